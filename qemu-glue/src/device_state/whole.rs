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
//! By post-copy, the guest is loaded and waits for `cont` before its memory is there. From the switch on, QEMU at the source
//! does not let it run when its connection ends; [`super::leave_postcopy`] takes it back.
//!
//! With its return path, the source's QEMU has completed only when that at the destination said that it loaded all.
//! Until then it lets the guest run on when its connection ends.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use tokio::sync::{broadcast, oneshot};

use super::load::{borrow, loaded_paused};
use super::postcopy::{is_in_postcopy, is_postcopy};
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
/// at most `downtime_ms`. With `post_copy`, the caller may hand the guest over before
/// ([`Client::migrate_start_postcopy`]).
///
/// # Errors
/// A [`DeviceStateError`]; QEMU is then as it was.
pub async fn begin_stream_out(
    client: &Client,
    downtime_ms: u64,
    post_copy: bool,
) -> Result<(Outgoing, UnixStream), DeviceStateError> {
    let turn = client.migration_turn().await;
    let (begun, has_begun) = oneshot::channel();
    let (tell, completed) = oneshot::channel();
    let client = client.clone();
    let settling = Settling::of(async move {
        let role = Role::StreamOut { downtime_ms, post_copy };
        let sent = send_task(client, role, begun, tell).await;
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
    role: Role,
    begun: oneshot::Sender<UnixStream>,
    mut tell: oneshot::Sender<()>,
) -> Result<(), DeviceStateError> {
    refuse_active(&client).await?;
    let status = settle(&client).await?;
    if !status.running {
        check_savable(&status)?;
    }
    let borrowed = Borrowed::take(&client, role).await?;
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
            end_migration(&client, role.may_switch()).await;
            drop(tell);
        }
    }
    if ended.is_err() && is_in_postcopy(&client).await.unwrap_or(true) {
        // QEMU changes no setting now; the mark tells the next engine.
        return ended;
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
    loaded: oneshot::Receiver<Loaded>,
    settling: Settling,
}

/// A guest that QEMU has loaded.
#[derive(Debug)]
#[must_use]
pub struct Loaded {
    /// Its state, which is never that of one that runs.
    pub status: Status,
    /// Whether all of its memory is here. If not, the [`Settling`] takes until it is, however often the connection is
    /// broken and replaced meanwhile.
    pub is_complete: bool,
}

/// Has a QEMU that was started with `-incoming defer` take a guest, over the socket that is returned. It does not run it.
/// With `post_copy`, the guest may come ahead of its memory.
///
/// # Errors
/// A [`DeviceStateError`].
pub async fn begin_stream_in(
    client: &Client,
    post_copy: bool,
) -> Result<(Incoming, UnixStream), DeviceStateError> {
    let turn = client.migration_turn().await;
    let (begun, has_begun) = oneshot::channel();
    let (tell, loaded) = oneshot::channel();
    let client = client.clone();
    let settling = Settling::of(async move {
        let taken = take_task(client, Role::StreamIn { post_copy }, begun, tell).await;
        drop(turn);
        taken
    });
    match has_begun.await {
        Ok(socket) => Ok((Incoming { loaded, settling }, socket)),
        Err(_) => Err(settling.error().await),
    }
}

impl Incoming {
    /// Waits until the guest is loaded.
    ///
    /// # Errors
    /// A [`DeviceStateError`]. The QEMU is of no further use then.
    pub async fn loaded(self) -> Result<(Loaded, Settling), DeviceStateError> {
        match self.loaded.await {
            Ok(loaded) => Ok((loaded, self.settling)),
            Err(_) => Err(self.settling.error().await),
        }
    }
}

async fn take_task(
    client: Client,
    role: Role,
    begun: oneshot::Sender<UnixStream>,
    mut tell: oneshot::Sender<Loaded>,
) -> Result<(), DeviceStateError> {
    let borrowed = borrow(&client, role).await?;
    let mut events = client.subscribe();
    let work = async {
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
    let is_complete = taken.as_ref().is_ok_and(|loaded| loaded.is_complete);
    let taken = taken.map(|loaded| loaded.status);
    let told = |status| {
        // Whoever is gone by now does not need it.
        let _told = tell.send(Loaded { status, is_complete });
    };
    let ended = match loaded_paused(&client, taken, told).await {
        Ok(()) if !is_complete => arrived(&client, &mut events).await,
        ended => ended,
    };
    let returned = borrowed.give_back(&client).await;
    ended?;
    returned
}

/// Waits until all memory of a guest is here that was loaded before it.
async fn arrived(
    client: &Client,
    events: &mut broadcast::Receiver<Event>,
) -> Result<(), DeviceStateError> {
    loop {
        match wait_completed(client, events).await {
            Err(DeviceStateError::Qmp(error)) if error.is_closed() => {
                return Err(DeviceStateError::QemuExited);
            }
            // A thread that waits for a page may hold the monitor up.
            Err(DeviceStateError::Qmp(_)) => wait_event(events, "MIGRATION").await,
            ended => return ended,
        }
    }
}

async fn wait_loaded(
    client: &Client,
    events: &mut broadcast::Receiver<Event>,
) -> Result<Loaded, DeviceStateError> {
    loop {
        let (status, info) = tokio::try_join!(client.query_status(), client.query_migrate())?;
        match info.status {
            Some(MigrationStatus::Failed | MigrationStatus::Cancelled) => {
                return Err(failure(&info));
            }
            Some(MigrationStatus::Completed) if status.state != RunState::InMigrate => {
                return Ok(Loaded { status, is_complete: true });
            }
            // It waits for `cont`, and QEMU for the rest of its memory.
            Some(now) if is_postcopy(&now) && status.state != RunState::InMigrate => {
                return Ok(Loaded { status, is_complete: false });
            }
            _ => wait_event(events, "MIGRATION").await,
        }
    }
}

/// Gives QEMU one end of a pair of sockets, as [`DESCRIPTOR_NAME`]; the other.
pub(super) async fn give_socket(client: &Client) -> Result<UnixStream, DeviceStateError> {
    let (ours, theirs) = UnixStream::pair().map_err(socket_failed("setting it up"))?;
    client.send_fd(DESCRIPTOR_NAME, OwnedFd::from(theirs)).await?;
    Ok(ours)
}
