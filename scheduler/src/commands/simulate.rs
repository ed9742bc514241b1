//! `godwit-scheduler simulate`.

use std::ops::Range;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, bail, ensure};
use scheduler::plan::{self, NAMES};
use scheduler::simulate::{Outcome, Scenario, Verdict};
use serde::Serialize;

use super::kept::{Kept, Store, fingerprint};
use super::summary::{Summary, ratios, table};
use super::timed::Timed;
use super::{plot, story};
use crate::args::SimulateArgs;

/// Largest file that is read.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Printed<'a> {
    v: u32,
    about: &'a str,
    duration_s: f64,
    hosts: usize,
    vms: usize,
    summary: &'a [Summary],
    expected: &'a [Verdict],
    runs: &'a [Kept],
    /// What was decided, for the first seed.
    first: &'a [Outcome],
}

/// Runs it.
pub(crate) fn run(args: &SimulateArgs) -> ExitCode {
    match simulate(args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether everything came out that the file expects.
fn simulate(args: &SimulateArgs) -> Result<bool> {
    let (scenario, fingerprint) = read(&args.file)?;
    let names = policies(args, &scenario)?;
    let count = args.seeds.unwrap_or_else(|| scenario.seeds());
    let seeds = args.first_seed..args.first_seed + count;
    let store = Mutex::new(Store::open(args.runs.as_deref(), &fingerprint)?);
    let todo = Todo { scenario: &scenario, fingerprint: &fingerprint, store: &store };
    let (runs, first) = todo.run(&names, &seeds, jobs(args))?;
    let summary: Vec<_> = names.iter().map(|name| Summary::of(name, &runs)).collect();
    let expected = scenario.judge(&first);
    if let Some(path) = &args.svg {
        let text = plot::plot(scenario.about(), &names, &runs, scenario.report_s());
        std::fs::write(path, text).with_context(|| format!("Cannot write {}", path.display()))?;
    }
    if args.json {
        let (hosts, vms) = scenario.size();
        let printed = Printed {
            v: 1,
            about: scenario.about(),
            duration_s: scenario.duration_s(),
            hosts,
            vms,
            summary: &summary,
            expected: &expected,
            runs: &runs,
            first: &first,
        };
        println!("{}", serde_json::to_string(&printed).context("Cannot write JSON")?);
    } else {
        tell(&scenario, count, &summary, &expected);
        if args.explain {
            let report_s = scenario.report_s();
            let period_s = args.at.map(|at_s| (at_s - report_s / 2.0, at_s + report_s / 2.0));
            first.iter().for_each(|outcome| print!("\n{}", story::story(outcome, period_s)));
        }
    }
    Ok(expected.iter().all(|verdict| verdict.holds))
}

fn read(path: &Path) -> Result<(Scenario, String)> {
    let cannot = || format!("Cannot read {}", path.display());
    let bytes = std::fs::metadata(path).with_context(cannot)?.len();
    ensure!(bytes <= FILE_BYTES_MAX, "{} has {bytes} bytes: too many", path.display());
    let text = std::fs::read_to_string(path).with_context(cannot)?;
    let scenario = Scenario::parse(&text);
    let scenario = scenario.with_context(|| format!("{} is no scenario", path.display()))?;
    Ok((scenario, fingerprint(&text)))
}

/// The policies to run, each once.
fn policies(args: &SimulateArgs, scenario: &Scenario) -> Result<Vec<String>> {
    let mut names =
        if args.policies.is_empty() { scenario.policies() } else { &args.policies }.to_vec();
    if names.is_empty() {
        names = NAMES.iter().map(|&name| name.to_owned()).collect();
    }
    for name in &names {
        if plan::policy(name).is_none() {
            bail!("There is no policy {name}; take one of {}", NAMES.join(", "));
        }
    }
    let mut known = vec![];
    names.retain(|name| {
        !known.contains(name) && {
            known.push(name.clone());
            true
        }
    });
    Ok(names)
}

fn jobs(args: &SimulateArgs) -> usize {
    args.jobs.map_or_else(
        || std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        usize::from,
    )
}

/// What is to be run.
struct Todo<'a> {
    scenario: &'a Scenario,
    fingerprint: &'a str,
    store: &'a Mutex<Store>,
}

/// A run, and what was decided if it is of the first seed and was not known.
type Done = (Kept, Option<Outcome>);

impl Todo<'_> {
    /// All runs: policy by policy, seed by seed.
    fn run(
        &self,
        names: &[String],
        seeds: &Range<u64>,
        jobs: usize,
    ) -> Result<(Vec<Kept>, Vec<Outcome>)> {
        let of = |name| seeds.clone().map(move |seed| (name, seed));
        let todo: Vec<(&String, u64)> = names.iter().flat_map(of).collect();
        let next = AtomicUsize::new(0);
        let done: Mutex<Vec<(usize, Result<Done>)>> = Mutex::default();
        std::thread::scope(|scope| {
            for _ in 0..jobs.min(todo.len()) {
                scope.spawn(|| {
                    while let Some((at, (name, seed))) = {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        todo.get(at).map(|item| (at, *item))
                    } {
                        let run = self.one(name, seed, seed == seeds.start);
                        done.lock().unwrap_or_else(PoisonError::into_inner).push((at, run));
                    }
                });
            }
        });
        let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        done.sort_by_key(|(at, _)| *at);
        ensure!(done.len() == todo.len(), "A run ended early");
        let done: Vec<Done> = done.into_iter().map(|(_, run)| run).collect::<Result<_>>()?;
        let (runs, first): (Vec<_>, Vec<_>) = done.into_iter().unzip();
        Ok((runs, first.into_iter().flatten().collect()))
    }

    /// A run, or what was kept of it.
    fn one(&self, name: &str, seed: u64, is_first: bool) -> Result<Done> {
        let store = || self.store.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = store().find(name, seed) {
            return Ok((known.clone(), None));
        }
        let timed = Timed::new(plan::policy(name).context("There is no such policy")?);
        let outcome = self.scenario.run(&timed, seed);
        let run = Kept::of(self.fingerprint, &outcome, timed.timing(), is_first);
        store().add(&run)?;
        Ok((run, is_first.then_some(outcome)))
    }
}

fn tell(scenario: &Scenario, seeds: u64, summary: &[Summary], expected: &[Verdict]) {
    let (hosts, vms) = scenario.size();
    println!("{}", scenario.about());
    println!(
        "{hosts} hosts, {vms} guests, {} s, {seeds} seed{}; sums and means over all seeds\n",
        scenario.duration_s(),
        if seeds == 1 { "" } else { "s" }
    );
    print!("{}", table(summary));
    if let Some(text) = ratios(summary) {
        print!("\nAgainst the best other policy (that with the fewest overload-seconds):\n{text}");
    }
    if !expected.is_empty() {
        println!("\nExpected:");
    }
    for verdict in expected {
        let mark = if verdict.holds { "yes" } else { "NO " };
        println!("  {mark}  {}: {}", verdict.expected, verdict.found);
    }
}
