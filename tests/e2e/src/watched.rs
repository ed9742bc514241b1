//! A running guest that a refused migration must not touch.
//!
//! Every refusal is checked for its words, its exit code, that the guest was never stopped (QEMU sent no STOP event, the
//! heartbeat went on), and that nothing of an engine is left in QEMU.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use framework::{EngineOutput, QemuKind, Vm, VmSpec, wait};

use crate::untouched::Before;
use crate::{PATIENCE, Rig, free_address};

/// Longest pause of the heartbeat that passes for a loaded machine.
const PAUSE_US_MAX: u64 = 400_000;

/// A running guest and what must not change about it.
#[derive(Debug)]
pub struct Watched {
    /// Identities and journals.
    pub rig: Rig,
    /// The guest.
    pub vm: Vm,
    before: Before,
}

impl Watched {
    /// Boots it.
    ///
    /// # Errors
    /// It does not boot.
    pub fn boot(spec: VmSpec) -> Result<Self> {
        let rig = Rig::new()?;
        let mut vm = Vm::boot(&rig.env, spec)?;
        let before = Before::of(&mut vm)?;
        Ok(Self { rig, vm, before })
    }

    /// A spec of the same shape that waits for a guest.
    #[must_use]
    pub fn next(&self, kind: QemuKind) -> VmSpec {
        self.vm.spec().successor("other", kind)
    }

    /// Runs something that must be refused, with these words in its message.
    ///
    /// # Errors
    /// It is not, for other reasons, or something changed about the guest.
    pub fn refused(
        &mut self,
        what: &str,
        words: &[&str],
        run: impl FnOnce(&Rig, &Vm) -> Result<EngineOutput>,
    ) -> Result<()> {
        self.vm.qmp().clear_events();
        let from_us = wait::monotonic_us();
        let ended = run(&self.rig, &self.vm).with_context(|| what.to_owned())?;
        self.check(&ended, words, from_us).with_context(|| format!("{what}: {ended:?}"))
    }

    fn check(&mut self, ended: &EngineOutput, words: &[&str], from_us: u64) -> Result<()> {
        ensure!(ended.code == Some(1), "Exit code {:?}", ended.code);
        let report = ended.json()?;
        ensure!(report["outcome"] == "failed", "Outcome {}", report["outcome"]);
        ensure!(report["error"]["source_vm"] != "paused", "Guest {}", report["error"]);
        let message = report["error"]["message"].as_str().unwrap_or_default();
        for word in words {
            ensure!(message.contains(word), "{word:?} is not in {message:?}");
        }
        self.untouched(from_us)
    }

    /// Nothing has changed about the guest, and it has run all the time since the events were cleared and `from_us` of the
    /// host's clock.
    ///
    /// # Errors
    /// What has changed.
    pub fn untouched(&mut self, from_us: u64) -> Result<()> {
        let journals = self.rig.journal("source");
        self.before.assert_untouched(&mut self.vm, Path::new(&journals))?;
        ensure!(
            self.vm.qmp().event("STOP", Duration::from_millis(20)).is_err(),
            "The guest was stopped"
        );
        let record = self.vm.heartbeat().record();
        let beats = record.beats.windows(2).filter(|pair| pair[1].at_us > from_us);
        let longest = beats.map(|pair| pair[1].at_us - pair[0].at_us).max().unwrap_or(u64::MAX);
        ensure!(longest < PAUSE_US_MAX, "The heartbeat paused for {longest} us");
        Ok(())
    }

    /// Sends, with these `extra` words, to a destination of another shape, which refuses and goes on waiting.
    ///
    /// # Errors
    /// As [`Watched::refused`].
    pub fn refused_by(&mut self, shape: VmSpec, extra: &[&str], words: &[&str]) -> Result<()> {
        let what = format!("{:?} {} {}", shape.backend, shape.memory_mib, shape.machine);
        let destination = Vm::start(&self.rig.env, shape)?;
        let listen = free_address()?;
        let mut receive = self.rig.receive(&destination, &listen, &[])?;
        self.refused(&what, words, |rig, vm| rig.send(vm, &listen, extra)?.wait(PATIENCE))?;
        receive.wait_stderr("refused:", PATIENCE)?;
        ensure!(receive.running()?, "The destination ended: {}", receive.stderr());
        Ok(())
    }
}
