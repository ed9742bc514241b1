//! How much overload is to be expected of a placement.
//!
//! A guest's need varies: at present it takes its usage, and in one of twenty moments it wants its peak or more. A host's
//! load is then about normal, around the sum of the usages, with the spread that the guests' spreads make together: part
//! of it independent, part of it common to all, as people's days are. From that follow the chance that the load exceeds
//! what the host should carry, and by how much. Of memory what is wanted counts, not what a guest makes do with.
//!
//! Invariant: the sums are those of adding everything up anew (up to rounding), however many moves were made.

use crate::model::{Amounts, Cluster, HostIndex, Placement, Resource, VmIndex};

/// Standard deviations from the mean to the 95th percentile.
const PEAK_DEVIATIONS: f64 = 1.645;

/// Least deviation of a guest, as a share of its usage: nothing is quite steady.
const DEVIATION_MIN: f64 = 0.03;

/// Share of the guests' deviations that is common to all.
const COMMON: f64 = 0.2;

/// How heavily a load beyond the limit weighs, beside that it is beyond.
const EXCESS_WEIGHT: f64 = 4.0;

/// What is expected of hosts.
#[derive(Debug, Clone)]
pub(super) struct Outlook<'a> {
    placement: Placement<'a>,
    /// Sums of the guests' deviations.
    deviation: Vec<Amounts>,
    /// Sums of their squares.
    variance: Vec<Amounts>,
    /// Shares of its capacity that a host should carry.
    share_max: Amounts,
}

/// A host's load as a distribution.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    pub(super) mean: Amounts,
    deviation: Amounts,
    variance: Amounts,
}

impl<'a> Outlook<'a> {
    /// As the guests run now.
    pub(super) fn new(cluster: &'a Cluster, share_max: Amounts) -> Self {
        let none = vec![Amounts::ZERO; cluster.hosts.len()];
        let placement = Placement::new(cluster);
        let mut outlook = Self { placement, deviation: none.clone(), variance: none, share_max };
        for vm in cluster.vm_indices() {
            let host = outlook.placement.host_of(vm);
            let deviation = deviation(cluster, vm);
            outlook.deviation[host.0] += deviation;
            outlook.variance[host.0] += squared(deviation);
        }
        outlook
    }

    pub(super) const fn placement(&self) -> &Placement<'a> {
        &self.placement
    }

    /// A host's load.
    pub(super) fn load(&self, host: HostIndex) -> Load {
        let memory_mib = self.placement.peak(host).memory_mib;
        Load {
            mean: Amounts { memory_mib, ..self.placement.usage(host) },
            deviation: self.deviation[host.0],
            variance: self.variance[host.0],
        }
    }

    /// The loads of source and destination if a guest went there.
    pub(super) fn loads_after(&self, vm: VmIndex, to: HostIndex) -> (Load, Load) {
        let from = self.placement.host_of(vm);
        let change = self.placement.change(vm, to);
        let deviation = deviation(self.placement.cluster(), vm);
        let (mut source, mut destination) = (self.load(from), self.load(to));
        let wanted = |mut usage: Amounts, peak: Amounts| {
            usage.memory_mib = peak.memory_mib;
            usage
        };
        source.mean += wanted(change.source_usage, change.source_peak);
        source.deviation -= deviation;
        source.variance -= squared(deviation);
        destination.mean += wanted(change.destination_usage, change.destination_peak);
        destination.deviation += deviation;
        destination.variance += squared(deviation);
        (source, destination)
    }

    /// Moves a guest.
    pub(super) fn go(&mut self, vm: VmIndex, to: HostIndex) {
        let from = self.placement.host_of(vm);
        if from == to {
            return;
        }
        let (source, destination) = self.loads_after(vm, to);
        for (host, load) in [(from, source), (to, destination)] {
            self.deviation[host.0] = load.deviation;
            self.variance[host.0] = load.variance;
        }
        self.placement.go(vm, to);
    }

    /// The overload to be expected of a host with this load: 0 for none, about 1 for load that is beyond the limit all the
    /// time, more for load that is far beyond it.
    pub(super) fn overload(&self, host: HostIndex, load: &Load) -> f64 {
        let capacity = &self.placement.cluster().host(host).capacity;
        let of = |resource| {
            let limit = capacity[resource] * self.share_max[resource];
            if limit <= 0.0 {
                return f64::from(u8::from(load.mean[resource] > 0.0));
            }
            let (chance, excess) = beyond(load.mean[resource], load.spread(resource), limit);
            chance + EXCESS_WEIGHT * excess / limit
        };
        Resource::ALL.into_iter().map(of).sum()
    }

    /// Whether a host carries a load's mean, in everything.
    pub(super) fn carries(&self, host: HostIndex, load: &Load) -> Result<(), Resource> {
        self.carries_above(host, load, &self.share_max)
    }

    /// Whether a host carries a load's mean, or at least no more than it has now.
    pub(super) fn carries_on(&self, host: HostIndex, load: &Load) -> Result<(), Resource> {
        let now = self.load(host).mean.share_of(&self.placement.cluster().host(host).capacity);
        self.carries_above(host, load, &self.share_max.max(&now))
    }

    /// Whether a host has the memory of a load.
    pub(super) fn holds(&self, host: HostIndex, load: &Load) -> bool {
        let capacity_mib = self.placement.cluster().host(host).capacity.memory_mib;
        load.mean.memory_mib <= capacity_mib * self.share_max.memory_mib
    }

    fn carries_above(&self, host: HostIndex, load: &Load, max: &Amounts) -> Result<(), Resource> {
        let shares = load.mean.share_of(&self.placement.cluster().host(host).capacity);
        let is_lacking = |resource: &Resource| shares[*resource] > max[*resource];
        Resource::ALL.into_iter().find(is_lacking).map_or(Ok(()), Err)
    }
}

impl Load {
    /// Standard deviation.
    fn spread(&self, resource: Resource) -> f64 {
        let common = self.deviation[resource].max(0.0);
        ((1.0 - COMMON) * self.variance[resource].max(0.0) + COMMON * common * common).sqrt()
    }
}

/// By how much a guest's need varies. What it has of memory does not vary by itself.
fn deviation(cluster: &Cluster, vm: VmIndex) -> Amounts {
    let guest = cluster.vm(vm);
    let mut deviation = Amounts::ZERO;
    for resource in [Resource::Cpu, Resource::Network, Resource::Disk] {
        let above = (guest.peak[resource] - guest.usage[resource]) / PEAK_DEVIATIONS;
        deviation[resource] = above.max(guest.usage[resource] * DEVIATION_MIN);
    }
    deviation
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
        let outlook = Outlook::new(&cluster, Limits::default().share_max);
        let of = |host| outlook.overload(HostIndex(host), &outlook.load(HostIndex(host)));
        assert!(of(0) > 1.0 && of(1) == 0.0, "{} {}", of(0), of(1));
        assert_eq!(outlook.carries(HostIndex(0), &outlook.load(HostIndex(0))), Err(Resource::Cpu));
    }

    proptest! {
        #[test]
        fn moves_change_what_adding_up_finds(
            moves in prop::collection::vec((0_usize..9, 0_usize..3), 0..30),
        ) {
            let mut cluster = synthetic::cluster(3, 9);
            for (number, vm) in cluster.vms.iter_mut().enumerate() {
                vm.peak.cpu_cores += number as f64 * 0.1;
            }
            let before = cluster.clone();
            let share_max = Limits::default().share_max;
            let mut outlook = Outlook::new(&before, share_max);
            for (vm, host) in moves {
                outlook.go(VmIndex(vm), HostIndex(host));
                cluster.vms[vm].host = HostIndex(host);
            }
            let fresh = Outlook::new(&cluster, share_max);
            for host in cluster.host_indices() {
                let (one, other) = (outlook.load(host), fresh.load(host));
                let (one, other) = (outlook.overload(host, &one), fresh.overload(host, &other));
                prop_assert!((one - other).abs() < 1e-6, "{one} {other}");
            }
        }
    }
}
