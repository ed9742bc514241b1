//! What a guest's memory would take to move: two looks at the same few pages, a second apart.
//!
//! The pages are spread evenly over the RAM, each time others; those that the guest's kernel does not use are left out, as
//! they do not travel. The looks are taken beside the readings, which do not wait for them: what they show is known at the
//! next reading.
//!
//! ```text
//!   idle ──due──► looking (a task) ──ended──► idle, with what was seen
//! ```
//!
//! Cost: [`PAGES`] pages are copied twice and packed once for every guest and [`EVERY_S`], and their descriptions by the
//! guest's kernel are read, of which 64 KiB lie together. Pages of a shared file that were never written stay holes. Invariant: a guest that is being moved is not looked at: its pages may lie elsewhere, and
//! waiting for one could take long.

use std::time::{Duration, Instant};

use fctrans::error::IntrospectError;
use fctrans::kernel::Kernel;
use fctrans::memory::{Gpa, LiveMemory, PhysicalMemory as _, RamRange};
use migrate_core::delta::Page;
use migrate_core::forecast::Sample;
use migrate_core::layout::PAGE_BYTES;
use migrate_core::pageset::PageSet;
use tokio::task::JoinHandle;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Pages that are looked at.
const PAGES: u64 = 256;

/// Time between the two looks.
const APART: Duration = Duration::from_secs(1);

/// How often a guest is looked at, seconds.
const EVERY_S: f64 = 300.0;

/// The samples of one guest.
#[derive(Debug, Default)]
pub(super) struct Sampler {
    began_at_s: Option<f64>,
    task: Option<JoinHandle<Option<Sample>>>,
    seen: Option<Sample>,
}

impl Sampler {
    /// Whether it is time for the next sample.
    pub(super) fn is_due(&self, at_s: f64) -> bool {
        self.task.is_none() && self.began_at_s.is_none_or(|began_s| at_s - began_s >= EVERY_S)
    }

    /// Begins to look.
    pub(super) fn begin(&mut self, kernel: &Kernel, memory: &LiveMemory, at_s: f64) {
        let looked_at = LookedAt { kernel: kernel.clone(), memory: memory.clone(), places: vec![] };
        self.began_at_s = Some(at_s);
        self.task = Some(tokio::spawn(look_twice(looked_at, at_s.to_bits())));
    }

    /// Takes what was seen since, if the looks have been taken.
    pub(super) async fn collect(&mut self) {
        if let Some(task) = self.task.take_if(|task| task.is_finished()) {
            self.seen = task.await.ok().flatten();
        }
    }

    /// What was seen last.
    pub(super) const fn seen(&self) -> Option<&Sample> {
        self.seen.as_ref()
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// A page, by where the guest sees it, and by its number.
#[derive(Debug, Clone, Copy)]
struct Place {
    at: Gpa,
    page: u64,
}

/// What is looked at: some pages of a guest.
#[derive(Debug)]
struct LookedAt {
    kernel: Kernel,
    memory: LiveMemory,
    places: Vec<Place>,
}

impl LookedAt {
    /// Chooses the pages, and leaves out those that are not used.
    fn choose(&mut self, seed: u64) -> Result<(), IntrospectError> {
        self.places = places(self.memory.ranges(), seed);
        let mut chosen = PageSet::new(self.memory.pages());
        self.places.iter().for_each(|place| chosen.insert(place.page));
        let unused = self.kernel.still_unused(&self.memory, &chosen)?;
        self.places.retain(|place| !unused.contains(place.page));
        Ok(())
    }

    fn look(&self) -> Result<Vec<Page>, IntrospectError> {
        let page = |place: &Place| {
            let mut page = [0; PAGE_BYTES];
            self.memory.read(place.at, &mut page).map(|()| page)
        };
        self.places.iter().map(page).collect()
    }
}

async fn look_twice(mut guest: LookedAt, seed: u64) -> Option<Sample> {
    let chosen = move || {
        guest.choose(seed).ok()?;
        let first = guest.look().ok()?;
        Some((guest, first))
    };
    let (guest, first) = tokio::task::spawn_blocking(chosen).await.ok()??;
    let began = Instant::now();
    tokio::time::sleep(APART).await;
    let compared = move || {
        let second = guest.look().ok()?;
        Sample::compare(&first, &second, began.elapsed()).ok()
    };
    tokio::task::spawn_blocking(compared).await.ok()?
}

/// The pages to look at: one in each of as many equal parts of the RAM, at random.
fn places(ranges: &[RamRange], seed: u64) -> Vec<Place> {
    let pages_of = |range: &RamRange| range.frames().end.saturating_sub(range.frames().start);
    let ram_pages: u64 = ranges.iter().map(pages_of).sum();
    let parts = PAGES.min(ram_pages);
    let place = |part: u64| {
        let (start, end) = (ram_pages * part / parts, ram_pages * (part + 1) / parts);
        let at = xxh3_64_with_seed(&part.to_le_bytes(), seed) % (end - start).max(1);
        let mut left = start + at;
        for range in ranges {
            if left < pages_of(range) {
                let frame = range.frames().start + left;
                return Some(Place { at: Gpa(frame * PAGE_BYTES as u64), page: range.page(frame) });
            }
            left -= pages_of(range);
        }
        None
    };
    (0..parts).filter_map(place).collect()
}

#[cfg(test)]
mod tests {
    use migrate_core::layout::PageIndex;

    use super::*;

    /// Two ranges with a hole between them, of so many pages together.
    fn ranges(pages: u64) -> Vec<RamRange> {
        let (below, bytes) = (pages / 3, |pages: u64| pages * PAGE_BYTES as u64);
        let hole = bytes(below + 1000);
        vec![
            RamRange { gpa: 0..bytes(below), first: PageIndex(7) },
            RamRange { gpa: hole..hole + bytes(pages - below), first: PageIndex(7 + below) },
        ]
    }

    #[test]
    fn pages_are_spread_and_each_time_others() {
        for pages in [0, 1, 7, 255, 256, 257, 100_000] {
            let found = places(&ranges(pages), 1);
            assert_eq!(found.len() as u64, pages.min(PAGES));
            let are_in_order =
                |pair: &[Place]| pair[0].page < pair[1].page && pair[0].at < pair[1].at;
            assert!(found.windows(2).all(are_in_order), "{found:?}");
            for place in &found {
                assert!((7..7 + pages).contains(&place.page), "{place:?}");
                let at = place.at.0 / PAGE_BYTES as u64;
                let after = if place.page < 7 + pages / 3 { 0 } else { 1000 };
                assert_eq!(at, place.page - 7 + after, "{place:?}");
            }
        }
        let numbers = |seed| places(&ranges(100_000), seed).iter().map(|one| one.page).collect();
        let (one, other): (Vec<u64>, Vec<u64>) = (numbers(1), numbers(2));
        assert_ne!(one, other);
    }
}
