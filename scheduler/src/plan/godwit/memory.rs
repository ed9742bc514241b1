//! Memory first: who lacks it grows where there is room, or where others do not use theirs; who soon will gets it before.

use super::search::Search;
use crate::model::{HostState, Resource, VmIndex};
use crate::plan::balloon::{self, Guest};
use crate::plan::drs;
use crate::plan::hot::Hot;

/// Memory is not given in smaller amounts, MiB.
const GROWTH_MIB_MIN: f64 = 1.0;

/// Gives memory to a hot host's guests that lack it; where there is none, others give what they do not use.
pub(super) fn grow(search: &mut Search<'_, '_>, hot: &Hot<'_>) {
    for vm in hot.spots.iter().filter_map(|spot| spot.sufferer) {
        give(search, vm, search.draft.problem().limits.memory_step_mib);
    }
    if search.draft.pending(hot).contains(&Resource::Memory) {
        let guests = drs::guests(&search.draft, hot.host);
        let room = drs::room(&search.draft, hot.host, 0.0);
        let changes = balloon::decide(&room, &guests, &search.settings.balloon);
        drs::apply(&mut search.draft, hot.host, &changes);
    }
}

/// Gives memory to guests that will soon lack it, where there is room.
pub(super) fn provide(search: &mut Search<'_, '_>) {
    let cluster = search.draft.cluster();
    for vm in cluster.vm_indices() {
        let guest = cluster.vm(vm);
        let needy = Guest { vm, memory: guest.memory, priority: guest.priority, oom_since_s: None };
        let need_mib = balloon::need_mib(&needy, &search.settings.balloon);
        if need_mib >= GROWTH_MIB_MIN && cluster.host(guest.host).state == HostState::Active {
            give(search, vm, need_mib);
        }
    }
}

/// Lets a guest grow to what it is estimated to want, by this much at least if it may; less where there is less.
fn give(search: &mut Search<'_, '_>, vm: VmIndex, least_mib: f64) {
    let draft = &mut search.draft;
    let guest = draft.cluster().vm(vm);
    if draft.has_resized(vm) || draft.has_moved(vm) || guest.is_migrating {
        return;
    }
    let (host, from_mib) = (draft.placement().host_of(vm), draft.placement().allocated_mib(vm));
    let wanted_mib = (guest.peak.memory_mib - from_mib).max(least_mib);
    let free_mib = draft.limit(host).memory_mib - draft.load(host).memory_mib;
    let more_mib = wanted_mib.min(guest.memory.max_mib - from_mib).min(free_mib);
    // A comparison that is true for numbers alone.
    if !(more_mib >= GROWTH_MIB_MIN && more_mib.is_finite()) {
        return;
    }
    let to_mib = from_mib + more_mib;
    let reason = format!(
        "{} needs {:.0} of its {from_mib:.0} MiB ({:.0} pages a second written to swap): it grows to {to_mib:.0} of the \
         {free_mib:.0} MiB that are free on {}",
        guest.name,
        guest.memory.needed_mib,
        guest.memory.swap_writes_per_s,
        draft.host_name(host),
    );
    draft.resize(vm, to_mib, reason);
}
