//! The guest's device state: everything that migrates except shared RAM.
//!
//! QEMU writes it as a migration with the capability `x-ignore-shared` (migration/ram.c,
//! `ramblock_is_ignored`) into a socket pair whose other end was passed with `getfd`; the
//! destination reads it the same way. The capability is experimental upstream: the stream's header
//! is checked for it, so that a QEMU that ignores it is noticed.
//!
//! ```text
//! source       paused --migrate--> finish-migrate --completed--> postmigrate --cont--> running
//!                 ^------------------- failed / cancelled -----------'   (the way back)
//! destination  inmigrate --migrate-incoming--> paused --cont--> running
//! ```
//!
//! Invariants:
//! - Neither [`save`] nor [`load`] starts a guest. The source's state `paused` travels along and
//!   the destination takes it over; a destination that runs after loading is stopped and reported.
//! - [`save`] returns only when QEMU has left `finish-migrate`: a `cont` before would collide with
//!   QEMU's own change of state.
//! - Settings of QEMU that were changed are put back on every way out, also when the caller is
//!   cancelled; [`restore_capabilities`] does it for an engine that was killed.
//! - The destination's disks stay inactive until `cont` (`late-block-activate`), so that the
//!   source can take them back.

mod header;
mod settings;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::time::Duration;

use migrate_core::error::{Classify, ErrorBin};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{broadcast, oneshot};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{debug, warn};

use crate::qmp::{Client, Event, MigrationInfo, MigrationStatus, QmpError, RunState, Status};
pub use header::{HeaderError, StreamHeader};
pub use settings::restore_capabilities;
use settings::{Borrowed, Role};

/// Longest time that saving or loading may take before it is given up.
pub const TRANSFER_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest time that QEMU may take to leave a transitional state after a migration has ended.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Interval of looking while QEMU changes its state; there is no event for these steps.
const SETTLE_INTERVAL: Duration = Duration::from_millis(1);

/// Interval of asking again if no event comes.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// Bytes read at once.
const READ_BYTES: usize = 256 << 10;

/// Name of the descriptor in QEMU.
const DESCRIPTOR_NAME: &str = "godwit-device-state";

/// Device state that could not be saved or loaded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DeviceStateError {
    /// The monitor failed or refused.
    #[error("The device state could not be handled through QMP")]
    Qmp(#[from] QmpError),
    /// The guest is in a state in which this is impossible.
    #[error("The VM is {state}; {remedy}")]
    WrongState {
        /// Its run state.
        state: RunState,
        /// What to do first.
        remedy: &'static str,
    },
    /// A migration is under way in this QEMU.
    #[error("QEMU has a migration under way ({status}); wait for it or cancel it")]
    MigrationActive {
        /// Where it stands.
        status: MigrationStatus,
    },
    /// The state is larger than allowed.
    #[error("The device state is larger than {limit_bytes} bytes; is all guest RAM shared?")]
    TooLarge {
        /// The limit in bytes.
        limit_bytes: u64,
    },
    /// QEMU ended the migration without success.
    #[error("QEMU could not transfer the device state: {detail}")]
    Failed {
        /// QEMU's text, or its status.
        detail: String,
    },
    /// The socket pair failed.
    #[error("The socket to QEMU failed while {doing}")]
    Socket {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// It took too long.
    #[error("QEMU has not finished the device state within {} s", waited.as_secs())]
    Timeout {
        /// How long was waited.
        waited: Duration,
    },
    /// The bytes are no device state that this engine can use.
    #[error("The device state is not usable")]
    Header(#[from] HeaderError),
    /// The destination's QEMU ended while it loaded.
    #[error(
        "The destination's QEMU exited while it loaded the device state: its configuration differs \
         from the source's or its RAM is not complete; QEMU's own log names the device"
    )]
    QemuExited,
    /// The guest executed after loading although it came paused. It has been stopped.
    #[error("The destination started the guest by itself; it has been stopped again")]
    Started,
    /// The caller gave up.
    #[error("The transfer of the device state was abandoned")]
    Abandoned,
}

impl Classify for DeviceStateError {
    fn bin(&self) -> ErrorBin {
        match self {
            Self::Qmp(error) => error.bin(),
            Self::Header(error) => error.bin(),
            Self::WrongState { .. } | Self::MigrationActive { .. } => ErrorBin::CallerMisuse,
            Self::QemuExited => ErrorBin::PeerIncompatible,
            _ => ErrorBin::System,
        }
    }
}

/// A guest's device state as QEMU wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceState {
    /// QEMU's migration stream, whole.
    pub bytes: Vec<u8>,
    /// What its header says.
    pub header: StreamHeader,
}

impl DeviceState {
    /// Checks the header of a stream, for example one that a peer has sent.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, HeaderError> {
        let header = StreamHeader::parse(&bytes)?;
        if !header.ignores_shared() {
            return Err(HeaderError::SharedNotIgnored);
        }
        Ok(Self { bytes, header })
    }
}

/// Takes the device state out of a stopped guest. At most `limit_bytes` are accepted.
///
/// Afterwards the VM is `postmigrate`: `cont` resumes it, also after this has failed.
///
/// # Errors
/// A [`DeviceStateError`]; the guest does not run and can be resumed.
pub async fn save(client: &Client, limit_bytes: u64) -> Result<DeviceState, DeviceStateError> {
    in_task(client, |client, abandoned| save_task(client, limit_bytes, abandoned)).await
}

/// Puts device state into a QEMU that was started with `-incoming defer` and has its RAM in place.
/// The guest does not run afterwards; its state is returned.
///
/// # Errors
/// A [`DeviceStateError`]. The destination's QEMU is of no further use then: before 9.1 it exits,
/// later ones refuse a second `migrate-incoming` (10.0.2).
pub async fn load(client: &Client, bytes: Vec<u8>) -> Result<Status, DeviceStateError> {
    let state = DeviceState::from_bytes(bytes)?;
    in_task(client, |client, abandoned| load_task(client, state, abandoned)).await
}

/// Runs work to its end in a task of its own. If the caller is dropped, the work learns of it; the
/// next transfer on this client waits until it has cleaned up.
async fn in_task<T, F>(
    client: &Client,
    work: impl FnOnce(Client, oneshot::Receiver<()>) -> F,
) -> Result<T, DeviceStateError>
where
    T: Send + 'static,
    F: Future<Output = Result<T, DeviceStateError>> + Send + 'static,
{
    let turn = client.migration_turn().await;
    let (_caller_is_here, abandoned) = oneshot::channel();
    let work = work(client.clone(), abandoned);
    let task = tokio::spawn(async move {
        let result = work.await;
        drop(turn);
        result
    });
    task.await.unwrap_or(Err(DeviceStateError::Abandoned))
}

async fn save_task(
    client: Client,
    limit_bytes: u64,
    abandoned: oneshot::Receiver<()>,
) -> Result<DeviceState, DeviceStateError> {
    let ((), status) =
        tokio::try_join!(refuse_active(&client), async { Ok(client.query_status().await?) })?;
    check_savable(&status)?;
    let borrowed = Borrowed::take(&client, Role::Save).await?;
    let work = transfer_out(&client, limit_bytes);
    let result = tokio::select! {
        done = timeout(TRANSFER_TIMEOUT, work) =>
            done.unwrap_or(Err(DeviceStateError::Timeout { waited: TRANSFER_TIMEOUT })),
        _ = abandoned => Err(DeviceStateError::Abandoned),
    };
    if result.is_err() {
        end_migration(&client).await;
    }
    let settled = settle(&client).await;
    let returned = borrowed.give_back(&client).await;
    let bytes = result?;
    settled?;
    returned?;
    Ok(DeviceState::from_bytes(bytes)?)
}

/// Only states that mean "stopped" at the destination as well may travel.
fn check_savable(status: &Status) -> Result<(), DeviceStateError> {
    let remedy = match &status.state {
        _ if status.running => "stop it first",
        RunState::Paused
        | RunState::Prelaunch
        | RunState::Shutdown
        | RunState::IoError
        | RunState::InternalError
        | RunState::Watchdog
        | RunState::GuestPanicked => return Ok(()),
        RunState::PostMigrate => "its state was taken already: resume and stop it first",
        RunState::InMigrate => "a guest is still to come in here",
        RunState::Suspended => "wake the guest up first",
        _ => "wait until it is paused",
    };
    Err(DeviceStateError::WrongState { state: status.state.clone(), remedy })
}

async fn refuse_active(client: &Client) -> Result<(), DeviceStateError> {
    let info = client.query_migrate().await?;
    match info.status {
        Some(status) if !status.is_over() => Err(DeviceStateError::MigrationActive { status }),
        _ => Ok(()),
    }
}

/// Hands QEMU one end of a socket pair and returns the other.
async fn socket_to_qemu(client: &Client) -> Result<UnixStream, DeviceStateError> {
    let failed = |source| DeviceStateError::Socket { doing: "setting it up", source };
    let (ours, theirs) = StdUnixStream::pair().map_err(failed)?;
    ours.set_nonblocking(true).map_err(failed)?;
    let ours = UnixStream::from_std(ours).map_err(failed)?;
    client.send_fd(DESCRIPTOR_NAME, OwnedFd::from(theirs)).await?;
    Ok(ours)
}

async fn transfer_out(client: &Client, limit_bytes: u64) -> Result<Vec<u8>, DeviceStateError> {
    let mut events = client.subscribe();
    let mut socket = socket_to_qemu(client).await?;
    if let Err(error) = client.migrate_fd(DESCRIPTOR_NAME).await {
        drop_descriptor(client).await;
        return Err(error.into());
    }
    let bytes = read_all(&mut socket, limit_bytes).await?;
    let info = wait_over(client, &mut events).await?;
    match info.status {
        Some(MigrationStatus::Completed) => {
            debug!(bytes = bytes.len(), "device state saved");
            Ok(bytes)
        }
        _ => Err(failure(&info)),
    }
}

async fn read_all(socket: &mut UnixStream, limit_bytes: u64) -> Result<Vec<u8>, DeviceStateError> {
    let mut bytes = Vec::new();
    let limit = usize::try_from(limit_bytes).unwrap_or(usize::MAX);
    loop {
        if bytes.len() > limit {
            return Err(DeviceStateError::TooLarge { limit_bytes });
        }
        bytes.reserve(READ_BYTES.min(limit.saturating_sub(bytes.len()) + 1));
        match socket.read_buf(&mut bytes).await {
            Ok(0) => return Ok(bytes),
            Ok(_) => {}
            Err(source) => {
                let doing = "reading the device state";
                return Err(DeviceStateError::Socket { doing, source });
            }
        }
    }
}

/// Waits for the end of the migration that has been started on this monitor.
async fn wait_over(
    client: &Client,
    events: &mut broadcast::Receiver<Event>,
) -> Result<MigrationInfo, DeviceStateError> {
    loop {
        let info = client.query_migrate().await?;
        if !info.is_under_way() {
            return Ok(info);
        }
        wait_event(events, "MIGRATION").await;
    }
}

/// Returns at an event of that name, or when it is time to ask again.
async fn wait_event(events: &mut broadcast::Receiver<Event>, name: &str) {
    let until = Instant::now() + ASK_AGAIN;
    loop {
        match timeout_at(until, events.recv()).await {
            Ok(Ok(event)) if event.name != name => {}
            // A lost event may have been ours.
            Ok(Ok(_) | Err(broadcast::error::RecvError::Lagged(_))) => return,
            Ok(Err(broadcast::error::RecvError::Closed)) | Err(_) => {
                tokio::time::sleep_until(until.min(Instant::now() + SETTLE_INTERVAL)).await;
                return;
            }
        }
    }
}

fn failure(info: &MigrationInfo) -> DeviceStateError {
    let status = info.status.as_ref().map_or("none", MigrationStatus::as_str);
    let detail = info.error_desc.clone().unwrap_or_else(|| format!("its status is {status}"));
    DeviceStateError::Failed { detail }
}

/// Ends a migration that is of no use any more, as far as QEMU lets us.
async fn end_migration(client: &Client) {
    let ended = async {
        let mut events = client.subscribe();
        client.migrate_cancel().await?;
        wait_over(client, &mut events).await
    };
    match timeout(SETTLE_TIMEOUT, ended).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => warn!(%error, "the migration could not be cancelled"),
        Err(_) => warn!("the cancelled migration does not end"),
    }
}

/// Waits until QEMU has left the transitional state at the end of a migration.
async fn settle(client: &Client) -> Result<Status, DeviceStateError> {
    let until = Instant::now() + SETTLE_TIMEOUT;
    loop {
        let status = client.query_status().await?;
        if status.state != RunState::FinishMigrate {
            return Ok(status);
        }
        if Instant::now() > until {
            return Err(DeviceStateError::Timeout { waited: SETTLE_TIMEOUT });
        }
        sleep(SETTLE_INTERVAL).await;
    }
}

async fn drop_descriptor(client: &Client) {
    if let Err(error) = client.close_fd(DESCRIPTOR_NAME).await {
        debug!(%error, "QEMU had no descriptor left to close");
    }
}

async fn load_task(
    client: Client,
    state: DeviceState,
    abandoned: oneshot::Receiver<()>,
) -> Result<Status, DeviceStateError> {
    let (active, status) = tokio::join!(refuse_active(&client), client.query_status());
    let status = status?;
    if status.state != RunState::InMigrate {
        let remedy = "load into a QEMU that was started with -incoming defer";
        return Err(DeviceStateError::WrongState { state: status.state, remedy });
    }
    active?;
    let borrowed = Borrowed::take(&client, Role::Load).await?;
    let work = transfer_in(&client, &state.bytes);
    let result = tokio::select! {
        done = timeout(TRANSFER_TIMEOUT, work) =>
            done.unwrap_or(Err(DeviceStateError::Timeout { waited: TRANSFER_TIMEOUT })),
        _ = abandoned => Err(DeviceStateError::Abandoned),
    };
    let returned = borrowed.give_back(&client).await;
    let status = result.map_err(|error| match error {
        DeviceStateError::Qmp(error) if error.is_closed() => DeviceStateError::QemuExited,
        other => other,
    })?;
    if status.running {
        client.stop().await?;
        return Err(DeviceStateError::Started);
    }
    returned?;
    Ok(status)
}

async fn transfer_in(client: &Client, bytes: &[u8]) -> Result<Status, DeviceStateError> {
    let mut events = client.subscribe();
    let mut socket = socket_to_qemu(client).await?;
    if let Err(error) = client.migrate_incoming_fd(DESCRIPTOR_NAME).await {
        drop_descriptor(client).await;
        return Err(error.into());
    }
    // A failed write means that QEMU has stopped reading: what it says about that is better.
    let written = async {
        socket.write_all(bytes).await?;
        socket.shutdown().await
    };
    if let Err(error) = written.await {
        debug!(%error, "QEMU stopped reading the device state");
    }
    loop {
        let status = client.query_status().await?;
        if status.state != RunState::InMigrate {
            return Ok(status);
        }
        let info = client.query_migrate().await?;
        if matches!(info.status, Some(MigrationStatus::Failed | MigrationStatus::Cancelled)) {
            return Err(failure(&info));
        }
        wait_event(&mut events, "MIGRATION").await;
    }
}
