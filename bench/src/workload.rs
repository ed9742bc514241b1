//! What the guest does while it is migrated.

use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use framework::{Vm, VmSpec};
use serde::{Deserialize, Serialize};

/// A checker that verifies its memory without being a load of its own.
const CHECKER: &str = "godwit.checker=size=8,rate=50,verify=2000,seed=5";

/// Time over which a workload's rate is measured before a migration.
const RATE_WINDOW: Duration = Duration::from_secs(2);

/// What the guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Workload {
    /// Nothing but its heartbeat.
    Idle,
    /// 64 bytes in each of 20,000 random pages a second, over 200 MiB, half of them text.
    Writer,
    /// The same over 200 MiB of random bytes.
    WriterRandom,
    /// 64 bytes in each of 20,000 random pages a second, over 200 of 1000 MiB of text.
    WriterText,
    /// 800 MiB of text, of which 20 MiB are written at 1,000 pages a second.
    Text,
    /// Incompressible data, written once and left alone.
    Resident,
}

impl Workload {
    /// As typed and shown.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Writer => "writer",
            Self::WriterRandom => "writer-random",
            Self::WriterText => "writer-text",
            Self::Text => "text",
            Self::Resident => "resident",
        }
    }

    /// Adds the programs to a guest; `resident_mib` is for [`Workload::Resident`] alone.
    pub(crate) fn give_to(self, spec: VmSpec, resident_mib: u64) -> VmSpec {
        let writer = |words: &str| format!("godwit.writer={words},seed=7");
        match self {
            Self::Idle => spec,
            Self::Writer => {
                let words = "fill=200,hot=200,rate=20000,bytes=64,content=mixed";
                spec.with(&writer(words)).with(CHECKER)
            }
            Self::WriterRandom => {
                let words = "fill=200,hot=200,rate=20000,bytes=64,content=random";
                spec.with(&writer(words)).with(CHECKER)
            }
            Self::WriterText => {
                let words = "fill=1000,hot=200,rate=20000,bytes=64,content=text";
                spec.with(&writer(words)).with(CHECKER)
            }
            Self::Text => {
                let words = "fill=800,hot=20,rate=1000,bytes=64,content=text";
                spec.with(&writer(words)).with(CHECKER)
            }
            Self::Resident => {
                let words = format!("fill={resident_mib},hot=1,rate=1,bytes=8,content=random");
                spec.with(&writer(&words))
            }
        }
    }

    fn writes(self) -> bool {
        !matches!(self, Self::Idle | Self::Resident)
    }

    /// Whether the guest verifies its memory.
    pub(crate) fn checks(self) -> bool {
        self.writes()
    }

    /// Brings a booted guest into the state that is measured.
    ///
    /// # Errors
    /// It does not answer.
    pub(crate) fn prepare(self, vm: &mut Vm) -> Result<()> {
        if self == Self::Resident {
            vm.ask("writer stop")?;
        }
        Ok(())
    }

    /// Pages a second that the guest really writes: emulation may not reach what was asked.
    ///
    /// # Errors
    /// It does not answer.
    pub(crate) fn pages_per_s(self, vm: &mut Vm) -> Result<Option<f64>> {
        if !self.writes() {
            return Ok(None);
        }
        let mut sample = || {
            let answer = vm.ask("writer report")?;
            let pages = framework::guest::number(&answer, "pages")?;
            anyhow::Ok((pages, framework::guest::number(&answer, "elapsed_us")?))
        };
        let first = sample().context("The writer does not report")?;
        std::thread::sleep(RATE_WINDOW);
        let last = sample()?;
        let seconds = last.1.saturating_sub(first.1) as f64 / 1e6;
        Ok((seconds > 0.0).then(|| last.0.saturating_sub(first.0) as f64 / seconds))
    }
}

impl std::fmt::Display for Workload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.label())
    }
}
