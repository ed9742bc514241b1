//! Predictions of downtime and the decision when to stop the guest.
//!
//! The downtime of stopping now is the time to carry what is left plus what stopping costs
//! regardless of memory (stop, device state, two round trips, the journal):
//!
//! ```text
//! downtime(now) = overhead + (bytes in flight + dirty pages * bytes a page) / goodput
//! ```
//!
//! Bytes a page are what the pages of the last round took, deltas and compression included.
//! One more round takes about that long without the overhead, during which the guest dirties pages
//! at the rate just seen; that gives `downtime(next)`. The rule is to stop at a local minimum under
//! the target: stop when the target holds and another round would not improve much. Where no such
//! point comes within [`Config::patience`], the migration is given up with the numbers that explain
//! it, and the guest runs on at the source.
//!
//! Predictions are kept in the report next to what happened.

use std::collections::VecDeque;
use std::time::Duration;

use serde::Serialize;

use crate::layout::PAGE_BYTES;
use crate::writes::expected_pages;

/// Another round must improve the predicted downtime to below this share to be worth it.
const WORTHWHILE: f64 = 0.9;

/// Time under the target after which the guest is stopped even if waiting still improves a little.
const POLISH: Duration = Duration::from_millis(500);

/// Window over which goodput is averaged.
const GOODPUT_WINDOW: Duration = Duration::from_millis(500);

/// What the user allows.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// Longest downtime that is acceptable.
    pub max_downtime: Duration,
    /// Time without a better prediction after which the migration is given up.
    pub patience: Duration,
}

/// Measures the rate at which the destination applies bytes, while there are bytes to apply.
#[derive(Debug, Default)]
pub struct Goodput {
    samples: VecDeque<(Duration, u64)>,
    last: Option<(Duration, u64)>,
    was_busy: bool,
    link_bytes_per_s: Option<f64>,
}

/// Time after which a change of the link's rate is mostly believed. What the destination applies
/// between two of its messages varies widely.
const LINK_MEMORY: Duration = Duration::from_millis(100);

/// Growth a second of what is believed of the link while it is not asked for all it has.
const LINK_GROWTH: f64 = 0.1;

impl Goodput {
    /// Notes that the destination had applied `applied_bytes` in total at `now`, with
    /// `outstanding_bytes` still under way. Intervals that began idle are not counted, unless more
    /// was `held_back` in them: on a fast link all that may be under way is applied before the
    /// destination tells so.
    pub fn note(
        &mut self,
        now: Duration,
        applied_bytes: u64,
        outstanding_bytes: u64,
        held_back: bool,
    ) {
        if let Some((at, bytes)) = self.last
            && (self.was_busy || held_back)
            && now > at
        {
            self.samples.push_back((now - at, applied_bytes.saturating_sub(bytes)));
            let mut total: Duration = self.samples.iter().map(|(span, _)| *span).sum();
            while self.samples.len() > 1 && total > GOODPUT_WINDOW {
                total -= self.samples.pop_front().map_or(Duration::ZERO, |(span, _)| span);
            }
            self.note_link(now - at, applied_bytes.saturating_sub(bytes), held_back);
        }
        self.last = Some((now, applied_bytes));
        self.was_busy = outstanding_bytes > 0;
    }

    /// While bytes wait for the link, it carries what it can. Otherwise it may carry more than was
    /// seen, and is believed to, bit by bit: a wrong belief corrects itself.
    fn note_link(&mut self, span: Duration, bytes: u64, held_back: bool) {
        let Some(average) = self.bytes_per_s() else { return };
        let span_s = span.as_secs_f64();
        self.link_bytes_per_s = Some(match self.link_bytes_per_s {
            None => average,
            Some(rate) if held_back => {
                let weight = span_s / (span_s + LINK_MEMORY.as_secs_f64());
                rate + (bytes as f64 / span_s - rate) * weight
            }
            Some(rate) => (rate * (1.0 + LINK_GROWTH * span_s)).max(average),
        });
    }

    /// Bytes a second that the link could carry, which is more than [`Self::bytes_per_s`] if there is
    /// not enough to send.
    pub fn link_bytes_per_s(&self) -> Option<f64> {
        self.link_bytes_per_s
    }

    /// Bytes a second, once at least 20 ms of busy time were seen.
    pub fn bytes_per_s(&self) -> Option<f64> {
        let (span, bytes) = self
            .samples
            .iter()
            .fold((Duration::ZERO, 0u64), |(span, bytes), (s, b)| (span + *s, bytes + b));
        (span >= Duration::from_millis(20) && bytes > 0).then(|| bytes as f64 / span.as_secs_f64())
    }
}

/// What is known after a scan.
#[derive(Debug, Clone, Copy)]
pub struct Observation {
    /// Pages waiting to be sent.
    pub dirty_pages: u64,
    /// Bytes handed to the lanes and not yet applied at the destination.
    pub outstanding_bytes: u64,
    /// Measured goodput; nothing if too little was sent to tell.
    pub goodput_bytes_per_s: Option<f64>,
    /// Bytes that a page takes on the wire.
    pub wire_bytes_per_page: f64,
    /// Pages that became dirty within `interval`.
    pub dirtied_pages: u64,
    /// Time since the previous scan.
    pub interval: Duration,
    /// What stopping costs regardless of memory.
    pub overhead: Duration,
}

/// Predicted downtimes in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Prediction {
    /// If the guest were stopped now.
    pub now_ms: f64,
    /// If it were stopped after one more round.
    pub next_ms: f64,
    /// The best seen so far.
    pub best_ms: f64,
}

/// What to do after a scan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Decision {
    /// Send another round.
    Continue,
    /// Stop the guest.
    Stop,
    /// Waiting longer will not help.
    GiveUp(Stall),
}

/// Why no round will reach the target, in the terms the user can change.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stall {
    /// Bytes a second that the guest dirties.
    pub dirty_bytes_per_s: f64,
    /// Bytes a second that the link carries.
    pub goodput_bytes_per_s: f64,
    /// Lowest downtime predicted so far, in milliseconds.
    pub best_ms: f64,
}

/// Decides after each scan.
#[derive(Debug)]
pub struct Convergence {
    config: Config,
    best: Option<(f64, Duration)>,
    /// Since when the prediction has been under the target.
    under_target_since: Option<Duration>,
    last: Option<Prediction>,
}

impl Convergence {
    /// A fresh decision maker.
    pub fn new(config: Config) -> Self {
        Self { config, best: None, under_target_since: None, last: None }
    }

    /// The latest prediction.
    pub fn prediction(&self) -> Option<Prediction> {
        self.last
    }

    /// How long the bytes under way alone will take: a scan before that finds little to do.
    pub fn drain(seen: &Observation) -> Duration {
        let seconds = seen.goodput_bytes_per_s.filter(|rate| *rate > 0.0);
        let seconds = seconds.map_or(0.0, |rate| seen.outstanding_bytes as f64 / rate);
        Duration::try_from_secs_f64(seconds).unwrap_or_default()
    }

    /// Decides what to do with what a scan at `now` found.
    pub fn decide(&mut self, seen: &Observation, now: Duration) -> Decision {
        let per_page = seen.wire_bytes_per_page;
        let pending = seen.dirty_pages as f64 * per_page + seen.outstanding_bytes as f64;
        let Some(goodput) = seen.goodput_bytes_per_s.filter(|rate| *rate > 0.0) else {
            // Nothing was measured because next to nothing had to be sent.
            let tiny = pending < 256.0 * 1024.0;
            return if tiny { Decision::Stop } else { Decision::Continue };
        };
        let overhead_ms = seen.overhead.as_secs_f64() * 1e3;
        let drain_s = pending / goodput;
        let now_ms = overhead_ms + drain_s * 1e3;
        let interval_s = seen.interval.as_secs_f64().max(1e-3);
        let dirty_per_s = seen.dirtied_pages as f64 / interval_s;
        let next_pages = expected_pages(dirty_per_s, interval_s, drain_s);
        let next_ms = overhead_ms + next_pages * per_page / goodput * 1e3;
        let best_ms = self.note_best(now_ms, now);
        self.last = Some(Prediction { now_ms, next_ms, best_ms });
        let target_ms = self.config.max_downtime.as_secs_f64() * 1e3;
        if now_ms <= target_ms {
            let since = *self.under_target_since.get_or_insert(now);
            let improves = next_ms < now_ms * WORTHWHILE;
            if !improves || now.saturating_sub(since) > POLISH {
                return Decision::Stop;
            }
            return Decision::Continue;
        }
        self.under_target_since = None;
        if self.best.is_some_and(|(_, at)| now.saturating_sub(at) > self.config.patience) {
            return Decision::GiveUp(Stall {
                dirty_bytes_per_s: dirty_per_s * PAGE_BYTES as f64,
                goodput_bytes_per_s: goodput,
                best_ms,
            });
        }
        Decision::Continue
    }

    /// Remembers the best prediction; an improvement below 5 % does not count as progress.
    fn note_best(&mut self, now_ms: f64, now: Duration) -> f64 {
        match self.best {
            Some((best, _)) if now_ms > best * 0.95 => best.min(now_ms),
            _ => {
                self.best = Some((now_ms, now));
                now_ms
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIRE_BYTES_PER_PAGE: f64 = PAGE_BYTES as f64 + 16.0;

    const CONFIG: Config =
        Config { max_downtime: Duration::from_millis(100), patience: Duration::from_secs(20) };

    /// A guest that writes `rate` random pages a second within `hot` pages, over a link of
    /// `goodput`; returns the decision that ended it, the downtime it would have, and when.
    fn simulate(rate: f64, hot: f64, goodput: f64, first_pages: f64) -> (Decision, f64, f64) {
        let mut convergence = Convergence::new(CONFIG);
        let overhead = Duration::from_millis(20);
        let (mut now, mut dirty) = (0.0, first_pages);
        loop {
            let round_s = dirty * WIRE_BYTES_PER_PAGE / goodput + 0.003;
            now += round_s;
            dirty = hot * (1.0 - (-rate * round_s / hot).exp());
            let seen = Observation {
                dirty_pages: dirty as u64,
                outstanding_bytes: 0,
                goodput_bytes_per_s: Some(goodput),
                wire_bytes_per_page: WIRE_BYTES_PER_PAGE,
                dirtied_pages: dirty as u64,
                interval: Duration::from_secs_f64(round_s),
                overhead,
            };
            let decision = convergence.decide(&seen, Duration::from_secs_f64(now));
            if decision != Decision::Continue {
                return (decision, 20.0 + dirty * WIRE_BYTES_PER_PAGE / goodput * 1e3, now);
            }
            assert!(now < 1000.0, "no decision");
        }
    }

    #[test]
    fn an_idle_guest_stops_at_once() {
        let (decision, downtime_ms, now) = simulate(100.0, 1000.0, 119e6, 25_000.0);
        assert_eq!(decision, Decision::Stop);
        assert!(downtime_ms < 25.0 && now < 2.0, "{downtime_ms} ms after {now} s");
    }

    #[test]
    fn a_busy_writer_converges_to_its_floor() {
        // 20,000 pages a second over 200 MiB at 1 Gb/s.
        let (decision, downtime_ms, _) = simulate(20_000.0, 51_200.0, 119e6, 281_600.0);
        assert_eq!(decision, Decision::Stop);
        assert!(downtime_ms < 60.0, "{downtime_ms} ms");
    }

    #[test]
    fn a_hopeless_writer_is_given_up_with_its_numbers() {
        let (decision, _, now) = simulate(100_000.0, 51_200.0, 12e6, 281_600.0);
        let Decision::GiveUp(stall) = decision else { panic!("{decision:?}") };
        assert!(stall.goodput_bytes_per_s < 13e6 && stall.best_ms > 100.0);
        assert!(now < 400.0);
    }

    #[test]
    fn goodput_counts_busy_time_only() {
        let mut goodput = Goodput::default();
        let at = Duration::from_millis;
        goodput.note(at(0), 0, 1000, false);
        goodput.note(at(100), 100_000, 0, false);
        goodput.note(at(900), 100_000, 1000, false);
        goodput.note(at(1000), 200_000, 0, false);
        let rate = goodput.bytes_per_s().unwrap();
        assert!((rate - 1e6).abs() < 1.0, "{rate}");
        // All was applied whenever the destination told so, but more was waiting to leave.
        goodput.note(at(1100), 400_000, 0, true);
        let rate = goodput.bytes_per_s().unwrap();
        assert!((rate - 4e5 / 0.3).abs() < 1.0, "{rate}");
    }

    #[test]
    fn a_link_that_is_not_asked_for_all_may_carry_more() {
        let mut goodput = Goodput::default();
        let (mut now, mut bytes) = (Duration::ZERO, 0);
        let mut run = |goodput: &mut Goodput, intervals, step, held_back| {
            for _ in 0..intervals {
                now += Duration::from_millis(10);
                bytes += step;
                goodput.note(now, bytes, 1, held_back);
            }
            goodput.link_bytes_per_s().unwrap()
        };
        let rate = run(&mut goodput, 100, 1_000_000, true);
        assert!((rate - 1e8).abs() < 1e6, "{rate}");
        let rate = run(&mut goodput, 100, 100_000, false);
        assert!((1.05e8..1.2e8).contains(&rate), "a tenth more after a second: {rate}");
        let rate = run(&mut goodput, 100, 1_000_000, true);
        assert!((rate - 1e8).abs() < 1e6, "{rate}");
    }
}
