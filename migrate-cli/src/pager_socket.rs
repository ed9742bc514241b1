//! How commands on the same host talk to the pager of a split guest: a Unix socket beside its journal, one JSON
//! object a line.
//!
//! ```text
//!   migrate status ── {"ask":"status"} ─► receive ── one Status
//!   migrate merge ─── {"ask":"merge"} ──► receive ── a Status every half second, until all is here
//!   migrate move-fragment ── {"ask":"move-fragment",...} ─► receive ── the same, until the server is drained
//!   migrate split, merge --to ── {"ask":"leave",...} ─► receive ── the same, until the guest has left, then Left
//! ```
//!
//! What cannot be done is answered by one [`Refused`].

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use crate::error::EngineError;
use crate::journal::{self, Journal};
use crate::source::recover::is_same_qemu;

/// Version of the shape of [`Status`].
pub const STATUS_VERSION: u32 = 1;

/// Longest line that either end takes.
pub const LINE_BYTES_MAX: u64 = 64 << 10;

/// How long a pager may take until it listens: it hears the source out first.
const LISTENS_WITHIN: Duration = Duration::from_secs(6);

/// Longest wait for the pager's next word.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// What is asked of a pager.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub enum Ask {
    /// How it is doing.
    Status,
    /// To bring all memory here.
    Merge,
    /// To move what one memory server has to others.
    MoveFragment {
        /// The server.
        from: SocketAddr,
        /// One of the others, which may be new to the guest.
        to: Option<SocketAddr>,
    },
    /// To let the guest go to another main host. Whoever asks is told by [`Left`]; leaving before cancels it.
    Leave(Leave),
}

/// How a split guest is to leave for another main host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leave {
    /// Where `migrate receive` listens.
    pub to: String,
    /// The only name that its identity may have.
    pub peer: Option<String>,
    /// Most bytes of the guest that it may hold; as many as this host if not said.
    pub resident_bytes: Option<u64>,
    /// The memory servers that the guest is to have then; those that it has if not said.
    pub memory: Option<Vec<SocketAddr>>,
    /// Whether all memory is to come to the new main host then.
    pub merge: bool,
    /// Longest acceptable downtime in milliseconds.
    pub max_downtime_ms: u64,
    /// Seconds without a better prediction of it after which the guest stays.
    pub patience_s: u64,
    /// Seconds to keep asking the new main host after the hand-over before the outcome is called in doubt.
    pub ask_s: u64,
}

impl Ask {
    /// Whether a status is the last word about it.
    pub fn is_over(&self, status: &Status) -> bool {
        match self {
            Self::Status => true,
            Self::Merge => status.state != PagerState::Merging,
            Self::MoveFragment { from, .. } => {
                status.state != PagerState::Split || !status.drains(*from)
            }
            Self::Leave(_) => false,
        }
    }
}

/// The answer to what is not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Why, and what to do instead.
    pub refused: String,
    /// Whether it made no sense.
    pub is_misuse: bool,
}

/// What became of a guest that was to leave.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Left {
    /// The report, as `migrate send --json` prints it.
    pub left: serde_json::Value,
}

/// What a pager says.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Answer {
    Refused(Refused),
    Left(Left),
    Status(Box<Status>),
}

/// What a pager says that does what was asked for.
#[derive(Debug)]
pub enum Heard {
    /// How the guest does.
    Status(Box<Status>),
    /// Its report, if it was to leave: the last word.
    Left(serde_json::Value),
}

/// How a memory server does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServerState {
    /// It answers.
    Connected,
    /// It does not, and is sought.
    Away,
    /// What it has moves to others.
    Draining,
    /// All that it had was moved; it serves the guest no more.
    Drained,
    /// It is gone with all that it had.
    Lost,
}

impl fmt::Display for ServerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connected => "connected",
            Self::Away => "away",
            Self::Draining => "draining",
            Self::Drained => "drained",
            Self::Lost => "lost",
        })
    }
}

/// What state a split guest is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PagerState {
    /// Part of its memory is elsewhere.
    Split,
    /// All of it is on its way here.
    Merging,
    /// All of it is here.
    Merged,
    /// It is about to leave for another main host.
    Leaving,
    /// Some of it is on no server any more: the guest is stopped, or its threads stand still.
    Lost,
}

impl fmt::Display for PagerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Split => "split",
            Self::Merging => "merging",
            Self::Merged => "merged",
            Self::Leaving => "leaving",
            Self::Lost => "lost",
        })
    }
}

/// What one memory server has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// Its address.
    pub server: String,
    /// Pages of which it has a valid copy, those included that are here as well and were not written since.
    pub pages: u64,
    /// Their bytes.
    pub bytes: u64,
    /// How it does.
    pub state: ServerState,
}

/// Page faults of the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultStatus {
    /// All of them.
    pub count: u64,
    /// On pages that hold nothing.
    pub zero: u64,
    /// On pages that were fetched.
    pub fetched: u64,
    /// Median time from the fault to the page, in microseconds.
    pub p50_us: u64,
    /// 99th percentile, in microseconds.
    pub p99_us: u64,
    /// Longest, in microseconds.
    pub max_us: u64,
}

/// Pages fetched before they were asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadAheadStatus {
    /// All of them.
    pub pages: u64,
    /// Of those, known to have been used.
    pub used: u64,
    /// Besides, pages that hold nothing, provided before they were asked for.
    #[serde(default)]
    pub zeros: u64,
}

/// Pages that were taken away.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvictedStatus {
    /// All of them.
    pub pages: u64,
    /// Of those, not sent, since servers still had them.
    pub clean: u64,
    /// Kept, because the guest wrote to them meanwhile.
    pub cancelled: u64,
}

/// Bytes to and from memory servers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BytesStatus {
    /// To them.
    pub sent: u64,
    /// From them.
    pub received: u64,
}

/// How a split guest is doing: what `migrate status --json` prints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// [`STATUS_VERSION`].
    pub v: u32,
    /// The VM's name.
    pub vm: String,
    /// Its state.
    pub state: PagerState,
    /// Most pages that may be here.
    pub resident_limit_pages: u64,
    /// Pages here.
    pub resident_pages: u64,
    /// What lies elsewhere.
    pub remote_pages: Vec<ServerStatus>,
    /// Pages that are on fewer servers than asked for.
    pub under_copied_pages: u64,
    /// While the guest is about to leave, pages that are not on servers yet.
    pub unflushed_pages: u64,
    /// Whether threads of the guest wait for room here that nothing makes, since the servers are full.
    #[serde(default)]
    pub is_stuck: bool,
    /// Page faults.
    pub faults: FaultStatus,
    /// Pages fetched before they were asked for.
    pub read_ahead: ReadAheadStatus,
    /// Pages that were taken away.
    pub evicted: EvictedStatus,
    /// Pages that the guest freed, and that were dropped.
    pub reclaimed_pages: u64,
    /// Bytes to and from memory servers.
    pub bytes: BytesStatus,
}

impl Status {
    /// Whether the server at an address has pages of the guest that are to move to others.
    pub fn drains(&self, server: SocketAddr) -> bool {
        use ServerState::{Drained, Lost};
        let mut found = self.remote_pages.iter().rev();
        let found = found.find(|one| one.server.parse() == Ok(server));
        found.is_some_and(|one| !matches!(one.state, Drained | Lost))
    }
}

/// A connection to the pager of a split guest.
#[derive(Debug)]
pub struct PagerClient {
    lines: tokio::io::Lines<BufReader<tokio::net::unix::OwnedReadHalf>>,
    writer: tokio::net::unix::OwnedWriteHalf,
}

impl PagerClient {
    /// Finds the pager of the guest at `qmp`, or the only one, and connects to it.
    ///
    /// # Errors
    /// [`EngineError::Misuse`] if there is none, or more than one where none is named.
    pub async fn find(dir: Option<&Path>, qmp: Option<&Path>) -> Result<Self, EngineError> {
        let dir = dir.map_or_else(journal::default_dir, Path::to_owned);
        let wanted = qmp.map(absolute);
        let found: Vec<PathBuf> = guests(&dir)
            .into_iter()
            .filter(|(_, of)| wanted.as_ref().is_none_or(|wanted| wanted == of))
            .map(|(socket, _)| socket)
            .collect();
        let [socket] = found.as_slice() else {
            let (what, remedy) = match found.len() {
                0 => (
                    "No split guest runs here".to_owned(),
                    "Look on its main host; name the --journal that `migrate receive` was given",
                ),
                count => (format!("{count} split guests run here"), "Name one of them by --qmp"),
            };
            return Err(EngineError::Misuse { what, remedy: remedy.into() });
        };
        let (reader, writer) = connect(socket).await?.into_split();
        Ok(Self { lines: BufReader::new(reader).lines(), writer })
    }

    /// Asks for something.
    ///
    /// # Errors
    /// If the pager is gone.
    pub async fn ask(&mut self, ask: &Ask) -> Result<(), EngineError> {
        let mut line = serde_json::to_string(ask).map_err(|error| gone(&error))?;
        line.push('\n');
        self.writer.write_all(line.as_bytes()).await.map_err(|error| gone(&error))
    }

    /// The next answer; nothing at the end.
    ///
    /// # Errors
    /// If the pager is gone or does not answer, or what it says against what was asked for.
    pub async fn next(&mut self) -> Result<Option<Heard>, EngineError> {
        let late = |_| EngineError::TooSlow {
            wanted: "how the guest does",
            seconds: ANSWER_WITHIN.as_secs(),
        };
        let line =
            tokio::time::timeout(ANSWER_WITHIN, self.lines.next_line()).await.map_err(late)?;
        let Some(line) = line.map_err(|error| gone(&error))? else { return Ok(None) };
        match serde_json::from_str(&line).map_err(|error| gone(&error))? {
            Answer::Status(status) => Ok(Some(Heard::Status(status))),
            Answer::Left(Left { left }) => Ok(Some(Heard::Left(left))),
            Answer::Refused(Refused { refused: text, is_misuse }) => {
                Err(EngineError::PagerRefused { text, is_misuse })
            }
        }
    }
}

fn gone(error: &dyn fmt::Display) -> EngineError {
    EngineError::Internal(format!("the guest's pager (`migrate receive`) does not answer: {error}"))
}

/// Connects to a pager, which may be just about to listen.
async fn connect(socket: &Path) -> Result<UnixStream, EngineError> {
    let began = tokio::time::Instant::now();
    loop {
        match UnixStream::connect(socket).await {
            Ok(stream) => return Ok(stream),
            Err(error) if began.elapsed() > LISTENS_WITHIN => {
                return Err(EngineError::Misuse {
                    what: format!(
                        "The guest's pager is gone ({error}): the guest waits for memory"
                    ),
                    remedy: "Start `migrate receive` for it again, with the options that it had"
                        .into(),
                });
            }
            Err(_) => tokio::time::sleep(LISTENS_WITHIN / 20).await,
        }
    }
}

/// Whether a split guest runs on this host whose QMP socket is this one.
pub fn is_split_here(dir: Option<&Path>, qmp: &Path) -> bool {
    let dir = dir.map_or_else(journal::default_dir, Path::to_owned);
    let qmp = absolute(qmp);
    guests(&dir).iter().any(|(_, of)| *of == qmp)
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// The sockets of the split guests' pagers, and the QMP sockets of these guests.
fn guests(dir: &Path) -> Vec<(PathBuf, PathBuf)> {
    let Ok(entries) = std::fs::read_dir(dir) else { return vec![] };
    let journals = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let journals =
        journals.filter(|path| path.extension().is_some_and(|ending| ending == "journal"));
    journals
        .filter_map(|path| {
            let found = Journal::open(&path).ok()??;
            let entry = found.entry();
            entry.paging.as_ref().filter(|paging| paging.split.is_some())?;
            is_same_qemu(entry).then(|| (path.with_extension("sock"), entry.qmp.clone()))
        })
        .collect()
}
