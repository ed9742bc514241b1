//! What the move of a guest would be worth to its host: equations (1) to (3) of the thesis.
//!
//! ```text
//!   network benefit = Nso + Nsd - Nds       (1)
//!   Nds = min(Is, AB, NBmax)                (2)
//! ```
//!
//! `Nso` and `Nsd`: traffic that crosses the source's interface to others and to the destination; `Is`: talk inside of the
//! source, which would cross then as `Nds`; `AB`: what the source's interface has left after the move; `NBmax`: what a
//! guest's interface carries.
//!
//! All figures are shares of what the source has, so that they can be added.

use super::IdcSettings;
use crate::model::{Amounts, HostIndex, Resource, VmIndex};
use crate::plan::draft::Draft;

/// Share of a network interface from which on talk through it is taken to be throttled.
const THROTTLED: f64 = 0.8;

/// A sum of shares is not larger than this, whatever a host lacks.
const SHARE_MAX: f64 = 1e6;

/// What a move would be worth.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Benefit {
    /// V.
    pub value: f64,
    /// `Nsd`: talk with guests of the destination, Mbit/s.
    pub met_mbit: f64,
    /// `Nso + Nsd`: what crosses the source's interface now because of the guest, Mbit/s.
    pub crossing_mbit: f64,
    /// `Nds`, Mbit/s.
    pub split_mbit: f64,
    /// What the guest takes of the source.
    pub share: Amounts,
    /// Processors that the destination needs beyond what the guest takes now.
    pub more_cores: f64,
}

impl Benefit {
    /// Of guests that move together. `lacks` is what the source lacks.
    pub(crate) fn of(
        draft: &Draft<'_>,
        from: HostIndex,
        lacks: &[Resource],
        unit: &[VmIndex],
        to: HostIndex,
        settings: &IdcSettings,
    ) -> Self {
        let cluster = draft.cluster();
        let capacity = cluster.host(from).capacity;
        let inner_mbit = draft.talk_mbit(unit, from);
        let met_mbit = draft.talk_mbit(unit, to);
        let (taken, all_mbit) = taken_by(draft, unit);
        let crossing_mbit = taken.network_mbit + (all_mbit - inner_mbit).max(0.0);
        let left_mbit =
            capacity.network_mbit - (draft.placement().usage(from).network_mbit - crossing_mbit);
        let ceiling_mbit = left_mbit.max(0.0).min(settings.guest_mbit_max.unwrap_or(f64::INFINITY));
        let split_mbit =
            if settings.counts_need { inner_mbit } else { inner_mbit.min(ceiling_mbit) };
        let gained_mbit = met_mbit * (gain(draft, from, to, met_mbit, settings) - 1.0);
        let predicted_mbit = if settings.predicts_inner { met_mbit + gained_mbit } else { 0.0 };
        let share = taken.share_of(&capacity);
        let network =
            Amounts { network_mbit: crossing_mbit - split_mbit + predicted_mbit, ..Amounts::ZERO };
        let mut value = if capacity.network_mbit > 0.0 {
            network.network_mbit / capacity.network_mbit
        } else {
            0.0
        };
        for resource in [Resource::Cpu, Resource::Memory, Resource::Disk] {
            if lacks.contains(&resource) {
                value += share[resource].min(SHARE_MAX);
            }
        }
        // What comes inside is faster with the same work for each byte of it as now inside, and without the network's.
        let more_cores =
            settings.network_cores_per_mbit * (split_mbit + gained_mbit - met_mbit).max(0.0);
        Self { value, met_mbit, crossing_mbit, split_mbit, share, more_cores }
    }
}

/// What guests take, network only to the outside, and what they exchange with other guests, Mbit/s.
fn taken_by(draft: &Draft<'_>, unit: &[VmIndex]) -> (Amounts, f64) {
    let cluster = draft.cluster();
    let mut taken = Amounts::ZERO;
    let mut all_mbit = 0.0;
    for vm in unit {
        taken += cluster.vm(*vm).usage;
        let peers = cluster.traffic.peers(*vm).iter();
        all_mbit +=
            peers.filter(|(peer, _)| !unit.contains(peer)).map(|(_, mbit)| mbit).sum::<f64>();
    }
    (taken, all_mbit)
}

/// By how much talk between hosts would grow inside of one: not at all, unless the network throttles it now.
fn gain(
    draft: &Draft<'_>,
    from: HostIndex,
    to: HostIndex,
    met_mbit: f64,
    settings: &IdcSettings,
) -> f64 {
    let is_full = |host| draft.placement().share(host).network_mbit >= THROTTLED;
    let is_throttled = is_full(from)
        || is_full(to)
        || settings.guest_mbit_max.is_some_and(|max| met_mbit >= THROTTLED * max);
    if is_throttled { settings.inner_gain.max(1.0) } else { 1.0 }
}
