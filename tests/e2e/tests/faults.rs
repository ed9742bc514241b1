//! Whatever dies at whatever step: at most one guest runs, and what is left can be brought to an end.
//!
//! A case holds an engine at a step (a failpoint), disturbs a victim there, lets the engine go on,
//! restarts what was killed and resolves what is in doubt. Then exactly one guest runs, at the end
//! that the table names, the heartbeat shows that it never ran twice, and it can be migrated again
//! into a fresh QEMU. One guest goes through all cases of a table as long as it survives.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use e2e::untouched::{Before, assert_detached};
use e2e::{PATIENCE, Rig, turn};
use framework::{Engine, EngineOutput, NetnsPair, Pulse, QemuKind, Vm, VmSpec};
use nix::sys::signal::Signal;

const LISTEN: &str = "10.77.0.2:7700";

/// Who suffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    SourceEngine,
    DestinationEngine,
    SourceQemu,
    DestinationQemu,
    Link,
    /// Ctrl-C.
    Interrupt,
}

/// Where the guest must be when everything is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Source,
    Destination,
    /// Its only copy died.
    Nowhere,
    /// Nowhere until an operator says so; then at the source.
    SourceByOperator,
}

/// The two hosts, and the guest wherever it is.
struct Stage {
    rig: Rig,
    net: NetnsPair,
    guest: Option<Vm>,
    kind: QemuKind,
    mode: &'static str,
}

/// What a case works with.
struct Case {
    step: &'static str,
    victim: Victim,
    destination: Vm,
    send: Option<Engine>,
    receive: Option<Engine>,
    /// How `send` ended, if it did by itself.
    sent: Option<EngineOutput>,
}

impl Stage {
    fn new(kind: QemuKind, mode: &'static str) -> Result<Self> {
        let rig = Rig::with_failpoints()?;
        Ok(Self { rig, net: NetnsPair::create(0)?, guest: None, kind, mode })
    }

    fn guest(&mut self) -> Result<Vm> {
        if let Some(vm) = self.guest.take() {
            return Ok(vm);
        }
        let spec = VmSpec::new("victim", self.kind)
            .memory_mib(192)
            .with("godwit.writer=fill=16,hot=4,rate=500,bytes=64,seed=7")
            .with("godwit.checker=size=8,seed=5");
        Vm::boot(&self.rig.env, spec)
    }

    fn receive(&self, vm: &Vm) -> Result<Engine> {
        let extra = ["--lease-s", "4", "--dead-peer-s", "1"];
        self.rig.receive_in(vm, LISTEN, &extra, Some(self.net.destination.name()))
    }

    fn send(&self, vm: &Vm) -> Result<Engine> {
        let mode = ["--mode", self.mode];
        let extra = ["--dead-peer-s", "1", "--ask-s", "3", "--max-downtime-ms", "2000"];
        let extra = [&mode[..], &extra].concat();
        self.rig.send_in(vm, LISTEN, &extra, Some(self.net.source.name()))
    }

    fn resolve(&self, vm: &Vm, extra: &[&str]) -> Result<EngineOutput> {
        let (qmp, journal) = (vm.qmp_engine().display().to_string(), self.rig.journal("source"));
        let mut words = vec!["resolve", "--json", "--qmp", &qmp, "--journal", &journal];
        words.extend(extra);
        Engine::run(&self.rig.migrate, &words, Some(self.net.source.name()), PATIENCE)
    }

    /// A migration that will be held at `step`: the destination's VM and the engines, `send` first.
    fn begin(&self, source: &Vm, step: &str) -> Result<(Vm, [Engine; 2])> {
        let destination = Vm::start(&self.rig.env, source.spec().successor("there", self.kind))?;
        self.rig.hold(step)?;
        let receive = self.receive(&destination)?;
        let send = self.send(source)?;
        Ok((destination, [send, receive]))
    }

    /// A migration that is held at `step`: the VMs, source first, and the engines, `send` first.
    fn held_at(&mut self, step: &str) -> Result<([Vm; 2], [Engine; 2])> {
        let source = self.guest()?;
        let (destination, engines) = self.begin(&source, step)?;
        self.rig.reached(step)?;
        Ok(([source, destination], engines))
    }

    fn case(&mut self, step: &'static str, victim: Victim, end: End) -> Result<()> {
        let began = std::time::Instant::now();
        self.try_case(step, victim, end)
            .with_context(|| format!("{victim:?} at {step}, which must end at {end:?}"))?;
        println!("{victim:?} at {step}: {end:?} ({:.1} s)", began.elapsed().as_secs_f64());
        Ok(())
    }

    fn try_case(&mut self, step: &'static str, victim: Victim, end: End) -> Result<()> {
        let mut source = self.guest()?;
        let before = Before::of(&mut source)?;
        let (destination, [send, receive]) = self.begin(&source, step)?;
        let mut case = Case {
            step,
            victim,
            destination,
            send: Some(send),
            receive: Some(receive),
            sent: None,
        };
        self.rig.reached(step).with_context(|| case.said())?;
        self.disturb(&mut case, &mut source)?;
        self.rig.release(step)?;
        let ended = self.bring_to_an_end(&mut case, &mut source, end);
        if victim == Victim::Link {
            self.net.mend()?;
        }
        ended.with_context(|| case.said())?;
        self.check(case, source, &before, end)
    }

    fn disturb(&self, case: &mut Case, source: &mut Vm) -> Result<()> {
        match case.victim {
            Victim::SourceEngine => {
                case.send.take().map(Engine::kill).transpose()?;
                // Whatever it was doing: QEMU is not held by a dead engine.
                assert_detached(source.pid())
            }
            Victim::DestinationEngine => {
                case.receive.take().map(Engine::kill).transpose().map(drop)
            }
            Victim::SourceQemu => source.kill(),
            Victim::DestinationQemu => case.destination.kill(),
            Victim::Link => self.net.cut(),
            Victim::Interrupt => {
                let send = case.send.as_mut().context("No engine to interrupt")?;
                send.signal(Signal::SIGINT)
            }
        }
    }

    /// Waits for what still runs, restarts what does not, resolves what is in doubt.
    fn bring_to_an_end(&self, case: &mut Case, source: &mut Vm, end: End) -> Result<()> {
        if let Some(send) = case.send.take() {
            let sent = send.wait(Duration::from_secs(40))?;
            ensure!(sent.code.is_some(), "`send` was killed");
            case.sent = Some(sent);
        }
        let code = case.sent.as_ref().and_then(|sent| sent.code);
        if case.sent.is_some() && code != Some(3) {
            return Ok(());
        }
        if code == Some(3) {
            let state = source.qmp().run_state()?;
            ensure!(state != "running", "The guest runs here while the outcome is in doubt");
        }
        if case.victim == Victim::Link {
            self.net.mend()?;
        }
        self.restart_receive(case)?;
        let resolved = self.resolve(source, &[])?;
        let resolved = match end {
            End::SourceByOperator => {
                ensure!(resolved.code == Some(3), "No doubt: {resolved:?}");
                self.resolve(source, &["--run-here"])?
            }
            _ => resolved,
        };
        let wanted = if end == End::Destination { Some(0) } else { Some(1) };
        ensure!(resolved.code == wanted, "resolve: {resolved:?}");
        Ok(())
    }

    /// A destination's engine that has ended is started again, if only to answer.
    fn restart_receive(&self, case: &mut Case) -> Result<()> {
        if let Some(receive) = &mut case.receive
            && receive.running()?
        {
            return Ok(());
        }
        let extra = ["--lease-s", "4", "--dead-peer-s", "1"];
        let netns = Some(self.net.destination.name());
        let mut receive = self.rig.receive_unchecked(&case.destination, LISTEN, &extra, netns)?;
        // One whose source never asked for a commit has nothing to answer, and ends.
        if let Err(error) = receive.wait_stderr("listening on", Duration::from_secs(10)) {
            ensure!(!receive.running()?, "{error:#}");
        }
        case.receive = Some(receive);
        Ok(())
    }

    fn check(&mut self, mut case: Case, mut source: Vm, before: &Before, end: End) -> Result<()> {
        let at_source = runs(&mut source)?;
        let at_destination = runs(&mut case.destination)?;
        let wanted = match end {
            End::Source | End::SourceByOperator => (true, false),
            End::Destination => (false, true),
            End::Nowhere => (false, false),
        };
        if (at_source, at_destination) != wanted {
            bail!(
                "Runs at (source, destination): ({at_source}, {at_destination}); {}",
                case.said()
            );
        }
        let record = source.heartbeat().record();
        Pulse::of(&[&record, &case.destination.heartbeat().record()])?.assert_one_runs()?;
        match end {
            End::Source | End::SourceByOperator => {
                let journals = PathBuf::from(self.rig.journal("source"));
                before.assert_untouched(&mut source, &journals).with_context(|| case.said())?;
                self.move_on(source)
            }
            End::Destination => {
                drop(case.receive.take().map(Engine::kill).transpose()?);
                drop(source);
                ensure!(
                    case.destination.heartbeat().beats_within(Duration::from_secs(5)),
                    "No heartbeat at the destination"
                );
                self.move_on(case.destination)
            }
            End::Nowhere => Ok(()),
        }
    }

    /// A second migration, into a fresh QEMU, succeeds.
    fn move_on(&mut self, vm: Vm) -> Result<()> {
        vm.assert_clean()?;
        let moved = self.rig.migrate(vm, self.kind, &["--max-downtime-ms", "2000"]);
        self.guest = Some(moved.context("The migration after that")?.vm);
        Ok(())
    }

    /// The guest that came through all of it has all its memory.
    fn finish(mut self) -> Result<()> {
        let Some(mut vm) = self.guest.take() else { return Ok(()) };
        vm.verify_checker(PATIENCE).map(drop)
    }
}

impl Case {
    /// What the engines said, for error texts.
    fn said(&self) -> String {
        let sent = match (&self.send, &self.sent) {
            (_, Some(sent)) => format!("{:?}: {}\n{}", sent.code, sent.stdout, sent.stderr),
            (Some(send), None) => send.stderr(),
            (None, None) => "(killed)".to_owned(),
        };
        let received = self.receive.as_ref().map_or_else(|| "(killed)".to_owned(), Engine::stderr);
        format!("{:?} at {}\nsend: {sent}\nreceive: {received}", self.victim, self.step)
    }
}

fn runs(vm: &mut Vm) -> Result<bool> {
    // QEMU may be about to end because it was told to.
    let Ok(state) = vm.qmp().run_state() else { return Ok(false) };
    Ok(state == "running")
}

fn table(kind: QemuKind, cases: &[(&'static str, Victim, End)]) -> Result<()> {
    table_in("auto", kind, cases)
}

fn table_in(
    mode: &'static str,
    kind: QemuKind,
    cases: &[(&'static str, Victim, End)],
) -> Result<()> {
    let _turn = turn();
    let mut stage = Stage::new(kind, mode)?;
    for (step, victim, end) in cases {
        stage.case(step, *victim, *end)?;
    }
    stage.finish()
}

#[test]
fn the_source_engine_dies() -> Result<()> {
    let victim = Victim::SourceEngine;
    table(
        QemuKind::V7_2,
        &[
            ("source-attaching", victim, End::Source),
            ("source-precopy", victim, End::Source),
            ("source-save-begun", victim, End::Source),
            ("source-stopped", victim, End::Source),
            ("source-state-saved", victim, End::Source),
            ("source-state-sent", victim, End::Source),
            ("destination-loading", victim, End::Source),
            ("source-ready", victim, End::Source),
            ("source-recording", victim, End::Source),
            // The commit was recorded but not sent: asked in time, the destination still takes it.
            ("source-recorded", victim, End::Destination),
            ("source-committed", victim, End::Destination),
            ("destination-recorded", victim, End::Destination),
            ("destination-resumed", victim, End::Destination),
        ],
    )
}

#[test]
fn the_destination_engine_dies() -> Result<()> {
    let victim = Victim::DestinationEngine;
    table(
        QemuKind::V7_2,
        &[
            ("destination-describing", victim, End::Source),
            ("source-precopy", victim, End::Source),
            ("source-save-begun", victim, End::Source),
            ("source-stopped", victim, End::Source),
            ("destination-loading", victim, End::Source),
            ("destination-loaded", victim, End::Source),
            ("destination-ready", victim, End::Source),
            ("source-ready", victim, End::Source),
            // From here on `send` ends in doubt, until the destination's journal has been asked.
            ("source-recorded", victim, End::Source),
            ("destination-committed", victim, End::Source),
            ("destination-recording", victim, End::Source),
            ("destination-recorded", victim, End::Destination),
            ("destination-resumed", victim, End::Destination),
        ],
    )
}

#[test]
fn a_qemu_dies() -> Result<()> {
    let (here, there) = (Victim::SourceQemu, Victim::DestinationQemu);
    table(
        QemuKind::V7_2,
        &[
            ("source-precopy", there, End::Source),
            ("source-stopped", there, End::Source),
            ("destination-loading", there, End::Source),
            ("destination-loaded", there, End::Source),
            ("destination-ready", there, End::Source),
            ("source-recorded", there, End::Source),
            ("destination-committed", there, End::Source),
            ("destination-recording", there, End::SourceByOperator),
            ("destination-recorded", there, End::SourceByOperator),
            // All of the guest is at the destination.
            ("source-recorded", here, End::Destination),
            ("source-committed", here, End::Destination),
            ("source-precopy", here, End::Nowhere),
            ("source-stopped", here, End::Nowhere),
        ],
    )
}

#[test]
fn the_link_is_cut() -> Result<()> {
    let victim = Victim::Link;
    table(
        QemuKind::V7_2,
        &[
            ("destination-describing", victim, End::Source),
            ("source-precopy", victim, End::Source),
            ("source-save-begun", victim, End::Source),
            ("source-stopped", victim, End::Source),
            ("source-state-saved", victim, End::Source),
            ("destination-loaded", victim, End::Source),
            ("source-ready", victim, End::Source),
            // The commit does not arrive and the lease ends meanwhile.
            ("source-recorded", victim, End::Source),
            ("destination-committed", victim, End::Destination),
            ("destination-recorded", victim, End::Destination),
            ("destination-resumed", victim, End::Destination),
        ],
    )
}

#[test]
fn ctrl_c_leaves_the_guest_where_it_is() -> Result<()> {
    let victim = Victim::Interrupt;
    table(
        QemuKind::V10_0,
        &[
            ("source-attaching", victim, End::Source),
            ("source-precopy", victim, End::Source),
            ("source-save-begun", victim, End::Source),
            ("source-stopped", victim, End::Source),
            ("source-state-saved", victim, End::Source),
            ("source-state-sent", victim, End::Source),
            ("destination-loading", victim, End::Source),
            // Too late: the destination has the guest's only right to run.
            ("source-recorded", victim, End::Destination),
            ("source-committed", victim, End::Destination),
        ],
    )
}

/// The same where the guest goes ahead of its memory: what dies before the commit costs nothing, what
/// dies after it is taken up again.
#[test]
fn whoever_dies_under_post_copy() -> Result<()> {
    use Victim::{DestinationEngine as There, Interrupt, Link, SourceEngine as Here};
    table_in(
        "post-copy",
        QemuKind::V10_0,
        &[
            ("destination-preparing", Here, End::Source),
            ("destination-preparing", There, End::Source),
            ("source-stopped", Here, End::Source),
            ("source-stopped", There, End::Source),
            ("source-state-sent", Here, End::Source),
            ("destination-paging", There, End::Source),
            ("destination-paging", Link, End::Source),
            ("destination-paging", Interrupt, End::Source),
            ("destination-loaded", There, End::Source),
            ("source-ready", Here, End::Source),
            ("source-recorded", Here, End::Destination),
            ("source-committed", Here, End::Destination),
            ("destination-recorded", Here, End::Destination),
            ("destination-recorded", There, End::Destination),
            ("destination-resumed", There, End::Destination),
            ("source-serving", Here, End::Destination),
            ("source-serving", Interrupt, End::Destination),
        ],
    )
}

/// Moves a guest, leaving its source paused, with one directory of journals for both ends, as on a
/// host that first receives and then sends.
fn sent_on(stage: &mut Stage, journal: &str) -> Result<(Vm, Vm)> {
    let start = stage.guest()?;
    let middle = Vm::start(&stage.rig.env, start.spec().successor("middle", stage.kind))?;
    let last = Vm::start(&stage.rig.env, start.spec().successor("last", stage.kind))?;
    let (source, destination) = (&stage.rig.source, &stage.rig.destination);
    let engine = |words: &[&str], vm: &Vm, identity: &PathBuf| {
        let (qmp, identity) =
            (vm.qmp_engine().display().to_string(), identity.display().to_string());
        let common = ["--journal", journal, "--qmp", &qmp, "--identity", &identity];
        Engine::start(&stage.rig.migrate, &[words, &common].concat(), None)
    };
    for (hop, next) in [&middle, &last].into_iter().enumerate() {
        let addr = e2e::free_address()?;
        let mut receive = engine(&["receive", "--once", "--listen", &addr], next, destination)?;
        receive.wait_stderr("listening on", PATIENCE)?;
        let words = ["send", "--to", &addr, "--keep-source", "--max-downtime-ms", "2000"];
        let from = if hop == 0 { &start } else { &middle };
        engine(&words, from, source)?.wait(PATIENCE)?.success()?;
        receive.wait(PATIENCE)?.success()?;
    }
    Ok((middle, last))
}

/// The guest came to this host and went on; what the journal says of its arrival resumes it never.
#[test]
fn a_guest_that_moved_on_is_not_resumed_by_the_journal_of_its_arrival() -> Result<()> {
    let _turn = turn();
    let mut stage = Stage::new(QemuKind::V7_2, "auto")?;
    let journal = stage.rig.journal("both");
    let (mut middle, mut last) = sent_on(&mut stage, &journal)?;
    let qmp = middle.qmp_engine().display().to_string();
    let identity = stage.rig.destination.display().to_string();
    let resolve = ["resolve", "--qmp", &qmp, "--journal", &journal];
    let addr = e2e::free_address()?;
    let receive = ["receive", "--listen", &addr, "--qmp", &qmp, "--journal", &journal];
    let receive = [&receive[..], &["--identity", &identity, "--once"]].concat();
    for words in [&resolve[..], &receive] {
        let done = Engine::run(&stage.rig.migrate, words, None, PATIENCE)?;
        let state = middle.qmp().run_state()?;
        ensure!(state == "postmigrate", "{state} after {words:?}: {done:?}");
    }
    ensure!(runs(&mut last)?, "The guest does not run where it is");
    let records = [middle.heartbeat().record(), last.heartbeat().record()];
    Pulse::of(&[&records[0], &records[1]])?.assert_one_runs()
}

/// The destination need not hear the session's close, of which nothing says that it arrives.
#[test]
fn a_source_that_is_done_keeps_no_destination_waiting() -> Result<()> {
    let _turn = turn();
    let mut stage = Stage::new(QemuKind::V7_2, "auto")?;
    let (_vms, [mut send, receive]) = stage.held_at("source-done")?;
    // One that had heard nothing would wait 5 s and then stay for two leases.
    receive.wait(Duration::from_secs(10))?.success()?;
    ensure!(send.running()?, "The source has closed its session");
    stage.net.cut()?;
    stage.rig.release("source-done")?;
    send.wait(PATIENCE)?.success().map(drop)
}

/// `resolve` does not decide about a migration that an engine is at work on.
#[test]
fn resolve_keeps_its_hands_off_a_migration_under_way() -> Result<()> {
    let _turn = turn();
    let mut stage = Stage::new(QemuKind::V7_2, "auto")?;
    let (vms, [send, receive]) = stage.held_at("source-recorded")?;
    for (vm, end) in vms.iter().zip(["source", "destination"]) {
        for extra in [&[][..], &["--run-here"], &["--runs-there"]] {
            let resolved = stage.rig.resolve(vm, end, extra)?;
            ensure!(resolved.code == Some(1), "{end} {extra:?}: {resolved:?}");
            ensure!(resolved.stderr.contains("at work on migration"), "{resolved:?}");
        }
    }
    stage.rig.release("source-recorded")?;
    send.wait(PATIENCE)?.success()?;
    receive.wait(PATIENCE)?.success().map(drop)
}
