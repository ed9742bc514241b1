//! The source of a guest that its QEMU sends: from the command to the report.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migrate_core::handover::Source;
use qemu_glue::device_state::{self, Outgoing, Settling};
use qemu_glue::qmp::Client;
use qemu_glue::vm::VmInventory;
use transport::messages::{FEATURE_STREAM, Message, StreamGuest};
use transport::{Closer, Identity, Options, SourceSession, close_code};

use super::blocks;
use super::steer::Steer;
use crate::args::{Mode, SendArgs, Switch};
use crate::error::EngineError;
use crate::gateway::channels::{Beside, Kind};
use crate::gateway::intake::Taken;
use crate::gateway::passage::{Lanes, Packing, Passage};
use crate::gateway::socket::QemuSocket;
use crate::journal::Journal;
use crate::progress::Progress;
use crate::report::{LaneReport, Report};
use crate::source::conclude::Ending;
use crate::source::contact::Contact;
use crate::source::gate::Gate;
use crate::source::handover::Owner;
use crate::source::lanes::LaneTasks;
use crate::source::link::Link;
use crate::source::prepare::{self, Found};
use crate::source::switch::LOAD_WITHIN;
use crate::source::unused::streamed::Streamed;
use crate::source::{input, skipped_or_told};
use crate::{cancel, failpoint};

/// Longest wait for QEMU to say how its migration ended, once its stream has.
const ENDS_WITHIN: Duration = Duration::from_secs(10);

/// Where the guest is to go.
#[derive(Debug)]
pub struct To {
    /// The destination.
    pub addr: SocketAddr,
    /// Our identity.
    pub identity: Arc<Identity>,
}

/// Sends a guest through its QEMU; `why` says why not by the direct path. Errors mean that nothing was touched.
///
/// # Errors
/// What is asked for and not possible, what the destination says against it, or that it cannot be recorded.
pub async fn send(
    args: &SendArgs,
    found: Found,
    to: To,
    why: Option<String>,
    report: &mut Report,
    clock: Instant,
) -> Result<(), EngineError> {
    report.path = "stream";
    check_asked(args, why.as_deref())?;
    if let Some(why) = why {
        eprintln!("by QEMU's stream, not the direct path: {why}");
    }
    let Found { client, vm, .. } = found;
    let migration = prepare::new_migration()?;
    let mut options =
        prepare::options(&args.common, prepare::lanes(args.lane_count, Mode::PreCopy));
    options.lane_kind = args.lanes.kind();
    options.features = FEATURE_STREAM;
    let To { addr, identity } = to;
    let accept = || accepted(addr, &identity, &options, migration, &vm);
    let session = prepare::unless_busy(accept).await?;
    let peer_name = session.peer.name.clone();
    let keep = args.keep_source;
    let journal = prepare::journal(&args.common, &args.to, keep, &vm, migration, &peer_name);
    let journal = match journal {
        Ok(journal) => journal,
        Err(error) => {
            session.close(close_code::ABORTED, &error.tell()).await;
            return Err(error);
        }
    };
    let SourceSession { control_sender, control_receiver, lanes, closer, .. } = session;
    report.lanes = Some(LaneReport::of(&closer, lanes.len()));
    let gate = Arc::new(Gate::new(args.max_bandwidth));
    let link = Link::start(control_sender, control_receiver, Arc::clone(&gate), clock);
    let round_trip = closer.rtt();
    // Whoever else of the authority answers at this address later is not believed.
    let options = Options { expected_peer: Some(peer_name), ..options };
    let contact = Contact {
        addr,
        identity,
        options,
        migration,
        session: Some((link, closer.clone())),
        resume: vm.status.running,
        running_at: None,
    };
    let lanes = Some(Lanes { tasks: LaneTasks::start(lanes), gate, round_trip });
    let migration = Streaming { args, client, vm, contact, journal, closer, clock, lanes };
    migration.run(report).await;
    Ok(())
}

/// What only the direct path can do.
fn check_asked(args: &SendArgs, why: Option<&str>) -> Result<(), EngineError> {
    let refuse = |what: &str| {
        let because = why.map(|why| format!(" ({why})")).unwrap_or_default();
        Err(EngineError::Misuse {
            what: format!("{what} is not possible by QEMU's stream{because}"),
            remedy: "Leave it out, or give the VM shared RAM (memory-backend-file,share=on) and use --path direct"
                .into(),
        })
    };
    match args.mode {
        Mode::PostCopy | Mode::Hybrid => refuse("Post-copy with `migrate send`"),
        Mode::Auto | Mode::PreCopy if args.verify => refuse("--verify"),
        Mode::Auto | Mode::PreCopy => Ok(()),
    }
}

async fn accepted(
    addr: SocketAddr,
    identity: &Identity,
    options: &Options,
    migration: transport::MigrationId,
    vm: &VmInventory,
) -> Result<SourceSession, EngineError> {
    let mut session =
        prepare::connect(addr, identity, options, migration, prepare::RECEIVE).await?;
    let asked = if session.selected.features & FEATURE_STREAM == 0 {
        Err(EngineError::Misuse {
            what: "The destination's engine takes no guests by their QEMU's stream".into(),
            remedy: "Update it there".into(),
        })
    } else {
        let guest = prepare::description(vm, blocks(vm));
        prepare::ask(&mut session, Message::StreamGuest(StreamGuest { guest })).await
    };
    match asked {
        Ok(_) => Ok(session),
        Err(error) => {
            session.close(close_code::ABORTED, &error.tell()).await;
            Err(error)
        }
    }
}

/// A migration that has left traces: a journal, a session.
struct Streaming<'a> {
    args: &'a SendArgs,
    client: Client,
    vm: VmInventory,
    contact: Contact,
    journal: Journal,
    closer: Closer,
    clock: Instant,
    /// Until pages leave.
    lanes: Option<Lanes>,
}

impl Streaming<'_> {
    async fn run(mut self, report: &mut Report) {
        let mut progress = Progress::new();
        let mut stopped_at = None;
        let moved = tokio::select! {
            moved = self.move_guest(report, &mut progress, &mut stopped_at) => moved,
            () = cancel::requested() => Err(EngineError::Cancelled),
        };
        progress.finish();
        failpoint::hit("source-ready").await;
        let ask_for = Duration::from_secs(self.args.ask_s);
        let (client, keep_source) = (Some(&self.client), self.args.keep_source);
        let mut owner = Owner {
            why: moved.as_ref().err(),
            ..Owner::new(client, &mut self.journal, &mut self.contact, ask_for, keep_source)
        };
        let outcome = owner.drive(Source::Moving, input(&moved)).await;
        let stuck = owner.stuck.take();
        let ended = self.contact.running_at.unwrap_or_else(Instant::now);
        if let Some(stopped_at) = stopped_at {
            report.downtime_ms = (ended - stopped_at).as_secs_f64() * 1e3;
        }
        report.total_ms = (ended - self.clock).as_secs_f64() * 1e3;
        let why = match moved {
            Ok(settling) => {
                if let Err(error) = settling.settled().await {
                    tracing::debug!(%error, "migration settings not put back");
                }
                None
            }
            Err(error) => Some(error),
        };
        let wire = self.closer.stats().wire;
        report.bytes.wire = wire.sent + wire.received;
        report.end_of_lanes(&self.closer);
        let Self { client, contact, journal, .. } = self;
        Ending { client: &client, contact, journal, why, stuck, unserved: None }
            .conclude(report, outcome)
            .await;
    }

    /// Has QEMU send its guest until the destination's QEMU has loaded it.
    async fn move_guest(
        &mut self,
        report: &mut Report,
        progress: &mut Progress,
        stopped_at: &mut Option<Instant>,
    ) -> Result<Settling, EngineError> {
        let parts = self.contact.session.as_mut().zip(self.lanes.take());
        let ((link, _), lanes) =
            parts.ok_or_else(|| EngineError::Internal("there is no session".into()))?;
        failpoint::hit("source-attaching").await;
        let unused = match self.args.skip_unused {
            Switch::Off => None,
            Switch::On => {
                let found = Streamed::find(&self.client, &self.vm).await;
                skipped_or_told(found, progress, report)
            }
        };
        let mut steer = Steer::new(&self.client, self.args, self.clock);
        let (outgoing, socket) =
            device_state::begin_stream_out(&self.client, steer.limit_ms()).await?;
        let packing = Packing {
            max_bandwidth: self.args.max_bandwidth,
            wanted: self.args.compression.wanted(),
            delta_bytes_max: self.args.delta_cache,
            unused: unused.clone(),
        };
        let socket = QemuSocket::Unix(socket);
        let mut passage = Passage::new(&packing, lanes, socket, Beside::none());
        failpoint::hit("source-precopy").await;
        let (taken, passed) = tokio::select! {
            passed = passage.pass(link, Kind::Stream) => passed,
            error = steer.run(progress, report, stopped_at) => (Taken::default(), Err(error)),
        };
        steer.note_end(stopped_at);
        drop(passage);
        note(report, &taken);
        let settling = completed(outgoing, passed).await?;
        if let Some(unused) = unused {
            report.pages.unused = unused.skipped_pages();
            unused.confirm().await?;
        }
        failpoint::hit("source-state-sent").await;
        match link.recv_within("that it is ready", LOAD_WITHIN).await? {
            // That all pages are in place was confirmed with the last of them.
            Message::Ready(ready) => {
                report.downtime_parts_ms.insert("load", ready.load_us as f64 / 1e3);
                Ok(settling)
            }
            other => Err(EngineError::OutOfPlace { got: other.name(), wanted: "Ready" }),
        }
    }
}

/// Waits for QEMU to say how its migration ended. Where its connection is what went wrong, it knows why.
async fn completed(
    outgoing: Outgoing,
    passed: Result<(), EngineError>,
) -> Result<Settling, EngineError> {
    if let Err(error) = passed {
        let is_qemus = matches!(error, EngineError::QemuSocket(_) | EngineError::Stream(_));
        if !is_qemus {
            return Err(error);
        }
        return match tokio::time::timeout(ENDS_WITHIN, outgoing.completed()).await {
            Ok(Err(why)) => Err(why.into()),
            Ok(Ok(_)) | Err(_) => Err(error),
        };
    }
    let ended = tokio::time::timeout(ENDS_WITHIN, outgoing.completed()).await;
    let late = |_| EngineError::TooSlow {
        wanted: "that QEMU ends its migration",
        seconds: ENDS_WITHIN.as_secs(),
    };
    Ok(ended.map_err(late)??)
}

/// What travelled, for the report.
fn note(report: &mut Report, taken: &Taken) {
    report.bytes.ram = taken.ram_bytes;
    report.pages.total = taken.ram_bytes / migrate_core::layout::PAGE_BYTES as u64;
    report.add(&taken.counts);
}
