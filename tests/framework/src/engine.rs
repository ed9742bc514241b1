//! The command under test, `migrate`, as a child process; so is `virsh`.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::process::{Process, bound};
use crate::wait;

/// How `migrate` ended.
#[derive(Debug, Clone)]
pub struct EngineOutput {
    /// Its exit code; `None` if a signal killed it.
    pub code: Option<i32>,
    /// The JSON object that `--json` prints at the end, if there is one.
    pub json: Option<Value>,
    /// All of stdout.
    pub stdout: String,
    /// All of stderr.
    pub stderr: String,
    /// CPU seconds are of interest to bench: of the process and its children, as far as known.
    pub cpu_seconds: Option<f64>,
    /// The most memory that it had resident while it was waited for, in bytes, as far as known.
    pub peak_bytes: Option<u64>,
}

impl EngineOutput {
    /// The JSON object.
    ///
    /// # Errors
    /// There is none; the text has the end of stderr.
    pub fn json(&self) -> Result<&Value> {
        self.json.as_ref().with_context(|| {
            format!("`migrate` printed no JSON (exit {:?}); stderr:\n{}", self.code, self.stderr)
        })
    }

    /// Fails unless the exit code is 0.
    ///
    /// # Errors
    /// It is not; the text has stderr.
    pub fn success(self) -> Result<Self> {
        if self.code != Some(0) {
            let (out, text) = (self.stdout.trim(), self.stderr.trim());
            bail!("`migrate` ended with {:?}; stdout: {out}\nstderr:\n{text}", self.code);
        }
        Ok(self)
    }
}

/// A running `migrate`, killed on drop.
#[derive(Debug)]
pub struct Engine {
    process: Process,
    folder: TempDir,
    name: String,
    cpu_seconds: Option<f64>,
    peak_bytes: Option<u64>,
}

impl Engine {
    /// Starts `program` with `arguments`, in network namespace `netns` if one is named.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(program: &Path, arguments: &[&str], netns: Option<&str>) -> Result<Self> {
        Self::start_with(program, arguments, netns, &[])
    }

    /// As [`Engine::start`], with environment variables (failpoints, log levels).
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_with(
        program: &Path,
        arguments: &[&str],
        netns: Option<&str>,
        variables: &[(&str, &str)],
    ) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("godwit-engine-")
            .tempdir()
            .context("Cannot create a folder for output")?;
        let create = |name: &str| {
            std::fs::File::create(folder.path().join(name)).context("Cannot create a log file")
        };
        let mut command = bound(program, netns);
        command
            .args(arguments)
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(create("stdout")?)
            .stderr(create("stderr")?);
        let file = program.file_name().unwrap_or_default().to_string_lossy();
        let name = format!("{file} {}", arguments.first().unwrap_or(&""));
        let process = Process::start(&name, command)?;
        Ok(Self { process, folder, name, cpu_seconds: None, peak_bytes: None })
    }

    /// Runs to the end.
    ///
    /// # Errors
    /// It cannot be started, or still runs after `timeout` (it is killed then).
    pub fn run(
        program: &Path,
        arguments: &[&str],
        netns: Option<&str>,
        timeout: Duration,
    ) -> Result<EngineOutput> {
        Self::start(program, arguments, netns)?.wait(timeout)
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn file(&self, name: &str) -> String {
        let bytes = std::fs::read(self.folder.path().join(name)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What it has written to stderr so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.file("stderr")
    }

    /// What it has written to stdout so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        self.file("stdout")
    }

    /// Waits until stderr contains a text.
    ///
    /// # Errors
    /// It ended without, or `timeout` passed; the text has stderr.
    pub fn wait_stderr(&mut self, text: &str, timeout: Duration) -> Result<()> {
        self.wait_said(text, timeout, |stderr| stderr.contains(text).then_some(()))
    }

    /// Waits until stderr has a whole line that begins with `prefix`, and returns the rest of it.
    ///
    /// # Errors
    /// As [`Self::wait_stderr`].
    pub fn wait_line(&mut self, prefix: &str, timeout: Duration) -> Result<String> {
        self.wait_said(prefix, timeout, |stderr| {
            let mut lines = stderr.split_inclusive('\n').filter(|line| line.ends_with('\n'));
            lines.find_map(|line| line.strip_prefix(prefix)).map(|rest| rest.trim().to_owned())
        })
    }

    /// Waits until `find` finds something in stderr; `text` names it.
    fn wait_said<T>(
        &mut self,
        text: &str,
        timeout: Duration,
        find: impl Fn(&str) -> Option<T>,
    ) -> Result<T> {
        let what = format!("{text:?} on stderr of {}", self.name);
        let found = wait::until(&what, timeout, || {
            // Looked at before the text: what was written before the end is then in the text.
            let ended = self.process.exited()?;
            match find(&self.stderr()) {
                None if ended.is_some() => bail!("{} ended without {text:?}", self.name),
                found => Ok(found),
            }
        });
        found.with_context(|| format!("Its stderr:\n{}", self.stderr()))
    }

    /// True while it runs.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn running(&mut self) -> Result<bool> {
        Ok(self.process.exited()?.is_none())
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Notes what it has used so far; the last values before its end are off by one poll interval at most.
    fn look(&mut self) {
        let pid = self.process.pid();
        self.cpu_seconds = crate::cpu::seconds(pid).ok().or(self.cpu_seconds);
        self.peak_bytes = crate::memory::peak_bytes(pid).ok().or(self.peak_bytes);
    }

    /// CPU seconds that it has used so far, and the most memory that it has had resident, in bytes; as far as known.
    pub fn used(&mut self) -> (Option<f64>, Option<u64>) {
        self.look();
        (self.cpu_seconds, self.peak_bytes)
    }

    /// Kills it with SIGKILL and returns what it wrote.
    ///
    /// # Errors
    /// It is not gone after 20 s.
    pub fn kill(mut self) -> Result<EngineOutput> {
        self.process.kill()?;
        self.wait(Duration::from_secs(1))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It still runs after `timeout` (it is killed then); the text has stderr.
    pub fn wait(self, timeout: Duration) -> Result<EngineOutput> {
        self.wait_beside(timeout, None)
    }

    /// As [`Self::wait`], and looks meanwhile at what `other` uses, which may end at the same time.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn wait_beside(
        mut self,
        timeout: Duration,
        mut other: Option<&mut Self>,
    ) -> Result<EngineOutput> {
        let what = format!("the end of {} (pid {})", self.name, self.process.pid());
        let ended = wait::until(&what, timeout, || {
            self.look();
            if let Some(other) = &mut other {
                other.look();
            }
            self.process.exited()
        });
        let status = ended.with_context(|| format!("Its stderr:\n{}", self.stderr()))?;
        let stdout = self.stdout();
        let last = stdout.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
        // One line, or one object over several lines.
        let json = serde_json::from_str(last).or_else(|_| serde_json::from_str(&stdout)).ok();
        Ok(EngineOutput {
            code: status.code(),
            json: json.filter(Value::is_object),
            stderr: self.stderr(),
            stdout,
            cpu_seconds: self.cpu_seconds,
            peak_bytes: self.peak_bytes,
        })
    }
}

/// A certificate authority with identities of hosts, made by `migrate pki`.
#[derive(Debug)]
pub struct Pki {
    folder: TempDir,
    program: PathBuf,
}

impl Pki {
    const TIMEOUT: Duration = Duration::from_secs(30);

    /// Runs `migrate pki init`.
    ///
    /// # Errors
    /// It failed.
    pub fn init(program: &Path) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("godwit-pki-")
            .tempdir()
            .context("Cannot create a folder for identities")?;
        let pki = Self { folder, program: program.to_owned() };
        let path = pki.path();
        Engine::run(program, &["pki", "init", &path], None, Self::TIMEOUT)?.success()?;
        Ok(pki)
    }

    fn path(&self) -> String {
        self.folder.path().display().to_string()
    }

    /// Folder of the authority; identities are in it, each by its host's name.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Runs `migrate pki issue` and returns the identity's folder.
    ///
    /// # Errors
    /// It failed.
    pub fn issue(&self, name: &str) -> Result<PathBuf> {
        let words = ["pki", "issue", &self.path(), name];
        Engine::run(&self.program, &words, None, Self::TIMEOUT)?.success()?;
        Ok(self.folder.path().join(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Engine {
        Engine::start(Path::new("/bin/sh"), &["-c", script], None).unwrap()
    }

    #[test]
    fn reads_code_json_and_stderr() {
        let engine = shell("echo progress >&2; echo '{\"v\":1,\"outcome\":\"failed\"}'; exit 1");
        let output = engine.wait(Duration::from_secs(10)).unwrap();
        assert_eq!(output.code, Some(1));
        assert_eq!(output.json().unwrap()["outcome"], "failed");
        assert_eq!(output.stderr, "progress\n");
        assert!(output.success().is_err());
    }

    #[test]
    fn waits_for_texts_and_kills() {
        let mut engine = shell("echo one >&2; sleep 60");
        engine.wait_stderr("one", Duration::from_secs(10)).unwrap();
        assert!(engine.wait_stderr("two", Duration::from_millis(50)).is_err());
        assert!(engine.running().unwrap());
        let output = engine.kill().unwrap();
        assert_eq!((output.code, output.json.is_none()), (None, true));
        let mut slow =
            shell("printf 'listening on 127' >&2; sleep 0.2; echo .0.0.1:7 >&2; sleep 9");
        let rest = slow.wait_line("listening on ", Duration::from_secs(5)).unwrap();
        assert_eq!(rest, "127.0.0.1:7", "a line that is not whole says nothing");
        let mut short = shell("echo one >&2");
        let error = short.wait_stderr("two", Duration::from_secs(10)).unwrap_err();
        assert!(format!("{error:#}").contains("ended without"));
    }
}
