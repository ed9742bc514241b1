//! The destination's part: which faults to ask for, which to wait for, and what is still missing.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use super::stalls::{FetchStats, Stalls};
use super::{HostPages, PostcopyError, append};
use crate::layout::{PageIndex, RamLayout};
use crate::pageset::PageSet;

/// What to do about a fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FaultAction {
    /// Ask the source for the host page that begins here.
    Ask(PageIndex),
    /// It was asked for, or part of it arrived and the rest is under way.
    Wait,
    /// These pages, a host page, have no content: place zeros (where something is already, wake).
    Zeros(Range<u64>),
    /// These pages, a host page, arrived, and were placed before this fault was looked at: place
    /// zeros where the guest gave them back since, and wake who waits for them otherwise.
    Present(Range<u64>),
}

/// What became of a run that arrived.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Arrival {
    /// Runs of whole host pages of which the last part arrived with this run: place them and wake
    /// who waits for them, before the next fault is looked at.
    pub complete: Vec<Range<u64>>,
    /// Pages of the run that had arrived before; their content is the same.
    pub duplicate_pages: u64,
    /// Since when the guest waited for those in `complete` that it waited for.
    pub waited_since: Vec<Duration>,
}

/// What the destination waits for.
#[derive(Debug)]
pub struct Fetch {
    hosts: HostPages,
    missing: PageSet,
    /// Host pages of which not every part arrived.
    lacking: PageSet,
    lacking_pages: u64,
    /// Parts of lacking host pages that arrived.
    parts: PageSet,
    /// First page of each host page that the guest waits for, and since when.
    waiting: BTreeMap<u64, Duration>,
    stalls: Stalls,
}

impl Fetch {
    /// For a guest that lacks the pages `missing`, as the source said.
    ///
    /// # Errors
    /// If the set is for another amount of RAM or holds parts of host pages.
    pub fn new(layout: &RamLayout, missing: PageSet) -> Result<Self, PostcopyError> {
        let hosts = HostPages::new(layout);
        let (set, ram) = (missing.size(), layout.pages());
        if set != ram {
            return Err(PostcopyError::WrongSize { set, ram });
        }
        let lacking = hosts.round_up(missing.clone());
        if lacking != missing {
            return Err(PostcopyError::PartialPages);
        }
        Ok(Self {
            hosts,
            parts: PageSet::new(ram),
            lacking_pages: lacking.len(),
            lacking,
            missing,
            waiting: BTreeMap::new(),
            stalls: Stalls::new(),
        })
    }

    /// The guest faulted on `page` at `now`.
    ///
    /// # Errors
    /// [`PostcopyError::NoSuchPage`] for a page outside RAM.
    pub fn fault(&mut self, page: PageIndex, now: Duration) -> Result<FaultAction, PostcopyError> {
        let host = self.hosts.of(page.0).ok_or(PostcopyError::NoSuchPage(page))?.pages;
        if !self.missing.contains(host.start) {
            self.stalls.faults_zero += 1;
            return Ok(FaultAction::Zeros(host));
        }
        if !self.lacking.contains(host.start) {
            return Ok(FaultAction::Present(host));
        }
        self.stalls.faults += 1;
        let waited_for = self.waiting.contains_key(&host.start);
        if !waited_for {
            self.waiting.insert(host.start, now);
            self.stalls.began(now);
        }
        if waited_for || self.parts.first_in(host.clone()).is_some() {
            self.stalls.faults_under_way += 1;
            return Ok(FaultAction::Wait);
        }
        Ok(FaultAction::Ask(PageIndex(host.start)))
    }

    /// Whether the guest waits for `page`.
    pub fn waits_for(&self, page: PageIndex) -> bool {
        let host = self.hosts.of(page.0);
        host.is_some_and(|host| self.waiting.contains_key(&host.pages.start))
    }

    /// The pages `run` arrived. Parts of a host page are to be kept until [`Arrival::complete`] names
    /// it; [`Self::woken`] is to be told when those are in place.
    ///
    /// # Errors
    /// [`PostcopyError::UnexpectedPage`] if one of them was not missing; then none counts.
    pub fn arrived(&mut self, run: Range<u64>) -> Result<Arrival, PostcopyError> {
        if let Some(page) = run.clone().find(|page| !self.missing.contains(*page)) {
            return Err(PostcopyError::UnexpectedPage(PageIndex(page)));
        }
        let mut arrival = Arrival::default();
        let mut next = run.start;
        while next < run.end {
            let Some(host) = self.hosts.of(next) else { break };
            let part = next..run.end.min(host.pages.end);
            next = part.end;
            if self.lacking.contains(host.pages.start) {
                self.part_arrived(host.pages, part, &mut arrival);
            } else {
                arrival.duplicate_pages += part.end - part.start;
            }
        }
        self.stalls.duplicate_pages += arrival.duplicate_pages;
        Ok(arrival)
    }

    /// What arrived is in place at `now`, and who waited for it goes on.
    pub fn woken(&mut self, arrival: &Arrival, now: Duration) {
        for since in &arrival.waited_since {
            self.stalls.ended(*since, now);
        }
    }

    /// Notes a part of a host page that is lacking.
    fn part_arrived(&mut self, host: Range<u64>, part: Range<u64>, arrival: &mut Arrival) {
        arrival.duplicate_pages += self.parts.iter_range(part.clone()).count() as u64;
        self.parts.insert_range(part);
        if host.clone().any(|page| !self.parts.contains(page)) {
            return;
        }
        self.parts.remove_range(host.clone());
        self.lacking.remove_range(host.clone());
        self.lacking_pages -= host.end - host.start;
        if let Some(since) = self.waiting.remove(&host.start) {
            arrival.waited_since.push(since);
        }
        append(&mut arrival.complete, host);
    }

    /// The pages that are still missing, in whole host pages: what the source has to be told after
    /// the link was lost.
    pub fn still_missing(&self) -> &PageSet {
        &self.lacking
    }

    /// Number of pages in [`Self::still_missing`].
    pub fn missing_pages(&self) -> u64 {
        self.lacking_pages
    }

    /// The link was lost and is back: tell the source what is [`Self::still_missing`], then ask again
    /// for the pages that this returns, in order. Host pages that arrived in part are missing again:
    /// drop what was kept of them.
    pub fn reconnected(&mut self) -> Vec<PageIndex> {
        self.parts.clear();
        self.waiting.keys().copied().map(PageIndex).collect()
    }

    /// Whether every page arrived.
    pub fn is_complete(&self) -> bool {
        self.lacking_pages == 0
    }

    /// What was measured so far.
    pub fn stats(&self) -> FetchStats {
        self.stalls.stats()
    }

    /// Bytes of memory in use by sets of pages.
    pub fn memory_bytes(&self) -> usize {
        [&self.missing, &self.lacking, &self.parts].map(PageSet::memory_bytes).iter().sum()
    }
}
