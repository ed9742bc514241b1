//! Debian's programs under load, each with a check of what it answers.
//!
//! Options: `kind` (`redis`, `sqlite` or `compress`), and those of the kind. Command: `report`.
//!
//! ```text
//!  redis-benchmark ──> redis-server        random keys and values, evicting
//!  SQL ──> sqlite3 ──> sums are compared   transactions over random rows
//!  text ──> xz -c ──> xz -dc ──> compare   without end
//! ```
//! The programs are not part of the ordinary guest: they come with an initramfs of their own, in
//! [`FOLDER`]. Invariants: every kind is bounded in memory by its options; whatever one finds wrong
//! is told once, and every report from then on is an error.

mod compress;
mod redis;
mod sqlite;

use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, bail};
use guest_programs::options::Options;

use crate::console::{monotonic_us, tell_failure};
use crate::shell;

/// Where the programs and their libraries lie.
const FOLDER: &str = "/app";

/// Brings the progress up to date before a report.
type Refresh = Box<dyn Fn(&Progress) -> Result<()>>;

/// How far an application has come.
struct Progress {
    operations: AtomicU64,
    failure: Mutex<Option<String>>,
    started_us: u64,
}

impl Progress {
    fn new() -> Self {
        let started_us = monotonic_us();
        Self { operations: AtomicU64::new(0), failure: Mutex::new(None), started_us }
    }

    fn add(&self, operations: u64) {
        self.operations.fetch_add(operations, Ordering::Relaxed);
    }

    /// Tells what went wrong, the first time.
    fn fail(&self, error: &anyhow::Error) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if failure.is_none() {
            tell_failure(&format!("APP FAIL {error:#}"));
            *failure = Some(format!("{error:#}"));
        }
    }

    fn report(&self, kind: &str) -> Result<String> {
        if let Some(failure) = &*self.failure.lock().unwrap_or_else(PoisonError::into_inner) {
            bail!("APP FAIL {failure}");
        }
        let elapsed_us = monotonic_us().saturating_sub(self.started_us);
        let operations = self.operations.load(Ordering::Relaxed);
        Ok(format!("APP OK kind={kind} operations={operations} elapsed_us={elapsed_us}"))
    }
}

/// A program of [`FOLDER`], with its libraries.
fn program(name: &str) -> Command {
    let mut command = Command::new(format!("{FOLDER}/bin/{name}"));
    command.env("LD_LIBRARY_PATH", format!("{FOLDER}/lib"));
    command
}

/// Runs `work` for ever beside the commands; if it ends, the application has failed.
fn load(progress: &Arc<Progress>, mut work: impl FnMut(&Progress) -> Result<()> + Send + 'static) {
    let progress = Arc::clone(progress);
    std::thread::spawn(move || {
        while let Ok(()) = work(&progress).inspect_err(|error| progress.fail(error)) {}
    });
}

/// Runs until stdin ends.
pub(crate) fn run(mut options: Options) -> Result<()> {
    let kind = options.word("kind", "");
    let progress = Arc::new(Progress::new());
    let refresh: Refresh = match kind.as_str() {
        "redis" => Box::new(redis::start(options, &progress)?),
        "sqlite" => {
            sqlite::start(options, &progress)?;
            Box::new(|_| Ok(()))
        }
        "compress" => {
            compress::start(options, &progress)?;
            Box::new(|_| Ok(()))
        }
        other => bail!("Unknown kind {other:?}; there are redis, sqlite, compress"),
    };
    println!("ready kind={kind}");
    shell::serve(|words| match words {
        ["report"] => {
            refresh(&progress).context("The application does not answer")?;
            progress.report(&kind)
        }
        _ => bail!("Unknown command; there is report"),
    })
}
