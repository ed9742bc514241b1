//! Which QEMU a QMP socket belongs to, seen without connecting: a monitor serves one client at a time, and a look must
//! not take that place.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::time::Duration;

/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// A socket file; a QEMU that starts makes another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketId {
    device: u64,
    inode: u64,
    /// Seconds and nanoseconds: inodes come again.
    made_at: (i64, i64),
}

/// The socket at `path`, if there is one.
pub fn at(path: &Path) -> Option<SocketId> {
    let metadata = fs::metadata(path).ok().filter(|metadata| metadata.file_type().is_socket())?;
    // When its mode or owner is changed, the time of that is another one.
    let made_at = (metadata.mtime(), metadata.mtime_nsec());
    Some(SocketId { device: metadata.dev(), inode: metadata.ino(), made_at })
}

/// Returns when a socket is at `path` that is not `known`.
pub async fn other_than(path: &Path, known: Option<SocketId>) -> SocketId {
    loop {
        match at(path) {
            Some(found) if known != Some(found) => return found,
            _ => tokio::time::sleep(LOOK_EVERY).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn a_new_socket_is_another_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        assert_eq!(at(&path), None);
        fs::write(&path, "").unwrap();
        assert_eq!(at(&path), None, "a file is no socket");
        fs::remove_file(&path).unwrap();
        let first = UnixListener::bind(&path).unwrap();
        let known = other_than(&path, None).await;
        assert_eq!(at(&path), Some(known));
        let same = tokio::time::timeout(LOOK_EVERY * 3, other_than(&path, Some(known))).await;
        assert!(same.is_err(), "it is the same");
        fs::remove_file(&path).unwrap();
        let _second = UnixListener::bind(&path).unwrap();
        assert_ne!(other_than(&path, Some(known)).await, known);
        drop(first);
    }
}
