//! Lanes: batches of pages, from the client to the server.
//!
//! Neither [`LaneSender::send`] nor [`LaneReceiver::recv`] may be cancelled and continued: half a
//! batch would be under way. Each lane belongs into a task of its own.

use quinn::{RecvStream, SendStream};

use crate::closer::Closer;
use crate::control::{StreamError, read_exact};
use crate::error::{TransportError, WireError};
use crate::lane_wire::{Batch, LANE_HEADER_BYTES, LaneHeader, encode_head};
use crate::payload::{Collector, Payload};

/// Sends batches on a lane.
#[derive(Debug)]
pub struct LaneSender {
    stream: SendStream,
    index: usize,
    sequence: u64,
    sending: bool,
    closer: Closer,
}

impl LaneSender {
    pub(crate) fn new(stream: SendStream, index: usize, closer: Closer) -> Self {
        Self { stream, index, sequence: 0, sending: false, closer }
    }

    /// Which of the session's lanes this is, from 0 on.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Batches sent so far.
    pub fn batches(&self) -> u64 {
        self.sequence
    }

    /// Sends a batch. Waits while the peer does not read; when it returns, the batch is in the
    /// send buffer, not yet at the peer.
    ///
    /// # Errors
    /// [`TransportError::Refused`] for a batch that breaks a rule, which is not sent and does no
    /// harm; else the session is lost.
    pub async fn send(&mut self, batch: Batch) -> Result<(), TransportError> {
        let sent = self.write(batch).await;
        sent.map_err(|error| error.of_session(&self.closer, &place(self.index)))
    }

    async fn write(&mut self, batch: Batch) -> Result<(), StreamError> {
        if self.sending {
            return Err(StreamError::Interrupted);
        }
        let sequence = self.sequence.wrapping_add(1);
        let head = encode_head(&batch, sequence).map_err(StreamError::Refused)?;
        self.sending = true;
        let mut pieces = batch.payload.into_pieces();
        pieces.insert(0, head);
        self.stream.write_all_chunks(&mut pieces).await?;
        self.sending = false;
        self.sequence = sequence;
        Ok(())
    }

    /// Ends the lane and waits until the peer's transport has everything that was sent.
    ///
    /// # Errors
    /// The session was lost before.
    pub async fn finish(mut self) -> Result<(), TransportError> {
        let finished = async {
            if self.sending {
                return Err(StreamError::Interrupted);
            }
            // An error says that the stream is finished already.
            let _finished = self.stream.finish();
            match self.stream.stopped().await {
                Ok(None) => Ok(()),
                Ok(Some(code)) => Err(StreamError::Cut(code.into_inner())),
                Err(quinn::StoppedError::ConnectionLost(error)) => Err(StreamError::Lost(error)),
                Err(quinn::StoppedError::ZeroRttRejected) => Err(StreamError::Interrupted),
            }
        };
        finished.await.map_err(|error| error.of_session(&self.closer, &place(self.index)))
    }
}

/// Receives batches from a lane.
#[derive(Debug)]
pub struct LaneReceiver {
    stream: RecvStream,
    index: usize,
    sequence: u64,
    receiving: bool,
    closer: Closer,
}

impl LaneReceiver {
    pub(crate) fn new(stream: RecvStream, index: usize, closer: Closer) -> Self {
        Self { stream, index, sequence: 0, receiving: false, closer }
    }

    /// Which of the session's lanes this is, from 0 on.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Batches received so far.
    pub fn batches(&self) -> u64 {
        self.sequence
    }

    /// The next batch, or nothing when the peer has ended the lane between two batches. That all
    /// batches came is proved by [`Sync`](crate::messages::Sync) alone.
    ///
    /// # Errors
    /// The session is lost, for the peer's fault or for others'.
    pub async fn recv(&mut self) -> Result<Option<Batch>, TransportError> {
        match self.read().await {
            Ok(batch) => Ok(Some(batch)),
            Err(StreamError::Ended) => Ok(None),
            Err(error) => Err(error.of_session(&self.closer, &place(self.index))),
        }
    }

    async fn read(&mut self) -> Result<Batch, StreamError> {
        if self.receiving {
            return Err(StreamError::Interrupted);
        }
        self.receiving = true;
        let sequence = self.sequence.wrapping_add(1);
        let mut header = [0; LANE_HEADER_BYTES];
        let greeted = read_exact(&mut self.stream, &mut header, "Batch").await;
        if matches!(greeted, Err(StreamError::Ended)) {
            self.receiving = false;
        }
        greeted?;
        let header = LaneHeader::parse(&header, sequence).map_err(StreamError::Wire)?;
        let runs = read_bytes(&mut self.stream, header.run_bytes(), "Runs of a batch").await?;
        let runs = header.parse_runs(&runs.to_vec()).map_err(StreamError::Wire)?;
        let bytes = header.payload_bytes();
        let payload = read_bytes(&mut self.stream, bytes, "Payload of a batch").await?;
        self.sequence = sequence;
        self.receiving = false;
        Ok(header.batch(runs, payload))
    }
}

/// What errors call a lane.
pub(crate) fn place(index: usize) -> String {
    format!("lane {index}")
}

/// Reads `needed` bytes, which were checked against a limit, without copying them.
async fn read_bytes(
    stream: &mut RecvStream,
    needed: usize,
    what: &'static str,
) -> Result<Payload, StreamError> {
    let mut bytes = Collector::default();
    while bytes.len() < needed {
        let available = bytes.len();
        let Some(chunk) = stream.read_chunk(needed - available, true).await? else {
            return Err(StreamError::Wire(WireError::Truncated { what, needed, available }));
        };
        bytes.push(chunk.bytes);
    }
    Ok(bytes.finish())
}
