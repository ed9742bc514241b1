//! Clusters by seed: hosts that are alike, guests of many sizes on hosts by chance, some in groups that talk; daily
//! patterns, bursts of single guests, flash crowds upon groups, memory needs that grow.
//!
//! Everything is drawn in a fixed order, so that a seed always gives the same cluster. Changes come at whole multiples of
//! [`GRID_S`]: what happens at once is worked out once.

use super::build::{machine, silent};
use super::file::{GeneratePart, HostKind, HostPart};
use crate::model::HostState;
use crate::simulate::random::Random;
use crate::simulate::world::{Change, Daily, Flow, Guest, Service, What, World};

/// Changes come at multiples of this.
const GRID_S: f64 = 5.0;

/// A day.
const DAY_S: f64 = 86_400.0;

/// Memory of a host that guests have at first, at most.
const FILLED_MAX: f64 = 0.85;

/// A time in which there is more to do.
struct Surge {
    from_s: f64,
    until_s: f64,
    factor: f64,
}

/// The world of a seed.
pub(super) fn world(part: &GeneratePart, duration_s: f64, seed: u64) -> World {
    let mut random = Random::new(seed);
    let mut world = World::default();
    for at in 0..part.hosts {
        world.machines.push(machine(&host(at)));
    }
    let mut room: Vec<f64> =
        world.machines.iter().map(|machine| machine.capacity.memory_mib * FILLED_MAX).collect();
    while world.guests.len() < part.vms {
        let left = part.vms - world.guests.len();
        let size = if random.unit() < part.grouped {
            (2 + random.below(part.group_size_max - 1)).min(left)
        } else {
            1
        };
        group(part, &mut world, &mut room, &mut random, size);
    }
    scale(part, &mut world);
    surges(part, &mut world, &mut random, duration_s);
    memory(part, &mut world, &mut random, duration_s);
    world.seal()
}

fn host(at: usize) -> HostPart {
    HostPart {
        name: format!("host-{at:03}"),
        kind: HostKind::Server,
        cpu_cores: None,
        memory_mib: None,
        network_mbit: None,
        receive_mbit: None,
        disk_mib: None,
        own_cpu_cores: None,
        own_memory_mib: None,
        state: HostState::Active,
    }
}

/// Guests that answer together, each of which talks to the next.
fn group(
    part: &GeneratePart,
    world: &mut World,
    room: &mut [f64],
    random: &mut Random,
    size: usize,
) {
    let first = world.guests.len();
    let service = world.services.len();
    let is_together = size > 1 && random.unit() < part.together;
    let daily = Daily {
        amplitude: part.daily * random.between(0.5, 1.0),
        period_s: DAY_S,
        phase_s: DAY_S * random.unit(),
    };
    let mut host = None;
    for at in first..first + size {
        let mut guest = guest(part, random, at, service, daily);
        let wanted = host.filter(|host| is_together && has_room(room, *host, guest.allocated_mib));
        let chosen = wanted.unwrap_or_else(|| place(room, random, guest.allocated_mib));
        // Where there is no room at all, the guest begins smaller.
        let left = room.get_mut(chosen);
        if let Some(left) = left {
            guest.allocated_mib = guest.allocated_mib.min(left.max(1.0));
            *left -= guest.allocated_mib;
        }
        guest.host = chosen;
        host = Some(chosen);
        if at > first {
            let mbit = random.log_normal(part.talk_mbit, 0.8).min(20.0 * part.talk_mbit);
            let (one, other) = (at - 1, at);
            world.flows.push(Flow { one, other, mbit, sent: 0.5, is_elastic: false });
        }
        world.guests.push(guest);
    }
    let users = world.guests.iter().skip(first).map(|guest| guest.cpu_cores).sum::<f64>() * 40.0;
    world.services.push(Service {
        users,
        base_ms: 20.0,
        talk_ms: if size > 1 { 20.0 } else { 0.0 },
        think_s: 5.0,
        ..silent(format!("group-{service}"))
    });
}

fn has_room(room: &[f64], host: usize, memory_mib: f64) -> bool {
    room.get(host).is_some_and(|left| *left >= memory_mib)
}

/// A host by chance that has the room; the emptiest one if some draws find none.
fn place(room: &[f64], random: &mut Random, memory_mib: f64) -> usize {
    for _ in 0..16 {
        let host = random.below(room.len());
        if has_room(room, host, memory_mib) {
            return host;
        }
    }
    let emptiest = room.iter().enumerate().max_by(|one, other| one.1.total_cmp(other.1));
    emptiest.map_or(0, |(host, _)| host)
}

fn guest(
    part: &GeneratePart,
    random: &mut Random,
    at: usize,
    service: usize,
    daily: Daily,
) -> Guest {
    let vcpus = [1, 2, 2, 4, 4, 8].get(random.below(6)).copied().unwrap_or(2);
    let allocated_mib =
        [2048.0, 4096.0, 4096.0, 8192.0].get(random.below(4)).copied().unwrap_or(4096.0);
    let needed_mib = allocated_mib * random.between(0.4, 0.9);
    Guest {
        name: format!("vm-{at:04}"),
        host: 0,
        vcpus,
        // Scaled when all are known.
        cpu_cores: f64::from(vcpus) * random.log_normal(0.25, 0.5).min(0.7),
        outside_mbit: random.log_normal(20.0, 1.0).min(400.0),
        outside_sent: random.between(0.3, 0.9),
        disk_mib: random.log_normal(5.0, 1.0).min(100.0),
        dirty_mib_per_s: random.log_normal(10.0, 1.0).min(300.0),
        allocated_mib,
        needed_mib,
        cache_mib: random.between(0.0, 0.2) * allocated_mib,
        reserve_mib: 256.0,
        max_mib: allocated_mib * 1.5,
        priority: 0,
        daily,
        noise: part.noise,
        service,
    }
}

/// So that all guests want the share of all hosts' CPU that the file says.
fn scale(part: &GeneratePart, world: &mut World) {
    let has: f64 = world.machines.iter().map(|machine| machine.capacity.cpu_cores).sum();
    let wants: f64 = world.guests.iter().map(|guest| guest.cpu_cores).sum();
    let factor = if wants > 0.0 { has * part.cpu_share / wants } else { 1.0 };
    for guest in &mut world.guests {
        guest.cpu_cores = (guest.cpu_cores * factor).min(f64::from(guest.vcpus));
    }
}

/// Bursts of one guest.
fn bursts(part: &GeneratePart, random: &mut Random, duration_s: f64) -> Vec<Surge> {
    let mut bursts = vec![];
    if part.bursts_per_day <= 0.0 {
        return bursts;
    }
    let mut at_s = 0.0;
    loop {
        at_s += random.exponential(DAY_S / part.bursts_per_day).max(GRID_S);
        if at_s >= duration_s {
            return bursts;
        }
        let lasts_s = random.between(0.05, 1.0) * part.burst_s_max;
        let factor = random.between(1.0, part.burst_factor_max);
        bursts.push(Surge { from_s: at_s, until_s: at_s + lasts_s, factor });
        at_s += lasts_s;
    }
}

/// Bursts of guests, and crowds upon groups.
fn surges(part: &GeneratePart, world: &mut World, random: &mut Random, duration_s: f64) {
    let mut surges: Vec<Vec<Surge>> =
        (0..world.guests.len()).map(|_| bursts(part, random, duration_s)).collect();
    let mut members = vec![vec![]; world.services.len()];
    for (at, guest) in world.guests.iter().enumerate() {
        if let Some(members) = members.get_mut(guest.service) {
            members.push(at);
        }
    }
    let mut at_s = 0.0;
    while part.crowds_per_day > 0.0 && !world.services.is_empty() {
        at_s += random.exponential(DAY_S / part.crowds_per_day).max(0.1);
        if at_s >= duration_s {
            break;
        }
        let service = random.below(world.services.len());
        let lasts_s = random.between(600.0, 3600.0);
        for guest in members.get(service).into_iter().flatten() {
            if let Some(own) = surges.get_mut(*guest) {
                own.extend(crowd(part, at_s, lasts_s));
            }
        }
    }
    for (guest, own) in surges.iter().enumerate() {
        factors(&mut world.changes, guest, own);
    }
}

/// It comes within two minutes, stays, and goes in two steps.
fn crowd(part: &GeneratePart, at_s: f64, lasts_s: f64) -> [Surge; 3] {
    let root = part.crowd_factor.cbrt();
    let surge = |late_s: f64, early_s: f64| Surge {
        from_s: at_s + late_s,
        until_s: at_s + lasts_s - early_s,
        factor: root,
    };
    [surge(0.0, 0.0), surge(60.0, 60.0), surge(120.0, 180.0)]
}

/// The level at every time at which it changes.
fn factors(changes: &mut Vec<Change>, guest: usize, surges: &[Surge]) {
    let grid = |at_s: f64| (at_s / GRID_S).round() * GRID_S;
    let mut edges: Vec<f64> =
        surges.iter().flat_map(|surge| [grid(surge.from_s), grid(surge.until_s)]).collect();
    edges.sort_by(f64::total_cmp);
    edges.dedup();
    for at_s in edges {
        let active =
            surges.iter().filter(|surge| (grid(surge.from_s)..grid(surge.until_s)).contains(&at_s));
        let factor = active.map(|surge| surge.factor).product();
        changes.push(Change { at_s, guest, what: What::Factor(factor) });
    }
}

/// Needs that grow over half an hour.
fn memory(part: &GeneratePart, world: &mut World, random: &mut Random, duration_s: f64) {
    const STEPS: u32 = 30;
    for (at, guest) in world.guests.iter().enumerate() {
        if random.unit() >= part.memory_grows {
            continue;
        }
        let from_s = random.unit() * duration_s;
        let end_mib = guest.allocated_mib * random.between(1.0, 1.3);
        for step in 1..=STEPS {
            let share = f64::from(step) / f64::from(STEPS);
            let at_s = ((from_s + 1800.0 * share) / GRID_S).round() * GRID_S;
            let mib = guest.needed_mib + (end_mib - guest.needed_mib) * share;
            world.changes.push(Change { at_s, guest: at, what: What::Needs(mib) });
        }
    }
}
