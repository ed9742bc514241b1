//! Tests: exchanges, drains, rules and hysteresis in small clusters.

use super::{Action, Hotspot, Limits, NAMES, Plan, Problem, policy};
use crate::model::{Cluster, HostIndex, HostState, LastMove, Resource, VmIndex, synthetic};

const NOW_S: f64 = 10_000.0;

fn spot(host: usize, resource: Resource) -> Hotspot {
    Hotspot {
        host: HostIndex(host),
        vm: None,
        resource,
        current: 0.95,
        predicted: 0.95,
        threshold: 0.85,
        since_s: 0.0,
        why: String::new(),
    }
}

fn plan_with(name: &str, cluster: &Cluster, hotspots: &[Hotspot], limits: &Limits) -> Plan {
    let problem = Problem { cluster, hotspots, limits, now_s: NOW_S };
    policy(name).expect("A policy").plan(&problem)
}

fn plan(name: &str, cluster: &Cluster, hotspots: &[Hotspot]) -> Plan {
    plan_with(name, cluster, hotspots, &Limits::default())
}

/// Guest, destination and wave of each migration.
fn moves(plan: &Plan) -> Vec<(usize, usize, u32)> {
    let migration = |(action, wave): (&Action, u32)| match action {
        Action::Migrate { vm, to, .. } => Some((vm.0, to.0, wave)),
        Action::Resize { .. } => None,
    };
    plan.steps.iter().map(|step| (&step.action, step.wave)).filter_map(migration).collect()
}

fn says(plan: &Plan, words: &str) -> bool {
    plan.notes.iter().any(|note| note.contains(words))
}

/// Hosts of 4 processors and 16 GiB; each guest given by host, processors and MiB.
fn cluster(hosts: usize, guests: &[(usize, f64, f64)]) -> Cluster {
    let mut cluster = synthetic::cluster(hosts, guests.len());
    for (vm, (host, cpu_cores, memory_mib)) in cluster.vms.iter_mut().zip(guests) {
        vm.host = HostIndex(*host);
        vm.vcpus = 4;
        vm.usage.cpu_cores = *cpu_cores;
        vm.usage.memory_mib = *memory_mib;
        vm.peak = vm.usage;
        vm.memory.allocated_mib = *memory_mib;
        vm.memory.used_mib = *memory_mib;
        vm.memory.needed_mib = *memory_mib * 0.8;
        vm.memory.max_mib = *memory_mib;
    }
    cluster
}

fn moving_policies() -> impl Iterator<Item = &'static str> {
    NAMES.into_iter().filter(|name| *name != "none")
}

#[test]
fn what_has_to_make_room_goes_first_if_there_is_room_for_it() {
    // The second host has no memory for the first guest, until the idle ones have left it.
    let guests =
        [(0, 2.0, 4000.0), (0, 1.8, 4000.0), (1, 0.1, 6000.0), (1, 0.1, 6000.0), (1, 0.5, 2000.0)];
    let mut cluster = cluster(2, &guests);
    cluster.hosts[0].own.cpu_cores = 0.0;
    // The hot host lacks network; processors are there for a while.
    cluster.vms[0].usage.network_mbit = 500.0;
    cluster.vms[1].usage.network_mbit = 400.0;
    for vm in 2..5 {
        cluster.vms[vm].usage.network_mbit = 0.0;
    }
    cluster.vms[0].usage.cpu_cores = 0.5;
    cluster.vms[1].usage.cpu_cores = 0.4;
    for vm in 0..5 {
        cluster.vms[vm].peak = cluster.vms[vm].usage;
    }
    let plan = plan("sandpiper", &cluster, &[spot(0, Resource::Network)]);
    assert_eq!(moves(&plan), [(2, 0, 0), (0, 1, 1)], "{plan:#?}");
    assert!(plan.steps[0].reason.contains("vm-0 (VSR"), "{}", plan.steps[0].reason);
    assert!(plan.steps[0].reason.contains("changes places with vm-2 of host-1"));
}

#[test]
fn a_guest_goes_first_if_its_peak_alone_lacks_room() {
    let guests = [(0, 2.0, 4000.0), (0, 1.8, 12000.0), (1, 0.8, 8000.0), (1, 0.4, 2000.0)];
    let mut cluster = cluster(2, &guests);
    // With its peak, the second host would have 1.2 + 2.4 of 3.4 processors.
    cluster.vms[0].peak.cpu_cores = 2.4;
    let plan = plan("sandpiper", &cluster, &[spot(0, Resource::Cpu)]);
    assert_eq!(moves(&plan), [(0, 1, 0), (3, 0, 1)], "{plan:#?}");
}

#[test]
fn a_third_host_is_where_one_waits_meanwhile() {
    // No room for 2.0 processors beside 2.0, and none on the hot host before its guest has left it.
    let guests = [
        (0, 2.0, 4000.0),
        (0, 1.9, 4000.0),
        (1, 0.9, 4000.0),
        (1, 1.0, 1500.0),
        (2, 2.2, 10_500.0),
        (2, 0.0, 0.0),
    ];
    let cluster = cluster(3, &guests);
    let plan = plan("sandpiper", &cluster, &[spot(0, Resource::Cpu)]);
    let there_and_back = [(2, 2, 0), (0, 1, 1), (2, 0, 2)];
    assert_eq!(moves(&plan), there_and_back, "{plan:#?}");
    assert!(plan.steps[0].reason.contains("vm-2 waits on host-2 meanwhile"));
    let few = Limits { moves_max: 2, ..Limits::default() };
    let plan = plan_with("sandpiper", &cluster, &[spot(0, Resource::Cpu)], &few);
    assert_eq!(moves(&plan), []);
    assert!(says(&plan, "no move would help"));
}

#[test]
fn every_policy_empties_a_host_and_no_other() {
    for name in moving_policies() {
        let mut cluster = synthetic::cluster(3, 9);
        cluster.hosts[1].state = HostState::Draining;
        cluster.traffic.set(VmIndex(4), VmIndex(2), 100.0);
        let plan = plan(name, &cluster, &[]);
        let moved: Vec<_> = plan.moves().collect();
        assert_eq!(moved.len(), 3, "{name}: {plan:#?}");
        assert!(moved.iter().all(|(_, from, to)| from.0 == 1 && to.0 != 1));
        assert!(moved.contains(&(VmIndex(4), HostIndex(1), HostIndex(2))), "Its peer is there");
        assert!(plan.steps.iter().all(|step| step.reason.starts_with("host-1 is to be emptied")));
    }
}

#[test]
fn drains_do_what_they_can_and_name_the_rest() {
    let mut cluster = synthetic::cluster(2, 8);
    cluster.hosts[0].state = HostState::Draining;
    cluster.rules.pinned.push(VmIndex(2));
    cluster.vms[4].priority = 9;
    let few = Limits { moves_max: 2, ..Limits::default() };
    let plan = plan_with("idc", &cluster, &[], &few);
    let moved: Vec<_> = moves(&plan).iter().map(|(vm, ..)| *vm).collect();
    assert_eq!(moved, [0, 6], "The important one goes last");
    assert!(says(&plan, "vm-2 stays on host-0: it is pinned"), "{plan:#?}");
    assert!(says(&plan, "host-0: 2 guests are left for the next plan"));
}

#[test]
fn drains_make_do_with_room_for_what_guests_take_now() {
    let mut cluster = cluster(2, &[(0, 1.0, 1000.0), (1, 1.0, 1000.0)]);
    cluster.hosts[0].state = HostState::Draining;
    cluster.vms[0].peak.cpu_cores = 4.0;
    let plan = plan("drs", &cluster, &[]);
    assert_eq!(moves(&plan), [(0, 1, 0)]);
    assert!(plan.steps[0].reason.contains("no host has room for its peak"));
    cluster.vms[1].usage.cpu_cores = 3.0;
    let full = self::plan("drs", &cluster, &[]);
    assert_eq!(moves(&full), []);
    assert!(says(&full, "vm-0 cannot leave: 1 host: not enough CPU there"), "{full:#?}");
}

/// One host with too much to do, and another without any guest.
fn hot_pair() -> Cluster {
    cluster(2, &[(0, 1.3, 1000.0), (0, 1.3, 1000.0), (0, 1.3, 1000.0)])
}

#[test]
fn guests_that_stay_together_go_together() {
    for name in moving_policies() {
        let mut cluster = hot_pair();
        cluster.rules.together.push(vec![VmIndex(0), VmIndex(1)]);
        cluster.rules.pinned.push(VmIndex(2));
        let plan = plan(name, &cluster, &[spot(0, Resource::Cpu)]);
        assert_eq!(moves(&plan), [(0, 1, 0), (1, 1, 1)], "{name}: {plan:#?}");
        cluster.rules.pinned.push(VmIndex(1));
        let plan = self::plan(name, &cluster, &[spot(0, Resource::Cpu)]);
        assert_eq!(moves(&plan), [], "{name}: one of them is pinned");
        assert!(says(&plan, "vm-1 stays on host-0: it is pinned"), "{name}: {plan:#?}");
    }
}

#[test]
fn rules_of_places_are_kept() {
    for name in moving_policies() {
        let mut cluster = hot_pair();
        cluster.vms[2].host = HostIndex(1);
        cluster.vms[0].usage.cpu_cores = 2.6;
        cluster.vms[0].peak.cpu_cores = 2.6;
        cluster.rules.apart.push(vec![VmIndex(1), VmIndex(2)]);
        cluster.rules.only_on.insert(VmIndex(0), vec![HostIndex(0)]);
        let plan = plan(name, &cluster, &[spot(0, Resource::Cpu)]);
        assert_eq!(moves(&plan), [], "{name}");
        let (apart, other) = ("keeps apart from runs there", "a rule names other hosts");
        assert!(says(&plan, apart) && says(&plan, other), "{name}: {plan:#?}");
    }
}

#[test]
fn guests_that_moved_lately_stay_and_do_not_go_back() {
    for name in moving_policies() {
        let moved = |ago_s: f64, from| {
            let mut cluster = hot_pair();
            for vm in &mut cluster.vms {
                vm.last_move = Some(LastMove { at_s: NOW_S - ago_s, from: HostIndex(from) });
            }
            plan(name, &cluster, &[spot(0, Resource::Cpu)])
        };
        assert!(says(&moved(10.0, 0), "it has moved not long ago"), "{name}");
        assert!(says(&moved(100.0, 1), "it came from there not long ago"), "{name}");
        for plan in [moved(10.0, 0), moved(100.0, 1), moved(-50.0, 0), moved(f64::NAN, 0)] {
            assert_eq!(moves(&plan), [], "{name}: {plan:#?}");
        }
        assert_eq!(moves(&moved(100.0, 0)).len(), 1, "{name}");
        assert_eq!(moves(&moved(601.0, 1)).len(), 1, "{name}");
    }
}

#[test]
fn the_unimportant_leave_first() {
    for name in moving_policies() {
        let mut cluster = hot_pair();
        cluster.vms[0].priority = 2;
        cluster.vms[1].priority = 1;
        cluster.vms[2].usage.cpu_cores = 1.0;
        let plan = plan(name, &cluster, &[spot(0, Resource::Cpu)]);
        assert_eq!(moves(&plan), [(2, 1, 0)], "{name}: {plan:#?}");
    }
}

#[test]
fn nothing_is_decided_about_hosts_that_are_silent_busy_or_unknown() {
    for name in moving_policies() {
        let mut cluster = hot_pair();
        cluster.hosts[0].is_migrating = true;
        let spots = [spot(0, Resource::Cpu), spot(7, Resource::Cpu)];
        let busy = plan(name, &cluster, &spots);
        assert!(says(&busy, "host-0 waits until the migration") && says(&busy, "not known"));
        cluster.hosts[0].is_migrating = false;
        cluster.hosts[0].state = HostState::Silent;
        let silent = plan(name, &cluster, &spots);
        assert!(says(&silent, "nothing was heard of it"), "{name}");
        cluster.hosts[0].state = HostState::Active;
        cluster.hosts[1].is_migrating = true;
        let taken = plan(name, &cluster, &spots);
        cluster.hosts[1].is_migrating = false;
        cluster.vms[0].usage.cpu_cores = f64::NAN;
        let wrong = plan(name, &cluster, &spots);
        assert!(says(&wrong, "Nothing is decided: Guest vm-0"), "{name}: {wrong:#?}");
        for plan in [busy, silent, taken, wrong] {
            assert!(plan.steps.is_empty(), "{name}: {plan:#?}");
        }
    }
}

#[test]
fn talk_that_would_fill_the_network_is_not_left_behind() {
    for name in moving_policies() {
        let mut cluster = hot_pair();
        for (one, other) in [(0, 1), (1, 2), (0, 2)] {
            cluster.traffic.set(VmIndex(one), VmIndex(other), 450.0);
        }
        let plan = plan(name, &cluster, &[spot(0, Resource::Cpu)]);
        assert_eq!(moves(&plan), [], "{name}: {plan:#?}");
    }
}

#[test]
fn drs_shares_memory_anew_before_it_moves_anyone() {
    let mut cluster = cluster(2, &[(0, 0.5, 8000.0), (0, 0.5, 7500.0)]);
    cluster.vms[0].memory.used_mib = 3000.0;
    cluster.vms[0].memory.needed_mib = 2000.0;
    cluster.vms[1].memory.needed_mib = 7400.0;
    cluster.vms[1].memory.max_mib = 9000.0;
    let plan = plan("drs", &cluster, &[spot(0, Resource::Memory)]);
    assert_eq!(moves(&plan), []);
    let shrinks = |step: &&super::Step| step.reason.contains("shrinks");
    assert_eq!(plan.steps.iter().filter(shrinks).count(), 1, "{plan:#?}");
    let (first, last) = (&plan.steps[0], &plan.steps[plan.steps.len() - 1]);
    assert!(first.reason.contains("vm-0 uses 3000 of its 8000 MiB"), "{}", first.reason);
    assert!(last.reason.contains("vm-1 needs 7400 of its 7500 MiB"), "{}", last.reason);
    assert!(first.wave < last.wave, "What is taken has to be there before it is given");
}

#[test]
fn drs_has_the_destination_make_room() {
    let mut cluster = cluster(2, &[(0, 1.9, 3000.0), (0, 1.9, 3000.0), (1, 0.5, 14_000.0)]);
    cluster.vms[2].memory.used_mib = 9000.0;
    cluster.vms[2].memory.needed_mib = 8000.0;
    let plan = plan("drs", &cluster, &[spot(0, Resource::Cpu)]);
    assert_eq!(moves(&plan), [(0, 1, 1)], "{plan:#?}");
    assert!(plan.steps[0].reason.contains("vm-2 uses 9000 of its 14000 MiB"));
    // Page cache that the guest needs after all.
    cluster.vms[2].memory.needed_mib = 13_500.0;
    let plan = self::plan("drs", &cluster, &[spot(0, Resource::Cpu)]);
    assert_eq!(plan.steps, []);
}
