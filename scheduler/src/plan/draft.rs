//! A plan in the making: where guests would be by now, and in which wave each step comes.
//!
//! Invariants: a step's `from` is where the guest is when its wave begins; whatever the order in which the steps of a wave
//! end, no host has more than it has after the wave, and what a step needs is not what another of its wave frees. Guests
//! that talk, or that a rule binds, move in different waves.

use super::room::Groups;
use super::{Action, Hotspot, Plan, Problem, Step};
use crate::cost;
use crate::model::{Amounts, Cluster, HostIndex, HostState, Placement, Resource, VmIndex};

/// Lines that a plan says about what it left.
const NOTES_MAX: usize = 64;

/// Share of the network that a migration gets even where guests fill it, since it competes with them.
const LINK_SHARE_MIN: f64 = 0.1;

/// A plan in the making.
#[derive(Debug)]
pub(crate) struct Draft<'a> {
    problem: Problem<'a>,
    pub(super) placement: Placement<'a>,
    pub(super) groups: Groups,
    /// What guests that come may want at their peak beyond what they take, for each host.
    pub(super) promised: Vec<Amounts>,
    pub(super) moved: Vec<bool>,
    resized: Vec<bool>,
    /// Hosts that gave something up in this plan.
    relieved: Vec<bool>,
    is_hot: Vec<bool>,
    moves: usize,
    wave: Wave,
    plan: Plan,
}

/// The wave to which steps are added.
#[derive(Debug)]
struct Wave {
    number: u32,
    guests: Vec<VmIndex>,
    /// What steps of the wave free on each host: not there until the wave has ended.
    freed: Vec<Amounts>,
}

impl<'a> Draft<'a> {
    /// Begins a plan.
    ///
    /// # Errors
    /// The plan that does nothing and says why, if the cluster's figures cannot be.
    pub(crate) fn new(problem: &Problem<'a>) -> Result<Self, Plan> {
        let cluster = problem.cluster;
        if let Err(why) = cluster.check() {
            return Err(Plan { steps: vec![], notes: vec![format!("Nothing is decided: {why}")] });
        }
        let (hosts, vms) = (cluster.hosts.len(), cluster.vms.len());
        let mut is_hot = vec![false; hosts];
        for spot in problem.hotspots {
            if let Some(is_hot) = is_hot.get_mut(spot.host.0) {
                *is_hot = true;
            }
        }
        Ok(Self {
            problem: *problem,
            placement: Placement::new(cluster),
            groups: Groups::new(cluster),
            promised: vec![Amounts::ZERO; hosts],
            moved: vec![false; vms],
            resized: vec![false; vms],
            relieved: vec![false; hosts],
            is_hot,
            moves: 0,
            wave: Wave { number: 0, guests: vec![], freed: vec![Amounts::ZERO; hosts] },
            plan: Plan::default(),
        })
    }

    pub(crate) const fn cluster(&self) -> &'a Cluster {
        self.problem.cluster
    }

    pub(crate) const fn problem(&self) -> &Problem<'a> {
        &self.problem
    }

    pub(crate) const fn placement(&self) -> &Placement<'a> {
        &self.placement
    }

    pub(crate) fn hotspots(&self) -> &'a [Hotspot] {
        self.problem.hotspots
    }

    /// How a host is called.
    pub(crate) fn host_name(&self, host: HostIndex) -> &'a str {
        &self.problem.cluster.host(host).name
    }

    /// How a guest is called.
    pub(crate) fn name(&self, vm: VmIndex) -> &'a str {
        &self.problem.cluster.vm(vm).name
    }

    /// Up to where a host may be filled.
    pub(crate) fn limit(&self, host: HostIndex) -> Amounts {
        let mut limit = self.cluster().host(host).capacity;
        for resource in Resource::ALL {
            limit[resource] *= self.problem.limits.share_max[resource];
        }
        limit
    }

    /// What is taken of a host, with the peaks of those who come.
    pub(crate) fn load(&self, host: HostIndex) -> Amounts {
        self.placement.usage(host) + self.promised[host.0]
    }

    /// How many more migrations the plan may have.
    pub(crate) const fn moves_left(&self) -> usize {
        self.problem.limits.moves_max.saturating_sub(self.moves)
    }

    /// Whether the plan moves a guest.
    pub(crate) fn has_moved(&self, vm: VmIndex) -> bool {
        self.moved[vm.0]
    }

    /// Whether the plan gives or takes a guest's memory.
    pub(crate) fn has_resized(&self, vm: VmIndex) -> bool {
        self.resized[vm.0]
    }

    /// Whether something has left a host, or shrunk there.
    pub(crate) fn is_relieved(&self, host: HostIndex) -> bool {
        self.relieved[host.0]
    }

    /// Whether a host has too much to do itself.
    pub(crate) fn is_hot(&self, host: HostIndex) -> bool {
        self.is_hot[host.0]
    }

    /// Hosts that hot hosts' guests may go to, rules and room apart.
    pub(crate) fn destinations(&self) -> Vec<HostIndex> {
        let cluster = self.cluster();
        let takes = |host: &HostIndex| {
            let at = cluster.host(*host);
            at.state == HostState::Active && !at.is_migrating && !self.is_hot(*host)
        };
        cluster.host_indices().filter(takes).collect()
    }

    /// Says something about what was left.
    pub(crate) fn note(&mut self, words: String) {
        if self.plan.notes.len() < NOTES_MAX && !self.plan.notes.contains(&words) {
            self.plan.notes.push(words);
        }
    }

    /// Adds the migrations of guests that move together.
    pub(crate) fn migrate(&mut self, unit: &[VmIndex], to: HostIndex, reason: &str) {
        for vm in unit {
            self.migrate_one(*vm, to, reason.to_owned());
        }
    }

    fn migrate_one(&mut self, vm: VmIndex, to: HostIndex, reason: String) {
        let from = self.placement.host_of(vm);
        let change = self.placement.change(vm, to);
        let adds = [(from, change.source_usage), (to, change.destination_usage)];
        if self.depends(vm) || adds.iter().any(|(host, adds)| !self.has_room_now(*host, adds)) {
            self.next_wave();
        }
        for (host, adds) in adds {
            for resource in Resource::ALL {
                self.wave.freed[host.0][resource] += (-adds[resource]).max(0.0);
            }
        }
        self.wave.guests.push(vm);
        let action = Action::Migrate { vm, from, to, cost: self.cost(vm, from, to) };
        let promise = self.promise(vm);
        if self.moved[vm.0] {
            self.promised[from.0] -= promise;
        }
        self.placement.go(vm, to);
        self.promised[to.0] += promise;
        self.moved[vm.0] = true;
        self.relieved[from.0] = true;
        self.moves += 1;
        self.plan.steps.push(Step { action, wave: self.wave.number, reason });
    }

    /// Lets a guest use more memory, or less.
    pub(crate) fn resize(&mut self, vm: VmIndex, to_mib: f64, reason: String) {
        let host = self.placement.host_of(vm);
        let from_mib = self.placement.allocated_mib(vm);
        let adds = Amounts { memory_mib: to_mib - from_mib, ..Amounts::ZERO };
        if self.wave.guests.contains(&vm) || !self.has_room_now(host, &adds) {
            self.next_wave();
        }
        self.wave.freed[host.0].memory_mib += (-adds.memory_mib).max(0.0);
        self.wave.guests.push(vm);
        self.placement.resize(vm, to_mib);
        self.resized[vm.0] = true;
        self.relieved[host.0] |= to_mib < from_mib;
        let action = Action::Resize { vm, from_mib, to_mib };
        self.plan.steps.push(Step { action, wave: self.wave.number, reason });
    }

    /// The plan, when nothing is to be added.
    pub(crate) fn finish(self) -> Plan {
        self.plan
    }

    /// What a guest may want beyond what it takes.
    pub(super) fn promise(&self, vm: VmIndex) -> Amounts {
        let guest = self.cluster().vm(vm);
        (guest.peak - guest.usage).max(&Amounts::ZERO)
    }

    /// What it takes to move a guest.
    pub(crate) fn cost(&self, vm: VmIndex, from: HostIndex, to: HostIndex) -> cost::MigrationCost {
        let link_mbit = self.problem.limits.link_mbit;
        let free_mbit = |host: HostIndex| {
            let (has, taken) = (self.cluster().host(host).capacity, self.placement.usage(host));
            (has.network_mbit - taken.network_mbit).max(LINK_SHARE_MIN * has.network_mbit)
        };
        cost::predict(self.cluster().vm(vm), link_mbit.min(free_mbit(from)).min(free_mbit(to)))
    }

    /// Whether a step with a guest has to wait for those of the wave.
    fn depends(&self, vm: VmIndex) -> bool {
        let traffic = &self.cluster().traffic;
        let binds = |other: &VmIndex| {
            *other == vm || traffic.between(vm, *other) > 0.0 || self.groups.bind(vm, *other)
        };
        self.wave.guests.iter().any(binds)
    }

    /// Whether a host can take this even if nothing that the wave frees is free yet.
    fn has_room_now(&self, host: HostIndex, adds: &Amounts) -> bool {
        let (limit, freed) = (self.limit(host), self.wave.freed[host.0]);
        let taken = self.placement.usage(host);
        Resource::ALL.into_iter().all(|resource| {
            let after = taken[resource] + freed[resource] + adds[resource];
            adds[resource] <= 0.0 || freed[resource] <= 0.0 || after <= limit[resource]
        })
    }

    fn next_wave(&mut self) {
        self.wave.number += 1;
        self.wave.guests.clear();
        self.wave.freed.fill(Amounts::ZERO);
    }
}
