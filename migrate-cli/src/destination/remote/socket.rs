//! The socket on which commands of this host ask how the guest does, or to merge it.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use migrate_core::error::{Classify, ErrorBin};
use migrate_core::layout::PAGE_BYTES;
use migrate_core::remote::ServerPhase;
use serde::Serialize;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Take};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::leave::{Cancel, Wanted};
use super::{Shared, fragment};
use crate::error::EngineError;
use crate::pager_socket::{
    Ask, BytesStatus, EvictedStatus, FaultStatus, LINE_BYTES_MAX, Leave, Left, ReadAheadStatus,
    Refused, STATUS_VERSION, ServerState, ServerStatus, Status,
};

/// How often progress is told.
const TELL_EVERY: Duration = Duration::from_millis(500);

/// Longest wait for the question.
const ASK_WITHIN: Duration = Duration::from_secs(5);

/// Answers until it is dropped. Returns only if that is not possible.
pub(super) async fn serve(path: PathBuf, shared: Arc<Shared>) -> EngineError {
    let failed =
        |error: std::io::Error| EngineError::Internal(format!("{}: {error}", path.display()));
    // Left by a pager that was killed.
    let _none_there = std::fs::remove_file(&path);
    let listener = match UnixListener::bind(&path) {
        Ok(listener) => listener,
        Err(error) => return failed(error),
    };
    if let Err(error) = std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)) {
        return failed(error);
    }
    loop {
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::spawn(answer(stream, Arc::clone(&shared)))),
            Err(error) => {
                tracing::warn!(%error, "a question was not taken");
                tokio::time::sleep(TELL_EVERY).await;
            }
        }
    }
}

/// Answers one question. The asker may leave at any time.
async fn answer(stream: UnixStream, shared: Arc<Shared>) {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    let mut reader = BufReader::new(reader.take(LINE_BYTES_MAX));
    let asked = tokio::time::timeout(ASK_WITHIN, reader.read_line(&mut line)).await;
    let Ok(Ok(_)) = asked else { return };
    let Ok(ask) = serde_json::from_str::<Ask>(&line) else {
        tracing::info!(line, "not understood");
        return;
    };
    let begun = match ask {
        Ask::Leave(leave) => return let_go(reader, writer, shared, leave).await,
        Ask::Status => Ok(()),
        Ask::Merge => shared.begin_merge(),
        Ask::MoveFragment { from, to } => {
            let begin = tokio::spawn({
                let shared = Arc::clone(&shared);
                // Also if the asker leaves: what was begun is brought to its end.
                async move { fragment::begin(&shared, from, to).await }
            });
            tell_until(begin, &mut writer, &shared).await
        }
    };
    if let Err(error) = begun {
        return refuse(&mut writer, &error).await;
    }
    loop {
        let changed = shared.changed.notified();
        let status = status(&shared);
        let is_last = ask.is_over(&status);
        if !say(&mut writer, &status).await || is_last {
            return;
        }
        tokio::select! {
            () = changed => {}
            () = tokio::time::sleep(TELL_EVERY) => {}
        }
    }
}

/// Tells how the guest does until something is begun.
async fn tell_until(
    mut begin: JoinHandle<Result<(), EngineError>>,
    writer: &mut OwnedWriteHalf,
    shared: &Shared,
) -> Result<(), EngineError> {
    loop {
        tokio::select! {
            begun = &mut begin => {
                return begun.unwrap_or_else(|error| Err(EngineError::Internal(error.to_string())));
            }
            () = tokio::time::sleep(TELL_EVERY) => drop(say(writer, &status(shared)).await),
        }
    }
}

/// Has the guest leave; shows how far that is. Whoever leaves before the end cancels it.
async fn let_go(
    mut reader: BufReader<Take<OwnedReadHalf>>,
    mut writer: OwnedWriteHalf,
    shared: Arc<Shared>,
    asked: Leave,
) {
    let (cancel, cancelled) = oneshot::channel();
    let (done, mut is_done) = oneshot::channel();
    let is_busy = shared.is_leaving.load(Ordering::Acquire);
    if is_busy
        || shared.wanted.try_send(Wanted { asked, cancel: Cancel::new(cancelled), done }).is_err()
    {
        let error = EngineError::Misuse {
            what: "The guest is about to leave already".into(),
            remedy: "Wait for that, or interrupt it".into(),
        };
        return refuse(&mut writer, &error).await;
    }
    let mut rest = String::new();
    let mut asker_left = pin!(reader.read_line(&mut rest));
    let report = loop {
        tokio::select! {
            report = &mut is_done => break report,
            _ = &mut asker_left => return drop(cancel),
            () = tokio::time::sleep(TELL_EVERY) => {
                if !say(&mut writer, &status(&shared)).await {
                    return;
                }
            }
        }
    };
    // Without a word the paging has ended otherwise, as the asker is told then.
    if let Ok(report) = report
        && let Ok(left) = serde_json::to_value(&report)
    {
        let _left = say(&mut writer, &Left { left }).await;
    }
}

async fn refuse(writer: &mut OwnedWriteHalf, error: &EngineError) {
    let is_misuse = error.bin() == ErrorBin::CallerMisuse;
    let _left = say(writer, &Refused { refused: error.tell(), is_misuse }).await;
}

/// Writes a line. Says whether anybody reads.
async fn say(writer: &mut OwnedWriteHalf, line: &impl Serialize) -> bool {
    let Ok(mut line) = serde_json::to_string(line) else { return false };
    line.push('\n');
    writer.write_all(line.as_bytes()).await.is_ok()
}

/// How the guest does.
pub(super) fn status(shared: &Shared) -> Status {
    let state = shared.state();
    let (stats, unflushed_pages, is_stuck) = {
        let remote = shared.remote.lock();
        let unflushed_pages = if remote.is_flushing() { remote.unflushed_pages() } else { 0 };
        (remote.stats(), unflushed_pages, remote.is_stuck())
    };
    let (sent, received) = shared.traffic.bytes();
    let (stores, drained) = (shared.stores.read(), shared.traffic.drained.lock());
    let servers = stores.iter().zip(&stats.servers).enumerate();
    let remote_pages = servers
        .map(|(number, (store, server))| ServerStatus {
            server: store.address.clone(),
            pages: server.pages,
            bytes: server.pages * PAGE_BYTES as u64,
            state: match server.state {
                ServerPhase::Gone if drained.contains(&number) => ServerState::Drained,
                ServerPhase::Gone => ServerState::Lost,
                _ if !shared.traffic.is_reached(number) => ServerState::Away,
                ServerPhase::Draining => ServerState::Draining,
                ServerPhase::Serving => ServerState::Connected,
            },
        })
        .collect();
    let faults = &stats.faults;
    Status {
        v: STATUS_VERSION,
        vm: shared.vm.clone(),
        state,
        resident_limit_pages: stats.resident_limit_pages.unwrap_or_else(|| shared.layout().pages()),
        resident_pages: stats.resident_pages,
        remote_pages,
        under_copied_pages: stats.under_copied_pages,
        unflushed_pages,
        is_stuck,
        faults: FaultStatus {
            count: faults.zero + faults.fetch + faults.wait,
            zero: faults.zero,
            fetched: faults.fetch + faults.wait,
            p50_us: stats.p50_us,
            p99_us: stats.p99_us,
            max_us: stats.max_us,
        },
        read_ahead: ReadAheadStatus {
            pages: stats.read_ahead_pages,
            used: stats.read_ahead_used_pages,
            zeros: stats.zeros_ahead_pages,
        },
        evicted: EvictedStatus {
            pages: stats.evicted.pages(),
            clean: stats.evicted.clean,
            cancelled: stats.evicted.cancelled,
        },
        reclaimed_pages: stats.reclaimed_pages,
        bytes: BytesStatus { sent, received },
    }
}
