//! Lanes: batches of pages, from the client to the server.
//!
//! ```text
//! QUIC only   ── batches ──► end
//! TCP only    ── batches ──► end
//! both        ── batches on QUIC ──► end of its stream ── batches on TCP ──► end
//! ```
//!
//! A lane that has both goes over at a batch's end, once, when its sender decides so; the
//! sequence of its batches goes on, and so does its Zstandard stream.
//!
//! Neither [`LaneSender::send`] nor [`LaneReceiver::recv`] may be cancelled and continued: half a
//! batch would be under way. Each lane belongs into a task of its own.

use std::io;

use crate::closer::Closer;
use crate::control::StreamError;
use crate::error::TransportError;
use crate::lane_stream::{Inlet, Outlet};
use crate::lane_wire::{Batch, LANE_HEADER_BYTES, LaneHeader, encode_head};
use crate::tcp::{TcpIn, TcpOut};
use crate::urgent::{UrgentReceiver, UrgentSender};

/// Sends batches on a lane.
#[derive(Debug)]
pub struct LaneSender {
    stream: Outlet,
    /// What the lane may go on over.
    next: Option<Box<TcpOut>>,
    index: usize,
    sequence: u64,
    sending: bool,
    closer: Closer,
}

impl LaneSender {
    pub(crate) fn new(
        stream: Outlet,
        next: Option<Box<TcpOut>>,
        index: usize,
        closer: Closer,
    ) -> Self {
        Self { stream, next, index, sequence: 0, sending: false, closer }
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
        match self.write(batch).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.closer.stream_error(error, &place(self.index)).await),
        }
    }

    async fn write(&mut self, batch: Batch) -> Result<(), StreamError> {
        if self.sending {
            return Err(StreamError::Interrupted);
        }
        let sequence = self.sequence.wrapping_add(1);
        let head = encode_head(&batch, sequence).map_err(StreamError::Refused)?;
        if self.next.is_some() && self.closer.is_fast() {
            self.go_over();
        }
        self.sending = true;
        let mut pieces = batch.payload.into_pieces();
        pieces.insert(0, head);
        self.stream.write_all(pieces, &self.closer).await?;
        self.sending = false;
        self.sequence = sequence;
        Ok(())
    }

    /// Leaves QUIC for TCP, if that still works.
    fn go_over(&mut self) {
        let Some(next) = self.next.take_if(|next| next.is_open()) else {
            return;
        };
        // Its end tells the peer to read on over TCP; dropping it does not take that back.
        if let Outlet::Quic(stream) = &mut self.stream {
            let _finished = stream.finish();
        }
        self.stream = Outlet::Tcp(next);
        self.closer.went_over();
    }

    /// Whether it has a TCP connection.
    pub fn has_tcp(&self) -> bool {
        self.next.is_some() || matches!(self.stream, Outlet::Tcp(_))
    }

    /// Makes this the lane of what the destination asks for. To be called before anything was sent, in
    /// a session whose other end does the same.
    ///
    /// # Errors
    /// [`TransportError::LaneKind`] if it has no TCP connection, or [`TransportError::LaneBroken`] if
    /// that has ended meanwhile.
    pub fn into_urgent(self) -> Result<UrgentSender, TransportError> {
        let Self { stream, next, index, closer, .. } = self;
        let (peer, place) = (closer.peer(), place(index));
        let tcp = match (stream, next) {
            (_, Some(tcp)) | (Outlet::Tcp(tcp), None) => tcp,
            (Outlet::Quic(_), None) => return Err(TransportError::LaneKind { peer }),
        };
        let pipe = match tcp.is_open() {
            true => tcp.into_pipe(),
            false => Err(io::ErrorKind::NotConnected.into()),
        };
        let pipe = pipe.map_err(|source| TransportError::LaneBroken { peer, place, source })?;
        Ok(UrgentSender::new(pipe, index, closer))
    }

    /// Ends the lane and waits until the peer has everything that was sent: its transport, or, over
    /// TCP, the reader of the lane.
    ///
    /// # Errors
    /// The session was lost before.
    pub async fn finish(mut self) -> Result<(), TransportError> {
        match self.end().await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.closer.stream_error(error, &place(self.index)).await),
        }
    }

    async fn end(&mut self) -> Result<(), StreamError> {
        if self.sending {
            return Err(StreamError::Interrupted);
        }
        self.stream.finish(&self.closer).await?;
        match self.next.take() {
            Some(next) => Outlet::Tcp(next).finish(&self.closer).await,
            None => Ok(()),
        }
    }
}

/// Receives batches from a lane.
#[derive(Debug)]
pub struct LaneReceiver {
    stream: Inlet,
    /// What the lane goes on over.
    next: Option<Box<TcpIn>>,
    index: usize,
    sequence: u64,
    receiving: bool,
    closer: Closer,
}

impl LaneReceiver {
    pub(crate) fn new(
        stream: Inlet,
        next: Option<Box<TcpIn>>,
        index: usize,
        closer: Closer,
    ) -> Self {
        Self { stream, next, index, sequence: 0, receiving: false, closer }
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
            Err(StreamError::Ended) => {
                self.stream.answer_end().await;
                Ok(None)
            }
            Err(error) => {
                self.stream.abandon();
                Err(self.closer.stream_error(error, &place(self.index)).await)
            }
        }
    }

    async fn read(&mut self) -> Result<Batch, StreamError> {
        if self.receiving {
            return Err(StreamError::Interrupted);
        }
        self.receiving = true;
        let sequence = self.sequence.wrapping_add(1);
        let mut header = [0; LANE_HEADER_BYTES];
        self.read_header(&mut header).await?;
        let header = LaneHeader::parse(&header, sequence).map_err(StreamError::Wire)?;
        let (stream, closer) = (&mut self.stream, &self.closer);
        let runs = stream.read_bytes(header.run_bytes(), "Runs of a batch", closer).await?;
        let runs = header.parse_runs(&runs.to_vec()).map_err(StreamError::Wire)?;
        let bytes = header.payload_bytes();
        let payload = stream.read_bytes(bytes, "Payload of a batch", closer).await?;
        self.sequence = sequence;
        self.receiving = false;
        Ok(header.batch(runs, payload))
    }

    /// Whether it has a TCP connection.
    pub fn has_tcp(&self) -> bool {
        self.next.is_some() || matches!(self.stream, Inlet::Tcp(_))
    }

    /// Makes this the lane of what the source is asked for. A [`Self::recv`] that waited for the first
    /// batch may have been cancelled.
    ///
    /// # Errors
    /// [`TransportError::LaneKind`] if it has no TCP connection, [`TransportError::LaneBroken`] if that
    /// has ended meanwhile, or [`TransportError::Interrupted`] if batches came already.
    pub fn into_urgent(self) -> Result<UrgentReceiver, TransportError> {
        let Self { stream, next, index, sequence, closer, .. } = self;
        let (peer, place) = (closer.peer(), place(index));
        if sequence > 0 {
            return Err(TransportError::Interrupted { place });
        }
        let tcp = match (stream, next) {
            (_, Some(tcp)) | (Inlet::Tcp(tcp), None) => tcp,
            (Inlet::Quic(_), None) => return Err(TransportError::LaneKind { peer }),
        };
        let pipe = tcp.into_pipe();
        let pipe = pipe.map_err(|source| TransportError::LaneBroken { peer, place, source })?;
        Ok(UrgentReceiver::new(pipe, index, closer))
    }

    async fn read_header(
        &mut self,
        header: &mut [u8; LANE_HEADER_BYTES],
    ) -> Result<(), StreamError> {
        loop {
            let read = self.stream.read_exact(header, "Batch", &self.closer).await;
            if !matches!(read, Err(StreamError::Ended)) {
                return read;
            }
            let Some(next) = self.next.take() else {
                self.receiving = false;
                return read;
            };
            self.stream = Inlet::Tcp(next);
        }
    }
}

/// What errors call a lane.
pub(crate) fn place(index: usize) -> String {
    format!("lane {index}")
}
