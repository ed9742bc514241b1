//! What the kernel says, as figures.
//!
//! Invariant: any text is accepted; what does not have the known form is nothing. Source of the forms: proc(5),
//! Documentation/accounting/psi.rst, Documentation/admin-guide/cgroup-v2.rst.

pub mod nft;
pub mod qmp;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

const KIB_PER_MIB: f64 = 1024.0;

/// Most interfaces that are looked at.
const INTERFACES_MAX: usize = 16_384;

/// Processor time since boot, over all processors, in clock ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuTime {
    /// In which something ran.
    pub busy_ticks: u64,
    /// In all.
    pub total_ticks: u64,
    /// Processors that are online.
    pub processors: u32,
}

/// /proc/stat. Time of guests is in that of users already; time stolen by a hypervisor under this host is neither busy nor
/// available, so that it is left out.
#[must_use]
pub fn cpu_time(text: &str) -> Option<CpuTime> {
    let line = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let fields: Vec<u64> =
        line.split_ascii_whitespace().map(|field| field.parse().ok()).collect::<Option<_>>()?;
    let [user, nice, system, idle, iowait, irq, softirq, ..] = fields.as_slice() else {
        return None;
    };
    let sum = |parts: &[u64]| parts.iter().fold(0_u64, |sum, part| sum.saturating_add(*part));
    let busy_ticks = sum(&[*user, *nice, *system, *irq, *softirq]);
    let is_processor = |line: &&str| {
        line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    let processors = u32::try_from(text.lines().filter(is_processor).count()).ok()?;
    Some(CpuTime { busy_ticks, total_ticks: sum(&[busy_ticks, *idle, *iowait]), processors })
}

/// The host's memory.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct HostMemory {
    /// In all.
    pub total_mib: f64,
    /// What programs can still have without swapping.
    pub available_mib: f64,
}

/// /proc/meminfo.
#[must_use]
pub fn host_memory(text: &str) -> Option<HostMemory> {
    let figure = |name: &str| {
        let rest = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        let kib: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib as f64 / KIB_PER_MIB)
    };
    Some(HostMemory { total_mib: figure("MemTotal")?, available_mib: figure("MemAvailable")? })
}

/// Microseconds since boot in which somebody waited, from a file of /proc/pressure or a cgroup's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stalled {
    /// At least one task.
    pub some_us: u64,
    /// All tasks that were not idle.
    pub full_us: u64,
}

/// A file of /proc/pressure. The kernel's own averages are over 10 s at least; the totals have any interval.
#[must_use]
pub fn stalled(text: &str) -> Option<Stalled> {
    let total = |kind: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(kind)?.strip_prefix(' '))?;
        line.split_ascii_whitespace().find_map(|field| field.strip_prefix("total="))?.parse().ok()
    };
    // Of CPU, older kernels have no second line.
    Some(Stalled { some_us: total("some")?, full_us: total("full").unwrap_or(0) })
}

/// Bytes through interfaces since they came up, both directions together, by name (/proc/net/dev).
#[must_use]
pub fn interfaces(text: &str) -> BTreeMap<String, u64> {
    let interface = |line: &str| {
        let (name, rest) = line.split_once(':')?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let (received, sent): (u64, u64) =
            (fields.first()?.parse().ok()?, fields.get(8)?.parse().ok()?);
        Some((name.trim().to_owned(), received.saturating_add(sent)))
    };
    text.lines().filter_map(interface).take(INTERFACES_MAX).collect()
}

/// Nanoseconds in which a thread could have run and waited, since it began, from /proc/PID/task/TID/schedstat. Time in
/// which its control group had used up its limit is among them.
#[must_use]
pub fn thread_waited_ns(text: &str) -> Option<u64> {
    text.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Clock ticks in which a process ran, from /proc/PID/stat; its name may hold anything.
#[must_use]
pub fn process_ticks(text: &str) -> Option<u64> {
    let (_, rest) = text.rsplit_once(')')?;
    let mut times = rest.split_ascii_whitespace().skip(11).map(|field| field.parse::<u64>().ok());
    times.next()??.checked_add(times.next()??)
}

/// A process's pages in memory, from /proc/PID/statm.
#[must_use]
pub fn resident_pages(text: &str) -> Option<u64> {
    text.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// The interface that a descriptor of /dev/net/tun stands for, from /proc/PID/fdinfo/FD.
#[must_use]
pub fn tap_name(text: &str) -> Option<&str> {
    let name = text.lines().find_map(|line| line.strip_prefix("iff:"))?.trim();
    (!name.is_empty()).then_some(name)
}

/// A number on a line of its own, such as memory.current; `max` is nothing.
#[must_use]
pub fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// A cgroup's limit of processors from cpu.max, if it has one.
#[must_use]
pub fn cpu_max_cores(text: &str) -> Option<f64> {
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period): (u64, u64) = (quota.parse().ok()?, period.parse().ok()?);
    (period > 0).then(|| quota as f64 / period as f64)
}

/// Microseconds of processor time from a cgroup's cpu.stat.
#[must_use]
pub fn cgroup_cpu_us(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("usage_usec "))?.trim().parse().ok()
}

/// What of a cgroup's memory can be had back at once: page cache that is not used (memory.stat). Version 1 tells that of
/// the group alone, and with those below it.
#[must_use]
pub fn cgroup_cache_bytes(text: &str) -> Option<u64> {
    let figure = |name| text.lines().find_map(|line| line.strip_prefix(name));
    figure("total_inactive_file ").or_else(|| figure("inactive_file "))?.trim().parse().ok()
}

/// The group by which a task's processor time is limited, from /proc/PID/task/TID/cgroup: of version 1 that of the
/// controller, else that of version 2.
#[must_use]
pub fn cpu_cgroup(text: &str) -> Option<&str> {
    fn parts(line: &str) -> Option<(&str, &str)> {
        line.split_once(':')?.1.split_once(':')
    }
    let of = |wanted: &dyn Fn(&str) -> bool| {
        let mut lines = text.lines().filter_map(parts);
        lines.find(|(controllers, _)| wanted(controllers)).map(|(_, group)| group)
    };
    let found = of(&|controllers| controllers.split(',').any(|one| one == "cpu"));
    found.or_else(|| of(&str::is_empty)).filter(|group| group.starts_with('/'))
}
