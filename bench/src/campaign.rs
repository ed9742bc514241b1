//! `bench targets`: all that judges a target, one after the other, and one table of it.
//!
//! ```text
//!  scenarios with targets ─┐
//!  attach, throughput ─────┴─► parts ── each by its own command ──► NAME.jsonl ──► one table
//! ```
//!
//! Invariant: a part that fails keeps no other from its turn, and a target is judged only by a record that
//! is whole: of this run or, under `--only-missing`, of an earlier one.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser as _;

use crate::args::{Cli, Command, TargetsArgs};
use crate::record::{Outcome, Record, Recorded, read};
use crate::scenario::{self, Overrides, Scenario};
use crate::targets::{self, Target};
use crate::{attach, compare, interrupt, report, throughput};

/// Times that is attached: seconds, so that `--repeats` does not count here.
const ATTACHES: u32 = 40;

/// Turns of the plain transfer and Godwit without `--repeats`.
const THROUGHPUT_TURNS: u32 = 5;

/// Migrations in a turn of `throughput`: over loopback and over a veth.
const THROUGHPUT_LINKS: u32 = 2;

/// What a part measures.
#[derive(Debug, Clone)]
enum Work {
    Scenario(Box<Scenario>),
    /// Times.
    Attach(u32),
    /// Turns.
    Throughput(u32),
}

/// What one command measures.
#[derive(Debug, Clone)]
struct Part {
    name: String,
    work: Work,
}

/// How a part ended.
#[derive(Debug)]
enum State {
    Measured,
    /// It was left out, since an earlier run has recorded it.
    Recorded,
    Failed(String),
    /// An interruption came before.
    NotBegun,
}

/// Measures, and prints one table of all targets.
///
/// # Errors
/// A part that nobody knows; or, after all the others, that a part failed or an interruption.
pub(crate) fn run(args: &TargetsArgs) -> Result<()> {
    let parts = parts(args)?;
    let with_left_out = |part: Part| {
        let is_left_out = args.only_missing && part.is_recorded(&args.out);
        (part, is_left_out)
    };
    let plan: Vec<(Part, bool)> = parts.into_iter().map(with_left_out).collect();
    eprint!("{}", announcement(&plan));
    let ended = in_turn(plan, interrupt::is_asked, |part| part.measure(&args.out));
    let judged = ended.iter().map(|(part, state)| judge(part, state, &args.out));
    let (targets, failures): (Vec<_>, Vec<_>) = judged.unzip();
    println!("{}", targets::table(&targets.concat()).markdown());
    let failures: Vec<String> = failures.into_iter().flatten().collect();
    let paged = report::page(&args.out);
    let (failed, of) = (failures.len(), ended.len());
    ensure!(failures.is_empty(), "{failed} of {of} failed: {}", failures.join("; "));
    paged
}

/// What is asked for, in its order.
fn parts(args: &TargetsArgs) -> Result<Vec<Part>> {
    let overrides = Overrides { repeats: args.repeats, ..Overrides::default() };
    let mut parts = vec![];
    for name in scenario::names()? {
        let scenario = Scenario::load(&name)?;
        if !scenario.targets.is_empty() {
            let work = Work::Scenario(Box::new(scenario.with(&overrides)?));
            parts.push(Part { name, work });
        }
    }
    let turns = args.repeats.unwrap_or(THROUGHPUT_TURNS);
    for (name, work) in
        [("attach", Work::Attach(ATTACHES)), ("throughput", Work::Throughput(turns))]
    {
        parts.push(Part { name: name.to_owned(), work });
    }
    for wanted in &args.scenarios {
        if !parts.iter().any(|part| part.name == *wanted) {
            let names: Vec<&str> = parts.iter().map(|part| part.name.as_str()).collect();
            bail!("Nothing with targets is called {wanted:?}; there are {}", names.join(", "));
        }
    }
    parts.retain(|part| args.scenarios.is_empty() || args.scenarios.contains(&part.name));
    Ok(parts)
}

/// What will run, in words.
fn announcement(plan: &[(Part, bool)]) -> String {
    let line = |part: &Part| format!("  {:<24} {}\n", part.name, part.shown());
    let lines = |left_out: bool| {
        plan.iter()
            .filter(move |(_, out)| *out == left_out)
            .map(|(part, _)| line(part))
            .collect::<String>()
    };
    let (to_run, left_out) = (lines(false), lines(true));
    let mut text = String::new();
    if !left_out.is_empty() {
        text.push_str(&format!("Recorded already, and left out:\n{left_out}"));
    }
    if to_run.is_empty() {
        text.push_str("Nothing is left to measure\n");
    } else {
        text.push_str(&format!(
            "To be measured, one after the other (Ctrl-C ends that; --only-missing goes on later):\n{to_run}"
        ));
    }
    text
}

/// Gives every part its turn until somebody interrupts.
fn in_turn(
    plan: Vec<(Part, bool)>,
    is_interrupted: impl Fn() -> bool,
    mut measure: impl FnMut(&Part) -> Result<()>,
) -> Vec<(Part, State)> {
    let one = |(part, is_left_out): (Part, bool)| {
        let state = if is_left_out {
            State::Recorded
        } else if is_interrupted() {
            State::NotBegun
        } else {
            eprintln!("== {}", part.name);
            match measure(&part) {
                Ok(()) => State::Measured,
                Err(error) => {
                    eprintln!("{}: {error:#}", part.name);
                    State::Failed(error.to_string())
                }
            }
        };
        (part, state)
    };
    plan.into_iter().map(one).collect()
}

/// The rows of a part, and what to say of it if it failed.
fn judge(part: &Part, state: &State, out: &Path) -> (Vec<Target>, Option<String>) {
    let row =
        |found: String| Target { what: part.name.clone(), bound: "-".into(), found, met: None };
    let failed = |why: &str| {
        let why = why.lines().next().unwrap_or_default();
        (vec![row(format!("failed: {why}"))], Some(format!("{}: {why}", part.name)))
    };
    match state {
        State::NotBegun => {
            (vec![row("not measured".into())], Some(format!("{}: interrupted before", part.name)))
        }
        State::Failed(why) => failed(why),
        State::Measured | State::Recorded => match read(&part.path(out)) {
            Err(error) => failed(&error.to_string()),
            Ok(recorded) => {
                let mut targets = report::judged(&recorded);
                for target in &mut targets {
                    target.what = format!("{}: {}", part.name, target.what);
                }
                if targets.is_empty() {
                    targets.push(row(format!("no target; see {}.md", part.name)));
                }
                let failures = failures(&recorded);
                let said = format!("{}: {failures} migrations", part.name);
                (targets, (failures > 0).then_some(said))
            }
        },
    }
}

/// Migrations that failed; those that did not converge did what is measured.
fn failures(recorded: &Recorded) -> usize {
    count(
        recorded,
        |record| matches!(record, Record::Migration(one) if one.outcome == Outcome::Failed),
    )
}

fn count(recorded: &Recorded, is_meant: impl Fn(&Record) -> bool) -> usize {
    recorded.records.iter().filter(|record| is_meant(record)).count()
}

impl Part {
    /// Words of the command line.
    fn words(&self) -> Vec<String> {
        let words: &[&str] = match &self.work {
            Work::Scenario(_) => &["compare", "--scenario", &self.name, "--repeats"],
            Work::Attach(_) => &["attach", "--count"],
            Work::Throughput(_) => &["throughput", "--veth", "--repeats"],
        };
        let times = match &self.work {
            Work::Scenario(scenario) => scenario.run.repeats,
            Work::Attach(times) | Work::Throughput(times) => *times,
        };
        words.iter().map(|&word| word.to_owned()).chain([times.to_string()]).collect()
    }

    /// In words.
    fn shown(&self) -> String {
        match &self.work {
            Work::Scenario(scenario) => {
                let modes = scenario.modes.plans().len();
                format!("{:>2} x {modes} migrations: {}", scenario.run.repeats, scenario.about)
            }
            Work::Attach(times) => format!("{times} times, and a migration"),
            Work::Throughput(turns) => {
                format!(
                    "{turns} plain transfers, {} migrations, unshaped",
                    turns * THROUGHPUT_LINKS
                )
            }
        }
    }

    fn path(&self, out: &Path) -> PathBuf {
        out.join(format!("{}.jsonl", self.name))
    }

    /// Does what its own command does.
    fn measure(&self, out: &Path) -> Result<()> {
        let out = out.to_str().context("The folder for the results has no name in UTF-8")?;
        let (words, out) = (self.words(), ["--out", out].map(str::to_owned));
        let words = ["bench".to_owned()].into_iter().chain(words).chain(out);
        match Cli::try_parse_from(words)?.command {
            Some(Command::Compare(args)) => compare::run(&args),
            Some(Command::Attach(args)) => attach::run(&args),
            Some(Command::Throughput(args)) => throughput::run(&args),
            other => bail!("{other:?} is no measurement of a target"),
        }
    }

    /// Whether an earlier run has recorded all of it, and no migration failed.
    fn is_recorded(&self, out: &Path) -> bool {
        read(&self.path(out)).is_ok_and(|recorded| self.is_whole(&recorded))
    }

    fn is_whole(&self, recorded: &Recorded) -> bool {
        let at_least = |times: u32, is_meant: &dyn Fn(&Record) -> bool| {
            count(recorded, is_meant) >= times as usize
        };
        let is_moved = |record: &Record| matches!(record, Record::Migration(_));
        let has_all = match &self.work {
            Work::Scenario(wanted) => {
                let is_same = |record: &Record| matches!(record, Record::Scenario { scenario } if scenario == wanted);
                let of = |mode: &str| {
                    at_least(
                        wanted.run.repeats,
                        &|record| matches!(record, Record::Migration(one) if one.mode == mode),
                    )
                };
                at_least(1, &is_same) && wanted.modes.plans().iter().all(|plan| of(&plan.name))
            }
            Work::Attach(times) => {
                at_least(*times, &|record| matches!(record, Record::Attach(_)))
                    && at_least(1, &is_moved)
            }
            Work::Throughput(turns) => {
                at_least(*turns, &|record| matches!(record, Record::Bulk(_)))
                    && at_least(turns * THROUGHPUT_LINKS, &is_moved)
            }
        };
        has_all && failures(recorded) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Log;
    use crate::record::samples::{host, migration};

    fn args(words: &[&str]) -> TargetsArgs {
        let words = [&["bench", "targets"], words].concat();
        match Cli::try_parse_from(words).unwrap().command {
            Some(Command::Targets(args)) => args,
            other => panic!("{other:?}"),
        }
    }

    fn names(parts: &[Part]) -> Vec<&str> {
        parts.iter().map(|part| part.name.as_str()).collect()
    }

    fn plan(words: &[&str]) -> Vec<(Part, bool)> {
        parts(&args(words)).unwrap().into_iter().map(|part| (part, false)).collect()
    }

    /// Records the scenario with a migration of each mode and turn.
    fn record(out: &Path, part: &Part, outcome: Outcome) {
        let Work::Scenario(scenario) = &part.work else { panic!("{part:?}") };
        let mut log = Log::create(out, &part.name, host()).unwrap();
        log.add(Record::Scenario { scenario: scenario.clone() }).unwrap();
        for turn in 0..scenario.run.repeats {
            for mode in scenario.modes.plans() {
                let mut one = migration(mode.by, turn, 25.0, 900.0);
                (one.mode, one.outcome) = (mode.name, outcome);
                log.add(Record::Migration(Box::new(one))).unwrap();
            }
        }
    }

    #[test]
    fn all_that_has_targets_runs_and_what_has_no_scenario_last() {
        let parts = parts(&args(&[])).unwrap();
        let names = names(&parts);
        for wanted in ["idle", "writer-text-100m", "faults", "ablation", "ablation-100m"] {
            assert!(names.contains(&wanted), "{wanted} in {names:?}");
        }
        assert!(!names.contains(&"text"), "it has no targets");
        assert_eq!(names[names.len() - 2..], ["attach", "throughput"]);
        for part in &parts {
            let words = [vec!["bench".to_owned()], part.words()].concat();
            assert!(Cli::try_parse_from(&words).is_ok(), "{words:?}");
        }
    }

    #[test]
    fn some_may_be_named_and_others_are_refused() {
        let some = ["--scenario", "throughput", "--scenario", "idle", "--repeats", "2"];
        let parts_of = |words: &[&str]| parts(&args(words));
        let some = parts_of(&some).unwrap();
        assert_eq!(names(&some), ["idle", "throughput"]);
        assert_eq!(some[0].words(), ["compare", "--scenario", "idle", "--repeats", "2"]);
        assert_eq!(some[1].words(), ["throughput", "--veth", "--repeats", "2"]);
        let error = parts_of(&["--scenario", "text"]).unwrap_err().to_string();
        assert!(error.contains("idle") && error.contains("attach"), "{error}");
    }

    #[test]
    fn a_failure_stops_nobody_else_and_an_interruption_the_rest() {
        let mut begun = vec![];
        let ended = in_turn(
            plan(&[]),
            || false,
            |part| {
                begun.push(part.name.clone());
                ensure!(part.name != "idle", "no guest");
                Ok(())
            },
        );
        assert_eq!(begun.len(), ended.len());
        let failed = |state: &State| matches!(state, State::Failed(why) if why == "no guest");
        assert_eq!(ended.iter().filter(|(_, state)| failed(state)).count(), 1);
        let interrupted = std::cell::Cell::new(false);
        let ended = in_turn(
            plan(&[]),
            || interrupted.get(),
            |_| {
                interrupted.set(true);
                Ok(())
            },
        );
        assert!(matches!(ended[0].1, State::Measured));
        assert!(ended[1..].iter().all(|(_, state)| matches!(state, State::NotBegun)));
    }

    #[test]
    fn what_is_recorded_whole_is_not_missing() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path();
        let idle = |words: &[&str]| {
            parts(&args(&[&["--scenario", "idle"], words].concat())).unwrap().remove(0)
        };
        assert!(!idle(&[]).is_recorded(out), "there is no record");
        let twice = idle(&["--repeats", "2"]);
        record(out, &twice, Outcome::Completed);
        assert!(twice.is_recorded(out));
        assert!(!idle(&["--repeats", "3"]).is_recorded(out), "more runs are wanted");
        let text = std::fs::read_to_string(twice.path(out)).unwrap();
        let (cut, _) = text.trim_end().rsplit_once('\n').unwrap();
        std::fs::write(twice.path(out), format!("{cut}\n")).unwrap();
        assert!(!twice.is_recorded(out), "the last run is missing");
        record(out, &twice, Outcome::Failed);
        assert!(!twice.is_recorded(out), "its runs failed");
    }

    #[test]
    fn the_table_has_a_row_for_every_target_and_for_what_could_not_be_judged() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path();
        let [idle, ablation] = ["idle", "ablation"]
            .map(|name| parts(&args(&["--scenario", name, "--repeats", "1"])).unwrap().remove(0));
        record(out, &idle, Outcome::Completed);
        record(out, &ablation, Outcome::Failed);
        let (targets, failure) = judge(&idle, &State::Measured, out);
        assert_eq!(failure, None);
        let text = targets::table(&targets).markdown();
        assert!(text.contains("| idle: outage, ms, median") && text.contains("yes |"), "{text}");
        let (targets, failure) = judge(&ablation, &State::Recorded, out);
        let is_unknown = |one: &Target| one.met.is_none() && one.found == "not measured";
        assert!(targets.len() > 1 && targets.iter().all(is_unknown), "{targets:?}");
        assert_eq!(failure.as_deref(), Some("ablation: 7 migrations"));
        for (state, found) in [
            (State::Failed("no guest\nat all".into()), "failed: no guest"),
            (State::NotBegun, "not measured"),
        ] {
            let (targets, failure) = judge(&idle, &state, out);
            assert_eq!(
                (targets.len(), targets[0].found.as_str()),
                (1, found),
                "not by an old record"
            );
            assert!(failure.is_some());
        }
    }

    #[test]
    fn what_will_run_is_said_before() {
        let mut plan = plan(&["--scenario", "idle", "--scenario", "attach"]);
        let text = announcement(&plan);
        assert!(
            text.contains("To be measured") && text.contains("An idle guest of 2 GiB"),
            "{text}"
        );
        assert!(text.contains("attach") && !text.contains("Recorded already"), "{text}");
        plan.iter_mut().for_each(|(_, left_out)| *left_out = true);
        let text = announcement(&plan);
        assert!(text.starts_with("Recorded already") && text.contains("Nothing is left"), "{text}");
    }
}
