//! Whether pre-copy will end, or the guest goes first and its last pages follow.
//!
//! Pre-copy can be aborted at any time, and neither a fault nor a lost link harms the guest; hybrid
//! ends, whatever the guest writes. So pre-copy is left only when it will not end: of the time that
//! memory may take of the downtime, `T`, the link needs more than `T` to carry what the guest writes
//! within `T`:
//!
//! ```text
//! written(T) * bytes a page > goodput * T          T = allowed downtime - overhead
//! ```
//!
//! The shorter a time, the more different pages are written in proportion to it, so rounds never
//! become as short as `T` where this holds. What is written within `T` is known from below
//! ([`crate::writes`]), and a margin is left for errors of measurement; where that does not suffice,
//! the patience of [`crate::convergence`] decides.
//!
//! | after | what is known | mode |
//! |---|---|---|
//! | – | the host is to be left at once | post-copy |
//! | no pass | – | pre-copy |
//! | a pass | what is left fits, or will | pre-copy |
//! | a pass | it will not, but another round makes what has to follow smaller | pre-copy |
//! | a pass | it will not, and no round makes it smaller | hybrid |
//! | any pass | the patience is over ([`crate::convergence::Decision::GiveUp`]) | hybrid |
//! | any pass | stopping alone takes longer than allowed | pre-copy, which says so |

use std::time::Duration;

use serde::Serialize;

use crate::convergence::Prediction;
use crate::layout::PAGE_BYTES;
use crate::writes::{Writes, Written};

/// By how much the link must be overtaxed before pre-copy counts as endless.
const MARGIN: f64 = 1.25;

/// What another round must make of what is left to be worth it.
const WORTHWHILE: f64 = 0.9;

/// How a guest moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// All memory first, then the guest.
    PreCopy,
    /// Memory at least once, then the guest, then what it wrote meanwhile.
    Hybrid,
    /// The guest first, then its memory.
    PostCopy,
}

/// A mode, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Choice {
    /// The mode to go on with.
    pub mode: Mode,
    /// One sentence for the user.
    pub why: String,
}

impl Choice {
    fn new(mode: Mode, why: impl Into<String>) -> Self {
        Self { mode, why: why.into() }
    }
}

/// What was measured up to the end of a round.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// Rounds that were sent; the first is a pass over all memory.
    pub rounds: u32,
    /// Pages of which the destination lacks the present version.
    pub left_pages: u64,
    /// Bytes handed to the lanes and not yet applied at the destination.
    pub outstanding_bytes: u64,
    /// What the guest writes.
    pub writes: Option<Writes>,
    /// Bytes that a page takes on the wire.
    pub wire_bytes_per_page: f64,
    /// Measured goodput; nothing if too little was sent to tell.
    pub goodput_bytes_per_s: Option<f64>,
    /// What stopping costs regardless of memory: the stop, the device state, the hand-over.
    pub overhead: Duration,
    /// Longest downtime that is acceptable.
    pub max_downtime: Duration,
    /// The downtimes that were predicted from this.
    pub prediction: Option<Prediction>,
    /// Whether the patience with pre-copy is over.
    pub stalled: bool,
}

/// The mode to begin with.
pub fn first_mode(leave_at_once: bool) -> Choice {
    if leave_at_once {
        Choice::new(Mode::PostCopy, "The guest is to leave its host at once")
    } else {
        Choice::new(Mode::PreCopy, "Nothing is known of the guest's writes yet")
    }
}

/// The mode to go on with after a round: pre-copy or hybrid.
pub fn choose_mode(seen: &Measured) -> Choice {
    let pre_copy = |why: String| Choice::new(Mode::PreCopy, why);
    if seen.rounds == 0 {
        return pre_copy("Memory has not been sent once yet".into());
    }
    let allowed_ms = ms(seen.max_downtime);
    let memory = seen.max_downtime.saturating_sub(seen.overhead);
    if memory.is_zero() {
        let overhead_ms = ms(seen.overhead);
        return pre_copy(format!(
            "Stopping the guest alone takes {overhead_ms:.0} ms of the {allowed_ms:.0} ms allowed; no mode is quicker"
        ));
    }
    let Some(goodput) = seen.goodput_bytes_per_s.filter(|rate| *rate > 0.0) else {
        return pre_copy("Too little had to be sent to measure the link".into());
    };
    let left_bytes =
        seen.left_pages as f64 * seen.wire_bytes_per_page + seen.outstanding_bytes as f64;
    let (left_ms, memory_ms) = (left_bytes / goodput * 1e3, ms(memory));
    if left_ms <= memory_ms {
        return pre_copy(format!(
            "What is left takes {left_ms:.0} ms of the {memory_ms:.0} ms that memory may take"
        ));
    }
    if seen.stalled {
        let left = megabytes(left_bytes);
        return Choice::new(
            Mode::Hybrid,
            format!(
                "No round has come closer to the allowed {allowed_ms:.0} ms for too long; {left} follow the guest"
            ),
        );
    }
    match seen.writes {
        None => pre_copy("Nothing is known of the guest's writes yet".into()),
        Some(writes) => compare(seen, writes, &Link { goodput, memory, left_bytes }),
    }
}

/// What the link has to carry, and in which time.
struct Link {
    /// Bytes a second.
    goodput: f64,
    /// Time that memory may take of the downtime.
    memory: Duration,
    /// Bytes on the wire that are left now.
    left_bytes: f64,
}

/// Compares what the guest writes with what the link carries.
fn compare(seen: &Measured, writes: Writes, link: &Link) -> Choice {
    let written_bytes = writes.within(link.memory) * seen.wire_bytes_per_page;
    let carried_bytes = link.goodput * link.memory.as_secs_f64();
    let comparison = format!(
        "in the {:.0} ms that memory may take the guest writes at least {} on the wire and the link carries {}",
        ms(link.memory),
        megabytes(written_bytes),
        megabytes(carried_bytes)
    );
    if written_bytes <= carried_bytes * MARGIN {
        return Choice::new(Mode::PreCopy, format!("Pre-copy can end: {comparison}"));
    }
    if let Some(next_bytes) = worthwhile(seen, link.left_bytes, link.goodput) {
        let (next, left) = (megabytes(next_bytes), megabytes(link.left_bytes));
        return Choice::new(
            Mode::PreCopy,
            format!(
                "Pre-copy will not end, but another round leaves {next} instead of {left} to follow the guest: {comparison}"
            ),
        );
    }
    let Written { pages, seconds } = writes.round.unwrap_or(writes.scan);
    let written = megabytes(pages * PAGE_BYTES as f64);
    Choice::new(
        Mode::Hybrid,
        format!(
            "The guest wrote {written} in {seconds:.1} s, and pre-copy will not end: {comparison}"
        ),
    )
}

/// Bytes that another round leaves, if that is much less than what is left now.
fn worthwhile(seen: &Measured, left_bytes: f64, goodput: f64) -> Option<f64> {
    let next_ms = seen.prediction?.next_ms - ms(seen.overhead);
    let next_bytes = next_ms.max(0.0) / 1e3 * goodput;
    (next_bytes < left_bytes * WORTHWHILE).then_some(next_bytes)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Bytes in words, in units of 10^6.
fn megabytes(bytes: f64) -> String {
    format!("{:.1} MB", bytes / 1e6)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::convergence::{Config, Convergence, Decision, Observation};
    use crate::writes::WriteRate;

    const WIRE_BYTES_PER_PAGE: f64 = PAGE_BYTES as f64 + 16.0;

    /// 1.1 GiB.
    const RAM_PAGES: f64 = 281_600.0;

    const OVERHEAD: Duration = Duration::from_millis(20);

    /// A guest that writes at random within sets, the link, and what the user allows.
    #[derive(Debug, Clone, Copy)]
    struct Guest {
        /// Pages a second, and the pages within which they fall.
        sets: [(f64, f64); 2],
        goodput: f64,
        max_downtime: Duration,
    }

    /// How a migration ended.
    #[derive(Debug)]
    struct End {
        mode: Mode,
        /// Whether the downtime is met, given that in hybrid memory takes none of it.
        met: bool,
        wire_bytes: f64,
        left_pages: f64,
        why: String,
    }

    impl Guest {
        fn new(rate: f64, hot: f64, goodput: f64) -> Self {
            let max_downtime = Duration::from_millis(100);
            Self { sets: [(rate, hot), (0.0, 1.0)], goodput, max_downtime }
        }

        /// Different pages written within a time.
        fn within(&self, time: Duration) -> f64 {
            let seconds = time.as_secs_f64();
            let part = |(rate, size): (f64, f64)| size * (1.0 - (-rate * seconds / size).exp());
            self.sets.map(part).iter().sum()
        }

        fn round_time(&self, pages: f64) -> Duration {
            Duration::from_secs_f64(pages * WIRE_BYTES_PER_PAGE / self.goodput + 0.003)
        }

        /// Scans while a round of this length is sent.
        fn scan(&self, seen: &mut WriteRate, round: Duration) -> f64 {
            let glimpse = Duration::from_millis(100);
            let mut rest = round;
            while rest > glimpse {
                seen.scanned(self.within(glimpse) as u64, glimpse);
                rest -= glimpse;
            }
            seen.scanned(self.within(rest) as u64, rest);
            let pages = self.within(round);
            seen.round(pages as u64, round);
            pages
        }

        /// Rounds until the decision, with or without the choice of a mode.
        fn migrate(self, automatic: bool) -> End {
            let (max_downtime, patience) = (self.max_downtime, Duration::from_secs(20));
            let mut convergence = Convergence::new(Config { max_downtime, patience });
            let mut seen = WriteRate::default();
            let (mut now, mut dirty, mut wire_bytes) = (Duration::ZERO, RAM_PAGES, 0.0);
            for rounds in 1..100_000 {
                let interval = self.round_time(dirty);
                wire_bytes += dirty * WIRE_BYTES_PER_PAGE;
                now += interval;
                dirty = self.scan(&mut seen, interval);
                let observation = Observation {
                    dirty_pages: dirty as u64,
                    outstanding_bytes: 0,
                    goodput_bytes_per_s: Some(self.goodput),
                    wire_bytes_per_page: WIRE_BYTES_PER_PAGE,
                    dirtied_pages: dirty as u64,
                    interval,
                    overhead: OVERHEAD,
                };
                let decision = convergence.decide(&observation, now);
                let choice = choose_mode(&Measured {
                    rounds,
                    left_pages: dirty as u64,
                    outstanding_bytes: 0,
                    writes: seen.writes(),
                    wire_bytes_per_page: WIRE_BYTES_PER_PAGE,
                    goodput_bytes_per_s: Some(self.goodput),
                    overhead: OVERHEAD,
                    max_downtime,
                    prediction: convergence.prediction(),
                    stalled: matches!(decision, Decision::GiveUp(_)),
                });
                let (mode, why) = (choice.mode, choice.why);
                let end = |met| End { mode, met, wire_bytes, left_pages: dirty, why };
                match decision {
                    Decision::Stop => return end(true),
                    _ if automatic && mode == Mode::Hybrid => return end(true),
                    Decision::GiveUp(_) => return end(false),
                    Decision::Continue => {}
                }
            }
            panic!("no end")
        }
    }

    #[test]
    fn light_and_moderate_writers_are_copied_first() {
        for (rate, hot, goodput) in
            [(0.0, 1.0, 12e6), (100.0, 1000.0, 119e6), (20_000.0, 51_200.0, 119e6)]
        {
            let end = Guest::new(rate, hot, goodput).migrate(true);
            assert_eq!(end.mode, Mode::PreCopy, "{end:?}");
            assert!(end.met && end.wire_bytes < 1.6 * RAM_PAGES * WIRE_BYTES_PER_PAGE, "{end:?}");
        }
    }

    #[test]
    fn a_writer_that_outruns_the_link_is_followed_by_its_hot_set() {
        // 400 MB/s within 200 MB, over 1 Gbit/s: without a choice the patience is wasted.
        let guest = Guest::new(100_000.0, 51_200.0, 119e6);
        let end = guest.migrate(true);
        assert_eq!((end.mode, end.met), (Mode::Hybrid, true), "{end:?}");
        assert!(end.left_pages < 52_000.0, "{end:?}");
        assert!(end.wire_bytes < 1.5 * RAM_PAGES * WIRE_BYTES_PER_PAGE, "{end:?}");
        assert!(
            end.why.contains("wrote 203.1 MB in 1.8 s") && end.why.contains("9.5 MB"),
            "{end:?}"
        );
        let stubborn = guest.migrate(false);
        assert!(!stubborn.met && stubborn.wire_bytes > 1.5 * end.wire_bytes, "{stubborn:?}");
    }

    #[test]
    fn a_small_hot_set_fits_however_fast_it_is_written() {
        // 8 MB that are rewritten all the time take 70 ms of 80.
        let end = Guest::new(1e6, 2_000.0, 119e6).migrate(true);
        assert_eq!((end.mode, end.met), (Mode::PreCopy, true), "{end:?}");
    }

    #[test]
    fn the_host_is_left_at_once_only_when_told() {
        assert_eq!(first_mode(true).mode, Mode::PostCopy);
        assert_eq!(first_mode(false).mode, Mode::PreCopy);
    }

    const HOPELESS: Measured = Measured {
        rounds: 1,
        left_pages: 50_000,
        outstanding_bytes: 0,
        writes: Some(Writes { scan: Written { pages: 45_000.0, seconds: 0.1 }, round: None }),
        wire_bytes_per_page: WIRE_BYTES_PER_PAGE,
        goodput_bytes_per_s: Some(119e6),
        overhead: OVERHEAD,
        max_downtime: Duration::from_millis(100),
        prediction: Some(Prediction { now_ms: 1750.0, next_ms: 1750.0, best_ms: 1750.0 }),
        stalled: false,
    };

    #[test]
    fn what_is_not_known_or_would_not_help_stays_pre_copy() {
        assert_eq!(choose_mode(&HOPELESS).mode, Mode::Hybrid);
        for measured in [
            Measured { rounds: 0, ..HOPELESS },
            Measured { goodput_bytes_per_s: None, ..HOPELESS },
            Measured { goodput_bytes_per_s: Some(0.0), ..HOPELESS },
            Measured { writes: None, ..HOPELESS },
            Measured { left_pages: 2_000, stalled: true, ..HOPELESS },
            Measured { overhead: Duration::from_millis(100), stalled: true, ..HOPELESS },
        ] {
            let choice = choose_mode(&measured);
            assert_eq!(choice.mode, Mode::PreCopy, "{measured:?}: {}", choice.why);
        }
        // The first pass left what is written once besides the hot set.
        let prediction = Some(Prediction { now_ms: 1750.0, next_ms: 900.0, best_ms: 1750.0 });
        let choice = choose_mode(&Measured { prediction, ..HOPELESS });
        assert_eq!(choice.mode, Mode::PreCopy);
        assert!(choice.why.contains("104.7 MB instead of 205.6 MB"), "{}", choice.why);
    }

    #[test]
    fn when_patience_is_over_the_rest_follows() {
        let writes = Some(Writes { scan: Written { pages: 1.0, seconds: 0.1 }, round: None });
        let unclear = Measured { writes, ..HOPELESS };
        assert_eq!(choose_mode(&unclear).mode, Mode::PreCopy);
        assert_eq!(choose_mode(&Measured { stalled: true, ..unclear }).mode, Mode::Hybrid);
    }

    proptest! {
        /// Where pre-copy ends, it is not left; where it does not, hybrid costs no more.
        #[test]
        fn pre_copy_is_left_only_where_it_would_not_end(
            rates in (2.0f64..6.0, 1.0f64..5.0),
            sizes in (2.0f64..4.5, 3.0f64..5.4),
            goodput in 6.5f64..9.5,
            max_downtime_ms in 25u64..3000,
        ) {
            let [fast, slow] = [(rates.0, sizes.0), (rates.1, sizes.1)]
                .map(|(rate, size)| (10f64.powf(rate), 10f64.powf(size)));
            let max_downtime = Duration::from_millis(max_downtime_ms);
            let guest = Guest { sets: [fast, slow], goodput: 10f64.powf(goodput), max_downtime };
            let (alone, chosen) = (guest.migrate(false), guest.migrate(true));
            let mode = if alone.met { Mode::PreCopy } else { Mode::Hybrid };
            prop_assert!(chosen.met && chosen.mode == mode, "{alone:?} {chosen:?}");
            prop_assert!(chosen.wire_bytes <= alone.wire_bytes);
        }
    }
}
