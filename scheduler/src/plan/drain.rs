//! Emptying hosts that are to be emptied, whatever the policy.
//!
//! Guests go where those are with whom they talk most, else where there is least to do; the large ones first, as long as
//! there is room for them, those of higher priority last.

use super::draft::Draft;
use super::room::{Outcome, Want};
use super::sandpiper::{by_volume, volume};
use super::words::{Refusals, shares};
use crate::model::{HostIndex, HostState, VmIndex};

/// Share of a destination's network from which on talk with its guests decides.
const TALK_SHARE_MIN: f64 = 0.01;

/// Moves guests away from hosts that are to be emptied, as far as the plan may have more moves.
pub(super) fn drain(draft: &mut Draft<'_>) {
    let cluster = draft.cluster();
    for host in cluster.host_indices() {
        let at = cluster.host(host);
        if at.state != HostState::Draining {
            continue;
        }
        if at.is_migrating {
            draft.note(format!("{} is emptied on when its migrations have ended", at.name));
            continue;
        }
        draft.note_held(host);
        for unit in largest_first(draft, host) {
            if draft.moves_left() < unit.len() {
                let left = draft.placement().guests(host).len();
                draft.note(format!("{}: {left} guests are left for the next plan", at.name));
                break;
            }
            send_away(draft, host, &unit);
        }
    }
}

fn largest_first(draft: &Draft<'_>, host: HostIndex) -> Vec<Vec<VmIndex>> {
    let cluster = draft.cluster();
    let capacity = cluster.host(host).capacity;
    let priority = |unit: &[VmIndex]| unit.iter().map(|vm| cluster.vm(*vm).priority).max();
    let size = |unit: &[VmIndex]| -> f64 {
        unit.iter().map(|vm| volume(&cluster.vm(*vm).peak.share_of(&capacity))).sum()
    };
    let mut units = draft.movable_units(host);
    units.sort_by(|one, other| {
        let by_priority = priority(one).cmp(&priority(other));
        by_priority.then(size(other).total_cmp(&size(one))).then(one.cmp(other))
    });
    units
}

/// Moves guests that belong together to the best host: with room for their peak, or else for what they take now.
fn send_away(draft: &mut Draft<'_>, host: HostIndex, unit: &[VmIndex]) {
    let hosts = by_preference(draft, unit);
    let mut refusals = Refusals::default();
    for want in [Want::Peak, Want::Present] {
        for to in &hosts {
            match draft.admits(unit, *to, want) {
                Ok(outcome) => {
                    let reason = reason(draft, host, unit, *to, want, &outcome);
                    draft.migrate(unit, *to, &reason);
                    return;
                }
                Err(obstacle) if want == Want::Present => refusals.add(obstacle),
                Err(_) => {}
            }
        }
    }
    let (name, at) = (draft.unit_name(unit), draft.host_name(host));
    draft.note(format!("{at} is to be emptied, but {name} cannot leave: {refusals}"));
}

fn by_preference(draft: &Draft<'_>, unit: &[VmIndex]) -> Vec<HostIndex> {
    let cluster = draft.cluster();
    let active = |host: &HostIndex| cluster.host(*host).state == HostState::Active;
    let hosts = by_volume(draft, cluster.host_indices().filter(active).collect());
    let talk = |host: HostIndex| {
        let mbit = draft.talk_mbit(unit, host);
        let least = TALK_SHARE_MIN * cluster.host(host).capacity.network_mbit;
        if mbit >= least { mbit } else { 0.0 }
    };
    let mut ranked: Vec<_> = hosts.into_iter().map(|host| (talk(host), host)).collect();
    ranked.sort_by(|one, other| other.0.total_cmp(&one.0));
    ranked.into_iter().map(|(_, host)| host).collect()
}

fn reason(
    draft: &Draft<'_>,
    host: HostIndex,
    unit: &[VmIndex],
    to: HostIndex,
    want: Want,
    outcome: &Outcome,
) -> String {
    let (name, at, there) = (draft.unit_name(unit), draft.host_name(host), draft.host_name(to));
    let talk_mbit = draft.talk_mbit(unit, to);
    let why = if talk_mbit > 0.0 {
        format!("it talks with guests there ({talk_mbit:.0} Mbit/s)")
    } else {
        format!("it has little to do (volume {:.2})", volume(&draft.placement().share(to)))
    };
    let room = match want {
        Want::Peak => "room for its peak",
        Want::Present => "no host has room for its peak, but this one for what it takes now",
    };
    let then = shares(&outcome.destination.share_of(&draft.cluster().host(to).capacity));
    format!("{at} is to be emptied. {name} goes to {there}: {why}, {room} ({then} then)")
}
