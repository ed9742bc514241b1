//! Which page goes where.

use migrate_core::pageset::PageSet;
use migrate_core::precopy::Round;
use migrate_core::remote::{CHUNK_PAGES, Placement, ServerRoom, place, server_of, slack_pages};

use super::super::unused::Unused;
use crate::error::EngineError;

/// Fewest pages that a guest may have on its main host: its kernel alone takes some of them.
pub(super) const RESIDENT_PAGES_MIN: u64 = 16 << 8;

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
    copies: usize,
}

impl Routes {
    /// Places the pages `in_use`, the `hot` ones first on the main host: at most `first` pages, of as many as it
    /// may hold later.
    ///
    /// # Errors
    /// If the servers have too little room.
    pub(super) fn new(
        in_use: &PageSet,
        hot: &PageSet,
        (first, main_pages_max): (u64, u64),
        reserves: Vec<u64>,
        copies: usize,
    ) -> Result<Self, EngineError> {
        let rooms: Vec<ServerRoom> = reserves
            .iter()
            .map(|reserve_pages| ServerRoom { reserve_pages: *reserve_pages })
            .collect();
        // Nothing was written yet while anybody looked.
        let no_heat = |_| 0;
        let placed = place(in_use, hot, no_heat, first, &rooms, copies)?;
        let Placement { main, servers } = placed;
        let main_pages_max = main_pages_max - slack_pages(main_pages_max);
        let in_use_pages = in_use.len();
        Ok(Self { main, servers, main_pages_max, in_use_pages, reserves, copies })
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
                for (server, share) in self.servers.iter_mut().zip(shares.iter_mut()) {
                    if server.contains(page) {
                        server.remove(page);
                        share.drop.insert(page);
                    }
                }
                continue;
            }
            self.insert_remote(page)?;
        }
        Ok(())
    }

    fn insert_remote(&mut self, page: u64) -> Result<(), EngineError> {
        for _ in 0..self.copies {
            let rooms = self.servers.iter().zip(&self.reserves).enumerate();
            let open = rooms.filter(|(_, (server, _))| !server.contains(page));
            let open = open.map(|(number, (server, reserve))| {
                let left = reserve.saturating_sub(server.len());
                (number, if left > 0 { *reserve } else { 0 })
            });
            let number = server_of(page / CHUNK_PAGES, open);
            let server = number.and_then(|number| self.servers.get_mut(number));
            server.ok_or_else(no_room)?.insert(page);
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
