//! The userfaultfd operations that the `userfaultfd` crate lacks, and a wrapper around it.
//!
//! A userfaultfd belongs to the address space of the process that created it, whoever holds the
//! descriptor: registering through QEMU's descriptor registers QEMU's memory, and the addresses are
//! QEMU's. The crate issues UFFDIO_API only on descriptors that it created itself, it does not
//! tell how far a UFFDIO_ZEROPAGE came, and its copies are never write-protected: these are here, everything
//! else goes through the crate.
//!
//! Source: include/uapi/linux/userfaultfd.h.
#![expect(unsafe_code, reason = "ioctls on a userfaultfd and adoption of its descriptor")]

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use linux_raw_sys::general::{
    UFFD_API, UFFD_FEATURE_MINOR_HUGETLBFS, UFFD_FEATURE_MISSING_HUGETLBFS,
    UFFD_FEATURE_MISSING_SHMEM, UFFD_FEATURE_WP_ASYNC, UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
    UFFD_FEATURE_WP_UNPOPULATED, uffdio_api, uffdio_copy, uffdio_range, uffdio_zeropage,
};
use rustix::ioctl::{Opcode, Updater, opcode};
use rustix::mm::UserfaultfdFlags;
use userfaultfd::{RegisterMode, Uffd};

const UFFDIO_API_OPCODE: Opcode = opcode::read_write::<uffdio_api>(0xaa, 0x3f);
const _: () = assert!(size_of::<uffdio_api>() == 24);

const UFFDIO_ZEROPAGE_OPCODE: Opcode = opcode::read_write::<uffdio_zeropage>(0xaa, 0x04);
const _: () = assert!(size_of::<uffdio_zeropage>() == 32);

const UFFDIO_COPY_OPCODE: Opcode = opcode::read_write::<uffdio_copy>(0xaa, 0x03);
const _: () = assert!(size_of::<uffdio_copy>() == 40);

/// The pages that are filled are write-protected from the beginning (UFFDIO_COPY_MODE_WP, which is not among
/// the constants of linux-raw-sys).
const COPY_PROTECTED: u64 = 1 << 1;

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
    /// Missing faults on hugetlbfs.
    pub const MISSING_HUGETLBFS: Self = Self(UFFD_FEATURE_MISSING_HUGETLBFS as u64);
    /// Mapping of pages of hugetlbfs that the file holds already.
    pub const MINOR_HUGETLBFS: Self = Self(UFFD_FEATURE_MINOR_HUGETLBFS as u64);
    /// What dirty tracking asks for.
    pub const TRACKING: Self =
        Self(Self::WP_ASYNC.0 | Self::WP_UNPOPULATED.0 | Self::WP_HUGETLBFS_SHMEM.0);
    /// What demand paging asks for.
    pub const PAGING: Self = Self(Self::MISSING_SHMEM.0 | Self::MISSING_HUGETLBFS.0);
    /// What demand paging asks for that also takes pages away: write faults are reported.
    pub const EVICTING: Self = Self(Self::PAGING.0 | Self::WP_HUGETLBFS_SHMEM.0);

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

/// A userfaultfd of this process's own address space, for a look at what the kernel can do or at
/// the pages of a file. It need not see faults of the kernel.
pub(crate) fn create_local() -> io::Result<OwnedFd> {
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

/// How far filling missing pages came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// So many bytes from the start on were filled: at least a page, perhaps not all.
    Bytes(u64),
    /// The first page was there already, and nothing was done.
    Present,
}

/// What a file holds at the start of a range of a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cached {
    /// So many bytes were there and are mapped now: at least a page, perhaps not all.
    Bytes(u64),
    /// The first page was there and mapped.
    Mapped,
    /// The first page is missing.
    Missing,
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

    /// Makes a registered range writable again, and wakes who waits for that.
    ///
    /// # Errors
    /// As [`write_protect`](Self::write_protect).
    pub fn unprotect(&self, range: &Range<u64>) -> io::Result<()> {
        let (address, length) = pointer(range);
        again(|| self.uffd.remove_write_protection(address, length, true).map_err(io_error))
    }

    /// Fills missing pages of a registered range, from `address` on, and wakes who waits for them.
    /// The length is a multiple of the range's page size. Nobody sees a page half filled. A page
    /// that is there ends the call.
    ///
    /// # Errors
    /// The kernel's answer: `ENOENT` if the range is not registered or lies in several mappings,
    /// `ESRCH` if the owner is gone, `ENOMEM` if the file may not grow, `EFAULT` if it ends before.
    pub fn copy(&self, address: u64, content: &[u8]) -> io::Result<Filled> {
        let (target, length) = pointer(&(address..address.saturating_add(content.len() as u64)));
        let copy = || {
            // SAFETY: reads `length` bytes of `content`. What it writes to are pages of another
            // process that did not exist before, so that no reference to them does.
            unsafe { self.uffd.copy(content.as_ptr().cast(), target, length, true) }
        };
        again(|| match copy() {
            Ok(bytes) => Ok(Filled::Bytes(bytes as u64)),
            Err(userfaultfd::Error::PartiallyCopied(bytes)) => progress(bytes as i64),
            Err(error) => present_or(io_error(error)),
        })
    }

    /// As [`copy`](Self::copy); the pages are write-protected before anybody can write to them.
    ///
    /// # Errors
    /// As [`copy`](Self::copy); `EINVAL` if write faults were not registered for.
    pub fn copy_protected(&self, address: u64, content: &[u8]) -> io::Result<Filled> {
        let len = content.len() as u64;
        again(|| {
            let src = content.as_ptr().expose_provenance() as u64;
            let mut argument =
                uffdio_copy { dst: address, src, len, mode: COPY_PROTECTED, copy: 0 };
            // SAFETY: UFFDIO_COPY reads and writes exactly one uffdio_copy (size asserted above); it reads `len`
            // bytes of `content`, whose address was exposed. What it fills is as in `copy`.
            let request = unsafe { Updater::<UFFDIO_COPY_OPCODE, uffdio_copy>::new(&mut argument) };
            // SAFETY: the request's pointer is to `argument`, which outlives the call.
            match unsafe { rustix::ioctl::ioctl(&self.uffd, request) } {
                Ok(()) => Ok(Filled::Bytes(len)),
                Err(rustix::io::Errno::AGAIN) => progress(argument.copy),
                Err(error) => present_or(error.into()),
            }
        })
    }

    /// As [`copy`](Self::copy), with zeros. hugetlbfs does not have this.
    ///
    /// # Errors
    /// As [`copy`](Self::copy); `EINVAL` on hugetlbfs.
    pub fn zero(&self, range: &Range<u64>) -> io::Result<Filled> {
        let len = range.end.saturating_sub(range.start);
        again(|| {
            let range = uffdio_range { start: range.start, len };
            let mut argument = uffdio_zeropage { range, mode: 0, zeropage: 0 };
            // SAFETY: UFFDIO_ZEROPAGE reads and writes exactly one uffdio_zeropage (size asserted
            // above). Memory that it fills is as in `copy`.
            let request =
                unsafe { Updater::<UFFDIO_ZEROPAGE_OPCODE, uffdio_zeropage>::new(&mut argument) };
            // SAFETY: the request's pointer is to `argument`, which outlives the call.
            match unsafe { rustix::ioctl::ioctl(&self.uffd, request) } {
                Ok(()) => Ok(Filled::Bytes(len)),
                Err(rustix::io::Errno::AGAIN) => progress(argument.zeropage),
                Err(error) => present_or(error.into()),
            }
        })
    }

    /// Wakes the threads that wait for pages of a range. Each looks again: if its page is still
    /// missing, its fault is reported anew.
    ///
    /// # Errors
    /// The kernel's answer; `EINVAL` if the range is not aligned to pages.
    pub fn wake(&self, range: &Range<u64>) -> io::Result<()> {
        let (start, length) = pointer(range);
        self.uffd.wake(start, length).map_err(io_error)
    }

    /// Maps what the file behind a registered range holds, from the start on up to the first page
    /// that is missing, and wakes who waits for it. Fills nothing.
    ///
    /// # Errors
    /// The kernel's answer; `ENOENT` if the range is registered with no userfaultfd or lies in
    /// several mappings.
    pub fn map_cached(&self, range: &Range<u64>) -> io::Result<Cached> {
        let (start, length) = pointer(range);
        again(|| match self.uffd.r#continue(start, length, true).map_err(io_error) {
            Ok(bytes) => Ok(Cached::Bytes(bytes)),
            Err(error) => match error.raw_os_error() {
                Some(libc::EEXIST) => Ok(Cached::Mapped),
                Some(libc::EFAULT) => Ok(Cached::Missing),
                _ => Err(error),
            },
        })
    }

    /// Lets reads return at once when there is nothing to read; poll(2) answers with an error
    /// otherwise. Holds for the owner's copy of the descriptor as well.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        let flags = rustix::fs::fcntl_getfl(&self.uffd)?;
        Ok(rustix::fs::fcntl_setfl(&self.uffd, flags | rustix::fs::OFlags::NONBLOCK)?)
    }
}

/// The kernel stopped early: after some bytes, or before it did anything (then the count is an
/// error number or 0).
fn progress(bytes: i64) -> io::Result<Filled> {
    match u64::try_from(bytes) {
        Ok(bytes) if bytes > 0 => Ok(Filled::Bytes(bytes)),
        _ => Err(io::Error::from_raw_os_error(libc::EAGAIN)),
    }
}

fn present_or(error: io::Error) -> io::Result<Filled> {
    if error.raw_os_error() == Some(libc::EEXIST) { Ok(Filled::Present) } else { Err(error) }
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

fn again<T>(mut operation: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for _ in 0..AGAIN_MAX {
        match operation() {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
            other => return other,
        }
    }
    operation()
}

/// The error number inside the crate's error.
pub(crate) fn io_error(error: userfaultfd::Error) -> io::Error {
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
