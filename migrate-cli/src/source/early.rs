//! The hand-over of a guest whose pages are not all over yet (post-copy): from the decision to the
//! destination's word that it is ready.
//!
//! ```text
//!   sync ─► drop what is known to be missing ─► prepared ─► stop ─┬► scan ────────┐
//!                                                                 └► device state ┴► scan ─► all that
//!   is missing ─► [verify] ─► load, while faults are answered ─► ready
//! ```
//!
//! Invariant: when the destination is told what is missing, every page that it is not told of is in
//! place there, and the guest is stopped.

use std::time::Instant;

use migrate_core::pageset::PageSet;
use migrate_core::precopy::{Precopy, Round};
use qemu_glue::device_state;
use transport::messages::{DEVICE_STATE_BYTES_MAX, Message, Prepare};

use super::feed::Feed;
use super::link::Link;
use super::prepare::{self, Guest};
use super::rounds::Mover;
use super::switch::{LOAD_WITHIN, compare, part, ready, send_state, synced};
use crate::error::EngineError;
use crate::report::Report;
use crate::{failpoint, missing, random};

/// Tells the destination to drop the pages that are `known` to be missing, and to be ready for faults.
/// The guest still runs.
///
/// # Errors
/// What went wrong; the destination may refuse, with its reason.
pub async fn prepare(mover: &Mover, known: &PageSet, link: &mut Link) -> Result<(), EngineError> {
    link.send(Message::Sync(mover.sync(0))).await?;
    synced(link, mover).await?;
    for part in missing::parts(known) {
        link.send(part).await?;
    }
    link.send(Message::Prepare(Prepare {})).await?;
    match link.recv_within("that it is prepared for faults", LOAD_WITHIN).await? {
        Message::Prepared(_) => Ok(()),
        other => Err(EngineError::OutOfPlace { got: other.name(), wanted: "Prepared" }),
    }
}

/// Stops the guest and finds out what is missing. `precopy` is nothing if no page was sent.
///
/// # Errors
/// What went wrong; the guest may then be stopped and can be resumed.
pub async fn stop(
    mover: &Mover,
    precopy: Option<&mut Precopy>,
    guest: &Guest,
    report: &mut Report,
) -> Result<(Feed, Vec<u8>), EngineError> {
    let stopping = Instant::now();
    guest.client.stop().await?;
    part(report, "stop", stopping);
    failpoint::hit("source-stopped").await;
    let began = Instant::now();
    let saved = device_state::save(&guest.client, DEVICE_STATE_BYTES_MAX);
    let missing = match precopy {
        None => {
            let state = saved.await?.bytes;
            (mover.ram.data_ranges()?, state)
        }
        Some(precopy) => {
            let scan = async { Ok::<_, EngineError>(precopy.stopped(mover.scan()?)?) };
            let (saved, last) = tokio::join!(saved, scan);
            let mut missing = pages_of(last?);
            let state = saved?.bytes;
            missing.union_with(&pages_of(precopy.tail(mover.scan()?)?));
            (missing, state)
        }
    };
    part(report, "device_state_save", began);
    report.bytes.device_state = missing.1.len() as u64;
    failpoint::hit("source-state-saved").await;
    Ok((Feed::new(mover.ram.layout(), missing.0), missing.1))
}

/// What the last rounds would have brought or looked at: none of it is known to be over there.
fn pages_of(round: Round) -> PageSet {
    let mut pages = round.dirty;
    pages.union_with(&round.look);
    pages
}

/// Tells the destination what is missing. Returns the seed of the digests that it will send of those
/// pages under `verify`; the others are compared now.
///
/// # Errors
/// What went wrong, or pages that differ.
pub async fn tell_missing(
    mover: &Mover,
    feed: &Feed,
    link: &mut Link,
    verify: bool,
    report: &mut Report,
) -> Result<Option<u64>, EngineError> {
    let began = Instant::now();
    let missing = feed.missing();
    for message in missing::messages(&missing) {
        link.send(message).await?;
    }
    report.pages.missing = missing.len();
    if !verify {
        return Ok(None);
    }
    let seed = random::number()?;
    compare(mover, link, seed, Some(&missing), report).await?;
    part(report, "verify", began);
    Ok(Some(seed))
}

/// Sends the device state and waits until the destination has loaded it. Faults must be answered
/// meanwhile: loading touches memory.
///
/// # Errors
/// What went wrong; the guest is stopped and can be resumed.
pub async fn load(
    mover: &Mover,
    guest: &Guest,
    state: &[u8],
    link: &mut Link,
    report: &mut Report,
) -> Result<(), EngineError> {
    let began = Instant::now();
    let (sent, unchanged) =
        tokio::join!(send_state(link, mover, state), prepare::check_ram_unchanged(guest));
    sent?;
    unchanged?;
    failpoint::hit("source-state-sent").await;
    ready(link, mover, report).await?;
    part(report, "transfer_and_load", began);
    Ok(())
}
