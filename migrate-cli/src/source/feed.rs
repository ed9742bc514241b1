//! The missing pages of a guest that runs at the destination: who sends which, and when.
//!
//! Requests and the background push take pages from one plan, so that each leaves once in a session
//! ([`migrate_core::postcopy::PushPlan`] decides; this module adds the lock and the clock).

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use migrate_core::encode::BATCH_TARGET_BYTES;
use migrate_core::layout::{PageIndex, RamLayout};
use migrate_core::pageset::PageSet;
use migrate_core::postcopy::{Answer, PostcopyError, PushConfig, PushCounts, PushPlan};

/// Smallest batch that the background push sends: what a request may have to wait behind on its way
/// through one lane.
const BATCH_BYTES_MIN: usize = 32 << 10;

/// Batches that what is under way consists of, at least.
const BATCHES_UNDER_WAY: usize = 8;

#[derive(Debug)]
struct Inner {
    plan: PushPlan,
    /// What is left of a run that was too long for its taker.
    rest: Option<(u64, u64)>,
    closed: bool,
}

/// The plan, shared by all that send from it.
#[derive(Debug)]
pub struct Feed {
    inner: Mutex<Inner>,
    began: Instant,
}

impl Feed {
    /// A feed of the `missing` pages; whole pages of the blocks if they are larger.
    pub fn new(layout: &RamLayout, missing: PageSet) -> Self {
        let plan = PushPlan::new(layout, missing, PushConfig::default());
        Self { inner: Mutex::new(Inner { plan, rest: None, closed: false }), began: Instant::now() }
    }

    /// All pages that were missing at the hand-over.
    pub fn missing(&self) -> PageSet {
        self.lock().plan.missing().clone()
    }

    /// Begins anew with what the destination still lacks.
    pub fn restart(&self, wanted: PageSet) {
        let mut inner = self.lock();
        inner.plan.wanted(wanted);
        (inner.rest, inner.closed) = (None, false);
    }

    /// Gives nothing more: the session is over.
    pub fn close(&self) {
        self.lock().closed = true;
    }

    /// At most `pages_max` consecutive pages of one block for the background, as first and number.
    pub fn next(&self, pages_max: usize) -> Option<(PageIndex, usize)> {
        let mut inner = self.lock();
        if inner.closed {
            return None;
        }
        let (first, pages) = match inner.rest.take() {
            Some(rest) => rest,
            None => {
                let run = inner.plan.next(pages_max as u64)?;
                (run.start, run.end - run.start)
            }
        };
        let taken = pages.min(pages_max as u64);
        inner.rest = (taken < pages).then_some((first + taken, pages - taken));
        Some((PageIndex(first), taken as usize))
    }

    /// The guest waits for `page`: what to send at once; nothing if it is under way already.
    ///
    /// # Errors
    /// [`PostcopyError`] if the page is not missing: the destination misbehaves.
    pub fn requested(&self, page: PageIndex) -> Result<Option<Answer>, PostcopyError> {
        self.lock().plan.requested(page, self.began.elapsed())
    }

    /// Bytes that the background may have under way at this moment.
    pub fn window_bytes(&self) -> u64 {
        self.lock().plan.push_budget(self.began.elapsed())
    }

    /// Size of a batch in the background: small while the guest faults.
    pub fn batch_bytes(&self) -> usize {
        let share = self.window_bytes() as usize / BATCHES_UNDER_WAY;
        share.clamp(BATCH_BYTES_MIN, BATCH_TARGET_BYTES)
    }

    /// Pages that were not sent yet.
    pub fn unsent_pages(&self) -> u64 {
        self.lock().plan.unsent_pages()
    }

    /// What was sent so far.
    pub fn counts(&self) -> PushCounts {
        self.lock().plan.counts()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
