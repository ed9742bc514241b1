//! Guests of all kinds while part of their memory is elsewhere, and what may happen to them then.

use anyhow::{Context as _, Result, ensure};
use e2e::split::{OFFER, PAGES_PER_MIB, Split, WORKING_RESIDENT_MIB, at_work, number};
use e2e::{BEATS_WITHIN, PATIENCE, Rig, free_address, in_turn, with_larger_pages};
use framework::ram_disk::RamDisk;
use framework::split::SplitState;
use framework::worker::{self, Phase};
use framework::{Backend, QemuKind, Vm, VmSpec, wait};
use nix::sys::signal::Signal;
use serde_json::json;

/// What the guests of these tests are given, in MiB.
const MEMORY_MIB: u64 = 512;

/// What a balloon leaves of that: less than the guest has in use and its main host may hold together.
const BALLOON_LEAVES_MIB: u64 = 400;

/// A tmpfs that has room for what the main host may hold, and not for the whole guest.
const SMALL_MIB: u64 = WORKING_RESIDENT_MIB + 32;

/// Pages that a guest drops at least once it has freed what it worked on.
const RECLAIMED_PAGES: u64 = 8 * PAGES_PER_MIB;

/// Splits a guest that was booted from this.
fn split_of(rig: &Rig, spec: VmSpec, servers: &[framework::MemoryServer]) -> Result<Split> {
    let kind = spec.qemu;
    let source = Vm::boot(&rig.env, spec)?;
    let mut split = rig.split(source, kind, servers, WORKING_RESIDENT_MIB, &["--verify"])?;
    worker::set_phase(&mut split.vm, Phase::Hot)?;
    split.work()?;
    Ok(split)
}

#[test]
fn guests_with_all_kinds_of_shared_ram_are_split() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let servers = rig.memory_servers(&rig.server_identities(2)?, &OFFER)?;
        for (backend, kind) in [
            (Backend::Numa2, QemuKind::V10_0),
            (Backend::Dimm, QemuKind::V10_0),
            (Backend::Memfd, QemuKind::V7_2),
        ] {
            println!("{backend:?}");
            let spec = at_work(kind).smp(2).backend(backend);
            let mut split = split_of(&rig, spec, &servers)?;
            split.works_on()?;
            split.merge(&rig, &servers)?;
        }
        Ok(())
    })
}

#[test]
fn a_guest_with_larger_pages_is_not_split() -> Result<()> {
    in_turn(|| {
        let (mut backends, _pages) = with_larger_pages(vec![]);
        let Some(backend) = backends.pop() else { return Ok(()) };
        let rig = Rig::new()?;
        let servers = rig.memory_servers(&rig.server_identities(2)?, &OFFER)?;
        let kind = QemuKind::V10_0;
        let source = Vm::boot(&rig.env, at_work(kind).backend(backend))?;
        let main = Vm::start(&rig.env, source.spec().successor("main", kind))?;
        let listen = free_address()?;
        let _receive = rig.receive(&main, &listen, &[])?;
        let split = rig.start_split(&source, &listen, &servers, WORKING_RESIDENT_MIB, &[])?;
        let split = split.wait(PATIENCE)?;
        ensure!(split.code != Some(0) && split.stderr.contains("4096"), "{split:?}");
        ensure!(source.heartbeat().beats_within(BEATS_WITHIN), "It must run on");
        for server in &servers {
            server.wait_empty(PATIENCE)?;
        }
        Ok(())
    })
}

#[test]
fn a_paused_guest_is_split_within_a_bandwidth_and_merged_and_stays_paused() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let servers = rig.memory_servers(&rig.server_identities(2)?, &OFFER)?;
        let kind = QemuKind::V7_2;
        let mut source = Vm::boot(&rig.env, at_work(kind))?;
        source.qmp().execute("stop", json!({}))?;
        let mut main = Vm::start(&rig.env, source.spec().successor("main", kind))?;
        let listen = free_address()?;
        let receive = rig.receive(&main, &listen, &[])?;
        let limit = ["--max-bandwidth", "300M"];
        let split = rig.start_split(&source, &listen, &servers, WORKING_RESIDENT_MIB, &limit)?;
        let report = split.wait(PATIENCE)?.success()?.json()?.clone();
        let bits = number(&report, "/bytes/wire")? as f64 * 8.0;
        let ms = report["total_ms"].as_f64().context("total_ms")?;
        ensure!(bits / ms / 1e3 < 320.0, "More than 300 Mbit/s: {report}");
        ensure!(main.qmp().run_state()? == "paused", "It must not run");
        ensure!(rig.pager(&main).status()?.state == SplitState::Split, "It is not split");
        rig.pager(&main).merge(PATIENCE)?;
        receive.wait(PATIENCE)?.success()?;
        ensure!(main.qmp().run_state()? == "paused", "It must not run");
        for server in &servers {
            server.wait_empty(PATIENCE)?;
        }
        main.qmp().execute("cont", json!({}))?;
        worker::check(&mut main, PATIENCE)?;
        main.verify_checker(PATIENCE).map(drop)
    })
}

/// QEMU makes holes in the guest's memory that the pager did not make, and the guest takes it again.
#[test]
fn a_balloon_takes_memory_of_a_split_guest_and_gives_it_back() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let servers = rig.memory_servers(&rig.server_identities(2)?, &OFFER)?;
        let mut split = split_of(&rig, at_work(QemuKind::V10_0).balloon(), &servers)?;
        for mib in [BALLOON_LEAVES_MIB, MEMORY_MIB, BALLOON_LEAVES_MIB, MEMORY_MIB] {
            let bytes = mib << 20;
            split.vm.qmp().execute("balloon", json!({ "value": bytes }))?;
            let mut last = None;
            let came = wait::until("the balloon", PATIENCE, || {
                let actual = split.vm.qmp().execute("query-balloon", json!({}))?["actual"].as_u64();
                last = actual;
                Ok((actual == Some(bytes)).then_some(()))
            });
            came.with_context(|| format!("{last:?} instead of {bytes} bytes"))?;
            split.work()?;
        }
        worker::set_phase(&mut split.vm, Phase::Fresh)?;
        split.works_on()?;
        split.merge(&rig, &servers).map(drop)
    })
}

/// The guest frees memory, and it is dropped: pages beyond these were. Says how many there are then.
fn freed_is_dropped(rig: &Rig, split: &mut Split, before: u64) -> Result<u64> {
    split.vm.ask("freed again")?;
    let least = before + RECLAIMED_PAGES;
    let dropped = rig
        .pager(&split.vm)
        .wait_status("memory that was freed", PATIENCE, |status| status.reclaimed_pages >= least);
    let dropped = dropped.with_context(|| split.receive.stderr())?;
    Ok(dropped.reclaimed_pages)
}

/// What the kernel before had freed, the next one uses: at the same addresses.
#[test]
fn a_split_guest_is_reset() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let servers = rig.memory_servers(&rig.server_identities(2)?, &OFFER)?;
        let spec = at_work(QemuKind::V10_0).with("nokaslr").with("godwit.freed=mib=40,seed=3");
        let mut split = split_of(&rig, spec, &servers)?;
        let reclaimed = freed_is_dropped(&rig, &mut split, 0)?;
        split.vm.qmp().execute("set-action", json!({ "reboot": "reset" }))?;
        split.vm.qmp().execute("system_reset", json!({}))?;
        split.vm.wait_ready(PATIENCE)?;
        worker::set_phase(&mut split.vm, Phase::Hot)?;
        split.work()?;
        // The next kernel is asked as the one before was.
        freed_is_dropped(&rig, &mut split, reclaimed)?;
        split.works_on()?;
        split.merge(&rig, &servers).map(drop)
    })
}

#[test]
fn a_guest_that_its_main_host_has_no_room_for_stays_split() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let servers = rig.memory_servers(&rig.server_identities(2)?, &OFFER)?;
        let kind = QemuKind::V10_0;
        let disk = RamDisk::mount(SMALL_MIB)?;
        let mut source = Vm::boot(&rig.env, at_work(kind))?;
        let spec = source.spec().successor("main", kind);
        let spec = spec.backend(Backend::TmpfsAt(disk.path().to_owned()));
        let mut main = Vm::start(&rig.env, spec)?;
        let listen = free_address()?;
        let receive = rig.receive(&main, &listen, &[])?;
        let split = rig.start_split(&source, &listen, &servers, WORKING_RESIDENT_MIB, &[])?;
        split.wait(PATIENCE)?.success()?;
        e2e::check_alive(&mut source, &mut main)?;
        worker::set_phase(&mut main, Phase::Hot)?;
        let refused = format!("{:#}", rig.pager(&main).merge(PATIENCE).err().context("Merged")?);
        ensure!(refused.contains("remount,size="), "{refused}");
        ensure!(rig.pager(&main).status()?.state == SplitState::Split, "{refused}");
        worker::wait_pages(&mut main, MEMORY_MIB, PATIENCE)?;
        disk.resize(MEMORY_MIB + 32)?;
        rig.pager(&main).merge(PATIENCE)?;
        receive.wait(PATIENCE)?.success()?;
        worker::check(&mut main, PATIENCE)?;
        main.verify_checker(PATIENCE).map(drop)
    })
}

/// Whoever asks for a merge may leave, and so may a server where each page has two copies.
#[test]
fn a_merge_goes_on_without_its_asker_and_a_server() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let mut servers = rig.memory_servers(&rig.server_identities(2)?, &OFFER)?;
        let split = rig.split_at_work(&servers, &["--copies", "2"])?;
        // Nothing comes from servers that say nothing.
        for server in &mut servers {
            server.engine().signal(Signal::SIGSTOP)?;
        }
        let mut merge = rig.start_merge(&split.vm)?;
        merge.wait_stderr("merging:", PATIENCE)?;
        merge.signal(Signal::SIGINT)?;
        let left = merge.wait(PATIENCE)?;
        ensure!(left.code != Some(0), "{left:?}");
        let dead = servers.pop().context("There are two")?;
        dead.kill()?;
        for server in &mut servers {
            server.engine().signal(Signal::SIGCONT)?;
        }
        let mut vm = split.whole(&rig, &servers)?;
        worker::set_phase(&mut vm, Phase::Idle)?;
        worker::check(&mut vm, PATIENCE)?;
        vm.verify_checker(PATIENCE).map(drop)
    })
}
