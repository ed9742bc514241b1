//! The thread that asks the guest's kernel: what the guest freed is dropped instead of paged, and what it used
//! least lately leaves first.
//!
//! ```text
//!   kernel found, and the one that runs ─► begin ─► what is unused? ─► drop it on servers
//!                                                       │
//!                                                       └─► protect what is here ─► the same kernel, and still
//!                                                           unused? ─► drop it
//! ```
//!
//! What the kernel is asked lies in pages that may be elsewhere: they are fetched, unless all of them would take more than
//! a share of what may be here; what was read once is kept. Guests whose kernel cannot be looked into are paged by their
//! faults alone.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fctrans::error::IntrospectError;
use fctrans::kernel::Kernel;
use fctrans::memory::{Gpa, LiveMemory, PhysicalMemory, RamRange, range_of};
use migrate_core::pageset::PageSet;
use migrate_core::remote::ReclaimDone;
use parking_lot::Mutex;
use qemu_glue::qmp::Client;
use qemu_glue::vm::{self, GpaRange, Processor};
use tokio::runtime::Handle;

use super::Shared;
use super::faults::{Command, FaultHandle};
use super::keeper::LOCKED_PAGES;
use crate::blocking::join;
use crate::error::EngineError;
use crate::resets::Resets;

/// How often the kernel is asked while nothing has to leave.
const EVERY: Duration = Duration::from_secs(2);

/// Shortest pause between two times, where pages leave that might have been freed instead.
const SOONEST: Duration = Duration::from_millis(500);

/// And the pause in times of what asking took, so that it takes little of a processor.
const PAUSE_TIMES: u32 = 10;

/// How long nothing is asked after it could not be, at first. Twice as long each time after that: what is fetched in vain
/// takes room from what the guest uses.
const AGAIN_AFTER: Duration = Duration::from_secs(10);

/// And at most.
const AGAIN_AFTER_MAX: Duration = Duration::from_secs(320);

/// Longest wait for QEMU to tell where the processors are.
const PROCESSORS_WITHIN: Duration = Duration::from_secs(5);

/// Pages that are dropped here at a time.
const DROP_PAGES: usize = 4096;

/// Pages that one page of the kernel's descriptions is about, in x86-64.
const DESCRIBED_PAGES: u64 = 64;

/// The part of what may be here that is fetched at most to ask the kernel once.
const FETCHED_SHARE: u64 = 8;

/// Longest wait for pages that were asked for.
const FETCHED_WITHIN: Duration = Duration::from_secs(1);

/// How often it is looked whether they came.
const LOOK_EVERY: Duration = Duration::from_micros(200);

/// How often the thread looks whether it is to end.
const TICK: Duration = Duration::from_millis(50);

/// The thread's owner. Dropping it waits for the thread, which was told to end.
#[derive(Debug)]
pub(super) struct ReclaimThread(Option<JoinHandle<()>>);

impl ReclaimThread {
    /// Begins to ask the guest's kernel, from time to time.
    pub(super) fn start(
        shared: Arc<Shared>,
        guest_physical: &[GpaRange],
        client: Client,
        runtime: Handle,
        faults: FaultHandle,
    ) -> Self {
        let memory = PagedMemory {
            live: LiveMemory::new(Arc::clone(&shared.ram), guest_physical),
            read: Mutex::new(PageSet::new(shared.layout().pages())),
            shared: Arc::clone(&shared),
            faults: faults.clone(),
            left_pages: AtomicU64::new(0),
        };
        let resets = Resets::watch(&client);
        let mut reclaimer = Reclaimer {
            shared,
            memory,
            client,
            resets,
            runtime,
            faults,
            kernel: None,
            variable: None,
            again_after: AGAIN_AFTER,
        };
        Self(Some(thread::spawn(move || reclaimer.run())))
    }
}

impl Drop for ReclaimThread {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            join(thread, None);
        }
    }
}

/// Guest memory, of which some is fetched to be read.
#[derive(Debug)]
struct PagedMemory {
    live: LiveMemory,
    shared: Arc<Shared>,
    faults: FaultHandle,
    /// Pages that were read.
    read: Mutex<PageSet>,
    /// Pages that may still be fetched.
    left_pages: AtomicU64,
}

impl PagedMemory {
    /// Most pages that are fetched at a time.
    fn most(&self) -> u64 {
        self.shared.split.resident_pages / FETCHED_SHARE
    }

    /// Allows so many pages to be fetched from now on.
    fn allow(&self, pages: u64) {
        self.left_pages.store(pages, Ordering::Relaxed);
    }

    /// Has pages come that are elsewhere.
    ///
    /// # Errors
    /// [`IntrospectError::Elsewhere`] if they do not, or may not.
    fn bring(&self, pages: &Range<u64>) -> Result<(), IntrospectError> {
        let began = Instant::now();
        loop {
            let mut remote = self.shared.remote.lock();
            let Some(page) = pages.clone().find(|page| !remote.is_here(*page)) else {
                return Ok(());
            };
            let left = self.left_pages.load(Ordering::Relaxed);
            let is_over = self.shared.is_over.load(Ordering::Acquire);
            if left == 0 || is_over || began.elapsed() > FETCHED_WITHIN {
                return Err(IntrospectError::Elsewhere { page });
            }
            let fetches = remote.fetch_to_read(pages.clone());
            drop(remote);
            if !fetches.is_empty() {
                let asked = fetches.iter().flat_map(|fetch| fetch.runs.iter().cloned().flatten());
                self.left_pages.store(left.saturating_sub(asked.count() as u64), Ordering::Relaxed);
                self.faults.tell(Command::Fetch(fetches));
            }
            thread::sleep(LOOK_EVERY);
        }
    }
}

impl PhysicalMemory for PagedMemory {
    fn ranges(&self) -> &[RamRange] {
        self.live.ranges()
    }

    fn pages(&self) -> u64 {
        self.live.pages()
    }

    fn read(&self, at: Gpa, buffer: &mut [u8]) -> Result<(), IntrospectError> {
        let bytes = buffer.len() as u64;
        let range = range_of(self.ranges(), at, bytes).ok_or(IntrospectError::NoRam { at })?;
        let page = |at: u64| range.page(at / migrate_core::layout::PAGE_BYTES as u64);
        let pages = page(at.0)..page(at.0 + bytes.max(1) - 1) + 1;
        self.read.lock().insert_range(pages.clone());
        self.bring(&pages)?;
        // Under the lock, so that none goes away meanwhile.
        let remote = self.shared.remote.lock();
        if let Some(page) = pages.clone().find(|page| !remote.is_here(*page)) {
            return Err(IntrospectError::Elsewhere { page });
        }
        let read = self.live.read(at, buffer);
        drop(remote);
        read
    }

    fn data(&self) -> Result<PageSet, IntrospectError> {
        self.live.data()
    }
}

#[derive(Debug)]
struct Reclaimer {
    shared: Arc<Shared>,
    memory: PagedMemory,
    client: Client,
    resets: Resets,
    runtime: Handle,
    faults: FaultHandle,
    kernel: Option<Kernel>,
    /// Where the guest's kernel was found before.
    variable: Option<u64>,
    /// How long nothing is asked if the kernel cannot be asked next.
    again_after: Duration,
}

impl Reclaimer {
    fn run(&mut self) {
        let shared = Arc::clone(&self.shared);
        let evicted = || shared.remote.lock().evicted_pages();
        let (mut next, mut soonest, mut evicted_then) = (Instant::now(), Instant::now(), 0);
        while !self.is_over() {
            thread::sleep(TICK);
            let now = Instant::now();
            // Another kernel begins, which may tell something.
            if self.kernel.is_none() && self.resets.happened() {
                self.again_after = AGAIN_AFTER;
                next = next.min(now + AGAIN_AFTER);
                soonest = next;
            }
            let is_due = now >= next || now >= soonest && evicted() > evicted_then;
            if !is_due || shared.is_merging.load(Ordering::Acquire) {
                continue;
            }
            next = now + EVERY;
            evicted_then = evicted();
            let _asking = shared.asking.lock();
            if shared.is_leaving.load(Ordering::Acquire) {
                continue;
            }
            let asked = self.ask();
            let ended = Instant::now();
            soonest = ended + (ended - now).saturating_mul(PAUSE_TIMES).max(SOONEST);
            next = next.max(soonest);
            match asked {
                Ok(()) => self.again_after = AGAIN_AFTER,
                Err(error) => {
                    tracing::info!(error = %error.tell(), "the guest's kernel tells nothing");
                    self.kernel = None;
                    next = ended + self.again_after;
                    soonest = next;
                    self.again_after = (self.again_after * 2).min(AGAIN_AFTER_MAX);
                }
            }
        }
    }

    fn is_over(&self) -> bool {
        self.shared.is_over.load(Ordering::Acquire)
    }

    fn ask(&mut self) -> Result<(), EngineError> {
        self.memory.read.lock().clear();
        let kernel = match self.kernel.take().filter(|_| !self.resets.happened()) {
            Some(kernel) => kernel,
            None => {
                self.memory.allow(self.memory.most());
                self.find()?
            }
        };
        self.variable = kernel.variable();
        // Some of the descriptions say nothing.
        let described = self.memory.pages() / DESCRIBED_PAGES;
        self.memory.allow(if described > self.memory.most() { 0 } else { described });
        kernel.check(&self.memory, &self.processors()?)?;
        self.shared.remote.lock().begin_reclaim();
        let usage = kernel.usage(&self.memory);
        let none = || PageSet::new(self.memory.pages());
        let mut unused = usage.as_ref().map_or_else(|_| none(), |usage| usage.unused());
        // A guest that was reset meanwhile writes where the kernel before had nothing.
        let was_reset = self.resets.happened();
        if was_reset {
            unused = none();
        }
        let dropped: u64 = self.shared.remote.lock().reclaim_remote(&unused).iter().sum();
        usage?;
        if was_reset {
            return Ok(());
        }
        if dropped > 0 {
            tracing::debug!(dropped, "copies of what the guest freed");
            self.shared.keeper.notify_one();
        }
        self.set_cold(&kernel, &unused)?;
        self.drop_resident(&kernel, &unused)?;
        self.kernel = Some(kernel);
        Ok(())
    }

    /// A kernel that does not fill what it frees.
    fn find(&self) -> Result<Kernel, EngineError> {
        let kernel = Kernel::find_again(&self.memory, &self.processors()?, self.variable)?;
        kernel.check_unfilled(&self.memory)?;
        Ok(kernel)
    }

    fn processors(&self) -> Result<Vec<Processor>, EngineError> {
        let asked =
            async { tokio::time::timeout(PROCESSORS_WITHIN, vm::processors(&self.client)).await };
        let late = |_| EngineError::TooSlow {
            wanted: "where the processors are",
            seconds: PROCESSORS_WITHIN.as_secs(),
        };
        Ok(self.runtime.block_on(asked).map_err(late)??)
    }

    /// What was not used lately leaves first; what was read here stays.
    fn set_cold(&self, kernel: &Kernel, unused: &PageSet) -> Result<(), EngineError> {
        let cold = kernel.working_set(&self.memory, unused)?.map(|set| set.cold);
        let cold = cold.unwrap_or_else(|| PageSet::new(self.memory.pages()));
        let pinned = self.memory.read.lock().clone();
        self.shared.remote.lock().set_cold(&cold, &pinned);
        Ok(())
    }

    /// Drops what the guest freed and is here.
    fn drop_resident(&self, kernel: &Kernel, unused: &PageSet) -> Result<(), EngineError> {
        let shared = &self.shared;
        let mut left = unused.clone();
        while !self.is_over() {
            let pages = {
                let mut remote = shared.remote.lock();
                let pages = remote.reclaim_candidates(&left, DROP_PAGES);
                shared.protect(&pages, true)?;
                pages
            };
            if pages.is_empty() {
                return Ok(());
            }
            let mut asked = PageSet::new(left.size());
            pages.iter().for_each(|page| asked.insert(*page));
            // A kernel that was started since they were protected cannot have written them unseen.
            let still = self.processors().and_then(|processors| {
                kernel.check(&self.memory, &processors)?;
                Ok(kernel.still_unused(&self.memory, &asked)?)
            });
            let was_reset = self.resets.happened();
            self.finish(&pages, still.as_ref().ok().filter(|_| !was_reset))?;
            still?;
            if was_reset {
                return Ok(());
            }
            left.subtract(&asked);
        }
        Ok(())
    }

    /// Drops those of the protected pages that are still unused.
    fn finish(&self, pages: &[u64], still: Option<&PageSet>) -> Result<(), EngineError> {
        let shared = &self.shared;
        let mut fetches = vec![];
        for pages in pages.chunks(LOCKED_PAGES) {
            let (mut gone, mut stay) = (vec![], vec![]);
            let mut remote = shared.remote.lock();
            for page in pages {
                let is_unused = still.is_some_and(|still| still.contains(*page));
                match remote.reclaim_done(*page, is_unused) {
                    ReclaimDone::Punch => gone.push(*page),
                    ReclaimDone::Unprotect => stay.push(*page),
                    ReclaimDone::Keep | ReclaimDone::Cancelled => {}
                }
            }
            shared.punch(&gone)?;
            shared.protect(&stay, false)?;
            shared.serve_waiting(&mut remote, &mut fetches)?;
        }
        if !fetches.is_empty() {
            self.faults.tell(Command::Fetch(fetches));
        }
        Ok(())
    }
}
