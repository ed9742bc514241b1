//! Connections of a memory server: a thread each, which carries out requests in their order.
//!
//! ```text
//!   accepted ─► shaking hands ─► welcomed ─► request, answer, request, ... ─► the end
//!      └─ too many: closed           └─ too many, or not one of --peer: refused
//! ```
//!
//! A connection takes some 3 MiB while a request of 256 pages is carried out.

use std::sync::Arc;
use std::time::Duration;

use migrate_core::store::{Listing, OpenStore, ServerStat};
use transport::pages::{Arriving, Extent, StoreError};
use transport::{PageAnswer, PageListener, PageRequest, PageServer, TransportError};

use super::Shared;
use crate::error::EngineError;

/// Most connections that have not shown yet who they are.
pub const HANDSHAKES_MAX: u64 = 128;

/// Pause after a connection could not be accepted, for want of descriptors or memory.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// Stack of a connection's thread in bytes; what is large lies on the heap.
const STACK_BYTES: usize = 512 << 10;

/// Accepts connections until the listener is stopped.
pub fn accept_all(listener: &PageListener, shared: &Arc<Shared>) {
    loop {
        match listener.accept() {
            Ok(arriving) => admit(arriving, shared),
            Err(TransportError::ListenerEnded) => return,
            Err(error) => {
                tracing::warn!(
                    error = EngineError::from(error).tell(),
                    "a connection was not accepted"
                );
                std::thread::sleep(ACCEPT_AGAIN_AFTER);
            }
        }
    }
}

/// Gives a connection a thread, if there is room.
fn admit(arriving: Arriving, shared: &Arc<Shared>) {
    let peer = arriving.addr();
    let counters = &shared.counters;
    counters.accepted.add(1);
    if counters.handshakes.get() >= HANDSHAKES_MAX {
        counters.turned_away.add(1);
        tracing::warn!(%peer, "closed: {HANDSHAKES_MAX} connections are being made already");
        return;
    }
    // Taken here, so that no more threads are started than there is room for.
    counters.handshakes.add(1);
    let of_thread = Arc::clone(shared);
    let started = std::thread::Builder::new()
        .name("pages".into())
        .stack_size(STACK_BYTES)
        .spawn(move || attend(arriving, &of_thread));
    if let Err(error) = started {
        counters.handshakes.subtract(1);
        counters.turned_away.add(1);
        tracing::warn!(%peer, %error, "closed: no thread for a connection");
    }
}

/// A connection from its handshake to its end.
fn attend(arriving: Arriving, shared: &Shared) {
    let addr = arriving.addr();
    let shaken = arriving.shake();
    shared.counters.handshakes.subtract(1);
    let served = shaken.and_then(|server| welcome(server, shared));
    match served {
        Ok(()) => tracing::info!(peer = %addr, "a connection has ended"),
        Err(error) => {
            shared.counters.broken.add(1);
            tracing::warn!(peer = %addr, error = EngineError::from(error).tell(), "a connection was cut");
        }
    }
}

fn welcome(mut server: PageServer, shared: &Shared) -> Result<(), TransportError> {
    let refuse = |server: PageServer, error: StoreError| {
        let peer = server.peer();
        shared.counters.turned_away.add(1);
        tracing::warn!(peer = %peer.addr, host = peer.name, %error, "a connection is refused");
        server.refuse(error)
    };
    let host = server.peer().name.clone();
    if !shared.peers.is_empty() && !shared.peers.contains(&host) {
        return refuse(server, StoreError::NotTaken);
    }
    let _place = match shared.places.take(&host) {
        Ok(place) => place,
        Err(error) => return refuse(server, error),
    };
    server.welcome()?;
    tracing::info!(peer = %server.peer().addr, host, "a host has connected");
    Connection { server, host, shared, open: None, counted: (0, 0) }.serve()
}

/// A connection that was welcomed.
struct Connection<'a> {
    server: PageServer,
    host: String,
    shared: &'a Shared,
    open: Option<OpenStore<'a>>,
    /// Bytes sent and received that are counted already.
    counted: (u64, u64),
}

impl<'a> Connection<'a> {
    fn serve(mut self) -> Result<(), TransportError> {
        let served = self.serve_all();
        self.count_bytes();
        served
    }

    fn serve_all(&mut self) -> Result<(), TransportError> {
        while let Some((tag, request)) = self.server.request()? {
            self.shared.counters.count(&request);
            let carried_out = match request {
                PageRequest::Get { extents, take, packed } => {
                    self.get(tag, &extents, take, packed)?
                }
                other => self.carry_out(tag, other).map(Some),
            };
            match carried_out {
                Ok(None) => {}
                Ok(Some(answer)) => self.server.answer(&answer)?,
                Err(error) => {
                    self.shared.counters.count_refused(&error);
                    tracing::debug!(host = self.host, %error, "a request is refused");
                    self.server.answer(&PageAnswer::Failed { tag, error })?;
                }
            }
            self.count_bytes();
        }
        Ok(())
    }

    fn count_bytes(&mut self) {
        let (sent, received) = self.server.bytes();
        self.shared.counters.sent_bytes.add(sent.saturating_sub(self.counted.0));
        self.shared.counters.received_bytes.add(received.saturating_sub(self.counted.1));
        self.counted = (sent, received);
    }

    /// Everything that has one answer.
    fn carry_out(&mut self, tag: u32, request: PageRequest) -> Result<PageAnswer, StoreError> {
        let now = self.shared.now();
        let done = PageAnswer::Done { tag };
        match request {
            PageRequest::Create(wanted) => {
                self.check_none_is_open()?;
                self.open = Some(self.shared.stores.create(wanted, &self.host, now)?);
            }
            PageRequest::Open { store, secret } => {
                self.check_none_is_open()?;
                self.open = Some(self.shared.stores.open(store, &secret, &self.host, now)?);
            }
            PageRequest::Keep => self.store()?.keep(now)?,
            PageRequest::Grant { host } => self.store()?.grant(&host, now)?,
            PageRequest::Revoke { host } => self.store()?.revoke(&host, now)?,
            PageRequest::Reserve { pages } => self.store()?.reserve(pages, now)?,
            PageRequest::Put { extents, contents, version, .. } => {
                self.store()?.put(&extents, &contents, version, now)?;
                self.shared.counters.put_pages.add(Extent::count(&extents));
            }
            // Has many answers, and a function of its own.
            PageRequest::Get { .. } => return Err(StoreError::NotOpen),
            PageRequest::Drop { extents } => self.store()?.drop_pages(&extents, now)?,
            PageRequest::List { from_page } => {
                let Listing { entries, next_page } = self.store()?.list(from_page, now)?;
                return Ok(PageAnswer::Listed { tag, entries, next_page });
            }
            PageRequest::Stat => {
                let (capacity_bytes, reserved_bytes) = self.shared.stores.capacity();
                let store = self.open.as_ref().map(|store| store.stat(now)).transpose()?;
                let stat = ServerStat { capacity_bytes, reserved_bytes, store };
                return Ok(PageAnswer::Stat { tag, stat });
            }
            PageRequest::Delete => {
                self.store()?.delete(now)?;
                self.open = None;
            }
        }
        Ok(done)
    }

    fn store(&mut self) -> Result<&mut OpenStore<'a>, StoreError> {
        self.open.as_mut().ok_or(StoreError::NotOpen)
    }

    /// One that is gone does not count.
    fn check_none_is_open(&self) -> Result<(), StoreError> {
        match &self.open {
            Some(store) if store.stat(self.shared.now()).is_ok() => Err(StoreError::OpenAlready),
            _ => Ok(()),
        }
    }

    /// Sends pages piece by piece.
    fn get(
        &mut self,
        tag: u32,
        extents: &[Extent],
        take: bool,
        packed: bool,
    ) -> Result<Result<Option<PageAnswer>, StoreError>, TransportError> {
        let Some(store) = &mut self.open else { return Ok(Err(StoreError::NotOpen)) };
        let mut reading = match store.read(extents, self.shared.now()) {
            Ok(reading) => reading,
            Err(error) => return Ok(Err(error)),
        };
        loop {
            let piece = match store.piece(&mut reading) {
                Ok(Some(piece)) => piece,
                Ok(None) => break,
                Err(error) => return Ok(Err(error)),
            };
            let (contents, last) = (piece.contents.into(), piece.last);
            let answer = PageAnswer::Pages { tag, extents: piece.extents, contents, packed, last };
            self.server.answer(&answer)?;
        }
        self.shared.counters.got_pages.add(Extent::count(extents));
        if take && let Err(error) = store.take(&reading) {
            // The client has its pages; the store was deleted meanwhile, and these with it.
            tracing::debug!(host = self.host, %error, "pages that were sent are gone already");
        }
        Ok(Ok(None))
    }
}
