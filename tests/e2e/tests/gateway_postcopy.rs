//! Guests that their QEMUs move by post-copy, through a pair of gateways.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::gateways::{Gateways, private, uri};
use e2e::{PATIENCE, Rig, check_alive, in_turn};
use framework::{QemuKind, Vm, wait};
use serde_json::json;

/// What QEMUs must have for post-copy; that at the destination also measures how long the guest waits.
const PLAIN: &[&str] = &["postcopy-ram", "postcopy-blocktime"];

/// The same with a connection of its own for pages that are asked for.
const PREEMPT: &[&str] = &["postcopy-ram", "postcopy-blocktime", "postcopy-preempt"];

/// Has QEMU move a guest into a fresh QEMU of `kind`, by post-copy from the beginning or after `passes` of pre-copy.
fn migrate(
    gateways: &Gateways,
    rig: &Rig,
    mut vm: Vm,
    kind: QemuKind,
    (capabilities, passes): (&[&str], u64),
) -> Result<Vm> {
    // Pre-copy is not to end by itself.
    let limits = json!({ "max-bandwidth": 200 << 20, "downtime-limit": 1 });
    let mut next = gateways.begin(rig, &mut vm, kind, capabilities, limits)?;
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

fn back_and_forth(kinds: &[QemuKind], capabilities: &[&str]) -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let gateways = Gateways::start(&rig)?;
        let (first, others) = kinds.split_first().context("no kinds")?;
        let mut vm = Vm::boot(&rig.env, private(*first))?;
        for (turn, kind) in others.iter().enumerate() {
            vm = migrate(&gateways, &rig, vm, *kind, (capabilities, turn as u64 % 3))?;
            ensure!(vm.heartbeat().beats_within(Duration::from_secs(5)), "It must run on");
        }
        vm.verify_checker(PATIENCE).with_context(|| gateways.said())?;
        println!("{}", gateways.said());
        Ok(())
    })
}

#[test]
fn ten_moves_on_7_2() -> Result<()> {
    back_and_forth(&[QemuKind::V7_2; 11], PLAIN)
}

#[test]
fn ten_moves_on_10_0() -> Result<()> {
    back_and_forth(&[QemuKind::V10_0; 11], PLAIN)
}

#[test]
fn a_guest_moves_from_7_2_to_10_0() -> Result<()> {
    back_and_forth(&[QemuKind::V7_2, QemuKind::V10_0, QemuKind::V10_0], PLAIN)
}

#[test]
fn preempted_moves_on_7_2() -> Result<()> {
    back_and_forth(&[QemuKind::V7_2; 4], PREEMPT)
}

#[test]
fn preempted_moves_on_10_0() -> Result<()> {
    back_and_forth(&[QemuKind::V10_0; 4], PREEMPT)
}

/// A gateway dies while the guest runs at the destination without all of its memory. The QEMUs pause the migration, and
/// go on through other gateways.
fn recovered(kind: QemuKind) -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let words = ["--dead-peer-s", "1"];
        let start = || Gateways::start_in(&rig, "127.0.0.1:0", [None, None], &words);
        let gateways = start()?;
        let mut vm = Vm::boot(&rig.env, private(kind))?;
        let limits = json!({ "max-bandwidth": 200 << 20, "max-postcopy-bandwidth": 8 << 20 });
        let mut next = gateways.begin(&rig, &mut vm, kind, PLAIN, limits)?;
        vm.qmp().execute("migrate-start-postcopy", json!({}))?;
        gateways.until(&mut next, &["postcopy-active"])?;
        std::thread::sleep(Duration::from_secs(1));
        gateways.until(&mut vm, &["postcopy-active"])?;
        let Gateways { source, destination, out, into } = gateways;
        destination.kill()?;
        wait::until("the source to pause", PATIENCE, || {
            let now = vm.qmp().execute("query-migrate", json!({}))?;
            Ok((now["status"] == "postcopy-paused").then_some(()))
        })?;
        println!("{}", source.kill()?.stderr);
        let gateways = start()?;
        gateways.until(&mut next, &["postcopy-paused"])?;
        next.qmp().execute("migrate-recover", uri(&into))?;
        let limits = json!({ "max-postcopy-bandwidth": 0 });
        vm.qmp().execute("migrate-set-parameters", limits)?;
        let mut again = uri(&out);
        again["resume"] = true.into();
        vm.qmp().execute("migrate", again)?;
        gateways.until(&mut vm, &["completed"])?;
        gateways.until(&mut next, &["completed"])?;
        check_alive(&mut vm, &mut next).with_context(|| gateways.said())?;
        next.verify_checker(PATIENCE).with_context(|| gateways.said())?;
        println!("{}", gateways.said());
        Ok(())
    })
}

#[test]
fn a_broken_move_goes_on_on_7_2() -> Result<()> {
    recovered(QemuKind::V7_2)
}

#[test]
fn a_broken_move_goes_on_on_10_0() -> Result<()> {
    recovered(QemuKind::V10_0)
}
