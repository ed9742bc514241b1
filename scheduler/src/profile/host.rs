//! The host's own figures: of the whole machine, or of a control group that stands for one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::cgroup::Cgroup;
use super::rates::Counter;
use super::report::Pressure;
use super::{parse, read};
use crate::model::Amounts;

/// Bits of a byte, over those of a megabit.
pub(super) const MBIT_PER_BYTE: f64 = 8.0 / 1e6;

/// Interfaces of the network namespace of whoever reads: a thread may have one of its own.
pub(super) const INTERFACES: &str = "/proc/thread-self/net/dev";

/// What is known of a host beforehand.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// What it has, where it is not to be found out; 0 to find out. Disks' rate cannot be found out.
    pub capacity: Amounts,
    /// The control group (a folder below /sys/fs/cgroup) whose limits are the host's, and whose use is the host's. Of
    /// version 1 that of any controller: /sys/fs/cgroup/cpu/...
    pub cgroup: Option<PathBuf>,
    /// Interfaces that lead outside; none to take those that have a device.
    pub uplinks: Vec<String>,
}

/// What a host has and what is taken of it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Figures {
    /// What it has.
    pub capacity: Amounts,
    /// What is taken.
    pub used: Amounts,
    /// Who waits.
    pub pressure: Pressure,
}

/// A host that is looked at, at an interval.
#[derive(Debug, Default)]
pub struct HostProbe {
    settings: Settings,
    busy: Counter,
    total: Counter,
    cgroup_cpu: Counter,
    uplinks: BTreeMap<String, Counter>,
    stalled: [Counter; 4],
}

impl HostProbe {
    /// Nothing is read yet.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self { settings, ..Self::default() }
    }

    /// Reads. Rates are those since the last time, 0 the first time. What cannot be read is told and counts as 0.
    pub fn read(&mut self, at_s: f64, troubles: &mut Vec<String>) -> Figures {
        let mut figures = Figures::default();
        let mut told = |result: Result<(), String>| troubles.extend(result.err());
        told(self.read_cpu(at_s, &mut figures));
        told(read_memory(&mut figures));
        told(self.read_network(at_s, &mut figures));
        let cgroup = self.settings.cgroup.as_deref().map(Cgroup::at);
        if let Some(cgroup) = &cgroup {
            told(self.read_cgroup(cgroup, at_s, &mut figures));
        }
        told(self.read_pressure(cgroup.as_ref(), at_s, &mut figures.pressure));
        let set = self.settings.capacity;
        for resource in crate::model::Resource::ALL {
            if set[resource] > 0.0 {
                figures.capacity[resource] = set[resource];
            }
        }
        figures
    }

    fn read_cpu(&mut self, at_s: f64, figures: &mut Figures) -> Result<(), String> {
        let time = read::figure("/proc/stat", parse::cpu_time)?;
        let processors = f64::from(time.processors);
        figures.capacity.cpu_cores = processors;
        let busy = self.busy.rate(at_s, time.busy_ticks as f64);
        let total = self.total.rate(at_s, time.total_ticks as f64);
        if let (Some(busy), Some(total)) = (busy, total.filter(|total| *total > 0.0)) {
            figures.used.cpu_cores = (busy / total).min(1.0) * processors;
        }
        Ok(())
    }

    fn read_network(&mut self, at_s: f64, figures: &mut Figures) -> Result<(), String> {
        let interfaces = read::figure(INTERFACES, |text| Some(parse::interfaces(text)))?;
        let settings = &self.settings;
        let is_uplink = |name: &&String| match settings.uplinks.is_empty() {
            true => Path::new("/sys/class/net").join(name).join("device").exists(),
            false => settings.uplinks.contains(name),
        };
        let mut missing = settings.uplinks.iter().filter(|name| !interfaces.contains_key(*name));
        if let Some(name) = missing.next() {
            return Err(format!("There is no interface {name}: name those that lead outside"));
        }
        let uplinks: Vec<&String> = interfaces.keys().filter(is_uplink).collect();
        self.uplinks.retain(|name, _| uplinks.contains(&name));
        for name in uplinks {
            let counter = self.uplinks.entry(name.clone()).or_default();
            let bytes = interfaces.get(name).copied().unwrap_or(0) as f64;
            figures.used.network_mbit += counter.rate(at_s, bytes).unwrap_or(0.0) * MBIT_PER_BYTE;
            figures.capacity.network_mbit += speed_mbit(name);
        }
        Ok(())
    }

    fn read_cgroup(
        &mut self,
        cgroup: &Cgroup,
        at_s: f64,
        figures: &mut Figures,
    ) -> Result<(), String> {
        if let Some(cores) = cgroup.limit_cores() {
            figures.capacity.cpu_cores = cores;
        }
        let used_cores = self.cgroup_cpu.rate(at_s, cgroup.used_s()?);
        figures.used.cpu_cores = used_cores.unwrap_or(0.0);
        if let Some(mib) = cgroup.limit_mib() {
            figures.capacity.memory_mib = mib;
        }
        figures.used.memory_mib = cgroup.used_mib()?;
        Ok(())
    }

    fn read_pressure(
        &mut self,
        cgroup: Option<&Cgroup>,
        at_s: f64,
        pressure: &mut Pressure,
    ) -> Result<(), String> {
        let read = |what: &str| {
            let whole = || PathBuf::from("/proc/pressure").join(what);
            read::figure(cgroup.map_or_else(whole, |cgroup| cgroup.pressure(what)), parse::stalled)
        };
        // Many kernels have it switched off (psi=1 switches it on); all else works without.
        let (cpu, memory, disk) = (read("cpu")?, read("memory")?, read("io")?);
        let totals = [cpu.some_us, memory.some_us, memory.full_us, disk.some_us];
        let mut shares = [0.0; 4];
        for ((share, counter), total_us) in shares.iter_mut().zip(&mut self.stalled).zip(totals) {
            *share = (counter.rate(at_s, total_us as f64).unwrap_or(0.0) / 1e6).min(1.0);
        }
        let [cpu, memory, memory_full, disk] = shares;
        *pressure = Pressure { cpu, memory, memory_full, disk };
        Ok(())
    }
}

fn read_memory(figures: &mut Figures) -> Result<(), String> {
    let memory = read::figure("/proc/meminfo", parse::host_memory)?;
    figures.capacity.memory_mib = memory.total_mib;
    figures.used.memory_mib = (memory.total_mib - memory.available_mib).max(0.0);
    Ok(())
}

/// Of both directions together; virtual ones say none, or −1.
fn speed_mbit(interface: &str) -> f64 {
    let path = Path::new("/sys/class/net").join(interface).join("speed");
    let mbit = read::figure(path, |text| text.trim().parse::<i64>().ok()).unwrap_or(0);
    2.0 * mbit.max(0) as f64
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn work_on_this_machine_is_seen() {
        let settings = Settings { uplinks: vec!["lo".into()], ..Settings::default() };
        let mut probe = HostProbe::new(settings);
        let mut troubles = vec![];
        let began = Instant::now();
        let first = probe.read(0.0, &mut troubles);
        assert_eq!(first.used.cpu_cores, 0.0);
        while began.elapsed() < Duration::from_millis(300) {
            std::hint::spin_loop();
        }
        let figures = probe.read(began.elapsed().as_secs_f64(), &mut troubles);
        assert!(figures.used.cpu_cores > 0.5, "{figures:?}");
        assert!(figures.used.cpu_cores <= figures.capacity.cpu_cores);
        assert!(
            figures.used.memory_mib > 0.0 && figures.used.memory_mib < figures.capacity.memory_mib
        );
        assert!(troubles.iter().all(|trouble| trouble.contains("pressure")), "{troubles:?}");
    }

    #[test]
    fn what_is_set_is_not_found_out_and_what_is_missing_is_told() {
        let capacity = Amounts { cpu_cores: 3.0, disk_mib: 200.0, ..Amounts::ZERO };
        let uplinks = vec!["none0".into()];
        let cgroup = Some(PathBuf::from("/sys/fs/cgroup/none"));
        let mut probe = HostProbe::new(Settings { capacity, cgroup, uplinks });
        let mut troubles = vec![];
        let figures = probe.read(0.0, &mut troubles);
        assert_eq!((figures.capacity.cpu_cores, figures.capacity.disk_mib), (3.0, 200.0));
        assert!(figures.capacity.memory_mib > 0.0);
        let all = troubles.join("\n");
        assert!(all.contains("There is no interface none0"), "{all}");
        assert!(all.contains("/sys/fs/cgroup/none/cpu.stat cannot be read"), "{all}");
    }
}
