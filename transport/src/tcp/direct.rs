//! Connections that no async runtime sees: the thread that will use one opens it, accepts it, and shakes
//! hands.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::{
    Pipe, TcpHandle, alert, certificate, check_alpn, give_up_when_stalled, open_port, server_name,
    tune,
};
use crate::error::TransportError;
use crate::options::Options;
use crate::tls::PAGES_ALPN;

/// A connection after its handshake, and the certificate that the peer has shown.
pub(crate) type Shaken = (Pipe, Option<CertificateDer<'static>>);

/// Opens a connection to `addr`, where a host of this name is expected, within the options'
/// handshake timeout.
pub(crate) fn connect(
    addr: SocketAddr,
    tls: &Arc<ClientConfig>,
    expected_peer: Option<&str>,
    options: &Options,
) -> Result<Shaken, TransportError> {
    let deadline = Deadline::after(options.handshake_timeout);
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => deadline.missed(addr),
        _ => TransportError::PagesConnect { peer: addr, source },
    };
    let name = server_name(expected_peer)?;
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))
        .map_err(failed)?;
    if let Some(own) = options.bind {
        socket.bind(&SocketAddr::new(own, 0).into()).map_err(failed)?;
    }
    tune(&socket, options).map_err(failed)?;
    give_up_when_stalled(&socket, options).map_err(failed)?;
    socket.connect_timeout(&addr.into(), deadline.left().map_err(failed)?).map_err(failed)?;
    let tls = ClientConnection::new(Arc::clone(tls), name)
        .map_err(|error| failed(io::Error::other(error)))?;
    shake(socket.into(), tls.into(), deadline)
        .map_err(|error| alert(addr, &error).unwrap_or_else(|| failed(error)))
        .and_then(|connected| connected.into_shaken(addr))
}

/// Shakes hands with a client, within the options' handshake timeout.
pub(crate) fn accept(
    stream: TcpStream,
    peer: SocketAddr,
    tls: &Arc<ServerConfig>,
    options: &Options,
) -> Result<Shaken, TransportError> {
    let deadline = Deadline::after(options.handshake_timeout);
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => deadline.missed(peer),
        _ => TransportError::PagesBroken { peer, source },
    };
    tune(&SockRef::from(&stream), options).map_err(failed)?;
    let tls =
        ServerConnection::new(Arc::clone(tls)).map_err(|error| failed(io::Error::other(error)))?;
    shake(stream, tls.into(), deadline)
        .map_err(|error| alert(peer, &error).unwrap_or_else(|| failed(error)))
        .and_then(|connected| connected.into_shaken(peer))
}

/// Opens a port whose connections are accepted by a thread that blocks.
pub(crate) fn listen_directly(
    addr: SocketAddr,
    options: &Options,
) -> Result<TcpListener, TransportError> {
    Ok(open_port(addr, options)?.into())
}

/// When a handshake must be over.
#[derive(Debug, Clone, Copy)]
struct Deadline {
    at: Instant,
    after: Duration,
}

impl Deadline {
    fn after(after: Duration) -> Self {
        Self { at: Instant::now() + after, after }
    }

    fn left(self) -> io::Result<Duration> {
        let left = self.at.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
    }

    fn missed(self, peer: SocketAddr) -> TransportError {
        let waiting_for = "the end of the TLS handshake";
        TransportError::HandshakeTimeout { peer, after: self.after, waiting_for }
    }
}

/// A connection whose handshake is over.
struct Connected {
    socket: TcpStream,
    tls: Connection,
    handle: Arc<TcpHandle>,
}

impl Connected {
    fn into_shaken(self, peer: SocketAddr) -> Result<Shaken, TransportError> {
        let Self { socket, tls, handle } = self;
        check_alpn(peer, &tls, PAGES_ALPN)?;
        let certificate = certificate(&tls);
        let pipe = Pipe::new(socket, tls, handle, &[]);
        let pipe = pipe.map_err(|source| TransportError::PagesBroken { peer, source })?;
        Ok((pipe, certificate))
    }
}

fn shake(mut socket: TcpStream, mut tls: Connection, deadline: Deadline) -> io::Result<Connected> {
    let handle = Arc::new(TcpHandle::new(&SockRef::from(&socket))?);
    while tls.is_handshaking() || tls.wants_write() {
        if tls.wants_write() {
            socket.set_write_timeout(Some(deadline.left()?))?;
            let written = tls.write_tls(&mut socket)?;
            handle.meter.sent.fetch_add(written as u64, Ordering::Relaxed);
            continue;
        }
        socket.set_read_timeout(Some(deadline.left()?))?;
        let read = match tls.read_tls(&mut socket) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        handle.meter.received.fetch_add(read as u64, Ordering::Relaxed);
        if let Err(error) = tls.process_new_packets() {
            // The peer is told why, if it still listens.
            let _told = tls.write_tls(&mut socket);
            return Err(io::Error::other(error));
        }
    }
    socket.set_read_timeout(None)?;
    socket.set_write_timeout(None)?;
    Ok(Connected { socket, tls, handle })
}
