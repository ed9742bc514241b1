//! Memory that the guest freed does not travel with QEMU's stream either.

use anyhow::{Context as _, Result, ensure};
use e2e::gateways::small;
use e2e::stage::runs;
use e2e::streams::{STREAM, stream, under_way};
use e2e::{PATIENCE, Rig, free_address, in_turn};
use framework::{Backend, QemuKind, Vm, VmSpec, guest, wait};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// A guest with private memory that freed noise: all of it once, or a part of it again and again.
fn freed(kind: QemuKind, churns: bool) -> VmSpec {
    let (churn, mib) = (u8::from(churns), if churns { 30 } else { 200 });
    small(kind).memory_mib(512).with(&format!("godwit.freed=mib={mib},seed=3,churn={churn}"))
}

fn number(report: &Value, field: &str) -> Result<u64> {
    report.pointer(field).and_then(Value::as_u64).with_context(|| format!("{field}: {report}"))
}

#[test]
fn freed_memory_is_left_out_unless_it_is_asked_for() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let mut vm = Vm::boot(&rig.env, freed(QemuKind::V7_2, false))?;
        for (kind, backend) in [
            (QemuKind::V7_2, Backend::Private),
            (QemuKind::V10_0, Backend::Tmpfs),
            (QemuKind::V10_0, Backend::Private),
        ] {
            vm.ask("freed again")?;
            let words = stream(&["--compression", "none"]);
            let next = vm.spec().successor("next", kind).backend(backend);
            let moved = rig.migrate_from(&mut vm, next, &words)?;
            let report = &moved.report;
            let (unused, wire) = (number(report, "/pages/unused")?, number(report, "/bytes/wire")?);
            println!("{unused} pages unused, {} MiB over the wire", wire / MIB);
            ensure!(unused * 4096 > 160 * MIB && wire < 200 * MIB, "{report}");
            vm = moved.vm;
        }
        vm.ask("freed again")?;
        let words = stream(&["--compression", "none", "--skip-unused", "off"]);
        let mut moved = rig.migrate(vm, QemuKind::V10_0, &words)?;
        ensure!(number(&moved.report, "/pages/unused")? == 0, "{}", moved.report);
        ensure!(number(&moved.report, "/bytes/wire")? > 200 * MIB, "{}", moved.report);
        moved.vm.verify_checker(PATIENCE).map(drop)
    })
}

/// With `init_on_free` the guest relies on zeros in what it freed.
#[test]
fn memory_that_comes_and_goes_is_never_wrong() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        for (kind, option) in
            [(QemuKind::V7_2, "init_on_free=0"), (QemuKind::V10_0, "init_on_free=1")]
        {
            let mut vm = Vm::boot(&rig.env, freed(kind, true).with(option))?;
            let mut times = 0;
            for _ in 0..4 {
                let moved = rig.migrate(vm, kind, &stream(&["--max-downtime-ms", "3000"]))?;
                let unused = number(&moved.report, "/pages/unused")?;
                println!("{option}: {unused} pages unused");
                // What was filled with zeros travels as zeros anyway.
                ensure!(unused > 0 || option == "init_on_free=1", "{}", moved.report);
                vm = moved.vm;
                // Two rounds of it begin and end here.
                let before = guest::number(&vm.ask("freed report")?, "times")?;
                ensure!(before >= times, "{before} {times}");
                wait::until("memory that comes and goes", PATIENCE, || {
                    times = guest::number(&vm.ask("freed report")?, "times")?;
                    Ok((times >= before + 2).then_some(()))
                })?;
                vm.assert_clean()?;
            }
            vm.verify_checker(PATIENCE)?;
        }
        Ok(())
    })
}

/// What the last kernel left says that all of this is free; the next one is about to use it.
#[test]
fn a_guest_that_is_reset_meanwhile_stays_where_it_is() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let kind = QemuKind::V7_2;
        // The same addresses at every start: nothing but the reset tells the kernels apart.
        let mut source = Vm::boot(&rig.env, freed(kind, false).with("nokaslr"))?;
        source.qmp().execute("set-action", json!({ "reboot": "reset" }))?;
        let destination = Vm::start(&rig.env, source.spec().successor("next", kind))?;
        let listen = free_address()?;
        let receive = rig.receive(&destination, &listen, &[])?;
        let words = stream(&["--max-bandwidth", "200M", "--compression", "none"]);
        let mut send = rig.send(&source, &listen, &words)?;
        under_way(&mut source, &mut send)?;
        source.qmp().execute("system_reset", json!({}))?;
        let sent = send.wait(PATIENCE)?;
        ensure!(sent.code != Some(0), "{}", sent.stderr);
        ensure!(sent.stderr.contains("reset meanwhile"), "{}", sent.stderr);
        ensure!(receive.wait(PATIENCE)?.code != Some(0), "receive took it");
        ensure!(runs(&mut source)?, "The guest does not run on");
        source.wait_ready(framework::vm::READY_TIMEOUT)
    })
}

#[test]
fn a_guest_that_fills_what_it_frees_is_moved_whole() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let kind = QemuKind::V7_2;
        let vm = Vm::boot(&rig.env, freed(kind, false).with("page_poison=1"))?;
        let mut moved = rig.migrate(vm, kind, STREAM)?;
        let report = &moved.report;
        let why = report["not_skipped"].as_str().unwrap_or_default();
        ensure!(why.contains("page_poison=1") && moved.said.contains(why), "{report}");
        ensure!(number(report, "/pages/unused")? == 0, "{report}");
        // The kernel checks the pattern as it gives the memory out.
        moved.vm.ask("freed again")?;
        moved.vm.verify_checker(PATIENCE).map(drop)
    })
}
