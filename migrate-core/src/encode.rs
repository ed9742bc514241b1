//! Turning private copies of pages into batches.
//!
//! A [`BatchBuilder`] lets the caller read guest memory straight into the batch's contents and then
//! judges the pages in place, so that contents are copied once. Pages that need not travel are
//! squeezed out, deltas and references take the place of their pages.

use serde::Serialize;

use crate::batch::{
    BATCH_PAYLOAD_BYTES_MAX, BATCH_RUNS_MAX, LAST_VERSION, PageRun, REFERENCE_BYTES, RUN_PAGES_MAX,
    RunKind,
};
use crate::codec::{Codec, CodecError, Packer, packed_bytes_max};
use crate::delta::{self, delta_bytes};
use crate::layout::{PAGE_BYTES, PageIndex};
use crate::page_table::{PageVerdict, SourcePages, is_zero};

/// Bytes of contents at which a batch is worth sending.
pub const BATCH_TARGET_BYTES: usize = 256 << 10;

/// A finished batch: runs and their contents, in order, not packed yet.
#[derive(Debug, Default)]
pub struct EncodedBatch {
    /// What the batch holds.
    pub runs: Vec<PageRun>,
    /// Contents of the runs, one after the other.
    pub content: PageBuffer,
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

    /// Adds `bytes` bytes at the end, whatever they hold, for the caller to write.
    pub fn extend(&mut self, bytes: usize) -> &mut [u8] {
        let (start, end) = (self.bytes, self.bytes + bytes);
        if self.memory.len() < end {
            self.memory.resize(end.max(BATCH_TARGET_BYTES), 0);
        }
        self.bytes = end;
        self.memory.get_mut(start..end).unwrap_or_default()
    }

    /// These bytes as `packer` packs them, in the memory of `into`.
    ///
    /// # Errors
    /// As [`Packer::pack`].
    pub fn pack(&self, packer: &mut Packer, codec: Codec, into: Self) -> Result<Self, CodecError> {
        let mut packed = into.emptied();
        let out = packed.extend(packed_bytes_max(self.len()));
        let bytes = packer.pack(codec, self.as_ref(), out)?;
        packed.truncate(bytes);
        Ok(packed)
    }

    /// Leaves the first `bytes` bytes in use.
    pub fn truncate(&mut self, bytes: usize) {
        self.bytes = self.bytes.min(bytes);
    }
}

impl AsRef<[u8]> for PageBuffer {
    fn as_ref(&self) -> &[u8] {
        self.memory.get(..self.bytes).unwrap_or_default()
    }
}

/// Why a page is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// It was reported written.
    Dirty,
    /// It may have changed without a report.
    Look,
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
    /// Sent as a difference to what was sent before.
    pub delta: u64,
    /// Sent as a reference to a page with the same content.
    pub duplicate: u64,
    /// Reported written, but with the content that was sent before: not sent.
    pub unchanged: u64,
    /// Left out of the round because they were written again before it came to them.
    pub left_out: u64,
    /// Of those sent, how many had been sent before.
    pub resent: u64,
    /// Of those sent, how many were looked at without being known as written.
    pub looked_sent: u64,
    /// Bytes that the batches took on their lanes.
    pub wire_bytes: u64,
    /// What each codec packed, in the order of [`Codec::ALL`].
    pub packed: [Packed; 3],
}

/// What a codec did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Packed {
    /// Bytes of contents that it packed.
    pub content: u64,
    /// Bytes that they were packed to.
    pub packed: u64,
}

impl PageCounts {
    /// Adds another count.
    pub fn add(&mut self, other: &Self) {
        self.kept += other.kept;
        self.zero += other.zero;
        self.raw += other.raw;
        self.delta += other.delta;
        self.duplicate += other.duplicate;
        self.unchanged += other.unchanged;
        self.left_out += other.left_out;
        self.resent += other.resent;
        self.looked_sent += other.looked_sent;
        self.wire_bytes += other.wire_bytes;
        for (codec, other) in self.packed.iter_mut().zip(&other.packed) {
            codec.content += other.content;
            codec.packed += other.packed;
        }
    }

    /// Counts a batch that leaves.
    pub fn note_packed(&mut self, codec: Codec, content_bytes: usize, packed_bytes: usize) {
        let entries = self.packed.iter_mut().zip(Codec::ALL);
        for (entry, _) in entries.filter(|(_, entry)| *entry == codec) {
            entry.content += content_bytes as u64;
            entry.packed += packed_bytes as u64;
        }
    }

    /// Pages that travelled in some form.
    pub fn sent(&self) -> u64 {
        self.zero + self.raw + self.delta + self.duplicate
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
        if self.batch.content.is_empty() {
            self.batch.content = buffer.emptied();
        }
    }

    /// Reads `pages` consecutive pages from `first` on with `read` into a private buffer, judges
    /// each against `table` and keeps what must travel. `read` copies pages from the one named on; it
    /// is also asked for single pages of the same lane, to compare them.
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
        read: impl Fn(PageIndex, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let sent_before = self.counts.sent();
        let judge = |page, content: &[u8]| {
            table.judge(page, content, |other| {
                let mut now = [0; PAGE_BYTES];
                read(other, &mut now).is_ok() && now == content
            })
        };
        self.fill(first, pages, reason, |buffer| read(first, buffer), judge)?;
        if reason == Reason::Look {
            self.counts.looked_sent += self.counts.sent() - sent_before;
        }
        Ok(())
    }

    /// As [`Self::push`] for pages that change no more and of which the destination holds nothing
    /// (post-copy): all of them travel.
    ///
    /// # Errors
    /// Whatever `read` returns; the batch is then as before.
    pub fn push_last<E>(
        &mut self,
        first: PageIndex,
        pages: usize,
        read: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.fill(first, pages, Reason::Dirty, read, |_, content| match is_zero(content) {
            true => PageVerdict::Zero(LAST_VERSION),
            false => PageVerdict::Raw(LAST_VERSION),
        })
    }

    /// Reads pages into the batch and squeezes out what `judge` says need not travel.
    fn fill<E>(
        &mut self,
        first: PageIndex,
        pages: usize,
        reason: Reason,
        read: impl FnOnce(&mut [u8]) -> Result<(), E>,
        judge: impl Fn(PageIndex, &[u8]) -> PageVerdict,
    ) -> Result<(), E> {
        let start = self.batch.content.len();
        let buffer = &mut self.batch.content;
        if let Err(error) = read(buffer.extend(pages * PAGE_BYTES)) {
            buffer.truncate(start);
            return Err(error);
        }
        let memory = &mut buffer.memory;
        let mut keep_end = start;
        for (page, at) in (first.0..).zip((start..).step_by(PAGE_BYTES)).take(pages) {
            let content = memory.get(at..at + PAGE_BYTES).unwrap_or_default();
            let (kind, version) = match judge(PageIndex(page), content) {
                PageVerdict::Keep => {
                    self.counts.kept += 1;
                    continue;
                }
                PageVerdict::Unchanged => {
                    let count = match reason {
                        Reason::Dirty => &mut self.counts.unchanged,
                        Reason::Look => &mut self.counts.kept,
                    };
                    *count += 1;
                    continue;
                }
                PageVerdict::Zero(version) => {
                    self.counts.zero += 1;
                    (RunKind::Zero, version)
                }
                PageVerdict::Raw(version) => {
                    if at != keep_end {
                        memory.copy_within(at..at + PAGE_BYTES, keep_end);
                    }
                    keep_end += PAGE_BYTES;
                    self.counts.raw += 1;
                    (RunKind::Raw, version)
                }
                PageVerdict::Delta(version, mask) => {
                    keep_end += shrink_to_delta(memory, at, mask, keep_end);
                    self.counts.delta += 1;
                    (RunKind::Delta, version)
                }
                PageVerdict::Same(version, of) => {
                    let place = memory.get_mut(keep_end..).and_then(<[u8]>::first_chunk_mut);
                    if let Some(place) = place {
                        *place = of.0.to_le_bytes();
                    }
                    keep_end += REFERENCE_BYTES;
                    self.counts.duplicate += 1;
                    (RunKind::Same, version)
                }
            };
            self.counts.resent += u64::from((2..LAST_VERSION).contains(&version));
            extend_run(&mut self.batch.runs, page, kind, version);
        }
        self.batch.content.truncate(keep_end);
        Ok(())
    }

    /// Bytes of contents so far.
    pub fn content_bytes(&self) -> usize {
        self.batch.content.len()
    }

    /// Pages that a push may still bring so that no limit of a batch can be exceeded.
    pub fn room_pages(&self) -> usize {
        let bytes = BATCH_PAYLOAD_BYTES_MAX.saturating_sub(self.batch.content.len()) / PAGE_BYTES;
        bytes.min(BATCH_RUNS_MAX.saturating_sub(self.batch.runs.len()))
    }

    /// Whether the batch is large enough to be sent.
    pub fn is_full(&self, push_pages: usize) -> bool {
        self.batch.content.len() >= BATCH_TARGET_BYTES || self.room_pages() < push_pages
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

/// Puts the delta of the page at `at` to `target`, which is not behind it; returns its length.
fn shrink_to_delta(memory: &mut [u8], at: usize, mask: u64, target: usize) -> usize {
    let bytes = delta_bytes(mask);
    let page = memory.get(at..).and_then(|page| page.first_chunk()).copied();
    if let (Some(page), Some(out)) = (page, memory.get_mut(target..target + bytes)) {
        delta::encode(&page, mask, out);
    }
    bytes
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
mod tests;
