//! The framework against real guests, on every QEMU that is supported.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use framework::disk;
use framework::guest::number;
use framework::hugepages::HugePages;
use framework::wait::{monotonic_us, until};
use framework::worker::{self, Phase};
use framework::{Backend, Env, Pulse, QemuKind, Vm, VmSpec};
use serde_json::json;

/// Guests share two cores: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

fn second(count: u64) -> Duration {
    Duration::from_secs(count)
}

/// Measures the beat for some seconds and returns (p50, p99, longest gap) in microseconds.
fn cadence(vm: &Vm, time: Duration) -> Result<(u64, u64, u64)> {
    let start_us = monotonic_us();
    std::thread::sleep(time);
    let mut record = vm.heartbeat().record();
    record.beats.retain(|beat| beat.at_us >= start_us);
    let pulse = Pulse::of(&[&record])?;
    pulse.assert_one_runs()?;
    ensure!(pulse.missing() == 0, "{} beats are missing", pulse.missing());
    let longest = pulse.longest().context("No gaps")?.gap_us();
    Ok((pulse.gap_percentile_us(50.0), pulse.gap_percentile_us(99.0), longest))
}

#[test]
fn boots_beats_checks_and_obeys() -> Result<()> {
    let _alone = alone();
    let env = Env::load()?;
    for kind in QemuKind::ALL {
        let start = Instant::now();
        let spec = VmSpec::new("basic", kind)
            .with("godwit.writer=fill=64,hot=16,rate=5000,bytes=64,content=mixed")
            .with("godwit.checker=size=16,rate=500,verify=8000");
        let mut vm = Vm::boot(&env, spec)?;
        println!("QEMU {}: boot {:.1} s", kind.version(), start.elapsed().as_secs_f64());

        let busy = cadence(&vm, second(4))?;
        let before = number(&vm.ask("writer stop")?, "pages")?;
        vm.ask("checker stop")?;
        let idle = cadence(&vm, second(4))?;
        println!("  gaps us (p50, p99, max): writer and checker {busy:?}, idle {idle:?}");
        ensure!((4000..7000).contains(&idle.0), "An idle guest beats every {} us", idle.0);
        let report = vm.ask("writer report")?;
        ensure!(number(&report, "pages")? == before, "The writer went on after stop: {report}");

        println!("  {}", vm.verify_checker(second(60))?);
        ensure!(vm.ask("sh uname -r")?.starts_with("6.1."), "Another kernel");
        ensure!(vm.ask("sh exit 3").is_err(), "A failing script was not noticed");
        ensure!(vm.ask("nonsense").is_err(), "An unknown command was accepted");
        ensure!(vm.qmp().run_state()? == "running", "QEMU says it does not run");
        ensure!(!vm.ram_files().is_empty() && vm.ram_files()[0].exists(), "No RAM file");

        vm.ask("checker corrupt 100")?;
        let error = vm.verify_checker(second(60)).unwrap_err().to_string();
        ensure!(error.contains("page=100 offset=4095"), "A wrong byte was not reported: {error}");
        ensure!(vm.assert_clean().is_err(), "The console is clean");
        ensure!(!vm.heartbeat().record().failures().is_empty(), "ttyS1 does not repeat it");

        // The answer is lost with the guest.
        drop(vm.guest().ask("poweroff", second(5)));
        ensure!(vm.wait_exit(second(20))?.success(), "QEMU failed");
    }
    Ok(())
}

#[test]
fn the_worker_goes_through_its_phases_and_finds_a_wrong_byte() -> Result<()> {
    let _alone = alone();
    let env = Env::load()?;
    let spec = VmSpec::new("worker", QemuKind::V7_2).with(
        "godwit.worker=fill_mib=24,content=mixed,hot_mib=16,fresh_mib=32,phase=idle,report_ms=500",
    );
    let mut vm = Vm::boot(&env, spec)?;
    let idle = worker::report(&mut vm)?;
    std::thread::sleep(second(1));
    ensure!(worker::report(&mut vm)?.pages == idle.pages, "An idle worker works");
    for (phase, mib) in [
        (Phase::Hot, 16),
        (Phase::Fresh, 2 * 32),
        (Phase::Used, 24),
        (Phase::Both, 3 * (2 * 32 + 24)),
    ] {
        let first = worker::set_phase(&mut vm, phase)?;
        let last = worker::wait_pages(&mut vm, mib * 256, second(60))?;
        println!("{phase:?}: {:?} MiB/s", last.mib_per_s(&first));
        let told = format!("WORKER OK phase={} ", phase.label());
        vm.console().wait_for(&told, second(10))?;
    }
    worker::set_phase(&mut vm, Phase::Idle)?;
    worker::check(&mut vm, second(60))?;
    ensure!(vm.ask("worker phase sleepy").is_err(), "An unknown phase was accepted");
    vm.ask("worker corrupt 100")?;
    let error = worker::check(&mut vm, second(60)).unwrap_err().to_string();
    ensure!(error.contains("WORKER FAIL count=1"), "A wrong byte was not reported: {error}");
    let console = vm.assert_clean().unwrap_err().to_string();
    ensure!(console.contains("area=used page=100 offset="), "It is not named: {console}");
    Ok(())
}

#[test]
fn paces_the_writer() -> Result<()> {
    let _alone = alone();
    let env = Env::load()?;
    let spec = VmSpec::new("paced", QemuKind::V7_2)
        .with("godwit.writer=fill=32,hot=8,rate=2000")
        .with("godwit.writer.b=fill=8,hot=8,rate=0,bytes=4096,content=random");
    let mut vm = Vm::boot(&env, spec)?;
    std::thread::sleep(second(5));
    let rate = |report: &str| -> Result<f64> {
        Ok(number(report, "pages")? as f64 / (number(report, "elapsed_us")? as f64 / 1e6))
    };
    let unpaced = rate(&vm.ask("writer.b report")?)?;
    vm.ask("writer.b stop")?;
    let paced = rate(&vm.ask("writer report")?)?;
    println!("pages a second: paced {paced:.0}, unpaced {unpaced:.0}");
    ensure!(paced < 2010.0 && unpaced > 4000.0, "paced {paced:.0}, unpaced {unpaced:.0}");
    vm.assert_clean()
}

#[test]
fn reads_its_disk_directly_and_finds_wrong_blocks() -> Result<()> {
    let _alone = alone();
    let env = Env::load()?;
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("disk.raw");
    disk::create(&image, 128, 5)?;
    for (kind, aio) in
        [(QemuKind::V7_2, "native"), (QemuKind::V7_2, "io_uring"), (QemuKind::V10_0, "io_uring")]
    {
        let spec = VmSpec::new("disk", kind)
            .disk(&image, "none", aio)
            .with("godwit.diskread=seed=5,threads=2,request=2048,buffers=3");
        let mut vm = Vm::boot(&env, spec)?;
        let report = until("64 requests", second(60), || {
            let report = vm.ask("diskread report")?;
            Ok((number(&report, "requests")? >= 64).then_some(report))
        })?;
        println!("QEMU {} {aio}: {report}", kind.version());
        ensure!(report.contains("DISKREAD OK"), "{report}");
        vm.assert_clean()?;
        let nodes = vm.qmp().execute("query-named-block-nodes", json!({}))?.to_string();
        ensure!(nodes.contains("\"direct\":true"), "The disk is not opened for direct I/O");
    }
    // An image with another seed is wrong everywhere.
    let spec = VmSpec::new("wrong", QemuKind::V7_2)
        .disk(&image, "none", "native")
        .with("godwit.diskread=seed=6,threads=1,request=64,rate=50");
    let mut vm = Vm::start(&env, spec)?;
    vm.console().wait_for("DISKREAD FAIL block=", second(120))?;
    drop(vm.kill());
    ensure!(vm.assert_clean().is_err(), "Wrong blocks are not a failure");
    Ok(())
}

#[test]
fn boots_with_every_backend() -> Result<()> {
    let _alone = alone();
    let env = Env::load()?;
    let huge = HugePages::reserve(256)?;
    let backends = [
        (Backend::Memfd, 256, 0),
        (Backend::Private, 256, 0),
        (Backend::Numa2, 512, 2),
        (Backend::Dimm, 512, 2),
        (Backend::Hugetlb(huge.path().to_owned()), 256, 1),
    ];
    for (at, (backend, mib, files)) in backends.into_iter().enumerate() {
        let kind = QemuKind::ALL[at % 2];
        let name = format!("{backend:?}");
        let spec = VmSpec::new("backend", kind).memory_mib(mib).smp(2).backend(backend);
        let spec = spec.balloon().with("godwit.checker=size=8");
        let mut vm = Vm::boot(&env, spec)?;
        let memory = vm.ask("sh grep MemTotal /proc/meminfo; ls /sys/devices/system/node")?;
        println!("{name} on {}: {}", kind.version(), memory.replace('\n', " "));
        let words: Vec<&str> = memory.split_ascii_whitespace().collect();
        let total_kib: u64 = words.get(1).context("No MemTotal")?.parse()?;
        ensure!(total_kib > (mib - 128) * 1024, "{name}: the guest sees {total_kib} KiB only");
        ensure!(memory.contains("node1") == (name == "Numa2"), "{name}: {memory}");
        ensure!(vm.ram_files().len() == files, "{name}: {:?}", vm.ram_files());
        ensure!(vm.ram_files().iter().all(|path| path.exists()), "{name}: no RAM file");
        vm.verify_checker(second(60))?;
        let paths = vm.ram_files().to_vec();
        drop(vm);
        ensure!(paths.iter().all(|path| !path.exists()), "{name}: RAM files are left");
    }
    Ok(())
}

/// Moves a guest with QEMU's own migration.
fn migrate(source: &mut Vm, destination: &mut Vm) -> Result<()> {
    let uri = format!("unix:{}", destination.folder().join("migration.sock").display());
    destination.qmp().execute("migrate-incoming", json!({ "uri": uri }))?;
    let limits = json!({ "max-bandwidth": 10_u64 << 30, "downtime-limit": 300 });
    source.qmp().execute("migrate-set-parameters", limits)?;
    source.qmp().execute("migrate", json!({ "uri": uri }))?;
    source.qmp().wait_migration(&["completed"], second(120))?;
    until("the guest at the destination", second(20), || {
        Ok((destination.qmp().run_state()? == "running").then_some(()))
    })
}

#[test]
fn follows_a_guest_from_one_qemu_to_the_other() -> Result<()> {
    let _alone = alone();
    let env = Env::load()?;
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("disk.raw");
    disk::create(&image, 64, 5)?;
    for (from, to) in [(QemuKind::V7_2, QemuKind::V10_0), (QemuKind::V10_0, QemuKind::V7_2)] {
        let spec = VmSpec::new("source", from)
            .disk(&image, "none", "native")
            .with("godwit.checker=size=16,rate=500,verify=8000")
            .with("godwit.diskread=seed=5,threads=1,request=512,rate=20");
        let mut destination = Vm::start(&env, spec.successor("destination", to))?;
        let mut source = Vm::boot(&env, spec)?;
        migrate(&mut source, &mut destination)?;
        ensure!(destination.heartbeat().beats_within(second(10)), "No beat at the destination");
        println!("{}", destination.verify_checker(second(60))?);
        ensure!(destination.ask("diskread report")?.contains("DISKREAD OK"), "Wrong blocks");
        source.assert_clean()?;

        let records = [source.heartbeat().record(), destination.heartbeat().record()];
        let pulse = Pulse::of(&[&records[0], &records[1]])?;
        pulse.assert_one_runs()?;
        let gap = pulse.handover(0, 1).context("No hand-over")?;
        println!(
            "{} -> {}: outage {:.1} ms, {} beats missing",
            from.version(),
            to.version(),
            gap.outage_ms(),
            gap.missing()
        );
        ensure!(gap.missing() <= 1, "{} beats are missing", gap.missing());
        ensure!(gap.outage_ms() > 0.0 && gap.outage_ms() < 10_000.0, "{}", gap.outage_ms());
    }
    Ok(())
}

#[test]
fn finds_two_running_copies() -> Result<()> {
    let _alone = alone();
    let env = Env::load()?;
    // Without a disk, whose lock would keep the second copy from running.
    let spec = VmSpec::new("source", QemuKind::V7_2);
    let mut destination = Vm::start(&env, spec.successor("destination", QemuKind::V7_2))?;
    let mut source = Vm::boot(&env, spec)?;
    migrate(&mut source, &mut destination)?;
    ensure!(destination.heartbeat().beats_within(second(10)), "No beat at the destination");
    source.qmp().execute("cont", json!({}))?;
    ensure!(source.heartbeat().beats_within(second(10)), "The source does not run on");
    let records = [source.heartbeat().record(), destination.heartbeat().record()];
    let result = Pulse::of(&[&records[0], &records[1]])?.assert_one_runs();
    let error = result.err().context("Two running copies were not found")?;
    println!("found: {error:#}");
    Ok(())
}

/// Whether no beat comes for half a second; one may have been on its way when the guest was halted.
fn falls_silent(vm: &Vm) -> bool {
    (0..2).any(|_| !vm.heartbeat().beats_within(Duration::from_millis(500)))
}

#[test]
fn freezes_thaws_and_kills() -> Result<()> {
    let _alone = alone();
    let env = Env::load()?;
    let mut vm = Vm::boot(&env, VmSpec::new("frozen", QemuKind::V7_2))?;
    let start_us = monotonic_us();
    vm.freeze()?;
    ensure!(falls_silent(&vm), "It beats while frozen");
    vm.thaw()?;
    ensure!(vm.heartbeat().beats_within(second(10)), "It does not beat after the thaw");
    let record = vm.heartbeat().record();
    let gap = Pulse::of(&[&record])?.outage(start_us, monotonic_us()).context("No gap")?;
    ensure!((450.0..2000.0).contains(&gap.outage_ms()), "The outage is {:.0}", gap.outage_ms());
    let pid = vm.pid();
    let cmdline = std::fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
    ensure!(cmdline.contains("qemu-system"), "The process id is not QEMU's: {cmdline}");
    ensure!(vm.cpu_seconds()? > 0.1, "QEMU used no CPU");
    vm.kill()?;
    ensure!(vm.exited()?.is_some() && falls_silent(&vm), "Not dead");
    vm.assert_clean()
}

#[test]
fn says_why_a_guest_does_not_start() -> Result<()> {
    let _alone = alone();
    let env = Env::load()?;
    let spec = VmSpec::new("bad", QemuKind::V7_2).extra(&["-device", "no-such-device"]);
    let error = format!("{:#}", Vm::start(&env, spec).unwrap_err());
    ensure!(error.contains("no-such-device"), "{error}");
    let spec = VmSpec::new("typo", QemuKind::V7_2).with("godwit.writer=fil=1");
    let error = format!("{:#}", Vm::boot(&env, spec).unwrap_err());
    ensure!(error.contains("Unknown option fil"), "{error}");
    Ok(())
}
