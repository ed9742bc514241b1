//! Dirties memory: a filled area, of which a hot part is written at a rate.
//!
//! Options: `fill` and `hot` (MiB), `rate` (pages a second, 0 = unpaced), `bytes` (written in each
//! page), `content` (`text`, `random` or `mixed`), `skew` (1: all hot pages alike; K: a share `x` of them
//! gets `x^(1/K)` of the writes), `seed`. Commands: `stop`, `start`, `rate N`, `report`.
//!
//! Invariants: after `stop` has been answered nothing is written any more; the rate is never
//! exceeded (guest_programs::pacer).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use guest_programs::options::Options;
use guest_programs::pacer::Pacer;
use guest_programs::pattern::{fill_random, fill_text};
use guest_programs::rng::XorShift;
use guest_programs::{PAGE_BYTES, pattern};

use crate::console::monotonic_us;
use crate::content::Content;
use crate::memory::{PAGES_PER_MIB, Page, pages};
use crate::shell;

/// More would write hardly anything but one page.
const SKEW_MAX: u64 = 16;

/// A prime beyond any number of hot pages' factors: multiples of it, modulo that number, are all different.
const SCATTER: u64 = 4_294_967_291;

/// What the command line thread and the writing thread share.
struct Shared {
    running: bool,
    pacer: Pacer,
    pages_written: u64,
    started_us: u64,
}

struct Writer {
    memory: Vec<Page>,
    hot_pages: u64,
    skew: i32,
    bytes: usize,
    content: Content,
    rng: XorShift,
    text: Vec<u8>,
}

impl Writer {
    fn fill(&mut self) {
        let last = (self.text.len() - PAGE_BYTES) as u64;
        for (number, page) in self.memory.iter_mut().enumerate() {
            if self.content.is_text(number as u64) {
                let at = self.rng.below(last) as usize;
                page.0.copy_from_slice(&self.text[at..at + PAGE_BYTES]);
                page.0[..8].copy_from_slice(&(number as u64).to_le_bytes());
            } else {
                let seed = self.rng.next_u64();
                pattern::fill_block(seed, number as u64, &mut page.0);
            }
        }
        std::hint::black_box(self.memory.as_mut_slice());
    }

    /// A hot page; those that are written most lie apart from one another.
    fn pick(&mut self) -> u64 {
        let number = self.rng.below(self.hot_pages);
        if self.skew == 1 {
            return number;
        }
        let rank = (number as f64 / self.hot_pages as f64).powi(self.skew) * self.hot_pages as f64;
        (rank as u64).wrapping_mul(SCATTER) % self.hot_pages
    }

    fn write_one(&mut self) {
        let number = self.pick();
        let slots = ((PAGE_BYTES - self.bytes) / 8 + 1) as u64;
        let at = self.rng.below(slots) as usize * 8;
        let at = at.min(PAGE_BYTES - self.bytes);
        let seed = self.rng.next_u64();
        let Some(page) = self.memory.get_mut(number as usize) else { return };
        let target = &mut page.0[at..at + self.bytes];
        if self.content.is_text(number) {
            fill_text(seed, target);
        } else {
            fill_random(seed, target);
        }
        std::hint::black_box(page);
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Most pages written before the state is looked at again.
const STEP_PAGES: u64 = 64;

fn write_for_ever(writer: &mut Writer, shared: &Mutex<Shared>) -> ! {
    loop {
        // The lock is held while writing: that makes the answer to `stop` true.
        let mut state = lock(shared);
        let granted = if state.running { state.pacer.grant(monotonic_us(), STEP_PAGES) } else { 0 };
        for _ in 0..granted {
            writer.write_one();
        }
        state.pages_written += granted;
        drop(state);
        if granted < STEP_PAGES {
            std::thread::sleep(Duration::from_millis(1));
        } else {
            std::thread::yield_now();
        }
    }
}

fn answer(shared: &Mutex<Shared>, words: &[&str]) -> Result<String> {
    let mut state = lock(shared);
    match words {
        ["stop"] => state.running = false,
        ["start"] => {
            state.pacer.restart(monotonic_us());
            state.running = true;
        }
        ["rate", number] => {
            let rate = number.parse()?;
            state.pacer.set_rate(rate);
        }
        ["report"] => {}
        _ => bail!("Unknown command; there are stop, start, rate N, report"),
    }
    let elapsed_us = monotonic_us().saturating_sub(state.started_us);
    let running = if state.running { "running" } else { "stopped" };
    Ok(format!("WRITER {running} pages={} elapsed_us={elapsed_us}", state.pages_written))
}

/// Runs until stdin ends.
pub(crate) fn run(mut options: Options) -> Result<()> {
    let fill_mib = options.number("fill", 64)?;
    let hot_mib = options.number("hot", fill_mib.min(16))?;
    let rate = options.number("rate", 1000)?;
    let bytes = options.number("bytes", 64)?;
    let seed = options.number("seed", 1)?;
    let skew = options.number("skew", 1)?;
    let content = Content::parse(&options.word("content", "text"))?;
    options.finish()?;
    ensure!(fill_mib >= 1 && hot_mib >= 1, "fill and hot are at least 1 MiB");
    ensure!(hot_mib <= fill_mib, "hot ({hot_mib} MiB) lies within fill ({fill_mib} MiB)");
    ensure!((1..=PAGE_BYTES as u64).contains(&bytes), "bytes is 1 to {PAGE_BYTES}");
    ensure!((1..=SKEW_MAX).contains(&skew), "skew is 1 to {SKEW_MAX}");
    let mut text = vec![0; 1 << 20];
    fill_text(seed, &mut text);
    let mut writer = Writer {
        memory: pages(fill_mib * PAGES_PER_MIB),
        hot_pages: hot_mib * PAGES_PER_MIB,
        skew: i32::try_from(skew)?,
        bytes: bytes as usize,
        content,
        rng: XorShift::new(seed),
        text,
    };
    writer.fill();
    let now_us = monotonic_us();
    let shared = Arc::new(Mutex::new(Shared {
        running: true,
        pacer: Pacer::new(rate, now_us),
        pages_written: 0,
        started_us: now_us,
    }));
    println!("ready fill={fill_mib} hot={hot_mib} rate={rate} bytes={bytes} seed={seed}");
    let own = Arc::clone(&shared);
    std::thread::spawn(move || write_for_ever(&mut writer, &own));
    shell::serve(|words| answer(&shared, words))
}
