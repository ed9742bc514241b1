//! What `cargo xtask setup` has prepared: kernel, initramfs and the two QEMUs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::Deserialize;

/// The QEMU versions that are tested.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum QemuKind {
    /// Debian 12's.
    V7_2,
    /// Of Debian 12's backports, unpacked beside the system.
    V10_0,
}

impl QemuKind {
    /// Both, older first.
    pub const ALL: [Self; 2] = [Self::V7_2, Self::V10_0];

    /// The version as in `env.json`.
    #[must_use]
    pub fn version(self) -> &'static str {
        match self {
            Self::V7_2 => "7.2",
            Self::V10_0 => "10.0",
        }
    }
}

/// Where one QEMU lies.
#[derive(Debug, Clone, Deserialize)]
pub struct QemuPaths {
    /// The program; for 10.0 a script that becomes QEMU by exec.
    pub bin: PathBuf,
    /// Its firmware, the folder for `-L`.
    pub data: PathBuf,
}

/// The contents of `env.json`, and where the command under test lies.
#[derive(Debug, Clone, Deserialize)]
pub struct Env {
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest's initramfs.
    pub initrd: PathBuf,
    /// A newer kernel, of Debian 12's backports.
    pub newer_kernel: PathBuf,
    /// An initramfs without modules, for any kernel.
    pub plain_initrd: PathBuf,
    /// The program `etcd`.
    pub etcd: PathBuf,
    /// By version.
    qemu: BTreeMap<String, QemuPaths>,
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

impl Env {
    /// Reads the file named by `GODWIT_ENV`, or else `target/godwit/env.json` of this repository.
    ///
    /// # Errors
    /// The file is missing or incomplete: the setup has not been run.
    pub fn load() -> Result<Self> {
        let path = std::env::var_os("GODWIT_ENV")
            .map_or_else(|| repository().join("target/godwit/env.json"), PathBuf::from);
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("Cannot read {}; run `cargo xtask setup`", path.display()))?;
        let env: Self = serde_json::from_str(&text).with_context(|| {
            format!("{} is not usable; run `cargo xtask setup`", path.display())
        })?;
        for kind in QemuKind::ALL {
            env.qemu(kind)?;
        }
        Ok(env)
    }

    /// Where a QEMU lies.
    ///
    /// # Errors
    /// `env.json` does not name this version.
    pub fn qemu(&self, kind: QemuKind) -> Result<&QemuPaths> {
        self.qemu.get(kind.version()).with_context(|| {
            format!("env.json names no QEMU {}; run `cargo xtask setup`", kind.version())
        })
    }

    /// The command `migrate`: `GODWIT_MIGRATE`, or the one that cargo built for development.
    ///
    /// # Errors
    /// There is none.
    pub fn migrate(&self) -> Result<PathBuf> {
        command("GODWIT_MIGRATE", "target/debug/migrate", "cargo build -p migrate-cli")
    }

    /// The command `godwit-scheduler`: `GODWIT_SCHEDULER`, or the one that cargo built for development.
    ///
    /// # Errors
    /// There is none.
    pub fn scheduler(&self) -> Result<PathBuf> {
        let how = "cargo build -p scheduler";
        command("GODWIT_SCHEDULER", "target/debug/godwit-scheduler", how)
    }

    /// `migrate` with failpoints compiled in.
    ///
    /// # Errors
    /// There is none.
    pub fn migrate_failpoints(&self) -> Result<PathBuf> {
        let how = "cargo build -p migrate-cli --features failpoints --target-dir target/failpoints";
        command("GODWIT_MIGRATE_FAILPOINTS", "target/failpoints/debug/migrate", how)
    }
}

fn command(variable: &str, default: &str, how: &str) -> Result<PathBuf> {
    let path = std::env::var_os(variable).map_or_else(|| repository().join(default), PathBuf::from);
    path.canonicalize()
        .with_context(|| format!("No program at {}; build it with `{how}`", path.display()))
}
