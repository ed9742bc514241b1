//! The initramfs with Debian's programs, which only scenarios with applications need.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context as _, Result, ensure};

/// The task that fetches and packs them, unless that has been done.
const TASK: [&str; 6] = ["run", "--quiet", "--package", "xtask", "--", "applications"];

/// Its path; provided by `cargo xtask applications` the first time in a run.
///
/// # Errors
/// They cannot be fetched, or cargo is not there.
pub(crate) fn initrd() -> Result<PathBuf> {
    static PROVIDED: OnceLock<PathBuf> = OnceLock::new();
    if let Some(path) = PROVIDED.get() {
        return Ok(path.clone());
    }
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    // Its progress is no part of what the bench prints.
    let mut command = Command::new("cargo");
    command.args(TASK).current_dir(root).stdout(std::io::stderr());
    let status = command.status().context("Cannot run cargo to provide the applications")?;
    ensure!(status.success(), "The applications are not there; see `cargo xtask applications`");
    let path = root.join("target/godwit/initrd-applications.gz");
    let path = path.canonicalize().with_context(|| format!("No {}", path.display()))?;
    Ok(PROVIDED.get_or_init(|| path).clone())
}
