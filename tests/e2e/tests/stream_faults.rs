//! Whatever dies during pre-copy: the guest runs on at the source, QEMU is as it was, and the next migration succeeds.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::stage::{Victim, runs};
use e2e::streams::{LISTEN, check_report, stream, under_way};
use e2e::untouched::Before;
use e2e::waits::slow;
use e2e::{BEATS_WITHIN, PATIENCE, Rig, free_address, in_turn};
use framework::{Engine, EngineOutput, NetnsPair, Pulse, QemuKind, Vm};
use nix::sys::signal::Signal;

/// Longest time from a disturbance to the end of what it ends.
const ENDS_WITHIN: Duration = Duration::from_secs(20);

/// So that pre-copy takes ten seconds and more.
const SLOWLY: [&str; 4] = ["--mode", "pre-copy", "--max-bandwidth", "16M"];

/// Who suffers, one after the other.
const VICTIMS: [Victim; 5] = [
    Victim::SourceEngine,
    Victim::DestinationEngine,
    Victim::Interrupt,
    Victim::Link,
    Victim::DestinationQemu,
];

/// Two hosts.
struct Site {
    rig: Rig,
    net: NetnsPair,
    kind: QemuKind,
}

/// A migration under way.
struct Underway {
    destination: Vm,
    send: Option<Engine>,
    receive: Option<Engine>,
}

impl Underway {
    /// What the engines say, for error texts.
    fn said(&self) -> String {
        let said = |engine: &Option<Engine>| engine.as_ref().map(Engine::stderr);
        format!("send: {:?}\nreceive: {:?}", said(&self.send), said(&self.receive))
    }
}

impl Site {
    /// Begins to move the guest and returns in the midst of it.
    fn begin(&self, vm: &mut Vm) -> Result<Underway> {
        let destination = Vm::start(&self.rig.env, vm.spec().successor("there", self.kind))?;
        let dead_peer = ["--dead-peer-s", "1"];
        let netns = Some(self.net.destination.name());
        let receive = self.rig.receive_in(&destination, LISTEN, &dead_peer, netns)?;
        let words = stream(&[&SLOWLY[..], &dead_peer].concat());
        let mut send = self.rig.send_in(vm, LISTEN, &words, Some(self.net.source.name()))?;
        under_way(vm, &mut send).with_context(|| receive.stderr())?;
        Ok(Underway { destination, send: Some(send), receive: Some(receive) })
    }

    fn disturb(&self, underway: &mut Underway, victim: Victim) -> Result<()> {
        match victim {
            Victim::SourceEngine => underway.send.take().map(Engine::kill).transpose().map(drop),
            Victim::DestinationEngine => {
                underway.receive.take().map(Engine::kill).transpose().map(drop)
            }
            Victim::DestinationQemu => underway.destination.kill(),
            Victim::Link => self.net.cut(),
            Victim::Interrupt => {
                let send = underway.send.as_mut().context("No engine to interrupt")?;
                send.signal(Signal::SIGINT)
            }
            Victim::SourceQemu => anyhow::bail!("That is the guest's end"),
        }
    }

    /// One victim; returns the guest where it is in the end.
    fn case(&self, mut vm: Vm, victim: Victim) -> Result<Vm> {
        let before = Before::of(&mut vm)?;
        let mut underway = self.begin(&mut vm)?;
        vm.qmp().clear_events();
        let began = Instant::now();
        self.disturb(&mut underway, victim)?;
        let ended = self.stays(&mut vm, &mut underway, &before);
        let took = began.elapsed();
        if victim == Victim::Link {
            self.net.mend()?;
        }
        ended.with_context(|| underway.said())?;
        drop(underway);
        let words = stream(&["--max-downtime-ms", "2000"]);
        let moved = self.rig.migrate(vm, self.kind, &words).context("The migration after that")?;
        check_report(&moved.report, "completed")?;
        println!(
            "{victim:?}: over after {took:.1?}; then moved in {} ms",
            moved.report["total_ms"]
        );
        Ok(moved.vm)
    }

    /// The guest runs at the source all the time, and QEMU is as it was when the engine has ended, or the next one.
    fn stays(&self, vm: &mut Vm, underway: &mut Underway, before: &Before) -> Result<()> {
        match underway.send.take() {
            Some(send) => failed(&send.wait(ENDS_WITHIN)?)?,
            None => self.wound_up(vm)?,
        }
        before.assert_untouched(vm, Path::new(&self.rig.journal("source")))?;
        let stopped = vm.qmp().event("STOP", Duration::from_millis(20));
        ensure!(stopped.is_err(), "The guest was stopped: {stopped:?}");
        ensure!(!runs(&mut underway.destination)?, "It runs at the destination");
        let records = [vm.heartbeat().record(), underway.destination.heartbeat().record()];
        ensure!(records[1].beats.is_empty(), "It ran at the destination");
        Pulse::of(&[&records[0], &records[1]])?.assert_one_runs()
    }

    /// QEMU gives up by itself what a killed engine began; the next one ends it, also if it fails then.
    fn wound_up(&self, vm: &mut Vm) -> Result<()> {
        vm.qmp().wait_migration(&["failed", "cancelled"], ENDS_WITHIN)?;
        ensure!(runs(vm)?, "The guest does not run on without the engine");
        ensure!(vm.heartbeat().beats_within(BEATS_WITHIN), "No heartbeat");
        let words = stream(&[]);
        let again = self.rig.send(vm, &free_address()?, &words)?.wait(PATIENCE)?;
        failed(&again)?;
        let message = again.json()?["error"]["message"].as_str().unwrap_or_default();
        ensure!(message.contains("Nobody answers"), "{again:?}");
        Ok(())
    }
}

/// How `send` ends where the guest stays.
fn failed(sent: &EngineOutput) -> Result<()> {
    ensure!(sent.code == Some(1), "{sent:?}");
    let report = sent.json()?;
    check_report(report, "failed")?;
    ensure!(report["error"]["source_vm"] == "running", "{report}");
    ensure!(report["error"]["destination_vm"] != "running", "{report}");
    Ok(())
}

/// One guest goes through all of it.
fn survives(kind: QemuKind) -> Result<()> {
    in_turn(|| {
        let site = Site { rig: Rig::new()?, net: NetnsPair::create(0)?, kind };
        let mut vm = Vm::boot(&site.rig.env, slow(kind))?;
        for victim in VICTIMS {
            vm = site.case(vm, victim).with_context(|| format!("{victim:?} on {kind:?}"))?;
        }
        vm.verify_checker(PATIENCE).map(drop)
    })
}

#[test]
fn a_guest_on_7_2_survives_whatever_dies_in_pre_copy() -> Result<()> {
    survives(QemuKind::V7_2)
}

#[test]
fn a_guest_on_10_0_survives_whatever_dies_in_pre_copy() -> Result<()> {
    survives(QemuKind::V10_0)
}
