//! What a migration will take, from two looks at a sample of the pages that the guest uses, before anything is sent.
//!
//! What the sample says is packed by the migration's own codecs, and the rounds of pre-copy are gone through with the
//! migration's own decisions ([`crate::convergence`], [`crate::mode`]):
//!
//! ```text
//!   two looks ──► Sample ──► Load ──► round, decide ──► Forecast
//!                                      ▲         │
//!                                      └─ again ─┘
//! ```
//!
//! Different pages that are written grow with the time as far as it was looked at, and half as fast after that
//! ([`crate::writes`]); there are never more than the guest uses.
//!
//! Invariant: a forecast ends, for every load and link, and has no figure that is not finite.

use std::time::Duration;

use serde::Serialize;

use crate::batch::RUN_BYTES;
use crate::codec::{Codec, CodecError, Packer, packed_bytes_max};
use crate::convergence::{Config, Convergence, Decision, Observation};
use crate::delta::{self, LINE_BYTES, LINES_CHANGED_MAX, Page};
use crate::mode::{Measured, Mode, choose_mode};
use crate::writes::{Writes, Written, expected_pages};

/// Content that is packed together.
const BATCH_BYTES: usize = 64 * 1024;

/// What a round takes beside its bytes, in seconds: a scan, and the way there and back.
const ROUND_S: f64 = 0.003;

/// After so many rounds the guest goes ahead of what is left.
const ROUNDS_MAX: u32 = 200;

/// What two looks at the same pages showed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// Pages that were looked at.
    pub pages: usize,
    /// Bytes of them, packed; zeros take none.
    pub packed_bytes: usize,
    /// Pages whose content was another one at the second look.
    pub written_pages: usize,
    /// Bytes of their changes, packed.
    pub changed_bytes: usize,
    /// Time between the looks.
    pub interval: Duration,
}

impl Sample {
    /// Compares two looks at the same pages, `interval` apart.
    ///
    /// # Errors
    /// [`CodecError::Pack`]: out of memory.
    pub fn compare(
        first: &[Page],
        second: &[Page],
        interval: Duration,
    ) -> Result<Self, CodecError> {
        let (mut contents, mut changes) = (Packed::default(), Packed::default());
        let mut written_pages = 0;
        for (old, new) in first.iter().zip(second) {
            if new.iter().any(|byte| *byte != 0) {
                contents.add(new)?;
            }
            let mask = changed_lines(old, new);
            if mask == 0 {
                continue;
            }
            written_pages += 1;
            if mask.count_ones() > LINES_CHANGED_MAX {
                changes.add(new)?;
            } else {
                let mut delta = vec![0; delta::delta_bytes(mask)];
                delta::encode(new, mask, &mut delta);
                changes.add(&delta)?;
            }
        }
        Ok(Self {
            pages: first.len().min(second.len()),
            packed_bytes: contents.end()?,
            written_pages,
            changed_bytes: changes.end()?,
            interval,
        })
    }

    /// The load of a guest that uses so many pages, if the sample is of these. Nothing is known from a sample without pages
    /// or time.
    pub fn load(&self, used_pages: f64) -> Option<Load> {
        if self.pages == 0 || self.interval.is_zero() {
            return None;
        }
        let used_pages = used_pages.max(0.0);
        Some(Load {
            first_bytes: used_pages * self.packed_bytes as f64 / self.pages as f64,
            pages: used_pages,
            written: Written {
                pages: used_pages * self.written_pages as f64 / self.pages as f64,
                seconds: self.interval.as_secs_f64(),
            },
            // They lie alone: each is told by a run of its own.
            bytes_a_written_page: match self.written_pages {
                0 => 0.0,
                pages => self.changed_bytes as f64 / pages as f64 + RUN_BYTES as f64,
            },
        })
    }
}

/// The lines that differ, as a mask.
fn changed_lines(old: &Page, new: &Page) -> u64 {
    let lines = old.chunks_exact(LINE_BYTES).zip(new.chunks_exact(LINE_BYTES));
    lines.enumerate().fold(0, |mask, (line, (old, new))| mask | u64::from(old != new) << line)
}

/// Counts what contents take once they are packed, a batch at a time.
#[derive(Default)]
struct Packed {
    packer: Packer,
    batch: Vec<u8>,
    bytes: usize,
}

impl Packed {
    fn add(&mut self, content: &[u8]) -> Result<(), CodecError> {
        self.batch.extend_from_slice(content);
        if self.batch.len() >= BATCH_BYTES { self.pack() } else { Ok(()) }
    }

    fn pack(&mut self) -> Result<(), CodecError> {
        let mut out = vec![0; packed_bytes_max(self.batch.len())];
        let packed = self.packer.pack(Codec::Zstd, &self.batch, &mut out)?;
        self.bytes += packed.min(self.batch.len());
        self.batch.clear();
        Ok(())
    }

    fn end(mut self) -> Result<usize, CodecError> {
        if !self.batch.is_empty() {
            self.pack()?;
        }
        Ok(self.bytes)
    }
}

/// What a guest gives a migration to do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Load {
    /// Bytes on the wire of all that has to travel once.
    pub first_bytes: f64,
    /// Pages that the guest uses: never more are written.
    pub pages: f64,
    /// Different pages that it writes within a time.
    pub written: Written,
    /// Bytes on the wire of a page that was written again.
    pub bytes_a_written_page: f64,
}

impl Load {
    /// Different pages that are written within `seconds`.
    fn written_pages(&self, seconds: f64) -> f64 {
        let Written { pages, seconds: seen_s } = self.written;
        expected_pages(pages / seen_s, seen_s, seconds).min(self.pages)
    }

    fn is_possible(&self) -> bool {
        let figures = [self.first_bytes, self.pages, self.written.pages, self.bytes_a_written_page];
        let are_possible = figures.iter().all(|figure| figure.is_finite() && *figure >= 0.0);
        are_possible && self.written.seconds.is_finite() && self.written.seconds > 0.0
    }
}

/// What a migration will take.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Forecast {
    /// How it ends.
    pub mode: Mode,
    /// Rounds before the guest stops.
    pub rounds: u32,
    /// Bytes on the wire.
    pub wire_bytes: f64,
    /// From the first page to the last, in seconds.
    pub total_s: f64,
    /// The guest stands still, in seconds.
    pub downtime_s: f64,
}

/// Goes through a migration of such a guest over a link that carries `goodput_bytes_per_s`. `overhead` is what stopping the
/// guest takes regardless of memory. None if a figure of the load or the link cannot be.
pub fn forecast(
    load: &Load,
    goodput_bytes_per_s: f64,
    overhead: Duration,
    config: Config,
) -> Option<Forecast> {
    let goodput = goodput_bytes_per_s;
    if !load.is_possible() || !goodput.is_finite() || goodput < 1.0 {
        return None;
    }
    let mut convergence = Convergence::new(config);
    let (mut sent_bytes, mut now_s, mut left_bytes) = (0.0, 0.0, load.first_bytes);
    for rounds in 1.. {
        let round_s = left_bytes / goodput + ROUND_S;
        (sent_bytes, now_s) = (sent_bytes + left_bytes, now_s + round_s);
        let left_pages = load.written_pages(round_s);
        left_bytes = left_pages * load.bytes_a_written_page;
        let round = Round { rounds, left_pages, seconds: round_s, now_s };
        let Some(mode) = round.ends_in(load, goodput, overhead, config, &mut convergence) else {
            continue;
        };
        let last_s = left_bytes / goodput;
        let memory_s = if mode == Mode::PreCopy { last_s } else { 0.0 };
        return Some(Forecast {
            mode,
            rounds,
            wire_bytes: sent_bytes + left_bytes,
            total_s: now_s + overhead.as_secs_f64() + last_s,
            downtime_s: overhead.as_secs_f64() + memory_s,
        });
    }
    None
}

/// The end of a round.
struct Round {
    rounds: u32,
    left_pages: f64,
    seconds: f64,
    now_s: f64,
}

impl Round {
    /// The mode in which the migration ends after this round; None if another round follows.
    fn ends_in(
        &self,
        load: &Load,
        goodput: f64,
        overhead: Duration,
        config: Config,
        convergence: &mut Convergence,
    ) -> Option<Mode> {
        let seen = Observation {
            dirty_pages: self.left_pages as u64,
            outstanding_bytes: 0,
            goodput_bytes_per_s: Some(goodput),
            wire_bytes_per_page: load.bytes_a_written_page,
            dirtied_pages: self.left_pages as u64,
            interval: Duration::try_from_secs_f64(self.seconds).unwrap_or(Duration::MAX),
            overhead,
        };
        let now = Duration::try_from_secs_f64(self.now_s).unwrap_or(Duration::MAX);
        let decision = convergence.decide(&seen, now);
        if decision == Decision::Stop {
            return Some(Mode::PreCopy);
        }
        let stalled = self.rounds >= ROUNDS_MAX || matches!(decision, Decision::GiveUp(_));
        let round = Written { pages: self.left_pages, seconds: self.seconds };
        let measured = Measured {
            rounds: self.rounds,
            left_pages: seen.dirty_pages,
            outstanding_bytes: 0,
            writes: Some(Writes { scan: load.written, round: Some(round) }),
            wire_bytes_per_page: load.bytes_a_written_page,
            goodput_bytes_per_s: Some(goodput),
            overhead,
            max_downtime: config.max_downtime,
            prediction: convergence.prediction(),
            stalled,
        };
        let mode = choose_mode(&measured).mode;
        (stalled || mode != Mode::PreCopy).then_some(mode)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::layout::PAGE_BYTES;

    const CONFIG: Config =
        Config { max_downtime: Duration::from_millis(150), patience: Duration::from_secs(30) };

    const OVERHEAD: Duration = Duration::from_millis(40);

    /// 1 Gbit/s.
    const LINK: f64 = 119e6;

    fn load(first_mib: f64, written_mib_per_s: f64, share_again: f64) -> Load {
        let pages = |mib: f64| mib * 1_048_576.0 / PAGE_BYTES as f64;
        Load {
            first_bytes: first_mib * 1_048_576.0,
            pages: pages(1024.0),
            written: Written { pages: pages(written_mib_per_s), seconds: 1.0 },
            bytes_a_written_page: share_again * PAGE_BYTES as f64,
        }
    }

    fn forecast_of(load: &Load, link: f64) -> Forecast {
        forecast(load, link, OVERHEAD, CONFIG).unwrap()
    }

    #[test]
    fn a_guest_at_rest_takes_its_memory_once() {
        let seen = forecast_of(&load(400.0, 0.0, 0.0), LINK);
        assert_eq!((seen.mode, seen.rounds), (Mode::PreCopy, 1));
        assert!((seen.wire_bytes - 400.0 * 1_048_576.0).abs() < 1.0, "{seen:?}");
        assert!((3.5..3.7).contains(&seen.total_s), "{seen:?}");
        assert!((seen.downtime_s - 0.04).abs() < 1e-9, "{seen:?}");
    }

    #[test]
    fn what_is_written_again_travels_again() {
        let seen = forecast_of(&load(400.0, 40.0, 0.5), LINK);
        assert_eq!(seen.mode, Mode::PreCopy);
        // 3.5 s, in which 40 + 0.5 * 2.5 * 40 MiB are written, half of which travel, and a little more.
        let again_mib = seen.wire_bytes / 1_048_576.0 - 400.0;
        assert!((50.0..57.0).contains(&again_mib), "{again_mib}");
        assert!(seen.downtime_s < 0.15, "{seen:?}");
    }

    #[test]
    fn a_guest_that_writes_faster_than_the_link_goes_ahead_of_its_memory() {
        let seen = forecast_of(&load(400.0, 400.0, 1.0), LINK);
        assert_eq!(seen.mode, Mode::Hybrid);
        assert!((seen.downtime_s - 0.04).abs() < 1e-9, "{seen:?}");
    }

    #[test]
    fn figures_that_cannot_be_give_no_forecast() {
        for bad in [f64::NAN, f64::INFINITY, -1.0] {
            let broken = Load { first_bytes: bad, ..load(1.0, 1.0, 1.0) };
            assert_eq!(forecast(&broken, LINK, OVERHEAD, CONFIG), None);
            assert_eq!(forecast(&load(1.0, 1.0, 1.0), bad, OVERHEAD, CONFIG), None);
        }
        let timeless = Written { pages: 1.0, seconds: 0.0 };
        let broken = Load { written: timeless, ..load(1.0, 1.0, 1.0) };
        assert_eq!(forecast(&broken, LINK, OVERHEAD, CONFIG), None);
    }

    /// A page of which every word is another one, and which packs badly.
    fn noise(seed: u64) -> Page {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut page = [0; PAGE_BYTES];
        for word in page.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        page
    }

    #[test]
    fn a_sample_is_scaled_to_the_guest() {
        let first: Vec<Page> = (0..100)
            .map(|page| match page {
                0..50 => [0; PAGE_BYTES],
                _ => noise(page),
            })
            .collect();
        let mut second = first.clone();
        for (page, seed) in second[60..80].iter_mut().zip(1000..) {
            page[640..704].copy_from_slice(&noise(seed)[..64]);
        }
        let sample = Sample::compare(&first, &second, Duration::from_secs(2)).unwrap();
        assert_eq!((sample.pages, sample.written_pages), (100, 20));
        let load = sample.load(100_000.0).unwrap();
        assert_eq!(load.written, Written { pages: 20_000.0, seconds: 2.0 });
        // Half of the pages hold noise.
        let whole = 50_000.0 * PAGE_BYTES as f64;
        assert!((0.97..1.01).contains(&(load.first_bytes / whole)), "{load:?}");
        // A line of 64 bytes; masks are equal.
        let line = load.bytes_a_written_page - RUN_BYTES as f64;
        assert!((64.0..72.0).contains(&line), "{load:?}");
        let nothing = Sample { pages: 0, ..sample };
        assert_eq!(nothing.load(1.0), None);
        let at_once = Sample { interval: Duration::ZERO, ..sample };
        assert_eq!(at_once.load(1.0), None);
    }

    proptest! {
        #[test]
        fn a_forecast_ends_and_carries_all(
            first_mib in 0.0..1e6_f64,
            written_mib_per_s in 0.0..1e6_f64,
            share_again in 0.0..1.2_f64,
            link in 1.0..1e11_f64,
        ) {
            let load = load(first_mib, written_mib_per_s, share_again);
            let seen = forecast_of(&load, link);
            prop_assert!(seen.wire_bytes >= load.first_bytes);
            prop_assert!(seen.total_s >= seen.wire_bytes / link);
            prop_assert!(seen.downtime_s >= OVERHEAD.as_secs_f64() && seen.downtime_s <= seen.total_s);
            prop_assert!(seen.total_s.is_finite());
            prop_assert!(seen.rounds <= ROUNDS_MAX);
        }
    }
}
