//! Connections to QEMUs that move a guest, on this host or next to it.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use qemu_glue::stream::StreamError;
use qemu_glue::stream::channel::{self, Channel};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::addr::QemuAddr;
use crate::error::EngineError;

/// Pause before a QEMU is tried again that does not listen yet.
const AGAIN_AFTER: Duration = Duration::from_millis(50);

/// A connection to a QEMU. Blocking.
#[derive(Debug)]
pub enum QemuSocket {
    /// A Unix socket.
    Unix(UnixStream),
    /// TCP.
    Tcp(TcpStream),
}

impl QemuSocket {
    /// Another handle of the same connection.
    ///
    /// # Errors
    /// If there are no descriptors left.
    pub fn another(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
        })
    }

    /// Whether nothing can be read for so long, not even the end.
    pub fn is_quiet(&self, within: Duration) -> bool {
        matches!(self.wait(within), Ok(false))
    }

    /// Waits until something can be read; whether it can.
    fn wait(&self, within: Duration) -> io::Result<bool> {
        let timeout = Timespec::try_from(within).map_err(io::Error::other)?;
        let fd = self.as_fd();
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) | Err(Errno::INTR) => Ok(false),
            polled => Ok(polled? > 0),
        }
    }

    /// Looks at the first bytes that wait to be read: how many there are, 0 at the end; nothing if none come within that
    /// time.
    ///
    /// # Errors
    /// If the connection has failed.
    pub fn peek(&self, buffer: &mut [u8], within: Duration) -> io::Result<Option<usize>> {
        if !self.wait(within)? {
            return Ok(None);
        }
        let (bytes, _) = rustix::net::recv(self.as_fd(), buffer, RecvFlags::PEEK)?;
        Ok(Some(bytes))
    }

    /// Reads what there is, however often a signal comes between; 0 bytes at the end.
    ///
    /// # Errors
    /// If the connection has failed.
    pub fn read_some(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut socket = self;
        loop {
            match socket.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    /// Nothing more is written; QEMU sees the end of the stream.
    pub fn end_writing(&self) {
        self.shut(std::net::Shutdown::Write);
    }

    /// The connection ends in both directions; who waits for it is woken.
    pub fn cut(&self) {
        self.shut(std::net::Shutdown::Both);
    }

    fn shut(&self, how: std::net::Shutdown) {
        let _gone_already = match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
        };
    }
}

impl AsFd for QemuSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Read for &QemuSocket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            QemuSocket::Unix(stream) => (&mut &*stream).read(buffer),
            QemuSocket::Tcp(stream) => (&mut &*stream).read(buffer),
        }
    }
}

impl Write for &QemuSocket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            QemuSocket::Unix(stream) => (&mut &*stream).write(bytes),
            QemuSocket::Tcp(stream) => (&mut &*stream).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether something that can be passed on begins with these bytes.
///
/// # Errors
/// [`EngineError::Stream`] with the remedy.
pub fn check_begins(first: &[u8]) -> Result<(), EngineError> {
    let channel = channel::recognise(first).unwrap_or(Channel::Unknown);
    // Of some, the other gateway knows which streams they belong to.
    let refusal = match channel {
        Channel::Resumed | Channel::Preempt => None,
        other => other.refusal(),
    };
    refusal.map_or(Ok(()), |refusal| Err(EngineError::Stream(StreamError { at_byte: 0, refusal })))
}

/// Connects to a QEMU that waits for a guest, or is about to. Cancel-safe.
///
/// # Errors
/// Why it is not reached, after `within`.
pub async fn connect(addr: &QemuAddr, port: u16, within: Duration) -> io::Result<QemuSocket> {
    let mut last = io::Error::from(io::ErrorKind::TimedOut);
    let tries = async {
        loop {
            match try_connect(addr, port).await {
                Ok(socket) => return socket,
                Err(error) => last = error,
            }
            tokio::time::sleep(AGAIN_AFTER).await;
        }
    };
    tokio::time::timeout(within, tries).await.map_err(|_| last)
}

async fn try_connect(addr: &QemuAddr, port: u16) -> io::Result<QemuSocket> {
    match addr {
        QemuAddr::Unix(path) => {
            let stream = tokio::net::UnixStream::connect(path).await?.into_std()?;
            stream.set_nonblocking(false)?;
            Ok(QemuSocket::Unix(stream))
        }
        QemuAddr::Tcp { host, .. } => {
            let stream = tokio::net::TcpStream::connect((host.as_str(), port)).await?.into_std()?;
            stream.set_nonblocking(false)?;
            stream.set_nodelay(true)?;
            Ok(QemuSocket::Tcp(stream))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_qemu_sends_is_written_to_whoever_listens() {
        for begins in [&b"QEVM\0\0\0\x03"[..], b"\x08\0\x0a\0\x07\x06pc.ram"] {
            assert!(check_begins(begins).is_ok());
        }
        for begins in [&b"\x16\x03\x01\x02\0\x01\0\x01"[..], b"GET / HTTP/1.1\r\n", b"", b"QEV"] {
            assert!(check_begins(begins).is_err());
        }
    }
}
