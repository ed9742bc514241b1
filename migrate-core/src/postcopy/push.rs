//! The source's part: what to answer a fault with, and what to push meanwhile.
//!
//! The push bubbles outwards from the latest faults (pivots), forward and backward by turns, up to
//! [`REACH_PAGES`] on either side; the latest pivot comes first. What no pivot reaches follows in
//! order. Every page is sent once, but for small pages that the guest waits for while they are on their way
//! in the background: those follow on the urgent lane, which is faster. See [`PushPlan::wanted`] for
//! what a lost link changes.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use serde::Serialize;

use super::budget::Budget;
use super::window::{Direction, REACH_PAGES, Windows};
use super::{HostPage, HostPages, PostcopyError, append};
use crate::layout::{PageIndex, RamLayout};
use crate::pageset::PageSet;

/// Faults whose surroundings are pushed first.
const PIVOTS_MAX: usize = 8;

/// A pivot reaches at least this many host pages on either side.
const PIVOT_HOST_PAGES: u64 = 4;

/// Longest time that a link should need for the background pages under way.
const QUEUE_MAX: Duration = Duration::from_millis(50);

/// Bounds of what the plan may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PushConfig {
    /// Bytes of background pages that may be under way even while the guest faults. Less than what
    /// the link carries in a round trip slows the push down.
    pub budget_bytes_min: u64,
    /// Bytes of background pages that may be under way while it does not.
    pub budget_bytes_max: u64,
    /// Pages of 4096 bytes in the widest answer to a fault, the faulting page included.
    pub window_pages_max: u64,
}

impl Default for PushConfig {
    /// 128 KiB to 16 MiB, and answers of at most 256 KiB.
    fn default() -> Self {
        Self { budget_bytes_min: 128 << 10, budget_bytes_max: 16 << 20, window_pages_max: 64 }
    }
}

impl PushConfig {
    /// Within the default's bounds: from twice what the link carries in a round trip to what it
    /// carries in 50 ms.
    pub fn for_link(bytes_per_s: f64, round_trip: Duration) -> Self {
        let (least, most) = {
            let default = Self::default();
            (default.budget_bytes_min, default.budget_bytes_max)
        };
        let carried = |time: Duration| (bytes_per_s * time.as_secs_f64()) as u64;
        let budget_bytes_min = carried(round_trip * 2).clamp(least, most);
        let budget_bytes_max = carried(QUEUE_MAX).clamp(budget_bytes_min, most);
        Self { budget_bytes_min, budget_bytes_max, ..Self::default() }
    }
}

/// What to send for a fault. All of it counts as sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The host page that the guest waits for. Send it in a batch of its own, before the rest.
    pub page: Range<u64>,
    /// Runs of further pages that it is likely to need next, the nearest first.
    pub neighbours: Vec<Range<u64>>,
}

/// What became of the pages. Pages that were sent again after a lost link count again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct PushCounts {
    /// Requests of the destination.
    pub requests: u64,
    /// Of those, requests for pages that were under way already.
    pub requests_late: u64,
    /// Pages sent because they were asked for.
    pub urgent_pages: u64,
    /// Of those, pages that had left in the background, too.
    pub repeated_pages: u64,
    /// Pages sent as their neighbours.
    pub prefetched_pages: u64,
    /// Of those, pages of windows that were continued: see [`Self::prefetch_hit_rate`].
    pub prefetched_used_pages: u64,
    /// Pages pushed in the background.
    pub pushed_pages: u64,
}

impl PushCounts {
    /// The share of neighbours that were sent with an answer and are known to have been used: the
    /// next fault of their stream was on the first page behind their window that was not sent with
    /// it (or was pushed since). The neighbours of a stream's last window count as not used, so the
    /// share is a lower bound. Nothing if there were no neighbours.
    pub fn prefetch_hit_rate(&self) -> Option<f64> {
        let sent = self.prefetched_pages;
        (sent > 0).then(|| self.prefetched_used_pages as f64 / sent as f64)
    }
}

/// A fault whose surroundings are pushed.
#[derive(Debug)]
struct Pivot {
    page: HostPage,
    next: Direction,
}

impl Pivot {
    /// The pages that it reaches on one side.
    fn side(&self, direction: Direction) -> Range<u64> {
        let HostPage { pages, block } = &self.page;
        let reach = REACH_PAGES.max(PIVOT_HOST_PAGES * self.page.len());
        match direction {
            Direction::Forward => pages.end..block.end.min(pages.end.saturating_add(reach)),
            Direction::Backward => block.start.max(pages.start.saturating_sub(reach))..pages.start,
        }
    }
}

/// What the source still has to send, and in which order.
#[derive(Debug)]
pub struct PushPlan {
    hosts: HostPages,
    missing: PageSet,
    unsent: PageSet,
    unsent_pages: u64,
    /// What left in the background alone.
    pushed: PageSet,
    windows: Windows,
    /// The most recent one is the first.
    pivots: VecDeque<Pivot>,
    /// Nothing before this page is unsent.
    cursor: u64,
    budget: Budget,
    counts: PushCounts,
}

impl PushPlan {
    /// For a guest that lacks the pages `missing` at the destination, and what else their host pages
    /// hold. The layout's page sizes are those with which the destination places pages.
    pub fn new(layout: &RamLayout, missing: PageSet, config: PushConfig) -> Self {
        let hosts = HostPages::new(layout);
        let missing = hosts.round_up(missing);
        Self {
            unsent: missing.clone(),
            unsent_pages: missing.len(),
            pushed: PageSet::new(missing.size()),
            missing,
            hosts,
            windows: Windows::new(config.window_pages_max),
            pivots: VecDeque::new(),
            cursor: 0,
            budget: Budget::new(config.budget_bytes_min, config.budget_bytes_max),
            counts: PushCounts::default(),
        }
    }

    /// The pages that the destination lacked at the hand-over, in whole host pages: what it has to
    /// be told.
    pub fn missing(&self) -> &PageSet {
        &self.missing
    }

    /// The link is back, and the destination still lacks `wanted`: the plan begins anew with these
    /// pages, as far as they were missing. Nothing of the former link's lanes may follow.
    pub fn wanted(&mut self, wanted: PageSet) {
        self.unsent = self.hosts.round_up(wanted);
        self.unsent.intersect(&self.missing);
        self.unsent_pages = self.unsent.len();
        self.pushed.clear();
        self.cursor = 0;
        self.pivots.clear();
        self.windows.forget();
    }

    /// The destination's guest faulted on `page`: what to answer with. Nothing if the page is under
    /// way already and will not come sooner for being sent again.
    ///
    /// # Errors
    /// [`PostcopyError::UnexpectedRequest`] if the page is not missing there.
    pub fn requested(
        &mut self,
        page: PageIndex,
        now: Duration,
    ) -> Result<Option<Answer>, PostcopyError> {
        let host = self.hosts.of(page.0).filter(|host| self.missing.contains(host.pages.start));
        let fault = host.ok_or(PostcopyError::UnexpectedRequest(page))?;
        self.counts.requests += 1;
        self.budget.fault(now);
        self.pivot(&fault);
        if !self.unsent.contains(fault.pages.start) {
            self.counts.requests_late += 1;
            self.windows.late(&fault, &self.unsent);
            return Ok(self.again(fault));
        }
        let window = self.windows.fault(&fault, &self.unsent);
        self.send(fault.pages.clone());
        let neighbours = self.neighbours(&fault, window.direction, window.pages);
        for run in &neighbours {
            self.send(run.clone());
            self.windows.answered(run);
            self.counts.prefetched_pages += run.end - run.start;
        }
        self.counts.urgent_pages += fault.len();
        Ok(Some(Answer { page: fault.pages, neighbours }))
    }

    /// Once more what the background may bring only after a while: a small page.
    fn again(&mut self, fault: HostPage) -> Option<Answer> {
        if fault.len() > 1 || !self.pushed.contains(fault.pages.start) {
            return None;
        }
        self.pushed.remove_range(fault.pages.clone());
        self.counts.urgent_pages += 1;
        self.counts.repeated_pages += 1;
        Some(Answer { page: fault.pages, neighbours: vec![] })
    }

    /// The next run to push, of at most `pages_max` pages or one host page if that is more. Nothing
    /// if all is sent.
    pub fn next(&mut self, pages_max: u64) -> Option<Range<u64>> {
        let run = self.next_at_pivot(pages_max).or_else(|| self.next_in_order(pages_max))?;
        self.send(run.clone());
        self.pushed.insert_range(run.clone());
        self.counts.pushed_pages += run.end - run.start;
        Some(run)
    }

    /// Bytes that may be under way in the background at `now`: doubles every 20 ms without a fault,
    /// halves with faults, within the bounds of [`PushConfig`].
    pub fn push_budget(&mut self, now: Duration) -> u64 {
        self.budget.bytes(now)
    }

    /// Whether every page that is missing was sent.
    pub fn is_done(&self) -> bool {
        self.unsent_pages == 0
    }

    /// Pages that were not sent yet.
    pub fn unsent_pages(&self) -> u64 {
        self.unsent_pages
    }

    /// What was sent so far, and why.
    pub fn counts(&self) -> PushCounts {
        PushCounts { prefetched_used_pages: self.windows.used_pages(), ..self.counts }
    }

    /// Bytes of memory in use.
    pub fn memory_bytes(&self) -> usize {
        [&self.missing, &self.unsent, &self.pushed].map(PageSet::memory_bytes).iter().sum()
    }

    /// Marks a run of unsent pages as sent.
    fn send(&mut self, run: Range<u64>) {
        self.unsent_pages -= run.end - run.start;
        self.unsent.remove_range(run);
    }

    /// Unsent host pages on one side of a fault, as far as the window's `pages` go with the faulting
    /// page included.
    fn neighbours(&self, fault: &HostPage, direction: Direction, pages: u64) -> Vec<Range<u64>> {
        let (block, size) = (&fault.block, fault.len());
        let mut runs = Vec::new();
        let mut left = pages.saturating_sub(size) / size;
        let mut side = match direction {
            Direction::Forward => {
                fault.pages.end..block.end.min(fault.pages.end.saturating_add(REACH_PAGES))
            }
            Direction::Backward => {
                block.start.max(fault.pages.start.saturating_sub(REACH_PAGES))..fault.pages.start
            }
        };
        while left > 0 {
            let next = match direction {
                Direction::Forward => self.unsent.first_in(side.clone()),
                Direction::Backward => self.unsent.last_in(side.clone()),
            };
            let Some(host) = next.and_then(|page| self.hosts.of(page)) else { break };
            match direction {
                Direction::Forward => side.start = host.pages.end,
                Direction::Backward => side.end = host.pages.start,
            }
            append(&mut runs, host.pages);
            left -= 1;
        }
        runs
    }

    /// Makes `fault` the first pivot, in the place of one that it is close to.
    fn pivot(&mut self, fault: &HostPage) {
        let near = |pivot: &Pivot| {
            pivot.page.block == fault.block
                && pivot.page.pages.start.abs_diff(fault.pages.start) < REACH_PAGES
        };
        self.pivots.retain(|pivot| !near(pivot));
        self.pivots.truncate(PIVOTS_MAX - 1);
        self.pivots.push_front(Pivot { page: fault.clone(), next: Direction::Forward });
    }

    /// The next run around the latest pivot that has unsent pages within its reach; pivots without
    /// are dropped.
    fn next_at_pivot(&mut self, pages_max: u64) -> Option<Range<u64>> {
        while let Some(pivot) = self.pivots.front_mut() {
            let direction = pivot.next;
            let turned = match direction {
                Direction::Forward => Direction::Backward,
                Direction::Backward => Direction::Forward,
            };
            pivot.next = turned;
            let sides = [(direction, pivot.side(direction)), (turned, pivot.side(turned))];
            for (direction, side) in sides {
                let run = match direction {
                    Direction::Forward => self.run_after(side, pages_max),
                    Direction::Backward => self.run_before(side, pages_max),
                };
                if run.is_some() {
                    return run;
                }
            }
            self.pivots.pop_front();
        }
        None
    }

    fn next_in_order(&mut self, pages_max: u64) -> Option<Range<u64>> {
        let first = self.unsent.first_in(self.cursor..self.missing.size())?;
        self.cursor = first;
        let block = self.hosts.of(first)?.block;
        self.run_after(first..block.end, pages_max)
    }

    /// The first run of unsent pages within `side`, which is part of a block.
    fn run_after(&self, side: Range<u64>, pages_max: u64) -> Option<Range<u64>> {
        let mut run = self.hosts.of(self.unsent.first_in(side.clone())?)?.pages;
        let size = run.end - run.start;
        while run.end < side.end
            && self.unsent.contains(run.end)
            && run.end - run.start + size <= pages_max
        {
            run.end += size;
        }
        Some(run)
    }

    /// The last run of unsent pages within `side`, which is part of a block.
    fn run_before(&self, side: Range<u64>, pages_max: u64) -> Option<Range<u64>> {
        let mut run = self.hosts.of(self.unsent.last_in(side.clone())?)?.pages;
        let size = run.end - run.start;
        while run.start > side.start
            && self.unsent.contains(run.start - 1)
            && run.end - run.start + size <= pages_max
        {
            run.start -= size;
        }
        Some(run)
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "one run is meant")]
mod tests {
    use super::*;
    use crate::layout::{BlockSpec, PAGE_BYTES};

    /// 8192 small pages, 8 of 2 MiB, 4096 small pages.
    fn layout() -> RamLayout {
        let block = |name: &str, pages, page_bytes| BlockSpec {
            name: name.into(),
            length_bytes: pages * PAGE_BYTES as u64,
            page_bytes,
        };
        RamLayout::new(vec![
            block("first", 8192, 4096),
            block("huge", 4096, 2 << 20),
            block("last", 4096, 4096),
        ])
        .unwrap()
    }

    fn plan_of(ranges: &[Range<u64>]) -> PushPlan {
        let mut missing = PageSet::new(layout().pages());
        ranges.iter().for_each(|range| missing.insert_range(range.clone()));
        PushPlan::new(&layout(), missing, PushConfig::default())
    }

    const NOW: Duration = Duration::from_millis(1);

    /// Pages that a fault on `page` is answered with; 0 if it is under way.
    fn fault(plan: &mut PushPlan, page: u64) -> u64 {
        let Some(answer) = plan.requested(PageIndex(page), NOW).unwrap() else { return 0 };
        assert!(answer.page.contains(&page));
        answer
            .neighbours
            .iter()
            .fold(answer.page.end - answer.page.start, |sum, run| sum + run.end - run.start)
    }

    #[test]
    fn a_scan_forward_widens_the_window() {
        let mut plan = plan_of(&[0..8192]);
        let (mut page, mut faults) = (0, 0);
        while page < 8000 {
            page += fault(&mut plan, page);
            faults += 1;
        }
        assert!(faults < 8000 / 64 + 8, "{faults} faults");
        assert_eq!(fault(&mut plan, page), 64);
        let counts = plan.counts();
        assert_eq!((counts.urgent_pages, counts.requests), (faults + 1, faults + 1));
        assert!(counts.prefetch_hit_rate().unwrap() > 0.95, "{counts:?}");
    }

    #[test]
    fn a_scan_backward_widens_the_window() {
        let mut plan = plan_of(&[0..4096]);
        let mut page = 4095;
        let mut faults = 0;
        while page > 200 {
            // Forward of the first fault there is nothing.
            page -= fault(&mut plan, page);
            faults += 1;
        }
        assert!(faults < 4096 / 64 + 8, "{faults} faults");
        assert!(plan.counts().prefetch_hit_rate().unwrap() > 0.9, "{:?}", plan.counts());
    }

    #[test]
    fn several_scans_at_once_keep_their_windows() {
        let mut plan = plan_of(&[0..8192]);
        let mut at = [0, 2000, 4000, 6000];
        for _ in 0..10 {
            for page in &mut at {
                *page += fault(&mut plan, *page);
            }
        }
        assert_eq!(at.map(|page| fault(&mut plan, page)), [64; 4]);
    }

    #[test]
    fn scattered_faults_narrow_the_window_to_the_page() {
        let mut plan = plan_of(&[0..8192]);
        let sent: Vec<_> =
            (0..200).map(|n| fault(&mut plan, n * 3571 % 8192)).filter(|n| *n > 0).collect();
        assert_eq!(sent.first(), Some(&4));
        let late: u64 = sent.iter().skip(10).sum();
        assert!(late < sent.len() as u64 * 2, "{late} pages for {} faults", sent.len());
    }

    #[test]
    fn a_stream_survives_what_the_push_sends_in_between() {
        let mut plan = plan_of(&[0..8192]);
        let mut page = 0;
        for _ in 0..8 {
            page += fault(&mut plan, page);
            let pushed = plan.next(16).unwrap();
            assert_eq!(pushed.start, page, "right behind the window");
            assert_eq!(fault(&mut plan, page + 3), 1, "under way in the background");
            assert_eq!(fault(&mut plan, page + 3), 0, "and on the urgent lane");
            page = pushed.end;
        }
        assert_eq!(fault(&mut plan, page), 64);
        let counts = plan.counts();
        assert_eq!((counts.requests_late, counts.repeated_pages), (16, 8));
    }

    #[test]
    fn late_requests_keep_a_stream_that_the_push_has_overtaken() {
        let mut plan = plan_of(&[0..8192]);
        let mut page = 0;
        for _ in 0..8 {
            page += fault(&mut plan, page);
        }
        let pushed = [plan.next(1000).unwrap(), plan.next(1000).unwrap()];
        assert_eq!(pushed, [page..1277, 1277..2277], "as far as the pivot reaches, then in order");
        assert!(2277 - page > REACH_PAGES);
        for late in [1200, 2100] {
            assert_eq!(fault(&mut plan, late), 1);
        }
        assert_eq!(fault(&mut plan, 2277), 64);
    }

    #[test]
    fn a_stream_that_turns_begins_narrow() {
        let mut plan = plan_of(&[0..8192]);
        let mut page = 4000;
        for _ in 0..8 {
            page += fault(&mut plan, page);
        }
        // What lies between its last window and where it began was sent by earlier windows.
        let answer = plan.requested(PageIndex(3999), NOW).unwrap().unwrap();
        assert_eq!(answer, Answer { page: 3999..4000, neighbours: vec![3998..3999] });
        let answer = plan.requested(PageIndex(3997), NOW).unwrap().unwrap();
        assert_eq!(answer, Answer { page: 3997..3998, neighbours: vec![3994..3997] });
    }

    #[test]
    fn a_scan_takes_one_pivot_only() {
        let mut plan = plan_of(&[0..8192]);
        fault(&mut plan, 4000);
        for n in 0..20 {
            fault(&mut plan, 7000 + 7 * n);
        }
        let mut sent = PageSet::new(plan.missing().size());
        while !sent.contains(3999) {
            sent.insert_range(plan.next(100).unwrap());
        }
        assert_eq!(sent.first_in(0..2900), None, "what no pivot reaches follows");
    }

    #[test]
    fn neighbours_skip_what_was_sent_or_never_missing() {
        let mut plan = plan_of(&[0..1, 2..3, 5..7, 1200..1300]);
        let answer = plan.requested(PageIndex(0), NOW).unwrap().unwrap();
        assert_eq!(answer, Answer { page: 0..1, neighbours: vec![2..3, 5..7] });
        assert_eq!(plan.requested(PageIndex(6), NOW), Ok(None));
        let outside = plan.requested(PageIndex(3), NOW);
        assert_eq!(outside, Err(PostcopyError::UnexpectedRequest(PageIndex(3))));
        assert!(plan.requested(PageIndex(u64::MAX), NOW).is_err());
        assert_eq!(plan.next(1000), Some(1200..1300), "beyond the pivot's reach");
        assert!(plan.is_done() && plan.next(1).is_none());
    }

    #[test]
    fn large_pages_travel_whole_and_alone() {
        let mut plan = plan_of(&[8192 + 700..8192 + 701, 8192 + 1100..8192 + 1600]);
        assert_eq!(plan.missing().len(), 3 * 512);
        let answer = plan.requested(PageIndex(8192 + 600), NOW).unwrap().unwrap();
        assert_eq!(answer, Answer { page: 8192 + 512..8192 + 1024, neighbours: vec![] });
        assert_eq!(plan.next(10), Some(8192 + 1024..8192 + 1536));
        assert_eq!(plan.next(10), Some(8192 + 1536..8192 + 2048));
        assert_eq!(plan.unsent_pages(), 0);
        let late = plan.requested(PageIndex(8192 + 1600), NOW);
        assert_eq!(late, Ok(None), "as long again on its way");
    }

    #[test]
    fn the_push_bubbles_from_the_latest_fault_and_never_crosses_a_block() {
        let mut plan = plan_of(&[0..8192, 12_288..16_384]);
        assert_eq!(plan.next(64), Some(0..64), "in order without faults");
        fault(&mut plan, 3000);
        fault(&mut plan, 12_288 + 10);
        // Windows of 4 and of 2 pages.
        assert_eq!(plan.next(64), Some(12_300..12_364));
        assert_eq!(plan.next(64), Some(12_288..12_298));
        assert_eq!(plan.next(64), Some(12_364..12_428));
        fault(&mut plan, 3004);
        let first: Vec<_> = (0..3).map_while(|_| plan.next(100)).collect();
        assert_eq!(first, [3012..3112, 2900..3000, 3112..3212]);
        let mut sent = PageSet::new(plan.missing().size());
        while let Some(run) = plan.next(1000) {
            assert!(run.start >= 12_288 || run.end <= 8192);
            sent.insert_range(run);
        }
        assert!(plan.is_done());
        let counts = plan.counts();
        let all = counts.pushed_pages + counts.urgent_pages + counts.prefetched_pages;
        assert_eq!(all, 8192 + 4096);
    }

    #[test]
    fn after_a_lost_link_only_what_is_wanted_is_sent() {
        let mut plan = plan_of(&[0..100]);
        while plan.next(7).is_some() {}
        let again = Answer { page: 50..51, neighbours: vec![] };
        assert_eq!(plan.requested(PageIndex(50), NOW), Ok(Some(again)));
        assert_eq!(plan.requested(PageIndex(50), NOW), Ok(None));
        let mut wanted = PageSet::new(1 << 20);
        wanted.insert_range(40..60);
        wanted.insert_range(200..300);
        plan.wanted(wanted);
        assert_eq!(plan.unsent_pages(), 20);
        assert_eq!(plan.next(1000), Some(40..60));
        assert!(plan.is_done());
    }

    #[test]
    fn bounds_follow_the_link() {
        let slow = PushConfig::for_link(12.5e6, Duration::from_millis(1));
        assert_eq!((slow.budget_bytes_min, slow.budget_bytes_max), (128 << 10, 625_000));
        let long = PushConfig::for_link(1.25e9, Duration::from_millis(2));
        assert_eq!((long.budget_bytes_min, long.budget_bytes_max), (5_000_000, 16 << 20));
        assert_eq!(PushConfig::for_link(f64::NAN, Duration::ZERO).budget_bytes_max, 128 << 10);
    }
}
