//! Connections to QEMUs that move a guest, on this host or next to it.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use qemu_glue::stream::{StreamError, channel};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::addr::QemuAddr;
use crate::error::EngineError;

/// Pause before a QEMU is tried again that does not listen yet.
const AGAIN_AFTER: Duration = Duration::from_millis(50);

/// Bytes that tell what a connection is for.
const FIRST_BYTES: usize = 8;

/// Longest wait for them.
const FIRST_WITHIN: Duration = Duration::from_secs(10);

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

    /// Reads the first bytes of a stream, which tell that it is one: whatever else connects must not take the place of a
    /// QEMU at the destination. Blocks for at most 10 s.
    ///
    /// # Errors
    /// [`EngineError::Stream`] if it is something that is not carried, with the remedy; [`EngineError::QemuSocket`].
    pub fn first_bytes(&self) -> Result<Vec<u8>, EngineError> {
        let began = Instant::now();
        let mut first = Vec::with_capacity(FIRST_BYTES);
        while first.len() < FIRST_BYTES {
            let left = FIRST_WITHIN.saturating_sub(began.elapsed());
            if left.is_zero() {
                let silent = "what connected is no QEMU that migrates: it said nothing";
                return Err(EngineError::QemuSocket(io::Error::new(
                    io::ErrorKind::TimedOut,
                    silent,
                )));
            }
            self.set_read_timeout(Some(left)).map_err(EngineError::QemuSocket)?;
            let mut buffer = [0; FIRST_BYTES];
            let room = buffer.get_mut(first.len()..).unwrap_or_default();
            match (&mut &*self).read(room) {
                Ok(0) => return Err(EngineError::QemuSocket(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => first.extend(room.iter().take(count)),
                Err(error) if is_for_now(&error) => {}
                Err(error) => return Err(EngineError::QemuSocket(error)),
            }
        }
        self.set_read_timeout(None).map_err(EngineError::QemuSocket)?;
        check_begins(&first)?;
        Ok(first)
    }

    /// Whether nothing can be read for so long.
    pub fn is_quiet(&self, within: Duration) -> bool {
        let fd = match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        };
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        let within = Timespec::try_from(within).ok();
        matches!(poll(&mut fds, within.as_ref()), Ok(0))
    }

    fn set_read_timeout(&self, within: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_read_timeout(within),
            Self::Tcp(stream) => stream.set_read_timeout(within),
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

fn is_for_now(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

/// Whether a stream that can be carried begins with these bytes.
///
/// # Errors
/// [`EngineError::Stream`] with the remedy.
pub fn check_begins(first: &[u8]) -> Result<(), EngineError> {
    let channel = channel::recognise(first).unwrap_or(channel::Channel::Unknown);
    match channel.refusal() {
        None => Ok(()),
        Some(refusal) => Err(EngineError::Stream(StreamError { at_byte: 0, refusal })),
    }
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

    fn first(bytes: &[u8]) -> Result<Vec<u8>, String> {
        let (here, there) = UnixStream::pair().unwrap();
        (&here).write_all(bytes).unwrap();
        drop(here);
        QemuSocket::Unix(there).first_bytes().map_err(|error| error.tell())
    }

    #[test]
    fn only_streams_of_qemu_are_let_in() {
        assert_eq!(first(b"QEVM\0\0\0\x03rest"), Ok(b"QEVM\0\0\0\x03".to_vec()));
        for (bytes, told) in [
            (&b"\x16\x03\x01\x02\0\x01\0\x01"[..], "tls-creds"),
            (&b"\x11\x22\x33\x44\0\0\0\x01"[..], "multifd"),
            (b"GET / HTTP/1.1\r\n", "no QEMU migration stream"),
            (b"", "failed"),
            (b"QEV", "failed"),
        ] {
            let error = first(bytes).unwrap_err();
            assert!(error.contains(told), "{error}");
        }
    }
}
