//! How long guests wait for their memory after post-copy, by QEMU's own count.
//!
//! The QEMU at the destination measures only if its capability `postcopy-blocktime` was switched on before.

use anyhow::{Context as _, Result, ensure};
use framework::{Backend, QemuKind, VmSpec};
use serde_json::Value;

/// Longest that a guest may wait for a page on average, on a link of 100 Mbit/s where what engines, sockets and QEMU hold of
/// a stream takes some hundreds.
const WAIT_MS_MAX: u64 = 30;

/// A guest with private memory for such a link, where post-copy takes some seconds.
#[must_use]
pub fn slow(kind: QemuKind) -> VmSpec {
    VmSpec::new("slow", kind)
        .backend(Backend::Private)
        .odd_memory()
        .with("godwit.writer=fill=24,hot=12,rate=300,bytes=64,content=random,seed=7")
        .with("godwit.checker=size=8,seed=5")
}

/// How a guest waited for its memory.
#[derive(Debug, Clone, Copy)]
pub struct Waits {
    /// Pages that were asked for.
    pub requests: u64,
    /// How long all of it stood still.
    pub blocked_ms: u64,
}

impl Waits {
    /// From what the two QEMUs say of a migration that completed.
    ///
    /// # Errors
    /// It was no post-copy, or was not measured.
    pub fn of(source: &Value, destination: &Value) -> Result<Self> {
        let is_post_copy = source["ram"]["postcopy-bytes"].as_u64() > Some(0);
        ensure!(is_post_copy, "It was no post-copy: {source}");
        Ok(Self {
            requests: source["ram"]["postcopy-requests"].as_u64().unwrap_or_default(),
            blocked_ms: destination["postcopy-blocktime"].as_u64().context("no blocktime")?,
        })
    }

    /// Pages that were asked for overtook the others.
    ///
    /// # Errors
    /// None was asked for, or the guest waited longer than what was under way takes to arrive.
    pub fn assert_short(&self) -> Result<()> {
        let per_request = self.blocked_ms.checked_div(self.requests);
        let per_request = per_request.context("No page was asked for")?;
        ensure!(per_request < WAIT_MS_MAX, "{self:?}");
        Ok(())
    }
}
