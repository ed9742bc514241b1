//! Hosts in namespaces with processors of their own, guests that are given work, and what each host reports of itself.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::turn;
use framework::cluster::{guest, guest_address, guest_mac};
use framework::{Cluster, ClusterHost, Env, HostPlan, QemuKind, Vm, load};
use scheduler::profile::report::MemorySource;
use scheduler::profile::{GuestReport, HostReport, Profiler, Settings};
use serde::Deserialize;

/// Two readings are so far apart.
const INTERVAL: Duration = Duration::from_secs(6);

const BOOT_TIMEOUT: Duration = Duration::from_secs(240);

/// What is read of an agent's configuration here.
#[derive(Deserialize)]
struct Config {
    profile: Settings,
}

/// A host's report over [`INTERVAL`], after readings whose rates say nothing yet.
fn report(host: &ClusterHost) -> Result<std::thread::JoinHandle<Result<HostReport>>> {
    let config: Config = toml::from_str(&host.profile_toml(10.0, host.plan().memory_mib))
        .context("No configuration")?;
    config.profile.check()?;
    let name = host.plan().name.clone();
    host.spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut profiler = Profiler::new(name, config.profile);
            for _ in 0..2 {
                // The second one looks into guests' memory, and watches their taps.
                profiler.report().await;
            }
            tokio::time::sleep(INTERVAL).await;
            let began_us = thread_us()?;
            let report = profiler.report().await;
            println!("{}: {} us of a processor, without nft", report.host, thread_us()? - began_us);
            profiler.end().await.map_err(anyhow::Error::msg)?;
            Ok(report)
        })
    })
}

/// Processor time of this thread.
fn thread_us() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat")?;
    Ok(text.split_whitespace().next().context("schedstat")?.parse::<u64>()? / 1000)
}

fn reports(cluster: &Cluster) -> Result<Vec<HostReport>> {
    let readings: Vec<_> = cluster.hosts().iter().map(report).collect::<Result<_>>()?;
    let mut reports = vec![];
    for reading in readings {
        let report = reading.join().map_err(|_| anyhow::anyhow!("A profiler panicked"))??;
        println!("{}", summary(&report));
        report.check()?;
        reports.push(report);
    }
    Ok(reports)
}

fn summary(report: &HostReport) -> String {
    let HostReport { host, capacity, used, pressure, .. } = report;
    let mut text = format!("{host}: {used:?} of {capacity:?}, {pressure:?}\n");
    for guest in &report.guests {
        text += &format!(
            "  {}: {:.2} cores, steal {:.2}, {:.2} Mbit/s to {:?}, {:.2} MiB/s of disk, {:?}\n",
            guest.name,
            guest.cpu_cores,
            guest.steal,
            guest.network_mbit,
            guest.sent,
            guest.disk_mib,
            guest.memory,
        );
    }
    text + &report.troubles.join("\n")
}

fn find<'a>(report: &'a HostReport, name: &str) -> Result<&'a GuestReport> {
    let found = report.guests.iter().find(|guest| guest.name == name);
    found.with_context(|| format!("{name} is not reported by {}", report.host))
}

/// Boots guests with these numbers on these hosts, while nothing limits them.
fn boot(cluster: &Cluster, env: &Env, on: &[(u8, usize)]) -> Result<Vec<Vm>> {
    let mut guests = vec![];
    for (number, host) in on {
        let spec = guest(&format!("vm{number}"), *number, QemuKind::V10_0);
        guests.push(cluster.host(*host).start(env, spec)?);
    }
    for guest in &mut guests {
        guest.wait_ready(BOOT_TIMEOUT)?;
    }
    for host in cluster.hosts() {
        host.limit()?;
    }
    Ok(guests)
}

#[test]
fn three_hosts_report_what_six_guests_do() -> Result<()> {
    let _turn = turn();
    let env = Env::load()?;
    let plans = ["a", "b", "c"].map(|name| HostPlan::new(name, 0.5, 400));
    let cluster = Cluster::create(&plans)?;
    let mut guests = boot(&cluster, &env, &[(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 2)])?;
    // A host whose guests want more than it has; talk inside a host and across hosts; memory.
    load::cpu(&mut guests[0], 60)?;
    load::cpu(&mut guests[1], 60)?;
    load::send(&mut guests[2], guest_address(4), 2000)?;
    load::send(&mut guests[3], guest_address(5), 1000)?;
    load::memory(&mut guests[5], 30)?;
    std::thread::sleep(Duration::from_secs(5));
    let [a, b, c] = reports(&cluster)?.try_into().map_err(|_| anyhow::anyhow!("Three hosts"))?;

    for report in [&a, &b, &c] {
        ensure!(report.capacity.cpu_cores == 0.5 && report.capacity.memory_mib == 400.0);
        ensure!(report.guests.len() == 2, "Guests of {}", report.host);
        let guests: f64 = report.guests.iter().map(|guest| guest.cpu_cores).sum();
        let off = (report.used.cpu_cores - guests).abs();
        ensure!(off < 0.05, "{}: {guests} of {}", report.host, report.used.cpu_cores);
        for guest in &report.guests {
            ensure!(guest.memory.source == MemorySource::Introspection, "{guest:?}");
            ensure!(guest.memory.max_mib == 128.0 && guest.memory.needed_mib > 10.0, "{guest:?}");
            ensure!(!guest.is_held && guest.vcpus == 1 && guest.addresses.len() == 1, "{guest:?}");
        }
    }
    ensure!((0.3..0.53).contains(&a.used.cpu_cores), "A host that is overloaded is full");
    for name in ["vm1", "vm2"] {
        let guest = find(&a, name)?;
        ensure!(guest.steal > 0.2, "{name} is not stolen from: {}", guest.steal);
        ensure!((0.1..0.4).contains(&guest.cpu_cores), "{name} has {}", guest.cpu_cores);
    }
    let (within, across) = (find(&b, "vm3")?, find(&b, "vm4")?);
    for (guest, to, mbit) in [(within, 4, 2.0), (across, 5, 1.0)] {
        let sent = guest.sent.iter().find(|sent| sent.to == guest_mac(to));
        let sent = sent.with_context(|| format!("{} sends nothing to vm{to}", guest.name))?;
        ensure!((0.3 * mbit..1.2 * mbit).contains(&sent.mbit), "{} Mbit/s", sent.mbit);
    }
    ensure!(across.network_mbit > within.network_mbit, "What is received counts, too");
    // Of both ends of the uplink: what leaves, and what is not the guests'.
    ensure!((0.25..1.5).contains(&b.used.network_mbit), "{} Mbit/s", b.used.network_mbit);
    let (idle, full) = (find(&c, "vm5")?.memory, find(&c, "vm6")?.memory);
    let more_mib = full.needed_mib - idle.needed_mib;
    ensure!((26.0..36.0).contains(&more_mib), "30 MiB more are {more_mib} MiB");
    for guest in &guests {
        guest.assert_clean()?;
    }
    Ok(())
}
