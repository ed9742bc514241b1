//! Hotspots that are found, and those that are none.

use proptest::prelude::*;

use super::*;
use crate::model::{GrayBox, synthetic};

/// One host of 4 processors with one guest whose CPU, in cores, is as said, every 10 s.
fn after(settings: &Settings, cores: &[f64]) -> Vec<Vec<Hotspot>> {
    let mut watch = Watch::new(settings.clone());
    let mut cluster = synthetic::cluster(1, 1);
    let judge = |(index, cores): (usize, &f64)| {
        cluster.vms[0].usage.cpu_cores = *cores;
        watch.observe(&cluster, 10.0 * index as f64)
    };
    cores.iter().enumerate().map(judge).collect()
}

fn found_at(hotspots: &[Vec<Hotspot>]) -> Vec<usize> {
    hotspots.iter().enumerate().filter(|(_, found)| !found.is_empty()).map(|(at, _)| at).collect()
}

#[test]
fn a_rise_is_a_hotspot_with_its_third_figure_and_a_spike_never() {
    let spike = after(&Settings::default(), &[1.0, 1.1, 1.0, 4.0, 1.0, 1.1, 1.0]);
    assert_eq!(found_at(&spike), Vec::<usize>::new());
    let rise = after(&Settings::default(), &[1.0, 1.1, 1.0, 3.8, 3.9, 3.8, 3.9]);
    assert_eq!(found_at(&rise), [5, 6]);
    let hotspot = &rise[6][0];
    assert_eq!((hotspot.host, hotspot.vm, hotspot.resource), (HostIndex(0), None, Resource::Cpu));
    assert_eq!(hotspot.since_s, 30.0);
    assert_eq!(hotspot.threshold, 0.85);
    assert!((hotspot.current - 0.975).abs() < 1e-9);
    let why = "CPU of host-0 is at 98 %, was above 85 % in 4 of the last 5 figures, and";
    assert!(hotspot.why.starts_with(why), "{}", hotspot.why);
}

#[test]
fn what_is_about_to_end_by_itself_is_none() {
    let sinking = after(&Settings::default(), &[4.0, 3.83, 3.66, 3.49]);
    assert_eq!(found_at(&sinking), [2], "after 3.49, less than the limit of 3.4 is expected");
    let most_aggressive = Settings { k: 1, n: 1, ..Settings::default() };
    assert_eq!(found_at(&after(&most_aggressive, &[1.0, 4.0, 1.0])), [1]);
}

#[test]
fn hosts_in_a_migration_and_silent_ones_are_not_judged_and_begin_anew() {
    let mut watch = Watch::new(Settings::default());
    let mut cluster = synthetic::cluster(1, 1);
    cluster.vms[0].usage.cpu_cores = 4.0;
    let mut judge = |at: u32, change: &dyn Fn(&mut Cluster)| {
        change(&mut cluster);
        watch.observe(&cluster, 10.0 * f64::from(at)).len()
    };
    assert_eq!([0, 1, 2].map(|at| judge(at, &|_| {})), [0, 0, 1]);
    assert_eq!(judge(3, &|cluster| cluster.hosts[0].is_migrating = true), 0);
    assert_eq!(judge(4, &|cluster| cluster.hosts[0].is_migrating = false), 0);
    assert_eq!([5, 6].map(|at| judge(at, &|_| {})), [0, 1], "figures from before do not count");
    assert_eq!(judge(7, &|cluster| cluster.hosts[0].state = HostState::Silent), 0);
    assert_eq!(judge(8, &|cluster| cluster.hosts[0].state = HostState::Draining), 1);
}

#[test]
fn a_guest_that_swaps_or_waits_or_is_late_is_named() {
    let mut watch = Watch::new(Settings::default());
    let mut cluster = synthetic::cluster(2, 6);
    cluster.vms[1].memory.swap_writes_per_s = 300.0;
    for waiting in [0, 2, 4] {
        cluster.vms[waiting].steal = 0.2 + 0.01 * waiting as f64;
    }
    cluster.vms[3].gray_box = Some(GrayBox {
        served_per_s: 90.0,
        dropped_per_s: 10.0,
        response_s: 0.3,
        promised_response_s: 0.2,
        promised_drops: 1.0,
        ..GrayBox::default()
    });
    let found = (0..3).map(|at| watch.observe(&cluster, f64::from(at))).last().unwrap();
    let mut named: Vec<_> =
        found.iter().map(|found| (found.host.0, found.vm.unwrap().0, found.resource)).collect();
    named.sort_unstable();
    assert_eq!(named, [(0, 4, Resource::Cpu), (1, 1, Resource::Memory), (1, 3, Resource::Cpu)]);
    let why: Vec<&str> = found.iter().map(|found| found.why.as_str()).collect();
    assert!(why[0].starts_with("Waiting of vm-4 for processors of host-0 is at 24 %"), "{why:?}");
    assert!(why[0].ends_with("2 more guests wait there"), "{why:?}");
    assert!(why[1].starts_with("What vm-1 on host-1 writes to its swap is at 300 pages/s"));
    assert!(why[2].starts_with("Response time of vm-3 on host-1 is at 150 % of what was promised"));
    cluster.vms[0].usage.cpu_cores = 4.0;
    let found = (3..6).map(|at| watch.observe(&cluster, f64::from(at))).last().unwrap();
    let cpu = found.iter().filter(|found| found.resource == Resource::Cpu && found.host.0 == 0);
    let cpu: Vec<&Hotspot> = cpu.collect();
    assert_eq!((cpu.len(), cpu[0].vm), (1, None), "one hotspot of what has one cause");
    assert!(
        cpu[0].why.ends_with("3 guests wait for it, most: vm-4, 24 % of its time"),
        "{}",
        cpu[0].why
    );
}

#[test]
fn who_vanishes_is_forgotten_and_who_comes_begins_anew() {
    let mut watch = Watch::new(Settings::default());
    let mut cluster = synthetic::cluster(2, 4);
    cluster.vms[3].memory.swap_writes_per_s = 300.0;
    let swaps =
        |watch: &mut Watch, cluster: &Cluster, at: u32| watch.observe(cluster, f64::from(at)).len();
    assert_eq!([0, 1, 2].map(|at| swaps(&mut watch, &cluster, at)), [0, 0, 1]);
    cluster.vms[3].host = HostIndex(0);
    assert_eq!([3, 4, 5].map(|at| swaps(&mut watch, &cluster, at)), [0, 0, 1]);
    let gone = cluster.vms.pop().unwrap();
    assert_eq!(swaps(&mut watch, &cluster, 6), 0);
    assert_eq!((watch.hosts.len(), watch.guests.len()), (2, 3));
    cluster.vms.push(gone);
    assert_eq!([7, 8, 9].map(|at| swaps(&mut watch, &cluster, at)), [0, 0, 1]);
}

#[test]
fn by_cusum_steal_and_not_use_is_the_sign() {
    let settings = Settings { kind: Kind::Cusum, ..Settings::default() };
    assert_eq!(found_at(&after(&settings, &[4.0; 40])), Vec::<usize>::new());
    let mut watch = Watch::new(settings);
    let mut cluster = synthetic::cluster(1, 2);
    let mut steal = |at: u32, steal: f64| {
        cluster.vms[0].steal = steal;
        watch.observe(&cluster, 10.0 * f64::from(at))
    };
    assert!((0..20).all(|at| steal(at, 0.02).is_empty()));
    assert!(steal(20, 0.6).is_empty(), "one figure lifts the mean to 0.08 only");
    let found = steal(21, 0.6);
    assert_eq!((found[0].vm, found[0].resource), (Some(VmIndex(0)), Resource::Cpu));
    let why = "Waiting of vm-0 for processors of host-0 has risen: 13 % on average (above 10 %";
    assert!(found[0].why.starts_with(why), "{}", found[0].why);
    let calm = (22..60).find(|at| steal(*at, 0.02).is_empty());
    assert!((23..30).contains(&calm.unwrap()), "{calm:?}");
}

#[test]
fn memory_that_was_too_full_from_the_first_figure_is_found_when_it_has_settled() {
    let settings = Settings { kind: Kind::Both, ..Settings::default() };
    let mut watch = Watch::new(settings.clone());
    let mut cluster = synthetic::cluster(1, 1);
    cluster.vms[0].usage.memory_mib = 0.9 * 16384.0;
    let found: Vec<_> = (0..20).map(|at| watch.observe(&cluster, 10.0 * f64::from(at))).collect();
    assert_eq!(found_at(&found), (settings.cusum.settled - 1..20).collect::<Vec<_>>());
    assert_eq!(
        found[19][0].why,
        "Memory of host-0 stays high: 90 % on average (above 80 % for 20 figures), 90 % now"
    );
}

#[test]
fn the_worst_is_first() {
    let mut watch = Watch::new(Settings::default());
    let mut cluster = synthetic::cluster(3, 3);
    for (vm, cores) in [(0, 3.5), (1, 4.0), (2, 3.7)] {
        cluster.vms[vm].usage.cpu_cores = cores;
    }
    cluster.hosts[0].capacity.disk_mib = 0.0;
    let found = (0..3).map(|at| watch.observe(&cluster, f64::from(at))).last().unwrap();
    assert_eq!(found.iter().map(|found| found.host.0).collect::<Vec<_>>(), [1, 2, 0]);
}

#[test]
fn settings_that_cannot_be_say_which_and_what_to_do() {
    assert_eq!(Settings::default().check(), Ok(()));
    let text = "kind = \"both\"\nk = 4\nn = 3\n[threshold]\ncpu = 0.7\n";
    let settings: Settings = toml::from_str(text).unwrap();
    assert_eq!(settings.threshold.cpu, 0.7);
    assert_eq!(settings.threshold.network, 0.80);
    let refused = settings.check().unwrap_err().to_string();
    assert_eq!(refused, "`n = 3` cannot be: take a number from `k` to 1000");
    let percent: Settings = toml::from_str("[threshold]\ncpu = 85.0\n").unwrap();
    let refused = percent.check().unwrap_err().to_string();
    assert!(refused.starts_with("`threshold.cpu = 85` cannot be"), "{refused}");
    let unknown = toml::from_str::<Settings>("[threshold]\ncpus = 0.85\n").unwrap_err();
    assert!(unknown.to_string().contains("line 2"), "{unknown}");
    let nan: Settings = toml::from_str("[cusum]\nalpha = nan\n").unwrap();
    assert_eq!(nan.check().unwrap_err().key, "cusum.alpha");
}

fn any_share() -> impl Strategy<Value = f64> {
    prop_oneof![6 => 0.0..6.0, 1 => Just(f64::NAN), 1 => any::<f64>(), 1 => Just(1e300)]
}

proptest! {
    /// A host is a hotspot exactly if counting by hand says so: k of the last n above, with the prediction that does
    /// not matter here, since it is of the last figure alone.
    #[test]
    fn counting_by_hand_agrees(cores in prop::collection::vec(0.0..4.0, 1..40), k in 1_usize..5, n in 1_usize..7) {
        let settings = Settings { k: k.min(n), n, window: n, ..Settings::default() };
        let found = after(&settings, &cores);
        for (at, found) in found.iter().enumerate() {
            let last = &cores[(at + 1).saturating_sub(n)..=at];
            let above = last.iter().filter(|cores| **cores / 4.0 > 0.85).count();
            if !found.is_empty() {
                prop_assert!(above >= settings.k && found[0].predicted > 0.85);
            } else if above == last.len() && above >= settings.k && last.len() < 3 {
                prop_assert!(false, "all {above} above, too few for another prediction than the last");
            }
        }
    }

    /// Whatever is told, at whatever time, by hosts and guests that come and go: no panic, nothing unjudgeable is judged,
    /// and memory follows the snapshot.
    #[test]
    fn nothing_that_is_told_does_harm(
        told in prop::collection::vec((any_share(), any_share(), any_share(), 0_usize..4, 1_usize..6, any_share()), 1..40),
        kind in prop_oneof![Just(Kind::Threshold), Just(Kind::Cusum), Just(Kind::Both)],
        k in 0_usize..4, gap_s in any_share(),
    ) {
        let mut watch = Watch::new(Settings { kind, k, gap_s, ..Settings::default() });
        for (cores, steal, swaps, quiet, vms, now_s) in told {
            let mut cluster = synthetic::cluster(3, vms);
            cluster.vms[0].usage.cpu_cores = cores;
            cluster.vms[0].steal = steal;
            cluster.vms[0].memory.swap_writes_per_s = swaps;
            cluster.vms[0].gray_box = Some(GrayBox {
                dropped_per_s: swaps, response_s: cores, promised_response_s: steal, ..GrayBox::default()
            });
            if let Some(host) = cluster.hosts.get_mut(quiet) {
                host.is_migrating = true;
            }
            let found = watch.observe(&cluster, now_s);
            prop_assert!(found.iter().all(|hotspot| hotspot.host.0 != quiet));
            prop_assert!(found.iter().all(|hotspot| hotspot.current.is_finite() && hotspot.predicted.is_finite()));
            prop_assert!(watch.guests.len() <= 5.max(vms) && watch.hosts.len() == 3 || cluster.check().is_err());
        }
    }
}
