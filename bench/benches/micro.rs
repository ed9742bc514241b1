//! Micro-benchmarks of what every page passes through: `cargo bench -p bench`.
#![expect(clippy::unwrap_used, reason = "own inputs; a benchmark may end at once")]

use std::convert::Infallible;
use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use migrate_core::batch::{PageRun, RunKind};
use migrate_core::codec::{Codec, Packer, packed_bytes_max};
use migrate_core::encode::{BatchBuilder, Reason};
use migrate_core::layout::{PAGE_BYTES, PageIndex};
use migrate_core::page_table::{SourcePages, is_zero};
use migrate_core::pageset::PageSet;
use transport::lane_wire::{Batch, decode, encode_head};

/// Bytes that do not compress, always the same.
fn noise(pages: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut words = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..pages * PAGE_BYTES / 8).flat_map(|_| words()).collect()
}

fn zero_pages(c: &mut Criterion) {
    let mut group = c.benchmark_group("is_zero");
    group.throughput(Throughput::Bytes(PAGE_BYTES as u64));
    let mut last = vec![0; PAGE_BYTES];
    last[PAGE_BYTES - 1] = 1;
    for (name, page) in [("zero", vec![0; PAGE_BYTES]), ("last-byte", last), ("noise", noise(1))] {
        group.bench_function(name, |b| b.iter(|| is_zero(black_box(&page))));
    }
    group.finish();
}

fn judge(c: &mut Criterion) {
    let mut group = c.benchmark_group("judge");
    group.throughput(Throughput::Bytes(PAGE_BYTES as u64));
    let mut page = noise(1);
    let table = || SourcePages::new(1 << 14, false, 7);
    let tables = [
        ("versions", table()),
        ("versions-and-hashes", SourcePages::new(1 << 14, true, 7)),
        ("versions-and-deltas", table().with_deltas(1, 1 << 30)),
        ("versions-and-duplicates", table().with_duplicates(1)),
    ];
    for (name, table) in tables {
        let mut next = 0u64;
        group.bench_function(name, |b| {
            b.iter(|| {
                next = (next + 1) % (1 << 14);
                page[200..208].copy_from_slice(&next.to_le_bytes());
                // Every page is another one, and comes back with one line changed.
                page[100] = page[100].wrapping_add(u8::from(next == 0));
                table.judge(PageIndex(next), black_box(&page), |_| false)
            });
        });
    }
    group.finish();
}

/// Packing batches of 256 KiB: words in any order, and noise.
fn codecs(c: &mut Criterion) {
    const BYTES: usize = 256 << 10;
    let mut group = c.benchmark_group("pack");
    group.throughput(Throughput::Bytes(BYTES as u64));
    let words = ["page ", "guest ", "memory ", "dirty ", "round ", "the ", "of ", "link "];
    let picks = noise(BYTES / PAGE_BYTES);
    let text = picks.iter().flat_map(|pick| words[usize::from(pick % 8)].bytes());
    let inputs = [("text", text.take(BYTES).collect::<Vec<u8>>()), ("noise", picks.clone())];
    for (name, content) in inputs {
        for codec in [Codec::Lz4, Codec::Zstd] {
            let mut out = vec![0; packed_bytes_max(BYTES)];
            group.bench_function(format!("{codec:?}/{name}"), |b| {
                b.iter_batched(
                    Packer::default,
                    |mut packer| packer.pack(codec, &content, &mut out).unwrap(),
                    BatchSize::PerIteration,
                );
            });
        }
    }
    group.finish();
}

/// A builder's work without the reading: 64 pages, all raw, all zero, or every other one zero.
fn batches(c: &mut Criterion) {
    const PAGES: usize = 64;
    let mut group = c.benchmark_group("batch_builder");
    group.throughput(Throughput::Bytes((PAGES * PAGE_BYTES) as u64));
    let mut mixed = noise(PAGES);
    mixed.chunks_mut(2 * PAGE_BYTES).for_each(|pair| pair[..PAGE_BYTES].fill(0));
    let inputs = [("raw", noise(PAGES)), ("zero", vec![0; PAGES * PAGE_BYTES]), ("mixed", mixed)];
    for (name, content) in inputs {
        let table = SourcePages::new(1 << 20, false, 7);
        group.bench_function(name, |b| {
            b.iter(|| {
                let mut builder = BatchBuilder::new();
                let read = |_, buffer: &mut [u8]| {
                    buffer.copy_from_slice(&content);
                    Ok::<(), Infallible>(())
                };
                builder.push(&table, PageIndex(0), PAGES, Reason::Dirty, read).unwrap();
                builder.take()
            });
        });
    }
    group.finish();
}

/// Sets of a guest of 4 GiB.
fn sets(c: &mut Criterion) {
    const PAGES: u64 = 1 << 20;
    let mut group = c.benchmark_group("pageset_iter");
    for (name, step) in [("1-in-1000", 1000), ("1-in-10", 10), ("all", 1)] {
        let mut set = PageSet::new(PAGES);
        (0..PAGES).step_by(step).for_each(|page| set.insert(page));
        group.throughput(Throughput::Elements(set.len()));
        group.bench_function(name, |b| b.iter(|| black_box(&set).iter().sum::<u64>()));
    }
    let (mut one, other) = (PageSet::new(PAGES), PageSet::new(PAGES));
    group.throughput(Throughput::Elements(PAGES));
    group.bench_function("union", |b| b.iter(|| one.union_with(black_box(&other))));
    group.finish();
}

/// A batch of 256 KiB in runs of so many pages.
fn batch(run_pages: u16) -> Batch {
    let runs = 64 / u64::from(run_pages);
    let run = |at: u64| PageRun {
        first: PageIndex(at * 100),
        pages: run_pages,
        kind: RunKind::Raw,
        version: 1,
    };
    Batch::plain((0..runs).map(run).collect(), noise(64), 1)
}

fn lanes(c: &mut Criterion) {
    let mut group = c.benchmark_group("lane_codec");
    for (name, run_pages) in [("1-run", 64), ("64-runs", 1)] {
        let batch = batch(run_pages);
        group.throughput(Throughput::Bytes(batch.payload.len() as u64));
        group.bench_function(format!("encode-{name}"), |b| {
            b.iter(|| encode_head(black_box(&batch), 1).unwrap());
        });
        let frame = [&encode_head(&batch, 1).unwrap()[..], &batch.payload.to_vec()[..]].concat();
        group.bench_function(format!("decode-{name}"), |b| {
            b.iter_batched(
                || (),
                |()| decode(black_box(&frame), 1).unwrap(),
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, zero_pages, judge, codecs, batches, sets, lanes);
criterion_main!(benches);
