//! Loading: QEMU's settings are prepared while the guest still runs at its source.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;

use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::settings::{Borrowed, Role};
use super::{
    DESCRIPTOR_NAME, DeviceState, DeviceStateError, Settling, TRANSFER_TIMEOUT, drop_descriptor,
    failure, refuse_active, socket_failed, wait_event,
};
use crate::qmp::{Client, MigrationStatus, RunState, Status};

/// A QEMU that is prepared to load device state. Dropping it puts the settings back.
#[derive(Debug)]
#[must_use]
pub struct Loading {
    give: oneshot::Sender<DeviceState>,
    status: oneshot::Receiver<Status>,
    settling: Settling,
}

/// Prepares a QEMU that was started with `-incoming defer` to load device state.
///
/// # Errors
/// A [`DeviceStateError`]; QEMU is then as it was.
pub async fn prepare_load(client: &Client) -> Result<Loading, DeviceStateError> {
    let turn = client.migration_turn().await;
    let (prepared, is_prepared) = oneshot::channel();
    let (give, state) = oneshot::channel();
    let (tell, status) = oneshot::channel();
    let client = client.clone();
    let settling = Settling::of(async move {
        let loaded = load_task(client, prepared, state, tell).await;
        drop(turn);
        loaded
    });
    match is_prepared.await {
        Ok(()) => Ok(Loading { give, status, settling }),
        Err(_) => Err(settling.error().await),
    }
}

impl Loading {
    /// Puts device state into QEMU, whose RAM is in place. The guest does not run afterwards; its
    /// state is returned.
    ///
    /// # Errors
    /// A [`DeviceStateError`]. The destination's QEMU is of no further use then: before 9.1 it
    /// exits, later ones refuse a second `migrate-incoming` (10.0.2). Bytes that are no device
    /// state are refused before QEMU sees them.
    pub async fn load(self, bytes: Vec<u8>) -> Result<(Status, Settling), DeviceStateError> {
        let Self { give, status, settling } = self;
        let state = match DeviceState::from_bytes(bytes) {
            Ok(state) => state,
            Err(error) => {
                drop(give);
                let _put_back = settling.settled().await;
                return Err(error.into());
            }
        };
        // A task that has ended already says why below.
        let _given = give.send(state);
        match status.await {
            Ok(status) => Ok((status, settling)),
            Err(_) => Err(settling.error().await),
        }
    }

    /// Puts the settings back without having loaded anything.
    pub async fn give_up(self) {
        drop(self.give);
        match self.settling.settled().await {
            Ok(()) | Err(DeviceStateError::Abandoned) => {}
            Err(error) => warn!(%error, "migration settings could not be put back"),
        }
    }
}

async fn load_task(
    client: Client,
    prepared: oneshot::Sender<()>,
    state: oneshot::Receiver<DeviceState>,
    mut tell: oneshot::Sender<Status>,
) -> Result<(), DeviceStateError> {
    let borrowed = borrow(&client, Role::Load).await?;
    let _told = prepared.send(());
    let work = async {
        let state = state.await.map_err(|_| DeviceStateError::Abandoned)?;
        let loaded = timeout(TRANSFER_TIMEOUT, transfer_in(&client, &state.bytes)).await;
        loaded.unwrap_or(Err(DeviceStateError::Timeout { waited: TRANSFER_TIMEOUT }))
    };
    let loaded = tokio::select! {
        loaded = work => loaded,
        () = tell.closed() => Err(DeviceStateError::Abandoned),
    };
    let told = |status| {
        // Whoever is gone by now does not need it.
        let _told = tell.send(status);
    };
    let ended = loaded_paused(&client, loaded, told).await;
    let returned = borrowed.give_back(&client).await;
    ended?;
    returned
}

/// Takes the settings that a role needs of a QEMU that waits for a guest.
pub(super) async fn borrow(client: &Client, role: Role) -> Result<Borrowed, DeviceStateError> {
    let (active, status) = tokio::join!(refuse_active(client), client.query_status());
    let status = status?;
    if status.state != RunState::InMigrate {
        let remedy = "load into a QEMU that was started with -incoming defer";
        return Err(DeviceStateError::WrongState { state: status.state, remedy });
    }
    active?;
    Borrowed::take(client, role).await
}

/// Tells that a guest is loaded; one that runs is stopped.
pub(super) async fn loaded_paused(
    client: &Client,
    loaded: Result<Status, DeviceStateError>,
    tell: impl FnOnce(Status),
) -> Result<(), DeviceStateError> {
    match loaded {
        Ok(status) if status.running => {
            client.stop().await.map_err(Into::into).and(Err(DeviceStateError::Started))
        }
        Ok(status) => {
            tell(status);
            Ok(())
        }
        Err(DeviceStateError::Qmp(error)) if error.is_closed() => Err(DeviceStateError::QemuExited),
        Err(error) => Err(error),
    }
}

async fn transfer_in(client: &Client, bytes: &[u8]) -> Result<Status, DeviceStateError> {
    let failed = socket_failed("setting it up");
    let mut events = client.subscribe();
    let (ours, theirs) = StdUnixStream::pair().map_err(&failed)?;
    ours.set_nonblocking(true).map_err(&failed)?;
    let mut socket = UnixStream::from_std(ours).map_err(&failed)?;
    client.send_fd(DESCRIPTOR_NAME, OwnedFd::from(theirs)).await?;
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
