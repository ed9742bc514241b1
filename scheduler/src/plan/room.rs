//! Whether guests may go somewhere, and whether there is room: rules, hysteresis, limits.
//!
//! Room is for what a guest is estimated to want at its peak; those who came in the same plan count with their peaks, those
//! who were there with what they take, since not all have their peaks at once.

use super::draft::Draft;
use super::words::list;
use crate::model::{Amounts, Cluster, HostIndex, HostState, Obstacle, Resource, VmIndex};

/// Guests that rules bind to each other.
#[derive(Debug)]
pub(crate) struct Groups {
    together: Vec<Option<usize>>,
    members: Vec<Vec<VmIndex>>,
    apart: Vec<Vec<usize>>,
}

impl Groups {
    pub(super) fn new(cluster: &Cluster) -> Self {
        let vms = cluster.vms.len();
        let mut groups =
            Self { together: vec![None; vms], members: vec![], apart: vec![vec![]; vms] };
        for group in &cluster.rules.together {
            groups.join(group);
        }
        for (number, group) in cluster.rules.apart.iter().enumerate() {
            for vm in group {
                groups.apart[vm.0].push(number);
            }
        }
        groups
    }

    /// Groups with a guest in common are one.
    fn join(&mut self, group: &[VmIndex]) {
        let mut all = group.to_vec();
        for vm in group {
            if let Some(number) = self.together[vm.0] {
                all.append(&mut self.members[number]);
            }
        }
        all.sort_unstable();
        all.dedup();
        for vm in &all {
            self.together[vm.0] = Some(self.members.len());
        }
        self.members.push(all);
    }

    fn with(&self, vm: VmIndex) -> &[VmIndex] {
        self.together[vm.0].map_or(&[], |number| self.members[number].as_slice())
    }

    /// Whether a rule says something about both.
    pub(super) fn bind(&self, one: VmIndex, other: VmIndex) -> bool {
        let is_together = self.together[one.0].is_some();
        (is_together && self.together[one.0] == self.together[other.0])
            || self.apart[one.0].iter().any(|number| self.apart[other.0].contains(number))
    }
}

/// For what there is to be room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Want {
    /// What the guest is estimated to want at its peak.
    Peak,
    /// What it takes now.
    Present,
}

/// What hosts would take after a move.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outcome {
    /// Usage of the host that guests leave.
    pub(crate) source: Amounts,
    /// Usage of the host that they go to, with the peaks of those who come if there was to be room for them.
    pub(crate) destination: Amounts,
}

/// Whether so little time has passed. A clock that says nothing sensible counts as too early.
pub(super) fn is_within(passed_s: f64, least_s: f64) -> bool {
    passed_s.is_nan() || passed_s < least_s
}

impl Draft<'_> {
    /// The guests that would move with this one: those that a rule keeps with it and that run where it does.
    pub(crate) fn unit(&self, vm: VmIndex) -> Vec<VmIndex> {
        let here = self.placement.host_of(vm);
        let members = self.groups.with(vm).iter().copied();
        let mut unit: Vec<_> =
            members.filter(|other| self.placement.host_of(*other) == here).collect();
        if unit.is_empty() {
            unit.push(vm);
        }
        unit
    }

    /// The units of a host that are not held there, each once.
    pub(crate) fn movable_units(&self, host: HostIndex) -> Vec<Vec<VmIndex>> {
        let mut guests = self.placement.guests(host).to_vec();
        guests.sort_unstable();
        let units = guests.into_iter().map(|vm| (vm, self.unit(vm)));
        let first = units.filter(|(vm, unit)| unit.first() == Some(vm)).map(|(_, unit)| unit);
        first.filter(|unit| unit.iter().all(|vm| self.held(*vm).is_none())).collect()
    }

    /// Notes the guests of a host that stay there whatever there is elsewhere.
    pub(crate) fn note_held(&mut self, host: HostIndex) {
        let mut guests = self.placement.guests(host).to_vec();
        guests.sort_unstable();
        for vm in guests {
            if let Some(why) = self.held(vm) {
                let (name, at) = (self.name(vm), self.host_name(host));
                self.note(format!("{name} stays on {at}: {why}"));
            }
        }
    }

    /// How guests that move together are called.
    pub(crate) fn unit_name(&self, unit: &[VmIndex]) -> String {
        let names: Vec<_> = unit.iter().map(|vm| self.name(*vm)).collect();
        list(&names)
    }

    /// What guests that move together exchange with a host's guests other than themselves, Mbit/s.
    pub(crate) fn talk_mbit(&self, unit: &[VmIndex], host: HostIndex) -> f64 {
        let placement = &self.placement;
        let peers = unit.iter().flat_map(|vm| placement.cluster().traffic.peers(*vm));
        let there =
            |(peer, _): &&(VmIndex, f64)| placement.host_of(*peer) == host && !unit.contains(peer);
        // The sum of nothing is -0.
        peers.filter(there).map(|(_, mbit)| mbit).sum::<f64>() + 0.0
    }

    /// Why a guest stays where it is, whatever the destination.
    pub(crate) fn held(&self, vm: VmIndex) -> Option<Obstacle> {
        let (guest, problem) = (self.cluster().vm(vm), self.problem());
        if guest.is_migrating || self.moved[vm.0] {
            return Some(Obstacle::OnItsWay);
        }
        if self.cluster().rules.pinned.contains(&vm) {
            return Some(Obstacle::Pinned);
        }
        let is_recent = |at_s: f64| is_within(problem.now_s - at_s, problem.limits.stay_s);
        guest.last_move.filter(|last| is_recent(last.at_s)).map(|_| Obstacle::MovedLately)
    }

    /// Whether rules and hysteresis let a guest go to a host.
    fn may_go(&self, vm: VmIndex, to: HostIndex, unit: &[VmIndex]) -> Result<(), Obstacle> {
        self.placement.may_go(vm, to)?;
        if self.cluster().host(to).is_migrating {
            return Err(Obstacle::HostMigrates);
        }
        let problem = self.problem();
        let is_recent = |at_s: f64| is_within(problem.now_s - at_s, problem.limits.back_after_s);
        let last = self.cluster().vm(vm).last_move;
        if last.is_some_and(|last| last.from == to && is_recent(last.at_s)) {
            return Err(Obstacle::CameFromThere);
        }
        let from = self.placement.host_of(vm);
        if self.cluster().host(from).state == HostState::Draining {
            return Ok(());
        }
        let elsewhere =
            |other: &&VmIndex| !unit.contains(other) && self.placement.host_of(**other) != to;
        self.groups
            .with(vm)
            .iter()
            .find(elsewhere)
            .map_or(Ok(()), |other| Err(Obstacle::Together(*other)))
    }

    /// Whether guests that move together may go to a host and have room there, and what that would mean.
    ///
    /// # Errors
    /// The first obstacle.
    pub(crate) fn admits(
        &mut self,
        unit: &[VmIndex],
        to: HostIndex,
        want: Want,
    ) -> Result<Outcome, Obstacle> {
        if let [vm] = unit {
            self.may_go(*vm, to, unit)?;
            return self.room(*vm, to, want, &Amounts::ZERO);
        }
        let Some(from) = unit.first().map(|vm| self.placement.host_of(*vm)) else {
            return Err(Obstacle::SameHost);
        };
        // They go one after the other: the first ones' talk with the last crosses the network meanwhile.
        let mut outcome = Err(Obstacle::SameHost);
        let mut gone = vec![];
        let mut promised = Amounts::ZERO;
        for vm in unit {
            outcome = self.may_go(*vm, to, unit).and_then(|()| self.room(*vm, to, want, &promised));
            if outcome.is_err() {
                break;
            }
            self.placement.go(*vm, to);
            gone.push(*vm);
            if want == Want::Peak {
                promised += self.promise(*vm);
            }
        }
        for vm in gone.into_iter().rev() {
            self.placement.go(vm, from);
        }
        outcome
    }

    /// Whether there is room for a guest, beside what was promised to those who move with it.
    fn room(
        &self,
        vm: VmIndex,
        to: HostIndex,
        want: Want,
        promised: &Amounts,
    ) -> Result<Outcome, Obstacle> {
        let change = self.placement.change(vm, to);
        let adds = match want {
            Want::Peak => change.destination_peak.max(&change.destination_usage),
            Want::Present => change.destination_usage,
        };
        let destination = self.load(to) + *promised + adds;
        let limit = self.limit(to);
        for resource in Resource::ALL {
            let fits = destination[resource] <= limit[resource];
            if adds[resource] > 0.0 && !fits {
                return Err(Obstacle::Room(resource));
            }
        }
        let from = self.placement.host_of(vm);
        let source = self.placement.usage(from) + change.source_usage;
        let fits = source.network_mbit <= self.limit(from).network_mbit;
        if change.source_usage.network_mbit > 0.0 && !fits {
            return Err(Obstacle::TalkLeftBehind);
        }
        Ok(Outcome { source, destination })
    }
}
