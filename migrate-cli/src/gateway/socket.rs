//! Sockets to QEMUs that move a guest: Unix or TCP, on this host or next to it.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, UnixListener};

use crate::error::EngineError;

/// Most ports that one address may name.
const PORTS_MAX: u16 = 1024;

/// Pause before a QEMU is tried again that does not listen yet.
const AGAIN_AFTER: Duration = Duration::from_millis(50);

/// Where QEMUs connect, or listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum QemuAddr {
    /// A Unix socket.
    Unix(PathBuf),
    /// TCP, on any of these ports; none is that which the other gateway's QEMU connected to.
    Tcp {
        /// Name or address.
        host: String,
        /// First and last port.
        ports: Option<(u16, u16)>,
    },
}

impl FromStr for QemuAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => Err("a path has to follow unix:".into()),
                path => Ok(Self::Unix(path.into())),
            };
        }
        let text = text.strip_prefix("tcp:").unwrap_or(text);
        let (host, ports) = match text.rsplit_once(':') {
            // An IPv6 address has colons of its own.
            Some((host, _)) if host.contains(':') && !host.starts_with('[') => (text, None),
            Some((host, ports)) => (host, Some(parse_ports(ports)?)),
            None => (text, None),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err("a host is missing before the port".into());
        }
        Ok(Self::Tcp { host: host.to_owned(), ports })
    }
}

fn parse_ports(text: &str) -> Result<(u16, u16), String> {
    let port = |text: &str| {
        let port = text.parse::<u16>().ok().filter(|port| *port > 0);
        port.ok_or_else(|| format!("{text:?} is no port"))
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (port(first)?, port(last)?);
    if last < first || last - first >= PORTS_MAX {
        return Err(format!("{first}-{last}: 1 to {PORTS_MAX} ports, the first one first"));
    }
    Ok((first, last))
}

impl fmt::Display for QemuAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, ports: None } => f.write_str(host),
            Self::Tcp { host, ports: Some((first, last)) } if first == last => {
                write!(f, "{host}:{first}")
            }
            Self::Tcp { host, ports: Some((first, last)) } => write!(f, "{host}:{first}-{last}"),
        }
    }
}

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

/// A QEMU that has connected.
#[derive(Debug)]
pub struct Connected {
    /// The connection.
    pub socket: QemuSocket,
    /// The port it connected to; 0 for a Unix socket.
    pub port: u16,
    /// Where that was, for people.
    pub name: String,
}

#[derive(Debug)]
enum Socket {
    Unix(UnixListener, String),
    Tcp(TcpListener, u16),
}

/// Waits for QEMUs.
#[derive(Debug)]
pub struct QemuListener {
    sockets: Vec<Socket>,
    /// Removed at the end.
    paths: Vec<PathBuf>,
}

impl QemuListener {
    /// Listens at all of these.
    ///
    /// # Errors
    /// [`EngineError::Misuse`] with the first one where that is not possible.
    pub async fn bind(addrs: &[QemuAddr]) -> Result<Self, EngineError> {
        let mut listener = Self { sockets: vec![], paths: vec![] };
        for addr in addrs {
            listener.add(addr).await?;
        }
        Ok(listener)
    }

    async fn add(&mut self, addr: &QemuAddr) -> Result<(), EngineError> {
        let failed = |at: String, error: io::Error| EngineError::Misuse {
            what: format!("QEMUs cannot be waited for at {at}: {error}"),
            remedy: "Name an address of this host and ports that are free".into(),
        };
        match addr {
            QemuAddr::Unix(path) => {
                // One that a gateway left which was killed; one in use is not taken away.
                if UnixStream::connect(path).is_err() {
                    let _none_there = std::fs::remove_file(path);
                }
                let bound = UnixListener::bind(path);
                let bound = bound.map_err(|error| failed(addr.to_string(), error))?;
                self.sockets.push(Socket::Unix(bound, addr.to_string()));
                self.paths.push(path.clone());
            }
            QemuAddr::Tcp { host, ports } => {
                let (first, last) = ports.ok_or_else(|| EngineError::Misuse {
                    what: format!("{addr} names no port to wait at"),
                    remedy: format!("Use {addr}:49152-49215, the ports that libvirt chooses from"),
                })?;
                for port in first..=last {
                    let at = format!("{host}:{port}");
                    let bound = TcpListener::bind((host.as_str(), port)).await;
                    let bound = bound.map_err(|error| failed(at, error))?;
                    self.sockets.push(Socket::Tcp(bound, port));
                }
            }
        }
        Ok(())
    }

    /// The next QEMU that connects. Cancel-safe.
    ///
    /// # Errors
    /// If a socket fails.
    pub async fn accept(&self) -> io::Result<Connected> {
        // One future a socket; the others are dropped, which loses no connection.
        let mut waits: Vec<_> =
            self.sockets.iter().map(|socket| Box::pin(accept_at(socket))).collect();
        std::future::poll_fn(|context| {
            for wait in &mut waits {
                if let std::task::Poll::Ready(connected) = wait.as_mut().poll(context) {
                    return std::task::Poll::Ready(connected);
                }
            }
            std::task::Poll::Pending
        })
        .await
    }
}

impl Drop for QemuListener {
    fn drop(&mut self) {
        for path in &self.paths {
            let _gone_already = std::fs::remove_file(path);
        }
    }
}

async fn accept_at(socket: &Socket) -> io::Result<Connected> {
    match socket {
        Socket::Unix(listener, name) => {
            let (stream, _) = listener.accept().await?;
            let stream = stream.into_std()?;
            stream.set_nonblocking(false)?;
            Ok(Connected { socket: QemuSocket::Unix(stream), port: 0, name: name.clone() })
        }
        Socket::Tcp(listener, port) => {
            let (stream, from) = listener.accept().await?;
            let stream = stream.into_std()?;
            stream.set_nonblocking(false)?;
            stream.set_nodelay(true)?;
            let name = format!("port {port}, from {from}");
            Ok(Connected { socket: QemuSocket::Tcp(stream), port: *port, name })
        }
    }
}

/// Connects to a QEMU that waits for a guest, or is about to. Blocks.
///
/// # Errors
/// Why it is not reached, after `within`.
pub fn connect(addr: &QemuAddr, port: u16, within: Duration) -> io::Result<QemuSocket> {
    let began = Instant::now();
    loop {
        match try_connect(addr, port) {
            Ok(socket) => return Ok(socket),
            Err(error) if began.elapsed() > within => return Err(error),
            Err(_) => std::thread::sleep(AGAIN_AFTER),
        }
    }
}

fn try_connect(addr: &QemuAddr, port: u16) -> io::Result<QemuSocket> {
    match addr {
        QemuAddr::Unix(path) => Ok(QemuSocket::Unix(UnixStream::connect(path)?)),
        QemuAddr::Tcp { host, ports } => {
            let port = match ports {
                Some((first, last)) if first == last => *first,
                _ => port,
            };
            let found: Vec<SocketAddr> = (host.as_str(), port).to_socket_addrs()?.collect();
            let stream = TcpStream::connect(&found[..])?;
            stream.set_nodelay(true)?;
            Ok(QemuSocket::Tcp(stream))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, ports: Option<(u16, u16)>) -> QemuAddr {
        QemuAddr::Tcp { host: host.into(), ports }
    }

    #[test]
    fn addresses_are_read_and_shown() {
        for (text, addr) in [
            ("unix:/run/a", QemuAddr::Unix("/run/a".into())),
            ("127.0.0.1:4444", tcp("127.0.0.1", Some((4444, 4444)))),
            ("host:49152-49215", tcp("host", Some((49152, 49215)))),
            ("host", tcp("host", None)),
        ] {
            assert_eq!(text.parse(), Ok(addr.clone()));
            assert_eq!(addr.to_string(), text);
        }
        assert_eq!("tcp:h:1".parse(), Ok(tcp("h", Some((1, 1)))));
        assert_eq!("[::1]:7".parse(), Ok(tcp("::1", Some((7, 7)))));
        for bad in ["unix:", ":7", "h:0", "h:9-8", "h:1-2000", "h:x"] {
            assert!(bad.parse::<QemuAddr>().is_err(), "{bad}");
        }
    }
}
