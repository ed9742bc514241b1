//! Direct I/O (correctness rule 6): guests whose disks fill memory past the page tables.
//!
//! The guest reads its disk all the time with O_DIRECT into reused buffers, several MiB a request,
//! so that reads are always in flight, and checks what it read. With `cache=none` QEMU
//! pins the guest's pages: what arrives after a page was armed again is not reported by the kernel.
//! What makes that likely is in [`e2e::reading`].

use anyhow::{Context as _, Result, ensure};
use e2e::reading::{reading, slow_disk};
use e2e::{BEATS_WITHIN, PATIENCE, Rig, free_address};
use framework::{QemuKind, Vm};

const MOVES: usize = 20;

/// Moves a reading guest back and forth, every page compared each time.
fn reads_on(cache: &str, aio: &str) -> Result<()> {
    let rig = Rig::new()?;
    let (image, slow) = slow_disk(&rig)?;
    let kinds = [QemuKind::V7_2, QemuKind::V10_0];
    for kind in kinds {
        let mut vm = Vm::boot(&rig.env, reading(&image, kind, cache, aio))?;
        slow.add(vm.pid())?;
        let mut looked = 0;
        for _ in 0..MOVES / kinds.len() {
            let moved = rig.migrate(vm, kind, &["--verify", "--max-downtime-ms", "3000"])?;
            vm = moved.vm;
            slow.add(vm.pid())?;
            let rounds = moved.report["rounds"].as_array().context("rounds")?;
            looked += rounds.iter().filter_map(|round| round["looked"].as_u64()).sum::<u64>();
        }
        let report = vm.ask("diskread report")?;
        println!("{kind:?} cache={cache},aio={aio}: {looked} pages looked at again; {report}");
        ensure!((looked > 0) == (cache == "none"), "{looked} pages looked at again");
        vm.assert_clean()?;
    }
    Ok(())
}

#[test]
fn twenty_moves_with_native_direct_io() -> Result<()> {
    reads_on("none", "native")
}

#[test]
fn twenty_moves_with_io_uring_direct_io() -> Result<()> {
    reads_on("none", "io_uring")
}

#[test]
fn twenty_moves_with_buffered_io() -> Result<()> {
    reads_on("writeback", "threads")
}

/// Reads that are in flight when the guest is handed over, and reads into pages that are still missing.
#[test]
fn disks_read_into_memory_that_follows() -> Result<()> {
    let rig = Rig::new()?;
    let (image, slow) = slow_disk(&rig)?;
    let kind = QemuKind::V10_0;
    let mut vm = Vm::boot(&rig.env, reading(&image, kind, "none", "native"))?;
    slow.add(vm.pid())?;
    for mode in ["hybrid", "post-copy", "hybrid", "post-copy", "hybrid", "post-copy"] {
        let moved = rig.migrate(vm, kind, &["--verify", "--mode", mode])?;
        vm = moved.vm;
        slow.add(vm.pid())?;
    }
    println!("{}", vm.ask("diskread report")?);
    vm.assert_clean()
}

/// The hazard is real: with the second look switched off, pages differ. If this fails, the tests
/// above prove nothing.
#[test]
fn without_the_second_look_pages_differ() -> Result<()> {
    let rig = Rig::with_failpoints()?;
    rig.arm("no-second-look")?;
    let (image, slow) = slow_disk(&rig)?;
    let mut source = Vm::boot(&rig.env, reading(&image, QemuKind::V7_2, "none", "native"))?;
    slow.add(source.pid())?;
    for attempt in 1..=MOVES {
        let destination = Vm::start(&rig.env, source.spec().successor("victim", QemuKind::V7_2))?;
        let listen = free_address()?;
        let receive = rig.receive(&destination, &listen, &[])?;
        let words = ["--verify", "--max-downtime-ms", "3000"];
        let sent = rig.send(&source, &listen, &words)?.wait(PATIENCE)?;
        drop(receive);
        let report = sent.json()?;
        if let Some(mismatches) = report["verify"]["mismatches"].as_u64().filter(|n| *n > 0) {
            println!("attempt {attempt}: {mismatches} pages differ without the second look");
            ensure!(sent.code == Some(1), "a difference must not be handed over: {report}");
            ensure!(
                source.heartbeat().beats_within(BEATS_WITHIN),
                "the guest must run on at the source"
            );
            return Ok(());
        }
        // Nothing was in flight at a scan this time: on from the new place.
        ensure!(sent.code == Some(0), "{}", sent.stderr);
        source = destination;
        slow.add(source.pid())?;
    }
    anyhow::bail!("no page differed in {MOVES} attempts")
}
