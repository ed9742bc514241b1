//! A connection in the hands of one thread, which may block: what waits for nobody else needs no task.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::BytesMut;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::Connection;

use super::{READ_AHEAD_BYTES, TcpHandle, TcpIn, TcpOut};
use crate::control::StreamError;

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
    fn new(
        stream: tokio::net::TcpStream,
        tls: Connection,
        handle: Arc<TcpHandle>,
        ahead: &[u8],
    ) -> io::Result<Self> {
        let socket = stream.into_std()?;
        socket.set_nonblocking(false)?;
        let (sealed, received) = (vec![0; READ_AHEAD_BYTES], BytesMut::new());
        let mut pipe = Self { socket, tls, handle, sealed, received, ended: false };
        pipe.tls.set_buffer_limit(None);
        pipe.open(ahead)?;
        Ok(pipe)
    }

    pub(crate) fn handle(&self) -> Arc<TcpHandle> {
        Arc::clone(&self.handle)
    }

    /// What came and was not taken.
    pub(crate) fn received(&mut self) -> &mut BytesMut {
        &mut self.received
    }

    /// Writes all pieces; when this returns, the kernel has them.
    pub(crate) fn write(&mut self, pieces: &[impl AsRef<[u8]>]) -> io::Result<()> {
        for piece in pieces {
            self.tls.writer().write_all(piece.as_ref())?;
        }
        self.flush()
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
        let before = self.received.len();
        let sealed = std::mem::take(&mut self.sealed);
        let opened = self.open(sealed.get(..read).unwrap_or_default());
        self.sealed = sealed;
        opened.map_err(StreamError::Broken)?;
        if self.ended && self.received.len() == before { Err(StreamError::Ended) } else { Ok(()) }
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
        self.flush()
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            let written = self.tls.write_tls(&mut self.socket)?;
            self.handle.meter.sent.fetch_add(written as u64, Ordering::Relaxed);
        }
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

impl TcpOut {
    /// Leaves the async runtime.
    pub(crate) fn into_pipe(self) -> io::Result<Pipe> {
        let (metered, tls) = self.tls.into_inner();
        Pipe::new(metered.stream, Connection::Client(tls), self.handle, &[])
    }
}

impl TcpIn {
    /// Leaves the async runtime.
    pub(crate) fn into_pipe(self) -> io::Result<Pipe> {
        let (buffered, tls) = self.tls.into_inner();
        let ahead = buffered.buffer().to_vec();
        Pipe::new(buffered.into_inner().stream, Connection::Server(tls), self.handle, &ahead)
    }
}
