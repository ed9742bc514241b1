//! Client of `libgodwit_preload.so` (qemu-glue/preload): asks it for a userfaultfd.
//!
//! ```text
//! engine -> library   one byte: 't' (take: the library closes its copy) or 'k' (keep)
//! library -> engine   five bytes: 'u' and the number of the copy kept (-1: none), with the
//!                     descriptor as SCM_RIGHTS; or 'e' and the error number
//! ```

use std::io::{self, IoSliceMut, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use super::CloseRemote;
use crate::error::AttachError;

/// How long the library may take for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Gets a userfaultfd from the library in the process; with it the number of QEMU's own copy, if
/// that was to be kept.
///
/// # Errors
/// [`AttachError::Preload`] if there is no answer, [`AttachError::PreloadWrongProcess`] if another
/// process answers, [`AttachError::UserfaultfdDenied`] if the process may not create one.
pub fn userfaultfd_from_preload(
    pid: i32,
    socket: &Path,
    close_remote: CloseRemote,
) -> Result<(OwnedFd, Option<i32>), AttachError> {
    let failed =
        |what| move |source| AttachError::Preload { what, path: socket.to_owned(), source };
    let mut stream = UnixStream::connect(socket).map_err(failed("connect to"))?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT)).map_err(failed("set up"))?;
    stream.set_write_timeout(Some(ANSWER_TIMEOUT)).map_err(failed("set up"))?;
    let peer = rustix::net::sockopt::socket_peercred(&stream)
        .map_err(|errno| failed("identify the owner of")(errno.into()))?;
    let found = peer.pid.as_raw_nonzero().get();
    if found != pid {
        let path = socket.to_owned();
        return Err(AttachError::PreloadWrongProcess { path, found, expected: pid });
    }
    let wish = match close_remote {
        CloseRemote::Yes => b"t",
        CloseRemote::No => b"k",
    };
    stream.write_all(wish).map_err(failed("send to"))?;
    let (kind, number, fd) = receive(&stream).map_err(failed("read from"))?;
    match (kind, fd) {
        (b'u', Some(fd)) => Ok((fd, (number >= 0).then_some(number))),
        (b'e', _) => {
            let source = io::Error::from_raw_os_error(number);
            Err(match number {
                libc::EPERM => AttachError::UserfaultfdDenied { pid, source },
                _ => AttachError::Userfaultfd { pid, source },
            })
        }
        _ => Err(failed("understand the answer of")(io::Error::from(io::ErrorKind::InvalidData))),
    }
}

fn receive(stream: &UnixStream) -> io::Result<(u8, i32, Option<OwnedFd>)> {
    let mut answer = [0u8; 5];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(&mut answer)];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
    let received = rustix::net::recvmsg(stream.as_fd(), &mut buffers, &mut control, flags)?;
    let mut fd = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message {
            fd = fds.next();
        }
    }
    if received.bytes != answer.len() {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
    }
    let [kind, number @ ..] = answer;
    Ok((kind, i32::from_le_bytes(number), fd))
}
