//! A split guest leaves for another main host: its memory servers keep what they have, and get what only this host
//! has; the guest's new pager finds all of it there.
//!
//! ```text
//!   session ─► [servers join] ─► room ─► granted ─► told of the stores ─► journal ─► flush while it runs ─► stop ─┐
//!     ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────┘
//!     └► device state, last pages ─► what lies where ─► load ─► ready ─► hand-over ─► gone
//!                                                                           └───────► paged here as before
//! ```
//!
//! Invariants: while it is told what lies where, and until it is known who has the guest, this pager changes nothing
//! on any server; should the guest stay, its memory here and there is what it was.

mod flush;
mod prepare;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migrate_core::error::GuestPlace;
use migrate_core::handover::source::Input;
use migrate_core::handover::{Outcome, Source};
use migrate_core::page_table::SourcePages;
use qemu_glue::qmp::Client;
use tokio::sync::oneshot;
use transport::messages::{Message, Split, Sync};
use transport::{Closer, LaneSender};

use super::{Shared, Watched};
use crate::args::CommonArgs;
use crate::error::EngineError;
use crate::failpoint;
use crate::journal::Journal;
use crate::pager_socket::Leave;
use crate::report::{LaneReport, Report, ReportOutcome};
use crate::source::contact::Contact;
use crate::source::early;
use crate::source::handover::{Owner, place};
use crate::source::prepare::{Guest, check_ram_unchanged};
use crate::source::switch::{self, part};

/// Where this pager is at home.
#[derive(Debug, Clone)]
pub struct Home {
    /// What commands of this host ask it over.
    pub socket: PathBuf,
    /// The VM and this host, as `migrate receive` was told.
    pub common: CommonArgs,
    /// Whose metrics are told.
    pub watched: Watched,
}

/// Somebody asks for a guest to leave.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) asked: Leave,
    /// Whether whoever asked still wants it.
    pub(super) cancel: Cancel,
    /// What became of it.
    pub(super) done: oneshot::Sender<Box<Report>>,
}

/// Tells when whoever asked for something is gone, or wants it no more.
#[derive(Debug)]
pub(super) struct Cancel(Option<oneshot::Receiver<()>>);

impl Cancel {
    /// One that comes when the other end of the channel is used or dropped.
    pub(super) fn new(receiver: oneshot::Receiver<()>) -> Self {
        Self(Some(receiver))
    }

    /// Returns when it is cancelled. Cancel-safe.
    pub(super) async fn requested(&mut self) {
        if let Some(receiver) = &mut self.0 {
            let _used_or_dropped = receiver.await;
            self.0 = None;
        }
    }

    fn check(&mut self) -> Result<(), EngineError> {
        let waits = |receiver: &mut oneshot::Receiver<()>| {
            receiver.try_recv() == Err(oneshot::error::TryRecvError::Empty)
        };
        match self.0.as_mut().is_some_and(waits) {
            true => Ok(()),
            false => {
                self.0 = None;
                Err(EngineError::Cancelled)
            }
        }
    }

    /// Does what can be dropped at any time, unless it is cancelled.
    async fn unless<T>(
        &mut self,
        work: impl Future<Output = Result<T, EngineError>>,
    ) -> Result<T, EngineError> {
        tokio::select! {
            done = work => done,
            () = self.requested() => Err(EngineError::Cancelled),
        }
    }
}

/// Whether the guest is still here.
#[derive(Debug)]
pub(super) enum Left {
    /// It runs elsewhere. The journal of that may go once nothing says any more that it is paged here.
    Gone(Box<Journal>),
    /// It is paged here as before.
    Here,
    /// That is not known; it stands still here.
    InDoubt,
}

/// Lets the guest go; everything that happens is in the report.
pub(super) async fn leave(
    shared: &Arc<Shared>,
    client: &Client,
    home: &Home,
    asked: &Leave,
    cancel: &mut Cancel,
) -> (Left, Report) {
    let clock = Instant::now();
    let mut report = Report::begin(&shared.vm);
    report.mode = "split";
    let left = match course(shared, client, home, asked, (&mut report, clock), cancel).await {
        Ok(left) => left,
        Err(error) => {
            report.fail(&error, place(Some(client)).await, GuestPlace::Unknown);
            Left::Here
        }
    };
    if report.outcome != ReportOutcome::Completed {
        report.total_ms = clock.elapsed().as_secs_f64() * 1e3;
    }
    (left, report)
}

/// An error means that nothing was touched but rooms on servers.
async fn course(
    shared: &Arc<Shared>,
    client: &Client,
    home: &Home,
    asked: &Leave,
    (report, clock): (&mut Report, Instant),
    cancel: &mut Cancel,
) -> Result<Left, EngineError> {
    // No server joins or is emptied for another reason meanwhile.
    let _alone = cancel.unless(async { Ok(shared.ordering.lock().await) }).await?;
    let rooms = shared.begin_leaving()?;
    let left = match Box::pin(prepare::begin(shared, client, home, asked, cancel)).await {
        Ok(begun) => Ok(begun.run(report, clock, cancel).await),
        Err(error) => Err(error),
    };
    if matches!(left, Ok(Left::Here) | Err(_)) {
        shared.end_leaving(rooms);
    }
    left
}

/// A guest whose new main host is ready for it.
struct Leaving<'a> {
    shared: &'a Arc<Shared>,
    asked: &'a Leave,
    /// What the new main host was told of the guest's memory.
    told: Split,
    guest: Guest,
    contact: Contact,
    journal: Journal,
    closer: Closer,
    /// Nothing goes over them, but the session has them.
    lanes: Vec<LaneSender>,
}

impl Leaving<'_> {
    async fn run(mut self, report: &mut Report, clock: Instant, cancel: &mut Cancel) -> Left {
        report.lanes = Some(LaneReport::of(&self.closer, self.lanes.len()));
        let mut stopped_at = None;
        let moved = cancel.unless(self.move_guest(report, &mut stopped_at)).await;
        failpoint::hit("leave-ready").await;
        let input = match &moved {
            Ok(()) => Input::Ready { agrees: true },
            Err(error) if error.is_lost_contact() => Input::Lost,
            Err(EngineError::PeerAborted { .. }) => Input::PeerAborted,
            Err(_) => Input::Cancel,
        };
        let error = moved.err();
        if error.is_some() {
            // It was never handed over. Before it runs, its disks count as busy again.
            self.shared.page_on();
        }
        let ask_for = Duration::from_secs(self.asked.ask_s);
        let client = Some(&self.guest.client);
        let mut owner = Owner {
            why: error.as_ref(),
            ..Owner::new(client, &mut self.journal, &mut self.contact, ask_for, false)
        };
        let outcome = owner.drive(Source::Moving, input).await;
        let stuck = owner.stuck.take();
        if let Some(stopped_at) = stopped_at {
            let running_at = self.contact.running_at.unwrap_or_else(Instant::now);
            report.downtime_ms = (running_at - stopped_at).as_secs_f64() * 1e3;
            report.total_ms = (running_at - clock).as_secs_f64() * 1e3;
        }
        self.conclude(report, outcome, error, stuck).await
    }

    async fn conclude(
        mut self,
        report: &mut Report,
        outcome: Outcome,
        error: Option<EngineError>,
        stuck: Option<EngineError>,
    ) -> Left {
        let wire = self.closer.stats().wire;
        report.bytes.wire += wire.sent + wire.received;
        report.end_of_lanes(&self.closer);
        let client = Some(&self.guest.client);
        match outcome {
            Outcome::Completed => {
                report.outcome = ReportOutcome::Completed;
                self.contact.close("done").await;
                Left::Gone(Box::new(self.journal))
            }
            Outcome::RolledBack => {
                self.shared.page_on();
                let error = error.unwrap_or_else(refused_late);
                self.contact.abort(&error).await;
                if let Some(peer) = self.contact.options.expected_peer.take() {
                    self.shared.revoke([peer]);
                }
                let error = match stuck {
                    None => {
                        self.journal.remove();
                        error
                    }
                    // The next pager can try again with the journal.
                    Some(stuck) => EngineError::Stuck {
                        qmp: self.journal.entry().qmp.clone(),
                        why: error.tell(),
                        source: Box::new(stuck),
                    },
                };
                report.fail(&error, place(client).await, GuestPlace::Incoming);
                Left::Here
            }
            Outcome::InDoubt => {
                let error = EngineError::InDoubt { qmp: self.journal.entry().qmp.clone() };
                report.fail(&error, place(client).await, GuestPlace::Unknown);
                Left::InDoubt
            }
        }
    }

    /// Brings everything to the servers, stops the guest and has it loaded at its new main host.
    async fn move_guest(
        &mut self,
        report: &mut Report,
        stopped_at: &mut Option<Instant>,
    ) -> Result<(), EngineError> {
        let Self { shared, asked, told, guest, contact, lanes, .. } = self;
        let Some((link, _)) = &mut contact.session else {
            return Err(EngineError::Internal("there is no session".into()));
        };
        failpoint::hit("leave-flushing").await;
        let before = shared.traffic.bytes().0;
        flush::flush(shared, asked, link).await?;
        early::prepare_for_faults(link).await?;
        let saving = switch::begin(&shared.ram, guest, link).await?;
        *stopped_at = Some(Instant::now());
        let stopped = async {
            let stopping = Instant::now();
            guest.client.stop().await?;
            part(report, "stop", stopping);
            failpoint::hit("leave-stopped").await;
            let began = Instant::now();
            let ahead_bytes = saving.ahead().len();
            let (saved, flushed) = tokio::join!(saving.finish(), shared.flush_last());
            flushed?;
            let (state, settling) = saved?;
            // What saving wrote, if anything.
            shared.flush_last().await?;
            part(report, "device_state_save", began);
            report.bytes.device_state = state.bytes.len() as u64;
            failpoint::hit("leave-flushed").await;
            let began = Instant::now();
            switch::send_state(link, &state.bytes, ahead_bytes).await?;
            let digest = SourcePages::new(shared.layout().pages(), false, 0).digest();
            link.send(Message::Sync(Sync { sequence: 1, batches: vec![0; lanes.len()] })).await?;
            report.split = Some(flush::tell(shared, told, link).await?);
            switch::load(link, digest, &state.bytes).await?;
            switch::synced(link, digest).await?;
            failpoint::hit("leave-state-sent").await;
            let ready = switch::ready(link, digest, report);
            tokio::try_join!(ready, check_ram_unchanged(guest))?;
            settling.settled().await?;
            part(report, "transfer_and_load", began);
            Ok(())
        };
        let dead_peer = contact.options.dead_peer;
        let done = switch::in_time(dead_peer, asked.max_downtime_ms, stopped).await;
        let sent = shared.traffic.bytes().0.saturating_sub(before);
        report.bytes.wire += sent;
        if let Some(split) = &mut report.split {
            split.to_servers_bytes = sent;
        }
        done
    }
}

/// The destination took everything and then would not have the guest.
fn refused_late() -> EngineError {
    EngineError::PeerAborted {
        code: transport::messages::AbortCode::Internal,
        text: "the destination refused the guest after the hand-over".into(),
    }
}
