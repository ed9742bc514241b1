//! `cargo xtask demo split`: a guest is split over two memory servers on this machine, works, and is merged,
//! by the same commands that a user would type.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::Rig;
use e2e::split::{Merged, Offer, PAGES_PER_MIB, Split, number};
use framework::worker::{self, Phase};
use framework::{MemoryServer, QemuKind, Status, Vm, VmSpec};

/// The guest's memory.
const MEMORY_MIB: u64 = 1024;

/// What the main host may hold of it.
const RESIDENT_MIB: u64 = 192;

/// What the guest works on: more than the main host may hold.
const HOT_MIB: u64 = 300;

/// How long it works in each phase.
const WORK: Duration = Duration::from_secs(15);

/// Longest time for all memory to be looked at again.
const CHECK_WITHIN: Duration = Duration::from_secs(300);

fn guest() -> VmSpec {
    VmSpec::new("demo", QemuKind::V7_2)
        .memory_mib(MEMORY_MIB)
        .with("godwit.writer=fill=100,hot=20,rate=1000,bytes=64,seed=7")
        .with("godwit.checker=size=16,seed=5")
        .with(&format!("godwit.worker=hot_mib={HOT_MIB},fresh_mib=100,phase=idle,seed=9"))
}

fn mib(pages: u64) -> f64 {
    pages as f64 / PAGES_PER_MIB as f64
}

fn main() -> Result<()> {
    ensure!(std::env::args().len() == 1, "The demo takes no arguments");
    println!(
        "A Linux guest of {MEMORY_MIB} MiB that writes and checks its memory all the time is split on this machine:\n\
         at most {RESIDENT_MIB} MiB of it stay at the main host, the rest lies on two memory servers and is\n\
         paged over TCP with mutual TLS 1.3.\n"
    );
    let rig = Rig::new()?;
    let offer = Offer { capacity_mib: MEMORY_MIB, extra: &[] };
    let servers = rig.memory_servers(&rig.server_identities(2)?, &offer)?;
    let began = Instant::now();
    let source = Vm::boot(&rig.env, guest())?;
    println!("the guest has booted ({:.1} s, QEMU under TCG)\n", began.elapsed().as_secs_f64());
    let mut split = rig.split(source, QemuKind::V7_2, &servers, RESIDENT_MIB, &[])?;
    tell_split(&split, &servers)?;
    let before = rig.pager(&split.vm).status()?;
    println!("work");
    for (phase, what) in [
        (Phase::Hot, format!("reads and writes pages of {HOT_MIB} MiB at random")),
        (Phase::Fresh, "allocates, writes, reads and frees 100 MiB".to_owned()),
    ] {
        let first = worker::set_phase(&mut split.vm, phase)?;
        std::thread::sleep(WORK);
        let last = worker::report(&mut split.vm)?;
        let mib_per_s = last.mib_per_s(&first).context("The guest's clock stands still")?;
        println!("  {:<6}     {mib_per_s:>8.1} MiB/s   {what}", phase.label());
    }
    worker::set_phase(&mut split.vm, Phase::Idle)?;
    println!("\nstatus");
    tell_status(&before, &rig.pager(&split.vm).status()?);
    let merged = split.merge(&rig, &servers)?;
    tell_merged(merged, &servers)
}

fn tell_split(split: &Split, servers: &[MemoryServer]) -> Result<()> {
    let report = &split.report;
    let ms = |field: &str| report[field].as_f64().unwrap_or(0.0);
    println!("split");
    println!("  total      {:>8.2} s", ms("total_ms") / 1e3);
    println!(
        "  outage     {:>8.0} ms      seen from outside by a heartbeat every 5 ms",
        split.outage_ms
    );
    println!("  downtime   {:>8.1} ms      as the engine measured it", ms("downtime_ms"));
    println!("  in use     {:>8.0} MiB", mib(number(report, "/split/in_use_pages")?));
    println!("  main host  {:>8.0} MiB", mib(number(report, "/split/resident_pages")?));
    for server in servers {
        println!("  server     {:>8.0} MiB     {}", mib(server.stored_pages()?), server.address());
    }
    println!();
    Ok(())
}

fn tell_status(before: &Status, now: &Status) {
    let (faults, evicted) = (&now.faults, &now.evicted);
    println!(
        "  faults     {:>8}         {} of them served by a server; median {} us, 99 % below {} us",
        faults.count - before.faults.count,
        faults.fetched - before.faults.fetched,
        faults.p50_us,
        faults.p99_us
    );
    println!(
        "  read ahead {:>8} pages   {} of them used",
        now.read_ahead.pages, now.read_ahead.used
    );
    println!(
        "  evicted    {:>8} pages   {} of them without being sent",
        evicted.pages, evicted.clean
    );
    println!("  reclaimed  {:>8} pages   freed by the guest, and dropped", now.reclaimed_pages);
    println!("  main host  {:>8.0} MiB", mib(now.resident_pages));
    println!("  servers    {:>8.0} MiB\n", mib(now.remote()));
}

fn tell_merged(merged: Merged, servers: &[MemoryServer]) -> Result<()> {
    let Merged { mut vm, ram, took, .. } = merged;
    let left: u64 = servers.iter().map(MemoryServer::stored_pages).sum::<Result<_>>()?;
    println!("merge");
    println!("  took       {:>8.2} s       while the guest ran", took.as_secs_f64());
    println!(
        "  main host  {:>8.0} MiB     at most until then, in {} looks; {RESIDENT_MIB} were allowed",
        ram.peak_bytes as f64 / f64::from(1 << 20),
        ram.looks
    );
    println!("  servers    {left:>8} pages   left\n");
    worker::check(&mut vm, CHECK_WITHIN)?;
    println!("the same guest is still running; its checker and its worker found nothing wrong");
    Ok(())
}
