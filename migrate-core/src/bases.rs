//! What the source remembers of the contents it sent, so that it can tell what changed since: a
//! keyed 64-bit hash for every line of 64 bytes.
//!
//! Memory is bounded: slots of 64 pages are taken as pages are sent for the first time. When none is
//! left, only pages that are sent again get one, from pages that were not (CLOCK, second chance):
//! what is rewritten is worth remembering. A page without a slot travels whole.
//!
//! Invariants: what is remembered of a page is what the destination holds of it, or nothing; each
//! shard holds the pages of one lane, so encoder threads do not wait for one another.

use std::sync::{Mutex, MutexGuard, PoisonError};

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::batch::{CHUNK_PAGES, lane_of};
use crate::delta::{LINE_BYTES, LINES};
use crate::layout::PageIndex;

/// Bytes of a slot's hashes.
pub const SLOT_BYTES: u64 = CHUNK_PAGES * (LINES * size_of::<u64>()) as u64;

const _: () = assert!(CHUNK_PAGES == u64::BITS as u64, "a bit a page");

/// The hashes of 64 neighbouring pages.
#[derive(Debug)]
struct Slot {
    /// Number of the chunk within its shard.
    chunk: usize,
    /// Pages whose hashes are known, the first lowest.
    known: u64,
    /// Whether a page was sent again since the clock's hand came by.
    resent: bool,
    hashes: Box<[[u64; LINES]]>,
}

impl Slot {
    fn new(chunk: usize) -> Self {
        let hashes = vec![[0; LINES]; CHUNK_PAGES as usize].into();
        Self { chunk, known: 0, resent: false, hashes }
    }
}

#[derive(Debug)]
struct Shard {
    slots: Vec<Slot>,
    slots_max: usize,
    /// The slot of every chunk, counted from 1; 0 is none.
    slot_of: Vec<u32>,
    hand: usize,
}

impl Shard {
    /// The slot of a chunk, found or taken; nothing if there is none to take.
    fn slot(&mut self, chunk: usize, resent: bool) -> Option<&mut Slot> {
        let mut number = *self.slot_of.get(chunk)? as usize;
        if number == 0 {
            number = if self.slots.len() < self.slots_max {
                self.slots.push(Slot::new(chunk));
                self.slots.len()
            } else if resent {
                self.evict(chunk)? + 1
            } else {
                return None;
            };
            *self.slot_of.get_mut(chunk)? = u32::try_from(number).ok()?;
        }
        let slot = self.slots.get_mut(number - 1)?;
        slot.resent |= resent;
        Some(slot)
    }

    /// Empties a slot whose pages were not sent again lately and gives it to `chunk`.
    fn evict(&mut self, chunk: usize) -> Option<usize> {
        // Twice around: at the second time no slot has its chance left.
        for _ in 0..2 * self.slots.len() {
            let number = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = self.slots.get_mut(number)?;
            if std::mem::take(&mut slot.resent) {
                continue;
            }
            let old = std::mem::replace(&mut slot.chunk, chunk);
            slot.known = 0;
            *self.slot_of.get_mut(old)? = 0;
            return Some(number);
        }
        None
    }
}

/// The hashes of what was sent.
#[derive(Debug)]
pub struct Bases {
    shards: Vec<Mutex<Shard>>,
    seed: u64,
}

impl Bases {
    /// Remembers contents of a guest with `pages` pages that travel on `lanes` lanes, in at most
    /// `bytes_max` bytes; fewer than a slot a lane ([`SLOT_BYTES`]) remember nothing. `seed` must be
    /// unpredictable for the guest.
    pub fn new(pages: u64, lanes: usize, bytes_max: u64, seed: u64) -> Self {
        let lanes = lanes.max(1);
        let chunks = pages.div_ceil(CHUNK_PAGES).div_ceil(lanes as u64);
        let chunks = usize::try_from(chunks).unwrap_or(usize::MAX);
        let slots_max = usize::try_from(bytes_max / SLOT_BYTES).unwrap_or(usize::MAX) / lanes;
        let slots_max = slots_max.min(chunks).min(u32::MAX as usize);
        let shard = || {
            let slot_of = vec![0; chunks];
            Mutex::new(Shard { slots: vec![], slots_max, slot_of, hand: 0 })
        };
        let shards = if slots_max == 0 { 0 } else { lanes };
        Self { shards: (0..shards).map(|_| shard()).collect(), seed }
    }

    /// Remembers `content` as sent. Returns which lines differ from what was remembered, the first
    /// lowest, or nothing if nothing was.
    pub fn replace(&self, page: PageIndex, content: &[u8], resent: bool) -> Option<u64> {
        let mut shard = self.shard(page)?;
        let chunk = usize::try_from(page.0 / CHUNK_PAGES).ok()? / self.shards.len();
        let slot = shard.slot(chunk, resent)?;
        let within = page.0 % CHUNK_PAGES;
        let hashes = slot.hashes.get_mut(within as usize)?;
        let mut changed = 0;
        for (number, (line, held)) in content.chunks(LINE_BYTES).zip(hashes).enumerate() {
            let hash = xxh3_64_with_seed(line, self.seed);
            changed |= u64::from(*held != hash) << number;
            *held = hash;
        }
        let known = slot.known >> within & 1 == 1;
        slot.known |= 1 << within;
        known.then_some(changed)
    }

    /// A hash of the whole content that is remembered of a page: far cheaper than one of the
    /// content itself.
    pub fn digest(&self, page: PageIndex) -> Option<u64> {
        let shard = self.shard(page)?;
        let chunk = usize::try_from(page.0 / CHUNK_PAGES).ok()? / self.shards.len();
        let number = *shard.slot_of.get(chunk)? as usize;
        let slot = shard.slots.get(number.checked_sub(1)?)?;
        let within = page.0 % CHUNK_PAGES;
        let hashes = slot.hashes.get(within as usize).filter(|_| slot.known >> within & 1 == 1)?;
        let mut bytes = [0; LINES * size_of::<u64>()];
        for (bytes, hash) in bytes.as_chunks_mut().0.iter_mut().zip(hashes) {
            *bytes = hash.to_le_bytes();
        }
        Some(xxh3_64_with_seed(&bytes, self.seed))
    }

    /// Bytes of memory in use.
    pub fn memory_bytes(&self) -> u64 {
        let shards = self.shards.iter().map(lock);
        shards
            .map(|shard| shard.slots.len() as u64 * SLOT_BYTES + 4 * shard.slot_of.len() as u64)
            .sum()
    }

    fn shard(&self, page: PageIndex) -> Option<MutexGuard<'_, Shard>> {
        self.shards.get(lane_of(page, self.shards.len())).map(lock)
    }
}

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::layout::PAGE_BYTES;

    fn content(lines: &[u8]) -> Vec<u8> {
        let mut content = vec![0; PAGE_BYTES];
        for (line, value) in content.chunks_mut(LINE_BYTES).zip(lines) {
            line.fill(*value);
        }
        content
    }

    proptest! {
        /// With room for few slots, whatever is answered is true of what was sent last.
        #[test]
        fn an_answer_is_the_difference(sends in prop::collection::vec(
            (0u64..640, prop::collection::vec(0u8..2, LINES), any::<bool>()), 1..200)
        ) {
            let bases = Bases::new(640, 2, 4 * SLOT_BYTES, 5);
            let mut sent: HashMap<u64, Vec<u8>> = HashMap::new();
            for (page, lines, resent) in sends {
                let answer = bases.replace(PageIndex(page), &content(&lines), resent);
                let before = sent.insert(page, lines.clone());
                if let Some(mask) = answer {
                    let before = before.expect("an answer about a page that was never sent");
                    let pairs = before.iter().zip(&lines).enumerate();
                    let want = pairs.fold(0u64, |mask, (at, (a, b))| mask | u64::from(a != b) << at);
                    prop_assert_eq!(mask, want);
                }
            }
            prop_assert!(bases.memory_bytes() <= 4 * SLOT_BYTES + 4 * 10);
        }
    }

    #[test]
    fn pages_that_are_sent_again_drive_others_out() {
        let bases = Bases::new(64 * 10, 1, 2 * SLOT_BYTES, 5);
        let send =
            |chunk: u64, resent| bases.replace(PageIndex(chunk * 64), &content(&[1]), resent);
        assert_eq!((send(0, false), send(1, false), send(2, false)), (None, None, None));
        assert_eq!(send(0, true), Some(0), "first come");
        assert_eq!(send(2, true), None, "takes the slot of 1");
        assert_eq!((send(2, true), send(0, true)), (Some(0), Some(0)));
        assert_eq!(send(1, false), None, "has lost its slot");
        assert_eq!((send(2, true), send(0, true)), (Some(0), Some(0)), "which it did not get back");
    }

    #[test]
    fn equal_contents_have_one_digest() {
        let bases = Bases::new(256, 2, 2 * SLOT_BYTES, 5);
        let digest = |page, lines: &[u8]| {
            bases.replace(PageIndex(page), &content(lines), false);
            bases.digest(PageIndex(page))
        };
        assert_eq!(bases.digest(PageIndex(0)), None, "never sent");
        let one = digest(0, &[1, 2]);
        assert!(one.is_some() && digest(1, &[1, 2]) == one && digest(64, &[1, 2]) == one);
        assert_ne!(digest(1, &[2, 1]), one);
        assert_eq!(bases.digest(PageIndex(2)), None, "its neighbours were sent");
        assert_eq!(digest(128, &[1, 2]), None, "no slot is left");
        assert_eq!(bases.digest(PageIndex(1 << 40)), None);
    }

    #[test]
    fn without_memory_nothing_is_remembered() {
        let bases = Bases::new(64, 4, 4 * SLOT_BYTES - 1, 5);
        assert_eq!(bases.replace(PageIndex(0), &content(&[1]), true), None);
        assert_eq!(bases.replace(PageIndex(0), &content(&[1]), true), None);
        assert_eq!(bases.memory_bytes(), 0);
    }
}
