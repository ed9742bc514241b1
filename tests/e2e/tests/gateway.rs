//! Guests that their QEMUs move themselves, through a pair of gateways.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::{PATIENCE, Rig, check_alive, in_turn};
use framework::{Backend, Engine, QemuKind, Vm, VmSpec, wait};
use serde_json::{Value, json};

/// A guest with private memory that writes and checks it.
fn private(kind: QemuKind) -> VmSpec {
    VmSpec::new("private", kind)
        .backend(Backend::Private)
        .with("godwit.writer=fill=60,hot=30,rate=4000,bytes=64,seed=7")
        .with("godwit.checker=size=24,seed=5")
}

/// A pair of gateways between two Unix sockets.
struct Gateways {
    source: Engine,
    destination: Engine,
    /// Where a QEMU sends to.
    out: PathBuf,
    /// Where a QEMU waits.
    into: PathBuf,
}

impl Gateways {
    fn start(rig: &Rig) -> Result<Self> {
        let (out, into) = (rig.folder.path().join("out"), rig.folder.path().join("into"));
        let identity = |path: &PathBuf| path.display().to_string();
        let qemu = format!("unix:{}", into.display());
        let there = identity(&rig.destination);
        let words = ["gateway", "destination", "--listen", "127.0.0.1:0", "--identity", &there];
        let words = [&words[..], &["--qemu", &qemu]].concat();
        let mut destination = Engine::start(&rig.migrate, &words, None)?;
        let to = destination.wait_line("listening on ", PATIENCE)?;
        let (listen, here) = (format!("unix:{}", out.display()), identity(&rig.source));
        let words = ["gateway", "source", "--listen", &listen, "--to", to.trim(), "--json"];
        let words = [&words[..], &["--identity", &here]].concat();
        let mut source = Engine::start(&rig.migrate, &words, None)?;
        source.wait_line("listening on ", PATIENCE)?;
        Ok(Self { source, destination, out, into })
    }

    fn said(&self) -> String {
        format!("source: {}\ndestination: {}", self.source.stderr(), self.destination.stderr())
    }

    /// Has QEMU move a guest into a fresh QEMU of `kind`.
    fn migrate(&self, rig: &Rig, mut vm: Vm, kind: QemuKind) -> Result<Vm> {
        let mut next = Vm::start(&rig.env, vm.spec().successor("next", kind))?;
        let uri = |path: &PathBuf| json!({ "uri": format!("unix:{}", path.display()) });
        for end in [&mut vm, &mut next] {
            let wanted = [("events", true), ("return-path", true)];
            let list: Vec<Value> = wanted
                .iter()
                .map(|(name, state)| json!({ "capability": name, "state": state }))
                .collect();
            end.qmp().execute("migrate-set-capabilities", json!({ "capabilities": list }))?;
        }
        next.qmp().execute("migrate-incoming", uri(&self.into))?;
        let limits = json!({ "max-bandwidth": 1u64 << 33, "downtime-limit": 300 });
        vm.qmp().execute("migrate-set-parameters", limits)?;
        vm.qmp().execute("migrate", uri(&self.out))?;
        let mut last = Value::Null;
        wait::until("the end of QEMU's migration", PATIENCE, || {
            last = vm.qmp().execute("query-migrate", json!({}))?;
            let status = last["status"].as_str().unwrap_or_default();
            ensure!(!["failed", "cancelled"].contains(&status), "{last}");
            Ok((status == "completed").then_some(()))
        })
        .with_context(|| format!("{last}\n{}", self.said()))?;
        check_alive(&mut vm, &mut next).with_context(|| self.said())?;
        println!("{}", last["ram"]);
        Ok(next)
    }
}

fn back_and_forth(kinds: &[QemuKind]) -> Result<()> {
    moved(kinds, private)
}

/// Moves a guest from kind to kind.
fn moved(kinds: &[QemuKind], guest: fn(QemuKind) -> VmSpec) -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let gateways = Gateways::start(&rig)?;
        let (first, others) = kinds.split_first().context("no kinds")?;
        let mut vm = Vm::boot(&rig.env, guest(*first))?;
        for kind in others {
            vm = gateways.migrate(&rig, vm, *kind)?;
            ensure!(vm.heartbeat().beats_within(Duration::from_secs(5)), "It must run on");
        }
        vm.verify_checker(PATIENCE).with_context(|| gateways.said())?;
        println!("{}", gateways.said());
        Ok(())
    })
}

#[test]
fn twenty_moves_on_7_2() -> Result<()> {
    back_and_forth(&[QemuKind::V7_2; 21])
}

#[test]
fn twenty_moves_on_10_0() -> Result<()> {
    back_and_forth(&[QemuKind::V10_0; 21])
}

#[test]
fn a_guest_moves_from_7_2_to_10_0() -> Result<()> {
    back_and_forth(&[QemuKind::V7_2, QemuKind::V10_0, QemuKind::V10_0])
}

/// Newer machines are told within the stream that their guest has stopped.
#[test]
fn a_newer_machine_moves() -> Result<()> {
    let guest = |kind| VmSpec { machine: "pc-i440fx-10.0".into(), ..private(kind).smp(2) };
    moved(&[QemuKind::V10_0; 6], guest)
}
