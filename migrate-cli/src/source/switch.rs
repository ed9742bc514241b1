//! From the decision to stop the guest to the destination's word that it is ready.
//!
//! ```text
//!   QEMU begins to save ─► stop ─┬► [scan] ─► last pages ─┐
//!                                └► device state ─────────┴► scan ─► tail pages
//!     ─┬► sync ─► [verify] ─┐
//!      └────────────────────┴► load ─► ready
//! ```
//!
//! What can be done while the guest runs is done before the stop ([`begin`]). The last scan comes
//! after `stop` has returned and after QEMU wrote its device state (correctness rule 13); one before
//! that finds early what a guest wrote that writes much. The destination loads only when every page
//! is in place.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use migrate_core::layout::PAGE_BYTES;
use migrate_core::pageset::PageSet;
use migrate_core::precopy::Precopy;
use qemu_glue::device_state::{self, Saving};
use qemu_glue::ram::GuestRam;
use qemu_glue::vm::Processor;
use transport::messages::{DEVICE_STATE_BYTES_MAX, Load, Message, VerifyRequest};
use xxhash_rust::xxh3::xxh3_64;

use super::link::Link;
use super::prepare::{self, Guest};
use super::rounds::Mover;
use crate::blocking::on_thread;
use crate::error::EngineError;
use crate::report::{Report, VerifyReport};
use crate::{failpoint, random, state_parts, verify};

/// Longest wait for the destination to load the device state, or to put the last pages in place.
pub const LOAD_WITHIN: Duration = Duration::from_secs(60);

/// Longest wait for the next digests under `--verify`.
const DIGESTS_WITHIN: Duration = Duration::from_secs(60);

/// Has QEMU begin to save the device state, and sends what there is of it. The guest still runs.
///
/// # Errors
/// What QEMU says against it, or if contact is lost.
pub async fn begin(ram: &GuestRam, guest: &Guest, link: &Link) -> Result<Saving, EngineError> {
    let shared_bytes = ram.layout().pages() * PAGE_BYTES as u64;
    let limit_bytes = DEVICE_STATE_BYTES_MAX;
    let saving = device_state::begin_save(&guest.client, shared_bytes, limit_bytes).await?;
    send_state(link, saving.ahead(), 0).await?;
    failpoint::hit("source-save-begun").await;
    Ok(saving)
}

/// Stops the guest and brings the rest of it over. Returns when the destination says that it is
/// ready and agrees about every page.
///
/// # Errors
/// What went wrong; the guest is then stopped and can be resumed.
pub async fn switch(
    mover: &Mover,
    precopy: &mut Precopy,
    guest: &Guest,
    saving: Saving,
    link: &mut Link,
    verify: bool,
    report: &mut Report,
) -> Result<(), EngineError> {
    let stopping = Instant::now();
    guest.client.stop().await?;
    part(report, "stop", stopping);
    failpoint::hit("source-stopped").await;
    let processors = mover.processors().await;

    let began = Instant::now();
    let shared = Mutex::new(&mut *report);
    let ahead_bytes = saving.ahead().len();
    // The first is polled first: QEMU gets its command before the scan.
    let save = async {
        let saved = saving.finish().await;
        (saved, began.elapsed())
    };
    let (saved, sent) = tokio::join!(save, last_pages(mover, precopy, &processors, link, &shared));
    sent?;
    let (saved, saving) = saved;
    let (state, settling) = saved?;
    report.downtime_parts_ms.insert("device_state_save", saving.as_secs_f64() * 1e3);
    report.bytes.device_state = state.bytes.len() as u64;
    // On its way while the last pages are looked for.
    send_state(link, &state.bytes, ahead_bytes).await?;

    let began = Instant::now();
    let tail = precopy.tail(mover.scan()?)?;
    mover.last_round(tail, link, &Mutex::new(&mut *report)).await?;
    part(report, "tail", began);
    failpoint::hit("source-state-saved").await;

    let mut began = Instant::now();
    let digest = mover.pages.digest();
    link.send(Message::Sync(mover.sync(1))).await?;
    if let Some(split) = &mover.split {
        split.tell(link).await?;
    }
    if verify {
        synced(link, digest).await?;
        let remote = mover.split.as_ref().map(|split| split.remote());
        compare(mover, link, random::number()?, remote.as_ref(), report).await?;
        compare_remote(mover, report).await?;
        part(report, "verify", began);
        began = Instant::now();
    }
    // The destination does one after the other; the answer to the first need not be waited for.
    load(link, digest, &state.bytes).await?;
    let answers = async {
        if !verify {
            synced(link, digest).await?;
        }
        failpoint::hit("source-state-sent").await;
        ready(link, digest, report).await
    };
    tokio::try_join!(answers, prepare::check_ram_unchanged(guest))?;
    settling.settled().await?;
    part(report, "transfer_and_load", began);
    Ok(())
}

/// Bounds the time for which the guest is stopped: ten times what the user allows, and as long as a peer may be silent.
///
/// # Errors
/// What the work says, or [`EngineError::TooSlow`].
pub async fn in_time<T>(
    dead_peer: Duration,
    max_downtime_ms: u64,
    work: impl Future<Output = Result<T, EngineError>>,
) -> Result<T, EngineError> {
    let within = dead_peer + Duration::from_millis(10 * max_downtime_ms);
    tokio::time::timeout(within, work).await.map_err(|_| EngineError::TooSlow {
        wanted: "that the guest can run there",
        seconds: within.as_secs(),
    })?
}

/// Sends what is known to be written, after another scan if the guest writes much, and what is used again.
async fn last_pages(
    mover: &Mover,
    precopy: &mut Precopy,
    processors: &[Processor],
    link: &Link,
    report: &Mutex<&mut Report>,
) -> Result<(), EngineError> {
    let began = Instant::now();
    let goodput = mover.goodput_bytes_per_s(link);
    let mut written = match precopy.few_written_since(mover.clock.elapsed(), goodput) {
        true => PageSet::new(mover.ram.layout().pages()),
        false => mover.scan()?,
    };
    written.union_with(&mover.used_again(processors)?);
    mover.last_round(precopy.stopped(written)?, link, report).await?;
    part(&mut report.lock().unwrap_or_else(PoisonError::into_inner), "last_pages", began);
    Ok(())
}

/// Notes how long a part of the downtime took.
pub fn part(report: &mut Report, name: &'static str, began: Instant) {
    report.downtime_parts_ms.insert(name, began.elapsed().as_secs_f64() * 1e3);
}

/// Waits until all batches are in place and the versions of all pages have this digest.
///
/// # Errors
/// If they are not, or contact is lost.
pub async fn synced(link: &mut Link, version_digest: u64) -> Result<(), EngineError> {
    match link.recv_within("that the last pages are in place", LOAD_WITHIN).await? {
        Message::Synced(synced) if synced.version_digest == version_digest => Ok(()),
        Message::Synced(_) => Err(other_pages()),
        other => Err(EngineError::OutOfPlace { got: other.name(), wanted: "Synced" }),
    }
}

fn other_pages() -> EngineError {
    EngineError::Contradiction("that other pages are in place than were sent".into())
}

/// Sends the device state from byte `from` on.
///
/// # Errors
/// If contact is lost.
pub async fn send_state(link: &Link, state: &[u8], from: usize) -> Result<(), EngineError> {
    for part in state_parts::messages(state.get(from..).unwrap_or_default(), from as u64) {
        link.send(Message::DeviceState(part)).await?;
    }
    Ok(())
}

/// Asks the destination to load the device state that was sent.
///
/// # Errors
/// If contact is lost.
pub async fn load(link: &Link, version_digest: u64, state: &[u8]) -> Result<(), EngineError> {
    let (total_bytes, digest) = (state.len() as u64, xxh3_64(state));
    link.send(Message::Load(Load { total_bytes, digest, version_digest })).await
}

/// Waits until the guest is loaded.
///
/// # Errors
/// If it could not be loaded, or the destination has other pages than were sent.
pub async fn ready(
    link: &mut Link,
    version_digest: u64,
    report: &mut Report,
) -> Result<(), EngineError> {
    let ready = match link.recv_within("that it is ready", LOAD_WITHIN).await? {
        Message::Ready(ready) => ready,
        other => return Err(EngineError::OutOfPlace { got: other.name(), wanted: "Ready" }),
    };
    report.downtime_parts_ms.insert("load", ready.load_us as f64 / 1e3);
    if ready.version_digest == version_digest { Ok(()) } else { Err(other_pages()) }
}

/// Compares what lies on memory servers.
async fn compare_remote(mover: &Mover, report: &mut Report) -> Result<(), EngineError> {
    let Some(split) = mover.split.clone() else { return Ok(()) };
    let (pages, mismatches) = on_thread(move || split.verify()).await??;
    let main = report.verify.unwrap_or(VerifyReport { pages: 0, mismatches: 0 });
    let pages = main.pages + pages;
    report.verify = Some(VerifyReport { pages, mismatches });
    if mismatches > 0 { Err(EngineError::Mismatch { mismatches, pages }) } else { Ok(()) }
}

/// Compares digests of all pages but those `missing`, in the order in which they come; what was found is
/// in the report.
///
/// # Errors
/// [`EngineError::Mismatch`] if pages differ.
pub async fn compare(
    mover: &Mover,
    link: &mut Link,
    seed: u64,
    missing: Option<&PageSet>,
    report: &mut Report,
) -> Result<(), EngineError> {
    link.send(Message::VerifyRequest(VerifyRequest { seed })).await?;
    let total = mover.ram.layout().pages();
    let mut found = VerifyReport { pages: 0, mismatches: 0 };
    let skipped = mover.unused.as_ref().map(|unused| unused.skipped());
    let zero = verify::digest(&[0; PAGE_BYTES], seed);
    let mut next = 0;
    loop {
        match link.recv_within("digests of its pages", DIGESTS_WITHIN).await? {
            Message::VerifyChunk(chunk) if chunk.first_page == next => {
                let count = chunk.digests.len() as u64;
                next += count;
                let ram = Arc::clone(&mover.ram);
                let first = migrate_core::layout::PageIndex(chunk.first_page);
                let ours = on_thread(move || verify::digests(&ram, seed, first, count)).await??;
                if ours.len() != chunk.digests.len() {
                    let text = format!("that there are more than {total} pages");
                    return Err(EngineError::Contradiction(text));
                }
                for (page, (a, b)) in (chunk.first_page..).zip(ours.iter().zip(&chunk.digests)) {
                    if missing.is_some_and(|missing| missing.contains(page)) {
                        continue;
                    }
                    found.pages += 1;
                    let is_skipped = skipped.as_ref().is_some_and(|skipped| skipped.contains(page));
                    if b != if is_skipped { &zero } else { a } {
                        tracing::error!(page, "page differs at the destination");
                        found.mismatches += 1;
                    }
                }
            }
            Message::VerifyEnd(end) if end.pages == next && next == total => {
                report.verify = Some(found);
                let VerifyReport { pages, mismatches } = found;
                if mismatches > 0 {
                    return Err(EngineError::Mismatch { mismatches, pages });
                }
                return Ok(());
            }
            other => {
                return Err(EngineError::OutOfPlace { got: other.name(), wanted: "all digests" });
            }
        }
    }
}
