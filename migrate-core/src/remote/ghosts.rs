//! What was evicted lately, and how much room pages that were used once have for themselves.
//!
//! As in ARC (Megiddo and Modha, FAST 2003): a page that comes back soon after it was evicted would have stayed,
//! had the queue that it left had more room. So the share of pages that were used once grows with each of its own
//! that comes back, and shrinks with each that had been used again and again; the fewer of a kind are remembered,
//! the more one of them tells.
//!
//! Invariant: a page is remembered once at most.

use super::pages::Class;
use crate::pageset::PageSet;

/// Part of the limit that as many evictions of a kind are remembered as, and twice that at most.
const GHOST_SHARE: u64 = 2;

/// Least evictions that are remembered.
const GHOST_PAGES_MIN: u64 = 256;

/// Part of the limit that pages used once have for themselves at first.
const RECENT_SHARE: u64 = 4;

/// Part of the limit that either kind has at least.
const LEAST_SHARE: u64 = 16;

/// By how many pages one that comes back changes the shares, at least. ARC sees every use and takes 1; here only those are
/// seen that go wrong, and each of them has cost a fetch.
const STEP_PAGES: u64 = 4;

/// What one of `own` that comes back changes, of `others` being remembered.
fn step_pages(others: u64, own: u64) -> u64 {
    STEP_PAGES * (others / own.max(1)).max(1)
}

/// Recent evictions of a kind, in two generations.
#[derive(Debug)]
struct Evicted {
    young: PageSet,
    old: PageSet,
    young_pages: u64,
    old_pages: u64,
}

impl Evicted {
    fn new(pages: u64) -> Self {
        let none = || PageSet::new(pages);
        Self { young: none(), old: none(), young_pages: 0, old_pages: 0 }
    }

    fn insert(&mut self, page: u64, generation_pages: u64) {
        if self.young_pages >= generation_pages {
            std::mem::swap(&mut self.young, &mut self.old);
            self.old_pages = self.young_pages;
            self.young.clear();
            self.young_pages = 0;
        }
        if !self.young.contains(page) {
            self.young_pages += 1;
            self.young.insert(page);
        }
    }

    fn take(&mut self, page: u64) -> bool {
        let sets = [(&mut self.young, &mut self.young_pages), (&mut self.old, &mut self.old_pages)];
        let mut found = false;
        for (set, count) in sets {
            if set.contains(page) {
                set.remove(page);
                *count -= 1;
                found = true;
            }
        }
        found
    }

    fn len(&self) -> u64 {
        self.young_pages + self.old_pages
    }
}

/// Recent evictions.
#[derive(Debug)]
pub(super) struct Ghosts {
    once: Evicted,
    again: Evicted,
    limit_pages: u64,
    recent_pages: u64,
}

impl Ghosts {
    pub(super) fn new(pages: u64, limit_pages: u64) -> Self {
        let recent_pages = limit_pages / RECENT_SHARE;
        Self { once: Evicted::new(pages), again: Evicted::new(pages), limit_pages, recent_pages }
    }

    /// Pages that were used once may take so many before others leave for them.
    pub(super) fn recent_pages(&self) -> u64 {
        self.recent_pages
    }

    /// There is another limit.
    pub(super) fn set_limit(&mut self, limit_pages: u64) {
        self.limit_pages = limit_pages;
        self.share(self.recent_pages);
    }

    fn share(&mut self, recent_pages: u64) {
        let least = self.limit_pages / LEAST_SHARE;
        self.recent_pages = recent_pages.clamp(least, self.limit_pages - least);
    }

    /// The page was evicted from the queues of this class.
    pub(super) fn evicted(&mut self, page: u64, class: Class) {
        self.forget(page);
        let generation_pages = (self.limit_pages / GHOST_SHARE).max(GHOST_PAGES_MIN);
        let of = if class == Class::Long { &mut self.again } else { &mut self.once };
        of.insert(page, generation_pages);
    }

    /// The guest needs the page, or is about to: whether it was evicted too early, which is forgotten.
    pub(super) fn returned(&mut self, page: u64) -> bool {
        let (once, again) = (self.once.len(), self.again.len());
        if self.once.take(page) {
            self.share(self.recent_pages.saturating_add(step_pages(again, once)));
            return true;
        }
        if self.again.take(page) {
            self.share(self.recent_pages.saturating_sub(step_pages(once, again)));
            return true;
        }
        false
    }

    /// What becomes of the page tells nothing.
    pub(super) fn forget(&mut self, page: u64) {
        self.once.take(page);
        self.again.take(page);
    }

    pub(super) fn memory_bytes(&self) -> usize {
        let sets = [&self.once.young, &self.once.old, &self.again.young, &self.again.old];
        sets.map(PageSet::memory_bytes).iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_goes_to_those_that_come_back() {
        let mut ghosts = Ghosts::new(10_000, 1600);
        assert_eq!(ghosts.recent_pages(), 400);
        (0..600).for_each(|page| ghosts.evicted(page, Class::Recent));
        (1000..1300).for_each(|page| ghosts.evicted(page, Class::Long));
        for page in 0..100 {
            assert!(ghosts.returned(page) && !ghosts.returned(page));
        }
        assert_eq!(ghosts.recent_pages(), 800);
        // There are fewer of the others, so that each of them tells more.
        assert!(ghosts.returned(1000));
        assert_eq!(ghosts.recent_pages(), 796);
        (1001..1250).for_each(|page| assert!(ghosts.returned(page)));
        assert_eq!(ghosts.recent_pages(), 100, "the least");
        assert!(!ghosts.returned(9999), "it was never here");
    }

    #[test]
    fn evictions_are_remembered_for_a_while() {
        let mut ghosts = Ghosts::new(10_000, 1000);
        (0..2000).for_each(|page| ghosts.evicted(page, Class::Ahead));
        assert!(!ghosts.returned(0) && ghosts.returned(1999));
        let remembered = (0..2000).filter(|page| ghosts.returned(*page)).count();
        assert!((500..=1000).contains(&remembered), "{remembered}");
        ghosts.evicted(7, Class::Recent);
        ghosts.evicted(7, Class::Long);
        ghosts.forget(7);
        assert!(!ghosts.returned(7));
        ghosts.set_limit(100);
        assert!(ghosts.recent_pages() <= 94);
    }
}
