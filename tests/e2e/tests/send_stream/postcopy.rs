//! Guests that run at the destination before their memory is there, by QEMU's own post-copy.

use anyhow::{Context as _, Result, ensure};
use e2e::gateways::small;
use e2e::waits::{Waits, slow};
use e2e::{PATIENCE, Rig, check_alive, in_turn};
use framework::{NetnsPair, QemuKind, Vm};
use serde_json::json;

use super::{LISTEN, check_report, stream};

#[test]
fn guests_move_ahead_of_their_memory() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let mut vm = Vm::boot(&rig.env, small(QemuKind::V7_2))?;
        let old = [("post-copy", QemuKind::V7_2), ("hybrid", QemuKind::V7_2)];
        let new = [("post-copy", QemuKind::V10_0), ("hybrid", QemuKind::V10_0)];
        let moves = old.into_iter().chain(new).chain([("post-copy", QemuKind::V10_0)]);
        for (mode, kind) in moves {
            let next = vm.spec().successor("next", kind);
            let words = stream(&["--mode", mode, "--keep-source"]);
            let moved = rig.migrate_from(&mut vm, next, &words);
            let moved = moved.with_context(|| format!("by {mode} to {kind:?}"))?;
            check_report(&moved.report, "completed")?;
            ensure!(moved.report["mode"] == mode, "{}", moved.report);
            ensure!(vm.qmp().run_state()? == "postmigrate", "The source is not kept");
            let left = vm.qmp().migration()?;
            let ram = &left["ram"];
            ensure!(ram["postcopy-bytes"].as_u64() > Some(0), "No post-copy: {left}");
            // By hybrid, the guest may find all that it looks for.
            let is_asked_for = ram["postcopy-requests"].as_u64() > Some(0);
            ensure!(mode == "hybrid" || is_asked_for, "No page was asked for: {left}");
            println!(
                "{mode} to {kind:?}: outage {:.0} ms, {} bytes after it, {} requests",
                moved.outage_ms, ram["postcopy-bytes"], ram["postcopy-requests"]
            );
            vm = moved.vm;
        }
        vm.verify_checker(PATIENCE).map(drop)
    })
}

/// What the guest waits for overtakes what is under way.
#[test]
fn little_is_waited_for_on_a_slow_link() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let net = NetnsPair::create(100_000_000)?;
        let mut vm = Vm::boot(&rig.env, slow(QemuKind::V10_0))?;
        let mut next = Vm::start(&rig.env, vm.spec().successor("there", QemuKind::V10_0))?;
        let measured = json!([{ "capability": "postcopy-blocktime", "state": true }]);
        let measured = json!({ "capabilities": measured });
        next.qmp().execute("migrate-set-capabilities", measured)?;
        let receive = rig.receive_in(&next, LISTEN, &[], Some(net.destination.name()))?;
        let words = stream(&["--mode", "post-copy", "--keep-source"]);
        let send = rig.send_in(&vm, LISTEN, &words, Some(net.source.name()))?;
        let sent = send.wait(PATIENCE)?.success().with_context(|| receive.stderr())?;
        receive.wait(PATIENCE)?.success()?;
        check_report(sent.json()?, "completed")?;
        check_alive(&mut vm, &mut next)?;
        let waits = Waits::of(&vm.qmp().migration()?, &next.qmp().migration()?)?;
        println!("{waits:?}\n{}", sent.stdout);
        waits.assert_short()?;
        next.verify_checker(PATIENCE).map(drop)
    })
}
