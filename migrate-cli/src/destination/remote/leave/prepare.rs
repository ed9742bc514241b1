//! Before a split guest leaves: its new main host is reached, and there is room for all of it on the servers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use migrate_core::layout::PAGE_BYTES;
use migrate_core::remote::ServerPhase;
use qemu_glue::qmp::Client;
use transport::Options;
use transport::messages::{FEATURE_SPLIT, Message, Split, Then};

use super::super::keeper::Order;
use super::super::{Shared, fragment};
use super::{Cancel, Home, Leaving};
use crate::args::{CommonArgs, Mode};
use crate::error::EngineError;
use crate::pager_socket::{Leave, PagerState};
use crate::source::contact::Contact;
use crate::source::gate::Gate;
use crate::source::link::Link;
use crate::source::prepare::{self, Accepted, Asked};
use crate::source::{early, recover};

/// Longest wait for the destination to reach the memory servers.
const PREPARED_WITHIN: Duration = Duration::from_secs(30);

/// Everything up to the journal.
///
/// # Errors
/// What keeps the guest from leaving: nothing was touched but rooms on servers.
pub(super) async fn begin<'a>(
    shared: &'a Arc<Shared>,
    client: &Client,
    home: &Home,
    asked: &'a Leave,
    cancel: &mut Cancel,
) -> Result<Leaving<'a>, EngineError> {
    let others = recover::before_leaving(client, &home.common).await?;
    shared.revoke(others);
    let guest = prepare::paged_guest(client.clone(), Arc::clone(&shared.ram)).await?;
    let addr = prepare::resolve_address(&asked.to).await?;
    let migration = prepare::new_migration()?;
    let common = CommonArgs { peer: asked.peer.clone(), ..home.common.clone() };
    let options = Options {
        features: FEATURE_SPLIT,
        ..prepare::options(&common, prepare::lanes(None, Mode::PreCopy))
    };
    let wanted = Asked { verify: false, mode: Mode::PreCopy };
    let accepted = prepare::accepted(addr, &shared.identity, &options, migration, &guest, wanted);
    let accepted = cancel.unless(accepted).await?;
    let Accepted { session, urgent: _ } = accepted;
    let (closer, peer) = (session.closer.clone(), session.peer.name.clone());
    let gate = Arc::new(Gate::new(None));
    let mut link =
        Link::start(session.control_sender, session.control_receiver, gate, Instant::now());
    let recorded = async {
        if session.selected.features & FEATURE_SPLIT == 0 {
            return Err(EngineError::Misuse {
                what: "The destination's engine takes no guests whose memory is split".into(),
                remedy: "Update it there".into(),
            });
        }
        // None of these is left half done.
        for addr in asked.memory.iter().flatten() {
            cancel.check()?;
            fragment::take_in(shared, *addr).await?;
        }
        fragment::reserve_for_flush(shared).await?;
        cancel.check()?;
        fragment::grant(shared, &peer).await?;
        let told = told(shared, asked)?;
        link.send(Message::Split(told.clone())).await?;
        let prepared = early::prepared(&mut link, "that it is prepared", PREPARED_WITHIN);
        cancel.unless(prepared).await?;
        let journal = prepare::journal(&common, &asked.to, false, &guest.vm, migration, &peer)?;
        Ok((told, journal))
    };
    let (told, journal) = match recorded.await {
        Ok(recorded) => recorded,
        Err(error) => {
            closer.close(transport::close_code::ABORTED, &error.tell()).await;
            shared.revoke([peer]);
            return Err(error);
        }
    };
    let contact = Contact {
        addr,
        identity: Arc::clone(&shared.identity),
        // Whoever else of the authority answers at this address later is not believed.
        options: Options { expected_peer: Some(peer), ..options },
        migration,
        session: Some((link, closer.clone())),
        resume: guest.vm.status.running,
        running_at: None,
    };
    Ok(Leaving { shared, asked, told, guest, contact, journal, closer, lanes: session.lanes })
}

/// What the new main host is told of the guest's memory.
fn told(shared: &Shared, asked: &Leave) -> Result<Split, EngineError> {
    let split = shared.split_now();
    let stays = |address: &str| {
        let address: Option<SocketAddr> = address.parse().ok();
        let wanted = asked.memory.as_ref();
        wanted.is_none_or(|wanted| address.is_none_or(|address| wanted.contains(&address)))
    };
    let leaves = |number: u16, address: &str| !stays(address) || split.then.drain.contains(&number);
    let numbers = (0u16..).zip(&split.stores);
    let drain: Vec<u16> = match asked.merge {
        true => vec![],
        false => numbers
            .filter(|(number, store)| leaves(*number, &store.address))
            .map(|(number, _)| number)
            .collect(),
    };
    if split.stores.len() < usize::from(split.copies) + drain.len() {
        return Err(EngineError::Misuse {
            what: format!("{} copies of each page need as many memory servers", split.copies),
            remedy: "Name another one by --memory".into(),
        });
    }
    let page = PAGE_BYTES as u64;
    let resident_pages =
        asked.resident_bytes.map_or(split.resident_pages, |bytes| bytes / page).max(1);
    let then = Then { merge: asked.merge, drain };
    Ok(Split { resident_pages, is_moved: true, then, ..split })
}

/// Rooms on servers as they were before a guest was to leave.
pub(super) struct Rooms(Vec<u64>);

impl Shared {
    /// From now on the guest is about to leave: it is neither merged nor are its servers emptied meanwhile.
    ///
    /// # Errors
    /// [`EngineError::Misuse`] if it cannot.
    pub(super) fn begin_leaving(&self) -> Result<Rooms, EngineError> {
        let state = self.state();
        let remote = self.remote.lock();
        // Merging begins under the same lock.
        if state != PagerState::Split || self.is_merging.load(Ordering::Acquire) {
            return Err(EngineError::Misuse {
                what: format!("The guest's memory is {state}"),
                remedy: "Only a guest that is split and at peace can leave".into(),
            });
        }
        self.is_leaving.store(true, Ordering::Release);
        Ok(Rooms(remote.stats().servers.iter().map(|server| server.reserve_pages).collect()))
    }

    /// The guest stays here, and whatever was done for its leaving is over.
    pub(super) fn end_leaving(&self, Rooms(rooms): Rooms) {
        self.page_on();
        let servers = self.remote.lock().stats().servers;
        for (number, (server, before)) in servers.iter().zip(rooms).enumerate() {
            // What is in use by now cannot be given back. Nobody waits for it.
            let wanted = before.max(server.pages + server.stale_pages);
            let (obeyed, _) = tokio::sync::oneshot::channel();
            if server.state != ServerPhase::Gone {
                self.order(Order::Reserve(number, wanted, obeyed));
            }
        }
        self.is_leaving.store(false, Ordering::Release);
        self.keeper.notify_all();
    }

    /// The guest is about to run here again.
    pub(super) fn page_on(&self) {
        let mut remote = self.remote.lock();
        remote.resumed();
        remote.end_flush();
        drop(remote);
        self.is_still.store(false, Ordering::Release);
        self.is_held.store(false, Ordering::Release);
        self.keeper.notify_all();
    }
}
