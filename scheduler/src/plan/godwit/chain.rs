//! Room is made first: a guest of the destination goes to a third host, or changes places with the one that is to come.
//!
//! ```text
//!   third   D ─ w ─► E, then H ─ v ─► D
//!   swap    D ─ w ─► H, then H ─ v ─► D    (or in the other order, as memory allows)
//!   around  D ─ w ─► E, then H ─ v ─► D, then E ─ w ─► H
//! ```
//!
//! Looked at are the guests whose leaving helps most and the hosts that have most left: all pairs would be too many.

use std::collections::BTreeSet;

use super::outlook::Outlook;
use super::search::{Move, Search};
use crate::model::{HostIndex, Placement, Resource, VmIndex};

/// Guests of the host, other hosts, and third hosts that are looked at.
const LOOKED_AT: usize = 6;

/// A chain must be worth so many times what a single move is.
const BETTER: f64 = 1.5;

/// The best chain that relieves a host, if it is much better than a single move.
pub(super) fn better(
    search: &Search<'_>,
    host: HostIndex,
    single: Option<Move>,
) -> Option<Vec<Move>> {
    let least_s = match single {
        Some(single) => single.worth_s * BETTER,
        None => search.settings.margin * search.trouble(host) * search.settings.horizon_s,
    };
    // Nothing that a chain could do is worth more than all that is wrong.
    if least_s > search.trouble(host) * search.settings.horizon_s {
        return None;
    }
    let mut tries =
        Tries { search, host, outlook: search.outlook.clone(), best: None, best_s: least_s };
    let others = roomiest(search, host);
    for vm in heaviest(search, host) {
        for to in others.iter().take(LOOKED_AT) {
            let guests: Vec<VmIndex> = search.placement().guests(*to).to_vec();
            for other in guests {
                tries.swap(vm, other);
                for third in others.iter().take(LOOKED_AT).filter(|third| *third != to) {
                    tries.third(vm, other, *third);
                }
            }
        }
    }
    tries.best
}

/// The host's guests whose leaving would relieve it most.
fn heaviest(search: &Search<'_>, host: HostIndex) -> Vec<VmIndex> {
    let cluster = search.problem.cluster;
    let load = search.outlook.load(host);
    let limits = &search.problem.limits.share_max;
    let shares = load.mean.share_of(&cluster.host(host).capacity);
    let tightest = Placement::tightest(&shares, limits);
    let mut guests = search.placement().guests(host).to_vec();
    let taken = |vm: VmIndex| search.placement().taken_by(vm)[tightest];
    guests.sort_by(|one, other| taken(*other).total_cmp(&taken(*one)).then(one.cmp(other)));
    guests.truncate(LOOKED_AT);
    guests
}

/// Other hosts, those with most left of what they have least of first.
fn roomiest(search: &Search<'_>, host: HostIndex) -> Vec<HostIndex> {
    let cluster = search.problem.cluster;
    let hosts = cluster.host_indices().filter(|other| *other != host);
    let mut hosts: Vec<(f64, HostIndex)> = hosts
        .filter(|other| !search.busy.contains(other))
        .map(|other| {
            let shares = search.placement().share(other);
            let tightest = Resource::ALL.into_iter().map(|resource| shares[resource]);
            (tightest.fold(0.0, f64::max), other)
        })
        .collect();
    hosts.sort_by(|one, other| one.0.total_cmp(&other.0).then(one.1.cmp(&other.1)));
    hosts.into_iter().map(|(_, host)| host).collect()
}

/// Chains that are tried on a copy.
struct Tries<'a, 'b> {
    search: &'a Search<'b>,
    /// The one to relieve.
    host: HostIndex,
    outlook: Outlook<'b>,
    best: Option<Vec<Move>>,
    best_s: f64,
}

impl Tries<'_, '_> {
    /// The two change places.
    fn swap(&mut self, vm: VmIndex, other: VmIndex) {
        let placement = self.search.placement();
        let (here, there) = (placement.host_of(vm), placement.host_of(other));
        let orders = [[(other, here), (vm, there)], [(vm, there), (other, here)]];
        for order in orders {
            self.consider(&order);
        }
    }

    /// The other goes to a third host, to stay there or, where that helps more, only until there is room here.
    fn third(&mut self, vm: VmIndex, other: VmIndex, third: HostIndex) {
        let placement = self.search.placement();
        let (here, there) = (placement.host_of(vm), placement.host_of(other));
        self.consider(&[(other, third), (vm, there)]);
        self.consider(&[(other, third), (vm, there), (other, here)]);
    }

    /// Remembers a chain if it may be made and is the best so far.
    fn consider(&mut self, steps: &[(VmIndex, HostIndex)]) {
        let mut chain = Vec::with_capacity(steps.len());
        let mut beside = 0.0;
        let is_possible = steps.iter().all(|(vm, to)| match self.step(*vm, *to) {
            Some((step, more)) => {
                beside += more;
                chain.push(step);
                true
            }
            None => false,
        });
        let worth_s = is_possible.then(|| self.worth_s(&chain, beside)).flatten();
        for step in chain.iter().rev() {
            self.outlook.go(step.vm, step.from);
        }
        if let (Some(worth_s), Some(last)) = (worth_s, chain.last_mut())
            && worth_s > self.best_s
        {
            last.worth_s = worth_s;
            self.best_s = worth_s;
            self.best = Some(chain);
        }
    }

    /// Makes a step on the copy, if it may be made and there is memory for it: the step, and what it saves beside overload.
    fn step(&mut self, vm: VmIndex, to: HostIndex) -> Option<(Move, f64)> {
        self.search.may_go(&self.outlook, vm, to).ok()?;
        let (_, there) = self.outlook.loads_after(vm, to);
        // Whatever else there is too little of on the way is there again at the end.
        if !self.outlook.holds(to, &there) {
            return None;
        }
        let beside = self.search.beside(&self.outlook, vm, to);
        let from = self.outlook.placement().host_of(vm);
        self.outlook.go(vm, to);
        Some((Move { vm, from, to, worth_s: 0.0, cost: self.search.cost(vm) }, beside))
    }

    /// What all steps together are worth, if all hosts but the one to relieve are well then.
    fn worth_s(&self, chain: &[Move], beside: f64) -> Option<f64> {
        let hosts: BTreeSet<HostIndex> =
            chain.iter().flat_map(|step| [step.from, step.to]).collect();
        let mut saved = beside;
        for host in hosts {
            let (before, after) = (self.search.outlook.load(host), self.outlook.load(host));
            match chain.iter().any(|step| step.to == host) && host != self.host {
                true => self.search.outlook.carries(host, &after).ok()?,
                false => self.search.outlook.carries_on(host, &after).ok()?,
            }
            saved += self.outlook.overload(host, &before) - self.outlook.overload(host, &after);
        }
        let price_s: f64 = chain.iter().map(|step| self.search.price_s(&step.cost)).sum();
        Some(saved * self.search.settings.horizon_s - price_s)
    }
}
