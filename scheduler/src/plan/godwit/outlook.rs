//! How much overload is to be expected of a placement.
//!
//! A guest's need varies: at present it wants what it takes and what it waits for, and in one of twenty moments it wants
//! its peak or more; besides, nobody knows what the next minutes bring. A host's load is then about normal, around the sum
//! of what is wanted, with the spread that the guests' spreads make together: part of it independent, part of it common to
//! all, as people's days are. From that follow the chance that more is wanted than the host has, and by how much. Of
//! memory what is wanted counts, not what a guest makes do with.
//!
//! Invariant: the sums are those of adding everything up anew (up to rounding), however many moves were made.

use crate::model::{Amounts, Cluster, HostIndex, Placement, Resource, Vm, VmIndex};

/// Standard deviations from the mean to the 95th percentile.
const PEAK_DEVIATIONS: f64 = 1.645;

/// Share of the guests' deviations that is common to all.
const COMMON: f64 = 0.2;

/// How heavily a load beyond what there is weighs, beside that it is beyond.
const EXCESS_WEIGHT: f64 = 4.0;

/// What is expected of hosts.
#[derive(Debug, Clone)]
pub(super) struct Outlook {
    guests: Vec<Guest>,
    hosts: Vec<Sums>,
    /// Shares of its capacity that a host should carry.
    share_max: Amounts,
    /// What a load beyond that counts.
    hot_weight: f64,
}

/// What is expected of a guest.
#[derive(Debug, Clone, Copy)]
struct Guest {
    /// What it wants beyond what it takes.
    waits_for: Amounts,
    deviation: Amounts,
}

/// Over the guests of a host.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    waits_for: Amounts,
    deviation: Amounts,
    /// Squares of the deviations.
    variance: Amounts,
}

/// A host's load as a distribution.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    pub(super) mean: Amounts,
    deviation: Amounts,
    variance: Amounts,
}

impl Outlook {
    /// As the guests run now.
    pub(super) fn new(
        placement: &Placement<'_>,
        share_max: Amounts,
        (hot_weight, unknown): (f64, f64),
    ) -> Self {
        let cluster = placement.cluster();
        let guests = cluster.vms.iter().map(|vm| Guest::new(vm, unknown)).collect();
        let hosts = vec![Sums::default(); cluster.hosts.len()];
        let mut outlook = Self { guests, hosts, share_max, hot_weight };
        for vm in cluster.vm_indices() {
            outlook.add(vm, placement.host_of(vm), 1.0);
        }
        outlook
    }

    fn add(&mut self, vm: VmIndex, host: HostIndex, sign: f64) {
        let (Some(guest), Some(sums)) = (self.guests.get(vm.0), self.hosts.get_mut(host.0)) else {
            return;
        };
        sums.waits_for += guest.waits_for.times(sign);
        sums.deviation += guest.deviation.times(sign);
        sums.variance += squared(guest.deviation).times(sign);
    }

    /// Moves a guest, as [`Placement::go`] does.
    pub(super) fn go(&mut self, vm: VmIndex, from: HostIndex, to: HostIndex) {
        self.add(vm, from, -1.0);
        self.add(vm, to, 1.0);
    }

    /// A host's load.
    pub(super) fn load(&self, placement: &Placement<'_>, host: HostIndex) -> Load {
        let sums = self.hosts.get(host.0).copied().unwrap_or_default();
        let memory_mib = placement.peak(host).memory_mib;
        let mean = Amounts { memory_mib, ..placement.usage(host) + sums.waits_for };
        Load { mean, deviation: sums.deviation, variance: sums.variance }
    }

    /// The loads of source and destination if a guest went there.
    pub(super) fn loads_after(
        &self,
        placement: &Placement<'_>,
        vm: VmIndex,
        to: HostIndex,
    ) -> (Load, Load) {
        let from = placement.host_of(vm);
        let change = placement.change(vm, to);
        let (mut source, mut destination) = (self.load(placement, from), self.load(placement, to));
        let wanted =
            |usage: Amounts, peak: Amounts| Amounts { memory_mib: peak.memory_mib, ..usage };
        source.mean += wanted(change.source_usage, change.source_peak);
        destination.mean += wanted(change.destination_usage, change.destination_peak);
        if let Some(guest) = self.guests.get(vm.0) {
            source.add(guest, -1.0);
            destination.add(guest, 1.0);
        }
        (source, destination)
    }

    /// What is wrong with a host that has this load: 0 for nothing, about 1 for more load than it has resources all the
    /// time, more for load that is far beyond.
    pub(super) fn trouble(&self, cluster: &Cluster, host: HostIndex, load: &Load) -> f64 {
        let capacity = &cluster.host(host).capacity;
        let of = |resource| {
            let limit = capacity[resource] * self.share_max[resource];
            let has = if resource == Resource::Memory { limit } else { capacity[resource] };
            let mean = load.mean[resource];
            if !(has > 0.0 && mean.is_finite()) {
                return f64::from(u8::from(mean > 0.0));
            }
            let (chance, excess) = beyond(mean, load.spread(resource), has);
            let is_hot = if mean > limit { self.hot_weight } else { 0.0 };
            chance + EXCESS_WEIGHT * excess / has + is_hot
        };
        Resource::ALL.into_iter().map(of).sum()
    }

    /// The largest share of what a host has that its load takes in its worse moments.
    pub(super) fn fullness(&self, placement: &Placement<'_>, host: HostIndex) -> f64 {
        let load = self.load(placement, host);
        let capacity = &placement.cluster().host(host).capacity;
        let share = |resource| {
            let at_worst = load.mean[resource] + load.spread(resource);
            if capacity[resource] > 0.0 { at_worst / capacity[resource] } else { 0.0 }
        };
        Resource::ALL.into_iter().map(share).fold(0.0, f64::max)
    }
}

impl Guest {
    fn new(vm: &Vm, unknown: f64) -> Self {
        let vcpus = f64::from(vm.vcpus).max(vm.usage.cpu_cores);
        let ran = 1.0 - vm.steal.clamp(0.0, 1.0);
        // All of the time waited for leaves nothing to divide by: it wants all that it can use.
        let wanted = if ran > 0.0 { (vm.usage.cpu_cores / ran).min(vcpus) } else { vcpus };
        let cpu_cores = wanted - vm.usage.cpu_cores;
        let waits_for = Amounts { cpu_cores, ..Amounts::ZERO };
        let mut deviation = Amounts::ZERO;
        // What it has of memory does not vary by itself.
        for resource in [Resource::Cpu, Resource::Network, Resource::Disk] {
            let usage = vm.usage[resource] + waits_for[resource];
            let seen = (vm.peak[resource] - usage).max(0.0) / PEAK_DEVIATIONS;
            deviation[resource] = seen.hypot(unknown * usage);
        }
        Self { waits_for, deviation }
    }
}

impl Load {
    /// Standard deviation.
    fn spread(&self, resource: Resource) -> f64 {
        let common = self.deviation[resource].max(0.0);
        ((1.0 - COMMON) * self.variance[resource].max(0.0) + COMMON * common * common).sqrt()
    }

    fn add(&mut self, guest: &Guest, sign: f64) {
        self.mean += guest.waits_for.times(sign);
        self.deviation += guest.deviation.times(sign);
        self.variance += squared(guest.deviation).times(sign);
    }
}

fn squared(amounts: Amounts) -> Amounts {
    let mut squares = amounts;
    for resource in Resource::ALL {
        squares[resource] *= amounts[resource];
    }
    squares
}

/// Of a normal distribution: the chance to exceed `limit`, and the expected excess over it.
fn beyond(mean: f64, spread: f64, limit: f64) -> (f64, f64) {
    if spread <= limit * 1e-9 {
        let excess = (mean - limit).max(0.0);
        return (f64::from(u8::from(excess > 0.0)), excess);
    }
    let away = (limit - mean) / spread;
    // Beyond eight deviations there is nothing that an f64 would tell from none, or all.
    if away > 8.0 {
        return (0.0, 0.0);
    }
    let chance = 0.5 * libm::erfc(away / std::f64::consts::SQRT_2);
    let density = (-0.5 * away * away).exp() / (2.0 * std::f64::consts::PI).sqrt();
    (chance, (spread * (density - away * chance)).max(0.0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::synthetic;
    use crate::plan::Limits;

    fn seen(placement: &Placement<'_>) -> Outlook {
        Outlook::new(placement, Limits::default().share_max, (0.1, 0.1))
    }

    #[test]
    fn chances_are_those_of_tables() {
        for (away, chance, excess) in
            [(0.0, 0.5, 0.3989), (1.645, 0.05, 0.0209), (-1.0, 0.8413, 1.0833)]
        {
            let (found, by) = beyond(10.0 - away, 1.0, 10.0);
            assert!((found - chance).abs() < 1e-3, "{away}: {found}");
            assert!((by - excess).abs() < 1e-3, "{away}: {by}");
        }
        assert_eq!(beyond(12.0, 0.0, 10.0), (1.0, 2.0));
        assert_eq!(beyond(9.0, 0.0, 10.0), (0.0, 0.0));
    }

    #[test]
    fn an_idle_host_has_nothing_to_fear_and_a_full_one_has() {
        let mut cluster = synthetic::cluster(2, 14);
        cluster.vms.iter_mut().for_each(|vm| vm.host = HostIndex(0));
        let placement = Placement::new(&cluster);
        let outlook = seen(&placement);
        let of = |host| {
            let load = outlook.load(&placement, HostIndex(host));
            outlook.trouble(&cluster, HostIndex(host), &load)
        };
        assert!(of(0) > 0.1 && of(1) == 0.0, "{} {}", of(0), of(1));
        assert!(outlook.fullness(&placement, HostIndex(0)) > 0.85);
    }

    #[test]
    fn who_waits_wants_more_than_it_takes() {
        let mut cluster = synthetic::cluster(1, 8);
        let calm = Placement::new(&cluster);
        let before = seen(&calm).load(&calm, HostIndex(0)).mean.cpu_cores;
        assert!((before - 4.0).abs() < 1e-9);
        cluster.vms[0].steal = 0.5;
        cluster.vms[1].steal = 1.0;
        let busy = Placement::new(&cluster);
        let after = seen(&busy).load(&busy, HostIndex(0)).mean.cpu_cores;
        assert!((after - 6.0).abs() < 1e-9, "{after}");
    }

    proptest! {
        #[test]
        fn moves_change_what_adding_up_finds(
            moves in prop::collection::vec((0_usize..9, 0_usize..3), 0..30),
        ) {
            let mut cluster = synthetic::cluster(3, 9);
            for (number, vm) in cluster.vms.iter_mut().enumerate() {
                vm.peak.cpu_cores += number as f64 * 0.1;
                vm.steal = number as f64 * 0.05;
            }
            let before = cluster.clone();
            let mut placement = Placement::new(&before);
            let mut outlook = seen(&placement);
            for (vm, host) in moves {
                let (vm, to) = (VmIndex(vm), HostIndex(host));
                let (source, destination) = outlook.loads_after(&placement, vm, to);
                let from = placement.host_of(vm);
                outlook.go(vm, from, to);
                placement.go(vm, to);
                cluster.vms[vm.0].host = to;
                if from != to {
                    for (host, load) in [(from, source), (to, destination)] {
                        let expected = outlook.load(&placement, host);
                        let (is, was) = (expected.mean.cpu_cores, load.mean.cpu_cores);
                        prop_assert!((is - was).abs() < 1e-9);
                    }
                }
            }
            let there = Placement::new(&cluster);
            let fresh = seen(&there);
            for host in cluster.host_indices() {
                let (one, other) = (outlook.load(&placement, host), fresh.load(&there, host));
                let one = outlook.trouble(&cluster, host, &one);
                let other = fresh.trouble(&cluster, host, &other);
                prop_assert!((one - other).abs() < 1e-6, "{one} {other}");
            }
        }
    }
}
