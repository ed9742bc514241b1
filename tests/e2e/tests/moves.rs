//! The main job: guests that work move and work on.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::{BEATS_WITHIN, PATIENCE, Rig, busy, free_address, preload_library, with_larger_pages};
use framework::{Backend, QemuKind, Vm, VmSpec};

/// Moves a guest `times` times from one QEMU to another, by the modes given in turn.
fn back_and_forth(kind: QemuKind, times: usize, modes: &[&str]) -> Result<()> {
    let rig = Rig::new()?;
    let mut vm = Vm::boot(&rig.env, busy(kind))?;
    let mut outages = vec![];
    for mode in modes.iter().cycle().take(times) {
        let moved = rig.migrate(vm, kind, &["--verify", "--mode", mode])?;
        outages.push(moved.outage_ms.round());
        vm = moved.vm;
    }
    vm.verify_checker(PATIENCE)?;
    println!("{kind:?} by {modes:?}: outages with --verify in ms: {outages:?}");
    Ok(())
}

#[test]
fn twenty_moves_on_7_2() -> Result<()> {
    back_and_forth(QemuKind::V7_2, 20, &["auto"])
}

#[test]
fn twenty_moves_on_10_0() -> Result<()> {
    back_and_forth(QemuKind::V10_0, 20, &["auto"])
}

/// Deltas, references, order and compression are on, as they are by default.
#[test]
fn fifty_moves_by_turns_before_and_after_the_memory() -> Result<()> {
    back_and_forth(QemuKind::V7_2, 50, &["auto", "hybrid", "post-copy"])
}

#[test]
fn a_guest_moves_from_7_2_to_10_0() -> Result<()> {
    let rig = Rig::new()?;
    let old = Vm::boot(&rig.env, busy(QemuKind::V7_2))?;
    let moved = rig.migrate(old, QemuKind::V10_0, &["--verify"])?;
    let moved = rig.migrate(moved.vm, QemuKind::V10_0, &["--verify"])?;
    let mut vm = moved.vm;
    vm.verify_checker(PATIENCE)?;
    Ok(())
}

/// However pages are packed, ordered and remembered, the same memory arrives.
#[test]
fn every_setting_moves_the_same_memory() -> Result<()> {
    let rig = Rig::new()?;
    let mut vm = Vm::boot(&rig.env, busy(QemuKind::V7_2))?;
    let settings: [&[&str]; 11] = [
        &[],
        &["--lanes", "quic"],
        &["--lanes", "tcp"],
        &["--lanes", "tcp", "--lane-count", "3", "--compression", "zstd"],
        &["--compression", "none"],
        &["--compression", "lz4"],
        &["--compression", "zstd"],
        &["--delta-cache", "0", "--compression", "zstd"],
        &["--delta-cache", "1M"],
        &["--page-order", "number", "--delta-cache", "0", "--compression", "none"],
        &["--duplicates", "off"],
    ];
    for words in settings {
        let moved = rig.migrate(vm, QemuKind::V7_2, &[words, &["--verify"]].concat())?;
        let report = &moved.report;
        let packed: Vec<u64> = (0..3)
            .map(|codec| report["codecs"][codec]["content"].as_u64().context("no such codec"))
            .collect::<Result<_>>()?;
        let deltas = report["pages"]["delta"].as_u64().context("no deltas")?;
        let references = report["pages"]["duplicate"].as_u64().context("no references")?;
        println!("{words:?}: {packed:?} bytes packed, {deltas} deltas, {references} references");
        ensure!((references > 0) != words.contains(&"off"), "{report}");
        // A cache too small for what is written may have nothing when it is asked.
        ensure!(words.contains(&"1M") || (deltas > 0) != words.contains(&"0"), "{report}");
        if let Some(at) = words.iter().position(|word| *word == "--lanes") {
            ensure!(report["lanes"]["kind"] == words[at + 1], "{report}");
        }
        ensure!(report["cpu_s_per_gb"].as_f64() > Some(0.0), "{report}");
        if let Some(at) = words.iter().position(|word| *word == "--compression") {
            let own = ["none", "lz4", "zstd"].iter().position(|codec| *codec == words[at + 1]);
            let own = own.context("no such codec")?;
            // What LZ4 does not make smaller travels plain.
            let others = (0..3).filter(|codec| *codec != own && (own != 1 || *codec != 0));
            ensure!(
                packed[own] > 0 && others.map(|codec| packed[codec]).sum::<u64>() == 0,
                "{report}"
            );
        }
        vm = moved.vm;
    }
    vm.verify_checker(PATIENCE)?;
    Ok(())
}

/// Guests whose RAM is made of several blocks, or of larger pages.
#[test]
fn all_kinds_of_shared_ram_move() -> Result<()> {
    let rig = Rig::new()?;
    let (backends, _huge) = with_larger_pages(vec![Backend::Numa2, Backend::Dimm]);
    for backend in backends {
        println!("{backend:?}");
        let kind = QemuKind::V10_0;
        let blocks = if matches!(backend, Backend::Hugetlb(_)) { 1 } else { 2 };
        let spec = busy(kind).smp(2).memory_mib(512).backend(backend);
        let vm = Vm::boot(&rig.env, spec)?;
        let mut moved = rig.migrate(vm, kind, &["--verify"])?;
        moved = rig.migrate(moved.vm, kind, &["--verify"])?;
        ensure!(moved.report["bytes"]["ram"] == 512u64 << 20, "{}", moved.report);
        let checked = rig.check(&moved.vm)?;
        ensure!(checked.contains(&format!("{blocks} block(s)")), "{checked}");
        moved.vm.verify_checker(PATIENCE)?;
    }
    Ok(())
}

/// QEMU up to 8.0 leaves every shared block out of its stream, memfd too.
#[test]
fn a_memfd_guest_moves_on_7_2() -> Result<()> {
    let rig = Rig::new()?;
    let vm = Vm::boot(&rig.env, busy(QemuKind::V7_2).backend(Backend::Memfd))?;
    let mut moved = rig.migrate(vm, QemuKind::V7_2, &["--verify"])?;
    moved.vm.verify_checker(PATIENCE)?;
    Ok(())
}

/// Memory that the guest never touched stays a hole at both ends.
#[test]
fn holes_stay_holes() -> Result<()> {
    let rig = Rig::new()?;
    let spec = VmSpec::new("idle", QemuKind::V7_2).memory_mib(1024);
    let vm = Vm::boot(&rig.env, spec)?;
    let used = populated_bytes(&vm)?;
    let moved = rig.migrate(vm, QemuKind::V7_2, &["--verify"])?;
    let there = populated_bytes(&moved.vm)?;
    println!("{} MiB populated at the source, {} MiB at the destination", used >> 20, there >> 20);
    ensure!(there <= used + (8 << 20), "{used} bytes became {there}");
    ensure!(there < 512 << 20, "an idle guest of 1 GiB uses {there} bytes");
    Ok(())
}

/// A guest that was paused stays paused, and one whose pages were freed to the host reads zeros.
#[test]
fn a_paused_guest_stays_paused() -> Result<()> {
    let rig = Rig::new()?;
    let mut source = Vm::boot(&rig.env, busy(QemuKind::V7_2))?;
    source.qmp().execute("stop", serde_json::json!({}))?;
    let mut destination = Vm::start(&rig.env, source.spec().successor("next", QemuKind::V7_2))?;
    let listen = free_address()?;
    let receive = rig.receive(&destination, &listen, &[])?;
    rig.send(&source, &listen, &["--verify"])?.wait(PATIENCE)?.success()?;
    receive.wait(PATIENCE)?.success()?;
    ensure!(destination.qmp().run_state()? == "paused", "it must not run");
    destination.qmp().execute("cont", serde_json::json!({}))?;
    ensure!(destination.heartbeat().beats_within(BEATS_WITHIN), "it must run on");
    destination.verify_checker(PATIENCE)?;
    Ok(())
}

/// Without ptrace: the preloaded library hands the descriptor over.
#[test]
fn a_guest_moves_by_the_preloaded_library() -> Result<()> {
    let rig = Rig::new()?;
    let socket = rig.folder.path().join("uffd.sock");
    let vm = Vm::boot(&rig.env, busy(QemuKind::V7_2).preload(&preload_library()?, &socket))?;
    let socket = socket.display().to_string();
    let words = ["--verify", "--preload-socket", &socket];
    let moved = rig.migrate(vm, QemuKind::V7_2, &words)?;
    ensure!(moved.report["attach_stopped_us"].is_null(), "{}", moved.report);
    Ok(())
}

/// A balloon takes pages away while the guest moves: they read as zeros at the destination.
#[test]
fn a_balloon_may_inflate_meanwhile() -> Result<()> {
    let rig = Rig::new()?;
    let spec = VmSpec::new("balloon", QemuKind::V7_2)
        .memory_mib(512)
        .balloon()
        .with("godwit.writer=fill=200,hot=20,rate=1000,bytes=64,seed=7");
    let mut source = Vm::boot(&rig.env, spec)?;
    let mut destination = Vm::start(&rig.env, source.spec().successor("next", QemuKind::V7_2))?;
    let listen = free_address()?;
    let receive = rig.receive(&destination, &listen, &[])?;
    // A downtime that cannot be had keeps the rounds going, so that pages vanish after they were sent.
    let words = ["--max-downtime-ms", "10", "--patience-s", "6", "--mode", "pre-copy"];
    let send = rig.send(&source, &listen, &words)?;
    std::thread::sleep(Duration::from_millis(2500));
    let full = populated_bytes(&source)?;
    source.qmp().execute("balloon", serde_json::json!({ "value": 270u64 << 20 }))?;
    let sent = send.wait(PATIENCE)?;
    ensure!(sent.code == Some(1), "{}", sent.stderr);
    let zero = sent.json()?["pages"]["zero"].as_u64();
    let left = populated_bytes(&source)?;
    println!(
        "{} MiB before the balloon, {} MiB after; {zero:?} pages given back",
        full >> 20,
        left >> 20
    );
    ensure!(zero > Some(0), "no page was given back: {}", sent.stderr);
    // And what then moves is right.
    let sent = rig.send(&source, &listen, &["--verify"])?.wait(PATIENCE)?;
    ensure!(sent.code == Some(0), "{}", sent.stderr);
    receive.wait(PATIENCE)?.success()?;
    ensure!(sent.json()?["verify"]["mismatches"] == 0, "{:?}", sent.json);
    e2e::check_alive(&mut source, &mut destination)?;
    Ok(())
}

/// The rate that the user allows is kept.
#[test]
fn the_bandwidth_limit_is_kept() -> Result<()> {
    let rig = Rig::new()?;
    let vm = Vm::boot(&rig.env, VmSpec::new("idle", QemuKind::V7_2))?;
    let moved = rig.migrate(vm, QemuKind::V7_2, &["--max-bandwidth", "200M"])?;
    let wire = moved.report["bytes"]["wire"].as_f64().context("wire")?;
    let seconds = moved.report["total_ms"].as_f64().context("total")? / 1e3;
    let rate = wire * 8.0 / seconds / 1e6;
    println!("{rate:.0} Mb/s under a limit of 200 Mb/s");
    ensure!(rate < 215.0, "{rate:.0} Mb/s");
    Ok(())
}

/// A guest that dirties more than the link carries is not stopped: the user is told why.
#[test]
fn a_guest_that_does_not_converge_stays() -> Result<()> {
    let rig = Rig::new()?;
    let spec = VmSpec::new("wild", QemuKind::V7_2)
        .with("godwit.writer=fill=100,hot=80,rate=0,bytes=4096,content=random,seed=7");
    let source = Vm::boot(&rig.env, spec)?;
    let destination = Vm::start(&rig.env, source.spec().successor("next", QemuKind::V7_2))?;
    let listen = free_address()?;
    let receive = rig.receive(&destination, &listen, &[])?;
    let limits = ["--max-bandwidth", "100M", "--patience-s", "4", "--max-downtime-ms", "100"];
    let words = [&limits[..], &["--mode", "pre-copy"]].concat();
    let sent = rig.send(&source, &listen, &words)?.wait(PATIENCE)?;
    drop(receive);
    ensure!(sent.code == Some(1), "{}", sent.stderr);
    for word in ["does not converge", "MB/s", "--max-downtime-ms"] {
        ensure!(sent.stderr.contains(word), "{}", sent.stderr);
    }
    ensure!(source.heartbeat().beats_within(BEATS_WITHIN), "it must run on");
    source.assert_clean()
}

/// Bytes of the VM's RAM files that are no holes.
fn populated_bytes(vm: &Vm) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let sizes = vm.ram_files().iter().map(|file| Ok(std::fs::metadata(file)?.blocks() * 512));
    sizes.sum()
}
