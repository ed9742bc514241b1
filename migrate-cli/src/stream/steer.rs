//! When the guest is stopped: QEMU's own figures, judged as those of the direct path.
//!
//! ```text
//!   first pass ─► passes over what was written ─► as few as they will be: stop ─► QEMU sends the rest and ends
//!                        │                        ├─ too many for ever: post-copy, or give up
//!                        └─ next to none: QEMU stops the guest itself
//! ```
//!
//! Where post-copy is asked for or allowed, QEMU is told to hand the guest over when [`migrate_core::mode`] says so, which
//! stops the guest, too.
//!
//! A pass begins with a look at QEMU's dirty bitmap (migration/ram.c, `migration_bitmap_sync`). Between two such looks
//! as many pages became dirty as are left at the second, and were sent meanwhile, beyond those that were left at the
//! first. Bytes count as they are in the guest's memory, whatever they take on the link: the rate at which QEMU gets
//! rid of them is that of the slowest part of the way.

use std::convert::Infallible;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use migrate_core::convergence::{Config, Convergence, Decision, Observation};
use migrate_core::layout::PAGE_BYTES;
use migrate_core::mode::{self, Measured, choose_mode};
use migrate_core::writes::WriteRate;
use qemu_glue::qmp::{Client, Event, MigrationRam};
use tokio::sync::broadcast;

use crate::args::{Mode, SendArgs};
use crate::error::EngineError;
use crate::failpoint;
use crate::progress::{Progress, Snapshot};
use crate::report::{Report, RoundReport};

/// How often QEMU is asked at least.
const ASK_EVERY: Duration = Duration::from_millis(100);

/// How often it is asked at most: passes become as short as the guest lets them.
const ASK_AT_MOST_EVERY: Duration = Duration::from_millis(10);

/// Time between two rounds in the report, each of which may be several passes.
const ROUND: Duration = Duration::from_millis(200);

/// The part of the downtime allowed that QEMU may take for its last pass without asking here.
const QEMUS_PART: u64 = 5;

/// Least of it in milliseconds. With 1, guests of a plain QEMU 7.2 under TCG arrived with memory that was out of date:
/// 7 of 40, against none of 45 with 30 and 300.
const LIMIT_MS_MIN: u64 = 20;

/// What stopping costs regardless of memory: QEMU's last pass, its device state, loading, two round trips, journals.
const OVERHEAD: Duration = Duration::from_millis(50);

/// QEMU's figures at some time.
#[derive(Debug, Clone, Copy)]
struct Seen {
    at: Instant,
    /// Looks at the dirty bitmap so far.
    syncs: u64,
    /// Pages left to send.
    left: u64,
    /// Pages sent so far.
    sent: u64,
}

impl Seen {
    fn of(ram: &MigrationRam) -> Self {
        Self {
            at: Instant::now(),
            syncs: ram.dirty_sync_count,
            left: ram.remaining / PAGE_BYTES as u64,
            sent: ram.normal + ram.duplicate,
        }
    }

    /// What happened between then and now.
    fn since(&self, then: &Self) -> Observation {
        let interval = self.at - then.at;
        let sent = self.sent.saturating_sub(then.sent);
        let rate = sent as f64 * PAGE_BYTES as f64 / interval.as_secs_f64().max(1e-3);
        Observation {
            dirty_pages: self.left,
            outstanding_bytes: 0,
            goodput_bytes_per_s: (sent > 0).then_some(rate),
            wire_bytes_per_page: PAGE_BYTES as f64,
            dirtied_pages: (self.left + sent).saturating_sub(then.left),
            interval,
            overhead: OVERHEAD,
        }
    }
}

/// When QEMU was told to hand the guest over by post-copy.
pub type Switched = OnceLock<Instant>;

/// Watches QEMU send a guest, and stops the guest.
#[derive(Debug)]
pub struct Steer<'a> {
    client: &'a Client,
    events: broadcast::Receiver<Event>,
    convergence: Convergence,
    mode: Mode,
    writes: WriteRate,
    /// Passes over what was written, the first one over all memory.
    passes: u32,
    max_downtime_ms: u64,
    clock: Instant,
    /// At the last look at the dirty bitmap.
    before: Option<Seen>,
    /// What happened between the last two.
    observed: Option<Observation>,
    /// At the beginning of the round that will be reported.
    round: Option<Seen>,
}

impl<'a> Steer<'a> {
    /// To be made before QEMU begins; `clock` is the migration's origin of time.
    pub fn new(client: &'a Client, args: &SendArgs, mode: Mode, clock: Instant) -> Self {
        let convergence = Convergence::new(Config {
            max_downtime: Duration::from_millis(args.max_downtime_ms),
            patience: Duration::from_secs(args.patience_s),
        });
        let events = client.subscribe();
        let max_downtime_ms = args.max_downtime_ms;
        Self {
            client,
            events,
            convergence,
            mode,
            writes: WriteRate::default(),
            passes: 0,
            max_downtime_ms,
            clock,
            before: None,
            observed: None,
            round: None,
        }
    }

    /// Milliseconds that QEMU may expect of its last pass to stop the guest by itself.
    pub fn limit_ms(&self) -> u64 {
        (self.max_downtime_ms / QEMUS_PART).max(LIMIT_MS_MIN)
    }

    /// Stops the guest when little is left to send, and notes when it stopped. Returns only what keeps it from that.
    pub async fn run(
        &mut self,
        progress: &mut Progress,
        report: &mut Report,
        stopped_at: &mut Option<Instant>,
        switched: &Switched,
    ) -> EngineError {
        match self.try_run(progress, report, stopped_at, switched).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    async fn try_run(
        &mut self,
        progress: &mut Progress,
        report: &mut Report,
        stopped_at: &mut Option<Instant>,
        switched: &Switched,
    ) -> Result<Infallible, EngineError> {
        if self.mode == Mode::PostCopy {
            report.mode = "post-copy";
            self.hand_over(report, stopped_at, switched).await?;
            std::future::pending::<()>().await;
        }
        loop {
            self.wait(stopped_at).await;
            if stopped_at.is_some() {
                break;
            }
            let info = self.client.query_migrate().await?;
            let Some(ram) = info.ram.filter(|ram| ram.dirty_sync_count > 0) else { continue };
            let seen = Seen::of(&ram);
            self.show(&seen, &ram, progress, report);
            let decision = self.judge(seen, report);
            match decision {
                Decision::GiveUp(stall) if self.mode == Mode::PreCopy => {
                    return Err(EngineError::NotConverging(stall));
                }
                Decision::Continue | Decision::GiveUp(_)
                    if let Some(why) = self.why_early(&decision) =>
                {
                    report.mode = "hybrid";
                    progress.say(&format!("post-copy from here: {why}"));
                    report.mode_reason = Some(why);
                    self.hand_over(report, stopped_at, switched).await?;
                    break;
                }
                Decision::Continue => {}
                Decision::GiveUp(stall) => return Err(EngineError::NotConverging(stall)),
                Decision::Stop => {
                    *stopped_at = Some(Instant::now());
                    self.client.stop().await?;
                    failpoint::hit("source-stopped").await;
                    break;
                }
            }
        }
        // The rest is QEMU's and the stream's.
        std::future::pending().await
    }

    /// Has QEMU hand the guest over by post-copy, and notes when it stopped.
    async fn hand_over(
        &mut self,
        report: &mut Report,
        stopped_at: &mut Option<Instant>,
        switched: &Switched,
    ) -> Result<(), EngineError> {
        switched.get_or_init(Instant::now);
        self.client.migrate_start_postcopy().await?;
        while stopped_at.is_none() {
            self.wait(stopped_at).await;
        }
        // What QEMU says before it has switched is what is left then.
        let left = self.client.query_migrate().await?.ram.unwrap_or_default().remaining;
        report.pages.missing = left / PAGE_BYTES as u64;
        failpoint::hit("source-stopped").await;
        Ok(())
    }

    /// Why the guest is to be handed over now, where it is.
    fn why_early(&self, decision: &Decision) -> Option<String> {
        let stalled = matches!(decision, Decision::GiveUp(_));
        if self.passes == 0 {
            return None;
        }
        let seen = self.before?;
        let observed = self.observed?;
        let measured = Measured {
            rounds: self.passes,
            left_pages: seen.left,
            outstanding_bytes: 0,
            writes: self.writes.writes(),
            wire_bytes_per_page: observed.wire_bytes_per_page,
            goodput_bytes_per_s: observed.goodput_bytes_per_s,
            overhead: OVERHEAD,
            max_downtime: Duration::from_millis(self.max_downtime_ms),
            prediction: self.convergence.prediction(),
            stalled,
        };
        let choice = choose_mode(&measured);
        match self.mode {
            Mode::Hybrid => Some("All memory was sent once, as asked".into()),
            Mode::Auto if choice.mode == mode::Mode::Hybrid || stalled => Some(choice.why),
            Mode::Auto | Mode::PreCopy | Mode::PostCopy => None,
        }
    }

    /// Waits until there may be something new; notes that QEMU has stopped the guest.
    async fn wait(&mut self, stopped_at: &mut Option<Instant>) {
        let asked_at = tokio::time::Instant::now();
        let mut next = asked_at + ASK_EVERY;
        loop {
            match tokio::time::timeout_at(next, self.events.recv()).await {
                Ok(Ok(event)) if event.name == "STOP" => {
                    *stopped_at = Some(Instant::now());
                    return;
                }
                Ok(Ok(event)) if event.name == "MIGRATION_PASS" => {
                    next = asked_at + ASK_AT_MOST_EVERY;
                }
                Ok(Ok(_) | Err(broadcast::error::RecvError::Lagged(_))) => {}
                // QEMU is gone, which its connection tells.
                Ok(Err(broadcast::error::RecvError::Closed)) => std::future::pending().await,
                Err(_elapsed) => return,
            }
        }
    }

    fn judge(&mut self, seen: Seen, report: &mut Report) -> Decision {
        let Some(before) = self.before.filter(|before| before.syncs < seen.syncs) else {
            self.before.get_or_insert(seen);
            return Decision::Continue;
        };
        self.before = Some(seen);
        let observed = seen.since(&before);
        self.observed = Some(observed);
        self.passes += 1;
        self.writes.scanned(observed.dirtied_pages, observed.interval);
        let decision = self.convergence.decide(&observed, self.clock.elapsed());
        let began = *self.round.get_or_insert(before);
        if seen.at - began.at >= ROUND || decision != Decision::Continue {
            self.round = Some(seen);
            report.rounds.push(RoundReport {
                round: report.rounds.len() as u32 + 1,
                dirty: observed.dirtied_pages,
                looked: 0,
                sent: seen.sent.saturating_sub(began.sent),
                ms: (seen.at - began.at).as_secs_f64() * 1e3,
                predicted: self.convergence.prediction(),
            });
        }
        decision
    }

    fn show(&self, seen: &Seen, ram: &MigrationRam, progress: &mut Progress, report: &Report) {
        let rate = self.before.map(|before| seen.since(&before));
        progress.show(&Snapshot {
            round: report.rounds.len() as u32 + 1,
            round_pages: seen.left,
            applied_bytes: ram.transferred,
            expected_bytes: ram.transferred + ram.remaining,
            rate_bytes_per_s: rate.and_then(|seen| seen.goodput_bytes_per_s),
            predicted_ms: self.convergence.prediction().map(|predicted| predicted.now_ms),
        });
    }

    /// Looks for a stop of the guest that came with the end of the stream.
    pub fn note_end(&mut self, stopped_at: &mut Option<Instant>) {
        while let Ok(event) = self.events.try_recv() {
            if event.name == "STOP" {
                stopped_at.get_or_insert_with(Instant::now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_dirtied_is_what_is_left_and_was_sent_beyond_what_was_left() {
        let at = Instant::now();
        let then = Seen { at, syncs: 2, left: 1000, sent: 5000 };
        let now = Seen { at: at + Duration::from_millis(500), syncs: 3, left: 400, sent: 6200 };
        let seen = now.since(&then);
        assert_eq!((seen.dirty_pages, seen.dirtied_pages), (400, 600));
        let rate = seen.goodput_bytes_per_s.unwrap();
        assert!((rate - 2400.0 * PAGE_BYTES as f64).abs() < 1.0, "{rate}");
        // Nothing was sent: nothing is known of the rate.
        assert_eq!(then.since(&then).goodput_bytes_per_s, None);
    }
}
