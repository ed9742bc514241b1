//! Dynamic page order: which pages to send first, which last, and which not before the guest stops.
//!
//! Svärd et al. (CloudCom 2011) send the pages that were written least often first. The heat of a
//! page is a decayed count of the scans that found it written, in one byte: at rest, 256 times the
//! chance that a [`TICK`] finds it written. Scans come at any distance; what they find is gathered
//! until a tick is full, so that heat does not depend on how long rounds take.
//!
//! Invariant: the order never decides whether a page is sent, only when.

use std::time::Duration;

use crate::layout::PAGE_BYTES;
use crate::pageset::PageSet;

/// Time to which heat refers.
pub const TICK: Duration = Duration::from_millis(100);

/// Heat that a tick adds to a written page.
const WARMTH: u8 = 64;

/// Lowest heat of each wave after the first.
const WAVES: [u8; 3] = [1, 64, 144];

/// Heat from which a page is expected to be written again before it would have been of use: written
/// in three of four ticks.
pub const HOT: u8 = 192;

/// How often pages are written.
#[derive(Debug)]
pub struct Heat {
    heat: Vec<u8>,
    /// Found written in the tick that is under way.
    recent: PageSet,
    tick_began: Duration,
}

impl Heat {
    /// A guest whose pages are all cold.
    pub fn new(pages: u64) -> Self {
        let count = usize::try_from(pages).unwrap_or(usize::MAX);
        Self { heat: vec![0; count], recent: PageSet::new(pages), tick_began: Duration::ZERO }
    }

    /// A scan at `now` found these pages written.
    pub fn scanned(&mut self, written: &PageSet, now: Duration) {
        self.recent.union_with(written);
        if now.saturating_sub(self.tick_began) < TICK {
            return;
        }
        self.tick_began = now;
        // Where all is cold nothing is written, so that it takes no memory.
        let warm = |part: &&mut [u8]| part.iter().any(|heat| *heat > 0);
        for heat in self.heat.chunks_mut(PAGE_BYTES).filter(warm).flatten() {
            *heat -= heat.div_ceil(4);
        }
        for page in self.recent.iter() {
            if let Some(heat) = self.heat.get_mut(page as usize) {
                *heat = heat.saturating_add(WARMTH);
            }
        }
        self.recent.clear();
    }

    /// The heat of a page.
    pub fn of(&self, page: u64) -> u8 {
        self.heat.get(page as usize).copied().unwrap_or(0)
    }

    /// The same pages in the order in which to send them: the coldest first. No set is empty.
    pub fn waves(&self, pages: &PageSet) -> Vec<PageSet> {
        let mut waves = vec![PageSet::new(pages.size()); WAVES.len() + 1];
        for page in pages.iter() {
            let heat = self.of(page);
            let number = WAVES.iter().filter(|from| heat >= **from).count();
            if let Some(wave) = waves.get_mut(number) {
                wave.insert(page);
            }
        }
        waves.retain(|wave| !wave.is_empty());
        waves
    }

    /// Of these pages, at most `pages_max` that are hot.
    pub fn hot(&self, pages: &PageSet, pages_max: u64) -> PageSet {
        let mut hot = PageSet::new(pages.size());
        let found = pages.iter().filter(|page| self.of(*page) >= HOT);
        for page in found.take(usize::try_from(pages_max).unwrap_or(usize::MAX)) {
            hot.insert(page);
        }
        hot
    }

    /// Bytes of memory in use.
    pub fn memory_bytes(&self) -> usize {
        self.heat.len() + self.recent.memory_bytes()
    }
}

/// The order of pages over the rounds of a migration.
#[derive(Debug)]
pub struct Order {
    heat: Heat,
    /// Pages of the round being sent that are not left out.
    sending: PageSet,
    /// Pages of which the destination has some version.
    sent: PageSet,
    /// Pages that wait for the stop.
    waiting: PageSet,
}

impl Order {
    /// For a guest of which nothing was sent.
    pub fn new(pages: u64) -> Self {
        let none = || PageSet::new(pages);
        Self { heat: Heat::new(pages), sending: none(), sent: none(), waiting: none() }
    }

    /// A scan at `now` found these pages written.
    pub fn scanned(&mut self, written: &PageSet, now: Duration) {
        self.heat.scanned(written, now);
    }

    /// A round of these pages begins: what to send in which order.
    pub fn begin_round(&mut self, pages: &PageSet) -> Vec<PageSet> {
        self.sending = pages.clone();
        self.heat.waves(pages)
    }

    /// Leaves the `written` pages out of the round being sent, and returns them. Only in the first
    /// round this is done with pages that were never sent: at the stop they could not travel as
    /// deltas.
    pub fn leave_out(&mut self, written: &PageSet, first_round: bool) -> PageSet {
        let mut left_out = written.clone();
        left_out.intersect(&self.sending);
        if !first_round {
            left_out.intersect(&self.sent);
        }
        self.sending.subtract(&left_out);
        left_out
    }

    /// The round was sent.
    pub fn round_sent(&mut self) {
        self.sent.union_with(&self.sending);
        self.sending.clear();
    }

    /// Takes at most `pages_max` hot pages out of the next round, to wait for the stop.
    pub fn begin_waiting(&mut self, pages: &mut PageSet, pages_max: u64) {
        let mut known = pages.clone();
        known.intersect(&self.sent);
        self.waiting = self.heat.hot(&known, pages_max);
        pages.subtract(&self.waiting);
    }

    /// Puts the pages that waited to the others; returns how many were not among them.
    pub fn end_waiting(&mut self, pages: &mut PageSet) -> u64 {
        let before = pages.len();
        pages.union_with(&self.waiting);
        self.waiting.clear();
        pages.len() - before
    }

    /// Pages that wait for the stop.
    pub fn waiting_pages(&self) -> u64 {
        self.waiting.len()
    }

    /// Bytes of memory in use.
    pub fn memory_bytes(&self) -> usize {
        let sets = [&self.sending, &self.sent, &self.waiting];
        self.heat.memory_bytes() + sets.map(PageSet::memory_bytes).iter().sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(pages: &[u64]) -> PageSet {
        let mut set = PageSet::new(64);
        pages.iter().for_each(|page| set.insert(*page));
        set
    }

    /// Scans every 10 ms in which page 1 is always written, page 2 in every other tick, page 3 once.
    fn warmed() -> Heat {
        let mut heat = Heat::new(64);
        for scan in 1..=400u64 {
            let now = Duration::from_millis(10 * scan);
            let mut written = set(&[1]);
            if (scan - 1) / 10 % 2 == 0 {
                written.insert(2);
            }
            if scan == 395 {
                written.insert(3);
            }
            heat.scanned(&written, now);
        }
        heat
    }

    #[test]
    fn heat_is_the_chance_to_be_written() {
        let heat = warmed();
        assert!(heat.of(1) >= 240, "{}", heat.of(1));
        assert!((90..170).contains(&heat.of(2)), "{}", heat.of(2));
        assert_eq!((heat.of(3), heat.of(4), heat.of(99)), (64, 0, 0));
    }

    #[test]
    fn heat_is_lost() {
        let mut heat = warmed();
        for tick in 1..=30 {
            heat.scanned(&set(&[]), Duration::from_secs(5) + TICK * tick);
        }
        assert_eq!((heat.of(1), heat.of(2), heat.of(3)), (0, 0, 0));
    }

    #[test]
    fn the_coldest_go_first_and_the_hottest_last() {
        let heat = warmed();
        let waves = heat.waves(&set(&[1, 2, 3, 4]));
        assert_eq!(waves.first(), Some(&set(&[4])));
        assert_eq!(waves.last(), Some(&set(&[1])));
        let mut all = set(&[]);
        waves.iter().for_each(|wave| all.union_with(wave));
        assert_eq!(all, set(&[1, 2, 3, 4]));
        assert_eq!(heat.waves(&set(&[5, 6])), [set(&[5, 6])]);
        assert!(heat.waves(&set(&[])).is_empty());
        assert_eq!(heat.hot(&set(&[1, 2, 3]), 5), set(&[1]));
        assert_eq!(heat.hot(&set(&[1]), 0), set(&[]));
    }
}
