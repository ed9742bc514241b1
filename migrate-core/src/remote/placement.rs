//! Which pages a split guest takes to its main host, and which server has each of the others.
//!
//! The hottest pages go to the main host: those in the working set first, then those written most
//! often. The rest is spread over the servers by chunks of 2 MiB, so that neighbours, which are used
//! together, are fetched from one server.
//!
//! A chunk goes to the server that scores highest for it (weighted rendezvous hashing): each server
//! gets a share by its room, and a server that comes or goes moves only its own chunks. A server
//! without room is passed over. The same rule places pages that are evicted later ([`server_of`]).
//!
//! Invariants: every page in use is in `main`, or on as many servers as there are copies; no server
//! has more than its room, `main` no more than the limit minus the slack.

use thiserror::Error;
use xxhash_rust::xxh3::xxh3_64;

use super::servers::Mask;
use super::{SERVERS_MAX, ServerRoom};
use crate::error::{Classify, ErrorBin};
use crate::pageset::PageSet;

/// Pages that stay together on a server: 2 MiB.
pub const CHUNK_PAGES: u64 = 512;

/// Least room in pages that is kept for faults.
const SLACK_PAGES_MIN: u64 = 64;

/// Part of the resident limit that is kept for faults.
const SLACK_SHARE: u64 = 64;

/// Ranks that pages are told apart by: heat, and whether they are in the working set.
const RANKS: usize = 512;

/// Pages of the resident limit that are kept free for faults, so that none waits for an eviction.
pub fn slack_pages(resident_pages_max: u64) -> u64 {
    (resident_pages_max / SLACK_SHARE).max(SLACK_PAGES_MIN).min(resident_pages_max / 2)
}

/// The server among these, given with their numbers and rooms in pages, that a chunk of guest memory
/// goes to. None if no server has room.
pub fn server_of(chunk: u64, servers: impl Iterator<Item = (usize, u64)>) -> Option<usize> {
    let open = servers.filter(|(_, reserve_pages)| *reserve_pages > 0);
    let scores = open.map(|(server, reserve_pages)| (score(chunk, server, reserve_pages), server));
    scores.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, server)| server)
}

/// The server that the chunk of a page goes to.
pub(super) fn best_server(page: u64, servers: impl Iterator<Item = (usize, u64)>) -> Option<usize> {
    server_of(page / CHUNK_PAGES, servers)
}

fn score(chunk: u64, server: usize, weight: u64) -> f64 {
    let mut bytes = [0; 2 * size_of::<u64>()];
    let (low, high) = bytes.split_at_mut(size_of::<u64>());
    low.copy_from_slice(&chunk.to_le_bytes());
    high.copy_from_slice(&(server as u64).to_le_bytes());
    // In (0, 1), so that the logarithm is finite and not zero.
    let chance = ((xxh3_64(&bytes) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    weight as f64 / -chance.ln()
}

/// Where the pages in use go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// To the main host.
    pub main: PageSet,
    /// To each server.
    pub servers: Vec<PageSet>,
}

/// Why memory cannot be placed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PlacementError {
    /// The servers have less room than is needed.
    #[error(
        "{needed_pages} pages in use have to go to memory servers, {copies} times each, and these \
         can take {placed_pages}; reserve more on them, add a server, or raise the resident limit"
    )]
    TooSmall {
        /// Pages that the main host has no room for.
        needed_pages: u64,
        /// Copies of each.
        copies: usize,
        /// Of those pages, how many the servers can take, every copy of a page on another one.
        placed_pages: u64,
    },
    /// No servers, or too many.
    #[error("{0} memory servers were named; name 1 to {SERVERS_MAX}")]
    Servers(usize),
    /// The copies cannot be on different servers.
    #[error(
        "{copies} copies on {servers} memory servers are not possible; ask for 1 or 2, and name as many servers"
    )]
    Copies {
        /// Copies asked for.
        copies: usize,
        /// Servers there are.
        servers: usize,
    },
}

impl Classify for PlacementError {
    fn bin(&self) -> ErrorBin {
        ErrorBin::CallerMisuse
    }
}

/// Checks that `copies` can be kept on `servers`.
pub(super) fn check_servers(servers: usize, copies: usize) -> Result<(), PlacementError> {
    if !(1..=SERVERS_MAX).contains(&servers) {
        return Err(PlacementError::Servers(servers));
    }
    if !(1..=2).contains(&copies) || copies > servers {
        return Err(PlacementError::Copies { copies, servers });
    }
    Ok(())
}

/// Places the pages `in_use` of a guest: the hottest ones on the main host, which may have
/// `resident_pages_max` and keeps [`slack_pages`] of them free, the others on the servers, each page on
/// `copies` of them. `hot` is the working set, `heat` tells how often a page is written
/// ([`crate::order`]).
///
/// # Errors
/// If the servers are too small, too few or too many.
pub fn place(
    in_use: &PageSet,
    hot: &PageSet,
    heat: impl Fn(u64) -> u8,
    resident_pages_max: u64,
    servers: &[ServerRoom],
    copies: usize,
) -> Result<Placement, PlacementError> {
    check_servers(servers.len(), copies)?;
    let room = resident_pages_max - slack_pages(resident_pages_max);
    let rank = |page| usize::from(hot.contains(page)) << 8 | usize::from(heat(page));
    let main = hottest(in_use, rank, room);
    let mut rest = in_use.clone();
    rest.subtract(&main);
    let servers = spread(&rest, servers, copies)?;
    Ok(Placement { main, servers })
}

/// At most `room` of these pages, those with the highest `rank` below [`RANKS`].
fn hottest(pages: &PageSet, rank: impl Fn(u64) -> usize, room: u64) -> PageSet {
    let mut quotas = [0u64; RANKS];
    for page in pages.iter() {
        if let Some(count) = quotas.get_mut(rank(page)) {
            *count += 1;
        }
    }
    let mut left = room;
    for quota in quotas.iter_mut().rev() {
        *quota = left.min(*quota);
        left -= *quota;
    }
    let mut chosen = PageSet::new(pages.size());
    for page in pages.iter() {
        if let Some(quota) = quotas.get_mut(rank(page)).filter(|quota| **quota > 0) {
            *quota -= 1;
            chosen.insert(page);
        }
    }
    chosen
}

/// Spreads pages over the servers.
fn spread(
    pages: &PageSet,
    rooms: &[ServerRoom],
    copies: usize,
) -> Result<Vec<PageSet>, PlacementError> {
    let mut free: Vec<u64> = rooms.iter().map(|room| room.reserve_pages).collect();
    let mut left = pages.len();
    let placed = fitting(&free, left, copies);
    if placed < left {
        return Err(PlacementError::TooSmall { needed_pages: left, copies, placed_pages: placed });
    }
    let mut sets = vec![PageSet::new(pages.size()); rooms.len()];
    let (mut chunk, mut order) = (None, Vec::new());
    for page in pages.iter() {
        if chunk != Some(page / CHUNK_PAGES) {
            chunk = Some(page / CHUNK_PAGES);
            order = preference(page / CHUNK_PAGES, rooms);
        }
        left -= 1;
        let mut chosen = choose(&order, &free, copies);
        if !leaves_room(&chosen, &free, left, copies) {
            let mut roomiest: Vec<usize> = (0..free.len()).collect();
            roomiest.sort_by_key(|server| std::cmp::Reverse(free.get(*server).copied()));
            chosen = choose(&roomiest, &free, copies);
        }
        for server in chosen.iter() {
            if let (Some(free), Some(set)) = (free.get_mut(server), sets.get_mut(server)) {
                *free -= 1;
                set.insert(page);
            }
        }
    }
    Ok(sets)
}

/// The servers in the order in which a chunk prefers them.
fn preference(chunk: u64, rooms: &[ServerRoom]) -> Vec<usize> {
    let mut taken = Mask::default();
    let next = || {
        let open = rooms.iter().enumerate().filter(|(server, _)| !taken.contains(*server));
        let server = server_of(chunk, open.map(|(server, room)| (server, room.reserve_pages)))?;
        taken.insert(server);
        Some(server)
    };
    std::iter::from_fn(next).collect()
}

/// The first servers with room.
fn choose(order: &[usize], free: &[u64], copies: usize) -> Mask {
    let mut chosen = Mask::default();
    let open = order.iter().filter(|server| free.get(**server).is_some_and(|free| *free > 0));
    open.take(copies).for_each(|server| chosen.insert(*server));
    chosen
}

/// Of `pages`, how many fit with every copy of a page on another server: one server is of no use
/// beyond a copy of each.
fn fitting(free: &[u64], pages: u64, copies: usize) -> u64 {
    let fits = |pages: u64| {
        let places: u64 = free.iter().map(|free| *free.min(&pages)).sum();
        places >= pages.saturating_mul(copies as u64)
    };
    // What fits, fits with fewer pages too.
    let (mut some, mut too_many) = (0, pages.saturating_add(1));
    while too_many - some > 1 {
        let middle = some.midpoint(too_many);
        if fits(middle) { some = middle } else { too_many = middle }
    }
    some
}

/// Whether `left` more pages still fit after one on the `chosen` servers. With one copy they always
/// do; with two, the server with the most room may be needed for every page.
fn leaves_room(chosen: &Mask, free: &[u64], left: u64, copies: usize) -> bool {
    let after = free.iter().enumerate().map(|(server, free)| {
        let taken = u64::from(chosen.contains(server));
        free.saturating_sub(taken).min(left)
    });
    chosen.len() == copies && after.sum::<u64>() >= left.saturating_mul(copies as u64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 300 * CHUNK_PAGES;

    fn rooms(rooms: &[u64]) -> Vec<ServerRoom> {
        rooms.iter().map(|reserve_pages| ServerRoom { reserve_pages: *reserve_pages }).collect()
    }

    #[test]
    fn servers_get_whole_chunks_by_their_room() {
        let mut in_use = PageSet::new(PAGES);
        in_use.insert_range(0..PAGES);
        let none = PageSet::new(PAGES);
        let servers = rooms(&[2 * PAGES, PAGES, PAGES]);
        let placement = place(&in_use, &none, |_| 0, 0, &servers, 1).unwrap();
        let shares: Vec<u64> =
            placement.servers.iter().map(|set| set.len() * 100 / PAGES).collect();
        assert!((42..58).contains(&shares[0]) && (17..33).contains(&shares[1]), "{shares:?}");
        for set in &placement.servers {
            for chunk in 0..PAGES / CHUNK_PAGES {
                let range = chunk * CHUNK_PAGES..(chunk + 1) * CHUNK_PAGES;
                let pages = set.iter_range(range).count() as u64;
                assert!(pages == 0 || pages == CHUNK_PAGES, "{pages} pages of a chunk");
            }
        }
        // A server that comes takes chunks from the others; none moves between these.
        let more = rooms(&[2 * PAGES, PAGES, PAGES, PAGES]);
        let grown = place(&in_use, &none, |_| 0, 0, &more, 1).unwrap();
        for (before, after) in placement.servers.iter().zip(&grown.servers) {
            let mut moved = after.clone();
            moved.subtract(before);
            assert!(moved.is_empty());
        }
        assert!(grown.servers[3].len() * 100 / PAGES > 12);
    }

    #[test]
    fn the_hottest_pages_stay() {
        let mut in_use = PageSet::new(PAGES);
        in_use.insert_range(0..1000);
        let mut hot = PageSet::new(PAGES);
        hot.insert_range(500..700);
        hot.insert_range(5000..6000);
        let heat = |page: u64| if page.is_multiple_of(10) { 200 } else { 3 };
        let place = |limit| place(&in_use, &hot, heat, limit, &rooms(&[PAGES]), 1).unwrap().main;
        // Half of 100 is kept free.
        let few = place(100);
        assert_eq!(few.len(), 50);
        assert!(few.iter().all(|page| (500..700).contains(&page)));
        assert_eq!(few.iter().filter(|page| page % 10 == 0).count(), 20);
        let more = place(300 + 64);
        assert_eq!(more.len(), 300);
        assert!((500..700).all(|page| more.contains(page)));
        assert_eq!(more.iter().filter(|page| page % 10 == 0).count(), 100);
        assert_eq!(place(5000), in_use);
    }

    proptest! {
        #[test]
        fn all_that_is_in_use_has_its_places(
            runs in prop::collection::vec((0..PAGES, 1u64..700), 0..6),
            limit in 0u64..600,
            free in prop::collection::vec(0u64..1500, 1..5),
            copies in 1usize..3,
        ) {
            let mut in_use = PageSet::new(PAGES);
            runs.iter().for_each(|(first, pages)| in_use.insert_range(*first..first + pages));
            let servers = rooms(&free);
            let none = PageSet::new(PAGES);
            match place(&in_use, &none, |_| 0, limit, &servers, copies) {
                Ok(placement) => {
                    prop_assert!(placement.main.len() <= limit - slack_pages(limit));
                    for page in 0..PAGES {
                        let on = placement.servers.iter().filter(|set| set.contains(page)).count();
                        let main = placement.main.contains(page);
                        let wanted = if in_use.contains(page) && !main { copies } else { 0 };
                        prop_assert_eq!(on, wanted);
                        prop_assert!(!main || in_use.contains(page));
                    }
                    for (set, room) in placement.servers.iter().zip(&free) {
                        prop_assert!(set.len() <= *room);
                    }
                }
                Err(PlacementError::TooSmall { needed_pages, placed_pages, .. }) => {
                    prop_assert!(placed_pages < needed_pages);
                    // One more page would not find its copies, whichever were chosen.
                    let more = placed_pages + 1;
                    let places: u64 = free.iter().map(|free| *free.min(&more)).sum();
                    prop_assert!(places < more * copies as u64);
                }
                Err(PlacementError::Copies { .. }) => prop_assert!(copies > free.len()),
                Err(error) => return Err(TestCaseError::fail(error.to_string())),
            }
        }
    }
}
