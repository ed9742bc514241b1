//! TCP connections that carry lanes: sockets, TLS, counting, and closing from elsewhere.
//!
//! ```text
//! LaneSender   ─► TLS ─► Metered ─► socket ~~~~ socket ─► Metered ─► read-ahead ─► TLS ─► LaneReceiver
//!                                     │                     │
//!                          TcpHandle (of the session's Closer): closes, tells the bytes
//! ```
//!
//! Only the client sends, but on the lane that requests come back on ([`pipe`]). Its end is TLS's
//! close_notify, which the server answers with its own; a connection that ends without one was cut,
//! and reading or finishing it is an error.
//!
//! Death of the peer is noticed by the control connection. The kernel's own timers are for a path
//! that carries QUIC and no longer TCP.
//!
//! The page channel has connections of its own, which never see an async runtime ([`direct`]).

mod direct;
mod pipe;

use std::collections::VecDeque;
use std::fs;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{AlertDescription, CommonState};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::control::StreamError;
use crate::error::{TransportError, WireError, tls_alert};
use crate::options::Options;
use crate::payload::{Collector, Payload};
use crate::tls::{ANY_NAME, LANE_ALPN};

pub(crate) use self::direct::{accept, connect, listen_directly};
pub(crate) use self::pipe::Pipe;

/// Connections that the kernel keeps for a listener that has not accepted them yet.
const BACKLOG: i32 = 128;

/// Shortest time after which the kernel gives a connection up whose data are not acknowledged. It
/// counts a peer that does not read as silent, too, and that may be merely slow.
const STALLED_MIN: Duration = Duration::from_secs(20);

/// Keep-alives that are sent to a silent peer before it counts as dead.
const KEEPALIVES: u32 = 4;

/// Bytes read ahead of TLS, which by itself reads 4 KiB at a time. It is taken before the client has
/// shown who it is.
const READ_AHEAD_BYTES: usize = 64 << 10;

/// Bytes that TLS takes before it must have written some.
const TLS_BUFFER_BYTES: usize = 256 << 10;

/// Largest piece of a batch's contents; as they arrive, so that an announced length costs nothing.
const PIECE_BYTES_MAX: usize = 256 << 10;

/// Pieces that are given to TLS at once.
const SLICES_MAX: usize = 16;

/// Bytes of one connection beneath TLS.
#[derive(Debug, Default)]
struct Meter {
    sent: AtomicU64,
    received: AtomicU64,
}

/// Closes and measures a connection, whoever uses it.
#[derive(Debug)]
pub(crate) struct TcpHandle {
    socket: Socket,
    meter: Arc<Meter>,
}

impl TcpHandle {
    fn new(socket: &Socket) -> io::Result<Self> {
        Ok(Self { socket: socket.try_clone()?, meter: Arc::default() })
    }

    /// Ends the connection at once; what is under way is lost.
    pub(crate) fn close(&self) {
        // Errors say that it has ended already.
        let _discard_what_is_unsent = self.socket.set_linger(Some(Duration::ZERO));
        let _ended = self.socket.shutdown(Shutdown::Both);
    }

    /// Reads nothing more; who waits for something is let go.
    pub(crate) fn stop_reading(&self) {
        let _ended_already = self.socket.shutdown(Shutdown::Read);
    }

    /// Bytes sent and received.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        let Meter { sent, received } = &*self.meter;
        (sent.load(Ordering::Relaxed), received.load(Ordering::Relaxed))
    }

    /// Whether nothing says that the connection has ended.
    fn is_open(&self) -> bool {
        let mut byte = [MaybeUninit::uninit()];
        match self.socket.peek(&mut byte) {
            Ok(bytes) => bytes > 0,
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        }
    }
}

/// A socket that counts.
#[derive(Debug)]
pub(crate) struct Metered {
    stream: TcpStream,
    meter: Arc<Meter>,
}

impl Metered {
    fn new(stream: TcpStream) -> io::Result<(Self, Arc<TcpHandle>)> {
        let handle = Arc::new(TcpHandle::new(&SockRef::from(&stream))?);
        Ok((Self { stream, meter: Arc::clone(&handle.meter) }, handle))
    }

    fn sent(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(bytes)) = &written {
            self.meter.sent.fetch_add(*bytes as u64, Ordering::Relaxed);
        }
        written
    }
}

impl AsyncRead for Metered {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        let bytes = buffer.filled().len().saturating_sub(before);
        self.meter.received.fetch_add(bytes as u64, Ordering::Relaxed);
        read
    }
}

impl AsyncWrite for Metered {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.sent(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.sent(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// The client's end of a connection.
#[derive(Debug)]
pub(crate) struct TcpOut {
    tls: client::TlsStream<Metered>,
    handle: Arc<TcpHandle>,
}

impl TcpOut {
    /// Opens a connection to `addr` and makes sure who answers.
    pub(crate) async fn dial(
        addr: SocketAddr,
        tls: &TlsConnector,
        options: &Options,
    ) -> Result<Self, TransportError> {
        let failed = |source| TransportError::LaneConnect { peer: addr, source };
        let socket = match addr {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        };
        let socket = socket.map_err(failed)?;
        if let Some(own) = options.bind {
            socket.bind(SocketAddr::new(own, 0)).map_err(failed)?;
        }
        let stream = socket.connect(addr).await.map_err(failed)?;
        let socket = SockRef::from(&stream);
        tune(&socket, options).map_err(failed)?;
        give_up_when_stalled(&socket, options).map_err(failed)?;
        // Bytes that wait here beyond what is on its way.
        socket.set_tcp_notsent_lowat(options.lane_window_bytes / 8).map_err(failed)?;
        let (stream, handle) = Metered::new(stream).map_err(failed)?;
        let name = server_name(options.expected_peer.as_deref())?;
        let shaken = tls.connect(name, stream).await;
        let mut tls =
            shaken.map_err(|error| alert(addr, &error).unwrap_or_else(|| failed(error)))?;
        check_alpn(addr, tls.get_ref().1, LANE_ALPN)?;
        tls.get_mut().1.set_buffer_limit(Some(TLS_BUFFER_BYTES));
        Ok(Self { tls, handle })
    }

    /// The server's certificate, as verified in the handshake.
    pub(crate) fn certificate(&self) -> Option<CertificateDer<'static>> {
        certificate(self.tls.get_ref().1)
    }

    pub(crate) fn handle(&self) -> Arc<TcpHandle> {
        Arc::clone(&self.handle)
    }

    /// Whether nothing says that the connection has ended.
    pub(crate) fn is_open(&self) -> bool {
        self.handle.is_open()
    }

    /// Writes all pieces; when this returns, the kernel has them.
    pub(crate) async fn write_all(&mut self, pieces: Vec<Bytes>) -> io::Result<()> {
        let mut pieces = VecDeque::from(pieces);
        while !pieces.is_empty() {
            let slices: Vec<_> =
                pieces.iter().take(SLICES_MAX).map(|piece| IoSlice::new(piece)).collect();
            let mut written = self.tls.write_vectored(&slices).await?;
            if written == 0 && slices.iter().any(|slice| !slice.is_empty()) {
                return Err(io::ErrorKind::WriteZero.into());
            }
            while let Some(piece) = pieces.front_mut() {
                let taken = written.min(piece.len());
                piece.advance(taken);
                written -= taken;
                if !piece.is_empty() {
                    break;
                }
                pieces.pop_front();
            }
        }
        self.tls.flush().await
    }

    /// Says that nothing more comes, and waits until the server has read everything.
    pub(crate) async fn finish(&mut self) -> io::Result<()> {
        self.tls.shutdown().await?;
        match self.tls.read(&mut [0]).await? {
            0 => Ok(()),
            _ => Err(io::Error::other("the server sent data on a lane")),
        }
    }
}

/// The server's end of a connection.
#[derive(Debug)]
pub(crate) struct TcpIn {
    tls: server::TlsStream<BufReader<Metered>>,
    handle: Arc<TcpHandle>,
    peer: SocketAddr,
}

impl TcpIn {
    /// Makes sure who has connected.
    pub(crate) async fn accept(
        stream: TcpStream,
        peer: SocketAddr,
        tls: &TlsAcceptor,
        options: &Options,
    ) -> Result<Self, TransportError> {
        let place = || "a new lane".to_owned();
        let failed = |source| TransportError::LaneBroken { peer, place: place(), source };
        tune(&SockRef::from(&stream), options).map_err(failed)?;
        let (stream, handle) = Metered::new(stream).map_err(failed)?;
        let shaken = tls.accept(BufReader::with_capacity(READ_AHEAD_BYTES, stream)).await;
        let tls = shaken.map_err(|error| alert(peer, &error).unwrap_or_else(|| failed(error)))?;
        check_alpn(peer, tls.get_ref().1, LANE_ALPN)?;
        Ok(Self { tls, handle, peer })
    }

    /// The client's certificate, as verified in the handshake.
    pub(crate) fn certificate(&self) -> Option<CertificateDer<'static>> {
        certificate(self.tls.get_ref().1)
    }

    pub(crate) fn handle(&self) -> Arc<TcpHandle> {
        Arc::clone(&self.handle)
    }

    pub(crate) fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Fills `bytes`; a clean end before the first byte is [`StreamError::Ended`].
    pub(crate) async fn read_exact(
        &mut self,
        bytes: &mut [u8],
        what: &'static str,
    ) -> Result<(), StreamError> {
        let needed = bytes.len();
        let mut available = 0;
        while let Some(rest) = bytes.get_mut(available..).filter(|rest| !rest.is_empty()) {
            match self.tls.read(rest).await.map_err(StreamError::Broken)? {
                0 if available == 0 => return Err(StreamError::Ended),
                0 => {
                    let error = WireError::Truncated { what, needed, available };
                    return Err(StreamError::Wire(error));
                }
                read => available = available.saturating_add(read),
            }
        }
        Ok(())
    }

    /// Reads `needed` bytes, which were checked against a limit.
    pub(crate) async fn read_bytes(
        &mut self,
        needed: usize,
        what: &'static str,
    ) -> Result<Payload, StreamError> {
        let mut bytes = Collector::default();
        while bytes.len() < needed {
            let piece_bytes = needed.saturating_sub(bytes.len()).min(PIECE_BYTES_MAX);
            let mut piece = BytesMut::with_capacity(piece_bytes);
            while piece.len() < piece_bytes {
                let room = piece_bytes.saturating_sub(piece.len());
                let read = self.tls.read_buf(&mut (&mut piece).limit(room)).await;
                if read.map_err(StreamError::Broken)? == 0 {
                    let available = bytes.len().saturating_add(piece.len());
                    return Err(StreamError::Wire(WireError::Truncated {
                        what,
                        needed,
                        available,
                    }));
                }
            }
            bytes.push(piece.freeze());
        }
        Ok(bytes.finish())
    }

    /// Tells the client that everything was read.
    pub(crate) async fn answer_end(&mut self) {
        // A client that does not wait for it may be gone.
        let _told = self.tls.shutdown().await;
    }
}

/// Opens the port for lanes over TCP.
pub(crate) fn listen(addr: SocketAddr, options: &Options) -> Result<TcpListener, TransportError> {
    let failed = |source| TransportError::Socket { what: "use a TCP socket", addr, source };
    let socket = open_port(addr, options)?;
    socket.set_nonblocking(true).map_err(failed)?;
    TcpListener::from_std(socket.into()).map_err(failed)
}

fn open_port(addr: SocketAddr, options: &Options) -> Result<Socket, TransportError> {
    let failed = |what| move |source: io::Error| TransportError::Socket { what, addr, source };
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))
        .map_err(failed("open a TCP socket"))?;
    // Connections of an earlier process that are still being wound up do not count.
    socket.set_reuse_address(true).map_err(failed("set up a TCP socket"))?;
    if let Some(bytes) = receive_buffer_bytes(options) {
        socket.set_recv_buffer_size(bytes).map_err(failed("set the receive buffer"))?;
    }
    let bound = socket.bind(&addr.into()).and_then(|()| socket.listen(BACKLOG));
    bound.map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => TransportError::AddressInUse { protocol: "TCP", addr },
        _ => TransportError::Socket { what: "listen on the TCP port", addr, source },
    })?;
    Ok(socket)
}

/// Receive buffer to set, in bytes, or nothing where the kernel would grant less: then it does better
/// by itself. It doubles the value; with what may wait at the sender, a lane's window results.
fn receive_buffer_bytes(options: &Options) -> Option<usize> {
    let wanted = options.lane_window_bytes as usize / 8 * 3;
    let max = fs::read_to_string("/proc/sys/net/core/rmem_max").ok()?;
    (max.trim().parse::<usize>().ok()? >= wanted).then_some(wanted)
}

/// What both ends need.
fn tune(socket: &Socket, options: &Options) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    let every = (options.dead_peer / (KEEPALIVES + 1)).max(Duration::from_secs(1));
    let keepalive =
        TcpKeepalive::new().with_time(every).with_interval(every).with_retries(KEEPALIVES);
    socket.set_tcp_keepalive(&keepalive)
}

/// What a client needs besides.
fn give_up_when_stalled(socket: &Socket, options: &Options) -> io::Result<()> {
    socket.set_tcp_user_timeout(Some(options.dead_peer.max(STALLED_MIN)))
}

/// The name that a server must have, or any.
fn server_name(expected_peer: Option<&str>) -> Result<ServerName<'static>, TransportError> {
    let name = expected_peer.unwrap_or(ANY_NAME).to_owned();
    ServerName::try_from(name).map_err(|_| TransportError::Option {
        option: "expected_peer",
        value: format!("{expected_peer:?}"),
        rule: "it must be a host name",
    })
}

fn certificate(state: &CommonState) -> Option<CertificateDer<'static>> {
    Some(state.peer_certificates()?.first()?.clone().into_owned())
}

/// A peer that names no protocol is let through by TLS.
fn check_alpn(peer: SocketAddr, state: &CommonState, alpn: &[u8]) -> Result<(), TransportError> {
    if state.alpn_protocol() == Some(alpn) {
        return Ok(());
    }
    Err(tls_alert(peer, u8::from(AlertDescription::NoApplicationProtocol), "found here"))
}

/// The TLS alert that ended a handshake, if one did.
pub(crate) fn alert(peer: SocketAddr, error: &io::Error) -> Option<TransportError> {
    use rustls::Error as E;
    let (alert, reported) = match error.get_ref()?.downcast_ref::<E>()? {
        E::AlertReceived(alert) => (*alert, "found by the peer"),
        E::InvalidCertificate(error) => (error.clone().into(), "found here"),
        E::NoCertificatesPresented => (AlertDescription::CertificateRequired, "found here"),
        E::NoApplicationProtocol => (AlertDescription::NoApplicationProtocol, "found here"),
        _ => return None,
    };
    Some(tls_alert(peer, u8::from(alert), reported))
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use super::*;

    #[tokio::test]
    async fn a_port_in_use_is_named_with_its_protocol() {
        for ip in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
            let first = listen(SocketAddr::new(ip, 0), &Options::default()).unwrap();
            let taken = first.local_addr().unwrap();
            let error = listen(taken, &Options::default()).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("TCP") && text.contains("choose another port"), "{text}");
        }
    }
}
