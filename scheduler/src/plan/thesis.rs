//! The five scenarios of the IDC thesis (4.2), each at the moments at which something is decided: victim and destination
//! have to be those of the thesis, for its policy and for Sandpiper.
//!
//! Memory, sessions and places are those of tables 4.2 to 4.6. The thesis prints no figures for single guests; those here
//! keep to what its text rests on: a server tier takes more CPU than its database, guests with more sessions more than those
//! with fewer, `VM1 has higher CPU utilization and network traffic to VM2`, and a network that carries 300 Mbit/s (table
//! 1.1).

use super::{Action, Hotspot, Limits, Plan, Problem, policy};
use crate::model::{Amounts, Cluster, Host, HostIndex, HostState, Memory, Resource, Vm, VmIndex};

/// What a session exchanges with its client, and the two tiers for it, Mbit/s.
const CLIENT_MBIT: f64 = 0.5;
const TIERS_MBIT: f64 = 0.6;

/// Testbed nodes; of their memory, 34 MiB are the graphics card's.
fn lab(hosts: usize, memory_mib: f64) -> Cluster {
    let capacity = Amounts {
        cpu_cores: 1.0,
        memory_mib: memory_mib - 34.0,
        network_mbit: 300.0,
        disk_mib: 50.0,
    };
    let own = Amounts { cpu_cores: 0.02, memory_mib: 512.0, ..Amounts::ZERO };
    let host = |index| Host {
        name: format!("PM{}", index + 1),
        capacity,
        own,
        state: HostState::Active,
        is_migrating: false,
    };
    Cluster { hosts: (0..hosts).map(host).collect(), ..Cluster::default() }
}

/// Adds a guest that serves so many sessions' clients, on the host of that number, counted from 1.
fn add(cluster: &mut Cluster, host: usize, memory_mib: f64, cpu_cores: f64, sessions: f64) {
    let usage =
        Amounts { cpu_cores, memory_mib, network_mbit: sessions * CLIENT_MBIT, ..Amounts::ZERO };
    cluster.vms.push(Vm {
        name: format!("VM{}", cluster.vms.len() + 1),
        host: HostIndex(host - 1),
        vcpus: 1,
        usage,
        peak: usage,
        steal: 0.0,
        memory: Memory {
            allocated_mib: memory_mib,
            used_mib: memory_mib * 0.9,
            needed_mib: memory_mib * 0.7,
            reserve_mib: 32.0,
            max_mib: 512.0,
            swap_writes_per_s: 0.0,
        },
        gray_box: None,
        dirty_mib_per_s: 1.0,
        sampled: None,
        priority: 0,
        is_migrating: false,
        last_move: None,
    });
}

/// Guests, counted from 1, that exchange so much.
fn talk(cluster: &mut Cluster, one: usize, other: usize, mbit: f64) {
    cluster.traffic.set(VmIndex(one - 1), VmIndex(other - 1), mbit);
}

fn hot(host: usize, vm: Option<usize>, resource: Resource) -> Hotspot {
    let (current, threshold) =
        if resource == Resource::Memory { (200.0, 150.0) } else { (0.95, 0.85) };
    Hotspot {
        host: HostIndex(host - 1),
        vm: vm.map(|vm| VmIndex(vm - 1)),
        resource,
        current,
        predicted: current,
        threshold,
        since_s: 0.0,
        why: String::new(),
    }
}

/// The thesis gives memory until there is none.
fn limits() -> Limits {
    let mut limits = Limits::default();
    limits.share_max.memory_mib = 1.0;
    limits
}

fn plan(name: &str, cluster: &Cluster, hotspots: &[Hotspot]) -> Plan {
    let limits = limits();
    let problem = Problem { cluster, hotspots, limits: &limits, now_s: 1000.0 };
    policy(name).expect("A policy").plan(&problem)
}

/// The steps, as `VM1>PM2` and `VM1=96`.
fn steps(plan: &Plan) -> Vec<String> {
    let words = |action: &Action| match action {
        Action::Migrate { vm, to, .. } => format!("VM{}>PM{}", vm.0 + 1, to.0 + 1),
        Action::Resize { vm, to_mib, .. } => format!("VM{}={to_mib}", vm.0 + 1),
    };
    plan.steps.iter().map(|step| words(&step.action)).collect()
}

fn assert_steps(name: &str, cluster: &Cluster, hotspots: &[Hotspot], expected: &[&str]) {
    let plan = plan(name, cluster, hotspots);
    assert_eq!(steps(&plan), expected, "{name}: {plan:#?}");
    for (one, next) in plan.steps.iter().zip(plan.steps.iter().skip(1)) {
        assert!(one.wave < next.wave, "What needs freed memory waits: {plan:#?}");
    }
}

/// Table 4.2.
fn isolated() -> Cluster {
    let mut cluster = lab(3, 2048.0);
    let guests = [(1, 0.33, 55.0), (1, 0.11, 0.0), (1, 0.25, 50.0), (1, 0.30, 60.0)];
    for (host, cpu_cores, sessions) in guests {
        add(&mut cluster, host, 256.0, cpu_cores, sessions);
    }
    for (host, cpu_cores, sessions) in [(2, 0.11, 0.0), (2, 0.50, 100.0), (3, 0.33, 55.0)] {
        add(&mut cluster, host, 256.0, cpu_cores, sessions);
    }
    talk(&mut cluster, 1, 2, 55.0 * TIERS_MBIT);
    talk(&mut cluster, 5, 7, 55.0 * TIERS_MBIT);
    cluster
}

#[test]
fn an_isolated_guest_leaves_rather_than_half_of_a_group() {
    let spots = [hot(1, None, Resource::Cpu)];
    assert_steps("sandpiper", &isolated(), &spots, &["VM1>PM3"]);
    assert_steps("idc", &isolated(), &spots, &["VM4>PM3"]);
    assert_steps("idc-plus", &isolated(), &spots, &["VM4>PM3"]);
}

#[test]
fn reasons_name_the_figures_that_decided() {
    let spots = [hot(1, None, Resource::Cpu)];
    let reason = |name| plan(name, &isolated(), &spots).steps[0].reason.clone();
    for (name, words) in [
        (
            "sandpiper",
            ["PM1 has too little CPU (101 % taken, 85 % may be)", "VSR 8.57", "volume (3.11)"],
        ),
        ("idc", ["VM4 to PM3", "V with room (0.400: CPU 30 %", "30 Mbit/s that leave and 0"]),
        ("drs", ["PM1 has too little CPU", "benefit", "opportunity cost"]),
    ] {
        for words in words {
            assert!(reason(name).contains(words), "{name}: {words:?} in {}", reason(name));
        }
    }
}

/// Table 4.3.
#[test]
fn a_group_is_reunited() {
    let mut cluster = lab(2, 2048.0);
    for (host, cpu_cores, sessions) in
        [(1, 0.42, 85.0), (1, 0.14, 0.0), (1, 0.40, 80.0), (2, 0.13, 0.0)]
    {
        add(&mut cluster, host, 256.0, cpu_cores, sessions);
    }
    talk(&mut cluster, 1, 2, 85.0 * TIERS_MBIT);
    talk(&mut cluster, 3, 4, 80.0 * TIERS_MBIT);
    let spots = [hot(1, None, Resource::Cpu)];
    assert_steps("sandpiper", &cluster, &spots, &["VM1>PM2"]);
    assert_steps("idc", &cluster, &spots, &["VM3>PM2"]);
    assert_steps("idc-plus", &cluster, &spots, &["VM3>PM2"]);
}

/// Table 4.4: 478 MiB are left for guests.
fn memory(first_mib: f64) -> Cluster {
    let mut cluster = lab(2, 1024.0);
    for (host, memory_mib, cpu_cores, sessions) in [
        (1, first_mib, 0.30, 70.0),
        (1, 192.0, 0.10, 0.0),
        (1, 160.0, 0.28, 70.0),
        (2, 192.0, 0.10, 0.0),
    ] {
        add(&mut cluster, host, memory_mib, cpu_cores, sessions);
    }
    talk(&mut cluster, 1, 2, 70.0 * TIERS_MBIT);
    talk(&mut cluster, 3, 4, 70.0 * TIERS_MBIT);
    cluster.vms[0].memory.swap_writes_per_s = 200.0;
    cluster
}

#[test]
fn memory_is_given_first_and_guests_move_when_there_is_none() {
    // Whether the detector names the guest or its host.
    for vm in [Some(1), None] {
        let spots = [hot(1, vm, Resource::Memory)];
        for name in ["sandpiper", "idc", "idc-plus"] {
            assert_steps(name, &memory(64.0), &spots, &["VM1=96"]);
        }
        assert_steps("sandpiper", &memory(96.0), &spots, &["VM1>PM2", "VM1=128"]);
        assert_steps("idc", &memory(96.0), &spots, &["VM3>PM2", "VM1=128"]);
        assert_steps("idc-plus", &memory(96.0), &spots, &["VM3>PM2", "VM1=128"]);
    }
}

/// Table 4.5.
#[test]
fn of_two_hosts_with_room_the_one_with_the_peer_is_taken() {
    let mut cluster = lab(4, 2048.0);
    for host in [1, 1, 1, 2, 2, 3] {
        add(&mut cluster, host, 256.0, 0.15, 0.0);
    }
    // Two pairs share PM2's interface; the third has PM3's for itself.
    for (one, other, mbit) in [(1, 4, 75.0), (2, 5, 75.0), (3, 6, 120.0)] {
        talk(&mut cluster, one, other, mbit);
    }
    let spots = [hot(1, None, Resource::Network)];
    assert_steps("sandpiper", &cluster, &spots, &["VM3>PM4"]);
    assert_steps("idc", &cluster, &spots, &["VM3>PM3"]);
    assert_steps("idc-plus", &cluster, &spots, &["VM3>PM3"]);
}

/// Table 4.6, with CPU figures of VM2 to VM5 at that moment.
fn several(cpu_cores: [f64; 4]) -> Cluster {
    let mut cluster = lab(3, 1024.0);
    let [second, third, fourth, fifth] = cpu_cores;
    for (host, memory_mib, cpu_cores, sessions) in [
        (1, 192.0, 0.10, 0.0),
        (2, 64.0, second, 70.0),
        (2, 96.0, third, 0.0),
        (2, 128.0, fourth, 70.0),
        (2, 128.0, fifth, 65.0),
        (3, 192.0, 0.10, 0.0),
    ] {
        add(&mut cluster, host, memory_mib, cpu_cores, sessions);
    }
    talk(&mut cluster, 1, 4, 70.0 * TIERS_MBIT);
    talk(&mut cluster, 2, 3, 70.0 * TIERS_MBIT);
    talk(&mut cluster, 5, 6, 65.0 * TIERS_MBIT);
    cluster
}

fn give(cluster: &mut Cluster, vm: usize, memory_mib: f64) {
    let guest = &mut cluster.vms[vm - 1];
    guest.usage.memory_mib = memory_mib;
    guest.peak.memory_mib = memory_mib;
    guest.memory.allocated_mib = memory_mib;
}

#[test]
fn several_overloads_are_solved_in_the_order_of_the_thesis() {
    for name in ["idc", "idc-plus"] {
        // 80 s: memory.
        let mut cluster = several([0.20, 0.07, 0.19, 0.18]);
        cluster.vms[1].memory.swap_writes_per_s = 200.0;
        assert_steps(name, &cluster, &[hot(2, Some(2), Resource::Memory)], &["VM2=96"]);
        // 130 s: CPU.
        let mut cluster = several([0.30, 0.10, 0.28, 0.26]);
        give(&mut cluster, 2, 96.0);
        assert_steps(name, &cluster, &[hot(2, None, Resource::Cpu)], &["VM4>PM1"]);
        // Then both: memory first, and CPU waits.
        let mut cluster = several([0.42, 0.14, 0.28, 0.36]);
        cluster.vms[3].host = HostIndex(0);
        let both = [hot(2, None, Resource::Cpu), hot(2, Some(2), Resource::Memory)];
        for has_mib in [96.0, 128.0, 160.0] {
            give(&mut cluster, 2, has_mib);
            cluster.vms[1].memory.swap_writes_per_s = 200.0;
            assert_steps(name, &cluster, &both, &[&format!("VM2={}", has_mib + 32.0)]);
        }
        // 210 s: CPU is left.
        give(&mut cluster, 2, 192.0);
        cluster.vms[1].memory.swap_writes_per_s = 0.0;
        assert_steps(name, &cluster, &[hot(2, None, Resource::Cpu)], &["VM5>PM3"]);
        // Those who moved grow where they are now.
        cluster.vms[4].host = HostIndex(2);
        let grow = [hot(1, Some(4), Resource::Memory), hot(3, Some(5), Resource::Memory)];
        assert_eq!(steps(&plan(name, &cluster, &grow)), ["VM4=160", "VM5=160"]);
    }
}

#[test]
fn talk_that_would_be_throttled_looks_cheap_to_move_only_to_the_thesis() {
    // VM1 exchanges 90 Mbit/s with VM2 inside; equation (2) counts the 30 that the network has left.
    let mut cluster = lab(2, 2048.0);
    for cpu_cores in [0.65, 0.10, 0.30] {
        add(&mut cluster, 1, 256.0, cpu_cores, 0.0);
    }
    talk(&mut cluster, 1, 2, 90.0);
    cluster.hosts[0].capacity.network_mbit = 100.0;
    cluster.hosts[0].own.network_mbit = 70.0;
    let share_max = Amounts { network_mbit: 2.0, ..limits().share_max };
    let limits = Limits { share_max, ..limits() };
    let spots = [hot(1, None, Resource::Cpu)];
    let problem = Problem { cluster: &cluster, hotspots: &spots, limits: &limits, now_s: 1000.0 };
    let first = |name| steps(&policy(name).expect("A policy").plan(&problem)).swap_remove(0);
    assert_eq!(first("idc"), "VM1>PM2", "0.65 - 0.30 is more than 0.30");
    assert_eq!(first("idc-plus"), "VM3>PM2", "0.65 - 0.90 is not");
}
