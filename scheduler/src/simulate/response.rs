//! How long users wait; the model is told in [`super::calibration`].

use super::calibration::{SWAP_MS, TALK_RATIO};
use super::moment::{Moment, Settings};
use super::world::{Service, World};

/// A busier host's queue is not longer: from there on it is the closed loop that tells what users wait.
const SHARE_MAX: f64 = 0.95;

/// Work that is not done at all would be waited for without end.
const DONE_MIN: f64 = 0.02;

/// A service at a moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Response {
    /// From a request to its response.
    pub(super) response_ms: f64,
    /// Requests that are answered in a second.
    pub(super) requests_per_s: f64,
}

/// By how much work takes longer on a host of which such a share of the CPU is in use.
fn stretch(share: f64, threads: f64) -> f64 {
    1.0 / (1.0 - share.clamp(0.0, SHARE_MAX).powf(threads.clamp(1.0, 64.0)))
}

/// What users of a service see; `None` where nobody waits.
pub(super) fn response(
    world: &World,
    service: &Service,
    moment: &Moment,
    now: &Settings,
) -> Option<Response> {
    if service.users <= 0.0 || service.guests.is_empty() {
        return None;
    }
    let work: f64 = service.guests.iter().map(|guest| world.guests[*guest].cpu_cores).sum();
    let (mut cpu_ms, mut done, mut missing, mut level) = (0.0, 1.0_f64, 0.0_f64, 0.0);
    for at in &service.guests {
        let (guest, machine) = (&moment.guests[*at], &world.machines[now.at[*at]]);
        let part = if work > 0.0 {
            world.guests[*at].cpu_cores / work
        } else {
            1.0 / service.guests.len() as f64
        };
        let share = moment.hosts[now.at[*at]].used.cpu_cores / machine.capacity.cpu_cores.max(1e-9);
        cpu_ms += service.base_ms * part * stretch(share, machine.threads);
        done = done.min(guest.done);
        missing = missing.max(guest.missing);
        level += now.level[*at] * now.factor[*at] / service.guests.len() as f64;
    }
    let think_ms = service.think_s * 1000.0;
    let done = done.max(DONE_MIN);
    let waits_ms = (think_ms + service.base_ms) * (1.0 - done) / done;
    let response_ms = cpu_ms + talk_ms(world, service, moment, now) + waits_ms + SWAP_MS * missing;
    let users = service.users * level;
    Some(Response {
        response_ms,
        requests_per_s: users * 1000.0 / (think_ms + response_ms).max(1.0),
    })
}

/// What its guests say to each other for a response, by where they are.
fn talk_ms(world: &World, service: &Service, moment: &Moment, now: &Settings) -> f64 {
    let total: f64 = service.flows.iter().map(|flow| world.flows[*flow].mbit).sum();
    if total <= 0.0 {
        return 0.0;
    }
    let mut slow = 0.0;
    for at in &service.flows {
        let flow = &world.flows[*at];
        let (one, other) = (now.at[flow.one], now.at[flow.other]);
        let factor = if one == other {
            1.0 / TALK_RATIO
        } else {
            let busy = |host: usize| {
                let has = world.machines[host].capacity.network_mbit.max(1e-9);
                (moment.hosts[host].used.network_mbit / has).clamp(0.0, SHARE_MAX)
            };
            1.0 / (1.0 - busy(one).max(busy(other)))
        };
        slow += flow.mbit / total * factor;
    }
    service.talk_ms * slow
}
