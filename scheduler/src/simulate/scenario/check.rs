//! What a file may not say, with the line and what to do about it.
//!
//! Invariant: a world that is built from a file that was accepted has finite, non-negative figures, and small enough
//! ones that a run ends.

use std::collections::HashMap;

use super::file::{File, GeneratePart, HostPart, VmPart, Work};
use super::{ScenarioError, expect};
use crate::lines::Lines;

/// Larger figures are typing errors.
const FIGURE_MAX: f64 = 1e9;

/// A year.
const DURATION_S_MAX: f64 = 366.0 * 86_400.0;

/// Report intervals in one run: enough for a month of 10 s.
const REPORTS_MAX: f64 = 300_000.0;

/// Guests times report intervals: enough for 10,000 guests and a week.
const WORK_MAX: f64 = 1e9;

/// Bursts and flash crowds in a run.
const SURGES_MAX: f64 = 5e6;

/// Guests in all: ten times what was aimed at.
const GUESTS_MAX: usize = 100_000;

impl Lines<'_> {
    fn error(
        &self,
        (table, nth, key): (&str, usize, &str),
        what: impl Into<String>,
        remedy: impl Into<String>,
    ) -> ScenarioError {
        let line = self.of(table, nth, key);
        ScenarioError::Wrong { line, what: what.into(), remedy: remedy.into() }
    }

    fn between(
        &self,
        place: (&str, usize, &str),
        value: f64,
        (low, high): (f64, f64),
    ) -> Result<(), ScenarioError> {
        if (low..=high).contains(&value) {
            return Ok(());
        }
        let what = format!("`{} = {value}` cannot be", place.2);
        Err(self.error(place, what, format!("take a number from {low} to {high}")))
    }
}

/// Checks everything.
pub(super) fn check(file: &File, text: &str) -> Result<(), ScenarioError> {
    let lines = Lines(text);
    head(file, &lines)?;
    let hosts = names(&lines, "host", file.host.iter().map(|host| host.name.as_str()))?;
    let vms = names(&lines, "vm", file.vm.iter().map(|vm| vm.name.as_str()))?;
    for (at, part) in file.host.iter().enumerate() {
        host(&lines, at, part)?;
    }
    for (at, part) in file.vm.iter().enumerate() {
        vm(&lines, at, part)?;
        if !hosts.contains_key(part.host.as_str()) {
            let what =
                format!("Guest {} runs on a host {} that is not there", part.name, part.host);
            return Err(lines.error(("vm", at, "host"), what, "name one of the file's [[host]]s"));
        }
    }
    for (at, talk) in file.talk.iter().enumerate() {
        lines.between(("talk", at, "mbit"), talk.mbit, (0.0, FIGURE_MAX))?;
        known(&lines, ("talk", at, "between"), &vms, [&talk.between.0, &talk.between.1])?;
        if talk.between.0 == talk.between.1 {
            let what = format!("{} talks to itself", talk.between.0);
            return Err(lines.error(("talk", at, "between"), what, "name two guests"));
        }
    }
    known(&lines, ("rules", 0, "pinned"), &vms, &file.rules.pinned)?;
    known(&lines, ("rules", 0, "together"), &vms, file.rules.together.iter().flatten())?;
    known(&lines, ("rules", 0, "apart"), &vms, file.rules.apart.iter().flatten())?;
    for (at, part) in file.expect.iter().enumerate() {
        for said in part.moves.iter().flatten() {
            if expect::parse_move(said).is_none() {
                let what = format!("`{said}` is no move");
                let remedy = "write GUEST: FROM -> TO";
                return Err(lines.error(("expect", at, "moves"), what, remedy));
            }
        }
    }
    fits(file, &lines, &hosts)
}

fn head(file: &File, lines: &Lines<'_>) -> Result<(), ScenarioError> {
    lines.between(("", 0, "report_s"), file.report_s, (0.1, 86_400.0))?;
    lines.between(("", 0, "duration_s"), file.duration_s, (file.report_s, DURATION_S_MAX))?;
    if file.duration_s / file.report_s > REPORTS_MAX {
        let what = format!("{} reports in a run", file.duration_s / file.report_s);
        let remedy = format!("take at most {REPORTS_MAX}: a shorter duration_s, a longer report_s");
        return Err(lines.error(("", 0, "duration_s"), what, remedy));
    }
    let guests = file.vm.len().max(file.generate.as_ref().map_or(0, |part| part.vms));
    if guests as f64 * file.duration_s / file.report_s > WORK_MAX {
        let what = format!("{guests} guests for {} s", file.duration_s);
        return Err(lines.error(("", 0, "duration_s"), what, "take fewer guests or less time"));
    }
    lines.between(("", 0, "seeds"), file.seeds as f64, (1.0, 1000.0))?;
    let cores = file.engine.cores_per_gbit;
    lines.between(("engine", 0, "cores_per_gbit"), cores, (0.0, 1000.0))?;
    lines.between(("limits", 0, "link_mbit"), file.limits.link_mbit, (0.1, FIGURE_MAX))?;
    let step_mib = file.limits.memory_step_mib;
    lines.between(("limits", 0, "memory_step_mib"), step_mib, (0.1, FIGURE_MAX))?;
    let settings = |table: &str, result: Result<(), crate::detect::SettingsError>| {
        result.map_err(|error| {
            let what = format!("`{} = {}` cannot be", error.key, error.value);
            let (table, key) = match error.key.rsplit_once('.') {
                Some((part, key)) => (format!("{table}.{part}"), key),
                None => (table.to_owned(), error.key),
            };
            // Where only `k` is written, that is what is wrong with `n`.
            let is_written = |key| lines.of(&table, 0, key) != lines.of(&table, 0, "");
            let key = if key == "n" && !is_written(key) { "k" } else { key };
            lines.error((&table, 0, key), what, error.remedy)
        })
    };
    settings("detect", file.detect.check())?;
    settings("provision", file.provision.check())?;
    match (&file.generate, file.host.is_empty()) {
        (Some(part), true) if file.vm.is_empty() => generate(lines, part, file.duration_s),
        (Some(_), _) => {
            let what = "There are hosts or guests beside [generate]";
            Err(lines.error(("generate", 0, ""), what, "leave one of both out"))
        }
        (None, true) => {
            let remedy = "add [[host]] and [[vm]] tables, or [generate]";
            Err(lines.error(("", 0, ""), "There is no host", remedy))
        }
        (None, false) => Ok(()),
    }
}

fn names<'a>(
    lines: &Lines<'_>,
    table: &str,
    names: impl Iterator<Item = &'a str>,
) -> Result<HashMap<&'a str, usize>, ScenarioError> {
    let mut known = HashMap::new();
    for (at, name) in names.enumerate() {
        if name.trim().is_empty() {
            return Err(lines.error((table, at, "name"), "An empty name", "name it"));
        }
        if known.insert(name, at).is_some() {
            let what = format!("A second {table} {name}");
            return Err(lines.error((table, at, "name"), what, "give it a name of its own"));
        }
        if at >= GUESTS_MAX {
            let what = format!("More than {GUESTS_MAX} of [[{table}]]");
            return Err(lines.error((table, at, "name"), what, "take fewer"));
        }
    }
    Ok(known)
}

fn known<'a>(
    lines: &Lines<'_>,
    place: (&str, usize, &str),
    vms: &HashMap<&str, usize>,
    said: impl IntoIterator<Item = &'a String>,
) -> Result<(), ScenarioError> {
    for name in said {
        if !vms.contains_key(name.as_str()) {
            let what = format!("There is no guest {name}");
            return Err(lines.error(place, what, "name one of the file's [[vm]]s"));
        }
    }
    Ok(())
}

fn host(lines: &Lines<'_>, at: usize, part: &HostPart) -> Result<(), ScenarioError> {
    for (key, value) in [
        ("cpu_cores", part.cpu_cores),
        ("memory_mib", part.memory_mib),
        ("network_mbit", part.network_mbit),
        ("receive_mbit", part.receive_mbit),
        ("disk_mib", part.disk_mib),
        ("own_cpu_cores", part.own_cpu_cores),
        ("own_memory_mib", part.own_memory_mib),
    ] {
        if let Some(value) = value {
            lines.between(("host", at, key), value, (0.0, FIGURE_MAX))?;
        }
    }
    Ok(())
}

fn vm(lines: &Lines<'_>, at: usize, part: &VmPart) -> Result<(), ScenarioError> {
    let figure = |key, value| lines.between(("vm", at, key), value, (0.0, FIGURE_MAX));
    lines.between(("vm", at, "vcpus"), part.vcpus.into(), (1.0, 1024.0))?;
    lines.between(("vm", at, "noise"), part.noise, (0.0, 1.0))?;
    figure("memory_mib", part.memory_mib)?;
    figure("cache_mib", part.cache_mib)?;
    figure("dirty_mib_per_s", part.dirty_mib_per_s)?;
    for (key, value) in [
        ("max_mib", part.max_mib),
        ("reserve_mib", part.reserve_mib),
        ("needs_mib", part.needs_mib),
    ] {
        figure(key, value.unwrap_or(0.0))?;
    }
    if part.max_mib.is_some_and(|max_mib| max_mib < part.memory_mib) {
        let what = format!("Guest {} has more memory than its max_mib", part.name);
        return Err(lines.error(
            ("vm", at, "max_mib"),
            what,
            "raise max_mib to memory_mib or more",
        ));
    }
    match part.work {
        Work::Web { sessions, .. } => figure("work", sessions)?,
        Work::Bulk { .. } => {}
        Work::Plain { cpu_cores, outside_mbit, disk_mib, users } => {
            for value in [cpu_cores, outside_mbit, disk_mib, users] {
                figure("work", value)?;
            }
        }
    }
    for (key, steps) in [("levels", &part.levels), ("needs", &part.needs)] {
        for (at_s, value) in steps {
            figure(key, *at_s)?;
            figure(key, *value)?;
        }
        if steps.windows(2).any(|pair| matches!(pair, [one, other] if one.0 >= other.0)) {
            let what = format!("`{key}` of {} goes back in time", part.name);
            return Err(lines.error(("vm", at, key), what, "put the later steps behind"));
        }
    }
    Ok(())
}

fn generate(lines: &Lines<'_>, part: &GeneratePart, duration_s: f64) -> Result<(), ScenarioError> {
    let place = |key| ("generate", 0, key);
    lines.between(place("hosts"), part.hosts as f64, (1.0, 20_000.0))?;
    lines.between(place("vms"), part.vms as f64, (0.0, GUESTS_MAX as f64))?;
    lines.between(place("vms"), part.vms as f64, (0.0, part.hosts as f64 * 14.0))?;
    lines.between(place("group_size_max"), part.group_size_max as f64, (2.0, 64.0))?;
    for (key, value, most) in [
        ("cpu_share", part.cpu_share, 5.0),
        ("grouped", part.grouped, 1.0),
        ("together", part.together, 1.0),
        ("talk_mbit", part.talk_mbit, 1e6),
        ("daily", part.daily, 1.0),
        ("noise", part.noise, 1.0),
        ("bursts_per_day", part.bursts_per_day, 2000.0),
        ("burst_s_max", part.burst_s_max, 1e6),
        ("crowds_per_day", part.crowds_per_day, 1e5),
        ("memory_grows", part.memory_grows, 1.0),
    ] {
        lines.between(place(key), value, (0.0, most))?;
    }
    lines.between(place("burst_factor_max"), part.burst_factor_max, (1.0, 1000.0))?;
    lines.between(place("crowd_factor"), part.crowd_factor, (1.0, 1000.0))?;
    let days = duration_s / 86_400.0;
    let bursts = part.vms as f64 * part.bursts_per_day * days;
    let crowds = part.crowds_per_day * part.group_size_max as f64 * days;
    if bursts + crowds > SURGES_MAX {
        let what = format!("{:.0} bursts and crowds", bursts + crowds);
        return Err(lines.error(place("bursts_per_day"), what, "take fewer, or less time"));
    }
    Ok(())
}

/// Guests' memory fits their hosts.
fn fits(file: &File, lines: &Lines<'_>, hosts: &HashMap<&str, usize>) -> Result<(), ScenarioError> {
    let mut left: Vec<f64> = file
        .host
        .iter()
        .map(super::build::machine)
        .map(|machine| machine.capacity.memory_mib - machine.own.memory_mib)
        .collect();
    for (at, vm) in file.vm.iter().enumerate() {
        let room = hosts.get(vm.host.as_str()).and_then(|host| left.get_mut(*host));
        let Some(room) = room else { continue };
        *room -= vm.memory_mib;
        if *room < 0.0 {
            let what = format!("Host {} has too little memory for {}", vm.host, vm.name);
            let remedy = format!("give the host {:.0} MiB more, or its guests less", -*room);
            return Err(lines.error(("vm", at, "memory_mib"), what, remedy));
        }
    }
    Ok(())
}
