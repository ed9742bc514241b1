//! LD_PRELOAD library that hands QEMU's userfaultfd to the engine, without ptrace.
//!
//! ```text
//! GODWIT_PRELOAD_SOCKET=/run/godwit/%p.sock LD_PRELOAD=libgodwit_preload.so qemu-system-x86_64 ...
//!
//! constructor: bind the socket (mode 0600), start one thread, forget both variables
//! thread:      accept -> same user or root? -> one byte -> userfaultfd -> answer
//!
//! engine -> library   't': take, the library closes its copy;  'k': the library keeps its copy
//! library -> engine   'u' and the number of the copy kept (i32, little-endian; -1: none), with the
//!                     descriptor as SCM_RIGHTS;  'e' and the error number
//! ```
//!
//! `%p` in the path stands for the process number. Without the variable the library does nothing.
//!
//! Invariants: QEMU is never ended, its standard output never written to, its signals never taken
//! (the thread blocks all), its memory allocator not used after the constructor. What goes wrong in
//! the constructor is one line on standard error, and the engine falls back to attaching.
//!
//! Limit: a fork takes no threads along, so with `-daemonize` the socket goes dead; let the service
//! manager start QEMU in the foreground.
#![expect(unsafe_code, reason = "system calls through libc, in a process that is not ours")]

use std::ffi::{CStr, CString, OsStr, OsString, c_int, c_void};
use std::mem::{size_of, zeroed};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

const SOCKET_VARIABLE: &str = "GODWIT_PRELOAD_SOCKET";

/// Stack of the thread in bytes, beside what the C library adds for thread-local data.
const STACK_BYTES: usize = 256 << 10;

/// How long an engine may take to say what it wants, in seconds.
const REQUEST_TIMEOUT_S: i64 = 2;

/// Most copies that are kept: each engine that pages asks for one.
const KEPT_MAX: usize = 16;

const BACKLOG: c_int = 4;

static LISTENER: AtomicI32 = AtomicI32::new(-1);
static KEPT: AtomicUsize = AtomicUsize::new(0);

/// Called by the dynamic linker before `main`.
#[used]
// SAFETY: the section holds pointers to functions that the dynamic linker calls with (argc, argv,
// envp), which a C function without parameters ignores.
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = constructor;

extern "C" fn constructor() {
    // A panic must not cross into the dynamic linker.
    if std::panic::catch_unwind(start).is_err() {
        complain("the library panicked");
    }
}

fn start() {
    let Some(pattern) = std::env::var_os(SOCKET_VARIABLE) else { return };
    forget_variables();
    let path = expand(&pattern, std::process::id());
    match listen(&path) {
        Ok(listener) => {
            LISTENER.store(listener, Ordering::SeqCst);
            if let Err(error) = start_thread() {
                complain(&format!("cannot start a thread: {error}"));
            }
        }
        Err(error) => complain(&format!("cannot listen on {}: {error}", path.display())),
    }
}

fn complain(text: &str) {
    use std::io::Write;
    // Standard error may be closed; nothing can be done about that.
    let _ = writeln!(std::io::stderr(), "godwit_preload: {text}");
}

/// `%p` stands for the process number.
fn expand(pattern: &OsStr, pid: u32) -> OsString {
    let mut path = Vec::new();
    let mut rest = pattern.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        rest = match rest.strip_prefix(b"%p") {
            Some(after) => {
                path.extend_from_slice(pid.to_string().as_bytes());
                after
            }
            None => {
                path.push(*byte);
                after
            }
        };
    }
    OsString::from_vec(path)
}

/// Programs that QEMU starts (network scripts) must not load the library again.
fn forget_variables() {
    let own = own_name();
    let list = std::env::var_os("LD_PRELOAD").unwrap_or_default();
    let left = without(&list, own.as_deref());
    // SAFETY: before `main` there are no other threads that could read the environment.
    unsafe {
        std::env::remove_var(SOCKET_VARIABLE);
        if left.is_empty() {
            std::env::remove_var("LD_PRELOAD");
        } else {
            std::env::set_var("LD_PRELOAD", left);
        }
    }
}

/// The list of libraries without the one whose file name is `name`.
fn without(list: &OsStr, name: Option<&[u8]>) -> OsString {
    let file_name = |path: &[u8]| path.rsplit(|byte| *byte == b'/').next().map(<[u8]>::to_vec);
    let own = name.and_then(file_name);
    let mut left = Vec::new();
    for entry in list.as_bytes().split(|byte| matches!(byte, b':' | b' ')) {
        if entry.is_empty() || (own.is_some() && file_name(entry) == own) {
            continue;
        }
        if !left.is_empty() {
            left.push(b':');
        }
        left.extend_from_slice(entry);
    }
    OsString::from_vec(left)
}

/// Path under which this library was loaded.
fn own_name() -> Option<Vec<u8>> {
    // SAFETY: `info` is written by dladdr; the name in it lives as long as the library.
    unsafe {
        let mut info: libc::Dl_info = zeroed();
        if libc::dladdr(constructor as *const c_void, &raw mut info) == 0
            || info.dli_fname.is_null()
        {
            return None;
        }
        Some(CStr::from_ptr(info.dli_fname).to_bytes().to_vec())
    }
}

/// Turns -1 into the error number.
fn check(result: c_int) -> std::io::Result<c_int> {
    if result == -1 { Err(std::io::Error::last_os_error()) } else { Ok(result) }
}

fn address(path: &OsStr) -> std::io::Result<libc::sockaddr_un> {
    // SAFETY: integers only, for which zero is a value.
    let mut address: libc::sockaddr_un = unsafe { zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_bytes();
    if bytes.is_empty() || bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(std::io::Error::from(std::io::ErrorKind::InvalidFilename));
    }
    for (place, byte) in address.sun_path.iter_mut().zip(bytes) {
        *place = *byte as libc::c_char;
    }
    Ok(address)
}

fn socket() -> std::io::Result<c_int> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: plain numbers.
    check(unsafe { libc::socket(libc::AF_UNIX, kind, 0) })
}

/// Binds and listens; a socket that nobody listens on any more is replaced.
fn listen(path: &OsStr) -> std::io::Result<c_int> {
    let address = address(path)?;
    let length = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    let fd = socket()?;
    let bind = || {
        // SAFETY: an address of this frame with its length. The mode that the socket has when it is
        // bound becomes that of its file, so there is no moment at which others may connect.
        unsafe {
            check(libc::fchmod(fd, 0o600))?;
            check(libc::bind(fd, (&raw const address).cast(), length))
        }
    };
    let bound = match bind() {
        Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) && is_stale(path) => {
            let name = CString::new(path.as_bytes())?;
            // SAFETY: a string that ends in zero.
            unsafe { libc::unlink(name.as_ptr()) };
            bind()
        }
        other => other,
    };
    // SAFETY: a descriptor of ours.
    let result = bound.and_then(|_| check(unsafe { libc::listen(fd, BACKLOG) }));
    match result {
        Ok(_) => Ok(fd),
        Err(error) => {
            // SAFETY: a descriptor of ours, not used again.
            unsafe { libc::close(fd) };
            Err(error)
        }
    }
}

/// Whether the path is a socket on which nobody listens.
fn is_stale(path: &OsStr) -> bool {
    use std::os::unix::fs::FileTypeExt;
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return false };
    metadata.file_type().is_socket()
        && std::os::unix::net::UnixStream::connect(path)
            .is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
}

fn start_thread() -> std::io::Result<()> {
    // SAFETY: structures of this frame, initialised by the calls that the C library has for it. The
    // thread inherits the mask, so that it never sees a signal of QEMU's.
    unsafe {
        let mut all: libc::sigset_t = zeroed();
        let mut before: libc::sigset_t = zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        let mut attributes: libc::pthread_attr_t = zeroed();
        libc::pthread_attr_init(&raw mut attributes);
        libc::pthread_attr_setstacksize(&raw mut attributes, STACK_BYTES);
        libc::pthread_attr_setdetachstate(&raw mut attributes, libc::PTHREAD_CREATE_DETACHED);
        let mut thread: libc::pthread_t = zeroed();
        let result =
            libc::pthread_create(&raw mut thread, &raw const attributes, serve, null_mut());
        libc::pthread_attr_destroy(&raw mut attributes);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, null_mut());
        if result == 0 { Ok(()) } else { Err(std::io::Error::from_raw_os_error(result)) }
    }
}

extern "C" fn serve(_: *mut c_void) -> *mut c_void {
    let listener = LISTENER.load(Ordering::SeqCst);
    // SAFETY: a name that ends in zero and is shorter than 16 bytes; null pointers where allowed.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, c"godwit-uffd".as_ptr());
        loop {
            let peer = libc::accept4(listener, null_mut(), null_mut(), libc::SOCK_CLOEXEC);
            if peer >= 0 {
                answer(peer);
                libc::close(peer);
            } else if !may_pass(errno()) {
                return null_mut();
            } else {
                // No descriptors or memory at the moment: not a reason to burn a processor.
                libc::usleep(10_000);
            }
        }
    }
}

/// Whether accept may work again after this error.
fn may_pass(error: c_int) -> bool {
    !matches!(error, libc::EBADF | libc::EINVAL | libc::ENOTSOCK | libc::EOPNOTSUPP | libc::EFAULT)
}

fn errno() -> c_int {
    // SAFETY: the C library's own variable of this thread.
    unsafe { *libc::__errno_location() }
}

/// Serves one connection.
fn answer(peer: c_int) {
    let time = libc::timeval { tv_sec: REQUEST_TIMEOUT_S, tv_usec: 0 };
    let size = size_of::<libc::timeval>() as libc::socklen_t;
    // SAFETY: a structure of this frame with its size.
    unsafe {
        for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
            libc::setsockopt(peer, libc::SOL_SOCKET, option, (&raw const time).cast(), size);
        }
    }
    if !is_friend(peer) {
        return;
    }
    let mut wish = 0u8;
    // SAFETY: one byte of this frame.
    let count = unsafe { libc::recv(peer, (&raw mut wish).cast(), 1, 0) };
    let keep = match (count, wish) {
        (1, b'k') => true,
        (1, b't') => false,
        (1, _) => return send(peer, b'e', libc::EINVAL, None),
        _ => return,
    };
    if keep && KEPT.load(Ordering::SeqCst) >= KEPT_MAX {
        return send(peer, b'e', libc::EMFILE, None);
    }
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: plain numbers.
    let uffd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let Ok(uffd) = c_int::try_from(uffd) else { return };
    if uffd < 0 {
        return send(peer, b'e', errno(), None);
    }
    if keep {
        KEPT.fetch_add(1, Ordering::SeqCst);
        return send(peer, b'u', uffd, Some(uffd));
    }
    send(peer, b'u', -1, Some(uffd));
    // SAFETY: a descriptor of ours, not used again.
    unsafe { libc::close(uffd) };
}

/// Whether the process at the other end runs as the same user or as root.
fn is_friend(peer: c_int) -> bool {
    let mut credentials = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut size = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: a structure of this frame with its size.
    let result = unsafe {
        libc::getsockopt(
            peer,
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut size,
        )
    };
    // SAFETY: no arguments.
    let own = unsafe { libc::geteuid() };
    result == 0 && (credentials.uid == own || credentials.uid == 0)
}

/// Room for the control message with one descriptor, aligned as the kernel wants it.
#[repr(C, align(8))]
struct Control([u8; 24]);

fn send(peer: c_int, kind: u8, number: c_int, fd: Option<c_int>) {
    let [a, b, c, d] = number.to_le_bytes();
    let mut bytes = [kind, a, b, c, d];
    let mut vector = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut control = Control([0; 24]);
    // SAFETY: the message refers to variables of this frame; the control buffer has the size that
    // CMSG_SPACE gives for one descriptor (asserted below), so that the first header and its data
    // lie within it.
    unsafe {
        let mut message: libc::msghdr = zeroed();
        message.msg_iov = &raw mut vector;
        message.msg_iovlen = 1;
        if let Some(fd) = fd {
            message.msg_control = (&raw mut control).cast();
            message.msg_controllen = size_of::<Control>();
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(size_of::<c_int>() as u32) as usize;
            libc::CMSG_DATA(header).cast::<c_int>().write_unaligned(fd);
        }
        // An engine that went away meanwhile gets nothing; that is its own affair.
        libc::sendmsg(peer, &raw const message, libc::MSG_NOSIGNAL);
    }
}

const _: () = assert!(control_bytes() == size_of::<Control>());

/// CMSG_SPACE for one descriptor: a header of 16 bytes and the number, aligned to 8.
const fn control_bytes() -> usize {
    size_of::<libc::cmsghdr>() + size_of::<c_int>().next_multiple_of(8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_number_is_filled_in() {
        let expand = |text: &str| expand(OsStr::new(text), 42).into_string().unwrap();
        assert_eq!(expand("/run/%p.sock"), "/run/42.sock");
        assert_eq!(expand("%p%p%"), "4242%");
        assert_eq!(expand("/run/x"), "/run/x");
    }

    #[test]
    fn only_this_library_is_taken_off_the_list() {
        let without =
            |list: &str, name: &[u8]| without(OsStr::new(list), Some(name)).into_string().unwrap();
        assert_eq!(without("/a/own.so", b"/b/own.so"), "");
        assert_eq!(without("x.so:/a/own.so y.so", b"own.so"), "x.so:y.so");
        assert_eq!(without("x.so", b"own.so"), "x.so");
    }

    #[test]
    fn paths_that_are_no_socket_addresses_are_refused() {
        assert!(address(OsStr::new("")).is_err());
        assert!(address(OsStr::new(&"x".repeat(108))).is_err());
        assert!(address(OsStr::from_bytes(b"a\0b")).is_err());
        assert!(address(OsStr::new(&"x".repeat(107))).is_ok());
    }

    #[test]
    fn a_file_or_a_live_socket_is_not_taken_for_stale() {
        let folder = std::env::temp_dir().join(format!("godwit-preload-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let path = folder.join("s");
        std::fs::write(&path, "").unwrap();
        assert!(!is_stale(path.as_os_str()));
        assert!(listen(path.as_os_str()).is_err());
        std::fs::remove_file(&path).unwrap();
        let first = listen(path.as_os_str()).unwrap();
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(listen(path.as_os_str()).is_err());
        // SAFETY: a descriptor of this test.
        unsafe { libc::close(first) };
        assert!(is_stale(path.as_os_str()));
        let again = listen(path.as_os_str()).unwrap();
        // SAFETY: as above.
        unsafe { libc::close(again) };
        std::fs::remove_dir_all(folder).unwrap();
    }
}
