//! Moves of one guest to one host, and the order in which hosts are relieved.

use std::collections::BTreeSet;

use super::outlook::Outlook;
use super::{Settings, chain, memory, words};
use crate::cost::{self, MigrationCost};
use crate::model::{HostIndex, HostState, Obstacle, Placement, Resource, VmIndex};
use crate::plan::{Action, Plan, Problem, Step};

/// What it is worth to have a guest leave a host that is to be emptied, in horizons of overload.
const DRAIN_WORTH: f64 = 100.0;

/// Expected overload below which a host needs no relief, hotspot or not.
const QUIET: f64 = 0.02;

/// A move, and what it is good for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Move {
    pub(super) vm: VmIndex,
    pub(super) from: HostIndex,
    pub(super) to: HostIndex,
    /// Seconds of overload that it saves, its cost taken off.
    pub(super) worth_s: f64,
    pub(super) cost: MigrationCost,
}

/// A plan in the making.
#[derive(Debug)]
pub(super) struct Search<'a> {
    pub(super) problem: &'a Problem<'a>,
    pub(super) settings: &'a Settings,
    pub(super) outlook: Outlook<'a>,
    /// Guests that the plan moves already.
    moved: BTreeSet<VmIndex>,
    /// Hosts that the plan uses already.
    pub(super) busy: BTreeSet<HostIndex>,
    plan: Plan,
}

impl<'a> Search<'a> {
    pub(super) fn new(problem: &'a Problem<'a>, settings: &'a Settings) -> Self {
        let cluster = problem.cluster;
        let migrating = cluster.host_indices().filter(|host| cluster.host(*host).is_migrating);
        Self {
            problem,
            settings,
            outlook: Outlook::new(cluster, problem.limits.share_max),
            moved: BTreeSet::new(),
            busy: migrating.collect(),
            plan: Plan::default(),
        }
    }

    pub(super) fn run(mut self) -> Plan {
        self.grow();
        let mut hosts = self.hosts();
        while !hosts.is_empty() && self.plan.moves().count() < self.problem.limits.moves_max {
            let worst = hosts.iter().copied().enumerate().max_by(|(_, one), (_, other)| {
                self.trouble(*one).total_cmp(&self.trouble(*other)).then(other.cmp(one))
            });
            let Some((place, host)) = worst else { break };
            let is_draining = self.problem.cluster.host(host).state == HostState::Draining;
            hosts.swap_remove(place);
            if self.busy.contains(&host) || (!is_draining && self.trouble(host) < QUIET) {
                continue;
            }
            let best = self.best(host);
            let enough_s = self.enough_s(host);
            let single = best.filter(|best| best.worth_s > enough_s);
            match chain::better(&self, host, single) {
                Some(chain) => self.take_all(&chain),
                None => match single {
                    Some(best) => self.take_all(&[best]),
                    None => self.plan.notes.push(words::stays(&self, host, best)),
                },
            }
        }
        self.plan
    }

    /// Gives memory to those who swap; of one host, to one at a time.
    fn grow(&mut self) {
        let mut given = BTreeSet::new();
        for hotspot in self.problem.hotspots {
            let step = memory::grown(self, hotspot).filter(|_| given.insert(hotspot.host));
            self.plan.steps.extend(step);
        }
    }

    /// Those to relieve: hotspots, and hosts that are to be emptied.
    fn hosts(&self) -> Vec<HostIndex> {
        let cluster = self.problem.cluster;
        let hot = self.problem.hotspots.iter().map(|hotspot| hotspot.host);
        let draining = cluster.host_indices();
        let draining = draining.filter(|host| cluster.host(*host).state == HostState::Draining);
        let found: BTreeSet<HostIndex> = hot.chain(draining).collect();
        found.into_iter().filter(|host| cluster.host(*host).state != HostState::Silent).collect()
    }

    /// Expected overload of a host; more than any for one that is to be emptied.
    pub(super) fn trouble(&self, host: HostIndex) -> f64 {
        let overload = self.outlook.overload(host, &self.outlook.load(host));
        match self.problem.cluster.host(host).state {
            HostState::Draining => DRAIN_WORTH + overload,
            _ => overload,
        }
    }

    /// What a move away from a host must be worth.
    fn enough_s(&self, host: HostIndex) -> f64 {
        let overload = self.outlook.overload(host, &self.outlook.load(host));
        self.settings.margin * overload * self.settings.horizon_s
    }

    /// The best move away from a host.
    fn best(&self, host: HostIndex) -> Option<Move> {
        let guests = self.outlook.placement().guests(host).iter();
        let to = |vm: VmIndex| self.problem.cluster.host_indices().map(move |to| (vm, to));
        let moves = guests.flat_map(|vm| to(*vm));
        let moves = moves.filter_map(|(vm, to)| self.judged(vm, to).ok());
        moves.reduce(|best, next| if is_better(&next, &best) { next } else { best })
    }

    /// What a move is worth, if it may be made.
    pub(super) fn judged(&self, vm: VmIndex, to: HostIndex) -> Result<Move, Obstacle> {
        let outlook = &self.outlook;
        self.may_go(outlook, vm, to)?;
        let (source, destination) = outlook.loads_after(vm, to);
        outlook.carries(to, &destination).map_err(Obstacle::Room)?;
        let from = outlook.placement().host_of(vm);
        // Who leaves those it talks with makes traffic of that.
        outlook.carries_on(from, &source).map_err(Obstacle::Room)?;
        let before = [from, to].map(|host| outlook.overload(host, &outlook.load(host)));
        let after = [(from, &source), (to, &destination)];
        let after = after.map(|(host, load)| outlook.overload(host, load));
        let saved = before.iter().sum::<f64>() - after.iter().sum::<f64>();
        let saved = saved + self.beside(outlook, vm, to);
        let cost = self.cost(vm);
        let worth_s = saved * self.settings.horizon_s - self.price_s(&cost);
        Ok(Move { vm, from, to, worth_s, cost })
    }

    /// What a move saves beside overload, in horizons of it.
    pub(super) fn beside(&self, outlook: &Outlook<'_>, vm: VmIndex, to: HostIndex) -> f64 {
        let from = outlook.placement().host_of(vm);
        let is_draining = self.problem.cluster.host(from).state == HostState::Draining;
        let drained = if is_draining { DRAIN_WORTH } else { 0.0 };
        drained + self.settings.talk_weight * self.quieter(outlook, vm, to)
    }

    pub(super) fn cost(&self, vm: VmIndex) -> MigrationCost {
        cost::predict(self.problem.cluster.vm(vm), self.problem.limits.link_mbit)
    }

    /// Whether rules and the recent past let a guest go there, and both hosts have no other migration.
    pub(super) fn may_go(
        &self,
        outlook: &Outlook<'_>,
        vm: VmIndex,
        to: HostIndex,
    ) -> Result<(), Obstacle> {
        let placement = outlook.placement();
        let from = placement.host_of(vm);
        placement.may_go(vm, to)?;
        if self.moved.contains(&vm) {
            return Err(Obstacle::OnItsWay);
        }
        if self.busy.contains(&to) || self.busy.contains(&from) {
            return Err(Obstacle::HostMigrates);
        }
        let (cluster, limits) = (self.problem.cluster, self.problem.limits);
        if let Some(last) = cluster.vm(vm).last_move {
            let ago_s = self.problem.now_s - last.at_s;
            if ago_s < limits.stay_s || (last.from == to && ago_s < limits.back_after_s) {
                return Err(Obstacle::CameFromThere);
            }
        }
        // A group is not torn for a hotspot; off a host that is to be emptied, all follow the first.
        let is_draining = cluster.host(from).state == HostState::Draining;
        let is_left = |host| host == to || (is_draining && host == from);
        let groups = cluster.rules.together.iter().filter(|group| group.contains(&vm));
        let mut others = groups.flatten().filter(|other| **other != vm);
        let stays = others.find(|other| !is_left(placement.host_of(**other)));
        stays.map_or(Ok(()), |other| Err(Obstacle::Together(*other)))
    }

    /// By how much less of the two hosts' interfaces is used for talk between guests, in shares.
    fn quieter(&self, outlook: &Outlook<'_>, vm: VmIndex, to: HostIndex) -> f64 {
        let placement = outlook.placement();
        let from = placement.host_of(vm);
        let less_mbit = placement.talk_mbit(vm, to) - placement.talk_mbit(vm, from);
        let of = |host| {
            let capacity_mbit = self.problem.cluster.host(host).capacity[Resource::Network];
            if capacity_mbit > 0.0 { less_mbit / capacity_mbit } else { 0.0 }
        };
        of(from) + of(to)
    }

    pub(super) fn price_s(&self, cost: &MigrationCost) -> f64 {
        let settings = self.settings;
        settings.mib_weight_s * cost.wire_mib
            + settings.pause_weight_s * cost.downtime_ms / 1000.0
            + settings.moving_weight_s * cost.total_s
    }

    /// Makes moves part of the plan, one after the other.
    fn take_all(&mut self, moves: &[Move]) {
        for (wave, step) in (0..).zip(moves) {
            let reason = words::leaves(self, step);
            self.outlook.go(step.vm, step.to);
            self.moved.insert(step.vm);
            let Move { vm, from, to, cost, .. } = *step;
            self.plan.steps.push(Step {
                action: Action::Migrate { vm, from, to, cost },
                wave,
                reason,
            });
        }
        // Of hosts and interfaces, a migration at a time.
        self.busy.extend(moves.iter().flat_map(|step| [step.from, step.to]));
    }

    pub(super) const fn placement(&self) -> &Placement<'a> {
        self.outlook.placement()
    }
}

/// Whether a move is better than another; of equals the one to the earlier host, of the earlier guest.
pub(super) fn is_better(one: &Move, other: &Move) -> bool {
    let order = one.worth_s.total_cmp(&other.worth_s);
    order.then((other.vm, other.to).cmp(&(one.vm, one.to))).is_gt()
}
