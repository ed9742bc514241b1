//! `bench throughput`: Godwit's goodput on an unshaped link beside a plain quinn transfer.
//!
//! The baseline is transport's example `bulk`: as many QUIC connections with the same tuning and
//! cipher, sender and receiver in one process, from memory to memory and into nothing. It runs in
//! the same namespace while the guest and the waiting QEMU of the next migration are up, so that
//! both have the same neighbours, and after the same memory was touched.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use framework::Engine;
use serde_json::Value;

use crate::args::ThroughputArgs;
use crate::compare::say;
use crate::driver::{DriveOptions, measure};
use crate::mode::Mode;
use crate::record::{Bulk, Log, Record};
use crate::scenario::{LinkPart, ModePlan, Workload};
use crate::testbed::{Bed, GuestPlan, Guests, Link, release};
use crate::{host, interrupt, report};

/// The guest has this much memory beyond the resident data, in MiB.
const SPARE_MIB: u64 = 548;

/// Longest time that the plain transfer may take.
const BULK_TIMEOUT: Duration = Duration::from_secs(120);

/// Measures, records, and prints tables.
///
/// # Errors
/// The testbed does not work, or an interruption.
pub(crate) fn run(args: &ThroughputArgs) -> Result<()> {
    let bulk = match &args.bulk {
        Some(path) => path.clone(),
        None => build_bulk()?,
    };
    let bed = Bed::open(args.common.qemu())?;
    let name = args.common.name.clone().unwrap_or_else(|| "throughput".to_owned());
    let mut log = Log::create(&args.common.out, &name, bed.host.clone())?;
    let measured = turns(&bed, args, &bulk, &mut log);
    let shown = report::render(log.path());
    measured?;
    shown
}

/// Builds the plain transfer, as it must be of the same sources as what it is compared with.
fn build_bulk() -> Result<PathBuf> {
    let words = ["build", "--release", "-p", "transport", "--example", "bulk"];
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let status = Command::new("cargo").args(words).current_dir(root).status();
    let status = status.context("Cannot run cargo to build the plain transfer")?;
    ensure!(status.success(), "The plain transfer cannot be built: `cargo {}`", words.join(" "));
    release("GODWIT_BULK", "examples/bulk", &format!("cargo {}", words.join(" ")))
}

fn turns(bed: &Bed, args: &ThroughputArgs, bulk: &Path, log: &mut Log) -> Result<()> {
    let plan = GuestPlan {
        name: "resident".to_owned(),
        qemu: args.common.qemu(),
        memory_mib: (args.resident + SPARE_MIB).next_multiple_of(2),
        smp: args.common.smp(),
        workload: Workload::Resident { mib: args.resident },
        is_private: false,
    };
    let lanes = args.lanes.to_string();
    let mut send_args = vec!["--lane-count".to_owned(), lanes];
    send_args.extend(args.common.send_args.iter().cloned());
    let limit = args.common.limit();
    let touch_mib = args.touch;
    let channels = args.lanes.into();
    let options = DriveOptions { limit, channels, send_args, touch_mib, split: None };
    let loopback = Link::loopback()?;
    let veth = match args.veth {
        true => Some(Link::veth(&LinkPart { rate: 0, ..LinkPart::default() })?),
        false => None,
    };
    for turn in 0..args.repeats {
        interrupt::check()?;
        let one = plain(bed, &loopback, &plan, args, bulk, turn)?;
        eprintln!(
            "turn {}/{} plain quinn {} Gbit/s into nothing, {} from memory to memory",
            turn + 1,
            args.repeats,
            one.bulk["plain_gbps"],
            one.bulk["memory_gbps"],
        );
        log.add(Record::Bulk(one))?;
        for link in std::iter::once(&loopback).chain(&veth) {
            let one = measure(bed, link, &plan, &ModePlan::of(Mode::Godwit), turn, &options)?;
            say(&one, args.repeats);
            log.add(Record::Migration(Box::new(one)))?;
        }
    }
    Ok(())
}

/// A plain transfer of as many bytes beside the same kind of guest.
fn plain(
    bed: &Bed,
    link: &Link,
    plan: &GuestPlan,
    args: &ThroughputArgs,
    bulk: &Path,
    turn: u32,
) -> Result<Bulk> {
    let neighbours = Guests::boot(bed, link, plan, Mode::Godwit.backend())?;
    interrupt::check()?;
    host::touch_memory(args.touch);
    let load1 = host::load1();
    let (mib, lanes) = (args.resident.to_string(), args.lanes.to_string());
    let words = [mib.as_str(), lanes.as_str(), "1", "plain", "memory"];
    let output = Engine::run(bulk, &words, Some(link.source()), BULK_TIMEOUT)?;
    drop(neighbours);
    let output = output.success().context("The plain transfer failed")?;
    let bulk: Value = output.json().context("The plain transfer printed no JSON")?.clone();
    for name in ["plain_gbps", "memory_gbps"] {
        bulk[name].as_f64().with_context(|| format!("The plain transfer names no `{name}`"))?;
    }
    Ok(Bulk { turn, load1, bulk })
}
