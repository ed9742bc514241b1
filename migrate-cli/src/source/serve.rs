//! Post-copy at the source: the memory of a guest that runs at the destination already.
//!
//! ```text
//!   requests ─► answering ───────────────► urgent lane ─┐
//!   plan ─────► encoder threads ─────────► other lanes ─┴─► destination
//! ```
//!
//! Invariants: the guest here is stopped and never resumed, so its memory does not change, and what is
//! sent twice is sent alike. A session that ends costs nothing: [`Server::resume`] opens another, in
//! which the destination says what it lacks.

use std::sync::Arc;
use std::time::Instant;

use migrate_core::codec_choice::Wanted;
use migrate_core::encode::PageCounts;
use migrate_core::layout::PageIndex;
use qemu_glue::ram::GuestRam;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use transport::messages::{Intent, VerifyChunk};
use transport::{Closer, Offer, close_code};

use super::answering::{Answering, Answers, UrgentLane};
use super::contact::Contact;
use super::feed::Feed;
use super::gate::Gate;
use super::lanes::LaneTasks;
use super::link::Link;
use super::outlet::PumpError;
use super::pump::Pump;
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
    closer: Closer,
    /// The lanes' tasks, where this session has its own.
    lanes: Option<LaneTasks>,
    /// Ends when it is dropped, which may take a moment.
    _answering: Answering,
    pushing: Option<JoinHandle<PageCounts>>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.gate.close();
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

    /// Answers requests over a session, with its own `lanes` unless it is the one in which the guest is
    /// handed over.
    pub fn begin(
        &mut self,
        pump: Arc<Pump>,
        gate: Arc<Gate>,
        lanes: Option<LaneTasks>,
        urgent: UrgentLane,
        requests: mpsc::Receiver<PageIndex>,
        closer: Closer,
    ) {
        let (ram, feed) = (Arc::clone(&self.ram), Arc::clone(&self.feed));
        let answers = Answers::new(ram, feed, Arc::clone(&gate), self.compression);
        let _answering = Answering::start(answers, urgent, requests, closer.clone());
        self.session = Some(Session { gate, pump, closer, lanes, _answering, pushing: None });
    }

    /// Sends the rest in the background, from now on. Says whether there is a session for it.
    pub fn push(&mut self) -> bool {
        let Some(session) = &mut self.session else { return false };
        if session.pushing.is_some() {
            return true;
        }
        let (pump, feed) = (Arc::clone(&session.pump), Arc::clone(&self.feed));
        let closer = session.closer.clone();
        session.pushing = Some(tokio::task::spawn_blocking(move || match pump.send_rest(feed) {
            Ok(counts) => counts,
            Err(error) => {
                // The session's end says why a lane was closed, if it has ended.
                if !matches!(error, PumpError::LaneClosed) {
                    tracing::error!(%error, "missing pages are not sent");
                }
                closer.close_now(close_code::INTERNAL, &error.to_string());
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
        let urgent = UrgentLane::of(urgent)?;
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
        self.feed.restart(wanted);
        let mut lanes = LaneTasks::start(session.lanes);
        let (ram, queues) = (Arc::clone(&self.ram), lanes.queues());
        let pump = Arc::new(Pump::serve(ram, Arc::clone(&gate), queues, self.compression));
        self.begin(pump, gate, Some(lanes), urgent, requests, closer.clone());
        contact.session = Some((link, closer));
        Ok(())
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
