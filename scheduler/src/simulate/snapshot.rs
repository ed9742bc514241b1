//! What agents would report: averages of the interval, as a [`Cluster`].

use super::moment::{Moment, Settings};
use super::world::World;
use crate::model::{Amounts, Cluster, Host, HostIndex, Memory, Rules, Traffic, Vm, VmIndex};

/// A cluster as it is known, and sums of the interval in progress.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) cluster: Cluster,
    guests: Vec<Sums>,
    flows_mbit_s: Vec<f64>,
    own: Vec<Amounts>,
}

/// What a guest did, times seconds.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    wanted_cores: f64,
    cores: f64,
    outside_mbit: f64,
    disk_mib: f64,
    swap_writes: f64,
    dirty_mib: f64,
}

impl Snapshot {
    pub(super) fn new(world: &World, rules: &Rules) -> Self {
        let host = |machine: &super::world::Machine| Host {
            name: machine.name.clone(),
            capacity: machine.capacity,
            own: machine.own,
            state: machine.state,
            is_migrating: false,
        };
        let vm = |guest: &super::world::Guest| Vm {
            name: guest.name.clone(),
            host: HostIndex(guest.host),
            vcpus: guest.vcpus,
            usage: Amounts::ZERO,
            peak: Amounts::ZERO,
            steal: 0.0,
            memory: Memory {
                reserve_mib: guest.reserve_mib,
                max_mib: guest.max_mib,
                ..Memory::default()
            },
            gray_box: None,
            dirty_mib_per_s: 0.0,
            sampled: None,
            priority: guest.priority,
            is_migrating: false,
            last_move: None,
        };
        Self {
            cluster: Cluster {
                hosts: world.machines.iter().map(host).collect(),
                vms: world.guests.iter().map(vm).collect(),
                traffic: Traffic::silent(world.guests.len()),
                rules: rules.clone(),
            },
            guests: vec![Sums::default(); world.guests.len()],
            flows_mbit_s: vec![0.0; world.flows.len()],
            own: vec![Amounts::ZERO; world.machines.len()],
        }
    }

    /// Counts a moment that lasts so long.
    pub(super) fn count(&mut self, world: &World, moment: &Moment, now: &Settings, lasts_s: f64) {
        for (at, (sums, guest)) in self.guests.iter_mut().zip(&moment.guests).enumerate() {
            sums.wanted_cores += guest.wanted_cores * lasts_s;
            sums.cores += guest.cores * lasts_s;
            sums.outside_mbit += guest.outside_mbit * lasts_s;
            sums.disk_mib += guest.disk_mib * lasts_s;
            sums.swap_writes += guest.swap_writes_per_s * lasts_s;
            let written = world.guests[at].dirty_mib_per_s * guest.level * guest.done;
            sums.dirty_mib += written * lasts_s;
        }
        for (sum, mbit) in self.flows_mbit_s.iter_mut().zip(&moment.flow_mbit) {
            *sum += mbit * lasts_s;
        }
        for (host, sum) in self.own.iter_mut().enumerate() {
            *sum += (world.machines[host].own + now.engine[host]).times(lasts_s);
        }
    }

    /// Writes the averages of the interval, which begins anew.
    pub(super) fn report(&mut self, world: &World, now: &Settings, lasted_s: f64) {
        for (host, own) in self.cluster.hosts.iter_mut().zip(&mut self.own) {
            host.own = own.times(1.0 / lasted_s);
            *own = Amounts::ZERO;
        }
        for (at, host) in self.cluster.hosts.iter_mut().enumerate() {
            // What is set aside is set aside from now on, not on average.
            host.own.memory_mib = world.machines[at].own.memory_mib + now.engine[at].memory_mib;
        }
        for (at, guest) in world.guests.iter().enumerate() {
            let sums = std::mem::take(&mut self.guests[at]);
            let vm = &mut self.cluster.vms[at];
            let (allocated_mib, needed_mib) = (now.allocated_mib[at], now.needed_mib[at]);
            vm.usage = Amounts {
                cpu_cores: sums.cores / lasted_s,
                memory_mib: allocated_mib,
                network_mbit: sums.outside_mbit / lasted_s,
                disk_mib: sums.disk_mib / lasted_s,
            };
            vm.peak = vm.usage;
            let done = if sums.wanted_cores > 0.0 { sums.cores / sums.wanted_cores } else { 1.0 };
            vm.steal = (1.0 - done).clamp(0.0, 1.0);
            vm.dirty_mib_per_s = sums.dirty_mib / lasted_s;
            vm.memory.allocated_mib = allocated_mib;
            vm.memory.used_mib = (needed_mib + guest.cache_mib).min(allocated_mib);
            vm.memory.needed_mib = needed_mib.min(allocated_mib);
            vm.memory.swap_writes_per_s = sums.swap_writes / lasted_s;
        }
        for (flow, sum) in world.flows.iter().zip(&mut self.flows_mbit_s) {
            self.cluster.traffic.set(VmIndex(flow.one), VmIndex(flow.other), *sum / lasted_s);
            *sum = 0.0;
        }
    }
}
