//! The two places of the demo: QEMU processes, their files and sockets.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use super::text;
use crate::args::DemoArgs;

/// What the guest does: text-like memory, a hot set rewritten all the time, a checker beside it.
const WORK: &str =
    "godwit.writer=fill=200,hot=40,rate=2000,bytes=64,seed=7 godwit.checker=size=16,seed=5";

/// Longest time for QEMU to open its sockets.
const START_WITHIN: Duration = Duration::from_secs(20);

/// Where the demo plays: a folder for everything, gone at the end.
#[derive(Debug)]
pub(super) struct Stage {
    args: DemoArgs,
    folder: TempDir,
    count: AtomicU32,
}

/// One QEMU.
#[derive(Debug)]
pub(super) struct Place {
    process: Child,
    folder: PathBuf,
    name: String,
}

impl Stage {
    pub(super) fn new(args: &DemoArgs) -> Result<Self> {
        let mut args = args.clone();
        for (what, path) in [("kernel", &mut args.kernel), ("initrd", &mut args.initrd)] {
            *path = fs::canonicalize(&*path).with_context(|| {
                format!("The {what} {} is not there; `cargo xtask setup` makes it", path.display())
            })?;
        }
        let folder = tempfile::Builder::new().prefix("godwit-demo-").tempdir();
        let folder = folder.context("No folder for sockets can be made")?;
        Ok(Self { args, folder, count: AtomicU32::new(0) })
    }

    /// A `migrate` command, run in the demo's folder.
    pub(super) fn command(&self, words: &[&str]) -> Command {
        let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("migrate"));
        let mut command = Command::new(program);
        command.args(words).current_dir(self.folder.path()).stdin(Stdio::null()).kill_on_drop(true);
        command
    }

    /// Starts a QEMU that boots the guest, or waits for it.
    pub(super) async fn boot(&self, incoming: bool) -> Result<Place> {
        let name = format!("vm{}", self.count.fetch_add(1, Ordering::Relaxed));
        let folder = self.folder.path().to_owned();
        let ram = PathBuf::from(format!("/dev/shm/godwit-demo-{}-{name}", std::process::id()));
        let mut command = Command::new(&self.args.qemu);
        command
            .args(self.arguments(&name, &ram, incoming))
            .current_dir(&folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut process = command.spawn().with_context(|| {
            format!(
                "{} cannot be started; `cargo xtask setup` installs QEMU",
                self.args.qemu.display()
            )
        })?;
        let began = Instant::now();
        while !greets(&folder.join(format!("{name}.qmp"))).await {
            if let Some(status) = process.try_wait()? {
                let said = process.wait_with_output().await?.stderr;
                bail!("QEMU ended ({status}): {}", String::from_utf8_lossy(&said).trim());
            }
            if began.elapsed() > START_WITHIN {
                bail!("QEMU does not open its monitor");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // QEMU has it open; without its name it cannot be left behind.
        fs::remove_file(&ram).context("The guest's RAM file is not there")?;
        Ok(Place { process, folder, name })
    }

    fn arguments(&self, name: &str, ram: &Path, incoming: bool) -> Vec<String> {
        let memory = self.args.memory_mib;
        let serial = format!("unix:{name}.heartbeat,server=on,wait=off");
        let mut words: Vec<String> = [
            // Never KVM: a /dev/kvm that opens is no proof that a guest boots on it.
            "-accel",
            "tcg",
            "-name",
            "demo",
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-m",
            &format!("{memory}M"),
            "-object",
            &format!("memory-backend-file,id=ram0,size={memory}M,share=on,mem-path={}", text(ram)),
            "-machine",
            "pc,memory-backend=ram0",
            "-serial",
            &format!("file:{name}.console"),
            "-serial",
            &serial,
            "-serial",
            "null",
            "-qmp",
            &format!("unix:{name}.qmp,server=on,wait=off"),
            "-kernel",
            &text(&self.args.kernel),
            "-initrd",
            &text(&self.args.initrd),
            "-append",
            &format!("console=ttyS0 panic=-1 loglevel=5 {WORK}"),
        ]
        .map(str::to_owned)
        .into();
        if let Some(data) = &self.args.qemu_data {
            words.extend(["-L".to_owned(), text(data)]);
        }
        if incoming {
            words.extend(["-incoming".to_owned(), "defer".to_owned()]);
        }
        words
    }
}

impl Place {
    pub(super) fn qmp(&self) -> String {
        format!("{}.qmp", self.name)
    }

    pub(super) fn heartbeat(&self) -> PathBuf {
        self.folder.join(format!("{}.heartbeat", self.name))
    }

    fn console(&self) -> String {
        let path = self.folder.join(format!("{}.console", self.name));
        String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
    }

    /// Waits until the guest's programs run.
    pub(super) async fn wait_ready(&mut self, within: Duration) -> Result<()> {
        let began = Instant::now();
        while !self.console().contains("GUEST READY") {
            if let Some(status) = self.process.try_wait()? {
                bail!("QEMU ended while the guest booted ({status})");
            }
            if began.elapsed() > within {
                bail!("The guest does not boot; its console says: {}", self.console());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Waits until QEMU has ended, as `migrate send` told it to.
    pub(super) async fn wait_exit(&mut self) -> Result<()> {
        let ended = tokio::time::timeout(Duration::from_secs(20), self.process.wait()).await;
        ended.context("The source's QEMU does not end")??;
        Ok(())
    }

    /// Nothing in the guest complained.
    pub(super) fn check_clean(&self) -> Result<()> {
        let console = self.console();
        for sign in ["CHECKER FAIL", "Kernel panic", "BUG:", "Oops"] {
            if console.contains(sign) {
                bail!("the guest reports {sign:?}; its console says: {console}");
            }
        }
        Ok(())
    }
}

/// Whether QEMU's monitor answers: the machine is complete then.
async fn greets(socket: &Path) -> bool {
    let Ok(stream) = UnixStream::connect(socket).await else { return false };
    let mut line = String::new();
    let mut reader = BufReader::new(stream);
    let greeting = reader.read_line(&mut line);
    tokio::time::timeout(START_WITHIN, greeting).await.is_ok_and(|read| read.is_ok())
        && line.contains("QMP")
}
