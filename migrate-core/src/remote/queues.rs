//! Queues of resident pages in the order of their arrival.
//!
//! ```text
//!            dirty                 clean
//!   Ahead    head ─ … ─ tail       head ─ … ─ tail      read ahead, not known to have been used
//!   Recent   head ─ … ─ tail       head ─ … ─ tail      used for the first time for long
//!   Long     head ─ … ─ tail       head ─ … ─ tail      came back soon after an eviction
//! ```
//!
//! Pages are linked through one table, so that any page is taken out at once. Each carries a stamp of
//! when it came, to compare the heads of two queues.
//!
//! Invariant: a page is in at most one queue. Table entries of pages that never were in one take no
//! memory.

use super::pages::Class;

const NONE: u32 = u32::MAX;

/// Most pages that the table can number: 16 TiB.
pub(super) const PAGES_MAX: u64 = NONE as u64;

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
    queues: [Queue; 6],
    clock: u32,
}

fn number(class: Class, clean: bool) -> Option<usize> {
    let row = match class {
        Class::None => return None,
        Class::Ahead => 0,
        Class::Recent => 1,
        Class::Long => 2,
    };
    Some(2 * row + usize::from(clean))
}

impl Queues {
    /// Empty queues for a guest of `pages` pages, at most [`PAGES_MAX`].
    pub(super) fn new(pages: u64) -> Self {
        let count = usize::try_from(pages).unwrap_or(usize::MAX);
        Self {
            links: bytemuck::allocation::zeroed_vec(count),
            queues: [Queue { head: NONE, tail: NONE, pages: 0 }; 6],
            clock: 0,
        }
    }

    /// Puts a page that is in no queue at the end of one.
    pub(super) fn push(&mut self, page: u64, class: Class, clean: bool) {
        let Some(queue) = number(class, clean).and_then(|number| self.queues.get_mut(number))
        else {
            return;
        };
        let Some(link) = self.links.get_mut(page as usize) else { return };
        let page = page as u32;
        *link = [queue.tail, NONE, self.clock];
        self.clock = self.clock.wrapping_add(1);
        let before = std::mem::replace(&mut queue.tail, page);
        queue.pages += 1;
        match self.links.get_mut(before as usize) {
            Some(link) if before != NONE => link[1] = page,
            _ => queue.head = page,
        }
    }

    /// Takes a page out of the queue that it is in.
    pub(super) fn take(&mut self, page: u64, class: Class, clean: bool) {
        let Some(queue) = number(class, clean).and_then(|number| self.queues.get_mut(number))
        else {
            return;
        };
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

    /// The page that has been in a queue longest.
    pub(super) fn head(&self, class: Class, clean: bool) -> Option<u64> {
        let queue = self.queues.get(number(class, clean)?)?;
        (queue.head != NONE).then_some(u64::from(queue.head))
    }

    /// The page that has been longest in the clean or the dirty queue of a class, whichever are
    /// allowed.
    pub(super) fn oldest(&self, class: Class, dirty: bool, clean: bool) -> Option<u64> {
        let dirty = self.head(class, false).filter(|_| dirty);
        let clean = self.head(class, true).filter(|_| clean);
        match (dirty, clean) {
            (Some(a), Some(b)) => Some(if self.age(a) > self.age(b) { a } else { b }),
            (a, b) => a.or(b),
        }
    }

    /// How many pages came after this one. Right for the last 2^32 of them.
    fn age(&self, page: u64) -> u32 {
        let stamp = self.links.get(page as usize).map_or(0, |link| link[2]);
        self.clock.wrapping_sub(stamp)
    }

    /// Pages in both queues of a class.
    pub(super) fn len(&self, class: Class) -> u64 {
        self.clean_len(class)
            + number(class, false).and_then(|n| self.queues.get(n)).map_or(0, |queue| queue.pages)
    }

    /// Pages in the clean queue of a class.
    pub(super) fn clean_len(&self, class: Class) -> u64 {
        number(class, true).and_then(|n| self.queues.get(n)).map_or(0, |queue| queue.pages)
    }

    /// Bytes of memory in use, the part of the table included that was never touched.
    pub(super) fn memory_bytes(&self) -> usize {
        self.links.len() * size_of::<Link>()
    }
}
