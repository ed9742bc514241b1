//! Tests: what holds for every policy on any cluster.

use proptest::prelude::*;
use rustix::time::{ClockId, clock_gettime};

use super::{Action, Hotspot, Limits, NAMES, Plan, Problem, policy};
use crate::model::{
    Amounts, Cluster, HostIndex, HostState, LastMove, Placement, Resource, VmIndex, synthetic,
};

const NOW_S: f64 = 10_000.0;

/// Numbers out of a seed (SplitMix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn up_to(&mut self, max: f64) -> f64 {
        max * (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// A cluster of which anything can be, with so many guests a host on average.
fn cluster(seed: u64, hosts: usize, vms: usize) -> Cluster {
    let mut dice = Dice(seed);
    let mut cluster = synthetic::cluster(hosts, vms);
    for host in &mut cluster.hosts {
        host.capacity = host.capacity.times(0.5 + dice.up_to(1.5));
        host.own = host.capacity.times(dice.up_to(0.1));
        host.is_migrating = dice.chance(4);
        host.state = match dice.below(16) {
            0 => HostState::Silent,
            1 | 2 => HostState::Draining,
            _ => HostState::Active,
        };
    }
    let room = cluster.hosts[0].capacity.times(1.7 * hosts as f64 / vms as f64);
    for vm in &mut cluster.vms {
        vm.host = HostIndex(dice.below(hosts));
        vm.vcpus = 1 + dice.below(8) as u32;
        for resource in Resource::ALL {
            vm.usage[resource] = dice.up_to(room[resource]);
            vm.peak[resource] = vm.usage[resource] * (1.0 + dice.up_to(0.8));
        }
        vm.usage.network_mbit *= 0.5;
        let allocated_mib = vm.usage.memory_mib;
        vm.memory.allocated_mib = allocated_mib;
        vm.memory.used_mib = dice.up_to(allocated_mib);
        vm.memory.needed_mib = dice.up_to(vm.memory.used_mib);
        vm.memory.reserve_mib = dice.up_to(allocated_mib);
        vm.memory.max_mib = allocated_mib * (1.0 + dice.up_to(0.5));
        vm.memory.swap_writes_per_s = if dice.chance(10) { dice.up_to(400.0) } else { 0.0 };
        vm.steal = dice.up_to(0.3);
        vm.priority = dice.below(3) as u8;
        vm.is_migrating = dice.chance(3);
        vm.last_move = dice.chance(30).then(|| LastMove {
            at_s: NOW_S - dice.up_to(1200.0),
            from: HostIndex(dice.below(hosts)),
        });
    }
    talk_and_rules(&mut dice, &mut cluster);
    cluster
}

fn talk_and_rules(dice: &mut Dice, cluster: &mut Cluster) {
    let (hosts, vms) = (cluster.hosts.len(), cluster.vms.len());
    let any = |dice: &mut Dice| VmIndex(dice.below(vms));
    for _ in 0..vms {
        let (one, other) = (any(dice), any(dice));
        cluster.traffic.set(one, other, dice.up_to(120.0));
    }
    for _ in 0..vms / 8 {
        let group = vec![any(dice), any(dice)];
        match dice.below(4) {
            0 => cluster.rules.pinned.push(group[0]),
            1 => cluster.rules.apart.push(group),
            2 => {
                let allowed = (0..hosts).filter(|_| dice.chance(50)).map(HostIndex).collect();
                cluster.rules.only_on.insert(group[0], allowed);
            }
            _ => {
                // Some are torn apart already.
                if dice.chance(80) {
                    cluster.vms[group[1].0].host = cluster.vms[group[0].0].host;
                }
                cluster.rules.together.push(group);
            }
        }
    }
}

/// What detectors would say, and some that they would not.
fn hotspots(seed: u64, cluster: &Cluster, limits: &Limits) -> Vec<Hotspot> {
    let mut dice = Dice(seed ^ 0xABCD);
    let placement = Placement::new(cluster);
    let mut spots = vec![];
    let mut add = |host: usize, vm, resource, current| {
        let threshold = 0.8;
        let why = "it waits".to_owned();
        let (host, predicted, since_s) = (HostIndex(host), current, 0.0);
        spots.push(Hotspot { host, vm, resource, current, predicted, threshold, since_s, why });
    };
    for host in cluster.host_indices() {
        let share = placement.share(host);
        for resource in Resource::ALL {
            if share[resource] > limits.share_max[resource] {
                add(host.0, None, resource, share[resource]);
            }
        }
    }
    for _ in 0..cluster.hosts.len() / 4 {
        let vm = VmIndex(dice.below(cluster.vms.len()));
        let resource = Resource::ALL[dice.below(4)];
        add(cluster.vm(vm).host.0, dice.chance(80).then_some(vm), resource, 0.9);
    }
    if dice.chance(10) {
        add(cluster.hosts.len(), Some(VmIndex(cluster.vms.len())), Resource::Cpu, f64::NAN);
    }
    spots
}

/// How much of everything each host takes.
fn shares(placement: &Placement<'_>) -> Vec<Amounts> {
    placement.cluster().host_indices().map(|host| placement.share(host)).collect()
}

/// After each step, no host has more than its limit unless it has not more than at the wave's start.
fn check_room(before: &[Amounts], placement: &Placement<'_>, limits: &Limits) {
    for (host, (was, is)) in before.iter().zip(shares(placement)).enumerate() {
        for resource in Resource::ALL {
            let most = limits.share_max[resource].max(was[resource]);
            assert!(is[resource] <= most + 1e-9, "host-{host}: {resource:?} {is:?}, was {was:?}");
        }
    }
}

fn apply(placement: &mut Placement<'_>, action: &Action) {
    match action {
        Action::Migrate { vm, from, to, cost } => {
            assert_eq!(placement.host_of(*vm), *from, "It is not there");
            assert_ne!(from, to);
            assert!(cost.wire_mib >= 0.0 && cost.total_s > 0.0 && cost.downtime_ms > 0.0);
            placement.go(*vm, *to);
        }
        Action::Resize { vm, from_mib, to_mib } => {
            assert!((placement.allocated_mib(*vm) - from_mib).abs() < 1e-9);
            placement.resize(*vm, *to_mib);
        }
    }
}

/// A plan's waves hold in whatever order their steps end.
fn check_waves(problem: &Problem<'_>, plan: &Plan) {
    let mut placement = Placement::new(problem.cluster);
    assert!(plan.steps.is_sorted_by_key(|step| step.wave));
    for wave in plan.steps.chunk_by(|one, other| one.wave == other.wave) {
        let before = shares(&placement);
        let mut backwards = placement.clone();
        for step in wave.iter().rev() {
            apply(&mut backwards, &step.action);
            check_room(&before, &backwards, problem.limits);
        }
        for step in wave {
            if let Action::Migrate { vm, to, .. } = step.action {
                check_apart(&placement, vm, to);
            }
            apply(&mut placement, &step.action);
            check_room(&before, &placement, problem.limits);
        }
    }
    for group in &problem.cluster.rules.together {
        let place = |vm: &VmIndex| (problem.cluster.vm(*vm).host, placement.host_of(*vm));
        let places: Vec<_> = group.iter().map(place).collect();
        let was_one = places.windows(2).all(|pair| pair[0].0 == pair[1].0);
        let is_one = places.windows(2).all(|pair| pair[0].1 == pair[1].1);
        assert!(is_one || !was_one, "{group:?} were together and are not");
    }
}

fn check_apart(placement: &Placement<'_>, vm: VmIndex, to: HostIndex) {
    let rules = &placement.cluster().rules;
    for group in rules.apart.iter().filter(|group| group.contains(&vm)) {
        let there = |other: &VmIndex| *other != vm && placement.host_of(*other) == to;
        assert!(!group.iter().any(there), "{group:?} meet on {to:?}");
    }
}

fn check_rules(problem: &Problem<'_>, plan: &Plan) {
    let (cluster, limits) = (problem.cluster, problem.limits);
    let rules = &cluster.rules;
    assert!(plan.moves().count() <= limits.moves_max);
    for (vm, from, to) in plan.moves() {
        let (guest, there) = (cluster.vm(vm), cluster.host(to));
        assert!(!rules.pinned.contains(&vm) && !guest.is_migrating);
        assert!(rules.only_on.get(&vm).is_none_or(|hosts| hosts.contains(&to)));
        assert!(there.state == HostState::Active && !there.is_migrating);
        let at = cluster.host(from);
        assert!(at.state != HostState::Silent && !at.is_migrating);
        if let Some(last) = guest.last_move {
            let passed_s = problem.now_s - last.at_s;
            assert!(passed_s >= limits.stay_s, "{vm:?} moved {passed_s} s ago");
            assert!(last.from != to || passed_s >= limits.back_after_s, "{vm:?} goes back");
        }
    }
    for step in &plan.steps {
        assert!(step.reason.len() > 20 && !step.reason.contains("NaN"), "{}", step.reason);
        if let Action::Resize { vm, from_mib, to_mib } = step.action {
            let memory = cluster.vm(vm).memory;
            assert!(to_mib <= memory.max_mib + 1e-9 || to_mib < from_mib);
            assert!(to_mib >= memory.reserve_mib - 1e-9 || to_mib > from_mib);
            assert!(cluster.host(cluster.vm(vm).host).state != HostState::Silent);
        }
    }
}

fn check_all(cluster: &Cluster, hotspots: &[Hotspot], limits: &Limits) -> usize {
    let problem = Problem { cluster, hotspots, limits, now_s: NOW_S };
    let mut steps = 0;
    for name in NAMES {
        let policy = policy(name).expect("A policy");
        let plan = policy.plan(&problem);
        assert_eq!(plan, policy.plan(&problem), "{name} is not sure");
        check_rules(&problem, &plan);
        check_waves(&problem, &plan);
        steps += plan.steps.len();
    }
    steps
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn plans_keep_rules_and_limits(
        seed in any::<u64>(),
        hosts in 1_usize..12,
        guests in 1_usize..80,
        moves_max in 0_usize..20,
    ) {
        let cluster = cluster(seed, hosts, guests);
        let limits = Limits { moves_max, ..Limits::default() };
        check_all(&cluster, &hotspots(seed, &cluster, &limits), &limits);
    }

    /// Whatever limits and hotspots say.
    #[test]
    fn absurd_figures_end_in_some_plan(
        seed in any::<u64>(),
        figure in prop_oneof![
            Just(f64::NAN), Just(f64::INFINITY), Just(-1.0), Just(0.0), Just(1e300),
        ],
        which in 0_usize..10,
    ) {
        let mut cluster = cluster(seed, 5, 30);
        let mut limits = Limits::default();
        let mut now_s = NOW_S;
        let memory = &mut cluster.vms[0].memory;
        match which {
            0 => limits.share_max = Amounts { cpu_cores: figure, memory_mib: figure, ..Amounts::ZERO },
            1 => (limits.back_after_s, limits.stay_s) = (figure, figure),
            2 => (limits.link_mbit, limits.memory_step_mib) = (figure, figure),
            3 => now_s = figure,
            4 => (memory.max_mib, memory.reserve_mib) = (figure, figure),
            5 => (memory.used_mib, memory.needed_mib) = (figure, figure),
            6 => memory.swap_writes_per_s = figure,
            7 => cluster.hosts[0].capacity = Amounts::ZERO.max(&Amounts::ZERO.times(figure)),
            8 => cluster.vms[0].usage.cpu_cores = figure,
            _ => cluster.vms[0].last_move = Some(LastMove { at_s: figure, from: HostIndex(99) }),
        }
        let spots = hotspots(seed, &cluster, &Limits::default());
        let problem = Problem { cluster: &cluster, hotspots: &spots, limits: &limits, now_s };
        for name in NAMES {
            let plan = policy(name).expect("A policy").plan(&problem);
            prop_assert!(plan.moves().count() <= limits.moves_max);
        }
    }
}

#[test]
fn random_clusters_give_the_policies_something_to_do() {
    let limits = Limits::default();
    let steps = |seed| {
        let cluster = cluster(seed, 8, 60);
        check_all(&cluster, &hotspots(seed, &cluster, &limits), &limits)
    };
    let all: usize = (0..50).map(steps).sum();
    assert!(all > 1000, "{all} steps");
}

/// What this thread has had of processors, which others that are busy do not change.
fn ran_s() -> f64 {
    let ran = clock_gettime(ClockId::ThreadCPUTime);
    ran.tv_sec as f64 + ran.tv_nsec as f64 / 1e9
}

#[test]
fn two_hundred_hosts_are_planned_for_in_no_time() {
    let limits = Limits { moves_max: 64, ..Limits::default() };
    let cluster = cluster(7, 200, 2000);
    let spots = hotspots(7, &cluster, &limits);
    assert!(spots.len() > 50, "{}", spots.len());
    for name in NAMES {
        let problem =
            Problem { cluster: &cluster, hotspots: &spots, limits: &limits, now_s: NOW_S };
        let begin_s = ran_s();
        let plan = policy(name).expect("A policy").plan(&problem);
        let took_s = ran_s() - begin_s;
        println!("{name}: {} steps, {} notes, {took_s} s", plan.steps.len(), plan.notes.len());
        check_rules(&problem, &plan);
        check_waves(&problem, &plan);
        assert!(took_s < 2.0, "{name}: {took_s} s");
    }
}
