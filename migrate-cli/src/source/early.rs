//! The hand-over of a guest whose pages are not all over yet (post-copy): from the decision to the
//! destination's word that it is ready.
//!
//! ```text
//!   sync ─► drop what is known to be missing ─► prepared ─► QEMU begins to save ─► stop ─┐
//!     ┌──────────────────────────────────────────────────────────────────────────────────┘
//!     ├► scan ────────┐
//!     └► device state ┴► scan ─► all that is missing ─► [verify] ─► load, while faults are answered
//!     ─► ready
//! ```
//!
//! Invariant: when the destination is told what is missing, every page that it is not told of is in
//! place there, and the guest is stopped.

use std::time::{Duration, Instant};

use migrate_core::pageset::PageSet;
use migrate_core::precopy::{Precopy, Round};
use qemu_glue::device_state::{DeviceState, Saving, Settling};
use transport::messages::{Message, Prepare};

use super::feed::Feed;
use super::link::Link;
use super::prepare::{self, Guest};
use super::rounds::Mover;
use super::switch::{self, LOAD_WITHIN, compare, part, ready, synced};
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
    synced(link, mover.pages.digest()).await?;
    for part in missing::parts(known) {
        link.send(part).await?;
    }
    prepare_for_faults(link).await
}

/// Tells the destination to get hold of QEMU's page faults. The guest still runs.
///
/// # Errors
/// What went wrong; the destination may refuse, with its reason.
pub async fn prepare_for_faults(link: &mut Link) -> Result<(), EngineError> {
    link.send(Message::Prepare(Prepare {})).await?;
    prepared(link, "that it is prepared for faults", LOAD_WITHIN).await
}

/// Waits for the destination to say that it is prepared.
///
/// # Errors
/// If it does not, or contact is lost.
pub async fn prepared(
    link: &mut Link,
    wanted: &'static str,
    within: Duration,
) -> Result<(), EngineError> {
    match link.recv_within(wanted, within).await? {
        Message::Prepared(_) => Ok(()),
        other => Err(EngineError::OutOfPlace { got: other.name(), wanted: "Prepared" }),
    }
}

/// A guest that was stopped while pages of it are missing at the destination.
#[derive(Debug)]
pub struct Stopped {
    /// What is missing.
    pub feed: Feed,
    /// The device state.
    pub state: DeviceState,
    /// How much of it was sent before.
    pub ahead_bytes: usize,
    /// What QEMU has left to do.
    pub settling: Settling,
}

/// Stops the guest and finds out what is missing. `precopy` is nothing if no page was sent.
///
/// # Errors
/// What went wrong; the guest may then be stopped and can be resumed.
pub async fn stop(
    mover: &Mover,
    precopy: Option<&mut Precopy>,
    guest: &Guest,
    saving: Saving,
    report: &mut Report,
) -> Result<Stopped, EngineError> {
    let stopping = Instant::now();
    guest.client.stop().await?;
    part(report, "stop", stopping);
    failpoint::hit("source-stopped").await;
    let processors = mover.processors().await;
    let began = Instant::now();
    let ahead_bytes = saving.ahead().len();
    let ((state, settling), mut missing) = match precopy {
        None => (saving.finish().await?, mover.ram.data_ranges()?),
        Some(precopy) => {
            let scan = async { Ok::<_, EngineError>(precopy.stopped(mover.scan()?)?) };
            let (saved, last) = tokio::join!(saving.finish(), scan);
            let mut missing = pages_of(last?);
            let saved = saved?;
            missing.union_with(&pages_of(precopy.tail(mover.scan()?)?));
            (saved, missing)
        }
    };
    part(report, "device_state_save", began);
    missing.union_with(&mover.used_again(&processors)?);
    mover.thin(&mut missing)?;
    report.bytes.device_state = state.bytes.len() as u64;
    failpoint::hit("source-state-saved").await;
    Ok(Stopped { feed: Feed::new(mover.ram.layout(), missing), state, ahead_bytes, settling })
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

/// Sends what is left of the device state and waits until the destination has loaded it. Faults must be answered
/// meanwhile: loading touches memory.
///
/// # Errors
/// What went wrong; the guest is stopped and can be resumed.
pub async fn load(
    mover: &Mover,
    guest: &Guest,
    (state, ahead_bytes): (&[u8], usize),
    link: &mut Link,
    report: &mut Report,
) -> Result<(), EngineError> {
    let began = Instant::now();
    let digest = mover.pages.digest();
    let (sent, unchanged) = tokio::join!(
        switch::send_state(link, state, ahead_bytes),
        prepare::check_ram_unchanged(guest)
    );
    sent?;
    unchanged?;
    switch::load(link, digest, state).await?;
    failpoint::hit("source-state-sent").await;
    ready(link, digest, report).await?;
    part(report, "transfer_and_load", began);
    Ok(())
}
