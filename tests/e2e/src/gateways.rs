//! A pair of gateways between two Unix sockets, and QEMUs that move a guest through them.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use framework::{Backend, Engine, QemuKind, Qmp, Vm, VmSpec, wait};
use serde_json::{Value, json};

use crate::{PATIENCE, Rig, check_alive};

/// A guest with private memory that writes and checks it, and that QEMU 7.2 under TCG can move as well.
#[must_use]
pub fn private(kind: QemuKind) -> VmSpec {
    VmSpec::new("private", kind)
        .backend(Backend::Private)
        .odd_memory()
        .with("godwit.writer=fill=60,hot=30,rate=4000,bytes=64,seed=7")
        .with("godwit.checker=size=24,seed=5")
}

/// The same, small so that many moves take little time.
#[must_use]
pub fn small(kind: QemuKind) -> VmSpec {
    VmSpec::new("small", kind)
        .backend(Backend::Private)
        .odd_memory()
        .with("godwit.writer=fill=40,hot=20,rate=4000,bytes=64,seed=7")
        .with("godwit.checker=size=8,seed=5")
}

/// A pair of gateways.
#[derive(Debug)]
pub struct Gateways {
    /// Where guests leave.
    pub source: Engine,
    /// Where they arrive.
    pub destination: Engine,
    /// Where a QEMU sends to.
    pub out: PathBuf,
    /// Where a QEMU waits.
    pub into: PathBuf,
}

impl Gateways {
    /// Both on loopback.
    ///
    /// # Errors
    /// One does not listen.
    pub fn start(rig: &Rig) -> Result<Self> {
        Self::start_in(rig, "127.0.0.1:0", [None, None], [&[], &[]])
    }

    /// The source's and the destination's gateway in these network namespaces, with these `extra` words.
    ///
    /// # Errors
    /// One does not listen.
    pub fn start_in(
        rig: &Rig,
        listen: &str,
        netns: [Option<&str>; 2],
        extra: [&[&str]; 2],
    ) -> Result<Self> {
        let (out, into) = (rig.folder.path().join("out"), rig.folder.path().join("into"));
        let text = |path: &PathBuf| path.display().to_string();
        let qemu = format!("unix:{}", into.display());
        let there = text(&rig.destination);
        let words = ["gateway", "destination", "--listen", listen, "--identity", &there];
        let words = [&words[..], &["--qemu", &qemu], extra[1]].concat();
        let mut destination = Engine::start(&rig.migrate, &words, netns[1])?;
        let to = destination.wait_line("listening on ", PATIENCE)?;
        let (at, here) = (format!("unix:{}", out.display()), text(&rig.source));
        let words = ["gateway", "source", "--listen", &at, "--to", to.trim(), "--json"];
        let words = [&words[..], &["--identity", &here], extra[0]].concat();
        let mut source = Engine::start(&rig.migrate, &words, netns[0])?;
        source.wait_line("listening on ", PATIENCE)?;
        Ok(Self { source, destination, out, into })
    }

    /// What both gateways said.
    #[must_use]
    pub fn said(&self) -> String {
        format!("source: {}\ndestination: {}", self.source.stderr(), self.destination.stderr())
    }

    /// Has QEMU begin to move a guest into a fresh QEMU of `kind`, which is returned.
    ///
    /// # Errors
    /// A QEMU refuses something.
    pub fn begin(
        &self,
        rig: &Rig,
        vm: &mut Vm,
        kind: QemuKind,
        capabilities: &[&str],
        limits: Value,
    ) -> Result<Vm> {
        let mut next = Vm::start(&rig.env, vm.spec().successor("next", kind))?;
        let list: Vec<Value> = ["events", "return-path"]
            .iter()
            .chain(capabilities)
            .map(|name| json!({ "capability": name, "state": true }))
            .collect();
        for end in [&mut *vm, &mut next] {
            let list = json!({ "capabilities": list });
            end.qmp().execute("migrate-set-capabilities", list)?;
        }
        next.qmp().execute("migrate-incoming", uri(&self.into))?;
        vm.qmp().execute("migrate-set-parameters", limits)?;
        vm.qmp().execute("migrate", uri(&self.out))?;
        Ok(next)
    }

    /// Waits until QEMU says that a migration is at one of these; what it says of it then.
    ///
    /// # Errors
    /// It failed, or takes too long.
    pub fn until(&self, vm: &mut Vm, wanted: &[&str]) -> Result<Value> {
        vm.qmp().wait_migration(wanted, PATIENCE).with_context(|| self.said())
    }

    /// Has QEMU move a guest into a fresh QEMU of `kind` by pre-copy.
    ///
    /// # Errors
    /// It does not arrive, or does not run on.
    pub fn migrate(&self, rig: &Rig, mut vm: Vm, kind: QemuKind) -> Result<Vm> {
        let limits = json!({ "max-bandwidth": 1u64 << 33, "downtime-limit": 300 });
        let mut next = self.begin(rig, &mut vm, kind, &[], limits)?;
        let last = self.until(&mut vm, &["completed"])?;
        check_alive(&mut vm, &mut next).with_context(|| self.said())?;
        println!("{}", last["ram"]);
        Ok(next)
    }
}

/// A Unix socket as QEMU's commands want it.
#[must_use]
pub fn uri(path: &Path) -> Value {
    json!({ "uri": format!("unix:{}", path.display()) })
}

/// Waits until the QEMU that a guest left has paused its post-copy.
///
/// # Errors
/// It did not.
pub fn wait_paused(vm: &mut Vm) -> Result<()> {
    wait::until("the source to pause", PATIENCE, || {
        Ok((vm.qmp().migration()?["status"] == "postcopy-paused").then_some(()))
    })
}

/// Connects the QEMUs of a paused post-copy again: the guest's by another monitor, which is asked out of band, since QEMU
/// itself may wait for the guest's memory, and answers nothing else meanwhile.
///
/// # Errors
/// What went wrong.
pub fn recover(vm: &mut Vm, there: &mut Qmp, into: &Path, out: &Path) -> Result<()> {
    wait::until("the destination to pause", PATIENCE, || {
        Ok(there.execute_oob("migrate-recover", uri(into)).ok())
    })?;
    let mut again = uri(out);
    again["resume"] = true.into();
    vm.qmp().execute("migrate", again).map(drop)
}
