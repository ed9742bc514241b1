//! Drives QEMU's own migration over QMP, from QEMU to QEMU or through gateways.
//!
//! The end is taken from QEMU's events, not by polling: every query costs the main loop time that
//! a migration needs. What is left to send is asked for when a pass begins, which an event tells,
//! and no more than five times a second.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use framework::wait::monotonic_us;
use framework::{Qmp, Vm};
use serde_json::{Value, json};

use crate::driver::{DriveOptions, Driven};
use crate::gateway::{Gateways, Passed};
use crate::interrupt;
use crate::mode::Mode;
use crate::qemu_tls;
use crate::record::{Dirty, EngineMemory, Outcome};
use crate::relay::Relay;
use crate::scenario::ModePlan;
use crate::testbed::{Bed, Guests, Link};

/// Where the destination's QEMU listens; the namespace is ours.
const PORT: u16 = 4444;

/// How long one wait for an event lasts.
const STEP: Duration = Duration::from_millis(20);

/// Least time between two questions for what is left.
const ASK_US: u64 = 200_000;

/// Longest wait for a cancelled migration to end.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(20);

/// Longest wait for QEMU's own times after the end.
const LAST_WORD_TIMEOUT: Duration = Duration::from_secs(2);

fn configure(qmp: &mut Qmp, mode: Mode, channels: u32) -> Result<()> {
    let names = [&["events"], mode.capabilities()].concat();
    let list: Vec<Value> =
        names.iter().map(|name| json!({ "capability": name, "state": true })).collect();
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": list }))?;
    qmp.execute("migrate-set-parameters", mode.parameters(channels))?;
    Ok(())
}

/// Waits for an event for a short time; nothing if it did not come.
fn event(vm: &mut Vm, name: &str) -> Result<Option<Value>> {
    let found = vm.qmp().event(name, STEP).ok();
    if found.is_none()
        && let Some(status) = vm.exited()?
    {
        bail!("QEMU ended with {status}: {}", vm.stderr().trim());
    }
    Ok(found)
}

/// The status that an event of migration names.
fn status(event: &Value) -> &str {
    event["data"]["status"].as_str().unwrap_or_default()
}

/// What lies between the QEMUs.
#[derive(Debug)]
struct Way {
    /// Where the source's QEMU sends to.
    out: String,
    gateways: Option<Gateways>,
    relay: Option<Relay>,
}

/// Lets the destination's QEMU listen, and prepares the way there.
fn prepare(bed: &Bed, link: &Link, guests: &mut Guests, plan: &ModePlan, turn: u32) -> Result<Way> {
    let mut listen = |uri: String| -> Result<()> {
        guests.destination.qmp().execute("migrate-incoming", json!({ "uri": uri }))?;
        Ok(())
    };
    if plan.by.is_by_gateway() {
        let (gateways, relay) = Gateways::start(bed, link, plan, turn)?;
        listen(gateways.uri_in())?;
        return Ok(Way { out: gateways.uri_out(), gateways: Some(gateways), relay });
    }
    listen(format!("tcp:{}:{PORT}", link.address()))?;
    let (address, relay) = link.reach(PORT, turn)?;
    Ok(Way { out: format!("tcp:{address}"), gateways: None, relay })
}

/// Runs one migration.
///
/// # Errors
/// QEMU refuses the mode, a gateway does not start, or an interruption.
pub(crate) fn migrate(
    bed: &Bed,
    link: &Link,
    guests: &mut Guests,
    plan: &ModePlan,
    turn: u32,
    options: &DriveOptions,
) -> Result<Driven> {
    let mode = plan.by;
    configure(guests.destination.qmp(), mode, options.channels)
        .with_context(|| format!("The destination cannot do {mode}"))?;
    configure(guests.source.qmp(), mode, options.channels)
        .with_context(|| format!("The source cannot do {mode}"))?;
    if mode.is_encrypted() {
        qemu_tls::switch_on(bed, guests)?;
    }
    let way = prepare(bed, link, guests, plan, turn)?;
    guests.source.qmp().clear_events();
    let from_us = monotonic_us();
    guests.source.qmp().execute("migrate", json!({ "uri": way.out }))?;
    let mut dirty = vec![];
    let mut passes = Passes { from_us, asked_us: 0, dirty: &mut dirty };
    let end = Instant::now() + options.limit;
    let ended = follow(&mut guests.source, mode, end, &mut passes);
    let to_us = monotonic_us();
    interrupt::check()?;
    let outcome = match ended {
        Ok(true) => Ok(()),
        Ok(false) => {
            cancel(&mut guests.source);
            let why = format!("Not complete after {} s; cancelled", options.limit.as_secs());
            Err((Outcome::NotConverged, why))
        }
        Err(error) => Err((Outcome::Failed, format!("{error:#}"))),
    };
    let report = last_word(guests.source.qmp());
    let reported_ms = (report["downtime"].as_f64(), report["total-time"].as_f64());
    if outcome.is_ok() {
        dirty.push(Dirty { ms: to_us.saturating_sub(from_us) as f64 / 1e3, bytes: 0 });
    }
    let mut driven = Driven {
        from_us,
        to_us,
        engine_s: (0.0, 0.0),
        engine_memory: EngineMemory::default(),
        outcome,
        reported_ms,
        dirty,
        relay: way.relay,
        paged: None,
        report,
    };
    if let Some(gateways) = way.gateways {
        driven.take_gateways(gateways.end());
    }
    Ok(driven)
}

impl Driven {
    /// Adds what gateways used and reported. Failures are told together.
    fn take_gateways(&mut self, ended: Result<Passed>) {
        let passed = match ended {
            Ok(passed) => passed,
            Err(error) => return self.fail(&format!("{error:#}")),
        };
        (self.engine_s, self.engine_memory) = (passed.engine_s, passed.engine_memory);
        let checked = passed.check();
        if let Some(report) = self.report.as_object_mut() {
            report.insert("gateway".to_owned(), passed.report);
        }
        if let Err(error) = checked {
            self.fail(&format!("{error:#}"));
        }
    }

    /// Something went wrong with a gateway, too, or alone.
    fn fail(&mut self, what: &str) {
        match &mut self.outcome {
            Ok(()) => self.outcome = Err((Outcome::Failed, what.to_owned())),
            Err((_, why)) => *why = format!("{why}\n{what}"),
        }
    }
}

/// Notes what is left when passes begin.
struct Passes<'a> {
    from_us: u64,
    asked_us: u64,
    dirty: &'a mut Vec<Dirty>,
}

impl Passes<'_> {
    /// A pass has begun.
    fn note(&mut self, source: &mut Vm) -> Result<()> {
        let now_us = monotonic_us();
        if now_us.saturating_sub(self.asked_us) < ASK_US {
            return Ok(());
        }
        self.asked_us = now_us;
        let report = source.qmp().execute("query-migrate", json!({}))?;
        if let Some(bytes) = report["ram"]["remaining"].as_u64()
            && report["status"] == "active"
        {
            let ms = now_us.saturating_sub(self.from_us) as f64 / 1e3;
            self.dirty.push(Dirty { ms, bytes });
        }
        Ok(())
    }
}

/// QEMU's account after the end. It announces `completed` before it has worked out its times
/// (migration/migration.c), which are 0 until then.
fn last_word(qmp: &mut Qmp) -> Value {
    let begin = Instant::now();
    loop {
        let report = qmp.execute("query-migrate", json!({})).unwrap_or_default();
        let unfinished =
            report["status"] == "completed" && report["total-time"].as_u64().unwrap_or(0) == 0;
        if !unfinished || begin.elapsed() > LAST_WORD_TIMEOUT {
            return report;
        }
        std::thread::sleep(STEP);
    }
}

/// True when it has completed, false at `end`.
fn follow(source: &mut Vm, mode: Mode, end: Instant, passes: &mut Passes<'_>) -> Result<bool> {
    let mut asked_post_copy = !mode.is_post_copy();
    while Instant::now() < end {
        interrupt::check()?;
        if let Some(pass) = source.qmp().kept_event("MIGRATION_PASS") {
            // The first pass is announced when it begins, the second when the first is over.
            if !asked_post_copy && pass["data"]["pass"].as_u64().is_some_and(|pass| pass >= 2) {
                source.qmp().execute("migrate-start-postcopy", json!({}))?;
                asked_post_copy = true;
            }
            passes.note(source)?;
        }
        let Some(change) = event(source, "MIGRATION")? else { continue };
        match status(&change) {
            "completed" => return Ok(true),
            "failed" => {
                let report = source.qmp().execute("query-migrate", json!({}))?;
                bail!("QEMU's migration failed: {}", report["error-desc"].as_str().unwrap_or("?"))
            }
            _ => {}
        }
    }
    Ok(false)
}

fn cancel(source: &mut Vm) {
    let begin = Instant::now();
    drop(source.qmp().execute("migrate_cancel", json!({})));
    while begin.elapsed() < CANCEL_TIMEOUT {
        match event(source, "MIGRATION") {
            Ok(Some(change)) if ["cancelled", "completed"].contains(&status(&change)) => return,
            Ok(_) => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_status_of_events() {
        let event = json!({ "event": "MIGRATION", "data": { "status": "completed" } });
        assert_eq!(status(&event), "completed");
        assert_eq!(status(&json!({})), "");
    }
}
