//! Entry points for fuzzers: what other agents, files and the kernel might say. `scheduler/fuzz` calls these with libFuzzer;
//! a test replays its corpus.
//!
//! Nothing here may panic, and what is accepted keeps the limits: reports come from whoever may write to the store.

use std::path::Path;

use serde_json::Value;

use crate::agent::config::Config;
use crate::model::{HostIndex, Resource};
use crate::plan::{self, Action, Hotspot, Limits, Problem};
use crate::profile::assemble::Settings;
use crate::profile::{HostReport, Received, assemble, parse};
use crate::simulate::Scenario;

/// Hosts that a plan is made for, of one input: planning is what takes time.
const HOSTS_MAX: usize = 16;

/// A report in each line. Returns how many were accepted; of those a cluster is made, and each policy plans for it.
pub fn reports(bytes: &[u8]) -> usize {
    let now_s = 1000.0;
    let accepted: Vec<Received> = bytes
        .split(|byte| *byte == b'\n')
        .filter_map(|line| HostReport::from_json(line).ok())
        .map(|report| {
            let again = serde_json::to_vec(&report).map(|text| HostReport::from_json(&text));
            assert!(
                matches!(&again, Ok(Ok(again)) if *again == report),
                "it is read as it is written"
            );
            Received { report, at_s: now_s }
        })
        .take(HOSTS_MAX)
        .collect();
    let cluster = assemble(&accepted, &Settings::default(), now_s).cluster;
    assert!(cluster.hosts.len() <= accepted.len(), "no host is made up");
    let hotspot = |(number, _)| Hotspot {
        host: HostIndex(number),
        vm: None,
        resource: if number % 2 == 0 { Resource::Cpu } else { Resource::Memory },
        current: 1.0,
        predicted: 1.0,
        threshold: 0.85,
        since_s: now_s,
        why: String::new(),
    };
    let hotspots: Vec<Hotspot> = cluster.hosts.iter().enumerate().map(hotspot).collect();
    let limits = Limits::default();
    let problem = Problem { cluster: &cluster, hotspots: &hotspots, limits: &limits, now_s };
    for policy in plan::NAMES.iter().filter_map(|name| plan::policy(name)) {
        for step in policy.plan(&problem).steps {
            let is_known = match step.action {
                Action::Migrate { vm, from, to, .. } => {
                    let hosts = cluster.hosts.len();
                    vm.0 < cluster.vms.len() && from.0 < hosts && to.0 < hosts && from != to
                }
                Action::Resize { vm, to_mib, .. } => vm.0 < cluster.vms.len() && to_mib.is_finite(),
            };
            assert!(is_known, "{}: {step:?}", policy.name());
        }
    }
    accepted.len()
}

/// An agent's configuration. Returns whether it was accepted.
pub fn config(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    match Config::parse(&text, Path::new("agent.toml")) {
        Ok(_) => true,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    }
}

/// A scenario. Returns whether it was accepted.
pub fn scenario(bytes: &[u8]) -> bool {
    Scenario::parse(&String::from_utf8_lossy(bytes)).is_ok()
}

/// What the kernel, nftables and QEMU answer. Returns how many readers found something.
pub fn answers(bytes: &[u8]) -> usize {
    let text = &*String::from_utf8_lossy(bytes);
    let json: Value = serde_json::from_slice(bytes).unwrap_or_default();
    let figures = [
        parse::cpu_max_cores(text),
        parse::qmp::ram_mib(&json),
        parse::qmp::balloon_leaves_mib(&json),
    ];
    let mut found = figures.iter().flatten().count();
    found += [
        parse::cpu_time(text).is_some(),
        parse::host_memory(text).is_some(),
        parse::stalled(text).is_some(),
        !parse::interfaces(text).is_empty(),
        parse::thread_waited_ns(text).is_some(),
        parse::process_ticks(text).is_some(),
        parse::resident_pages(text).is_some(),
        parse::tap_name(text).is_some(),
        parse::number(text).is_some(),
        parse::cgroup_cpu_us(text).is_some(),
        parse::cgroup_cache_bytes(text).is_some(),
        parse::cpu_cgroup(text).is_some(),
        parse::nft::sent(bytes).is_some(),
        parse::qmp::disk_bytes(&json) > 0,
        !parse::qmp::ethernet_addresses(&json).is_empty(),
        parse::qmp::balloon_stats(&json).is_some(),
    ]
    .iter()
    .filter(|found| **found)
    .count();
    found
}
