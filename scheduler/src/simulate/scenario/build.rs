//! A world out of a file's hosts and guests.

use std::collections::HashMap;

use super::file::{BulkRole, File, HostKind, HostPart, VmPart, WebRole, Work};
use crate::model::{Amounts, Rules, VmIndex};
use crate::simulate::calibration::{
    IDC_MBIT, LINE_MBIT, OWN_CORES, RECEIVE_MBIT, THINK_S, THREADS, WEB_BASE_MS,
    WEB_DATABASE_CORES, WEB_OUTSIDE_MBIT, WEB_SENT, WEB_SERVER_CORES, WEB_TALK_MBIT, WEB_TALK_MS,
};
use crate::simulate::world::{Change, Daily, Flow, Guest, Machine, Service, What, World};

/// Share of the talk of a web service that the database sends.
const DATABASE_SENDS: f64 = 0.8;

/// A host of a kind, with what the file says otherwise.
pub(super) fn machine(part: &HostPart) -> Machine {
    let (cpu_cores, memory_mib, network_mbit, receive_mbit, own_cores, threads, speed) =
        match part.kind {
            HostKind::Server => (16.0, 65536.0, 10_000.0, 10_000.0, 0.5, 16.0, 10.0),
            HostKind::Pentium4 => (1.0, 1502.0, LINE_MBIT, RECEIVE_MBIT, OWN_CORES, THREADS, 1.0),
        };
    let cores = part.cpu_cores.unwrap_or(cpu_cores);
    let network_mbit = part.network_mbit.unwrap_or(network_mbit);
    Machine {
        name: part.name.clone(),
        capacity: Amounts {
            cpu_cores: cores,
            memory_mib: part.memory_mib.unwrap_or(memory_mib),
            network_mbit,
            disk_mib: part.disk_mib.unwrap_or(500.0),
        },
        own: Amounts {
            cpu_cores: part.own_cpu_cores.unwrap_or(own_cores),
            memory_mib: part.own_memory_mib.unwrap_or(0.0),
            ..Amounts::ZERO
        },
        receive_mbit: part.receive_mbit.unwrap_or(receive_mbit).min(network_mbit),
        threads: threads * cores / cpu_cores,
        speed,
        state: part.state,
    }
}

/// The world of a file's tables.
pub(super) fn world(file: &File) -> World {
    let mut world = World { machines: file.host.iter().map(machine).collect(), ..World::default() };
    let hosts: HashMap<_, _> = (0..).zip(&file.host).map(|(at, part)| (&part.name, at)).collect();
    let vms: HashMap<_, _> = (0..).zip(&file.vm).map(|(at, part)| (&part.name, at)).collect();
    let mut services: HashMap<String, usize> = HashMap::new();
    for (at, part) in file.vm.iter().enumerate() {
        let name = part.group.clone().unwrap_or_else(|| part.name.clone());
        let service = *services.entry(name.clone()).or_insert_with(|| {
            world.services.push(silent(name));
            world.services.len() - 1
        });
        let host = hosts.get(&part.host).copied().unwrap_or(0);
        world.guests.push(guest(part, host, service));
        if let Some(service) = world.services.get_mut(service) {
            users(service, &part.work);
        }
        changes(&mut world.changes, at, part);
    }
    pairs(file, &mut world);
    for talk in &file.talk {
        let ends = (vms.get(&talk.between.0), vms.get(&talk.between.1));
        if let (Some(one), Some(other)) = ends {
            join(&mut world.flows, (*one, *other), talk.mbit, 0.5, talk.elastic);
        }
    }
    world.seal()
}

/// A service that nobody waits for.
pub(super) const fn silent(name: String) -> Service {
    Service {
        name,
        guests: vec![],
        flows: vec![],
        users: 0.0,
        base_ms: WEB_BASE_MS,
        talk_ms: WEB_TALK_MS,
        think_s: THINK_S,
    }
}

fn users(service: &mut Service, work: &Work) {
    match work {
        // The users of a service are those of its server; a database alone has none.
        Work::Web { role: WebRole::Server | WebRole::Both, sessions } => service.users += sessions,
        Work::Plain { users, .. } => service.users += users,
        Work::Web { .. } | Work::Bulk { .. } => {}
    }
}

fn guest(part: &VmPart, host: usize, service: usize) -> Guest {
    let (cpu_cores, outside_mbit, outside_sent, disk_mib) = match part.work {
        Work::Web { role, sessions } => {
            let (cores, outside_mbit) = match role {
                WebRole::Server => (WEB_SERVER_CORES, WEB_OUTSIDE_MBIT),
                WebRole::Database => (WEB_DATABASE_CORES, 0.0),
                WebRole::Both => (WEB_SERVER_CORES + WEB_DATABASE_CORES, WEB_OUTSIDE_MBIT),
            };
            (sessions * cores, sessions * outside_mbit, WEB_SENT, 0.0)
        }
        Work::Bulk { .. } => (0.0, 0.0, 0.5, 0.0),
        Work::Plain { cpu_cores, outside_mbit, disk_mib, .. } => {
            (cpu_cores, outside_mbit, 0.5, disk_mib)
        }
    };
    Guest {
        name: part.name.clone(),
        host,
        vcpus: part.vcpus,
        cpu_cores,
        outside_mbit,
        outside_sent,
        disk_mib,
        dirty_mib_per_s: part.dirty_mib_per_s,
        allocated_mib: part.memory_mib,
        needed_mib: part.needs_mib.unwrap_or(part.memory_mib * 0.6),
        cache_mib: part.cache_mib,
        reserve_mib: part.reserve_mib.unwrap_or(part.memory_mib / 4.0),
        max_mib: part.max_mib.unwrap_or(part.memory_mib * 4.0),
        priority: part.priority,
        daily: Daily::default(),
        noise: part.noise,
        service,
    }
}

fn changes(changes: &mut Vec<Change>, guest: usize, part: &VmPart) {
    let levels = part.levels.iter().map(|(at_s, factor)| (at_s, What::Factor(*factor)));
    let needs = part.needs.iter().map(|(at_s, mib)| (at_s, What::Needs(*mib)));
    changes.extend(levels.chain(needs).map(|(at_s, what)| Change { at_s: *at_s, guest, what }));
}

/// Servers talk to the databases of their group, bulk clients to their servers.
fn pairs(file: &File, world: &mut World) {
    for (one, from) in file.vm.iter().enumerate() {
        for (other, to) in file.vm.iter().enumerate() {
            if from.group.is_none() || from.group != to.group {
                continue;
            }
            match (&from.work, &to.work) {
                (
                    Work::Web { role: WebRole::Database, sessions },
                    Work::Web { role: WebRole::Server, .. },
                ) => {
                    let mbit = sessions * WEB_TALK_MBIT;
                    join(&mut world.flows, (one, other), mbit, DATABASE_SENDS, false);
                }
                (Work::Bulk { role: BulkRole::Client }, Work::Bulk { role: BulkRole::Server }) => {
                    join(&mut world.flows, (one, other), IDC_MBIT, 1.0, true);
                }
                _ => {}
            }
        }
    }
}

/// At most one flow between two guests.
pub(super) fn join(
    flows: &mut Vec<Flow>,
    (one, other): (usize, usize),
    mbit: f64,
    sent: f64,
    is_elastic: bool,
) {
    let same = |flow: &&mut Flow| {
        (flow.one, flow.other) == (one, other) || (flow.one, flow.other) == (other, one)
    };
    match flows.iter_mut().find(same) {
        Some(flow) => {
            flow.mbit += mbit;
            flow.is_elastic |= is_elastic;
        }
        None => flows.push(Flow { one, other, mbit, sent, is_elastic }),
    }
}

/// The rules of a file.
pub(super) fn rules(file: &File) -> Rules {
    let vms: HashMap<_, _> =
        (0..).zip(&file.vm).map(|(at, part)| (&part.name, VmIndex(at))).collect();
    let indices =
        |names: &Vec<String>| names.iter().filter_map(|name| vms.get(name).copied()).collect();
    Rules {
        pinned: indices(&file.rules.pinned),
        together: file.rules.together.iter().map(indices).collect(),
        apart: file.rules.apart.iter().map(indices).collect(),
        only_on: HashMap::new(),
    }
}
