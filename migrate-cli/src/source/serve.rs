//! Post-copy at the source: the memory of a guest that runs at the destination already.
//!
//! ```text
//!   Request ──► answer ── reads, packs ──► urgent lane ─┐
//!   plan ─────► encoder threads ─────────► other lanes ─┴─► destination
//! ```
//!
//! Invariants: the guest here is stopped and never resumed, so its memory does not change, and what is
//! sent twice is sent alike. A session that ends costs nothing: [`Server::resume`] opens another, in
//! which the destination says what it lacks.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use migrate_core::batch::{CHUNK_PAGES, wire_bytes};
use migrate_core::codec::{Codec, Packer};
use migrate_core::codec_choice::Wanted;
use migrate_core::encode::{BatchBuilder, PageBuffer, PageCounts};
use migrate_core::layout::PageIndex;
use migrate_core::pageset::PageSet;
use qemu_glue::ram::GuestRam;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use transport::messages::{Intent, VerifyChunk};
use transport::{Batch, LaneSender, Offer};

use super::buffers::Buffers;
use super::contact::Contact;
use super::feed::Feed;
use super::gate::Gate;
use super::lanes::LaneTasks;
use super::link::Link;
use super::pump::{Pump, PumpError};
use crate::blocking::on_thread;
use crate::error::EngineError;
use crate::missing;
use crate::report::VerifyReport;
use crate::{ENGINE, verify};

/// Serves missing pages over one session after the other.
#[derive(Debug)]
pub struct Server {
    ram: Arc<GuestRam>,
    feed: Arc<Feed>,
    compression: Wanted,
    /// The user's limit, in bits a second.
    max_bandwidth: Option<u64>,
    /// Seed of the digests that the destination sends at the end, if it was asked to.
    verify_seed: Option<u64>,
    /// What they said so far.
    verified: VerifyReport,
    /// What the background sent in sessions that are over.
    pushed: PageCounts,
    session: Option<Session>,
}

/// What works on one session.
#[derive(Debug)]
struct Session {
    gate: Arc<Gate>,
    pump: Arc<Pump>,
    /// The lanes' tasks, where this session has its own.
    lanes: Option<LaneTasks>,
    answering: JoinHandle<()>,
    pushing: Option<JoinHandle<PageCounts>>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.gate.close();
        self.answering.abort();
    }
}

impl Server {
    /// A server of the pages in `feed`.
    pub fn new(
        ram: Arc<GuestRam>,
        feed: Arc<Feed>,
        compression: Wanted,
        max_bandwidth: Option<u64>,
        verify_seed: Option<u64>,
    ) -> Self {
        let verified = VerifyReport { pages: 0, mismatches: 0 };
        let pushed = PageCounts::default();
        Self { ram, feed, compression, max_bandwidth, verify_seed, verified, pushed, session: None }
    }

    /// Answers requests over the session in which the guest is handed over.
    pub fn begin(
        &mut self,
        pump: Arc<Pump>,
        gate: Arc<Gate>,
        urgent: LaneSender,
        requests: mpsc::Receiver<PageIndex>,
    ) {
        let answering = Answering::new(self, &gate, urgent).start(requests);
        self.session = Some(Session { gate, pump, lanes: None, answering, pushing: None });
    }

    /// Sends the rest in the background, from now on. Says whether there is a session for it.
    pub fn push(&mut self) -> bool {
        let Some(session) = &mut self.session else { return false };
        if session.pushing.is_some() {
            return true;
        }
        let (pump, feed) = (Arc::clone(&session.pump), Arc::clone(&self.feed));
        session.pushing = Some(tokio::task::spawn_blocking(move || match pump.send_rest(feed) {
            Ok(counts) => counts,
            Err(error) => {
                // The session's end says why a lane was closed.
                if !matches!(error, PumpError::LaneClosed) {
                    tracing::error!(%error, "missing pages are not sent");
                }
                PageCounts::default()
            }
        }));
        true
    }

    /// Goes on in a new session, which takes the place of the contact's.
    ///
    /// # Errors
    /// What kept it from that; it can be tried again.
    pub async fn resume(&mut self, contact: &mut Contact) -> Result<(), EngineError> {
        self.stop().await;
        let offer = Offer::new(ENGINE, contact.migration, Intent::Resume);
        let options = &contact.options;
        let mut session =
            transport::connect(contact.addr, &contact.identity, options, offer).await?;
        let urgent = session.lanes.pop().filter(|_| !session.lanes.is_empty());
        let urgent = urgent.ok_or_else(|| EngineError::Contradiction("one lane only".into()))?;
        let gate = Arc::new(Gate::new(self.max_bandwidth));
        let closer = session.closer.clone();
        let mut link = Link::start(
            session.control_sender,
            session.control_receiver,
            Arc::clone(&gate),
            Instant::now(),
        );
        for message in missing::messages(&self.feed.missing()) {
            link.send(message).await?;
        }
        let pages = self.ram.layout().pages();
        let next = async || link.recv().await;
        let wanted = missing::receive(pages, "what it lacks", next).await?;
        tracing::info!(pages = wanted.len(), "the destination lacks");
        let requests = link.requests();
        let requests =
            requests.ok_or_else(|| EngineError::Internal("requests are taken".into()))?;
        self.restart(wanted, gate, session.lanes, urgent, requests);
        contact.session = Some((link, closer));
        Ok(())
    }

    fn restart(
        &mut self,
        wanted: PageSet,
        gate: Arc<Gate>,
        lanes: Vec<LaneSender>,
        urgent: LaneSender,
        requests: mpsc::Receiver<PageIndex>,
    ) {
        self.feed.restart(wanted);
        let mut lanes = LaneTasks::start(lanes);
        let pump = Arc::new(Pump::serve(
            Arc::clone(&self.ram),
            Arc::clone(&gate),
            lanes.queues(),
            self.compression,
        ));
        let answering = Answering::new(self, &gate, urgent).start(requests);
        let lanes = Some(lanes);
        self.session = Some(Session { gate, pump, lanes, answering, pushing: None });
    }

    /// Compares digests that the destination made of pages as they arrived.
    ///
    /// # Errors
    /// If memory cannot be read, or digests came that were not asked for.
    pub async fn compare(&mut self, chunk: VerifyChunk) -> Result<(), EngineError> {
        let unasked = || EngineError::OutOfPlace { got: "VerifyChunk", wanted: "Running" };
        let seed = self.verify_seed.ok_or_else(unasked)?;
        let (ram, first) = (Arc::clone(&self.ram), PageIndex(chunk.first_page));
        let count = chunk.digests.len() as u64;
        let ours = on_thread(move || verify::digests(&ram, seed, first, count)).await??;
        let differ = ours.iter().zip(&chunk.digests).filter(|(ours, theirs)| ours != theirs);
        self.verified.mismatches += differ.count() as u64;
        self.verified.pages += count;
        Ok(())
    }

    /// What the digests said, if there were any.
    pub fn verified(&self) -> Option<VerifyReport> {
        self.verify_seed.map(|_| self.verified)
    }

    /// What the background sent, as far as sessions were ended by [`Self::stop`].
    pub fn pushed(&self) -> &PageCounts {
        &self.pushed
    }

    /// What was sent.
    pub fn feed(&self) -> &Feed {
        &self.feed
    }

    /// Ends what works on the session in use.
    pub async fn stop(&mut self) {
        self.feed.close();
        let Some(mut session) = self.session.take() else { return };
        session.gate.close();
        session.answering.abort();
        if let Some(lanes) = &mut session.lanes {
            lanes.stop().await;
        }
        if let Some(pushing) = session.pushing.take()
            && let Ok(counts) = pushing.await
        {
            self.pushed.add(&counts);
        }
        let _dropped = on_thread(move || drop(session)).await;
    }
}

/// Answers requests, one after the other.
struct Answering {
    ram: Arc<GuestRam>,
    feed: Arc<Feed>,
    gate: Arc<Gate>,
    lane: LaneSender,
    is_packed: bool,
    builder: BatchBuilder,
    packer: Packer,
    buffers: Buffers,
}

impl Answering {
    fn new(server: &Server, gate: &Arc<Gate>, lane: LaneSender) -> Self {
        Self {
            ram: Arc::clone(&server.ram),
            feed: Arc::clone(&server.feed),
            gate: Arc::clone(gate),
            lane,
            is_packed: server.compression != Wanted::Always(Codec::Plain),
            builder: BatchBuilder::new(),
            packer: Packer::default(),
            buffers: Buffers::default(),
        }
    }

    fn start(mut self, mut requests: mpsc::Receiver<PageIndex>) -> JoinHandle<()> {
        tokio::spawn(async move {
            while let Some(page) = requests.recv().await {
                if let Err(error) = self.answer(page).await {
                    tracing::warn!(error = %error.tell(), "requests are not answered");
                    break;
                }
            }
        })
    }

    /// Reads on the runtime's thread: a page is some microseconds, and the guest waits.
    async fn answer(&mut self, page: PageIndex) -> Result<(), EngineError> {
        let Some(answer) = self.feed.requested(page)? else { return Ok(()) };
        self.send(answer.page).await?;
        self.flush().await?;
        for neighbours in answer.neighbours {
            self.send(neighbours).await?;
        }
        self.flush().await
    }

    async fn send(&mut self, run: Range<u64>) -> Result<(), EngineError> {
        for first in run.clone().step_by(CHUNK_PAGES as usize) {
            let pages = (run.end - first).min(CHUNK_PAGES) as usize;
            let first = PageIndex(first);
            let read = |buffer: &mut [u8]| self.ram.read(first, buffer);
            self.builder.push_last(first, pages, read).map_err(PumpError::from)?;
            if self.builder.is_full(CHUNK_PAGES as usize) {
                self.flush().await?;
            }
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), EngineError> {
        let Some(batch) = self.builder.take() else { return Ok(()) };
        self.builder.reuse(self.buffers.take());
        let content_bytes = batch.content.len();
        let (codec, payload) = self.pack(batch.content)?;
        self.gate.pass(wire_bytes(batch.runs.len(), payload.len()));
        let payload = self.buffers.lend(payload).into();
        let batch = Batch { runs: batch.runs, payload, codec, content_bytes, round: 0 };
        Ok(self.lane.send(batch).await?)
    }

    fn pack(&mut self, content: PageBuffer) -> Result<(Codec, PageBuffer), PumpError> {
        if !self.is_packed || content.is_empty() {
            return Ok((Codec::Plain, content));
        }
        let packed = content.pack(&mut self.packer, Codec::Lz4, self.buffers.take())?;
        let (codec, kept, spare) = match packed.len() < content.len() {
            true => (Codec::Lz4, packed, content),
            false => (Codec::Plain, content, packed),
        };
        self.buffers.put(spare);
        Ok((codec, kept))
    }
}
