//! Pre-copy: from the attached guest to the moment when it is to be stopped.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use migrate_core::encode::PageCounts;
use migrate_core::mode::{self, choose_mode};
use migrate_core::page_table::SourcePages;
use migrate_core::pageset::PageSet;
use migrate_core::precopy::{LinkState, Precopy, Round, Step};
use qemu_glue::ram::GuestRam;
use qemu_glue::track::DirtyTracker;
use qemu_glue::vm::Processor;
use transport::messages::Sync;

use super::gate::Gate;
use super::link::Link;
use super::outlet::PumpError;
use super::pump::Pump;
use super::split::Split;
use super::unused::Unused;
use crate::args::Mode;
use crate::error::EngineError;
use crate::progress::{Progress, Snapshot};
use crate::report::{Report, RoundReport};

/// What stopping costs regardless of memory, before anything was measured: the stop itself, the
/// device state's way out and in, the journals.
const STOP_OVERHEAD: Duration = Duration::from_millis(40);

/// Time without any progress of pages after which who gets them counts as stuck while the guest runs.
const STUCK_AFTER: Duration = Duration::from_secs(20);

/// How often it is made sure that the guest's kernel is the one that was found.
const KERNEL_CHECKED_EVERY: Duration = Duration::from_millis(100);

/// What looking at a page again costs that was skipped, with the guest stopped: 3 ms for each GiB.
const LOOK_AGAIN: Duration = Duration::from_nanos(12);

/// How often progress is shown and looked at, and written pages are looked for meanwhile.
const TICK: Duration = migrate_core::order::TICK;

/// How pre-copy ended.
#[derive(Debug)]
pub enum Ended {
    /// The guest is to be stopped, the last pages take as long as is allowed.
    Complete,
    /// The guest is to be handed over although pages are missing: at least these.
    Early(PageSet),
}

/// The attached guest and the way to the destination.
#[derive(Debug)]
pub struct Mover {
    /// Guest memory.
    pub ram: Arc<GuestRam>,
    /// What was sent of it.
    pub pages: Arc<SourcePages>,
    /// Write tracking, unless no page is sent before the guest stops.
    pub tracker: Option<Mutex<DirtyTracker>>,
    /// Pages that are no holes, where a balloon may make holes of them unreported (rule 14).
    pub populated: Option<Mutex<PageSet>>,
    /// Whether the session has a lane that only post-copy uses.
    pub has_urgent_lane: bool,
    /// Tells what the guest does not use.
    pub unused: Option<Arc<Unused>>,
    /// Where pages go that are not the destination's.
    pub split: Option<Arc<Split>>,
    /// Encoder threads.
    pub pump: Arc<Pump>,
    /// Back-pressure.
    pub gate: Arc<Gate>,
    /// The same while the guest is stopped.
    pub dead_peer: Duration,
    /// The migration's origin of time.
    pub clock: Instant,
}

impl Mover {
    /// Scans for written pages and arms them again. Pages that became holes count as written.
    ///
    /// # Errors
    /// If the kernel refuses: QEMU is gone or changed its memory.
    pub fn scan(&self) -> Result<PageSet, EngineError> {
        // Milliseconds, for which what this thread has just queued would wait otherwise.
        tokio::task::block_in_place(|| self.scan_here())
    }

    fn scan_here(&self) -> Result<PageSet, EngineError> {
        let pages = self.ram.layout().pages();
        let mut dirty = PageSet::new(pages);
        let Some(tracker) = &self.tracker else { return Ok(dirty) };
        let mut tracker = tracker.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = tracker.scan(&mut dirty)?;
        tracing::debug!(pages = seen.pages, took_us = seen.took.as_micros() as u64, "scan");
        if let Some(populated) = &self.populated {
            let mut populated = populated.lock().unwrap_or_else(PoisonError::into_inner);
            populated.union_with(&dirty);
            let mut holes = PageSet::new(pages);
            self.ram.vanished(&populated, &mut holes)?;
            populated.subtract(&holes);
            dirty.union_with(&holes);
        }
        Ok(dirty)
    }

    /// Where the guest's processors are, if anybody asks for that.
    pub async fn processors(&self) -> Vec<Processor> {
        match &self.unused {
            Some(unused) => unused.processors().await,
            None => vec![],
        }
    }

    /// What was skipped by what another kernel said than the one that runs now.
    async fn of_another_kernel(&self) -> Result<PageSet, EngineError> {
        let processors = self.processors().await;
        let pages = match &self.unused {
            Some(unused) => tokio::task::block_in_place(|| unused.of_another_kernel(&processors))?,
            None => None,
        };
        Ok(pages.unwrap_or_else(|| PageSet::new(self.ram.layout().pages())))
    }

    /// What looking again at all that is skipped will cost while the guest is stopped.
    fn look_again(&self) -> Duration {
        LOOK_AGAIN.saturating_mul(u32::try_from(self.skipped_pages()).unwrap_or(u32::MAX))
    }

    /// Number of pages that are skipped.
    pub fn skipped_pages(&self) -> u64 {
        self.unused.as_ref().map_or(0, |unused| unused.skipped_pages())
    }

    /// The guest is stopped for post-copy: takes those out of the `missing` pages that need not follow it.
    ///
    /// # Errors
    /// If memory cannot be read.
    pub fn thin(&self, missing: &mut PageSet) -> Result<(), EngineError> {
        match &self.unused {
            Some(unused) => tokio::task::block_in_place(|| unused.thin(missing, &self.pages)),
            None => Ok(()),
        }
    }

    /// The guest is stopped: pages that were skipped as unused, and are used now.
    ///
    /// # Errors
    /// If memory cannot be read.
    pub fn used_again(&self, processors: &[Processor]) -> Result<PageSet, EngineError> {
        match &self.unused {
            Some(unused) => tokio::task::block_in_place(|| unused.used_again(processors)),
            None => Ok(PageSet::new(self.ram.layout().pages())),
        }
    }

    /// Bytes a second that the links carry together, if enough was sent to tell.
    pub fn goodput_bytes_per_s(&self, link: &Link) -> Option<f64> {
        let main = link.goodput_bytes_per_s();
        match &self.split {
            Some(split) => split.goodput_bytes_per_s(main),
            None => main,
        }
    }

    /// What the destination must have in place.
    pub fn sync(&self, sequence: u32) -> Sync {
        let mut batches = self.pump.batches();
        batches.extend(self.has_urgent_lane.then_some(0));
        Sync { sequence, batches }
    }

    /// Scans while a round is being sent: what is written again before it was sent waits.
    fn glimpse(&self, precopy: &mut Precopy) -> Result<(), EngineError> {
        if precopy.wants_glimpses() {
            let written = self.scan()?;
            self.pump.leave_out(&precopy.glimpsed(&written, self.clock.elapsed())?);
        }
        Ok(())
    }

    /// Sends a round; `tick` is called every 100 ms. Returns when all of it is on its way. Fails if no page arrives
    /// anywhere for `stuck_after`.
    ///
    /// # Errors
    /// What the pump says, or [`EngineError::TooSlow`].
    async fn send(
        &self,
        round: Round,
        link: &Link,
        stuck_after: Duration,
        mut tick: impl FnMut() -> Result<(), EngineError>,
    ) -> Result<PageCounts, EngineError> {
        let (pump, unused) = (Arc::clone(&self.pump), self.unused.clone());
        let split = self.split.clone();
        pump.begin_round();
        let mut sending = tokio::task::spawn_blocking(move || -> Result<_, EngineError> {
            if let Some(unused) = unused {
                unused.begin_round(&round)?;
            }
            match split {
                Some(split) => split.send(&pump, round),
                None => Ok(pump.send(round)?),
            }
        });
        let moved = || {
            link.applied_bytes() + self.split.as_ref().map_or(0, |split| split.acknowledged_bytes())
        };
        let mut last = (moved(), Instant::now());
        loop {
            tokio::select! {
                sent = &mut sending => {
                    let sent = sent.map_err(|error| EngineError::Internal(error.to_string()))?;
                    return sent;
                }
                () = link.ended() => return Err(EngineError::Pump(PumpError::LaneClosed)),
                () = tokio::time::sleep(TICK) => {}
            }
            tick()?;
            if let Some(split) = self.split.clone()
                && split.wants_renewal()
            {
                drop(tokio::task::spawn_blocking(move || split.keep_alive()));
            }
            if moved() != last.0 {
                last = (moved(), Instant::now());
            } else if last.1.elapsed() > stuck_after {
                let seconds = stuck_after.as_secs();
                return Err(EngineError::TooSlow { wanted: "progress with pages", seconds });
            }
        }
    }

    /// Runs rounds until the guest is to be stopped, with or without pages missing as `mode` allows.
    ///
    /// # Errors
    /// [`EngineError::NotConverging`], or what went wrong.
    pub async fn precopy(
        &self,
        precopy: &mut Precopy,
        data: PageSet,
        link: &mut Link,
        mode: Mode,
        progress: &mut Progress,
        report: &mut Report,
    ) -> Result<Ended, EngineError> {
        let mut step = precopy.armed(data, self.clock.elapsed())?;
        let mut checked = Instant::now();
        loop {
            let round = match step {
                Step::Send(round) => round,
                Step::StopGuest => return Ok(Ended::Complete),
                Step::GiveUp(stall) if mode == Mode::PreCopy => {
                    return Err(EngineError::NotConverging(stall));
                }
                Step::GiveUp(_) => {
                    report.mode_reason = Some(why_early(mode, precopy));
                    return Ok(Ended::Early(precopy.stop_now()?));
                }
            };
            if is_early(mode, precopy) {
                report.mode_reason = Some(why_early(mode, precopy));
                return Ok(Ended::Early(precopy.stop_now()?));
            }
            let wait = round.not_before.saturating_sub(self.clock.elapsed());
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
            }
            let mut entry = begin(&round);
            let began = Instant::now();
            let before = self.gate.bytes().0;
            let predicted = precopy.prediction().map(|prediction| prediction.now_ms);
            let expected = (entry.dirty as f64 * precopy.wire_bytes_per_page()) as u64;
            let show = |progress: &mut Progress| {
                progress.show(&Snapshot {
                    round: entry.round,
                    round_pages: entry.dirty,
                    applied_bytes: link.applied_bytes(),
                    expected_bytes: before + expected,
                    rate_bytes_per_s: link.goodput_bytes_per_s(),
                    predicted_ms: predicted,
                });
            };
            show(progress);
            let tick = || {
                show(progress);
                self.glimpse(precopy)
            };
            let counts = self.send(round, link, STUCK_AFTER, tick).await?;
            precopy.round_sent(&counts)?;
            report.add(&counts);
            report.pages.deferred += precopy.waiting_pages();
            let mut dirty = self.scan()?;
            if checked.elapsed() > KERNEL_CHECKED_EVERY {
                dirty.union_with(&self.of_another_kernel().await?);
                checked = Instant::now();
            }
            let state = LinkState {
                outstanding_bytes: self.gate.bytes().1,
                goodput_bytes_per_s: self.goodput_bytes_per_s(link),
                overhead: STOP_OVERHEAD + self.look_again(),
            };
            step = precopy.scanned(dirty, state, self.clock.elapsed())?;
            entry.sent = counts.sent();
            entry.ms = began.elapsed().as_secs_f64() * 1e3;
            entry.predicted = precopy.prediction();
            tracing::info!(round = ?entry, "round");
            push_round(report, entry);
        }
    }

    /// Sends a round with the guest stopped.
    ///
    /// # Errors
    /// What the pump says, or [`EngineError::TooSlow`].
    pub async fn last_round(
        &self,
        round: Round,
        link: &Link,
        report: &Mutex<&mut Report>,
    ) -> Result<(), EngineError> {
        let mut entry = begin(&round);
        let began = Instant::now();
        let counts = self.send(round, link, self.dead_peer, || Ok(())).await?;
        entry.sent = counts.sent();
        entry.ms = began.elapsed().as_secs_f64() * 1e3;
        let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
        report.add(&counts);
        push_round(&mut report, entry);
        Ok(())
    }
}

/// Whether the guest is to be handed over instead of sending another round.
fn is_early(mode: Mode, precopy: &Precopy) -> bool {
    precopy.measured().is_some_and(|measured| match mode {
        Mode::Hybrid => true,
        Mode::Auto => choose_mode(&measured).mode == mode::Mode::Hybrid,
        Mode::PreCopy | Mode::PostCopy => false,
    })
}

fn why_early(asked: Mode, precopy: &Precopy) -> String {
    match precopy.measured() {
        Some(measured) if asked == Mode::Auto => choose_mode(&measured).why,
        _ => "All memory was sent once, as asked".into(),
    }
}

/// Rounds kept in the report; a guest that takes thousands of rounds is described by the first and
/// the last ones.
const ROUNDS_MAX: usize = 500;

fn push_round(report: &mut Report, entry: RoundReport) {
    if report.rounds.len() >= ROUNDS_MAX {
        report.rounds.remove(ROUNDS_MAX / 2);
    }
    report.rounds.push(entry);
}

fn begin(round: &Round) -> RoundReport {
    RoundReport {
        round: round.number,
        dirty: round.dirty.len(),
        looked: round.look.len(),
        sent: 0,
        ms: 0.0,
        predicted: None,
    }
}
