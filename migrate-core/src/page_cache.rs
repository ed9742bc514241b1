//! A bounded cache of pages as they were sent last, to make byte-exact deltas against
//! ([`crate::xbzrle`]), where the other end reads nothing else.
//!
//! ```text
//!             no room, and worth no more than any frame looked at
//!            +---------------------------------------------------+
//!            v                                                   |
//!   sent -> not held -- room, or worth more than the victim -> held -> sent again: the base
//!            ^                                                   |     was there; new content
//!            +------------------ victim of another --------------+
//! ```
//!
//! What is worth holding is what will be sent again, and what was sent more often is the likelier
//! to. A page that was never sent again is worth less than any that was: in the first round as much
//! as its heat ([`crate::order::Heat`]), later more, as only written pages are sent then. What is
//! held loses worth while it is not sent. A page takes another's frame only if it is clearly worth
//! more: rounds walk over the same pages again and again, and a cache that takes whatever comes
//! would have lost each page just before it came back. The victim is the least worth of [`LOOKS`]
//! frames under a hand that goes around, so that a sending costs the same however large the cache
//! is.
//!
//! Invariants: what is held of a page is what was sent last, or nothing (every sending goes through
//! [`PageCache::replace`]), so an evicted base costs a whole page and nothing else; memory stays
//! below the bound; each shard holds the pages of one lane, so lanes do not wait for one another.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::batch::lane_of;
use crate::delta::Page;
use crate::layout::{PAGE_BYTES, PageIndex};

/// Frames that are looked at to find a victim.
pub const LOOKS: usize = 16;

/// Frames that are found together.
const SLAB_FRAMES: usize = 16;

/// Most bytes that a frame takes beside its page: [`Frame`], and an entry of the map with the room
/// that a map keeps free, of which there are two while it grows.
const FRAME_EXTRA_BYTES: usize = 128;

/// Bytes of memory that holding a page takes.
pub const FRAME_BYTES: u64 = (PAGE_BYTES + FRAME_EXTRA_BYTES) as u64;

/// What holding a page is worth.
type Worth = u8;

/// Heat that makes a level; the first round's pages are worth their level, 8 at most.
const HEAT_PER_LEVEL: u8 = 32;

/// The worth of a page that is sent for the first time after the first round, which says that it
/// was written; and what is left to one that was sent again, but not any more.
const WRITTEN: Worth = 9;

/// Rounds without a sending after which a page that was sent again is worth half as many sendings.
const HALVING_ROUNDS: u32 = 4;

/// What is known of a page that is about to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sending {
    /// The version as which it is sent, 1 if it was never sent before.
    pub version: u32,
    /// How often it is written, as [`crate::order::Heat::of`] says.
    pub heat: u8,
}

impl Sending {
    /// What holding the page would be worth.
    fn worth(self, round: u32) -> Worth {
        match (self.version, round) {
            (0 | 1, 0 | 1) => self.heat.div_ceil(HEAT_PER_LEVEL),
            (0 | 1, _) => WRITTEN,
            (version, _) => sent_again(version),
        }
    }
}

/// The worth of a page that was sent so many times, at least twice: twice as many are worth one
/// more.
fn sent_again(times: u32) -> Worth {
    times.ilog2().try_into().map_or(Worth::MAX, |doublings: u8| WRITTEN + doublings)
}

#[derive(Debug)]
struct Frame {
    page: PageIndex,
    /// What the page was worth when it was sent last.
    worth: Worth,
    /// How often it was sent, as far as is known.
    times: u32,
    /// The round in which it was sent last.
    round: u32,
}

impl Frame {
    /// For a page that is sent now. One that is sent first after the first round was written, and
    /// may wait for its second sending like those that had it.
    fn new(page: PageIndex, sending: Sending, round: u32) -> Self {
        let times = if round > 1 { sending.version.max(2) } else { sending.version };
        let worth = Sending { version: times, ..sending }.worth(round);
        Self { page, worth, times, round }
    }

    /// The same page is sent again.
    fn renew(&mut self, sending: Sending, round: u32) {
        let version = sending.version.max(self.times.saturating_add(1));
        *self = Self::new(self.page, Sending { version, ..sending }, round);
    }

    fn worth(&self, round: u32) -> Worth {
        let rounds = round.wrapping_sub(self.round);
        let (lost, least) =
            if self.times < 2 { (rounds, 0) } else { (rounds / HALVING_ROUNDS, WRITTEN) };
        self.worth.saturating_sub(u8::try_from(lost).unwrap_or(u8::MAX)).max(least)
    }
}

#[derive(Debug)]
struct Shard {
    frame_of: HashMap<PageIndex, usize>,
    frames: Vec<Frame>,
    slabs: Vec<Box<[Page]>>,
    frames_max: usize,
    hand: usize,
}

impl Shard {
    fn content(&mut self, number: usize) -> Option<&mut Page> {
        self.slabs.get_mut(number / SLAB_FRAMES)?.get_mut(number % SLAB_FRAMES)
    }

    /// Finds a frame for a page that is not held; nothing if what is held is worth as much.
    fn admit(&mut self, page: PageIndex, sending: Sending, round: u32) -> Option<usize> {
        let frame = Frame::new(page, sending, round);
        let number = if self.frames.len() < self.frames_max {
            if self.frames.len() == self.slabs.len() * SLAB_FRAMES {
                self.slabs.push(vec![[0; PAGE_BYTES]; SLAB_FRAMES].into());
            }
            self.frames.push(frame);
            self.frames.len() - 1
        } else {
            let number = self.victim(sending.worth(round), round)?;
            let old = std::mem::replace(self.frames.get_mut(number)?, frame);
            self.frame_of.remove(&old.page);
            number
        };
        self.frame_of.insert(page, number);
        Some(number)
    }

    /// The least worth of the next frames under the hand, if it is worth less than `worth`.
    fn victim(&mut self, worth: Worth, round: u32) -> Option<usize> {
        if worth == 0 {
            return None;
        }
        let mut least: Option<(Worth, usize)> = None;
        for _ in 0..LOOKS.min(self.frames.len()) {
            let number = self.hand;
            self.hand = (number + 1) % self.frames.len();
            let held = self.frames.get(number)?.worth(round);
            if least.is_none_or(|(least, _)| held < least) {
                least = Some((held, number));
            }
        }
        least.filter(|(least, _)| *least < worth).map(|(_, number)| number)
    }

    fn memory_bytes(&self) -> u64 {
        let slabs = self.slabs.len() * SLAB_FRAMES * PAGE_BYTES
            + self.slabs.capacity() * size_of::<Box<[Page]>>();
        // A map keeps an eighth of its places free, and a byte for each.
        let places = self.frame_of.capacity() * 8 / 7;
        let map = places * (size_of::<(PageIndex, usize)>() + 1);
        (slabs + self.frames.capacity() * size_of::<Frame>() + map) as u64
    }
}

/// Pages as they were sent last.
#[derive(Debug)]
pub struct PageCache {
    shards: Vec<Mutex<Shard>>,
    round: AtomicU32,
}

impl PageCache {
    /// Holds pages that travel on `lanes` lanes, in at most `bytes_max` bytes. Memory is taken as
    /// pages come; fewer bytes than [`FRAME_BYTES`] for 16 pages a lane hold nothing.
    pub fn new(lanes: usize, bytes_max: u64) -> Self {
        let lanes = lanes.max(1);
        let frames = usize::try_from(bytes_max / FRAME_BYTES).unwrap_or(usize::MAX) / lanes;
        let frames_max = frames / SLAB_FRAMES * SLAB_FRAMES;
        let shard = || Shard {
            frame_of: HashMap::new(),
            frames: vec![],
            slabs: vec![],
            frames_max,
            hand: 0,
        };
        let shards = (0..lanes).map(|_| Mutex::new(shard())).collect();
        Self { shards, round: AtomicU32::new(0) }
    }

    /// A round begins: pages that are not sent in it lose worth.
    pub fn begin_round(&self) {
        self.round.fetch_add(1, Ordering::Relaxed);
    }

    /// Remembers `content` as sent. If the page was held, `compare` sees what was sent before, and
    /// its answer is returned; lanes other than the page's own do not wait meanwhile.
    pub fn replace<R>(
        &self,
        page: PageIndex,
        content: &Page,
        sending: Sending,
        compare: impl FnOnce(&Page) -> R,
    ) -> Option<R> {
        let mut shard = self.shards.get(lane_of(page, self.shards.len())).map(lock)?;
        let round = self.round.load(Ordering::Relaxed);
        if let Some(&number) = shard.frame_of.get(&page) {
            shard.frames.get_mut(number)?.renew(sending, round);
            let held = shard.content(number)?;
            let answer = compare(held);
            *held = *content;
            return Some(answer);
        }
        let number = shard.admit(page, sending, round)?;
        *shard.content(number)? = *content;
        None
    }

    /// Bytes of memory in use.
    pub fn memory_bytes(&self) -> u64 {
        self.shards.iter().map(lock).map(|shard| shard.memory_bytes()).sum()
    }
}

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const COLD: Sending = Sending { version: 1, heat: 0 };
    const AGAIN: Sending = Sending { version: 2, heat: 80 };

    /// Room for `frames` pages a lane, a multiple of [`SLAB_FRAMES`].
    fn cache(lanes: usize, frames: u64) -> PageCache {
        PageCache::new(lanes, lanes as u64 * frames * FRAME_BYTES)
    }

    /// Sends a page full of `value`; the value that was there before, if it was held.
    fn send(cache: &PageCache, page: u64, value: u8, sending: Sending) -> Option<u8> {
        cache.replace(PageIndex(page), &[value; PAGE_BYTES], sending, |old| {
            assert!(old.iter().all(|byte| *byte == old[0]));
            old[0]
        })
    }

    /// The pages that a lane holds.
    fn held(cache: &PageCache, lane: usize) -> BTreeSet<u64> {
        let shard = lock(&cache.shards[lane]);
        for (page, number) in &shard.frame_of {
            assert_eq!(shard.frames[*number].page, *page);
        }
        assert_eq!(shard.frames.len(), shard.frame_of.len());
        shard.frame_of.keys().map(|page| page.0).collect()
    }

    fn sending() -> impl Strategy<Value = Sending> {
        (1u32..9, any::<u8>()).prop_map(|(version, heat)| Sending { version, heat })
    }

    /// What the model knows of a page that was sent.
    struct Known {
        value: u8,
        worth: u8,
        times: u32,
        round: u32,
    }

    impl Known {
        fn worth(&self, round: u32) -> u8 {
            let idle = (round - self.round) as u8;
            match self.times {
                1 => self.worth.saturating_sub(idle),
                _ => self.worth.saturating_sub(idle / 4).max(9),
            }
        }
    }

    proptest! {
        /// The model remembers everything: what is answered is what was sent last, and what is lost
        /// was worth less than what came.
        #[test]
        fn an_answer_is_what_was_sent_last(
            sends in prop::collection::vec((0u64..320, any::<u8>(), sending(), 0u8..40), 1..400)
        ) {
            const FRAMES: usize = 2 * SLAB_FRAMES;
            let (cache, mut round) = (cache(2, FRAMES as u64), 1);
            cache.begin_round();
            let mut sent: HashMap<u64, Known> = HashMap::new();
            for (page, value, sending, next_round) in sends {
                if next_round == 0 {
                    cache.begin_round();
                    round += 1;
                }
                let lane = lane_of(PageIndex(page), 2);
                let before = held(&cache, lane);
                let answer = send(&cache, page, value, sending);
                let after = held(&cache, lane);
                let base = sent.get(&page).filter(|_| before.contains(&page));
                prop_assert_eq!(answer, base.map(|known| known.value));

                let again = |times: u32| 9 + times.ilog2() as u8;
                let once = sending.heat.div_ceil(32);
                let coming = match (sending.version, round) {
                    (1, 1) => once,
                    (1, _) => 9,
                    (version, _) => again(version),
                };
                let lost: Vec<&u64> = before.difference(&after).collect();
                if before.contains(&page) {
                    prop_assert_eq!(&before, &after);
                } else if before.len() < FRAMES {
                    prop_assert!(lost.is_empty() && after.contains(&page));
                } else if after.contains(&page) {
                    prop_assert!(lost.len() == 1 && sent[lost[0]].worth(round) < coming);
                } else {
                    prop_assert!(lost.is_empty());
                    let as_good = before.iter().filter(|held| sent[held].worth(round) >= coming);
                    let as_good = as_good.count();
                    prop_assert!(as_good >= LOOKS || coming == 0, "only {as_good} are worth as much");
                }
                let times = base.map_or(1, |known| known.times + 1).max(sending.version);
                let times = if round > 1 { times.max(2) } else { times };
                let worth = if times == 1 { once } else { again(times) };
                sent.insert(page, Known { value, worth, times, round });
            }
            prop_assert!(cache.memory_bytes() <= 2 * FRAMES as u64 * FRAME_BYTES);
        }
    }

    #[test]
    fn a_page_that_was_never_sent_again_drives_none_out_that_was() {
        let cache = cache(1, 64);
        for page in 0..64 {
            send(&cache, page, 1, Sending { version: 2, heat: 0 });
        }
        for round in 0..20 {
            for page in 64..640 {
                send(&cache, page, 1, Sending { version: 1, heat: 255 });
            }
            assert_eq!(held(&cache, 0), (0..64).collect(), "round {round}");
            cache.begin_round();
        }
    }

    #[test]
    fn in_the_first_round_heat_decides() {
        let cache = cache(1, 64);
        cache.begin_round();
        for page in 0..1000 {
            let heat = if page % 20 == 7 { 1 } else { 0 };
            send(&cache, page, 1, Sending { version: 1, heat });
        }
        let hot = held(&cache, 0).iter().filter(|page| *page % 20 == 7).count();
        assert_eq!(hot, 50, "all of them");
    }

    #[test]
    fn what_is_sent_first_after_the_first_round_was_written() {
        let cache = cache(1, 64);
        cache.begin_round();
        (0..64).for_each(|page| assert_eq!(send(&cache, page, 1, COLD), None));
        cache.begin_round();
        (64..128).for_each(|page| assert_eq!(send(&cache, page, 1, COLD), None));
        assert_eq!(held(&cache, 0), (64..128).collect());
    }

    /// A hot set of four times the cache, walked in order, round after round.
    #[test]
    fn walking_over_more_than_fits_keeps_what_fits() {
        let cache = cache(1, 64);
        for round in 1..10u8 {
            cache.begin_round();
            let hits = (0..256).filter(|page| send(&cache, *page, round, AGAIN).is_some()).count();
            assert_eq!(hits, if round == 1 { 0 } else { 64 });
        }
    }

    #[test]
    fn what_is_not_sent_any_more_makes_room() {
        let cache = cache(1, 64);
        for page in 0..64 {
            send(&cache, page, 1, Sending { version: 8, heat: 255 });
        }
        // Sent 8 times is worth more than twice until it was halved thrice.
        for round in 1..=12 {
            assert_eq!(held(&cache, 0).first(), Some(&0), "round {round}");
            cache.begin_round();
            for page in 100..164 {
                send(&cache, page, 1, AGAIN);
            }
        }
        assert_eq!(held(&cache, 0), (100..164).collect());
    }

    #[test]
    fn lanes_have_their_own_pages() {
        let cache = cache(4, 64);
        std::thread::scope(|scope| {
            for lane in 0..4 {
                let cache = &cache;
                scope.spawn(move || {
                    for value in 0..20 {
                        for page in lane * 64..(lane + 1) * 64 {
                            let before = send(cache, page, value, AGAIN);
                            assert_eq!(before, value.checked_sub(1));
                        }
                    }
                });
            }
        });
    }

    #[test]
    fn without_memory_nothing_is_held() {
        let cache = PageCache::new(2, 2 * SLAB_FRAMES as u64 * FRAME_BYTES - 1);
        assert_eq!(send(&cache, 0, 1, AGAIN), None);
        assert_eq!(send(&cache, 0, 1, AGAIN), None);
        assert_eq!(cache.memory_bytes(), 0);
    }
}
