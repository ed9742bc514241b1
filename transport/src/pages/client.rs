//! The end of a page channel that asks.
//!
//! It belongs to one thread. Requests may be sent before earlier ones are answered; while the server
//! reads nothing since its answers are not taken, [`PageClient::send`] takes them in, so neither waits
//! for the other for ever.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::due::Due;
use super::{PLACE, PageAnswer, PageRequest, wire};
use crate::control::StreamError;
use crate::error::{TransportError, WireError};
use crate::identity::{Identity, certified_name};
use crate::options::Options;
use crate::tcp::{self, Pipe, TcpHandle};
use crate::tls;

/// How long [`PageClient::call`] waits for an answer: 30 s unless the options say otherwise. Deleting a
/// large store takes a while.
pub fn call_wait(options: &Options) -> Duration {
    options.dead_peer * 6
}

/// Cuts a page channel from another thread.
#[derive(Debug, Clone)]
pub struct PageStop {
    handle: Arc<TcpHandle>,
    stopped: Arc<AtomicBool>,
}

impl PageStop {
    pub(super) fn new(handle: Arc<TcpHandle>, stopped: &Arc<AtomicBool>) -> Self {
        Self { handle, stopped: Arc::clone(stopped) }
    }

    /// Cuts the connection. Whoever waits to send or receive finds that it has ended.
    pub fn cut(&self) {
        self.stopped.store(true, Ordering::Release);
        self.handle.close();
    }
}

/// A connection to a memory server.
#[derive(Debug)]
pub struct PageClient {
    pipe: Pipe,
    addr: SocketAddr,
    peer: String,
    /// Of the last request.
    tag: u32,
    due: Due,
    call_wait: Duration,
    stopped: Arc<AtomicBool>,
}

impl PageClient {
    /// Connects to the memory server at `addr`, whose certificate must carry `expected_peer` if that is
    /// given, and any name of the authority else. Blocks for twice the options' handshake timeout at
    /// most.
    ///
    /// # Errors
    /// What is wrong at this end, at the other, or between them;
    /// [`TransportError::PagesRefused`] if the server takes no more connections, or none of this host.
    pub fn connect(
        addr: SocketAddr,
        identity: &Identity,
        expected_peer: Option<&str>,
        options: &Options,
    ) -> Result<Self, TransportError> {
        let options =
            Options { expected_peer: expected_peer.map(str::to_owned), ..options.clone() };
        options.check()?;
        let tls = tls::pages_client(identity, expected_peer).map_err(TransportError::Identity)?;
        let (pipe, certificate) = tcp::connect(addr, &tls, expected_peer, &options)?;
        let Some(peer) = certificate.as_ref().and_then(certified_name) else {
            return Err(TransportError::Unexpected {
                peer: addr,
                expected: "a certificate with a host name",
                found: "one without".into(),
            });
        };
        let stopped = Arc::default();
        let (due, call_wait) = (Due::default(), call_wait(&options));
        let mut client = Self { pipe, addr, peer, tag: 0, due, call_wait, stopped };
        // The server's first word shows that it took this host's certificate.
        match client.first_answer(options.handshake_timeout)? {
            PageAnswer::Done { tag: 0 } => Ok(client),
            PageAnswer::Failed { tag: 0, error } => {
                Err(TransportError::PagesRefused { peer: addr, source: error })
            }
            other => Err(TransportError::Unexpected {
                peer: addr,
                expected: "a welcome",
                found: format!("an answer to request {}", other.tag()),
            }),
        }
    }

    /// The server's name by its certificate.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The server's address.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Bytes sent and received so far, beneath TLS.
    pub fn bytes(&self) -> (u64, u64) {
        self.pipe.handle().bytes()
    }

    /// Ends the connection from elsewhere.
    pub fn stop(&self) -> PageStop {
        PageStop::new(self.pipe.handle(), &self.stopped)
    }

    /// How many requests are not answered.
    pub fn under_way(&self) -> usize {
        self.due.len()
    }

    /// Whether there is room for a request's answers beside those that are under way.
    pub fn has_room(&self, request: &PageRequest) -> bool {
        self.due.has_room(request)
    }

    /// Sends a request and returns the tag that its answers will have. Blocks while the server takes
    /// nothing. What comes meanwhile is kept: call [`Self::receive`] before waiting for the descriptor
    /// if [`Self::has_answers`].
    ///
    /// # Errors
    /// [`TransportError::PagesUnderWay`] and [`TransportError::Refused`] say that nothing was sent;
    /// after any other the connection is over.
    pub fn send(&mut self, request: &PageRequest) -> Result<u32, TransportError> {
        if !self.due.has_room(request) {
            let requests = self.due.len();
            return Err(TransportError::PagesUnderWay { peer: self.addr, requests });
        }
        let tag = self.tag.wrapping_add(1);
        let pieces = wire::encode_request(request, tag).map_err(TransportError::Refused)?;
        self.pipe.write_and_read(&pieces).map_err(|error| self.fail(error))?;
        self.tag = tag;
        self.due.add(tag, request);
        Ok(tag)
    }

    /// Whether a complete answer has come that was not taken yet, or one that breaks a rule; the
    /// descriptor does not show them.
    pub fn has_answers(&mut self) -> bool {
        wire::is_complete(self.pipe.received())
    }

    /// Takes in what has come, and adds the answers that are complete to `answers`: in the order of their
    /// requests, the pieces of an answer in the order of its pages. Blocks if nothing has come: to be
    /// called when the descriptor is readable. May add nothing.
    ///
    /// # Errors
    /// [`TransportError::Ended`] if the connection was ended, else why it is over.
    pub fn receive(&mut self, answers: &mut Vec<PageAnswer>) -> Result<(), TransportError> {
        let before = answers.len();
        self.take(answers)?;
        if answers.len() == before {
            self.pipe.read().map_err(|error| self.fail(error))?;
            self.take(answers)?;
        }
        Ok(())
    }

    /// As [`Self::receive`], but never blocks: what has not come is left for later, also the rest of an
    /// answer that has begun.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub fn receive_ready(&mut self, answers: &mut Vec<PageAnswer>) -> Result<(), TransportError> {
        let before = answers.len();
        self.take(answers)?;
        if answers.len() == before {
            self.pipe.read_ready().map_err(|error| self.fail(error))?;
            self.take(answers)?;
        }
        Ok(())
    }

    /// Sends a request and waits for all of its answer, [`call_wait`] at most. The pieces of a `Get`
    /// are joined into one.
    ///
    /// # Errors
    /// [`TransportError::PagesUnderWay`] if other requests are not answered yet; else as
    /// [`Self::send`] and [`Self::receive`], and [`TransportError::PagesTimeout`], after which the
    /// connection is over.
    pub fn call(&mut self, request: &PageRequest) -> Result<PageAnswer, TransportError> {
        if self.due.len() > 0 {
            let requests = self.due.len();
            return Err(TransportError::PagesUnderWay { peer: self.addr, requests });
        }
        self.send(request)?;
        let deadline = Instant::now() + self.call_wait;
        let mut answers = vec![];
        self.take(&mut answers)?;
        while answers.last().is_none_or(|answer| !answer.is_last()) {
            self.wait_until(deadline, self.call_wait, "The answer")?;
            self.receive(&mut answers)?;
        }
        answers.into_iter().reduce(joined).ok_or(TransportError::Ended { peer: self.addr })
    }

    /// As [`Self::receive`], but waits [`call_wait`] at most.
    ///
    /// # Errors
    /// As [`Self::receive`], and [`TransportError::PagesTimeout`], after which the connection is over.
    pub fn receive_in_time(&mut self, answers: &mut Vec<PageAnswer>) -> Result<(), TransportError> {
        if !self.has_answers() {
            self.wait_until(Instant::now() + self.call_wait, self.call_wait, "The answer")?;
        }
        self.receive(answers)
    }

    /// The server's first word.
    fn first_answer(&mut self, within: Duration) -> Result<PageAnswer, TransportError> {
        let deadline = Instant::now() + within;
        loop {
            let decoded = wire::decode_answer(self.pipe.received());
            if let Some(answer) = decoded.map_err(|error| self.fail(StreamError::Wire(error)))? {
                return Ok(answer);
            }
            self.wait_until(deadline, within, "The welcome")?;
            self.pipe.read().map_err(|error| self.fail(error))?;
        }
    }

    /// Waits until something has come.
    fn wait_until(
        &mut self,
        deadline: Instant,
        within: Duration,
        what: &'static str,
    ) -> Result<(), TransportError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.pipe.handle().close();
                return Err(TransportError::PagesTimeout { peer: self.addr, what, within });
            }
            let ready = self.pipe.wait(PollFlags::IN, Some(left));
            if !ready.map_err(|error| self.fail(error))?.is_empty() {
                return Ok(());
            }
        }
    }

    /// The answers of what was read.
    fn take(&mut self, answers: &mut Vec<PageAnswer>) -> Result<(), TransportError> {
        let mut next = || -> Result<Option<PageAnswer>, WireError> {
            let answer = wire::decode_answer(self.pipe.received())?;
            answer.iter().try_for_each(|answer| self.due.check(answer))?;
            Ok(answer)
        };
        loop {
            match next() {
                Ok(Some(answer)) => answers.push(answer),
                Ok(None) => return Ok(()),
                Err(error) => return Err(self.fail(StreamError::Wire(error))),
            }
        }
    }

    /// The connection is over.
    fn fail(&self, error: StreamError) -> TransportError {
        fail(error, self.addr, &self.pipe.handle(), &self.stopped)
    }
}

/// What ended a connection, which is cut.
pub(super) fn fail(
    error: StreamError,
    peer: SocketAddr,
    handle: &TcpHandle,
    stopped: &AtomicBool,
) -> TransportError {
    // What the peer breaks is told by its end alone: after a cut nothing more is read.
    let was_stopped = stopped.load(Ordering::Acquire);
    if !matches!(error, StreamError::Ended) {
        handle.close();
    }
    match error {
        StreamError::Wire(source) => TransportError::Wire { peer, place: PLACE.into(), source },
        StreamError::Refused(source) => TransportError::Refused(source),
        StreamError::Broken(source) if !was_stopped => {
            tcp::alert(peer, &source).unwrap_or(TransportError::PagesBroken { peer, source })
        }
        _ => TransportError::Ended { peer },
    }
}

/// Two pieces of an answer as one.
fn joined(first: PageAnswer, second: PageAnswer) -> PageAnswer {
    match (first, second) {
        (
            PageAnswer::Pages { tag, mut extents, contents, packed, .. },
            PageAnswer::Pages { extents: more, contents: rest, last, .. },
        ) => {
            extents.extend(more);
            let contents = [contents, rest].concat().into();
            PageAnswer::Pages { tag, extents, contents, packed, last }
        }
        (_, second) => second,
    }
}

/// The connection, for poll(2).
impl AsFd for PageClient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}
