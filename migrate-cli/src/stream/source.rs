//! The source of a guest that its QEMU sends: from the command to the report.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migrate_core::handover::Source;
use qemu_glue::device_state;
use qemu_glue::qmp::Client;
use qemu_glue::vm::VmInventory;
use transport::messages::{Describe, FEATURE_STREAM, Message, Ready, StreamGuest};
use transport::{Closer, Identity, Options, SourceSession};

use super::blocks;
use super::passing::{Passing, is_for};
use super::steer::{Steer, Switched};
use crate::args::{Mode, SendArgs, Switch};
use crate::error::EngineError;
use crate::gateway::channels::Beside;
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
    let mode = possible_mode(args.mode, &found.client).await?;
    if let Some(why) = why {
        eprintln!("by QEMU's stream, not the direct path: {why}");
    }
    if let Some(why) = device_state::lost_writes(&found.client).await? {
        eprintln!("caution: {why}");
    }
    let Found { client, vm, .. } = found;
    let migration = prepare::new_migration()?;
    let mut options = prepare::options(&args.common, prepare::lanes(args.lane_count, mode));
    options.lane_kind = args.lanes.kind();
    options.features = FEATURE_STREAM;
    let To { addr, identity } = to;
    let accept = || accepted(addr, &identity, &options, migration, &vm, mode);
    let (session, mode) = prepare::unless_busy(accept).await?;
    let peer_name = session.peer.name.clone();
    let keep = args.keep_source;
    let journal = prepare::journal(&args.common, &args.to, keep, &vm, migration, &peer_name);
    let journal = match journal {
        Ok(journal) => journal,
        Err(error) => return Err(prepare::closed(session, error).await),
    };
    let SourceSession { control_sender, control_receiver, lanes, closer, .. } = session;
    report.lanes = Some(LaneReport::of(&closer, lanes.len()));
    let gate = Arc::new(Gate::new(args.max_bandwidth));
    let (receiver, words) = control_receiver.sorted(is_for);
    let stream = Link::start(control_sender.clone(), receiver, Arc::clone(&gate), clock);
    let link = Link::start(control_sender, words, Arc::clone(&gate), clock);
    let round_trip = closer.rtt();
    let began = (peer_name, link, closer.clone());
    let contact = Contact::begun((addr, identity), &options, migration, began, vm.status.running);
    let lanes = Some(Lanes { tasks: LaneTasks::start(lanes), gate, round_trip });
    let stream = Some(stream);
    let migration =
        Streaming { args, mode, client, vm, contact, journal, closer, clock, lanes, stream };
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
    if args.verify { refuse("--verify") } else { Ok(()) }
}

/// The mode, as far as the QEMU here goes along with it.
async fn possible_mode(asked: Mode, client: &Client) -> Result<Mode, EngineError> {
    if asked == Mode::PreCopy {
        return Ok(asked);
    }
    match device_state::postcopy_obstacle(client).await? {
        None => Ok(asked),
        Some(why) => without_postcopy(asked, "The guest cannot be handed over by post-copy", &why),
    }
}

/// What is left of a mode where post-copy is not possible.
fn without_postcopy(asked: Mode, what: &str, why: &str) -> Result<Mode, EngineError> {
    if asked == Mode::Auto {
        tracing::info!(why, "post-copy is not possible");
        return Ok(Mode::PreCopy);
    }
    Err(EngineError::Misuse {
        what: format!("{what}: {why}"),
        remedy: "Put that right, or use --mode pre-copy".into(),
    })
}

async fn accepted(
    addr: SocketAddr,
    identity: &Identity,
    options: &Options,
    migration: transport::MigrationId,
    vm: &VmInventory,
    mode: Mode,
) -> Result<(SourceSession, Mode), EngineError> {
    let mut session =
        prepare::connect(addr, identity, options, migration, prepare::RECEIVE).await?;
    let asked = if session.selected.features & FEATURE_STREAM == 0 {
        Err(EngineError::Misuse {
            what: "The destination's engine takes no guests by their QEMU's stream".into(),
            remedy: "Update it there".into(),
        })
    } else {
        let post_copy = mode != Mode::PreCopy;
        let guest = Describe { post_copy, ..prepare::description(vm, blocks(vm)) };
        prepare::ask(&mut session, Message::StreamGuest(StreamGuest { guest })).await
    };
    let what = "The destination cannot run a guest before its pages are there";
    let mode = asked.and_then(|accept| match accept.no_post_copy {
        Some(why) if mode != Mode::PreCopy => without_postcopy(mode, what, &why),
        _ => Ok(mode),
    });
    match mode {
        Ok(mode) => Ok((session, mode)),
        Err(error) => Err(prepare::closed(session, error).await),
    }
}

/// A migration that has left traces: a journal, a session.
struct Streaming<'a> {
    args: &'a SendArgs,
    /// As far as both ends go along with what was asked for.
    mode: Mode,
    client: Client,
    vm: VmInventory,
    contact: Contact,
    journal: Journal,
    closer: Closer,
    clock: Instant,
    /// Until pages leave.
    lanes: Option<Lanes>,
    /// What the session carries of the stream, until it does.
    stream: Option<Link>,
}

impl Streaming<'_> {
    async fn run(mut self, report: &mut Report) {
        let mut progress = Progress::new();
        let mut stopped_at = None;
        let switched = Switched::default();
        let moved = tokio::select! {
            moved = self.move_guest(report, &mut progress, &mut stopped_at, &switched) => moved,
            () = cancel::requested() => Err(EngineError::Cancelled),
        };
        progress.finish();
        let mut moved = match moved {
            Ok(passing) => Ok(passing),
            Err(error) => {
                if switched.get().is_some() {
                    // No commit was sent. Disks may be in use there until this is heard.
                    self.contact.abort(&error).await;
                }
                Err(error)
            }
        };
        failpoint::hit("source-ready").await;
        let ask_for = Duration::from_secs(self.args.ask_s);
        let (client, keep_source) = (Some(&self.client), self.args.keep_source);
        let input = input(&moved);
        let (passing, why) = match &mut moved {
            Ok(passing) => (passing.take(), None),
            Err(error) => (None, Some(&*error)),
        };
        let mut owner = Owner {
            why,
            passing,
            ..Owner::new(client, &mut self.journal, &mut self.contact, ask_for, keep_source)
        };
        let outcome = owner.drive(Source::Moving, input).await;
        let (stuck, is_stranded) = (owner.stuck.take(), owner.is_stranded);
        let passing = owner.passing.take();
        let running_at = self.contact.running_at.unwrap_or_else(Instant::now);
        if let Some(stopped_at) = stopped_at {
            report.downtime_ms = (running_at - stopped_at).as_secs_f64() * 1e3;
        }
        let ended = if switched.get().is_some() { Instant::now() } else { running_at };
        report.total_ms = (ended - self.clock).as_secs_f64() * 1e3;
        if let Some(passing) = passing {
            self.settle(report, passing, switched.get().is_some()).await;
        }
        let wire = self.closer.stats().wire;
        report.bytes.wire = wire.sent + wire.received;
        report.end_of_lanes(&self.closer);
        let Self { client, contact, journal, .. } = self;
        let why = moved.err();
        Ending { client: &client, contact, journal, why, stuck, unserved: None, is_stranded }
            .conclude(report, outcome)
            .await;
    }

    /// What is left to do in QEMU, and to be told.
    async fn settle(&self, report: &mut Report, mut passing: Passing, is_handed_over: bool) {
        let settled = passing.settled(is_handed_over).await;
        let taken = passing.taken();
        note(report, &taken);
        report.pages.urgent = taken.urgent_pages;
        if let Err(error) = settled {
            tracing::debug!(error = error.tell(), "QEMU's migration is not settled");
        }
    }

    /// Has QEMU send its guest until the destination's QEMU has loaded it; its stream may go on after that.
    async fn move_guest(
        &mut self,
        report: &mut Report,
        progress: &mut Progress,
        stopped_at: &mut Option<Instant>,
        switched: &Switched,
    ) -> Result<Option<Passing>, EngineError> {
        let parts = self.lanes.take().zip(self.stream.take());
        let ((lanes, stream), (words, _)) = parts
            .zip(self.contact.session.as_mut())
            .ok_or_else(|| EngineError::Internal("there is no session".into()))?;
        failpoint::hit("source-attaching").await;
        let unused = match self.args.skip_unused {
            Switch::Off => None,
            Switch::On => {
                let found = Streamed::find(&self.client, &self.vm).await;
                skipped_or_told(found, progress, report)
            }
        };
        let mut steer = Steer::new(&self.client, self.args, self.mode, self.clock);
        let may_switch = self.mode != Mode::PreCopy;
        let (outgoing, socket) =
            device_state::begin_stream_out(&self.client, steer.limit_ms(), may_switch).await?;
        let packing = Packing {
            max_bandwidth: self.args.max_bandwidth,
            wanted: self.args.compression.wanted(),
            delta_bytes_max: self.args.delta_cache,
            unused: unused.clone(),
        };
        let socket = QemuSocket::Unix(socket);
        let passage = Passage::new(&packing, lanes, socket, Beside::none());
        let mut passing = Passing::start(passage, stream, outgoing);
        failpoint::hit("source-precopy").await;
        let mut ready = None;
        let steered = {
            let mut steering = pin!(steer.run(progress, report, stopped_at, switched));
            loop {
                tokio::select! {
                    () = passing.over() => break Ok(()),
                    word = words.recv(), if ready.is_none() => {
                        ready = Some(ready_of(word));
                        if switched.get().is_some() || matches!(ready, Some(Err(_))) {
                            break Ok(());
                        }
                    }
                    error = &mut steering => break Err(error),
                    () = tokio::time::sleep(LOAD_WITHIN) => {}
                }
                if switched.get().is_some_and(|at| at.elapsed() > LOAD_WITHIN) {
                    let wanted = "that it is ready";
                    break Err(EngineError::TooSlow { wanted, seconds: LOAD_WITHIN.as_secs() });
                }
            }
        };
        steer.note_end(stopped_at);
        steered?;
        let is_handed_over = switched.get().is_some();
        let ready = match ready {
            Some(Err(error)) => return Err(passing.why_over(error).await),
            Some(Ok(ready)) if is_handed_over => {
                confirm(unused, report).await?;
                ready
            }
            ready => {
                // Without post-copy it is ready when all has been sent.
                if let Err(error) = passing.completed(is_handed_over).await {
                    note(report, &passing.taken());
                    return Err(error);
                }
                confirm(unused, report).await?;
                failpoint::hit("source-state-sent").await;
                match ready {
                    Some(Ok(ready)) => ready,
                    _ => ready_of(words.recv_within("that it is ready", LOAD_WITHIN).await)?,
                }
            }
        };
        // That all pages are in place was confirmed with the last of them, or will be.
        if ready.load_us > 0 {
            report.downtime_parts_ms.insert("load", ready.load_us as f64 / 1e3);
        }
        Ok(Some(passing))
    }
}

/// The guest is stopped: what was left out may be missing at the destination.
async fn confirm(unused: Option<Arc<Streamed>>, report: &mut Report) -> Result<(), EngineError> {
    let Some(unused) = unused else { return Ok(()) };
    report.pages.unused = unused.skipped_pages();
    unused.confirm().await
}

fn ready_of(word: Result<Message, EngineError>) -> Result<Ready, EngineError> {
    match word? {
        Message::Ready(ready) => Ok(ready),
        other => Err(EngineError::OutOfPlace { got: other.name(), wanted: "Ready" }),
    }
}

/// What travelled, for the report.
fn note(report: &mut Report, taken: &Taken) {
    report.bytes.ram = taken.ram_bytes;
    report.pages.total = taken.ram_bytes / migrate_core::layout::PAGE_BYTES as u64;
    report.add(&taken.counts);
}
