//! The end that is connected to: carries a stream's sessions one after the other, as they come.

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use migrate_core::page_table::DestinationPages;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use transport::messages::{FEATURE_STREAM_RESUME, Message, StreamResumed};
use transport::{Batch, DestinationSession, LaneReceiver, TransportError, close_code};

use super::awaited::{Place, Resuming};
use super::carry::{Control, Inbox};
use super::tally::{self, Tally};
use super::{LAST_WORD_WITHIN, REPLACED, RESUMED_WITHIN, TOLD_WITHIN, is_loss};
use crate::destination::apply::Applier;
use crate::destination::intake::{Intake, tell_progress};
use crate::destination::sink::PageSink;
use crate::error::EngineError;
use crate::tell;

/// A lane, over all sessions.
#[derive(Debug)]
struct Lane {
    batches: mpsc::Sender<Batch>,
    /// Batches that came.
    received: AtomicU64,
}

#[derive(Debug)]
struct Shared {
    /// What comes in, for people.
    name: String,
    control: Arc<Control>,
    lanes: Vec<Arc<Lane>>,
    /// Who applies pages, once they may come.
    applier: watch::Sender<Option<Arc<Applier>>>,
    tally: Tally,
    /// How long a session is waited for.
    within: Duration,
}

/// A stream on its way in, over all of its sessions. Dropping it drops the last one.
#[derive(Debug)]
pub struct Arriving {
    shared: Arc<Shared>,
    inbox: Inbox,
    /// Until pages may come.
    batches: Vec<mpsc::Receiver<Batch>>,
    task: JoinHandle<()>,
}

impl Arriving {
    /// Takes a session over, in which everything was agreed on; others are waited for `within` that time.
    pub fn start(session: DestinationSession, place: Place, within: Duration) -> Self {
        let (control, inbox) = Control::new();
        let lanes = session.lanes.iter().map(|_| {
            let (queue, batches) = mpsc::channel(1);
            (Arc::new(Lane { batches: queue, received: AtomicU64::new(0) }), batches)
        });
        let (lanes, batches) = lanes.unzip();
        let shared = Arc::new(Shared {
            name: format!("a guest from {}", session.peer.name),
            control,
            lanes,
            applier: watch::channel(None).0,
            tally: Tally::new(session.control_sender.clone(), session.closer.clone()),
            within,
        });
        let task = tokio::spawn(carry(Arc::clone(&shared), session, place));
        Self { shared, inbox, batches, task }
    }

    /// The stream's next message. Cancel-safe.
    ///
    /// # Errors
    /// Why there are no more.
    pub async fn recv(&mut self) -> Result<Message, EngineError> {
        self.inbox.recv().await
    }

    /// What is said over it.
    pub fn control(&self) -> &Arc<Control> {
        &self.shared.control
    }

    /// Lanes that each session has.
    pub fn lane_count(&self) -> usize {
        self.shared.lanes.len()
    }

    /// Pages may come from now on.
    pub fn begin_pages(&mut self, sink: Arc<dyn PageSink>, pages: Arc<DestinationPages>) -> Intake {
        let intake = Intake::begin(sink, pages, std::mem::take(&mut self.batches));
        self.shared.applier.send_replace(Some(Arc::clone(intake.applier())));
        intake
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

    /// What comes on the lanes, instead of [`Self::begin_pages`].
    #[cfg(test)]
    pub(super) fn batches(&mut self) -> Vec<mpsc::Receiver<Batch>> {
        std::mem::take(&mut self.batches)
    }

    /// Ends it: waits until the other end has heard everything and goes, or says why not.
    pub async fn close(&self, error: Option<&EngineError>) {
        if let Some(error) = error {
            return self.shared.tally.abort(error).await;
        }
        // Whoever lost contact in the last moment looks for it.
        let within = self.shared.within + TOLD_WITHIN;
        let _gone = tokio::time::timeout(within, self.shared.control.ended()).await;
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// How a session ended.
enum Ended {
    /// For good or not.
    Why(EngineError),
    /// The source has given it up already.
    Again(Box<Resuming>),
}

/// Carries all sessions of a stream. Does not return: what is left of the last one is dropped after it was closed.
async fn carry(shared: Arc<Shared>, mut session: DestinationSession, mut place: Place) {
    let mut tasks = JoinSet::new();
    let why = loop {
        let resuming = match shared.run(&mut session, &mut tasks, &mut place).await {
            Ended::Why(why) if !is_loss(&why) => break why,
            Ended::Why(why) => {
                let seconds = shared.within.as_secs();
                tell!(
                    "{}: connection lost, waiting {seconds} s for it ({})",
                    shared.name,
                    why.tell()
                );
                Err(why)
            }
            Ended::Again(resuming) => {
                tell!("{}: connection lost, as the other gateway says", shared.name);
                Ok(resuming)
            }
        };
        shared.tally.lose();
        tasks.shutdown().await;
        session = match shared.replaced(resuming, &mut place).await {
            Ok(session) => session,
            Err(error) => break error,
        };
        tell!("{}: connected again, going on", shared.name);
    };
    // Whoever comes from now on is told that nothing waits.
    drop(place);
    shared.control.end(why);
    pending::<()>().await;
}

impl Shared {
    /// Carries a session until it ends.
    async fn run(
        &self,
        session: &mut DestinationSession,
        tasks: &mut JoinSet<TransportError>,
        place: &mut Place,
    ) -> Ended {
        for (receiver, lane) in session.lanes.drain(..).zip(&self.lanes) {
            tasks.spawn(drain(receiver, Arc::clone(lane)));
        }
        let (sender, closer) = (&session.control_sender, session.closer.clone());
        let receiver = &mut session.control_receiver;
        let progress = async {
            let mut applier = self.applier.subscribe();
            let applier = applier.wait_for(Option::is_some).await.ok().and_then(|set| set.clone());
            if let Some(applier) = applier {
                tell_progress(sender.clone(), applier).await;
            }
            pending::<()>().await;
        };
        let why = tokio::select! {
            resuming = place.next() => return Ended::Again(Box::new(resuming)),
            why = self.control.carry(sender, receiver, |message| Ok(Some(message))) => why,
            Some(ended) = tasks.join_next() => match ended {
                Ok(error) => error.into(),
                Err(error) => EngineError::Internal(error.to_string()),
            },
            lost = closer.closed() => lost.into(),
            () = progress => EngineError::Cancelled,
        };
        if is_loss(&why) || !matches!(why, EngineError::Transport(_)) {
            return Ended::Why(why);
        }
        Ended::Why(match self.control.hear_rest(receiver, LAST_WORD_WITHIN).await {
            Some(aborted @ EngineError::PeerAborted { .. }) => aborted,
            _ => why,
        })
    }

    /// Another session in place of the last one: one that is there, or one that comes in time after this was lost.
    async fn replaced(
        &self,
        resuming: Result<Box<Resuming>, EngineError>,
        place: &mut Place,
    ) -> Result<DestinationSession, EngineError> {
        let deadline = Instant::now() + self.within;
        let (mut next, mut last) = match resuming {
            Ok(resuming) => (Some(resuming), EngineError::Cancelled),
            Err(why) => (None, why),
        };
        loop {
            let resuming = match next.take() {
                Some(resuming) => resuming,
                None => match tokio::time::timeout_at(deadline, place.next()).await {
                    Ok(resuming) => Box::new(resuming),
                    Err(_elapsed) => {
                        let (seconds, source) = (self.within.as_secs(), Box::new(last));
                        return Err(EngineError::ContactLost { seconds, source });
                    }
                },
            };
            let Resuming { mut session, turn } = *resuming;
            let taken = self.take_up(&mut session).await;
            drop(turn);
            match taken {
                Ok(()) => {
                    self.tally.replace(session.control_sender.clone(), session.closer.clone());
                    return Ok(session);
                }
                Err(error @ EngineError::Contradiction(_)) => {
                    tally::abort(&session.control_sender, &session.closer, &error).await;
                    return Err(error);
                }
                Err(error) => {
                    tracing::info!(error = %error.tell(), "not connected again");
                    session.closer.close_now(close_code::REPLACED, REPLACED);
                    last = error;
                }
            }
        }
    }

    async fn take_up(&self, session: &mut DestinationSession) -> Result<(), EngineError> {
        let first = tokio::time::timeout(RESUMED_WITHIN, session.control_receiver.recv()).await;
        let late = |_| EngineError::TooSlow {
            wanted: "where the stream goes on",
            seconds: RESUMED_WITHIN.as_secs(),
        };
        let here = match first.map_err(late)?? {
            Message::StreamResume(here) => here,
            other => {
                let (got, wanted) = (other.name(), "StreamResume");
                return Err(EngineError::OutOfPlace { got, wanted });
            }
        };
        if session.selected.features & FEATURE_STREAM_RESUME == 0
            || session.lanes.len() != self.lanes.len()
        {
            let what = format!("{} lanes, and other features than before", session.lanes.len());
            return Err(EngineError::Contradiction(what));
        }
        self.control.resume(here.messages)?;
        let batches = self.lanes.iter().map(|lane| lane.received.load(Ordering::Relaxed));
        let (messages, batches) = (self.control.received(), batches.collect());
        let there = Message::StreamResumed(StreamResumed { messages, batches });
        Ok(session.control_sender.send(&there).await?)
    }
}

/// Takes a lane's batches in until the session ends. May be cancelled, and go on with the lane of another session.
async fn drain(mut receiver: LaneReceiver, lane: Arc<Lane>) -> TransportError {
    loop {
        let Ok(place) = lane.batches.reserve().await else {
            return pending().await;
        };
        match receiver.recv().await {
            Ok(Some(batch)) => {
                lane.received.fetch_add(1, Ordering::Relaxed);
                place.send(batch);
            }
            // The control stream says what that means.
            Ok(None) => return pending().await,
            Err(error) => return error,
        }
    }
}
