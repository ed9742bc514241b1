//! QEMU's whole stream, its RAM included: for guests whose memory cannot be reached another way.
//!
//! ```text
//!   begin_stream_out: settings, migrate ──► stream to the caller ──► [caller stops the guest] ──► completed
//!   begin_stream_in:  settings, "do not run it", migrate-incoming ──► stream from the caller ──► loaded
//!                                                                      then, at both: settings ──► Settling
//! ```
//!
//! While the guest runs, QEMU sends again what is written, until it expects the rest to take no longer than the limit
//! that it was given; then it stops the guest itself. So who begins a stream has to be ready for its end at any time.
//! Where the caller stops the guest earlier, little is left, and QEMU comes to its end soon.
//!
//! A limit of next to nothing is no way to hold QEMU back: it would look for written pages all the time, and with a
//! limit of 0 hand over without a look at what was written last (migration/migration.c, `migration_iteration_run`).
//!
//! With its return path, the source's QEMU has completed only when that at the destination said that it loaded all.
//! Until then it lets the guest run on when its connection ends.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use tokio::sync::{broadcast, oneshot};

use super::load::{borrow, loaded_paused};
use super::save::{check_savable, end_migration, settle};
use super::settings::{Borrowed, Role};
use super::{
    DESCRIPTOR_NAME, DeviceStateError, Settling, drop_descriptor, failure, refuse_active,
    socket_failed, wait_completed, wait_event,
};
use crate::qmp::{Client, Event, MigrationStatus, RunState, Status};

/// A guest that QEMU sends. Dropping it cancels that; where the guest was not stopped by the caller, it runs on.
#[derive(Debug)]
#[must_use]
pub struct Outgoing {
    completed: oneshot::Receiver<()>,
    settling: Settling,
}

/// Has QEMU begin to send its guest, over the socket that is returned. It stops the guest where it expects a downtime of
/// at most `downtime_ms`.
///
/// # Errors
/// A [`DeviceStateError`]; QEMU is then as it was.
pub async fn begin_stream_out(
    client: &Client,
    downtime_ms: u64,
) -> Result<(Outgoing, UnixStream), DeviceStateError> {
    let turn = client.migration_turn().await;
    let (begun, has_begun) = oneshot::channel();
    let (tell, completed) = oneshot::channel();
    let client = client.clone();
    let settling = Settling::of(async move {
        let sent = send_task(client, downtime_ms, begun, tell).await;
        drop(turn);
        sent
    });
    match has_begun.await {
        Ok(socket) => Ok((Outgoing { completed, settling }, socket)),
        Err(_) => Err(settling.error().await),
    }
}

impl Outgoing {
    /// Waits until the destination's QEMU has loaded everything and said so. The guest is stopped then.
    ///
    /// # Errors
    /// A [`DeviceStateError`]: QEMU did not come to its end. If it had stopped the guest itself, that runs again.
    pub async fn completed(self) -> Result<Settling, DeviceStateError> {
        match self.completed.await {
            Ok(()) => Ok(self.settling),
            Err(_) => Err(self.settling.error().await),
        }
    }
}

async fn send_task(
    client: Client,
    downtime_ms: u64,
    begun: oneshot::Sender<UnixStream>,
    mut tell: oneshot::Sender<()>,
) -> Result<(), DeviceStateError> {
    refuse_active(&client).await?;
    let status = settle(&client).await?;
    if !status.running {
        check_savable(&status)?;
    }
    let borrowed = Borrowed::take(&client, Role::StreamOut { downtime_ms }).await?;
    let work = async {
        let mut events = client.subscribe();
        let socket = give_socket(&client).await?;
        if let Err(error) = client.migrate_fd(DESCRIPTOR_NAME).await {
            drop_descriptor(&client).await;
            return Err(error.into());
        }
        let _told = begun.send(socket);
        wait_completed(&client, &mut events).await
    };
    let ended = tokio::select! {
        ended = work => ended,
        () = tell.closed() => Err(DeviceStateError::Abandoned),
    };
    match &ended {
        // Whoever is gone by now does not need it.
        Ok(()) => drop(tell.send(())),
        Err(_) => {
            end_migration(&client).await;
            drop(tell);
        }
    }
    let settled = settle(&client).await;
    let returned = borrowed.give_back(&client).await;
    ended?;
    settled?;
    returned
}

/// A QEMU that takes a guest. Dropping it puts the settings back; a QEMU that took a part is of no further use.
#[derive(Debug)]
#[must_use]
pub struct Incoming {
    loaded: oneshot::Receiver<Status>,
    settling: Settling,
}

/// Has a QEMU that was started with `-incoming defer` take a guest, over the socket that is returned. It does not run it.
///
/// # Errors
/// A [`DeviceStateError`].
pub async fn begin_stream_in(client: &Client) -> Result<(Incoming, UnixStream), DeviceStateError> {
    let turn = client.migration_turn().await;
    let (begun, has_begun) = oneshot::channel();
    let (tell, loaded) = oneshot::channel();
    let client = client.clone();
    let settling = Settling::of(async move {
        let taken = take_task(client, begun, tell).await;
        drop(turn);
        taken
    });
    match has_begun.await {
        Ok(socket) => Ok((Incoming { loaded, settling }, socket)),
        Err(_) => Err(settling.error().await),
    }
}

impl Incoming {
    /// Waits until the guest is loaded; its state, which is never that of one that runs.
    ///
    /// # Errors
    /// A [`DeviceStateError`]. The QEMU is of no further use then.
    pub async fn loaded(self) -> Result<(Status, Settling), DeviceStateError> {
        match self.loaded.await {
            Ok(status) => Ok((status, self.settling)),
            Err(_) => Err(self.settling.error().await),
        }
    }
}

async fn take_task(
    client: Client,
    begun: oneshot::Sender<UnixStream>,
    mut tell: oneshot::Sender<Status>,
) -> Result<(), DeviceStateError> {
    let borrowed = borrow(&client, Role::StreamIn).await?;
    let work = async {
        let mut events = client.subscribe();
        // While a guest is still to come, this says that it is not to run (monitor/qmp-cmds.c, `qmp_stop`).
        client.stop().await?;
        let socket = give_socket(&client).await?;
        if let Err(error) = client.migrate_incoming_fd(DESCRIPTOR_NAME).await {
            drop_descriptor(&client).await;
            return Err(error.into());
        }
        let _told = begun.send(socket);
        wait_loaded(&client, &mut events).await
    };
    let taken = tokio::select! {
        taken = work => taken,
        () = tell.closed() => Err(DeviceStateError::Abandoned),
    };
    let ended = loaded_paused(&client, taken, tell).await;
    let returned = borrowed.give_back(&client).await;
    ended?;
    returned
}

async fn wait_loaded(
    client: &Client,
    events: &mut broadcast::Receiver<Event>,
) -> Result<Status, DeviceStateError> {
    loop {
        let (status, info) = tokio::try_join!(client.query_status(), client.query_migrate())?;
        match info.status {
            Some(MigrationStatus::Failed | MigrationStatus::Cancelled) => {
                return Err(failure(&info));
            }
            Some(MigrationStatus::Completed) if status.state != RunState::InMigrate => {
                return Ok(status);
            }
            _ => wait_event(events, "MIGRATION").await,
        }
    }
}

/// Gives QEMU one end of a pair of sockets, as [`DESCRIPTOR_NAME`]; the other.
async fn give_socket(client: &Client) -> Result<UnixStream, DeviceStateError> {
    let (ours, theirs) = UnixStream::pair().map_err(socket_failed("setting it up"))?;
    client.send_fd(DESCRIPTOR_NAME, OwnedFd::from(theirs)).await?;
    Ok(ours)
}
