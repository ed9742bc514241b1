//! The control stream of a session: typed messages both ways.
//!
//! [`ControlReceiver::recv`] may be cancelled at any time: a task of its own reads the stream and
//! queues whole messages. A [`ControlSender::send`] that is cancelled half-way leaves half a frame
//! on the stream, so every later one fails with [`TransportError::Interrupted`].

use std::io;
use std::sync::Arc;
use std::time::Duration;

use quinn::{ReadError, ReadExactError, RecvStream, SendStream, WriteError};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinHandle;

use crate::closer::Closer;
use crate::error::{TransportError, WireError};
use crate::messages::Message;
use crate::wire::{CONTROL_HEADER_BYTES, ControlHeader, encode, next_sequence};

/// Messages that wait to be taken before the stream is not read any further.
pub const QUEUE_MESSAGES_MAX: usize = 16;

/// What errors call this stream.
pub(crate) const PLACE: &str = "control";

/// Why a frame could not be read or written, before it is known whose session it is.
#[derive(Debug)]
pub(crate) enum StreamError {
    /// The stream ended between two frames.
    Ended,
    /// The peer broke the protocol.
    Wire(WireError),
    /// This end wanted to send what the peer would refuse.
    Refused(WireError),
    /// The peer cut the stream off.
    Cut(u64),
    /// The connection is gone.
    Lost(quinn::ConnectionError),
    /// A TCP connection ended without the end that TLS gives it.
    Broken(io::Error),
    /// An earlier operation was cancelled.
    Interrupted,
}

impl From<ReadError> for StreamError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Reset(code) => Self::Cut(code.into_inner()),
            ReadError::ConnectionLost(error) => Self::Lost(error),
            ReadError::ClosedStream
            | ReadError::IllegalOrderedRead
            | ReadError::ZeroRttRejected => Self::Interrupted,
        }
    }
}

impl From<WriteError> for StreamError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Stopped(code) => Self::Cut(code.into_inner()),
            WriteError::ConnectionLost(error) => Self::Lost(error),
            WriteError::ClosedStream | WriteError::ZeroRttRejected => Self::Interrupted,
        }
    }
}

impl StreamError {
    /// The error of a session; a peer that broke the protocol loses it.
    pub(crate) fn of_session(self, closer: &Closer, place: &str) -> TransportError {
        let peer = closer.peer();
        let place = place.to_owned();
        match self {
            Self::Ended => TransportError::Ended { peer },
            Self::Wire(source) => closer.misbehaved(place, source),
            Self::Refused(source) => TransportError::Refused(source),
            Self::Cut(code) => TransportError::Cut { peer, place, code },
            Self::Lost(error) => closer.lost(error),
            Self::Broken(source) => TransportError::LaneBroken { peer, place, source },
            Self::Interrupted => {
                closer.close_reason().unwrap_or(TransportError::Interrupted { place })
            }
        }
    }
}

/// Fills `bytes` from the stream; an end before the first byte is [`StreamError::Ended`].
pub(crate) async fn read_exact(
    stream: &mut RecvStream,
    bytes: &mut [u8],
    what: &'static str,
) -> Result<(), StreamError> {
    let needed = bytes.len();
    stream.read_exact(bytes).await.map_err(|error| match error {
        ReadExactError::FinishedEarly(0) => StreamError::Ended,
        ReadExactError::FinishedEarly(available) => {
            StreamError::Wire(WireError::Truncated { what, needed, available })
        }
        ReadExactError::ReadError(error) => error.into(),
    })
}

/// The writing half of a control stream.
#[derive(Debug)]
pub(crate) struct Writer {
    stream: SendStream,
    sequence: u32,
    sending: bool,
}

impl Writer {
    pub(crate) fn new(stream: SendStream) -> Self {
        Self { stream, sequence: 0, sending: false }
    }

    pub(crate) async fn write(&mut self, message: &Message) -> Result<(), StreamError> {
        if self.sending {
            return Err(StreamError::Interrupted);
        }
        let sequence = next_sequence(self.sequence).map_err(StreamError::Refused)?;
        let frame = encode(message, sequence).map_err(StreamError::Refused)?;
        self.sending = true;
        self.stream.write_chunk(frame.into()).await?;
        self.sending = false;
        self.sequence = sequence;
        Ok(())
    }

    /// Ends the stream and waits until the peer's transport has everything.
    pub(crate) async fn finish(&mut self) -> Result<(), StreamError> {
        // An error says that the stream is finished already.
        let _finished = self.stream.finish();
        match self.stream.stopped().await {
            Ok(None) => Ok(()),
            Ok(Some(code)) => Err(StreamError::Cut(code.into_inner())),
            Err(quinn::StoppedError::ConnectionLost(error)) => Err(StreamError::Lost(error)),
            Err(quinn::StoppedError::ZeroRttRejected) => Err(StreamError::Interrupted),
        }
    }
}

/// The reading half of a control stream. A cancelled [`Reader::read`] cannot be continued.
#[derive(Debug)]
pub(crate) struct Reader {
    stream: RecvStream,
    sequence: u32,
}

impl Reader {
    pub(crate) fn new(stream: RecvStream) -> Self {
        Self { stream, sequence: 0 }
    }

    pub(crate) async fn read(&mut self) -> Result<Message, StreamError> {
        let sequence = next_sequence(self.sequence).map_err(StreamError::Wire)?;
        let mut header = [0; CONTROL_HEADER_BYTES];
        read_exact(&mut self.stream, &mut header, "Control frame").await?;
        let header = ControlHeader::parse(&header, sequence).map_err(StreamError::Wire)?;
        // At most the limit of the message's type, which the header was checked against.
        let mut body = vec![0; header.body_bytes()];
        let what = "Body of a control frame";
        read_exact(&mut self.stream, &mut body, what).await.map_err(|error| match error {
            StreamError::Ended => StreamError::Wire(WireError::Truncated {
                what,
                needed: header.body_bytes(),
                available: 0,
            }),
            other => other,
        })?;
        let message = header.decode(&body).map_err(StreamError::Wire)?;
        self.sequence = sequence;
        Ok(message)
    }
}

/// Sends control messages; clones send on the same stream, one message at a time.
#[derive(Debug, Clone)]
pub struct ControlSender {
    writer: Arc<Mutex<Writer>>,
    closer: Closer,
}

impl ControlSender {
    pub(crate) fn new(writer: Writer, closer: Closer) -> Self {
        Self { writer: Arc::new(Mutex::new(writer)), closer }
    }

    /// Sends a message: it is in the send buffer when this returns, not yet at the peer.
    ///
    /// # Errors
    /// [`TransportError::Refused`] for a message that breaks a rule, which is not sent and does no
    /// harm; else the session is lost.
    pub async fn send(&self, message: &Message) -> Result<(), TransportError> {
        let sent = self.writer.lock().await.write(message).await;
        match sent {
            Ok(()) => Ok(()),
            Err(error) => Err(self.closer.stream_error(error, PLACE).await),
        }
    }

    /// Ends this direction and waits, at most `within`, until the peer's transport has everything
    /// that was sent. To be called before the session is closed, which discards what is under way.
    ///
    /// # Errors
    /// The session was lost before, or `within` has passed.
    pub async fn finish(&self, within: Duration) -> Result<(), TransportError> {
        let finished = async { self.writer.lock().await.finish().await };
        match tokio::time::timeout(within, finished).await {
            Ok(finished) => finished.map_err(|error| error.of_session(&self.closer, PLACE)),
            Err(_elapsed) => {
                Err(TransportError::NotAcknowledged { peer: self.closer.peer(), within })
            }
        }
    }
}

/// Which of two receivers a message is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum For {
    /// The first.
    First,
    /// The second.
    Second,
    /// Both of them.
    Both,
}

/// Receives control messages.
#[derive(Debug)]
pub struct ControlReceiver {
    queue: mpsc::Receiver<Result<Message, TransportError>>,
    /// What came and was not taken yet.
    ahead: Option<Result<Message, TransportError>>,
    closer: Closer,
    /// What reads the stream; nothing of one that is a part.
    task: Option<JoinHandle<()>>,
}

impl ControlReceiver {
    pub(crate) fn new(mut reader: Reader, closer: Closer) -> Self {
        let (sender, queue) = mpsc::channel(QUEUE_MESSAGES_MAX);
        let session = closer.clone();
        let task = tokio::spawn(async move {
            loop {
                let read = reader.read().await;
                let read = read.map_err(|error| error.of_session(&session, PLACE));
                let ends = read.is_err();
                if sender.send(read).await.is_err() || ends {
                    return;
                }
            }
        });
        Self { queue, ahead: None, closer, task: Some(task) }
    }

    /// Two receivers in its place, each with its part of the messages. The end is for both, its reason as it was noticed
    /// for the first. One that is dropped misses what is for it; one that takes nothing holds the other up in the end.
    #[must_use]
    pub fn sorted(self, which: impl Fn(&Message) -> For + Send + 'static) -> (Self, Self) {
        let [(first, queue), (second, other)] = [(); 2].map(|()| mpsc::channel(QUEUE_MESSAGES_MAX));
        let (closer, mut whole) = (self.closer.clone(), self);
        let (to_first, to_second) = (first.clone(), second.clone());
        let unheard = async move { tokio::join!(to_first.closed(), to_second.closed()) };
        let sorting = async move {
            loop {
                let read = whole.recv().await;
                let (is_over, which) = match &read {
                    Ok(message) => (false, which(message)),
                    Err(_) => (true, For::First),
                };
                if which == For::Both
                    && let Ok(message) = &read
                {
                    let _missed = second.send(Ok(message.clone())).await;
                }
                let to = if which == For::Second { &second } else { &first };
                let _missed = to.send(read).await;
                if is_over {
                    return;
                }
            }
        };
        tokio::spawn(async move {
            tokio::select! {
                () = sorting => {}
                _ = unheard => {}
            }
        });
        let part = |queue| Self { queue, ahead: None, closer: closer.clone(), task: None };
        (part(queue), part(other))
    }

    /// Waits until there is a message, which stays there; false if there will be none. May be cancelled.
    pub async fn has_more(&mut self) -> bool {
        if self.ahead.is_none() {
            self.ahead = self.queue.recv().await;
        }
        matches!(self.ahead, Some(Ok(_)))
    }

    /// The next message. May be cancelled: no message is lost.
    ///
    /// # Errors
    /// Why there are no more; [`TransportError::Ended`] where the peer just has no more to say.
    pub async fn recv(&mut self) -> Result<Message, TransportError> {
        let message = match self.ahead.take() {
            Some(message) => Some(message),
            None => self.queue.recv().await,
        };
        match message {
            Some(message) => message,
            // The reason was handed out before.
            None => Err(self
                .closer
                .close_reason()
                .unwrap_or(TransportError::Ended { peer: self.closer.peer() })),
        }
    }
}

impl Drop for ControlReceiver {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}
