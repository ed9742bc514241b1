//! A guest that runs here while part of its memory lies on memory servers: its pager.
//!
//! ```text
//!   fault thread ── fault ──► zeros, or asks a server ──► places what comes
//!   keeper thread ── over the low mark ──► protects, copies, puts, punches
//!                 ── from time to time ──► asks the guest's kernel what it freed, drops that
//!                 ── merge ──────────────► fetches everything
//!   socket ── migrate status, migrate merge
//! ```
//!
//! What to do is decided by [`migrate_core::remote::Remote`]; this carries it out. Invariant: what must be one with a
//! decision (placing, protecting, punching) is done while the decision's lock is held.
//!
//! The threads live as long as the guest is split. Should this process die, QEMU keeps a copy of the userfaultfd,
//! and the guest's threads wait.

mod act;
mod faults;
mod fragment;
mod keeper;
mod leave;
mod metrics;
mod prepare;
mod reclaim;
mod rescue;
mod shared;
mod socket;
mod traffic;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use migrate_core::pageset::PageSet;
use migrate_core::remote::{Remote, RemoteConfig, ServerRoom};
use parking_lot::{Condvar, Mutex, RwLock};
use qemu_glue::pager::{Duty, Pager};
use qemu_glue::qmp::Client;
use qemu_glue::ram::GuestRam;
use qemu_glue::vm::VmInventory;
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc};
use transport::messages::{Split, Store, Then};

use self::faults::FaultThread;
use self::keeper::{Flushed, KeeperThread, Order};
pub use self::leave::Home;
use self::leave::{Left, Wanted};
pub use self::metrics::{Watched, register_pagers};
pub use self::prepare::Reached;
use self::reclaim::ReclaimThread;
pub use self::rescue::rescue;
pub use self::shared::Note;
use self::shared::Shared;
use self::traffic::Traffic;
use crate::blocking::on_thread;
use crate::error::EngineError;
use crate::journal::Journal;
use crate::tell;

/// Most pages that are fetched with the one that the guest waits for.
const READ_AHEAD_PAGES_MAX: u64 = 256;

/// Highest version of a page that a peer is believed: a guest comes to it in no lifetime, and there is room above it.
const VERSIONS_BELIEVED: u64 = 1 << 55;

/// How long whoever asked for a guest to leave may take to hear that it has.
const HEARD_WITHIN: Duration = Duration::from_secs(2);

/// How often QEMU is looked after.
const WATCH_EVERY: Duration = Duration::from_millis(200);

/// The pager of a split guest.
#[derive(Debug)]
pub struct RemoteGuest {
    shared: Arc<Shared>,
    notes: mpsc::UnboundedReceiver<Note>,
    wanted: mpsc::Receiver<Wanted>,
    faults: Option<FaultThread>,
    keeper: Option<KeeperThread>,
    reclaim: Option<ReclaimThread>,
}

/// A userfaultfd to page with.
#[derive(Debug)]
pub struct Attached {
    /// The descriptor.
    pub uffd: OwnedFd,
    /// QEMU's own copy of it.
    pub remote_fd: i32,
}

/// How the paging of a guest came to its end.
#[derive(Debug)]
pub enum Ending {
    /// All memory is here.
    Merged,
    /// QEMU is gone.
    Gone,
    /// It runs at another main host. The journal of that may go once nothing says any more that it is paged here.
    Left(Box<Journal>),
}

impl RemoteGuest {
    /// Begins to page a guest of which `remote` pages are on the servers, by number, and the others here or nowhere.
    /// No page on a server has a higher version than `version`.
    ///
    /// # Errors
    /// What the pager says, or if there are more pages here than may be. Nothing is paged then.
    pub async fn start(
        name: String,
        ram: Arc<GuestRam>,
        attached: Attached,
        reached: Reached,
        (remote, version): (Vec<PageSet>, u64),
    ) -> Result<Self, EngineError> {
        let started = on_thread(move || {
            let config = config(&reached.split);
            // What is there from now on is known to be there: QEMU waits for everything else.
            let pager = Pager::start(ram.identity().pid(), attached.uffd, &ram, Duty::Evict)?;
            let placed = || -> Result<Remote, EngineError> {
                Ok(Remote::new(ram.layout().pages(), config, &ram.data_ranges()?, remote)?)
            };
            match placed() {
                Ok(remote) => {
                    let paged = (pager, attached.remote_fd, remote);
                    let is_held = reached.split.is_moved;
                    Self::begin(name, ram, paged, reached, (version + 1, is_held))
                }
                Err(error) => {
                    // The guest was not loaded: nobody waits for more than zeros.
                    let _ended = pager.end();
                    Err(error)
                }
            }
        });
        started.await?
    }

    /// Goes on with the paging of a guest whose pager died.
    ///
    /// # Errors
    /// What the pager or a server says; the guest's threads wait on.
    pub async fn take_over(
        name: String,
        ram: Arc<GuestRam>,
        attached: Attached,
        mut reached: Reached,
    ) -> Result<Self, EngineError> {
        let started = on_thread(move || {
            let present = ram.data_ranges()?;
            let (remote, version) = rescue::found(&mut reached, &present)?;
            let mut config = config(&reached.split);
            let limit_pages = config.resident_pages_max;
            // More than may be here, if it was being merged; more at a server than the journal knew of.
            config.resident_pages_max = limit_pages.max(present.len());
            for (room, held) in config.servers.iter_mut().zip(&remote) {
                room.reserve_pages = room.reserve_pages.max(held.len());
            }
            let mut remote = Remote::new(ram.layout().pages(), config, &present, remote)?;
            if reached.split.then.merge {
                remote.begin_merge();
            } else {
                remote.set_resident_pages_max(limit_pages)?;
            }
            let pager = Pager::resume(ram.identity().pid(), attached.uffd, &ram, Duty::Evict)?;
            let paged = (pager, attached.remote_fd, remote);
            Self::begin(name, ram, paged, reached, (version + 1, false))
        });
        started.await?
    }

    fn begin(
        vm: String,
        ram: Arc<GuestRam>,
        (pager, remote_fd, remote): (Pager, i32, Remote),
        reached: Reached,
        (version, is_held): (u64, bool),
    ) -> Result<Self, EngineError> {
        let Reached { split, identity, options, for_faults, for_keeper } = reached;
        let (notes, to_note) = mpsc::unbounded_channel();
        let (wanted, is_wanted) = mpsc::channel(1);
        // When its last pager died.
        let is_merging = !is_held && split.then.merge;
        let shared = Arc::new(Shared {
            vm,
            ram,
            pager,
            remote_fd,
            identity,
            options,
            stores: RwLock::new(split.stores.clone()),
            listed: Mutex::default(),
            split,
            notes,
            ordering: tokio::sync::Mutex::default(),
            orders: Mutex::default(),
            remote: Mutex::new(remote),
            began: Instant::now(),
            keeper: Condvar::new(),
            is_over: AtomicBool::new(false),
            is_merging: AtomicBool::new(is_merging),
            is_merged: AtomicBool::new(false),
            is_leaving: AtomicBool::new(false),
            is_still: AtomicBool::new(false),
            is_held: AtomicBool::new(is_held),
            is_settled: AtomicBool::new(!is_held),
            keeping: Mutex::default(),
            asking: Mutex::default(),
            version: AtomicU64::new(version),
            flushed: Flushed::default(),
            wanted,
            changed: Notify::new(),
            traffic: Traffic::default(),
            failure: Mutex::new(None),
        });
        // Whatever is noted from now on says so.
        for server in &shared.split.then.drain {
            shared.remote.lock().drain(usize::from(*server));
        }
        let faults = FaultThread::start(Arc::clone(&shared), for_faults)?;
        let keeper = KeeperThread::start(Arc::clone(&shared), for_keeper, faults.handle());
        let (faults, keeper) = (Some(faults), Some(keeper));
        Ok(Self { shared, notes: to_note, wanted: is_wanted, faults, keeper, reclaim: None })
    }

    /// The guest runs: its kernel is asked from now on.
    pub fn begin_to_ask(&mut self, client: &Client, vm: &VmInventory) {
        let Some(faults) = &self.faults else { return };
        let (shared, runtime) = (Arc::clone(&self.shared), Handle::current());
        let memory = &vm.guest_physical;
        let asking = ReclaimThread::start(shared, memory, client.clone(), runtime, faults.handle());
        self.reclaim = Some(asking);
    }

    /// What the journal is to say, once.
    pub fn take_notes(&mut self) -> mpsc::UnboundedReceiver<Note> {
        std::mem::replace(&mut self.notes, mpsc::unbounded_channel().1)
    }

    /// The guest belongs here and is about to run: from now on pages leave for servers.
    pub fn own(&self) {
        self.shared.is_held.store(false, Ordering::Release);
        self.shared.keeper.notify_all();
    }

    /// The guest runs: does what it came with, and lets none of `others` at its memory any more, which were its hosts or
    /// were to be.
    pub fn settle(&self, others: impl IntoIterator<Item = String>) {
        self.own();
        let shared = &self.shared;
        shared.is_settled.store(true, Ordering::Release);
        shared.revoke(others);
        let Then { merge, drain } = &shared.split.then;
        for server in drain {
            shared.order(Order::Part(usize::from(*server)));
        }
        if *merge && let Err(error) = shared.begin_merge() {
            tell!("the guest stays split: {}", error.tell());
        }
    }

    /// Pages the guest until all of its memory is here, it has left, or its QEMU is gone; answers on the socket
    /// meanwhile. What is on the servers is deleted then, unless it has left.
    ///
    /// # Errors
    /// If its faults can no longer be served; its threads wait then. [`EngineError::InDoubt`] if it is not known
    /// whether it has left.
    pub async fn run(mut self, client: &Client, home: &Home) -> Result<Ending, EngineError> {
        home.watched.begin(&self.shared);
        let answering = socket::serve(home.socket.clone(), Arc::clone(&self.shared));
        let mut wanted = std::mem::replace(&mut self.wanted, mpsc::channel(1).1);
        let paged = async {
            loop {
                tokio::select! {
                    ending = self.ended(client) => return ending,
                    Some(wanted) = wanted.recv() => {
                        if let Some(ending) = self.let_go(client, home, wanted).await? {
                            return Ok(ending);
                        }
                    }
                }
            }
        };
        let ending = tokio::select! {
            ending = paged => ending,
            error = answering => Err(error),
        };
        if let Err(error) = std::fs::remove_file(&home.socket) {
            tracing::debug!(%error, "socket not removed");
        }
        let ending = ending?;
        match &ending {
            Ending::Left(_) => self.stop(),
            Ending::Merged | Ending::Gone => self.end(true).await,
        }
        Ok(ending)
    }

    /// Lets the guest go; tells who asked for that.
    async fn let_go(
        &self,
        client: &Client,
        home: &Home,
        wanted: Wanted,
    ) -> Result<Option<Ending>, EngineError> {
        let Wanted { asked, mut cancel, done } = wanted;
        let (left, report) = leave::leave(&self.shared, client, home, &asked, &mut cancel).await;
        let error = report.error.as_ref().map(|error| error.message.clone());
        let _gone = done.send(Box::new(report));
        // Whoever asked has heard it when it leaves.
        if !matches!(left, Left::Here) {
            let _gone_anyway = tokio::time::timeout(HEARD_WITHIN, cancel.requested()).await;
        }
        match left {
            Left::Gone(journal) => Ok(Some(Ending::Left(journal))),
            Left::Here => {
                tell!("the guest stays here: {}", error.unwrap_or_default());
                Ok(None)
            }
            Left::InDoubt => Err(EngineError::InDoubt { qmp: home.common.qmp.clone() }),
        }
    }

    async fn ended(&self, client: &Client) -> Result<Ending, EngineError> {
        let shared = &self.shared;
        let mut is_stopped = false;
        loop {
            let changed = shared.changed.notified();
            // Its monitor may be gone, and something may have failed, because it is.
            if shared.ram.identity().check().is_err() {
                return Ok(Ending::Gone);
            }
            if let Some(error) = shared.failure.lock().take() {
                return Err(error);
            }
            if shared.is_merged.load(Ordering::Acquire) {
                return Ok(Ending::Merged);
            }
            if !is_stopped && shared.remote.lock().is_lost() {
                is_stopped = true;
                stop_lost(client.clone());
            }
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep(WATCH_EVERY) => {}
            }
        }
    }

    /// Ends paging: every page is here, or the guest is not wanted. Its stores are deleted if they are its own.
    pub async fn end(&mut self, is_own: bool) {
        self.shared.is_over.store(true, Ordering::Release);
        self.shared.keeper.notify_all();
        let (shared, faults, keeper) =
            (Arc::clone(&self.shared), self.faults.take(), self.keeper.take());
        let reclaim = self.reclaim.take();
        let ended = on_thread(move || {
            drop(reclaim);
            // Its connections delete the stores, when no page is wanted any more.
            let clients = keeper.map(KeeperThread::stop).unwrap_or_default();
            drop(faults);
            shared.end_paging();
            if is_own || !shared.split.is_moved {
                keeper::delete_stores(&shared.stores.read(), clients);
            }
        });
        let _told_in_the_log = ended.await;
    }

    /// The guest is gone, its stores with it.
    fn stop(&self) {
        self.shared.is_over.store(true, Ordering::Release);
        self.shared.keeper.notify_all();
    }
}

/// Part of the guest's memory is lost: it must not go on. QEMU may not answer, as its threads wait for that memory;
/// then they stand still by themselves.
fn stop_lost(client: Client) {
    tell!("part of the guest's memory is lost with a memory server: the guest is stopped");
    tokio::spawn(async move {
        if let Err(error) = client.stop().await {
            tracing::warn!(%error, "QEMU was not stopped");
        }
    });
}

/// Refuses a version of a page that no guest comes to.
///
/// # Errors
/// [`EngineError::Contradiction`].
pub fn check_version(version: u64) -> Result<(), EngineError> {
    if version <= VERSIONS_BELIEVED {
        return Ok(());
    }
    Err(EngineError::Contradiction(format!("that a page has version {version}")))
}

fn config(split: &Split) -> RemoteConfig {
    let window = Duration::from_millis(split.direct_io_window_ms.into());
    let room = |store: &Store| ServerRoom { reserve_pages: store.reserve_pages };
    RemoteConfig {
        resident_pages_max: split.resident_pages,
        copies: usize::from(split.copies),
        servers: split.stores.iter().map(room).collect(),
        read_ahead_pages_max: READ_AHEAD_PAGES_MAX,
        direct_io_window: (!window.is_zero()).then_some(window),
    }
}
