//! The machine and the programs that were measured, so that numbers can be judged later.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use framework::{Env, QemuKind};
use serde::{Deserialize, Serialize};

/// What the measurements of one run have in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Host {
    /// Words of the command line.
    pub(crate) command: Vec<String>,
    /// `uname -r`.
    pub(crate) kernel: String,
    /// CPU model.
    pub(crate) cpu: String,
    /// CPUs online.
    pub(crate) cpus: u32,
    /// QEMU's version line.
    pub(crate) qemu: String,
    /// `migrate --version`.
    pub(crate) migrate: String,
    /// Commit of the sources, with `+` if they were changed since; empty outside of git.
    pub(crate) commit: String,
}

fn first_line(program: &Path, words: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(words)
        .output()
        .with_context(|| format!("Cannot run {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

fn commit() -> String {
    let git = |words: &[&str]| first_line(Path::new("git"), words).unwrap_or_default();
    let hash = git(&["rev-parse", "--short", "HEAD"]);
    let changed = !git(&["status", "--porcelain", "--untracked-files=no"]).is_empty();
    format!("{hash}{}", if changed { "+" } else { "" })
}

impl Host {
    /// Looks at this machine.
    ///
    /// # Errors
    /// QEMU or `migrate` cannot be run.
    pub(crate) fn look(env: &Env, migrate: &Path, kind: QemuKind) -> Result<Self> {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name"));
        let cpu = model.and_then(|rest| rest.split_once(':')).map_or("unknown", |(_, name)| name);
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            command: std::env::args().skip(1).collect(),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpu: cpu.trim().to_owned(),
            cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
            qemu: first_line(&env.qemu(kind)?.bin, &["--version"])?,
            migrate: first_line(migrate, &["--version"])?,
            commit: commit(),
        })
    }
}

/// Load averages over 1 minute: processes that ran or waited for a CPU.
pub(crate) fn load1() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0.0)
}

/// CPU seconds that the whole machine has spent since boot, other than idling: shows what ran
/// beside a measurement.
pub(crate) fn busy_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    busy_ticks(&text) as f64 / 100.0
}

/// user + nice + system + irq + softirq + steal of the first line.
fn busy_ticks(stat: &str) -> u64 {
    let line = stat.lines().next().unwrap_or_default();
    let numbers: Vec<u64> =
        line.split_ascii_whitespace().skip(1).map(|word| word.parse().unwrap_or(0)).collect();
    [0, 1, 2, 5, 6, 7].iter().filter_map(|at| numbers.get(*at)).sum()
}

/// Writes to `mib` MiB of free memory and gives it back.
pub(crate) fn touch_memory(mib: u64) {
    const PART_BYTES: usize = 64 << 20;
    let parts: Vec<Vec<u8>> = (0..mib.div_ceil(64)).map(|_| vec![1; PART_BYTES]).collect();
    drop(std::hint::black_box(parts));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_leaves_idle_and_guest_time_out() {
        assert_eq!(busy_ticks("cpu  1 2 4 1000 1000 8 16 32 9 9\ncpu0 1"), 63);
        assert_eq!(busy_ticks(""), 0);
        assert!(load1() >= 0.0 && busy_seconds() > 0.0);
    }
}
