//! Turning private copies of pages into batches.
//!
//! A [`BatchBuilder`] lets the caller read guest memory straight into the batch's payload and then
//! judges the pages in place, so that contents are copied once. Pages that need not travel are
//! squeezed out.

use crate::batch::{BATCH_PAYLOAD_BYTES_MAX, BATCH_RUNS_MAX, PageRun, RUN_PAGES_MAX, RunKind};
use crate::layout::{PAGE_BYTES, PageIndex};
use crate::page_table::{PageVerdict, Reason, SourcePages};

/// Bytes of payload at which a batch is worth sending.
pub const BATCH_TARGET_BYTES: usize = 256 << 10;

/// A finished batch: runs and the contents of the raw ones, in order.
#[derive(Debug, Default)]
pub struct EncodedBatch {
    /// What the batch holds.
    pub runs: Vec<PageRun>,
    /// Contents of the raw runs, one after the other.
    pub payload: PageBuffer,
}

/// Memory for contents that can be used again: finding and clearing fresh memory for every batch
/// costs as much as reading the pages into it.
#[derive(Debug, Default)]
pub struct PageBuffer {
    /// As large as it ever was; only the first part is in use.
    memory: Vec<u8>,
    bytes: usize,
}

impl PageBuffer {
    /// The same memory, empty.
    #[must_use]
    pub fn emptied(self) -> Self {
        Self { bytes: 0, ..self }
    }

    /// Bytes in use.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether nothing is in use.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Adds `bytes` bytes of any content and returns them.
    fn extend(&mut self, bytes: usize) -> &mut [u8] {
        let (start, end) = (self.bytes, self.bytes + bytes);
        if self.memory.len() < end {
            self.memory.resize(end.max(BATCH_TARGET_BYTES), 0);
        }
        self.bytes = end;
        self.memory.get_mut(start..end).unwrap_or_default()
    }

    /// Leaves the first `bytes` bytes in use.
    fn truncate(&mut self, bytes: usize) {
        self.bytes = self.bytes.min(bytes);
    }
}

impl AsRef<[u8]> for PageBuffer {
    fn as_ref(&self) -> &[u8] {
        self.memory.get(..self.bytes).unwrap_or_default()
    }
}

/// What became of the pages that went through a builder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PageCounts {
    /// Read and found to need no sending.
    pub kept: u64,
    /// Sent as zero.
    pub zero: u64,
    /// Sent with their content.
    pub raw: u64,
    /// Of those sent, how many had been sent before.
    pub resent: u64,
    /// Of those sent, how many were looked at without being known as written.
    pub looked_sent: u64,
}

impl PageCounts {
    /// Adds another count.
    pub fn add(&mut self, other: &Self) {
        self.kept += other.kept;
        self.zero += other.zero;
        self.raw += other.raw;
        self.resent += other.resent;
        self.looked_sent += other.looked_sent;
    }

    /// Pages that travelled in some form.
    pub fn sent(&self) -> u64 {
        self.zero + self.raw
    }
}

/// Collects pages until a batch is worth sending.
#[derive(Debug, Default)]
pub struct BatchBuilder {
    batch: EncodedBatch,
    counts: PageCounts,
}

impl BatchBuilder {
    /// An empty builder.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives an empty builder a buffer that a finished batch no longer needs.
    pub fn reuse(&mut self, buffer: PageBuffer) {
        if self.batch.payload.is_empty() {
            self.batch.payload = buffer.emptied();
        }
    }

    /// Reads `pages` consecutive pages from `first` on with `read` into a private buffer, judges
    /// each against `table` and keeps what must travel.
    ///
    /// At most [`Self::room_pages`] pages may be asked for.
    ///
    /// # Errors
    /// Whatever `read` returns; the batch is then as before.
    pub fn push<E>(
        &mut self,
        table: &SourcePages,
        first: PageIndex,
        pages: usize,
        reason: Reason,
        read: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let start = self.batch.payload.len();
        let payload = &mut self.batch.payload;
        if let Err(error) = read(payload.extend(pages * PAGE_BYTES)) {
            payload.truncate(start);
            return Err(error);
        }
        let memory = &mut payload.memory;
        let mut keep_end = start;
        let sent_before = self.counts.sent();
        for (page, at) in (first.0..).zip((start..).step_by(PAGE_BYTES)).take(pages) {
            let content = memory.get(at..at + PAGE_BYTES).unwrap_or_default();
            match table.judge(PageIndex(page), content, reason) {
                PageVerdict::Keep => self.counts.kept += 1,
                PageVerdict::Zero(version) => {
                    self.counts.zero += 1;
                    self.counts.resent += 1;
                    extend_run(&mut self.batch.runs, page, RunKind::Zero, version);
                }
                PageVerdict::Raw(version) => {
                    if at != keep_end {
                        memory.copy_within(at..at + PAGE_BYTES, keep_end);
                    }
                    keep_end += PAGE_BYTES;
                    self.counts.raw += 1;
                    self.counts.resent += u64::from(version > 1);
                    extend_run(&mut self.batch.runs, page, RunKind::Raw, version);
                }
            }
        }
        self.batch.payload.truncate(keep_end);
        if reason == Reason::Look {
            self.counts.looked_sent += self.counts.sent() - sent_before;
        }
        Ok(())
    }

    /// Pages that a push may still bring so that no limit of a batch can be exceeded.
    pub fn room_pages(&self) -> usize {
        let bytes = BATCH_PAYLOAD_BYTES_MAX.saturating_sub(self.batch.payload.len()) / PAGE_BYTES;
        bytes.min(BATCH_RUNS_MAX.saturating_sub(self.batch.runs.len()))
    }

    /// Whether the batch is large enough to be sent.
    pub fn is_full(&self, push_pages: usize) -> bool {
        self.batch.payload.len() >= BATCH_TARGET_BYTES || self.room_pages() < push_pages
    }

    /// Takes the batch if it holds anything.
    pub fn take(&mut self) -> Option<EncodedBatch> {
        if self.batch.runs.is_empty() {
            return None;
        }
        Some(std::mem::take(&mut self.batch))
    }

    /// Takes the counts since the last call.
    pub fn take_counts(&mut self) -> PageCounts {
        std::mem::take(&mut self.counts)
    }
}

fn extend_run(runs: &mut Vec<PageRun>, page: u64, kind: RunKind, version: u32) {
    if let Some(run) = runs.last_mut()
        && run.kind == kind
        && run.version == version
        && run.first.0 + u64::from(run.pages) == page
        && run.pages < RUN_PAGES_MAX
    {
        run.pages += 1;
        return;
    }
    runs.push(PageRun { first: PageIndex(page), pages: 1, kind, version });
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever mixture of pages goes in, runs and payload agree and limits hold.
        #[test]
        fn runs_and_payload_agree(pushes in prop::collection::vec(
            (0u64..200, prop::collection::vec(0u8..3, 1..20)), 1..30)
        ) {
            let table = SourcePages::new(256, true, 7);
            let mut builder = BatchBuilder::new();
            let mut sent = vec![0u8; 256];
            let mut guest = vec![0u8; 256];
            for (first, values) in pushes {
                builder.push(&table, PageIndex(first), values.len(), Reason::Dirty, |buffer| {
                    for (page, value) in buffer.chunks_mut(PAGE_BYTES).zip(&values) {
                        page.fill(*value);
                    }
                    Ok::<(), Infallible>(())
                }).unwrap();
                guest[first as usize..first as usize + values.len()].copy_from_slice(&values);
                if builder.is_full(20) {
                    apply(builder.take(), &mut sent);
                }
            }
            apply(builder.take(), &mut sent);
            prop_assert_eq!(guest, sent);
        }
    }

    fn apply(batch: Option<EncodedBatch>, sent: &mut [u8]) {
        let Some(batch) = batch else { return };
        assert!(batch.runs.len() <= BATCH_RUNS_MAX);
        assert!(batch.payload.len() <= BATCH_PAYLOAD_BYTES_MAX);
        let expected: usize = batch.runs.iter().map(PageRun::payload_bytes).sum();
        assert_eq!(batch.payload.len(), expected);
        let mut payload = batch.payload.as_ref().chunks(PAGE_BYTES);
        for run in &batch.runs {
            for page in run.first.0..run.first.0 + u64::from(run.pages) {
                sent[page as usize] = match run.kind {
                    RunKind::Raw => payload.next().unwrap()[17],
                    RunKind::Zero => 0,
                };
            }
        }
    }

    #[test]
    fn a_failed_read_leaves_the_batch_as_it_was() {
        let table = SourcePages::new(4, false, 0);
        let mut builder = BatchBuilder::new();
        assert_eq!(builder.push(&table, PageIndex(0), 2, Reason::Dirty, |_| Err("no")), Err("no"));
        assert!(builder.take().is_none());
    }
}
