//! Carries out the destination's side of the hand-over: journal, messages, QEMU.
//!
//! The decisions are [`migrate_core::handover::Destination`]'s; this module only does what it says.

use std::collections::VecDeque;
use std::future::pending;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use migrate_core::handover::destination::{Input, Output};
use migrate_core::handover::{Destination, DestinationState, Outcome};
use qemu_glue::qmp::{Client, MigrationStatus, RunState};
use qemu_glue::ram::GuestRam;
use tokio::sync::mpsc;
use transport::messages::{
    self, DIGESTS_MAX, FaultStats, Intent, Message, Ready, Running, Verdict, VerifyChunk, VerifyEnd,
};
use transport::{
    Closer, ControlReceiver, ControlSender, DestinationSession, MigrationId, TransportError,
    close_code,
};

use super::arrival::empty;
use super::paging::{self, Paging};
use super::remote::RemoteGuest;
use crate::blocking::on_thread;
use crate::error::EngineError;
use crate::failpoint;
use crate::journal::{Journal, Record};
use crate::stream::rest::{self, Became, Rest};
use crate::tell;

/// How long the source has to close the session after it was told that the guest runs.
const GOODBYE: Duration = Duration::from_secs(5);

/// Longest wait until a word is on its way.
const TELL_WITHIN: Duration = Duration::from_secs(5);

/// Pause before something that failed is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// How often QEMU is looked after while the commit is due.
const QEMU_WATCH_EVERY: Duration = Duration::from_millis(100);

/// A session to talk to the source over.
#[derive(Debug)]
pub struct Voice {
    /// Our words.
    pub control: ControlSender,
    /// The source's.
    pub receiver: ControlReceiver,
    /// Ends it.
    pub closer: Closer,
}

/// What the source does, or what is found wrong with it, while pages are missing.
#[derive(Debug)]
enum Event {
    /// Pages are not taken in any more, or faults not served.
    Failed(EngineError),
    /// A word, or the loss of the session.
    Heard(Result<Message, TransportError>),
    /// It opened another session.
    Opened(Box<DestinationSession>),
    /// No page is missing any more.
    Whole,
}

/// What the source said with its commit.
#[derive(Debug, Clone, Copy)]
pub struct Committed {
    /// Whether the guest is to run.
    resume: bool,
    at: Instant,
}

/// Everything that the hand-over acts on.
#[derive(Debug)]
pub struct Owner<'a> {
    /// QEMU's monitor.
    pub client: &'a Client,
    /// The migration's journal.
    pub journal: &'a mut Journal,
    /// The session in use.
    pub voice: Voice,
    /// What brings missing pages in, until all are here.
    pub paging: Option<Paging>,
    /// What still comes of a guest whose QEMU sends and takes its missing pages.
    pub rest: Option<Rest>,
    /// What pages a guest whose memory is split.
    pub remote: Option<RemoteGuest>,
    /// What the guest's page faults cost.
    pub faults: Option<FaultStats>,
    /// Sessions opened to ask about this migration, or to go on with it.
    pub asks: &'a mut mpsc::Receiver<DestinationSession>,
    /// The migration.
    pub migration: MigrationId,
    /// How long a loaded guest waits for its commit.
    pub lease: Duration,
    /// What to tell the source when everything is loaded.
    pub ready: Option<Ready>,
    /// Guest memory, where it is reached directly.
    pub ram: Option<&'a Arc<GuestRam>>,
    /// The source's commit, once it came.
    pub commit: Option<Committed>,
    /// Whether `voice` has ended.
    pub is_lost: bool,
    /// Whether the guest runs here and lacks pages, for Ctrl-C.
    pub fetches: &'a AtomicBool,
    /// Whether the source knows how it ended, or will never ask: it asks only about what was ready.
    pub source_knows: bool,
}

impl Owner<'_> {
    /// Drives the hand-over from `state`, which `input` has just reached, to its end.
    pub async fn drive(&mut self, state: Destination, input: Input) -> Outcome {
        let (state, outputs) = state.handle(input);
        self.carry_on(state, outputs).await
    }

    /// Carries out `outputs` in `state`, and everything that follows.
    pub async fn carry_on(&mut self, state: Destination, outputs: Vec<Output>) -> Outcome {
        let mut state = state;
        let mut todo = VecDeque::from(outputs);
        let lease_ends = Instant::now() + self.lease;
        loop {
            let input = match todo.pop_front() {
                Some(output) => self.carry_out(output).await,
                None => match state.outcome() {
                    Some(outcome) => {
                        self.say_goodbye(outcome).await;
                        return outcome;
                    }
                    // Nobody can resume it any more, and it may have run: the source stays stopped.
                    None if self.is_bereft(state) => {
                        tell!("the guest belongs here, but its QEMU is gone");
                        return Outcome::InDoubt;
                    }
                    None => Some(self.hear(state, lease_ends).await),
                },
            };
            if let Some(input) = input {
                let (next, more) = state.handle(input);
                tracing::debug!(?state, ?input, ?next, "hand-over");
                state = next;
                todo.extend(more);
            }
        }
    }

    /// Whether the guest belongs here and its QEMU is gone.
    fn is_bereft(&self, state: Destination) -> bool {
        matches!(state, Destination::Owned | Destination::Fetching) && self.client.is_closed()
    }

    async fn carry_out(&mut self, output: Output) -> Option<Input> {
        match output {
            Output::Record(record) => {
                failpoint::hit("destination-recording").await;
                if let Some(commit) = self.commit {
                    self.journal.set_was_running(commit.resume);
                }
                let written = self.journal.record(Record::Destination(record));
                failpoint::hit("destination-recorded").await;
                Some(match written {
                    Ok(()) => Input::Recorded,
                    Err(error) => {
                        tracing::error!(%error, "hand-over not recorded");
                        // Not in a busy loop, should the source keep asking.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        Input::RecordFailed
                    }
                })
            }
            Output::SayReady => {
                self.source_knows = false;
                if let Some(ready) = self.ready.clone() {
                    self.tell(Message::Ready(ready)).await;
                }
                failpoint::hit("destination-ready").await;
                None
            }
            Output::ResumeGuest => {
                if let Some(remote) = &self.remote {
                    self.fetches.store(true, Ordering::Relaxed);
                    remote.own();
                }
                Some(self.resume().await)
            }
            Output::Say(DestinationState::Running) => {
                let resume_us = self.commit.map_or(0, |commit| commit.at.elapsed().as_micros());
                let resume_us = u64::try_from(resume_us).unwrap_or(u64::MAX);
                let faults = self.faults;
                self.tell(Message::Running(Running { resume_us, faults })).await;
                announce(self.client).await;
                None
            }
            Output::Say(state) => {
                self.fetches.store(state == DestinationState::Fetching, Ordering::Relaxed);
                self.tell(Message::Verdict(Verdict { state, text: String::new() })).await;
                if state == DestinationState::Fetching {
                    // QEMU may not answer before pages have come: nothing waits for it.
                    let client = self.client.clone();
                    tokio::spawn(async move { announce(&client).await });
                    failpoint::hit("destination-fetching").await;
                }
                None
            }
            Output::DiscardGuest => {
                drop(self.rest.take());
                // Threads of QEMU may wait for pages that nobody sends any more.
                if let Some(paging) = self.paging.take() {
                    paging.end().await;
                }
                if let Some(mut remote) = self.remote.take() {
                    remote.end(false).await;
                }
                discard(self.client, self.ram).await;
                None
            }
        }
    }

    async fn resume(&mut self) -> Input {
        let wanted = self.commit.is_none_or(|commit| commit.resume);
        let resumed = match self.is_whole() {
            false => self.resume_lacking(wanted).await,
            true => resume_guest(self.client, wanted).await,
        };
        match resumed {
            Ok(()) => {
                failpoint::hit("destination-resumed").await;
                Input::Resumed { complete: self.is_whole() }
            }
            Err(error) => {
                tracing::error!(error = %error.tell(), "the guest could not be resumed");
                Input::ResumeFailed
            }
        }
    }

    /// Whether all pages of the guest are here.
    fn is_whole(&self) -> bool {
        self.paging.is_none() && self.rest.is_none()
    }

    /// Resumes a guest that lacks pages: QEMU may need some of them to do so, and the source that has
    /// them may be lost, or come back, meanwhile.
    async fn resume_lacking(&mut self, wanted: bool) -> Result<(), EngineError> {
        let fetching =
            || Message::Verdict(Verdict { state: DestinationState::Fetching, text: String::new() });
        if self.paging.as_ref().is_some_and(|paging| !paging.is_connected()) {
            self.tell(fetching()).await;
        }
        let mut resuming = pin!(resume_guest(self.client, wanted));
        loop {
            let event = tokio::select! {
                resumed = &mut resuming => return resumed,
                event = self.event() => event,
            };
            if let Some(Input::Asked | Input::Commit) = self.react(event).await {
                self.tell(fetching()).await;
            }
        }
    }

    /// The next event while pages are missing. Cancel-safe.
    async fn event(&mut self) -> Event {
        let Self { client, paging, rest, voice, asks, is_lost, .. } = self;
        // Once the session is lost there is only a new one to wait for.
        tokio::select! {
            error = paging::failed(paging), if !*is_lost => Event::Failed(error),
            became = rest::next(rest, client) => match became {
                Became::Broken(error) => Event::Failed(error),
                Became::Whole => Event::Whole,
            },
            heard = voice.receiver.recv(), if !*is_lost => Event::Heard(heard),
            Some(session) = asks.recv() => Event::Opened(Box::new(session)),
            else => pending().await,
        }
    }

    /// Does what an event asks for. The guest belongs here: a source that is lost is waited for.
    async fn react(&mut self, event: Event) -> Option<Input> {
        match event {
            Event::Whole => {
                self.rest = None;
                self.fetches.store(false, Ordering::Relaxed);
                return Some(Input::Fetched);
            }
            Event::Failed(error) => {
                tell!("{}; {}", error.tell(), self.awaited());
                self.voice.closer.close_now(close_code::ABORTED, &messages::text(&error.tell()));
                self.is_lost = true;
                self.disconnect().await;
            }
            Event::Heard(Ok(Message::Ask(ask))) if ask.migration == self.migration => {
                return Some(Input::Asked);
            }
            Event::Heard(Ok(Message::Commit(_))) => return Some(Input::Commit),
            // It asked, and heard the answer.
            Event::Heard(Ok(Message::Done(_))) => {}
            Event::Heard(Ok(other)) => tracing::warn!(message = other.name(), "out of place"),
            Event::Heard(Err(error)) => {
                tell!("{error}; the guest stays here, {}", self.awaited());
                self.is_lost = true;
                self.disconnect().await;
            }
            Event::Opened(session) => {
                if self.take_up(*session).await {
                    self.is_lost = false;
                }
            }
        }
        None
    }

    /// What a lost session has to be followed by.
    fn awaited(&self) -> &'static str {
        match self.rest {
            Some(_) => rest::BROKEN,
            None => "waiting for the source to come back",
        }
    }

    /// The next thing that the source, QEMU or time says.
    async fn hear(&mut self, state: Destination, lease_ends: Instant) -> Input {
        let is_ready = state == Destination::Ready;
        if state == Destination::Fetching {
            return self.fetch().await;
        }
        let over = if is_ready { lease_ends } else { Instant::now() + RETRY_AFTER };
        // Once the session is lost there is only a new one to wait for.
        let mut is_lost = self.is_lost;
        let heard = loop {
            tokio::select! {
                message = self.voice.receiver.recv(), if !is_lost => match message {
                    Ok(Message::Commit(commit)) if commit.migration == self.migration => {
                        failpoint::hit("destination-committed").await;
                        self.commit = Some(Committed { resume: commit.resume, at: Instant::now() });
                        break if self.client.is_closed() { Input::ResumeFailed } else { Input::Commit };
                    }
                    Ok(Message::Ask(ask)) if ask.migration == self.migration => break Input::Asked,
                    Ok(Message::Abort(abort)) => {
                        tell!("the source gave up: {}", abort.text);
                        self.source_knows = true;
                        break Input::PeerAborted;
                    }
                    Ok(other) => tracing::warn!(message = other.name(), "out of place"),
                    Err(error) => {
                        tell!("{error}; waiting for the source to come back");
                        is_lost = true;
                        self.disconnect().await;
                    }
                },
                // Nobody has the guest's memory here; the source takes it back.
                became = rest::next(&mut self.rest, self.client), if is_ready => match became {
                    Became::Whole => self.rest = None,
                    Became::Broken(error) => {
                        tell!("{}; the guest is given back", error.tell());
                        break Input::ResumeFailed;
                    }
                },
                Some(session) = self.asks.recv() => {
                    if self.take_up(session).await {
                        is_lost = false;
                    }
                }
                () = tokio::time::sleep_until(over.into()) => {
                    break if is_ready { Input::LeaseEnded } else { Input::Retry };
                }
                () = tokio::time::sleep(QEMU_WATCH_EVERY), if is_ready => {
                    if self.client.is_closed() {
                        tell!("QEMU is gone");
                        break Input::ResumeFailed;
                    }
                }
            }
        };
        self.is_lost = is_lost;
        heard
    }

    /// The session in use is over: nothing comes in until there is another.
    async fn disconnect(&mut self) {
        if let Some(paging) = &mut self.paging {
            paging.stop_intake().await;
        }
    }

    /// Goes on in another session. Says whether it is of use.
    async fn take_up(&mut self, session: DestinationSession) -> bool {
        if session.intent == Intent::Ask {
            // Who asks has lost contact, whether that was noticed here or not.
            self.disconnect().await;
            self.voice = Voice::of(session);
            return true;
        }
        let Some(paging) = &mut self.paging else {
            session.close(close_code::REJECTED, "no page is missing").await;
            return false;
        };
        match paging.resume(session).await {
            Ok(voice) => {
                self.voice = voice;
                true
            }
            Err(error) => {
                tell!("{}; waiting for the source to come back", error.tell());
                false
            }
        }
    }

    /// Takes missing pages in, until all are here or something else has to be done.
    async fn fetch(&mut self) -> Input {
        if self.rest.is_some() {
            let event = self.event().await;
            return self.react(event).await.unwrap_or(Input::Retry);
        }
        let Some(paging) = &self.paging else { return Input::Fetched };
        let fetcher = Arc::clone(paging.fetcher());
        let event = tokio::select! {
            () = fetcher.completed() => {
                self.end_fetching().await;
                return Input::Fetched;
            }
            event = self.event() => event,
            () = tokio::time::sleep(RETRY_AFTER) => return Input::Retry,
        };
        self.react(event).await.unwrap_or(Input::Retry)
    }

    /// Every page is here: the source is told what came, if it asked for that, and paging ends.
    async fn end_fetching(&mut self) {
        let Some(paging) = self.paging.take() else { return };
        self.fetches.store(false, Ordering::Relaxed);
        self.faults = paging.fetcher().stats();
        let digests = paging.fetcher().digests();
        paging.end().await;
        let Some(digests) = digests else { return };
        let pages = digests.len() as u64;
        let mut chunk: Option<VerifyChunk> = None;
        for (page, digest) in digests {
            match &mut chunk {
                Some(open)
                    if open.first_page + open.digests.len() as u64 == page
                        && open.digests.len() < DIGESTS_MAX =>
                {
                    open.digests.push(digest);
                }
                _ => {
                    let next = VerifyChunk { first_page: page, digests: vec![digest] };
                    if let Some(full) = chunk.replace(next) {
                        self.tell(Message::VerifyChunk(full)).await;
                    }
                }
            }
        }
        if let Some(last) = chunk {
            self.tell(Message::VerifyChunk(last)).await;
        }
        self.tell(Message::VerifyEnd(VerifyEnd { pages })).await;
    }

    async fn tell(&self, message: Message) {
        let told = tokio::time::timeout(TELL_WITHIN, self.voice.control.send(&message)).await;
        match told {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::info!(%error, message = message.name(), "not told"),
            Err(_elapsed) => tracing::info!(message = message.name(), "not told in time"),
        }
    }

    /// Waits for the source to end the session, so that it has heard the last word.
    async fn say_goodbye(&mut self, outcome: Outcome) {
        // Who asked in a session that is over has heard what was so then.
        if outcome == Outcome::Completed && self.is_lost {
            self.source_knows = false;
        } else if outcome == Outcome::Completed {
            let Voice { receiver, closer, .. } = &mut self.voice;
            self.source_knows =
                match tokio::time::timeout(GOODBYE, farewell(receiver, closer)).await {
                    Ok(None | Some(TransportError::Closed { code: close_code::DONE, .. })) => true,
                    Ok(Some(_)) | Err(_) => false,
                };
        }
        if self.source_knows {
            self.journal.mark_heard();
        }
        self.voice.closer.close_now(close_code::DONE, &messages::text("done"));
    }
}

impl Voice {
    /// The control stream of a session that was opened to ask.
    pub fn of(session: DestinationSession) -> Self {
        Self {
            control: session.control_sender,
            receiver: session.control_receiver,
            closer: session.closer,
        }
    }
}

/// Waits until the source has heard the last word: returns nothing when it says so, else how the session ended.
pub async fn farewell(receiver: &mut ControlReceiver, closer: &Closer) -> Option<TransportError> {
    loop {
        match receiver.recv().await {
            Ok(Message::Done(_)) => return None,
            Ok(other) => tracing::debug!(message = other.name(), "after the last word"),
            // The stream ends a little before the session, whose code tells why.
            Err(_) => return Some(closer.closed().await),
        }
    }
}

/// QEMU announces when loading ends; a guest that was resumed later is announced again, so that no
/// switch forgot it meanwhile.
async fn announce(client: &Client) {
    if let Err(error) = client.announce_self().await {
        tracing::debug!(%error, "addresses not announced");
    }
}

/// Lets the guest run if that is `wanted`, and reads its state back.
///
/// # Errors
/// If QEMU is gone, refuses or does not come to the state wanted.
pub async fn resume_guest(client: &Client, wanted: bool) -> Result<(), EngineError> {
    if !wanted {
        return Ok(());
    }
    if !client.query_status().await?.running {
        client.cont().await?;
    }
    let status = client.query_status().await?;
    if status.running {
        return Ok(());
    }
    Err(EngineError::RunState { found: status.state.to_string(), wanted: "running" })
}

/// Makes sure that a guest that belongs to its source does not stay here: memory of a QEMU that still
/// waits is given back; a QEMU that holds a loaded guest is quit, so that nobody resumes it.
pub async fn discard(client: &Client, ram: Option<&Arc<GuestRam>>) {
    let failed = client.query_migrate().await.is_ok_and(|info| {
        matches!(info.status, Some(MigrationStatus::Failed | MigrationStatus::Cancelled))
    });
    let waiting =
        client.query_status().await.is_ok_and(|status| status.state == RunState::InMigrate)
            && !failed;
    if !waiting {
        let why = if failed { "can take no other" } else { "holds a copy" };
        tell!("the guest stays at its source; this QEMU, which {why}, is quit");
        if let Err(error) = client.quit().await {
            tracing::info!(%error, "QEMU not quit");
        }
        return;
    }
    if let Some(ram) = ram.map(Arc::clone) {
        match on_thread(move || empty(&ram)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(error = %error.tell(), "memory not given back"),
            Err(error) => tracing::warn!(%error, "memory not given back"),
        }
    }
}
