//! Rounds of pre-copy as a state machine: from arming to the last page.
//!
//! ```text
//!            armed                     scanned, continue
//!  Idle ───────────────► Sending ◄──────────────────────┐
//!                          │ round sent                 │
//!                          ▼                            │
//!                       Scanning ───────────────────────┘
//!                          │ scanned, stop     │ stalled
//!                          ▼                   ▼
//!                       Stopping            GaveUp
//!                          │ guest stopped and scanned
//!                          ▼
//!                        Final ── tail scanned ──► Tail
//! ```
//!
//! The caller carries out each [`Step`] and reports with the matching method; a call that does not
//! fit the state is an error, not a guess. Correctness rules kept here: a page is scanned (armed)
//! before it is read (1); everything reported is looked at again where direct I/O is possible (6);
//! the last scans come after the guest stopped and after its device state was written (13); where
//! larger pages back a block, a report means all of such a page, so its parts are looked at and sent
//! only if their content differs (15).

use std::time::Duration;

use thiserror::Error;

use crate::convergence::{Config, Convergence, Decision, Observation, Prediction, Stall};
use crate::encode::PageCounts;
use crate::error::{Classify, ErrorBin};
use crate::layout::{PAGE_BYTES, RamLayout};
use crate::pageset::PageSet;
use crate::second_look::SecondLook;

/// Length of a round while only direct I/O's window is waited for.
const IDLE_ROUND: Duration = Duration::from_millis(50);

/// A round of fewer pages waits until half of what is under way has arrived...
const SMALL_ROUND_PAGES: u64 = 256;

/// ...but no longer than this.
const DRAIN_WAIT_MAX: Duration = Duration::from_millis(20);

/// What to do next.
#[derive(Debug)]
pub enum Step {
    /// Send these pages, then call [`Precopy::round_sent`].
    Send(Round),
    /// Stop the guest, scan, then call [`Precopy::stopped`].
    StopGuest,
    /// Another round makes no sense: the guest stays here.
    GiveUp(Stall),
}

/// The pages of one round.
#[derive(Debug)]
pub struct Round {
    /// Number of the round, from 1.
    pub number: u32,
    /// Pages reported written: send whatever they hold.
    pub dirty: PageSet,
    /// Pages to look at again: send those whose content differs from what was last sent.
    pub look: PageSet,
    /// When to start: later than now while only time is waited for, so as not to scan in vain.
    pub not_before: Duration,
}

/// A method was called that does not fit the state.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{call} does not fit the state {state} of pre-copy")]
pub struct OutOfTurn {
    call: &'static str,
    state: &'static str,
}

impl Classify for OutOfTurn {
    fn bin(&self) -> ErrorBin {
        ErrorBin::CallerMisuse
    }
}

/// How pre-copy is to be run.
#[derive(Debug, Clone, Copy)]
pub struct PrecopyConfig {
    /// What the user allows.
    pub convergence: Config,
    /// Longest plausible direct I/O; nothing if the guest's disks do none.
    pub direct_io_window: Option<Duration>,
}

#[derive(Debug)]
enum State {
    Idle,
    Sending { number: u32 },
    Scanning { number: u32 },
    Stopping { number: u32, dirty: PageSet },
    Final { number: u32 },
    Tail,
    GaveUp,
}

impl State {
    fn name(&self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Sending { .. } => "sending",
            Self::Scanning { .. } => "scanning",
            Self::Stopping { .. } => "stopping",
            Self::Final { .. } => "final",
            Self::Tail => "tail",
            Self::GaveUp => "gave up",
        }
    }
}

/// The measured costs that the next decision needs.
#[derive(Debug, Clone, Copy)]
pub struct LinkState {
    /// Bytes handed to the lanes and not yet applied at the destination.
    pub outstanding_bytes: u64,
    /// Measured goodput, if enough was sent to tell.
    pub goodput_bytes_per_s: Option<f64>,
    /// What stopping costs regardless of memory.
    pub overhead: Duration,
}

/// Drives rounds until the guest is to be stopped.
#[derive(Debug)]
pub struct Precopy {
    state: State,
    pages: u64,
    /// Pages of blocks whose reports cover more than one page.
    coarse: Option<PageSet>,
    /// Share of the pages looked at that had changed, as last seen.
    changed_share: f64,
    /// Pages that the round being sent looks at.
    looked_pages: u64,
    convergence: Convergence,
    second_look: Option<SecondLook>,
    /// Before this time the guest is not stopped: reads that were in flight when tracking was armed
    /// have to pass first, so that only recent pages are left to look at during the stop.
    earliest_stop: Duration,
    last_scan: Duration,
}

impl Precopy {
    /// A machine for a guest with this RAM.
    pub fn new(layout: &RamLayout, config: PrecopyConfig) -> Self {
        let pages = layout.pages();
        Self {
            state: State::Idle,
            pages,
            coarse: coarse_pages(layout),
            changed_share: 1.0,
            looked_pages: 0,
            convergence: Convergence::new(config.convergence),
            second_look: config.direct_io_window.map(|window| SecondLook::new(pages, window)),
            earliest_stop: Duration::ZERO,
            last_scan: Duration::ZERO,
        }
    }

    /// Tracking is armed and `data` are the pages that are not holes. Reads in flight at this moment
    /// may have been pinned before, so every page counts as reported now.
    ///
    /// # Errors
    /// [`OutOfTurn`] if called twice.
    pub fn armed(&mut self, data: PageSet, now: Duration) -> Result<Step, OutOfTurn> {
        let State::Idle = self.state else { return Err(self.out_of_turn("armed")) };
        if let Some(look) = &mut self.second_look {
            let mut all = PageSet::new(self.pages);
            all.insert_range(0..self.pages);
            look.report(&all, now);
            look.seal();
            self.earliest_stop = look.next_due().unwrap_or(now);
        }
        self.last_scan = now;
        self.state = State::Sending { number: 1 };
        Ok(Step::Send(Round {
            number: 1,
            dirty: data,
            look: PageSet::new(self.pages),
            not_before: now,
        }))
    }

    /// Whether pages are looked at, which needs their hashes.
    pub fn needs_hashes(&self) -> bool {
        self.coarse.is_some() || self.second_look.is_some()
    }

    /// All pages of the round are on the lanes: scan next and call [`Self::scanned`].
    ///
    /// # Errors
    /// [`OutOfTurn`] if no round is being sent.
    pub fn round_sent(&mut self, counts: &PageCounts) -> Result<(), OutOfTurn> {
        let State::Sending { number } = self.state else {
            return Err(self.out_of_turn("round_sent"));
        };
        if self.looked_pages > 0 {
            self.changed_share = counts.looked_sent as f64 / self.looked_pages as f64;
        }
        self.state = State::Scanning { number };
        Ok(())
    }

    /// A scan at `now` found (and armed again) the pages `dirty`.
    ///
    /// # Errors
    /// [`OutOfTurn`] if no scan was due.
    pub fn scanned(
        &mut self,
        mut dirty: PageSet,
        link: LinkState,
        now: Duration,
    ) -> Result<Step, OutOfTurn> {
        let State::Scanning { number } = self.state else {
            return Err(self.out_of_turn("scanned"));
        };
        let second_look = self.look_after_scan(&dirty, now);
        let mut look = self.split_coarse(&mut dirty);
        let dirtied_pages = dirty.len() + (look.len() as f64 * self.changed_share) as u64;
        let again = second_look.len();
        look.union_with(&second_look);
        let seen = Observation {
            dirty_pages: dirtied_pages,
            outstanding_bytes: link.outstanding_bytes,
            goodput_bytes_per_s: link.goodput_bytes_per_s,
            dirtied_pages,
            interval: now.saturating_sub(self.last_scan),
            overhead: link.overhead,
        };
        self.last_scan = now;
        let mut next = Round { number: number + 1, dirty, look, not_before: now };
        Ok(match self.convergence.decide(&seen, now) {
            Decision::Stop if now >= self.earliest_stop && again == 0 => {
                next.dirty.union_with(&next.look);
                self.state = State::Stopping { number: next.number, dirty: next.dirty };
                Step::StopGuest
            }
            decision @ (Decision::Continue | Decision::Stop) => {
                if decision == Decision::Stop && now < self.earliest_stop {
                    next.not_before = self.earliest_stop.min(now + IDLE_ROUND);
                } else if dirtied_pages < SMALL_ROUND_PAGES {
                    // What is under way goes first in any case: scanning faster is in vain.
                    next.not_before = now + (Convergence::drain(&seen) / 2).min(DRAIN_WAIT_MAX);
                }
                self.state = State::Sending { number: next.number };
                self.looked_pages = next.look.len();
                Step::Send(next)
            }
            Decision::GiveUp(stall) => {
                self.state = State::GaveUp;
                Step::GiveUp(stall)
            }
        })
    }

    fn look_after_scan(&mut self, dirty: &PageSet, now: Duration) -> PageSet {
        let Some(second_look) = &mut self.second_look else { return PageSet::new(self.pages) };
        second_look.report(dirty, now);
        let mut look = second_look.take_due(now);
        look.subtract(dirty);
        look
    }

    /// Takes the pages out of `dirty` whose reports may mean their neighbours.
    fn split_coarse(&self, dirty: &mut PageSet) -> PageSet {
        let mut look = PageSet::new(self.pages);
        if let Some(coarse) = &self.coarse {
            look.union_with(dirty);
            look.intersect(coarse);
            dirty.subtract(coarse);
        }
        look
    }

    /// The guest is stopped and was scanned afterwards: these are the last pages but for those that
    /// writing the device state touches.
    ///
    /// # Errors
    /// [`OutOfTurn`] if the guest was not to be stopped.
    pub fn stopped(&mut self, mut dirty: PageSet) -> Result<Round, OutOfTurn> {
        let State::Stopping { number, dirty: waiting } = &self.state else {
            return Err(self.out_of_turn("stopped"));
        };
        let number = *number;
        dirty.union_with(waiting);
        let mut look = self.split_coarse(&mut dirty);
        if let Some(second_look) = &mut self.second_look {
            look.union_with(&second_look.take_all());
        }
        look.subtract(&dirty);
        self.state = State::Final { number };
        Ok(Round { number, dirty, look, not_before: Duration::ZERO })
    }

    /// The device state was written and a scan afterwards found `dirty`.
    ///
    /// # Errors
    /// [`OutOfTurn`] if the final round was not sent yet.
    pub fn tail(&mut self, mut dirty: PageSet) -> Result<Round, OutOfTurn> {
        let State::Final { number } = self.state else { return Err(self.out_of_turn("tail")) };
        self.state = State::Tail;
        let look = self.split_coarse(&mut dirty);
        Ok(Round { number: number + 1, dirty, look, not_before: Duration::ZERO })
    }

    /// The latest prediction of downtime.
    pub fn prediction(&self) -> Option<Prediction> {
        self.convergence.prediction()
    }

    fn out_of_turn(&self, call: &'static str) -> OutOfTurn {
        OutOfTurn { call, state: self.state.name() }
    }
}

/// Pages of blocks that are backed by larger pages, if there are any.
fn coarse_pages(layout: &RamLayout) -> Option<PageSet> {
    let mut coarse = PageSet::new(layout.pages());
    for (index, block) in layout.blocks().iter().enumerate() {
        if block.page_bytes > PAGE_BYTES as u64 {
            coarse.insert_range(layout.block_pages(index));
        }
    }
    (!coarse.is_empty()).then_some(coarse)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::BlockSpec;

    fn layout(page_bytes: u64) -> RamLayout {
        let block = |name: &str, pages, page_bytes| BlockSpec {
            name: name.into(),
            length_bytes: pages * PAGE_BYTES as u64,
            page_bytes,
        };
        RamLayout::new(vec![block("small", 32, 4096), block("other", 32, page_bytes)]).unwrap()
    }

    fn set(pages: &[u64]) -> PageSet {
        let mut set = PageSet::new(64);
        pages.iter().for_each(|page| set.insert(*page));
        set
    }

    fn config(direct_io_window: Option<Duration>) -> PrecopyConfig {
        PrecopyConfig {
            convergence: Config {
                max_downtime: Duration::from_millis(100),
                patience: Duration::from_secs(5),
            },
            direct_io_window,
        }
    }

    const LINK: LinkState = LinkState {
        outstanding_bytes: 0,
        goodput_bytes_per_s: None,
        overhead: Duration::from_millis(10),
    };

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn pages_of_the_deciding_scan_travel_in_the_final_round() {
        let mut precopy = Precopy::new(&layout(4096), config(None));
        let Step::Send(first) = precopy.armed(set(&[1, 2]), at(0)).unwrap() else { panic!() };
        assert_eq!(first.dirty, set(&[1, 2]));
        precopy.round_sent(&PageCounts::default()).unwrap();
        assert!(matches!(precopy.scanned(set(&[3]), LINK, at(10)).unwrap(), Step::StopGuest));
        let last = precopy.stopped(set(&[4])).unwrap();
        assert_eq!(last.dirty, set(&[3, 4]));
        assert_eq!(precopy.tail(set(&[5])).unwrap().dirty, set(&[5]));
    }

    #[test]
    fn with_direct_io_everything_is_looked_at_before_the_stop() {
        let mut precopy = Precopy::new(&layout(4096), config(Some(at(1000))));
        precopy.armed(set(&[1]), at(0)).unwrap();
        precopy.round_sent(&PageCounts::default()).unwrap();
        let Step::Send(round) = precopy.scanned(set(&[3]), LINK, at(10)).unwrap() else { panic!() };
        assert!(round.look.is_empty());
        precopy.round_sent(&PageCounts::default()).unwrap();
        let step = precopy.scanned(set(&[]), LINK, at(1001)).unwrap();
        let Step::Send(round) = step else { panic!("{step:?}") };
        assert!(round.look.contains(1) && round.look.contains(63) && !round.look.contains(3));
        precopy.round_sent(&PageCounts::default()).unwrap();
        assert!(matches!(precopy.scanned(set(&[]), LINK, at(1005)).unwrap(), Step::StopGuest));
        let last = precopy.stopped(set(&[])).unwrap();
        assert_eq!(last.look, set(&[3]), "reported at 10 ms: due at the stop");
    }

    #[test]
    fn parts_of_larger_pages_are_looked_at() {
        let mut precopy = Precopy::new(&layout(8 * 4096), config(None));
        assert!(precopy.needs_hashes());
        precopy.armed(set(&[1, 40]), at(0)).unwrap();
        precopy.round_sent(&PageCounts::default()).unwrap();
        let far = LinkState { goodput_bytes_per_s: Some(1e3), ..LINK };
        let step = precopy.scanned(set(&[1, 40, 41]), far, at(10)).unwrap();
        let Step::Send(round) = step else { panic!("{step:?}") };
        assert_eq!((round.dirty, round.look), (set(&[1]), set(&[40, 41])));
        // Half of what was looked at had changed: half of the next report counts.
        precopy.round_sent(&PageCounts { looked_sent: 1, ..PageCounts::default() }).unwrap();
        assert!(matches!(precopy.scanned(set(&[40]), LINK, at(20)).unwrap(), Step::StopGuest));
        let last = precopy.stopped(set(&[2, 48])).unwrap();
        assert_eq!((last.dirty, last.look), (set(&[2]), set(&[40, 48])));
        let tail = precopy.tail(set(&[3, 63])).unwrap();
        assert_eq!((tail.dirty, tail.look), (set(&[3]), set(&[63])));
    }

    #[test]
    fn calls_out_of_turn_are_refused() {
        let mut precopy = Precopy::new(&layout(4096), config(None));
        assert!(precopy.round_sent(&PageCounts::default()).is_err());
        assert!(precopy.stopped(set(&[])).is_err());
        precopy.armed(set(&[]), at(0)).unwrap();
        assert!(precopy.armed(set(&[]), at(0)).is_err());
        let text = precopy.tail(set(&[])).unwrap_err().to_string();
        assert!(text.contains("sending"), "{text}");
    }
}
