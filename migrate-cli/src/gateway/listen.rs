//! Waits for QEMUs that want to send a guest.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use tokio::net::{TcpListener, UnixListener};

use super::addr::{LIBVIRT_PORTS, QemuAddr};
use super::socket::QemuSocket;
use crate::error::EngineError;
use crate::qmp_socket::{self, SocketId};

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
    paths: Vec<(PathBuf, Option<SocketId>)>,
    /// Who may connect to Unix sockets.
    mode: u32,
}

impl QemuListener {
    /// Listens at all of these; Unix sockets get this `mode`, as of files.
    ///
    /// # Errors
    /// [`EngineError::Misuse`] with the first one where that is not possible.
    pub async fn bind(addrs: &[QemuAddr], mode: u32) -> Result<Self, EngineError> {
        let mut listener = Self { sockets: vec![], paths: vec![], mode };
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
                let failed = |error| failed(addr.to_string(), error);
                remove_left(path).map_err(failed)?;
                let bound = UnixListener::bind(path).map_err(failed)?;
                self.paths.push((path.clone(), qmp_socket::at(path)));
                self.sockets.push(Socket::Unix(bound, addr.to_string()));
                let mode = fs::Permissions::from_mode(self.mode);
                fs::set_permissions(path, mode).map_err(failed)?;
            }
            QemuAddr::Tcp { host, ports } => {
                let (first, last) = LIBVIRT_PORTS;
                let (first, last) = ports.ok_or_else(|| EngineError::Misuse {
                    what: format!("{addr} names no port to wait at"),
                    remedy: format!(
                        "Use {addr}:{first}-{last}, the ports that libvirt chooses from"
                    ),
                })?;
                for port in first..=last {
                    let one = QemuAddr::Tcp { host: host.clone(), ports: Some((port, port)) };
                    let at = one.to_string();
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
        for (path, socket) in &self.paths {
            // Somebody else may wait there by now.
            if qmp_socket::at(path) == *socket {
                let _gone_already = fs::remove_file(path);
            }
        }
    }
}

/// Removes a socket that a process left which is gone. One in use stays, and so does whatever is no socket.
fn remove_left(path: &Path) -> io::Result<()> {
    if qmp_socket::at(path).is_none() {
        return Ok(());
    }
    // The kernel says whether a stream's socket is there before it finds that this is none: nobody is disturbed.
    match UnixDatagram::unbound()?.connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        _ => Ok(()),
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

#[cfg(test)]
mod tests {
    use std::os::unix::net as std_net;

    use super::*;

    #[tokio::test]
    async fn sockets_in_use_and_files_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let addr = [QemuAddr::Unix(path.clone())];
        fs::write(&path, "a file").unwrap();
        assert!(QemuListener::bind(&addr, 0o600).await.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"a file");
        fs::remove_file(&path).unwrap();
        let other = std_net::UnixListener::bind(&path).unwrap();
        other.set_nonblocking(true).unwrap();
        assert!(QemuListener::bind(&addr, 0o600).await.is_err());
        assert!(other.accept().is_err(), "nobody is to have connected");
        // What its process left.
        drop(other);
        let listener = QemuListener::bind(&addr, 0o620).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o620);
        let waits = std_net::UnixStream::connect(&path).unwrap();
        assert_eq!(listener.accept().await.unwrap().port, 0);
        drop((listener, waits));
        assert!(!path.exists());
        // Of another one at the same place, nothing is removed.
        let listener = QemuListener::bind(&addr, 0o600).await.unwrap();
        fs::remove_file(&path).unwrap();
        let _other = std_net::UnixListener::bind(&path).unwrap();
        drop(listener);
        assert!(path.exists());
    }
}
