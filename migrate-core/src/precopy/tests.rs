//! Pre-copy as a caller sees it.

use super::*;
use crate::layout::BlockSpec;

fn layout(page_bytes: u64) -> RamLayout {
    let block = |name: &str, pages, page_bytes| BlockSpec {
        name: name.into(),
        length_bytes: pages * PAGE_BYTES as u64,
        page_bytes,
    };
    RamLayout::new(vec![block("small", 32, 4096), block("other", 32, page_bytes)]).unwrap()
}

fn set(pages: &[u64]) -> PageSet {
    let mut set = PageSet::new(64);
    pages.iter().for_each(|page| set.insert(*page));
    set
}

fn config(direct_io_window: Option<Duration>) -> PrecopyConfig {
    PrecopyConfig {
        convergence: Config {
            max_downtime: Duration::from_millis(100),
            patience: Duration::from_secs(5),
        },
        direct_io_window,
        order: true,
    }
}

const LINK: LinkState = LinkState {
    outstanding_bytes: 0,
    goodput_bytes_per_s: None,
    overhead: Duration::from_millis(10),
};

fn at(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

#[test]
fn pages_of_the_deciding_scan_travel_in_the_final_round() {
    let mut precopy = Precopy::new(&layout(4096), config(None));
    let Step::Send(first) = precopy.armed(set(&[1, 2]), at(0)).unwrap() else { panic!() };
    assert_eq!(first.dirty, set(&[1, 2]));
    precopy.round_sent(&PageCounts::default()).unwrap();
    assert!(matches!(precopy.scanned(set(&[3]), LINK, at(10)).unwrap(), Step::StopGuest));
    let last = precopy.stopped(set(&[4])).unwrap();
    assert_eq!(last.dirty, set(&[3, 4]));
    assert_eq!(precopy.tail(set(&[5])).unwrap().dirty, set(&[5]));
}

#[test]
fn with_direct_io_everything_is_looked_at_before_the_stop() {
    let mut precopy = Precopy::new(&layout(4096), config(Some(at(1000))));
    precopy.armed(set(&[1]), at(0)).unwrap();
    precopy.round_sent(&PageCounts::default()).unwrap();
    let Step::Send(round) = precopy.scanned(set(&[3]), LINK, at(10)).unwrap() else { panic!() };
    assert!(round.look.is_empty());
    precopy.round_sent(&PageCounts::default()).unwrap();
    let step = precopy.scanned(set(&[]), LINK, at(1001)).unwrap();
    let Step::Send(round) = step else { panic!("{step:?}") };
    assert!(round.look.contains(1) && round.look.contains(63) && !round.look.contains(3));
    precopy.round_sent(&PageCounts::default()).unwrap();
    assert!(matches!(precopy.scanned(set(&[]), LINK, at(1005)).unwrap(), Step::StopGuest));
    let last = precopy.stopped(set(&[])).unwrap();
    assert_eq!(last.look, set(&[3]), "reported at 10 ms: due at the stop");
}

#[test]
fn parts_of_larger_pages_are_looked_at() {
    let mut precopy = Precopy::new(&layout(8 * 4096), config(None));
    assert!(precopy.needs_hashes());
    precopy.armed(set(&[1, 40]), at(0)).unwrap();
    precopy.round_sent(&PageCounts::default()).unwrap();
    let far = LinkState { goodput_bytes_per_s: Some(1e3), ..LINK };
    let step = precopy.scanned(set(&[1, 40, 41]), far, at(10)).unwrap();
    let Step::Send(round) = step else { panic!("{step:?}") };
    assert_eq!((round.dirty, round.look), (set(&[1]), set(&[40, 41])));
    // Half of what was looked at had changed: half of the next report counts.
    precopy.round_sent(&PageCounts { looked_sent: 1, ..PageCounts::default() }).unwrap();
    assert!(matches!(precopy.scanned(set(&[40]), LINK, at(20)).unwrap(), Step::StopGuest));
    let last = precopy.stopped(set(&[2, 48])).unwrap();
    assert_eq!((last.dirty, last.look), (set(&[2]), set(&[40, 48])));
    let tail = precopy.tail(set(&[3, 63])).unwrap();
    assert_eq!((tail.dirty, tail.look), (set(&[3]), set(&[63])));
}

/// A link over which a page takes 100 ms, far from converging.
const SLOW: LinkState = LinkState { goodput_bytes_per_s: Some(4e4), ..LINK };

#[test]
fn what_a_glimpse_finds_travels_in_the_next_round() {
    let mut precopy = Precopy::new(&layout(4096), config(None));
    precopy.armed(set(&[1, 2, 3]), at(0)).unwrap();
    let wait = precopy.glimpsed(&set(&[2, 9]), at(100)).unwrap();
    assert_eq!(wait, set(&[2]), "9 is no part of the round");
    precopy.round_sent(&PageCounts::default()).unwrap();
    assert!(precopy.glimpsed(&set(&[1]), at(150)).is_err(), "no round is being sent");
    let step = precopy.scanned(set(&[1]), SLOW, at(200)).unwrap();
    let Step::Send(round) = step else { panic!("{step:?}") };
    assert_eq!(round.dirty, set(&[1, 2, 9]));
    // 2 and 9 were never sent: they do not wait again. 1 was.
    assert_eq!(precopy.glimpsed(&set(&[1, 2, 9]), at(300)).unwrap(), set(&[1]));
    precopy.round_sent(&PageCounts::default()).unwrap();
    let step = precopy.scanned(set(&[]), SLOW, at(400)).unwrap();
    let Step::Send(round) = step else { panic!("{step:?}") };
    assert_eq!(round.dirty, set(&[1, 2, 9]));
}

/// Pre-copy of a guest that writes the pages 2 to 16 all the time, and its latest round: pages 2 and
/// 3 wait for the stop.
fn with_hot_pages() -> (Precopy, Round) {
    let mut precopy = Precopy::new(&layout(4096), config(None));
    precopy.armed(set(&[1, 2, 3]), at(0)).unwrap();
    let mut last = None;
    for round in 1..40 {
        precopy.round_sent(&PageCounts::default()).unwrap();
        let written = set(&Vec::from_iter(if round % 5 == 0 { 1..17 } else { 2..17 }));
        // 20 % of 100 ms carry two pages, all of it twelve.
        let link = LinkState { goodput_bytes_per_s: Some(5e5), ..LINK };
        let step = precopy.scanned(written, link, at(100 * round)).unwrap();
        let Step::Send(round) = step else { panic!("{step:?}") };
        last = Some(round);
    }
    (precopy, last.unwrap())
}

#[test]
fn hot_pages_go_last_and_then_wait_for_the_stop() {
    let (mut precopy, round) = with_hot_pages();
    assert_eq!((round.dirty.len(), precopy.waiting_pages()), (13, 2));
    assert!(!round.dirty.contains(2) && !round.dirty.contains(3));
    precopy.round_sent(&PageCounts::default()).unwrap();
    let step = precopy.scanned(set(&[1]), LINK, at(4100)).unwrap();
    assert!(matches!(step, Step::StopGuest), "{step:?}");
    assert_eq!(precopy.stopped(set(&[5])).unwrap().dirty, set(&[1, 2, 3, 5]));
}

#[test]
fn colder_pages_go_first() {
    let mut precopy = Precopy::new(&layout(4096), config(None));
    precopy.armed(set(&[1, 2]), at(0)).unwrap();
    (1..9).for_each(|tick| drop(precopy.glimpsed(&set(&[1]), at(100 * tick))));
    precopy.round_sent(&PageCounts::default()).unwrap();
    let step = precopy.scanned(set(&[1, 2]), SLOW, at(900)).unwrap();
    let Step::Send(round) = step else { panic!("{step:?}") };
    assert_eq!(round.waves, [set(&[2]), set(&[1])]);
}

#[test]
fn calls_out_of_turn_are_refused() {
    let mut precopy = Precopy::new(&layout(4096), config(None));
    assert!(precopy.round_sent(&PageCounts::default()).is_err());
    assert!(precopy.stopped(set(&[])).is_err());
    precopy.armed(set(&[]), at(0)).unwrap();
    assert!(precopy.armed(set(&[]), at(0)).is_err());
    let text = precopy.tail(set(&[])).unwrap_err().to_string();
    assert!(text.contains("sending"), "{text}");
}

#[test]
fn a_round_that_is_asked_for_can_wait_for_the_stop() {
    let mut precopy = Precopy::new(&layout(4096), config(None));
    assert!(precopy.stop_now().is_err() && precopy.measured().is_none());
    precopy.armed(set(&[1, 2, 3]), at(0)).unwrap();
    precopy.glimpsed(&set(&[4]), at(100)).unwrap();
    precopy.round_sent(&PageCounts::default()).unwrap();
    assert!(precopy.stop_now().is_err(), "a scan is due");
    let step = precopy.scanned(set(&[2, 4]), SLOW, at(200)).unwrap();
    assert!(matches!(step, Step::Send(_)), "{step:?}");
    let seen = precopy.measured().unwrap();
    assert_eq!((seen.rounds, seen.left_pages, seen.stalled), (1, 2, false));
    // One page in the first 100 ms, two in the second.
    let writes = seen.writes.unwrap();
    assert_eq!((writes.scan.pages, writes.round.map(|round| round.pages)), (1.5, Some(2.0)));
    precopy.glimpsed(&set(&[9]), at(300)).unwrap();
    assert_eq!(precopy.stop_now().unwrap(), set(&[2, 4, 9]));
    let last = precopy.stopped(set(&[5])).unwrap();
    assert_eq!((last.number, last.dirty), (2, set(&[2, 4, 5, 9])));
    assert_eq!(precopy.tail(set(&[6])).unwrap().dirty, set(&[6]));
}

#[test]
fn pages_that_wait_are_among_the_last_when_the_round_is_not_sent() {
    let (mut precopy, round) = with_hot_pages();
    assert!(!round.dirty.contains(2));
    precopy.stop_now().unwrap();
    assert_eq!(precopy.waiting_pages(), 0);
    assert_eq!(precopy.stopped(set(&[])).unwrap().dirty, set(&Vec::from_iter(2..17)));
}

#[test]
fn after_giving_up_the_guest_can_still_be_stopped() {
    let mut precopy = Precopy::new(&layout(8 * 4096), config(None));
    precopy.armed(set(&[1]), at(0)).unwrap();
    let stuck = LinkState { goodput_bytes_per_s: Some(1e3), ..LINK };
    for ms in [1, 2, 6000] {
        precopy.round_sent(&PageCounts::default()).unwrap();
        let step = precopy.scanned(set(&[1, 2, 40]), stuck, at(ms)).unwrap();
        assert_eq!(matches!(step, Step::GiveUp(_)), ms == 6000);
    }
    assert!(precopy.measured().unwrap().stalled);
    assert_eq!(precopy.stop_now().unwrap(), set(&[1, 2, 40]));
    let last = precopy.stopped(set(&[3])).unwrap();
    assert_eq!((last.dirty, last.look), (set(&[1, 2, 3]), set(&[40])));
}

#[test]
fn nothing_is_measured_while_all_memory_waits_for_a_second_look() {
    let mut precopy = Precopy::new(&layout(4096), config(Some(at(1000))));
    precopy.armed(set(&[1]), at(0)).unwrap();
    for (ms, known) in [(500, false), (1001, false), (1005, true)] {
        precopy.round_sent(&PageCounts::default()).unwrap();
        let step = precopy.scanned(set(&[3, 4]), SLOW, at(ms)).unwrap();
        assert!(matches!(step, Step::Send(_)), "{step:?}");
        assert_eq!(precopy.measured().is_some(), known, "{ms} ms");
    }
    precopy.stop_now().unwrap();
    let last = precopy.stopped(set(&[])).unwrap();
    assert_eq!(last.dirty.len() + last.look.len(), 2, "what was written lately");
}

/// A guest that writes little need not be scanned before its device state is written.
#[test]
fn little_that_was_written_is_found_afterwards() {
    for (pages, few) in [(1, true), (60, false)] {
        let mut precopy = Precopy::new(&layout(4096), config(None));
        precopy.armed(set(&[1, 2]), at(0)).unwrap();
        assert!(!precopy.few_written_since(at(0), Some(1e8)), "nothing is known yet");
        precopy.round_sent(&PageCounts::default()).unwrap();
        let written: Vec<u64> = (0..pages).collect();
        assert!(matches!(precopy.scanned(set(&written), LINK, at(10)).unwrap(), Step::StopGuest));
        // 1 page in 10 ms, or 60; in 2 ms the link carries 48.
        assert_eq!(precopy.few_written_since(at(20), Some(1e8)), few, "{pages} pages");
        assert!(!precopy.few_written_since(at(20), None));
        precopy.stopped(set(&[])).unwrap();
        assert_eq!(precopy.tail(set(&[5])).unwrap().dirty, set(&[5]));
    }
}
