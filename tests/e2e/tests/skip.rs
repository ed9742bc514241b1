//! Memory that the guest does not use is not moved, and nothing is lost by that.

use anyhow::{Context as _, Result, ensure};
use e2e::{PATIENCE, Rig, busy, free_address};
use framework::{QemuKind, Vm, VmSpec};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// A guest that freed 200 MiB of noise, beside what is written and checked.
fn freed(kind: QemuKind, churns: bool) -> VmSpec {
    let churn = u8::from(churns);
    let mib = if churns { 30 } else { 200 };
    busy(kind).memory_mib(512).with(&format!("godwit.freed=mib={mib},seed=3,churn={churn}"))
}

fn number(report: &Value, field: &str) -> Result<u64> {
    report.pointer(field).and_then(Value::as_u64).with_context(|| format!("{field}: {report}"))
}

#[test]
fn freed_memory_stays_where_it_is_in_every_mode() -> Result<()> {
    let rig = Rig::new()?;
    let kind = QemuKind::V7_2;
    let mut vm = Vm::boot(&rig.env, freed(kind, false))?;
    for mode in ["pre-copy", "hybrid", "post-copy", "auto"] {
        vm.ask("freed again")?;
        let moved =
            rig.migrate(vm, kind, &["--verify", "--mode", mode, "--compression", "none"])?;
        let report = &moved.report;
        let (unused, wire) = (number(report, "/pages/unused")?, number(report, "/bytes/wire")?);
        println!("{mode}: {unused} pages unused, {} MiB over the wire", wire / MIB);
        ensure!(unused * 4096 > 190 * MIB, "{mode}: {report}");
        ensure!(wire < 200 * MIB, "{mode}: {report}");
        vm = moved.vm;
    }
    vm.ask("freed again")?;
    let moved = rig.migrate(vm, kind, &["--verify", "--skip-unused", "off"])?;
    ensure!(number(&moved.report, "/pages/unused")? == 0, "{}", moved.report);
    ensure!(number(&moved.report, "/bytes/wire")? > 200 * MIB, "{}", moved.report);
    vm = moved.vm;
    vm.verify_checker(PATIENCE)?;
    Ok(())
}

/// Memory is freed and taken again all the time, also of pages that were sent before. With `init_on_free` the
/// guest relies on zeros in what it freed.
#[test]
fn memory_that_comes_and_goes_is_never_wrong() -> Result<()> {
    let rig = Rig::new()?;
    let kind = QemuKind::V10_0;
    for option in ["init_on_free=0", "init_on_free=1"] {
        let mut vm = Vm::boot(&rig.env, freed(kind, true).with(option))?;
        let mut times = 0;
        for mode in ["pre-copy", "hybrid", "pre-copy", "post-copy", "hybrid"] {
            let words = ["--verify", "--mode", mode, "--max-downtime-ms", "3000"];
            let moved = rig.migrate(vm, kind, &words)?;
            println!("{option} {mode}: {} pages unused", moved.report["pages"]["unused"]);
            ensure!(number(&moved.report, "/pages/unused")? > 0, "{}", moved.report);
            vm = moved.vm;
            // Two rounds of it begin and end here.
            let before = framework::guest::number(&vm.ask("freed report")?, "times")?;
            ensure!(before >= times, "{before} {times}");
            framework::wait::until("memory that comes and goes", PATIENCE, || {
                times = framework::guest::number(&vm.ask("freed report")?, "times")?;
                Ok((times >= before + 2).then_some(()))
            })?;
            vm.assert_clean()?;
        }
        vm.verify_checker(PATIENCE)?;
    }
    Ok(())
}

#[test]
fn a_guest_that_fills_what_it_frees_is_moved_whole() -> Result<()> {
    let rig = Rig::new()?;
    let kind = QemuKind::V7_2;
    let vm = Vm::boot(&rig.env, freed(kind, false).with("page_poison=1"))?;
    let seen = rig.inspect(&vm)?;
    ensure!(
        seen["not_skipped"].as_str().is_some_and(|why| why.contains("page_poison=1")),
        "{seen}"
    );
    let moved = rig.migrate(vm, kind, &["--verify"])?;
    let report = &moved.report;
    ensure!(
        report["not_skipped"].as_str().is_some_and(|why| why.contains("page_poison=1")),
        "{report}"
    );
    ensure!(number(report, "/pages/unused")? == 0, "{report}");
    let mut vm = moved.vm;
    // The kernel checks the pattern as it gives the memory out.
    vm.ask("freed again")?;
    vm.verify_checker(PATIENCE)?;
    Ok(())
}

#[test]
fn a_machine_without_a_kernel_says_so() -> Result<()> {
    let rig = Rig::new()?;
    let vm = Vm::start(&rig.env, VmSpec::new("bare", QemuKind::V7_2).extra(&["-S"]))?;
    let seen = rig.inspect(&vm);
    let error = format!("{:#}", seen.err().context("something was seen")?);
    ensure!(error.contains("No Linux kernel that describes itself"), "{error}");
    Ok(())
}

/// What the last kernel left says that all of this is free; the next one is about to use it.
#[test]
fn a_guest_that_is_reset_meanwhile_is_moved_as_it_is_then() -> Result<()> {
    let rig = Rig::new()?;
    let kind = QemuKind::V7_2;
    // The same addresses at every start: nothing but the reset tells the kernels apart.
    let mut source = Vm::boot(&rig.env, freed(kind, false).with("nokaslr"))?;
    source.qmp().execute("set-action", json!({ "reboot": "reset" }))?;
    let destination = Vm::start(&rig.env, source.spec().successor("next", kind))?;
    let listen = free_address()?;
    let receive = rig.receive(&destination, &listen, &[])?;
    let words = ["--verify", "--max-bandwidth", "400M", "--compression", "none"];
    let mut send = rig.send(&source, &listen, &words)?;
    send.wait_stderr("round 1", PATIENCE)?;
    source.qmp().execute("system_reset", json!({}))?;
    let sent = send.wait(PATIENCE)?;
    ensure!(sent.stderr.contains("all that was skipped is sent"), "{}", sent.stderr);
    let report = sent.json()?;
    ensure!(sent.code == Some(0), "{report}\n{}", sent.stderr);
    ensure!(number(report, "/pages/unused")? == 0, "{report}");
    ensure!(number(report, "/verify/mismatches")? == 0, "{report}");
    ensure!(receive.wait(PATIENCE)?.code == Some(0), "receive failed");
    Ok(())
}
