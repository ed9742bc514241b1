//! A hugetlbfs mount of our own with reserved 2 MiB pages.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use tempfile::TempDir;

const RESERVED: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Reserved pages and a mount to use them by; both are given back on drop.
#[derive(Debug)]
pub struct HugePages {
    mount: TempDir,
    pages: u64,
}

fn reserved() -> Result<u64> {
    let text = fs::read_to_string(RESERVED).with_context(|| format!("Cannot read {RESERVED}"))?;
    text.trim().parse().with_context(|| format!("{RESERVED} holds no number"))
}

/// Other processes may reserve some, too: nobody else changes the number while this lives.
fn turn() -> Result<fs::File> {
    let turn = fs::File::open(RESERVED).with_context(|| format!("Cannot read {RESERVED}"))?;
    turn.lock().with_context(|| format!("Cannot lock {RESERVED}"))?;
    Ok(turn)
}

impl HugePages {
    /// Reserves `mib` MiB more than there are.
    ///
    /// # Errors
    /// Not root, or memory is too fragmented.
    pub fn reserve(mib: u64) -> Result<Self> {
        let mount = tempfile::Builder::new()
            .prefix("godwit-huge-")
            .tempdir()
            .context("Cannot create a folder to mount at")?;
        let pages = mib.div_ceil(2);
        let turn = turn()?;
        let before = reserved()?;
        fs::write(RESERVED, (before + pages).to_string())
            .with_context(|| format!("Cannot write {RESERVED}; are we root?"))?;
        let got = reserved()?.saturating_sub(before);
        drop(turn);
        let status = Command::new("mount")
            .args(["-t", "hugetlbfs", "-o", "pagesize=2M", "none"])
            .arg(mount.path())
            .status();
        let mounted = status.is_ok_and(|status| status.success());
        let huge = Self { mount, pages: got };
        if !mounted || got < pages {
            // What was got is given back by drop.
            bail!("Only {got} of {pages} huge pages could be reserved (mounted: {mounted})");
        }
        Ok(huge)
    }

    /// Where to create files.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.mount.path()
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        drop(Command::new("umount").arg(self.mount.path()).output());
        let _turn = turn();
        if let Ok(now) = reserved() {
            drop(fs::write(RESERVED, now.saturating_sub(self.pages).to_string()));
        }
    }
}
