//! Owns memory and verifies every byte of it in rotation, while rewriting random pages.
//!
//! Options: `size` (MiB), `rate` (pages rewritten a second), `verify` (pages verified a second; 0 =
//! unpaced for both), `seed`. Commands: `report`, `stop` (no more rewriting), `start`.
//!
//! Invariants: a page's expected contents follow from (seed, number, generation), and the
//! generations are kept apart from the pages, so that an old version of a page is found as surely
//! as a wrong byte. Beside memory, results of integer and floating-point arithmetic and the order
//! of the clock are verified in every step.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use guest_programs::PAGE_BYTES;
use guest_programs::options::Options;
use guest_programs::pacer::Pacer;
use guest_programs::pattern::{self, compare, fill_page};
use guest_programs::rng::XorShift;

use crate::console::{monotonic_us, tell_failure};
use crate::memory::{PAGES_PER_MIB, Page, pages};
use crate::shell;

/// Failures that are printed; further ones are only counted.
const PRINTED_FAILURES: u64 = 20;
/// Most pages handled before the clock is read again.
const STEP_PAGES: u64 = 64;

struct Checker {
    seed: u64,
    memory: Vec<Page>,
    generations: Vec<u64>,
    next: usize,
    rng: XorShift,
    running: bool,
    rewrite: Pacer,
    verify: Pacer,
    passes: u64,
    verified: u64,
    rewritten: u64,
    failures: u64,
    /// Sum of all generations, kept in one place: lost updates of both a page and its generation
    /// show up here at the end of a pass.
    generation_sum: u64,
    arithmetic: (u64, u64),
    last_us: u64,
}

/// A few thousand dependent operations in integer and vector registers; always the same result.
fn arithmetic(seed: u64) -> (u64, u64) {
    let mut rng = XorShift::new(seed);
    let (mut float, mut whole) = (1.0_f64, 0_u64);
    for _ in 0..500 {
        let word = rng.next_u64();
        whole = whole.rotate_left(9) ^ word.wrapping_mul(31);
        float = float.mul_add(0.5, (word >> 40) as f64).sqrt() + 1.0;
    }
    (whole, float.to_bits())
}

impl Checker {
    fn fail(&mut self, text: &str) {
        self.failures += 1;
        if self.failures <= PRINTED_FAILURES {
            tell_failure(&format!("CHECKER FAIL {text}"));
        }
    }

    fn write(&mut self, number: usize, generation: u64) {
        let (Some(page), Some(known)) =
            (self.memory.get_mut(number), self.generations.get_mut(number))
        else {
            return;
        };
        fill_page(self.seed, number as u64, generation, &mut page.0);
        std::hint::black_box(&mut page.0);
        self.generation_sum = self.generation_sum.wrapping_add(generation).wrapping_sub(*known);
        *known = generation;
    }

    fn rewrite_random(&mut self) {
        let number = self.rng.below(self.memory.len() as u64) as usize;
        let generation = self.generations.get(number).map_or(0, |known| known + 1);
        self.write(number, generation);
        self.rewritten += 1;
    }

    fn verify_next(&mut self) {
        let number = self.next;
        let (Some(page), Some(&generation)) =
            (self.memory.get(number), self.generations.get(number))
        else {
            return self.end_of_pass();
        };
        let mut want = [0; PAGE_BYTES];
        fill_page(self.seed, number as u64, generation, &mut want);
        if let Some(wrong) = compare(&want, std::hint::black_box(&page.0)) {
            let kind = pattern::Kind::of(number as u64);
            let address = page.0.as_ptr() as usize;
            self.fail(&format!(
                "page={number} offset={} want={:02x} got={:02x} bytes={} generation={generation} \
                 kind={kind:?} address={address:#x} pass={}",
                wrong.offset, wrong.want, wrong.got, wrong.bytes, self.passes
            ));
            self.write(number, generation);
        }
        self.next += 1;
        self.verified += 1;
    }

    fn end_of_pass(&mut self) {
        self.next = 0;
        self.passes += 1;
        let sum = self.generations.iter().fold(0_u64, |sum, &one| sum.wrapping_add(one));
        if sum != self.generation_sum {
            self.fail(&format!("generations want={:#x} got={sum:#x}", self.generation_sum));
            self.generation_sum = sum;
        }
    }

    fn verify_registers_and_time(&mut self) {
        let got = arithmetic(std::hint::black_box(self.seed));
        if got != self.arithmetic {
            self.fail(&format!("arithmetic want={:x?} got={got:x?}", self.arithmetic));
        }
        let now_us = monotonic_us();
        if now_us < self.last_us {
            self.fail(&format!("clock want>={} got={now_us}", self.last_us));
        }
        self.last_us = now_us;
    }

    /// One step; true if there was nothing to do.
    fn step(&mut self) -> bool {
        self.verify_registers_and_time();
        let verify = self.verify.grant(self.last_us, STEP_PAGES);
        for _ in 0..verify {
            self.verify_next();
        }
        let rewrite = if self.running { self.rewrite.grant(self.last_us, STEP_PAGES) } else { 0 };
        for _ in 0..rewrite {
            self.rewrite_random();
        }
        verify < STEP_PAGES && rewrite < STEP_PAGES
    }

    fn report(&self) -> String {
        let numbers = format!(
            "passes={} pages={} verified={} rewritten={}",
            self.passes,
            self.memory.len(),
            self.verified,
            self.rewritten
        );
        match self.failures {
            0 => format!("CHECKER OK {numbers}"),
            count => format!("CHECKER FAIL count={count} {numbers}"),
        }
    }
}

fn lock(checker: &Mutex<Checker>) -> MutexGuard<'_, Checker> {
    checker.lock().unwrap_or_else(PoisonError::into_inner)
}

fn answer(checker: &Mutex<Checker>, words: &[&str]) -> Result<String> {
    let mut checker = lock(checker);
    match words {
        ["report"] => {}
        ["stop"] => checker.running = false,
        ["start"] => {
            checker.rewrite.restart(monotonic_us());
            checker.running = true;
        }
        // Proof that a wrong byte is found: tests of the tests use it.
        ["corrupt", page] => {
            let number: usize = page.parse()?;
            let Some(page) = checker.memory.get_mut(number) else { bail!("No page {number}") };
            page.0[PAGE_BYTES - 1] ^= 0x40;
        }
        _ => bail!("Unknown command; there are report, stop, start, corrupt PAGE"),
    }
    Ok(checker.report())
}

/// Runs until stdin ends.
pub(crate) fn run(mut options: Options) -> Result<()> {
    let size_mib = options.number("size", 16)?;
    let rate = options.number("rate", 500)?;
    let verify = options.number("verify", 10_000)?;
    let seed = options.number("seed", 1)?;
    options.finish()?;
    ensure!(size_mib >= 1, "size is at least 1 MiB");
    let now_us = monotonic_us();
    let count = size_mib * PAGES_PER_MIB;
    let mut checker = Checker {
        seed,
        memory: pages(count),
        generations: vec![0; count as usize],
        next: 0,
        rng: XorShift::new(seed),
        running: true,
        rewrite: Pacer::new(rate, now_us),
        verify: Pacer::new(verify, now_us),
        passes: 0,
        verified: 0,
        rewritten: 0,
        failures: 0,
        generation_sum: 0,
        arithmetic: arithmetic(seed),
        last_us: now_us,
    };
    for number in 0..count as usize {
        checker.write(number, number as u64 & 1);
    }
    println!("ready size={size_mib} rate={rate} verify={verify} seed={seed}");
    let checker = Arc::new(Mutex::new(checker));
    let own = Arc::clone(&checker);
    std::thread::spawn(move || {
        loop {
            let idle = lock(&own).step();
            std::thread::sleep(if idle { Duration::from_millis(2) } else { Duration::ZERO });
        }
    });
    shell::serve(|words| answer(&checker, words))
}
