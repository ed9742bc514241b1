//! What guests are estimated to want at their peak.
//!
//! Of CPU, network and disk: a high percentile of what was wanted in the last window. What a guest takes says too little
//! when it is capped, so that then more is added:
//!
//! - CPU: what it waited for counts as wanted (usage / (1 − steal)), and where it is stolen from, or takes its fair share
//!   of processors that are all busy, [`Settings::delta`] of its processors is added. Where its application says of
//!   itself what it serves, [`gg1`] says what its promised response time takes.
//! - Network: likewise, for a guest that takes its fair share of an interface that is busy.
//! - Memory: what it has been given, since how much that is was decided here and says nothing of what it wants; while it
//!   swaps, a step more for each observation of that in a row.
//!
//! Invariants: a peak is never less than what is taken, of CPU never more than the guest has processors (unless it takes
//! more), of memory never more than it was started with; guests that vanish are forgotten.

pub mod gg1;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::detect::SettingsError;
use crate::model::{Amounts, Cluster, HostIndex, Placement, Resource, Vm, VmIndex};
use crate::series::Series;

/// Settings of the estimates.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// The percentile, as a share.
    pub percentile: f64,
    /// How long figures count, seconds.
    pub window_s: f64,
    /// How many figures count at most.
    pub window_len: usize,
    /// Share of a host's processors, or network, from which on it is saturated.
    pub saturated: f64,
    /// Share of its fair share from which on a guest is capped by it.
    pub fair: f64,
    /// Steal from which on a guest is capped.
    pub steal: f64,
    /// What is added where a guest is capped: share of its processors, or of its fair share of the network.
    pub delta: f64,
    /// Pages that a guest writes to its swap, a second, from which on it has too little memory.
    pub swap_writes_per_s: f64,
    /// By what memory grows in one step, MiB.
    pub memory_step_mib: f64,
    /// So many steps are added at most while nothing is given.
    pub memory_steps_max: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            percentile: 0.95,
            window_s: 600.0,
            window_len: 60,
            saturated: 0.95,
            fair: 0.9,
            steal: 0.10,
            delta: 0.10,
            swap_writes_per_s: 150.0,
            memory_step_mib: 32.0,
            memory_steps_max: 8,
        }
    }
}

impl Settings {
    /// Checks that every setting makes sense.
    ///
    /// # Errors
    /// The first that does not, with its key and what to do.
    pub fn check(&self) -> Result<(), SettingsError> {
        let share = "take a share from 0 to 1 (95 % is 0.95)";
        for (key, value, most, remedy) in [
            ("percentile", self.percentile, 1.0, share),
            ("saturated", self.saturated, 1.0, share),
            ("fair", self.fair, 1.0, share),
            ("steal", self.steal, 1.0, share),
            ("delta", self.delta, 1.0, share),
            ("window-s", self.window_s, 604_800.0, "take seconds, at most a week"),
            ("window-len", self.window_len as f64, 10_000.0, "take at most 10000 figures"),
            ("swap-writes-per-s", self.swap_writes_per_s, 1e9, "take pages a second, from 0"),
            ("memory-step-mib", self.memory_step_mib, 1e6, "take MiB, from 0"),
            ("memory-steps-max", self.memory_steps_max.into(), 1000.0, "take at most 1000 steps"),
        ] {
            if !(0.0..=most).contains(&value) {
                return Err(SettingsError { key, value, remedy });
            }
        }
        Ok(())
    }
}

/// What guests have wanted of late.
#[derive(Debug)]
pub struct Estimates {
    settings: Settings,
    guests: BTreeMap<String, Wanted>,
    now_s: f64,
    round: u64,
}

/// What a guest has wanted.
#[derive(Debug)]
struct Wanted {
    cpu_cores: Series,
    network_mbit: Series,
    disk_mib: Series,
    requests_per_s: Series,
    swapped_for: u32,
    seen_in: u64,
}

/// What a guest may have of its host.
#[derive(Debug, Clone, Copy)]
struct Part {
    /// What it would have if all wanted everything.
    fair: Amounts,
    /// What it could have now: that, or what it takes and what is free.
    open_cores: f64,
    is_cpu_saturated: bool,
    is_network_saturated: bool,
}

impl Estimates {
    /// With nothing seen yet.
    #[must_use]
    pub const fn new(settings: Settings) -> Self {
        Self { settings, guests: BTreeMap::new(), now_s: 0.0, round: 0 }
    }

    /// Remembers usage and sets every guest's `peak`. A cluster that [`Cluster::check`] refuses stays as it is.
    ///
    /// Guests on their way, and those of hosts in a migration, keep the estimates that they had: the migration is in
    /// their figures.
    pub fn observe(&mut self, cluster: &mut Cluster, now_s: f64) {
        if cluster.check().is_err() {
            return;
        }
        if now_s.is_finite() {
            self.now_s = now_s;
        }
        self.round += 1;
        let peaks: Vec<Amounts> = {
            let placement = Placement::new(cluster);
            let crowds: Vec<Crowd> =
                cluster.host_indices().map(|host| Crowd::of(&placement, host)).collect();
            let peak = |index: VmIndex| {
                let crowd = crowds[cluster.vm(index).host.0];
                self.observe_guest(
                    &placement,
                    index,
                    &crowd.part(&placement, index, &self.settings),
                )
            };
            cluster.vm_indices().map(peak).collect()
        };
        for (vm, peak) in cluster.vms.iter_mut().zip(peaks) {
            vm.peak = peak;
        }
        let round = self.round;
        self.guests.retain(|_, wanted| wanted.seen_in == round);
    }

    fn observe_guest(&mut self, placement: &Placement<'_>, index: VmIndex, part: &Part) -> Amounts {
        let vm = placement.cluster().vm(index);
        let is_disturbed = vm.is_migrating || placement.cluster().host(vm.host).is_migrating;
        let wanted = match self.guests.get_mut(&vm.name) {
            Some(wanted) => wanted,
            None => {
                self.guests.entry(vm.name.clone()).or_insert_with(|| Wanted::new(&self.settings))
            }
        };
        wanted.seen_in = self.round;
        if !is_disturbed {
            wanted.take(&self.settings, vm, self.now_s);
        }
        let taken_mbit = placement.taken_by(index).network_mbit;
        wanted.peak(&self.settings, vm, part, taken_mbit)
    }
}

impl Wanted {
    fn new(settings: &Settings) -> Self {
        let series = || Series::new(settings.window_len.min(10_000)).within(settings.window_s);
        Self {
            cpu_cores: series(),
            network_mbit: series(),
            disk_mib: series(),
            requests_per_s: series(),
            swapped_for: 0,
            seen_in: 0,
        }
    }

    fn take(&mut self, settings: &Settings, vm: &Vm, now_s: f64) {
        self.cpu_cores.push(now_s, demanded_cores(vm));
        self.network_mbit.push(now_s, vm.usage.network_mbit);
        self.disk_mib.push(now_s, vm.usage.disk_mib);
        if let Some(gray_box) = vm.gray_box {
            self.requests_per_s.push(now_s, gray_box.served_per_s + gray_box.dropped_per_s);
        }
        let swaps = vm.memory.swap_writes_per_s > settings.swap_writes_per_s;
        let steps = self.swapped_for.saturating_add(1).min(settings.memory_steps_max);
        self.swapped_for = if swaps { steps } else { 0 };
    }

    fn peak(&self, settings: &Settings, vm: &Vm, part: &Part, taken_mbit: f64) -> Amounts {
        let often = |series: &Series| series.percentile(settings.percentile).unwrap_or(0.0);
        let peak = Amounts {
            cpu_cores: self.peak_cores(settings, vm, part),
            memory_mib: self.peak_memory_mib(settings, vm),
            network_mbit: often(&self.network_mbit) + added_mbit(settings, part, taken_mbit),
            disk_mib: often(&self.disk_mib),
        };
        peak.max(&vm.usage)
    }

    fn peak_cores(&self, settings: &Settings, vm: &Vm, part: &Part) -> f64 {
        let vcpus = f64::from(vm.vcpus);
        let takes_its_part =
            part.is_cpu_saturated && vm.usage.cpu_cores >= settings.fair * part.fair.cpu_cores;
        let is_capped = takes_its_part || vm.steal > settings.steal;
        let often = self.cpu_cores.percentile(settings.percentile).unwrap_or(0.0);
        let mut cores = often + if is_capped { settings.delta * vcpus } else { 0.0 };
        let requests_per_s = self.requests_per_s.percentile(settings.percentile);
        if let (Some(gray_box), Some(requests_per_s)) = (&vm.gray_box, requests_per_s) {
            let needed = gg1::scale(gray_box, requests_per_s).map(|scale| scale * part.open_cores);
            cores = cores.max(needed.unwrap_or(0.0));
        }
        cores.min(vcpus)
    }

    fn peak_memory_mib(&self, settings: &Settings, vm: &Vm) -> f64 {
        let allocated_mib = vm.usage.memory_mib;
        if self.swapped_for == 0 {
            return allocated_mib;
        }
        let more_mib = f64::from(self.swapped_for) * settings.memory_step_mib;
        let max_mib = if vm.memory.max_mib.is_finite() { vm.memory.max_mib } else { 0.0 };
        (allocated_mib + more_mib).min(max_mib).max(allocated_mib)
    }
}

/// What a guest would have used if it had not had to wait.
fn demanded_cores(vm: &Vm) -> f64 {
    let ran = 1.0 - vm.steal.clamp(0.0, 1.0);
    let vcpus = f64::from(vm.vcpus).max(vm.usage.cpu_cores);
    // All of the time waited for leaves nothing to divide by: it wants all that it can use.
    if ran > 0.0 { (vm.usage.cpu_cores / ran).min(vcpus) } else { vcpus }
}

fn added_mbit(settings: &Settings, part: &Part, taken_mbit: f64) -> f64 {
    let fair_mbit = part.fair.network_mbit;
    let is_capped = part.is_network_saturated && taken_mbit >= settings.fair * fair_mbit;
    if is_capped { settings.delta * fair_mbit } else { 0.0 }
}

/// Who shares a host.
#[derive(Debug, Clone, Copy)]
struct Crowd {
    vcpus: f64,
    talkers: f64,
}

impl Crowd {
    fn of(placement: &Placement<'_>, host: HostIndex) -> Self {
        let capacity = placement.cluster().host(host).capacity;
        let guests = placement.guests(host);
        let vcpus = guests.iter().map(|vm| f64::from(placement.cluster().vm(*vm).vcpus)).sum();
        let talks =
            |vm: &&VmIndex| placement.taken_by(**vm).network_mbit > capacity.network_mbit / 100.0;
        Self { vcpus, talkers: guests.iter().filter(talks).count() as f64 }
    }

    fn part(&self, placement: &Placement<'_>, index: VmIndex, settings: &Settings) -> Part {
        let vm = placement.cluster().vm(index);
        let host = placement.cluster().host(vm.host);
        let (usage, share) = (placement.usage(vm.host), placement.share(vm.host));
        let (vcpus, room) = (f64::from(vm.vcpus), host.capacity - host.own);
        let fair_cores = (room.cpu_cores.max(0.0) * vcpus / self.vcpus.max(1.0)).min(vcpus);
        let free_cores = (host.capacity.cpu_cores - usage.cpu_cores).max(0.0);
        let fair_mbit = room.network_mbit.max(0.0) / self.talkers.max(1.0);
        Part {
            fair: Amounts { cpu_cores: fair_cores, network_mbit: fair_mbit, ..Amounts::ZERO },
            open_cores: (vm.usage.cpu_cores + free_cores).max(fair_cores).min(vcpus),
            is_cpu_saturated: share[Resource::Cpu] >= settings.saturated,
            is_network_saturated: share[Resource::Network] >= settings.saturated,
        }
    }
}

#[cfg(test)]
mod tests;
