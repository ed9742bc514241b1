//! How long a decision takes for large clusters, by policy.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use scheduler::model::{
    Amounts, Cluster, Host, HostIndex, HostState, Memory, Placement, Resource, Rules, Traffic, Vm,
    VmIndex,
};
use scheduler::plan::{self, Hotspot, Limits, Problem};

/// Hosts and guests.
const SIZES: [(usize, usize); 2] = [(200, 2_000), (1_000, 10_000)];

/// Figures that look random and are the same each time.
fn spread(number: usize, factor: usize) -> f64 {
    ((number * 2_654_435_761 * factor) % 1_000) as f64 / 1_000.0
}

/// Guests of all sizes, groups of four that talk, and one host in ten with too much to do.
fn cluster(hosts: usize, vms: usize) -> Cluster {
    let capacity = Amounts {
        cpu_cores: 16.0,
        memory_mib: 131_072.0,
        network_mbit: 10_000.0,
        disk_mib: 2_000.0,
    };
    let host = |number: usize| Host {
        name: format!("host-{number}"),
        capacity,
        own: Amounts { cpu_cores: 0.5, memory_mib: 2_048.0, ..Amounts::ZERO },
        state: HostState::Active,
        is_migrating: false,
    };
    let vm = |number: usize| {
        let at = number % hosts;
        let heat = if at.is_multiple_of(10) { 1.6 } else { 0.8 };
        let memory_mib = 2_048.0 + 12_288.0 * spread(number, 3);
        let usage = Amounts {
            cpu_cores: heat * (0.2 + 1.6 * spread(number, 5)),
            memory_mib,
            network_mbit: 200.0 * spread(number, 7),
            disk_mib: 20.0 * spread(number, 11),
        };
        let peak = Amounts { memory_mib, ..usage.times(1.3) };
        Vm {
            name: format!("vm-{number}"),
            host: HostIndex(at),
            vcpus: 4,
            usage,
            peak,
            steal: 0.0,
            memory: Memory {
                allocated_mib: memory_mib,
                used_mib: 0.7 * memory_mib,
                needed_mib: 0.5 * memory_mib,
                reserve_mib: 512.0,
                max_mib: 16_384.0,
                swap_writes_per_s: 0.0,
            },
            dirty_mib_per_s: 50.0 * spread(number, 13),
            sampled: None,
            priority: 0,
            is_migrating: false,
            last_move: None,
            gray_box: None,
        }
    };
    let mut cluster = Cluster {
        hosts: (0..hosts).map(host).collect(),
        vms: (0..vms).map(vm).collect(),
        traffic: Traffic::silent(vms),
        rules: Rules::default(),
    };
    for number in 0..vms {
        let other = number / 4 * 4 + (number + 1) % 4;
        cluster.traffic.set(VmIndex(number), VmIndex(other), 50.0);
    }
    cluster
}

fn hotspots(cluster: &Cluster, limits: &Limits) -> Vec<Hotspot> {
    let placement = Placement::new(cluster);
    let hot = cluster.host_indices().filter_map(|host| {
        let current = placement.share(host)[Resource::Cpu];
        let threshold = limits.share_max[Resource::Cpu];
        (current > threshold).then(|| Hotspot {
            host,
            vm: None,
            resource: Resource::Cpu,
            current,
            predicted: current,
            threshold,
            since_s: 0.0,
            why: "CPU".into(),
        })
    });
    hot.collect()
}

fn plans(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("plan");
    group.sample_size(10).measurement_time(Duration::from_secs(5));
    for (hosts, vms) in SIZES {
        let (cluster, limits) = (cluster(hosts, vms), Limits::default());
        let hotspots = hotspots(&cluster, &limits);
        let problem =
            Problem { cluster: &cluster, hotspots: &hotspots, limits: &limits, now_s: 0.0 };
        for name in plan::NAMES {
            let Some(policy) = plan::policy(name) else { continue };
            let moves = policy.plan(&problem).moves().count();
            println!("{name}: {moves} moves for {} hotspots of {hosts} hosts", hotspots.len());
            group.bench_function(BenchmarkId::new(name, vms), |bencher| {
                bencher.iter(|| black_box(policy.plan(black_box(&problem))));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, plans);
criterion_main!(benches);
