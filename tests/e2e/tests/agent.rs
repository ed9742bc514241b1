//! `migrate agent`: a host's memory server and receivers in one process.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use e2e::split::{EMPTY_WITHIN, OFFER, WORK_PAGES, WORKING_RESIDENT_MIB, at_work};
use e2e::{PATIENCE, Rig, check_alive, free_address, in_turn};
use framework::worker::{self, Phase};
use framework::{Engine, QemuKind, Vm, VmSpec, metrics, wait};
use nix::sys::signal::Signal;

const KIND: QemuKind = QemuKind::V10_0;

/// A running agent.
struct Agent {
    engine: Engine,
    metrics: String,
}

impl Agent {
    /// Starts one at the destination host; `parts` are the tables of its configuration.
    fn start(rig: &Rig, parts: &str) -> Result<Self> {
        let metrics = metrics::free_port()?;
        let (identity, journal) = (rig.destination.display(), rig.journal("destination"));
        let text = format!(
            "identity = \"{identity}\"\njournal = \"{journal}\"\nmetrics = \"{metrics}\"\n{parts}"
        );
        let file = rig.folder.path().join(format!("agent-{}.toml", metrics.replace(':', "-")));
        std::fs::write(&file, text).context("No configuration")?;
        let words = ["agent", "--config", &file.display().to_string()];
        let mut engine = Engine::start(&rig.migrate, &words, None)?;
        engine.wait_stderr("metrics on", PATIENCE)?;
        Ok(Self { engine, metrics })
    }

    /// Waits until it has begun to listen so many times.
    fn wait_listens(&self, times: usize) -> Result<()> {
        wait::until("the agent to listen", PATIENCE, || {
            let count = self.engine.stderr().matches("listening on").count();
            Ok((count >= times).then_some(()))
        })
        .with_context(|| self.engine.stderr())
    }

    /// Waits until its only receiver is in a state.
    fn wait_state(&self, state: &str) -> Result<()> {
        let label = format!("state=\"{state}\"");
        let is_in = |line: &str| {
            line.starts_with("godwit_agent_receiver{")
                && line.contains(&label)
                && line.ends_with(" 1")
        };
        wait::until(&label, PATIENCE, || Ok(self.told()?.lines().any(is_in).then_some(())))
            .with_context(|| self.engine.stderr())
    }

    fn told(&self) -> Result<String> {
        metrics::get(&self.metrics)
    }

    fn sum(&self, name: &str) -> Result<u64> {
        let told = self.told()?;
        metrics::sum(&told, name)?.with_context(|| format!("No {name}:\n{told}"))
    }

    /// Tells it to end, and that no guest needs it any more.
    fn end(mut self) -> Result<()> {
        self.engine.signal(Signal::SIGTERM)?;
        self.engine.wait(PATIENCE)?.success().map(drop)
    }
}

/// The table of a receiver.
fn receiver(qmp: &Path, listen: &str) -> String {
    format!("[[receive]]\nqmp = \"{}\"\nlisten = \"{listen}\"\n", qmp.display())
}

#[test]
fn guests_arrive_in_one_qemu_after_the_other() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let link = rig.folder.path().join("vm.qmp");
        let listen = free_address()?;
        let agent = Agent::start(&rig, &receiver(&link, &listen))?;
        agent.wait_state("no-socket")?;
        let spec = VmSpec::new("arrives", KIND).with("godwit.checker=size=24,seed=5");
        let mut vm = Vm::boot(&rig.env, spec)?;
        for turn in 1..=2 {
            let mut next = Vm::start(&rig.env, vm.spec().successor("next", KIND))?;
            // As if this QEMU had made its socket where the last one had its own.
            let made = rig.folder.path().join("made");
            std::os::unix::fs::symlink(next.qmp_engine(), &made)?;
            std::fs::rename(&made, &link)?;
            agent.wait_listens(turn)?;
            agent.wait_state("receives")?;
            let sent = rig.send(&vm, &listen, &[])?.wait(PATIENCE)?;
            ensure!(sent.code == Some(0), "{}\nagent: {}", sent.stderr, agent.engine.stderr());
            check_alive(&mut vm, &mut next)?;
            // The next `send` needs the monitor.
            agent.wait_state("occupied")?;
            vm = next;
        }
        vm.verify_checker(PATIENCE)?;
        agent.end()
    })
}

#[test]
fn a_split_guest_is_kept_and_paged_by_agents() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let servers = rig.memory_servers(&rig.server_identities(1)?, &OFFER)?;
        let address = metrics::free_port()?;
        let table = format!("[memory-server]\nlisten = \"{address}\"\ncapacity = \"1G\"\n");
        let keeper = Agent::start(&rig, &table)?;
        let mut source = Vm::boot(&rig.env, at_work(KIND))?;
        let mut vm = Vm::start(&rig.env, source.spec().successor("main", KIND))?;
        let listen = free_address()?;
        let table = receiver(&vm.qmp_engine(), &listen);
        let mut agent = Agent::start(&rig, &table)?;
        agent.wait_listens(1)?;
        let extra = ["--memory", address.as_str()];
        let split = rig.start_split(&source, &listen, &servers, WORKING_RESIDENT_MIB, &extra)?;
        let split = split.wait(PATIENCE)?;
        ensure!(split.code == Some(0), "{}\nagent: {}", split.stderr, agent.engine.stderr());
        check_alive(&mut source, &mut vm)?;
        ensure!(keeper.sum("godwit_memory_stored_pages")? > 0, "The agent keeps nothing");
        worker::set_phase(&mut vm, Phase::Hot)?;
        worker::wait_pages(&mut vm, WORK_PAGES, PATIENCE)?;
        ensure!(agent.sum("godwit_pager_fetched_faults_total")? > 0, "Nothing was fetched");
        // One word is not enough to leave a guest without its memory.
        agent.engine.signal(Signal::SIGTERM)?;
        agent.engine.wait_stderr("lacks pages", PATIENCE)?;
        worker::wait_pages(&mut vm, WORK_PAGES, PATIENCE)?;
        agent.engine.kill()?;
        let agent = Agent::start(&rig, &table)?;
        agent.wait_listens(1)?;
        worker::wait_pages(&mut vm, WORK_PAGES, PATIENCE)?;
        rig.pager(&vm).merge(PATIENCE)?;
        agent.wait_state("occupied")?;
        worker::set_phase(&mut vm, Phase::Idle)?;
        worker::check(&mut vm, PATIENCE)?;
        vm.verify_checker(PATIENCE)?;
        servers.iter().try_for_each(|server| server.wait_empty(EMPTY_WITHIN))?;
        agent.end()?;
        keeper.end()
    })
}

#[test]
fn a_configuration_that_makes_no_sense_ends_the_agent() -> Result<()> {
    let rig = Rig::new()?;
    let file = rig.folder.path().join("agent.toml");
    let identity = rig.destination.display();
    let table = "[memory-server]\nlisten = \"127.0.0.1:0\"\ncapacity = \"much\"\n";
    std::fs::write(&file, format!("identity = \"{identity}\"\n{table}"))?;
    let words = ["agent", "--config", &file.display().to_string()];
    let refused = Engine::run(&rig.migrate, &words, None, PATIENCE)?;
    ensure!(refused.code == Some(1), "{refused:?}");
    for told in ["agent.toml", "[memory-server]", "'much'", "--help"] {
        ensure!(refused.stderr.contains(told), "{told} is not in {}", refused.stderr);
    }
    Ok(())
}
