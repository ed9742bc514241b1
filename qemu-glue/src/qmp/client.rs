//! The connection: two tasks around one socket, and the handle that commands are sent with.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{OwnedMutexGuard, broadcast, mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tracing::{debug, trace, warn};

use super::error::QmpError;
use super::types::QemuVersion;
use super::wire::{self, Event, MESSAGE_BYTES_MAX, Message};

/// How long a monitor may take to greet. A busy one never does.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a command may take if nothing else is said. QEMU answers late while it completes a
/// migration.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// Events that a slow receiver may be behind before it loses some.
const EVENTS_KEPT: usize = 1024;

/// Lines that may wait for the writer.
const LINES_WAITING_MAX: usize = 64;

/// Most messages for an earlier client that are passed over before the greeting.
const STALE_MESSAGES_MAX: usize = 256;

type Answer = Result<Value, QmpError>;

/// The process at the other end of the socket, by `SO_PEERCRED`: the one that called `listen`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerProcess {
    /// Its process id; 0 if it lives in a process namespace that is not visible from here.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
}

/// A connection to one QEMU's monitor. Clones share it; it closes when the last one is dropped.
#[derive(Debug, Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    peer: PeerProcess,
    version: QemuVersion,
    oob: bool,
    lines: mpsc::Sender<Line>,
    shared: Arc<Shared>,
    /// One descriptor at a time: QEMU keeps only the last one that it has received.
    descriptor_turn: Arc<tokio::sync::Mutex<()>>,
    /// One migration of ours at a time.
    migration_turn: Arc<tokio::sync::Mutex<()>>,
    tasks: [AbortHandle; 2],
}

impl Drop for Inner {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

#[derive(Debug)]
struct Line {
    bytes: Vec<u8>,
    descriptor: Option<OwnedFd>,
}

#[derive(Debug)]
struct Shared {
    next_id: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Open { waiting: HashMap<u64, Waiter>, events: broadcast::Sender<Event> },
    Closed { reason: String },
}

#[derive(Debug)]
struct Waiter {
    command: String,
    reply: oneshot::Sender<Answer>,
}

impl Shared {
    fn new() -> Self {
        let (events, _) = broadcast::channel(EVENTS_KEPT);
        let state = State::Open { waiting: HashMap::new(), events };
        Self { next_id: AtomicU64::new(first_id()), state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a command; its answer comes through the receiver.
    fn wait_for(&self, command: &str) -> Result<(u64, oneshot::Receiver<Answer>), QmpError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        match &mut *self.lock() {
            State::Open { waiting, .. } => {
                waiting.insert(id, Waiter { command: command.to_owned(), reply });
                Ok((id, answer))
            }
            State::Closed { reason } => Err(closed(command, reason)),
        }
    }

    fn forget(&self, id: u64) {
        if let State::Open { waiting, .. } = &mut *self.lock() {
            waiting.remove(&id);
        }
    }

    fn deliver(&self, id: u64, result: Result<Value, (String, String)>) {
        let waiter = match &mut *self.lock() {
            State::Open { waiting, .. } => waiting.remove(&id),
            State::Closed { .. } => None,
        };
        let Some(Waiter { command, reply }) = waiter else {
            debug!(id, "QEMU answered a command that nobody waits for any more");
            return;
        };
        let answer = result.map_err(|(class, desc)| QmpError::Command { command, class, desc });
        // The waiter may have given up at this moment: then nobody wants the answer.
        let _ = reply.send(answer);
    }

    fn announce(&self, event: Event) {
        if let State::Open { events, .. } = &*self.lock() {
            trace!(name = event.name, "QMP event");
            // Without a receiver an event is of no interest.
            let _ = events.send(event);
        }
    }

    /// Ends everything: waiters fail, event channels end. The first reason stays.
    fn close(&self, reason: &str) {
        let mut state = self.lock();
        if matches!(*state, State::Closed { .. }) {
            return;
        }
        let before = std::mem::replace(&mut *state, State::Closed { reason: reason.to_owned() });
        drop(state);
        if let State::Open { waiting, .. } = before {
            for Waiter { command, reply } in waiting.into_values() {
                let _ = reply.send(Err(closed(&command, reason)));
            }
        }
    }

    fn close_reason(&self) -> String {
        match &*self.lock() {
            State::Open { .. } => "the connection is being closed".to_owned(),
            State::Closed { reason } => reason.clone(),
        }
    }
}

fn closed(command: &str, reason: &str) -> QmpError {
    QmpError::Closed { command: command.to_owned(), reason: reason.to_owned() }
}

/// Takes a waiter off the map when its command is given up.
struct Forget<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.shared.forget(self.id);
    }
}

impl Client {
    /// Connects to a monitor's Unix socket and negotiates, with out-of-band commands if offered.
    ///
    /// # Errors
    /// [`QmpError::Connect`], [`QmpError::NoGreeting`] if another client holds the monitor, or
    /// what the negotiation says.
    pub async fn connect(path: impl AsRef<Path>) -> Result<Self, QmpError> {
        Self::connect_within(path.as_ref(), GREETING_TIMEOUT).await
    }

    /// As [`Client::connect`], with another limit on the wait for the greeting.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub async fn connect_within(path: &Path, patience: Duration) -> Result<Self, QmpError> {
        let refused = |source| QmpError::Connect { path: path.to_owned(), source };
        let stream = match timeout(patience, UnixStream::connect(path)).await {
            Ok(connected) => connected.map_err(refused)?,
            Err(_) => return Err(no_greeting(path, patience)),
        };
        let credentials = stream.peer_cred().map_err(refused)?;
        let peer = PeerProcess { pid: credentials.pid().unwrap_or(0), uid: credentials.uid() };
        let (read_half, write_half) = stream.into_split();
        let mut reader = BufReader::new(read_half);
        let (version, oob) = timeout(patience, greeting(&mut reader, path))
            .await
            .map_err(|_| no_greeting(path, patience))??;

        let shared = Arc::new(Shared::new());
        let (lines, queue) = mpsc::channel(LINES_WAITING_MAX);
        let tasks = [
            tokio::spawn(read_task(reader, Arc::clone(&shared))).abort_handle(),
            tokio::spawn(write_task(write_half, queue, Arc::clone(&shared))).abort_handle(),
        ];
        let inner = Inner {
            path: path.to_owned(),
            peer,
            version,
            oob,
            lines,
            shared,
            descriptor_turn: Arc::default(),
            migration_turn: Arc::default(),
            tasks,
        };
        let client = Self { inner: Arc::new(inner) };
        let enable = if oob { json!({ "enable": ["oob"] }) } else { Value::Null };
        client.execute("qmp_capabilities", enable).await?;
        Ok(client)
    }

    /// The process that listens on the socket. With libvirt this need not be QEMU itself.
    pub fn peer(&self) -> PeerProcess {
        self.inner.peer
    }

    /// QEMU's version, from the greeting.
    pub fn version(&self) -> &QemuVersion {
        &self.inner.version
    }

    /// The socket that this client is connected to.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Whether the connection is over.
    pub fn is_closed(&self) -> bool {
        matches!(*self.inner.shared.lock(), State::Closed { .. })
    }

    /// Events from now on. The channel ends with the connection.
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        match &*self.inner.shared.lock() {
            State::Open { events, .. } => events.subscribe(),
            // A channel whose sender is gone: it has ended.
            State::Closed { .. } => broadcast::channel(1).1,
        }
    }

    /// Runs a command and waits up to [`COMMAND_TIMEOUT`]. `Value::Null` stands for no arguments.
    ///
    /// # Errors
    /// QEMU's refusal, the end of the connection, or no answer in time.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, COMMAND_TIMEOUT).await
    }

    /// Runs a command with a limit on the wait of its own.
    ///
    /// # Errors
    /// As [`Client::execute`].
    pub async fn execute_within(
        &self,
        command: &str,
        arguments: Value,
        patience: Duration,
    ) -> Result<Value, QmpError> {
        self.run("execute", command, arguments, None, patience).await
    }

    /// Runs a command out of band: QEMU answers it even while its main loop is busy.
    ///
    /// # Errors
    /// As [`Client::execute`], and [`QmpError::NoOutOfBand`].
    pub async fn execute_oob(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        if !self.inner.oob {
            return Err(QmpError::NoOutOfBand { command: command.to_owned() });
        }
        self.run("exec-oob", command, arguments, None, COMMAND_TIMEOUT).await
    }

    /// Runs a line of the human monitor and returns its text.
    ///
    /// # Errors
    /// As [`Client::execute`].
    pub async fn hmp(&self, line: &str) -> Result<String, QmpError> {
        const COMMAND: &str = "human-monitor-command";
        match self.execute(COMMAND, json!({ "command-line": line })).await? {
            Value::String(text) => Ok(text),
            _ => Err(QmpError::answer(COMMAND, "it is no text")),
        }
    }

    /// Passes a descriptor to QEMU under a name (`getfd`), for `fd:NAME` on this same monitor.
    ///
    /// # Errors
    /// As [`Client::execute`].
    pub async fn send_fd(&self, name: &str, descriptor: OwnedFd) -> Result<(), QmpError> {
        let client = self.clone();
        let arguments = json!({ "fdname": name });
        // A task of its own, so that the turn is held until QEMU has taken the descriptor even if
        // the caller is cancelled.
        let task = tokio::spawn(async move {
            let turn = Arc::clone(&client.inner.descriptor_turn);
            let _turn = turn.lock().await;
            client.run("execute", "getfd", arguments, Some(descriptor), COMMAND_TIMEOUT).await
        });
        match task.await {
            Ok(answer) => answer.map(drop),
            Err(error) => Err(closed("getfd", &error.to_string())),
        }
    }

    /// The right to run a migration and to change its settings; waits for who has it.
    pub(crate) async fn migration_turn(&self) -> OwnedMutexGuard<()> {
        Arc::clone(&self.inner.migration_turn).lock_owned().await
    }

    async fn run(
        &self,
        verb: &str,
        command: &str,
        arguments: Value,
        descriptor: Option<OwnedFd>,
        patience: Duration,
    ) -> Result<Value, QmpError> {
        let shared = &*self.inner.shared;
        let (id, answer) = shared.wait_for(command)?;
        let _forget = Forget { shared, id };
        let mut message = json!({ verb: command, "id": id });
        if let (Some(fields), false) = (message.as_object_mut(), arguments.is_null()) {
            fields.insert("arguments".to_owned(), arguments);
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(b'\n');
        if bytes.len() > MESSAGE_BYTES_MAX {
            return Err(QmpError::TooLong { command: command.to_owned(), bytes: bytes.len() });
        }
        let exchange = async {
            if self.inner.lines.send(Line { bytes, descriptor }).await.is_err() {
                return Err(closed(command, &shared.close_reason()));
            }
            match answer.await {
                Ok(answer) => answer,
                Err(_) => Err(closed(command, &shared.close_reason())),
            }
        };
        timeout(patience, exchange).await.unwrap_or_else(|_| {
            Err(QmpError::Timeout { command: command.to_owned(), waited: patience })
        })
    }
}

fn no_greeting(path: &Path, patience: Duration) -> QmpError {
    QmpError::NoGreeting { path: path.to_owned(), seconds: patience.as_secs() }
}

async fn greeting(
    reader: &mut BufReader<OwnedReadHalf>,
    path: &Path,
) -> Result<(QemuVersion, bool), QmpError> {
    let not_qmp = |detail: String| QmpError::NotQmp { path: path.to_owned(), detail };
    let mut line = Vec::new();
    for _ in 0..STALE_MESSAGES_MAX {
        match wire::read_line(reader, &mut line).await {
            Ok(Some(())) => {}
            Ok(None) => {
                let detail = "it closed the connection without a greeting".to_owned();
                return Err(not_qmp(detail));
            }
            Err(error) => return Err(not_qmp(error.to_string())),
        }
        match wire::parse(&line).map_err(not_qmp)? {
            Message::Greeting { version, oob } => {
                let version = QemuVersion::from_value(&version)
                    .ok_or_else(|| not_qmp("the greeting names no version".to_owned()))?;
                return Ok((version, oob));
            }
            Message::Reply { .. } | Message::Event(_) => {
                debug!("QEMU delivered what an earlier client had not waited for");
            }
            Message::Other => break,
        }
    }
    Err(not_qmp(format!("it began with {}", wire::quote(&line))))
}

/// The first command id of a connection. QEMU may deliver the answers that an earlier client left
/// behind to the next one (seen with 10.0.2), so that two connections must not use the same ids.
fn first_id() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // QEMU keeps ids as 64-bit signed numbers: the microseconds leave room for all commands.
    u64::try_from(now.as_micros()).unwrap_or(0).min(1 << 62)
}

async fn read_task(mut reader: BufReader<OwnedReadHalf>, shared: Arc<Shared>) {
    let mut line = Vec::new();
    let reason = loop {
        match wire::read_line(&mut reader, &mut line).await {
            Ok(Some(())) => {}
            Ok(None) => break "the connection was closed by QEMU".to_owned(),
            Err(error) => break error.to_string(),
        }
        match wire::parse(&line) {
            Ok(Message::Reply { id: Some(id), result }) => shared.deliver(id, result),
            Ok(Message::Reply { id: None, result }) => {
                warn!(?result, "QEMU answered without saying what");
            }
            Ok(Message::Event(event)) => shared.announce(event),
            Ok(Message::Greeting { .. } | Message::Other) => {
                debug!(line = wire::quote(&line), "QMP message of an unknown kind");
            }
            Err(text) => break text,
        }
        if line.capacity() > (1 << 20) {
            line = Vec::new();
        }
    };
    debug!(reason, "the QMP connection has ended");
    shared.close(&reason);
}

async fn write_task(
    mut writer: OwnedWriteHalf,
    mut queue: mpsc::Receiver<Line>,
    shared: Arc<Shared>,
) {
    while let Some(line) = queue.recv().await {
        if let Err(error) = write_line(&mut writer, line).await {
            shared.close(&format!("writing to QEMU failed: {error}"));
            return;
        }
    }
}

async fn write_line(writer: &mut OwnedWriteHalf, line: Line) -> io::Result<()> {
    let mut bytes = line.bytes.as_slice();
    if let Some(descriptor) = line.descriptor {
        let socket: &UnixStream = writer.as_ref();
        let sent = socket
            .async_io(Interest::WRITABLE, || {
                let raw = [descriptor.as_raw_fd()];
                let control = [ControlMessage::ScmRights(&raw)];
                let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                let pieces = [IoSlice::new(bytes)];
                sendmsg::<()>(socket.as_raw_fd(), &pieces, &control, flags, None)
                    .map_err(io::Error::from)
            })
            .await?;
        bytes = bytes.get(sent..).unwrap_or_default();
    }
    writer.write_all(bytes).await
}
