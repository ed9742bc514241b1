//! What a QEMU looks like before a migration, and proof that one that was undone left no trace.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use framework::Vm;
use serde_json::{Value, json};

use crate::BEATS_WITHIN;

/// What a migration may change in a source's QEMU and must put back.
#[derive(Debug)]
pub struct Before {
    capabilities: Value,
    parameters: Value,
}

impl Before {
    /// Notes it.
    ///
    /// # Errors
    /// QEMU does not answer.
    pub fn of(vm: &mut Vm) -> Result<Self> {
        let capabilities = vm.qmp().execute("query-migrate-capabilities", json!({}))?;
        let parameters = vm.qmp().execute("query-migrate-parameters", json!({}))?;
        Ok(Self { capabilities, parameters })
    }

    /// The guest runs on and nothing of a migration is left.
    ///
    /// # Errors
    /// What is left.
    pub fn assert_untouched(&self, vm: &mut Vm, journals: &Path) -> Result<()> {
        let now = Self::of(vm)?;
        ensure!(now.capabilities == self.capabilities, "Capabilities: {}", now.capabilities);
        ensure!(now.parameters == self.parameters, "Parameters: {}", now.parameters);
        let state = vm.qmp().run_state()?;
        ensure!(state == "running", "The source's QEMU is {state}");
        ensure!(vm.heartbeat().beats_within(BEATS_WITHIN), "No heartbeat at the source");
        assert_detached(vm.pid())?;
        let left = source_journals(journals);
        ensure!(left.is_empty(), "Journals are left: {left:?}");
        Ok(())
    }
}

/// Nobody traces the process, it has no userfaultfd, and none of its memory is registered with one.
///
/// # Errors
/// What is left of an engine.
pub fn assert_detached(pid: u32) -> Result<()> {
    let process = Path::new("/proc").join(pid.to_string());
    for entry in std::fs::read_dir(process.join("fd")).context("No descriptors")?.flatten() {
        // One that was closed meanwhile is none of ours.
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        // Not the device of this name, which QEMU 10.0 keeps open after it was asked for post-copy.
        let is_uffd = target.to_string_lossy().contains("[userfaultfd]");
        ensure!(!is_uffd, "QEMU has a userfaultfd: {:?}", entry.path());
    }
    let maps = std::fs::read_to_string(process.join("smaps")).context("No smaps")?;
    ensure!(maps.contains("VmFlags:"), "The kernel shows no flags of mappings");
    for line in maps.lines().filter_map(|line| line.strip_prefix("VmFlags:")) {
        let tracked = line.split_whitespace().any(|flag| ["uw", "um"].contains(&flag));
        ensure!(!tracked, "Memory is registered with a userfaultfd: {line}");
    }
    for task in std::fs::read_dir(process.join("task")).context("No threads")?.flatten() {
        let Ok(status) = std::fs::read_to_string(task.path().join("status")) else { continue };
        let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
        ensure!(tracer.is_some_and(|pid| pid.trim() == "0"), "Thread {:?} is traced", task.path());
        let state = status.lines().find_map(|line| line.strip_prefix("State:"));
        ensure!(state.is_some_and(|state| !state.contains(['T', 't'])), "{:?} stands", task.path());
    }
    Ok(())
}

/// Names of the journals of migrations away from here.
#[must_use]
pub fn source_journals(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("source-")).collect()
}
