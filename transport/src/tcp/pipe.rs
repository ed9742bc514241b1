//! A connection in the hands of one thread, which may block: what waits for nobody else needs no task.

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::BytesMut;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use rustls::Connection;

use super::{READ_AHEAD_BYTES, TcpHandle, TcpIn, TcpOut};
use crate::control::StreamError;

/// Ready for either.
const BOTH: PollFlags = PollFlags::IN.union(PollFlags::OUT);

/// Both directions of a connection. Blocked calls end when its [`TcpHandle`] closes it.
#[derive(Debug)]
pub(crate) struct Pipe {
    socket: TcpStream,
    tls: Connection,
    handle: Arc<TcpHandle>,
    /// As it came from the socket.
    sealed: Vec<u8>,
    /// What came and was not taken.
    received: BytesMut,
    /// Whether the peer sends no more.
    ended: bool,
}

impl Pipe {
    pub(super) fn new(
        socket: TcpStream,
        tls: Connection,
        handle: Arc<TcpHandle>,
        ahead: &[u8],
    ) -> io::Result<Self> {
        let (sealed, received) = (vec![0; READ_AHEAD_BYTES], BytesMut::new());
        let mut pipe = Self { socket, tls, handle, sealed, received, ended: false };
        pipe.tls.set_buffer_limit(None);
        pipe.open(ahead)?;
        pipe.flush()?;
        Ok(pipe)
    }

    pub(crate) fn handle(&self) -> Arc<TcpHandle> {
        Arc::clone(&self.handle)
    }

    /// Bounds how long one call waits for the socket; one that takes longer fails with `WouldBlock`.
    pub(crate) fn set_timeouts(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket.set_read_timeout(timeout)?;
        self.socket.set_write_timeout(timeout)
    }

    /// What came and was not taken.
    pub(crate) fn received(&mut self) -> &mut BytesMut {
        &mut self.received
    }

    /// Writes all pieces; when this returns, the kernel has them.
    pub(crate) fn write(&mut self, pieces: &[impl AsRef<[u8]>]) -> io::Result<()> {
        self.seal(pieces)?;
        self.flush()
    }

    /// The same, but takes in what comes while the peer reads nothing: it may be waiting for that.
    pub(crate) fn write_and_read(
        &mut self,
        pieces: &[impl AsRef<[u8]>],
    ) -> Result<(), StreamError> {
        self.seal(pieces).map_err(StreamError::Broken)?;
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut WithoutWaiting(&self.socket)) {
                Ok(written) => self.count_sent(written),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let wanted = if self.ended { PollFlags::OUT } else { BOTH };
                    if self.wait(wanted, None)?.intersects(!PollFlags::OUT) && !self.ended {
                        self.take_in()?;
                    }
                }
                Err(error) => return Err(StreamError::Broken(error)),
            }
        }
        Ok(())
    }

    fn seal(&mut self, pieces: &[impl AsRef<[u8]>]) -> io::Result<()> {
        pieces.iter().try_for_each(|piece| self.tls.writer().write_all(piece.as_ref()))
    }

    /// Waits until the socket is ready; empty after `timeout`.
    pub(crate) fn wait(
        &self,
        wanted: PollFlags,
        timeout: Option<Duration>,
    ) -> Result<PollFlags, StreamError> {
        let timeout = timeout.map(Timespec::try_from).transpose();
        let timeout = timeout.map_err(|error| StreamError::Broken(io::Error::other(error)))?;
        let mut fds = [PollFd::new(&self.socket, wanted)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => Ok(fds.iter().fold(PollFlags::empty(), |all, fd| all | fd.revents())),
            Err(Errno::INTR) => Ok(PollFlags::empty()),
            Err(error) => Err(StreamError::Broken(error.into())),
        }
    }

    /// Whether [`Self::read`] would not block.
    pub(crate) fn is_readable(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// Waits until something comes, unless there is something to be read already.
    pub(crate) fn read(&mut self) -> Result<(), StreamError> {
        if self.ended {
            return Err(StreamError::Ended);
        }
        let before = self.received.len();
        self.take_in()?;
        self.flush().map_err(StreamError::Broken)?;
        if self.ended && self.received.len() == before { Err(StreamError::Ended) } else { Ok(()) }
    }

    /// Takes in what has come, if anything has. Never blocks.
    pub(crate) fn read_ready(&mut self) -> Result<(), StreamError> {
        if self.ended {
            return Err(StreamError::Ended);
        }
        if !self.is_readable() {
            return Ok(());
        }
        let before = self.received.len();
        self.take_in()?;
        self.flush_ready().map_err(StreamError::Broken)?;
        if self.ended && self.received.len() == before { Err(StreamError::Ended) } else { Ok(()) }
    }

    /// Reads and decrypts once.
    fn take_in(&mut self) -> Result<(), StreamError> {
        let read = loop {
            match self.socket.read(&mut self.sealed) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read.map_err(StreamError::Broken)?,
            }
        };
        if read == 0 {
            return Err(StreamError::Broken(io::ErrorKind::UnexpectedEof.into()));
        }
        self.handle.meter.received.fetch_add(read as u64, Ordering::Relaxed);
        let sealed = std::mem::take(&mut self.sealed);
        let opened = self.open(sealed.get(..read).unwrap_or_default());
        self.sealed = sealed;
        opened.map_err(StreamError::Broken)
    }

    /// Decrypts, at first also what is with TLS already.
    fn open(&mut self, mut sealed: &[u8]) -> io::Result<()> {
        loop {
            let state = self.tls.process_new_packets().map_err(io::Error::other)?;
            let before = self.received.len();
            self.received.resize(before.saturating_add(state.plaintext_bytes_to_read()), 0);
            let place = self.received.get_mut(before..).unwrap_or_default();
            if !place.is_empty() {
                self.tls.reader().read_exact(place)?;
            }
            self.ended |= state.peer_has_closed();
            if sealed.is_empty() {
                break;
            }
            self.tls.read_tls(&mut sealed)?;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            let written = self.tls.write_tls(&mut self.socket)?;
            self.count_sent(written);
        }
        Ok(())
    }

    /// Writes what the kernel takes at once; the rest goes with the next request.
    fn flush_ready(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut WithoutWaiting(&self.socket)) {
                Ok(written) => self.count_sent(written),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn count_sent(&self, bytes: usize) {
        self.handle.meter.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// Writes what the kernel takes at once, to a socket that would block otherwise.
struct WithoutWaiting<'a>(&'a TcpStream);

impl Write for WithoutWaiting<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let mut nothing_else = SendAncillaryBuffer::default();
        Ok(sendmsg(self.0, slices, &mut nothing_else, flags)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Says that nothing more comes, if that can be said without waiting.
impl Drop for Pipe {
    fn drop(&mut self) {
        self.tls.send_close_notify();
        let _peer_does_not_read_or_has_gone =
            self.socket.set_nonblocking(true).and_then(|()| self.flush());
    }
}

/// For poll(2): readable when [`Pipe::read`] would not block.
impl AsFd for Pipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn blocking(stream: tokio::net::TcpStream) -> io::Result<TcpStream> {
    let socket = stream.into_std()?;
    socket.set_nonblocking(false)?;
    Ok(socket)
}

impl TcpOut {
    /// Leaves the async runtime.
    pub(crate) fn into_pipe(self) -> io::Result<Pipe> {
        let (metered, tls) = self.tls.into_inner();
        Pipe::new(blocking(metered.stream)?, Connection::Client(tls), self.handle, &[])
    }
}

impl TcpIn {
    /// Leaves the async runtime.
    pub(crate) fn into_pipe(self) -> io::Result<Pipe> {
        let (buffered, tls) = self.tls.into_inner();
        let ahead = buffered.buffer().to_vec();
        let socket = blocking(buffered.into_inner().stream)?;
        Pipe::new(socket, Connection::Server(tls), self.handle, &ahead)
    }
}
