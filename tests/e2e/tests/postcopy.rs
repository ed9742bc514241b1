//! Guests that run at the destination before their memory is there.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::untouched::assert_detached;
use e2e::{Moved, PATIENCE, Rig, busy, with_larger_pages};
use framework::{Backend, Engine, NetnsPair, QemuKind, Vm, VmSpec, wait};
use nix::sys::signal::Signal;

/// The report of a post-copy migration says what it did.
fn check_report(moved: &Moved, mode: &str) -> Result<()> {
    let report = &moved.report;
    ensure!(report["mode"] == mode, "{report}");
    ensure!(report["pages"]["missing"].as_u64() > Some(0), "{report}");
    let faults = report["faults"]["count"].as_u64().context("no word of faults")?;
    println!(
        "{mode}: outage {:.0} ms, {} pages missing, {faults} faults, {} prefetched: {}",
        moved.outage_ms,
        report["pages"]["missing"],
        report["pages"]["prefetched"],
        report["faults"]
    );
    Ok(())
}

/// Moves a guest `times` times between QEMUs of the kinds given in turn, by both modes and all kinds of
/// lanes in turn.
fn back_and_forth(kinds: [QemuKind; 2], times: usize) -> Result<()> {
    let rig = Rig::new()?;
    let mut vm = Vm::boot(&rig.env, busy(kinds[0]))?;
    for turn in 1..=times {
        let (mode, lanes) = (["hybrid", "post-copy"][turn % 2], ["auto", "quic", "tcp"][turn % 3]);
        let words = ["--verify", "--mode", mode, "--lanes", lanes];
        let moved = rig.migrate(vm, kinds[turn % 2], &words)?;
        check_report(&moved, mode)?;
        vm = moved.vm;
    }
    vm.verify_checker(PATIENCE)?;
    Ok(())
}

#[test]
fn guests_move_ahead_of_their_memory_on_7_2() -> Result<()> {
    back_and_forth([QemuKind::V7_2; 2], 10)
}

#[test]
fn guests_move_ahead_of_their_memory_on_10_0() -> Result<()> {
    back_and_forth([QemuKind::V10_0; 2], 10)
}

/// Guests whose RAM is made of several blocks, or of larger pages.
#[test]
fn all_kinds_of_shared_ram_follow() -> Result<()> {
    let rig = Rig::new()?;
    let (backends, _huge) = with_larger_pages(vec![Backend::Numa2]);
    for backend in backends {
        println!("{backend:?}");
        let spec = busy(QemuKind::V10_0).smp(2).memory_mib(512).backend(backend);
        let mut vm = Vm::boot(&rig.env, spec)?;
        for mode in ["post-copy", "hybrid"] {
            let moved = rig.migrate(vm, QemuKind::V10_0, &["--verify", "--mode", mode])?;
            check_report(&moved, mode)?;
            vm = moved.vm;
        }
        vm.verify_checker(PATIENCE)?;
    }
    Ok(())
}

const LISTEN: &str = "10.77.0.2:7700";

/// A guest between two hosts with a slow link, whose memory follows it.
struct Torn {
    rig: Rig,
    net: NetnsPair,
    source: Vm,
    destination: Vm,
    send: Option<Engine>,
    receive: Option<Engine>,
}

impl Torn {
    /// Returns when the guest runs at the destination.
    fn begin() -> Result<Self> {
        let rig = Rig::new()?;
        let net = NetnsPair::create(40_000_000)?;
        let spec = VmSpec::new("torn", QemuKind::V10_0)
            .with("godwit.writer=fill=100,hot=20,rate=300,bytes=64,content=random,seed=7")
            .with("godwit.checker=size=16,seed=5");
        let source = Vm::boot(&rig.env, spec)?;
        let spec = source.spec().successor("there", QemuKind::V10_0);
        let destination = Vm::start(&rig.env, spec)?;
        let receive = rig.receive_in(
            &destination,
            LISTEN,
            &["--dead-peer-s", "1"],
            Some(net.destination.name()),
        )?;
        let words = ["--mode", "post-copy", "--dead-peer-s", "1"];
        let mut send = rig.send_in(&source, LISTEN, &words, Some(net.source.name()))?;
        send.wait_stderr("the guest runs at the destination", PATIENCE)?;
        Ok(Self { rig, net, source, destination, send: Some(send), receive: Some(receive) })
    }

    fn restart_receive(&mut self) -> Result<()> {
        let netns = Some(self.net.destination.name());
        let words = ["--dead-peer-s", "1"];
        self.receive = Some(self.rig.receive_in(&self.destination, LISTEN, &words, netns)?);
        Ok(())
    }

    /// Waits until pages go over for the `time`th time.
    fn resumed(&mut self, time: usize) -> Result<()> {
        let receive = self.receive.as_mut().context("Nobody receives")?;
        let again = wait::until("the source to come back", PATIENCE, || {
            ensure!(receive.running()?, "`receive` has ended");
            let times = receive.stderr().matches("the source is back").count();
            Ok((times >= time).then_some(()))
        });
        again.with_context(|| format!("receive: {}", receive.stderr()))
    }

    fn resolve(&self) -> Result<Engine> {
        let (qmp, journal) = (self.source.qmp_engine(), self.rig.journal("source"));
        let qmp = qmp.display().to_string();
        let words = ["resolve", "--json", "--qmp", &qmp, "--journal", &journal];
        Engine::start(&self.rig.migrate, &words, Some(self.net.source.name()))
    }

    /// All memory arrives, the guest is well and nothing is left behind.
    fn end(mut self) -> Result<()> {
        let serve = self.send.take().context("Nobody serves")?;
        let sent = serve.wait(PATIENCE)?;
        let receive = self.receive.take().context("Nobody receives")?;
        ensure!(sent.code == Some(0), "{}\nreceive: {}", sent.stderr, receive.stderr());
        receive.wait(PATIENCE)?.success()?;
        e2e::check_alive(&mut self.source, &mut self.destination)?;
        self.destination.verify_checker(PATIENCE)?;
        assert_detached(self.destination.pid())
    }
}

/// Threads that need a missing page wait, the others work on; every time the pages go on.
#[test]
fn the_link_is_cut_ten_times() -> Result<()> {
    let mut torn = Torn::begin()?;
    for time in 1..=10_usize {
        torn.net.cut()?;
        std::thread::sleep(Duration::from_millis(if time % 2 == 0 { 300 } else { 2000 }));
        torn.net.mend()?;
        if time % 2 == 1 {
            torn.resumed(time.div_ceil(2))?;
        }
    }
    torn.end()
}

#[test]
fn ctrl_c_does_not_leave_a_guest_without_its_memory() -> Result<()> {
    let mut torn = Torn::begin()?;
    for engine in [&mut torn.send, &mut torn.receive] {
        let engine = engine.as_mut().context("No engine")?;
        engine.signal(Signal::SIGINT)?;
        engine.wait_stderr("going on until", PATIENCE)?;
    }
    torn.end()
}

#[test]
fn each_engine_is_killed_while_memory_follows() -> Result<()> {
    let mut torn = Torn::begin()?;
    drop(torn.receive.take().map(Engine::kill).transpose()?);
    std::thread::sleep(Duration::from_millis(500));
    torn.restart_receive()?;
    torn.resumed(1)?;
    drop(torn.send.take().map(Engine::kill).transpose()?);
    std::thread::sleep(Duration::from_millis(500));
    torn.send = Some(torn.resolve()?);
    torn.resumed(2)?;
    // Both: nobody knows any more what was missing.
    drop(torn.send.take().map(Engine::kill).transpose()?);
    drop(torn.receive.take().map(Engine::kill).transpose()?);
    torn.restart_receive()?;
    torn.send = Some(torn.resolve()?);
    torn.resumed(1)?;
    torn.end()
}
