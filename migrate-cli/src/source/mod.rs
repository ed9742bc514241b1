//! The source of a migration: from the command to the report.
//!
//! ```text
//!   prepare ─► session, describe ─► journal ─► attach ─► rounds ─► switch ─► hand over ─► report
//!      │               │               │          └────────┴─────────┴─► take back ─────► report
//!      └───────────────┴───────────────┴──► nothing was touched ────────────────────────► report
//! ```
//!
//! With post-copy the guest is handed over while pages are missing, which are served afterwards
//! ([`early`], [`serve`]).

pub mod answering;
pub mod buffers;
pub mod conclude;
pub mod contact;
pub mod early;
pub mod feed;
pub mod gate;
pub mod handover;
pub mod lanes;
pub mod link;
pub mod outlet;
pub mod prepare;
pub mod pump;
pub mod recover;
pub mod rounds;
pub mod serve;
pub mod split;
pub mod switch;
pub mod unused;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use migrate_core::convergence::Config;
use migrate_core::error::GuestPlace;
use migrate_core::handover::source::Input;
use migrate_core::handover::{Outcome, Source};
use migrate_core::layout::PAGE_BYTES;
use migrate_core::page_table::SourcePages;
use migrate_core::pageset::PageSet;
use migrate_core::precopy::{Precopy, PrecopyConfig};
use qemu_glue::qmp::Client;
use qemu_glue::track::DirtyTracker;
use transport::messages::FEATURE_SPLIT;
use transport::{Closer, Identity, LaneSender, MigrationId, SourceSession};

use self::answering::UrgentLane;
use self::conclude::Ending;
use self::contact::Contact;
use self::early::Stopped;
use self::feed::Feed;
use self::gate::Gate;
use self::handover::{Owner, place};
use self::lanes::LaneTasks;
use self::link::Link;
use self::outlet::PumpError;
use self::prepare::{Accepted, Asked, Guest, GuestPath};
use self::pump::Pump;
use self::rounds::{Ended, Mover};
use self::serve::Server;
use self::split::{Room, Split};
use self::unused::Unused;
use crate::args::{Mode, PageOrder, PathChoice, SendArgs, SplitArgs, Switch};
use crate::blocking::{on_thread, worker_threads};
use crate::error::EngineError;
use crate::journal::Journal;
use crate::progress::Progress;
use crate::report::{LaneReport, Report, ReportOutcome, VerifyReport};
use crate::{attaching, cancel, failpoint, random, stream};

/// Migrates a guest as asked; everything that happens is in the report.
pub async fn send(args: &SendArgs) -> Report {
    migrate(args, None).await
}

/// Migrates a guest whose memory is split; everything that happens is in the report.
pub async fn split(args: &SplitArgs) -> Report {
    let mode = Mode::PreCopy;
    migrate(&SendArgs { mode, ..args.send.clone() }, Some(args)).await
}

async fn migrate(args: &SendArgs, asked: Option<&SplitArgs>) -> Report {
    let began = Instant::now();
    let mut report = Report::begin(&args.common.qmp.display().to_string());
    if asked.is_some() {
        report.mode = "split";
    }
    if let Err(error) = Box::pin(run(args, asked, &mut report, began)).await {
        // Nothing was touched: the guest is as it was.
        let client = Client::connect(&args.common.qmp).await.ok();
        report.fail(&error, place(client.as_ref()).await, GuestPlace::Unknown);
    }
    if report.outcome != ReportOutcome::Completed {
        report.total_ms = began.elapsed().as_secs_f64() * 1e3;
    }
    report
}

/// Everything up to the journal; errors from here mean that nothing was touched.
async fn run(
    args: &SendArgs,
    asked: Option<&SplitArgs>,
    report: &mut Report,
    clock: Instant,
) -> Result<(), EngineError> {
    if let Some(asked) = asked {
        split::check_asked(&asked.send)?;
    }
    let identity = Arc::new(Identity::load(&args.common.identity)?);
    let addr = prepare::resolve_address(&args.to).await?;
    recover::before_sending(args).await?;
    let found = prepare::find(args).await?;
    report.vm = found.vm.label();
    let path = match args.path {
        // A split needs it, and what is preloaded is there for it alone.
        PathChoice::Auto if asked.is_some() || args.preload_socket.is_some() => PathChoice::Direct,
        path => path,
    };
    if let (GuestPath::Stream, why) = found.path(path, args.preload_socket.as_deref())? {
        let to = stream::source::To { addr, identity };
        return stream::source::send(args, found, to, why, report, clock).await;
    }
    if path == PathChoice::Auto {
        eprintln!("by the direct path: all of its RAM is in shared files");
    }
    let guest = found.open().await?;
    let migration = prepare::new_migration()?;
    let mut options = prepare::options(&args.common, prepare::lanes(args.lane_count, args.mode));
    options.lane_kind = args.lanes.kind();
    options.features = FEATURE_SPLIT;
    let wanted = Asked { verify: args.verify, mode: args.mode };
    let accepted = prepare::accepted(addr, &identity, &options, migration, &guest, wanted).await?;
    let Accepted { session, urgent } = accepted;
    let closer = session.closer.clone();
    report.lanes = Some(LaneReport::of(&closer, session.lanes.len()));
    let recorded = async {
        let room = match asked {
            Some(asked) => Some(room(asked, &guest, &identity, &session).await?),
            None => None,
        };
        let (peer, keep) = (&session.peer.name, args.keep_source);
        let journal = prepare::journal(&args.common, &args.to, keep, &guest.vm, migration, peer)?;
        Ok::<_, EngineError>((room, journal))
    };
    let (room, journal) = match recorded.await {
        Ok(recorded) => recorded,
        Err(error) => return Err(prepare::closed(session, error).await),
    };
    let peer_name = session.peer.name.clone();
    let gate = Arc::new(Gate::new(args.max_bandwidth));
    let link =
        Link::start(session.control_sender, session.control_receiver, Arc::clone(&gate), clock);
    let began = (peer_name, link, closer.clone());
    let resume = guest.vm.status.running;
    let contact = Contact::begun((addr, identity), &options, migration, began, resume);
    let migration = Migration {
        args,
        guest,
        contact,
        journal,
        gate,
        closer,
        clock,
        lanes: LaneTasks::start(session.lanes),
        urgent,
        room,
        split: None,
    };
    migration.run(report).await;
    Ok(())
}

/// Room on memory servers for a guest whose destination takes such guests.
async fn room(
    asked: &SplitArgs,
    guest: &Guest,
    identity: &Arc<Identity>,
    session: &SourceSession,
) -> Result<Room, EngineError> {
    if session.selected.features & FEATURE_SPLIT == 0 {
        return Err(EngineError::Misuse {
            what: "The destination's engine takes no guests whose memory is split".into(),
            remedy: "Update it there".into(),
        });
    }
    Room::make(asked, guest, identity, &session.peer.name).await
}

/// A migration that has left traces: a journal, a session.
struct Migration<'a> {
    args: &'a SendArgs,
    guest: Guest,
    contact: Contact,
    journal: Journal,
    gate: Arc<Gate>,
    closer: Closer,
    clock: Instant,
    lanes: LaneTasks,
    urgent: Option<LaneSender>,
    /// Where pages are to go that are not the destination's, until it is decided which.
    room: Option<Room>,
    split: Option<Arc<Split>>,
}

/// A guest whose destination is ready.
struct Moved {
    mover: Mover,
    /// Serves what is missing there.
    server: Option<Server>,
}

impl Migration<'_> {
    async fn run(mut self, report: &mut Report) {
        let mut progress = Progress::new();
        let mut stopped_at = None;
        let moved = tokio::select! {
            moved = self.move_guest(report, &mut progress, &mut stopped_at) => moved,
            () = cancel::requested() => Err(EngineError::Cancelled),
        };
        progress.finish();
        let mut moved = match moved {
            Err(error) => Err(self.root_cause(error).await),
            moved => moved,
        };
        failpoint::hit("source-ready").await;
        let input = input(&moved);
        let (server, why) = match &mut moved {
            Ok(moved) => (moved.server.as_mut(), None),
            Err(error) => (None, Some(&*error)),
        };
        let ask_for = Duration::from_secs(self.args.ask_s);
        let (client, keep_source) = (Some(&self.guest.client), self.args.keep_source);
        let mut owner = Owner {
            server,
            why,
            ..Owner::new(client, &mut self.journal, &mut self.contact, ask_for, keep_source)
        };
        let outcome = owner.drive(Source::Moving, input).await;
        let (stuck, faults) = (owner.stuck.take(), owner.faults.take());
        report.faults = faults.map(Into::into);
        if let Some(stopped_at) = stopped_at {
            let running_at = self.contact.running_at.unwrap_or_else(Instant::now);
            report.downtime_ms = (running_at - stopped_at).as_secs_f64() * 1e3;
            let over = if report.pages.missing > 0 { Instant::now() } else { running_at };
            report.total_ms = (over - self.clock).as_secs_f64() * 1e3;
        }
        // Tracking is undone only now: that takes milliseconds which the guest would have waited.
        self.gate.close();
        self.lanes.stop().await;
        if let Ok(moved) = &moved {
            report.pages.unused = moved.mover.skipped_pages();
        }
        let (mover, server, error) = match moved {
            Ok(Moved { mover, server }) => (Some(mover), server, None),
            Err(error) => (None, None, Some(error)),
        };
        let unserved = server.as_ref().map(|server| server.feed().unsent_pages());
        if let Some(mut server) = server {
            server.stop().await;
            note_served(report, &server);
        }
        let _dropped = on_thread(move || drop(mover)).await;
        self.conclude(report, outcome, error, stuck, unserved).await;
    }

    async fn conclude(
        mut self,
        report: &mut Report,
        outcome: Outcome,
        why: Option<EngineError>,
        stuck: Option<EngineError>,
        unserved: Option<u64>,
    ) {
        let wire = self.closer.stats().wire;
        report.bytes.wire = wire.sent + wire.received;
        self.conclude_split(report, outcome).await;
        report.end_of_lanes(&self.closer);
        let Self { guest, contact, journal, .. } = self;
        let is_stranded = false;
        Ending { client: &guest.client, contact, journal, why, stuck, unserved, is_stranded }
            .conclude(report, outcome)
            .await;
    }

    /// The stores go with the guest, or away.
    async fn conclude_split(&mut self, report: &mut Report, outcome: Outcome) {
        let (room, split) = (self.room.take(), self.split.take());
        if let Some(split) = &split {
            let told = split.report();
            report.bytes.wire += told.to_servers_bytes;
            report.split = Some(told);
        }
        // In doubt, they may be the guest's: the destination keeps them, or their lease ends.
        if outcome != Outcome::RolledBack {
            return;
        }
        let deleted = on_thread(move || {
            if let Some(room) = room {
                room.delete();
            }
            if let Some(split) = split {
                split.delete();
            }
        });
        let _told_in_the_log = deleted.await;
    }

    /// A lane that ends is the consequence of something that the control stream tells.
    async fn root_cause(&mut self, error: EngineError) -> EngineError {
        match (&error, &mut self.contact.session) {
            (EngineError::Pump(PumpError::LaneClosed), Some((link, _))) => {
                link.why_over().await.unwrap_or(error)
            }
            _ => error,
        }
    }

    /// Attaches, runs the rounds, stops the guest and brings the rest over.
    async fn move_guest(
        &mut self,
        report: &mut Report,
        progress: &mut Progress,
        stopped_at: &mut Option<Instant>,
    ) -> Result<Moved, EngineError> {
        if self.args.mode == Mode::PostCopy {
            return self.post_copy(report, progress, stopped_at).await;
        }
        let Some((link, _)) = &mut self.contact.session else {
            return Err(EngineError::Internal("there is no session".into()));
        };
        let ram = Arc::clone(&self.guest.ram);
        let window = prepare::direct_io_window(self.args, &self.guest.vm);
        if let Some(window) = window {
            let disks = self.guest.vm.direct_io.join(", ");
            progress.say(&format!(
                "direct I/O ({disks}): written pages are compared again after {} ms",
                window.as_millis()
            ));
        }
        failpoint::hit("source-attaching").await;
        let attached =
            attaching::attach(self.guest.vm.pid, self.args.preload_socket.as_deref()).await?;
        report.attach_stopped_us = attached.stopped_us;
        let pid = self.guest.vm.pid;
        let armed = on_thread({
            let ram = Arc::clone(&ram);
            move || -> Result<_, EngineError> {
                let tracker = DirtyTracker::arm(pid, attached.uffd, &ram)?;
                Ok((tracker, ram.data_ranges()?))
            }
        });
        let looked = unused(self.args, &self.guest, progress, report);
        let (armed, unused) = tokio::join!(armed, looked);
        let (tracker, data) = armed??;
        if let Some(mut room) = self.room.take() {
            room.tell(link).await?;
            let (ram, unused, data) = (Arc::clone(&ram), unused.clone(), data.clone());
            let gate = Arc::clone(&self.gate);
            let placed =
                on_thread(move || (Split::place(&mut room, ram, unused, gate, &data), room));
            let (split, room) = placed.await?;
            self.room = Some(room);
            self.split = Some(Arc::new(split?));
        }
        let mut precopy = Precopy::new(
            ram.layout(),
            PrecopyConfig {
                convergence: Config {
                    max_downtime: Duration::from_millis(self.args.max_downtime_ms),
                    patience: Duration::from_secs(self.args.patience_s),
                },
                direct_io_window: window,
                order: self.args.page_order == PageOrder::Heat,
            },
        );
        let queues = self.lanes.queues();
        let pages =
            SourcePages::new(ram.layout().pages(), precopy.needs_hashes(), random::number()?);
        let pages = pages.with_deltas(queues.len(), self.args.delta_cache);
        let pages = Arc::new(match self.args.duplicates {
            Switch::On => pages.with_duplicates(queues.len()),
            Switch::Off => pages,
        });
        describe_memory(report, &pages, precopy.order_memory_bytes(), &data);
        let mover = Mover {
            pump: Arc::new(Pump::start(
                Arc::clone(&ram),
                Arc::clone(&pages),
                Arc::clone(&self.gate),
                queues,
                worker_threads(),
                self.args.compression.wanted(),
                unused.clone(),
            )),
            split: self.split.clone(),
            unused,
            ram,
            pages,
            tracker: Some(Mutex::new(tracker)),
            populated: self.guest.vm.discards.then(|| Mutex::new(data.clone())),
            has_urgent_lane: self.urgent.is_some(),
            gate: Arc::clone(&self.gate),
            dead_peer: self.args.common.dead_peer(),
            clock: self.clock,
        };
        failpoint::hit("source-precopy").await;
        let mode = if self.urgent.is_some() { self.args.mode } else { Mode::PreCopy };
        let ended = mover.precopy(&mut precopy, data, link, mode, progress, report).await?;
        report.delta_cache_bytes = mover.pages.delta_memory_bytes();
        if let Ended::Early(known) = ended {
            report.mode = "hybrid";
            progress.say(&format!(
                "post-copy from here: {}",
                report.mode_reason.as_deref().unwrap_or_default()
            ));
            let server =
                self.hand_over_early(&mover, Some((&mut precopy, &known)), report, stopped_at);
            let server = Some(server.await?);
            return Ok(Moved { mover, server });
        }
        if mover.split.is_some() {
            early::prepare_for_faults(link).await?;
        }
        let saving = switch::begin(&mover.ram, &self.guest, link).await?;
        *stopped_at = Some(Instant::now());
        let (verify, dead_peer) = (self.args.verify, mover.dead_peer);
        let switched =
            switch::switch(&mover, &mut precopy, &self.guest, saving, link, verify, report);
        if verify {
            switched.await?;
        } else {
            // However slowly the destination goes on, the guest does not wait for it for ever.
            switch::in_time(dead_peer, self.args.max_downtime_ms, switched).await?;
        }
        Ok(Moved { mover, server: None })
    }

    /// Hands the guest over before any of its pages. Nothing is tracked: it is stopped first.
    async fn post_copy(
        &mut self,
        report: &mut Report,
        progress: &Progress,
        stopped_at: &mut Option<Instant>,
    ) -> Result<Moved, EngineError> {
        report.mode = "post-copy";
        let ram = Arc::clone(&self.guest.ram);
        let pages = Arc::new(SourcePages::new(ram.layout().pages(), false, 0));
        describe_memory(report, &pages, 0, &ram.data_ranges()?);
        let (gate, queues) = (Arc::clone(&self.gate), self.lanes.queues());
        let (threads, wanted) = (worker_threads(), self.args.compression.wanted());
        let unused = unused(self.args, &self.guest, progress, report).await;
        let pump = Pump::start(
            Arc::clone(&ram),
            Arc::clone(&pages),
            gate,
            queues,
            threads,
            wanted,
            unused.clone(),
        );
        let mover = Mover {
            pump: Arc::new(pump),
            split: None,
            unused,
            ram,
            pages,
            tracker: None,
            populated: None,
            has_urgent_lane: true,
            gate: Arc::clone(&self.gate),
            dead_peer: self.args.common.dead_peer(),
            clock: self.clock,
        };
        let server = Some(self.hand_over_early(&mover, None, report, stopped_at).await?);
        Ok(Moved { mover, server })
    }

    /// Stops the guest and has it loaded at the destination, where pages are missing; `precopy` with
    /// the pages that are known to be, or nothing if all are.
    async fn hand_over_early(
        &mut self,
        mover: &Mover,
        precopy: Option<(&mut Precopy, &PageSet)>,
        report: &mut Report,
        stopped_at: &mut Option<Instant>,
    ) -> Result<Server, EngineError> {
        let none = PageSet::new(mover.ram.layout().pages());
        let (precopy, known) = match precopy {
            Some((precopy, known)) => (Some(precopy), known),
            None => (None, &none),
        };
        let mut session = self.contact.session.take();
        let parts = session.as_mut().zip(self.urgent.take());
        let ((link, closer), urgent) = parts
            .ok_or_else(|| EngineError::Internal("there is no lane for missing pages".into()))?;
        let urgent = UrgentLane::of(urgent)?;
        early::prepare(mover, known, link).await?;
        let saving = switch::begin(&mover.ram, &self.guest, link).await?;
        *stopped_at = Some(Instant::now());
        let verify = self.args.verify;
        let guest = &self.guest;
        let (compression, limit) = (self.args.compression.wanted(), self.args.max_bandwidth);
        let work = async {
            let Stopped { feed, state, ahead_bytes, settling } =
                early::stop(mover, precopy, guest, saving, report).await?;
            let seed = early::tell_missing(mover, &feed, link, verify, report).await?;
            let feed: Arc<Feed> = Arc::new(feed);
            let mut server = Server::new(Arc::clone(&mover.ram), feed, compression, limit, seed);
            let requests = link
                .requests()
                .ok_or_else(|| EngineError::Internal("somebody else answers requests".into()))?;
            let (pump, gate) = (Arc::clone(&mover.pump), Arc::clone(&mover.gate));
            server.begin(pump, gate, None, urgent, requests, closer.clone());
            early::load(mover, guest, (&state.bytes, ahead_bytes), link, report).await?;
            settling.settled().await?;
            Ok(server)
        };
        let allowed_ms = self.args.max_downtime_ms;
        let server = match verify {
            true => work.await,
            false => switch::in_time(mover.dead_peer, allowed_ms, work).await,
        };
        self.contact.session = session;
        server
    }
}

/// What a migration that has come so far means for the hand-over.
pub fn input<T>(moved: &Result<T, EngineError>) -> Input {
    match moved {
        Ok(_) => Input::Ready { agrees: true },
        Err(error) if error.is_lost_contact() => Input::Lost,
        Err(EngineError::PeerAborted { .. }) => Input::PeerAborted,
        Err(_) => Input::Cancel,
    }
}

/// A look into the guest's kernel, if that is wanted and possible; else says once why not.
async fn unused(
    args: &SendArgs,
    guest: &Guest,
    progress: &Progress,
    report: &mut Report,
) -> Option<Arc<Unused>> {
    match args.skip_unused {
        Switch::Off => None,
        Switch::On => skipped_or_told(Unused::find(guest).await, progress, report),
    }
}

/// What tells of unused memory; if there is nothing, says once why not.
pub(crate) fn skipped_or_told<T>(
    found: Result<T, EngineError>,
    progress: &Progress,
    report: &mut Report,
) -> Option<Arc<T>> {
    let error = match found {
        Ok(found) => return Some(Arc::new(found)),
        Err(error) => error.tell(),
    };
    progress.say(&format!("memory that the guest does not use is sent as well: {error}"));
    report.not_skipped = Some(error);
    None
}

/// What serving did, for the report.
fn note_served(report: &mut Report, server: &Server) {
    report.add(server.pushed());
    let counts = server.feed().counts();
    report.pages.urgent = counts.urgent_pages;
    report.pages.prefetched = counts.prefetched_pages;
    report.prefetch_hit_rate = counts.prefetch_hit_rate();
    if let Some(late) = server.verified() {
        let early = report.verify.unwrap_or(VerifyReport { pages: 0, mismatches: 0 });
        report.verify = Some(VerifyReport {
            pages: early.pages + late.pages,
            mismatches: early.mismatches + late.mismatches,
        });
        if late.mismatches > 0 {
            let VerifyReport { pages, mismatches } = late;
            let error = EngineError::Mismatch { mismatches, pages };
            report.fail(&error, GuestPlace::Gone, GuestPlace::Running);
        }
    }
}

fn describe_memory(report: &mut Report, pages: &SourcePages, order_bytes: usize, data: &PageSet) {
    let total = data.size();
    report.pages.total = total;
    report.pages.hole = total - data.len();
    report.bytes.ram = total * PAGE_BYTES as u64;
    report.bytes.populated = data.len() * PAGE_BYTES as u64;
    let tables = pages.memory_bytes() + order_bytes + data.memory_bytes();
    report.table_bytes_per_page = tables as f64 / total.max(1) as f64;
}

/// The migration's id as journals write it.
pub fn parse_migration(text: &str) -> Option<MigrationId> {
    text.parse().ok()
}
