//! Guests that their QEMUs move by post-copy, through a pair of gateways.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::gateways::{Gateways, recover, small, wait_paused};
use e2e::waits::{self, Waits};
use e2e::{BEATS_WITHIN, PATIENCE, Rig, check_alive, in_turn, with_larger_pages};
use framework::{NetnsPair, QemuKind, Qmp, Vm, VmSpec, wait};
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
) -> Result<(Vm, Waits)> {
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
    let waits = Waits::of(&source, &destination).with_context(|| gateways.said())?;
    // After some passes a guest may find all that it looks for.
    ensure!(passes > 1 || waits.requests > 0, "Nothing was asked for: {}", gateways.said());
    check_alive(&mut vm, &mut next).with_context(|| gateways.said())?;
    println!(
        "{passes} passes, post-copy {took:.1?}, downtime {} ms, {waits:?}",
        source["downtime"]
    );
    Ok((next, waits))
}

fn back_and_forth(kinds: &[QemuKind], capabilities: &[&str], words: &[&str]) -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let gateways = Gateways::start_in(&rig, "127.0.0.1:0", [None, None], [words, &[]])?;
        let (first, others) = kinds.split_first().context("no kinds")?;
        let mut vm = Vm::boot(&rig.env, small(*first))?;
        for (turn, kind) in others.iter().enumerate() {
            (vm, _) = migrate(&gateways, &rig, vm, *kind, (capabilities, turn as u64 % 3))?;
            ensure!(vm.heartbeat().beats_within(BEATS_WITHIN), "It must run on");
        }
        vm.verify_checker(PATIENCE).with_context(|| gateways.said())?;
        println!("{}", gateways.said());
        Ok(())
    })
}

#[test]
fn ten_moves_on_7_2() -> Result<()> {
    back_and_forth(&[QemuKind::V7_2; 11], PLAIN, &["--lane-count", "1"])
}

#[test]
fn ten_moves_on_10_0() -> Result<()> {
    back_and_forth(&[QemuKind::V10_0; 11], PLAIN, &[])
}

#[test]
fn a_guest_moves_from_7_2_to_10_0() -> Result<()> {
    back_and_forth(&[QemuKind::V7_2, QemuKind::V10_0], PLAIN, &["--lanes", "tcp"])
}

#[test]
fn guests_move_with_a_connection_for_pages_that_are_asked_for() -> Result<()> {
    back_and_forth(
        &[QemuKind::V7_2, QemuKind::V7_2, QemuKind::V10_0, QemuKind::V10_0],
        PREEMPT,
        &[],
    )
}

/// A gateway dies while the guest runs at the destination without all of its memory. The QEMUs pause the migration, and
/// go on through other gateways.
fn recovered(kind: QemuKind) -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let words: &[&str] = &["--dead-peer-s", "1"];
        let start = || Gateways::start_in(&rig, "127.0.0.1:0", [None, None], [words, words]);
        let gateways = start()?;
        let mut vm = Vm::boot(&rig.env, small(kind))?;
        let limits = json!({ "max-bandwidth": 200 << 20, "max-postcopy-bandwidth": 8 << 20 });
        let mut next = gateways.begin(&rig, &mut vm, kind, PLAIN, limits)?;
        let mut monitor = Qmp::connect_oob(&next.qmp_engine(), PATIENCE)?;
        vm.qmp().execute("migrate-start-postcopy", json!({}))?;
        gateways.until(&mut next, &["postcopy-active"])?;
        std::thread::sleep(Duration::from_millis(500));
        gateways.until(&mut vm, &["postcopy-active"])?;
        let Gateways { source, destination, out, into } = gateways;
        destination.kill()?;
        wait_paused(&mut vm)?;
        println!("{}", source.kill()?.stderr);
        let gateways = start()?;
        let limits = json!({ "max-postcopy-bandwidth": 0 });
        vm.qmp().execute("migrate-set-parameters", limits)?;
        recover(&mut vm, &mut monitor, &into, &out)?;
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

#[test]
fn little_is_waited_for_on_a_slow_link() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let net = NetnsPair::create(100_000_000)?;
        let netns = [Some(net.source.name()), Some(net.destination.name())];
        let gateways = Gateways::start_in(&rig, "10.77.0.2:7700", netns, [&[], &[]])?;
        let vm = Vm::boot(&rig.env, waits::slow(QemuKind::V10_0))?;
        let (mut vm, waits) = migrate(&gateways, &rig, vm, QemuKind::V10_0, (PLAIN, 0))?;
        waits.assert_short().with_context(|| gateways.said())?;
        vm.verify_checker(PATIENCE).with_context(|| gateways.said())?;
        println!("{}\n{}", gateways.said(), gateways.source.stdout());
        Ok(())
    })
}

/// Of huge pages QEMU takes no parts: such a guest does not leave, and runs on.
#[test]
fn huge_pages_are_refused_before_the_guest_leaves() -> Result<()> {
    in_turn(|| {
        let (backends, _huge) = with_larger_pages(vec![]);
        let rig = Rig::new()?;
        for backend in backends {
            let mut gateways = Gateways::start(&rig)?;
            let spec = VmSpec::new("huge", QemuKind::V10_0).backend(backend);
            let mut vm = Vm::boot(&rig.env, spec)?;
            let _next = gateways.begin(&rig, &mut vm, QemuKind::V10_0, PLAIN, json!({}))?;
            gateways.source.wait_stderr("postcopy-ram off", PATIENCE)?;
            wait::until("the end of the migration", PATIENCE, || {
                let now = vm.qmp().execute("query-migrate", json!({}))?;
                Ok((now["status"] == "failed").then_some(()))
            })?;
            ensure!(vm.heartbeat().beats_within(BEATS_WITHIN), "It must run on");
            println!("{}", gateways.said());
        }
        Ok(())
    })
}
