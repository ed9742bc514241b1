//! Hosts that have too much to do, how they are relieved by memory, and when they count as cured.

use std::fmt::{self, Display, Formatter};

use super::Hotspot;
use super::draft::Draft;
use super::room::Outcome;
use super::words::percent;
use crate::model::{HostIndex, HostState, Resource, VmIndex};

/// Share of a host's capacity by which a move has to relieve it, to be worth it.
const RELIEF_SHARE_MIN: f64 = 0.001;

/// Memory is not given in smaller amounts.
const GROWTH_MIB_MIN: f64 = 1.0;

/// A host and everything that it has too little of.
#[derive(Debug, Clone)]
pub(crate) struct Hot<'a> {
    pub(crate) host: HostIndex,
    pub(crate) spots: Vec<Spot<'a>>,
}

/// A hotspot, and who suffers from it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spot<'a> {
    pub(crate) spot: &'a Hotspot,
    /// The guest that has too little memory, if that is what is lacking and it is one guest's: the one the hotspot names,
    /// or the one that swaps most.
    pub(crate) sufferer: Option<VmIndex>,
}

impl Hot<'_> {
    /// Whether there is too little of this.
    pub(crate) fn lacks(&self, resource: Resource) -> bool {
        self.spots.iter().any(|Spot { spot, .. }| spot.resource == resource)
    }
}

/// Why a guest is not given memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoGrowth {
    /// It has all of its RAM.
    AtMax,
    /// Its host has none left.
    HostFull,
}

impl Display for NoGrowth {
    fn fmt(&self, to: &mut Formatter<'_>) -> fmt::Result {
        to.write_str(match self {
            Self::AtMax => "it has all the memory it was started with",
            Self::HostFull => "its host has no memory left for it",
        })
    }
}

impl<'a> Draft<'a> {
    /// The hot hosts about which something can be decided, in the order of their worst hotspots.
    pub(crate) fn hot_hosts(&mut self) -> Vec<Hot<'a>> {
        let mut hot: Vec<Hot<'a>> = vec![];
        for spot in self.hotspots() {
            let Some(host) = self.cluster().hosts.get(spot.host.0) else {
                self.note("A hotspot names a host that is not known".into());
                continue;
            };
            let name = &host.name;
            if host.state == HostState::Silent {
                self.note(format!("{name}: nothing was heard of it, so nothing is decided"));
                continue;
            }
            if host.is_migrating {
                self.note(format!("{name} waits until the migration that uses it has ended"));
                continue;
            }
            let spot = Spot { spot, sufferer: self.sufferer(spot) };
            match hot.iter_mut().find(|hot| hot.host == spot.spot.host) {
                Some(hot) => hot.spots.push(spot),
                None => hot.push(Hot { host: spot.spot.host, spots: vec![spot] }),
            }
        }
        hot
    }

    fn sufferer(&self, spot: &Hotspot) -> Option<VmIndex> {
        if spot.resource != Resource::Memory {
            return None;
        }
        let cluster = self.cluster();
        let named = spot.vm.filter(|vm| cluster.vms.get(vm.0).is_some_and(|g| g.host == spot.host));
        let swaps = |vm: VmIndex| cluster.vm(vm).memory.swap_writes_per_s;
        named.or_else(|| {
            let guests = self.placement().guests(spot.host).iter().copied();
            let swappers = guests.filter(|vm| swaps(*vm) > 0.0);
            swappers.max_by(|one, other| swaps(*one).total_cmp(&swaps(*other)).then(other.cmp(one)))
        })
    }

    /// What a host still lacks after the steps so far.
    pub(crate) fn pending(&self, hot: &Hot<'_>) -> Vec<Resource> {
        let mut pending: Vec<Resource> = vec![];
        for spot in hot.spots.iter().filter(|spot| !self.is_cured(spot)) {
            if !pending.contains(&spot.spot.resource) {
                pending.push(spot.spot.resource);
            }
        }
        pending
    }

    /// A guest that lacks memory is cured once it has more, or is elsewhere; a host once something has left it and what is
    /// left is within its limits.
    fn is_cured(&self, Spot { spot, sufferer }: &Spot<'_>) -> bool {
        let has_room = || {
            let (taken, limit) = (self.placement().usage(spot.host), self.limit(spot.host));
            taken[spot.resource] <= limit[spot.resource]
        };
        match sufferer {
            Some(vm) => self.has_resized(*vm) || self.has_moved(*vm),
            None => self.is_relieved(spot.host) && has_room(),
        }
    }

    /// Whether a move takes something of what a host lacks off it, and makes nothing that it lacks worse.
    pub(crate) fn helps(&self, host: HostIndex, pending: &[Resource], outcome: &Outcome) -> bool {
        let (has, taken) = (self.cluster().host(host).capacity, self.placement().usage(host));
        let relief = |resource: &Resource| taken[*resource] - outcome.source[*resource];
        pending.iter().any(|resource| relief(resource) > RELIEF_SHARE_MIN * has[*resource])
            && pending.iter().all(|resource| relief(resource) >= 0.0)
    }

    /// By how much a guest can grow, in MiB.
    ///
    /// # Errors
    /// Why it cannot.
    pub(crate) fn room_to_grow(&self, vm: VmIndex) -> Result<f64, NoGrowth> {
        let host = self.placement().host_of(vm);
        let up_to_max = self.cluster().vm(vm).memory.max_mib - self.placement().allocated_mib(vm);
        let step_mib = self.problem().limits.memory_step_mib.min(up_to_max);
        // Comparisons that are true for numbers alone.
        if !(up_to_max >= GROWTH_MIB_MIN && step_mib >= GROWTH_MIB_MIN) {
            return Err(NoGrowth::AtMax);
        }
        let free_mib = self.limit(host).memory_mib - self.load(host).memory_mib;
        if free_mib >= step_mib { Ok(step_mib) } else { Err(NoGrowth::HostFull) }
    }

    /// Lets guests of a host that lack memory grow by a step each, where there is room. Whether one did.
    pub(crate) fn grow(&mut self, hot: &Hot<'_>) -> bool {
        let mut has_grown = false;
        for vm in hot.spots.iter().filter_map(|spot| spot.sufferer) {
            if self.has_resized(vm) {
                continue;
            }
            match self.room_to_grow(vm) {
                Ok(step_mib) => {
                    self.grow_by(vm, step_mib);
                    has_grown = true;
                }
                Err(why) => {
                    let name = self.name(vm);
                    self.note(format!("{name} lacks memory and cannot grow: {why}"));
                }
            }
        }
        has_grown
    }

    fn grow_by(&mut self, vm: VmIndex, step_mib: f64) {
        let host = self.placement().host_of(vm);
        let free_mib = self.limit(host).memory_mib - self.load(host).memory_mib;
        let swaps = self.cluster().vm(vm).memory.swap_writes_per_s;
        let from_mib = self.placement().allocated_mib(vm);
        let to_mib = from_mib + step_mib;
        let (name, at) = (self.name(vm), self.host_name(host));
        let reason = format!(
            "{name} lacks memory ({swaps:.0} pages a second written to swap): it grows from {from_mib:.0} to {to_mib:.0} MiB \
             of the {free_mib:.0} MiB that are free on {at}"
        );
        self.resize(vm, to_mib, reason);
    }

    /// What a host lacks, with the figures: `CPU: 95 % of at most 85 %`.
    pub(crate) fn lack(&self, hot: &Hot<'_>) -> String {
        let share = self.placement().share(hot.host);
        let mut words: Vec<String> = vec![];
        for resource in self.pending(hot) {
            let max = percent(self.problem().limits.share_max[resource]);
            let mut spots = hot.spots.iter().map(|spot| spot.spot);
            let spot = spots.find(|spot| spot.resource == resource);
            let suffers = spot.filter(|spot| spot.vm.is_some()).map(|spot| spot.why.as_str());
            words.push(match suffers {
                Some(why) if !why.is_empty() => format!("too little {} ({why})", resource.name()),
                _ => format!(
                    "too little {} ({} taken, {max} may be)",
                    resource.name(),
                    percent(share[resource])
                ),
            });
        }
        words.join(" and ")
    }
}
