//! Child processes that cannot outlive the test.
//!
//! The kernel kills them when the thread that started them ends (`PR_SET_PDEATHSIG`, set by
//! `setpriv`). Tests start VMs from short-lived threads, so all are started by one thread that
//! lives as long as the process.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait;

/// Enters the control groups named before `--` and becomes what is behind it.
const ENTER: &str = r#"while [ "$1" != -- ]; do
    echo $$ > "$1/cgroup.procs" || exit 125
    shift
done
shift
exec "$@""#;

type Order = (Command, Sender<std::io::Result<Child>>);

fn starter() -> &'static Mutex<Sender<Order>> {
    static STARTER: OnceLock<Mutex<Sender<Order>>> = OnceLock::new();
    STARTER.get_or_init(|| {
        let (sender, orders) = channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, answer) in orders {
                // Nobody waits any more: then the child is not needed either, and dies with us.
                drop(answer.send(command.spawn()));
            }
        });
        Mutex::new(sender)
    })
}

/// `program` as a command that is killed with us, inside network namespace `netns` if one is named.
/// The process id is the program's own: every step in between replaces itself. SIGINT ends it unless it
/// does otherwise by itself: who runs tests in the background of a script has it ignored.
#[must_use]
pub fn bound(program: &Path, netns: Option<&str>) -> Command {
    bound_in(program, netns, &[])
}

/// As [`bound`], inside control groups, which are named by their folders.
#[must_use]
pub fn bound_in(program: &Path, netns: Option<&str>, cgroups: &[PathBuf]) -> Command {
    let mut words: Vec<OsString> = vec![];
    // Before the namespace, in which /sys is another one.
    if !cgroups.is_empty() {
        words.extend(["sh", "-c", ENTER, "enter"].map(OsString::from));
        words.extend(cgroups.iter().map(|folder| folder.as_os_str().to_owned()));
        words.push("--".into());
    }
    if let Some(name) = netns {
        words.extend(["ip", "netns", "exec", name].map(OsString::from));
    }
    let rest = ["setpriv", "--pdeathsig", "KILL", "env", "--default-signal=INT"];
    words.extend(rest.map(OsString::from));
    words.push(program.as_os_str().to_owned());
    let mut command = Command::new(words.remove(0));
    command.args(words);
    command
}

/// A child process, killed on drop.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts `command`; `name` is for error texts.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(name: &str, command: Command) -> Result<Self> {
        let (sender, answer) = channel();
        starter()
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .send((command, sender))
            .map_err(|_| anyhow!("The thread that starts processes is gone"))?;
        let child = answer
            .recv()
            .context("The thread that starts processes is gone")?
            .with_context(|| format!("Cannot start {name}"))?;
        Ok(Self { child, name: name.to_owned(), status: None })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The child, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Its exit status if it has ended.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            let name = &self.name;
            self.status =
                self.child.try_wait().with_context(|| format!("Cannot wait for {name}"))?;
        }
        Ok(self.status)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It has not ended within `timeout`; it still runs then.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {} (pid {})", self.name, self.pid());
        wait::until(&what, timeout, || self.exited())
    }

    /// Sends a signal; nothing happens if it has ended already.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.exited()?.is_some() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid() as i32), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => {
                Err(error).with_context(|| format!("Cannot send {signal} to {}", self.name))
            }
        }
    }

    /// Kills it and waits until it is gone.
    ///
    /// # Errors
    /// It is not gone after 20 s.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGKILL)?;
        self.wait(Duration::from_secs(20))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("{error:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    fn sleeper() -> Process {
        let mut command = bound(Path::new("sleep"), None);
        command.arg("60");
        Process::start("sleep", command).unwrap()
    }

    #[test]
    fn outlives_the_thread_that_asked_for_it() {
        let mut process = std::thread::spawn(sleeper).join().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(process.exited().unwrap(), None);
        let pid = process.pid();
        drop(process);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn tells_how_it_ended() {
        let mut command = bound(Path::new("sh"), None);
        command.args(["-c", "exit 7"]);
        let mut process = Process::start("sh", command).unwrap();
        assert_eq!(process.wait(Duration::from_secs(10)).unwrap().code(), Some(7));
        process.signal(Signal::SIGTERM).unwrap();
        assert!(sleeper().wait(Duration::from_millis(50)).is_err());
    }

    #[test]
    fn ends_by_an_interrupt_where_that_is_ignored() {
        let mut interrupted = bound(Path::new("sh"), None);
        interrupted.args(["-c", "kill -INT $$; exit 7"]);
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' INT; exec \"$@\"", "sh"]);
        command.arg(interrupted.get_program()).args(interrupted.get_args());
        let mut process = Process::start("sh", command).unwrap();
        let status = process.wait(Duration::from_secs(10)).unwrap();
        assert_eq!(status.signal(), Some(Signal::SIGINT as i32));
    }

    #[test]
    fn a_missing_program_is_an_error() {
        let command = Command::new("/nonexistent/program");
        assert!(Process::start("nothing", command).is_err());
    }
}
