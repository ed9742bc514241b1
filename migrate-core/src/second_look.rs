//! Which pages direct I/O may have changed behind the tracking's back (correctness rule 6).
//!
//! A page that is the target of an O_DIRECT read is reported written when the kernel pins it, not
//! when the data arrives. If the page was armed again in between, the arrival goes unseen. Such a
//! page *was* reported once, so everything that was reported gets a second look (a comparison of
//! content hashes) once the longest plausible I/O has passed; what was reported within that window
//! is looked at when the guest is stopped, which drains all I/O.
//!
//! ```text
//!   reported at t ──► young bucket ──► … ──► old bucket ──► due: look again
//!                         ▲   window / GENERATIONS each   (later reports move a page back)
//! ```
//!
//! Invariants: a page is due no earlier than `window` after its last report; a page that was
//! reported is in a bucket until it was due or [`SecondLook::take_all`] was called.

use std::collections::VecDeque;
use std::time::Duration;

use crate::pageset::PageSet;

/// Buckets that a window is divided into: finer buckets look earlier, coarser ones need less memory
/// (one bit a page each).
const GENERATIONS: u32 = 4;

#[derive(Debug)]
struct Bucket {
    /// Time of the newest report in this bucket.
    newest: Duration,
    opened: Duration,
    sealed: bool,
    pages: PageSet,
}

/// Pages that wait for their second look.
#[derive(Debug)]
pub struct SecondLook {
    window: Duration,
    size: u64,
    /// Oldest first. A page may be in several buckets; the youngest one counts.
    buckets: VecDeque<Bucket>,
}

impl SecondLook {
    /// `window` is the longest plausible time from pinning a page to the arrival of its data.
    pub fn new(pages: u64, window: Duration) -> Self {
        Self { window, size: pages, buckets: VecDeque::new() }
    }

    /// Notes that `pages` were reported written at `now`. Time must not run backwards.
    pub fn report(&mut self, pages: &PageSet, now: Duration) {
        let span = self.window / GENERATIONS;
        let needs_new =
            self.buckets.back().is_none_or(|bucket| bucket.sealed || now >= bucket.opened + span);
        if needs_new {
            self.buckets.push_back(Bucket {
                newest: now,
                opened: now,
                sealed: false,
                pages: PageSet::new(self.size),
            });
        }
        if let Some(bucket) = self.buckets.back_mut() {
            bucket.newest = now;
            bucket.pages.union_with(pages);
        }
    }

    /// Closes the bucket being filled: later reports do not delay what was reported so far.
    pub fn seal(&mut self) {
        if let Some(bucket) = self.buckets.back_mut() {
            bucket.sealed = true;
        }
    }

    /// Takes the pages whose window has passed at `now`.
    pub fn take_due(&mut self, now: Duration) -> PageSet {
        let mut due = PageSet::new(self.size);
        while let Some(bucket) = self.buckets.front() {
            if now < bucket.newest + self.window {
                break;
            }
            due.union_with(&bucket.pages);
            self.buckets.pop_front();
        }
        for younger in &self.buckets {
            due.subtract(&younger.pages);
        }
        due
    }

    /// Takes all pages that still wait. Call with the guest stopped and its I/O drained.
    pub fn take_all(&mut self) -> PageSet {
        let mut all = PageSet::new(self.size);
        for bucket in self.buckets.drain(..) {
            all.union_with(&bucket.pages);
        }
        all
    }

    /// Number of pages that [`Self::take_all`] would return.
    pub fn waiting_pages(&self) -> u64 {
        let mut all = PageSet::new(self.size);
        for bucket in &self.buckets {
            all.union_with(&bucket.pages);
        }
        all.len()
    }

    /// When the oldest bucket falls due, if any waits.
    pub fn next_due(&self) -> Option<Duration> {
        self.buckets.front().map(|bucket| bucket.newest + self.window)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const WINDOW: Duration = Duration::from_millis(100);

    fn set(pages: &[u64]) -> PageSet {
        let mut set = PageSet::new(64);
        pages.iter().for_each(|page| set.insert(*page));
        set
    }

    proptest! {
        #[test]
        fn due_never_early_and_never_lost(
            steps in prop::collection::vec((0u64..40, prop::collection::vec(0u64..64, 0..5)), 1..80)
        ) {
            let mut look = SecondLook::new(64, WINDOW);
            let mut last_report = BTreeMap::new();
            let mut now = Duration::ZERO;
            for (advance_ms, pages) in steps {
                now += Duration::from_millis(advance_ms);
                look.report(&set(&pages), now);
                for page in pages {
                    last_report.insert(page, now);
                }
                for page in look.take_due(now).iter() {
                    let reported = last_report.remove(&page);
                    prop_assert!(reported.is_some_and(|at| now >= at + WINDOW), "page {page} too early");
                }
                let span = WINDOW / GENERATIONS;
                for (page, at) in &last_report {
                    prop_assert!(now < *at + WINDOW + span, "page {page} forgotten");
                }
            }
            let rest: Vec<u64> = look.take_all().iter().collect();
            prop_assert_eq!(rest, last_report.keys().copied().collect::<Vec<_>>());
        }
    }

    #[test]
    fn memory_is_bounded_by_generations() {
        let mut look = SecondLook::new(64, WINDOW);
        for ms in 0..1000 {
            let now = Duration::from_millis(ms);
            look.report(&set(&[1]), now);
            look.take_due(now);
            assert!(look.buckets.len() <= GENERATIONS as usize + 2);
        }
    }
}
