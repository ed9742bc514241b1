//! Works on memory in phases, to measure what its access costs, and verifies all that it reads.
//!
//! ```text
//!  idle ── nothing
//!  hot ─── pages of the hot area, read and written, at random or in their order
//!  fresh ─ memory is allocated, written, read and freed again, over and over
//!  used ── pages of the area that was filled once, read
//!  both ── a turn of fresh, then as many pages of used as there are, over and over
//! ```
//! Options: `fill_mib` (filled once, then only read), `content` (of it: `random`, `text` or `mixed`), `hot_mib`, `fresh_mib`,
//! `order` (`random` or `sequential`, for hot and used), `phase` (the first one; without it hot if there is a hot
//! area), `report_ms` (a line on the console at such intervals, 0 for none), `seed`. Commands: `report`, `phase NAME`,
//! `check` (goes through all of both areas once, before anything else; the report counts it when it is done), `corrupt PAGE`
//! (of what was filled: proof that a wrong byte is found).
//!
//! An operation is a page gone through, with all of its bytes. Invariants: a page's contents follow from (seed, number,
//! generation), and the generations are kept apart from the pages; whatever is wrong is told once and every
//! report from then on says so.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use guest_programs::PAGE_BYTES;
use guest_programs::options::Options;
use guest_programs::pattern::{fill_text, fill_words, page_key, wrong_word};
use guest_programs::rng::XorShift;

use crate::console::{monotonic_us, tell, tell_failure};
use crate::content::Content;
use crate::memory::{PAGES_PER_MIB, Page, pages};
use crate::shell;

/// Failures that are printed; further ones are only counted.
const PRINTED_FAILURES: u64 = 20;
/// Pages gone through before commands are looked at again.
const STEP_PAGES: usize = 64;

/// No page.
const NONE: u64 = u64::MAX;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Idle,
    Hot,
    Fresh,
    Used,
    Both,
}

impl Phase {
    const ALL: [Self; 5] = [Self::Idle, Self::Hot, Self::Fresh, Self::Used, Self::Both];

    fn label(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Hot => "hot",
            Self::Fresh => "fresh",
            Self::Used => "used",
            Self::Both => "both",
        }
    }
}

/// What the working thread shares with those that ask.
struct Shared {
    /// Index in [`Phase::ALL`].
    phase: AtomicU8,
    pages: AtomicU64,
    checks_wanted: AtomicU64,
    checks: AtomicU64,
    /// A page to spoil, or [`NONE`].
    corrupt: AtomicU64,
    failures: AtomicU64,
    started_us: u64,
}

impl Shared {
    fn phase(&self) -> Phase {
        let at = usize::from(self.phase.load(Ordering::Relaxed));
        Phase::ALL.get(at).copied().unwrap_or(Phase::Idle)
    }

    fn fail(&self, text: &str) {
        if self.failures.fetch_add(1, Ordering::Relaxed) < PRINTED_FAILURES {
            tell_failure(&format!("WORKER FAIL {text}"));
        }
    }

    /// Pages gone through, and the clock in microseconds since the start.
    fn progress(&self) -> (u64, u64) {
        let elapsed_us = monotonic_us().saturating_sub(self.started_us);
        (self.pages.load(Ordering::Relaxed), elapsed_us)
    }

    fn report(&self) -> String {
        let (pages, elapsed_us) = self.progress();
        let numbers = format!(
            "phase={} pages={pages} checks={} elapsed_us={elapsed_us}",
            self.phase().label(),
            self.checks.load(Ordering::Relaxed)
        );
        match self.failures.load(Ordering::Relaxed) {
            0 => format!("WORKER OK {numbers}"),
            count => format!("WORKER FAIL count={count} {numbers}"),
        }
    }
}

/// The order in which pages of an area are gone through.
struct Walk {
    rng: XorShift,
    is_random: bool,
    next: usize,
}

impl Walk {
    fn pick(&mut self, pages: usize) -> usize {
        if self.is_random {
            return self.rng.below(pages as u64) as usize;
        }
        let at = self.next % pages.max(1);
        self.next = at + 1;
        at
    }
}

/// Pages that are read and written.
struct Hot {
    pages: Vec<Page>,
    generations: Vec<u64>,
    walk: Walk,
    seed: u64,
}

impl Hot {
    fn verify(&self, number: usize, shared: &Shared) {
        let (Some(page), Some(&generation)) =
            (self.pages.get(number), self.generations.get(number))
        else {
            return;
        };
        let key = page_key(self.seed, number as u64, generation);
        if let Some(offset) = wrong_word(key, std::hint::black_box(&page.0)) {
            shared.fail(&format!("area=hot page={number} offset={offset} generation={generation}"));
        }
    }

    fn step(&mut self, shared: &Shared) {
        for _ in 0..STEP_PAGES {
            let number = self.walk.pick(self.pages.len());
            self.verify(number, shared);
            if let (Some(page), Some(generation)) =
                (self.pages.get_mut(number), self.generations.get_mut(number))
            {
                *generation += 1;
                fill_words(page_key(self.seed, number as u64, *generation), &mut page.0);
                std::hint::black_box(&mut page.0);
            }
        }
    }
}

/// Pages that were filled once.
struct Used {
    pages: Vec<Page>,
    content: Content,
    walk: Walk,
    seed: u64,
}

impl Used {
    fn fill(&mut self) {
        let seed = self.seed;
        for (number, page) in (0..).zip(&mut self.pages) {
            let key = page_key(seed, number, 0);
            match self.content.is_text(number) {
                true => fill_text(key, &mut page.0),
                false => fill_words(key, &mut page.0),
            }
        }
        std::hint::black_box(self.pages.as_mut_slice());
    }

    fn verify(&self, number: usize, shared: &Shared) {
        let Some(page) = self.pages.get(number) else { return };
        let (got, key) = (std::hint::black_box(&page.0), page_key(self.seed, number as u64, 0));
        let wrong = if self.content.is_text(number as u64) {
            let mut want = [0; PAGE_BYTES];
            fill_text(key, &mut want);
            want.iter().zip(got).position(|(want, got)| want != got)
        } else {
            wrong_word(key, got)
        };
        if let Some(offset) = wrong {
            shared.fail(&format!("area=used page={number} offset={offset}"));
        }
    }

    fn step(&mut self, shared: &Shared) {
        for _ in 0..STEP_PAGES {
            let number = self.walk.pick(self.pages.len());
            self.verify(number, shared);
        }
    }
}

/// Memory that is taken from the kernel and given back over and over.
struct Fresh {
    bytes: Vec<u8>,
    pages: usize,
    next: usize,
    is_written: bool,
    seed: u64,
    round: u64,
}

impl Fresh {
    /// The pages of what is allocated now.
    fn area(&mut self) -> &mut [[u8; PAGE_BYTES]] {
        let start = self.bytes.as_ptr().align_offset(PAGE_BYTES);
        let aligned = self.bytes.get_mut(start..).unwrap_or_default();
        let (pages, _) = aligned.as_chunks_mut::<PAGE_BYTES>();
        let count = self.pages.min(pages.len());
        &mut pages[..count]
    }

    fn step(&mut self, shared: &Shared) {
        if self.bytes.is_empty() {
            // Zeros that the kernel provides page by page, when they are written.
            self.bytes = vec![0; (self.pages + 1) * PAGE_BYTES];
            self.round += 1;
        }
        let (from, is_written) = (self.next, self.is_written);
        let (seed, round) = (self.seed, self.round);
        for (number, page) in self.area().iter_mut().enumerate().skip(from).take(STEP_PAGES) {
            let key = page_key(seed, number as u64, round);
            if !is_written {
                fill_words(key, page);
                std::hint::black_box(page);
            } else if let Some(offset) = wrong_word(key, std::hint::black_box(page)) {
                shared.fail(&format!("area=fresh page={number} offset={offset} round={round}"));
            }
        }
        self.next += STEP_PAGES;
        if self.next >= self.pages {
            self.next = 0;
            self.is_written = !self.is_written;
            if !self.is_written {
                self.bytes = Vec::new();
            }
        }
    }

    fn free(&mut self) {
        (self.bytes, self.next, self.is_written) = (Vec::new(), 0, false);
    }
}

struct Worker {
    hot: Hot,
    used: Used,
    fresh: Fresh,
    /// Of both: pages to read before it is fresh memory's turn again.
    reads_left: usize,
    shared: Arc<Shared>,
}

impl Worker {
    fn step_by_turns(&mut self, shared: &Shared) {
        if self.reads_left > 0 {
            self.reads_left = self.reads_left.saturating_sub(STEP_PAGES);
            return self.used.step(shared);
        }
        self.fresh.step(shared);
        if self.fresh.bytes.is_empty() {
            self.reads_left = self.used.pages.len();
        }
    }

    fn check(&self) {
        (0..self.used.pages.len()).for_each(|number| self.used.verify(number, &self.shared));
        (0..self.hot.pages.len()).for_each(|number| self.hot.verify(number, &self.shared));
        self.shared.checks.fetch_add(1, Ordering::Relaxed);
    }

    fn run(&mut self) -> ! {
        let shared = Arc::clone(&self.shared);
        loop {
            // Looked at before what is to be spoilt: a check finds all that was asked for before it.
            let wanted = shared.checks_wanted.load(Ordering::Acquire);
            let spoilt = shared.corrupt.swap(NONE, Ordering::Relaxed);
            if let Some(page) = self.used.pages.get_mut(spoilt as usize) {
                page.0[PAGE_BYTES - 1] ^= 0x40;
            }
            if wanted > shared.checks.load(Ordering::Relaxed) {
                self.check();
                continue;
            }
            let phase = shared.phase();
            if phase != Phase::Fresh && phase != Phase::Both {
                self.fresh.free();
                self.reads_left = 0;
            }
            match phase {
                Phase::Idle => {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                }
                Phase::Hot => self.hot.step(&shared),
                Phase::Fresh => self.fresh.step(&shared),
                Phase::Used => self.used.step(&shared),
                Phase::Both => self.step_by_turns(&shared),
            }
            shared.pages.fetch_add(STEP_PAGES as u64, Ordering::Relaxed);
        }
    }
}

/// Writes a line at intervals while there is work.
fn tell_rates(shared: &Shared, interval: Duration) -> ! {
    let mut last = shared.progress();
    loop {
        std::thread::sleep(interval);
        let now = shared.progress();
        let seconds = now.1.saturating_sub(last.1) as f64 / 1e6;
        if shared.phase() != Phase::Idle && seconds > 0.0 {
            let per_s = now.0.saturating_sub(last.0) as f64 / seconds;
            let mib_per_s = per_s / PAGES_PER_MIB as f64;
            let report = shared.report();
            tell(&format!("{report} mib_per_s={mib_per_s:.1} operations_per_s={per_s:.0}"));
        }
        last = now;
    }
}

/// Memory of each phase, in pages.
struct Sizes {
    hot: u64,
    used: u64,
    fresh: u64,
}

impl Sizes {
    /// The phase of this name, if it has memory.
    fn phase(&self, name: &str) -> Result<Phase> {
        let found = Phase::ALL.into_iter().find(|phase| phase.label() == name);
        let Some(phase) = found else {
            bail!("Unknown phase {name:?}; there are idle, hot, fresh, used, both")
        };
        let (pages, option) = match phase {
            Phase::Idle => return Ok(phase),
            Phase::Hot => (self.hot, "hot_mib"),
            Phase::Fresh => (self.fresh, "fresh_mib"),
            Phase::Used => (self.used, "fill_mib"),
            Phase::Both => (self.used.min(self.fresh), "fill_mib and fresh_mib"),
        };
        ensure!(pages > 0, "Phase {name} needs memory: give {option}");
        Ok(phase)
    }
}

fn answer(shared: &Shared, sizes: &Sizes, words: &[&str]) -> Result<String> {
    match words {
        ["report"] => {}
        ["phase", name] => {
            let phase = sizes.phase(name)?;
            shared.phase.store(phase as u8, Ordering::Relaxed);
        }
        ["corrupt", page] => {
            let page: u64 = page.parse()?;
            ensure!(page < sizes.used, "No page {page} was filled");
            shared.corrupt.store(page, Ordering::Relaxed);
        }
        ["check"] => drop(shared.checks_wanted.fetch_add(1, Ordering::Release)),
        _ => bail!("Unknown command; there are report, phase NAME, check, corrupt PAGE"),
    }
    Ok(shared.report())
}

/// Runs until stdin ends.
pub(crate) fn run(mut options: Options) -> Result<()> {
    let mut area = |key: &str| Ok::<_, anyhow::Error>(options.number(key, 0)? * PAGES_PER_MIB);
    let sizes = Sizes { used: area("fill_mib")?, hot: area("hot_mib")?, fresh: area("fresh_mib")? };
    let content = Content::parse(&options.word("content", "random"))?;
    let order = options.word("order", "random");
    let first = options.word("phase", if sizes.hot > 0 { "hot" } else { "idle" });
    let report_ms = options.number("report_ms", 5000)?;
    let seed = options.number("seed", 1)?;
    options.finish()?;
    ensure!(["random", "sequential"].contains(&order.as_str()), "Unknown order {order:?}");
    let walk = |number: u64| Walk {
        rng: XorShift::new(seed ^ number),
        is_random: order == "random",
        next: 0,
    };
    let shared = Arc::new(Shared {
        phase: AtomicU8::new(sizes.phase(&first)? as u8),
        pages: AtomicU64::new(0),
        checks_wanted: AtomicU64::new(0),
        checks: AtomicU64::new(0),
        corrupt: AtomicU64::new(NONE),
        failures: AtomicU64::new(0),
        started_us: monotonic_us(),
    });
    let generations = vec![0; sizes.hot as usize];
    let mut worker = Worker {
        hot: Hot { pages: pages(sizes.hot), generations, walk: walk(1), seed: seed ^ 1 },
        used: Used { pages: pages(sizes.used), content, walk: walk(2), seed: seed ^ 2 },
        fresh: Fresh {
            bytes: Vec::new(),
            pages: sizes.fresh as usize,
            next: 0,
            is_written: false,
            seed: seed ^ 3,
            round: 0,
        },
        reads_left: 0,
        shared: Arc::clone(&shared),
    };
    worker.used.fill();
    for (number, page) in (0..).zip(&mut worker.hot.pages) {
        fill_words(page_key(worker.hot.seed, number, 0), &mut page.0);
    }
    println!("ready {}", shared.report());
    std::thread::spawn(move || worker.run());
    if report_ms > 0 {
        let shared = Arc::clone(&shared);
        std::thread::spawn(move || tell_rates(&shared, Duration::from_millis(report_ms)));
    }
    shell::serve(|words| answer(&shared, &sizes, words))
}
