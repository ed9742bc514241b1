//! The destination: waits for sources, takes one guest at a time, answers questions about the past.
//!
//! ```text
//!   listen ─► session ─► Migrate: describe ─► journal ─► pages ─► load ─► ready ─► own ─► running
//!                └─────► Ask: what the journal says
//! ```
//!
//! A guest that was handed over before its pages runs while they come in ([`paging`], [`faults`], [`fetcher`]); if
//! the engine dies meanwhile, the next one goes on ([`rescue`]).
//!
//! Invariant: this process runs a guest only after `owned` is durable in its journal, which needs the
//! source's commit (see [`migrate_core::handover`]).

pub mod answer;
pub mod apply;
pub mod arrival;
pub mod faults;
pub mod fetcher;
pub mod intake;
pub mod owner;
pub mod paging;
pub mod remote;
pub mod rescue;
pub mod sink;

use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use migrate_core::handover::Outcome;
use parking_lot::Mutex;
use qemu_glue::check::Severity;
use qemu_glue::qmp::{Client, RunState};
use qemu_glue::vm::{self, VmInventory};
use tokio::sync::mpsc;
use transport::messages::{FEATURE_SPLIT, FEATURE_STREAM, Intent, RefuseCode};
use transport::{
    DestinationSession, Identity, Listener, MigrationId, Options, TransportError, close_code,
};

use self::answer::{Archive, Latest};
use self::remote::{Ending, Home, Note, RemoteGuest, Watched};
use crate::args::{CommonArgs, ReceiveArgs};
use crate::error::EngineError;
use crate::{cancel, qmp_socket, tell};

/// How long this stays after the guest has arrived, in times of the lease, to answer a source that
/// lost contact: it asks for 30 s unless told otherwise, and the lease is 20 s.
const LINGER_LEASES: u32 = 2;

/// Questions about an arriving guest that may wait for it to answer.
const ASKS_WAITING: usize = 4;

/// What is the same for every session.
#[derive(Debug)]
pub struct Place {
    /// QEMU's monitor.
    pub client: Client,
    /// The waiting VM.
    pub vm: VmInventory,
    /// Where journals lie.
    pub journal_dir: PathBuf,
    /// The identity's directory, for the journal.
    pub identity_dir: PathBuf,
    /// The QMP socket, for the journal.
    pub qmp: PathBuf,
    /// How long a loaded guest waits for its commit.
    pub lease: Duration,
    /// Whether a guest runs here that lacks pages.
    pub fetches: AtomicBool,
    /// Seconds of silence after which a memory server counts as dead.
    pub dead_peer: Duration,
    /// Pages a guest that runs here while part of its memory is elsewhere.
    pub remote: Mutex<Option<RemoteGuest>>,
    /// Whose metrics are told.
    pub watched: Watched,
}

/// Whether somebody may ask about a guest that came here, or a guest here has no pager; also if that cannot be told.
pub fn is_asked_for(common: &CommonArgs) -> bool {
    let archive = Archive::open(&common.journal_dir(), &common.qmp);
    archive.map_or(true, |archive| archive.is_asked_for() || archive.lacks_pages())
}

/// Receives guests as asked; a guest that it pages is `watched`.
///
/// # Errors
/// What kept it from listening, or ended the only migration under `--once`.
pub async fn receive(args: &ReceiveArgs, watched: &Watched) -> Result<Outcome, EngineError> {
    loop {
        // What it finds may no longer be so once QEMU was started anew.
        if let Some(outcome) = receive_or_another(args, watched).await? {
            return Ok(outcome);
        }
    }
}

/// The same; nothing if it answered questions until another QEMU was there.
///
/// # Errors
/// As [`receive`].
pub async fn receive_or_another(
    args: &ReceiveArgs,
    watched: &Watched,
) -> Result<Option<Outcome>, EngineError> {
    let (mut requests, watched) = (cancel::Requests::watch(), watched.clone());
    let journal_dir = args.common.journal_dir();
    let identity = Identity::load(&args.common.identity)?;
    let default = Options::default();
    let options = Options {
        // One more for pages that a guest waits for, as the source has it.
        lanes: default.lanes + 1,
        dead_peer: args.common.dead_peer(),
        expected_peer: args.common.peer.clone(),
        features: FEATURE_SPLIT | FEATURE_STREAM,
        ..default
    };
    let socket = qmp_socket::at(&args.common.qmp);
    let mut archive = Archive::open(&journal_dir, &args.common.qmp)?;
    archive.release_abandoned().await;
    if let Some(journal) = archive.take_fetching() {
        let fetches = AtomicBool::new(true);
        let going_on = rescue::rescue(args, &identity, &options, journal, &mut archive, &fetches);
        return until_cancelled(&mut requests, &fetches, going_on).await.map(Some);
    }
    if let Some(journal) = archive.take_split() {
        let fetches = AtomicBool::new(true);
        let going_on = remote::rescue(args, identity, &options, journal, (&mut archive, watched));
        return until_cancelled(&mut requests, &fetches, going_on).await.map(Some);
    }
    let client = Client::connect(&args.common.qmp).await;
    archive.recover(client.as_ref().ok(), false).await;
    let (client, vm) = match client {
        Ok(client) => {
            let vm = waiting_vm(&client).await;
            (Some(client), vm)
        }
        Err(error) => (None, Err(EngineError::from(error))),
    };
    let vm = match vm {
        Ok(vm) => vm,
        // A source may still ask about a guest that came here, or never came to run here.
        Err(why) if archive.is_asked_for() => {
            let mut listener = Listener::bind(args.listen, &identity, &options)?;
            tell!(
                "{}; answering questions about earlier migrations only, listening on {}",
                why.tell(),
                listener.local_addr()
            );
            // Others may want both, and a question is rare.
            drop((archive, client));
            return tokio::select! {
                outcome = answer_only(&mut listener, args, why) => outcome.map(Some),
                () = requests.next() => Err(EngineError::Cancelled),
                _ = qmp_socket::other_than(&args.common.qmp, socket) => Ok(None),
            };
        }
        Err(why) => return Err(why),
    };
    let client = client.ok_or_else(|| EngineError::Internal("QEMU's monitor is gone".into()))?;
    let mut listener = Listener::bind(args.listen, &identity, &options)?;
    // Scripts wait for this line.
    tell!("listening on {}", listener.local_addr());
    let place = Arc::new(Place {
        client,
        vm,
        journal_dir,
        identity_dir: args.common.identity.clone(),
        qmp: std::path::absolute(&args.common.qmp).unwrap_or_else(|_| args.common.qmp.clone()),
        lease: Duration::from_secs(args.lease_s),
        fetches: AtomicBool::new(false),
        dead_peer: args.common.dead_peer(),
        remote: Mutex::new(None),
        watched,
    });
    let serving = serve(&mut listener, &place, &mut archive);
    until_cancelled(&mut requests, &place.fetches, serving).await.map(Some)
}

/// Ends `work` at Ctrl-C; while a guest runs here that lacks pages, only at the second.
async fn until_cancelled<T>(
    requests: &mut cancel::Requests,
    fetches: &AtomicBool,
    work: impl Future<Output = Result<T, EngineError>>,
) -> Result<T, EngineError> {
    let mut work = pin!(work);
    let mut was_warned = false;
    loop {
        tokio::select! {
            done = &mut work => return done,
            () = requests.next() => {}
        }
        if was_warned || !fetches.load(Ordering::Relaxed) {
            return Err(EngineError::Cancelled);
        }
        was_warned = true;
        tell!(
            "the guest runs here and lacks pages: going on until it has them. If interrupted again, \
             its threads wait for pages until `migrate receive` is started anew"
        );
    }
}

async fn waiting_vm(client: &Client) -> Result<VmInventory, EngineError> {
    check_waiting(client).await?;
    let vm = vm::inventory(client).await?;
    check_vm(&vm)?;
    Ok(vm)
}

/// Answers questions; under `--once` until nobody may ask any more.
async fn answer_only(
    listener: &mut Listener,
    args: &ReceiveArgs,
    why: EngineError,
) -> Result<Outcome, EngineError> {
    loop {
        let session = listener.accept().await?;
        if session.intent == Intent::Migrate {
            session.close(close_code::REJECTED, &why.tell()).await;
            continue;
        }
        let mut archive = match Archive::open(&args.common.journal_dir(), &args.common.qmp) {
            Ok(archive) => archive,
            Err(busy) => {
                session.close(close_code::REJECTED, &busy.tell()).await;
                continue;
            }
        };
        let client = match archive.needs_monitor() {
            true => Client::connect(&args.common.qmp).await.ok(),
            false => None,
        };
        archive.answer(client.as_ref(), session).await;
        if args.once && !archive.is_asked_for() {
            return Ok(match archive.latest() {
                Some((_, true)) => Outcome::Completed,
                _ => Outcome::RolledBack,
            });
        }
    }
}

async fn serve(
    listener: &mut Listener,
    place: &Arc<Place>,
    archive: &mut Archive,
) -> Result<Outcome, EngineError> {
    loop {
        let session = match listener.accept().await {
            Err(TransportError::ListenerEnded) => return Err(TransportError::ListenerEnded.into()),
            Err(error) => {
                tell!("refused: {}", EngineError::from(error).tell());
                continue;
            }
            Ok(session) if session.intent == Intent::Migrate => session,
            Ok(session) => {
                archive.answer(Some(&place.client), session).await;
                continue;
            }
        };
        let taken = take(listener, place, archive, session).await;
        match &taken {
            Ok(outcome) => tell!("{}", describe(*outcome)),
            Err(error) => tell!("refused: {}", error.tell()),
        }
        let remote = place.remote.lock().take();
        if let Some(mut remote) = remote {
            if matches!(taken, Ok(Outcome::InDoubt)) {
                // Its QEMU is gone, and its last main host may have all of it: that is the operator's to say.
                remote.end(false).await;
                return taken;
            }
            place.fetches.store(true, Ordering::Relaxed);
            let common = CommonArgs {
                qmp: place.qmp.clone(),
                identity: place.identity_dir.clone(),
                journal: Some(place.journal_dir.clone()),
                peer: None,
                dead_peer_s: place.dead_peer.as_secs(),
            };
            let watched = place.watched.clone();
            let (client, vm, others) = (&place.client, &place.vm, vec![]);
            let paged = Paged { client, vm, common, watched, others };
            page(listener, paged, archive, remote).await?;
            return taken;
        }
        // QEMU takes one guest; after that, or after a failure half-way, it is of no more use.
        let Err(over) = check_waiting(&place.client).await else { continue };
        if !archive.source_knows() {
            linger(listener, Some(&place.client), place.lease, archive).await;
        }
        return taken.map_err(|_told| over);
    }
}

/// A guest that is paged here.
struct Paged<'a> {
    client: &'a Client,
    vm: &'a VmInventory,
    /// What `migrate receive` was told.
    common: CommonArgs,
    /// Whose metrics are told.
    watched: Watched,
    /// Hosts for which the guest was about to leave when its last pager died.
    others: Vec<String>,
}

/// Pages a guest whose memory is split, until that is over; answers questions meanwhile.
async fn page(
    listener: &mut Listener,
    Paged { client, vm, common, watched, others }: Paged<'_>,
    archive: &mut Archive,
    mut remote: RemoteGuest,
) -> Result<(), EngineError> {
    let Some(Latest { socket, from }) = archive.latest_paged() else { return Ok(()) };
    remote.settle(from.into_iter().chain(others));
    remote.begin_to_ask(client, vm);
    let notes = remote.take_notes();
    let home = Home { socket, common, watched };
    tell!("part of its memory is elsewhere; this is its pager (`migrate status`, `migrate merge`)");
    let attendant = Attendant::new(listener, Some(client), archive, None);
    let attendant = Attendant { notes, ..attendant };
    let ending = attendant.attend(remote.run(client, &home)).await?;
    let is_noted = archive.paging_ended();
    match ending {
        Ending::Merged => tell!("all memory of the guest is here"),
        Ending::Gone => tell!("the guest's QEMU is gone"),
        Ending::Left(journal) => {
            tell!("the guest has left for its new main host");
            // As long as something says that it is paged here, this says that it is not to be.
            if is_noted {
                journal.remove();
            }
        }
    }
    Ok(())
}

fn describe(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Completed => "the guest runs here",
        Outcome::RolledBack => "the guest stays at its source",
        Outcome::InDoubt => "the outcome is in doubt",
    }
}

/// Takes a guest in, and answers questions meanwhile: those about this guest go to its arrival.
async fn take(
    listener: &mut Listener,
    place: &Arc<Place>,
    archive: &mut Archive,
    session: DestinationSession,
) -> Result<Outcome, EngineError> {
    let migration = session.migration;
    let (forward, mut asks) = mpsc::channel(ASKS_WAITING);
    let arrival = arrival::take_guest(Arc::clone(place), session, &mut asks);
    let client = Some(&place.client);
    let attendant = Attendant::new(listener, client, archive, Some((migration, &forward)));
    let (journal, outcome) = attendant.attend(arrival).await;
    if let Some(journal) = journal {
        archive.add(journal);
    }
    outcome
}

/// Attends to the port and the journals while something goes on.
struct Attendant<'a> {
    listener: &'a mut Listener,
    client: Option<&'a Client>,
    archive: &'a mut Archive,
    /// The migration that is going on, and who takes sessions about it.
    forward: Option<(MigrationId, &'a mpsc::Sender<DestinationSession>)>,
    /// What the journal of the latest guest is to say.
    notes: mpsc::UnboundedReceiver<Note>,
}

impl<'a> Attendant<'a> {
    fn new(
        listener: &'a mut Listener,
        client: Option<&'a Client>,
        archive: &'a mut Archive,
        forward: Option<(MigrationId, &'a mpsc::Sender<DestinationSession>)>,
    ) -> Self {
        let (_, notes) = mpsc::unbounded_channel();
        Self { listener, client, archive, forward, notes }
    }

    /// Answers sessions while `work` is going on; those about its migration are forwarded to it.
    async fn attend<T>(mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            let other = tokio::select! {
                done = &mut work => return done,
                Some(Note { split, noted }) = self.notes.recv() => {
                    let _left = noted.send(self.archive.note_split(split));
                    continue;
                }
                other = self.listener.accept() => other,
            };
            // A slow asker must not hold up the guest that is arriving; but it is answered, also when
            // the work is over meanwhile.
            let mut answered = pin!(self.answer(other));
            tokio::select! {
                done = &mut work => {
                    answered.await;
                    return done;
                }
                () = &mut answered => {}
            }
        }
    }

    async fn answer(&mut self, other: Result<DestinationSession, TransportError>) {
        let other = match other {
            Ok(other) => other,
            Err(error) => return tracing::info!(%error, "session refused"),
        };
        if other.intent == Intent::Migrate {
            let text = "another guest is arriving here";
            return arrival::refuse(&other, RefuseCode::Busy, text).await;
        }
        match self.forward.filter(|(migration, _)| *migration == other.migration) {
            Some((_, forward)) => {
                if let Err(full) = forward.try_send(other) {
                    full.into_inner().close(close_code::REJECTED, "asked already").await;
                }
            }
            None => self.archive.answer(self.client, other).await,
        }
    }
}

/// Stays a while to answer a source that lost contact after its commit.
async fn linger(
    listener: &mut Listener,
    client: Option<&Client>,
    lease: Duration,
    archive: &mut Archive,
) {
    let asked = async {
        loop {
            match listener.accept().await {
                Ok(session) if session.intent == Intent::Ask => {
                    archive.answer(client, session).await;
                    if archive.source_knows() {
                        return;
                    }
                }
                Ok(session) => session.close(close_code::SHUTDOWN, "the guest has arrived").await,
                Err(_) => return,
            }
        }
    };
    let _nobody_asked = tokio::time::timeout(lease * LINGER_LEASES, asked).await;
}

/// A guest can come in only while QEMU waits for one.
///
/// # Errors
/// [`EngineError::NotWaiting`], or if QEMU does not answer.
pub async fn check_waiting(client: &Client) -> Result<(), EngineError> {
    let status = client.query_status().await?;
    if status.state == RunState::InMigrate {
        return Ok(());
    }
    Err(EngineError::NotWaiting { state: status.state.to_string() })
}

/// What stands against the direct path alone matters when a guest comes by it.
fn check_vm(vm: &VmInventory) -> Result<(), EngineError> {
    let blockers: Vec<_> =
        vm.blockers.iter().filter(|found| found.severity == Severity::Blocker).cloned().collect();
    if blockers.is_empty() { Ok(()) } else { Err(EngineError::Blocked(blockers)) }
}
