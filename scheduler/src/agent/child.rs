//! Engines that run on their own: they outlive the agent that started them, and the next agent finds them again.
//!
//! ```text
//!   FOLDER/child.json    process id and start time
//!   FOLDER/out, log      what it prints
//! ```
//!
//! Invariant: a process is known by its id together with its start time, so that no other one is taken for it.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use qemu_glue::procfs;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

/// Its standard output, in its folder.
pub const OUT: &str = "out";

/// Its standard error, in its folder.
pub const LOG: &str = "log";

const RECORD: &str = "child.json";

/// Time between two looks whether it has ended.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Longest text that is read of what an engine says at its end, in bytes.
pub const TEXT_BYTES_MAX: u64 = 1 << 20;

/// What may stand in a file's name as it is.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.');

/// A process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Child {
    pid: i32,
    start_ticks: u64,
}

impl Child {
    /// Starts a program in a process group of its own and records it in `folder`, which must be there.
    ///
    /// # Errors
    /// What the system says.
    pub fn start(program: &Path, args: &[String], folder: &Path) -> io::Result<Self> {
        let (out, log) = (File::create(folder.join(OUT))?, File::create(folder.join(LOG))?);
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null()).stdout(out).stderr(log).process_group(0);
        let mut process = command.spawn()?;
        let pid = process.id().and_then(|pid| i32::try_from(pid).ok());
        let gone = || io::Error::other("the process ended at once");
        let pid = pid.ok_or_else(gone)?;
        let start_ticks = procfs::start_time_ticks(pid).map_err(io::Error::other)?;
        let child = Self { pid, start_ticks };
        let recorded = write(&folder.join(RECORD), &child);
        // Whoever started it has to ask for its end, or it stays as a zombie.
        tokio::spawn(async move { process.wait().await });
        recorded.map(|()| child)
    }

    /// The one that is recorded in a folder, whether it runs or not.
    #[must_use]
    pub fn recorded(folder: &Path) -> Option<Self> {
        read(&folder.join(RECORD))
    }

    /// Whether it runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        procfs::start_time_ticks(self.pid).is_ok_and(|ticks| ticks == self.start_ticks)
            && procfs::thread_state(self.pid, self.pid).is_ok_and(|state| state != 'Z')
    }

    /// Asks it to end, as Ctrl-C does.
    pub fn interrupt(&self) {
        if self.is_alive()
            && let Some(pid) = Pid::from_raw(self.pid)
        {
            // It may have ended this very moment.
            let _gone = kill_process(pid, Signal::INT);
        }
    }

    /// Returns when it has ended.
    pub async fn ended(&self) {
        while self.is_alive() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// The end of what was printed, of so many bytes at most.
#[must_use]
pub fn printed(folder: &Path, name: &str, bytes_max: u64) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(folder.join(name))?;
        let from = file.metadata()?.len().saturating_sub(bytes_max);
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = vec![];
        file.take(bytes_max).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

/// Writes a record so that it is there whole or not at all.
///
/// # Errors
/// What the system says.
pub fn write(path: &Path, record: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec_pretty(record).map_err(io::Error::other)?;
    let new = path.with_extension("new");
    let file = File::create(&new)?;
    io::Write::write_all(&mut &file, &text)?;
    file.sync_all()?;
    fs::rename(&new, path)
}

/// Reads a record, if it is there and whole.
pub fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// A name as one part of a path, whatever it holds; different names have different ones.
#[must_use]
pub fn file_name(name: &str) -> String {
    let safe = utf8_percent_encode(name, PLAIN).to_string();
    // Neither hidden nor a step in the path.
    safe.strip_prefix('.').map(|rest| format!("%2E{rest}")).unwrap_or(safe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_child_is_found_again_and_told_from_others() {
        let folder = tempfile::tempdir().unwrap();
        // Whoever runs tests in the background has SIGINT ignored.
        let script = "echo said; echo warned >&2; exec sleep 30";
        let args = ["--default-signal=INT", "sh", "-c", script].map(str::to_owned);
        let child = Child::start(Path::new("/usr/bin/env"), &args, folder.path()).unwrap();
        assert!(child.is_alive());
        assert_eq!(Child::recorded(folder.path()), Some(child));
        let other = Child { start_ticks: child.start_ticks + 1, ..child };
        assert!(!other.is_alive(), "another process had that id");
        while printed(folder.path(), LOG, TEXT_BYTES_MAX).is_empty() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        assert_eq!(printed(folder.path(), OUT, TEXT_BYTES_MAX), "said\n");
        child.interrupt();
        tokio::time::timeout(Duration::from_secs(10), child.ended()).await.unwrap();
        assert!(!child.is_alive());
    }

    #[test]
    fn names_stay_in_their_folder_and_apart() {
        for (name, file) in [
            ("web-1.a", "web-1.a"),
            ("../x", "%2E.%2Fx"),
            ("..", "%2E."),
            ("a%2E", "a%252E"),
            ("ü", "%C3%BC"),
        ] {
            assert_eq!(file_name(name), file);
        }
    }
}
