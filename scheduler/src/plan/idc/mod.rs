//! The IDC-aware policy (Liang, master's thesis, NCTU 2009): guests that talk with each other belong on one host, since
//! talk inside of a host (inter-domain communication, IDC) costs no network and is faster.
//!
//! Victim and destination are chosen together: the pair with the largest
//! `V = CPU * C + memory * M + network benefit` (3) that has room, where `C` and `M` are 1 if the host lacks CPU or memory
//! and 0 otherwise; see [`benefit`] for the last term. Ties go to the pair with more traffic between each other, then to
//! the host with least to do. Memory is dealt with before CPU, and first by growth: swapping takes CPU, too.
//!
//! `idc` decides as the thesis. `idc-plus` adds what its author left open, each by its own switch in [`IdcSettings`].

pub mod benefit;

use serde::{Deserialize, Serialize};

use self::benefit::Benefit;
use super::draft::Draft;
use super::hot::Hot;
use super::room::{Outcome, Want};
use super::sandpiper::volume;
use super::words::{Refusals, percent, shares};
use super::{Plan, Policy, Problem, drain};
use crate::model::{Amounts, HostIndex, Obstacle, Resource, VmIndex};

/// Pairs about which a plan says why they were not chosen, for each host.
const REFUSED_NOTES_MAX: usize = 3;

/// What the thesis left open, and figures that it measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IdcSettings {
    /// Talk that a move would take onto the network counts with what it needs, also where the network could not carry it.
    /// In the thesis the ceilings make guests whose talk would be throttled look cheap to move.
    pub counts_need: bool,
    /// Talk that a move would bring inside of the destination is predicted and counts as benefit. In the thesis it only
    /// breaks ties.
    pub predicts_inner: bool,
    /// Room on the destination is judged by what the guest would take there: its peak, the processors' work for talk that
    /// would cross the network then, and for talk that would be faster inside. In the thesis, by what it takes now.
    pub estimates_after: bool,
    /// What one guest's network interface can carry, Mbit/s (`NBmax`); none if it is as fast as its host's.
    pub guest_mbit_max: Option<f64>,
    /// How much faster talk that fills the network gets inside of a host. Table 1.1: 1113.755 for 283.17 Mbit/s.
    pub inner_gain: f64,
    /// Processors kept busy by a Mbit/s of talk across the network, beyond those for the same inside, on each of both
    /// hosts. Table 1.1: (61.7 % - 82.6 % * 283/1114) of a processor for 283 Mbit/s at both ends.
    pub network_cores_per_mbit: f64,
}

impl Default for IdcSettings {
    fn default() -> Self {
        Self {
            counts_need: false,
            predicts_inner: false,
            estimates_after: false,
            guest_mbit_max: None,
            inner_gain: 3.93,
            network_cores_per_mbit: 0.000_72,
        }
    }
}

/// The policy.
#[derive(Debug, Clone)]
pub struct Idc {
    name: &'static str,
    settings: IdcSettings,
}

impl Idc {
    /// As its author describes it.
    #[must_use]
    pub fn as_in_the_thesis() -> Self {
        Self::new("idc", IdcSettings::default())
    }

    /// With everything that its author left open.
    #[must_use]
    pub fn plus() -> Self {
        let settings = IdcSettings {
            counts_need: true,
            predicts_inner: true,
            estimates_after: true,
            ..IdcSettings::default()
        };
        Self::new("idc-plus", settings)
    }

    /// With these settings, under this name.
    #[must_use]
    pub const fn new(name: &'static str, settings: IdcSettings) -> Self {
        Self { name, settings }
    }
}

impl Policy for Idc {
    fn name(&self) -> &'static str {
        self.name
    }

    fn plan(&self, problem: &Problem<'_>) -> Plan {
        let mut draft = match Draft::new(problem) {
            Ok(draft) => draft,
            Err(plan) => return plan,
        };
        for hot in &draft.hot_hosts() {
            self.cure(&mut draft, hot);
        }
        drain::drain(&mut draft);
        draft.finish()
    }
}

/// A victim and a destination.
#[derive(Debug)]
struct Pair<'a> {
    unit: &'a [VmIndex],
    to: HostIndex,
    priority: u8,
    benefit: Benefit,
    /// Volume of the destination.
    load: f64,
}

impl Idc {
    fn cure(&self, draft: &mut Draft<'_>, hot: &Hot<'_>) {
        let at = draft.host_name(hot.host);
        if draft.grow(hot) && draft.pending(hot).iter().all(|left| *left != Resource::Memory) {
            if !draft.pending(hot).is_empty() {
                let lack = draft.lack(hot);
                draft.note(format!("{at}: {lack} waits, since memory that guests lack takes CPU"));
            }
            return;
        }
        draft.note_held(hot.host);
        while !draft.pending(hot).is_empty() {
            if draft.moves_left() == 0 {
                draft.note(format!("{at}: the plan has no moves left"));
                return;
            }
            if !self.move_one(draft, hot) {
                let lack = draft.lack(hot);
                draft.note(format!("{at}: {lack}; no move would help"));
                return;
            }
            draft.grow(hot);
        }
    }

    /// Moves the pair with the largest V that has room. Whether there was one.
    fn move_one(&self, draft: &mut Draft<'_>, hot: &Hot<'_>) -> bool {
        let pending = draft.pending(hot);
        let units = draft.movable_units(hot.host);
        let mut refused = 0;
        let mut refusals = Refusals::default();
        for pair in self.pairs(draft, hot, &pending, &units) {
            match self.admits(draft, &pair) {
                Ok(outcome) if draft.helps(hot.host, &pending, &outcome) => {
                    let reason = self.reason(draft, hot, &pair, &outcome);
                    draft.migrate(pair.unit, pair.to, &reason);
                    return true;
                }
                Ok(_) => refusals.add_words("a guest's leaving would not relieve its host"),
                Err(obstacle) => {
                    if refused < REFUSED_NOTES_MAX {
                        let (name, to) = (draft.unit_name(pair.unit), draft.host_name(pair.to));
                        let value = pair.benefit.value;
                        draft.note(format!(
                            "{name} to {to} (V {value:.3}) was not possible: {obstacle}"
                        ));
                    }
                    refused += 1;
                    refusals.add(obstacle);
                }
            }
        }
        draft.note(format!(
            "{}: none of its guests can leave: {refusals}",
            draft.host_name(hot.host)
        ));
        false
    }

    /// All pairs, the one to take first.
    fn pairs<'u>(
        &self,
        draft: &Draft<'_>,
        hot: &Hot<'_>,
        pending: &[Resource],
        units: &'u [Vec<VmIndex>],
    ) -> Vec<Pair<'u>> {
        let cluster = draft.cluster();
        let load = |host: HostIndex| (host, volume(&draft.placement().share(host)));
        let hosts: Vec<_> = draft.destinations().into_iter().map(load).collect();
        let mut pairs = vec![];
        for unit in units.iter().filter(|unit| unit.len() <= draft.moves_left()) {
            let priority = unit.iter().map(|vm| cluster.vm(*vm).priority).max().unwrap_or_default();
            for (to, load) in &hosts {
                let benefit = Benefit::of(draft, hot.host, pending, unit, *to, &self.settings);
                pairs.push(Pair { unit, to: *to, priority, benefit, load: *load });
            }
        }
        pairs.sort_by(|one, other| {
            let (one_is, other_is) = (&one.benefit, &other.benefit);
            one.priority
                .cmp(&other.priority)
                .then(other_is.value.total_cmp(&one_is.value))
                .then(other_is.met_mbit.total_cmp(&one_is.met_mbit))
                .then(other_is.crossing_mbit.total_cmp(&one_is.crossing_mbit))
                .then(one.load.total_cmp(&other.load))
                .then(one.unit.cmp(other.unit))
                .then(one.to.cmp(&other.to))
        });
        pairs
    }

    fn admits(&self, draft: &mut Draft<'_>, pair: &Pair<'_>) -> Result<Outcome, Obstacle> {
        if !self.settings.estimates_after {
            return draft.admits(pair.unit, pair.to, Want::Present);
        }
        let mut outcome = draft.admits(pair.unit, pair.to, Want::Peak)?;
        outcome.destination.cpu_cores += pair.benefit.more_cores;
        if outcome.destination.cpu_cores <= draft.limit(pair.to).cpu_cores {
            Ok(outcome)
        } else {
            Err(Obstacle::Room(Resource::Cpu))
        }
    }

    fn reason(
        &self,
        draft: &Draft<'_>,
        hot: &Hot<'_>,
        pair: &Pair<'_>,
        outcome: &Outcome,
    ) -> String {
        let (at, there) = (draft.host_name(hot.host), draft.host_name(pair.to));
        let (name, lack) = (draft.unit_name(pair.unit), draft.lack(hot));
        let Benefit { value, met_mbit, crossing_mbit, split_mbit, share, .. } = pair.benefit;
        let talk = if met_mbit > 0.0 {
            format!(
                "it talks with guests there ({met_mbit:.0} Mbit/s, which no longer cross the network)"
            )
        } else {
            format!("the host with least to do (volume {:.2})", pair.load)
        };
        let network_share =
            (crossing_mbit - split_mbit) / draft.cluster().host(hot.host).capacity.network_mbit;
        let then = outcome.destination.share_of(&draft.cluster().host(pair.to).capacity);
        format!(
            "{at} has {lack}. {name} to {there} has the largest V with room ({value:.3}: {}, network benefit {} of \
             {crossing_mbit:.0} Mbit/s that leave and {split_mbit:.0} that would be torn apart); {talk} ({} then)",
            taken(&share),
            percent(network_share),
            shares(&then),
        )
    }
}

/// What a guest takes of CPU and memory.
fn taken(share: &Amounts) -> String {
    format!("CPU {}, memory {}", percent(share.cpu_cores), percent(share.memory_mib))
}
