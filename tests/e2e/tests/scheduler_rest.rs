//! What an agent costs its host while nothing happens.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use e2e::turn;
use framework::process::Process;
use framework::{Cluster, Env, HostPlan, cpu, memory, wait};
use transport::pki;

const GUESTS: u8 = 50;

/// The default.
const INTERVAL_S: f64 = 10.0;

/// So long it is looked at: six readings.
const REST: Duration = Duration::from_secs(60);

const PATIENCE: Duration = Duration::from_secs(60);

/// The agent itself: what starts it becomes it.
fn is_agent(pid: u32) -> bool {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.starts_with("godwit-schedule")
}

#[test]
fn an_agent_at_rest_takes_little_with_fifty_guests() -> Result<()> {
    let _turn = turn();
    let env = Env::load()?;
    let cluster = Cluster::create(&[HostPlan::new("a", 2.0, 8000)])?;
    let host = cluster.host(0);
    let qemus: Vec<Process> =
        (0..GUESTS).map(|number| host.start_light(&env, number)).collect::<Result<_>>()?;
    let folder = tempfile::tempdir()?;
    let authority = folder.path().join("ca");
    pki::init(&authority, &pki::InitOptions::default())?;
    pki::issue(&authority, "a", &pki::IssueOptions::default())?;
    let config = folder.path().join("agent.toml");
    let text = format!(
        "identity = {:?}\nlisten = \"{}:7790\"\nstate = {:?}\n[store]\nkind = \"embedded\"\npath = {:?}\n{}",
        authority.join("a"),
        host.address(),
        folder.path().join("state"),
        folder.path().join("store.sqlite"),
        host.profile_toml(INTERVAL_S, host.plan().memory_mib),
    );
    std::fs::write(&config, text)?;
    let program = env.scheduler()?;
    let mut agent = host.run(&program, &["agent", "--config", &config.display().to_string()])?;
    agent.wait_stderr("listening on", PATIENCE)?;
    let pid = agent.pid();
    ensure!(is_agent(pid), "{pid} is something else");
    // Two readings, with all that is asked only once.
    std::thread::sleep(Duration::from_secs_f64(INTERVAL_S * 1.5));
    let (before, began) = (cpu::seconds(pid)?, Instant::now());
    std::thread::sleep(REST);
    let share = (cpu::seconds(pid)? - before) / began.elapsed().as_secs_f64();
    let resident_mib = memory::peak_bytes(pid)? as f64 / 1_048_576.0;
    println!("{:.2} % of a processor, {resident_mib:.1} MiB", share * 100.0);
    ensure!(share < 0.01, "{:.2} % of a processor\n{}", share * 100.0, agent.stderr());
    ensure!(resident_mib < 60.0, "{resident_mib} MiB");
    // It did look at them: their taps are counted.
    let taps = wait::until("counters of taps", PATIENCE, || {
        let set = host.netns().run(&["nft", "list", "set", "bridge", "godwit_traffic", "guests"]);
        Ok(set.ok())
    })?;
    ensure!((0..GUESTS).all(|number| taps.contains(&format!("\"l{number}\""))), "{taps}");
    drop(qemus);
    Ok(())
}
