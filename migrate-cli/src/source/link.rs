//! The source's side of the control stream: progress is taken care of, the rest is queued.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use migrate_core::convergence::Goodput;
use migrate_core::layout::PageIndex;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use transport::messages::Message;
use transport::{ControlReceiver, ControlSender};

use super::gate::Gate;
use crate::error::EngineError;
use crate::gateway::lasting::{Control, Inbox};

/// Messages that may wait for the engine. It waits for one at a time.
const INBOX: usize = 16;

/// Requests for pages that may wait: a guest has some threads that can fault.
const REQUESTS: usize = 1024;

/// How long the control stream may take to tell why something has ended.
const WHY_WITHIN: Duration = Duration::from_secs(2);

/// How far the destination is.
#[derive(Debug, Default)]
struct Applied {
    bytes: u64,
    goodput: Goodput,
}

/// Takes note of how far the destination is.
#[derive(Debug, Clone)]
pub struct Pace {
    applied: Arc<Mutex<Applied>>,
    gate: Arc<Gate>,
    clock: Instant,
}

impl Pace {
    /// For what passes the gate; `clock` is the migration's origin of time.
    pub fn new(gate: Arc<Gate>, clock: Instant) -> Self {
        Self { applied: Arc::default(), gate, clock }
    }

    /// The destination has applied so many bytes in all.
    ///
    /// # Errors
    /// [`EngineError::Contradiction`] if that cannot be.
    pub fn note(&self, applied_bytes: u64) -> Result<(), EngineError> {
        note(&self.applied, &self.gate, applied_bytes, self.clock.elapsed())
    }

    /// Another session has taken the place of one that was lost: what was measured across the gap tells nothing.
    pub fn begin_again(&self) {
        self.applied.lock().unwrap_or_else(PoisonError::into_inner).goodput = Goodput::default();
    }

    /// Nobody waits for the destination any more.
    pub fn close(&self) {
        self.gate.close();
    }
}

/// Who says things.
#[derive(Debug)]
enum Voice {
    Session(ControlSender),
    Lasting(Arc<Control>),
}

/// What was heard.
#[derive(Debug)]
enum Ear {
    Session(mpsc::Receiver<Result<Message, EngineError>>),
    Lasting(Inbox),
}

/// The control stream of a migration: one session's, or one that outlives its sessions.
#[derive(Debug)]
pub struct Link {
    voice: Voice,
    inbox: Ear,
    applied: Arc<Mutex<Applied>>,
    over: watch::Receiver<bool>,
    requests: Option<mpsc::Receiver<PageIndex>>,
    task: JoinHandle<()>,
}

impl Link {
    /// Takes over a session's control stream; `clock` is the migration's origin of time.
    pub fn start(
        sender: ControlSender,
        mut receiver: ControlReceiver,
        gate: Arc<Gate>,
        clock: Instant,
    ) -> Self {
        let (queue, inbox) = mpsc::channel(INBOX);
        let pace = Pace::new(Arc::clone(&gate), clock);
        let applied = Arc::clone(&pace.applied);
        let (ends, over) = watch::channel(false);
        let (wanted, requests) = mpsc::channel(REQUESTS);
        let task = tokio::spawn(async move {
            loop {
                let message = match receiver.recv().await {
                    Ok(Message::Progress(progress)) => match pace.note(progress.applied_bytes) {
                        Ok(()) => continue,
                        Err(error) => Err(error),
                    },
                    Ok(Message::Request(request)) => {
                        // Nobody takes them where no pages are missing; then they mean nothing.
                        let _unasked = wanted.send(PageIndex(request.page)).await;
                        continue;
                    }
                    Ok(Message::Abort(abort)) => {
                        Err(EngineError::PeerAborted { code: abort.code, text: abort.text })
                    }
                    Ok(message) => Ok(message),
                    Err(error) => Err(error.into()),
                };
                let over = message.is_err();
                if over {
                    gate.close();
                    ends.send_replace(true);
                }
                if queue.send(message).await.is_err() || over {
                    return;
                }
            }
        });
        let (voice, inbox) = (Voice::Session(sender), Ear::Session(inbox));
        Self { voice, inbox, applied, over, requests: Some(requests), task }
    }

    /// Over all sessions of a stream, which the task carries.
    pub fn lasting(control: Arc<Control>, inbox: Inbox, pace: Pace, task: JoinHandle<()>) -> Self {
        let over = control.over();
        let (voice, inbox) = (Voice::Lasting(control), Ear::Lasting(inbox));
        Self { voice, inbox, applied: pace.applied, over, requests: None, task }
    }

    /// The pages that the destination asks for; can be taken once.
    pub fn requests(&mut self) -> Option<mpsc::Receiver<PageIndex>> {
        self.requests.take()
    }

    /// Sends a message.
    ///
    /// # Errors
    /// If the session is over.
    pub async fn send(&self, message: Message) -> Result<(), EngineError> {
        match &self.voice {
            Voice::Session(sender) => Ok(sender.send(&message).await?),
            Voice::Lasting(control) => control.send(message).await,
        }
    }

    /// Says nothing more and waits, at most `within`, until everything that was said is there.
    ///
    /// # Errors
    /// If the session is over, or that takes longer.
    pub async fn finish(&self, within: Duration) -> Result<(), EngineError> {
        match &self.voice {
            Voice::Session(sender) => Ok(sender.finish(within).await?),
            Voice::Lasting(control) => {
                let heard = tokio::time::timeout(within, control.is_heard()).await;
                let seconds = within.as_secs();
                match heard {
                    Ok(true) => Ok(()),
                    Ok(false) => Err(EngineError::Cancelled),
                    Err(_elapsed) => {
                        Err(EngineError::TooSlow { wanted: "that it heard everything", seconds })
                    }
                }
            }
        }
    }

    /// Waits for the next message that is no progress. Cancel-safe.
    ///
    /// # Errors
    /// If the session is over or the destination gave up.
    pub async fn recv(&mut self) -> Result<Message, EngineError> {
        match &mut self.inbox {
            Ear::Session(inbox) => inbox.recv().await.unwrap_or_else(|| {
                Err(EngineError::Internal("the control stream's reader is gone".into()))
            }),
            Ear::Lasting(inbox) => inbox.recv().await,
        }
    }

    /// Returns when the session is over or the destination gave up; [`Self::recv`] then says why.
    pub async fn ended(&self) {
        let mut over = self.over.clone();
        // The reader's end without a word is an end, too.
        let _reader_is_gone = over.wait_for(|over| *over).await;
    }

    /// Why the session ended, where something else failed first that may be only its consequence; nothing if that is
    /// not told soon.
    pub async fn why_over(&mut self) -> Option<EngineError> {
        let why = async {
            loop {
                if let Err(error) = self.recv().await {
                    return error;
                }
            }
        };
        tokio::time::timeout(WHY_WITHIN, why).await.ok()
    }

    /// Waits for a message for at most `within`.
    ///
    /// # Errors
    /// As [`Self::recv`], and [`EngineError::TooSlow`].
    pub async fn recv_within(
        &mut self,
        wanted: &'static str,
        within: Duration,
    ) -> Result<Message, EngineError> {
        tokio::time::timeout(within, self.recv())
            .await
            .map_err(|_| EngineError::TooSlow { wanted, seconds: within.as_secs() })?
    }

    /// Goodput in bytes a second, if enough was sent to tell.
    pub fn goodput_bytes_per_s(&self) -> Option<f64> {
        self.lock().goodput.bytes_per_s()
    }

    /// Bytes that the destination applied.
    pub fn applied_bytes(&self) -> u64 {
        self.lock().bytes
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Applied> {
        self.applied.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn note(
    applied: &Mutex<Applied>,
    gate: &Gate,
    bytes: u64,
    now: Duration,
) -> Result<(), EngineError> {
    let (under_way, held_back) = gate.applied(bytes).ok_or_else(|| {
        EngineError::Contradiction(format!("that it applied {bytes} bytes, more than were sent"))
    })?;
    let mut applied = applied.lock().unwrap_or_else(PoisonError::into_inner);
    if bytes < applied.bytes {
        return Err(EngineError::Contradiction(format!(
            "that it applied {bytes} bytes, after {} before",
            applied.bytes
        )));
    }
    applied.bytes = bytes;
    applied.goodput.note(now, bytes, under_way, held_back);
    gate.set_link(applied.goodput.link_bytes_per_s());
    if let Some(rate) = applied.goodput.bytes_per_s() {
        gate.set_goodput(rate);
    }
    Ok(())
}
