//! The userfaultfd operations that the `userfaultfd` crate lacks, and a wrapper around it.
//!
//! A userfaultfd belongs to the address space of the process that created it, whoever holds the
//! descriptor: registering through QEMU's descriptor registers QEMU's memory, and the addresses are
//! QEMU's. The crate issues UFFDIO_API only on descriptors that it created itself, so that
//! handshake is here; registering, protecting and waking go through the crate.
//!
//! Source: include/uapi/linux/userfaultfd.h.
#![expect(unsafe_code, reason = "ioctls on a userfaultfd and adoption of its descriptor")]

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use linux_raw_sys::general::{
    UFFD_API, UFFD_FEATURE_MISSING_SHMEM, UFFD_FEATURE_WP_ASYNC, UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
    UFFD_FEATURE_WP_UNPOPULATED, uffdio_api,
};
use rustix::ioctl::{Opcode, Updater, opcode};
use rustix::mm::UserfaultfdFlags;
use userfaultfd::{RegisterMode, Uffd};

const UFFDIO_API_OPCODE: Opcode = opcode::read_write::<uffdio_api>(0xaa, 0x3f);
const _: () = assert!(size_of::<uffdio_api>() == 24);

/// Most bytes that one UFFDIO_WRITEPROTECT covers: the call holds QEMU's mmap lock for reading, and
/// a thread that wants to map memory meanwhile waits for its end (about 0.1 ms per 64 MiB).
const PROTECT_BYTES_MAX: u64 = 256 << 20;

/// How often an operation is tried again that the kernel interrupted (EAGAIN).
const AGAIN_MAX: u32 = 1000;

/// Feature bits of a userfaultfd (UFFD_FEATURE_*).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features(u64);

impl Features {
    /// Write faults are resolved in the kernel; PAGEMAP_SCAN tells which pages were written.
    pub const WP_ASYNC: Self = Self(UFFD_FEATURE_WP_ASYNC as u64);
    /// Pages that were never populated are protected as well.
    pub const WP_UNPOPULATED: Self = Self(UFFD_FEATURE_WP_UNPOPULATED as u64);
    /// Write protection of tmpfs and hugetlbfs.
    pub const WP_HUGETLBFS_SHMEM: Self = Self(UFFD_FEATURE_WP_HUGETLBFS_SHMEM as u64);
    /// Missing faults on tmpfs.
    pub const MISSING_SHMEM: Self = Self(UFFD_FEATURE_MISSING_SHMEM as u64);
    /// What dirty tracking asks for.
    pub const TRACKING: Self =
        Self(Self::WP_ASYNC.0 | Self::WP_UNPOPULATED.0 | Self::WP_HUGETLBFS_SHMEM.0);

    /// Takes bits as the kernel numbers them.
    pub fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The bits as the kernel numbers them.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Both.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` are among these.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Issues UFFDIO_API on a fresh userfaultfd, whoever created it. Returns the features that the
/// kernel supports. A descriptor takes this once in its life.
///
/// # Errors
/// `EINVAL` if the kernel lacks one of the features, `EPERM` or `EINVAL` if the descriptor was
/// initialised before.
pub fn handshake(uffd: impl AsFd, wanted: Features) -> io::Result<Features> {
    let mut api = uffdio_api { api: u64::from(UFFD_API), features: wanted.bits(), ioctls: 0 };
    // SAFETY: UFFDIO_API reads and writes exactly one uffdio_api (size asserted above).
    let request = unsafe { Updater::<UFFDIO_API_OPCODE, uffdio_api>::new(&mut api) };
    // SAFETY: the request's pointer is to `api`, which outlives the call; on a descriptor of
    // another kind the kernel answers ENOTTY.
    unsafe { rustix::ioctl::ioctl(uffd, request) }?;
    Ok(Features(api.features))
}

/// A userfaultfd of this process's own address space, for a look at what the kernel can do.
fn create_local() -> io::Result<OwnedFd> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // The kernel's features do not depend on the flag that needs no privilege, so fall back to it.
    // SAFETY: an uninitialised userfaultfd has no influence on memory; no range is registered.
    unsafe { rustix::mm::userfaultfd(flags) }
        .or_else(|_| {
            let user_only = UserfaultfdFlags::from_bits_retain(flags.bits() | 1);
            // SAFETY: as above.
            unsafe { rustix::mm::userfaultfd(user_only) }
        })
        .map_err(io::Error::from)
}

/// The features that this kernel supports.
///
/// # Errors
/// The kernel's answer if it has no userfaultfd or does not allow one.
pub fn supported() -> io::Result<Features> {
    handshake(create_local()?, Features(0))
}

/// An initialised userfaultfd of another process. Dropping it closes the descriptor.
#[derive(Debug)]
pub struct TargetUffd {
    uffd: Uffd,
}

/// What registering did not do.
#[derive(Debug)]
pub enum RegisterError {
    /// Another userfaultfd holds part of the range.
    Busy,
    /// Anything else.
    Other(io::Error),
}

impl TargetUffd {
    /// Issues the handshake and takes the descriptor over.
    ///
    /// # Errors
    /// As [`handshake`].
    pub fn initialise(fd: OwnedFd, wanted: Features) -> io::Result<Self> {
        handshake(&fd, wanted)?;
        Ok(Self::adopt(fd))
    }

    /// Takes over a descriptor on which the handshake was done before (by a process that died).
    pub fn adopt(fd: OwnedFd) -> Self {
        // SAFETY: the descriptor is open and owned, and ownership moves into the Uffd.
        let uffd = unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) };
        Self { uffd }
    }

    /// The crate's view, for faults, copies and wake-ups.
    pub fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    /// Registers a range of the owner's addresses.
    ///
    /// # Errors
    /// [`RegisterError::Busy`] if another userfaultfd holds part of it.
    pub fn register(&self, range: &Range<u64>, mode: RegisterMode) -> Result<(), RegisterError> {
        let (start, length) = pointer(range);
        match self.uffd.register_with_mode(start, length, mode) {
            Ok(_) => Ok(()),
            Err(error) => match io_error(error) {
                error if error.raw_os_error() == Some(libc::EBUSY) => Err(RegisterError::Busy),
                error => Err(RegisterError::Other(error)),
            },
        }
    }

    /// Ends the registration of a range; pages become writable again.
    ///
    /// # Errors
    /// The kernel's answer; `ESRCH` if the owner is gone.
    pub fn unregister(&self, range: &Range<u64>) -> io::Result<()> {
        let (start, length) = pointer(range);
        self.uffd.unregister(start, length).map_err(io_error)
    }

    /// Write-protects a registered range, piece by piece.
    ///
    /// # Errors
    /// The kernel's answer; `ENOENT` if part of the range is not registered.
    pub fn write_protect(&self, range: &Range<u64>) -> io::Result<()> {
        let mut start = range.start;
        while start < range.end {
            let end = range.end.min(start.saturating_add(PROTECT_BYTES_MAX));
            let (address, length) = pointer(&(start..end));
            again(|| self.uffd.write_protect(address, length).map_err(io_error))?;
            start = end;
        }
        Ok(())
    }
}

impl AsFd for TargetUffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

impl AsRawFd for TargetUffd {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.uffd.as_raw_fd()
    }
}

/// The crate takes the owner's addresses as pointers; they are never followed here.
fn pointer(range: &Range<u64>) -> (*mut c_void, usize) {
    let length = range.end.saturating_sub(range.start);
    (
        std::ptr::without_provenance_mut(usize::try_from(range.start).unwrap_or(0)),
        usize::try_from(length).unwrap_or(0),
    )
}

fn again(mut operation: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    for _ in 0..AGAIN_MAX {
        match operation() {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
            other => return other,
        }
    }
    operation()
}

/// The error number inside the crate's error.
fn io_error(error: userfaultfd::Error) -> io::Error {
    match error {
        userfaultfd::Error::SystemError(errno)
        | userfaultfd::Error::CopyFailed(errno)
        | userfaultfd::Error::ZeropageFailed(errno) => io::Error::from_raw_os_error(errno as i32),
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_can_track() {
        let features = supported().unwrap();
        assert!(features.contains(Features::TRACKING), "{:#x}", features.bits());
    }

    #[test]
    fn a_second_handshake_is_refused() {
        let fd = create_local().unwrap();
        handshake(&fd, Features::TRACKING).unwrap();
        assert!(handshake(&fd, Features::TRACKING).is_err());
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(handshake(file, Features(0)).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }

    #[test]
    fn unmapped_ranges_are_refused_with_the_kernels_answer() {
        let uffd = TargetUffd::initialise(create_local().unwrap(), Features::TRACKING).unwrap();
        let result = uffd.register(&(0x1000..0x2000), RegisterMode::WRITE_PROTECT);
        assert!(matches!(result, Err(RegisterError::Other(_))), "{result:?}");
        assert!(uffd.write_protect(&(0x1000..0x2000)).is_err());
    }
}
