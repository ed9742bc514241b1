//! Estimates of peaks, and what they are made of.

use proptest::prelude::*;

use super::*;
use crate::model::{GrayBox, synthetic};

fn near(one: f64, other: f64) -> bool {
    (one - other).abs() < 1e-9
}

#[test]
fn a_peak_is_what_was_wanted_in_all_but_a_twentieth_of_the_time() {
    let mut estimates = Estimates::new(Settings::default());
    let mut cluster = synthetic::cluster(2, 2);
    for index in 0..40_u32 {
        // Once in twenty it wants more.
        cluster.vms[0].usage.cpu_cores = if index % 20 == 5 { 1.9 } else { 0.4 };
        cluster.vms[0].usage.disk_mib = f64::from(index);
        estimates.observe(&mut cluster, 10.0 * f64::from(index));
    }
    assert!(near(cluster.vms[0].peak.cpu_cores, 0.4));
    assert!(near(cluster.vms[0].peak.disk_mib, 39.0), "never less than now");
    cluster.vms[0].usage.disk_mib = 0.0;
    estimates.observe(&mut cluster, 400.0);
    assert!(near(cluster.vms[0].peak.disk_mib, 37.0), "rank 39 of 41");
    estimates.observe(&mut cluster, 2000.0);
    assert!(near(cluster.vms[0].peak.disk_mib, 0.0), "figures grow old");
}

#[test]
fn who_is_capped_wants_more_than_it_takes() {
    let mut cluster = synthetic::cluster(1, 4);
    // 4 processors, 4 guests with 2 each: a fair share is 1.
    cluster.vms.iter_mut().for_each(|vm| vm.usage.cpu_cores = 1.0);
    cluster.vms[3].usage.cpu_cores = 0.9 - 1e-6;
    Estimates::new(Settings::default()).observe(&mut cluster, 0.0);
    assert!(near(cluster.vms[0].peak.cpu_cores, 1.2), "a tenth of two processors more");
    assert!(near(cluster.vms[3].peak.cpu_cores, 0.9 - 1e-6), "it does not take its fair share");
    cluster.vms[3].steal = 0.25;
    Estimates::new(Settings::default()).observe(&mut cluster, 0.0);
    assert!(near(cluster.vms[3].peak.cpu_cores, (0.9 - 1e-6) / 0.75 + 0.2), "it had to wait");
    cluster.vms[3].steal = 1.0;
    Estimates::new(Settings::default()).observe(&mut cluster, 0.0);
    assert!(near(cluster.vms[3].peak.cpu_cores, 2.0), "never more than its processors");
}

#[test]
fn a_full_interface_hides_what_is_wanted_of_it() {
    let mut cluster = synthetic::cluster(2, 4);
    cluster.vms[0].usage.network_mbit = 700.0;
    cluster.vms[2].usage.network_mbit = 290.0;
    Estimates::new(Settings::default()).observe(&mut cluster, 0.0);
    assert!(near(cluster.vms[0].peak.network_mbit, 750.0));
    assert!(near(cluster.vms[2].peak.network_mbit, 290.0), "less than its fair half");
    assert!(near(cluster.vms[1].peak.network_mbit, 10.0));
}

#[test]
fn memory_grows_by_steps_while_a_guest_swaps() {
    let mut estimates = Estimates::new(Settings::default());
    let mut cluster = synthetic::cluster(1, 1);
    let mut peak_mib = |swap_writes_per_s: f64, is_migrating: bool| {
        cluster.vms[0].memory.swap_writes_per_s = swap_writes_per_s;
        cluster.vms[0].is_migrating = is_migrating;
        estimates.observe(&mut cluster, 0.0);
        cluster.vms[0].peak.memory_mib
    };
    assert_eq!(peak_mib(149.0, false), 1024.0);
    assert_eq!(peak_mib(151.0, false), 1056.0);
    assert_eq!(peak_mib(500.0, false), 1088.0);
    assert_eq!(peak_mib(500.0, true), 1088.0, "its migration is in its figures");
    assert_eq!((0..20).map(|_| peak_mib(500.0, false)).last(), Some(1024.0 + 8.0 * 32.0));
    assert_eq!(peak_mib(0.0, false), 1024.0);
    cluster.vms[0].memory.max_mib = 1040.0;
    cluster.vms[0].memory.swap_writes_per_s = 500.0;
    estimates.observe(&mut cluster, 0.0);
    assert_eq!(cluster.vms[0].peak.memory_mib, 1040.0);
}

/// 100 requests a second of 5 ms each, spread as an exponential distribution spreads them; promised are 20 ms.
const SHOP: GrayBox = GrayBox {
    served_per_s: 90.0,
    dropped_per_s: 10.0,
    response_s: 0.01,
    service_s: 0.005,
    arrival_variance_s2: 0.0001,
    service_variance_s2: 0.000_025,
    promised_response_s: 0.02,
    promised_drops: 0.01,
};

#[test]
fn the_bound_is_what_the_paper_has() {
    // 1 / (0.005 + 0.000125 / (2 · 0.015)) = 1 / 0.0091666…
    assert!((gg1::capacity_per_s(&SHOP).unwrap() - 109.090_909).abs() < 1e-5);
    assert!((gg1::scale(&SHOP, 240.0).unwrap() - 2.2).abs() < 1e-9);
    let late = GrayBox { promised_response_s: 0.005, ..SHOP };
    assert_eq!(gg1::scale(&late, 1.0), Some(f64::INFINITY));
    assert_eq!(gg1::scale(&GrayBox { promised_response_s: 0.0, ..SHOP }, 1.0), None);
    assert_eq!(gg1::scale(&GrayBox { service_s: f64::NAN, ..SHOP }, 1.0), None);
}

#[test]
fn a_promise_is_provided_for() {
    let mut cluster = synthetic::cluster(1, 4);
    cluster.vms.iter_mut().for_each(|vm| vm.usage.cpu_cores = 1.0);
    cluster.vms[1].gray_box = Some(SHOP);
    Estimates::new(Settings::default()).observe(&mut cluster, 0.0);
    assert!(near(cluster.vms[1].peak.cpu_cores, 1.2), "λ is below the bound: the rest is enough");
    cluster.vms[1].gray_box = Some(GrayBox { served_per_s: 150.0, ..SHOP });
    Estimates::new(Settings::default()).observe(&mut cluster, 0.0);
    let scale = 160.0 * (0.005 + 0.000_125 / 0.03);
    assert!(near(cluster.vms[1].peak.cpu_cores, scale), "of a fair share of one processor");
    cluster.vms[1].gray_box = Some(GrayBox { promised_response_s: 0.001, ..SHOP });
    Estimates::new(Settings::default()).observe(&mut cluster, 0.0);
    assert!(near(cluster.vms[1].peak.cpu_cores, 2.0), "all that it can have");
}

#[test]
fn settings_that_cannot_be_say_which_and_what_to_do() {
    assert_eq!(Settings::default().check(), Ok(()));
    let settings: Settings = toml::from_str("percentile = 95.0").unwrap();
    let refused = settings.check().unwrap_err().to_string();
    assert_eq!(refused, "`percentile = 95` cannot be: take a share from 0 to 1 (95 % is 0.95)");
}

fn any_amount() -> impl Strategy<Value = f64> {
    prop_oneof![6 => 0.0..5.0, 1 => 0.0..1e9, 1 => Just(f64::NAN), 1 => Just(f64::INFINITY)]
}

proptest! {
    /// Whatever is told: no panic, and a peak is at least what is taken and at most what there can be.
    #[test]
    fn peaks_are_between_what_is_taken_and_what_can_be(
        told in prop::collection::vec(
            (prop::array::uniform4(any_amount()), 0.0..1.5, any_amount(), prop::array::uniform6(any_amount()), 1_usize..5),
            1..30,
        ),
    ) {
        let mut estimates = Estimates::new(Settings::default());
        for (at, (usage, steal, swaps, gray, vms)) in told.into_iter().enumerate() {
            let mut cluster = synthetic::cluster(2, vms);
            let [cpu_cores, memory_mib, network_mbit, disk_mib] = usage;
            let vm = &mut cluster.vms[0];
            vm.usage = Amounts { cpu_cores, memory_mib, network_mbit, disk_mib };
            (vm.steal, vm.memory.swap_writes_per_s) = (steal, swaps);
            vm.gray_box = Some(GrayBox {
                served_per_s: gray[0], dropped_per_s: gray[1], service_s: gray[2],
                arrival_variance_s2: gray[3], service_variance_s2: gray[4],
                promised_response_s: gray[5], ..GrayBox::default()
            });
            let before = cluster.clone();
            estimates.observe(&mut cluster, at as f64);
            if before.check().is_err() {
                continue;
            }
            prop_assert!(cluster.check().is_ok());
            for vm in &cluster.vms {
                prop_assert!(vm.usage.fits(&vm.peak));
                prop_assert!(vm.peak.cpu_cores <= vm.usage.cpu_cores.max(f64::from(vm.vcpus)));
                prop_assert!(vm.peak.memory_mib <= vm.usage.memory_mib.max(vm.memory.max_mib));
            }
            prop_assert_eq!(estimates.guests.len(), vms);
        }
    }
}
