//! Saving: QEMU begins while the guest runs, is held by a socket that is full, and finishes when the
//! guest has stopped.
//!
//! ```text
//!   begin_save: settings, migrate, ROMs ──► blocked at their last page ──► [caller stops the guest]
//!   finish:     read all ──► state to the caller ──► end of the migration, settings ──► Settling
//! ```
//!
//! A migration of QEMU walks all RAM when it starts, shared or not (migration/ram.c,
//! `ram_init_bitmaps`), which takes longer the larger the guest is. The guest's run state is written
//! after that and after the RAM that is not shared, so it says `paused` if the guest was
//! stopped in between. That RAM, most of the stream, is read before ([`super::ahead`]) but for a page
//! that does not fit the socket. Where there is no such page, QEMU begins after the stop.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt::SndBuf};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, oneshot};
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, warn};

use super::ahead::{Ahead, Step};
use super::postcopy::is_postcopy;
use super::settings::{Borrowed, Role};
use super::{
    DESCRIPTOR_NAME, DeviceState, DeviceStateError, SETTLE_INTERVAL, Settling, TRANSFER_TIMEOUT,
    drop_descriptor, refuse_active, socket_failed, wait_completed, wait_event, wait_over,
};
use crate::qmp::{Client, Event, RunState, Status};

/// Longest time that QEMU may take to leave a transitional state after a migration has ended.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a migration whose connection was given up may take to notice that.
const ENDS_BY_ITSELF_WITHIN: Duration = Duration::from_secs(2);

/// Bytes read at once.
const READ_BYTES: usize = 256 << 10;

/// What goes wrong if reading does.
const READING: &str = "reading the device state";

/// Room of the socket in bytes while QEMU is to wait: the kernel makes it its least.
const NARROW_BYTES: usize = 0;

/// The same when it is to write.
const WIDE_BYTES: usize = 1 << 20;

/// Device state that QEMU has begun to write. Dropping it ends that; the guest is not touched.
#[derive(Debug)]
#[must_use]
pub struct Saving {
    go: oneshot::Sender<()>,
    ahead: Vec<u8>,
    state: oneshot::Receiver<DeviceState>,
    settling: Settling,
}

/// Has QEMU begin to write the device state of a guest that runs or is stopped, so that little is left
/// to do when it has stopped. `shared_bytes` of its RAM are left out. Of what QEMU writes, at most
/// `limit_bytes` are accepted.
///
/// # Errors
/// A [`DeviceStateError`]; QEMU is then as it was.
pub async fn begin_save(
    client: &Client,
    shared_bytes: u64,
    limit_bytes: u64,
) -> Result<Saving, DeviceStateError> {
    let turn = client.migration_turn().await;
    let (begun, has_begun) = oneshot::channel();
    let (go, stopped) = oneshot::channel();
    let (give, state) = oneshot::channel();
    let caller = Caller { begun, stopped, give };
    let stream = Stream { shared_bytes, limit_bytes };
    let client = client.clone();
    let settling = Settling::of(async move {
        let saved = save_task(client, stream, caller).await;
        drop(turn);
        saved
    });
    match has_begun.await {
        Ok(ahead) => Ok(Saving { go, ahead, state, settling }),
        Err(_) => Err(settling.error().await),
    }
}

impl Saving {
    /// What was written already: how the state begins.
    pub fn ahead(&self) -> &[u8] {
        &self.ahead
    }

    /// Takes the device state of the guest, which has been stopped since. Returns when QEMU has
    /// written all of it. Once settled, the VM is `postmigrate` and `cont` resumes it, also after
    /// this has failed.
    ///
    /// # Errors
    /// A [`DeviceStateError`]; the guest is as the caller left it.
    pub async fn finish(self) -> Result<(DeviceState, Settling), DeviceStateError> {
        let Self { go, state, settling, .. } = self;
        // A task that has ended already says why below.
        let _told = go.send(());
        match state.await {
            Ok(state) => Ok((state, settling)),
            Err(_) => Err(settling.error().await),
        }
    }
}

impl Settling {
    /// Why the task ended before it gave what was waited for.
    pub(super) async fn error(self) -> DeviceStateError {
        self.settled().await.err().unwrap_or(DeviceStateError::Abandoned)
    }
}

/// The task's ways to its caller.
struct Caller {
    begun: oneshot::Sender<Vec<u8>>,
    stopped: oneshot::Receiver<()>,
    give: oneshot::Sender<DeviceState>,
}

/// What is known of the stream that QEMU will write.
#[derive(Debug, Clone, Copy)]
struct Stream {
    shared_bytes: u64,
    limit_bytes: u64,
}

async fn save_task(client: Client, stream: Stream, caller: Caller) -> Result<(), DeviceStateError> {
    refuse_active(&client).await?;
    let status = settle(&client).await?;
    if !status.running {
        check_savable(&status)?;
    }
    let borrowed = Borrowed::take(&client, Role::Save).await?;
    let Caller { begun, stopped, mut give } = caller;
    let saved = tokio::select! {
        saved = transfer(&client, stream, begun, stopped) => saved,
        () = give.closed() => Err(DeviceStateError::Abandoned),
    };
    let ended = match saved {
        Ok((state, mut events)) => {
            // Whoever is gone by now does not need it.
            let _given = give.send(state);
            in_time(wait_completed(&client, &mut events)).await
        }
        Err(error) => Err(error),
    };
    if ended.is_err() {
        end_migration(&client, false).await;
    }
    let settled = settle(&client).await;
    let returned = borrowed.give_back(&client).await;
    ended?;
    settled?;
    returned
}

/// From the beginning of QEMU's migration to the last byte that it writes.
async fn transfer(
    client: &Client,
    stream: Stream,
    begun: oneshot::Sender<Vec<u8>>,
    stopped: oneshot::Receiver<()>,
) -> Result<(DeviceState, broadcast::Receiver<Event>), DeviceStateError> {
    let held = in_time(begin_held(client, stream)).await?;
    let ahead = held.as_ref().map(|held| held.bytes.clone()).unwrap_or_default();
    debug!(bytes = ahead.len(), "device state read ahead");
    let _told = begun.send(ahead);
    // The caller decides how long this takes.
    stopped.await.map_err(|_| DeviceStateError::Abandoned)?;
    in_time(async {
        check_savable(&client.query_status().await?)?;
        let outgoing = match held {
            Some(held) => held,
            None => Outgoing::begin(client, WIDE_BYTES).await?,
        };
        let (bytes, events) = outgoing.read_all(stream.limit_bytes).await?;
        debug!(bytes = bytes.len(), "device state saved");
        Ok((DeviceState::written(bytes)?, events))
    })
    .await
}

/// Has QEMU begin, and holds it; nothing if it cannot be held. Then QEMU is as it was.
async fn begin_held(client: &Client, stream: Stream) -> Result<Option<Outgoing>, DeviceStateError> {
    let mut outgoing = Outgoing::begin(client, NARROW_BYTES).await?;
    if outgoing.read_ahead(stream).await? {
        return Ok(Some(outgoing));
    }
    let Outgoing { socket, theirs, mut events, .. } = outgoing;
    // QEMU's write fails, and the guest runs on.
    drop((socket, theirs));
    wait_over(client, &mut events).await?;
    settle(client).await?;
    Ok(None)
}

async fn in_time<T>(
    work: impl Future<Output = Result<T, DeviceStateError>>,
) -> Result<T, DeviceStateError> {
    let done = timeout(TRANSFER_TIMEOUT, work).await;
    done.unwrap_or(Err(DeviceStateError::Timeout { waited: TRANSFER_TIMEOUT }))
}

/// Only states that mean "stopped" at the destination as well may travel.
pub(super) fn check_savable(status: &Status) -> Result<(), DeviceStateError> {
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

/// A migration of QEMU into a socket with next to no room.
#[derive(Debug)]
struct Outgoing {
    socket: UnixStream,
    /// QEMU's end, to make room. While it is held, the stream has no end.
    theirs: OwnedFd,
    /// What was read so far.
    bytes: Vec<u8>,
    events: broadcast::Receiver<Event>,
}

impl Outgoing {
    /// Starts the migration and waits until it has come to its first bytes.
    async fn begin(client: &Client, room_bytes: usize) -> Result<Self, DeviceStateError> {
        let failed = socket_failed("setting it up");
        let events = client.subscribe();
        let (ours, theirs) = StdUnixStream::pair().map_err(&failed)?;
        ours.set_nonblocking(true).map_err(&failed)?;
        let socket = UnixStream::from_std(ours).map_err(&failed)?;
        setsockopt(&theirs, SndBuf, &room_bytes).map_err(|errno| failed(errno.into()))?;
        let qemus = theirs.try_clone().map_err(&failed)?;
        client.send_fd(DESCRIPTOR_NAME, OwnedFd::from(qemus)).await?;
        if let Err(error) = client.migrate_fd(DESCRIPTOR_NAME).await {
            drop_descriptor(client).await;
            return Err(error.into());
        }
        socket.readable().await.map_err(&failed)?;
        Ok(Self { socket, theirs: theirs.into(), bytes: Vec::new(), events })
    }

    /// Reads as far as QEMU may come while the guest runs; says whether it can be held there.
    async fn read_ahead(&mut self, stream: Stream) -> Result<bool, DeviceStateError> {
        let mut ahead = Ahead::new(stream.shared_bytes);
        let limit = usize::try_from(stream.limit_bytes).unwrap_or(usize::MAX);
        loop {
            let to = match ahead.step(&self.bytes) {
                Step::Read(to) if to <= limit => to,
                Step::Read(_) | Step::Unknown => return Ok(false),
                Step::Hold => return Ok(true),
            };
            let from = self.bytes.len();
            self.bytes.resize(to, 0);
            let part = self.bytes.get_mut(from..).unwrap_or_default();
            self.socket.read_exact(part).await.map_err(socket_failed(READING))?;
        }
    }

    /// Makes room and reads to the end.
    async fn read_all(
        self,
        limit_bytes: u64,
    ) -> Result<(Vec<u8>, broadcast::Receiver<Event>), DeviceStateError> {
        let Self { mut socket, theirs, mut bytes, events } = self;
        if let Err(error) = setsockopt(&theirs, SndBuf, &WIDE_BYTES) {
            debug!(%error, "QEMU's end of the socket stays narrow");
        }
        drop(theirs);
        let limit = usize::try_from(limit_bytes).unwrap_or(usize::MAX);
        loop {
            if bytes.len() > limit {
                return Err(DeviceStateError::TooLarge { limit_bytes });
            }
            bytes.reserve(READ_BYTES.min(limit.saturating_sub(bytes.len()).saturating_add(1)));
            let read = socket.read_buf(&mut bytes).await;
            if read.map_err(socket_failed(READING))? == 0 {
                return Ok((bytes, events));
            }
        }
    }
}

/// Waits until a migration whose connection was given up is over, or has been handed over by post-copy.
async fn settled_mode(client: &Client, events: &mut broadcast::Receiver<Event>) {
    while let Ok(info) = client.query_migrate().await {
        if !info.is_under_way() || info.status.as_ref().is_some_and(is_postcopy) {
            return;
        }
        wait_event(events, "MIGRATION").await;
    }
}

/// Ends a migration that is of no use any more, as far as QEMU lets us. One that was handed over by post-copy, which it
/// may have been where it `may_switch`, is left as it is: whose the guest is by now is not known here, and QEMU 7.2
/// takes the command then and gets stuck.
pub(super) async fn end_migration(client: &Client, may_switch: bool) {
    let mut events = client.subscribe();
    if may_switch && timeout(ENDS_BY_ITSELF_WITHIN, settled_mode(client, &mut events)).await.is_ok()
    {
        return;
    }
    let ended = async {
        client.migrate_cancel().await?;
        wait_over(client, &mut events).await
    };
    match timeout(SETTLE_TIMEOUT, ended).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => warn!(%error, "the migration could not be cancelled"),
        Err(_) => warn!("the cancelled migration does not end"),
    }
}

/// Waits until QEMU has left the transitional state at the end of a migration and has cleaned up.
pub(super) async fn settle(client: &Client) -> Result<Status, DeviceStateError> {
    let until = Instant::now() + SETTLE_TIMEOUT;
    loop {
        let (kept, status) = tokio::try_join!(client.keeps_migration(), client.query_status())?;
        if !kept && status.state != RunState::FinishMigrate {
            return Ok(status);
        }
        if Instant::now() > until {
            return Err(DeviceStateError::Timeout { waited: SETTLE_TIMEOUT });
        }
        sleep(SETTLE_INTERVAL).await;
    }
}
