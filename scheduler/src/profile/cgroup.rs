//! Control groups of both versions: limits of processor time and memory, and what is used of them.
//!
//! Version 2 has one folder for a group, version 1 one for each controller, which may lie in different trees:
//!
//! | | version 2 | version 1 |
//! |---|---|---|
//! | limit of processors | cpu.max | cpu/…/cpu.cfs_quota_us, cpu.cfs_period_us |
//! | processor time used | cpu.stat: usage_usec | cpuacct/…/cpuacct.usage |
//! | limit of memory | memory.max | memory/…/memory.limit_in_bytes |
//! | memory used | memory.current, memory.stat | memory/…/memory.usage_in_bytes, memory.stat |
//!
//! Source: Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/{cpuacct,memory}.rst, scheduler/sched-bwc.rst.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::{parse, read};

const MIB: f64 = 1_048_576.0;

/// Where control groups are.
pub const ROOT: &str = "/sys/fs/cgroup";

/// Controllers of version 1 whose files are read; they may share a tree (`cpu,cpuacct`), which has a link for each then.
const CONTROLLERS: [&str; 3] = ["cpu", "cpuacct", "memory"];

/// Most groups above one that are looked at.
const DEPTH_MAX: usize = 32;

/// A control group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    /// The first one is what it was named by.
    folders: Vec<PathBuf>,
}

impl Cgroup {
    /// The group in this folder. Of version 1 it is the one of any controller; the others' are found beside it.
    #[must_use]
    pub fn at(folder: &Path) -> Self {
        Self::below(Path::new(ROOT), folder)
    }

    fn below(root: &Path, folder: &Path) -> Self {
        let mut folders = vec![folder.to_owned()];
        if !root.join("cgroup.controllers").exists()
            && let Ok(rest) = folder.strip_prefix(root)
            && rest.components().count() > 1
        {
            let name: PathBuf = rest.components().skip(1).collect();
            let others = CONTROLLERS.iter().map(|controller| root.join(controller).join(&name));
            folders.extend(others.filter(|other| other != folder));
        }
        Self { folders }
    }

    /// Processors that it may use; none if it may use all.
    #[must_use]
    pub fn limit_cores(&self) -> Option<f64> {
        if let Some(path) = self.find("cpu.max") {
            return read::figure(path, parse::cpu_max_cores).ok();
        }
        let quota_us = read::figure(self.find("cpu.cfs_quota_us")?, parse::number).ok()?;
        let period_us = read::figure(self.find("cpu.cfs_period_us")?, parse::number).ok()?;
        (period_us > 0).then(|| quota_us as f64 / period_us as f64)
    }

    /// Processor time that was used, seconds.
    ///
    /// # Errors
    /// In words, if it cannot be read.
    pub fn used_s(&self) -> Result<f64, String> {
        if let Some(path) = self.find("cpuacct.usage") {
            return Ok(read::figure(path, parse::number)? as f64 / 1e9);
        }
        Ok(read::figure(self.path("cpu.stat"), parse::cgroup_cpu_us)? as f64 / 1e6)
    }

    /// Memory that it may use, MiB; none if there is no limit.
    #[must_use]
    pub fn limit_mib(&self) -> Option<f64> {
        let path = self.find("memory.max").or_else(|| self.find("memory.limit_in_bytes"))?;
        let bytes = read::figure(path, parse::number).ok()?;
        // Version 1 has no word for "none", but the largest number of whole pages.
        (bytes < 1 << 62).then_some(bytes as f64 / MIB)
    }

    /// Memory that is used and cannot be had back at once, MiB.
    ///
    /// # Errors
    /// In words, if it cannot be read.
    pub fn used_mib(&self) -> Result<f64, String> {
        let path = self.find("memory.current").or_else(|| self.find("memory.usage_in_bytes"));
        let path = path.unwrap_or_else(|| self.path("memory.current"));
        let bytes = read::figure(&path, parse::number)?;
        let cache = read::figure(path.with_file_name("memory.stat"), parse::cgroup_cache_bytes)?;
        Ok(bytes.saturating_sub(cache) as f64 / MIB)
    }

    /// The file of pressure, `cpu`, `memory` or `io`; version 1 has none, and the whole machine's is read.
    #[must_use]
    pub fn pressure(&self, what: &str) -> PathBuf {
        let whole = || Path::new("/proc/pressure").join(what);
        self.find(&format!("{what}.pressure")).unwrap_or_else(whole)
    }

    fn find(&self, file: &str) -> Option<PathBuf> {
        self.folders.iter().map(|folder| folder.join(file)).find(|path| path.exists())
    }

    /// Where a file would be, for telling that it is not there.
    fn path(&self, file: &str) -> PathBuf {
        self.folders.first().map_or_else(|| file.into(), |folder| folder.join(file))
    }
}

/// Processors that a guest may use by limits of its own: those of the groups that its processors' threads are in, up to
/// that of the host, which is not the guest's own. None if there is no limit, or nothing can be read.
#[must_use]
pub fn own_limit_cores(pid: i32, threads: &[i32], host: Option<&Path>) -> Option<f64> {
    let group = |thread: &i32| {
        let text = read::text(format!("/proc/{pid}/task/{thread}/cgroup")).ok()?;
        parse::cpu_cgroup(&text).map(PathBuf::from)
    };
    let groups: BTreeSet<PathBuf> = threads.iter().filter_map(group).collect();
    limit_of(Path::new(ROOT), &groups, host)
}

fn limit_of(root: &Path, groups: &BTreeSet<PathBuf>, host: Option<&Path>) -> Option<f64> {
    let is_split = !root.join("cgroup.controllers").exists();
    let folder = |group: &Path| {
        let tree = if is_split { root.join("cpu") } else { root.to_owned() };
        tree.join(group.strip_prefix("/").unwrap_or(group))
    };
    let is_own = |group: &&Path| {
        let is_of_host =
            host.is_some_and(|host| folder_name(root, host, is_split).starts_with(group));
        group.parent().is_some() && !is_of_host
    };
    let limit = |group: &Path| Cgroup::below(root, &folder(group)).limit_cores();
    let own = groups.iter().filter(|group| is_own(&group.as_path()));
    let leaves: Option<Vec<f64>> = own.map(|group| limit(group)).collect();
    let leaves = leaves.filter(|limits| limits.len() == groups.len() && !limits.is_empty());
    let leaves = leaves.map(|limits| limits.iter().sum());
    let above = groups.first()?.ancestors().skip(1).take(DEPTH_MAX).filter(is_own);
    above.filter_map(limit).chain(leaves).reduce(f64::min)
}

/// A group's folder as /proc/PID/cgroup has it.
fn folder_name(root: &Path, folder: &Path, is_split: bool) -> PathBuf {
    let rest = folder.strip_prefix(root).unwrap_or(folder);
    let rest = rest.components().skip(usize::from(is_split));
    Path::new("/").join(rest.collect::<PathBuf>())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn write(root: &Path, files: &[(&str, &str)]) {
        for (file, text) in files {
            let path = root.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }

    #[test]
    fn both_versions_say_the_same() {
        let (v1, v2) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let v1_files = [
            ("cpu/g/h/cpu.cfs_quota_us", "50000\n"),
            ("cpu/g/h/cpu.cfs_period_us", "100000\n"),
            ("cpu/g/h/cpu.stat", "nr_periods 0\nnr_throttled 0\nthrottled_time 0\n"),
            ("cpuacct/g/h/cpuacct.usage", "2500000000\n"),
            ("memory/g/h/memory.limit_in_bytes", "104857600\n"),
            ("memory/g/h/memory.usage_in_bytes", "8388608\n"),
            ("memory/g/h/memory.stat", "inactive_file 0\ntotal_inactive_file 4194304\n"),
        ];
        let v2_files = [
            ("cgroup.controllers", "cpu memory\n"),
            ("g/h/cpu.max", "50000 100000\n"),
            ("g/h/cpu.stat", "usage_usec 2500000\nuser_usec 1\n"),
            ("g/h/memory.max", "104857600\n"),
            ("g/h/memory.current", "8388608\n"),
            ("g/h/memory.stat", "anon 1\ninactive_file 4194304\n"),
        ];
        write(v1.path(), &v1_files);
        write(v2.path(), &v2_files);
        let old = Cgroup::below(v1.path(), &v1.path().join("cpu/g/h"));
        let new = Cgroup::below(v2.path(), &v2.path().join("g/h"));
        for group in [&old, &new] {
            assert_eq!((group.limit_cores(), group.used_s()), (Some(0.5), Ok(2.5)), "{group:?}");
            assert_eq!((group.limit_mib(), group.used_mib()), (Some(100.0), Ok(4.0)), "{group:?}");
        }
        assert_eq!(old.pressure("cpu"), Path::new("/proc/pressure/cpu"));
        write(v1.path(), &[("cpu/g/h/cpu.cfs_quota_us", "-1\n")]);
        write(v1.path(), &[("memory/g/h/memory.limit_in_bytes", "9223372036854771712\n")]);
        assert_eq!((old.limit_cores(), old.limit_mib()), (None, None));
        write(v2.path(), &[("g/h/cpu.max", "max 100000\n"), ("g/h/memory.max", "max\n")]);
        assert_eq!((new.limit_cores(), new.limit_mib()), (None, None));
        let none = v1.path().join("none");
        let folders = vec![none.clone()];
        assert_eq!(Cgroup::below(v1.path(), &none), Cgroup { folders }, "not the whole machine");
        let missing = Cgroup::below(v2.path(), &v2.path().join("none"));
        assert!(missing.used_s().unwrap_err().contains("none/cpu.stat cannot be read"));
        assert!(missing.used_mib().unwrap_err().contains("none/memory.current cannot be read"));
    }

    /// Each processor of a guest may have a group and a limit, and all together another one.
    #[test]
    fn a_guests_own_limit_is_the_narrowest_below_the_host() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let vcpu = |max| [("vm/a/vcpu0/cpu.max", max), ("vm/a/vcpu1/cpu.max", max)];
        write(root, &[("cgroup.controllers", ""), ("vm/cpu.max", "100000 100000")]);
        write(root, &vcpu("80000 100000"));
        let groups = ["/vm/a/vcpu0", "/vm/a/vcpu1"].map(PathBuf::from).into();
        let host = root.join("vm");
        assert_eq!(limit_of(root, &groups, Some(&host)), Some(1.6));
        assert_eq!(limit_of(root, &groups, None), Some(1.0), "of all guests together");
        write(root, &[("vm/a/cpu.max", "50000 100000")]);
        assert_eq!(limit_of(root, &groups, Some(&host)), Some(0.5));
        write(root, &vcpu("max 100000"));
        write(root, &[("vm/a/cpu.max", "max 100000")]);
        assert_eq!(limit_of(root, &groups, Some(&host)), None);
        let in_host = [PathBuf::from("/vm")].into();
        assert_eq!(limit_of(root, &in_host, Some(&host)), None, "that is the host's");
        assert_eq!(limit_of(root, &BTreeSet::new(), None), None);
        assert_eq!(limit_of(root, &["/".into()].into(), None), None);
    }
}
