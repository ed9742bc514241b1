//! Control groups with a limit of processor time, of either version; removed on drop.
//!
//! Of version 1 there is a folder for each controller, of version 2 one for all.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::wait;

const ROOT: &str = "/sys/fs/cgroup";

/// Names of ours begin with this, then the id of the test's process.
const PREFIX: &str = "godwit-cg";

/// Controllers of version 1 that are used. The first one's folder is what the group is named by.
const CONTROLLERS: [&str; 3] = ["cpu", "cpuacct", "memory"];

/// Limits are kept within this time: short, so that guests stall for some milliseconds only.
const PERIOD_US: u64 = 20_000;

/// A control group.
#[derive(Debug)]
pub struct Cgroup {
    folders: Vec<PathBuf>,
}

fn is_second_version() -> bool {
    Path::new(ROOT).join("cgroup.controllers").exists()
}

impl Cgroup {
    /// Creates one without limits; `what` becomes part of its name.
    ///
    /// # Errors
    /// Not root, or the machine has no such controllers.
    pub fn create(what: &str) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        sweep();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}-{}-{count}-{what}", std::process::id());
        let root = Path::new(ROOT);
        let mut folders = vec![];
        if is_second_version() {
            fs::write(root.join("cgroup.subtree_control"), "+cpu +memory")
                .context("Cannot have controllers for groups")?;
            folders.push(root.join(&name));
        } else {
            folders.extend(CONTROLLERS.map(|controller| root.join(controller).join(&name)));
            // Controllers in one tree have one folder.
            let real = |folder: &PathBuf| fs::canonicalize(folder.parent()?).ok();
            folders.dedup_by_key(|folder| real(folder));
        }
        let cgroup = Self { folders };
        for folder in &cgroup.folders {
            fs::create_dir(folder)
                .with_context(|| format!("Cannot create {} (are we root?)", folder.display()))?;
        }
        Ok(cgroup)
    }

    /// Its folders, for [`crate::process::bound_in`].
    #[must_use]
    pub fn folders(&self) -> &[PathBuf] {
        &self.folders
    }

    /// The folder that it is named by.
    ///
    /// # Panics
    /// Never: there is one at least.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folders[0]
    }

    /// Limits processor time of all in it together; none takes the limit away.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn limit(&self, cores: Option<f64>) -> Result<()> {
        let quota_us = cores.map(|cores| (cores * PERIOD_US as f64).round() as u64);
        let write = |file: &str, text: String| {
            let path = self.folder().join(file);
            fs::write(&path, text).with_context(|| format!("Cannot write {}", path.display()))
        };
        if is_second_version() {
            let quota = quota_us.map_or_else(|| "max".to_owned(), |us| us.to_string());
            return write("cpu.max", format!("{quota} {PERIOD_US}"));
        }
        write("cpu.cfs_period_us", PERIOD_US.to_string())?;
        write("cpu.cfs_quota_us", quota_us.map_or_else(|| "-1".to_owned(), |us| us.to_string()))
    }

    /// Puts a process into it.
    ///
    /// # Errors
    /// It is gone.
    pub fn add(&self, pid: u32) -> Result<()> {
        for folder in &self.folders {
            fs::write(folder.join("cgroup.procs"), pid.to_string())
                .with_context(|| format!("Cannot put {pid} into {}", folder.display()))?;
        }
        Ok(())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for folder in &self.folders {
            // A process that was killed leaves its group a moment later.
            let remove = || Ok(fs::remove_dir(folder).is_ok().then_some(()));
            if let Err(error) = wait::until("processes to leave", Duration::from_secs(5), remove) {
                eprintln!("{} is left behind: {error:#}", folder.display());
            }
        }
    }
}

/// Removes groups of test processes that were killed; what ran in them was killed with them.
fn sweep() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let root = Path::new(ROOT);
        let trees = CONTROLLERS.map(|controller| root.join(controller));
        for entry in trees.iter().map(PathBuf::as_path).chain([root]).flat_map(fs::read_dir) {
            for entry in entry.flatten() {
                let name = entry.file_name();
                let rest = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
                let pid = rest.and_then(|rest| rest.split('-').nth(1)?.parse::<u32>().ok());
                if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                    drop(fs::remove_dir(entry.path()));
                }
            }
        }
    });
}
