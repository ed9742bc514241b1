//! Exchanging a guest of a hot host for others of a host that has less to do, where none can simply move.
//!
//! Room for the exchange is made in one of three ways, tried in this order: the others go first, if there is room for what
//! they take; the guest goes first, if there is; one guest waits on a third host meanwhile. No more than three migrations.

use super::draft::Draft;
use super::hot::Hot;
use super::room::Want;
use super::sandpiper::{Ranked, by_volume, by_vsr};
use super::words::list;
use crate::model::{Amounts, HostIndex, Resource, VmIndex};

/// Migrations of an exchange.
const MOVES_MAX: usize = 3;

/// Guests of a hot host that are tried.
const VICTIMS_MAX: usize = 5;

/// Hosts that are tried for each of them, those that have least to do.
const HOSTS_MAX: usize = 32;

/// Share of the hot host's capacity that an exchange has to free, to be worth it.
const GAIN_SHARE_MIN: f64 = 0.02;

/// Who moves where, in order.
type Exchange = Vec<(VmIndex, HostIndex)>;

/// Exchanges guests, if that relieves a hot host. Whether it did.
pub(super) fn swap(draft: &mut Draft<'_>, hot: &Hot<'_>) -> bool {
    if draft.moves_left() < 2 {
        return false;
    }
    let pending = draft.pending(hot);
    let hosts = by_volume(draft, draft.destinations());
    let victims = by_vsr(draft, hot.host);
    let singles = |ranked: &&Ranked| ranked.unit.len() == 1;
    for victim in victims.iter().filter(singles).take(VICTIMS_MAX) {
        for with in hosts.iter().take(HOSTS_MAX) {
            let others = others_for(draft, victim, *with);
            for count in 1..=others.len() {
                let Some(others) = others.get(..count) else { continue };
                let Some(exchange) = arrange(draft, hot.host, &pending, victim, others, *with)
                else {
                    continue;
                };
                carry_out(draft, hot, victim, others, *with, &exchange);
                return true;
            }
        }
    }
    false
}

/// Guests of another host that have less to do for their memory than the victim, the least first.
fn others_for(draft: &Draft<'_>, victim: &Ranked, with: HostIndex) -> Vec<VmIndex> {
    let mut others = by_vsr(draft, with);
    others.retain(|other| other.unit.len() == 1 && other.vsr < victim.vsr);
    others.sort_by(|one, other| one.vsr.total_cmp(&other.vsr).then(one.unit.cmp(&other.unit)));
    let count = (MOVES_MAX - 1).min(draft.moves_left() - 1);
    others.into_iter().flat_map(|other| other.unit).take(count).collect()
}

/// The first way to exchange guests that leaves the hot host with less of what it lacks, and all within their limits at each
/// step.
fn arrange(
    draft: &mut Draft<'_>,
    hot: HostIndex,
    pending: &[Resource],
    victim: &Ranked,
    others: &[VmIndex],
    with: HostIndex,
) -> Option<Exchange> {
    let there = (*victim.unit.first()?, with);
    let back: Exchange = others.iter().map(|other| (*other, hot)).collect();
    let mut ways = vec![[back.clone(), vec![there]].concat(), [vec![there], back].concat()];
    if let [other] = others
        && draft.moves_left() >= MOVES_MAX
        && let Some(third) = third_host(draft, *other, with)
    {
        ways.push(vec![(*other, third), there, (*other, hot)]);
    }
    ways.into_iter().find(|way| is_good(draft, hot, pending, way))
}

/// A host on which a guest can wait.
fn third_host(draft: &mut Draft<'_>, vm: VmIndex, with: HostIndex) -> Option<HostIndex> {
    let mut hosts = by_volume(draft, draft.destinations()).into_iter();
    hosts.find(|host| *host != with && draft.admits(&[vm], *host, Want::Present).is_ok())
}

/// Tries an exchange and takes it back.
fn is_good(draft: &mut Draft<'_>, hot: HostIndex, pending: &[Resource], way: &Exchange) -> bool {
    let before = draft.placement.usage(hot);
    let mut gone = vec![];
    let mut is_possible = true;
    for (vm, to) in way {
        is_possible = draft.admits(&[*vm], *to, Want::Present).is_ok();
        if !is_possible {
            break;
        }
        gone.push((*vm, draft.placement.host_of(*vm)));
        draft.placement.go(*vm, *to);
    }
    let is_good = is_possible && gains(draft, hot, pending, &before) && holds_peaks(draft, way);
    for (vm, from) in gone.into_iter().rev() {
        draft.placement.go(vm, from);
    }
    is_good
}

/// Whether the hot host has clearly less of something that it lacks, and no more of anything that it lacks.
fn gains(draft: &Draft<'_>, hot: HostIndex, pending: &[Resource], before: &Amounts) -> bool {
    let (has, after) = (draft.cluster().host(hot).capacity, draft.placement.usage(hot));
    let gain = |resource: &Resource| before[*resource] - after[*resource];
    pending.iter().any(|resource| gain(resource) >= GAIN_SHARE_MIN * has[*resource])
        && pending.iter().all(|resource| gain(resource) >= 0.0)
}

/// Whether there is room for the peaks of those who came, where they are in the end.
fn holds_peaks(draft: &Draft<'_>, way: &Exchange) -> bool {
    way.iter().all(|(_, host)| {
        let came = |(vm, _): &&(VmIndex, HostIndex)| draft.placement.host_of(*vm) == *host;
        let mut guests: Vec<_> = way.iter().filter(came).map(|(vm, _)| *vm).collect();
        guests.dedup();
        let mut promise = Amounts::ZERO;
        for vm in guests {
            promise += draft.promise(vm);
        }
        let (load, limit) = (draft.load(*host) + promise, draft.limit(*host));
        Resource::ALL
            .into_iter()
            .all(|resource| promise[resource] <= 0.0 || load[resource] <= limit[resource])
    })
}

fn carry_out(
    draft: &mut Draft<'_>,
    hot: &Hot<'_>,
    victim: &Ranked,
    others: &[VmIndex],
    with: HostIndex,
    way: &Exchange,
) {
    let names: Vec<_> = others.iter().map(|other| draft.name(*other)).collect();
    let (lack, at, there) = (draft.lack(hot), draft.host_name(hot.host), draft.host_name(with));
    let (name, others) = (draft.unit_name(&victim.unit), list(&names));
    let reason = format!(
        "{at} has {lack}, and none of its guests has room elsewhere as things are: {name} (VSR {:.2} a GiB) changes places \
         with {others} of {there}, which have less to do for their memory",
        victim.vsr,
    );
    for (vm, to) in way {
        let waits = if *to == with || *to == hot.host {
            String::new()
        } else {
            format!("; {others} waits on {} meanwhile", draft.host_name(*to))
        };
        draft.migrate(&[*vm], *to, &format!("{reason}{waits}"));
    }
}
