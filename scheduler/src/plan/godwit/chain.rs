//! Room is made first: a guest of the destination goes to a third host, or changes places with the one that is to come.
//!
//! ```text
//!   third   D ─ w ─► E, then H ─ v ─► D
//!   swap    D ─ w ─► H, then H ─ v ─► D    (or in the other order, as there is room)
//!   around  D ─ w ─► E, then H ─ v ─► D, then E ─ w ─► H
//! ```
//!
//! Looked at are the guests whose leaving helps most and the hosts that have most left: all pairs would be too many.

use super::search::{Move, Search};
use super::words;
use crate::model::{HostIndex, Resource, VmIndex};
use crate::plan::hot::Hot;
use crate::plan::room::Want;

/// Guests of the host that are looked at.
const GUESTS: usize = 4;

/// Hosts with which they could change places, and third hosts.
const HOSTS: usize = 6;

/// Hosts in one plan for which chains are looked for: it has to end.
pub(super) const CHAINS_MAX: usize = 16;

/// Moves of a chain, in order.
#[derive(Debug, Clone)]
pub(super) struct Chain {
    /// Who goes where.
    pub(super) steps: Vec<(VmIndex, HostIndex)>,
    /// Seconds of overload that all of it saves, its price taken off.
    pub(super) worth_s: f64,
}

/// The best chain that relieves a host, where no single move does.
pub(super) fn better(
    search: &mut Search<'_, '_>,
    hot: &Hot<'_>,
    pending: &[Resource],
    single: Option<&Move>,
) -> Option<Chain> {
    if single.is_some() || search.draft.moves_left() < 2 || search.chains_left == 0 {
        return None;
    }
    search.chains_left -= 1;
    let others: Vec<HostIndex> = search.roomiest().take(HOSTS).collect();
    let mut best: Option<Chain> = None;
    for vm in heaviest(search, hot.host, pending) {
        for to in &others {
            let mut guests = search.draft.placement().guests(*to).to_vec();
            guests.sort_unstable();
            for other in guests {
                for steps in ways(hot.host, vm, other, *to, &others) {
                    let worth_s = worth_s(search, hot.host, pending, &steps);
                    let least_s = best.as_ref().map_or(0.0, |best| best.worth_s);
                    if let Some(worth_s) = worth_s.filter(|worth_s| *worth_s > least_s) {
                        best = Some(Chain { steps, worth_s });
                    }
                }
            }
        }
    }
    best
}

/// Makes a chain part of the plan.
pub(super) fn take(search: &mut Search<'_, '_>, hot: &Hot<'_>, chain: &Chain) {
    let reason = words::changes_places(search, hot, chain);
    for (vm, to) in &chain.steps {
        search.carry_out(&[*vm], *to, &reason);
    }
}

/// The host's guests whose leaving would relieve it most.
fn heaviest(search: &Search<'_, '_>, host: HostIndex, pending: &[Resource]) -> Vec<VmIndex> {
    let capacity = search.draft.cluster().host(host).capacity;
    let units = search.draft.movable_units(host);
    let mut guests: Vec<VmIndex> =
        units.into_iter().filter(|unit| unit.len() == 1).flatten().collect();
    let taken = |vm: VmIndex| {
        let share = search.draft.placement().taken_by(vm).share_of(&capacity);
        pending.iter().map(|resource| share[*resource]).sum::<f64>()
    };
    guests.sort_by(|one, other| taken(*other).total_cmp(&taken(*one)).then(one.cmp(other)));
    guests.truncate(GUESTS);
    guests
}

/// How `vm` can get from `here` to `to` by way of `other`, which runs there.
fn ways(
    here: HostIndex,
    vm: VmIndex,
    other: VmIndex,
    to: HostIndex,
    thirds: &[HostIndex],
) -> Vec<Vec<(VmIndex, HostIndex)>> {
    let mut ways = vec![vec![(other, here), (vm, to)], vec![(vm, to), (other, here)]];
    for third in thirds.iter().filter(|third| **third != to && **third != here) {
        ways.push(vec![(other, *third), (vm, to)]);
        ways.push(vec![(other, *third), (vm, to), (other, here)]);
    }
    ways
}

/// What all steps together are worth, if each may be made and leaves nothing worse than limits allow.
fn worth_s(
    search: &mut Search<'_, '_>,
    host: HostIndex,
    pending: &[Resource],
    steps: &[(VmIndex, HostIndex)],
) -> Option<f64> {
    if steps.len() > search.draft.moves_left() || !is_possible(search, steps) {
        return None;
    }
    let mut hosts: Vec<HostIndex> =
        steps.iter().flat_map(|(vm, to)| [search.draft.placement().host_of(*vm), *to]).collect();
    hosts.sort_unstable();
    hosts.dedup();
    let sum = |search: &mut Search<'_, '_>| -> f64 {
        hosts.iter().map(|host| search.trouble(*host)).sum()
    };
    let before = sum(search);
    let was = search.draft.placement().usage(host);
    let (after, is) =
        search.on_trial(steps, |search| (sum(search), search.draft.placement().usage(host)));
    let (limit, settings) = (search.draft.limit(host), search.settings);
    let relieves = |resource: &Resource| is[*resource] < was[*resource];
    if !pending.iter().all(|resource| relieves(resource) && is[*resource] <= limit[*resource]) {
        return None;
    }
    let mut price_s = 0.0;
    let mut talked = 0.0;
    for (at, (vm, to)) in steps.iter().enumerate() {
        let from = search.draft.placement().host_of(*vm);
        price_s += search.price_s(&search.cost(&[*vm], from, *to));
        let earlier = steps.get(..at).unwrap_or_default();
        talked += search.on_trial(earlier, |search| search.quieter(&[*vm], *to));
    }
    let cured = pending.len() as f64 * settings.hot_weight;
    let saved = before - after + cured + settings.talk_weight * talked;
    Some(saved * settings.horizon_s - price_s)
}

/// Whether each step may be made after those before it, and there is room for the peaks of those who came.
fn is_possible(search: &mut Search<'_, '_>, steps: &[(VmIndex, HostIndex)]) -> bool {
    for (at, (vm, to)) in steps.iter().enumerate() {
        let (vm, to) = (*vm, *to);
        let is_free = search.draft.unit(vm).len() == 1 && search.draft.held(vm).is_none();
        let stays = steps.iter().skip(at + 1).all(|(later, _)| *later != vm);
        let want = if stays { Want::Peak } else { Want::Present };
        let earlier = steps.get(..at).unwrap_or_default();
        if !is_free
            || !search.on_trial(earlier, |search| search.draft.admits(&[vm], to, want).is_ok())
        {
            return false;
        }
    }
    true
}
