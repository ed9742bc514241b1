//! Namespaces, links, and the promise that nothing outlives the test.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use framework::engine::Engine;
use framework::netns::{Netns, NetnsPair};
use framework::process::{Process, bound};
use framework::split_net::SplitNet;

const PORT: &str = "5001";

/// Sends `mib` MiB over TCP from the source to the destination and returns the seconds it took.
fn send(pair: &NetnsPair, mib: u64) -> Result<f64> {
    let shell = Path::new("/bin/sh");
    let receive = format!("exec busybox nc -l -p {PORT} -e sh -c 'cat > /dev/null'");
    let receiver = Engine::start(shell, &["-c", &receive], Some(pair.destination.name()))?;
    std::thread::sleep(Duration::from_millis(300));
    let (address, bytes) = (NetnsPair::DESTINATION, mib << 20);
    let script = format!("exec busybox nc {address} {PORT} -e head -c {bytes} /dev/zero");
    let start = Instant::now();
    let sender = Engine::start(shell, &["-c", &script], Some(pair.source.name()))?;
    receiver.wait(Duration::from_secs(60))?.success()?;
    let seconds = start.elapsed().as_secs_f64();
    drop(sender);
    Ok(seconds)
}

fn pings(from: &Netns, to: Ipv4Addr) -> bool {
    from.run(&["busybox", "ping", "-c", "1", "-W", "1", &to.to_string()]).is_ok()
}

fn reaches(pair: &NetnsPair) -> bool {
    pings(&pair.source, NetnsPair::DESTINATION)
}

#[test]
fn hosts_of_a_split_reach_servers_by_links_of_their_own() -> Result<()> {
    let net = SplitNet::create(2, 1_000_000_000)?;
    ensure!(net.source_links() == ["link0", "link1", "link2"], "{:?}", net.source_links());
    let before = net.source_bytes()?;
    ensure!(pings(&net.source, SplitNet::MAIN), "The source does not reach the main host");
    for number in 0..2 {
        let server = SplitNet::server(number);
        let device = net.source_links()[1 + number];
        let sent = net.source.bytes(device)?.1;
        ensure!(pings(&net.source, server), "The source does not reach {server}");
        ensure!(net.source.bytes(device)?.1 > sent, "It went over another link than {device}");
        let seen = net.source_bytes()?;
        ensure!(pings(&net.main, server), "The main host does not reach {server}");
        // What else the kernel says on a new link is a few hundred bytes.
        ensure!(net.source_bytes()?.0 - seen.0 < 1000, "It went by way of the source");
    }
    let after = net.source_bytes()?;
    ensure!(after.0 > before.0 && after.1 > before.1, "Nothing was counted");
    let names: Vec<String> = [&net.source, &net.main]
        .into_iter()
        .chain(&net.servers)
        .map(|netns| netns.name().to_owned())
        .collect();
    drop(net);
    ensure!(names.iter().all(|name| !Path::new("/run/netns").join(name).exists()), "Left behind");
    ensure!(SplitNet::create(SplitNet::SERVERS_MAX + 1, 0).is_err(), "More servers than devices");
    Ok(())
}

#[test]
fn a_link_is_shaped_counted_cut_and_mended() -> Result<()> {
    let pair = NetnsPair::create(40_000_000)?;
    ensure!(reaches(&pair), "The hosts do not reach each other");
    let before = pair.bytes()?.0;
    let seconds = send(&pair, 10)?;
    let bytes = pair.bytes()?.0 - before;
    let rate = bytes as f64 * 8.0 / seconds;
    println!("10 MiB at 40 Mbit/s: {seconds:.2} s, {bytes} bytes, {:.1} Mbit/s", rate / 1e6);
    ensure!((10 << 20..12 << 20).contains(&bytes), "{bytes} bytes were counted");
    ensure!((30e6..46e6).contains(&rate), "{rate} bits a second");
    pair.shape(0)?;
    let seconds = send(&pair, 10)?;
    ensure!(seconds < 1.0, "10 MiB without a limit took {seconds} s");
    pair.cut()?;
    ensure!(!reaches(&pair), "The cut link still carries");
    pair.mend()?;
    ensure!(reaches(&pair), "The mended link does not carry");
    let names = [pair.source.name().to_owned(), pair.destination.name().to_owned()];
    drop(pair);
    ensure!(names.iter().all(|name| !Path::new("/run/netns").join(name).exists()), "Left behind");
    Ok(())
}

/// Ran by the test below in a process of its own, which is killed.
#[test]
fn helper_that_is_killed() -> Result<()> {
    let Ok(path) = std::env::var("FRAMEWORK_HELPER_PID_FILE") else { return Ok(()) };
    let mut command = bound(Path::new("sleep"), None);
    command.arg("120");
    let process = Process::start("sleep", command)?;
    // The kernel is asked by `setpriv`, just before it becomes `sleep`.
    std::thread::sleep(Duration::from_millis(500));
    std::fs::write(path, process.pid().to_string())?;
    std::thread::sleep(Duration::from_secs(100));
    Ok(())
}

#[test]
fn children_die_with_a_killed_test() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("pid");
    let helper = Engine::start_with(
        &std::env::current_exe()?,
        &["--exact", "helper_that_is_killed"],
        None,
        &[("FRAMEWORK_HELPER_PID_FILE", &file.to_string_lossy())],
    )?;
    let pid = framework::wait::until("the helper's child", Duration::from_secs(20), || {
        Ok(std::fs::read_to_string(&file).ok().filter(|text| !text.is_empty()))
    })?;
    let child = format!("/proc/{pid}/cmdline");
    ensure!(std::fs::read_to_string(&child)?.contains("sleep"), "The child is not there");
    helper.kill()?;
    framework::wait::until("the child's end", Duration::from_secs(5), || {
        let text = std::fs::read_to_string(&child).unwrap_or_default();
        Ok((!text.contains("sleep")).then_some(()))
    })
}
