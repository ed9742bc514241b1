//! Single decisions of a flush.

use super::*;

fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
    let mut set = PageSet::new(PAGES);
    pages.into_iter().for_each(|page| set.insert(page));
    set
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Two servers, of which the first has `remote`, and `resident` pages at the main host. A flush has begun.
fn flushing(copies: usize, room: u64, resident: u64, remote: &PageSet) -> Remote {
    let config = RemoteConfig {
        resident_pages_max: 100,
        copies,
        servers: vec![ServerRoom { reserve_pages: room }; 2],
        read_ahead_pages_max: 1,
        direct_io_window: None,
    };
    let held = vec![remote.clone(), set([])];
    let mut new = Remote::new(PAGES, config, &set(0..resident), held).unwrap();
    new.begin_flush();
    new
}

/// Servers take a page.
fn take(remote: &mut Remote, page: u64) -> PutDone {
    let mut last = PutDone::More;
    for server in remote.put_to(page) {
        assert_eq!(last, PutDone::More);
        last = remote.put_done(page, server, ms(1), || true);
    }
    last
}

fn flush(remote: &mut Remote, want: usize) -> Vec<u64> {
    let pages = remote.next_to_flush(want, ms(0));
    pages.iter().for_each(|page| assert_eq!(take(remote, *page), PutDone::Keep));
    pages
}

/// The pages in the order in which they would leave.
fn order_of_eviction(remote: &mut Remote) -> Vec<u64> {
    let mut order = Vec::new();
    loop {
        let victims = remote.victims(1, ms(0));
        victims.dirty.iter().for_each(|page| assert_eq!(take(remote, *page), PutDone::Punch));
        match victims.clean.first().or_else(|| victims.dirty.first()) {
            Some(page) => order.push(*page),
            None => return order,
        }
    }
}

/// A guest that wrote some pages, read others, and came back to some soon.
fn mixed() -> Remote {
    let mut remote = flushing(1, 4000, 4, &set(500..520));
    for page in 10..40 {
        remote.missing_fault(page, true, ms(0));
        if page % 2 == 0 {
            let from = 500 + (page - 10) / 2;
            remote.missing_fault(from, false, ms(0));
            remote.arrived(from, 0, ms(0));
        }
    }
    remote
}

#[test]
fn a_flush_changes_nothing_in_the_order_of_eviction() {
    let without = order_of_eviction(&mut mixed());
    for (want, rounds) in [(100, 1), (1, 9), (7, 3)] {
        let mut remote = mixed();
        for _ in 0..rounds {
            flush(&mut remote, want);
        }
        assert_eq!(order_of_eviction(&mut remote), without, "{rounds} times {want}");
    }
    // Nor does one that servers do not take, or that is given up.
    let mut remote = mixed();
    let page = remote.next_to_flush(1, ms(0))[0];
    let (first, other) = (remote.put_to(page)[0], 1 - remote.put_to(page)[0]);
    assert_eq!(remote.put_failed(page, first, PutFailure::Gone), PutFailed::Another(other));
    assert_eq!(remote.put_failed(page, other, PutFailure::Gone), PutFailed::Back);
    assert_eq!(order_of_eviction(&mut remote), without);
}

#[test]
fn what_was_not_written_for_longest_is_flushed_first() {
    // Nothing is provided ahead over what servers have.
    let mut remote = flushing(1, 4000, 4, &set([21, 31, 41, 51]));
    for page in [50, 40, 30, 20] {
        remote.missing_fault(page, true, ms(0));
    }
    assert_eq!(flush(&mut remote, 5), [0, 1, 2, 3, 50]);
    assert_eq!(remote.write_fault(2), WriteFault::Unprotect);
    assert_eq!(flush(&mut remote, 3), [20, 30, 40]);
    assert_eq!(remote.unflushed_pages(), 1);
    assert_eq!(flush(&mut remote, 3), [2]);
    assert_eq!(flush(&mut remote, 3), [0u64; 0]);
    remote.write_fault(3);
    remote.end_flush();
    assert_eq!(flush(&mut remote, 3), [0u64; 0]);
}

#[test]
fn what_is_under_way_ends_as_it_began() {
    let mut remote = flushing(1, 4000, 4, &set([]));
    let pages = remote.next_to_flush(2, ms(0));
    remote.end_flush();
    assert!(!remote.is_flushing());
    assert_eq!(take(&mut remote, pages[0]), PutDone::Keep);
    // All that comes back is dirty.
    remote.begin_flush();
    remote.begin_merge();
    assert!(!remote.is_flushing());
    assert_eq!(take(&mut remote, pages[1]), PutDone::Cancelled);
    remote.begin_flush();
    assert_eq!(flush(&mut remote, 9), [0u64; 0]);
}

#[test]
fn a_cold_page_that_is_being_flushed_leaves() {
    let mut remote = flushing(1, 4000, 20, &set([]));
    remote.set_cold(&set(0..3), &set([]));
    assert_eq!(remote.next_to_flush(2, ms(0)), [0, 1]);
    assert_eq!(take(&mut remote, 0), PutDone::Keep);
    // The one that is clean already, the one whose put goes on, and the last one.
    assert_eq!(remote.victims(3, ms(0)), Victims { clean: vec![0], dirty: vec![2] });
    assert_eq!(take(&mut remote, 1), PutDone::Punch);
    assert_eq!(take(&mut remote, 2), PutDone::Punch);
    assert_eq!(remote.stats().evicted, EvictionCounts { clean: 1, dirty: 2, cancelled: 0 });
}

#[test]
fn cold_pages_go_first_though_they_were_flushed() {
    let mut remote = flushing(1, 10, 20, &set([]));
    remote.set_cold(&set(5..8), &set([]));
    assert_eq!(remote.victims(1, ms(0)).dirty, [5]);
    assert_eq!(take(&mut remote, 5), PutDone::Punch);
    assert_eq!(flush(&mut remote, 99).len(), 19);
    // No server has room: only clean pages can go.
    assert_eq!(remote.victims(2, ms(0)), Victims { clean: vec![6, 7], dirty: vec![] });
}

#[test]
fn a_page_that_is_pinned_no_more_can_leave_once_it_is_flushed() {
    let mut remote = flushing(1, 50, 2, &set([]));
    remote.set_cold(&set([]), &set(0..2));
    assert_eq!(remote.victims(9, ms(0)), Victims::default());
    assert_eq!(remote.next_to_flush(9, ms(0)), [0, 1]);
    remote.set_cold(&set([]), &set([]));
    assert_eq!(take(&mut remote, 0), PutDone::Keep);
    assert_eq!(remote.write_fault(1), WriteFault::Unprotect);
    assert_eq!(take(&mut remote, 1), PutDone::Cancelled);
    assert_eq!(remote.victims(9, ms(0)), Victims { clean: vec![0], dirty: vec![1] });
}

#[test]
fn a_written_page_is_flushed_again_once_its_put_was_answered() {
    let mut remote = flushing(2, 4000, 1, &set([]));
    assert_eq!(flush(&mut remote, 1), [0]);
    assert!((0..2).all(|server| remote.held(server) == Some(&set([0]))));
    remote.write_fault(0);
    assert_eq!(remote.next_to_flush(1, ms(0)), [0]);
    remote.write_fault(0);
    let servers = remote.put_to(0);
    assert_eq!(remote.next_to_flush(1, ms(0)), [0u64; 0]);
    assert_eq!(remote.put_done(0, servers[0], ms(0), || true), PutDone::More);
    assert_eq!(remote.next_to_flush(1, ms(0)), [0u64; 0]);
    assert_eq!(remote.put_done(0, servers[1], ms(0), || true), PutDone::Cancelled);
    assert_eq!(flush(&mut remote, 1), [0]);
    assert_eq!(remote.stale(9), [], "each put replaced the last one");
}

#[test]
fn direct_io_has_its_time_until_the_guest_stands_still() {
    let mut remote = flushing(1, 4000, 2, &set([]));
    remote.direct_io_window = ms(50);
    assert_eq!(remote.next_to_flush(2, ms(100)), [0, 1]);
    for page in 0..2 {
        let server = remote.put_to(page)[0];
        let done = remote.put_done(page, server, ms(120), || panic!("too early"));
        assert_eq!(done, PutDone::NotYet(ms(150)));
    }
    assert_eq!(remote.finish_put(0, ms(150), || false), PutDone::Changed);
    remote.stopped();
    assert_eq!(remote.finish_put(1, ms(121), || true), PutDone::Keep);
    assert_eq!(flush(&mut remote, 9), [0]);
    assert!(remote.is_flushed());
    remote.resumed();
    assert!(!remote.is_flushed());
    remote.write_fault(0);
    assert_eq!(remote.next_to_flush(2, ms(200)), [0]);
    let server = remote.put_to(0)[0];
    assert_eq!(remote.put_done(0, server, ms(210), || true), PutDone::NotYet(ms(250)));
}

#[test]
fn pinned_pages_do_not_take_the_room_of_others() {
    let mut remote = flushing(1, 10, 60, &set([]));
    remote.set_cold(&set([]), &set(0..30));
    // Only pages that would leave come to know that they are pinned.
    assert_eq!(remote.victims(1, ms(0)).dirty, [30]);
    assert_eq!(take(&mut remote, 30), PutDone::Punch);
    assert_eq!(remote.flush_room_lacking(), 59 - 19);
    assert_eq!(flush(&mut remote, 9), (31..40).collect::<Vec<_>>());
    remote.set_reserve(0, 40);
    assert_eq!(remote.flush_room_lacking(), 10);
    assert_eq!(flush(&mut remote, 99), (40..60).collect::<Vec<_>>());
    remote.set_reserve(1, 20);
    assert_eq!(remote.flush_room_lacking(), 0);
    assert_eq!(flush(&mut remote, 99), (0..30).collect::<Vec<_>>());
    // Still nothing pinned is evicted.
    assert_eq!(remote.victims(99, ms(0)).clean, (31..60).collect::<Vec<_>>());
}

#[test]
fn pinned_pages_are_flushed_without_enough_room_once_the_guest_stands_still() {
    let mut remote = flushing(1, 5, 20, &set([]));
    remote.set_cold(&set([]), &set(0..20));
    assert_eq!(remote.victims(1, ms(0)), Victims::default(), "all are pinned");
    assert_eq!(flush(&mut remote, 99), [0u64; 0]);
    remote.stopped();
    assert_eq!(flush(&mut remote, 99).len(), 10);
}

#[test]
fn room_is_counted_for_every_copy_once_stale_ones_are_gone() {
    let mut remote = flushing(2, 8, 10, &set([]));
    assert_eq!(remote.flush_room_lacking(), 4);
    remote.set_reserve(0, 100);
    // One server is of no use beyond a copy of each.
    assert_eq!(remote.flush_room_lacking(), 2);
    assert_eq!(flush(&mut remote, 4).len(), 4);
    assert_eq!(remote.flush_room_lacking(), 2);
    (0..4).for_each(|page| assert_eq!(remote.write_fault(page), WriteFault::Unprotect));
    assert_eq!(remote.flush_room_lacking(), 2, "stale copies make room");
    assert_eq!(remote.stale(9).len(), 2);
    assert_eq!(remote.next_to_flush(4, ms(0)).len(), 4);
    let written = remote.next_to_flush(1, ms(0))[0];
    remote.write_fault(written);
    assert_eq!(remote.flush_room_lacking(), 2, "so do those that arrive too late");
    remote.server_lost(1);
    assert_eq!(remote.flush_room_lacking(), 0, "one copy of each is all that there can be");
    remote.server_lost(0);
    assert_eq!(remote.flush_room_lacking(), 10);
}

#[test]
fn a_flush_goes_on_without_a_lost_server() {
    let mut remote = flushing(2, 50, 2, &set([]));
    assert_eq!(flush(&mut remote, 1), [0]);
    assert_eq!(remote.next_to_flush(1, ms(0)), [1]);
    let servers = remote.put_to(1);
    assert_eq!(remote.put_done(1, servers[0], ms(0), || true), PutDone::More);
    assert_eq!(remote.server_lost(servers[0]), []);
    assert_eq!(remote.put_done(1, servers[1], ms(0), || true), PutDone::Cancelled);
    remote.stopped();
    assert!(!remote.is_flushed());
    assert_eq!(flush(&mut remote, 9), [1]);
    assert!(remote.is_flushed());
    assert_eq!(remote.held(servers[1]), Some(&set(0..2)));
}

#[test]
fn what_is_being_asked_about_needs_room_only_if_no_server_has_it() {
    let mut remote = flushing(1, 1, 3, &set([]));
    let flushed = flush(&mut remote, 1);
    assert_eq!(remote.flush_room_lacking(), 1);
    remote.begin_reclaim();
    assert_eq!(remote.reclaim_candidates(&set(0..2), 9), [flushed[0], 1]);
    assert_eq!(remote.flush_room_lacking(), 1);
    assert_eq!(remote.reclaim_done(0, true), ReclaimDone::Punch);
    assert_eq!(remote.flush_room_lacking(), 0, "its copy is stale");
}

#[test]
fn a_server_that_gets_room_takes_pages() {
    let mut remote = flushing(1, 1, 10, &set([]));
    let added = remote.add_server(ServerRoom { reserve_pages: 0 }).unwrap();
    assert_eq!(flush(&mut remote, 9).len(), 2);
    remote.set_reserve(added, 5);
    assert_eq!(flush(&mut remote, 9).len(), 5);
    assert_eq!(remote.held(added).unwrap().len(), 5);
    // What is gone stays gone.
    remote.server_lost(added);
    remote.set_reserve(added, 50);
    assert_eq!((remote.flush_room_lacking(), flush(&mut remote, 9)), (8, vec![]));
}

#[test]
fn what_a_draining_server_took_is_flushed_again() {
    let mut remote = flushing(1, 50, 1, &set([]));
    assert_eq!(remote.next_to_flush(1, ms(0)), [0]);
    let server = remote.put_to(0)[0];
    remote.drain(server);
    assert_eq!(remote.put_done(0, server, ms(0), || true), PutDone::Changed);
    assert_eq!(flush(&mut remote, 1), [0]);
    assert_eq!(remote.held(1 - server), Some(&set([0])));
}

#[test]
fn stale_copies_and_lost_pages_are_not_flushed() {
    let mut remote = flushing(1, 50, 1, &set([7]));
    remote.stopped();
    assert_eq!(flush(&mut remote, 1), [0]);
    assert!(remote.is_flushed());
    let server = usize::from(remote.held(1) == Some(&set([0])));
    remote.write_fault(0);
    remote.drain(server);
    assert_eq!(flush(&mut remote, 1), [0]);
    assert!(!remote.is_flushed(), "there are two copies of page 0");
    assert_eq!(remote.stale(9).len(), 1);
    assert!(remote.is_flushed());
    remote.server_lost(0);
    assert!(remote.is_lost() && !remote.is_flushed());
}

#[test]
fn nothing_is_flushed_while_a_page_is_on_its_way() {
    let begin = |pages| {
        let mut remote = flushing(2, 50, pages, &set([7]));
        remote.stopped();
        remote
    };
    assert!(begin(0).is_flushed());
    let mut coming = begin(0);
    coming.missing_fault(7, false, ms(0));
    let mut flushing = begin(1);
    assert_eq!(flushing.next_to_flush(1, ms(0)), [0]);
    let mut leaving = begin(1);
    assert_eq!(leaving.victims(1, ms(0)).dirty, [0]);
    let mut dropping = begin(1);
    flush(&mut dropping, 1);
    dropping.begin_reclaim();
    assert_eq!(dropping.reclaim_candidates(&set([0]), 1), [0]);
    for mut remote in [coming, flushing, leaving, dropping] {
        assert_eq!((remote.unflushed_pages(), remote.is_flushed()), (1, false));
        remote.resumed();
        assert!(!remote.is_flushed());
    }
    // A copy that is being made may come to be out of date.
    let mut moving = begin(0);
    assert_eq!(moving.next_to_move(1, ms(0)).len(), 1);
    assert_eq!((moving.unflushed_pages(), moving.is_flushed()), (0, false));
    moving.moved(7);
    assert!(moving.is_flushed());
}

#[test]
fn a_guest_that_waits_for_a_flush_is_not_stuck() {
    let mut remote = flushing(1, 1, 100, &set([]));
    let pages = remote.next_to_flush(9, ms(0));
    assert_eq!(remote.missing_fault(500, true, ms(0)).answer, FaultAnswer::NoRoom);
    assert!(pages.len() == 2 && !remote.is_stuck(), "what is flushed can go");
    for page in pages {
        let server = remote.put_to(page)[0];
        assert_eq!(remote.put_failed(page, server, PutFailure::Full), PutFailed::Back);
    }
    assert!(remote.is_stuck());
}

#[test]
fn reading_makes_no_work_while_flushing() {
    // Without room to spare what is read would be dirty.
    for (is_flushing, dirty_pages) in [(true, 0), (false, 1)] {
        let mut remote = flushing(1, 50, 0, &set(0..50));
        remote.set_reserve(1, 0);
        if !is_flushing {
            remote.end_flush();
        }
        remote.missing_fault(3, false, ms(0));
        remote.arrived(3, 0, ms(0));
        assert_eq!(remote.unflushed_pages(), dirty_pages);
    }
}

#[test]
fn pages_given_up_for_a_fault_that_finds_no_room_are_punched() {
    let mut remote = flushing(1, 50, 4, &set([]));
    remote.set_resident_pages_max(4).unwrap();
    assert_eq!(flush(&mut remote, 2), [0, 1]);
    assert_eq!(remote.missing_fault(500, true, ms(0)).punch, [0]);
    assert_eq!(remote.missing_fault(501, true, ms(0)).punch, [1]);
    assert_eq!(remote.missing_fault(502, true, ms(0)).answer, FaultAnswer::NoRoom);
    assert_eq!(flush(&mut remote, 1), [2]);
    remote.set_resident_pages_max(2).unwrap();
    let served = remote.waiting_with_room(ms(0));
    let fault = MissingFault { punch: vec![2], answer: FaultAnswer::NoRoom };
    assert_eq!(served, [(502, fault)]);
    assert_eq!(remote.waiting_with_room(ms(0)), []);
}

#[test]
fn pinned_pages_that_a_lower_limit_has_no_room_for_leave() {
    let mut remote = flushing(1, 50, 20, &set([]));
    remote.end_flush();
    remote.set_cold(&set([]), &set(0..20));
    assert_eq!(remote.victims(1, ms(0)), Victims::default());
    remote.set_resident_pages_max(10).unwrap();
    assert_eq!(remote.wanted_evictions(), 15);
    assert_eq!(remote.victims(99, ms(0)).dirty.len(), 15);
}
