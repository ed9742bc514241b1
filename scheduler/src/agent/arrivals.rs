//! Guests that come here.
//!
//! ```text
//!   asked ─► QEMU started by the owner's program ─► `migrate receive` listens ─► answered with its address
//!                                                          │
//!                 QEMU is told to end ◄── it does not run ─┴─ the engine ended ─► the guest runs: it is ours now
//! ```
//!
//! An engine is told to end when nobody has a claim on the guest's move any more, or when the agent that has is gone for
//! long. The migrations' own protocol makes sure that this is safe at any moment: the guest runs on where it was, or
//! here. Invariants: a QEMU whose guest runs is never told to end; of one guest at most one is expected.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use qemu_glue::qmp::{Client as Monitor, RunState};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::child::{self, Child};
use super::records::Records;
use super::shared::Shared;
use crate::api::control::{ApiError, ReceiveAnswer, ReceiveRequest};
use crate::store::claims::Claim;

/// How long the engine may take to listen.
const LISTENS_WITHIN: Duration = Duration::from_secs(15);

/// How long QEMU may take to answer.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Time between two looks at a guest's claim.
const CLAIM_EVERY: Duration = Duration::from_secs(1);

/// A claim may be heard of this long after its guest, seconds.
const CLAIM_WITHIN_S: f64 = 15.0;

/// For so long the agent that moves a guest may be gone, seconds.
const ORPHAN_AFTER_S: f64 = 120.0;

/// What the engine says when it listens.
const LISTENING: &str = "listening on ";

const START_LOG: &str = "start.log";

/// What is remembered of a guest that is expected.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The guest.
    pub guest: String,
    /// The host that it comes from.
    pub from: String,
    /// The monitor of the QEMU that waits for it.
    pub socket: PathBuf,
    /// Since when, seconds since 1970.
    pub began_s: f64,
}

/// Gets ready for a guest that the agent of `from` brings.
///
/// # Errors
/// Why not; no QEMU of ours waits then.
pub async fn receive(
    shared: &Arc<Shared>,
    from: &str,
    request: &ReceiveRequest,
) -> Result<ReceiveAnswer, ApiError> {
    let config = shared.config();
    let guest = request.guest.as_str();
    if guest.is_empty() || guest.len() > crate::profile::report::NAME_BYTES_MAX {
        return Err(ApiError::bad_request("A guest's name has 1 to 128 bytes"));
    }
    let sockets = config.profile.socket_folder.clone().ok_or_else(|| {
        ApiError::unavailable(format!(
            "{} takes no guests: set profile.socket-folder there",
            shared.host
        ))
    })?;
    let socket = sockets.join(format!("{}.qmp", child::file_name(guest)));
    let records = Records::of_arrivals(&config.state);
    if records.has(guest) {
        return Err(ApiError::conflict(format!("{guest} is expected here already")));
    }
    let began_s = shared.clock.now_s();
    let record = Record { guest: guest.into(), from: from.into(), socket, began_s };
    records.keep(guest, &record)?;
    shared.left_alone.lock().insert(guest.into(), record.socket.clone());
    let answer = get_ready(shared, &record, &request.uuid, &records.folder(guest)).await;
    match &answer {
        Ok(_) => {
            let shared = Arc::clone(shared);
            tokio::spawn(async move { watch(&shared, &record).await });
        }
        Err(_) => clear_away(shared, &record).await,
    }
    answer
}

async fn get_ready(
    shared: &Arc<Shared>,
    record: &Record,
    uuid: &str,
    folder: &Path,
) -> Result<ReceiveAnswer, ApiError> {
    make_way(record).await?;
    start_qemu(shared, record, uuid, folder).await?;
    let config = shared.config();
    let addr = free_address(shared)?;
    let mut args = vec![
        "receive".to_owned(),
        format!("--listen={addr}"),
        format!("--qmp={}", record.socket.display()),
        format!("--identity={}", config.identity.display()),
        format!("--journal={}", shared.journal().display()),
        format!("--peer={}", record.from),
        "--once".to_owned(),
    ];
    args.extend(config.migrate.receive.iter().cloned());
    let program = &config.migrate.program;
    let engine = Child::start(program, &args, folder).map_err(|error| {
        ApiError::unavailable(format!("{} does not start: {error}", program.display()))
    })?;
    let listens = tokio::time::timeout(LISTENS_WITHIN, listens(engine, folder)).await;
    if !listens.unwrap_or(false) {
        engine.interrupt();
        let log = child::printed(folder, child::LOG, child::TEXT_BYTES_MAX);
        let why = log.lines().last().unwrap_or("it says nothing").to_owned();
        return Err(ApiError::unavailable(format!("`migrate receive` does not listen: {why}")));
    }
    let host =
        config.advertise.as_deref().and_then(|api| api.rsplit_once(':')).map(|(host, _)| host);
    Ok(ReceiveAnswer {
        addr: match (config.migrate.address, host) {
            (None, Some(host)) if addr.ip().is_unspecified() => format!("{host}:{}", addr.port()),
            _ => addr.to_string(),
        },
    })
}

/// A socket that nobody listens on is removed; a QEMU that lives there is not touched.
async fn make_way(record: &Record) -> Result<(), ApiError> {
    if !record.socket.exists() {
        return Ok(());
    }
    let taken = |what: &str| {
        ApiError::conflict(format!(
            "{} is taken by {what}: {} cannot come",
            record.socket.display(),
            record.guest
        ))
    };
    match std::os::unix::net::UnixStream::connect(&record.socket) {
        Ok(_) => Err(taken("a QEMU that runs")),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            fs::remove_file(&record.socket).map_err(|error| taken(&error.to_string()))
        }
        Err(error) => Err(taken(&error.to_string())),
    }
}

/// Runs the owner's program, which leaves a QEMU behind.
async fn start_qemu(
    shared: &Arc<Shared>,
    record: &Record,
    uuid: &str,
    folder: &Path,
) -> Result<(), ApiError> {
    let config = shared.config();
    let Some((program, args)) = config.migrate.start.split_first() else {
        let what = format!(
            "{} takes no guests: migrate.start must name a program there that starts their QEMUs",
            shared.host
        );
        return Err(ApiError::unavailable(what));
    };
    let qmp = record.socket.display().to_string();
    let fill = |text: &String| {
        text.replace("{qmp}", &qmp).replace("{uuid}", uuid).replace("{guest}", &record.guest)
    };
    let mut command = Command::new(program);
    command.args(args.iter().map(fill)).stdin(Stdio::null()).stdout(Stdio::null());
    // QEMU lives on in its own group when this agent is interrupted.
    let log = fs::File::create(folder.join(START_LOG));
    command.stderr(log.map_err(|error| ApiError::unavailable(error.to_string()))?);
    command.process_group(0).kill_on_drop(true);
    let failed = |why: String| {
        let log = child::printed(folder, START_LOG, child::TEXT_BYTES_MAX);
        let said = log.lines().last().map(|line| format!(": {line}")).unwrap_or_default();
        ApiError::unavailable(format!(
            "{program} did not start a QEMU for {}: {why}{said}",
            record.guest
        ))
    };
    let within = Duration::from_secs_f64(config.migrate.start_within_s);
    let started = async {
        let status = command.status().await.map_err(|error| failed(error.to_string()))?;
        if !status.success() {
            return Err(failed(status.to_string()));
        }
        while !record.socket.exists() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    };
    let late = |_| {
        let seconds = within.as_secs_f64();
        failed(format!("no {} after {seconds} s (migrate.start-within-s)", record.socket.display()))
    };
    tokio::time::timeout(within, started).await.map_err(late)?
}

/// An address on which nobody else receives.
fn free_address(shared: &Arc<Shared>) -> Result<SocketAddr, ApiError> {
    let config = shared.config();
    let ip: IpAddr = config.migrate.address.unwrap_or_else(|| config.listen.ip());
    let [first, last] = config.migrate.ports;
    let is_free =
        |addr: &SocketAddr| UdpSocket::bind(addr).is_ok() && TcpListener::bind(addr).is_ok();
    (first..=last).map(|port| SocketAddr::new(ip, port)).find(is_free).ok_or_else(|| {
        ApiError::unavailable(format!(
            "No port of {ip} from {first} to {last} is free (migrate.ports)"
        ))
    })
}

async fn listens(engine: Child, folder: &Path) -> bool {
    loop {
        if child::printed(folder, child::LOG, child::TEXT_BYTES_MAX).contains(LISTENING) {
            return true;
        }
        if !engine.is_alive() {
            return false;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Follows an engine to its end, and clears away what is of no more use. For every record, after a start, too.
pub async fn watch(shared: &Arc<Shared>, record: &Record) {
    let folder = Records::of_arrivals(&shared.config().state).folder(&record.guest);
    shared.left_alone.lock().insert(record.guest.clone(), record.socket.clone());
    if let Some(engine) = Child::recorded(&folder) {
        let mut gone_since_s = None;
        while engine.is_alive() {
            if is_given_up(shared, record, &mut gone_since_s) {
                engine.interrupt();
            }
            let _elapsed = tokio::time::timeout(CLAIM_EVERY, engine.ended()).await;
        }
    }
    clear_away(shared, record).await;
}

/// Whether nobody brings the guest any more.
fn is_given_up(shared: &Arc<Shared>, record: &Record, gone_since_s: &mut Option<f64>) -> bool {
    let now_s = shared.clock.now_s();
    let waited_s = now_s - record.began_s;
    if waited_s < CLAIM_WITHIN_S {
        return false;
    }
    shared.board.with(|heard| {
        if heard.trouble.is_some() {
            return false;
        }
        let Some(claim) = heard.claims.get(&record.guest).filter(|claim| claim.to == shared.host)
        else {
            return true;
        };
        if heard.agents.contains_key(&claim.agent) {
            *gone_since_s = None;
            return waited_s > shared.config().migrate.arrive_within_s;
        }
        now_s - *gone_since_s.get_or_insert(now_s) > ORPHAN_AFTER_S
    })
}

/// Tells the engine of a guest that does not come to end; the rest follows.
///
/// # Errors
/// [`ApiError::NotFound`] if that guest is not expected.
pub fn stop(shared: &Arc<Shared>, guest: &str) -> Result<(), ApiError> {
    let records = Records::of_arrivals(&shared.config().state);
    if !records.has(guest) {
        return Err(ApiError::not_found(format!("{guest} is not expected here")));
    }
    if let Some(engine) = Child::recorded(&records.folder(guest)) {
        engine.interrupt();
    }
    Ok(())
}

/// After the engine: a QEMU whose guest has not come is told to end, and the claim of a mover that is gone ends.
async fn clear_away(shared: &Arc<Shared>, record: &Record) {
    let is_empty = match Monitor::connect_within(&record.socket, ANSWERS_WITHIN).await {
        Ok(monitor) => match monitor.query_status().await {
            Ok(status) if status.state == RunState::InMigrate => {
                if let Err(error) = monitor.quit().await {
                    tracing::warn!(guest = record.guest, %error, "A QEMU without a guest stays");
                }
                true
            }
            Ok(_) | Err(_) => false,
        },
        Err(_) => true,
    };
    if is_empty && !is_listened_to(&record.socket) {
        // It may be gone with its QEMU.
        let _gone = fs::remove_file(&record.socket);
    }
    end_claim(shared, &record.guest).await;
    Records::of_arrivals(&shared.config().state).forget(&record.guest);
    shared.left_alone.lock().remove(&record.guest);
}

fn is_listened_to(socket: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(socket).is_ok()
}

/// Ends the claim of an agent that is gone: the guest can come no more, and is here or where it was.
async fn end_claim(shared: &Arc<Shared>, guest: &str) {
    let is_orphan = shared.board.with(|heard| {
        let claim: Option<&Claim> = heard.claims.get(guest);
        claim.is_some_and(|claim| {
            claim.to == shared.host && !heard.agents.contains_key(&claim.agent)
        })
    });
    if !is_orphan {
        return;
    }
    let taken = shared.claims.take_over(guest).await;
    let ended = match taken {
        Ok(_) => shared.claims.end(guest).await,
        Err(error) => Err(error),
    };
    if let Err(error) = ended {
        tracing::info!(guest, %error, "The claim of an agent that is gone is left to others");
    }
}

/// Claims of agents that are gone on guests that are not expected here any more: they end.
pub async fn end_orphans(shared: &Arc<Shared>, gone_since_s: &mut BTreeMap<String, f64>) {
    let now_s = shared.clock.now_s();
    let mut orphans: BTreeSet<String> = shared.board.with(|heard| {
        if heard.trouble.is_some() {
            return BTreeSet::new();
        }
        let of_ours = heard.claims.values().filter(|claim| claim.to == shared.host);
        let gone = of_ours.filter(|claim| !heard.agents.contains_key(&claim.agent));
        gone.map(|claim| claim.vm.clone()).collect()
    });
    let records = Records::of_arrivals(&shared.config().state);
    orphans.retain(|guest| !records.has(guest));
    gone_since_s.retain(|guest, _| orphans.contains(guest));
    for guest in orphans {
        if now_s - *gone_since_s.entry(guest.clone()).or_insert(now_s) > ORPHAN_AFTER_S {
            end_claim(shared, &guest).await;
        }
    }
}
