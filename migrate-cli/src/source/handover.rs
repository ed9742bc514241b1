//! Carries out the source's side of the hand-over: journal, messages, QEMU.
//!
//! The decisions are [`migrate_core::handover::Source`]'s; this module only does what it says. It
//! serves the ordinary hand-over, the recovery of an interrupted one, and `migrate resolve`.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use migrate_core::error::GuestPlace;
use migrate_core::handover::source::{Input, Output};
use migrate_core::handover::{DestinationState, Outcome, Source};
use qemu_glue::device_state;
use qemu_glue::qmp::{Client, QmpError};
use transport::messages::{FaultStats, Message};

use super::contact::Contact;
use super::serve::Server;
use crate::error::EngineError;
use crate::journal::{Journal, Record};
use crate::progress::Progress;
use crate::stream::passing::Passing;
use crate::{cancel, failpoint};

/// Time that QEMU may take to wind up a migration of its own.
const WIND_UP: Duration = Duration::from_secs(5);

/// How long a destination may take to notice that it is to give back the disks of a guest that was on its way by
/// post-copy: its QEMU takes them when it loads (7.2), and is quit.
const DISKS_WITHIN: Duration = Duration::from_secs(15);

/// How long a destination that fetches pages is sought after contact is lost: without these pages
/// the guest is lost.
const SERVE_FOR: Duration = Duration::from_secs(600);

/// Pause before another session is tried.
const SERVE_AGAIN_AFTER: Duration = Duration::from_millis(300);

/// How often progress is shown.
const TICK: Duration = Duration::from_millis(100);

/// Everything that the hand-over acts on.
#[derive(Debug)]
pub struct Owner<'a> {
    /// QEMU's monitor; nothing if QEMU is gone.
    pub client: Option<&'a Client>,
    /// The migration's journal.
    pub journal: &'a mut Journal,
    /// The destination.
    pub contact: &'a mut Contact,
    /// How long to ask before the outcome is in doubt.
    pub ask_for: Duration,
    /// Serves missing pages after the hand-over (post-copy).
    pub server: Option<&'a mut Server>,
    /// The stream of a guest that its QEMU serves itself (post-copy), or that is through.
    pub passing: Option<Passing>,
    /// Whether the destination was heard to run the guest and to lack pages that cannot be served.
    pub is_stranded: bool,
    /// Whether the destination was heard to fetch them.
    pub has_served: bool,
    /// Leave QEMU paused after success instead of quitting it.
    pub keep_source: bool,
    /// Why the migration is undone, to tell the destination.
    pub why: Option<&'a EngineError>,
    /// What the destination said of the guest's faults.
    pub faults: Option<FaultStats>,
    /// Why the guest, which belongs here, could not be resumed.
    pub stuck: Option<EngineError>,
}

impl<'a> Owner<'a> {
    /// An owner that serves no pages and has nothing to complain of.
    pub fn new(
        client: Option<&'a Client>,
        journal: &'a mut Journal,
        contact: &'a mut Contact,
        ask_for: Duration,
        keep_source: bool,
    ) -> Self {
        Self {
            client,
            journal,
            contact,
            ask_for,
            server: None,
            passing: None,
            is_stranded: false,
            has_served: false,
            keep_source,
            why: None,
            faults: None,
            stuck: None,
        }
    }
}

impl Owner<'_> {
    /// Drives the hand-over from `state`, which `input` has just reached, to its end.
    pub async fn drive(&mut self, state: Source, input: Input) -> Outcome {
        let (mut state, outputs) = state.handle(input);
        let mut todo = VecDeque::from(outputs);
        let mut asking_since = None;
        loop {
            let input = match (todo.pop_front(), state) {
                (Some(output), _) => self.carry_out(output, &mut asking_since).await,
                (None, Source::Ended(outcome)) => return outcome,
                (None, Source::Serving) => Some(self.serve(&mut asking_since).await),
                (None, _) => Some(self.contact.hear().await),
            };
            if let Some(input) = input {
                let (next, more) = state.handle(input);
                tracing::debug!(?state, ?input, ?next, "hand-over");
                state = next;
                todo.extend(more);
            }
        }
    }

    async fn carry_out(
        &mut self,
        output: Output,
        asking_since: &mut Option<Instant>,
    ) -> Option<Input> {
        match output {
            Output::Record(record) => {
                failpoint::hit("source-recording").await;
                let written = self.journal.record(Record::Source(record));
                failpoint::hit("source-recorded").await;
                Some(match written {
                    Ok(()) => Input::Recorded,
                    Err(error) => {
                        tracing::error!(%error, "hand-over not recorded");
                        Input::RecordFailed
                    }
                })
            }
            Output::SendCommit => {
                let lost = self.contact.commit().await;
                failpoint::hit("source-committed").await;
                lost
            }
            Output::SendAbort => {
                let cancelled = EngineError::Cancelled;
                self.contact.abort(self.why.unwrap_or(&cancelled)).await;
                None
            }
            Output::Ask => {
                let since = *asking_since.get_or_insert_with(Instant::now);
                let patience = if self.has_served { SERVE_FOR } else { self.ask_for };
                Some(self.ask(since + patience).await)
            }
            Output::ResumeGuest => {
                self.resume().await;
                None
            }
            Output::ReleaseGuest => {
                failpoint::hit("source-releasing").await;
                self.release().await;
                None
            }
        }
    }

    /// Asks what became of the guest; if it fetches pages, goes on serving them.
    async fn ask(&mut self, deadline: Instant) -> Input {
        let heard = self.contact.ask(deadline).await;
        let fetching = heard == Input::Verdict(DestinationState::Fetching);
        let Some(server) = self.server.as_mut().filter(|_| fetching) else {
            self.is_stranded |= fetching;
            return match heard {
                // Who only asks cannot serve.
                Input::Verdict(DestinationState::Fetching) => Input::GiveUpAsking,
                heard => heard,
            };
        };
        match server.resume(self.contact).await {
            Ok(()) => heard,
            Err(error) if Instant::now() < deadline => {
                tracing::info!(error = %error.tell(), "missing pages are not served yet");
                tokio::time::sleep(SERVE_AGAIN_AFTER).await;
                Input::Lost
            }
            Err(error) => {
                tracing::warn!(error = %error.tell(), "missing pages are not served");
                Input::GiveUpAsking
            }
        }
    }

    /// Serves missing pages until the destination has them all, or contact is lost.
    async fn serve(&mut self, asking_since: &mut Option<Instant>) -> Input {
        if let Some(passing) = &mut self.passing {
            failpoint::hit("source-serving").await;
            return passing.serve(self.contact).await;
        }
        let Some(server) = &mut self.server else { return Input::GiveUpAsking };
        if !server.push() {
            // The commit went over a session that carries no pages.
            return Input::Lost;
        }
        self.has_served = true;
        *asking_since = None;
        failpoint::hit("source-serving").await;
        let mut progress = Progress::new();
        loop {
            let said = tokio::select! {
                said = self.contact.next() => said,
                () = cancel::requested() => {
                    progress.say(
                        "the guest runs at the destination and needs its memory from here: going on \
                         until all of it is over",
                    );
                    continue;
                }
                () = tokio::time::sleep(TICK) => {
                    progress.fetching(server.feed().unsent_pages(), self.contact.applied_bytes());
                    continue;
                }
            };
            let over = match said {
                Ok(Message::VerifyChunk(chunk)) => server.compare(chunk).await.err(),
                Ok(Message::VerifyEnd(_)) => None,
                Ok(Message::Running(running)) => {
                    self.faults = running.faults;
                    progress.finish();
                    return Input::Verdict(DestinationState::Running);
                }
                Ok(Message::Verdict(verdict)) => return Input::Verdict(verdict.state),
                Ok(other) => Some(EngineError::OutOfPlace { got: other.name(), wanted: "Running" }),
                Err(error) => Some(error),
            };
            if let Some(error) = over {
                progress.finish();
                eprintln!("{}; the guest waits for missing pages, contact is sought", error.tell());
                return Input::Lost;
            }
        }
    }

    /// Lets the guest run here again; a failure is kept in `stuck`.
    pub async fn resume(&mut self) {
        // QEMU sends nothing more, and is told nothing more.
        drop(self.passing.take());
        if let Some(client) = self.client
            && let Err(error) = take_back(client, self.journal.entry().was_running).await
        {
            tracing::error!(error = %error.tell(), "the guest could not be resumed here");
            self.stuck = Some(error);
        }
    }

    /// Quits the QEMU that the guest has left, unless it is to stay. One whose guest runs is never
    /// quit: then somebody said what is not so.
    pub async fn release(&self) {
        if let Some(client) = self.client.filter(|_| !self.keep_source) {
            quit_left(client).await;
        }
    }
}

/// Quits a QEMU that its guest has left, unless a guest runs in it.
pub async fn quit_left(client: &Client) {
    match client.query_status().await {
        Ok(status) if status.running => {
            tracing::error!("the guest runs here; its QEMU is not quit");
        }
        Ok(_) if device_state::is_in_postcopy(client).await.unwrap_or(true) => {
            tracing::error!("the guest's memory is here and may be needed; its QEMU is not quit");
        }
        Ok(_) => {
            if let Err(error) = client.quit().await {
                tracing::warn!(%error, "the source's QEMU was not quit");
            }
        }
        Err(error) => tracing::warn!(%error, "the source's QEMU was not quit"),
    }
}

/// Brings the guest back to what it was: no migration in QEMU, capabilities restored, running if it
/// ran, its addresses announced, and the run state read back. The guest belongs here: also one that was on its way by
/// post-copy is taken back.
///
/// # Errors
/// If QEMU refuses or does not come to the state wanted.
pub async fn take_back(client: &Client, was_running: bool) -> Result<(), EngineError> {
    let since = Instant::now();
    let may_switch = client.capabilities().await?.get("postcopy-ram") == Some(&true);
    let mut disks_within = Duration::ZERO;
    loop {
        let info = client.query_migrate().await?;
        let Some(status) = info.status.filter(|status| !status.is_over()) else { break };
        if device_state::is_postcopy(&status) {
            device_state::leave_postcopy(client).await?;
            disks_within = DISKS_WITHIN;
            continue;
        }
        if since.elapsed() >= WIND_UP {
            break;
        }
        // A command that meets post-copy would do harm.
        if !may_switch || since.elapsed() >= WIND_UP / 2 {
            let _may_be_over_already = client.migrate_cancel().await;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    if let Err(error) = device_state::restore_capabilities(client).await {
        tracing::warn!(%error, "migration settings not restored");
    }
    if !was_running {
        return Ok(());
    }
    let mut status = client.query_status().await?;
    if !status.running {
        resume_with_disks(client, disks_within).await?;
        status = client.query_status().await?;
        if let Err(error) = client.announce_self().await {
            tracing::debug!(%error, "addresses not announced");
        }
    }
    if !status.running {
        let found = status.state.to_string();
        return Err(EngineError::RunState { found, wanted: "running" });
    }
    Ok(())
}

/// Lets the guest run; for as long as `within`, disks may be in use by the QEMU that was to take it.
async fn resume_with_disks(client: &Client, within: Duration) -> Result<(), EngineError> {
    let until = Instant::now() + within;
    loop {
        match client.cont().await {
            Err(QmpError::Command { desc, .. }) if Instant::now() < until => {
                tracing::info!(desc, "the guest cannot be resumed yet");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            resumed => return Ok(resumed?),
        }
    }
}

/// What the source's guest is doing, as read back from QEMU.
pub async fn place(client: Option<&Client>) -> GuestPlace {
    let Some(client) = client else { return GuestPlace::Gone };
    match client.query_status().await {
        Ok(status) => status.place(),
        Err(error) if error.is_closed() => GuestPlace::Gone,
        Err(_) => GuestPlace::Unknown,
    }
}
