//! The decentralised DRS (Agrawal, IIT Kanpur 2016): memory is shared anew between a host's guests first
//! ([`super::balloon`]); then the guest leaves whose going is worth most beyond the opportunity cost of its coming.
//!
//! ```text
//!   cost = 100/(2n) * (n^((load_h + used_g)/total_h) + n^(min(demand_g + cpu_h, cap_h)/cap_h))      n hosts
//!   benefit = 100 * allocated_g / total / guests      where memory is lacking
//!             CPU_g / guests                          where CPU is lacking, in % of the guest's processors
//! ```
//!
//! The destination's guests give what memory the guest will want, before it comes. One migration at a time for each host.
//! Network and disk are none of this policy's business.

use super::balloon::{self, BalloonSettings, Change, Guest, Room, Why};
use super::draft::Draft;
use super::hot::Hot;
use super::room::{Outcome, Want};
use super::words::{Refusals, shares};
use super::{Plan, Policy, Problem, drain};
use crate::model::{HostIndex, Obstacle, Resource, VmIndex};

/// Shares beyond this make no difference any more.
const SHARE_MAX: f64 = 2.0;

/// Of what a guest waits for, so much has to be free.
const DEMAND_SHARE: f64 = 0.5;

/// The policy.
#[derive(Debug, Clone, Default)]
pub struct Drs {
    /// When memory is taken and given.
    pub balloon: BalloonSettings,
}

impl Policy for Drs {
    fn name(&self) -> &'static str {
        "drs"
    }

    fn plan(&self, problem: &Problem<'_>) -> Plan {
        let mut draft = match Draft::new(problem) {
            Ok(draft) => draft,
            Err(plan) => return plan,
        };
        let mut taken = vec![];
        for hot in &draft.hot_hosts() {
            self.cure(&mut draft, hot, &mut taken);
        }
        drain::drain(&mut draft);
        draft.finish()
    }
}

/// What guests that move together bring along.
#[derive(Debug, Clone, Copy, Default)]
struct Load {
    used_mib: f64,
    allocated_mib: f64,
    max_mib: f64,
    cpu_cores: f64,
    /// With what they wait for.
    demand_cores: f64,
    /// Of their processors, percent.
    cpu_percent: f64,
    priority: u8,
}

impl Load {
    fn of(draft: &Draft<'_>, unit: &[VmIndex]) -> Self {
        let mut load = Self::default();
        for vm in unit {
            let guest = draft.cluster().vm(*vm);
            let vcpus = f64::from(guest.vcpus.max(1));
            let demand_cores = (guest.usage.cpu_cores * (1.0 + guest.steal)).min(vcpus);
            load.used_mib += guest.memory.used_mib;
            load.allocated_mib += draft.placement().allocated_mib(*vm);
            load.max_mib += guest.memory.max_mib;
            load.cpu_cores += guest.usage.cpu_cores;
            load.demand_cores += demand_cores.max(guest.usage.cpu_cores);
            load.cpu_percent += 100.0 * guest.usage.cpu_cores / vcpus;
            load.priority = load.priority.max(guest.priority);
        }
        load
    }
}

/// A move and what speaks for it and against.
#[derive(Debug)]
struct Offer {
    unit: Vec<VmIndex>,
    to: HostIndex,
    priority: u8,
    benefit: f64,
    cost: f64,
    demand_mib: f64,
}

impl Drs {
    fn cure(&self, draft: &mut Draft<'_>, hot: &Hot<'_>, taken: &mut Vec<HostIndex>) {
        let name = draft.host_name(hot.host);
        if hot.lacks(Resource::Memory) {
            let room = room(draft, hot.host, 0.0);
            let changes = balloon::decide(&room, &guests(draft, hot.host), &self.balloon);
            apply(draft, hot.host, &changes);
        }
        let is_ours = |lack: &Resource| matches!(lack, Resource::Cpu | Resource::Memory);
        let (ours, others): (Vec<_>, Vec<_>) = draft.pending(hot).into_iter().partition(is_ours);
        for lack in others {
            draft.note(format!("{name}: this policy does nothing about {}", lack.name()));
        }
        if ours.is_empty() {
            return;
        }
        draft.note_held(hot.host);
        if draft.moves_left() == 0 {
            draft.note(format!("{name}: the plan has no moves left"));
        } else if !self.move_one(draft, hot, &ours, taken) {
            let lack = draft.lack(hot);
            draft.note(format!("{name}: {lack}; no move would help"));
        }
    }

    fn move_one(
        &self,
        draft: &mut Draft<'_>,
        hot: &Hot<'_>,
        lacks: &[Resource],
        taken: &mut Vec<HostIndex>,
    ) -> bool {
        let mut refusals = Refusals::default();
        for offer in offers(draft, hot, lacks, taken, &mut refusals) {
            match self.admits(draft, &offer) {
                Ok((outcome, _)) if !draft.helps(hot.host, lacks, &outcome) => {
                    refusals.add_words("a guest's leaving would not relieve its host");
                }
                Ok((outcome, changes)) => {
                    let reason = reason(draft, hot, &offer, &outcome);
                    apply(draft, offer.to, &changes);
                    draft.migrate(&offer.unit, offer.to, &reason);
                    taken.push(offer.to);
                    return true;
                }
                Err(obstacle) => refusals.add(obstacle),
            }
        }
        let name = draft.host_name(hot.host);
        draft.note(format!("{name}: none of its guests can leave: {refusals}"));
        false
    }

    /// Whether there is room, with memory that the destination's guests give if need be.
    fn admits(
        &self,
        draft: &mut Draft<'_>,
        offer: &Offer,
    ) -> Result<(Outcome, Vec<Change>), Obstacle> {
        match draft.admits(&offer.unit, offer.to, Want::Peak) {
            Ok(outcome) => return Ok((outcome, vec![])),
            Err(Obstacle::Room(Resource::Memory)) => {}
            Err(obstacle) => return Err(obstacle),
        }
        let room = room(draft, offer.to, offer.demand_mib);
        let mut changes = balloon::decide(&room, &guests(draft, offer.to), &self.balloon);
        changes.retain(|change| change.why != Why::Needs && change.why != Why::Entitlement);
        let before: Vec<_> =
            changes.iter().map(|change| draft.placement.allocated_mib(change.vm)).collect();
        for change in &changes {
            draft.placement.resize(change.vm, change.to_mib);
        }
        let outcome = draft.admits(&offer.unit, offer.to, Want::Peak);
        for (change, before_mib) in changes.iter().zip(before) {
            draft.placement.resize(change.vm, before_mib);
        }
        outcome.map(|outcome| (outcome, changes))
    }
}

/// Every guest of a hot host on every other that can take it, the best first.
fn offers(
    draft: &Draft<'_>,
    hot: &Hot<'_>,
    lacks: &[Resource],
    taken: &[HostIndex],
    refusals: &mut Refusals,
) -> Vec<Offer> {
    let cluster = draft.cluster();
    let here = cluster.host(hot.host).capacity;
    let guests_here = draft.placement().guests(hot.host).len().max(1) as f64;
    let loads: Vec<_> = draft
        .movable_units(hot.host)
        .into_iter()
        .filter(|unit| unit.len() <= draft.moves_left())
        .map(|unit| (Load::of(draft, &unit), unit))
        .collect();
    let mut offers = vec![];
    for to in draft.destinations() {
        if taken.contains(&to) {
            refusals.add(Obstacle::HostMigrates);
            continue;
        }
        let there = There::new(draft, to);
        for (load, unit) in &loads {
            let cost = match there.cost(load) {
                Ok(cost) => cost,
                Err(resource) => {
                    refusals.add(Obstacle::Room(resource));
                    continue;
                }
            };
            let mut benefit = 0.0;
            if lacks.contains(&Resource::Memory) {
                benefit += 100.0 * load.allocated_mib / here.memory_mib / guests_here;
            }
            if lacks.contains(&Resource::Cpu) {
                benefit += load.cpu_percent / guests_here;
            }
            let (unit, priority, demand_mib) = (unit.clone(), load.priority, load.allocated_mib);
            offers.push(Offer { unit, to, priority, benefit, cost, demand_mib });
        }
    }
    offers.sort_by(|one, other| {
        let worth = |offer: &Offer| offer.benefit - offer.cost;
        let by_priority = one.priority.cmp(&other.priority);
        let by_worth = by_priority.then(worth(other).total_cmp(&worth(one)));
        by_worth.then(one.unit.cmp(&other.unit)).then(one.to.cmp(&other.to))
    });
    offers
}

/// A possible destination.
#[derive(Debug)]
struct There {
    hosts: f64,
    cap_cores: f64,
    cpu_cores: f64,
    total_mib: f64,
    /// What cannot be given up: without page cache and free pages.
    load_mib: f64,
}

impl There {
    fn new(draft: &Draft<'_>, host: HostIndex) -> Self {
        let cluster = draft.cluster();
        let (has, own) = (cluster.host(host).capacity, cluster.host(host).own);
        let guests = draft.placement().guests(host).iter();
        let needed_mib: f64 = guests.map(|vm| cluster.vm(*vm).memory.needed_mib).sum();
        Self {
            hosts: cluster.hosts.len() as f64,
            cap_cores: has.cpu_cores,
            cpu_cores: draft.placement().usage(host).cpu_cores,
            total_mib: has.memory_mib,
            load_mib: own.memory_mib + needed_mib,
        }
    }

    /// What the coming of guests would cost.
    ///
    /// # Errors
    /// What there would be too little of.
    fn cost(&self, load: &Load) -> Result<f64, Resource> {
        let fits_memory = self.load_mib + load.max_mib <= self.total_mib;
        if !fits_memory {
            return Err(Resource::Memory);
        }
        let wanted = load.cpu_cores + DEMAND_SHARE * (load.demand_cores - load.cpu_cores);
        let fits_cpu = self.cap_cores - self.cpu_cores >= wanted;
        if !fits_cpu {
            return Err(Resource::Cpu);
        }
        let memory = share(self.load_mib + load.used_mib, self.total_mib);
        let cpu = share((load.demand_cores + self.cpu_cores).min(self.cap_cores), self.cap_cores);
        let n = self.hosts;
        Ok(100.0 / (2.0 * n) * (n.powf(memory) + n.powf(cpu)))
    }
}

fn share(of: f64, total: f64) -> f64 {
    if total > 0.0 { (of / total).min(SHARE_MAX) } else { SHARE_MAX }
}

/// A host's memory as guests may share it.
pub(super) fn room(draft: &Draft<'_>, host: HostIndex, incoming_mib: f64) -> Room {
    let (limit, load) = (draft.limit(host).memory_mib, draft.load(host).memory_mib);
    let total_mib = (limit - draft.cluster().host(host).own.memory_mib).max(0.0);
    Room { total_mib, free_mib: limit - load, incoming_mib }
}

/// Guests whose memory the plan leaves alone so far.
pub(super) fn guests(draft: &Draft<'_>, host: HostIndex) -> Vec<Guest> {
    let mut guests = draft.placement().guests(host).to_vec();
    guests.sort_unstable();
    let stays = guests.into_iter().filter(|vm| {
        !draft.has_moved(*vm) && !draft.has_resized(*vm) && !draft.cluster().vm(*vm).is_migrating
    });
    let described = stays.map(|vm| {
        let guest = draft.cluster().vm(vm);
        Guest { vm, memory: guest.memory, priority: guest.priority, oom_since_s: None }
    });
    described.collect()
}

/// Adds what guests give and get.
pub(super) fn apply(draft: &mut Draft<'_>, host: HostIndex, changes: &[Change]) {
    for change in changes {
        let (name, at) = (draft.name(change.vm), draft.host_name(host));
        let memory = &draft.cluster().vm(change.vm).memory;
        let (from_mib, to_mib) = (memory.allocated_mib, change.to_mib);
        let resized = format!("from {from_mib:.0} to {to_mib:.0} MiB");
        let reason = match change.why {
            Why::Needs => format!(
                "{name} needs {:.0} of its {from_mib:.0} MiB ({:.0} pages a second written to swap): it grows {resized}",
                memory.needed_mib, memory.swap_writes_per_s
            ),
            Why::SoftIdle => format!(
                "{at} needs memory, and {name} uses {:.0} of its {from_mib:.0} MiB: it shrinks {resized}",
                memory.used_mib
            ),
            Why::HardIdle => format!(
                "{at} needs memory, and {name} uses {:.0} MiB but needs {:.0} of them: it shrinks {resized}",
                memory.used_mib, memory.needed_mib
            ),
            Why::Entitlement => format!(
                "{at} has too little memory for all, and {name} more than its share: it shrinks {resized}"
            ),
        };
        draft.resize(change.vm, to_mib, reason);
    }
}

fn reason(draft: &Draft<'_>, hot: &Hot<'_>, offer: &Offer, outcome: &Outcome) -> String {
    let (at, there) = (draft.host_name(hot.host), draft.host_name(offer.to));
    let (name, lack) = (draft.unit_name(&offer.unit), draft.lack(hot));
    let then = outcome.destination.share_of(&draft.cluster().host(offer.to).capacity);
    format!(
        "{at} has {lack}. {name} to {there} is worth most: benefit {:.1} less the opportunity cost of {:.1} ({} then)",
        offer.benefit,
        offer.cost,
        shares(&then),
    )
}
