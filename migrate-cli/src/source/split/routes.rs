//! Which page goes where.

use migrate_core::pageset::PageSet;
use migrate_core::precopy::Round;
use migrate_core::remote::{CHUNK_PAGES, Placement, ServerRoom, place, server_of, slack_pages};

use super::super::unused::Unused;
use crate::error::EngineError;

/// Fewest pages that a guest may have on its main host: its kernel alone takes some of them.
pub(super) const RESIDENT_PAGES_MIN: u64 = 16 << 8;

/// Part of what the main host may hold that is kept free when the first pages are placed: for those that turn out
/// to be written, and for what the guest touches first.
const SPARE_SHARE: u64 = 8;

/// Of as many pages as the main host may hold, those that go there at first: the rest is for what is written meanwhile.
fn first_on_main(resident_pages: u64) -> u64 {
    resident_pages - resident_pages / SPARE_SHARE
}

/// The fewest pages that a guest which uses all of its memory has on its main host.
pub(super) fn least_on_main(resident_pages: u64) -> u64 {
    let first = first_on_main(resident_pages);
    first - slack_pages(first)
}

/// Pages to reserve on each of `servers` for `pages` that may lie there, `copies` times each. Chunks are spread as
/// evenly as they can be.
pub(super) fn reserve_pages(pages: u64, copies: usize, servers: usize) -> u64 {
    let (copies, servers) = (copies as u64, servers.max(1) as u64);
    let chunks = pages.div_ceil(CHUNK_PAGES) + 1;
    (chunks * copies).div_ceil(servers).saturating_add(1) * CHUNK_PAGES
}

/// What goes to one server in a round.
#[derive(Debug)]
pub(super) struct Share {
    /// Pages to send.
    pub(super) send: PageSet,
    /// Pages that go to the main host from now on.
    pub(super) drop: PageSet,
}

/// Where every page goes that was seen so far.
#[derive(Debug)]
pub(super) struct Routes {
    main: PageSet,
    servers: Vec<PageSet>,
    main_pages_max: u64,
    in_use_pages: u64,
    reserves: Vec<u64>,
    /// Of these, pages that are not taken.
    left: Vec<u64>,
    copies: usize,
}

impl Routes {
    /// Places the pages `in_use`, the `hot` ones first on the main host, which may hold `main_pages_max` later.
    ///
    /// # Errors
    /// If the servers have too little room.
    pub(super) fn new(
        in_use: &PageSet,
        hot: &PageSet,
        main_pages_max: u64,
        reserves: Vec<u64>,
        copies: usize,
    ) -> Result<Self, EngineError> {
        let rooms: Vec<ServerRoom> = reserves
            .iter()
            .map(|reserve_pages| ServerRoom { reserve_pages: *reserve_pages })
            .collect();
        // Nothing was written yet while anybody looked.
        let no_heat = |_| 0;
        let first = first_on_main(main_pages_max);
        let placed = place(in_use, hot, no_heat, first, &rooms, copies)?;
        let Placement { main, servers } = placed;
        let main_pages_max = main_pages_max - slack_pages(main_pages_max);
        let in_use_pages = in_use.len();
        let taken = servers.iter().map(PageSet::len);
        let left =
            reserves.iter().zip(taken).map(|(all, taken)| all.saturating_sub(taken)).collect();
        Ok(Self { main, servers, main_pages_max, in_use_pages, reserves, left, copies })
    }

    /// Takes the servers' pages out of a round: what goes to each of them.
    ///
    /// # Errors
    /// If pages that the guest took since have no place on any server.
    pub(super) fn divide(
        &mut self,
        round: &mut Round,
        unused: Option<&Unused>,
    ) -> Result<Vec<Share>, EngineError> {
        let size = round.dirty.size();
        let mut fresh = round.dirty.clone();
        fresh.subtract(&self.main);
        if let Some(unused) = unused {
            let mut nowhere = fresh.clone();
            self.servers.iter().for_each(|server| nowhere.subtract(server));
            fresh.subtract(&unused.skip(&nowhere));
        }
        let mut shares: Vec<Share> = self
            .servers
            .iter()
            .map(|_| Share { send: PageSet::new(size), drop: PageSet::new(size) })
            .collect();
        self.take_in(&fresh, round.number > 1, &mut shares)?;
        let mut all = round.dirty.clone();
        all.union_with(&round.look);
        for (share, server) in shares.iter_mut().zip(&self.servers) {
            share.send = all.clone();
            share.send.intersect(server);
        }
        round.dirty.intersect(&self.main);
        round.look.intersect(&self.main);
        round.waves.iter_mut().for_each(|wave| wave.intersect(&self.main));
        round.waves.retain(|wave| !wave.is_empty());
        Ok(shares)
    }

    /// Places pages that are not the main host's: new ones, and those that are written `again` while there is
    /// room.
    fn take_in(
        &mut self,
        pages: &PageSet,
        again: bool,
        shares: &mut [Share],
    ) -> Result<(), EngineError> {
        let mut room = self.main_pages_max.saturating_sub(self.main.len());
        for page in pages.iter() {
            let is_placed = self.servers.iter().any(|server| server.contains(page));
            if is_placed && !(again && room > 0) {
                continue;
            }
            if room > 0 {
                room -= 1;
                self.main.insert(page);
                let servers = self.servers.iter_mut().zip(shares.iter_mut()).zip(&mut self.left);
                for ((server, share), left) in
                    servers.filter(|((server, _), _)| server.contains(page))
                {
                    server.remove(page);
                    share.drop.insert(page);
                    *left += 1;
                }
                continue;
            }
            self.insert_remote(page)?;
        }
        Ok(())
    }

    fn insert_remote(&mut self, page: u64) -> Result<(), EngineError> {
        for _ in 0..self.copies {
            let rooms = self.servers.iter().zip(&self.reserves).zip(&self.left).enumerate();
            let open = rooms.filter(|(_, ((server, _), _))| !server.contains(page));
            let open = open.map(|(number, ((_, reserve), left))| {
                (number, if *left > 0 { *reserve } else { 0 })
            });
            let number = server_of(page / CHUNK_PAGES, open).ok_or_else(no_room)?;
            if let (Some(server), Some(left)) =
                (self.servers.get_mut(number), self.left.get_mut(number))
            {
                server.insert(page);
                *left = left.saturating_sub(1);
            }
        }
        Ok(())
    }

    /// Pages that go to the main host.
    pub(super) fn main_pages(&self) -> u64 {
        self.main.len()
    }

    /// Pages that were in use when they were placed.
    pub(super) fn in_use_pages(&self) -> u64 {
        self.in_use_pages
    }
}

fn no_room() -> EngineError {
    EngineError::Misuse {
        what: "The memory servers have no room for what the guest has taken meanwhile".into(),
        remedy: "Allow more on the main host by --resident, or name another server by --memory"
            .into(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const PAGES: u64 = 64 * CHUNK_PAGES;

    fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
        let mut set = PageSet::new(PAGES);
        pages.into_iter().for_each(|page| set.insert(page));
        set
    }

    fn round(number: u32, dirty: PageSet) -> Round {
        let (waves, look) = (vec![dirty.clone()], set([]));
        Round { number, dirty, waves, look, not_before: Duration::ZERO }
    }

    /// What two servers have of a guest all of whose pages are in use, but for the last chunk.
    fn routes(main_pages: u64, reserve: u64, copies: usize) -> Routes {
        let in_use = set(0..PAGES - CHUNK_PAGES);
        Routes::new(&in_use, &set(0..100), main_pages, vec![reserve; 2], copies).unwrap()
    }

    #[test]
    fn every_page_goes_to_one_place_and_hot_ones_to_the_main_host() {
        let mut routes = routes(8 * CHUNK_PAGES, PAGES, 1);
        let mut first = round(1, set(0..PAGES - CHUNK_PAGES));
        let shares = routes.divide(&mut first, None).unwrap();
        assert!((0..100).all(|page| first.dirty.contains(page)));
        assert!(first.dirty.len() <= routes.main_pages_max);
        let sent: u64 = shares.iter().map(|share| share.send.len()).sum();
        assert_eq!(sent + first.dirty.len(), PAGES - CHUNK_PAGES);
        assert!(shares.iter().all(|share| share.drop.is_empty() && !share.send.is_empty()));
        assert_eq!(first.waves, [first.dirty.clone()]);
    }

    #[test]
    fn a_guest_that_uses_all_of_its_memory_fits_what_was_reserved() {
        for main_pages in [RESIDENT_PAGES_MIN, 8 * CHUNK_PAGES + 7, PAGES / 2, PAGES] {
            for (copies, servers) in [(1, 1), (1, 3), (2, 2)] {
                let reserve = reserve_pages(PAGES - least_on_main(main_pages), copies, servers);
                let all = set(0..PAGES);
                Routes::new(&all, &set(0..9), main_pages, vec![reserve; servers], copies).unwrap();
            }
        }
    }

    #[test]
    fn what_is_written_again_moves_to_the_main_host_while_there_is_room() {
        let mut routes = routes(8 * CHUNK_PAGES, PAGES, 2);
        routes.main_pages_max = routes.main.len() + 3;
        let written = set((PAGES - 2 * CHUNK_PAGES..).take(5));
        let mut second = round(2, written.clone());
        let left: Vec<u64> = routes.left.clone();
        let shares = routes.divide(&mut second, None).unwrap();
        assert_eq!(second.dirty.len(), 3);
        for (share, (before, after)) in shares.iter().zip(left.iter().zip(&routes.left)) {
            assert_eq!((share.drop.len(), share.send.len()), (3, 2), "with two copies on each");
            assert_eq!(before + 3, *after);
        }
        // In the first round nothing is known to be written.
        let mut first = round(1, written);
        routes.main_pages_max += 10;
        assert!(routes.divide(&mut first, None).unwrap().iter().all(|share| share.drop.is_empty()));
    }

    #[test]
    fn what_the_guest_takes_later_is_refused_only_where_no_server_has_room() {
        let reserve = reserve_pages(PAGES - least_on_main(8 * CHUNK_PAGES), 1, 2);
        let mut routes = routes(8 * CHUNK_PAGES, reserve, 1);
        routes.main_pages_max = routes.main.len();
        let fresh = set(PAGES - CHUNK_PAGES..PAGES);
        let shares = routes.divide(&mut round(2, fresh.clone()), None).unwrap();
        assert_eq!(shares.iter().map(|share| share.send.len()).sum::<u64>(), CHUNK_PAGES);
        routes.servers.iter_mut().for_each(|server| server.subtract(&fresh));
        routes.left = vec![0, 0];
        let error = routes.divide(&mut round(3, fresh), None).unwrap_err();
        assert!(error.to_string().contains("--memory"), "{error}");
    }
}
