//! Queues of resident pages in the order of their arrival.
//!
//! ```text
//!            dirty                clean                flushed, and clean since
//!   Ahead    head ─ … ─ tail      head ─ … ─ tail      head ─ … ─ tail      read ahead, not known to have been used
//!   Recent   head ─ … ─ tail      head ─ … ─ tail      head ─ … ─ tail      used for the first time for long
//!   Long     head ─ … ─ tail      head ─ … ─ tail      head ─ … ─ tail      came back soon after an eviction
//!   None     head ─ … ─ tail      head ─ … ─ tail      head ─ … ─ tail      pinned: never evicted
//! ```
//!
//! Pages are linked through one table, so that any page is taken out at once. Each carries a stamp of
//! when it came, to compare the heads of queues.
//!
//! A page that becomes clean by a flush keeps its stamp, since nobody used it. Pages are flushed in the
//! order of their stamps, so that a queue of their own keeps them in that order without a search.
//!
//! Invariants: a page is in at most one queue; `flushed` are the pages of the queues of that name. Table
//! entries of pages that never were in one take no memory.

use super::pages::Class;
use crate::pageset::PageSet;

const NONE: u32 = u32::MAX;

/// Most pages that the table can number: 16 TiB.
pub(super) const PAGES_MAX: u64 = NONE as u64;

/// A clean page leaves before a dirty one that has been there up to so many times as long.
const CLEAN_FIRST: u32 = 2;

/// Queues of one class.
const DIRTY: usize = 0;
const CLEAN: usize = 1;
const FLUSHED: usize = 2;
const LANES: usize = 3;

const CLASSES: usize = 4;

/// Previous, next, stamp.
type Link = [u32; 3];

#[derive(Debug, Clone, Copy)]
struct Queue {
    head: u32,
    tail: u32,
    pages: u64,
}

/// All queues.
#[derive(Debug)]
pub(super) struct Queues {
    links: Vec<Link>,
    queues: [[Queue; LANES]; CLASSES],
    flushed: PageSet,
    clock: u32,
}

impl Queues {
    /// Empty queues for a guest of `pages` pages, at most [`PAGES_MAX`].
    pub(super) fn new(pages: u64) -> Self {
        let count = usize::try_from(pages).unwrap_or(usize::MAX);
        Self {
            links: bytemuck::allocation::zeroed_vec(count),
            queues: [[Queue { head: NONE, tail: NONE, pages: 0 }; LANES]; CLASSES],
            flushed: PageSet::new(pages),
            clock: 0,
        }
    }

    /// Puts a page that is in no queue at the end of one.
    pub(super) fn push(&mut self, page: u64, class: Class, clean: bool) {
        if let Some(link) = self.links.get_mut(page as usize) {
            link[2] = self.clock;
            self.clock = self.clock.wrapping_add(1);
            self.link_last(page, class, if clean { CLEAN } else { DIRTY });
        }
    }

    /// Puts a page that was taken out of a dirty queue, and in no other since, back where it was: a clean
    /// one among those that were flushed.
    pub(super) fn put_back(&mut self, page: u64, class: Class, clean: bool) {
        if clean {
            self.flushed.insert(page);
            self.link_last(page, class, FLUSHED);
        } else {
            self.link_first(page, class, DIRTY);
        }
    }

    fn link_last(&mut self, page: u64, class: Class, lane: usize) {
        let queue = &mut self.queues[class as usize][lane];
        let Some(link) = self.links.get_mut(page as usize) else { return };
        let page = page as u32;
        (link[0], link[1]) = (queue.tail, NONE);
        let before = std::mem::replace(&mut queue.tail, page);
        queue.pages += 1;
        match self.links.get_mut(before as usize) {
            Some(link) if before != NONE => link[1] = page,
            _ => queue.head = page,
        }
    }

    fn link_first(&mut self, page: u64, class: Class, lane: usize) {
        let queue = &mut self.queues[class as usize][lane];
        let Some(link) = self.links.get_mut(page as usize) else { return };
        let page = page as u32;
        (link[0], link[1]) = (NONE, queue.head);
        let after = std::mem::replace(&mut queue.head, page);
        queue.pages += 1;
        match self.links.get_mut(after as usize) {
            Some(link) if after != NONE => link[0] = page,
            _ => queue.tail = page,
        }
    }

    /// Takes a page out of the queue that it is in.
    pub(super) fn take(&mut self, page: u64, class: Class, clean: bool) {
        let lane = match clean {
            true if self.flushed.contains(page) => FLUSHED,
            true => CLEAN,
            false => DIRTY,
        };
        if lane == FLUSHED {
            self.flushed.remove(page);
        }
        let queue = &mut self.queues[class as usize][lane];
        let Some([before, after, _]) = self.links.get(page as usize).copied() else { return };
        queue.pages -= 1;
        match self.links.get_mut(before as usize) {
            Some(link) if before != NONE => link[1] = after,
            _ => queue.head = after,
        }
        match self.links.get_mut(after as usize) {
            Some(link) if after != NONE => link[0] = before,
            _ => queue.tail = before,
        }
    }

    fn head(&self, class: Class, lane: usize) -> Option<u64> {
        let head = self.queues[class as usize][lane].head;
        (head != NONE).then_some(u64::from(head))
    }

    /// The page that has been in the dirty queue of a class longest.
    pub(super) fn first_dirty(&self, class: Class) -> Option<u64> {
        self.head(class, DIRTY)
    }

    /// The page after this one in the queue that it is in.
    pub(super) fn after(&self, page: u64) -> Option<u64> {
        let [_, after, _] = self.links.get(page as usize).copied()?;
        (after != NONE).then_some(u64::from(after))
    }

    /// The page that has been longest in the queues of a class, dirty ones left out if they are not
    /// allowed. A dirty page has to be put before it leaves, so that a clean one goes before it that has
    /// been there half as long (clean first, as in CFLRU; Park and others, CASES 2006). Flushed ones count
    /// as dirty there, so that a flush changes nothing in the order.
    pub(super) fn oldest(&self, class: Class, dirty: bool) -> Option<u64> {
        let written = [self.head(class, DIRTY).filter(|_| dirty), self.head(class, FLUSHED)];
        let written = written.into_iter().flatten().max_by_key(|page| self.age(*page));
        match (written, self.head(class, CLEAN)) {
            (Some(written), Some(clean)) if self.age(clean) < self.age(written) / CLEAN_FIRST => {
                Some(written)
            }
            (written, clean) => clean.or(written),
        }
    }

    /// How many pages came after this one. Right for the last 2^32 of them.
    pub(super) fn age(&self, page: u64) -> u32 {
        let stamp = self.links.get(page as usize).map_or(0, |link| link[2]);
        self.clock.wrapping_sub(stamp)
    }

    /// Pages in the queues of a class.
    pub(super) fn len(&self, class: Class) -> u64 {
        self.queues[class as usize].iter().map(|queue| queue.pages).sum()
    }

    /// Clean pages in the queues of a class.
    pub(super) fn clean_len(&self, class: Class) -> u64 {
        let queues = &self.queues[class as usize];
        queues[CLEAN].pages + queues[FLUSHED].pages
    }

    /// Bytes of memory in use, the part of the table included that was never touched.
    pub(super) fn memory_bytes(&self) -> usize {
        self.links.len() * size_of::<Link>() + self.flushed.memory_bytes()
    }
}
