//! What the threads of a split guest's pager share, and what the journal is to say of it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use migrate_core::layout::{PAGE_BYTES, RamLayout};
use migrate_core::remote::{Remote, ServerPhase};
use parking_lot::{Condvar, Mutex, RwLock};
use qemu_glue::attach;
use qemu_glue::pager::Pager;
use qemu_glue::ram::GuestRam;
use tokio::sync::{Notify, mpsc, oneshot};
use transport::Identity;
use transport::messages::{Split, Store, Then};

use super::keeper::{Flushed, Order};
use super::leave::Wanted;
use super::traffic::Traffic;
use crate::error::EngineError;
use crate::journal::JournalError;
use crate::pager_socket::PagerState;

/// What the threads share.
#[derive(Debug)]
pub(super) struct Shared {
    /// The VM's name.
    pub(super) vm: String,
    pub(super) ram: Arc<GuestRam>,
    pub(super) pager: Pager,
    /// QEMU's own copy of the descriptor.
    pub(super) remote_fd: i32,
    pub(super) identity: Arc<Identity>,
    pub(super) options: transport::Options,
    /// As the guest came; of its stores, those that it had then.
    pub(super) split: Split,
    /// By the numbers of their servers, those included that it has no more.
    pub(super) stores: RwLock<Vec<Store>>,
    /// Where the journal differs from that.
    pub(super) listed: Mutex<Listed>,
    /// What the journal is to say of them.
    pub(super) notes: mpsc::UnboundedSender<Note>,
    /// One order is prepared at a time.
    pub(super) ordering: tokio::sync::Mutex<()>,
    /// For the keeper.
    pub(super) orders: Mutex<Vec<Order>>,
    pub(super) remote: Mutex<Remote>,
    pub(super) began: Instant,
    /// Wakes the keeper.
    pub(super) keeper: Condvar,
    /// Whether the threads are to end.
    pub(super) is_over: AtomicBool,
    /// Whether all memory is to come here.
    pub(super) is_merging: AtomicBool,
    /// Whether all of it has.
    pub(super) is_merged: AtomicBool,
    /// Whether the guest is about to leave for another main host.
    pub(super) is_leaving: AtomicBool,
    /// Whether it stands still for that.
    pub(super) is_still: AtomicBool,
    /// Whether nothing may change on servers: it is not decided whose they are.
    pub(super) is_held: AtomicBool,
    /// Whether the guest has run here, so that nobody else needs what was on servers before.
    pub(super) is_settled: AtomicBool,
    /// The keeper has this while it works.
    pub(super) keeping: Mutex<()>,
    /// And the asking thread this.
    pub(super) asking: Mutex<()>,
    /// Of the next pages that are put.
    pub(super) version: AtomicU64,
    pub(super) flushed: Flushed,
    /// Who asks for the guest to leave.
    pub(super) wanted: mpsc::Sender<Wanted>,
    /// Rings when the state changes.
    pub(super) changed: Notify,
    pub(super) traffic: Traffic,
    pub(super) failure: Mutex<Option<EngineError>>,
}

/// Servers that are in the journal and not among the guest's yet, and the other way round.
#[derive(Debug, Default)]
pub(super) struct Listed {
    pub(super) joining: Vec<Store>,
    pub(super) parting: BTreeSet<usize>,
}

/// Something that the journal is to say before the pager goes on.
#[derive(Debug)]
pub struct Note {
    /// Where the guest's memory is from now on.
    pub split: Split,
    /// Told once that is durable.
    pub noted: oneshot::Sender<Result<(), JournalError>>,
}

impl Shared {
    pub(super) fn now(&self) -> Duration {
        self.began.elapsed()
    }

    pub(super) fn layout(&self) -> &RamLayout {
        self.ram.layout()
    }

    /// The store on a server.
    pub(super) fn store(&self, server: usize) -> Option<Store> {
        self.stores.read().get(server).cloned()
    }

    /// The guest's stores, as the journal is to tell them now.
    pub(super) fn split_now(&self) -> Split {
        self.listed(&self.listed.lock())
    }

    fn listed(&self, Listed { joining, parting }: &Listed) -> Split {
        let stores = self.stores.read().clone();
        let gone = self.traffic.gone.lock().clone();
        let servers = self.remote.lock().stats().servers;
        let (mut there, mut drain) = (vec![], vec![]);
        for (number, (store, server)) in stores.into_iter().zip(servers).enumerate() {
            if gone.contains(&number) || parting.contains(&number) {
                continue;
            }
            if server.state == ServerPhase::Draining {
                drain.extend(u16::try_from(there.len()));
            }
            there.push(Store { reserve_pages: server.reserve_pages, ..store });
        }
        there.extend(joining.iter().cloned());
        let then = Then { merge: self.is_merging.load(Ordering::Acquire), drain };
        Split { stores: there, then, ..self.split.clone() }
    }

    /// All memory is to come here.
    ///
    /// # Errors
    /// [`EngineError::Misuse`] if the guest is about to leave, or has no room here.
    pub(super) fn begin_merge(&self) -> Result<(), EngineError> {
        let mut remote = self.remote.lock();
        if self.is_leaving.load(Ordering::Acquire) {
            return Err(EngineError::Misuse {
                what: "The guest is about to leave for another main host".into(),
                remedy: "Interrupt that, or merge it there".into(),
            });
        }
        if !self.is_merging.load(Ordering::Acquire) {
            check_room(&self.ram, remote.stats().remote_pages)?;
        }
        if !self.is_merging.swap(true, Ordering::AcqRel) {
            remote.begin_merge();
            drop(remote);
            // The next pager goes on with it. Should it not be noted, it has to be asked for again.
            drop(self.note());
            self.keeper.notify_all();
        }
        Ok(())
    }

    /// Has the journal say where the guest's memory is. The answer comes once that is durable; none if nobody keeps the
    /// journal.
    pub(super) fn note(&self) -> oneshot::Receiver<Result<(), JournalError>> {
        let (noted, answer) = oneshot::channel();
        // What is noted later is true later.
        let listed = self.listed.lock();
        let _unkept = self.notes.send(Note { split: self.listed(&listed), noted });
        answer
    }

    /// Has the keeper do something. One that has ended does nothing any more, and whoever waits for it is told so.
    pub(super) fn order(&self, order: Order) {
        self.orders.lock().push(order);
        if self.is_over.load(Ordering::Acquire) {
            self.orders.lock().clear();
        }
        self.keeper.notify_all();
    }

    /// These hosts have nothing to do with the guest's memory any more.
    pub(super) fn revoke(&self, hosts: impl IntoIterator<Item = String>) {
        for host in hosts.into_iter().filter(|host| host != self.identity.name()) {
            self.order(Order::Revoke(host));
        }
    }

    /// The state, for people.
    pub(super) fn state(&self) -> PagerState {
        if self.remote.lock().is_lost() {
            PagerState::Lost
        } else if self.is_merged.load(Ordering::Acquire) {
            PagerState::Merged
        } else if self.is_merging.load(Ordering::Acquire) {
            PagerState::Merging
        } else if self.is_leaving.load(Ordering::Acquire) {
            PagerState::Leaving
        } else {
            PagerState::Split
        }
    }

    /// Something keeps pages from being served.
    pub(super) fn fail(&self, error: EngineError) {
        self.failure.lock().get_or_insert(error);
        self.is_over.store(true, Ordering::Release);
        self.changed.notify_waiters();
    }

    pub(super) fn end_paging(&self) {
        if let Err(error) = self.pager.end() {
            tracing::warn!(%error, "paging was not ended in good order");
        }
        if let Err(error) = attach::close_descriptor(self.pager.pid(), self.remote_fd) {
            tracing::debug!(%error, "QEMU keeps a descriptor that is of no use any more");
        }
    }
}

/// Whether so many further pages have room here, which others may take meanwhile.
///
/// # Errors
/// [`EngineError::Misuse`] if they have not.
fn check_room(ram: &GuestRam, pages: u64) -> Result<(), EngineError> {
    let Some(room_bytes) = ram.room_bytes()? else { return Ok(()) };
    let needed_bytes = pages * PAGE_BYTES as u64;
    if needed_bytes <= room_bytes {
        return Ok(());
    }
    Err(EngineError::Misuse {
        what: format!(
            "{} MiB of the guest are elsewhere, and the file system of its memory has room for {}",
            needed_bytes >> 20,
            room_bytes >> 20
        ),
        remedy: "Enlarge it (mount -o remount,size=...), or merge the guest at another host (`migrate merge --to`)"
            .into(),
    })
}
