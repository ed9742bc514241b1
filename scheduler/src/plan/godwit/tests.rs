//! Decisions on small clusters, and what holds for all plans.

use proptest::prelude::*;

use super::*;
use crate::model::{
    Cluster, HostIndex, HostState, LastMove, Placement, Resource, VmIndex, synthetic,
};
use crate::plan::{Action, Hotspot, Limits};

/// Hotspots where usage is beyond the limits, as a detector without memory would find them.
fn hotspots(cluster: &Cluster, limits: &Limits) -> Vec<Hotspot> {
    let placement = Placement::new(cluster);
    let hosts =
        cluster.host_indices().flat_map(|host| Resource::ALL.map(|resource| (host, resource)));
    let hot = hosts.filter_map(|(host, resource)| {
        let current = placement.share(host)[resource];
        let threshold = limits.share_max[resource];
        (current > threshold).then(|| Hotspot {
            host,
            vm: None,
            resource,
            current,
            predicted: current,
            threshold,
            since_s: 0.0,
            why: "test".into(),
        })
    });
    hot.collect()
}

fn plan(cluster: &Cluster, now_s: f64) -> Plan {
    cluster.check().unwrap();
    let limits = Limits::default();
    let hotspots = hotspots(cluster, &limits);
    Godwit::default().plan(&Problem { cluster, hotspots: &hotspots, limits: &limits, now_s })
}

/// All guests on the first host, each with so many cores.
fn crowded(hosts: usize, cores: &[f64]) -> Cluster {
    let mut cluster = synthetic::cluster(hosts, cores.len());
    for (vm, cores) in cluster.vms.iter_mut().zip(cores) {
        vm.host = HostIndex(0);
        (vm.usage.cpu_cores, vm.peak.cpu_cores) = (*cores, *cores);
    }
    cluster
}

#[test]
fn a_quiet_cluster_is_left_alone() {
    assert_eq!(plan(&synthetic::cluster(3, 9), 0.0), Plan::default());
}

#[test]
fn the_guest_that_is_cheap_to_move_goes() {
    let mut cluster = crowded(2, &[1.0, 1.0, 1.0, 1.0]);
    cluster.vms[2].memory.used_mib = 100.0;
    let moves: Vec<_> = plan(&cluster, 0.0).moves().collect();
    assert_eq!(moves, [(VmIndex(2), HostIndex(0), HostIndex(1))]);
}

#[test]
fn talkers_are_not_separated_and_are_brought_together() {
    let mut cluster = crowded(3, &[1.0, 1.0, 1.0, 1.0, 0.5]);
    cluster.vms[4].host = HostIndex(2);
    cluster.traffic.set(VmIndex(0), VmIndex(1), 200.0);
    cluster.traffic.set(VmIndex(3), VmIndex(4), 200.0);
    let moves: Vec<_> = plan(&cluster, 0.0).moves().collect();
    assert_eq!(moves, [(VmIndex(3), HostIndex(0), HostIndex(2))]);
}

#[test]
fn guests_change_places_where_nothing_else_helps() {
    // The other host has memory for one of the large ones only after its small one is gone, and here is room for that.
    let mut cluster = crowded(2, &[2.0, 1.8, 0.2, 0.0]);
    let guests = [(0, 7000.0), (0, 7000.0), (1, 7100.0), (1, 1560.0)];
    for (vm, (host, mib)) in cluster.vms.iter_mut().zip(guests) {
        (vm.usage.memory_mib, vm.peak.memory_mib, vm.memory.allocated_mib) = (mib, mib, mib);
        vm.host = HostIndex(host);
    }
    let plan = plan(&cluster, 0.0);
    let moves: Vec<_> = plan.moves().collect();
    assert_eq!(moves.len(), 2, "{plan:?}");
    let waves: Vec<u32> = plan.steps.iter().map(|step| step.wave).collect();
    assert_eq!(waves, [0, 1]);
    let mut placement = Placement::new(&cluster);
    moves.iter().for_each(|(vm, _, to)| placement.go(*vm, *to));
    for host in cluster.host_indices() {
        assert!(placement.share(host).cpu_cores < 0.85, "{plan:?}");
    }
}

#[test]
fn a_host_is_emptied() {
    let mut cluster = synthetic::cluster(3, 6);
    cluster.hosts[1].state = HostState::Draining;
    let moves: Vec<_> = plan(&cluster, 0.0).moves().collect();
    assert_eq!(moves.len(), 2, "{moves:?}");
    for (vm, from, to) in moves {
        assert_eq!(from, HostIndex(1));
        cluster.vms[vm.0].host = to;
    }
    assert_eq!(plan(&cluster, 1000.0).moves().count(), 0);
}

#[test]
fn who_came_does_not_go_back_soon() {
    let mut cluster = crowded(2, &[2.0, 2.0]);
    let last_move = Some(LastMove { at_s: 0.0, from: HostIndex(1) });
    cluster.vms.iter_mut().for_each(|vm| vm.last_move = last_move);
    let early = plan(&cluster, 300.0);
    assert_eq!(early.moves().count(), 0);
    let says = |note: &String| note.contains("it came from there not long ago");
    assert!(early.notes.iter().any(says), "{:?}", early.notes);
    assert_eq!(plan(&cluster, 700.0).moves().count(), 1);
}

#[test]
fn a_guest_that_swaps_grows_before_anything_moves() {
    let mut cluster = synthetic::cluster(2, 4);
    let limits = Limits::default();
    cluster.vms[0].peak.memory_mib = 1280.0;
    let hotspot = Hotspot {
        host: HostIndex(0),
        vm: Some(VmIndex(0)),
        resource: Resource::Memory,
        current: 200.0,
        predicted: 200.0,
        threshold: 150.0,
        since_s: 0.0,
        why: "vm-0 writes 200 pages a second to its swap".into(),
    };
    let hotspots = [hotspot];
    let problem = Problem { cluster: &cluster, hotspots: &hotspots, limits: &limits, now_s: 0.0 };
    let plan = Godwit::default().plan(&problem);
    assert_eq!(plan.steps.len(), 1);
    let grows = Action::Resize { vm: VmIndex(0), from_mib: 1024.0, to_mib: 1280.0 };
    assert_eq!(plan.steps[0].action, grows);
}

#[test]
fn who_will_soon_lack_memory_gets_it_before() {
    let mut cluster = synthetic::cluster(2, 4);
    cluster.vms[1].memory.needed_mib = 950.0;
    let plan = plan(&cluster, 0.0);
    assert_eq!(plan.steps.len(), 1);
    let Action::Resize { vm, from_mib, to_mib } = plan.steps[0].action else { panic!("{plan:?}") };
    assert_eq!((vm, from_mib, to_mib.round()), (VmIndex(1), 1024.0, 1126.0));
    assert!(plan.steps[0].reason.contains("needs 950 of its 1024 MiB"), "{plan:?}");
}

#[test]
fn others_give_what_they_do_not_use_where_a_host_is_full() {
    let mut cluster = synthetic::cluster(1, 15);
    cluster.vms[0].memory.needed_mib = 1020.0;
    cluster.vms[0].memory.swap_writes_per_s = 300.0;
    let limits = Limits::default();
    let mut spots = hotspots(&cluster, &limits);
    spots.push(Hotspot {
        host: HostIndex(0),
        vm: Some(VmIndex(0)),
        resource: Resource::Memory,
        current: 300.0,
        predicted: 300.0,
        threshold: 150.0,
        since_s: 0.0,
        why: "vm-0 swaps".into(),
    });
    cluster.hosts[0].own.memory_mib = 0.95 * 16384.0 - 15.0 * 1024.0;
    let problem = Problem { cluster: &cluster, hotspots: &spots, limits: &limits, now_s: 0.0 };
    let plan = Godwit::default().plan(&problem);
    let mut given_mib = 0.0;
    for step in &plan.steps {
        let Action::Resize { vm, from_mib, to_mib } = step.action else { panic!("{plan:?}") };
        assert_eq!(vm == VmIndex(0), to_mib > from_mib, "{plan:?}");
        given_mib += to_mib - from_mib;
    }
    assert!(plan.steps.len() > 1 && given_mib <= 1.0, "{plan:?}");
}

#[test]
fn a_load_that_lasts_is_relieved_before_it_is_too_much_and_a_spike_is_not() {
    let mut cluster = crowded(2, &[2.4, 0.5, 0.4]);
    assert_eq!(plan(&cluster, 0.0), Plan::default(), "all are at their height");
    for vm in &mut cluster.vms {
        vm.peak.cpu_cores *= 1.2;
    }
    let plan = plan(&cluster, 0.0);
    assert_eq!(plan.moves().count(), 1, "{plan:?}");
    assert!(plan.steps[0].reason.contains("is likely to have too much to do soon"), "{plan:?}");
}

prop_compose! {
    /// Clusters with guests of all sizes, in places of all kinds.
    fn clusters()(
        hosts in 2_usize..6,
        guests in prop::collection::vec((0_usize..6, 0.0..3.0, 100.0..8000.0, 0.0..300.0), 1..24),
        talk in prop::collection::vec((0_usize..24, 0_usize..24, 1.0..400.0), 0..20),
        apart in prop::collection::vec(0_usize..24, 0..4),
        together in prop::collection::vec(0_usize..24, 0..3),
        pinned in prop::option::of(0_usize..24),
        draining in prop::option::of(0_usize..6),
    ) -> Cluster {
        let mut cluster = synthetic::cluster(hosts, guests.len());
        let count = guests.len();
        for (vm, (host, cores, mib, mbit)) in cluster.vms.iter_mut().zip(guests) {
            vm.host = HostIndex(host % hosts);
            vm.usage = crate::model::Amounts {
                cpu_cores: cores, memory_mib: mib, network_mbit: mbit, disk_mib: 1.0,
            };
            vm.peak = vm.usage.times(1.2);
            vm.peak.memory_mib = mib;
            vm.memory.allocated_mib = mib;
        }
        for (one, other, mbit) in talk {
            cluster.traffic.set(VmIndex(one % count), VmIndex(other % count), mbit);
        }
        cluster.rules.apart = vec![apart.into_iter().map(|vm| VmIndex(vm % count)).collect()];
        cluster.rules.together = vec![together.into_iter().map(|vm| VmIndex(vm % count)).collect()];
        cluster.rules.pinned = pinned.into_iter().map(|vm| VmIndex(vm % count)).collect();
        if let Some(host) = draining {
            cluster.hosts[host % hosts].state = HostState::Draining;
        }
        cluster
    }
}

proptest! {
    /// No move breaks a rule, and where a plan ends nobody is over a limit who was not before.
    #[test]
    fn plans_are_sound(cluster in clusters()) {
        let plan = plan(&cluster, 0.0);
        let limits = Limits::default();
        let mut placement = Placement::new(&cluster);
        let before = placement.clone();
        for step in &plan.steps {
            match step.action {
                Action::Migrate { vm, from, to, .. } => {
                    prop_assert_eq!(placement.host_of(vm), from);
                    prop_assert_eq!(placement.may_go(vm, to), Ok(()));
                    placement.go(vm, to);
                    let share = placement.share(to).memory_mib;
                    prop_assert!(share <= limits.share_max.memory_mib + 1e-9, "{share}");
                }
                Action::Resize { vm, to_mib, .. } => placement.resize(vm, to_mib),
            }
        }
        for host in cluster.host_indices() {
            for resource in Resource::ALL {
                let (was, is) = (before.share(host)[resource], placement.share(host)[resource]);
                let max = limits.share_max[resource].max(was + 1e-9);
                prop_assert!(is <= max + 1e-9, "{host:?} {resource:?} {was} {is}");
            }
        }
        prop_assert!(plan.steps.iter().all(|step| !step.reason.is_empty()));
    }
}
