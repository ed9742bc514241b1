//! What only this host has goes to the servers: while the guest runs, until little is left; then the rest.
//!
//! Invariant: from [`Shared::hold_if_flushed`] on until the hold ends, nothing changes on any server, nor what is
//! known to lie there.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use migrate_core::convergence::{Config, Convergence, Decision, Observation};
use migrate_core::layout::PAGE_BYTES;
use migrate_core::pageset::PageSet;
use transport::messages::{Message, RemoteEnd, Split, Store};

use super::super::{Shared, fragment};
use crate::error::EngineError;
use crate::missing;
use crate::pager_socket::Leave;
use crate::report::{RemoteReport, SplitReport};
use crate::source::link::Link;

/// Time between two looks at how far the flush is.
const TICK: Duration = Duration::from_millis(100);

/// Time between two looks with the guest stopped.
const LAST_TICK: Duration = Duration::from_millis(1);

/// What stopping costs regardless of memory, before anything was measured.
const STOP_OVERHEAD: Duration = Duration::from_millis(60);

/// Shortest busy time that tells a rate.
const ENOUGH: Duration = Duration::from_millis(2);

/// Brings what is only here to the servers, while the guest runs, until little enough is left.
///
/// # Errors
/// [`EngineError::NotConverging`], a server without room, or the destination is lost.
pub(super) async fn flush(
    shared: &Arc<Shared>,
    asked: &Leave,
    link: &mut Link,
) -> Result<(), EngineError> {
    shared.remote.lock().begin_flush();
    shared.keeper.notify_all();
    let config = Config {
        max_downtime: Duration::from_millis(asked.max_downtime_ms),
        patience: Duration::from_secs(asked.patience_s),
    };
    let mut convergence = Convergence::new(config);
    let mut speed = Speed::new(shared);
    loop {
        tokio::select! {
            () = tokio::time::sleep(TICK) => {}
            () = link.ended() => {
                // Why, is the next word.
                link.recv().await?;
            }
        }
        shared.check_paged()?;
        // The guest may use more than it did.
        fragment::reserve_for_flush(shared).await?;
        match convergence.decide(&speed.observe(shared), shared.now()) {
            Decision::GiveUp(stall) => return Err(EngineError::NotConverging(stall)),
            // A question to the guest's kernel would keep it waiting.
            Decision::Stop if shared.asking.try_lock().is_some() => return Ok(()),
            Decision::Stop | Decision::Continue => {}
        }
    }
}

/// How fast pages go to the servers, and how fast the guest writes.
struct Speed {
    bytes_per_s: Option<f64>,
    flushed: (u64, Duration),
    left: u64,
    at: Instant,
}

impl Speed {
    fn new(shared: &Shared) -> Self {
        let left = shared.remote.lock().unflushed_pages();
        Self { bytes_per_s: None, flushed: shared.flushed.seen(), left, at: Instant::now() }
    }

    fn observe(&mut self, shared: &Shared) -> Observation {
        let (now, flushed) = (Instant::now(), shared.flushed.seen());
        let pages = flushed.0.saturating_sub(self.flushed.0);
        let busy = flushed.1.saturating_sub(self.flushed.1);
        if busy > ENOUGH {
            self.bytes_per_s = Some(pages as f64 * PAGE_BYTES as f64 / busy.as_secs_f64());
        }
        let left = shared.remote.lock().unflushed_pages();
        let observation = Observation {
            dirty_pages: left,
            outstanding_bytes: 0,
            goodput_bytes_per_s: self.bytes_per_s,
            wire_bytes_per_page: PAGE_BYTES as f64,
            dirtied_pages: (left + pages).saturating_sub(self.left),
            interval: now - self.at,
            overhead: STOP_OVERHEAD,
        };
        (self.flushed, self.left, self.at) = (flushed, left, now);
        observation
    }
}

/// Tells the new main host what lies in each of the stores that it was `told` of.
///
/// # Errors
/// If that is not where all is, or contact is lost.
pub(super) async fn tell(
    shared: &Shared,
    told: &Split,
    link: &Link,
) -> Result<SplitReport, EngineError> {
    let version = shared.version.load(Ordering::Acquire);
    let (held, in_use_pages) = shared.held(&told.stores)?;
    let mut remote_pages = vec![];
    for ((store, of), held) in (0..).zip(&told.stores).zip(held) {
        for part in missing::parts(&held) {
            link.send(part).await?;
        }
        let pages = held.len();
        link.send(Message::RemoteEnd(RemoteEnd { store, pages, version })).await?;
        remote_pages.push(RemoteReport { server: of.address.clone(), pages });
    }
    Ok(SplitReport { resident_pages: 0, remote_pages, in_use_pages, to_servers_bytes: 0 })
}

impl Shared {
    fn check_paged(&self) -> Result<(), EngineError> {
        if self.is_over.load(Ordering::Acquire) || self.remote.lock().is_lost() {
            return Err(EngineError::Internal("the guest's memory cannot be paged".into()));
        }
        Ok(())
    }

    /// The guest stands still: brings the last pages to the servers, and changes nothing there from then on.
    ///
    /// # Errors
    /// If its memory is not paged any more, or has no room there.
    pub(super) async fn flush_last(&self) -> Result<(), EngineError> {
        self.remote.lock().stopped();
        self.is_still.store(true, Ordering::Release);
        self.is_held.store(false, Ordering::Release);
        loop {
            self.keeper.notify_all();
            self.check_paged()?;
            if self.hold_if_flushed() {
                return Ok(());
            }
            let lacking = self.remote.lock().flush_room_lacking();
            if lacking > 0 {
                return Err(EngineError::Misuse {
                    what: format!("The memory servers lack room for {lacking} pages"),
                    remedy: "Name another one by --memory".into(),
                });
            }
            tokio::time::sleep(LAST_TICK).await;
        }
    }

    /// Whether all is on the servers; nothing changes there from then on.
    fn hold_if_flushed(&self) -> bool {
        let (keeping, asking) = (self.keeping.try_lock(), self.asking.try_lock());
        // What a server that is away was to drop could be taken for the guest's memory.
        let is_flushed = keeping.is_some()
            && asking.is_some()
            && self.traffic.lost.lock().is_empty()
            && self.remote.lock().is_flushed();
        if is_flushed {
            self.is_held.store(true, Ordering::Release);
        }
        is_flushed
    }

    /// What each of these stores has, which are all that the guest has; and how many pages it uses.
    fn held(&self, stores: &[Store]) -> Result<(Vec<PageSet>, u64), EngineError> {
        let changed = || EngineError::Internal("the guest's memory servers have changed".into());
        let listed = self.listed.lock();
        let (all, gone) = (self.stores.read(), self.traffic.gone.lock());
        let is_there = |server: &usize| !gone.contains(server) && !listed.parting.contains(server);
        let there: Vec<usize> = (0..all.len()).filter(is_there).collect();
        let is_same = |(server, store): (&usize, &Store)| {
            all.get(*server).is_some_and(|known| known.id == store.id)
        };
        if there.len() != stores.len() || !there.iter().zip(stores).all(is_same) {
            return Err(changed());
        }
        let remote = self.remote.lock();
        if !remote.is_flushed() {
            return Err(changed());
        }
        let held: Option<Vec<_>> =
            there.iter().map(|server| remote.held(*server).cloned()).collect();
        let stats = remote.stats();
        Ok((held.ok_or_else(changed)?, stats.remote_pages + stats.clean_pages))
    }
}
