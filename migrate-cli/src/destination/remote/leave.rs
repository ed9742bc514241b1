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

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use migrate_core::convergence::{Config, Convergence, Decision, Observation};
use migrate_core::error::GuestPlace;
use migrate_core::handover::source::Input;
use migrate_core::handover::{Outcome, Source};
use migrate_core::layout::PAGE_BYTES;
use migrate_core::page_table::SourcePages;
use qemu_glue::qmp::Client;
use tokio::sync::oneshot;
use transport::messages::{FEATURE_SPLIT, Message, RemoteEnd, Sync, Then};
use transport::pages::PageRequest;
use transport::{Closer, LaneSender, Options};

use super::{Shared, Watched, fragment};
use crate::args::{CommonArgs, Mode};
use crate::blocking::on_thread;
use crate::error::EngineError;
use crate::journal::Journal;
use crate::pager_socket::{Leave, PagerState};
use crate::report::{LaneReport, RemoteReport, Report, ReportOutcome, SplitReport};
use crate::source::contact::Contact;
use crate::source::gate::Gate;
use crate::source::handover::{Owner, place};
use crate::source::link::Link;
use crate::source::prepare::{self, Accepted, Asked, Guest};
use crate::source::switch::{self, part};
use crate::source::{early, recover};
use crate::{failpoint, missing, stores};

/// Time between two looks at how far the flush is.
const TICK: Duration = Duration::from_millis(100);

/// What stopping costs regardless of memory, before anything was measured.
const STOP_OVERHEAD: Duration = Duration::from_millis(60);

/// Longest wait for the destination to reach the memory servers.
const PREPARED_WITHIN: Duration = Duration::from_secs(30);

/// Longest time for which the guest is stopped before the hand-over, besides ten times the downtime that is allowed.
const STOPPED_WITHIN: Duration = Duration::from_secs(30);

/// Shortest busy time that tells a rate.
const ENOUGH: Duration = Duration::from_millis(2);

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
    /// Comes when whoever asked is gone, or wants it no more.
    pub(super) cancelled: oneshot::Receiver<()>,
    /// What became of it.
    pub(super) done: oneshot::Sender<Box<Report>>,
}

/// Whether the guest is still here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// It runs elsewhere.
    Gone,
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
    cancelled: &mut oneshot::Receiver<()>,
) -> (Left, Report) {
    let clock = Instant::now();
    let mut report = Report::begin(&shared.vm);
    report.mode = "split";
    let left = match Box::pin(begin(shared, client, home, asked)).await {
        Ok(begun) => begun.run(&mut report, clock, cancelled).await,
        // Nothing was touched but rooms on servers.
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

/// A guest whose new main host is ready for it.
struct Leaving<'a> {
    shared: &'a Arc<Shared>,
    asked: &'a Leave,
    guest: Guest,
    contact: Contact,
    journal: Journal,
    closer: Closer,
    /// Nothing goes over them, but the session has them.
    lanes: Vec<LaneSender>,
}

/// Everything up to the journal.
async fn begin<'a>(
    shared: &'a Arc<Shared>,
    client: &Client,
    home: &Home,
    asked: &'a Leave,
) -> Result<Leaving<'a>, EngineError> {
    check(shared)?;
    recover::before_leaving(client, &home.common).await?;
    let guest = prepare::paged_guest(client.clone(), Arc::clone(&shared.ram)).await?;
    let addr = prepare::resolve_address(&asked.to).await?;
    let migration = prepare::new_migration()?;
    let common = CommonArgs { peer: asked.peer.clone(), ..home.common.clone() };
    let options = Options {
        features: FEATURE_SPLIT,
        ..prepare::options(&common, prepare::lanes(None, Mode::PreCopy))
    };
    let wanted = Asked { verify: false, mode: Mode::PreCopy };
    let accepted =
        prepare::accepted(addr, &shared.identity, &options, migration, &guest, wanted).await?;
    let Accepted { session, urgent: _ } = accepted;
    let (closer, peer) = (session.closer.clone(), session.peer.name.clone());
    let gate = Arc::new(Gate::new(None));
    let mut link =
        Link::start(session.control_sender, session.control_receiver, gate, Instant::now());
    let recorded = async {
        if session.selected.features & FEATURE_SPLIT == 0 {
            return Err(EngineError::Misuse {
                what: "The destination's engine takes no guests whose memory is split".into(),
                remedy: "Update it there".into(),
            });
        }
        make_room(shared, asked, &peer).await?;
        link.send(Message::Split(told(shared, asked)?)).await?;
        early::prepared(&mut link, "that it is prepared", PREPARED_WITHIN).await?;
        prepare::journal(&common, &asked.to, false, &guest, migration, &peer)
    };
    let journal = match recorded.await {
        Ok(journal) => journal,
        Err(error) => {
            closer.close(transport::close_code::ABORTED, &error.tell()).await;
            revoke(shared, &peer).await;
            return Err(error);
        }
    };
    let contact = Contact {
        addr,
        identity: Arc::clone(&shared.identity),
        // Whoever else of the authority answers at this address later is not believed.
        options: Options { expected_peer: Some(peer), ..options },
        migration,
        session: Some((link, closer.clone())),
        resume: guest.vm.status.running,
        running_at: None,
    };
    Ok(Leaving { shared, asked, guest, contact, journal, closer, lanes: session.lanes })
}

/// Refuses what cannot be left.
fn check(shared: &Shared) -> Result<(), EngineError> {
    let state = shared.state();
    if state == PagerState::Split {
        return Ok(());
    }
    Err(EngineError::Misuse {
        what: format!("The guest's memory is {}", format!("{state:?}").to_lowercase()),
        remedy: "Only a guest that is split and at peace can leave".into(),
    })
}

/// The servers take what is only here, and give it to the new main host.
async fn make_room(shared: &Arc<Shared>, asked: &Leave, peer: &str) -> Result<(), EngineError> {
    for addr in asked.memory.iter().flatten() {
        fragment::take_in(shared, *addr).await?;
    }
    fragment::reserve_for_flush(shared).await?;
    ask_all(shared, &PageRequest::Grant { host: peer.to_owned() }).await
}

/// Has all servers of the guest do something, over connections of its own.
async fn ask_all(shared: &Arc<Shared>, request: &PageRequest) -> Result<(), EngineError> {
    let (shared, request) = (Arc::clone(shared), request.clone());
    let asked = on_thread(move || {
        for store in shared.split_now(None).stores {
            let mut client = stores::open(&store, &shared.identity, &shared.options)?;
            stores::ask(&mut client, &store.address, &request)?;
        }
        Ok(())
    });
    asked.await?
}

/// The guest stays: whoever was to have it has nothing to do with its memory. One that does not answer is told by the
/// next pager, or never: it cannot do without the secret.
async fn revoke(shared: &Arc<Shared>, peer: &str) {
    if peer == shared.identity.name() {
        return;
    }
    if let Err(error) = ask_all(shared, &PageRequest::Revoke { host: peer.to_owned() }).await {
        tracing::warn!(error = %error.tell(), peer, "access to the guest's memory was not withdrawn");
    }
}

/// What the new main host is told of the guest's memory.
fn told(shared: &Shared, asked: &Leave) -> Result<transport::messages::Split, EngineError> {
    let split = shared.split_now(None);
    let stays = |address: &str| {
        let address: Option<SocketAddr> = address.parse().ok();
        let wanted = asked.memory.as_ref();
        wanted.is_none_or(|wanted| address.is_none_or(|address| wanted.contains(&address)))
    };
    let numbers = (0u16..).zip(&split.stores);
    let drain: Vec<u16> = match asked.merge {
        true => vec![],
        false => {
            numbers.filter(|(_, store)| !stays(&store.address)).map(|(number, _)| number).collect()
        }
    };
    if split.stores.len() - drain.len() < usize::from(split.copies) {
        return Err(EngineError::Misuse {
            what: format!("{} copies of each page need as many memory servers", split.copies),
            remedy: "Name another one by --memory".into(),
        });
    }
    let page = PAGE_BYTES as u64;
    let resident_pages =
        asked.resident_bytes.map_or(split.resident_pages, |bytes| bytes / page).max(1);
    let then = Then { merge: asked.merge, drain };
    Ok(transport::messages::Split { resident_pages, is_moved: true, then, ..split })
}

impl Leaving<'_> {
    async fn run(
        mut self,
        report: &mut Report,
        clock: Instant,
        cancelled: &mut oneshot::Receiver<()>,
    ) -> Left {
        report.lanes = Some(LaneReport::of(&self.closer, self.lanes.len()));
        let mut stopped_at = None;
        let moved = tokio::select! {
            moved = self.move_guest(report, &mut stopped_at) => moved,
            _ = cancelled => Err(EngineError::Cancelled),
        };
        failpoint::hit("leave-ready").await;
        let input = match &moved {
            Ok(()) => Input::Ready { agrees: true },
            Err(error) if error.is_lost_contact() => Input::Lost,
            Err(EngineError::PeerAborted { .. }) => Input::PeerAborted,
            Err(_) => Input::Cancel,
        };
        let error = moved.err();
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
                self.journal.remove();
                Left::Gone
            }
            Outcome::RolledBack => {
                self.shared.page_on();
                let error = error.or(stuck).unwrap_or_else(refused_late);
                report.fail(&error, place(client).await, GuestPlace::Incoming);
                self.contact.abort(&error).await;
                if let Some(peer) = self.contact.options.expected_peer.take() {
                    revoke(self.shared, &peer).await;
                }
                self.journal.remove();
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
        let Self { shared, asked, guest, contact, lanes, .. } = self;
        let Some((link, _)) = &mut contact.session else {
            return Err(EngineError::Internal("there is no session".into()));
        };
        failpoint::hit("leave-flushing").await;
        let before = shared.traffic.bytes().0;
        flush(shared, asked, link).await?;
        early::prepare_for_faults(link).await?;
        let saving = switch::begin(&shared.ram, guest, link).await?;
        *stopped_at = Some(Instant::now());
        let within = STOPPED_WITHIN + Duration::from_millis(10 * asked.max_downtime_ms);
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
            tell(shared, link, report).await?;
            switch::load(link, digest, &state.bytes).await?;
            switch::synced(link, digest).await?;
            failpoint::hit("leave-state-sent").await;
            let ready = switch::ready(link, digest, report);
            tokio::try_join!(ready, prepare::check_ram_unchanged(guest))?;
            settling.settled().await?;
            part(report, "transfer_and_load", began);
            Ok(())
        };
        let late = |_| EngineError::TooSlow {
            wanted: "that the guest can run there",
            seconds: within.as_secs(),
        };
        let done = tokio::time::timeout(within, stopped).await.map_err(late)?;
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

/// Brings what is only here to the servers, while the guest runs, until little enough is left.
async fn flush(shared: &Arc<Shared>, asked: &Leave, link: &mut Link) -> Result<(), EngineError> {
    shared.remote.lock().begin_flush();
    shared.is_leaving.store(true, Ordering::Release);
    shared.keeper.notify_all();
    let config = Config {
        max_downtime: Duration::from_millis(asked.max_downtime_ms),
        patience: Duration::from_secs(asked.patience_s),
    };
    let (mut convergence, mut rate) = (Convergence::new(config), None);
    let (mut last, mut seen) = (Instant::now(), shared.flushed.seen());
    let mut left = shared.remote.lock().unflushed_pages();
    loop {
        tokio::select! {
            () = tokio::time::sleep(TICK) => {}
            () = link.ended() => {
                // Why, is the next word.
                link.recv().await?;
            }
        }
        if shared.is_over.load(Ordering::Acquire) || shared.remote.lock().is_lost() {
            return Err(EngineError::Internal("the guest's memory cannot be paged".into()));
        }
        let (now, flushed) = (Instant::now(), shared.flushed.seen());
        let (pages, busy) = (flushed.0 - seen.0, flushed.1.saturating_sub(seen.1));
        if busy > ENOUGH {
            rate = Some(pages as f64 * PAGE_BYTES as f64 / busy.as_secs_f64());
        }
        let left_now = shared.remote.lock().unflushed_pages();
        let observation = Observation {
            dirty_pages: left_now,
            outstanding_bytes: 0,
            goodput_bytes_per_s: rate,
            wire_bytes_per_page: PAGE_BYTES as f64,
            dirtied_pages: (left_now + pages).saturating_sub(left),
            interval: now - last,
            overhead: STOP_OVERHEAD,
        };
        match convergence.decide(&observation, shared.now()) {
            Decision::Stop => return Ok(()),
            Decision::GiveUp(stall) => return Err(EngineError::NotConverging(stall)),
            Decision::Continue => {}
        }
        (last, seen, left) = (now, flushed, left_now);
    }
}

/// Tells the new main host what lies on which server.
async fn tell(shared: &Shared, link: &Link, report: &mut Report) -> Result<(), EngineError> {
    // No server may be away: what it should have dropped could be taken for the guest's memory.
    if !shared.traffic.lost.lock().is_empty() {
        return Err(EngineError::Internal("a memory server does not answer".into()));
    }
    let (mut remote_pages, mut store) = (vec![], 0);
    let gone = shared.traffic.gone.lock().clone();
    let stores = shared.stores.read().clone();
    for (server, of) in stores.iter().enumerate().filter(|(server, _)| !gone.contains(server)) {
        let held = shared.remote.lock().held(server).cloned();
        let held = held.ok_or_else(|| EngineError::Internal("a server is not known".into()))?;
        for part in missing::parts(&held) {
            link.send(part).await?;
        }
        let (pages, version) = (held.len(), shared.version.load(Ordering::Acquire));
        link.send(Message::RemoteEnd(RemoteEnd { store, pages, version })).await?;
        remote_pages.push(RemoteReport { server: of.address.clone(), pages });
        store += 1;
    }
    let stats = shared.remote.lock().stats();
    let in_use_pages = stats.remote_pages + stats.clean_pages;
    report.split =
        Some(SplitReport { resident_pages: 0, remote_pages, in_use_pages, to_servers_bytes: 0 });
    Ok(())
}

impl Shared {
    /// The guest stands still: brings the last pages to the servers, and changes nothing there from then on.
    async fn flush_last(&self) -> Result<(), EngineError> {
        self.remote.lock().stopped();
        self.is_held.store(false, Ordering::Release);
        loop {
            self.keeper.notify_all();
            if self.is_over.load(Ordering::Acquire) || self.remote.lock().is_lost() {
                return Err(EngineError::Internal("the guest's memory cannot be paged".into()));
            }
            if self.hold_if_flushed() {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Whether all is on the servers; nothing changes there from then on.
    fn hold_if_flushed(&self) -> bool {
        let (keeping, asking) = (self.keeping.try_lock(), self.asking.try_lock());
        let is_flushed = keeping.is_some() && asking.is_some() && self.remote.lock().is_flushed();
        if is_flushed {
            self.is_held.store(true, Ordering::Release);
        }
        is_flushed
    }

    /// The guest stays here.
    fn page_on(&self) {
        let mut remote = self.remote.lock();
        remote.end_flush();
        remote.resumed();
        drop(remote);
        self.is_leaving.store(false, Ordering::Release);
        self.is_held.store(false, Ordering::Release);
        self.keeper.notify_all();
    }
}
