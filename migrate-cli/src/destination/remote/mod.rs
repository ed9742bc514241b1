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
mod prepare;
mod reclaim;
mod rescue;
mod socket;
mod traffic;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use migrate_core::layout::RamLayout;
use migrate_core::pageset::PageSet;
use migrate_core::remote::{Remote, RemoteConfig, ServerRoom};
use parking_lot::{Condvar, Mutex, RwLock};
use qemu_glue::attach;
use qemu_glue::pager::{Duty, Pager};
use qemu_glue::qmp::Client;
use qemu_glue::ram::GuestRam;
use qemu_glue::vm::VmInventory;
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, oneshot};
use transport::Identity;
use transport::messages::{Split, Store};

use self::faults::FaultThread;
use self::keeper::{KeeperThread, Order};
pub use self::prepare::Reached;
use self::reclaim::ReclaimThread;
pub use self::rescue::rescue;
use self::traffic::Traffic;
use crate::blocking::on_thread;
use crate::error::EngineError;
use crate::journal::JournalError;
use crate::pager_socket::PagerState;

/// Most pages that are fetched with the one that the guest waits for.
const READ_AHEAD_PAGES_MAX: u64 = 256;

/// Highest version of a page that a peer is believed: a guest comes to it in no lifetime, and there is room above it.
pub const VERSIONS_BELIEVED: u64 = 1 << 55;

/// How often QEMU is looked after.
const WATCH_EVERY: Duration = Duration::from_millis(200);

/// What the threads share.
#[derive(Debug)]
struct Shared {
    /// The VM's name.
    vm: String,
    ram: Arc<GuestRam>,
    pager: Pager,
    /// QEMU's own copy of the descriptor.
    remote_fd: i32,
    identity: Arc<Identity>,
    options: transport::Options,
    /// As the guest came; of its stores, those that it had then.
    split: Split,
    /// By the numbers of their servers, those included that it has no more.
    stores: RwLock<Vec<Store>>,
    /// What the journal is to say of them.
    notes: mpsc::UnboundedSender<Note>,
    /// One order is prepared at a time.
    ordering: tokio::sync::Mutex<()>,
    /// For the keeper.
    orders: Mutex<Vec<Order>>,
    remote: Mutex<Remote>,
    began: Instant,
    /// Wakes the keeper.
    keeper: Condvar,
    /// Whether the threads are to end.
    is_over: AtomicBool,
    /// Whether all memory is to come here.
    is_merging: AtomicBool,
    /// Whether all of it has.
    is_merged: AtomicBool,
    /// Rings when the state changes.
    changed: Notify,
    traffic: Traffic,
    failure: Mutex<Option<EngineError>>,
}

/// Something that the journal is to say before the pager goes on.
#[derive(Debug)]
pub struct Note {
    /// Where the guest's memory is from now on.
    pub split: Split,
    /// Told once that is durable.
    pub noted: oneshot::Sender<Result<(), JournalError>>,
}

/// The pager of a split guest.
#[derive(Debug)]
pub struct RemoteGuest {
    shared: Arc<Shared>,
    notes: mpsc::UnboundedReceiver<Note>,
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// All memory is here.
    Merged,
    /// QEMU is gone.
    Gone,
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
                    Self::begin(name, ram, paged, reached, version + 1)
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
            let config = config(&reached.split);
            let remote = Remote::new(ram.layout().pages(), config, &present, remote)?;
            let pager = Pager::resume(ram.identity().pid(), attached.uffd, &ram, Duty::Evict)?;
            let paged = (pager, attached.remote_fd, remote);
            Self::begin(name, ram, paged, reached, version + 1)
        });
        started.await?
    }

    fn begin(
        vm: String,
        ram: Arc<GuestRam>,
        (pager, remote_fd, remote): (Pager, i32, Remote),
        reached: Reached,
        version: u64,
    ) -> Result<Self, EngineError> {
        let Reached { split, identity, options, for_faults, for_keeper } = reached;
        let (notes, to_note) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            vm,
            ram,
            pager,
            remote_fd,
            identity,
            options,
            stores: RwLock::new(split.stores.clone()),
            split,
            notes,
            ordering: tokio::sync::Mutex::default(),
            orders: Mutex::default(),
            remote: Mutex::new(remote),
            began: Instant::now(),
            keeper: Condvar::new(),
            is_over: AtomicBool::new(false),
            is_merging: AtomicBool::new(false),
            is_merged: AtomicBool::new(false),
            changed: Notify::new(),
            traffic: Traffic::default(),
            failure: Mutex::new(None),
        });
        let faults = FaultThread::start(Arc::clone(&shared), for_faults)?;
        let clients = keeper::Clients { list: for_keeper, version };
        let keeper = KeeperThread::start(Arc::clone(&shared), clients, faults.handle());
        let (faults, keeper) = (Some(faults), Some(keeper));
        Ok(Self { shared, notes: to_note, faults, keeper, reclaim: None })
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

    /// Pages the guest until all of its memory is here or its QEMU is gone; answers on the socket meanwhile. What is
    /// on the servers is deleted then.
    ///
    /// # Errors
    /// If its faults can no longer be served; its threads wait then.
    pub async fn run(mut self, client: &Client, socket: PathBuf) -> Result<Ending, EngineError> {
        let answering = socket::serve(socket.clone(), Arc::clone(&self.shared));
        let ending = tokio::select! {
            ending = self.ended(client) => ending,
            error = answering => Err(error),
        };
        if let Err(error) = std::fs::remove_file(&socket) {
            tracing::debug!(%error, "socket not removed");
        }
        let ending = ending?;
        self.end().await;
        Ok(ending)
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

    /// Ends paging: every page is here, or the guest is not wanted. Its stores are deleted.
    pub async fn end(&mut self) {
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
            keeper::delete_stores(&shared.stores.read(), clients);
        });
        let _told_in_the_log = ended.await;
    }
}

/// Part of the guest's memory is lost: it must not go on. QEMU may not answer, as its threads wait for that memory;
/// then they stand still by themselves.
fn stop_lost(client: Client) {
    eprintln!("part of the guest's memory is lost with a memory server: the guest is stopped");
    tokio::spawn(async move {
        if let Err(error) = client.stop().await {
            tracing::warn!(%error, "QEMU was not stopped");
        }
    });
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

impl Shared {
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn layout(&self) -> &RamLayout {
        self.ram.layout()
    }

    /// The store on a server.
    fn store(&self, server: usize) -> Option<Store> {
        self.stores.read().get(server).cloned()
    }

    /// The guest's stores on servers that have not gone, `except` this one.
    fn split_now(&self, except: Option<usize>) -> Split {
        let gone = self.traffic.gone.lock();
        let stores = self.stores.read();
        let there = stores
            .iter()
            .enumerate()
            .filter(|(server, _)| !gone.contains(server) && Some(*server) != except);
        Split { stores: there.map(|(_, store)| store.clone()).collect(), ..self.split.clone() }
    }

    /// Has the journal say where the guest's memory is. The answer comes once that is durable; none if nobody keeps the
    /// journal.
    fn note(&self, split: Split) -> oneshot::Receiver<Result<(), JournalError>> {
        let (noted, answer) = oneshot::channel();
        let _unkept = self.notes.send(Note { split, noted });
        answer
    }

    /// The state, for people.
    fn state(&self) -> PagerState {
        if self.remote.lock().is_lost() {
            PagerState::Lost
        } else if self.is_merged.load(Ordering::Acquire) {
            PagerState::Merged
        } else if self.is_merging.load(Ordering::Acquire) {
            PagerState::Merging
        } else {
            PagerState::Split
        }
    }

    /// Something keeps pages from being served.
    fn fail(&self, error: EngineError) {
        self.failure.lock().get_or_insert(error);
        self.is_over.store(true, Ordering::Release);
        self.changed.notify_waiters();
    }

    fn end_paging(&self) {
        if let Err(error) = self.pager.end() {
            tracing::warn!(%error, "paging was not ended in good order");
        }
        if let Err(error) = attach::close_descriptor(self.pager.pid(), self.remote_fd) {
            tracing::debug!(%error, "QEMU keeps a descriptor that is of no use any more");
        }
    }
}
