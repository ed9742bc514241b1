//! A migration from here, from its claim to its end.
//!
//! ```text
//!   recorded ─► claimed ─► destination ready ─► engine runs ─► its report ──► there or here ─► claim ended, record gone
//!                  │              │                  │ killed, in doubt ▲
//!                  └──────────────┴── failed ──►     └──► resolve ──────┘
//! ```
//!
//! The record of a migration is written before it is claimed and removed after the claim has ended, so that an agent that
//! is started again knows of all that it has begun ([`Records`]). The engine runs on its own ([`Child`]): the agent's
//! death does not touch it.
//!
//! Invariants: an engine is started once for a claim; a claim ends only when it is known where the guest runs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use qemu_glue::qmp::Client as Monitor;
use serde::{Deserialize, Serialize};

use super::board::Moved;
use super::child::{self, Child};
use super::records::Records;
use super::shared::Shared;
use crate::api::control::{ApiError, ReceiveRequest};
use crate::api::view::{MovePoint, MoveStage, MoveView, POINTS_MAX};
use crate::model::Amounts;
use crate::profile::report::GuestState;
use crate::store::claims::{Claim, ClaimError, ROOT};
use crate::store::{Change, Store};

/// Time between two looks at the engine's progress.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Pauses between two tries to find out where a guest runs.
const AGAIN_AFTER: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(15)];

/// How long QEMU may take to answer where its guest is.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

const PROGRESS: &str = "progress";

/// As much as the newest [`POINTS_MAX`] lines of progress take, in bytes.
const PROGRESS_BYTES_MAX: u64 = POINTS_MAX as u64 * 256;

/// What is remembered of a migration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// What was claimed.
    pub claim: Claim,
    /// The guest's monitor.
    pub socket: PathBuf,
    /// When it began, seconds since 1970.
    pub began_s: f64,
}

/// What the engine prints at its end, as far as it matters here.
#[derive(Debug, Clone, Deserialize)]
struct Report {
    outcome: Outcome,
    #[serde(default)]
    downtime_ms: Option<f64>,
    #[serde(default)]
    bytes: Option<Bytes>,
    #[serde(default)]
    error: Option<Failure>,
    #[serde(default)]
    message: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Outcome {
    Completed,
    Failed,
    InDoubt,
}

#[derive(Debug, Clone, Deserialize)]
struct Bytes {
    wire: u64,
}

#[derive(Debug, Clone, Deserialize)]
struct Failure {
    message: String,
}

/// Where the guest is, and what is known of how it got there.
#[derive(Debug, Default)]
struct Settled {
    /// Why it is still here, if it is.
    error: Option<String>,
    downtime_ms: Option<f64>,
    wire_bytes: Option<u64>,
}

/// Claims a migration of a guest that runs here. [`carry`] does the rest.
///
/// # Errors
/// Why it may not begin; nothing has changed then.
pub async fn begin(
    shared: &Arc<Shared>,
    guest: &str,
    to: &str,
    reason: &str,
) -> Result<Record, ApiError> {
    let world = shared.world();
    let config = shared.config();
    let from = shared.host.clone();
    let no_guest = || ApiError::not_found(format!("No guest is called {guest}"));
    let vm = world.vm(guest).ok_or_else(no_guest)?;
    let no_host = || ApiError::not_found(format!("No host is called {to}"));
    let host = world.host(to).ok_or_else(no_host)?;
    let placement = crate::model::Placement::new(&world.cluster);
    placement.may_go(vm, host).map_err(|obstacle| {
        ApiError::conflict(format!("{guest} does not go to {to}: {obstacle}"))
    })?;
    let socket = shared.socket_of(guest).ok_or_else(|| {
        ApiError::conflict(format!(
            "{guest} has no monitor on {from}: is its socket below profile.socket-folder?"
        ))
    })?;
    let takes = placement.change(vm, host).destination_usage.max(&Amounts::ZERO);
    let claim = Claim {
        vm: guest.into(),
        from: from.clone(),
        to: to.into(),
        agent: from,
        takes,
        reason: reason.into(),
    };
    let record = Record { claim, socket, began_s: shared.clock.now_s() };
    let records = Records::of_moves(&config.state);
    if records.has(guest) {
        return Err(ApiError::conflict(format!("{guest} is being moved already")));
    }
    records.keep(guest, &record)?;
    let share_max = config.limits.share_max;
    let room = |promises: &[crate::store::claims::Promise]| {
        let comes: Vec<Amounts> = promises.iter().map(|promise| promise.takes).collect();
        world.room(host, &comes, &share_max)
    };
    if let Err(error) = shared.claims.begin(&record.claim, room).await {
        // Whether a store that went away has heard it is not known: the record stays, and is looked after.
        if !matches!(error, ClaimError::Store(_)) {
            records.forget(guest);
        }
        return Err(refused(&error));
    }
    shared.left_alone.lock().insert(guest.into(), record.socket.clone());
    shared.moves.begin(view(&record));
    Ok(record)
}

fn refused(error: &ClaimError) -> ApiError {
    let what = error.to_string();
    match error {
        ClaimError::Store(_) | ClaimError::Contended => ApiError::unavailable(what),
        _ => ApiError::conflict(what),
    }
}

fn view(record: &Record) -> MoveView {
    let Claim { vm, from, to, agent, reason, .. } = record.claim.clone();
    MoveView { guest: vm, from, to, agent, reason, began_s: record.began_s, ..MoveView::default() }
}

/// Carries a migration to its end that was just claimed.
pub async fn carry(shared: &Arc<Shared>, record: &Record) -> MoveView {
    run(shared, record, true).await
}

/// Carries one to its end that an earlier agent began. What was claimed and not begun is given up.
pub async fn pick_up(shared: &Arc<Shared>, record: &Record) -> MoveView {
    run(shared, record, false).await
}

async fn run(shared: &Arc<Shared>, record: &Record, may_start: bool) -> MoveView {
    let guest = record.claim.vm.as_str();
    let records = Records::of_moves(&shared.config().state);
    let folder = records.folder(guest);
    shared.left_alone.lock().insert(guest.to_owned(), record.socket.clone());
    shared.moves.begin(view(record));
    let settled = match Child::recorded(&folder) {
        Some(engine) => settle(shared, record, &folder, engine).await,
        None if !may_start => {
            let error = "the agent ended before the engine was started".to_owned();
            Settled { error: Some(error), ..Settled::default() }
        }
        None => match start(shared, record, &folder).await {
            Ok(engine) => settle(shared, record, &folder, engine).await,
            Err(why) => Settled { error: Some(why), ..Settled::default() },
        },
    };
    let ended = conclude(shared, record, settled).await;
    records.forget(guest);
    shared.left_alone.lock().remove(guest);
    ended
}

/// Has the destination get ready and starts the engine.
async fn start(shared: &Arc<Shared>, record: &Record, folder: &Path) -> Result<Child, String> {
    let Claim { vm, to, .. } = &record.claim;
    let config = shared.config();
    let api = shared.api_of(to).ok_or_else(|| format!("The agent of {to} is not there"))?;
    let uuid = shared.world().reported(&shared.host, vm).map(|guest| guest.uuid.clone());
    let request = ReceiveRequest { guest: vm.clone(), uuid: uuid.unwrap_or_default() };
    let answer = shared.client.receive(&api, Some(to), &request).await;
    let addr = answer.map_err(|error| format!("{to} does not get ready for {vm}: {error}"))?.addr;
    shared.moves.update(vm, |view| view.stage = MoveStage::Moving);
    let text = |path: &Path| path.display().to_string();
    let mut args: Vec<String> = vec![
        "send".into(),
        format!("--qmp={}", text(&record.socket)),
        format!("--to={addr}"),
        format!("--identity={}", text(&config.identity)),
        format!("--journal={}", text(&shared.journal())),
        format!("--peer={to}"),
        format!("--progress-file={}", text(&folder.join(PROGRESS))),
        "--json".into(),
    ];
    args.extend(config.migrate.send.iter().cloned());
    Child::start(&config.migrate.program, &args, folder)
        .map_err(|error| format!("{} does not start: {error}", config.migrate.program.display()))
}

/// Follows the engine to its end and finds out where the guest is.
async fn settle(shared: &Arc<Shared>, record: &Record, folder: &Path, engine: Child) -> Settled {
    let guest = record.claim.vm.as_str();
    shared.moves.update(guest, |view| view.stage = MoveStage::Moving);
    while engine.is_alive() {
        if shared.moves.is_abort_wanted(guest) {
            engine.interrupt();
        }
        follow(shared, guest, folder);
        tokio::time::sleep(LOOK_EVERY).await;
    }
    follow(shared, guest, folder);
    let mut report = read_report(folder);
    let mut pause = AGAIN_AFTER[0];
    loop {
        if let Some(report) = report.as_ref().filter(|report| report.outcome != Outcome::InDoubt) {
            return settled(report, folder);
        }
        shared.moves.update(guest, |view| view.stage = MoveStage::InDoubt);
        match resolve(shared, record, folder).await {
            Some(resolved) => report = Some(resolved),
            None => match whereabouts(shared, record).await {
                Some(true) => return Settled::default(),
                Some(false) => {
                    let error =
                        last_words(folder).unwrap_or_else(|| "the engine was killed".into());
                    return Settled { error: Some(error), ..Settled::default() };
                }
                None => {}
            },
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(AGAIN_AFTER[1]);
    }
}

fn settled(report: &Report, folder: &Path) -> Settled {
    let said = report.error.as_ref().map(|error| error.message.clone());
    let why = || said.or_else(|| report.message.clone()).or_else(|| last_words(folder));
    Settled {
        error: (report.outcome == Outcome::Failed)
            .then(|| why().unwrap_or_else(|| "the engine does not say why".into())),
        downtime_ms: report.downtime_ms,
        wire_bytes: report.bytes.as_ref().map(|bytes| bytes.wire),
    }
}

fn read_report(folder: &Path) -> Option<Report> {
    serde_json::from_str(child::printed(folder, child::OUT, child::TEXT_BYTES_MAX).trim()).ok()
}

/// The last line of the engine's log.
fn last_words(folder: &Path) -> Option<String> {
    let log = child::printed(folder, child::LOG, child::TEXT_BYTES_MAX);
    log.lines().rev().find(|line| !line.trim().is_empty()).map(str::to_owned)
}

/// Reads what the engine says of its progress.
fn follow(shared: &Arc<Shared>, guest: &str, folder: &Path) {
    let text = child::printed(folder, PROGRESS, PROGRESS_BYTES_MAX);
    let points: Vec<MovePoint> =
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let points = points.get(points.len().saturating_sub(POINTS_MAX)..).unwrap_or_default().to_vec();
    shared.moves.update(guest, |view| view.curve = points);
}

/// Has the engine find out how a migration ended that it left unfinished; nothing if it does not know of one.
async fn resolve(shared: &Arc<Shared>, record: &Record, folder: &Path) -> Option<Report> {
    let config = shared.config();
    let folder = folder.join("resolve");
    let args = [
        "resolve".to_owned(),
        format!("--qmp={}", record.socket.display()),
        format!("--journal={}", shared.journal().display()),
        format!("--identity={}", config.identity.display()),
        "--json".to_owned(),
    ];
    let started = fs::create_dir_all(&folder)
        .and_then(|()| Child::start(&config.migrate.program, &args, &folder));
    match started {
        Ok(engine) => engine.ended().await,
        Err(error) => tracing::warn!(%error, "`migrate resolve` does not start"),
    }
    read_report(&folder)
}

/// Whether the guest runs at the destination (true) or here (false), where that is certain.
async fn whereabouts(shared: &Arc<Shared>, record: &Record) -> Option<bool> {
    let Claim { vm, to, .. } = &record.claim;
    let monitor = Monitor::connect_within(&record.socket, ANSWERS_WITHIN).await;
    let asked = match &monitor {
        Ok(monitor) => monitor.query_status().await.map(|status| status.running),
        Err(_) => Ok(false),
    };
    if asked.is_ok_and(|is_running| is_running) {
        return Some(false);
    }
    let there = shared.board.with(|heard| {
        let report = heard.reports.get(to)?;
        report.guests.iter().find(|guest| guest.name == *vm).map(|guest| guest.state)
    });
    (there == Some(GuestState::Running)).then_some(true)
}

/// Tells the store and everybody how it ended. The store may be away for a while: the claim has to end some time.
async fn conclude(shared: &Arc<Shared>, record: &Record, settled: Settled) -> MoveView {
    let Claim { vm, from, to, .. } = &record.claim;
    let now_s = shared.clock.now_s();
    if let Some(why) = &settled.error {
        tracing::warn!(guest = vm, to, why, "A guest has not moved and runs on here");
        if let Some(api) = shared.api_of(to)
            && let Err(error) = shared.client.stop_receiving(&api, Some(to), vm).await
        {
            tracing::warn!(guest = vm, to, %error, "The destination still waits for the guest");
        }
    } else {
        tracing::info!(guest = vm, from, to, "A guest has moved");
    }
    let mut pause = AGAIN_AFTER[0];
    while let Err(error) = tell_store(shared, record, settled.error.is_none(), now_s).await {
        tracing::warn!(guest = vm, %error, "The end of a migration is not entered yet");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(AGAIN_AFTER[1]);
    }
    shared.moves.end(vm, |view| {
        view.ended_s = Some(now_s);
        view.stage = match settled.error {
            None => MoveStage::Completed,
            Some(_) => MoveStage::Failed,
        };
        view.error = settled.error;
        view.downtime_ms = settled.downtime_ms;
        view.wire_bytes = settled.wire_bytes;
    })
}

async fn tell_store(
    shared: &Arc<Shared>,
    record: &Record,
    has_moved: bool,
    at_s: f64,
) -> Result<(), ClaimError> {
    let Claim { vm, from, .. } = &record.claim;
    if has_moved {
        let moved = serde_json::to_vec(&Moved { at_s, from: from.clone() });
        let value = moved.map_err(io::Error::other).unwrap_or_default();
        let put = Change::Put { key: format!("{ROOT}moved/{vm}"), value, lease: None };
        shared.store.commit(&[], &[put]).await?;
    }
    match shared.claims.end(vm).await {
        // It was ended before, or the destination's agent took it over and saw to it.
        Err(ClaimError::NotOurs { .. }) => Ok(()),
        other => other,
    }
}
