//! Getting a userfaultfd of a running QEMU's address space.
//!
//! Two ways lead to it: the library `libgodwit_preload.so`, if QEMU was started with it, and one
//! injected system call if it was not. Both end with a descriptor in the engine that acts on QEMU's
//! memory.
//!
//! | module | what it does |
//! |---|---|
//! | `inject` | makes a thread of QEMU call `userfaultfd` and `close`, and puts everything back |
//! | `frame` | the signal frame that brings the thread back if the engine dies meanwhile |
//! | `gadget` | finds the code for both in QEMU's own mappings |
//! | `ptrace` | ptrace requests with bounded waits |
//! | `seccomp` | asks QEMU's filters beforehand whether they allow the calls |
//! | `preload` | the client of the preloaded library |
//! | [`probe()`] | says beforehand, without touching QEMU, whether it will work |
//!
//! Who holds the descriptor (design rule 12): with [`CloseRemote::Yes`] only the engine does, and
//! its death undoes every registration. With [`CloseRemote::No`] QEMU keeps a copy, and a restarted
//! engine takes it again with [`take_descriptor`].
//!
//! Limits: x86-64 only; threads with a shadow stack are refused. A thread blocked in one of the
//! calls that the kernel never restarts (epoll_wait, io_uring_enter, KVM_RUN, sigtimedwait) sees
//! `EINTR`, as after any stop; such threads are taken last. While a thread is held, no other thread
//! of the engine may wait for any child (`waitpid(-1)`): it would be told of the stops.

mod cpu;
mod frame;
mod gadget;
mod inject;
mod preload;
mod probe;
mod ptrace;
mod seccomp;

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::process::PidfdGetfdFlags;

pub use crate::error::AttachError;
use crate::procfs::{self, Activity, Identity};
use inject::{Session, Target};
pub use preload::userfaultfd_from_preload;
pub use probe::probe;

/// Most threads that are tried for one call.
const THREADS_TRIED_MAX: usize = 24;

/// How often the threads are listed anew when those listed have ended meanwhile.
const LISTINGS_MAX: usize = 4;

/// Between the two looks that tell a userfaultfd left over from one that QEMU is just creating.
const LEFT_OVER_AFTER: Duration = Duration::from_millis(20);

/// What becomes of QEMU's own copy of the descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseRemote {
    /// Closed: the engine's death undoes everything by itself. For tracking.
    Yes,
    /// Kept open: faults stay blocked until an engine comes back. For paging and post-copy.
    No,
}

/// What an injection did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InjectionReport {
    /// How long the thread stood still as far as was seen, in microseconds: on a busy host it may
    /// have stood still for longer, but not for longer than `requested_us`.
    pub stopped_us: u64,
    /// The same from the request to stop it on, including the time until it got a processor.
    pub requested_us: u64,
    /// Which thread it was.
    pub thread: i32,
    /// Number of the copy that QEMU still has.
    pub remote_fd: Option<i32>,
    /// Descriptors that an engine which died had left in QEMU and that were closed.
    pub left_over_closed: usize,
}

/// How the descriptor was obtained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// From the preloaded library.
    Preload {
        /// Number of the copy that QEMU still has.
        remote_fd: Option<i32>,
    },
    /// By an injected call.
    Injection(InjectionReport),
}

/// A fresh userfaultfd of another process's address space; UFFDIO_API was not called yet.
#[derive(Debug)]
pub struct Attached {
    /// The descriptor.
    pub uffd: OwnedFd,
    /// How it was obtained.
    pub way: Way,
    /// Whose it is.
    pub identity: Identity,
}

/// Gets a userfaultfd from the preloaded library if its socket is given, else by injection.
///
/// # Errors
/// [`AttachError`]; there is no silent change from one way to the other.
pub fn userfaultfd(
    pid: i32,
    preload_socket: Option<&Path>,
    close_remote: CloseRemote,
) -> Result<Attached, AttachError> {
    let identity = Identity::of(pid).map_err(|source| AttachError::Proc { pid, source })?;
    let (uffd, way) = match preload_socket {
        Some(socket) => {
            let (uffd, remote_fd) = userfaultfd_from_preload(pid, socket, close_remote)?;
            (uffd, Way::Preload { remote_fd })
        }
        None => {
            let keep = close_remote == CloseRemote::No;
            let (uffd, report) = userfaultfd_by_injection(pid, keep)?;
            (uffd, Way::Injection(report))
        }
    };
    identity.check().map_err(|source| AttachError::Proc { pid, source })?;
    Ok(Attached { uffd, way, identity })
}

/// Gets a userfaultfd by one injected call. Unless `keep_remote`, a second one closes QEMU's copy
/// while the thread is still held. Userfaultfds that an engine left behind when it died in the
/// middle of this are closed on the way.
///
/// # Errors
/// [`AttachError`]; QEMU runs on as before in every case.
pub fn userfaultfd_by_injection(
    pid: i32,
    keep_remote: bool,
) -> Result<(OwnedFd, InjectionReport), AttachError> {
    let identity = Identity::of(pid).map_err(|source| AttachError::Proc { pid, source })?;
    let left_over = left_over(pid)?;
    let work = Work::Create { keep_remote, left_over };
    let (fd, report) = on_some_thread(&identity, &work)?;
    let fd = fd.ok_or(AttachError::TracerThread { pid, source: None })?;
    Ok((fd, report))
}

/// Closes a userfaultfd of the process by an injected call: the copy that [`CloseRemote::No`] left.
///
/// # Errors
/// [`AttachError::TakeOver`] if the number is no userfaultfd there.
pub fn close_descriptor(pid: i32, remote_fd: i32) -> Result<InjectionReport, AttachError> {
    let identity = Identity::of(pid).map_err(|source| AttachError::Proc { pid, source })?;
    check_userfaultfd(pid, remote_fd)?;
    on_some_thread(&identity, &Work::Close { remote_fd }).map(|(_, report)| report)
}

/// Duplicates a userfaultfd that the process holds: for a pager that was restarted.
///
/// # Errors
/// [`AttachError::TakeOver`] if the number is no userfaultfd there or may not be taken.
pub fn take_descriptor(pid: i32, remote_fd: i32) -> Result<OwnedFd, AttachError> {
    let identity = Identity::of(pid).map_err(|source| AttachError::Proc { pid, source })?;
    check_userfaultfd(pid, remote_fd)?;
    duplicate(&identity, remote_fd)
}

fn check_userfaultfd(pid: i32, remote_fd: i32) -> Result<(), AttachError> {
    let failed = |source| AttachError::TakeOver { pid, remote_fd, source };
    let target = std::fs::read_link(format!("/proc/{pid}/fd/{remote_fd}")).map_err(failed)?;
    if target.as_os_str() != "anon_inode:[userfaultfd]" {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is no userfaultfd")));
    }
    Ok(())
}

fn duplicate(identity: &Identity, remote_fd: i32) -> Result<OwnedFd, AttachError> {
    let flags = PidfdGetfdFlags::empty();
    rustix::process::pidfd_getfd(identity.pidfd(), remote_fd, flags).map_err(|errno| {
        AttachError::TakeOver { pid: identity.pid(), remote_fd, source: errno.into() }
    })
}

/// Userfaultfds on which no handshake was ever done, seen twice with the same number.
fn left_over(pid: i32) -> Result<Vec<i32>, AttachError> {
    let look =
        || procfs::unused_userfaultfds(pid).map_err(|source| AttachError::Proc { pid, source });
    let first = look()?;
    if first.is_empty() {
        return Ok(first);
    }
    std::thread::sleep(LEFT_OVER_AFTER);
    let second = look()?;
    Ok(first.into_iter().filter(|fd| second.contains(fd)).collect())
}

/// What to do with a held thread.
#[derive(Debug, Clone)]
enum Work {
    Create { keep_remote: bool, left_over: Vec<i32> },
    Close { remote_fd: i32 },
}

type Done = (Option<OwnedFd>, InjectionReport);

/// Tries threads one after the other, best first, each from an OS thread of its own: should one not
/// stop, the end of that OS thread lets go of it.
fn on_some_thread(identity: &Identity, work: &Work) -> Result<Done, AttachError> {
    let pid = identity.pid();
    let target = Target::examine(pid)?;
    let mut tried = 0;
    let mut last = None;
    for _ in 0..LISTINGS_MAX {
        identity.check().map_err(|source| AttachError::Proc { pid, source })?;
        for tid in candidates(pid)?.into_iter().take(THREADS_TRIED_MAX) {
            tried += 1;
            match on_thread(identity, &target, tid, work) {
                Err(error) if error.another_thread_may_do() => {
                    tracing::debug!(pid, tid, %error, "another thread is tried");
                    last = Some(Box::new(error));
                }
                other => return other,
            }
        }
    }
    Err(AttachError::NoThread { pid, tried, last })
}

fn on_thread(
    identity: &Identity,
    target: &Target,
    tid: i32,
    work: &Work,
) -> Result<Done, AttachError> {
    let pid = target.pid;
    std::thread::scope(|scope| {
        let tracer = std::thread::Builder::new().name("godwit-ptrace".to_owned());
        let tracer = tracer.spawn_scoped(scope, || {
            ptrace::prepare_own_thread(procfs::processor(pid, tid));
            hold_and_work(identity, target, tid, work)
        });
        match tracer {
            Ok(tracer) => tracer
                .join()
                .unwrap_or_else(|_| Err(AttachError::TracerThread { pid, source: None })),
            Err(source) => Err(AttachError::TracerThread { pid, source: Some(source) }),
        }
    })
}

fn hold_and_work(
    identity: &Identity,
    target: &Target,
    tid: i32,
    work: &Work,
) -> Result<Done, AttachError> {
    let session = Session::open(target, tid)?;
    let result = match work {
        Work::Create { keep_remote, left_over } => {
            create(identity, &session, *keep_remote, left_over)
        }
        Work::Close { remote_fd } => {
            close(target.pid, &session, *remote_fd).map(|()| Made::default())
        }
    };
    let closed = session.close();
    // What went wrong first says more; but a descriptor is worthless if QEMU was not left well.
    let made = result?;
    let held = closed?;
    let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let Made { fd, remote_fd, left_over_closed } = made;
    let report = InjectionReport {
        stopped_us: us(held.from_stop),
        requested_us: us(held.from_request),
        thread: tid,
        remote_fd,
        left_over_closed,
    };
    Ok((fd, report))
}

#[derive(Default)]
struct Made {
    fd: Option<OwnedFd>,
    remote_fd: Option<i32>,
    left_over_closed: usize,
}

fn create(
    identity: &Identity,
    session: &Session<'_>,
    keep_remote: bool,
    left_over: &[i32],
) -> Result<Made, AttachError> {
    let pid = identity.pid();
    let mut left_over_closed = 0;
    for remote_fd in left_over {
        close(pid, session, *remote_fd)?;
        left_over_closed += 1;
    }
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    let result = session.call(libc::SYS_userfaultfd, [flags, 0, 0])?;
    if result < 0 {
        let source = error_of(result);
        return Err(match source.raw_os_error() {
            Some(libc::EPERM) => AttachError::UserfaultfdDenied { pid, source },
            _ => AttachError::Userfaultfd { pid, source },
        });
    }
    let remote_fd = i32::try_from(result).unwrap_or(-1);
    let fd = duplicate(identity, remote_fd);
    if keep_remote && fd.is_ok() {
        return Ok(Made { fd: fd.ok(), remote_fd: Some(remote_fd), left_over_closed });
    }
    let closed = close(pid, session, remote_fd);
    let fd = fd?;
    closed?;
    Ok(Made { fd: Some(fd), remote_fd: None, left_over_closed })
}

fn close(pid: i32, session: &Session<'_>, remote_fd: i32) -> Result<(), AttachError> {
    let number = u64::try_from(remote_fd).unwrap_or(u64::MAX);
    let result = session.call(libc::SYS_close, [number, 0, 0])?;
    if result < 0 {
        return Err(AttachError::CloseRemote { pid, remote_fd, source: error_of(result) });
    }
    Ok(())
}

fn error_of(result: i64) -> io::Error {
    io::Error::from_raw_os_error(i32::try_from(result.wrapping_neg()).unwrap_or(0))
}

/// Threads, those first whose interruption is least noticed.
fn candidates(pid: i32) -> Result<Vec<i32>, AttachError> {
    let threads = procfs::threads(pid).map_err(|source| AttachError::Proc { pid, source })?;
    let mut ranked: Vec<(u32, i32)> = threads
        .into_iter()
        .filter_map(|tid| {
            let state = procfs::thread_state(pid, tid).ok()?;
            let rank = match state {
                'Z' | 'X' => return None,
                'D' => 9,
                _ => rank(procfs::activity(pid, tid)),
            };
            Some((rank, tid))
        })
        .collect();
    ranked.sort_unstable();
    Ok(ranked.into_iter().map(|(_, tid)| tid).collect())
}

/// Lower is better. Source: signal(7), "Interruption of system calls ... by stop signals".
fn rank(activity: Activity) -> u32 {
    match activity {
        Activity::Blocked { number, arguments: [_, _, _, fourth, ..] } => match number {
            libc::SYS_ppoll | libc::SYS_pselect6 => 0,
            // Without a timeout the call is simply made again.
            libc::SYS_futex if fourth == 0 => 0,
            libc::SYS_futex => 1,
            // Those that end with EINTR although no handler ran.
            libc::SYS_epoll_wait
            | libc::SYS_epoll_pwait
            | libc::SYS_epoll_pwait2
            | libc::SYS_rt_sigtimedwait
            | libc::SYS_semop
            | libc::SYS_semtimedop
            | libc::SYS_io_getevents
            | libc::SYS_io_uring_enter
            | libc::SYS_ioctl => 8,
            // Blocked in a page fault, perhaps one that a userfaultfd must answer.
            -1 => 7,
            _ => 2,
        },
        Activity::Running | Activity::Unknown => 3,
    }
}

#[cfg(test)]
pub(crate) mod tests;
