//! The end that connects: carries a stream's sessions one after the other.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migrate_core::error::{Classify, ErrorBin};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use transport::messages::{
    FEATURE_STREAM_RESUME, Intent, Message, MigrationId, Progress, StreamResume, StreamResumed,
};
use transport::{
    Batch, Identity, LaneKind, LaneSender, Offer, Options, SourceSession, TransportError,
    close_code,
};

use super::carry::Control;
use super::outgoing::{Bounds, Outgoing};
use super::tally::{self, Tally};
use super::{
    LANE_BYTES, LANE_UNSENT, LAST_WORD_WITHIN, REPLACED, RESUMED_WITHIN, TOLD_WITHIN, is_loss,
};
use crate::error::EngineError;
use crate::source::gate::Gate;
use crate::source::lanes::LaneTasks;
use crate::source::link::{Link, Pace};
use crate::{ENGINE, tell};

/// Pauses between two attempts, the first and the longest.
const PAUSE: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(1)];

/// How long one attempt may take: a link that is back answers sooner, and the next attempt's packets leave at once.
const ATTEMPT_WITHIN: Duration = Duration::from_secs(2);

/// Silence after which it is asked whether there is a gateway at all.
const ASK_AFTER: Duration = Duration::from_millis(500);

/// How a lost session is replaced.
#[derive(Debug, Clone)]
pub struct Again {
    /// What is passed on, for people.
    pub name: String,
    /// The other gateway.
    pub addr: SocketAddr,
    /// Our identity.
    pub identity: Arc<Identity>,
    /// Options of the first session.
    pub options: Options,
    /// The migration.
    pub migration: MigrationId,
    /// How long it is tried.
    pub within: Duration,
}

#[derive(Debug)]
struct Shared {
    control: Arc<Control>,
    lanes: Vec<Arc<Outgoing<Batch>>>,
    tally: Tally,
}

/// A stream on its way out, over all of its sessions.
#[derive(Debug)]
pub struct Leaving {
    shared: Arc<Shared>,
}

impl Leaving {
    /// Takes a session over; `clock` is the origin of time.
    pub fn start(
        session: SourceSession,
        again: Again,
        gate: Arc<Gate>,
        clock: Instant,
    ) -> (Self, Link, LaneTasks) {
        let (control, inbox) = Control::new();
        let lanes = session.lanes.iter().map(|_| {
            let bounds = Bounds { bytes: LANE_BYTES, unsent: LANE_UNSENT };
            Arc::new(Outgoing::new(bounds))
        });
        let shared = Arc::new(Shared {
            control: Arc::clone(&control),
            lanes: lanes.collect(),
            tally: Tally::new(session.control_sender.clone(), session.closer.clone()),
        });
        let pace = Pace::new(gate, clock);
        let lane_tasks = LaneTasks::lasting(&shared.lanes);
        let again = again.like(&session);
        let task = tokio::spawn(carry(Arc::clone(&shared), session, again, pace.clone()));
        let link = Link::lasting(control, inbox, pace, task);
        (Self { shared }, link, lane_tasks)
    }

    /// How often a session took another's place.
    pub fn reconnects(&self) -> u64 {
        self.shared.tally.reconnects()
    }

    /// Payload bytes in both directions, over all sessions.
    pub fn wire_bytes(&self) -> u64 {
        self.shared.tally.wire_bytes()
    }

    /// Breaks the session off.
    #[cfg(test)]
    pub(super) fn cutter(&self) -> impl Fn() + Send + 'static {
        let shared = Arc::clone(&self.shared);
        move || shared.tally.cut()
    }

    /// Ends it: the other end has taken everything, or is told why not. To be called as long as there is the link.
    pub async fn close(&self, error: Option<&EngineError>) {
        if let Some(error) = error {
            return self.shared.tally.abort(error).await;
        }
        let Shared { control, tally, .. } = &*self.shared;
        let heard = || tokio::time::timeout(TOLD_WITHIN, control.is_heard());
        // Both QEMUs are done. Who is there and silent will hear; who was lost in the last moment is looked for.
        let _silent = heard().await;
        if tally.is_away() {
            let again = async {
                tally.there().await;
                let _silent = heard().await;
            };
            tokio::select! {
                () = again => {}
                () = control.ended() => {}
            }
        }
        tally.close().await;
    }
}

/// Carries all sessions of a stream. Does not return: what is left of the last one is dropped after it was closed.
async fn carry(shared: Arc<Shared>, mut session: SourceSession, again: Again, pace: Pace) {
    let mut tasks = JoinSet::new();
    let why = loop {
        let why = shared.run(&mut session, &mut tasks, &pace).await;
        if !is_loss(&why) {
            break why;
        }
        shared.tally.lose();
        tasks.shutdown().await;
        let seconds = again.within.as_secs();
        tell!("{}: connection lost, trying again for {seconds} s ({})", again.name, why.tell());
        session = match again.connect(&shared, why).await {
            Ok(session) => session,
            Err(error) => break error,
        };
        shared.tally.replace(session.control_sender.clone(), session.closer.clone());
        pace.begin_again();
        tell!("{}: connected again, going on", again.name);
    };
    pace.close();
    shared.lanes.iter().for_each(|lane| lane.close());
    shared.control.end(why);
    std::future::pending::<()>().await;
}

impl Shared {
    /// Carries a session until it ends, and says why.
    async fn run(
        &self,
        session: &mut SourceSession,
        tasks: &mut JoinSet<TransportError>,
        pace: &Pace,
    ) -> EngineError {
        for (lane, outgoing) in session.lanes.drain(..).zip(&self.lanes) {
            tasks.spawn(feed(lane, Arc::clone(outgoing)));
        }
        let closer = session.closer.clone();
        let receiver = &mut session.control_receiver;
        let aside = |message| match message {
            Message::Progress(progress) => self.progress(&progress, pace).map(|()| None),
            other => Ok(Some(other)),
        };
        let why = tokio::select! {
            why = self.control.carry(&session.control_sender, receiver, aside) => why,
            Some(ended) = tasks.join_next() => match ended {
                Ok(error) => error.into(),
                Err(error) => EngineError::Internal(error.to_string()),
            },
            lost = closer.closed() => lost.into(),
        };
        if is_loss(&why) || !matches!(why, EngineError::Transport(_)) {
            return why;
        }
        match self.control.hear_rest(receiver, LAST_WORD_WITHIN).await {
            Some(aborted @ EngineError::PeerAborted { .. }) => aborted,
            _ => why,
        }
    }

    fn progress(&self, progress: &Progress, pace: &Pace) -> Result<(), EngineError> {
        let batches = &progress.applied_batches;
        if batches.len() != self.lanes.len() {
            let what = format!("how far {} lanes are", batches.len());
            return Err(EngineError::Contradiction(what));
        }
        for (lane, count) in self.lanes.iter().zip(batches) {
            lane.confirm(*count)?;
        }
        pace.note(progress.applied_bytes)
    }

    fn resume(&self, there: &StreamResumed) -> Result<(), EngineError> {
        if there.batches.len() != self.lanes.len() {
            let what = format!("how far {} lanes are", there.batches.len());
            return Err(EngineError::Contradiction(what));
        }
        self.control.resume(there.messages)?;
        for (lane, count) in self.lanes.iter().zip(&there.batches) {
            lane.resume(*count)?;
        }
        Ok(())
    }
}

async fn feed(mut lane: LaneSender, outgoing: Arc<Outgoing<Batch>>) -> TransportError {
    loop {
        let batch = outgoing.next().await;
        if let Err(error) = lane.send(batch).await {
            return error;
        }
    }
}

impl Again {
    /// Another session is to be as this one, with the same host.
    fn like(mut self, session: &SourceSession) -> Self {
        let has_tcp = session.lanes.iter().any(LaneSender::has_tcp);
        self.options = Options {
            lanes: session.lanes.len(),
            expected_peer: Some(session.peer.name.clone()),
            handshake_timeout: ATTEMPT_WITHIN.min(self.options.handshake_timeout),
            ..self.options
        };
        if !has_tcp {
            self.options.lane_kind = LaneKind::Quic;
        }
        self
    }

    /// Makes another session in place of one that was lost for that reason.
    async fn connect(
        &self,
        shared: &Shared,
        mut last: EngineError,
    ) -> Result<SourceSession, EngineError> {
        let deadline = tokio::time::Instant::now() + self.within;
        let [mut pause, pause_max] = PAUSE;
        loop {
            match tokio::time::timeout_at(deadline, self.once(shared)).await {
                Ok(Ok(session)) => return Ok(session),
                Ok(Err(error)) if is_final(&error) => return Err(error),
                Ok(Err(error)) => {
                    tracing::info!(error = %error.tell(), "not connected again");
                    last = error;
                }
                Err(_elapsed) => {}
            }
            if tokio::time::Instant::now() + pause >= deadline {
                let seconds = self.within.as_secs();
                return Err(EngineError::ContactLost { seconds, source: Box::new(last) });
            }
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(pause_max);
        }
    }

    async fn once(&self, shared: &Shared) -> Result<SourceSession, EngineError> {
        let offer = Offer::new(ENGINE, self.migration, Intent::Resume);
        let connecting = transport::connect(self.addr, &self.identity, &self.options, offer);
        let mut session = tokio::select! {
            biased;
            session = connecting => session?,
            gone = self.gone() => return Err(gone),
        };
        match self.take_up(&mut session, shared).await {
            Ok(()) => Ok(session),
            Err(error) => {
                match is_final(&error) {
                    true => tally::abort(&session.control_sender, &session.closer, &error).await,
                    false => session.closer.close_now(close_code::REPLACED, REPLACED),
                }
                Err(error)
            }
        }
    }

    /// Returns once it is known that nobody is there: what the other end knew of the stream is gone.
    async fn gone(&self) -> EngineError {
        loop {
            tokio::time::sleep(ASK_AFTER).await;
            // Where it was not used, TCP may be refused for other reasons.
            if self.options.lane_kind == LaneKind::Quic {
                continue;
            }
            let connected = TcpStream::connect(self.addr).await;
            if connected.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused) {
                return EngineError::PeerGone { addr: self.addr };
            }
        }
    }

    async fn take_up(
        &self,
        session: &mut SourceSession,
        shared: &Shared,
    ) -> Result<(), EngineError> {
        if session.selected.features & FEATURE_STREAM_RESUME == 0
            || session.lanes.len() != shared.lanes.len()
        {
            let what = format!("{} lanes, and other features than before", session.lanes.len());
            return Err(EngineError::Contradiction(what));
        }
        let messages = shared.control.received();
        session.control_sender.send(&Message::StreamResume(StreamResume { messages })).await?;
        let answer = tokio::time::timeout(RESUMED_WITHIN, session.control_receiver.recv()).await;
        let late = |_| EngineError::TooSlow {
            wanted: "where the stream goes on",
            seconds: RESUMED_WITHIN.as_secs(),
        };
        match answer.map_err(late)?? {
            Message::StreamResumed(there) => shared.resume(&there),
            Message::Refuse(refuse) => {
                Err(EngineError::Refused { code: refuse.code, text: refuse.text })
            }
            Message::Abort(abort) => {
                Err(EngineError::PeerAborted { code: abort.code, text: abort.text })
            }
            other => Err(EngineError::OutOfPlace { got: other.name(), wanted: "StreamResumed" }),
        }
    }
}

/// Whether it makes no sense to try again.
fn is_final(error: &EngineError) -> bool {
    match error {
        error if error.is_busy() => false,
        EngineError::PeerGone { .. } | EngineError::PeerAborted { .. } => true,
        error => error.bin() != ErrorBin::System,
    }
}
