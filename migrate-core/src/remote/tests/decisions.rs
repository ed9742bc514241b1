//! Single decisions.

use super::*;

const ROOM: ServerRoom = ServerRoom { reserve_pages: 4000 };

fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
    let mut set = PageSet::new(PAGES);
    pages.into_iter().for_each(|page| set.insert(page));
    set
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Two servers, one copy; `remote` is on the first.
fn split(
    limit: u64,
    resident: impl IntoIterator<Item = u64>,
    remote: impl IntoIterator<Item = u64>,
) -> Remote {
    let config = RemoteConfig {
        resident_pages_max: limit,
        copies: 1,
        servers: vec![ROOM; 2],
        read_ahead_pages_max: 64,
        direct_io_window: None,
    };
    Remote::new(PAGES, config, &set(resident), vec![set(remote), set([])]).unwrap()
}

fn fetched(fault: &MissingFault) -> Vec<u64> {
    match &fault.answer {
        FaultAnswer::Fetch(fetch) => fetch.runs.iter().cloned().flatten().collect(),
        other => panic!("{other:?}"),
    }
}

/// Pages arrive from the first server.
fn arrive<'a>(remote: &mut Remote, pages: impl IntoIterator<Item = &'a u64>) {
    for page in pages {
        assert_eq!(remote.arrived(*page, 0, ms(1)), Arrived::Place { protect: true });
    }
}

/// Faults on a page and brings all that is asked for, also ahead; returns it.
fn bring(remote: &mut Remote, page: u64) -> Vec<u64> {
    let pages = fetched(&remote.missing_fault(page, false, ms(0)));
    let mut all = Vec::new();
    let mut due = pages;
    while !due.is_empty() {
        arrive(remote, &due);
        all.append(&mut due);
        due = remote.read_ahead().into_iter().flat_map(|f| f.runs).flatten().collect();
    }
    all
}

/// Evicts dirty pages to where they belong.
fn evict(remote: &mut Remote, pages: usize) -> Victims {
    let victims = remote.victims(pages, ms(0));
    for page in &victims.dirty {
        let server = remote.put_to(*page)[0];
        assert_eq!(remote.put_done(*page, server, ms(0), || true), PutDone::Punch);
    }
    victims
}

#[test]
fn a_stream_is_read_ahead_and_scattered_faults_are_not() {
    let mut remote = split(900, [], 0..PAGES);
    let mut next = 0;
    let mut faults = 0;
    while next < 500 {
        let pages = bring(&mut remote, next);
        next = pages.iter().max().unwrap() + 1;
        faults += 1;
    }
    assert!(faults <= 9, "{faults} faults for {next} pages");
    let used = remote.stats().read_ahead_used_pages;
    assert!(used > 300 && used <= remote.stats().read_ahead_pages, "{used}");
    let mut remote = split(900, [], 0..PAGES);
    let scattered = (1..15).map(|n| bring(&mut remote, n * 331 % PAGES).len());
    assert_eq!(scattered.skip(2).max(), Some(1));
}

#[test]
fn what_is_ahead_of_a_stream_is_asked_for_once_a_fault() {
    let mut remote = split(900, [], 0..PAGES);
    let first = fetched(&remote.missing_fault(0, false, ms(0)));
    arrive(&mut remote, &first);
    assert_eq!(remote.read_ahead(), [], "one fault is no stream");
    let second = fetched(&remote.missing_fault(first.len() as u64, false, ms(0)));
    assert!(second.len() > first.len());
    let (half, rest) = second.split_at(second.len() / 2);
    arrive(&mut remote, half);
    assert_eq!(remote.read_ahead(), []);
    remote.arrived(rest[0], 0, ms(0));
    let ahead = remote.read_ahead();
    let pages: Vec<u64> = ahead.iter().flat_map(|f| f.runs.iter().cloned()).flatten().collect();
    assert_eq!(pages[0], second[second.len() - 1] + 1);
    // Nobody is seen to use it.
    let under_way = rest[1..].iter().chain(&pages);
    arrive(&mut remote, under_way);
    assert_eq!(remote.read_ahead(), []);
    // Someone waits in the farther half.
    let last = pages[pages.len() - 1];
    let third = fetched(&remote.missing_fault(last + 1, false, ms(0)));
    let waited = third[third.len() - 1];
    assert_eq!(remote.missing_fault(waited, false, ms(0)).answer, FaultAnswer::Wait);
    assert_eq!(remote.read_ahead()[0].runs[0].start, waited + 1);
}

#[test]
fn a_backward_stream_asks_for_the_faulting_page_first() {
    let mut remote = split(900, [], 0..PAGES);
    let mut page = 900;
    for _ in 0..4 {
        let runs = fetched(&remote.missing_fault(page, false, ms(0)));
        assert_eq!(runs[0], page);
        arrive(&mut remote, &runs);
        remote.read_ahead();
        page = remote.pages.remote().last_in(0..page).unwrap();
    }
    assert!(page < 890 && remote.stats().read_ahead_pages > 4, "{page}");
}

#[test]
fn at_the_limit_clean_pages_make_room_and_dirty_ones_do_not() {
    let mut remote = split(4, 0..2, 10..20);
    assert_eq!(bring(&mut remote, 15)[0], 15);
    while remote.room() > 0 {
        let page = remote.pages.remote().first_in(0..PAGES).unwrap();
        bring(&mut remote, page);
    }
    let fault = remote.missing_fault(500, true, ms(0));
    assert_eq!(fault.answer, FaultAnswer::Zeros(500..501));
    assert_eq!(fault.punch.len(), 1);
    assert_eq!(remote.missing_fault(501, true, ms(0)).answer, FaultAnswer::Zeros(501..502));
    assert_eq!(remote.missing_fault(502, true, ms(3)).answer, FaultAnswer::NoRoom);
    assert_eq!(remote.waiting_with_room(ms(4)), []);
    assert_eq!(remote.wanted_evictions(), 3, "to 2 below the limit, and one waits");
    let victims = evict(&mut remote, 3);
    assert_eq!((victims.clean.len(), victims.dirty.len()), (0, 3));
    let served = remote.waiting_with_room(ms(10));
    assert_eq!((served.len(), served[0].0), (1, 502));
    assert!(matches!(&served[0].1.answer, FaultAnswer::Zeros(run) if run.contains(&502)));
    let stats = remote.stats();
    assert_eq!((stats.faults.no_room, stats.max_us), (1, 7000));
    assert!(remote.wanted_evictions() <= 1, "what is provided ahead takes half of what is free");
}

#[test]
fn memory_that_is_used_in_its_order_is_provided_ahead() {
    let mut remote = split(400, [], [600]);
    let zeros = |remote: &mut Remote, page| match remote.missing_fault(page, true, ms(0)).answer {
        FaultAnswer::Zeros(run) => run,
        other => panic!("{other:?}"),
    };
    let (mut page, mut faults) = (100, 0);
    while page < 200 {
        let run = zeros(&mut remote, page);
        assert_eq!(run.start, page);
        (page, faults) = (run.end, faults + 1);
    }
    assert!(faults < 10, "{faults} faults for 100 pages");
    let stats = remote.stats();
    assert_eq!((stats.faults.zero, stats.zeros_ahead_pages), (faults, page - 100 - faults));
    assert_eq!(stats.resident_pages, page - 100);
    assert_eq!(zeros(&mut remote, 599).end, 600, "what servers have is no zeros");
    for scattered in [300, 900, 350, 800, 450, 700] {
        zeros(&mut remote, scattered);
    }
    assert_eq!(
        zeros(&mut remote, 500),
        500..501,
        "nothing is expected of those that use memory here and there"
    );
}

#[test]
fn memory_is_provided_ahead_into_free_room_alone() {
    let mut remote = split(40, [], []);
    let (mut page, mut runs) = (0, vec![]);
    while let FaultAnswer::Zeros(run) = remote.missing_fault(page, true, ms(0)).answer {
        page = run.end;
        runs.push(run.end - run.start);
    }
    assert_eq!(page, 40, "all of the limit can be used: {runs:?}");
    assert_eq!(runs.last(), Some(&1), "the last room is for what is waited for: {runs:?}");
}

#[test]
fn a_page_that_comes_back_soon_stays_longer() {
    let mut remote = split(400, [], []);
    for page in 0..300 {
        remote.missing_fault(page, true, ms(0));
    }
    let victims = evict(&mut remote, 10);
    assert_eq!(victims.dirty, (0..10).collect::<Vec<_>>(), "first in, first out");
    let server = remote.servers.holder(3).unwrap();
    remote.missing_fault(3, true, ms(0));
    remote.arrived(3, server, ms(0));
    assert_eq!(remote.stats().refaults, 1);
    // Pages used once since then leave, down to their share; the one that came back is still here.
    let later = evict(&mut remote, 150);
    assert_eq!(later.dirty.len(), 150);
    assert!(remote.pages.resident().contains(3));
    assert_eq!(remote.pages.class(3), Class::Long);
}

#[test]
fn clean_pages_leave_before_dirty_ones_that_are_not_twice_as_old() {
    // Nothing is provided ahead over what servers have.
    let mut remote = split(100, [], (0..40).map(|page| 2 * page + 1).chain([500]));
    for page in 0..9 {
        remote.missing_fault(2 * page, true, ms(0));
    }
    bring(&mut remote, 500);
    assert_eq!(remote.victims(1, ms(0)), Victims { clean: vec![], dirty: vec![0] });
    for page in 9..20 {
        remote.missing_fault(2 * page, true, ms(0));
    }
    assert_eq!(remote.victims(1, ms(0)), Victims { clean: vec![500], dirty: vec![] });
    assert_eq!(remote.victims(1, ms(0)), Victims { clean: vec![], dirty: vec![2] });
}

#[test]
fn cold_pages_go_first_and_pinned_ones_never() {
    let mut remote = split(100, 0..90, []);
    remote.set_cold(&set(40..50), &set(0..20));
    assert_eq!(evict(&mut remote, 10).dirty, (40..50).collect::<Vec<_>>());
    assert_eq!(evict(&mut remote, 5).dirty, (20..25).collect::<Vec<_>>());
    assert_eq!(evict(&mut remote, 100).dirty.len(), 55);
    assert_eq!(remote.pages.in_file(), 20);
    // They may take no more than half of the limit.
    let mut remote = split(100, 0..90, []);
    remote.set_cold(&set([]), &set(0..90));
    assert_eq!(evict(&mut remote, 100).dirty.len(), 40);
    // Once they are no longer pinned they can go.
    remote.set_cold(&set([]), &set([]));
    assert_eq!(evict(&mut remote, 100).dirty.len(), 50);
}

#[test]
fn what_faults_show_to_be_used_is_not_cold() {
    let mut remote = split(100, 0..20, [50]);
    bring(&mut remote, 50);
    remote.set_cold(&set((0..20).chain([50])), &set([]));
    let victims = evict(&mut remote, 20);
    assert_eq!((victims.dirty, victims.clean), ((0..20).collect::<Vec<_>>(), vec![]));
}

#[test]
fn a_cold_page_that_is_written_is_not_cold() {
    let mut remote = split(100, [], 0..90);
    for page in 0..40 {
        if remote.pages.remote().contains(page) {
            bring(&mut remote, page);
        }
    }
    remote.set_cold(&set(10..12), &set([]));
    assert_eq!(remote.write_fault(10), WriteFault::Unprotect);
    let victims = remote.victims(2, ms(0));
    assert!(victims.clean.contains(&11) && !victims.dirty.contains(&10), "{victims:?}");
}

#[test]
fn direct_io_has_its_time_before_a_page_goes() {
    let mut remote = split(10, 0..10, []);
    remote.direct_io_window = ms(50);
    let page = remote.victims(1, ms(100)).dirty[0];
    let server = remote.put_to(page)[0];
    let not_asked = || panic!("too early");
    assert_eq!(remote.put_done(page, server, ms(120), not_asked), PutDone::NotYet(ms(150)));
    assert_eq!(remote.finish_put(page, ms(150), || false), PutDone::Changed);
    assert_eq!(remote.stale(9), [Stale { server, runs: vec![page..page + 1] }]);
    assert_eq!(remote.finish_put(page, ms(151), || true), PutDone::Cancelled);
}

#[test]
fn a_copy_is_not_stale_while_its_put_is_under_way() {
    let mut remote = split(10, 0..10, []);
    let page = remote.victims(1, ms(0)).dirty[0];
    let server = remote.put_to(page)[0];
    assert_eq!(remote.write_fault(page), WriteFault::Unprotect);
    assert_eq!(remote.stale(9), []);
    assert!(!remote.victims(10, ms(0)).dirty.contains(&page), "put twice at once");
    assert_eq!(remote.put_done(page, server, ms(0), || true), PutDone::Cancelled);
    // The next put overwrites what the last one left, so that it need not be dropped.
    assert_eq!(remote.servers.list[server].stale, set([page]));
    assert_eq!(remote.victims(10, ms(0)).dirty, [page]);
    assert_eq!(remote.stale(9), []);
}

#[test]
fn a_full_server_is_passed_over() {
    let mut remote = split(10, 0..10, []);
    let page = remote.victims(1, ms(0)).dirty[0];
    let server = remote.put_to(page)[0];
    assert_eq!(remote.put_failed(page, server, PutFailure::Full), PutFailed::Another(1 - server));
    assert_eq!(remote.put_failed(page, 1 - server, PutFailure::Full), PutFailed::Back);
    assert_eq!(remote.victims(1, ms(0)), Victims::default(), "nobody has room");
    assert_eq!(remote.missing_fault(500, true, ms(0)).answer, FaultAnswer::NoRoom);
    assert!(remote.is_stuck());
    assert_eq!(remote.put_to(page), [0usize; 0]);
    let added = remote.add_server(ROOM).unwrap();
    assert!(!remote.is_stuck());
    let page = remote.victims(1, ms(0)).dirty[0];
    assert_eq!(remote.put_to(page), [added]);
}

#[test]
fn memory_that_became_remote_after_the_question_is_not_dropped() {
    let mut remote = split(10, [1], [2, 3]);
    remote.begin_reclaim();
    let server = remote.victims(1, ms(0)).dirty.iter().map(|page| remote.put_to(*page)[0]).next();
    assert_eq!(remote.put_done(1, server.unwrap(), ms(0), || true), PutDone::Punch);
    assert_eq!(remote.reclaim_remote(&set([1, 2])), [1, 0]);
    assert_eq!(remote.stale(9), [Stale { server: 0, runs: vec![2..3] }]);
    assert_eq!(fetched(&remote.missing_fault(1, false, ms(0)))[0], 1);
    assert!(matches!(remote.missing_fault(2, false, ms(0)).answer, FaultAnswer::Zeros(_)));
    assert_eq!(remote.reclaim_remote(&set([3])), [0, 0], "nothing was begun");
}

#[test]
fn a_clean_page_that_was_given_back_has_no_copies() {
    let mut remote = split(10, [], [2]);
    bring(&mut remote, 2);
    assert_eq!(remote.missing_fault(2, false, ms(0)).answer, FaultAnswer::Present);
    remote.given_back(2);
    assert_eq!(remote.stale(9), [Stale { server: 0, runs: vec![2..3] }]);
    assert_eq!(remote.victims(9, ms(0)), Victims { clean: vec![], dirty: vec![2] });
}

#[test]
fn a_lost_page_is_never_read_as_zeros() {
    let mut remote = split(10, [], 0..4);
    assert!(matches!(remote.missing_fault(0, false, ms(0)).answer, FaultAnswer::Fetch(_)));
    assert_eq!(remote.server_lost(0), []);
    assert_eq!(remote.arrived(0, 0, ms(0)), Arrived::Ignore);
    assert_eq!(remote.lost_pages(), &set(0..4));
    assert_eq!(remote.missing_fault(1, true, ms(0)).answer, FaultAnswer::Lost);
    assert_eq!(remote.missing_fault(PAGES, true, ms(0)).answer, FaultAnswer::Lost);
    remote.begin_merge();
    assert!(!remote.is_merged());
}

#[test]
fn a_server_can_be_done_without_if_these_others_have_all_that_is_not_here() {
    let config = RemoteConfig {
        resident_pages_max: 40,
        copies: 2,
        servers: vec![ROOM; 3],
        read_ahead_pages_max: 1,
        direct_io_window: None,
    };
    let held = vec![set(0..20), set(0..10), set(10..20)];
    let mut remote = Remote::new(PAGES, config, &set([]), held).unwrap();
    assert!(remote.can_lose(0, &[1, 2]) && remote.can_lose(1, &[0]));
    assert!(!remote.can_lose(0, &[]), "nobody else is known to have them");
    assert!(!remote.can_lose(0, &[1]), "the other half may be nowhere else");
    assert!(!remote.can_lose(0, &[0, 1]), "what is on it alone goes with it");
    assert_eq!(remote.server_lost(2), []);
    assert!(!remote.can_lose(0, &[1, 2]), "one that is gone has nothing");
    let asked = fetched(&remote.missing_fault(10, false, ms(0)));
    assert!(!remote.can_lose(0, &[1]), "what was asked for has not come");
    arrive(&mut remote, &asked);
    for page in 11..20 {
        assert!(remote.is_here(page) || !remote.can_lose(0, &[1]), "{page} is on it alone");
        if !remote.is_here(page) {
            bring(&mut remote, page);
        }
    }
    assert!(remote.can_lose(0, &[1]));
}

#[test]
fn what_is_to_be_read_comes_as_far_as_there_is_room() {
    let mut remote = split(6, [0, 1], 2..40);
    // One fault waits: its page comes first.
    let fault = fetched(&remote.missing_fault(39, false, ms(0)));
    let mut asked = |pages| {
        let fetches = remote.fetch_to_read(pages);
        fetches.into_iter().flat_map(|fetch| fetch.runs).flatten().collect::<Vec<u64>>()
    };
    assert_eq!(asked(0..5), [2, 3, 4][..4 - fault.len()]);
    assert_eq!(asked(0..5), [0; 0], "there is room for no more");
    assert!(!remote.is_here(2));
    arrive(&mut remote, &[2]);
    assert!(remote.is_here(2));
}

#[test]
fn a_contradictory_placement_is_refused() {
    let config = |copies| RemoteConfig {
        resident_pages_max: 4,
        copies,
        servers: vec![ServerRoom { reserve_pages: 5 }; 2],
        read_ahead_pages_max: 1,
        direct_io_window: None,
    };
    let new = |copies, resident: PageSet, remote: Vec<PageSet>| {
        Remote::new(PAGES, config(copies), &resident, remote).map(drop)
    };
    let twice = Err(RemoteError::PlacedTwice(3));
    assert_eq!(new(1, set([3]), vec![set([3]), set([])]), twice);
    assert_eq!(new(1, set([]), vec![set([2, 3]), set([3])]), twice);
    assert_eq!(new(2, set([]), vec![set([2, 3]), set([3])]), Ok(()));
    let small = PageSet::new(5);
    assert_eq!(new(1, small, vec![set([]), set([])]), Err(RemoteError::WrongPlacement));
    assert_eq!(new(1, set([]), vec![set([])]), Err(RemoteError::WrongPlacement));
    let many = RemoteError::TooManyResident { resident: 5, limit: 4 };
    assert_eq!(new(1, set(0..5), vec![set([]), set([])]), Err(many));
    let remote = RemoteError::TooManyRemote { server: 1, pages: 6, reserve: 5 };
    assert_eq!(new(1, set([]), vec![set([]), set(0..6)]), Err(remote));
    let copies = PlacementError::Copies { copies: 3, servers: 2 };
    assert_eq!(new(3, set([]), vec![set([]), set([])]), Err(RemoteError::Servers(copies)));
}
