//! Hosts in namespaces: they reach each other, have the processors that they are given, and leave nothing behind.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use framework::cpu;
use framework::process::{Process, bound_in};
use framework::{Cluster, HostPlan, wait};

/// The machine may have something else to do for a while.
const UNLIMITED_WITHIN: Duration = Duration::from_secs(120);

/// Cores that a busy program gets in a host, over a second.
fn cores(cluster: &Cluster, host: usize) -> Result<f64> {
    let host = cluster.host(host);
    let folders = host.cgroup().folders();
    let mut command = bound_in(Path::new("sh"), Some(host.netns().name()), folders);
    command.args(["-c", "while :; do :; done"]);
    let process = Process::start("a busy loop", command)?;
    std::thread::sleep(Duration::from_millis(300));
    let (before, began) = (cpu::seconds(process.pid())?, Instant::now());
    std::thread::sleep(Duration::from_secs(1));
    Ok((cpu::seconds(process.pid())? - before) / began.elapsed().as_secs_f64())
}

#[test]
fn hosts_have_what_they_are_given_and_leave_nothing() -> Result<()> {
    let cluster = Cluster::create(&["a", "b", "c"].map(|name| HostPlan::new(name, 0.2, 256)))?;
    for from in cluster.hosts() {
        for to in cluster.hosts() {
            let address = to.address().to_string();
            from.netns().run(&["busybox", "ping", "-c", "1", "-W", "2", &address])?;
        }
    }
    cluster.host(0).limit()?;
    let limited = cores(&cluster, 0)?;
    println!("limited to 0.2: {limited:.3}");
    // Linux gives no more, and less only if the whole machine is short of time.
    ensure!((0.1..0.23).contains(&limited), "{limited}");
    cluster.host(0).unlimit()?;
    wait::until("a host without limit to have more", UNLIMITED_WITHIN, || {
        let free = cores(&cluster, 0)?;
        println!("without limit: {free:.3}");
        Ok((free > 0.25).then_some(()))
    })?;
    let left: Vec<PathBuf> = cluster
        .hosts()
        .iter()
        .flat_map(|host| {
            let netns = Path::new("/run/netns").join(host.netns().name());
            host.cgroup().folders().iter().cloned().chain([netns, host.folder().to_owned()])
        })
        .collect();
    ensure!(left.iter().all(|path| path.exists()), "{left:?}");
    drop(cluster);
    ensure!(left.iter().all(|path| !path.exists()), "{left:?}");
    Ok(())
}
