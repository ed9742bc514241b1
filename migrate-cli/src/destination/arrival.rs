//! One guest coming in: its description, its pages, its device state.

use std::future::pending;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migrate_core::error::{Classify, ErrorBin};
use migrate_core::handover::destination::Input;
use migrate_core::handover::{Destination, DestinationRecord, Outcome};
use migrate_core::layout::{PageIndex, RamLayout};
use migrate_core::page_table::DestinationPages;
use qemu_glue::device_state;
use qemu_glue::procfs;
use qemu_glue::qmp::RunState;
use qemu_glue::ram::GuestRam;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use transport::messages::{
    self, Abort, Accept, DIGESTS_MAX, Describe, Load, Message, Progress, Ready, Refuse, RefuseCode,
    Sync, Synced, VerifyChunk, VerifyEnd, VerifyRequest,
};
use transport::{
    Closer, ControlReceiver, ControlSender, DestinationSession, LaneReceiver, close_code,
};
use xxhash_rust::xxh3::xxh3_64;

use super::Place;
use super::apply::{Applier, LaneInlet};
use super::owner::{Owner, Voice};
use crate::error::EngineError;
use crate::journal::{Entry, Journal, Record};
use crate::{failpoint, verify};

/// How often the source is told what was applied.
const PROGRESS_EVERY: Duration = Duration::from_millis(5);

/// Longest silence of a source that is connected but does nothing.
const IDLE_MAX: Duration = Duration::from_secs(120);

/// Longest wait for the description of the guest: it is ready when the source connects.
const DESCRIBE_WITHIN: Duration = Duration::from_secs(10);

/// How long a source that is refused has to take note of it.
const REFUSAL_WITHIN: Duration = Duration::from_secs(1);

/// Takes one guest in. Returns its journal if one was begun, and how it ended.
pub async fn take_guest(
    place: Arc<Place>,
    mut session: DestinationSession,
    asks: &mut mpsc::Receiver<DestinationSession>,
) -> (Option<Journal>, Result<Outcome, EngineError>) {
    eprintln!("session from {} ({})", session.peer.name, session.peer.addr);
    let begun = begin(&place, &mut session).await;
    let (ram, mut journal) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            refuse(&session, refuse_code(&error), &error.tell()).await;
            return (None, Err(error));
        }
    };
    let arrival = Arrival::start(Arc::clone(&place), ram, session);
    let outcome = arrival.run(&mut journal, asks).await;
    (Some(journal), outcome)
}

/// Tells a source that its guest is not taken. The session is closed only when the source has left:
/// a close overtakes what was not read yet.
pub async fn refuse(session: &DestinationSession, code: RefuseCode, text: &str) {
    let text = messages::text(text);
    let told = Message::Refuse(Refuse { code, text: text.clone() });
    let heard = async {
        session.control_sender.send(&told).await?;
        session.control_sender.finish(REFUSAL_WITHIN).await?;
        Ok::<_, transport::TransportError>(session.closer.closed().await)
    };
    let _gone_or_too_slow = tokio::time::timeout(REFUSAL_WITHIN, heard).await;
    session.close(close_code::REJECTED, &text).await;
}

fn refuse_code(error: &EngineError) -> RefuseCode {
    match error {
        EngineError::Layout(_) => RefuseCode::Layout,
        EngineError::Refused { code, .. } => *code,
        EngineError::Misuse { .. } => RefuseCode::NoPlace,
        _ => RefuseCode::Internal,
    }
}

/// Compares the guest with the place and records the beginning.
async fn begin(
    place: &Place,
    session: &mut DestinationSession,
) -> Result<(Arc<GuestRam>, Journal), EngineError> {
    let described = tokio::time::timeout(DESCRIBE_WITHIN, session.control_receiver.recv()).await;
    let described = described.map_err(|_| EngineError::TooSlow {
        wanted: "a description of the guest",
        seconds: DESCRIBE_WITHIN.as_secs(),
    })??;
    let Message::Describe(guest) = described else {
        return Err(EngineError::OutOfPlace { got: described.name(), wanted: "Describe" });
    };
    super::check_waiting(&place.client).await?;
    check_machine(place, &guest)?;
    let theirs = RamLayout::new(guest.blocks.clone())?;
    let ram = Arc::new(GuestRam::open(place.vm.pid, &place.vm.regions, true)?);
    ram.layout().check_same(&theirs)?;
    failpoint::hit("destination-describing").await;
    let journal = Journal::create(
        &place.journal_dir,
        Entry {
            migration: session.migration.to_string(),
            record: Record::Destination(DestinationRecord::Receiving),
            qmp: place.qmp.clone(),
            vm: guest.vm_name.clone(),
            qemu_pid: place.vm.pid,
            qemu_start_ticks: procfs::start_time_ticks(place.vm.pid)?,
            peer: session.peer.addr.to_string(),
            identity: place.identity_dir.clone(),
            peer_name: Some(session.peer.name.clone()),
            was_running: true,
            keep_source: false,
            heard: false,
        },
    )?;
    match accept(place, session, &ram).await {
        Ok(()) => Ok((ram, journal)),
        Err(error) => {
            // The source never heard that it was accepted, or has gone: nobody will ask.
            journal.remove();
            Err(error)
        }
    }
}

/// Empties the place and tells the source that it may begin.
async fn accept(
    place: &Place,
    session: &DestinationSession,
    ram: &Arc<GuestRam>,
) -> Result<(), EngineError> {
    // What an earlier attempt left must not shine through pages that are zero at the source.
    let clean = Arc::clone(ram);
    let cleaned = tokio::task::spawn_blocking(move || empty(&clean)).await;
    cleaned.map_err(|error| EngineError::Internal(error.to_string()))??;
    let version = &place.vm.qemu;
    let accept = Accept {
        qemu_version: (version.major, version.minor, version.micro),
        resident_bytes: ram.resident_bytes()?,
    };
    Ok(session.control_sender.send(&Message::Accept(accept)).await?)
}

fn check_machine(place: &Place, guest: &Describe) -> Result<(), EngineError> {
    let vm = &place.vm;
    let refuse = |code, text| Err(EngineError::Refused { code, text });
    if guest.machine != vm.machine {
        let text = format!(
            "the guest's machine type is {}, this QEMU was started with {}; start it with -machine {}",
            guest.machine, vm.machine, guest.machine
        );
        return refuse(RefuseCode::Layout, text);
    }
    let (major, minor, _) = guest.qemu_version;
    if !vm.qemu.at_least(major, minor) {
        let text = format!(
            "the guest comes from QEMU {major}.{minor}, this is {}; QEMU loads guests of older \
             versions only",
            vm.qemu
        );
        return refuse(RefuseCode::Qemu, text);
    }
    Ok(())
}

/// Punches everything out, so that every page reads as zeros. Blocks.
///
/// # Errors
/// If the memory cannot be written.
pub fn empty(ram: &GuestRam) -> Result<(), EngineError> {
    let data = ram.data_ranges()?;
    let mut pages = data.iter().peekable();
    while let Some(first) = pages.next() {
        let mut end = first + 1;
        while pages.next_if_eq(&end).is_some() {
            end += 1;
        }
        for (part, count) in ram.layout().split(PageIndex(first), end - first) {
            ram.discard(part, count)?;
        }
    }
    Ok(())
}

/// A guest whose pages are coming in.
struct Arrival {
    place: Arc<Place>,
    ram: Arc<GuestRam>,
    pages: Arc<DestinationPages>,
    applier: Arc<Applier>,
    control: ControlSender,
    receiver: ControlReceiver,
    closer: Closer,
    migration: transport::MigrationId,
    tasks: Vec<JoinHandle<()>>,
    device_state: Vec<u8>,
}

impl Arrival {
    fn start(place: Arc<Place>, ram: Arc<GuestRam>, session: DestinationSession) -> Self {
        let pages = Arc::new(DestinationPages::new(ram.layout().pages()));
        let threads = std::thread::available_parallelism().map_or(2, usize::from).min(4);
        let lanes = session.lanes.len();
        let (applier, inlets) =
            Applier::start(Arc::clone(&ram), Arc::clone(&pages), lanes, threads);
        let applier = Arc::new(applier);
        let closer = session.closer.clone();
        let mut tasks: Vec<_> = session
            .lanes
            .into_iter()
            .zip(inlets)
            .map(|(lane, inlet)| tokio::spawn(drain(lane, inlet, closer.clone())))
            .collect();
        tasks.push(tokio::spawn(tell_progress(
            session.control_sender.clone(),
            Arc::clone(&applier),
        )));
        Self {
            place,
            ram,
            pages,
            applier,
            control: session.control_sender,
            receiver: session.control_receiver,
            closer,
            migration: session.migration,
            tasks,
            device_state: vec![],
        }
    }

    async fn run(
        mut self,
        journal: &mut Journal,
        asks: &mut mpsc::Receiver<DestinationSession>,
    ) -> Result<Outcome, EngineError> {
        let loaded = self.receive().await;
        self.stop_tasks().await;
        let mut ready = None;
        let (input, error) = match loaded {
            Ok(loaded) => {
                ready = Some(loaded);
                (Input::Loaded, None)
            }
            Err(error) if error.is_lost_contact() => (Input::Lost, Some(error)),
            Err(error @ EngineError::PeerAborted { .. }) => (Input::PeerAborted, Some(error)),
            Err(error) => {
                self.tell_abort(&error).await;
                (Input::LoadFailed, Some(error))
            }
        };
        let mut owner = Owner {
            client: &self.place.client,
            journal,
            voice: Voice { control: self.control, receiver: self.receiver, closer: self.closer },
            asks,
            migration: self.migration,
            lease: self.place.lease,
            ready,
            ram: &self.ram,
            commit: None,
            is_lost: false,
            source_knows: true,
        };
        let outcome = owner.drive(Destination::Receiving, input).await;
        error.map_or(Ok(outcome), Err)
    }

    /// Handles control messages until the guest is loaded.
    async fn receive(&mut self) -> Result<Ready, EngineError> {
        loop {
            let applier = Arc::clone(&self.applier);
            let message = tokio::select! {
                message = self.receiver.recv() => message?,
                error = applier.failed() => return Err(error.into()),
                () = tokio::time::sleep(IDLE_MAX) => return Err(EngineError::TooSlow {
                    wanted: "anything",
                    seconds: IDLE_MAX.as_secs(),
                }),
            };
            tracing::debug!(message = message.name(), "control");
            match message {
                Message::Sync(sync) => self.sync(&sync).await?,
                Message::VerifyRequest(request) => self.verify(&request).await?,
                Message::DeviceState(part) => {
                    if part.offset != self.device_state.len() as u64 {
                        return Err(EngineError::Contradiction(format!(
                            "device state goes on at byte {}, not at {}",
                            part.offset,
                            self.device_state.len()
                        )));
                    }
                    self.device_state.extend_from_slice(&part.bytes);
                }
                Message::Load(load) => return self.load(&load).await,
                Message::Abort(abort) => {
                    return Err(EngineError::PeerAborted { code: abort.code, text: abort.text });
                }
                other => {
                    return Err(EngineError::OutOfPlace {
                        got: other.name(),
                        wanted: "pages or device state",
                    });
                }
            }
        }
    }

    async fn sync(&mut self, sync: &Sync) -> Result<(), EngineError> {
        if sync.batches.len() != self.applier.applied().1.len() {
            return Err(EngineError::Contradiction("another number of lanes than it has".into()));
        }
        tokio::select! {
            reached = self.applier.reach(&sync.batches) => reached?,
            () = tokio::time::sleep(IDLE_MAX) => return Err(EngineError::TooSlow {
                wanted: "the batches that it announced",
                seconds: IDLE_MAX.as_secs(),
            }),
        }
        let version_digest = self.pages.digest();
        let synced = Synced { sequence: sync.sequence, version_digest };
        Ok(self.control.send(&Message::Synced(synced)).await?)
    }

    async fn verify(&self, request: &VerifyRequest) -> Result<(), EngineError> {
        let total = self.ram.layout().pages();
        for first in (0..total).step_by(DIGESTS_MAX) {
            let (ram, seed) = (Arc::clone(&self.ram), request.seed);
            let count = (total - first).min(DIGESTS_MAX as u64);
            let digests = tokio::task::spawn_blocking(move || {
                verify::digests(&ram, seed, PageIndex(first), count)
            });
            let digests =
                digests.await.map_err(|error| EngineError::Internal(error.to_string()))??;
            let chunk = VerifyChunk { first_page: first, digests };
            self.control.send(&Message::VerifyChunk(chunk)).await?;
        }
        Ok(self.control.send(&Message::VerifyEnd(VerifyEnd { pages: total })).await?)
    }

    async fn load(&mut self, load: &Load) -> Result<Ready, EngineError> {
        let state = std::mem::take(&mut self.device_state);
        if load.total_bytes != state.len() as u64 || load.digest != xxh3_64(&state) {
            return Err(EngineError::Contradiction("another device state than it sent".into()));
        }
        if load.version_digest != self.pages.digest() {
            return Err(EngineError::Contradiction("other pages than it sent".into()));
        }
        failpoint::hit("destination-loading").await;
        let began = Instant::now();
        let status = device_state::load(&self.place.client, state).await?;
        let load_us = began.elapsed().as_micros() as u64;
        if status.running || status.state == RunState::InMigrate {
            let found = status.state.to_string();
            return Err(EngineError::RunState { found, wanted: "paused" });
        }
        failpoint::hit("destination-loaded").await;
        Ok(Ready {
            load_us,
            version_digest: self.pages.digest(),
            run_state: messages::text(status.state.as_str()),
        })
    }

    async fn tell_abort(&self, error: &EngineError) {
        let text = messages::text(&error.tell());
        tracing::warn!(bin = %error.bin(), text, "migration refused");
        let abort = Message::Abort(Abort { code: error.abort_code(), text });
        let _told = tokio::time::timeout(Duration::from_secs(1), self.control.send(&abort)).await;
    }

    /// After this, nothing writes guest memory any more.
    async fn stop_tasks(&mut self) {
        for task in self.tasks.drain(..) {
            task.abort();
            let _aborted = task.await;
        }
        let applier = Arc::clone(&self.applier);
        let _joined = tokio::task::spawn_blocking(move || applier.join()).await;
    }
}

async fn drain(mut lane: LaneReceiver, inlet: LaneInlet, closer: Closer) {
    loop {
        match lane.recv().await {
            Ok(Some(batch)) => {
                if !inlet.push(batch).await {
                    break;
                }
            }
            Ok(None) => break,
            Err(error) if error.bin() == ErrorBin::PeerMisbehaved => {
                closer.close(close_code::PROTOCOL, &EngineError::from(error).tell()).await;
                break;
            }
            Err(error) => {
                tracing::info!(lane = lane.index(), %error, "lane ended");
                break;
            }
        }
    }
    // Nothing more comes on this lane; the control stream says what that means.
    drop(inlet);
    pending::<()>().await;
}

async fn tell_progress(control: ControlSender, applier: Arc<Applier>) {
    let mut told = 0;
    loop {
        tokio::time::sleep(PROGRESS_EVERY).await;
        let (applied_bytes, applied_batches) = applier.applied();
        if applied_bytes == told {
            continue;
        }
        told = applied_bytes;
        let progress = Message::Progress(Progress { applied_bytes, applied_batches });
        if control.send(&progress).await.is_err() {
            return;
        }
    }
}
