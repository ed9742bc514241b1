//! The destination of a guest that its QEMU sends: from its description to the hand-over.

use std::pin::pin;
use std::time::{Duration, Instant};

use migrate_core::handover::{Destination, Outcome};
use qemu_glue::device_state::{self, DeviceStateError, Settling};
use qemu_glue::qmp::Status;
use tokio::sync::{mpsc, oneshot};
use transport::messages::{self, Accept, Describe, Message, Ready, RefuseCode};
use transport::{Closer, ControlReceiver, ControlSender, DestinationSession, LaneReceiver};

use super::blocks;
use super::passing::{Ended, is_for};
use super::rest::{Rest, over};
use crate::destination::arrival::{self, Concluded, check_machine};
use crate::destination::owner::{Owner, Voice};
use crate::destination::{Place, check_waiting};
use crate::error::EngineError;
use crate::failpoint;
use crate::gateway::delivery::Delivery;
use crate::gateway::ends::Ends;
use crate::gateway::socket::QemuSocket;
use crate::journal::Journal;

/// Longest wait for QEMU to load the guest, once it has all of it; or to say why not.
const LOADED_WITHIN: Duration = Duration::from_secs(60);

/// Longest wait for what stands behind an error that may be only its consequence.
const WHY_WITHIN: Duration = Duration::from_secs(2);

/// Takes the guest that is described in. Returns its journal if one was begun, and how it ended.
pub async fn take_guest(
    place: &Place,
    session: DestinationSession,
    guest: &Describe,
    asks: &mut mpsc::Receiver<DestinationSession>,
) -> (Option<Journal>, Result<Outcome, EngineError>) {
    let (mut journal, post_copy) = match begin(place, &session, guest).await {
        Ok(begun) => begun,
        Err(error) => return (None, arrival::refused(&session, error).await),
    };
    let migration = session.migration;
    let DestinationSession { lanes, control_sender: control, closer, .. } = session;
    let (stream, receiver) = session.control_receiver.sorted(is_for);
    let ends = (control.clone(), stream, closer.clone());
    let streamed = take(place, post_copy, lanes, ends).await;
    let (ready, settling, rest) = match streamed {
        Ok((ready, Took::Whole(settling))) => (Ok(ready), Some(settling), None),
        Ok((ready, Took::Ahead(rest))) => (Ok(ready), None, Some(rest)),
        Err(error) => (Err(error), None, None),
    };
    let Concluded { input, ready, error } = arrival::conclude(ready, &control).await;
    let mut owner = Owner {
        client: &place.client,
        journal: &mut journal,
        voice: Voice { control, receiver, closer },
        paging: None,
        rest,
        remote: None,
        faults: None,
        asks,
        migration,
        lease: place.lease,
        ready,
        ram: None,
        commit: None,
        is_lost: false,
        fetches: &place.fetches,
        source_knows: true,
    };
    let outcome = owner.drive(Destination::Receiving, input).await;
    if let Some(settling) = settling
        && let Err(error) = settling.settled().await
    {
        tracing::warn!(%error, "migration settings not put back");
    }
    (Some(journal), error.map_or(Ok(outcome), Err))
}

/// Compares the guest with the place and records the beginning. Says whether the guest may come ahead of its memory.
async fn begin(
    place: &Place,
    session: &DestinationSession,
    guest: &Describe,
) -> Result<(Journal, bool), EngineError> {
    check_waiting(&place.client).await?;
    check_machine(place, guest)?;
    check_blocks(place, guest)?;
    failpoint::hit("destination-describing").await;
    let no_post_copy = match guest.post_copy {
        true => device_state::postcopy_obstacle(&place.client).await?,
        false => None,
    };
    let no_post_copy = no_post_copy.map(|why| messages::text(&why));
    let post_copy = guest.post_copy && no_post_copy.is_none();
    let accept = Accept { qemu_version: place.vm.qemu.numbers(), resident_bytes: 0, no_post_copy };
    let journal = arrival::journal(place, session, guest)?;
    let told = session.control_sender.send(&Message::Accept(accept)).await;
    Ok((arrival::kept_if(told.map_err(Into::into), journal)?, post_copy))
}

/// QEMU itself compares lengths only when the stream lists them, and is of no more use then.
fn check_blocks(place: &Place, guest: &Describe) -> Result<(), EngineError> {
    let ours = blocks(&place.vm);
    for theirs in &guest.blocks {
        let (name, bytes) = (&theirs.name, theirs.length_bytes);
        let text = match ours.iter().find(|block| block.name == *name) {
            Some(block) if block.length_bytes == bytes => continue,
            Some(block) => format!(
                "RAM block {name} has {bytes} bytes at the source and {} here; start this QEMU with the same memory",
                block.length_bytes
            ),
            None => format!(
                "the guest has a RAM block {name} of {bytes} bytes, this QEMU has none of that name; start it with the same devices"
            ),
        };
        return Err(EngineError::Refused { code: RefuseCode::Layout, text });
    }
    Ok(())
}

/// What came of a guest's stream when the guest was loaded.
enum Took {
    /// All of it.
    Whole(Settling),
    /// The guest, ahead of its memory.
    Ahead(Rest),
}

/// Takes the stream in until QEMU has loaded the guest.
async fn take(
    place: &Place,
    post_copy: bool,
    lanes: Vec<LaneReceiver>,
    (control, mut stream, closer): (ControlSender, ControlReceiver, Closer),
) -> Result<(Ready, Took), EngineError> {
    // A source that wants post-copy alone goes away again, and QEMU is to be as it was.
    if !stream.has_more().await {
        return Err(match stream.recv().await {
            Ok(other) => EngineError::OutOfPlace { got: other.name(), wanted: "StreamBytes" },
            Err(error) => error.into(),
        });
    }
    let (incoming, socket) = device_state::begin_stream_in(&place.client, post_copy).await?;
    let mut delivery = Delivery::new(QemuSocket::Unix(socket))?;
    let (digest, mut has_digest) = oneshot::channel();
    let mut passing = Ended(tokio::spawn(async move {
        let passed = delivery.pass(Ends::one(lanes, control, &mut stream, closer)).await;
        let _nobody_asks = digest.send((delivery.version_digest(), Instant::now()));
        // A QEMU that still waits for more sees that nothing comes.
        drop(delivery);
        passed
    }));
    let mut loading = pin!(incoming.loaded());
    let (passed, loaded) = tokio::select! {
        passed = &mut passing.0 => {
            let within = match &passed {
                // In post-copy QEMU does not give up, but waits.
                Ok(Err(_)) if post_copy => WHY_WITHIN,
                _ => LOADED_WITHIN,
            };
            (Some(passed), in_time(within, loading).await)
        }
        loaded = &mut loading => (None, loaded.map_err(EngineError::from)),
    };
    let loaded = match loaded {
        Ok((loaded, settling)) if !loaded.is_complete => {
            failpoint::hit("destination-loaded").await;
            let rest = Rest::new(passing, passed, settling);
            return Ok((ready(&loaded.status, 0, 0), Took::Ahead(rest)));
        }
        loaded => loaded,
    };
    let passed = match passed {
        Some(passed) => passed,
        None => {
            let late = |_| Ok(Err(EngineError::Cancelled));
            let within = if loaded.is_ok() { LOADED_WITHIN } else { WHY_WITHIN };
            tokio::time::timeout(within, &mut passing.0).await.unwrap_or_else(late)
        }
    };
    let (loaded, settling) = match (over(passed), loaded) {
        (Ok(()), loaded) => loaded?,
        // Where its connection is what went wrong, QEMU knows why.
        (
            Err(EngineError::QemuSocket(_) | EngineError::Apply(_) | EngineError::Cancelled),
            Err(why),
        ) => {
            return Err(why);
        }
        (Err(error), _) => return Err(error),
    };
    failpoint::hit("destination-loaded").await;
    let (digest, began) = has_digest.try_recv().unwrap_or_else(|_| (0, Instant::now()));
    let load_us = began.elapsed().as_micros() as u64;
    Ok((ready(&loaded.status, load_us, digest), Took::Whole(settling)))
}

fn ready(status: &Status, load_us: u64, version_digest: u64) -> Ready {
    Ready { load_us, version_digest, run_state: messages::text(status.state.as_str()) }
}

async fn in_time<T>(
    within: Duration,
    loading: impl Future<Output = Result<T, DeviceStateError>>,
) -> Result<T, EngineError> {
    let loaded = tokio::time::timeout(within, loading).await;
    let late = |_| EngineError::TooSlow {
        wanted: "that QEMU has loaded the guest",
        seconds: within.as_secs(),
    };
    Ok(loaded.map_err(late)??)
}
