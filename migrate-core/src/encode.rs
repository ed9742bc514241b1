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
mod tests {
    use std::cell::{Cell, RefCell};
    use std::collections::BTreeSet;
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;
    use crate::batch::{CHUNK_PAGES, lane_of};
    use crate::delta::{LINE_BYTES, LINES, MASK_BYTES, changed_ranges};

    /// A page whose lines hold `value`, one of them perhaps another.
    fn page((value, patch): Content) -> Vec<u8> {
        let mut page = vec![value; PAGE_BYTES];
        if let Some((line, value)) = patch {
            page[line * LINE_BYTES..][..LINE_BYTES].fill(value);
        }
        page
    }

    fn any_page() -> impl Strategy<Value = Content> {
        (0u8..3, prop::option::weighted(0.3, (0..LINES, any::<u8>())))
    }

    /// The model: a guest of two chunks a lane whose contents repeat.
    #[derive(Debug, Clone)]
    enum Op {
        /// The guest writes pages. If they are not seen, the tracking learns of it later.
        Write { first: u64, pages: Vec<Content>, seen: bool },
        /// Written pages of a chunk are read; then, before anything is compared, the guest writes.
        Push { chunk: u64, pages: usize, meanwhile: Vec<(u64, Content)> },
        /// What a lane has collected is applied.
        Apply { lane: usize },
    }

    type Content = (u8, Option<(usize, u8)>);

    const PAGES: u64 = 4 * CHUNK_PAGES;

    fn op() -> impl Strategy<Value = Op> {
        // Some pages are written again and again.
        let place = || {
            let within = prop_oneof![4 => 0u64..4, 1 => 0..CHUNK_PAGES];
            (0..PAGES / CHUNK_PAGES, within).prop_map(|(chunk, at)| chunk * CHUNK_PAGES + at)
        };
        let write = (place(), prop::collection::vec(any_page(), 1..12), any::<bool>());
        let write = write.prop_map(|(first, pages, seen)| Op::Write { first, pages, seen });
        let meanwhile = prop::collection::vec((place(), any_page()), 0..4);
        let push = (0..PAGES / CHUNK_PAGES, 1usize..20, meanwhile);
        let push = push.prop_map(|(chunk, pages, meanwhile)| Op::Push { chunk, pages, meanwhile });
        prop_oneof![3 => write, 4 => push, 1 => (0usize..2).prop_map(|lane| Op::Apply { lane })]
    }

    struct Guest {
        memory: RefCell<Vec<Vec<u8>>>,
        /// Pages that were written and not read since.
        dirty: RefCell<BTreeSet<u64>>,
    }

    impl Guest {
        fn write(&self, number: u64, content: Content) {
            if let Some(slot) = self.memory.borrow_mut().get_mut(number as usize) {
                *slot = page(content);
                self.dirty.borrow_mut().insert(number);
            }
        }

        /// Reads dirty pages from `first` on into the builder.
        fn push(
            &self,
            builder: &mut BatchBuilder,
            table: &SourcePages,
            (first, pages): (u64, usize),
            meanwhile: &[(u64, Content)],
        ) {
            self.dirty.borrow_mut().retain(|page| !(first..first + pages as u64).contains(page));
            let read_the_pages = Cell::new(false);
            let read = |from: PageIndex, buffer: &mut [u8]| {
                let memory = self.memory.borrow();
                let content = memory.iter().skip(from.0 as usize).flatten();
                buffer.iter_mut().zip(content).for_each(|(to, from)| *to = *from);
                drop(memory);
                if !read_the_pages.replace(true) {
                    meanwhile.iter().for_each(|(page, content)| self.write(*page, *content));
                }
                Ok::<(), Infallible>(())
            };
            builder.push(table, PageIndex(first), pages, Reason::Dirty, read).unwrap();
        }

        /// The first dirty pages of a chunk, without a gap.
        fn next(&self, chunk: u64, pages: usize) -> Option<(u64, usize)> {
            let dirty = self.dirty.borrow();
            let chunk = chunk * CHUNK_PAGES..(chunk + 1) * CHUNK_PAGES;
            let first = *dirty.range(chunk.clone()).next()?;
            let run = (first..chunk.end).take_while(|page| dirty.contains(page));
            Some((first, run.take(pages).count()))
        }
    }

    proptest! {
        /// Whatever is written and read, and however far one lane is ahead of the other: what the
        /// batches bring is what was read last, and limits hold.
        #[test]
        fn batches_bring_what_was_read(
            ops in prop::collection::vec(op(), 1..120),
            deltas in any::<bool>(),
            duplicates in any::<bool>(),
        ) {
            let mut table = SourcePages::new(PAGES, !deltas, 7);
            if deltas {
                table = table.with_deltas(2, 1 << 20);
            }
            if duplicates {
                table = table.with_duplicates(2);
            }
            let mut sent = vec![vec![0u8; PAGE_BYTES]; PAGES as usize];
            let guest = Guest { memory: RefCell::new(sent.clone()), dirty: RefCell::default() };
            let mut builders = [BatchBuilder::new(), BatchBuilder::new()];
            let mut unseen = vec![];
            let end = (0..PAGES / CHUNK_PAGES).flat_map(|chunk| {
                let push = Op::Push { chunk, pages: CHUNK_PAGES as usize, meanwhile: vec![] };
                std::iter::repeat_n(push, CHUNK_PAGES as usize)
            });
            let see = Op::Write { first: PAGES, pages: vec![], seen: true };
            for op in ops.into_iter().chain([see]).chain(end) {
                match op {
                    Op::Write { first, pages, seen } => {
                        for (number, content) in (first..).zip(pages) {
                            guest.write(number, content);
                            if !seen {
                                guest.dirty.borrow_mut().remove(&number);
                                unseen.push(number);
                            }
                        }
                        if seen {
                            let late = unseen.drain(..).filter(|page| *page < PAGES);
                            guest.dirty.borrow_mut().extend(late);
                        }
                    }
                    Op::Push { chunk, pages, meanwhile } => {
                        let Some(run) = guest.next(chunk, pages) else { continue };
                        let lane = lane_of(PageIndex(run.0), 2);
                        let builder = &mut builders[lane];
                        guest.push(builder, &table, run, &meanwhile);
                        if builder.is_full(CHUNK_PAGES as usize) {
                            apply(builder.take(), lane, &mut sent);
                        }
                    }
                    Op::Apply { lane } => apply(builders[lane].take(), lane, &mut sent),
                }
            }
            for (lane, builder) in builders.iter_mut().enumerate() {
                apply(builder.take(), lane, &mut sent);
            }
            prop_assert!(*guest.memory.borrow() == sent);
        }
    }

    /// Does what the destination does with a batch of one of two lanes.
    fn apply(batch: Option<EncodedBatch>, lane: usize, sent: &mut [Vec<u8>]) {
        let Some(batch) = batch else { return };
        assert!(batch.runs.len() <= BATCH_RUNS_MAX);
        assert!(batch.content.len() <= BATCH_PAYLOAD_BYTES_MAX);
        let mut rest = batch.content.as_ref();
        let mut take = |bytes| {
            let (taken, left) = rest.split_at(bytes);
            rest = left;
            taken
        };
        for run in &batch.runs {
            for page in run.first.0..run.first.0 + u64::from(run.pages) {
                assert_eq!(lane_of(PageIndex(page), 2), lane);
                let (number, mut page) = (page, sent[page as usize].clone());
                match run.kind {
                    RunKind::Raw => page.copy_from_slice(take(PAGE_BYTES)),
                    RunKind::Zero => page.fill(0),
                    RunKind::Delta => {
                        let mask = u64::from_le_bytes(take(MASK_BYTES).try_into().unwrap());
                        for range in changed_ranges(mask) {
                            let lines = take(range.len());
                            page[range].copy_from_slice(lines);
                        }
                    }
                    RunKind::Same => {
                        let of = u64::from_le_bytes(take(REFERENCE_BYTES).try_into().unwrap());
                        assert!(of != number && lane_of(PageIndex(of), 2) == lane);
                        page.copy_from_slice(&sent[of as usize]);
                    }
                }
                sent[number as usize] = page;
            }
        }
        assert!(rest.is_empty());
    }

    #[test]
    fn equal_pages_travel_as_references_in_order() {
        let table = SourcePages::new(PAGES, false, 7).with_duplicates(2);
        let mut builder = BatchBuilder::new();
        let read = |from: PageIndex, buffer: &mut [u8]| {
            // Page 3 is another one, all others are equal.
            for (number, page) in (from.0..).zip(buffer.chunks_mut(PAGE_BYTES)) {
                page.fill(if number == 3 { 9 } else { 5 });
            }
            Ok::<(), Infallible>(())
        };
        builder.push(&table, PageIndex(0), 6, Reason::Dirty, read).unwrap();
        let batch = builder.take().unwrap();
        let kinds: Vec<_> =
            batch.runs.iter().map(|run| (run.first.0, run.pages, run.kind)).collect();
        let (raw, same) = (RunKind::Raw, RunKind::Same);
        assert_eq!(kinds, [(0, 1, raw), (1, 2, same), (3, 1, raw), (4, 2, same)]);
        assert_eq!(batch.content.len(), 2 * PAGE_BYTES + 4 * REFERENCE_BYTES);
        let counts = builder.take_counts();
        assert_eq!((counts.raw, counts.duplicate, counts.sent()), (2, 4, 6));
        // Another lane knows nothing of them.
        builder.push(&table, PageIndex(CHUNK_PAGES), 2, Reason::Dirty, read).unwrap();
        assert_eq!((builder.take_counts().raw, builder.take().unwrap().runs.len()), (1, 2));
    }

    #[test]
    fn a_failed_read_leaves_the_batch_as_it_was() {
        let table = SourcePages::new(4, false, 0);
        let mut builder = BatchBuilder::new();
        assert_eq!(
            builder.push(&table, PageIndex(0), 2, Reason::Dirty, |_, _| Err("no")),
            Err("no")
        );
        assert!(builder.take().is_none());
    }
}
