//! The world against the tables that it is calibrated with, and against what must hold in any world.

use std::fmt::Write as _;

use proptest::prelude::*;

use super::calibration::{
    IDC_CPU, IDC_MBIT, NIC_CPU, NIC_MBIT, WEB_IDC_CPU, WEB_IDC_MS, WEB_NIC_CPU, WEB_NIC_MS,
};
use super::moment::{Moment, Settings};
use super::world::World;
use super::{Outcome, Scenario};
use crate::cost;
use crate::model::{HostIndex, Resource, VmIndex};
use crate::plan::{Action, Plan, Policy, Problem, Step};

/// A policy that does what a test says.
#[derive(Debug)]
struct Scripted(fn(&Problem<'_>) -> Plan);

impl Policy for Scripted {
    fn name(&self) -> &'static str {
        "scripted"
    }

    fn plan(&self, problem: &Problem<'_>) -> Plan {
        (self.0)(problem)
    }
}

/// Moves nothing.
const STAYS: Scripted = Scripted(|_| Plan::default());

/// A guest of a host that is too hot goes to the next host, come what may.
const RESTLESS: Scripted = Scripted(|problem| {
    let mut plan = Plan::default();
    for hotspot in problem.hotspots {
        let cluster = problem.cluster;
        let there = cluster.vm_indices().find(|vm| cluster.vm(*vm).host == hotspot.host);
        let Some(vm) = there else { continue };
        let to = HostIndex((hotspot.host.0 + 1) % cluster.hosts.len());
        let cost = cost::predict(cluster.vm(vm), problem.limits.link_mbit);
        let action = Action::Migrate { vm, from: hotspot.host, to, cost };
        plan.steps.push(Step { action, wave: 0, reason: hotspot.why.clone() });
    }
    plan
});

/// Two pairs on two hosts, as the tables have them; `inside`: both of a pair on the same host.
fn tables(inside: bool, client: &str, server: &str) -> Outcome {
    let mut text = String::from("about = \"tables\"\nduration_s = 60\n");
    for host in ["PM1", "PM2"] {
        let _ = write!(text, "[[host]]\nname = \"{host}\"\nkind = \"pentium4\"\n");
    }
    // Over the network both servers are on PM2, which receives.
    let places = if inside { ["PM1", "PM1", "PM2", "PM2"] } else { ["PM1", "PM2", "PM1", "PM2"] };
    for (at, host) in places.iter().enumerate() {
        let (group, work) = (at / 2, if at % 2 == 0 { client } else { server });
        let _ = write!(
            text,
            "[[vm]]\nname = \"VM{at}\"\nhost = \"{host}\"\ngroup = \"g{group}\"\nmemory_mib = 256\nwork = {work}\n"
        );
    }
    Scenario::parse(&text).expect("a scenario").run(&STAYS, 1)
}

fn near(value: f64, expected: f64, share: f64) -> bool {
    (value / expected - 1.0).abs() <= share
}

#[test]
fn netperf_gets_what_table_1_1_says() {
    let (client, server) =
        (r#"{ kind = "bulk", role = "client" }"#, r#"{ kind = "bulk", role = "server" }"#);
    for (inside, mbit, cpu) in [(false, NIC_MBIT, NIC_CPU), (true, IDC_MBIT, IDC_CPU)] {
        let outcome = tables(inside, client, server);
        for service in &outcome.services {
            assert!(near(service.talk_mbit, mbit, 0.01), "{inside}: {service:?}");
        }
        let shares = outcome.hosts.iter().map(|host| host.cpu_share);
        let mean = shares.sum::<f64>() / outcome.hosts.len() as f64;
        assert!(near(mean, cpu, 0.01), "{inside}: {:?}", outcome.hosts);
    }
}

#[test]
fn specweb_takes_what_tables_1_2_and_1_3_say() {
    // Crossing pairs, a server and a database on each host.
    let work = |role: &str| format!("{{ kind = \"web\", role = \"{role}\", sessions = 90 }}");
    for (inside, response_ms, cpu) in
        [(false, WEB_NIC_MS, WEB_NIC_CPU), (true, WEB_IDC_MS, WEB_IDC_CPU)]
    {
        let mut text = String::from("about = \"tables\"\nduration_s = 60\n");
        for host in ["PM1", "PM2"] {
            let _ = write!(text, "[[host]]\nname = \"{host}\"\nkind = \"pentium4\"\n");
        }
        let places =
            if inside { ["PM1", "PM1", "PM2", "PM2"] } else { ["PM1", "PM2", "PM2", "PM1"] };
        for (at, host) in places.iter().enumerate() {
            let (group, work) = (at / 2, work(if at % 2 == 0 { "server" } else { "database" }));
            let _ = write!(
                text,
                "[[vm]]\nname = \"VM{at}\"\nhost = \"{host}\"\ngroup = \"g{group}\"\nmemory_mib = 256\nwork = {work}\n"
            );
        }
        let outcome = Scenario::parse(&text).expect("a scenario").run(&STAYS, 1);
        assert!(near(outcome.response_mean_ms, response_ms, 0.03), "{}", outcome.response_mean_ms);
        for host in &outcome.hosts {
            assert!(near(host.cpu_share, cpu, 0.02), "{inside}: {host:?}");
        }
        assert_eq!(outcome.overload_s, 0.0);
    }
}

/// A file of `hosts` hosts, guests with their figures and pairs that talk.
fn text(
    hosts: usize,
    vms: &[(usize, f64, f64, f64, f64)],
    talks: &[(usize, usize, f64)],
) -> String {
    let mut text =
        String::from("about = \"random\"\nduration_s = 300\n[limits]\nlink_mbit = 500\n");
    for host in 0..hosts {
        let _ = write!(text, "[[host]]\nname = \"h{host}\"\ncpu_cores = 4\nnetwork_mbit = 1000\n");
    }
    for (at, (host, cores, outside, disk, needs)) in vms.iter().enumerate() {
        let host = host % hosts;
        let _ = write!(
            text,
            "[[vm]]\nname = \"v{at}\"\nhost = \"h{host}\"\nmemory_mib = 1024\nvcpus = 4\nneeds_mib = {needs:.3}\n\
             work = {{ kind = \"plain\", cpu_cores = {cores:.3}, outside_mbit = {outside:.3}, disk_mib = {disk:.3}, users = 10 }}\n"
        );
    }
    for (one, other, mbit) in talks {
        let (one, other) = (one % vms.len(), other % vms.len());
        if one != other {
            let _ =
                write!(text, "[[talk]]\nbetween = [\"v{one}\", \"v{other}\"]\nmbit = {mbit:.3}\n");
        }
    }
    text
}

/// Nothing is given that is not there, nothing is left while somebody wants it, and adding up gives what is said.
fn check_moment(world: &World, now: &Settings, moment: &Moment) -> Result<(), TestCaseError> {
    for (at, machine) in world.machines.iter().enumerate() {
        let host = &moment.hosts[at];
        for resource in [Resource::Cpu, Resource::Network, Resource::Disk] {
            let (used, has) = (host.used[resource], machine.capacity[resource]);
            prop_assert!(
                used >= 0.0 && used <= has * (1.0 + 1e-9),
                "{resource:?}: {used} of {has}"
            );
        }
        let cores: f64 = now.guests[at].iter().map(|guest| moment.guests[*guest].cores).sum();
        let used = cores + machine.own.cpu_cores + now.engine[at].cpu_cores;
        prop_assert!((used - host.used.cpu_cores).abs() < 1e-6);
        let expected = host.wanted.cpu_cores.min(machine.capacity.cpu_cores);
        prop_assert!((host.used.cpu_cores - expected).abs() < 1e-6, "work is conserved");
    }
    for guest in &moment.guests {
        prop_assert!(guest.cores >= 0.0 && guest.cores <= guest.wanted_cores + 1e-9);
        prop_assert!((0.0..=1.0 + 1e-9).contains(&guest.done));
        prop_assert!(guest.outside_mbit >= 0.0 && guest.disk_mib >= 0.0);
    }
    Ok(())
}

fn vms() -> impl Strategy<Value = Vec<(usize, f64, f64, f64, f64)>> {
    let vm = (0_usize..4, 0.0..4.0, 0.0..800.0, 0.0..400.0, 0.0..3000.0);
    prop::collection::vec(vm, 1..16)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn work_is_conserved_and_nobody_gets_less_than_nothing(
        vms in vms(),
        talks in prop::collection::vec((0_usize..16, 0_usize..16, 0.0..2000.0), 0..20),
    ) {
        let scenario = Scenario::parse(&text(4, &vms, &talks)).expect("a scenario");
        let world = scenario.world.as_ref().expect("hosts and guests");
        let (now, mut moment) = (Settings::new(world), Moment::new(world));
        moment.settle(world, &now);
        check_moment(world, &now, &moment)?;
    }

    #[test]
    fn a_seed_gives_the_same_run_and_memory_is_never_given_twice(
        vms in vms(),
        talks in prop::collection::vec((0_usize..16, 0_usize..16, 0.0..2000.0), 0..20),
        seed in any::<u64>(),
    ) {
        let scenario = Scenario::parse(&text(4, &vms, &talks)).expect("a scenario");
        let one = scenario.run(&RESTLESS, seed);
        prop_assert_eq!(&one, &scenario.run(&RESTLESS, seed));
        prop_assert!(one.overload_s >= 0.0 && one.overload_s <= 4.0 * one.duration_s + 1e-6);
        prop_assert!(one.response_mean_ms.is_finite() && one.response_p95_ms.is_finite());
        for pair in one.moves.windows(2) {
            prop_assert!(pair[0].at_s <= pair[1].at_s);
        }
        // One at a time for each host.
        for (at, moved) in one.moves.iter().enumerate() {
            for other in one.moves.iter().skip(at + 1).filter(|other| other.at_s < moved.end_s) {
                let busy = [&moved.from, &moved.to];
                prop_assert!(!busy.contains(&&other.from) && !busy.contains(&&other.to));
            }
        }
    }

    #[test]
    fn absurd_files_are_refused_or_run(
        duration in prop::sample::select(vec!["60", "0", "-1", "nan", "inf", "1e300", "1e-300", "100"]),
        figure in prop::sample::select(vec!["0", "-5", "nan", "inf", "-inf", "1e308", "1e9", "0.5", "\"x\""]),
        key in prop::sample::select(vec!["cpu_cores", "network_mbit", "memory_mib", "receive_mbit", "disk_mib", "own_cpu_cores", "surprise"]),
        other in prop::sample::select(vec!["needs_mib", "max_mib", "vcpus", "dirty_mib_per_s", "noise", "cache_mib", "priority"]),
        value in prop::sample::select(vec!["0", "1", "-1", "nan", "inf", "1e308", "1e9", "[]"]),
        steps in prop::sample::select(vec!["[]", "[[0, 1]]", "[[5, 1], [3, 1]]", "[[0, nan]]", "[[0, 1e9], [1, 0]]", "[[0]]"]),
    ) {
        let text = format!(
            "about = \"absurd\"\nduration_s = {duration}\n[[host]]\nname = \"a\"\n{key} = {figure}\n[[host]]\nname = \"b\"\n\
             [[vm]]\nname = \"v\"\nhost = \"a\"\nmemory_mib = 0\n{other} = {value}\nlevels = {steps}\n\
             work = {{ kind = \"plain\", cpu_cores = 1e9, outside_mbit = 1e9, disk_mib = 1e9, users = 1e9 }}\n"
        );
        if let Ok(scenario) = Scenario::parse(&text) {
            let outcome = scenario.run(&RESTLESS, 1);
            prop_assert!(outcome.overload_s.is_finite() && outcome.response_mean_ms.is_finite());
        }
    }

    #[test]
    fn generated_clusters_are_the_seeds(seed in any::<u64>(), hosts in 1_usize..12) {
        let text = format!(
            "about = \"g\"\nduration_s = 600\n[generate]\nhosts = {hosts}\nvms = {}\nbursts_per_day = 200\ncrowds_per_day = 200\n\
             memory_grows = 0.5\n",
            hosts * 10
        );
        let scenario = Scenario::parse(&text).expect("a scenario");
        let (one, other) = (scenario.run(&RESTLESS, seed), scenario.run(&RESTLESS, seed));
        prop_assert_eq!(&one, &other);
        prop_assert_ne!(one.response_mean_ms, scenario.run(&RESTLESS, seed ^ 1).response_mean_ms);
    }
}

#[test]
fn what_is_wrong_is_told_with_its_line_and_a_remedy() {
    let good = "about = \"x\"\nduration_s = 60\n[[host]]\nname = \"a\"\n\n[[vm]]\nname = \"v\"\nhost = \"a\"\nmemory_mib = 64\nwork = { kind = \"plain\", cpu_cores = 1 }\n";
    assert!(Scenario::parse(good).is_ok());
    for (from, to, line, words) in [
        ("host = \"a\"", "host = \"b\"", 8, "name one of the file's [[host]]s"),
        ("memory_mib = 64", "memory_mib = -64", 9, "take a number from 0"),
        ("memory_mib = 64", "memory_mib = 1e6", 9, "MiB more"),
        ("duration_s = 60", "duration_s = 0", 2, "take a number from"),
        ("memory_mib = 64", "memory_mib = 64\nlevels = [[9, 1], [3, 1]]", 10, "later steps"),
        ("memory_mib = 64", "memory_mib = 64\nmax_mib = 32", 10, "raise max_mib"),
        ("name = \"a\"\n", "name = \"a\"\n[[host]]\nname = \"a\"\n", 6, "of its own"),
        ("[[host]]", "[detect]\nk = 9\n[[host]]", 4, "from `k`"),
        ("[[host]]", "[detect.threshold]\ncpu = 85\n[[host]]", 4, "85 % is 0.85"),
        ("[[host]]", "[[talk]]\nbetween = [\"v\", \"w\"]\nmbit = 3\n[[host]]", 4, "no guest w"),
        ("[[host]]", "[generate]\nhosts = 3\n[[host]]", 3, "leave one of both out"),
        (
            "[[host]]",
            "[[expect]]\npolicy = \"idc\"\nmoves = [\"v to b\"]\n[[host]]",
            5,
            "FROM -> TO",
        ),
    ] {
        let text = good.replacen(from, to, 1);
        let error = Scenario::parse(&text).expect_err(to).to_string();
        assert!(error.starts_with(&format!("Line {line}: ")), "{to}: {error}");
        assert!(error.contains(words), "{to}: {error}");
    }
    let error =
        Scenario::parse(&good.replace("memory_mib", "memory")).expect_err("a key").to_string();
    assert!(error.contains("line 9") && error.contains("SCHEDULER.md"), "{error}");
}

#[test]
fn memory_that_is_given_ends_swapping_and_a_full_host_gives_none() {
    const GROWS: Scripted = Scripted(|problem| {
        let grows = problem.hotspots.iter().filter_map(|hotspot| hotspot.vm);
        let step = |vm: VmIndex| {
            let from_mib = problem.cluster.vm(vm).memory.allocated_mib;
            let action = Action::Resize { vm, from_mib, to_mib: from_mib + 100.0 };
            Step { action, wave: 0, reason: "it swaps".into() }
        };
        Plan { steps: grows.map(step).collect(), notes: vec![] }
    });
    let text = |memory: f64| {
        format!(
            "about = \"swap\"\nduration_s = 300\n[[host]]\nname = \"a\"\nmemory_mib = {memory}\n[[vm]]\nname = \"v\"\nhost = \"a\"\n\
             memory_mib = 200\nneeds_mib = 380\nwork = {{ kind = \"plain\", cpu_cores = 1, users = 10 }}\n"
        )
    };
    let roomy = Scenario::parse(&text(1000.0)).expect("a scenario").run(&GROWS, 1);
    assert_eq!(roomy.resizes.len(), 2, "{:?}", roomy.resizes);
    assert!(roomy.overload.memory_s > 0.0 && roomy.overload.memory_s < 100.0);
    let full = Scenario::parse(&text(210.0)).expect("a scenario").run(&GROWS, 1);
    assert_eq!(full.resizes.last().map(|resized| resized.to_mib), Some(210.0));
    assert_eq!(full.overload.memory_s, 300.0);
    assert!(!full.refused.is_empty());
}
