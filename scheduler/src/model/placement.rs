//! Where guests run, or would after some moves, and what that means for each host.
//!
//! Invariant: the loads are those that adding everything up anew gives (up to rounding), however many moves were made.

use super::{Amounts, Cluster, HostIndex, Resource, VmIndex};

/// Guests on their hosts, and the hosts' loads.
#[derive(Debug, Clone)]
pub struct Placement<'a> {
    cluster: &'a Cluster,
    at: Vec<HostIndex>,
    guests: Vec<Vec<VmIndex>>,
    /// Memory that guests were given beside what they have, MiB; negative if it was taken.
    given_mib: Vec<f64>,
    usage: Vec<Amounts>,
    peak: Vec<Amounts>,
}

impl<'a> Placement<'a> {
    /// As the guests run now.
    #[must_use]
    pub fn new(cluster: &'a Cluster) -> Self {
        let own: Vec<Amounts> = cluster.hosts.iter().map(|host| host.own).collect();
        let mut placement = Self {
            cluster,
            at: cluster.vms.iter().map(|vm| vm.host).collect(),
            guests: vec![vec![]; cluster.hosts.len()],
            given_mib: vec![0.0; cluster.vms.len()],
            usage: own.clone(),
            peak: own,
        };
        for vm in cluster.vm_indices() {
            let host = placement.host_of(vm);
            placement.guests[host.0].push(vm);
            let traffic_mbit = placement.crossing_mbit(vm, host);
            let usage = placement.usage_of(vm, traffic_mbit);
            let peak = placement.peak_of(vm, traffic_mbit);
            placement.usage[host.0] += usage;
            placement.peak[host.0] += peak;
        }
        placement
    }

    /// What it is about.
    #[must_use]
    pub const fn cluster(&self) -> &'a Cluster {
        self.cluster
    }

    /// Where a guest runs.
    #[must_use]
    pub fn host_of(&self, vm: VmIndex) -> HostIndex {
        self.at[vm.0]
    }

    /// The guests of a host, in no order.
    #[must_use]
    pub fn guests(&self, host: HostIndex) -> &[VmIndex] {
        &self.guests[host.0]
    }

    /// What is taken of a host, its own programs included.
    #[must_use]
    pub fn usage(&self, host: HostIndex) -> Amounts {
        self.usage[host.0]
    }

    /// What would be wanted of a host if all of its guests had their peak at once.
    #[must_use]
    pub fn peak(&self, host: HostIndex) -> Amounts {
        self.peak[host.0]
    }

    /// [`Placement::usage`] as shares of what the host has.
    #[must_use]
    pub fn share(&self, host: HostIndex) -> Amounts {
        self.usage(host).share_of(&self.cluster.host(host).capacity)
    }

    /// [`Placement::peak`] as shares of what the host has.
    #[must_use]
    pub fn peak_share(&self, host: HostIndex) -> Amounts {
        self.peak(host).share_of(&self.cluster.host(host).capacity)
    }

    /// What a guest exchanges with guests on a host, Mbit/s.
    #[must_use]
    pub fn talk_mbit(&self, vm: VmIndex, host: HostIndex) -> f64 {
        let peers = self.cluster.traffic.peers(vm).iter();
        peers.filter(|(peer, _)| self.host_of(*peer) == host).map(|(_, mbit)| mbit).sum()
    }

    /// What a guest would exchange with other hosts' guests if it ran on this one, Mbit/s.
    #[must_use]
    pub fn crossing_mbit(&self, vm: VmIndex, host: HostIndex) -> f64 {
        let peers = self.cluster.traffic.peers(vm).iter();
        peers.filter(|(peer, _)| self.host_of(*peer) != host).map(|(_, mbit)| mbit).sum()
    }

    /// What the source's and the destination's usage and peak would change by if a guest went there.
    ///
    /// Traffic inside the source that would cross both interfaces then, and traffic between the two hosts that no longer
    /// would, are counted.
    #[must_use]
    pub fn change(&self, vm: VmIndex, to: HostIndex) -> Change {
        let from = self.host_of(vm);
        let (left_mbit, met_mbit) = (self.talk_mbit(vm, from), self.talk_mbit(vm, to));
        let all_mbit: f64 = self.cluster.traffic.peers(vm).iter().map(|(_, mbit)| mbit).sum();
        // Those who stay behind now talk through the source's interface, those who are met no longer through theirs.
        let stay = Amounts { network_mbit: left_mbit, ..Amounts::ZERO };
        let meet = Amounts { network_mbit: met_mbit, ..Amounts::ZERO };
        let (before_mbit, after_mbit) = (all_mbit - left_mbit, all_mbit - met_mbit);
        Change {
            source_usage: stay - self.usage_of(vm, before_mbit),
            source_peak: stay - self.peak_of(vm, before_mbit),
            destination_usage: self.usage_of(vm, after_mbit) - meet,
            destination_peak: self.peak_of(vm, after_mbit) - meet,
        }
    }

    /// Moves a guest.
    pub fn go(&mut self, vm: VmIndex, to: HostIndex) {
        let from = self.host_of(vm);
        if from == to {
            return;
        }
        let change = self.change(vm, to);
        self.usage[from.0] += change.source_usage;
        self.peak[from.0] += change.source_peak;
        self.usage[to.0] += change.destination_usage;
        self.peak[to.0] += change.destination_peak;
        self.guests[from.0].retain(|guest| *guest != vm);
        self.guests[to.0].push(vm);
        self.at[vm.0] = to;
    }

    /// Memory that a guest may use, MiB.
    #[must_use]
    pub fn allocated_mib(&self, vm: VmIndex) -> f64 {
        self.cluster.vm(vm).memory.allocated_mib + self.given_mib[vm.0]
    }

    /// Lets a guest use so much memory, in MiB.
    pub fn resize(&mut self, vm: VmIndex, to_mib: f64) {
        let host = self.host_of(vm);
        let before = (self.usage_of(vm, 0.0), self.peak_of(vm, 0.0));
        self.given_mib[vm.0] = to_mib - self.cluster.vm(vm).memory.allocated_mib;
        let after = (self.usage_of(vm, 0.0), self.peak_of(vm, 0.0));
        self.usage[host.0] += after.0 - before.0;
        self.peak[host.0] += after.1 - before.1;
    }

    /// What a guest takes with so much traffic to other hosts' guests.
    fn usage_of(&self, vm: VmIndex, crossing_mbit: f64) -> Amounts {
        let mut amounts = with_traffic(self.cluster.vm(vm).usage, crossing_mbit);
        amounts.memory_mib = (amounts.memory_mib + self.given_mib[vm.0]).max(0.0);
        amounts
    }

    /// Memory that was given meets the peak; memory that was taken is no longer wanted.
    fn peak_of(&self, vm: VmIndex, crossing_mbit: f64) -> Amounts {
        let mut amounts = with_traffic(self.cluster.vm(vm).peak, crossing_mbit);
        let taken_mib = self.given_mib[vm.0].min(0.0);
        let usage_mib = self.usage_of(vm, crossing_mbit).memory_mib;
        amounts.memory_mib = (amounts.memory_mib + taken_mib).max(usage_mib);
        amounts
    }

    /// What a guest takes where it runs, its traffic with guests of other hosts included.
    #[must_use]
    pub fn taken_by(&self, vm: VmIndex) -> Amounts {
        self.usage_of(vm, self.crossing_mbit(vm, self.host_of(vm)))
    }

    /// The resource of which `shares` has the most, relative to `limits`.
    #[must_use]
    pub fn tightest(shares: &Amounts, limits: &Amounts) -> Resource {
        let mut tightest = Resource::Cpu;
        for resource in Resource::ALL {
            if shares[resource] * limits[tightest] > shares[tightest] * limits[resource] {
                tightest = resource;
            }
        }
        tightest
    }
}

fn with_traffic(mut amounts: Amounts, crossing_mbit: f64) -> Amounts {
    amounts.network_mbit += crossing_mbit;
    amounts
}

/// What a move would change.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Change {
    /// Usage of the host that it leaves.
    pub source_usage: Amounts,
    /// Peak of the host that it leaves.
    pub source_peak: Amounts,
    /// Usage of the host that it goes to.
    pub destination_usage: Amounts,
    /// Peak of the host that it goes to.
    pub destination_peak: Amounts,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::synthetic;

    fn near(one: Amounts, other: Amounts) -> bool {
        Resource::ALL.into_iter().all(|resource| (one[resource] - other[resource]).abs() < 1e-6)
    }

    proptest! {
        /// Loads after any moves are those of a cluster in which the guests run there.
        #[test]
        fn moves_change_what_adding_up_finds(
            traffic in prop::collection::vec((0_usize..12, 0_usize..12, 0.0..500.0), 0..30),
            moves in prop::collection::vec((0_usize..12, 0_usize..4), 0..40),
        ) {
            let mut cluster = synthetic::cluster(4, 12);
            for (one, other, mbit) in traffic {
                cluster.traffic.set(VmIndex(one), VmIndex(other), mbit);
            }
            let before = cluster.clone();
            let mut placement = Placement::new(&before);
            for (vm, host) in moves {
                let (vm, to) = (VmIndex(vm), HostIndex(host));
                let from = placement.host_of(vm);
                if from != to {
                    let change = placement.change(vm, to);
                    let expected = placement.usage(to) + change.destination_usage;
                    placement.go(vm, to);
                    prop_assert!(near(placement.usage(to), expected));
                }
                cluster.vms[vm.0].host = to;
                let fresh = Placement::new(&cluster);
                for host in cluster.host_indices() {
                    prop_assert!(near(placement.usage(host), fresh.usage(host)), "{host:?}");
                    prop_assert!(near(placement.peak(host), fresh.peak(host)), "{host:?}");
                    prop_assert_eq!(placement.guests(host).len(), fresh.guests(host).len());
                }
            }
        }
    }

    #[test]
    fn memory_that_is_given_counts_wherever_the_guest_goes() {
        let mut cluster = synthetic::cluster(2, 2);
        cluster.vms[0].peak.memory_mib = 1100.0;
        let mut placement = Placement::new(&cluster);
        let vm = VmIndex(0);
        placement.resize(vm, 1224.0);
        placement.go(vm, HostIndex(1));
        assert_eq!(placement.usage(HostIndex(0)).memory_mib, 0.0);
        assert_eq!(placement.usage(HostIndex(1)).memory_mib, 1224.0 + 1024.0);
        assert_eq!(placement.peak(HostIndex(1)).memory_mib, 1224.0 + 1024.0, "no more is wanted");
        placement.resize(vm, 924.0);
        assert_eq!(placement.allocated_mib(vm), 924.0);
        assert_eq!(placement.usage(HostIndex(1)).memory_mib, 924.0 + 1024.0);
        assert_eq!(placement.peak(HostIndex(1)).memory_mib, 1000.0 + 1024.0);
    }
}
