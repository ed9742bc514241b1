//! Post-copy at the destination: what becomes of the page faults of a guest that runs while pages of it
//! are still at the source.
//!
//! ```text
//!   fault thread ── fault ── missing ──► to be asked for
//!                     └───── zeros ────► placed here
//!   lanes ─────────────────────────────► placed, who waits is woken
//! ```
//!
//! What to do is decided by [`migrate_core::postcopy::Fetch`]. Invariant: a page counts as arrived and is
//! placed under one lock, so that a fault on it is never answered with zeros before its content is there.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::time::Instant;

use migrate_core::layout::{PAGE_BYTES, PageIndex, RamLayout};
use migrate_core::pageset::PageSet;
use migrate_core::postcopy::{FaultAction, Fetch, FetchStats, PostcopyError};
use parking_lot::{Mutex, MutexGuard};
use qemu_glue::attach;
use qemu_glue::pager::{Fault, Pager};
use tokio::sync::Notify;
use transport::messages::FaultStats;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::error::EngineError;

/// Pages that are placed before a fault may be looked at again.
const PLACE_PAGES: u64 = 16;

#[derive(Debug)]
struct State {
    /// Nothing as long as it is not known what is missing.
    fetch: Option<Fetch>,
    /// Faults from before that.
    early: Vec<PageIndex>,
    /// Parts of host pages that are not complete, by their first page.
    parts: HashMap<u64, Vec<u8>>,
    /// Seed and digests of what arrived, if the source wants them.
    digests: Option<(u64, BTreeMap<u64, u64>)>,
}

/// Decides about faults and places pages, whatever session they come over.
#[derive(Debug)]
pub struct Fetcher {
    layout: RamLayout,
    pager: Pager,
    /// QEMU's own copy of the descriptor.
    remote_fd: i32,
    began: Instant,
    state: Mutex<State>,
    changed: Notify,
}

impl Fetcher {
    /// A fetcher of pages that `pager` finds missing; `missing` may become known later.
    ///
    /// # Errors
    /// [`EngineError::Postcopy`] if the set does not fit the guest.
    pub fn new(
        pager: Pager,
        remote_fd: i32,
        missing: Option<PageSet>,
        verify_seed: Option<u64>,
    ) -> Result<Self, EngineError> {
        let layout = pager.layout().clone();
        let fetch = missing.map(|missing| Fetch::new(&layout, missing)).transpose()?;
        let state = State {
            fetch,
            early: vec![],
            parts: HashMap::new(),
            digests: verify_seed.map(|seed| (seed, BTreeMap::new())),
        };
        let (began, changed) = (Instant::now(), Notify::new());
        Ok(Self { layout, pager, remote_fd, began, state: Mutex::new(state), changed })
    }

    /// The guest's memory, and where its faults are read.
    pub fn pager(&self) -> &Pager {
        &self.pager
    }

    /// Decides about a fault; returns the page to ask for.
    ///
    /// # Errors
    /// If the page is none of the guest's, or the pager's.
    pub fn fault(&self, fault: Fault) -> Result<Option<PageIndex>, EngineError> {
        let now = self.began.elapsed();
        let mut state = self.state.lock();
        let Some(fetch) = &mut state.fetch else {
            state.early.push(fault.page);
            return Ok(None);
        };
        match fetch.fault(fault.page, now)? {
            FaultAction::Ask(page) => return Ok(Some(page)),
            FaultAction::Wait => {}
            FaultAction::Zeros(host) | FaultAction::Present(host) => {
                self.pager.place_zeros(PageIndex(host.start), host.end - host.start)?;
            }
        }
        Ok(None)
    }

    /// The pages in place, of a guest whose pager was taken over.
    ///
    /// # Errors
    /// If the memory cannot be looked at.
    pub fn present(&self) -> Result<PageSet, EngineError> {
        Ok(self.pager.present()?)
    }

    /// Whether it is known what is missing.
    pub fn knows_missing(&self) -> bool {
        self.state.lock().fetch.is_some()
    }

    /// From now on it is known that these pages are `missing`. What is to be asked for
    /// [`Self::reconnected`] tells.
    ///
    /// # Errors
    /// [`EngineError::Postcopy`] if the set does not fit the guest.
    pub fn set_missing(&self, missing: PageSet) -> Result<(), EngineError> {
        let fetch = Fetch::new(&self.layout, missing)?;
        let early = {
            let mut state = self.state.lock();
            state.fetch = Some(fetch);
            std::mem::take(&mut state.early)
        };
        for page in early {
            let _asked_on_the_next_route =
                self.fault(Fault { page, pages: 1, is_write: false, is_protected: false })?;
        }
        self.changed.notify_waiters();
        Ok(())
    }

    /// What is still missing.
    pub fn still_missing(&self) -> Option<PageSet> {
        self.state.lock().fetch.as_ref().map(|fetch| fetch.still_missing().clone())
    }

    /// There is another session: what to ask for in it that was asked for before.
    pub fn reconnected(&self) -> Vec<PageIndex> {
        let mut state = self.state.lock();
        state.parts.clear();
        state.fetch.as_mut().map(Fetch::reconnected).unwrap_or_default()
    }

    /// Puts pages in place that came from the source: their contents, or zeros.
    ///
    /// # Errors
    /// [`EngineError::Postcopy`] for pages that are not missing, or what the pager says.
    pub fn place(&self, run: &Range<u64>, content: Option<&[u8]>) -> Result<(), EngineError> {
        let outside = PostcopyError::UnexpectedPage(PageIndex(run.start));
        if run.end > self.layout.pages() {
            return Err(outside.into());
        }
        for (part, pages) in self.layout.split(PageIndex(run.start), run.end - run.start) {
            let mut first = part.0;
            while first < part.0 + pages {
                let host = self.layout.host_page(PageIndex(first)).unwrap_or(first..first + 1);
                let step = if host.end - host.start == 1 { first + PLACE_PAGES } else { host.end };
                let end = step.min(part.0 + pages);
                let at = (first - run.start) as usize * PAGE_BYTES;
                let bytes = (end - first) as usize * PAGE_BYTES;
                let content = content.map(|all| all.get(at..at + bytes).unwrap_or_default());
                self.place_step(first..end, &host, content)?;
                first = end;
            }
        }
        if self.is_complete() {
            self.changed.notify_waiters();
        }
        Ok(())
    }

    fn place_step(
        &self,
        run: Range<u64>,
        host: &Range<u64>,
        content: Option<&[u8]>,
    ) -> Result<(), EngineError> {
        let mut state = self.state.lock();
        let State { fetch, parts, digests, .. } = &mut *state;
        let fetch = fetch
            .as_mut()
            .ok_or(EngineError::OutOfPlace { got: "a missing page", wanted: "what is missing" })?;
        if let Some((seed, digests)) = digests {
            note_digests(*seed, digests, &run, content);
        }
        if host.end - host.start > 1 {
            let lacks = fetch.still_missing().contains(host.start);
            let arrival = fetch.arrived(run.clone())?;
            if !lacks {
                return Ok(());
            }
            let bytes = (host.end - host.start) as usize * PAGE_BYTES;
            let part = parts.entry(host.start).or_insert_with(|| vec![0; bytes]);
            let at = (run.start - host.start) as usize * PAGE_BYTES;
            let place = part.get_mut(at..).unwrap_or_default();
            for (place, byte) in place.iter_mut().zip(content.unwrap_or_default()) {
                *place = *byte;
            }
            for host in &arrival.complete {
                let content = parts.remove(&host.start).unwrap_or_default();
                self.pager.place(PageIndex(host.start), &content)?;
            }
            fetch.woken(&arrival, self.began.elapsed());
            return Ok(());
        }
        // Asked before they count as arrived, and only where it matters.
        let waits = content.is_none() && run.clone().any(|page| fetch.waits_for(PageIndex(page)));
        let arrival = fetch.arrived(run.clone())?;
        for done in &arrival.complete {
            match content {
                Some(content) => {
                    let at = |page: u64| (page - run.start) as usize * PAGE_BYTES;
                    let content = content.get(at(done.start)..at(done.end)).unwrap_or_default();
                    self.pager.place(PageIndex(done.start), content)?;
                }
                // Nobody waits: it reads as zeros once it is touched.
                None if !waits => {}
                None => {
                    self.pager.place_zeros(PageIndex(done.start), done.end - done.start)?;
                }
            }
        }
        fetch.woken(&arrival, self.began.elapsed());
        // Who serves a fault need not wait for all that comes in the background.
        MutexGuard::unlock_fair(state);
        Ok(())
    }

    /// Whether every page is here.
    pub fn is_complete(&self) -> bool {
        self.state.lock().fetch.as_ref().is_some_and(Fetch::is_complete)
    }

    /// Returns when every page is here.
    pub async fn completed(&self) {
        loop {
            let changed = self.changed.notified();
            if self.is_complete() {
                return;
            }
            changed.await;
        }
    }

    /// Digests of what arrived, in order, if the source wants them.
    pub fn digests(&self) -> Option<Vec<(u64, u64)>> {
        let state = self.state.lock();
        let (_, digests) = state.digests.as_ref()?;
        Some(digests.iter().map(|(page, digest)| (*page, *digest)).collect())
    }

    /// What the guest's faults cost.
    pub fn stats(&self) -> Option<FaultStats> {
        let stats = self.state.lock().fetch.as_ref().map(Fetch::stats)?;
        tracing::info!(?stats, "faults");
        let FetchStats { faults, faults_under_way, p50_us, p99_us, max_us, .. } = stats;
        Some(FaultStats { count: faults, waited: faults_under_way, p50_us, p99_us, max_us })
    }

    /// Ends paging: what is missing reads as zeros, and QEMU's copy of the descriptor is closed. Blocks.
    pub fn end(&self) {
        if let Err(error) = self.pager.end() {
            tracing::warn!(%error, "paging was not ended in good order");
        }
        if let Err(error) = attach::close_descriptor(self.pager.pid(), self.remote_fd) {
            tracing::warn!(%error, "QEMU keeps a descriptor that is of no use any more");
        }
    }
}

fn note_digests(
    seed: u64,
    digests: &mut BTreeMap<u64, u64>,
    run: &Range<u64>,
    content: Option<&[u8]>,
) {
    let zeros = [0; PAGE_BYTES];
    let mut pages = content.unwrap_or_default().chunks(PAGE_BYTES);
    for page in run.clone() {
        let content = pages.next().unwrap_or(&zeros);
        digests.insert(page, xxh3_64_with_seed(content, seed));
    }
}
