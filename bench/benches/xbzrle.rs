//! What a page that is sent again costs until its delta is there:
//! `cargo bench -p bench --bench xbzrle`.
//!
//! `encode` is the engine's XBZRLE, `reference` the same format byte by byte, `cached` the engine's
//! with the page cache around it, `judge` the page table with hashes of lines. Each is run over one
//! page, and over 32 MiB of them, with as much remembered, which come from memory. Times are the
//! processor's, so that other work on the machine counts less.
#![expect(clippy::unwrap_used, reason = "own inputs; a benchmark may end at once")]

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use migrate_core::delta::{self, Page};
use migrate_core::layout::{PAGE_BYTES, PageIndex};
use migrate_core::page_cache::{FRAME_BYTES, PageCache, Sending};
use migrate_core::page_table::SourcePages;
use migrate_core::xbzrle::{self, Encoded};
use rustix::time::{ClockId, clock_gettime};

#[path = "../../migrate-core/src/xbzrle/reference.rs"]
mod reference;

/// Pages that do not fit into the processor's own caches.
const MANY: usize = 8192;

/// Processor time of this thread.
struct CpuTime;

impl CpuTime {
    fn now() -> Duration {
        clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap()
    }
}

impl Measurement for CpuTime {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        Self::now()
    }

    fn end(&self, began: Duration) -> Duration {
        Self::now() - began
    }

    fn add(&self, one: &Duration, other: &Duration) -> Duration {
        *one + *other
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        WallTime.to_f64(value)
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}

/// Bytes that do not compress, always the same.
fn noise() -> impl FnMut() -> u64 {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

/// Two versions of some pages.
struct Versions {
    old: Vec<Page>,
    new: Vec<Page>,
}

impl Versions {
    /// Noise, and the same with the given ranges changed in every page.
    fn new(pages: usize, changed: &[(usize, usize)]) -> Self {
        let mut word = noise();
        let mut old = vec![[0; PAGE_BYTES]; pages];
        for bytes in old.iter_mut().flat_map(|page| page.as_chunks_mut::<8>().0) {
            *bytes = word().to_le_bytes();
        }
        let mut new = old.clone();
        for (start, length) in changed {
            for page in &mut new {
                page[*start..start + length].iter_mut().for_each(|byte| *byte = !*byte);
            }
        }
        Self { old, new }
    }

    /// Calls `work` with a page's number and its versions, one page after the other and again from
    /// the start; every second time around the versions are exchanged.
    fn walk<R>(&self, mut work: impl FnMut(usize, &Page, &Page) -> R) -> impl FnMut() -> R {
        let mut at = 0;
        move || {
            let (number, turned) = (at % self.old.len(), at / self.old.len() % 2 == 1);
            at += 1;
            let (old, new) = (&self.old[number], &self.new[number]);
            let (old, new) = if turned { (new, old) } else { (old, new) };
            work(number, black_box(old), black_box(new))
        }
    }
}

fn run(group: &mut BenchmarkGroup<'_, CpuTime>, case: &str, versions: &Versions) {
    type Encode = fn(&Page, &Page, &mut [u8]) -> Encoded;
    let encoders: [(&str, Encode); 2] =
        [("encode", xbzrle::encode), ("reference", reference::encode)];
    let mut out = [0; PAGE_BYTES];
    for (name, encode) in encoders {
        let mut work = versions.walk(|_, old, new| encode(old, new, black_box(&mut out)));
        group.bench_function(format!("{name}/{case}"), |b| b.iter(&mut work));
    }

    let pages = versions.old.len() as u64;
    let cache = PageCache::new(1, pages.next_multiple_of(16) * FRAME_BYTES);
    let cached = |number: usize, new: &Page, out: &mut [u8]| {
        let sending = Sending { version: 2, heat: 100 };
        let encode = |old: &Page| xbzrle::encode(old, new, out);
        cache.replace(PageIndex(number as u64), new, sending, encode)
    };
    let table = SourcePages::new(pages, false, 7).with_deltas(1, 1 << 30);
    let judge = |number: usize, new: &Page| table.judge(PageIndex(number as u64), new, |_| false);
    for (number, page) in versions.old.iter().enumerate() {
        assert_eq!(cached(number, page, &mut out), None);
        judge(number, page);
    }
    let mut work =
        versions.walk(|number, _, new| cached(number, new, black_box(&mut out)).unwrap());
    group.bench_function(format!("cached/{case}"), |b| b.iter(&mut work));
    let mut work = versions.walk(|number, _, new| judge(number, new));
    group.bench_function(format!("judge/{case}"), |b| b.iter(&mut work));
}

fn deltas(c: &mut Criterion<CpuTime>) {
    let words: Vec<_> = (0..8).map(|number| (number * 520 + 24, 8)).collect();
    let half: Vec<_> = (0..32).map(|number| (number * 128, 64)).collect();
    let lines: Vec<_> = (0..8).map(|number| (number * 512 + 64, 64)).collect();
    let cases: [(&str, &[(usize, usize)]); 5] = [
        ("unchanged", &[]),
        ("64-bytes", &[(1000, 64)]),
        ("8-words", &words),
        ("8-lines", &lines),
        ("half", &half),
    ];
    for (pages, place) in [(1, "one-page"), (MANY, "from-memory")] {
        let mut group = c.benchmark_group(place);
        group.throughput(Throughput::BytesDecimal(PAGE_BYTES as u64));
        for (name, changed) in cases {
            run(&mut group, name, &Versions::new(pages, changed));
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().with_measurement(CpuTime);
    targets = deltas
}
criterion_main!(benches);
