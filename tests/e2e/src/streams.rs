//! `migrate send --path stream`, as its tests use it.

use anyhow::{Context as _, Result, ensure};
use framework::{Engine, Vm, wait};
use serde_json::Value;

use crate::PATIENCE;

/// What every `send` here is told.
pub const STREAM: &[&str] = &["--path", "stream"];

/// Where a destination behind a link of its own listens.
pub const LISTEN: &str = "10.77.0.2:7700";

/// What QEMU has given the engine before a migration counts as under way.
const UNDER_WAY_BYTES: u64 = 4 << 20;

/// [`STREAM`] and more.
#[must_use]
pub fn stream<'a>(extra: &[&'a str]) -> Vec<&'a str> {
    [STREAM, extra].concat()
}

/// Waits until pages are on their way while the guest runs.
///
/// # Errors
/// `send` ends before, or QEMU does not begin.
pub fn under_way(vm: &mut Vm, send: &mut Engine) -> Result<()> {
    let begun = wait::until("a migration to be under way", PATIENCE, || {
        ensure!(send.running()?, "`send` has ended");
        let now = vm.qmp().migration()?;
        let is_moving = now["ram"]["transferred"].as_u64() > Some(UNDER_WAY_BYTES);
        Ok((now["status"] == "active" && is_moving).then_some(()))
    });
    begun.with_context(|| send.stderr())
}

/// What every report says, however the migration ended.
///
/// # Errors
/// What it does not say.
pub fn check_report(report: &Value, outcome: &str) -> Result<()> {
    let is_ours = report["v"] == 1 && report["outcome"] == outcome && report["path"] == "stream";
    ensure!(is_ours, "{report}");
    let mode = report["mode"].as_str().unwrap_or_default();
    ensure!(["pre-copy", "post-copy", "hybrid"].contains(&mode), "{report}");
    let numbers = ["/total_ms", "/downtime_ms", "/bytes/ram", "/bytes/wire"];
    for field in numbers.into_iter().chain(["/pages/zero", "/pages/raw", "/pages/delta"]) {
        let is_number = report.pointer(field).is_some_and(Value::is_number);
        ensure!(is_number, "{field} in {report}");
    }
    let error = &report["error"];
    if outcome == "completed" {
        ensure!(error.is_null(), "{report}");
        return Ok(());
    }
    for field in ["kind", "message", "source_vm", "destination_vm"] {
        let is_said = error[field].as_str().is_some_and(|text| !text.is_empty());
        ensure!(is_said, "error.{field} in {report}");
    }
    Ok(())
}
