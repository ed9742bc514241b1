//! Starts real QEMUs for tests: under TCG, without a guest OS, everything in a folder of their own.

#![allow(
    dead_code,
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "tests may panic; each test binary uses another part, so that expect would not hold"
)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use qemu_glue::qmp::Client;
use tempfile::TempDir;

/// A machine type that all tested versions know.
pub(crate) const MACHINE: &str = "pc-i440fx-7.2";

/// A QEMU program to test with.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    pub(crate) name: &'static str,
    path: PathBuf,
    data: Option<PathBuf>,
}

/// The QEMUs that exist here: `GODWIT_QEMU_7_2` (or the system's) and `GODWIT_QEMU_10_0` with its
/// firmware in `GODWIT_QEMU_10_0_DATA`.
pub(crate) fn programs() -> Vec<Program> {
    let old = std::env::var_os("GODWIT_QEMU_7_2").unwrap_or_else(|| "qemu-system-x86_64".into());
    let mut programs = vec![Program { name: "7.2", path: old.into(), data: None }];
    match std::env::var_os("GODWIT_QEMU_10_0") {
        Some(new) => programs.push(Program {
            name: "10.0",
            path: new.into(),
            data: std::env::var_os("GODWIT_QEMU_10_0_DATA").map(PathBuf::from),
        }),
        None => eprintln!("SKIPPED for QEMU 10.0: GODWIT_QEMU_10_0 is not set"),
    }
    programs
}

/// A folder on tmpfs for sockets and RAM files.
pub(crate) fn folder() -> TempDir {
    tempfile::Builder::new().prefix("godwit-test-").tempdir_in("/dev/shm").unwrap()
}

/// A running QEMU; killed when dropped.
#[derive(Debug)]
pub(crate) struct Qemu {
    child: Child,
    pub(crate) socket: PathBuf,
}

impl Qemu {
    /// Starts a QEMU whose monitor is `folder/NAME.qmp`, and waits for that socket.
    pub(crate) fn start(program: &Program, folder: &Path, name: &str, arguments: &[&str]) -> Self {
        let socket = folder.join(format!("{name}.qmp"));
        let mut command = Command::new(&program.path);
        if let Some(data) = &program.data {
            command.arg("-L").arg(data);
        }
        command
            .args(["-accel", "tcg", "-nodefaults", "-display", "none", "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .args(arguments)
            .stdin(Stdio::null());
        let child = command.spawn().unwrap();
        let mut qemu = Self { child, socket };
        let until = Instant::now() + Duration::from_secs(20);
        while std::os::unix::net::UnixStream::connect(&qemu.socket).is_err() {
            assert!(Instant::now() < until, "{name} has not opened its monitor");
            assert!(!qemu.has_exited(), "{name} exited at once");
            std::thread::sleep(Duration::from_millis(10));
        }
        qemu
    }

    /// A QEMU with `MACHINE`, 256 MiB in one shared file of the folder, and more arguments.
    pub(crate) fn start_shared(
        program: &Program,
        folder: &Path,
        name: &str,
        more: &[&str],
    ) -> Self {
        let memory = shared_file(folder, name, "ram0", 256);
        let machine = format!("{MACHINE},memory-backend=ram0");
        let mut arguments = vec!["-m", "256", "-machine", &machine, "-object", &memory];
        arguments.extend_from_slice(more);
        Self::start(program, folder, name, &arguments)
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    pub(crate) fn has_exited(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub(crate) async fn client(&self) -> Client {
        Client::connect(&self.socket).await.unwrap()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The `-object` argument of a shared memory file.
pub(crate) fn shared_file(folder: &Path, name: &str, id: &str, mib: u64) -> String {
    let path = folder.join(format!("{name}.{id}.ram"));
    format!("memory-backend-file,id={id},size={mib}M,share=on,mem-path={}", path.display())
}

/// Copies RAM from the file of one QEMU into that of another, which is mapped meanwhile.
pub(crate) fn copy_memory(folder: &Path, from: &str, to: &str, id: &str) {
    use std::os::unix::fs::FileExt;
    let open = |name: &str| {
        let path = folder.join(format!("{name}.{id}.ram"));
        std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap()
    };
    let (from, to) = (open(from), open(to));
    let length = from.metadata().unwrap().len();
    assert_eq!(to.metadata().unwrap().len(), length);
    let (mut chunk, mut there) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for offset in (0..length).step_by(chunk.len()) {
        from.read_exact_at(&mut chunk, offset).unwrap();
        to.read_exact_at(&mut there, offset).unwrap();
        if chunk != there {
            to.write_all_at(&chunk, offset).unwrap();
        }
    }
}
