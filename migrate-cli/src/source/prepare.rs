//! Everything that can be found out before the guest is touched: the VM, the destination, the journal.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use migrate_core::batch::LANES_MAX;
use migrate_core::handover::SourceRecord;
use migrate_core::layout::{BlockSpec, PAGE_BYTES};
use qemu_glue::check::{Finding, Severity};
use qemu_glue::procfs;
use qemu_glue::qmp::Client;
use qemu_glue::ram::GuestRam;
use qemu_glue::vm::{self, VmInventory};
use transport::messages::{Accept, Describe, Intent, Message, MigrationId};
use transport::{Identity, LaneSender, Offer, Options, SourceSession, TransportError};

use crate::args::{CommonArgs, Mode, PathChoice, SendArgs};
use crate::blocking::worker_threads;
use crate::error::EngineError;
use crate::journal::{Entry, Journal, Record};
use crate::{ENGINE, attaching, failpoint, random};

/// The monitor's command for it; its answer changes when a block appears, vanishes or is resized.
const RAM_BLOCKS: &str = "info ramblock";

/// A busy destination is asked again this often, this long apart.
const BUSY_RETRIES: u32 = 3;
const BUSY_WAIT: Duration = Duration::from_secs(1);

/// What waits for guests at a destination.
pub const RECEIVE: &str = "migrate receive";

/// Longest wait for the destination to look at its place and empty it.
const ACCEPT_WITHIN: Duration = Duration::from_secs(60);

/// The guest and everything known of it.
#[derive(Debug)]
pub struct Guest {
    /// QEMU's monitor.
    pub client: Client,
    /// The VM.
    pub vm: VmInventory,
    /// Its memory, opened for reading.
    pub ram: Arc<GuestRam>,
    /// QEMU's list of RAM blocks as it was then.
    pub ram_blocks: String,
}

/// A VM whose monitor answers.
#[derive(Debug)]
pub struct Found {
    /// QEMU's monitor.
    pub client: Client,
    /// The VM.
    pub vm: VmInventory,
}

/// How a guest is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestPath {
    /// Through the shared file that holds its RAM.
    Direct,
    /// Through its QEMU's stream.
    Stream,
}

/// Connects to the VM and looks at it.
///
/// # Errors
/// If QEMU does not answer.
pub async fn find(args: &SendArgs) -> Result<Found, EngineError> {
    let client = Client::connect(&args.common.qmp).await?;
    let vm = vm::inventory(&client).await?;
    Ok(Found { client, vm })
}

impl Found {
    /// The path that is `asked` for, or the best one that there is; and why that is not the direct one.
    ///
    /// # Errors
    /// [`EngineError::Blocked`] with every reason and remedy.
    pub fn path(
        &self,
        asked: PathChoice,
        preload_socket: Option<&Path>,
    ) -> Result<(GuestPath, Option<String>), EngineError> {
        let worse = |severity| move |finding: &Finding| finding.severity >= severity;
        let found = self.vm.blockers.iter().cloned();
        let blocked: Vec<_> = found.clone().filter(worse(Severity::Blocker)).collect();
        if asked == PathChoice::Stream {
            return match blocked.is_empty() {
                true => Ok((GuestPath::Stream, None)),
                false => Err(EngineError::Blocked(blocked)),
            };
        }
        let attaching = attaching::probe(self.vm.pid, preload_socket);
        let mut indirect: Vec<_> =
            found.chain(attaching).filter(worse(Severity::Indirect)).collect();
        match indirect.first() {
            None => Ok((GuestPath::Direct, None)),
            Some(_) if asked == PathChoice::Auto && blocked.is_empty() => {
                Ok((GuestPath::Stream, Some(indirect.swap_remove(0).what)))
            }
            Some(_) => Err(EngineError::Blocked(indirect)),
        }
    }

    /// Opens the guest's memory, for the direct path.
    ///
    /// # Errors
    /// What failed.
    pub async fn open(self) -> Result<Guest, EngineError> {
        let Self { client, vm, .. } = self;
        let ram = Arc::new(GuestRam::open(vm.pid, &vm.regions, false)?);
        let ram_blocks = client.hmp(RAM_BLOCKS).await?;
        Ok(Guest { client, vm, ram, ram_blocks })
    }
}

/// The same of a guest that this process has attached to.
///
/// # Errors
/// [`EngineError::Blocked`] with every reason and remedy, or what failed.
pub async fn paged_guest(client: Client, ram: Arc<GuestRam>) -> Result<Guest, EngineError> {
    let vm = vm::inventory(&client).await?;
    if !vm.blockers.is_empty() {
        return Err(EngineError::Blocked(vm.blockers));
    }
    let ram_blocks = client.hmp(RAM_BLOCKS).await?;
    Ok(Guest { client, vm, ram, ram_blocks })
}

/// Resolves an address as typed.
///
/// # Errors
/// [`EngineError::Misuse`] if it names no host.
pub async fn resolve_address(text: &str) -> Result<SocketAddr, EngineError> {
    let misuse = |why: String| EngineError::Misuse {
        what: format!("{text:?} is no address of a destination: {why}"),
        remedy: "Give HOST:PORT, as in 192.0.2.7:7700".into(),
    };
    let mut found =
        tokio::net::lookup_host(text).await.map_err(|error| misuse(error.to_string()))?;
    found.next().ok_or_else(|| misuse("the name has no address".into()))
}

/// Session options from what was typed.
pub fn options(common: &CommonArgs, lanes: usize) -> Options {
    Options {
        lanes,
        dead_peer: common.dead_peer(),
        expected_peer: common.peer.clone(),
        ..Options::default()
    }
}

/// Opens the session and describes the guest. A busy destination is asked again a few times.
///
/// # Errors
/// What the transport says, or [`EngineError::Refused`] with the destination's reason.
pub async fn accepted(
    addr: SocketAddr,
    identity: &Identity,
    options: &Options,
    migration: MigrationId,
    guest: &Guest,
    asked: Asked,
) -> Result<Accepted, EngineError> {
    unless_busy(|| accepted_once(addr, identity, options, migration, guest, asked)).await
}

/// Tries again a few times while a destination is busy.
///
/// # Errors
/// What the last attempt says.
pub async fn unless_busy<T, F>(attempt: impl Fn() -> F) -> Result<T, EngineError>
where
    F: Future<Output = Result<T, EngineError>>,
{
    let mut tries = 0;
    loop {
        match attempt().await {
            Err(error) if error.is_busy() && tries < BUSY_RETRIES => {
                tries += 1;
                tokio::time::sleep(BUSY_WAIT).await;
            }
            other => return other,
        }
    }
}

/// What a destination is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// To compare all pages.
    pub verify: bool,
    /// How memory is moved.
    pub mode: Mode,
}

/// A session whose destination takes the guest.
#[derive(Debug)]
pub struct Accepted {
    /// The session, without the urgent lane.
    pub session: SourceSession,
    /// The lane for pages that the guest waits for, where it may be handed over before its pages.
    pub urgent: Option<LaneSender>,
}

/// Opens the session of a migration with an engine that was started with this `command`.
///
/// # Errors
/// [`EngineError::Unreachable`], or what the transport says.
pub async fn connect(
    addr: SocketAddr,
    identity: &Identity,
    options: &Options,
    migration: MigrationId,
    command: &'static str,
) -> Result<SourceSession, EngineError> {
    let offer = Offer::new(ENGINE, migration, Intent::Migrate);
    let session = transport::connect(addr, identity, options, offer).await;
    session.map_err(|error| match error {
        source @ (TransportError::Lost { .. } | TransportError::HandshakeTimeout { .. }) => {
            EngineError::Unreachable { addr, command, source: Box::new(source) }
        }
        other => EngineError::from(other),
    })
}

async fn accepted_once(
    addr: SocketAddr,
    identity: &Identity,
    options: &Options,
    migration: MigrationId,
    guest: &Guest,
    Asked { verify, mode }: Asked,
) -> Result<Accepted, EngineError> {
    let mut session = connect(addr, identity, options, migration, RECEIVE).await?;
    let described = describe(&mut session, guest, verify, mode != Mode::PreCopy).await;
    match described.and_then(|accept| urgent_lane(&mut session, accept, mode)) {
        Ok(urgent) => Ok(Accepted { session, urgent }),
        Err(error) => Err(closed(session, error).await),
    }
}

/// Ends a session in which nothing will be moved; why.
pub async fn closed(session: SourceSession, error: EngineError) -> EngineError {
    session.close(transport::close_code::ABORTED, &error.tell()).await;
    error
}

/// Describes the guest to the destination, which accepts or refuses it.
///
/// # Errors
/// [`EngineError::Refused`] with the destination's reason.
pub async fn describe(
    session: &mut SourceSession,
    guest: &Guest,
    verify: bool,
    post_copy: bool,
) -> Result<Accept, EngineError> {
    let blocks = guest.ram.layout().blocks().to_vec();
    let description = Describe { verify, post_copy, ..description(&guest.vm, blocks) };
    ask(session, Message::Describe(description)).await
}

/// A guest with these blocks, of which nothing special is wanted.
pub fn description(vm: &VmInventory, blocks: Vec<BlockSpec>) -> Describe {
    Describe {
        vm_name: vm.label(),
        vm_uuid: Some(vm.uuid.clone()),
        machine: vm.machine.clone(),
        qemu_version: vm.qemu.numbers(),
        page_bytes: PAGE_BYTES as u32,
        blocks,
        verify: false,
        post_copy: false,
    }
}

/// Asks the destination to take the guest that is described.
///
/// # Errors
/// [`EngineError::Refused`] with the destination's reason.
pub async fn ask(session: &mut SourceSession, description: Message) -> Result<Accept, EngineError> {
    session.control_sender.send(&description).await?;
    let wanted = "whether it takes the guest";
    let late = |_| EngineError::TooSlow { wanted, seconds: ACCEPT_WITHIN.as_secs() };
    let answer = tokio::time::timeout(ACCEPT_WITHIN, session.control_receiver.recv()).await;
    match answer.map_err(late)?? {
        Message::Accept(accept) => Ok(accept),
        Message::Refuse(refuse) => {
            Err(EngineError::Refused { code: refuse.code, text: refuse.text })
        }
        other => Err(EngineError::OutOfPlace { got: other.name(), wanted: "Accept or Refuse" }),
    }
}

/// Sets a lane aside for pages that the guest waits for, if it may have to wait for any.
fn urgent_lane(
    session: &mut SourceSession,
    accept: Accept,
    mode: Mode,
) -> Result<Option<LaneSender>, EngineError> {
    if mode == Mode::PreCopy {
        return Ok(None);
    }
    let urgent = session.lanes.pop();
    let why = match accept.no_post_copy {
        None if !session.lanes.is_empty() => return Ok(urgent),
        None => "it allows one lane only".to_owned(),
        Some(why) => why,
    };
    if session.lanes.is_empty() {
        session.lanes.extend(urgent);
    }
    if mode == Mode::Auto {
        tracing::info!(why, "post-copy is not possible");
        return Ok(None);
    }
    Err(EngineError::Misuse {
        what: format!("The destination cannot run a guest before its pages are there: {why}"),
        remedy: "Put that right there, or use --mode pre-copy".into(),
    })
}

/// Creates the journal. From here on a crash leaves a trace.
///
/// # Errors
/// If it cannot be written.
pub fn journal(
    common: &CommonArgs,
    to: &str,
    keep_source: bool,
    vm: &VmInventory,
    migration: MigrationId,
    peer_name: &str,
) -> Result<Journal, EngineError> {
    let dir = common.journal_dir();
    let entry = Entry {
        migration: migration.to_string(),
        record: Record::Source(SourceRecord::Moving),
        qmp: std::path::absolute(&common.qmp).unwrap_or_else(|_| common.qmp.clone()),
        vm: vm.label(),
        qemu_pid: vm.pid,
        qemu_start_ticks: procfs::start_time_ticks(vm.pid)?,
        peer: to.to_owned(),
        identity: common.identity.clone(),
        peer_name: Some(peer_name.to_owned()),
        was_running: vm.status.running,
        keep_source,
        heard: false,
        paging: None,
    };
    Ok(Journal::create(&dir, entry)?)
}

/// The RAM blocks as they are now equal those that the migration began with.
///
/// # Errors
/// [`EngineError::RamChanged`], or what QEMU says.
pub async fn check_ram_unchanged(guest: &Guest) -> Result<(), EngineError> {
    let now = guest.client.hmp(RAM_BLOCKS).await?;
    if now == guest.ram_blocks { Ok(()) } else { Err(EngineError::RamChanged) }
}

/// Lanes to use: one a core, at most 4, unless told; one more for pages that the guest waits for.
pub fn lanes(asked: Option<u16>, mode: Mode) -> usize {
    let lanes = asked.map_or_else(worker_threads, usize::from);
    (lanes + usize::from(mode != Mode::PreCopy)).min(LANES_MAX)
}

/// A migration's identity.
///
/// # Errors
/// If the kernel gives no random bytes.
pub fn new_migration() -> Result<MigrationId, EngineError> {
    Ok(MigrationId(random::bytes()?))
}

/// Longest plausible direct I/O, if the VM does any.
pub fn direct_io_window(args: &SendArgs, vm: &VmInventory) -> Option<Duration> {
    if vm.direct_io.is_empty() || failpoint::is_set("no-second-look") {
        return None;
    }
    Some(Duration::from_millis(args.direct_io_window_ms))
}
