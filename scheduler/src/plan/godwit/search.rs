//! Which guest goes where, and the order in which hosts are relieved.

use super::outlook::{Load, Outlook};
use super::{Settings, chain, memory, words};
use crate::cost::MigrationCost;
use crate::model::{HostIndex, HostState, Resource, Vm, VmIndex};
use crate::plan::Plan;
use crate::plan::draft::Draft;
use crate::plan::drain;
use crate::plan::hot::Hot;
use crate::plan::room::{Outcome, Want, is_within};
use crate::plan::words::Refusals;

/// Destinations that are looked at, beside those where a guest's peers are; more only while there is none with room.
const LOOKED_AT: usize = 24;

/// Guests on destinations that are judged in one plan: it has to end.
const JUDGED_MAX: usize = 60_000;

/// Hosts without a hotspot that are relieved in one plan: the rest can wait for the next.
const ANTICIPATED_MAX: usize = 4;

/// Share of a host that guests beyond their peaks may take where it is to be relieved before it is a hotspot.
const UNSTEADY_MAX: f64 = 0.05;

/// Guests that move together to one host, and what that is good for.
#[derive(Debug, Clone)]
pub(super) struct Move {
    pub(super) unit: Vec<VmIndex>,
    pub(super) from: HostIndex,
    pub(super) to: HostIndex,
    /// Whether one of them has moved not long ago.
    is_recent: bool,
    priority: u8,
    /// Seconds of overload that it saves, its price taken off.
    pub(super) worth_s: f64,
    pub(super) cost: MigrationCost,
}

/// A plan in the making.
#[derive(Debug)]
pub(super) struct Search<'a, 'p> {
    pub(super) draft: Draft<'p>,
    pub(super) settings: &'a Settings,
    pub(super) outlook: Outlook,
    /// Hosts that take guests and how full they are, those with most left first.
    roomiest: Vec<(f64, HostIndex)>,
    judged_left: usize,
    /// Hosts for which chains may still be looked for.
    pub(super) chains_left: usize,
}

impl<'a, 'p> Search<'a, 'p> {
    pub(super) fn new(draft: Draft<'p>, settings: &'a Settings) -> Self {
        let outlook = expected(&draft, settings);
        let full = |host| (outlook.fullness(draft.placement(), host), host);
        let roomiest = draft.destinations().into_iter().map(full).collect();
        let (judged_left, chains_left) = (JUDGED_MAX, chain::CHAINS_MAX);
        let mut search = Self { draft, settings, outlook, roomiest, judged_left, chains_left };
        search.sort();
        search
    }

    pub(super) fn run(mut self) -> Plan {
        let mut hot = self.draft.hot_hosts();
        let trouble = |hot: &Hot<'_>| self.trouble(hot.host);
        hot.sort_by(|one, other| {
            trouble(other).total_cmp(&trouble(one)).then(one.host.cmp(&other.host))
        });
        for hot in &hot {
            memory::grow(&mut self, hot);
        }
        memory::provide(&mut self);
        for hot in &hot {
            self.cure(hot);
        }
        if self.draft.cluster().hosts.iter().any(|host| host.state == HostState::Draining) {
            drain::drain(&mut self.draft);
            self.outlook = expected(&self.draft, self.settings);
            self.sort();
        }
        self.anticipate();
        self.draft.finish()
    }

    /// Relieves hosts that are likely to have too much to do, where a move is worth much more than its price.
    fn anticipate(&mut self) {
        let cluster = self.draft.cluster();
        let least = self.settings.margin_s / self.settings.horizon_s;
        let hosts = cluster.host_indices().filter(|host| {
            let at = cluster.host(*host);
            at.state == HostState::Active && !at.is_migrating && !self.draft.is_hot(*host)
        });
        let mut likely: Vec<_> = hosts.map(|host| (self.trouble(host), host)).collect();
        likely.retain(|(trouble, host)| *trouble > least && self.is_steady(*host));
        likely.sort_by(|one, other| other.0.total_cmp(&one.0).then(one.1.cmp(&other.1)));
        for (_, host) in likely.into_iter().take(ANTICIPATED_MAX) {
            // What came here in this plan counts.
            if self.draft.moves_left() == 0 || self.draft.is_relieved(host) {
                continue;
            }
            let (best, _) = self.best(host, &[]);
            if let Some(best) = best.filter(|best| best.worth_s > self.settings.margin_s) {
                self.take(&Hot { host, spots: vec![] }, &best);
            }
        }
    }

    /// Whether a host's load was seen before. A guest that is beyond its peak of the last minutes may come down by itself:
    /// whether it does is for the detectors to say.
    fn is_steady(&self, host: HostIndex) -> bool {
        let cluster = self.draft.cluster();
        let capacity = &cluster.host(host).capacity;
        let guests = self.draft.placement().guests(host).iter().map(|vm| cluster.vm(*vm));
        [Resource::Cpu, Resource::Network, Resource::Disk].into_iter().all(|resource| {
            let is_high = |vm: &&Vm| vm.peak[resource] <= vm.usage[resource];
            let high: f64 = guests.clone().filter(is_high).map(|vm| vm.usage[resource]).sum();
            high <= UNSTEADY_MAX * capacity[resource]
        })
    }

    /// Relieves a host until it is well and nothing more is worth its price.
    fn cure(&mut self, hot: &Hot<'_>) {
        let mut pending = self.draft.pending(hot);
        if !pending.is_empty() {
            self.draft.note_held(hot.host);
        }
        while !pending.is_empty() {
            if self.draft.moves_left() == 0 {
                self.draft.note(format!(
                    "{}: the plan has no moves left",
                    self.draft.host_name(hot.host)
                ));
                return;
            }
            let (best, refusals) = self.best(hot.host, &pending);
            let single = best.as_ref().filter(|best| best.worth_s > 0.0);
            match (chain::better(self, hot, &pending, single), single) {
                (Some(steps), _) => chain::take(self, hot, &steps),
                (None, Some(best)) => self.take(hot, &best.clone()),
                (None, None) => {
                    let words = words::stays(self, hot, best.as_ref(), &refusals);
                    self.draft.note(words);
                    return;
                }
            }
            memory::grow(self, hot);
            pending = self.draft.pending(hot);
        }
        while self.draft.moves_left() > 0 {
            let (best, _) = self.best(hot.host, &[]);
            let Some(best) = best.filter(|best| best.worth_s > self.settings.margin_s) else {
                return;
            };
            self.take(hot, &best);
        }
    }

    /// What is wrong with a host.
    pub(super) fn trouble(&self, host: HostIndex) -> f64 {
        let load = self.outlook.load(self.draft.placement(), host);
        self.trouble_with(host, &load)
    }

    fn trouble_with(&self, host: HostIndex, load: &Load) -> f64 {
        self.outlook.trouble(self.draft.cluster(), host, load)
    }

    /// The best move away from a host that takes something of what is pending off it.
    fn best(&mut self, host: HostIndex, pending: &[Resource]) -> (Option<Move>, Refusals) {
        let units = self.draft.movable_units(host);
        let moves_left = self.draft.moves_left();
        let units: Vec<_> = units.into_iter().filter(|unit| unit.len() <= moves_left).collect();
        let mut refusals = Refusals::default();
        let mut best = None;
        let mut begin = 0;
        while best.is_none() && begin < self.roomiest.len() && self.judged_left > 0 {
            for unit in &units {
                for to in self.destinations(unit, begin) {
                    self.judged_left = self.judged_left.saturating_sub(1);
                    match self.draft.admits(unit, to, Want::Peak) {
                        Ok(outcome) => {
                            if !pending.is_empty() && !self.draft.helps(host, pending, &outcome) {
                                refusals.add_words("that would not relieve its host");
                                continue;
                            }
                            let next = self.judge(unit, to, pending, &outcome);
                            if best.as_ref().is_none_or(|best| is_better(&next, best)) {
                                best = Some(next);
                            }
                        }
                        Err(obstacle) => refusals.add(obstacle),
                    }
                }
            }
            begin += LOOKED_AT;
        }
        (best, refusals)
    }

    /// Where guests could go: some of the hosts with most left, and in the first round those that have to do with them.
    fn destinations(&self, unit: &[VmIndex], begin: usize) -> Vec<HostIndex> {
        let roomiest = self.roomiest.iter().skip(begin).take(LOOKED_AT).map(|(_, host)| *host);
        let mut hosts: Vec<_> = roomiest.collect();
        if begin > 0 {
            return hosts;
        }
        let (cluster, placement) = (self.draft.cluster(), self.draft.placement());
        let peers = unit.iter().flat_map(|vm| cluster.traffic.peers(*vm));
        let peers = peers.map(|(peer, _)| placement.host_of(*peer));
        let only = unit.iter().filter_map(|vm| cluster.rules.only_on.get(vm)).flatten().copied();
        for host in peers.chain(only) {
            let takes = || {
                let at = cluster.host(host);
                at.state == HostState::Active && !at.is_migrating && !self.draft.is_hot(host)
            };
            if !hosts.contains(&host) && takes() {
                hosts.push(host);
            }
        }
        hosts
    }

    /// What a move is worth that is possible.
    fn judge(
        &mut self,
        unit: &[VmIndex],
        to: HostIndex,
        pending: &[Resource],
        outcome: &Outcome,
    ) -> Move {
        let cluster = self.draft.cluster();
        let first = unit.first().copied().unwrap_or(VmIndex(0));
        let from = self.draft.placement().host_of(first);
        let before = self.trouble(from) + self.trouble(to);
        let talked = self.quieter(unit, to);
        let after = if let [vm] = unit {
            let (source, there) = self.outlook.loads_after(self.draft.placement(), *vm, to);
            self.trouble_with(from, &source) + self.trouble_with(to, &there)
        } else {
            let steps: Vec<_> = unit.iter().map(|vm| (*vm, to)).collect();
            self.on_trial(&steps, |search| search.trouble(from) + search.trouble(to))
        };
        let limit = self.draft.limit(from);
        let cured = |resource: &&Resource| outcome.source[**resource] <= limit[**resource];
        let cured = pending.iter().filter(cured).count() as f64 * self.settings.hot_weight;
        let saved = before - after + cured + self.settings.talk_weight * talked;
        let cost = self.cost(unit, from, to);
        Move {
            unit: unit.to_vec(),
            from,
            to,
            is_recent: unit.iter().any(|vm| self.is_recent(*vm)),
            priority: unit.iter().map(|vm| cluster.vm(*vm).priority).max().unwrap_or_default(),
            worth_s: saved * self.settings.horizon_s - self.price_s(&cost),
            cost,
        }
    }

    /// What is so after some moves, which are taken back.
    pub(super) fn on_trial<T>(
        &mut self,
        steps: &[(VmIndex, HostIndex)],
        what: impl FnOnce(&mut Self) -> T,
    ) -> T {
        let mut gone = vec![];
        for (vm, to) in steps {
            let from = self.draft.placement().host_of(*vm);
            self.outlook.go(*vm, from, *to);
            self.draft.placement.go(*vm, *to);
            gone.push((*vm, from, *to));
        }
        let found = what(self);
        for (vm, from, to) in gone.into_iter().rev() {
            self.outlook.go(vm, to, from);
            self.draft.placement.go(vm, from);
        }
        found
    }

    /// Whether a guest has moved not long ago.
    fn is_recent(&self, vm: VmIndex) -> bool {
        let problem = self.draft.problem();
        let last = self.draft.cluster().vm(vm).last_move;
        last.is_some_and(|last| is_within(problem.now_s - last.at_s, problem.limits.back_after_s))
    }

    /// What it takes to move guests one after the other.
    pub(super) fn cost(&self, unit: &[VmIndex], from: HostIndex, to: HostIndex) -> MigrationCost {
        let mut all = MigrationCost { wire_mib: 0.0, total_s: 0.0, downtime_ms: 0.0 };
        for vm in unit {
            let one = self.draft.cost(*vm, from, to);
            all.wire_mib += one.wire_mib;
            all.total_s += one.total_s;
            all.downtime_ms += one.downtime_ms;
        }
        all
    }

    pub(super) fn price_s(&self, cost: &MigrationCost) -> f64 {
        let settings = self.settings;
        settings.mib_weight_s * cost.wire_mib
            + settings.pause_weight_s * cost.downtime_ms / 1000.0
            + settings.moving_weight_s * cost.total_s
    }

    /// By how much less of the two hosts' interfaces is used for talk between guests, in shares.
    pub(super) fn quieter(&self, unit: &[VmIndex], to: HostIndex) -> f64 {
        let Some(from) = unit.first().map(|vm| self.draft.placement().host_of(*vm)) else {
            return 0.0;
        };
        let less_mbit = self.draft.talk_mbit(unit, to) - self.draft.talk_mbit(unit, from);
        let of = |host| {
            let capacity_mbit = self.draft.cluster().host(host).capacity[Resource::Network];
            if capacity_mbit > 0.0 { less_mbit / capacity_mbit } else { 0.0 }
        };
        of(from) + of(to)
    }

    /// Makes a move part of the plan.
    fn take(&mut self, hot: &Hot<'_>, best: &Move) {
        let reason = words::leaves(self, hot, best);
        self.carry_out(&best.unit, best.to, &reason);
    }

    pub(super) fn carry_out(&mut self, unit: &[VmIndex], to: HostIndex, reason: &str) {
        for vm in unit {
            let from = self.draft.placement().host_of(*vm);
            self.outlook.go(*vm, from, to);
        }
        self.draft.migrate(unit, to, reason);
        self.sort();
    }

    /// Puts destinations in order as they are now.
    fn sort(&mut self) {
        for (full, host) in &mut self.roomiest {
            *full = self.outlook.fullness(self.draft.placement(), *host);
        }
        self.roomiest.sort_by(|one, other| one.0.total_cmp(&other.0).then(one.1.cmp(&other.1)));
    }

    /// Hosts that take guests, those with most left first.
    pub(super) fn roomiest(&self) -> impl Iterator<Item = HostIndex> + '_ {
        self.roomiest.iter().map(|(_, host)| *host)
    }
}

/// What is to be expected of guests where they would be by now.
fn expected(draft: &Draft<'_>, settings: &Settings) -> Outlook {
    let weights = (settings.hot_weight, settings.unknown);
    Outlook::new(draft.placement(), draft.problem().limits.share_max, weights)
}

/// Whether a move is better than another; of equals that of the earlier guests to the earlier host.
fn is_better(one: &Move, other: &Move) -> bool {
    let key = |of: &Move| (of.is_recent, of.priority);
    let order = key(other).cmp(&key(one)).then(one.worth_s.total_cmp(&other.worth_s));
    order.then_with(|| (&other.unit, other.to).cmp(&(&one.unit, one.to))).is_gt()
}
