//! UDP sockets with large buffers, and several of them on one port.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use socket2::{Domain, Protocol, Socket, Type};

use crate::error::TransportError;

/// Buffers below this lose packets at a few Gb/s.
const SMALL_BYTES: usize = 2 << 20;

/// UDP buffers that the kernel granted, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdpBuffers {
    /// Send buffer.
    pub send_bytes: usize,
    /// Receive buffer.
    pub receive_bytes: usize,
}

impl UdpBuffers {
    /// Says so in the log where the kernel granted so little that packets will be lost.
    pub(crate) fn warn_if_small(self, asked_bytes: usize) {
        if self.send_bytes.min(self.receive_bytes) < asked_bytes.min(SMALL_BYTES) {
            tracing::warn!(
                send_bytes = self.send_bytes,
                receive_bytes = self.receive_bytes,
                asked_bytes,
                "Small UDP buffers lose packets at high speed; raise net.core.rmem_max and wmem_max"
            );
        }
    }

    /// The smaller of each.
    pub(crate) fn least(self, other: Self) -> Self {
        Self {
            send_bytes: self.send_bytes.min(other.send_bytes),
            receive_bytes: self.receive_bytes.min(other.receive_bytes),
        }
    }
}

/// A socket for a connection to `remote`.
pub(crate) fn client(
    remote: SocketAddr,
    bind: Option<IpAddr>,
    buffer_bytes: usize,
) -> Result<(UdpSocket, UdpBuffers), TransportError> {
    let any = match remote {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let addr = SocketAddr::new(bind.unwrap_or(any), 0);
    open(addr, false, buffer_bytes)
}

/// `count` sockets that share one port; port 0 chooses one.
///
/// The kernel hashes the addresses of a packet to choose the socket, so all packets of a client's
/// socket reach the same one, as long as none of the sockets is closed.
pub(crate) fn server(
    addr: SocketAddr,
    count: usize,
    buffer_bytes: usize,
) -> Result<(Vec<UdpSocket>, UdpBuffers), TransportError> {
    // A socket that shares its port would also join those of another process of this user. One that
    // does not share it finds out whether anybody is there.
    let (probe, _) = open(addr, false, buffer_bytes)?;
    let addr = probe.local_addr().map_err(|source| TransportError::Socket {
        what: "read the port",
        addr,
        source,
    })?;
    drop(probe);

    let (first, mut granted) = open(addr, true, buffer_bytes)?;
    let mut sockets = vec![first];
    while sockets.len() < count {
        let (socket, buffers) = open(addr, true, buffer_bytes)?;
        granted = granted.least(buffers);
        sockets.push(socket);
    }
    Ok((sockets, granted))
}

fn open(
    addr: SocketAddr,
    share_port: bool,
    buffer_bytes: usize,
) -> Result<(UdpSocket, UdpBuffers), TransportError> {
    let failed = |what| move |source: io::Error| TransportError::Socket { what, addr, source };
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))
        .map_err(failed("open a socket"))?;
    if share_port {
        socket.set_reuse_port(true).map_err(failed("share the port"))?;
    }
    // The kernel grants what it may and says nothing if that is less.
    socket.set_recv_buffer_size(buffer_bytes).map_err(failed("set the receive buffer"))?;
    socket.set_send_buffer_size(buffer_bytes).map_err(failed("set the send buffer"))?;
    socket.bind(&addr.into()).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => TransportError::AddressInUse { protocol: "UDP", addr },
        _ => TransportError::Socket { what: "bind a socket", addr, source },
    })?;
    // Linux reports twice what may be used; the other half is for its own bookkeeping.
    let receive_bytes = socket.recv_buffer_size().map_err(failed("read the receive buffer"))? / 2;
    let send_bytes = socket.send_buffer_size().map_err(failed("read the send buffer"))? / 2;
    Ok((socket.into(), UdpBuffers { send_bytes, receive_bytes }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_shared_within_and_refused_to_others() {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let (sockets, granted) = server(any, 3, 1 << 20).unwrap();
        let port = sockets[0].local_addr().unwrap().port();
        assert!(sockets.iter().all(|s| s.local_addr().unwrap().port() == port));
        assert!(granted.receive_bytes >= 200 << 10, "{granted:?}");

        let taken = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let error = server(taken, 3, 1 << 20).unwrap_err();
        assert!(matches!(error, TransportError::AddressInUse { addr, .. } if addr == taken));
    }
}
