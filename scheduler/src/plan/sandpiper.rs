//! Sandpiper (Wood and others, NSDI 2007): a guest's load is one number, its volume; what has much of it for its memory
//! leaves first, and goes to the host with the least.
//!
//! `volume = 1/(1-cpu) * 1/(1-network) * 1/(1-memory)`, `VSR = volume / memory`. Lack of memory is first met with memory.
//! Where nothing can move, a guest is exchanged for others of a host with less to do (`swap`).
//!
//! As in the original, a guest's network figure counts what it exchanges inside of its host, which the IDC thesis calls a
//! fault; room on destinations is judged by what crosses their interfaces.

use super::draft::Draft;
use super::hot::Hot;
use super::room::Want;
use super::words::{Refusals, shares};
use super::{Plan, Policy, Problem, drain, swap};
use crate::model::{Amounts, HostIndex, Resource, VmIndex};

/// A resource of which nothing is left counts as if so much of it were.
const LEFT_MIN: f64 = 0.01;

/// Victims about which a plan says why they went nowhere, for each host.
const REFUSED_NOTES_MAX: usize = 3;

/// The policy.
#[derive(Debug, Clone, Default)]
pub struct Sandpiper {}

impl Policy for Sandpiper {
    fn name(&self) -> &'static str {
        "sandpiper"
    }

    fn plan(&self, problem: &Problem<'_>) -> Plan {
        let mut draft = match Draft::new(problem) {
            Ok(draft) => draft,
            Err(plan) => return plan,
        };
        let mut hot = draft.hot_hosts();
        let heat = |hot: &Hot<'_>| volume(&draft.placement().share(hot.host));
        hot.sort_by(|one, other| heat(other).total_cmp(&heat(one)).then(one.host.cmp(&other.host)));
        for hot in &hot {
            cure(&mut draft, hot);
        }
        drain::drain(&mut draft);
        draft.finish()
    }
}

/// The volume of shares of a host's capacity.
#[must_use]
pub fn volume(shares: &Amounts) -> f64 {
    let factor = |resource| 1.0 / (1.0 - shares[resource]).max(LEFT_MIN);
    factor(Resource::Cpu) * factor(Resource::Network) * factor(Resource::Memory)
}

/// A guest's volume, or that of guests that move together, for its memory.
#[derive(Debug, Clone)]
pub(super) struct Ranked {
    pub(super) unit: Vec<VmIndex>,
    priority: u8,
    /// What they take as shares of what the host has.
    pub(super) shares: Amounts,
    /// Volume per GiB.
    pub(super) vsr: f64,
}

impl Ranked {
    fn new(draft: &Draft<'_>, host: HostIndex, unit: Vec<VmIndex>) -> Self {
        let cluster = draft.cluster();
        let mut taken = Amounts::ZERO;
        for vm in &unit {
            taken += cluster.vm(*vm).usage;
            let talk = cluster.traffic.peers(*vm).iter().map(|(_, mbit)| mbit);
            taken.network_mbit += talk.sum::<f64>();
        }
        let memory_mib = unit.iter().map(|vm| draft.placement().allocated_mib(*vm)).sum::<f64>();
        taken.memory_mib = memory_mib;
        let shares = taken.share_of(&cluster.host(host).capacity);
        let vsr = volume(&shares) / (memory_mib / 1024.0).max(f64::MIN_POSITIVE);
        let priority = unit.iter().map(|vm| cluster.vm(*vm).priority).max().unwrap_or_default();
        Self { unit, priority, shares, vsr }
    }
}

/// What could leave a host, by priority and then the largest VSR first.
pub(super) fn by_vsr(draft: &Draft<'_>, host: HostIndex) -> Vec<Ranked> {
    let units = draft.movable_units(host);
    let mut ranked: Vec<_> = units.into_iter().map(|unit| Ranked::new(draft, host, unit)).collect();
    ranked.sort_by(|one, other| {
        let by_priority = one.priority.cmp(&other.priority);
        by_priority.then(other.vsr.total_cmp(&one.vsr)).then(one.unit.cmp(&other.unit))
    });
    ranked
}

/// Hosts that take guests, the least volume first.
pub(super) fn by_volume(draft: &Draft<'_>, mut hosts: Vec<HostIndex>) -> Vec<HostIndex> {
    let load = |host: &HostIndex| volume(&draft.placement().share(*host));
    hosts.sort_by(|one, other| load(one).total_cmp(&load(other)).then(one.cmp(other)));
    hosts
}

fn cure(draft: &mut Draft<'_>, hot: &Hot<'_>) {
    draft.grow(hot);
    draft.note_held(hot.host);
    while !draft.pending(hot).is_empty() {
        if draft.moves_left() == 0 {
            draft.note(format!("{}: the plan has no moves left", draft.host_name(hot.host)));
            return;
        }
        if !move_one(draft, hot) && !swap::swap(draft, hot) {
            let lack = draft.lack(hot);
            draft.note(format!("{}: {lack}; no move would help", draft.host_name(hot.host)));
            return;
        }
        draft.grow(hot);
    }
}

/// Moves the first guest, in the order of VSR, that a host has room for. Whether there was one.
fn move_one(draft: &mut Draft<'_>, hot: &Hot<'_>) -> bool {
    let pending = draft.pending(hot);
    let hosts = by_volume(draft, draft.destinations());
    for (rank, victim) in by_vsr(draft, hot.host).into_iter().enumerate() {
        if victim.unit.len() > draft.moves_left() {
            continue;
        }
        let mut refusals = Refusals::default();
        for to in &hosts {
            match draft.admits(&victim.unit, *to, Want::Peak) {
                Ok(outcome) if draft.helps(hot.host, &pending, &outcome) => {
                    let reason = reason(draft, hot, &victim, *to, &outcome.destination);
                    draft.migrate(&victim.unit, *to, &reason);
                    return true;
                }
                Ok(_) => refusals.add_words("that would not relieve its host"),
                Err(obstacle) => refusals.add(obstacle),
            }
        }
        if rank < REFUSED_NOTES_MAX {
            let (name, at) = (draft.unit_name(&victim.unit), draft.host_name(hot.host));
            draft.note(format!("{name} (VSR {:.2}) stays on {at}: {refusals}", victim.vsr));
        }
    }
    false
}

fn reason(
    draft: &Draft<'_>,
    hot: &Hot<'_>,
    victim: &Ranked,
    to: HostIndex,
    after: &Amounts,
) -> String {
    let lack = draft.lack(hot);
    let at = draft.host_name(hot.host);
    let (name, there) = (draft.unit_name(&victim.unit), draft.host_name(to));
    let least = volume(&draft.placement().share(to));
    format!(
        "{at} has {lack}. {name} has the largest volume for its memory of those that can go (VSR {:.2} a GiB; {}); {there} has \
         the least volume ({least:.2}) of those with room for its peak ({} then)",
        victim.vsr,
        shares(&victim.shares),
        shares(&after.share_of(&draft.cluster().host(to).capacity)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_grows_with_each_share_and_is_finite() {
        let shares = Amounts { cpu_cores: 0.5, memory_mib: 0.75, network_mbit: 0.2, disk_mib: 0.9 };
        assert!((volume(&shares) - 2.0 * 4.0 * 1.25).abs() < 1e-9);
        let full = Amounts { cpu_cores: f64::INFINITY, ..shares };
        assert!((volume(&full) - 100.0 * 4.0 * 1.25).abs() < 1e-9);
    }
}
