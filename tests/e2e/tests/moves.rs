//! The main job: guests that work move and work on.

use anyhow::Result;
use e2e::Rig;
use framework::{QemuKind, Vm, VmSpec};

/// A guest that writes and checks its memory.
fn busy(kind: QemuKind) -> VmSpec {
    VmSpec::new("busy", kind)
        .with("godwit.writer=fill=60,hot=30,rate=4000,bytes=64,seed=7")
        .with("godwit.checker=size=24,seed=5")
}

/// Moves a guest `times` times between QEMUs of the kinds given in turn.
fn back_and_forth(kinds: [QemuKind; 2], times: usize) -> Result<()> {
    let rig = Rig::new()?;
    let mut vm = Vm::boot(&rig.env, busy(kinds[0]))?;
    let mut outages = vec![];
    for turn in 1..=times {
        let moved = rig.migrate(vm, kinds[turn % 2], &["--verify"])?;
        outages.push(moved.outage_ms.round());
        vm = moved.vm;
    }
    vm.verify_checker(e2e::PATIENCE)?;
    println!("{kinds:?}: outages with --verify in ms: {outages:?}");
    Ok(())
}

#[test]
fn twenty_moves_on_7_2() -> Result<()> {
    back_and_forth([QemuKind::V7_2; 2], 20)
}
