//! A stream's messages in both directions, over whatever session there is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use transport::messages::{Message, StreamHeard};
use transport::{ControlReceiver, ControlSender};

use super::outgoing::{Bounds, Outgoing};
use crate::error::EngineError;

/// Weight of the messages that may be sent and not yet taken, in bytes.
const KEPT_BYTES: u64 = 8 << 20;

/// What a message weighs beside the stream's bytes in it.
const MESSAGE_BYTES: u64 = 256;

/// Messages that may wait to be sent.
const UNSENT: usize = 4;

/// Pause before it is told what was taken; there may be more by then.
const HEARD_AFTER: Duration = Duration::from_millis(5);

/// Whether a message is one of the stream's, which are counted.
fn is_counted(message: &Message) -> bool {
    matches!(
        message,
        Message::StreamBlocks(_)
            | Message::StreamBytes(_)
            | Message::StreamBack(_)
            | Message::StreamPostcopy(_)
            | Message::StreamEnd(_)
            | Message::Sync(_)
            | Message::Synced(_)
    )
}

fn weight(message: &Message) -> u64 {
    let bytes = match message {
        Message::StreamBytes(part) => part.bytes.len(),
        Message::StreamBack(part) => part.bytes.len(),
        _ => 0,
    };
    MESSAGE_BYTES + bytes as u64
}

/// One end's messages, over all sessions.
#[derive(Debug)]
pub struct Control {
    outgoing: Outgoing<Message>,
    /// Messages that came.
    received: AtomicU64,
    /// Messages that were taken out of the inbox.
    taken: watch::Sender<u64>,
    /// Weight of what came and was not taken, in bytes.
    waiting_bytes: AtomicU64,
    inbox: mpsc::UnboundedSender<Result<Message, EngineError>>,
    /// Set at the end.
    over: watch::Sender<bool>,
}

/// What came, for whoever takes it.
#[derive(Debug)]
pub struct Inbox {
    queue: mpsc::UnboundedReceiver<Result<Message, EngineError>>,
    control: Arc<Control>,
}

impl Inbox {
    /// The next message. Cancel-safe.
    ///
    /// # Errors
    /// Why there are no more; what came before was handed out.
    pub async fn recv(&mut self) -> Result<Message, EngineError> {
        let message = self.queue.recv().await.unwrap_or(Err(EngineError::Cancelled))?;
        if is_counted(&message) {
            self.control.waiting_bytes.fetch_sub(weight(&message), Ordering::Relaxed);
            self.control.taken.send_modify(|taken| *taken += 1);
        }
        Ok(message)
    }
}

impl Control {
    /// Nothing was said yet.
    pub fn new() -> (Arc<Self>, Inbox) {
        let (inbox, queue) = mpsc::unbounded_channel();
        let control = Arc::new(Self {
            outgoing: Outgoing::new(Bounds { bytes: KEPT_BYTES, unsent: UNSENT }),
            received: AtomicU64::new(0),
            taken: watch::channel(0).0,
            waiting_bytes: AtomicU64::new(0),
            inbox,
            over: watch::channel(false).0,
        });
        (Arc::clone(&control), Inbox { queue, control })
    }

    /// Says something, as soon as may be.
    ///
    /// # Errors
    /// [`EngineError::Cancelled`] at the end; the inbox says why.
    pub async fn send(&self, message: Message) -> Result<(), EngineError> {
        let bytes = weight(&message);
        self.outgoing.push(message, bytes).await.map_err(|_closed| EngineError::Cancelled)
    }

    /// Messages that came.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Another session begins, to an end to which so many messages came.
    ///
    /// # Errors
    /// [`EngineError::Contradiction`] if that cannot be.
    pub fn resume(&self, messages: u64) -> Result<(), EngineError> {
        Ok(self.outgoing.resume(messages)?)
    }

    /// Waits until the other end has taken all that was said, or it is over; whether it has.
    pub async fn is_heard(&self) -> bool {
        self.outgoing.all_confirmed().await.is_ok()
    }

    /// It is over, for this reason, which comes behind what came.
    pub fn end(&self, why: EngineError) {
        self.outgoing.close();
        let _nobody_asks = self.inbox.send(Err(why));
        self.over.send_replace(true);
    }

    /// Returns when it is over.
    pub async fn ended(&self) {
        let mut over = self.over();
        let _cannot_fail = over.wait_for(|over| *over).await;
    }

    /// Whether it is over.
    pub fn over(&self) -> watch::Receiver<bool> {
        self.over.subscribe()
    }

    /// Carries messages both ways until that fails, and says why. `aside` takes what is not the stream's, or gives it
    /// back. May be cancelled, and carried on in another session.
    pub async fn carry(
        &self,
        sender: &ControlSender,
        receiver: &mut ControlReceiver,
        aside: impl Fn(Message) -> Result<Option<Message>, EngineError>,
    ) -> EngineError {
        tokio::select! {
            error = self.hear(receiver, aside) => error,
            error = self.say(sender) => error,
            error = self.tell(sender) => error,
        }
    }

    /// Takes what an ended session still brings.
    pub async fn hear_rest(
        &self,
        receiver: &mut ControlReceiver,
        within: Duration,
    ) -> Option<EngineError> {
        let rest = self.hear(receiver, |_| Ok(None));
        tokio::time::timeout(within, rest).await.ok()
    }

    async fn hear(
        &self,
        receiver: &mut ControlReceiver,
        aside: impl Fn(Message) -> Result<Option<Message>, EngineError>,
    ) -> EngineError {
        loop {
            let taken = match receiver.recv().await {
                Ok(message) => self.take(message, &aside),
                Err(error) => Err(error.into()),
            };
            if let Err(error) = taken {
                return error;
            }
        }
    }

    fn take(
        &self,
        message: Message,
        aside: impl Fn(Message) -> Result<Option<Message>, EngineError>,
    ) -> Result<(), EngineError> {
        let message = match message {
            Message::StreamHeard(heard) => return Ok(self.outgoing.confirm(heard.messages)?),
            Message::Abort(abort) => {
                return Err(EngineError::PeerAborted { code: abort.code, text: abort.text });
            }
            message if is_counted(&message) => message,
            message => match aside(message)? {
                Some(message) => message,
                None => return Ok(()),
            },
        };
        if is_counted(&message) {
            let bytes = weight(&message);
            let waiting = self.waiting_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
            if waiting > 2 * KEPT_BYTES {
                let what = "more at a time than may be under way";
                return Err(EngineError::Contradiction(what.into()));
            }
            self.received.fetch_add(1, Ordering::Relaxed);
        }
        let _nobody_asks = self.inbox.send(Ok(message));
        Ok(())
    }

    async fn say(&self, sender: &ControlSender) -> EngineError {
        loop {
            let message = self.outgoing.next().await;
            if let Err(error) = sender.send(&message).await {
                return error.into();
            }
        }
    }

    /// Tells the other end what need not be kept there.
    async fn tell(&self, sender: &ControlSender) -> EngineError {
        let mut taken = self.taken.subscribe();
        if *taken.borrow() > 0 {
            // Word of it may have been lost with a session.
            taken.mark_changed();
        }
        while taken.changed().await.is_ok() {
            tokio::time::sleep(HEARD_AFTER).await;
            let messages = *taken.borrow_and_update();
            let heard = Message::StreamHeard(StreamHeard { messages });
            if let Err(error) = sender.send(&heard).await {
                return error.into();
            }
        }
        std::future::pending().await
    }
}
