//! One guest coming in: its description, its pages, its device state.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migrate_core::error::{Classify, ErrorBin};
use migrate_core::handover::destination::Input;
use migrate_core::handover::{Destination, DestinationRecord, Outcome};
use migrate_core::layout::{PageIndex, RamLayout};
use migrate_core::page_table::DestinationPages;
use migrate_core::pageset::PageSet;
use qemu_glue::check::Severity;
use qemu_glue::device_state::{self, Loading, Settling};
use qemu_glue::pager::Duty;
use qemu_glue::procfs;
use qemu_glue::qmp::RunState;
use qemu_glue::ram::GuestRam;
use tokio::sync::mpsc;
use transport::messages::{
    self, Abort, Accept, DIGESTS_MAX, Describe, Load, Message, Missing, MissingEnd, Prepared,
    Ready, Refuse, RefuseCode, RemoteEnd, Split, Sync, Synced, VerifyChunk, VerifyEnd,
    VerifyRequest,
};
use transport::{Closer, ControlReceiver, ControlSender, DestinationSession, close_code};
use xxhash_rust::xxh3::xxh3_64;

use super::Place;
use super::intake::Intake;
use super::owner::{Owner, Voice};
use super::paging::{self, Paging};
use super::remote::{Attached, Reached, RemoteGuest, check_version};
use crate::blocking::on_thread;
use crate::error::EngineError;
use crate::journal::{Entry, Journal, PagingEntry, Record};
use crate::missing::Arriving;
use crate::{attaching, failpoint, state_parts, stream, tell, verify};

/// Most RAM blocks of a guest whose pages may be missing: the journal holds them all.
const PAGED_BLOCKS_MAX: usize = 32;

/// Longest plausible direct I/O of the disks of a guest that has none at its source, in milliseconds.
const DIRECT_IO_WINDOW_MS: u32 = 3000;

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
    tell!("session from {} ({})", session.peer.name, session.peer.addr);
    let begun = match described(&mut session).await {
        Ok(Message::Describe(guest)) => begin(&place, &session, guest).await,
        Ok(Message::StreamGuest(told)) => {
            let taken = stream::destination::take_guest(&place, session, &told.guest, asks);
            return Box::pin(taken).await;
        }
        Ok(Message::StreamOpen(_)) => Err(EngineError::Refused {
            code: RefuseCode::NoPlace,
            text: "this is `migrate receive`: start `migrate gateway destination` for a gateway"
                .into(),
        }),
        Ok(other) => Err(EngineError::OutOfPlace { got: other.name(), wanted: "Describe" }),
        Err(error) => Err(error),
    };
    let (ram, mut journal) = match begun {
        Ok(begun) => begun,
        Err(error) => return (None, refused(&session, error).await),
    };
    let arrival = Arrival::start(Arc::clone(&place), ram, session);
    let outcome = arrival.run(&mut journal, asks).await;
    (Some(journal), outcome)
}

/// The source's first word: which guest it wants to bring.
async fn described(session: &mut DestinationSession) -> Result<Message, EngineError> {
    let described = tokio::time::timeout(DESCRIBE_WITHIN, session.control_receiver.recv()).await;
    Ok(described.map_err(|_| EngineError::TooSlow {
        wanted: "a description of the guest",
        seconds: DESCRIBE_WITHIN.as_secs(),
    })??)
}

/// Tells a source why its guest is not taken.
///
/// # Errors
/// Just that.
pub async fn refused(
    session: &DestinationSession,
    error: EngineError,
) -> Result<Outcome, EngineError> {
    refuse(session, refuse_code(&error), &error.tell()).await;
    Err(error)
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
        EngineError::Misuse { .. } | EngineError::NotWaiting { .. } | EngineError::Blocked(_) => {
            RefuseCode::NoPlace
        }
        _ => RefuseCode::Internal,
    }
}

/// Compares the guest with the place and records the beginning.
async fn begin(
    place: &Place,
    session: &DestinationSession,
    guest: Describe,
) -> Result<(Arc<GuestRam>, Journal), EngineError> {
    super::check_waiting(&place.client).await?;
    check_machine(place, &guest)?;
    if !place.vm.blockers.is_empty() {
        return Err(EngineError::Blocked(place.vm.blockers.clone()));
    }
    let theirs = RamLayout::new(guest.blocks.clone())?;
    let ram = Arc::new(GuestRam::open(place.vm.pid, &place.vm.regions, true)?);
    ram.layout().check_same(&theirs)?;
    failpoint::hit("destination-describing").await;
    let journal = journal(place, session, &guest)?;
    let no_post_copy = guest.post_copy.then(|| no_post_copy(place, &theirs)).flatten();
    let told = accept(place, session, &ram, no_post_copy).await;
    Ok((ram, kept_if(told, journal)?))
}

/// The journal of a guest whose source was told that it may begin; none is left of another.
///
/// # Errors
/// Why it was not told.
pub fn kept_if(told: Result<(), EngineError>, journal: Journal) -> Result<Journal, EngineError> {
    match told {
        Ok(()) => Ok(journal),
        Err(error) => {
            // The source never heard that it was accepted, or has gone: nobody will ask.
            journal.remove();
            Err(error)
        }
    }
}

/// Creates the journal of a guest that comes in.
///
/// # Errors
/// If it cannot be written.
pub fn journal(
    place: &Place,
    session: &DestinationSession,
    guest: &Describe,
) -> Result<Journal, EngineError> {
    let entry = Entry {
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
        paging: None,
    };
    Ok(Journal::create(&place.journal_dir, entry)?)
}

/// Empties the place and tells the source that it may begin.
async fn accept(
    place: &Place,
    session: &DestinationSession,
    ram: &Arc<GuestRam>,
    no_post_copy: Option<String>,
) -> Result<(), EngineError> {
    // What an earlier attempt left must not shine through pages that are zero at the source.
    let clean = Arc::clone(ram);
    on_thread(move || empty(&clean)).await??;
    let accept = Accept {
        qemu_version: place.vm.qemu.numbers(),
        resident_bytes: ram.resident_bytes()?,
        no_post_copy,
    };
    Ok(session.control_sender.send(&Message::Accept(accept)).await?)
}

/// Why a guest cannot run here before its pages are here.
fn no_post_copy(place: &Place, theirs: &RamLayout) -> Option<String> {
    if place.vm.regions.len() > PAGED_BLOCKS_MAX {
        let blocks = place.vm.regions.len();
        return Some(format!("{blocks} RAM blocks; at most {PAGED_BLOCKS_MAX} can be paged"));
    }
    for (ours, theirs) in place.vm.regions.iter().zip(theirs.blocks()) {
        if ours.page_bytes != theirs.page_bytes {
            return Some(messages::text(&format!(
                "RAM block {} has pages of {} bytes here and of {} there",
                ours.name, ours.page_bytes, theirs.page_bytes
            )));
        }
    }
    let findings = attaching::probe(place.vm.pid, None);
    let blocker = findings.into_iter().find(|found| found.severity >= Severity::Indirect)?;
    let remedy = blocker.remedy.map(|remedy| format!(" ({remedy})")).unwrap_or_default();
    Some(messages::text(&format!("{}{remedy}", blocker.what)))
}

/// The QEMU here can load the guest: it has the same machine type and is not older.
///
/// # Errors
/// [`EngineError::Refused`] with the remedy.
pub fn check_machine(place: &Place, guest: &Describe) -> Result<(), EngineError> {
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
    discard_all(ram, &ram.data_ranges()?)
}

/// Punches pages out. Blocks.
fn discard_all(ram: &GuestRam, set: &PageSet) -> Result<(), EngineError> {
    let mut pages = set.iter().peekable();
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
    intake: Option<Intake>,
    /// What the source says is missing, part by part.
    arriving: Arriving,
    /// All of it, once that is known.
    missing: Option<PageSet>,
    verify_seed: Option<u64>,
    /// A descriptor to page with, and QEMU's copy of it.
    uffd: Option<(OwnedFd, i32)>,
    paging: Option<Paging>,
    /// The memory servers of a guest whose memory is split, and what lies there.
    split: Option<(Reached, Vec<PageSet>)>,
    /// The highest version of a page that lies there.
    remote_version: u64,
    /// Pages such a guest, once it is loaded.
    remote: Option<RemoteGuest>,
    control: ControlSender,
    receiver: ControlReceiver,
    closer: Closer,
    migration: transport::MigrationId,
    device_state: Vec<u8>,
    /// QEMU, prepared to load it.
    loading: Option<Loading>,
    /// What QEMU has left to do after loading.
    settling: Option<Settling>,
}

impl Arrival {
    fn start(place: Arc<Place>, ram: Arc<GuestRam>, session: DestinationSession) -> Self {
        let pages = Arc::new(DestinationPages::new(ram.layout().pages()));
        let (control, closer) = (session.control_sender.clone(), session.closer.clone());
        let taken = (Arc::clone(&ram), Arc::clone(&pages));
        let intake = Intake::start(taken.0, taken.1, session.lanes, control, &closer);
        Self {
            place,
            arriving: Arriving::new(ram.layout().pages()),
            ram,
            pages,
            intake: Some(intake),
            missing: None,
            verify_seed: None,
            uffd: None,
            paging: None,
            split: None,
            remote_version: 0,
            remote: None,
            control: session.control_sender,
            receiver: session.control_receiver,
            closer,
            migration: session.migration,
            device_state: vec![],
            loading: None,
            settling: None,
        }
    }

    async fn run(
        mut self,
        journal: &mut Journal,
        asks: &mut mpsc::Receiver<DestinationSession>,
    ) -> Result<Outcome, EngineError> {
        let loaded = self.receive(journal).await;
        if let Some(mut intake) = self.intake.take() {
            intake.stop().await;
        }
        if loaded.is_err()
            && let Some((uffd, remote_fd)) = self.uffd.take()
        {
            drop(uffd);
            attaching::close_copy(self.place.vm.pid, remote_fd).await;
        }
        if let Some(loading) = self.loading.take() {
            loading.give_up().await;
        }
        let Concluded { input, ready, error } = conclude(loaded, &self.control).await;
        let mut owner = Owner {
            client: &self.place.client,
            journal,
            voice: Voice { control: self.control, receiver: self.receiver, closer: self.closer },
            paging: self.paging,
            rest: None,
            remote: self.remote,
            faults: None,
            asks,
            migration: self.migration,
            lease: self.place.lease,
            ready,
            ram: Some(&self.ram),
            commit: None,
            is_lost: false,
            fetches: &self.place.fetches,
            source_knows: true,
        };
        let outcome = owner.drive(Destination::Receiving, input).await;
        *self.place.remote.lock() = owner.remote.take();
        if let Some(settling) = self.settling
            && let Err(error) = settling.settled().await
        {
            tracing::warn!(%error, "migration settings not put back");
        }
        error.map_or(Ok(outcome), Err)
    }

    /// Handles control messages until the guest is loaded.
    async fn receive(&mut self, journal: &mut Journal) -> Result<Ready, EngineError> {
        loop {
            let applier = Arc::clone(self.intake()?.applier());
            let (before, _) = applier.applied();
            let message = tokio::select! {
                message = self.receiver.recv() => message?,
                error = applier.failed() => return Err(error.into()),
                () = tokio::time::sleep(IDLE_MAX) => {
                    // A split guest that changes its main host sends its pages elsewhere.
                    let is_moved =
                        self.split.as_ref().is_some_and(|(reached, _)| reached.split.is_moved);
                    if is_moved || applier.applied().0 != before {
                        continue;
                    }
                    let seconds = IDLE_MAX.as_secs();
                    return Err(EngineError::TooSlow { wanted: "anything", seconds });
                }
            };
            tracing::debug!(message = message.name(), "control");
            match message {
                Message::Sync(sync) => self.sync(&sync).await?,
                Message::VerifyRequest(request) => self.verify(&request).await?,
                Message::Missing(part) => self.drop_pages(&part).await?,
                Message::Prepare(_) => self.prepare(journal).await?,
                Message::Split(split) => self.reach(split).await?,
                Message::RemoteEnd(end) => self.all_remote(&end)?,
                Message::MissingEnd(end) => self.all_missing(&end)?,
                Message::DeviceState(part) => {
                    if part.offset != self.device_state.len() as u64 {
                        return Err(EngineError::Contradiction(format!(
                            "device state goes on at byte {}, not at {}",
                            part.offset,
                            self.device_state.len()
                        )));
                    }
                    self.device_state.extend(state_parts::unpacked(part)?);
                    if self.loading.is_none() {
                        // While the rest is on its way.
                        self.loading = Some(device_state::prepare_load(&self.place.client).await?);
                    }
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
        let applier = Arc::clone(self.intake()?.applier());
        if sync.batches.len() != applier.applied().1.len() {
            return Err(EngineError::Contradiction("another number of lanes than it has".into()));
        }
        tokio::select! {
            reached = applier.reach(&sync.batches) => reached?,
            () = tokio::time::sleep(IDLE_MAX) => return Err(EngineError::TooSlow {
                wanted: "the batches that it announced",
                seconds: IDLE_MAX.as_secs(),
            }),
        }
        let version_digest = self.pages.digest();
        let synced = Synced { sequence: sync.sequence, version_digest };
        Ok(self.control.send(&Message::Synced(synced)).await?)
    }

    fn intake(&self) -> Result<&Intake, EngineError> {
        self.intake.as_ref().ok_or_else(|| EngineError::Internal("nothing is taken in".into()))
    }

    /// Drops pages that are out of date: they are fetched once the guest runs here.
    async fn drop_pages(&mut self, part: &Missing) -> Result<(), EngineError> {
        let dropped = self.arriving.add(part)?;
        let ram = Arc::clone(&self.ram);
        on_thread(move || discard_all(&ram, &dropped)).await?
    }

    /// Gets hold of QEMU's page faults, while the guest still runs at its source.
    async fn prepare(&mut self, journal: &mut Journal) -> Result<(), EngineError> {
        if self.uffd.is_some() {
            return Err(EngineError::OutOfPlace { got: "Prepare", wanted: "MissingEnd" });
        }
        failpoint::hit("destination-preparing").await;
        let attached = attaching::attach_shared(self.place.vm.pid).await?;
        let remote_fd = attached.1;
        self.uffd = Some(attached);
        let regions = self.place.vm.regions.clone();
        let split = self.split.as_ref().map(|(reached, _)| reached.split.clone());
        journal.set_paging(PagingEntry { remote_fd, regions, split })?;
        self.arriving = Arriving::new(self.ram.layout().pages());
        Ok(self.control.send(&Message::Prepared(Prepared {})).await?)
    }

    fn all_missing(&mut self, end: &MissingEnd) -> Result<(), EngineError> {
        if self.uffd.is_none() || self.missing.is_some() {
            return Err(EngineError::OutOfPlace { got: "MissingEnd", wanted: "pages" });
        }
        let fresh = Arriving::new(self.ram.layout().pages());
        self.missing = Some(std::mem::replace(&mut self.arriving, fresh).end(end)?);
        Ok(())
    }

    /// Reaches the memory servers of the guest.
    async fn reach(&mut self, mut split: Split) -> Result<(), EngineError> {
        if self.split.is_some() {
            return Err(EngineError::OutOfPlace { got: "Split", wanted: "pages" });
        }
        if let Some(why) = no_post_copy(&self.place, self.ram.layout()) {
            return Err(EngineError::Refused { code: RefuseCode::NoPlace, text: why });
        }
        Duty::Evict.check(&self.ram)?;
        if !self.place.vm.direct_io.is_empty() && split.direct_io_window_ms == 0 {
            split.direct_io_window_ms = DIRECT_IO_WINDOW_MS;
        }
        let identity = Arc::new(transport::Identity::load(&self.place.identity_dir)?);
        let options = transport::Options { dead_peer: self.place.dead_peer, ..Default::default() };
        let reached = on_thread(move || Reached::connect(split, identity, options)).await??;
        self.split = Some((reached, vec![]));
        Ok(self.control.send(&Message::Prepared(Prepared {})).await?)
    }

    /// The pages that were said to be missing lie on a memory server.
    fn all_remote(&mut self, end: &RemoteEnd) -> Result<(), EngineError> {
        let out_of_place = || EngineError::OutOfPlace { got: "RemoteEnd", wanted: "pages" };
        let (reached, remote) = self.split.as_mut().ok_or_else(out_of_place)?;
        let in_order = usize::from(end.store) == remote.len();
        if self.uffd.is_none() || !in_order || remote.len() >= reached.split.stores.len() {
            return Err(out_of_place());
        }
        check_version(end.version)?;
        self.remote_version = self.remote_version.max(end.version);
        let fresh = Arriving::new(self.ram.layout().pages());
        let arrived = std::mem::replace(&mut self.arriving, fresh);
        remote.push(arrived.end(&MissingEnd { pages: end.pages })?);
        Ok(())
    }

    /// Begins to page a guest whose memory is split: loading the device state touches memory.
    async fn begin_remote(
        &mut self,
        mut reached: Reached,
        remote: Vec<PageSet>,
    ) -> Result<(), EngineError> {
        let uffd = self.uffd.take();
        let (uffd, remote_fd) =
            uffd.ok_or_else(|| EngineError::Internal("there is nothing to page with".into()))?;
        let (place, ram) = (Arc::clone(&self.place), Arc::clone(&self.ram));
        let remote = (remote, self.remote_version);
        let kept = on_thread(move || reached.keep().map(|()| reached)).await.and_then(|kept| kept);
        let started = match kept {
            Ok(reached) => {
                let attached = Attached { uffd, remote_fd };
                RemoteGuest::start(place.vm.label(), ram, attached, reached, remote).await
            }
            Err(error) => Err(error),
        };
        match started {
            Ok(started) => {
                self.remote = Some(started);
                Ok(())
            }
            Err(error) => {
                attaching::close_copy(self.place.vm.pid, remote_fd).await;
                Err(error)
            }
        }
    }

    /// Begins to serve faults: loading the device state touches memory.
    async fn begin_paging(&mut self, missing: PageSet) -> Result<(), EngineError> {
        let parts = self.uffd.take().zip(self.intake.take());
        let ((uffd, remote_fd), intake) =
            parts.ok_or_else(|| EngineError::Internal("there is nothing to page with".into()))?;
        let (ram, seed) = (Arc::clone(&self.ram), self.verify_seed);
        match Paging::start(uffd, remote_fd, ram, missing, seed, intake).await {
            Ok(mut paging) => {
                let connected = paging.connect(self.control.clone()).await;
                self.paging = Some(paging);
                connected
            }
            Err((error, intake)) => {
                self.intake = Some(intake);
                attaching::close_copy(self.place.vm.pid, remote_fd).await;
                Err(error)
            }
        }
    }

    async fn verify(&mut self, request: &VerifyRequest) -> Result<(), EngineError> {
        self.verify_seed = Some(request.seed);
        let total = self.ram.layout().pages();
        for first in (0..total).step_by(DIGESTS_MAX) {
            let (ram, seed) = (Arc::clone(&self.ram), request.seed);
            let count = (total - first).min(DIGESTS_MAX as u64);
            let digests = move || verify::digests(&ram, seed, PageIndex(first), count);
            let digests = on_thread(digests).await??;
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
        let version_digest = self.pages.digest();
        if load.version_digest != version_digest {
            return Err(EngineError::Contradiction("other pages than it sent".into()));
        }
        failpoint::hit("destination-loading").await;
        if let Some(missing) = self.missing.take() {
            self.begin_paging(missing).await?;
            failpoint::hit("destination-paging").await;
        }
        if let Some((reached, remote)) = self.split.take() {
            self.begin_remote(reached, remote).await?;
            failpoint::hit("destination-split").await;
        }
        let began = Instant::now();
        let loading = match self.loading.take() {
            Some(loading) => loading,
            None => device_state::prepare_load(&self.place.client).await?,
        };
        // A guest that lacks pages goes on taking them in; for all others this is the end.
        let intake = self.intake.take();
        let taken_in = async {
            if let Some(mut intake) = intake {
                intake.stop().await;
            }
        };
        let loaded = async { tokio::join!(loading.load(state), taken_in).0 };
        let is_paged = self.paging.is_some();
        let (status, settling) = tokio::select! {
            loaded = loaded => loaded?,
            // Loading may wait for a page that nobody sends any more.
            error = paging::failed(&mut self.paging) => return Err(error),
            lost = self.closer.closed(), if is_paged => return Err(lost.into()),
        };
        self.settling = Some(settling);
        let load_us = began.elapsed().as_micros() as u64;
        if status.running || status.state == RunState::InMigrate {
            let found = status.state.to_string();
            return Err(EngineError::RunState { found, wanted: "paused" });
        }
        failpoint::hit("destination-loaded").await;
        Ok(Ready { load_us, version_digest, run_state: messages::text(status.state.as_str()) })
    }
}

/// What the loading of a guest means for the hand-over.
#[derive(Debug)]
pub struct Concluded {
    /// For the hand-over.
    pub input: Input,
    /// To tell the source.
    pub ready: Option<Ready>,
    /// What went wrong.
    pub error: Option<EngineError>,
}

/// Draws the conclusion; tells a source that can be reached what went wrong here.
pub async fn conclude(loaded: Result<Ready, EngineError>, control: &ControlSender) -> Concluded {
    let (input, error) = match loaded {
        Ok(ready) => return Concluded { input: Input::Loaded, ready: Some(ready), error: None },
        Err(error) if error.is_lost_contact() => {
            if error.bin() == ErrorBin::PeerMisbehaved {
                warn_refused(&error);
            }
            (Input::Lost, error)
        }
        Err(error @ EngineError::PeerAborted { .. }) => (Input::PeerAborted, error),
        Err(error) => {
            warn_refused(&error);
            let text = messages::text(&error.tell());
            let abort = Message::Abort(Abort { code: error.abort_code(), text });
            let _told = tokio::time::timeout(Duration::from_secs(1), control.send(&abort)).await;
            (Input::LoadFailed, error)
        }
    };
    Concluded { input, ready: None, error: Some(error) }
}

fn warn_refused(error: &EngineError) {
    tracing::warn!(bin = %error.bin(), text = error.tell(), "migration refused");
}
