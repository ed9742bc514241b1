//! A guest whose contents repeat, and a destination that applies its batches.

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
    let kinds: Vec<_> = batch.runs.iter().map(|run| (run.first.0, run.pages, run.kind)).collect();
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
    assert_eq!(builder.push(&table, PageIndex(0), 2, Reason::Dirty, |_, _| Err("no")), Err("no"));
    assert!(builder.take().is_none());
}
