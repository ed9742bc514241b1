//! Guests that their QEMUs move by post-copy, through a pair of gateways.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::gateways::{Gateways, private};
use e2e::{PATIENCE, Rig, check_alive, in_turn};
use framework::{QemuKind, Vm, wait};
use serde_json::json;

/// What the destination's QEMU must have for post-copy; it also measures how long the guest waits.
const CAPABILITIES: [&str; 2] = ["postcopy-ram", "postcopy-blocktime"];

/// Has QEMU move a guest into a fresh QEMU of `kind`, by post-copy from the beginning or after `passes` of pre-copy.
fn migrate(gateways: &Gateways, rig: &Rig, mut vm: Vm, kind: QemuKind, passes: u64) -> Result<Vm> {
    // Pre-copy is not to end by itself.
    let limits = json!({ "max-bandwidth": 200 << 20, "downtime-limit": 1 });
    let mut next = gateways.begin(rig, &mut vm, kind, &CAPABILITIES, limits)?;
    wait::until("passes of pre-copy", PATIENCE, || {
        let now = vm.qmp().execute("query-migrate", json!({}))?;
        Ok((now["ram"]["dirty-sync-count"].as_u64() >= Some(passes)).then_some(()))
    })?;
    let began = Instant::now();
    vm.qmp().execute("migrate-start-postcopy", json!({}))?;
    let source = gateways.until(&mut vm, &["completed"])?;
    let took = began.elapsed();
    let destination = gateways.until(&mut next, &["completed"])?;
    let requests = source["ram"]["postcopy-requests"].as_u64();
    ensure!(requests > Some(0), "It was no post-copy: {source}\n{}", gateways.said());
    check_alive(&mut vm, &mut next).with_context(|| gateways.said())?;
    println!(
        "{passes} passes, post-copy {took:.1?}: {requests:?} requests, downtime {} ms, blocked {} ms",
        source["downtime"], destination["postcopy-blocktime"]
    );
    Ok(next)
}

fn back_and_forth(kinds: &[QemuKind]) -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let gateways = Gateways::start(&rig)?;
        let (first, others) = kinds.split_first().context("no kinds")?;
        let mut vm = Vm::boot(&rig.env, private(*first))?;
        for (turn, kind) in others.iter().enumerate() {
            vm = migrate(&gateways, &rig, vm, *kind, turn as u64 % 3)?;
            ensure!(vm.heartbeat().beats_within(Duration::from_secs(5)), "It must run on");
        }
        vm.verify_checker(PATIENCE).with_context(|| gateways.said())?;
        println!("{}", gateways.said());
        Ok(())
    })
}

#[test]
fn ten_moves_on_7_2() -> Result<()> {
    back_and_forth(&[QemuKind::V7_2; 11])
}

#[test]
fn ten_moves_on_10_0() -> Result<()> {
    back_and_forth(&[QemuKind::V10_0; 11])
}

#[test]
fn a_guest_moves_from_7_2_to_10_0() -> Result<()> {
    back_and_forth(&[QemuKind::V7_2, QemuKind::V10_0, QemuKind::V10_0])
}
