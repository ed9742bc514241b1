//! The destination of a guest that its QEMU sends: from its description to the hand-over.

use std::time::{Duration, Instant};

use migrate_core::handover::{Destination, Outcome};
use qemu_glue::device_state::{self, Incoming, Settling};
use qemu_glue::qmp::Status;
use tokio::sync::mpsc;
use transport::messages::{self, Accept, Describe, Message, Ready, RefuseCode};
use transport::{Closer, ControlReceiver, ControlSender, DestinationSession, LaneReceiver};

use super::blocks;
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

/// Takes the guest that is described in. Returns its journal if one was begun, and how it ended.
pub async fn take_guest(
    place: &Place,
    session: DestinationSession,
    guest: &Describe,
    asks: &mut mpsc::Receiver<DestinationSession>,
) -> (Option<Journal>, Result<Outcome, EngineError>) {
    let mut journal = match begin(place, &session, guest).await {
        Ok(journal) => journal,
        Err(error) => return (None, arrival::refused(&session, error).await),
    };
    let migration = session.migration;
    let DestinationSession { lanes, control_sender: control, closer, .. } = session;
    let mut receiver = session.control_receiver;
    let ends = (control.clone(), &mut receiver, closer.clone());
    let streamed = take(place, lanes, ends).await;
    let (ready, settling) = match streamed {
        Ok((ready, settling)) => (Ok(ready), Some(settling)),
        Err(error) => (Err(error), None),
    };
    let Concluded { input, ready, error } = arrival::conclude(ready, &control).await;
    let mut owner = Owner {
        client: &place.client,
        journal: &mut journal,
        voice: Voice { control, receiver, closer },
        paging: None,
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

/// Compares the guest with the place and records the beginning.
async fn begin(
    place: &Place,
    session: &DestinationSession,
    guest: &Describe,
) -> Result<Journal, EngineError> {
    check_waiting(&place.client).await?;
    check_machine(place, guest)?;
    check_blocks(place, guest)?;
    failpoint::hit("destination-describing").await;
    let journal = arrival::journal(place, session, guest)?;
    let qemu_version = place.vm.qemu.numbers();
    let accept = Accept { qemu_version, resident_bytes: 0, no_post_copy: None };
    match session.control_sender.send(&Message::Accept(accept)).await {
        Ok(()) => Ok(journal),
        Err(error) => {
            // The source never heard that it was accepted, or has gone: nobody will ask.
            journal.remove();
            Err(error.into())
        }
    }
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

/// Takes the stream in until QEMU has loaded the guest.
async fn take(
    place: &Place,
    lanes: Vec<LaneReceiver>,
    (control, receiver, closer): (ControlSender, &mut ControlReceiver, Closer),
) -> Result<(Ready, Settling), EngineError> {
    let (incoming, socket) = device_state::begin_stream_in(&place.client).await?;
    let mut delivery = Delivery::new(QemuSocket::Unix(socket))?;
    let passed = delivery.pass(Ends::one(lanes, control, receiver, closer)).await;
    let (version_digest, began) = (delivery.version_digest(), Instant::now());
    // A QEMU that still waits for more sees that nothing comes.
    drop(delivery);
    let (status, settling) = match (passed, loaded(incoming).await) {
        (Ok(()), loaded) => loaded?,
        // Where its connection is what went wrong, QEMU knows why.
        (Err(EngineError::QemuSocket(_) | EngineError::Apply(_)), Err(why)) => return Err(why),
        (Err(error), _) => return Err(error),
    };
    failpoint::hit("destination-loaded").await;
    let load_us = began.elapsed().as_micros() as u64;
    let run_state = messages::text(status.state.as_str());
    Ok((Ready { load_us, version_digest, run_state }, settling))
}

async fn loaded(incoming: Incoming) -> Result<(Status, Settling), EngineError> {
    let loaded = tokio::time::timeout(LOADED_WITHIN, incoming.loaded()).await;
    let late = |_| EngineError::TooSlow {
        wanted: "that QEMU has loaded the guest",
        seconds: LOADED_WITHIN.as_secs(),
    };
    Ok(loaded.map_err(late)??)
}
