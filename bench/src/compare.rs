//! `bench compare`: scenarios one after the other, the modes of each in turns.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::args::CompareArgs;
use crate::driver::{DriveOptions, measure};
use crate::record::{Log, Migration, Outcome, Record};
use crate::scenario::{self, ModePlan, Scenario};
use crate::table::number;
use crate::testbed::{Bed, GuestPlan, Link};
use crate::{interrupt, report};

/// Measures, records, and prints tables.
///
/// # Errors
/// A scenario is not right, the testbed does not work, or an interruption; what was measured is
/// recorded.
pub(crate) fn run(args: &CompareArgs) -> Result<()> {
    let runs = runs(args)?;
    let mut first = Ok(());
    for (name, scenario) in &runs {
        if interrupt::is_asked() {
            break;
        }
        let done = one(args, name, scenario);
        if let Err(error) = &done
            && runs.len() > 1
        {
            // The others still have their turn.
            eprintln!("{name}: {error:#}");
        }
        first = first.and(done);
    }
    let shown = report::page(&args.common.out);
    first.and(shown)
}

/// The scenarios with the names of their results.
fn runs(args: &CompareArgs) -> Result<Vec<(String, Scenario)>> {
    let wanted: Vec<&String> = args.scenarios.iter().chain(&args.workload).collect();
    ensure!(
        !wanted.is_empty(),
        "Name a scenario by --scenario; there are {}",
        scenario::names()?.join(", ")
    );
    ensure!(
        wanted.len() == 1 || args.common.name.is_none(),
        "--name is for one scenario; several are called by their own names"
    );
    let load = |wanted: &&String| {
        let scenario = Scenario::load(wanted)?.with(&args.overrides())?;
        let usual = match args.workload {
            Some(_) => format!("compare-{}", scenario.name),
            None => scenario.name.clone(),
        };
        Ok((args.common.name.clone().unwrap_or(usual), scenario))
    };
    let runs: Vec<(String, Scenario)> = wanted.iter().map(load).collect::<Result<_>>()?;
    let mut names = BTreeSet::new();
    for (name, _) in &runs {
        ensure!(names.insert(name), "Two scenarios would write their results to {name}.jsonl");
    }
    Ok(runs)
}

fn one(args: &CompareArgs, name: &str, scenario: &Scenario) -> Result<()> {
    eprintln!("{name}: {}", scenario.about);
    let qemu = scenario.guest.qemu_kind()?;
    let bed = Bed::open(qemu)?;
    let plan = GuestPlan {
        name: scenario.name.clone(),
        qemu,
        memory_mib: scenario.guest.memory_mib,
        smp: scenario.guest.smp,
        workload: scenario.workload.clone(),
        is_private: scenario.guest.is_private,
    };
    let options = DriveOptions {
        touch_mib: scenario.run.touch_mib,
        limit: Duration::from_secs(scenario.run.limit_s),
        channels: scenario.modes.channels,
        send_args: args.common.send_args.clone(),
        split: scenario.split.clone(),
    };
    let mut log = Log::create(&args.common.out, name, bed.host.clone())?;
    log.add(Record::Scenario { scenario: Box::new(scenario.clone()) })?;
    let measured = turns(&bed, &plan, &options, scenario, &mut log);
    // What there is, is shown in any case.
    let shown = report::render(log.path());
    measured?;
    shown
}

fn turns(
    bed: &Bed,
    plan: &GuestPlan,
    options: &DriveOptions,
    scenario: &Scenario,
    log: &mut Log,
) -> Result<()> {
    let link = match &scenario.split {
        Some(part) => Link::split(&scenario.link, part.servers)?,
        None => Link::veth(&scenario.link)?,
    };
    let modes = scenario.modes.plans();
    for turn in 0..scenario.run.repeats {
        for mode in order(&modes, turn) {
            let one = measure(bed, &link, plan, mode, turn, options)?;
            say(&one, scenario.run.repeats);
            log.add(Record::Migration(Box::new(one)))?;
        }
    }
    Ok(())
}

/// Each turn begins with another mode, so that none always follows the same one.
fn order(modes: &[ModePlan], turn: u32) -> Vec<&ModePlan> {
    let mut modes: Vec<&ModePlan> = modes.iter().collect();
    let by = turn as usize % modes.len().max(1);
    modes.rotate_left(by);
    modes
}

/// One line on stderr.
pub(crate) fn say(one: &Migration, turns: u32) {
    let shown = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), number);
    eprintln!(
        "turn {}/{turns} {:<17} {:<8} outage {:>7} ms, total {:>7} ms, wire {:>7} MiB ({} of the \
         compulsory), load {}{}",
        one.turn + 1,
        one.mode,
        one.link,
        shown(one.outage_ms),
        number(one.total_ms),
        number(one.wire_bytes() / f64::from(1 << 20)),
        shown(one.wire_per_compulsory()),
        number(one.load1),
        match one.outcome {
            Outcome::Completed => String::new(),
            _ => format!("\n  {:?}: {}", one.outcome, one.error.as_deref().unwrap_or("?")),
        }
    );
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::Cli;
    use crate::mode::Mode;

    #[test]
    fn every_turn_has_every_mode_once_and_another_first() {
        let modes = [Mode::Godwit, Mode::PreCopy, Mode::PostCopy].map(ModePlan::of);
        let names = |turn| order(&modes, turn).iter().map(|one| one.name.clone()).collect();
        let firsts: Vec<String> = (0..3).map(|turn| order(&modes, turn)[0].name.clone()).collect();
        assert_eq!(firsts, ["godwit", "pre-copy", "post-copy"]);
        for turn in 0..7 {
            let mut sorted: Vec<String> = names(turn);
            sorted.sort();
            assert_eq!(sorted, ["godwit", "post-copy", "pre-copy"]);
        }
    }

    #[test]
    fn results_are_called_as_asked() {
        let names = |words: &[&str]| -> Result<Vec<String>> {
            let cli = Cli::parse_from([&["bench"], words].concat());
            Ok(runs(&cli.compare)?.into_iter().map(|(name, _)| name).collect())
        };
        let two = ["--scenario", "idle", "--scenario", "writer"];
        assert_eq!(names(&two).unwrap(), ["idle", "writer"]);
        assert_eq!(names(&["--workload", "text"]).unwrap(), ["compare-text"]);
        assert_eq!(names(&["--scenario", "idle", "--name", "x"]).unwrap(), ["x"]);
        assert!(names(&[&two[..], &["--name", "x"]].concat()).is_err());
        assert!(names(&[&two[..], &two[..]].concat()).is_err());
        assert!(names(&[]).unwrap_err().to_string().contains("writer-text"));
    }
}
