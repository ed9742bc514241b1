//! Pages of a guest that runs at the destination already: those that it waits for first.
//!
//! ```text
//!   backlog ── asked for ──► thread ─────────────────► last lane
//!          └── the rest ───► thread ── window, gate ──► other lanes
//! ```
//!
//! Invariants: a page leaves once, whole or as zeros; the bytes that handed the guest over were written before the
//! first of them leaves. What is under way in bulk is little while the guest faults.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use migrate_core::codec::Codec;
use migrate_core::codec_choice::{CodecChoice, Wanted};
use migrate_core::encode::{PageCounts, Reason};
use migrate_core::layout::{PAGE_BYTES, PageIndex};
use migrate_core::page_table::SourcePages;
use transport::Batch;

use super::backlog::Content;
use super::encode::Finished;
use super::requests::Requests;
use crate::blocking::hurry;
use crate::source::outlet::{Outlet, Outlets, PumpError};

/// Pages with contents in a batch that nobody waits for: what a request may have to wait behind on its way.
const BULK_CONTENTS: usize = 16;

/// Pages in such a batch.
const BULK_PAGES: usize = 512;

/// Pages in a batch that the guest waits for.
const URGENT_PAGES: usize = 8;

/// Time that bulk may take on the link beside round trips, while the guest faults and while it does not: so long may a
/// page wait behind it.
const QUEUE: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(20)];

/// Bytes of bulk that may be under way on any link.
const WINDOW_BYTES_MIN: u64 = 128 << 10;

/// Sends what comes after the hand-over.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    requests: Arc<Requests>,
    pages: SourcePages,
    outlets: Outlets,
    counts: Mutex<PageCounts>,
}

impl Server {
    /// Takes over from the encoder; bulk is packed with the codec that is `wanted`. An idle link has this `round_trip`.
    ///
    /// # Errors
    /// [`PumpError`] if there is no lane.
    pub fn start(
        before: Finished,
        requests: Arc<Requests>,
        wanted: Wanted,
        round_trip: Duration,
    ) -> Result<Self, PumpError> {
        let Finished { pages, outlets, mut lanes, counts } = before;
        let last = lanes.last().ok_or(PumpError::WorkerGone)?;
        let urgent = match lanes.len() {
            1 => last.beside(),
            _ => lanes.pop().ok_or(PumpError::WorkerGone)?,
        };
        let (pages, counts) = (pages.forgetting(), Mutex::new(counts));
        let shared = Arc::new(Shared { requests, pages, outlets, counts });
        let packed_urgent = match wanted {
            Wanted::Always(Codec::Plain) => wanted,
            _ => Wanted::Always(Codec::Lz4),
        };
        let threads = [
            spawn(&shared, move |shared| {
                hurry();
                send_urgent(shared, urgent, CodecChoice::new(packed_urgent, 1))
            }),
            spawn(&shared, move |shared| {
                send_bulk(shared, lanes, CodecChoice::new(wanted, 1), round_trip)
            }),
        ];
        Ok(Self { shared, threads: threads.into() })
    }

    /// Takes a page; zeros if it has no content. Blocks while too much waits.
    ///
    /// # Errors
    /// [`PumpError`] if a lane is gone.
    pub fn push(
        &self,
        page: PageIndex,
        content: Option<&[u8; PAGE_BYTES]>,
    ) -> Result<(), PumpError> {
        self.shared.requests.backlog().push(page.0, content)
    }

    /// Sends all that was taken so far: how many batches each lane has been given then.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn flush(&self) -> Result<Vec<u64>, PumpError> {
        self.shared.requests.backlog().flush()?;
        Ok(self.shared.outlets.batches())
    }

    /// Versions of all pages, for comparison.
    pub fn digest(&self) -> u64 {
        self.shared.pages.digest()
    }

    /// What became of the pages so far.
    pub fn counts(&self) -> PageCounts {
        *self.shared.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.requests.backlog().end(None);
        self.shared.outlets.gate.close();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a sender of pages panicked");
            }
        }
    }
}

/// Starts a thread whose failure ends everything.
fn spawn(
    shared: &Arc<Shared>,
    work: impl FnOnce(&Shared) -> Result<(), PumpError> + Send + 'static,
) -> JoinHandle<()> {
    let shared = Arc::clone(shared);
    thread::spawn(move || {
        if let Err(error) = work(&shared) {
            shared.requests.backlog().end(Some(error));
        }
    })
}

fn send_urgent(
    shared: &Shared,
    mut outlet: Outlet,
    mut choice: CodecChoice,
) -> Result<(), PumpError> {
    while let Some(pages) = shared.requests.backlog().urgent(URGENT_PAGES) {
        let packed = shared.pack(&mut outlet, &mut choice, &pages)?;
        shared.outlets.gate.pass(packed.as_ref().map_or(0, |(_, bytes)| *bytes));
        shared.send(&outlet, packed, pages.len())?;
    }
    Ok(())
}

fn send_bulk(
    shared: &Shared,
    mut lanes: Vec<Outlet>,
    mut choice: CodecChoice,
    round_trip: Duration,
) -> Result<(), PumpError> {
    let (backlog, gate) = (shared.requests.backlog(), &shared.outlets.gate);
    // What a batch is likely to take on the wire.
    let mut likely_bytes = (BULK_CONTENTS * PAGE_BYTES) as u64;
    for turn in 0.. {
        let Some(window_bytes) = backlog.window() else { return Ok(()) };
        gate.limit_window(match gate.link_bytes_per_s() {
            Some(rate) => {
                let [least, most] = QUEUE.map(|queue| carried(rate, 2 * round_trip + queue));
                window_bytes.clamp(least, most)
            }
            None => window_bytes,
        });
        // Pages are taken when they may leave: until then they may still overtake.
        gate.enter(likely_bytes);
        let pages = backlog.bulk(BULK_PAGES, BULK_CONTENTS);
        let lane = turn % lanes.len().max(1);
        let outlet = lanes.get_mut(lane).ok_or(PumpError::WorkerGone)?;
        let packed = shared.pack(outlet, &mut choice, &pages)?;
        let bytes = packed.as_ref().map_or(0, |(_, bytes)| *bytes);
        gate.correct(likely_bytes, bytes);
        likely_bytes = bytes.max(PAGE_BYTES as u64);
        shared.send(outlet, packed, pages.len())?;
    }
    Ok(())
}

/// Bytes that a link carries in some time, for a window.
fn carried(bytes_per_s: f64, time: Duration) -> u64 {
    ((bytes_per_s * time.as_secs_f64()) as u64).max(WINDOW_BYTES_MIN)
}

impl Shared {
    /// Makes a batch of pages, and says how many bytes it takes on the wire.
    fn pack(
        &self,
        outlet: &mut Outlet,
        choice: &mut CodecChoice,
        pages: &[(u64, Content)],
    ) -> Result<Option<(Batch, u64)>, PumpError> {
        let mut counts = PageCounts::default();
        for (page, content) in pages {
            let read = |_: PageIndex, buffer: &mut [u8]| {
                match content {
                    Some(content) => buffer.copy_from_slice(&**content),
                    None => buffer.fill(0),
                }
                Ok::<_, PumpError>(())
            };
            outlet.builder.push(&self.pages, PageIndex(*page), 1, Reason::Dirty, read)?;
        }
        let packed = outlet.packed(&self.outlets, choice, 0, &mut counts)?;
        counts.add(&outlet.builder.take_counts());
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).add(&counts);
        Ok(packed)
    }

    /// Sends a batch of so many pages.
    fn send(
        &self,
        outlet: &Outlet,
        packed: Option<(Batch, u64)>,
        pages: usize,
    ) -> Result<(), PumpError> {
        if let Some((batch, _)) = packed {
            outlet.send(&self.outlets, batch)?;
        }
        self.requests.backlog().sent(pages);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_under_way_is_what_the_link_carries() {
        let ms = Duration::from_millis;
        // 100 Mbit/s, 10 Gbit/s.
        assert_eq!(carried(12.5e6, ms(5)), WINDOW_BYTES_MIN);
        assert_eq!(carried(1.25e9, ms(45)), 56_250_000);
    }
}
