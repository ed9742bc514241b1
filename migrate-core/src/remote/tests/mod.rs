//! Random histories of a guest, its evictor and its servers, against a model of the memory; and
//! single decisions.

#[expect(clippy::single_range_in_vec_init, reason = "one run is meant")]
mod decisions;
mod flush;
mod world;

use proptest::prelude::*;

use super::*;
use world::{PAGES, World};

/// How a history begins.
#[derive(Debug, Clone)]
pub(super) struct Setup {
    /// Pages with content.
    pub(super) used: u64,
    pub(super) limit: u64,
    pub(super) copies: usize,
    pub(super) rooms: Vec<u64>,
    /// Pages by which each server has less room than it promised.
    pub(super) missing_room: usize,
    pub(super) window: Option<Duration>,
}

#[derive(Debug, Clone)]
enum Op {
    Read(u64),
    Write(u64),
    Fault,
    Evict(usize),
    Stale(usize),
    Send(usize),
    Serve(usize, bool),
    Hear(usize, bool),
    Pass(u64),
    Dma(u64, u64),
    Free(u64, u64),
    Balloon(u64),
    FetchToRead(u64, u64),
    BeginReclaim,
    AskUnused,
    ReclaimRemote,
    Candidates(usize),
    ReclaimDone,
    Cold(u64, u64, u64),
    Kill(usize, bool),
    AddServer(u64),
    Drain(usize),
    Moves(usize),
    StepMove,
    Merge,
    FetchMore(usize),
    Limit(u64),
    Settle,
    BeginFlush,
    EndFlush,
    Flush(usize),
    Stop,
    Resume,
    SetReserve(usize, u64),
}

/// The longest that direct I/O takes.
const WINDOW: Duration = Duration::from_millis(20);

impl World {
    fn run(&mut self, op: &Op) {
        match op {
            Op::Read(page) => self.access(*page, false),
            Op::Write(page) => self.access(*page, true),
            Op::Fault => self.fault(),
            Op::Evict(pages) => self.evict(*pages),
            Op::Stale(pages) => self.stale(*pages),
            Op::Send(count) => (0..*count).for_each(|_| self.send()),
            Op::Serve(server, puts) => self.serve(*server, *puts),
            Op::Hear(server, puts) => self.hear(*server, *puts),
            Op::Pass(ms) => self.pass(Duration::from_millis(*ms)),
            Op::Dma(page, ms) => self.begin_dma(*page, Duration::from_millis(*ms)),
            Op::Free(page, count) => (*page..(page + count).min(PAGES)).for_each(|p| self.free(p)),
            Op::Balloon(page) => self.balloon(*page),
            Op::FetchToRead(first, count) => {
                let fetches = self.remote.fetch_to_read(*first..(first + count).min(PAGES));
                self.send_fetches(fetches);
            }
            Op::BeginReclaim => self.begin_reclaim(),
            Op::AskUnused => self.ask_unused(),
            Op::ReclaimRemote => self.reclaim_remote(),
            Op::Candidates(pages) => self.reclaim_candidates(*pages),
            Op::ReclaimDone => self.reclaim_done(),
            Op::Cold(first, count, pinned) => {
                let (mut cold, mut hot) = (PageSet::new(PAGES), PageSet::new(PAGES));
                cold.insert_range(*first..first + count);
                hot.insert_range(*pinned..pinned + 6);
                self.remote.set_cold(&cold, &hot);
            }
            Op::Kill(server, puts_first) => self.kill(*server, *puts_first),
            Op::AddServer(room) if self.servers.len() < 5 => self.add_server(*room),
            Op::AddServer(_) => {}
            Op::Drain(server) => self.remote.drain(*server),
            Op::Moves(pages) => self.begin_moves(*pages),
            Op::StepMove => self.step_move(),
            Op::Merge => self.begin_merge(),
            Op::FetchMore(pages) => self.fetch_more(*pages),
            Op::Settle => self.settle_for(2),
            Op::Limit(pages) => self.set_limit(*pages),
            Op::BeginFlush => self.begin_flush(),
            Op::EndFlush => self.remote.end_flush(),
            Op::Flush(pages) => self.flush(*pages),
            Op::Stop => self.stop(),
            Op::Resume => self.resume(),
            Op::SetReserve(server, pages) => self.set_reserve(*server, *pages),
        }
        self.check();
        self.assert_lost();
    }
}

/// Mostly few pages, so that histories meet; some where a chunk ends.
fn page() -> impl Strategy<Value = u64> {
    prop_oneof![6 => 0u64..24, 3 => 0u64..90, 2 => 500u64..524, 1 => 0..PAGES]
}

/// What happens to guests all the time.
fn common() -> impl Strategy<Value = Op> {
    let server = || 0usize..3;
    prop_oneof![
        8 => page().prop_map(Op::Read),
        8 => page().prop_map(Op::Write),
        14 => Just(Op::Fault),
        6 => (1usize..20).prop_map(Op::Evict),
        3 => (1usize..20).prop_map(Op::Stale),
        10 => (1usize..6).prop_map(Op::Send),
        18 => (server(), any::<bool>()).prop_map(|(server, puts)| Op::Serve(server, puts)),
        18 => (server(), any::<bool>()).prop_map(|(server, puts)| Op::Hear(server, puts)),
        3 => (0u64..15).prop_map(Op::Pass),
    ]
}

fn reclaiming() -> impl Strategy<Value = Op> {
    prop_oneof![
        30 => common(),
        4 => (page(), 1u64..8).prop_map(|(page, count)| Op::Free(page, count)),
        1 => page().prop_map(Op::Balloon),
        3 => (page(), 1u64..8).prop_map(|(page, count)| Op::FetchToRead(page, count)),
        2 => Just(Op::BeginReclaim),
        2 => Just(Op::AskUnused),
        2 => Just(Op::ReclaimRemote),
        2 => (1usize..9).prop_map(Op::Candidates),
        4 => Just(Op::ReclaimDone),
        8 => flushing(),
    ]
}

/// A flush, which begins and ends at any time.
fn flushing() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => Just(Op::BeginFlush),
        1 => Just(Op::EndFlush),
        12 => (1usize..20).prop_map(Op::Flush),
        1 => Just(Op::Stop),
        3 => Just(Op::Resume),
    ]
}

/// Memory that is freed, asked about, used again and given back, over and over.
fn freeing() -> impl Strategy<Value = Op> {
    let few = || 0u64..8;
    prop_oneof![
        4 => few().prop_map(Op::Read),
        8 => few().prop_map(Op::Write),
        12 => Just(Op::Fault),
        6 => (1usize..9).prop_map(Op::Evict),
        8 => Just(Op::Send(4)),
        14 => (0usize..3, any::<bool>()).prop_map(|(server, puts)| Op::Serve(server, puts)),
        14 => (0usize..3, any::<bool>()).prop_map(|(server, puts)| Op::Hear(server, puts)),
        2 => Just(Op::Pass(20)),
        5 => (few(), 1u64..4).prop_map(|(page, count)| Op::Free(page, count)),
        3 => few().prop_map(Op::Balloon),
        1 => Just(Op::BeginReclaim),
        2 => Just(Op::AskUnused),
        2 => Just(Op::ReclaimRemote),
        2 => (1usize..9).prop_map(Op::Candidates),
        3 => Just(Op::ReclaimDone),
        1 => Just(Op::Stale(9)),
        6 => Just(Op::Settle),
        6 => flushing(),
    ]
}

/// What happens to a guest whose servers stay, direct I/O included.
fn everywhere() -> impl Strategy<Value = Op> {
    prop_oneof![
        60 => reclaiming(),
        6 => (page(), 0u64..25).prop_map(|(page, ms)| Op::Dma(page, ms)),
        1 => (page(), 0u64..60, page()).prop_map(|(first, count, hot)| Op::Cold(first, count, hot)),
        1 => (2u64..40).prop_map(Op::Limit),
    ]
}

fn everything() -> impl Strategy<Value = Op> {
    prop_oneof![
        60 => reclaiming(),
        4 => (page(), 0u64..25).prop_map(|(page, ms)| Op::Dma(page, ms)),
        2 => (page(), 0u64..60, page()).prop_map(|(first, count, hot)| Op::Cold(first, count, hot)),
        3 => (1usize..9).prop_map(Op::Moves),
        6 => Just(Op::StepMove),
        1 => (0usize..4, any::<bool>()).prop_map(|(server, first)| Op::Kill(server, first)),
        1 => (40u64..400).prop_map(Op::AddServer),
        1 => (0usize..4).prop_map(Op::Drain),
        1 => (2u64..40).prop_map(Op::Limit),
        1 => (0usize..4, 0u64..300).prop_map(|(server, pages)| Op::SetReserve(server, pages)),
        2 => (1usize..30).prop_map(Op::FetchMore),
    ]
}

fn setup() -> impl Strategy<Value = Setup> {
    let rooms = prop::collection::vec(60u64..300, 2..4);
    let window = prop_oneof![Just(None), Just(Some(WINDOW))];
    (0u64..60, 4u64..40, 1usize..3, rooms, prop_oneof![3 => Just(0), 1 => 1usize..60], window)
        .prop_map(|(used, limit, copies, rooms, missing_room, window)| Setup {
            used,
            limit,
            copies: copies.min(rooms.len()),
            rooms,
            missing_room,
            window,
        })
}

fn roomy(copies: usize) -> Setup {
    let rooms = vec![2 * PAGES; 3];
    Setup { used: 80, limit: 16, copies, rooms, missing_room: 0, window: Some(WINDOW) }
}

/// A history, in the middle of which all may be brought back.
fn run(setup: &Setup, ops: &[Op], merge_at: Option<usize>) -> World {
    let mut world = World::new(setup);
    world.check();
    for (number, op) in ops.iter().enumerate() {
        world.run(op);
        if merge_at == Some(number) {
            world.run(&Op::Merge);
        }
    }
    world
}

proptest! {
    /// Nothing but what was written last is ever read, whatever happens to servers.
    #[test]
    fn the_guest_reads_what_it_wrote(
        setup in setup(),
        ops in prop::collection::vec(everything(), 0..500),
        merge_at in prop::option::of(0usize..700),
    ) {
        let mut world = run(&setup, &ops, merge_at);
        world.settle();
        prop_assert!(world.stuck().is_empty() || world.remote.is_stuck());
        world.merge();
    }

    /// What the guest frees may go, and what it uses again is not taken from it.
    #[test]
    fn freed_memory_is_dropped_and_used_memory_is_not(
        copies in 1usize..3,
        limit in 2u64..12,
        ops in prop::collection::vec(freeing(), 0..400),
    ) {
        let mut world = run(&Setup { used: 10, limit, window: None, ..roomy(copies) }, &ops, None);
        world.settle();
        prop_assert_eq!(world.stuck(), [0u64; 0]);
        world.merge();
    }

    /// With room and without dead servers all that waits is served before anything is brought back.
    #[test]
    fn no_fault_waits_forever(
        copies in 1usize..3,
        ops in prop::collection::vec(reclaiming(), 0..500),
    ) {
        let mut world = run(&roomy(copies), &ops, None);
        world.run(&Op::Resume);
        world.settle();
        prop_assert_eq!(world.stuck(), [0u64; 0]);
        prop_assert_eq!(world.remote.wanted_evictions(), 0);
        for page in 0..100 {
            world.access(page, false);
            world.settle();
        }
        prop_assert_eq!(world.stuck(), [0u64; 0]);
        world.merge();
    }

    /// With two copies one server may die at any moment; then another, once all was copied again.
    #[test]
    fn two_copies_survive_a_server(
        before in prop::collection::vec(reclaiming(), 0..200),
        between in prop::collection::vec(reclaiming(), 0..200),
        dead in 0usize..3,
        puts_first in any::<bool>(),
    ) {
        let mut world = run(&roomy(2), &before, None);
        world.run(&Op::Kill(dead, puts_first));
        prop_assert!(!world.remote.is_lost());
        between.iter().for_each(|op| world.run(op));
        world.add_server(2 * PAGES);
        for _ in 0..4 {
            world.begin_moves(PAGES as usize);
            world.settle();
        }
        prop_assert_eq!(world.remote.stats().under_copied_pages, 0);
        world.run(&Op::Kill((dead + 1) % 3, !puts_first));
        prop_assert!(!world.remote.is_lost());
        world.settle();
        world.merge();
    }

    /// Once a guest that stands still is flushed, it goes on at another main host with what servers have.
    #[test]
    fn a_flushed_guest_can_go_on_elsewhere(
        copies in 1usize..3,
        ops in prop::collection::vec(everywhere(), 0..300),
        limit in 4u64..40,
        after in prop::collection::vec(reclaiming(), 0..100),
    ) {
        let mut world = run(&roomy(copies), &ops, None);
        world.run(&Op::BeginFlush);
        world.run(&Op::Stop);
        prop_assert_eq!(world.remote.flush_room_lacking(), 0);
        world.settle();
        prop_assert_eq!(world.remote.unflushed_pages(), 0);
        prop_assert!(world.remote.is_flushed());
        world.move_main(limit, copies);
        prop_assert_eq!(world.remote.stats().under_copied_pages, 0);
        after.iter().for_each(|op| world.run(op));
        world.run(&Op::Resume);
        for page in 0..100 {
            world.access(page, false);
        }
        world.settle();
        prop_assert_eq!(world.stuck(), [0u64; 0]);
        world.merge();
    }

    /// A server can be taken away while the guest runs.
    #[test]
    fn a_drained_server_is_empty(
        copies in 1usize..3,
        before in prop::collection::vec(reclaiming(), 0..200),
        after in prop::collection::vec(reclaiming(), 0..200),
        drained in 0usize..3,
    ) {
        let mut world = run(&roomy(copies), &before, None);
        world.run(&Op::Drain(drained));
        for (number, op) in after.iter().enumerate() {
            world.run(op);
            if number % 8 == 0 {
                world.run(&Op::Moves(4));
                world.run(&Op::StepMove);
            }
        }
        for _ in 0..4 {
            world.begin_moves(PAGES as usize);
            world.settle();
        }
        prop_assert!(world.remote.is_drained(drained));
        prop_assert!(world.servers[drained].stored.is_empty());
        world.run(&Op::Kill(drained, false));
        prop_assert!(!world.remote.is_lost());
        world.merge();
    }
}

impl Remote {
    /// What the parts say of one another.
    pub(super) fn check(&self) {
        let mut remote_pages = 0;
        for page in 0..self.pages.len() {
            let state = self.pages.state(page);
            let holders = self.servers.holders(page);
            let on_servers =
                matches!(state, State::Clean | State::Remote | State::Coming | State::Dropping);
            assert!(holders.is_empty() || on_servers, "page {page} is {state:?} and held");
            let needs_copy = matches!(state, State::Clean | State::Remote);
            assert!(!needs_copy || !holders.is_empty(), "page {page} is {state:?} and not held");
            let under_copied = state == State::Remote && holders.len() < self.servers.copies;
            assert_eq!(under_copied, self.under_copied.contains(page), "copies of {page}");
            assert_eq!(state == State::Coming, self.coming.contains_key(&page));
            let transfer = self.servers.transfers.get(&page);
            if matches!(state, State::Leaving | State::Flushing) {
                assert!(transfer.is_some_and(|t| !t.cancelled && t.copied_from.is_none()));
            }
            remote_pages += u64::from(state == State::Remote);
        }
        assert_eq!(remote_pages, self.pages.count(State::Remote));
        self.check_queues();
        for (number, server) in self.servers.list.iter().enumerate() {
            let under_way = |(page, transfer): (&u64, &servers::Transfer)| {
                let counts = transfer.pending.or(transfer.done).contains(number);
                let known = server.held.contains(*page) || server.stale.contains(*page);
                assert!(!counts || !known || server.phase == ServerPhase::Gone);
                counts
            };
            let under_way = self.servers.transfers.iter().filter(|t| under_way((t.0, t.1))).count();
            let mut both = server.held.clone();
            both.intersect(&server.stale);
            assert!(both.is_empty());
            if server.phase != ServerPhase::Gone {
                let stored = server.held.len() + server.stale.len() + under_way as u64;
                assert_eq!(server.stored_pages, stored, "server {number}");
            }
        }
    }
    /// Every resident page is in the queue of its class, and no other is in any.
    fn check_queues(&self) {
        let mut queued = [0u64; 2];
        let mut clean_pages = 0;
        for class in [Class::None, Class::Ahead, Class::Recent, Class::Long] {
            let mut next = self.queues.first_dirty(class);
            while let Some(page) = next {
                assert_eq!((self.pages.state(page), self.pages.class(page)), (State::Dirty, class));
                queued[0] += 1;
                next = self.queues.after(page);
            }
            queued[1] += self.queues.len(class);
            clean_pages += self.queues.clean_len(class);
        }
        assert_eq!(queued[0], self.pages.count(State::Dirty));
        assert_eq!(clean_pages, self.pages.count(State::Clean));
        assert_eq!(queued[1], self.pages.resident().len());
    }
}
