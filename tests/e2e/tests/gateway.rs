//! Guests that their QEMUs move themselves, through a pair of gateways.

use anyhow::{Context as _, Result, ensure};
use e2e::gateways::{Gateways, private};
use e2e::{BEATS_WITHIN, PATIENCE, Rig, in_turn};
use framework::{QemuKind, Vm, VmSpec};

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
            ensure!(vm.heartbeat().beats_within(BEATS_WITHIN), "It must run on");
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
    let guest =
        |kind| VmSpec { machine: "pc-i440fx-10.0".into(), extra_kib: 0, ..private(kind).smp(2) };
    moved(&[QemuKind::V10_0; 6], guest)
}
