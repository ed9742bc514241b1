//! `godwit-scheduler simulate`.

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, bail, ensure};
use scheduler::plan::{self, NAMES};
use scheduler::simulate::{Outcome, Scenario, Verdict};
use serde::Serialize;

use super::summary::{Summary, ratios, table};
use super::timed::{Timed, Timing};
use super::{plot, story};
use crate::args::SimulateArgs;

/// Largest file that is read.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// A run and what its decisions took.
#[derive(Debug, Serialize)]
pub(super) struct Done {
    #[serde(flatten)]
    pub(super) outcome: Outcome,
    pub(super) decide: Timing,
}

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
    runs: &'a [Done],
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
    let scenario = read(&args.file)?;
    let names = policies(args, &scenario)?;
    let seeds = args.seeds.unwrap_or_else(|| scenario.seeds());
    let runs = all(&scenario, &names, seeds, jobs(args))?;
    let summary: Vec<_> = names.iter().map(|name| Summary::of(name, &runs)).collect();
    let first: Vec<Outcome> = runs
        .iter()
        .filter(|done| done.outcome.seed == 1)
        .map(|done| done.outcome.clone())
        .collect();
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
        };
        println!("{}", serde_json::to_string(&printed).context("Cannot write JSON")?);
    } else {
        tell(&scenario, seeds, &summary, &expected);
        if args.explain {
            first.iter().for_each(|outcome| print!("\n{}", story::story(outcome)));
        }
    }
    Ok(expected.iter().all(|verdict| verdict.holds))
}

fn read(path: &Path) -> Result<Scenario> {
    let cannot = || format!("Cannot read {}", path.display());
    let bytes = std::fs::metadata(path).with_context(cannot)?.len();
    ensure!(bytes <= FILE_BYTES_MAX, "{} has {bytes} bytes: too many", path.display());
    let text = std::fs::read_to_string(path).with_context(cannot)?;
    Scenario::parse(&text).with_context(|| format!("{} is no scenario", path.display()))
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

/// All runs: policy by policy, seed by seed.
fn all(scenario: &Scenario, names: &[String], seeds: u64, jobs: usize) -> Result<Vec<Done>> {
    let todo: Vec<(&String, u64)> =
        names.iter().flat_map(|name| (1..=seeds).map(move |seed| (name, seed))).collect();
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(usize, Done)>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..jobs.min(todo.len()) {
            scope.spawn(|| {
                while let Some((at, (name, seed))) = {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    todo.get(at).map(|item| (at, *item))
                } {
                    let Some(policy) = plan::policy(name) else { continue };
                    let timed = Timed::new(policy);
                    let outcome = scenario.run(&timed, seed);
                    let run = Done { outcome, decide: timed.timing() };
                    done.lock().unwrap_or_else(PoisonError::into_inner).push((at, run));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(at, _)| *at);
    ensure!(done.len() == todo.len(), "A run ended early");
    Ok(done.into_iter().map(|(_, run)| run).collect())
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
