//! Random histories of both ends: faults, pushes, lanes that overtake one another, lost links and
//! duplicates, against a model of the memory.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::layout::BlockSpec;

const SMALL: u64 = 90;
const HUGE: u64 = 3 * 512;
const PAGES: u64 = SMALL + HUGE + 70;

/// Most pages of a run that one batch holds.
const BATCH_PAGES: u64 = 200;

fn layout() -> RamLayout {
    let block = |name: &str, pages, page_bytes| BlockSpec {
        name: name.into(),
        length_bytes: pages * PAGE_BYTES as u64,
        page_bytes,
    };
    let blocks = vec![
        block("small", SMALL, 4096),
        block("huge", HUGE, 2 << 20),
        block("last", PAGES - SMALL - HUGE, 4096),
    ];
    RamLayout::new(blocks).unwrap()
}

/// The host page of a page, by the blocks above.
fn host(page: u64) -> Range<u64> {
    if (SMALL..SMALL + HUGE).contains(&page) {
        let start = page - (page - SMALL) % 512;
        start..start + 512
    } else {
        page..page + 1
    }
}

/// What a page holds at the source, which is stopped.
fn content(page: u64) -> u64 {
    page.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

#[derive(Debug, Clone)]
enum Op {
    Fault(u64),
    Push(u64),
    DeliverControl,
    DeliverUrgent,
    DeliverBulk(usize),
    DuplicateBulk(usize),
    Cut,
    Mend,
    Hostile(u64, u64),
    Wait(u64),
}

#[derive(Debug)]
enum ToSource {
    Missing(PageSet),
    Ask(PageIndex),
}

#[derive(Debug)]
struct World {
    missing: PageSet,
    plan: PushPlan,
    fetch: Fetch,
    /// What was placed at the destination.
    memory: BTreeMap<u64, u64>,
    /// Parts of host pages that wait for the others.
    gathered: BTreeMap<u64, u64>,
    /// Host pages that threads of the guest wait for.
    waiting: BTreeSet<u64>,
    /// Host pages that were asked for over this link and did not arrive.
    asked: BTreeSet<u64>,
    /// Sent over this link.
    sent: PageSet,
    /// Of those, pages that were sent again since the guest waited for them.
    repeated: PageSet,
    to_source: VecDeque<ToSource>,
    urgent: VecDeque<Range<u64>>,
    bulk: [VecDeque<Range<u64>>; 2],
    up: bool,
    /// The source knows what is missing.
    synced: bool,
    lossless: bool,
    now: Duration,
}

impl World {
    fn new(given: &[(u64, u64)]) -> Self {
        let mut missing = PageSet::new(PAGES);
        given.iter().for_each(|(start, pages)| missing.insert_range(*start..start + pages));
        let plan = PushPlan::new(&layout(), missing.clone(), PushConfig::default());
        missing.iter().collect::<Vec<_>>().into_iter().for_each(|p| missing.insert_range(host(p)));
        assert_eq!(plan.missing(), &missing);
        Self {
            fetch: Fetch::new(&layout(), plan.missing().clone()).unwrap(),
            missing,
            plan,
            memory: BTreeMap::new(),
            gathered: BTreeMap::new(),
            waiting: BTreeSet::new(),
            asked: BTreeSet::new(),
            sent: PageSet::new(PAGES),
            repeated: PageSet::new(PAGES),
            to_source: VecDeque::new(),
            urgent: VecDeque::new(),
            bulk: [VecDeque::new(), VecDeque::new()],
            up: true,
            synced: true,
            lossless: true,
            now: Duration::ZERO,
        }
    }

    fn fault(&mut self, page: u64) {
        let first = host(page).start;
        match self.fetch.fault(PageIndex(page), self.now).unwrap() {
            FaultAction::Ask(asked) => {
                assert_eq!(asked.0, first);
                assert!(self.missing.contains(first) && !self.memory.contains_key(&first));
                assert!(self.waiting.insert(first), "asked twice");
                self.ask(asked);
            }
            FaultAction::Wait => {
                let gathered = self.gathered.range(host(page)).next().is_some();
                assert!(self.waiting.contains(&first) || gathered, "nothing is under way");
                self.waiting.insert(first);
            }
            FaultAction::Zeros(pages) => {
                assert_eq!(pages, host(page));
                assert!(!self.missing.contains(first));
            }
            FaultAction::Present(pages) => {
                assert!(pages == host(page) && self.memory.contains_key(&page));
            }
        }
    }

    /// Without a link the request is lost.
    fn ask(&mut self, page: PageIndex) {
        if self.up {
            assert!(self.asked.insert(page.0));
            self.to_source.push_back(ToSource::Ask(page));
        }
    }

    fn check_sent(&mut self, run: &Range<u64>) {
        assert!(!run.is_empty());
        for page in run.clone() {
            assert!(self.missing.contains(page) && !self.sent.contains(page), "{page} sent twice");
            self.sent.insert(page);
        }
        assert_eq!((host(run.start).start, host(run.end - 1).end), (run.start, run.end));
        let last = layout().locate(PageIndex(run.end - 1)).unwrap();
        assert_eq!(layout().locate(PageIndex(run.start)).unwrap().block, last.block);
    }

    fn push(&mut self, pages_max: u64) {
        if !self.up || !self.synced {
            return;
        }
        let Some(run) = self.plan.next(pages_max) else { return assert!(self.plan.is_done()) };
        assert!(run.end - run.start <= pages_max || run == host(run.start));
        self.check_sent(&run);
        for (n, batch) in batches(run).enumerate() {
            self.bulk[n % 2].push_back(batch);
        }
    }

    fn deliver_control(&mut self) {
        match self.to_source.pop_front() {
            Some(ToSource::Missing(pages)) => {
                self.plan.wanted(pages);
                self.synced = true;
            }
            Some(ToSource::Ask(page)) => {
                let answer = self.plan.requested(page, self.now).unwrap();
                let Some(answer) = answer else {
                    return assert!(self.sent.contains(page.0), "neither sent nor answered");
                };
                assert_eq!(answer.page, host(page.0));
                if self.sent.contains(page.0) {
                    assert!(answer.page == (page.0..page.0 + 1) && answer.neighbours.is_empty());
                    assert!(!self.repeated.contains(page.0), "{page} sent three times");
                    self.repeated.insert(page.0);
                    return self.urgent.push_back(answer.page);
                }
                let pages: u64 = answer.neighbours.iter().map(|run| run.end - run.start).sum();
                assert!(pages < 64);
                for run in std::iter::once(answer.page).chain(answer.neighbours) {
                    self.check_sent(&run);
                    self.urgent.extend(batches(run));
                }
            }
            None => {}
        }
    }

    fn arrive(&mut self, run: Option<Range<u64>>) {
        let Some(run) = run else { return };
        let arrival = self.fetch.arrived(run.clone()).unwrap();
        self.fetch.woken(&arrival, self.now);
        let mut duplicates = 0;
        for page in run {
            let gathered = self.memory.contains_key(&page)
                || self.gathered.insert(page, content(page)).is_some();
            duplicates += u64::from(gathered);
        }
        assert_eq!(arrival.duplicate_pages, duplicates);
        for page in arrival.complete.into_iter().flatten() {
            let part = self.gathered.remove(&page).expect("complete without having arrived");
            assert_eq!(self.memory.insert(page, part), None, "placed twice");
            self.waiting.remove(&page);
            self.asked.remove(&page);
        }
    }

    fn hostile(&mut self, start: u64, pages: u64) {
        let run = start..start + pages;
        if run.clone().any(|page| !self.missing.contains(page)) {
            let error = self.fetch.arrived(run).unwrap_err();
            assert!(matches!(error, PostcopyError::UnexpectedPage(_)), "{error}");
        }
        if !self.missing.contains(start) {
            assert!(self.plan.requested(PageIndex(start), self.now).is_err());
        }
    }

    fn cut(&mut self) {
        self.up = false;
        self.synced = false;
        self.lossless = false;
        self.to_source.clear();
        self.urgent.clear();
        self.bulk.iter_mut().for_each(VecDeque::clear);
        self.asked.clear();
    }

    fn mend(&mut self) {
        if self.up {
            return;
        }
        self.up = true;
        self.sent.clear();
        self.repeated.clear();
        let again = self.fetch.reconnected();
        self.gathered.clear();
        assert!(again.iter().map(|page| page.0).eq(self.waiting.iter().copied()));
        self.to_source.push_back(ToSource::Missing(self.fetch.still_missing().clone()));
        again.into_iter().for_each(|page| self.ask(page));
    }

    fn run(&mut self, op: &Op) {
        match op {
            Op::Fault(page) => self.fault(*page),
            Op::Push(pages_max) => self.push(*pages_max),
            Op::DeliverControl => self.deliver_control(),
            Op::DeliverUrgent => {
                let run = self.urgent.pop_front();
                self.arrive(run);
            }
            Op::DeliverBulk(lane) => {
                let run = self.bulk[*lane].pop_front();
                self.arrive(run);
            }
            Op::DuplicateBulk(lane) => {
                self.lossless = false;
                let again = self.bulk[*lane].front().cloned();
                self.bulk[1 - *lane].extend(again);
            }
            Op::Cut => self.cut(),
            Op::Mend => self.mend(),
            Op::Hostile(start, pages) => self.hostile(*start, *pages),
            Op::Wait(ms) => self.now += Duration::from_millis(*ms),
        }
        let placed = self.memory.len() as u64;
        assert_eq!(self.fetch.missing_pages() + placed, self.missing.len());
        assert_eq!(self.fetch.still_missing().len(), self.fetch.missing_pages());
        let budget = self.plan.push_budget(self.now);
        assert!((128 << 10..=16 << 20).contains(&budget));
    }

    /// Delivers all that is under way, the urgent lane first.
    fn settle(&mut self) {
        while !self.to_source.is_empty()
            || !self.urgent.is_empty()
            || self.bulk.iter().any(|lane| !lane.is_empty())
        {
            let ops =
                [Op::DeliverControl, Op::DeliverUrgent, Op::DeliverBulk(0), Op::DeliverBulk(1)];
            ops.iter().for_each(|op| self.run(op));
        }
    }

    fn finish(&mut self) {
        self.mend();
        self.settle();
        assert!(self.waiting.is_empty(), "waiting without a push: {:?}", self.waiting);
        while !self.plan.is_done() {
            self.push(64);
        }
        assert_eq!(self.plan.next(64), None);
        self.settle();
        assert!(self.fetch.is_complete() && self.fetch.still_missing().is_empty());
        assert!(self.memory.keys().copied().eq(self.missing.iter()));
        assert!(self.memory.iter().all(|(page, found)| *found == content(*page)));
        let stats = self.fetch.stats();
        assert!(stats.served <= stats.faults && stats.p50_us <= stats.p99_us);
        if self.lossless {
            let counts = self.plan.counts();
            assert_eq!(counts.repeated_pages, self.repeated.len());
            assert_eq!(stats.duplicate_pages, self.repeated.len());
            let sent = counts.urgent_pages + counts.prefetched_pages + counts.pushed_pages;
            assert_eq!(sent, self.missing.len() + self.repeated.len());
        }
    }
}

fn batches(run: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let starts = run.clone().step_by(BATCH_PAGES as usize);
    starts.map(move |start| start..run.end.min(start + BATCH_PAGES))
}

fn page() -> impl Strategy<Value = u64> {
    prop_oneof![0..SMALL, 0..PAGES, SMALL + HUGE..PAGES]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => page().prop_map(Op::Fault),
        3 => (1u64..700).prop_map(Op::Push),
        6 => Just(Op::DeliverControl),
        6 => Just(Op::DeliverUrgent),
        6 => (0usize..2).prop_map(Op::DeliverBulk),
        1 => (0usize..2).prop_map(Op::DuplicateBulk),
        1 => Just(Op::Cut),
        2 => Just(Op::Mend),
        1 => (0..PAGES + 100, 1u64..1000).prop_map(|(start, pages)| Op::Hostile(start, pages)),
        2 => (0u64..60).prop_map(Op::Wait),
    ]
}

fn missing() -> impl Strategy<Value = Vec<(u64, u64)>> {
    prop::collection::vec((page(), 1u64..40), 0..12)
}

proptest! {
    #[test]
    fn every_missing_page_is_placed_once(
        missing in missing(),
        ops in prop::collection::vec(op(), 0..250),
    ) {
        let mut world = World::new(&missing);
        ops.iter().for_each(|op| world.run(op));
        world.finish();
    }

    /// Without a lost link or a repeated batch each page travels once, or twice if it is waited for.
    #[test]
    fn no_page_is_sent_again_in_vain(
        missing in missing(),
        ops in prop::collection::vec(op(), 0..250),
    ) {
        let mut world = World::new(&missing);
        let lossy = |op: &&Op| !matches!(op, Op::Cut | Op::DuplicateBulk(_));
        ops.iter().filter(lossy).for_each(|op| world.run(op));
        prop_assert!(world.lossless);
        world.finish();
    }
}

fn set(ranges: &[Range<u64>]) -> PageSet {
    let mut set = PageSet::new(PAGES);
    ranges.iter().for_each(|range| set.insert_range(range.clone()));
    set
}

fn at(us: u64) -> Duration {
    Duration::from_micros(us)
}

#[test]
fn a_host_page_is_complete_with_its_last_part() {
    let mut fetch = Fetch::new(&layout(), set(&[SMALL..SMALL + 512, 3..5])).unwrap();
    let first = PageIndex(SMALL);
    assert_eq!(fetch.fault(PageIndex(SMALL + 9), at(10)), Ok(FaultAction::Ask(first)));
    assert_eq!(fetch.fault(first, at(20)), Ok(FaultAction::Wait));
    let part = fetch.arrived(SMALL + 100..SMALL + 512).unwrap();
    assert_eq!(part, Arrival::default());
    let rest = fetch.arrived(SMALL..SMALL + 101).unwrap();
    let (complete, waited_since) = (vec![SMALL..SMALL + 512], vec![at(10)]);
    assert_eq!(rest, Arrival { complete, duplicate_pages: 1, waited_since });
    fetch.woken(&rest, at(40));
    let present = FaultAction::Present(SMALL..SMALL + 512);
    assert_eq!(fetch.fault(first, at(50)), Ok(present));
    let zeros = FaultAction::Zeros(SMALL + 512..SMALL + 1024);
    assert_eq!(fetch.fault(PageIndex(SMALL + 600), at(50)), Ok(zeros));
    let arrival = fetch.arrived(3..5).unwrap();
    assert_eq!(arrival, Arrival { complete: vec![3..5], ..Arrival::default() });
    let stats = fetch.stats();
    assert_eq!((stats.faults, stats.faults_under_way, stats.faults_zero), (2, 1, 1));
    assert_eq!((stats.served, stats.max_us, stats.blocked_us), (1, 30, 30));
    assert!(fetch.is_complete());
}

#[test]
fn a_stall_lasts_through_an_outage() {
    let mut fetch = Fetch::new(&layout(), set(&[SMALL..SMALL + 512, 3..5])).unwrap();
    fetch.fault(PageIndex(4), at(0)).unwrap();
    fetch.arrived(SMALL..SMALL + 200).unwrap();
    // Part of it is there: no need to ask before the link is lost.
    assert_eq!(fetch.fault(PageIndex(SMALL + 1), at(5)), Ok(FaultAction::Wait));
    assert_eq!(fetch.reconnected(), [PageIndex(4), PageIndex(SMALL)]);
    assert_eq!(fetch.still_missing(), &set(&[SMALL..SMALL + 512, 3..5]));
    assert_eq!(fetch.arrived(SMALL + 200..SMALL + 512).unwrap().complete, []);
    let arrival = fetch.arrived(4..5).unwrap();
    fetch.woken(&arrival, at(2_000_000));
    assert_eq!(fetch.stats().max_us, 2_000_000);
    assert_eq!(fetch.missing_pages(), 513);
}

#[test]
fn what_a_peer_must_not_say_is_refused() {
    let wrong = Fetch::new(&layout(), PageSet::new(7)).unwrap_err();
    assert_eq!(wrong, PostcopyError::WrongSize { set: 7, ram: PAGES });
    let partial = Fetch::new(&layout(), set(&[SMALL..SMALL + 511])).unwrap_err();
    assert_eq!(partial, PostcopyError::PartialPages);
    let mut fetch = Fetch::new(&layout(), set(&[3..5])).unwrap();
    for run in [2..4, 4..6, 0..u64::MAX, PAGES - 1..PAGES + 1, u64::MAX - 1..u64::MAX] {
        let error = fetch.arrived(run).unwrap_err();
        assert_eq!(error.bin(), ErrorBin::PeerMisbehaved);
    }
    assert_eq!(fetch.missing_pages(), 2, "nothing of a refused run counts");
    let outside = fetch.fault(PageIndex(PAGES), at(0)).unwrap_err();
    assert_eq!(outside.bin(), ErrorBin::CallerMisuse);
}
