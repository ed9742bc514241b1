//! Two hosts and a guest that migrates between them while something dies.
//!
//! A case holds an engine at a step (a failpoint), disturbs a victim there, lets the engine go on,
//! restarts what was killed and resolves what is in doubt. Then exactly one guest runs, at the end
//! that the case names, the heartbeat shows that it never ran twice, and it can be migrated again
//! into a fresh QEMU; one that was split is merged before that. One guest goes through all cases as
//! long as it survives.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use framework::{
    Backend, Engine, EngineOutput, MemoryServer, NetnsPair, Pulse, QemuKind, Vm, VmSpec,
};
use nix::sys::signal::Signal;

use crate::split::Offer;
use crate::untouched::{Before, assert_detached};
use crate::{BEATS_WITHIN, PATIENCE, Rig};

const LISTEN: &str = "10.77.0.2:7700";

/// Where the memory servers of a guest that is split listen, at the main host.
const SERVERS: [&str; 2] = ["10.77.0.2:7701", "10.77.0.2:7702"];

/// What a source that was killed left at a server goes before the next ones need its room.
const OFFER: Offer<'_> = Offer { capacity_mib: 512, extra: &["--lease-s", "3"] };

/// What the main host may hold of it: less than it uses.
const RESIDENT_MIB: u64 = 64;

/// Who suffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    /// `migrate send` or `migrate split`.
    SourceEngine,
    /// `migrate receive`.
    DestinationEngine,
    /// The QEMU that the guest leaves.
    SourceQemu,
    /// The QEMU that waits for it.
    DestinationQemu,
    /// The link between the hosts.
    Link,
    /// Ctrl-C.
    Interrupt,
}

/// Where the guest must be when everything is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Where it was.
    Source,
    /// Where it was to go.
    Destination,
    /// Its only copy died.
    Nowhere,
    /// Nowhere until an operator says so; then at the source.
    SourceByOperator,
}

/// The two hosts, and the guest wherever it is.
#[derive(Debug)]
pub struct Stage {
    /// Identities, journals and failpoints.
    pub rig: Rig,
    /// The link.
    pub net: NetnsPair,
    guest: Option<Vm>,
    kind: QemuKind,
    mode: &'static str,
    /// Whether its QEMU sends the guest, slowly.
    is_streamed: bool,
    /// Of a guest that is split.
    servers: Vec<MemoryServer>,
}

/// What a case works with.
#[derive(Debug)]
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
    /// For migrations in this mode.
    ///
    /// # Errors
    /// What it needs is not there.
    pub fn new(kind: QemuKind, mode: &'static str) -> Result<Self> {
        let rig = Rig::with_failpoints()?;
        let (guest, is_streamed, servers) = (None, false, vec![]);
        Ok(Self { rig, net: NetnsPair::create(0)?, guest, kind, mode, is_streamed, servers })
    }

    /// For migrations in this mode by QEMU's stream.
    ///
    /// # Errors
    /// What it needs is not there.
    pub fn of_streams(kind: QemuKind, mode: &'static str) -> Result<Self> {
        Ok(Self { is_streamed: true, ..Self::new(kind, mode)? })
    }

    /// For splits over the main host and two memory servers on it.
    ///
    /// # Errors
    /// What it needs is not there.
    pub fn of_splits(kind: QemuKind) -> Result<Self> {
        let mut stage = Self::new(kind, "split")?;
        let identities = stage.rig.server_identities(SERVERS.len())?;
        for (listen, identity) in SERVERS.into_iter().zip(&identities.0) {
            let netns = Some(stage.net.destination.name());
            let server = stage.rig.memory_server_in(identity, listen, &OFFER, netns)?;
            stage.servers.push(server);
        }
        Ok(stage)
    }

    /// A guest that works with some of its memory.
    ///
    /// # Errors
    /// It does not boot.
    pub fn guest(&mut self) -> Result<Vm> {
        if let Some(vm) = self.guest.take() {
            return Ok(vm);
        }
        let spec = VmSpec::new("victim", self.kind)
            .memory_mib(192)
            .with("godwit.writer=fill=16,hot=4,rate=500,bytes=64,seed=7")
            .with("godwit.checker=size=8,seed=5");
        let spec = if self.is_streamed { spec.backend(Backend::Private) } else { spec };
        Vm::boot(&self.rig.env, spec)
    }

    fn receive(&self, vm: &Vm) -> Result<Engine> {
        let extra = ["--lease-s", "4", "--dead-peer-s", "1"];
        self.rig.receive_in(vm, LISTEN, &extra, Some(self.net.destination.name()))
    }

    fn send(&self, vm: &Vm) -> Result<Engine> {
        let netns = Some(self.net.source.name());
        let extra = ["--dead-peer-s", "1", "--ask-s", "3", "--max-downtime-ms", "2000"];
        if self.servers.is_empty() {
            let mut extra = [&["--mode", self.mode][..], &extra].concat();
            if self.is_streamed {
                extra.extend(["--path", "stream", "--max-bandwidth", "16M"]);
            }
            return self.rig.send_in(vm, LISTEN, &extra, netns);
        }
        let over = (&self.servers[..], RESIDENT_MIB);
        self.rig.start_split_in(vm, LISTEN, over, &extra, self.net.source.name())
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
    ///
    /// # Errors
    /// It does not come there.
    pub fn held_at(&mut self, step: &str) -> Result<([Vm; 2], [Engine; 2])> {
        let source = self.guest()?;
        let (destination, engines) = self.begin(&source, step)?;
        self.rig.reached(step)?;
        Ok(([source, destination], engines))
    }

    /// Each of these victims suffers at its step, and the guest ends where it must, with all its memory.
    ///
    /// # Errors
    /// It does not.
    pub fn play(mut self, cases: &[(&'static str, Victim, End)]) -> Result<()> {
        for (step, victim, end) in cases {
            self.case(step, *victim, *end)?;
        }
        self.finish()
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
            let sent = send.wait(PATIENCE)?;
            ensure!(sent.code.is_some(), "`send` was killed");
            case.sent = Some(sent);
        }
        let code = case.sent.as_ref().and_then(|sent| sent.code);
        if case.sent.is_some() && code != Some(3) {
            if !self.servers.is_empty() && end == End::Destination {
                // It needs a pager.
                self.restart_receive(case)?;
            }
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
        if let Err(error) = receive.wait_stderr("listening on", PATIENCE) {
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
                if self.servers.is_empty() {
                    drop(case.receive.take().map(Engine::kill).transpose()?);
                } else {
                    self.rig.pager(&case.destination).merge(PATIENCE)?;
                    let receive = case.receive.take().context("Nobody pages it")?;
                    receive.wait(PATIENCE)?.success()?;
                }
                drop(source);
                ensure!(
                    case.destination.heartbeat().beats_within(BEATS_WITHIN),
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

/// Whether a VM's guest runs.
///
/// # Errors
/// None: a QEMU that does not answer runs none.
pub fn runs(vm: &mut Vm) -> Result<bool> {
    // QEMU may be about to end because it was told to.
    let Ok(state) = vm.qmp().run_state() else { return Ok(false) };
    Ok(state == "running")
}
