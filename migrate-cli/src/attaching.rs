//! Getting a userfaultfd of QEMU's address space, and saying beforehand whether that will work.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use qemu_glue::attach::{self, CloseRemote, Way};
use qemu_glue::check::{Finding, Severity};

use crate::blocking::on_thread;
use crate::error::EngineError;

/// A userfaultfd of QEMU's address space.
#[derive(Debug)]
pub struct Attached {
    /// The descriptor; the only one.
    pub uffd: OwnedFd,
    /// Time that a thread of QEMU was stopped, in microseconds; nothing with the preloaded library.
    pub stopped_us: Option<u64>,
}

/// Whether attaching will work, without touching QEMU. The direct path alone needs it, so nothing here is worse than
/// [`Severity::Indirect`].
pub fn probe(pid: i32, preload_socket: Option<&Path>) -> Vec<Finding> {
    let mut findings = match preload_socket {
        Some(socket) if !socket.exists() => vec![Finding::blocker(
            format!("There is no socket of the preloaded library at {}", socket.display()),
            "start QEMU with LD_PRELOAD=libgodwit_preload.so and GODWIT_PRELOAD_SOCKET set, or \
             leave --preload-socket out",
        )],
        Some(_) => vec![],
        None => attach::probe(pid),
    };
    for finding in &mut findings {
        finding.severity = finding.severity.min(Severity::Indirect);
    }
    findings
}

/// Attaches for paging: QEMU keeps a copy, whose number is returned, so that its threads wait for
/// another engine should this one die (rule 12).
///
/// # Errors
/// What [`attach::userfaultfd`] says.
pub async fn attach_shared(pid: i32) -> Result<(OwnedFd, i32), EngineError> {
    let attached = on_thread(move || attach::userfaultfd_by_injection(pid, true)).await;
    let (uffd, report) = attached??;
    let remote_fd = report.remote_fd;
    let remote_fd = remote_fd.ok_or_else(|| EngineError::Internal("QEMU kept no copy".into()))?;
    Ok((uffd, remote_fd))
}

/// Closes the copy that [`attach_shared`] left in QEMU.
pub async fn close_copy(pid: i32, remote_fd: i32) {
    let closed = on_thread(move || attach::close_descriptor(pid, remote_fd)).await;
    if let Ok(Err(error)) = closed {
        tracing::info!(%error, "QEMU keeps a descriptor that is of no use any more");
    }
}

/// Attaches. QEMU keeps no copy, so that the death of this process undoes everything (rule 12).
///
/// # Errors
/// What [`attach::userfaultfd`] says.
pub async fn attach(pid: i32, preload_socket: Option<&Path>) -> Result<Attached, EngineError> {
    let socket: Option<PathBuf> = preload_socket.map(Path::to_owned);
    let attached =
        on_thread(move || attach::userfaultfd(pid, socket.as_deref(), CloseRemote::Yes)).await??;
    let stopped_us = match attached.way {
        Way::Injection(report) => Some(report.stopped_us),
        Way::Preload { .. } => None,
    };
    Ok(Attached { uffd: attached.uffd, stopped_us })
}
