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

/// The control stream of a migration.
#[derive(Debug)]
pub struct Link {
    sender: ControlSender,
    inbox: mpsc::Receiver<Result<Message, EngineError>>,
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
        let applied = Arc::new(Mutex::new(Applied::default()));
        let (ends, over) = watch::channel(false);
        let (wanted, requests) = mpsc::channel(REQUESTS);
        let task = tokio::spawn({
            let applied = Arc::clone(&applied);
            async move {
                loop {
                    let message = match receiver.recv().await {
                        Ok(Message::Progress(progress)) => {
                            match note(&applied, &gate, progress.applied_bytes, clock.elapsed()) {
                                Ok(()) => continue,
                                Err(error) => Err(error),
                            }
                        }
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
            }
        });
        Self { sender, inbox, applied, over, requests: Some(requests), task }
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
        Ok(self.sender.send(&message).await?)
    }

    /// Says nothing more and waits, at most `within`, until everything that was said is there.
    ///
    /// # Errors
    /// If the session is over, or that takes longer.
    pub async fn finish(&self, within: Duration) -> Result<(), EngineError> {
        Ok(self.sender.finish(within).await?)
    }

    /// Waits for the next message that is no progress. Cancel-safe.
    ///
    /// # Errors
    /// If the session is over or the destination gave up.
    pub async fn recv(&mut self) -> Result<Message, EngineError> {
        self.inbox.recv().await.unwrap_or_else(|| {
            Err(EngineError::Internal("the control stream's reader is gone".into()))
        })
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
