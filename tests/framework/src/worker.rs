//! The guest's program `worker`: what it does, how fast, and whether its memory is right.

use std::time::Duration;

use anyhow::{Result, bail};
use guest_programs::PAGE_BYTES;

use crate::guest::number;
use crate::vm::Vm;
use crate::wait;

const MIB: f64 = 1_048_576.0;

/// What a worker does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Nothing.
    Idle,
    /// Reads and writes pages of its hot area.
    Hot,
    /// Allocates memory, writes it, reads it and frees it again.
    Fresh,
    /// Reads pages of the area that was filled once.
    Used,
    /// The last two by turns.
    Both,
}

impl Phase {
    /// As the worker calls it.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Hot => "hot",
            Self::Fresh => "fresh",
            Self::Used => "used",
            Self::Both => "both",
        }
    }
}

/// What a worker has done since its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// Pages that it went through.
    pub pages: u64,
    /// Times that all it filled was found right, on demand.
    pub checks: u64,
    /// The guest's clock, microseconds since the worker's start.
    pub elapsed_us: u64,
}

impl Work {
    /// Reads a report.
    fn parse(report: &str) -> Result<Self> {
        if !report.starts_with("WORKER OK") {
            bail!("The worker found wrong memory: {report}");
        }
        Ok(Self {
            pages: number(report, "pages")?,
            checks: number(report, "checks")?,
            elapsed_us: number(report, "elapsed_us")?,
        })
    }

    /// MiB a second from then to now, as far as the guest's clock moved.
    #[must_use]
    pub fn mib_per_s(&self, then: &Self) -> Option<f64> {
        let seconds = self.elapsed_us.saturating_sub(then.elapsed_us) as f64 / 1e6;
        let bytes = self.pages.saturating_sub(then.pages) as f64 * PAGE_BYTES as f64;
        (seconds > 0.0).then(|| bytes / MIB / seconds)
    }
}

/// Asks a VM's worker what it has done.
///
/// # Errors
/// It does not answer, or has found something wrong.
pub fn report(vm: &mut Vm) -> Result<Work> {
    Work::parse(&vm.ask("worker report")?)
}

/// Has it do something else.
///
/// # Errors
/// As [`report`], or it has no memory for this phase.
pub fn set_phase(vm: &mut Vm, phase: Phase) -> Result<Work> {
    Work::parse(&vm.ask(&format!("worker phase {}", phase.label()))?)
}

/// Waits until it went through so many more pages.
///
/// # Errors
/// As [`report`], or it does not come so far within `timeout`.
pub fn wait_pages(vm: &mut Vm, pages: u64, timeout: Duration) -> Result<Work> {
    let first = report(vm)?.pages;
    wait::until(&format!("{pages} pages of the worker"), timeout, || {
        let work = report(vm)?;
        Ok((work.pages >= first + pages).then_some(work))
    })
}

/// Has it compare all that it filled, and its hot area, with what belongs there.
///
/// # Errors
/// As [`report`], or it is not done within `timeout`.
pub fn check(vm: &mut Vm, timeout: Duration) -> Result<()> {
    let first = Work::parse(&vm.ask("worker check")?)?.checks;
    wait::until("the worker's check of all its memory", timeout, || {
        Ok((report(vm)?.checks > first).then_some(()))
    })?;
    vm.assert_clean()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_become_rates() {
        let of = |report: &str| Work::parse(report);
        let first = of("WORKER OK phase=hot pages=256 checks=0 elapsed_us=1000000").unwrap();
        let last = of("WORKER OK phase=hot pages=1280 checks=1 elapsed_us=3000000").unwrap();
        assert_eq!(last.mib_per_s(&first), Some(2.0));
        assert_eq!(first.mib_per_s(&first), None);
        assert!(of("WORKER FAIL count=1 pages=1 checks=0 elapsed_us=1").is_err());
    }
}
