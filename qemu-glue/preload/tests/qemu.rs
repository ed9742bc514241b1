//! The library inside a real QEMU, asked by the engine's own client.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use migrate_core::pageset::PageSet;
use qemu_glue::attach::{
    AttachError, CloseRemote, Way, close_descriptor, take_descriptor, userfaultfd,
};
use qemu_glue::procfs;
use qemu_glue::ram::{GuestRam, RamRegion};
use qemu_glue::track::DirtyTracker;

const RAM_BYTES: u64 = 64 << 20;

fn library() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let folders = exe.ancestors().skip(1).take(2);
    let found =
        folders.map(|folder| folder.join("libgodwit_preload.so")).find(|path| path.exists());
    found.expect("the library is built beside the tests")
}

struct Qemu {
    child: Child,
    ram: tempfile::NamedTempFile,
    socket: PathBuf,
}

impl Qemu {
    /// `pattern` is what the variable says, `%p` included.
    fn start(pattern: &Path) -> Option<Self> {
        let ram = tempfile::Builder::new().prefix("godwit-test").tempfile_in("/dev/shm").unwrap();
        let backend = format!(
            "memory-backend-file,id=mem0,size={RAM_BYTES},share=on,mem-path={}",
            ram.path().display()
        );
        let child = Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg", "-nodefaults", "-display", "none", "-m", "64", "-object"])
            .args([&backend, "-machine", "pc,memory-backend=mem0", "-boot", "reboot-timeout=1"])
            .env("LD_PRELOAD", library())
            .env("GODWIT_PRELOAD_SOCKET", pattern)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn();
        let child = match child {
            Ok(child) => child,
            Err(error) => {
                println!("SKIPPED, no qemu-system-x86_64: {error}");
                return None;
            }
        };
        let name = pattern.to_str().unwrap().replace("%p", &child.id().to_string());
        let qemu = Self { child, ram, socket: name.into() };
        let deadline = Instant::now() + Duration::from_secs(20);
        while qemu.region().is_none() || UnixStream::connect(&qemu.socket).is_err() {
            assert!(Instant::now() < deadline, "QEMU did not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(qemu)
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    fn region(&self) -> Option<RamRegion> {
        let mappings = procfs::mappings(self.pid()).ok()?;
        let path = self.ram.path().to_str()?;
        let hva = mappings.iter().find(|mapping| mapping.path == path)?.start;
        Some(RamRegion { name: "mem0".into(), length_bytes: RAM_BYTES, page_bytes: 4096, hva })
    }

    fn userfaultfds(&self) -> usize {
        let pid = self.pid();
        let links = procfs::descriptors(pid).unwrap().into_iter();
        let links = links.filter_map(|fd| std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok());
        links.filter(|link| link.as_os_str() == "anon_inode:[userfaultfd]").count()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn qemu_is_tracked_without_ptrace() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut qemu) = Qemu::start(&folder.path().join("%p.sock")) else { return };
    let pid = qemu.pid();
    let attached = userfaultfd(pid, Some(&qemu.socket), CloseRemote::Yes).unwrap();
    assert_eq!(attached.way, Way::Preload { remote_fd: None });
    let deadline = Instant::now() + Duration::from_secs(5);
    // The library closes its copy after it has sent it.
    while qemu.userfaultfds() > 0 {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
    let ram = GuestRam::open(pid, &[qemu.region().unwrap()], false).unwrap();
    let mut tracker = DirtyTracker::arm(pid, attached.uffd, &ram).unwrap();
    let mut dirty = PageSet::new(tracker.pages());
    while dirty.is_empty() {
        assert!(Instant::now() < deadline + Duration::from_secs(10), "the guest writes nothing");
        tracker.scan(&mut dirty).unwrap();
        std::thread::sleep(Duration::from_millis(20));
    }
    tracker.disarm().unwrap();

    let kept = userfaultfd(pid, Some(&qemu.socket), CloseRemote::No).unwrap();
    let Way::Preload { remote_fd: Some(remote_fd) } = kept.way else { panic!("{:?}", kept.way) };
    assert_eq!(qemu.userfaultfds(), 1);
    drop(kept);
    drop(take_descriptor(pid, remote_fd).unwrap());
    close_descriptor(pid, remote_fd).unwrap();
    assert_eq!(qemu.userfaultfds(), 0);

    assert_eq!(std::fs::metadata(&qemu.socket).unwrap().permissions().mode() & 0o777, 0o600);
    let threads = procfs::threads(pid).unwrap();
    let own = threads.iter().find(|tid| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm"));
        name.is_ok_and(|name| name.trim() == "godwit-uffd")
    });
    // All but SIGKILL and SIGSTOP, and the two that the C library keeps for itself.
    let blocked = procfs::status(pid, *own.unwrap()).unwrap().blocked;
    assert_eq!(blocked | 1 << 31 | 1 << 32 | 1 << 8 | 1 << 18, u64::MAX, "{blocked:#x}");

    qemu.child.kill().unwrap();
    let mut said = String::new();
    qemu.child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "", "standard output belongs to QEMU");
}

#[test]
fn a_stale_socket_is_replaced_and_another_process_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("qemu.sock");
    for _ in 0..2 {
        // The first is killed and leaves its socket behind.
        let Some(qemu) = Qemu::start(&socket) else { return };
        userfaultfd(qemu.pid(), Some(&socket), CloseRemote::Yes).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let error = userfaultfd(own, Some(&socket), CloseRemote::Yes).unwrap_err();
        let found = qemu.pid();
        assert!(
            matches!(error, AttachError::PreloadWrongProcess { found: it, .. } if it == found),
            "{error:?}"
        );
    }
    let own = i32::try_from(std::process::id()).unwrap();
    let error = userfaultfd(own, Some(&socket), CloseRemote::Yes).unwrap_err();
    assert!(matches!(error, AttachError::Preload { .. }), "{error:?}");
}

#[test]
fn odd_clients_do_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    let Some(qemu) = Qemu::start(&folder.path().join("%p.sock")) else { return };
    let mut stream = UnixStream::connect(&qemu.socket).unwrap();
    stream.write_all(b"?").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, [b'e', 22, 0, 0, 0]);
    // One that goes away before it is answered, and one that says nothing: the next waits for at
    // most as long as that one may.
    drop(UnixStream::connect(&qemu.socket).unwrap().write_all(b"t"));
    let silent = UnixStream::connect(&qemu.socket).unwrap();
    let mut patient = UnixStream::connect(&qemu.socket).unwrap();
    patient.write_all(b"t").unwrap();
    patient.set_read_timeout(Some(Duration::from_secs(8))).unwrap();
    let mut first = [0];
    patient.read_exact(&mut first).unwrap();
    assert_eq!(first, *b"u");
    drop(silent);
    userfaultfd(qemu.pid(), Some(&qemu.socket), CloseRemote::Yes).unwrap();
}

#[test]
fn children_do_not_load_the_library_again() {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new("sh")
        .args(["-c", "sh -c 'env; cat /proc/self/maps'"])
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("LD_PRELOAD", library())
        .env("GODWIT_PRELOAD_SOCKET", folder.path().join("s"))
        .output()
        .unwrap();
    assert!(output.status.success());
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("PATH="), "{text}");
    assert!(!text.contains("LD_PRELOAD") && !text.contains("GODWIT"), "{text}");
    assert!(!text.contains("godwit_preload"), "{text}");
    // A path that cannot be bound is said on standard error, and the program runs.
    let output = Command::new("sh")
        .args(["-c", "echo fine"])
        .env("LD_PRELOAD", library())
        .env("GODWIT_PRELOAD_SOCKET", "/nonexistent/s")
        .output()
        .unwrap();
    assert_eq!(output.stdout, b"fine\n");
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nonexistent/s"));
}
