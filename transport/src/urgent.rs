//! The lane of pages that a guest waits for, over TCP: requests go one way, batches the other.
//!
//! ```text
//!  destination                               source
//!  UrgentReceiver::ask ───── Request ──────► UrgentSender::requested
//!  UrgentReceiver::receive ◄──── Batch ───── UrgentSender::send
//! ```
//!
//! A fault costs the guest a round trip, and on a fast network most of that is threads waking
//! each other. So each end belongs to one thread, which blocks; there is no task between it and the
//! socket. A lane becomes such a pair of ends when both sides take it so, before a batch was sent on it.
//! A request is a control frame, numbered by itself.
//!
//! Either end may drop its own, and the other finds that the lane has ended. Any error ends the
//! session: who serves a guest's faults goes on in another.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Buf;
use migrate_core::layout::PageIndex;

use crate::closer::Closer;
use crate::control::StreamError;
use crate::error::{TransportError, WireError, close_code};
use crate::lane::place;
use crate::lane_wire::{self, Batch, encode_head};
use crate::messages::{Message, Request};
use crate::tcp::{Pipe, TcpHandle};
use crate::wire::{self, next_sequence};

/// Ends an urgent lane from another thread.
#[derive(Debug, Clone)]
pub struct UrgentStop {
    handle: Arc<TcpHandle>,
    stopped: Arc<AtomicBool>,
}

impl UrgentStop {
    /// Lets go who waits for something to come; that one finds that the lane has ended.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.handle.stop_reading();
    }

    /// Cuts the connection, also for who waits to send.
    pub fn cut(&self) {
        self.stopped.store(true, Ordering::Release);
        self.handle.close();
    }
}

/// What both ends have.
#[derive(Debug)]
struct End {
    pipe: Pipe,
    index: usize,
    /// Batches so far.
    batches: u64,
    /// Requests so far.
    requests: u32,
    /// Whether this end was told to end.
    stopped: Arc<AtomicBool>,
    closer: Closer,
}

impl End {
    fn new(pipe: Pipe, index: usize, closer: Closer) -> Box<Self> {
        let stopped = Arc::default();
        Box::new(Self { pipe, index, batches: 0, requests: 0, stopped, closer })
    }

    fn stop(&self) -> UrgentStop {
        UrgentStop { handle: self.pipe.handle(), stopped: Arc::clone(&self.stopped) }
    }

    /// The session is over, and the first reason counts, unless one end just ended the lane.
    fn fail(&self, error: StreamError) -> TransportError {
        let peer = self.closer.peer();
        if let StreamError::Broken(_) | StreamError::Ended = &error {
            if let Some(why) = self.closer.close_reason() {
                return why;
            }
            if self.stopped.load(Ordering::Acquire) || matches!(error, StreamError::Ended) {
                return TransportError::Ended { peer };
            }
        }
        let error = error.of_session(&self.closer, &place(self.index));
        self.closer.close_now(close_code::INTERNAL, &error.to_string());
        error
    }
}

/// The source's end.
#[derive(Debug)]
pub struct UrgentSender(Box<End>);

impl UrgentSender {
    pub(crate) fn new(pipe: Pipe, index: usize, closer: Closer) -> Self {
        Self(End::new(pipe, index, closer))
    }

    /// Ends the lane from elsewhere.
    pub fn stop(&self) -> UrgentStop {
        self.0.stop()
    }

    /// Waits for the next page that the destination asks for. Blocks.
    ///
    /// # Errors
    /// Why there will be none: [`TransportError::Ended`] if the lane was ended, else the session is over.
    pub fn requested(&mut self) -> Result<PageIndex, TransportError> {
        loop {
            if let Some(page) = self.received_request()? {
                return Ok(page);
            }
            self.0.pipe.read().map_err(|error| self.0.fail(error))?;
        }
    }

    /// The next page that the destination has asked for, if it has. Does not block.
    ///
    /// # Errors
    /// As [`Self::requested`].
    pub fn requested_already(&mut self) -> Result<Option<PageIndex>, TransportError> {
        if let Some(page) = self.received_request()? {
            return Ok(Some(page));
        }
        if self.0.pipe.is_readable() {
            self.0.pipe.read().map_err(|error| self.0.fail(error))?;
        }
        self.received_request()
    }

    /// The next request of what was read.
    fn received_request(&mut self) -> Result<Option<PageIndex>, TransportError> {
        match self.decode_request().map_err(|error| self.0.fail(error))? {
            None => Ok(None),
            Some(Message::Request(request)) => Ok(Some(PageIndex(request.page))),
            Some(other) => {
                let (peer, found) = (self.0.closer.peer(), other.name().into());
                let error = TransportError::Unexpected { peer, expected: "Request", found };
                self.0.closer.close_now(close_code::PROTOCOL, &error.to_string());
                Err(error)
            }
        }
    }

    fn decode_request(&mut self) -> Result<Option<Message>, StreamError> {
        let End { pipe, requests, .. } = &mut *self.0;
        let next = next_sequence(*requests).map_err(StreamError::Wire)?;
        let Some((message, bytes)) = complete(wire::decode(pipe.received(), next))? else {
            return Ok(None);
        };
        pipe.received().advance(bytes);
        *requests = next;
        Ok(Some(message))
    }

    /// Sends a batch. Blocks while the peer does not read.
    ///
    /// # Errors
    /// [`TransportError::Refused`] for a batch that breaks a rule; the session is over.
    pub fn send(&mut self, batch: Batch) -> Result<(), TransportError> {
        self.write(batch).map_err(|error| self.0.fail(error))
    }

    fn write(&mut self, batch: Batch) -> Result<(), StreamError> {
        let End { pipe, batches, .. } = &mut *self.0;
        *batches = batches.wrapping_add(1);
        let head = encode_head(&batch, *batches).map_err(StreamError::Refused)?;
        let mut pieces = batch.payload.into_pieces();
        pieces.insert(0, head);
        pipe.write(&pieces).map_err(StreamError::Broken)
    }
}

/// The destination's end.
#[derive(Debug)]
pub struct UrgentReceiver(Box<End>);

impl UrgentReceiver {
    pub(crate) fn new(pipe: Pipe, index: usize, closer: Closer) -> Self {
        Self(End::new(pipe, index, closer))
    }

    /// Ends the lane from elsewhere.
    pub fn stop(&self) -> UrgentStop {
        self.0.stop()
    }

    /// Which of the session's lanes this is.
    pub fn index(&self) -> usize {
        self.0.index
    }

    /// Asks for a page. Blocks while the peer does not read.
    ///
    /// # Errors
    /// The session is over.
    pub fn ask(&mut self, page: PageIndex) -> Result<(), TransportError> {
        self.write_request(page).map_err(|error| self.0.fail(error))
    }

    fn write_request(&mut self, page: PageIndex) -> Result<(), StreamError> {
        let End { pipe, requests, .. } = &mut *self.0;
        *requests = next_sequence(*requests).map_err(StreamError::Refused)?;
        let request = Message::Request(Request { page: page.0 });
        let frame = wire::encode(&request, *requests).map_err(StreamError::Refused)?;
        pipe.write(&[frame]).map_err(StreamError::Broken)
    }

    /// Takes in what has come and adds the batches that are complete to `batches`. Blocks if nothing
    /// has come: to be called when the descriptor is readable.
    ///
    /// # Errors
    /// [`TransportError::Ended`] if the lane was ended, else the session is over.
    pub fn receive(&mut self, batches: &mut Vec<Batch>) -> Result<(), TransportError> {
        self.read_batches(batches).map_err(|error| self.0.fail(error))
    }

    fn read_batches(&mut self, batches: &mut Vec<Batch>) -> Result<(), StreamError> {
        let End { pipe, batches: count, .. } = &mut *self.0;
        pipe.read()?;
        loop {
            let next = count.wrapping_add(1);
            let Some((batch, bytes)) = complete(lane_wire::decode(pipe.received(), next))? else {
                return Ok(());
            };
            pipe.received().advance(bytes);
            *count = next;
            batches.push(batch);
        }
    }
}

/// What was decoded, or nothing as long as there is too little.
fn complete<T>(decoded: Result<T, WireError>) -> Result<Option<T>, StreamError> {
    match decoded {
        Ok(decoded) => Ok(Some(decoded)),
        Err(WireError::Truncated { .. }) => Ok(None),
        Err(error) => Err(StreamError::Wire(error)),
    }
}

/// The connection, for poll(2).
impl AsFd for UrgentReceiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.pipe.as_fd()
    }
}

#[cfg(test)]
mod tests;
