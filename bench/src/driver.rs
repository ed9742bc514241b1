//! One migration, measured from outside in the same way for every mode.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use framework::wait::monotonic_us;
use framework::{Backend, Pulse, RamDisk, Vm};
use serde_json::Value;

use crate::mode::Mode;
use crate::record::{Cpu, Dirty, EngineMemory, Migration, Outcome, unix_s};
use crate::relay::Relay;
use crate::sample::Sampler;
use crate::scenario::{ModePlan, SplitPart};
use crate::split::{self, Paged, Worked};
use crate::testbed::{
    Bed, GuestPlan, Guests, Link, application_per_s, application_works, writer_pages_per_s,
};
use crate::{compulsory, godwit, host, interrupt, qemu};

/// The guest settles for so long after its boot.
const SETTLE: Duration = Duration::from_secs(2);

/// Time over which the guest is watched before and after.
const WATCH: Duration = Duration::from_millis(500);

/// Longest wait for the first heartbeat at the destination after the command's end.
const ARRIVAL: Duration = Duration::from_secs(15);

/// Longest wait for the checker's verdict.
const VERDICT: Duration = Duration::from_secs(120);

/// Gaps up to this count as the heartbeat's own unrest, in microseconds: it beats every 5 ms.
const CALM_GAP_US: u64 = 20_000;

/// What a driver reports of a migration that it has carried out.
#[derive(Debug)]
pub(crate) struct Driven {
    /// Host time of the command, microseconds.
    pub(crate) from_us: u64,
    /// Host time of its end, microseconds.
    pub(crate) to_us: u64,
    /// CPU seconds of (`migrate send`, `migrate receive`), or of both gateways.
    pub(crate) engine_s: (f64, f64),
    /// Memory of both.
    pub(crate) engine_memory: EngineMemory,
    /// How it ended by the driver's account, and why.
    pub(crate) outcome: Result<(), (Outcome, String)>,
    /// The mode's own downtime and total in milliseconds.
    pub(crate) reported_ms: (Option<f64>, Option<f64>),
    /// The dirty set over time, as the mode tells.
    pub(crate) dirty: Vec<Dirty>,
    /// The relay, if there is one. It may still hold bytes that are to arrive.
    pub(crate) relay: Option<Relay>,
    /// Who pages the guest, if it was split.
    pub(crate) paged: Option<Paged>,
    /// The mode's own report.
    pub(crate) report: Value,
}

/// How a migration is to be driven.
#[derive(Debug, Clone)]
pub(crate) struct DriveOptions {
    /// Time after which it is given up.
    pub(crate) limit: Duration,
    /// Channels of multifd.
    pub(crate) channels: u32,
    /// Further arguments of `migrate send`.
    pub(crate) send_args: Vec<String>,
    /// Free memory to touch right before, in MiB.
    pub(crate) touch_mib: u64,
    /// Hosts of split guests, and what is measured there.
    pub(crate) split: Option<SplitPart>,
}

/// Boots a fresh guest, migrates it once and measures. A migration that fails is a record, too.
///
/// # Errors
/// The testbed does not work: no guest, no namespace, or an interruption.
pub(crate) fn measure(
    bed: &Bed,
    link: &Link,
    plan: &GuestPlan,
    mode: &ModePlan,
    turn: u32,
    options: &DriveOptions,
) -> Result<Migration> {
    interrupt::check()?;
    // Dropped after the guests. Both have their memory in it.
    let ram = options.split.as_ref().map(|_| RamDisk::mount(2 * plan.memory_mib)).transpose()?;
    let own = ram.as_ref().map(|disk| Backend::TmpfsAt(disk.path().to_owned()));
    let usual = if plan.is_private { Backend::Private } else { mode.by.backend() };
    let backend = own.filter(|_| mode.by == Mode::Godwit).unwrap_or(usual);
    let mut guests = Guests::boot(bed, link, plan, backend)?;
    host::touch_memory(options.touch_mib);
    std::thread::sleep(if options.touch_mib == 0 { SETTLE } else { WATCH });
    let writer_pages_per_s = writer_pages_per_s(plan, &mut guests.source)?;
    let application_per_s = application_per_s(plan, &mut guests.source)?;
    let cpu = || -> Result<(f64, f64)> {
        Ok((guests.source.cpu_seconds()?, guests.destination.cpu_seconds()?))
    };
    let before_watch = (monotonic_us(), guests.source.cpu_seconds()?);
    std::thread::sleep(WATCH);
    let before = (monotonic_us(), cpu()?);
    let guest_before_cpus =
        (before.1.0 - before_watch.1) / ((before.0 - before_watch.0).max(1) as f64 / 1e6);
    let gaps_before = Pulse::of(&[&guests.source.heartbeat().record()])?;
    interrupt::check()?;
    let (at_unix_s, load1) = (unix_s(), host::load1());
    let wire_before = link.bytes()?;
    let machine_before = host::busy_seconds();
    let cpu_before = (guests.source.cpu_seconds()?, guests.destination.cpu_seconds()?);
    let sampler = Sampler::begin(guests.source.pid(), link.devices());
    let mut driven = match mode.by.is_sent() {
        true => godwit::migrate(bed, link, &mut guests, mode, turn, options)?,
        false => qemu::migrate(bed, link, &mut guests, mode, turn, options)?,
    };
    let machine_s = host::busy_seconds() - machine_before;
    let used = |vm: &Vm, before: f64| vm.cpu_seconds().map_or(0.0, |now| now - before);
    let cpu = Cpu {
        engine_source_s: driven.engine_s.0,
        engine_destination_s: driven.engine_s.1,
        qemu_source_s: used(&guests.source, cpu_before.0),
        qemu_destination_s: used(&guests.destination, cpu_before.1),
        guest_before_cpus,
        machine_s,
    };
    let samples = sampler.end(driven.from_us, driven.to_us);
    let checked = judge(bed, &mut guests, plan, &driven, options);
    // What it broke off is no failure of the guest.
    interrupt::check()?;
    let relay = driven.relay.take().map(Relay::end).transpose()?;
    let wire = link.bytes()?;
    let (outcome, error, seen) = match checked {
        Ok(seen) => (Outcome::Completed, None, seen),
        Err((outcome, error)) => (outcome, Some(error), Seen::default()),
    };
    let compulsory = match outcome {
        // Up to 12 GiB of it would take longer than all the rest.
        Outcome::Completed if options.split.is_none() => Some(compulsory::of(&mut guests.source)?),
        _ => None,
    };
    Ok(Migration {
        mode: mode.name.clone(),
        by: mode.by,
        send_args: arguments(mode, options),
        workload: plan.name.clone(),
        memory_mib: plan.memory_mib,
        smp: plan.smp,
        link_bits: link.rate(),
        link: link.label().to_owned(),
        turn,
        at_unix_s,
        load1,
        outcome,
        error,
        total_ms: driven.to_us.saturating_sub(driven.from_us) as f64 / 1e3,
        arrived_ms: seen.arrived_ms,
        outage_ms: seen.outage_ms,
        worst_gap_ms: seen.worst_gap_ms,
        stalled_ms: seen.stalled_ms,
        gap_before_p99_ms: Some(gaps_before.gap_percentile_us(99.0) as f64 / 1e3),
        reported_downtime_ms: driven.reported_ms.0,
        reported_total_ms: driven.reported_ms.1,
        wire_out_bytes: wire.0.saturating_sub(wire_before.0),
        wire_back_bytes: wire.1.saturating_sub(wire_before.1),
        samples,
        dirty: driven.dirty,
        compulsory,
        relay,
        cpu,
        engine_memory: driven.engine_memory,
        writer_pages_per_s,
        application_per_s,
        split: seen.split,
        report: driven.report,
    })
}

/// What was typed for a mode and this run: QEMU's own modes and gateways have no `migrate send`.
fn arguments(mode: &ModePlan, options: &DriveOptions) -> Vec<String> {
    let further = options.send_args.iter().filter(|_| mode.by.is_sent());
    mode.send.iter().chain(further).cloned().collect()
}

/// What the heartbeat showed.
#[derive(Debug, Default)]
struct Seen {
    arrived_ms: Option<f64>,
    outage_ms: Option<f64>,
    worst_gap_ms: Option<f64>,
    stalled_ms: Option<f64>,
    /// What the guest did afterwards, in scenarios of split guests.
    split: Option<Worked>,
}

/// Whether the migration is a success: by the driver's account, by what is seen of the guest, and by its work where
/// that is asked for.
fn judge(
    bed: &Bed,
    guests: &mut Guests,
    plan: &GuestPlan,
    driven: &Driven,
    options: &DriveOptions,
) -> Result<Seen, (Outcome, String)> {
    driven.outcome.clone()?;
    let failed = |what: &str, error: &anyhow::Error| {
        let said = driven.paged.as_ref().map(Paged::said).unwrap_or_default();
        (Outcome::Failed, format!("{what}: {error:#}\n{said}").trim_end().to_owned())
    };
    let mut seen = check(guests, plan, driven)
        .map_err(|error| failed("The guest is not well after it", &error))?;
    if let Some(part) = &options.split {
        let worked = split::work(bed, &mut guests.destination, part, driven.paged.as_ref());
        seen.split = Some(worked.map_err(|error| failed("The guest does not work", &error))?);
    }
    Ok(seen)
}

/// The guest beats at the destination, was never in two places, its checker is clean, and its
/// application goes on.
fn check(guests: &mut Guests, plan: &GuestPlan, driven: &Driven) -> Result<Seen> {
    let (source, destination) = (&mut guests.source, &mut guests.destination);
    ensure!(
        destination.heartbeat().beats_within(ARRIVAL),
        "no heartbeat at the destination; its QEMU said {:?}, its console ends with:\n{}",
        destination.stderr().trim(),
        destination.console().tail(10)
    );
    std::thread::sleep(WATCH);
    let (before, after) = (source.heartbeat().record(), destination.heartbeat().record());
    let pulse = Pulse::of(&[&before, &after])?;
    pulse.assert_one_runs()?;
    let gap = pulse.handover(0, 1).context("the heartbeat shows no hand-over")?;
    let until_us = driven.to_us.max(gap.to.beat.at_us) + WATCH.as_micros() as u64;
    let worst = pulse.outage(driven.from_us, until_us);
    let stalled_us: u64 = pulse
        .gaps(driven.from_us, until_us)
        .map(|gap| gap.gap_us().saturating_sub(CALM_GAP_US))
        .sum();
    source.assert_clean()?;
    destination.assert_clean()?;
    if plan.workload.checks() {
        destination.verify_checker(VERDICT)?;
    }
    if plan.workload.is_application() {
        application_works(destination, VERDICT)?;
    }
    Ok(Seen {
        arrived_ms: Some(gap.to.beat.at_us.saturating_sub(driven.from_us) as f64 / 1e3),
        outage_ms: Some(gap.outage_ms()),
        worst_gap_ms: worst.map(|gap| gap.outage_ms()),
        stalled_ms: Some(stalled_us as f64 / 1e3),
        split: None,
    })
}
