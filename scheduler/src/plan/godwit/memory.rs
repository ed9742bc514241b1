//! Memory first: who swaps grows where there is room.

use super::search::Search;
use crate::model::{Amounts, Resource, VmIndex};
use crate::plan::{Action, Hotspot, Step};

/// What a guest that has too little memory is given, if its host has so much.
pub(super) fn grown(search: &Search<'_>, hotspot: &Hotspot) -> Option<Step> {
    let vm = hotspot.vm.filter(|_| hotspot.resource == Resource::Memory)?;
    let problem = search.problem;
    let (guest, limits) = (problem.cluster.vm(vm), problem.limits);
    let from_mib = guest.memory.allocated_mib;
    let wanted_mib = guest.peak.memory_mib.max(from_mib + limits.memory_step_mib);
    let to_mib = wanted_mib.min(guest.memory.max_mib);
    if to_mib <= from_mib || guest.is_migrating || room_mib(search, vm) < to_mib - from_mib {
        return None;
    }
    let reason = format!(
        "{}: {} grows from {from_mib:.0} to {to_mib:.0} MiB, which its host has",
        hotspot.why, guest.name
    );
    Some(Step { action: Action::Resize { vm, from_mib, to_mib }, wave: 0, reason })
}

/// What a guest's host has left.
fn room_mib(search: &Search<'_>, vm: VmIndex) -> f64 {
    let host = search.placement().host_of(vm);
    let Amounts { memory_mib: taken_mib, .. } = search.placement().usage(host);
    let capacity_mib = search.problem.cluster.host(host).capacity.memory_mib;
    capacity_mib * search.problem.limits.share_max.memory_mib - taken_mib
}
