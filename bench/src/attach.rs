//! `bench attach`: what attaching costs QEMU, what a scan of clean memory costs, and the size of the
//! engine's tables.
//!
//! ```text
//!  a guest with much resident memory ── N times: attach ─ arm ─ (guest runs 100 ms) ─ stop ─
//!                                                  scan once, then clean scans ─ disarm ─ cont
//!  then one migration over loopback, whose report names its own attach and the tables
//! ```

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use framework::wait::monotonic_us;
use framework::{Pulse, Vm};
use migrate_core::pageset::PageSet;
use qemu_glue::attach::{CloseRemote, Way, userfaultfd};
use qemu_glue::qmp::Client;
use qemu_glue::ram::GuestRam;
use qemu_glue::track::DirtyTracker;
use qemu_glue::vm::{VmInventory, inventory};
use serde_json::json;

use crate::args::AttachArgs;
use crate::driver::{DriveOptions, measure};
use crate::mode::Mode;
use crate::record::{Attach, Log, Record};
use crate::scenario::{ModePlan, Workload};
use crate::testbed::{Bed, GuestPlan, Guests, Link};
use crate::{interrupt, report};

/// Time that the guest runs between an attach and the next.
const BETWEEN: Duration = Duration::from_millis(100);

/// Clean scans an attach.
const CLEAN_SCANS: usize = 5;

/// Longest wait for a guest's heartbeat after it was continued.
const BEAT: Duration = Duration::from_secs(5);

/// Measures, records, and prints tables.
///
/// # Errors
/// The testbed does not work, attaching fails, or an interruption.
pub(crate) fn run(args: &AttachArgs) -> Result<()> {
    let bed = Bed::open(args.common.qemu())?;
    let mib = args.resident.min(args.memory.saturating_sub(200));
    let plan = GuestPlan {
        name: "resident".to_owned(),
        qemu: args.common.qemu(),
        memory_mib: args.memory,
        smp: args.common.smp(),
        workload: Workload::Resident { mib },
        is_private: false,
    };
    let name = args.common.name.clone().unwrap_or_else(|| "attach".to_owned());
    let mut log = Log::create(&args.common.out, &name, bed.host.clone())?;
    let measured = all(&bed, &plan, args, &mut log);
    let shown = report::render(log.path());
    measured?;
    shown
}

fn all(bed: &Bed, plan: &GuestPlan, args: &AttachArgs, log: &mut Log) -> Result<()> {
    let link = Link::loopback()?;
    let mut guests = Guests::boot(bed, &link, plan, Mode::Godwit.backend())?;
    let vm = describe(&guests.source)?;
    let ram = GuestRam::open(vm.pid, &vm.regions, false)?;
    for turn in 0..args.count {
        interrupt::check()?;
        log.add(Record::Attach(one(&mut guests.source, &vm, &ram, turn)?))?;
    }
    drop(guests);
    let options = DriveOptions {
        touch_mib: 0,
        limit: args.common.limit(),
        channels: 1,
        send_args: args.common.send_args.clone(),
        split: None,
    };
    let moved = measure(bed, &link, plan, &ModePlan::of(Mode::Godwit), 0, &options)?;
    log.add(Record::Migration(Box::new(moved)))
}

fn describe(vm: &Vm) -> Result<VmInventory> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("Cannot start a runtime for QMP")?;
    runtime.block_on(async {
        let client = Client::connect(&vm.qmp_engine()).await?;
        Ok(inventory(&client).await?)
    })
}

fn us(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

fn one(guest: &mut Vm, vm: &VmInventory, ram: &GuestRam, turn: u32) -> Result<Attach> {
    let from_us = monotonic_us();
    let began = Instant::now();
    let attached = userfaultfd(vm.pid, None, CloseRemote::Yes)?;
    let attach_us = us(began);
    let stopped_us = match attached.way {
        Way::Injection(report) => report.stopped_us,
        Way::Preload { .. } => anyhow::bail!("No injection took place"),
    };
    let began = Instant::now();
    let mut tracker = DirtyTracker::arm(vm.pid, attached.uffd, ram)?;
    let arm_us = us(began);
    std::thread::sleep(BETWEEN);
    let pulse = Pulse::of(&[&guest.heartbeat().record()])?;
    let gap_us = pulse.outage(from_us, monotonic_us()).map_or(0, |gap| gap.gap_us());

    guest.qmp().execute("stop", json!({}))?;
    let mut dirty = PageSet::new(ram.layout().pages());
    tracker.scan(&mut dirty)?;
    let mut clean_scan_us = Vec::new();
    let mut clean_scan_pages = 0;
    for _ in 0..CLEAN_SCANS {
        let seen = tracker.scan(&mut dirty)?;
        clean_scan_us.push(u64::try_from(seen.took.as_micros()).unwrap_or(u64::MAX));
        clean_scan_pages = seen.pages;
    }
    let populated_bytes = ram.resident_bytes()?;
    tracker.disarm()?;
    guest.qmp().execute("cont", json!({}))?;
    anyhow::ensure!(
        guest.heartbeat().beats_within(BEAT),
        "The guest does not beat after attach {turn}"
    );
    guest.assert_clean()?;
    Ok(Attach {
        turn,
        stopped_us,
        attach_us,
        arm_us,
        gap_us,
        ram_bytes: ram.layout().bytes(),
        populated_bytes,
        clean_scan_us,
        clean_scan_pages,
    })
}
