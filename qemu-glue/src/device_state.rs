//! The guest's device state: everything that migrates except shared RAM.
//!
//! QEMU writes it as a migration with the capability `x-ignore-shared` (migration/ram.c,
//! `ramblock_is_ignored`) into a socket pair whose other end was passed with `getfd`; the
//! destination reads it the same way. The capability is experimental upstream: the stream's header
//! is checked for it, so that a QEMU that ignores it is noticed.
//!
//! ```text
//! source       running --migrate, blocked--> running --stop--> paused --unblocked--> finish-migrate
//!                 ^                                                                        |
//!                 '----cont---- (the way back) <---- failed / cancelled / postmigrate <----'
//! destination  inmigrate --migrate-incoming--> paused --cont--> running
//! ```
//!
//! QEMU begins to write while the guest still runs: what takes it long, its tables of all RAM, is
//! done before the stop. It cannot go on because nobody reads ([`begin_save`]).
//!
//! Invariants:
//! - Neither saving nor loading starts a guest. The source's state `paused` travels along and
//!   the destination takes it over; a destination that runs after loading is stopped and reported.
//! - A [`Settling`] is over only when QEMU has left `finish-migrate` and keeps nothing of its migration:
//!   a `cont` or a migration before would collide with QEMU's own change of state.
//! - Settings of QEMU that were changed are put back on every way out, also when the caller is
//!   cancelled; [`restore_capabilities`] does it for an engine that was killed.
//! - The destination's disks stay inactive until `cont` (`late-block-activate`), so that the
//!   source can take them back.

mod ahead;
mod header;
mod load;
mod lost_writes;
mod postcopy;
mod save;
mod settings;
mod whole;

use std::io;
use std::time::Duration;

use migrate_core::error::{Classify, ErrorBin};
use thiserror::Error;
use tokio::sync::broadcast;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use crate::qmp::{Client, Event, MigrationInfo, MigrationStatus, QmpError, RunState};
pub use crate::stream::HeaderError;
use crate::stream::tail;
pub use header::StreamHeader;
pub use load::{Loading, prepare_load};
pub use lost_writes::lost_writes;
pub use postcopy::{is_in_postcopy, is_postcopy, leave_postcopy, postcopy_obstacle};
pub use save::{Saving, begin_save};
pub use settings::restore_capabilities;
pub use whole::{Incoming, Loaded, Outgoing, begin_stream_in, begin_stream_out};

/// Longest time that saving or loading may take before it is given up.
pub const TRANSFER_TIMEOUT: Duration = Duration::from_secs(60);

/// Interval of looking while QEMU changes its state; there is no event for these steps.
const SETTLE_INTERVAL: Duration = Duration::from_millis(1);

/// Interval of asking again if no event comes.
const ASK_AGAIN: Duration = Duration::from_millis(100);

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

/// A guest's device state as QEMU wrote it, without the description for people at its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceState {
    /// QEMU's migration stream.
    pub bytes: Vec<u8>,
    /// What its header says.
    pub header: StreamHeader,
}

impl DeviceState {
    /// What QEMU has just written. The description of all fields, a third of the stream, is replaced
    /// with an empty one: QEMU reads past it (migration/savevm.c, `qemu_loadvm_state`).
    fn written(mut bytes: Vec<u8>) -> Result<Self, HeaderError> {
        if let Some(end) = tail::described_end(&bytes) {
            bytes.truncate(end + 2);
            bytes.extend([0; 4]);
        }
        Self::from_bytes(bytes)
    }

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

/// What is left to do in QEMU once the state was saved or loaded: its own end of the migration, and
/// its settings. It is done in any case; whoever needs it done waits for it here.
#[derive(Debug)]
#[must_use]
pub struct Settling(JoinHandle<Result<(), DeviceStateError>>);

impl Settling {
    fn of(work: impl Future<Output = Result<(), DeviceStateError>> + Send + 'static) -> Self {
        Self(tokio::spawn(work))
    }

    /// The same, for who has something else to do meanwhile. Cancel-safe; not to be called again once it returned.
    ///
    /// # Errors
    /// As [`Self::settled`].
    pub async fn ended(&mut self) -> Result<(), DeviceStateError> {
        (&mut self.0).await.unwrap_or(Err(DeviceStateError::Abandoned))
    }

    /// Waits until QEMU is as it was.
    ///
    /// # Errors
    /// A [`DeviceStateError`]: QEMU did not finish what it wrote, or did not take its settings back.
    pub async fn settled(self) -> Result<(), DeviceStateError> {
        self.0.await.unwrap_or(Err(DeviceStateError::Abandoned))
    }
}

async fn refuse_active(client: &Client) -> Result<(), DeviceStateError> {
    let info = client.query_migrate().await?;
    match info.status {
        Some(status) if !status.is_over() => Err(DeviceStateError::MigrationActive { status }),
        _ => Ok(()),
    }
}

fn socket_failed(doing: &'static str) -> impl Fn(io::Error) -> DeviceStateError {
    move |source| DeviceStateError::Socket { doing, source }
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

/// Waits for the good end of the migration that has been started on this monitor.
async fn wait_completed(
    client: &Client,
    events: &mut broadcast::Receiver<Event>,
) -> Result<(), DeviceStateError> {
    let info = wait_over(client, events).await?;
    match info.status {
        Some(MigrationStatus::Completed) => Ok(()),
        _ => Err(failure(&info)),
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

async fn drop_descriptor(client: &Client) {
    if let Err(error) = client.close_fd(DESCRIPTOR_NAME).await {
        debug!(%error, "QEMU had no descriptor left to close");
    }
}
