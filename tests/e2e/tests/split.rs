//! Guests that run on a main host while part of their memory lies on memory servers.
//!
//! The guest writes, checks and works on more memory than its main host may hold, so that pages go and
//! come all the time; a thread looks every 20 ms whether the host holds to the limit.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::reading::{reading, slow_disk, wait_blocks};
use e2e::split::{EMPTY_WITHIN, Merged, OFFER, Offer, PAGES_PER_MIB, Split, number};
use e2e::untouched::Before;
use e2e::{PATIENCE, Rig, free_address, in_turn};
use framework::split::SplitState;
use framework::worker::{self, Phase};
use framework::{Engine, EngineOutput, MemoryServer, QemuKind, RamWatch, Vm, VmSpec};
use nix::sys::signal::Signal;

const MIB: u64 = 1 << 20;

/// What the main host may hold.
const RESIDENT_MIB: u64 = 128;

/// The worker's hot area: it does not fit there.
const HOT_MIB: u64 = 160;

/// Longest time for work under emulation, most of whose memory is elsewhere.
const WORK_WITHIN: Duration = Duration::from_secs(300);

/// Slow enough for a split to be under way for ten seconds at least.
const SLOWLY: [&str; 2] = ["--max-bandwidth", "150M"];

/// A guest of 512 MiB that uses some 300 of them.
fn working(kind: QemuKind) -> VmSpec {
    VmSpec::new("working", kind)
        .memory_mib(512)
        .with("godwit.writer=fill=60,hot=30,rate=2000,bytes=64,seed=7")
        .with("godwit.checker=size=24,seed=5")
        .with(&format!("godwit.worker=hot_mib={HOT_MIB},fresh_mib=48,order=random,seed=9"))
}

/// The guest goes through all its memory and through fresh memory, and all of it is right.
fn works(rig: &Rig, split: &mut Split) -> Result<()> {
    let before = rig.pager(&split.vm).status()?;
    worker::set_phase(&mut split.vm, Phase::Hot)?;
    worker::wait_pages(&mut split.vm, HOT_MIB * PAGES_PER_MIB, WORK_WITHIN)?;
    worker::set_phase(&mut split.vm, Phase::Fresh)?;
    worker::wait_pages(&mut split.vm, 3 * 48 * PAGES_PER_MIB, WORK_WITHIN)?;
    worker::set_phase(&mut split.vm, Phase::Idle)?;
    worker::check(&mut split.vm, WORK_WITHIN)?;
    split.vm.verify_checker(WORK_WITHIN)?;
    let after = rig.pager(&split.vm).status()?;
    ensure!(after.state == SplitState::Split, "{after:?}");
    ensure!(after.faults.fetched > before.faults.fetched, "{before:?}, then {after:?}");
    ensure!(after.evicted.pages > before.evicted.pages, "{before:?}, then {after:?}");
    ensure!(after.faults.count >= after.faults.fetched + after.faults.zero, "{after:?}");
    ensure!(after.faults.p50_us > 0 && after.faults.p50_us <= after.faults.p99_us, "{after:?}");
    Ok(())
}

/// Merges it and says what it was like.
fn merge(split: Split, rig: &Rig, servers: &[MemoryServer]) -> Result<Vm> {
    let (outage_ms, parts) = (split.outage_ms, split.report["split"].clone());
    let Merged { vm, ram, status, took } = split.merge(rig, servers)?;
    println!("outage {outage_ms:.0} ms, {parts}; then {status:?}; {ram:?}; merged in {took:.1?}");
    Ok(vm)
}

/// Pages that all servers hold.
fn stored(servers: &[MemoryServer]) -> Result<u64> {
    servers.iter().map(MemoryServer::stored_pages).sum()
}

#[test]
fn a_guest_over_two_servers_works_and_is_merged() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let servers = rig.memory_servers(&rig.server_identities(2)?, &OFFER)?;
        ensure!(stored(&servers)? == 0, "Servers that just began hold pages");
        let kind = QemuKind::V10_0;
        let source = Vm::boot(&rig.env, working(kind))?;
        let mut split = rig.split(source, kind, &servers, RESIDENT_MIB, &[])?;
        for server in &servers {
            ensure!(server.stored_pages()? > 0, "{}: {}", server.address(), server.metrics()?);
        }
        works(&rig, &mut split)?;
        let mut vm = merge(split, &rig, &servers)?;
        worker::check(&mut vm, PATIENCE)
    })
}

/// As many as GODWIT_CYCLES says: every time into a fresh QEMU, by turns of both kinds where they can follow each other.
#[test]
fn guests_are_split_and_merged_again_and_again() -> Result<()> {
    let cycles = match std::env::var("GODWIT_CYCLES") {
        Ok(text) => text.parse().with_context(|| format!("GODWIT_CYCLES is {text:?}"))?,
        Err(_) => 2,
    };
    in_turn(|| {
        let rig = Rig::new()?;
        let servers = rig.memory_servers(&rig.server_identities(2)?, &OFFER)?;
        let mut vm = Vm::boot(&rig.env, working(QemuKind::V7_2))?;
        for cycle in 1..=cycles {
            // A guest that has been with the newer one does not go back.
            let kind = if cycle * 2 > cycles { QemuKind::V10_0 } else { QemuKind::V7_2 };
            println!("cycle {cycle} of {cycles}, {kind:?}");
            let mut split = rig.split(vm, kind, &servers, RESIDENT_MIB, &["--verify"])?;
            works(&rig, &mut split)?;
            vm = merge(split, &rig, &servers)?;
        }
        worker::check(&mut vm, PATIENCE)
    })
}

/// A guest that is about to be split, and what must not change about it.
struct Watched {
    rig: Rig,
    vm: Vm,
    before: Before,
}

impl Watched {
    fn boot() -> Result<Self> {
        let rig = Rig::new()?;
        let mut vm = Vm::boot(&rig.env, working(QemuKind::V10_0))?;
        let before = Before::of(&mut vm)?;
        Ok(Self { rig, vm, before })
    }

    /// A waiting QEMU with its receiver, and the split into it.
    fn begin(&mut self, servers: &[MemoryServer], extra: &[&str]) -> Result<Attempt> {
        self.vm.qmp().clear_events();
        let spec = self.vm.spec().successor("main", QemuKind::V10_0);
        let destination = Vm::start(&self.rig.env, spec)?;
        let watch = RamWatch::begin(&destination);
        let listen = free_address()?;
        let receive = self.rig.receive(&destination, &listen, &[])?;
        let split = self.rig.start_split(&self.vm, &listen, servers, RESIDENT_MIB, extra)?;
        Ok(Attempt { split, watch, _receive: receive, _destination: destination })
    }

    /// The split failed, its message has these words, and the guest is as it was.
    fn failed(&mut self, attempt: Attempt, words: &[&str]) -> Result<()> {
        let ended = attempt.split.wait(PATIENCE)?;
        self.check(&ended, words).with_context(|| format!("{ended:?}"))?;
        attempt.watch.end()?.assert_at_most(RESIDENT_MIB * MIB)
    }

    fn check(&mut self, ended: &EngineOutput, words: &[&str]) -> Result<()> {
        ensure!(ended.code == Some(1), "Exit code {:?}", ended.code);
        let report = ended.json()?;
        ensure!(report["outcome"] == "failed", "Outcome {}", report["outcome"]);
        let message = report["error"]["message"].as_str().unwrap_or_default();
        for word in words {
            ensure!(message.contains(word), "{word:?} is not in {message:?}");
        }
        let journals = self.rig.journal("source");
        self.before.assert_untouched(&mut self.vm, Path::new(&journals))?;
        worker::wait_pages(&mut self.vm, PAGES_PER_MIB, PATIENCE)?;
        self.vm.verify_checker(PATIENCE).map(drop)
    }

    /// The guest was not even stopped for a moment.
    fn never_stopped(&mut self) -> Result<()> {
        let stop = self.vm.qmp().event("STOP", Duration::from_millis(20));
        ensure!(stop.is_err(), "The guest was stopped");
        Ok(())
    }
}

/// A split that is under way.
struct Attempt {
    split: Engine,
    watch: RamWatch,
    _receive: Engine,
    _destination: Vm,
}

#[test]
fn servers_without_room_are_refused_before_anything_moves() -> Result<()> {
    in_turn(|| {
        let mut watched = Watched::boot()?;
        let identities = watched.rig.server_identities(2)?;
        let small = Offer { capacity_mib: 32, extra: &[] };
        let servers = watched.rig.memory_servers(&identities, &small)?;
        let attempt = watched.begin(&servers, &[])?;
        watched.failed(attempt, &["--capacity"])?;
        watched.never_stopped()?;
        for server in &servers {
            server.wait_empty(EMPTY_WITHIN)?;
        }
        Ok(())
    })
}

#[test]
fn servers_that_die_in_a_split_leave_the_guest_where_it_is() -> Result<()> {
    in_turn(|| {
        let mut watched = Watched::boot()?;
        let identities = watched.rig.server_identities(2)?;
        let offer = Offer { extra: &["--lease-s", "5"], ..OFFER };
        for victims in [1, 2] {
            let mut servers = watched.rig.memory_servers(&identities, &offer)?;
            let attempt = watched.begin(&servers, &SLOWLY)?;
            for server in &servers {
                server.wait_stored(PAGES_PER_MIB, PATIENCE)?;
            }
            let addresses: Vec<String> =
                servers.iter().map(|server| server.address().to_owned()).collect();
            for victim in servers.drain(..victims) {
                victim.kill()?;
            }
            // Of two that die at once one may be noticed first.
            let named = if victims == 1 { addresses[0].as_str() } else { "127.0.0.1" };
            watched.failed(attempt, &[named])?;
            watched.never_stopped()?;
            for survivor in &servers {
                survivor.wait_empty(EMPTY_WITHIN)?;
            }
        }
        // It can still be split.
        let servers = watched.rig.memory_servers(&identities, &OFFER)?;
        let Watched { rig, vm, .. } = watched;
        let split = rig.split(vm, QemuKind::V10_0, &servers, RESIDENT_MIB, &[])?;
        merge(split, &rig, &servers).map(drop)
    })
}

#[test]
fn ctrl_c_in_a_split_leaves_the_guest_where_it_is() -> Result<()> {
    in_turn(|| {
        let mut watched = Watched::boot()?;
        let identities = watched.rig.server_identities(2)?;
        let servers = watched.rig.memory_servers(&identities, &OFFER)?;
        let mut attempt = watched.begin(&servers, &SLOWLY)?;
        for server in &servers {
            server.wait_stored(PAGES_PER_MIB, PATIENCE)?;
        }
        attempt.split.signal(Signal::SIGINT)?;
        watched.failed(attempt, &[])?;
        watched.never_stopped()?;
        // Told by the source: their lease is longer.
        for server in &servers {
            server.wait_empty(EMPTY_WITHIN)?;
        }
        Ok(())
    })
}

/// A guest of 2 GiB that freed 1200 MiB of noise, and holds 200 MiB that it looks at again only when it is told to.
fn freed() -> VmSpec {
    VmSpec::new("freed", QemuKind::V7_2)
        .memory_mib(2048)
        .with("godwit.checker=size=24,seed=5")
        .with("godwit.worker=fill_mib=200,seed=9")
        .with("godwit.freed=mib=1200,seed=3")
}

#[test]
fn freed_memory_goes_nowhere() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let kind = QemuKind::V7_2;
        let servers = rig.memory_servers(
            &rig.server_identities(2)?,
            &Offer { capacity_mib: 2048, extra: &[] },
        )?;
        let vm = Vm::boot(&rig.env, freed())?;
        let mut split = rig.split(vm, kind, &servers, RESIDENT_MIB, &[])?;
        let report = split.report.clone();
        ensure!(number(&report, "/pages/unused")? > 1150 * PAGES_PER_MIB, "{report}");
        let in_use = number(&report, "/split/in_use_pages")?;
        ensure!((200 * PAGES_PER_MIB..600 * PAGES_PER_MIB).contains(&in_use), "{report}");
        ensure!(number(&report, "/split/to_servers_bytes")? < 500 * MIB, "{report}");
        ensure!(stored(&servers)? < 600 * PAGES_PER_MIB, "{report}");
        worker::check(&mut split.vm, WORK_WITHIN)?;
        let mut vm = merge(split, &rig, &servers)?;
        // It is the look into the guest that saves this.
        vm.guest().ask("freed again", WORK_WITHIN)?;
        let mut split = rig.split(vm, kind, &servers, RESIDENT_MIB, &["--skip-unused", "off"])?;
        let report = split.report.clone();
        ensure!(number(&report, "/split/to_servers_bytes")? > 1000 * MIB, "{report}");
        worker::check(&mut split.vm, WORK_WITHIN)?;
        merge(split, &rig, &servers).map(drop)
    })
}

/// Reads are in flight all the time into pages that are being evicted, and into pages that are elsewhere.
#[test]
fn a_disk_reads_into_memory_that_comes_and_goes() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let servers = rig.memory_servers(&rig.server_identities(2)?, &OFFER)?;
        let (image, slow) = slow_disk(&rig)?;
        let kind = QemuKind::V10_0;
        let spec = reading(&image, kind, "none", "native")
            .with("godwit.checker=size=24,seed=5")
            .with("godwit.worker=hot_mib=100,order=random,seed=9");
        let source = Vm::boot(&rig.env, spec)?;
        slow.add(source.pid())?;
        let mut split =
            rig.split(source, kind, &servers, RESIDENT_MIB, &["--max-downtime-ms", "3000"])?;
        slow.add(split.vm.pid())?;
        let evicted = rig.pager(&split.vm).status()?.evicted;
        // As much as the host may hold, of all that the guest has.
        wait_blocks(&mut split.vm, RESIDENT_MIB * PAGES_PER_MIB, WORK_WITHIN)?;
        let after = rig.pager(&split.vm).status()?;
        println!("{after:?}");
        ensure!(after.evicted.pages >= evicted.pages + 64 * PAGES_PER_MIB, "{after:?}");
        worker::set_phase(&mut split.vm, Phase::Idle)?;
        worker::check(&mut split.vm, WORK_WITHIN)?;
        merge(split, &rig, &servers)?.assert_clean()?;
        Ok(())
    })
}
