//! What a profiler's sample of a guest's pages foretells of its migration is what the engine then reports.
//!
//! The guests hold noise: what repeats far apart is packed better than a sample can show.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::{PATIENCE, Rig};
use framework::{QemuKind, Vm, VmSpec, wait};
use scheduler::cost::{self, Sampled};
use scheduler::profile::{Profiler, Received, Settings, assemble};

/// What the link is held to, Mbit/s.
const LINK_MBIT: f64 = 200.0;

/// By how much a sample of one page in each MiB may be off.
const OFF_MAX: f64 = 1.4;

/// The guest's sample, and what is foretold from it.
fn foretell(vm: &Vm) -> Result<(Sampled, cost::MigrationCost)> {
    // Samples are taken between readings.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let sockets = vec![vm.qmp_engine()];
    let settings = Settings { sockets, traffic: false, ..Settings::default() };
    let mut profiler = Profiler::new("here".into(), settings);
    let report = wait::until("a sample", PATIENCE, || {
        std::thread::sleep(Duration::from_millis(500));
        let report = runtime.block_on(profiler.report());
        let is_sampled = report.guests.first().is_some_and(|guest| guest.sampled.is_some());
        Ok(is_sampled.then_some(report))
    })?;
    let sampled = report.guests.first().and_then(|guest| guest.sampled).context("No sample")?;
    let at_s = report.at_s;
    let seen = assemble(&[Received { report, at_s }], &Default::default(), at_s);
    let guest = seen.cluster.vms.first().with_context(|| format!("No guest: {seen:?}"))?;
    Ok((sampled, cost::predict(guest, LINK_MBIT)))
}

/// Says how far off it is, in words if it is too far.
fn off(what: &str, foretold: f64, was: f64) -> Option<String> {
    let told = format!("{what}: {foretold:.2} was foretold, {was:.2} came");
    println!("{told}");
    ((foretold / was).max(was / foretold) > OFF_MAX).then_some(told)
}

#[test]
fn what_is_foretold_comes() -> Result<()> {
    let rig = Rig::new()?;
    let writers = [
        ("idle", "fill=60,hot=1,rate=1,bytes=64,content=random,seed=7"),
        ("sparse", "fill=100,hot=60,rate=3000,bytes=64,content=random,seed=7"),
        ("pages", "fill=100,hot=60,rate=1500,bytes=4096,content=random,seed=7"),
    ];
    let mut wrong = vec![];
    for (name, writer) in writers {
        let vm = Vm::boot(
            &rig.env,
            VmSpec::new(name, QemuKind::V10_0).with(&format!("godwit.writer={writer}")),
        )?;
        let (sampled, foretold) = foretell(&vm)?;
        println!("{name}: {sampled:?} {foretold:?}");
        let moved = rig.migrate(vm, QemuKind::V10_0, &["--max-bandwidth", "200M"])?;
        let report = &moved.report;
        let figure = |figure: &serde_json::Value| figure.as_f64().context("Not in the report");
        let wire_mib = figure(&report["bytes"]["wire"])? / 1_048_576.0;
        wrong.extend(off(&format!("{name}: MiB on the wire"), foretold.wire_mib, wire_mib));
        wrong.extend(off(
            &format!("{name}: seconds"),
            foretold.total_s,
            figure(&report["total_ms"])? / 1e3,
        ));
        println!(
            "{name}: {:.0} ms of downtime foretold, {:.0} came",
            foretold.downtime_ms,
            figure(&report["downtime_ms"])?
        );
    }
    ensure!(wrong.is_empty(), "{wrong:#?}");
    Ok(())
}
