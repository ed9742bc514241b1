//! The end of a page channel that answers, and accepting connections.
//!
//! ```text
//! PageListener::accept ─► Arriving ─ shake ─► PageServer ─ welcome ─► request, answer, request, ...
//!                            │                    └─────── refuse ─► the end
//!                            └─ dropped: closed without a word
//! ```
//!
//! Accepting takes one thread, and every connection one of its own: nothing that a client does or
//! leaves undone delays another. How many there may be is for the caller to bound.
//!
//! Invariants: a request is handed out when all of it is there and keeps the rules; one that began
//! must be complete within [`frame_wait`], and so must an answer be taken.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use socket2::SockRef;

use super::client::fail;
use super::{PageAnswer, PageRequest, PageStop, StoreError, wire};
use crate::control::StreamError;
use crate::error::{TransportError, WireError};
use crate::identity::{Identity, certified_name};
use crate::options::Options;
use crate::session::PeerInfo;
use crate::tcp::{self, Pipe};
use crate::tls;

/// How long a request may take to come from its first byte on, and an answer to go: 20 s unless the
/// options say otherwise.
pub fn frame_wait(options: &Options) -> Duration {
    options.dead_peer * 4
}

/// Accepts connections on one TCP port.
#[derive(Debug)]
pub struct PageListener {
    socket: Arc<TcpListener>,
    addr: SocketAddr,
    tls: Arc<ServerConfig>,
    options: Options,
    stopped: Arc<AtomicBool>,
}

/// Ends a listener from another thread.
#[derive(Debug, Clone)]
pub struct PageListenerStop {
    socket: Arc<TcpListener>,
    stopped: Arc<AtomicBool>,
}

impl PageListenerStop {
    /// Lets go who waits for a connection; there will be none.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        let _ended_already = SockRef::from(&*self.socket).shutdown(std::net::Shutdown::Both);
    }
}

impl PageListener {
    /// Opens the port; 0 chooses one. Needs no async runtime.
    ///
    /// # Errors
    /// [`TransportError::AddressInUse`] if another process has it, or what else is wrong.
    pub fn bind(
        addr: SocketAddr,
        identity: &Identity,
        options: &Options,
    ) -> Result<Self, TransportError> {
        options.check()?;
        let tls = tls::pages_server(identity).map_err(TransportError::Identity)?;
        let socket = tcp::listen_directly(addr, options)?;
        let addr = socket.local_addr().map_err(|source| TransportError::Socket {
            what: "read the port",
            addr,
            source,
        })?;
        let (socket, stopped) = (Arc::new(socket), Arc::default());
        Ok(Self { socket, addr, tls, options: options.clone(), stopped })
    }

    /// The address that is listened on.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// Ends it from elsewhere.
    pub fn stop(&self) -> PageListenerStop {
        let (socket, stopped) = (Arc::clone(&self.socket), Arc::clone(&self.stopped));
        PageListenerStop { socket, stopped }
    }

    /// Waits for the next connection. Who it is shows [`Arriving::shake`].
    ///
    /// # Errors
    /// [`TransportError::ListenerEnded`] after a stop; else what the kernel lacks, which may pass.
    pub fn accept(&self) -> Result<Arriving, TransportError> {
        let accepted = self.socket.accept();
        if self.stopped.load(Ordering::Acquire) {
            return Err(TransportError::ListenerEnded);
        }
        let failed = |source| TransportError::Socket {
            what: "accept a connection",
            addr: self.addr,
            source,
        };
        let (stream, peer) = accepted.map_err(failed)?;
        Ok(Arriving { stream, peer, tls: Arc::clone(&self.tls), options: self.options.clone() })
    }
}

/// A connection of a client that has not shown who it is. Dropped, it is closed without a word.
#[derive(Debug)]
pub struct Arriving {
    stream: TcpStream,
    peer: SocketAddr,
    tls: Arc<ServerConfig>,
    options: Options,
}

impl Arriving {
    /// The client's address.
    pub fn addr(&self) -> SocketAddr {
        self.peer
    }

    /// Shakes hands, within the options' handshake timeout. Blocks.
    ///
    /// # Errors
    /// The client is no host of the authority, speaks another protocol, or is too slow.
    pub fn shake(self) -> Result<PageServer, TransportError> {
        let Self { stream, peer, tls, options } = self;
        let (pipe, certificate) = tcp::accept(stream, peer, &tls, &options)?;
        PageServer::new(pipe, peer, certificate.as_ref(), frame_wait(&options))
    }
}

/// A connection of a client, to be welcomed or refused first.
#[derive(Debug)]
pub struct PageServer {
    pipe: Pipe,
    peer: PeerInfo,
    /// Of the last request.
    tag: u32,
    frame_wait: Duration,
    stopped: Arc<AtomicBool>,
}

impl PageServer {
    fn new(
        pipe: Pipe,
        addr: SocketAddr,
        certificate: Option<&CertificateDer<'static>>,
        frame_wait: Duration,
    ) -> Result<Self, TransportError> {
        let Some(name) = certificate.and_then(certified_name) else {
            return Err(TransportError::Unexpected {
                peer: addr,
                expected: "a certificate with a host name",
                found: "one without".into(),
            });
        };
        pipe.set_timeouts(Some(frame_wait))
            .map_err(|source| TransportError::PagesBroken { peer: addr, source })?;
        let (peer, stopped) = (PeerInfo { name, addr }, Arc::default());
        Ok(Self { pipe, peer, tag: 0, frame_wait, stopped })
    }

    /// Who asks.
    pub fn peer(&self) -> &PeerInfo {
        &self.peer
    }

    /// Bytes sent and received so far, beneath TLS.
    pub fn bytes(&self) -> (u64, u64) {
        self.pipe.handle().bytes()
    }

    /// Ends the connection from elsewhere.
    pub fn stop(&self) -> PageStop {
        PageStop::new(self.pipe.handle(), &self.stopped)
    }

    /// Tells the client that its requests are taken.
    ///
    /// # Errors
    /// The client is gone.
    pub fn welcome(&mut self) -> Result<(), TransportError> {
        self.answer(&PageAnswer::Done { tag: 0 })
    }

    /// Tells the client why its requests are not taken, and ends the connection.
    ///
    /// # Errors
    /// The client is gone.
    pub fn refuse(mut self, error: StoreError) -> Result<(), TransportError> {
        self.answer(&PageAnswer::Failed { tag: 0, error })
    }

    /// Waits for the next request; returns it with its tag, or nothing when the client has ended the
    /// connection.
    ///
    /// # Errors
    /// Why the connection is over.
    pub fn request(&mut self) -> Result<Option<(u32, PageRequest)>, TransportError> {
        let mut began = None;
        loop {
            match wire::decode_request(self.pipe.received()) {
                Ok(Some((tag, request))) => return self.numbered(tag, request).map(Some),
                Ok(None) => {}
                Err(error) => return Err(self.fail(StreamError::Wire(error))),
            }
            if !self.pipe.received().is_empty() {
                let began = *began.get_or_insert_with(Instant::now);
                if began.elapsed() >= self.frame_wait {
                    return Err(self.too_slow("A request"));
                }
            }
            match self.pipe.read() {
                Ok(()) => {}
                Err(StreamError::Ended) if self.pipe.received().is_empty() => return Ok(None),
                Err(StreamError::Ended) => {
                    let available = self.pipe.received().len();
                    let needed = available.saturating_add(1);
                    let what = "A request";
                    let cut = WireError::Truncated { what, needed, available };
                    return Err(self.fail(StreamError::Wire(cut)));
                }
                // A client may be silent between requests for as long as it likes.
                Err(StreamError::Broken(error)) if is_timeout(&error) => {}
                Err(error) => return Err(self.fail(error)),
            }
        }
    }

    fn numbered(
        &mut self,
        tag: u32,
        request: PageRequest,
    ) -> Result<(u32, PageRequest), TransportError> {
        let expected = self.tag.wrapping_add(1);
        if tag != expected {
            let (expected, found) = (u64::from(expected), u64::from(tag));
            let error = WireError::Sequence { what: "A request", expected, found };
            return Err(self.fail(StreamError::Wire(error)));
        }
        self.tag = tag;
        Ok((tag, request))
    }

    /// Sends an answer; when this returns, the kernel has it. Blocks while the client takes nothing.
    ///
    /// # Errors
    /// [`TransportError::Refused`] for an answer that breaks a rule; the connection is over.
    pub fn answer(&mut self, answer: &PageAnswer) -> Result<(), TransportError> {
        let pieces = wire::encode_answer(answer);
        let pieces = pieces.map_err(|error| self.fail(StreamError::Refused(error)))?;
        match self.pipe.write(&pieces) {
            Err(error) if is_timeout(&error) => Err(self.too_slow("Taking an answer")),
            written => written.map_err(|error| self.fail(StreamError::Broken(error))),
        }
    }

    fn too_slow(&self, what: &'static str) -> TransportError {
        self.pipe.handle().close();
        TransportError::PagesTimeout { peer: self.peer.addr, what, within: self.frame_wait }
    }

    /// The connection is over.
    fn fail(&self, error: StreamError) -> TransportError {
        fail(error, self.peer.addr, &self.pipe.handle(), &self.stopped)
    }
}

/// What a socket says when its timeout has passed.
fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// The connection, for poll(2).
impl AsFd for PageServer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}
