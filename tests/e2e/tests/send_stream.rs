//! `migrate send --path stream`: guests in any kind of RAM move by QEMU's own stream, which the engines carry.
//!
//! What is looked at comes from the guest (heartbeat, checker), from QEMU (`query-migrate`, events) and from the report, not
//! from what the engines say of each other. "Under way" is what QEMU says of its migration.

#[path = "send_stream/refused.rs"]
mod refused;
#[path = "send_stream/unused.rs"]
mod unused;

use anyhow::{Context as _, Result, ensure};
use e2e::gateways::small;
use e2e::stage::runs;
use e2e::streams::{LISTEN, STREAM, check_report, stream, under_way};
use e2e::waits::slow;
use e2e::{BEATS_WITHIN, Moved, PATIENCE, Rig, check_alive, free_address, in_turn};
use framework::{Backend, NetnsPair, QemuKind, Vm, VmSpec};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// Most that QEMU's other blocks (firmware, option ROMs, tables) add to the guest's RAM.
const OTHER_BLOCKS_BYTES_MAX: u64 = 16 << 20;

/// Moves a guest from kind to kind, by different settings in turn.
fn moved(kinds: &[QemuKind], guest: fn(QemuKind) -> VmSpec) -> Result<()> {
    const SETTINGS: [&[&str]; 5] = [
        &[],
        &["--lanes", "tcp"],
        &["--lanes", "quic", "--lane-count", "1", "--compression", "zstd"],
        &["--compression", "none"],
        &["--mode", "pre-copy", "--compression", "lz4"],
    ];
    in_turn(|| {
        let rig = Rig::new()?;
        let (first, others) = kinds.split_first().context("no kinds")?;
        let mut vm = Vm::boot(&rig.env, guest(*first))?;
        let mut outages = vec![];
        for (turn, kind) in others.iter().enumerate() {
            let settings = SETTINGS[turn % SETTINGS.len()];
            let moved = rig.migrate(vm, *kind, &stream(settings));
            let moved = moved.with_context(|| format!("move {} by {settings:?}", turn + 1))?;
            check_report(&moved.report, "completed")?;
            outages.push(moved.outage_ms.round());
            vm = moved.vm;
        }
        vm.verify_checker(PATIENCE)?;
        println!("{kinds:?}: outages in ms: {outages:?}");
        Ok(())
    })
}

#[test]
fn twenty_moves_on_7_2() -> Result<()> {
    moved(&[QemuKind::V7_2; 21], small)
}

#[test]
fn twenty_moves_on_10_0() -> Result<()> {
    moved(&[QemuKind::V10_0; 21], small)
}

#[test]
fn a_guest_moves_from_7_2_to_10_0() -> Result<()> {
    moved(&[QemuKind::V7_2, QemuKind::V10_0, QemuKind::V10_0], small)
}

/// Newer machines are told within the stream that their guest has stopped.
#[test]
fn a_newer_machine_moves() -> Result<()> {
    let guest =
        |kind| VmSpec { machine: "pc-i440fx-10.0".into(), extra_kib: 0, ..small(kind).smp(2) };
    moved(&[QemuKind::V10_0; 4], guest)
}

#[test]
fn the_report_says_what_happened_and_the_source_is_quit_unless_it_is_kept() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let mut first = Vm::boot(&rig.env, small(QemuKind::V7_2))?;
        let next = first.spec().successor("next", QemuKind::V7_2);
        // So slow that pages are written again before they could be over.
        let words = ["--mode", "pre-copy", "--max-bandwidth", "200M", "--keep-source"];
        let words = stream(&[&words[..], &["--max-downtime-ms", "300"]].concat());
        let moved = rig.migrate_from(&mut first, next, &words)?;
        complete(&moved, first.spec().memory_bytes()).with_context(|| moved.report.to_string())?;
        ensure!(first.qmp().run_state()? == "postmigrate", "The source is not kept");
        drop(first);
        let mut second = moved.vm;
        let next = second.spec().successor("last", QemuKind::V7_2);
        let mut last = rig.migrate_from(&mut second, next, STREAM)?;
        second.wait_exit(PATIENCE).context("The source is not quit")?;
        last.vm.verify_checker(PATIENCE).map(drop)
    })
}

/// What the report of a move with several rounds must say.
fn complete(moved: &Moved, ram_bytes: u64) -> Result<()> {
    let report = &moved.report;
    check_report(report, "completed")?;
    ensure!(report["mode"] == "pre-copy", "mode");
    let number = |field: &str| report.pointer(field).and_then(Value::as_f64).context("no number");
    let (total_ms, downtime_ms) = (number("/total_ms")?, number("/downtime_ms")?);
    ensure!(downtime_ms > 0.0 && downtime_ms < total_ms, "downtime");
    let ram = report["bytes"]["ram"].as_u64().context("no RAM")?;
    ensure!((ram_bytes..ram_bytes + OTHER_BLOCKS_BYTES_MAX).contains(&ram), "RAM");
    // Most of the guest's memory is zeros.
    let wire = number("/bytes/wire")?;
    ensure!(wire > 1e6 && wire < ram as f64, "wire");
    ensure!(wire * 8e3 / total_ms < 215e6, "More than the limit was sent");
    for kind in ["/pages/zero", "/pages/raw", "/pages/delta"] {
        ensure!(number(kind)? > 0.0, "{kind}");
    }
    println!("outage {:.0} ms, downtime {downtime_ms:.0} ms of {total_ms:.0} ms", moved.outage_ms);
    Ok(())
}

#[test]
fn the_path_is_chosen_by_the_kind_of_memory() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let vm = Vm::boot(&rig.env, small(QemuKind::V7_2))?;
        let mut moved = rig.migrate(vm, QemuKind::V7_2, &[])?;
        ensure!(moved.report["path"] == "stream", "{}", moved.report);
        says(&moved.said, ["stream", "private"])?;
        let shared = moved.vm.spec().successor("shared", QemuKind::V7_2).backend(Backend::Tmpfs);
        let moved = rig.migrate_from(&mut moved.vm, shared, STREAM)?;
        let mut moved = rig.migrate(moved.vm, QemuKind::V7_2, &["--path", "auto", "--verify"])?;
        ensure!(moved.report["path"] == "direct", "{}", moved.report);
        says(&moved.said, ["direct", "shared"])?;
        moved.vm.verify_checker(PATIENCE).map(drop)
    })
}

/// One line has all these words.
fn says(text: &str, words: [&str; 2]) -> Result<()> {
    let is_said = text.lines().any(|line| words.iter().all(|word| line.contains(word)));
    ensure!(is_said, "No line has {words:?}:\n{text}");
    Ok(())
}

/// From private to shared memory and back, and between kinds of shared memory.
#[test]
fn any_kind_of_memory_moves_into_any_other() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let mut vm = Vm::boot(&rig.env, small(QemuKind::V7_2))?;
        let steps: [(QemuKind, Backend, &str); 5] = [
            (QemuKind::V7_2, Backend::Tmpfs, "pre-copy"),
            (QemuKind::V7_2, Backend::Tmpfs, "pre-copy"),
            (QemuKind::V10_0, Backend::Memfd, "auto"),
            (QemuKind::V10_0, Backend::Tmpfs, "pre-copy"),
            (QemuKind::V10_0, Backend::Private, "auto"),
        ];
        for (kind, backend, mode) in steps {
            let what = format!("{:?} to {backend:?} on {kind:?} by {mode}", vm.spec().backend);
            let next = vm.spec().successor("next", kind).backend(backend);
            let moved = rig.migrate_from(&mut vm, next, &stream(&["--mode", mode]));
            let moved = moved.with_context(|| what.clone())?;
            check_report(&moved.report, "completed")?;
            println!("{what}: outage {:.0} ms", moved.outage_ms);
            vm = moved.vm;
        }
        vm.verify_checker(PATIENCE).map(drop)
    })
}

/// Moves a paused guest.
fn moved_paused(rig: &Rig, source: &Vm, kind: QemuKind) -> Result<Vm> {
    let mut next = Vm::start(&rig.env, source.spec().successor("next", kind))?;
    let listen = free_address()?;
    let receive = rig.receive(&next, &listen, &[])?;
    let sent = rig.send(source, &listen, STREAM)?.wait(PATIENCE)?.success()?;
    receive.wait(PATIENCE)?.success()?;
    check_report(sent.json()?, "completed")?;
    ensure!(next.qmp().run_state()? == "paused", "It is {}", next.qmp().run_state()?);
    Ok(next)
}

/// Also where its migration fails, and where it moves twice.
#[test]
fn a_paused_guest_stays_paused() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let mut vm = Vm::boot(&rig.env, slow(QemuKind::V7_2))?;
        vm.qmp().execute("stop", json!({}))?;
        let next = Vm::start(&rig.env, vm.spec().successor("vain", QemuKind::V7_2))?;
        let listen = free_address()?;
        let _receive = rig.receive(&next, &listen, &[])?;
        let words = stream(&["--mode", "pre-copy", "--max-bandwidth", "16M"]);
        let mut send = rig.send(&vm, &listen, &words)?;
        under_way(&mut vm, &mut send)?;
        send.signal(Signal::SIGINT)?;
        let sent = send.wait(PATIENCE)?;
        ensure!(sent.code == Some(1), "{sent:?}");
        check_report(sent.json()?, "failed")?;
        ensure!(sent.json()?["error"]["source_vm"] == "paused", "{sent:?}");
        ensure!(vm.qmp().run_state()? == "paused", "It runs at the source: {sent:?}");
        let vm = moved_paused(&rig, &vm, QemuKind::V7_2)?;
        let mut vm = moved_paused(&rig, &vm, QemuKind::V10_0)?;
        ensure!(vm.heartbeat().count() == 0, "It ran meanwhile");
        vm.qmp().execute("cont", json!({}))?;
        ensure!(vm.heartbeat().beats_within(BEATS_WITHIN), "It must run on");
        vm.verify_checker(PATIENCE).map(drop)
    })
}

/// A destination takes one guest; others are refused, whichever way they come, and the first arrives.
#[test]
fn a_destination_at_which_a_guest_arrives_refuses_others() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let net = NetnsPair::create(20_000_000)?;
        let [here, there] = [net.source.name(), net.destination.name()].map(Some);
        let mut vm = Vm::boot(&rig.env, slow(QemuKind::V10_0))?;
        let mut next = Vm::start(&rig.env, vm.spec().successor("there", QemuKind::V10_0))?;
        let receive = rig.receive_in(&next, LISTEN, &[], there)?;
        let mut send = rig.send_in(&vm, LISTEN, &stream(&["--mode", "pre-copy"]), here)?;
        under_way(&mut vm, &mut send)?;
        for backend in [Backend::Private, Backend::Tmpfs] {
            let what = format!("{backend:?}");
            let spec = VmSpec::new("other", QemuKind::V10_0).backend(backend);
            let mut other = Vm::start(&rig.env, spec)?;
            let sent = rig.send_in(&other, LISTEN, &[], here)?.wait(PATIENCE)?;
            ensure!(sent.code == Some(1), "{what}: {sent:?}");
            let message = sent.json()?["error"]["message"].as_str().unwrap_or_default();
            ensure!(message.contains("another guest is arriving"), "{what}: {message}");
            ensure!(runs(&mut other)?, "{what} does not run on");
        }
        ensure!(send.running()?, "The first has ended: {}", send.stderr());
        net.shape(0)?;
        let sent = send.wait(PATIENCE)?.success().with_context(|| receive.stderr())?;
        receive.wait(PATIENCE)?.success()?;
        check_report(sent.json()?, "completed")?;
        check_alive(&mut vm, &mut next)?;
        next.verify_checker(PATIENCE).map(drop)
    })
}
