//! Rounds of pre-copy as a state machine: from arming to the last page.
//!
//! ```text
//!            armed      glimpsed       scanned, continue
//!  Idle ───────────────► Sending ◄──────────────────────┐
//!              stop now  │ │ round sent                 │
//!               ┌────────┘ ▼                            │
//!               │       Scanning ───────────────────────┘
//!               │          │ scanned, stop     │ stalled
//!               │          ▼                   ▼
//!               └──────► Stopping ◄───────── GaveUp
//!                          │        stop now
//!                          │ guest stopped and scanned
//!                          ▼
//!                        Final ── tail scanned ──► Tail
//! ```
//!
//! The caller carries out each [`Step`] and reports with the matching method; a call that does not
//! fit the state is an error, not a guess. Correctness rules kept here: a page is scanned (armed)
//! before it is read (1); everything reported is looked at again where direct I/O is possible (6);
//! the last scan comes after the guest stopped and after its device state was written (13); where
//! larger pages back a block, a report means all of such a page, so its parts are looked at and sent
//! only if their content differs (15).
//!
//! With [`PrecopyConfig::order`] the coldest pages of a round go first ([`crate::order`]). Scans while
//! a round is being sent (glimpses) tell heat early; a page that one finds written before it was sent
//! waits for the next round. Hot pages whose last version the destination has anyway wait until the
//! guest stops, as many as a share of the downtime carries.
//!
//! Where pre-copy will not end ([`Precopy::measured`], [`crate::mode`]) or gave up,
//! [`Precopy::stop_now`] leads to the same last rounds; what they hold may then follow the guest
//! ([`crate::postcopy`]).

use std::time::Duration;

use thiserror::Error;

use crate::convergence::{Config, Convergence, Decision, Observation, Prediction, Stall};
use crate::encode::PageCounts;
use crate::error::{Classify, ErrorBin};
use crate::layout::{PAGE_BYTES, RamLayout};
use crate::mode::Measured;
use crate::order::Order;
use crate::pageset::PageSet;
use crate::second_look::SecondLook;
use crate::writes::WriteRate;

/// Length of a round while only direct I/O's window is waited for.
const IDLE_ROUND: Duration = Duration::from_millis(50);

/// A round of fewer pages waits until half of what is under way has arrived...
const SMALL_ROUND_PAGES: u64 = 256;

/// ...but no longer than this.
const DRAIN_WAIT_MAX: Duration = Duration::from_millis(20);

/// What is sent within this time is not worth a scan beside the device state's way out: the two
/// delay each other by as much.
const FEW: Duration = Duration::from_millis(2);

/// Bytes on the wire of a page with its content and its share of a run header, as long as nothing
/// else is known.
const WHOLE_PAGE_BYTES: f64 = PAGE_BYTES as f64 + 16.0;

/// A round of fewer pages tells nothing about the bytes that a page takes.
const TELLING_PAGES: u64 = 64;

/// Share of the acceptable downtime that pages may take which wait for the stop.
const WAITING_SHARE: f64 = 0.2;

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
    /// Pages reported written.
    pub dirty: PageSet,
    /// The same pages, in the order in which to send them; no set is empty.
    pub waves: Vec<PageSet>,
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
    /// Whether pages are sent by their heat, else by their number.
    pub order: bool,
}

#[derive(Debug)]
enum State {
    Idle,
    Sending { number: u32 },
    Scanning { number: u32 },
    Stopping { number: u32, dirty: PageSet },
    Final { number: u32 },
    Tail,
    GaveUp { number: u32 },
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
            Self::GaveUp { .. } => "gave up",
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
    /// Bytes on the wire a page, as last seen.
    wire_bytes_per_page: f64,
    max_downtime: Duration,
    /// Found written by glimpses of the round being sent.
    glimpsed: PageSet,
    /// Pages of the round last asked for, or that it would have had.
    unsent: PageSet,
    writes: WriteRate,
    measured: Option<Measured>,
    order: Option<Order>,
    convergence: Convergence,
    second_look: Option<SecondLook>,
    /// Before this time the guest is not stopped: reads that were in flight when tracking was armed
    /// have to pass first, so that only recent pages are left to look at during the stop.
    earliest_stop: Duration,
    last_scan: Duration,
    /// The last scan or glimpse.
    last_look: Duration,
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
            wire_bytes_per_page: WHOLE_PAGE_BYTES,
            max_downtime: config.convergence.max_downtime,
            glimpsed: PageSet::new(pages),
            unsent: PageSet::new(pages),
            writes: WriteRate::default(),
            measured: None,
            order: config.order.then(|| Order::new(pages)),
            convergence: Convergence::new(config.convergence),
            second_look: config.direct_io_window.map(|window| SecondLook::new(pages, window)),
            earliest_stop: Duration::ZERO,
            last_scan: Duration::ZERO,
            last_look: Duration::ZERO,
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
        self.last_look = now;
        self.state = State::Sending { number: 1 };
        Ok(Step::Send(self.round(1, data, PageSet::new(self.pages), now)))
    }

    /// A round, with its pages in order.
    fn round(&mut self, number: u32, dirty: PageSet, look: PageSet, not_before: Duration) -> Round {
        let waves = match &mut self.order {
            Some(order) => order.begin_round(&dirty),
            None if dirty.is_empty() => vec![],
            None => vec![dirty.clone()],
        };
        self.unsent.clone_from(&dirty);
        self.unsent.union_with(&look);
        Round { number, dirty, waves, look, not_before }
    }

    /// Whether scans while a round is being sent are of use.
    pub fn wants_glimpses(&self) -> bool {
        self.order.is_some()
    }

    /// A scan at `now`, while a round is being sent, found (and armed again) the pages `written`.
    /// Returns the pages of the round that wait for the next one, if they were not sent yet.
    ///
    /// # Errors
    /// [`OutOfTurn`] if no round is being sent.
    pub fn glimpsed(&mut self, written: &PageSet, now: Duration) -> Result<PageSet, OutOfTurn> {
        let State::Sending { number } = self.state else {
            return Err(self.out_of_turn("glimpsed"));
        };
        if let Some(look) = &mut self.second_look {
            look.report(written, now);
        }
        self.glimpsed.union_with(written);
        self.count_writes(written, now);
        let Some(order) = &mut self.order else { return Ok(PageSet::new(self.pages)) };
        order.scanned(written, now);
        Ok(order.leave_out(written, number == 1))
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
        let written = counts.sent() + counts.unchanged;
        if written >= TELLING_PAGES {
            self.wire_bytes_per_page = counts.wire_bytes as f64 / written as f64;
        }
        if let Some(order) = &mut self.order {
            order.round_sent();
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
        if let Some(order) = &mut self.order {
            order.scanned(&dirty, now);
        }
        self.count_writes(&dirty, now);
        let second_look = self.look_after_scan(&dirty, now);
        dirty.union_with(&self.glimpsed);
        self.glimpsed.clear();
        let mut look = self.split_coarse(&mut dirty);
        let dirtied_pages = dirty.len() + (look.len() as f64 * self.changed_share) as u64;
        let waiting_pages = self.order.as_mut().map_or(0, |order| order.end_waiting(&mut dirty));
        let again = second_look.len();
        look.union_with(&second_look);
        let seen = Observation {
            dirty_pages: dirtied_pages + waiting_pages,
            outstanding_bytes: link.outstanding_bytes,
            goodput_bytes_per_s: link.goodput_bytes_per_s,
            wire_bytes_per_page: self.wire_bytes_per_page,
            dirtied_pages,
            interval: now.saturating_sub(self.last_scan),
            overhead: link.overhead,
        };
        self.last_scan = now;
        self.writes.round(dirtied_pages, seen.interval);
        let decision = self.convergence.decide(&seen, now);
        let may_stop = now >= self.earliest_stop && again == 0;
        self.measured = may_stop.then(|| self.measure(&seen, &decision, number));
        let number = number + 1;
        Ok(match decision {
            Decision::Stop if may_stop => {
                dirty.union_with(&look);
                self.state = State::Stopping { number, dirty };
                Step::StopGuest
            }
            decision @ (Decision::Continue | Decision::Stop) => {
                let mut not_before = now;
                if decision == Decision::Stop && now < self.earliest_stop {
                    not_before = self.earliest_stop.min(now + IDLE_ROUND);
                } else if dirtied_pages < SMALL_ROUND_PAGES {
                    // What is under way goes first in any case: scanning faster is in vain.
                    not_before = now + (Convergence::drain(&seen) / 2).min(DRAIN_WAIT_MAX);
                }
                self.begin_waiting(&mut dirty, link.goodput_bytes_per_s);
                self.state = State::Sending { number };
                self.looked_pages = look.len();
                Step::Send(self.round(number, dirty, look, not_before))
            }
            Decision::GiveUp(stall) => {
                dirty.union_with(&look);
                self.unsent = dirty;
                self.state = State::GaveUp { number };
                Step::GiveUp(stall)
            }
        })
    }

    /// A scan or glimpse at `now` found these pages written.
    fn count_writes(&mut self, written: &PageSet, now: Duration) {
        let mut pages = written.len();
        if let Some(coarse) = &self.coarse {
            let mut parts = written.clone();
            parts.intersect(coarse);
            pages -= (parts.len() as f64 * (1.0 - self.changed_share)) as u64;
        }
        self.writes.scanned(pages, now.saturating_sub(self.last_look));
        self.last_look = now;
    }

    fn measure(&self, seen: &Observation, decision: &Decision, rounds: u32) -> Measured {
        Measured {
            rounds,
            left_pages: seen.dirty_pages,
            outstanding_bytes: seen.outstanding_bytes,
            writes: self.writes.writes(),
            wire_bytes_per_page: seen.wire_bytes_per_page,
            goodput_bytes_per_s: seen.goodput_bytes_per_s,
            overhead: seen.overhead,
            max_downtime: self.max_downtime,
            prediction: self.convergence.prediction(),
            stalled: matches!(decision, Decision::GiveUp(_)),
        }
    }

    /// What the last scan found, for [`crate::mode::choose_mode`]. Nothing before the first round is
    /// sent, and while many pages wait for their second look: stopping the guest then would make all
    /// of them last pages.
    pub fn measured(&self) -> Option<Measured> {
        self.measured
    }

    /// The guest is to be stopped before what is left fits into the downtime: instead of sending the
    /// round that was asked for (or, should part of it be sent, the rest of it), or after
    /// [`Step::GiveUp`]. Stop the guest, scan, then call [`Self::stopped`]. The destination lacks what
    /// the last rounds hold: the dirty pages, and those to look at whose content differs. Returns the
    /// pages that are known to be among them already.
    ///
    /// # Errors
    /// [`OutOfTurn`] if no round was asked for.
    pub fn stop_now(&mut self) -> Result<PageSet, OutOfTurn> {
        let (State::Sending { number } | State::GaveUp { number }) = self.state else {
            return Err(self.out_of_turn("stop_now"));
        };
        let mut dirty = std::mem::replace(&mut self.unsent, PageSet::new(self.pages));
        dirty.union_with(&self.glimpsed);
        self.glimpsed.clear();
        if let Some(order) = &mut self.order {
            order.end_waiting(&mut dirty);
        }
        self.state = State::Stopping { number, dirty: dirty.clone() };
        Ok(dirty)
    }

    /// Takes hot pages out of the next round that can as well travel when the guest is stopped.
    fn begin_waiting(&mut self, dirty: &mut PageSet, goodput_bytes_per_s: Option<f64>) {
        let Some(order) = &mut self.order else { return };
        let bytes =
            goodput_bytes_per_s.unwrap_or(0.0) * self.max_downtime.as_secs_f64() * WAITING_SHARE;
        order.begin_waiting(dirty, (bytes / self.wire_bytes_per_page.max(1.0)) as u64);
    }

    /// Bytes of memory that the order of pages takes.
    pub fn order_memory_bytes(&self) -> usize {
        self.order.as_ref().map_or(0, Order::memory_bytes)
    }

    /// Pages that wait for the stop.
    pub fn waiting_pages(&self) -> u64 {
        self.order.as_ref().map_or(0, Order::waiting_pages)
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

    /// Whether so little was written between the last scan and `now` that finding it while the device
    /// state is written takes longer than sending it afterwards.
    pub fn few_written_since(&self, now: Duration, goodput_bytes_per_s: Option<f64>) -> bool {
        let since = now.saturating_sub(self.last_look);
        let written = self.writes.writes().zip(goodput_bytes_per_s);
        written.is_some_and(|(writes, goodput)| {
            writes.within(since) * self.wire_bytes_per_page < goodput * FEW.as_secs_f64()
        })
    }

    /// The guest is stopped and was scanned afterwards, or need not be yet
    /// ([`Self::few_written_since`]): these are the last pages but for those that are written
    /// meanwhile, by the device state's way out too.
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
        Ok(self.last_round(number, dirty, look))
    }

    /// The device state was written and a scan afterwards found `dirty`.
    ///
    /// # Errors
    /// [`OutOfTurn`] if the final round was not sent yet.
    pub fn tail(&mut self, mut dirty: PageSet) -> Result<Round, OutOfTurn> {
        let State::Final { number } = self.state else { return Err(self.out_of_turn("tail")) };
        self.state = State::Tail;
        let look = self.split_coarse(&mut dirty);
        Ok(self.last_round(number + 1, dirty, look))
    }

    /// A round with the guest stopped, in which order is of no use.
    fn last_round(&self, number: u32, dirty: PageSet, look: PageSet) -> Round {
        let waves = if dirty.is_empty() { vec![] } else { vec![dirty.clone()] };
        Round { number, dirty, waves, look, not_before: Duration::ZERO }
    }

    /// Bytes on the wire that a written page is expected to take.
    pub fn wire_bytes_per_page(&self) -> f64 {
        self.wire_bytes_per_page
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
mod tests;
