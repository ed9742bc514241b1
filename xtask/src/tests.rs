//! `test`: all tests, and one true line with their number at the end.
//!
//! Tests with guests (`framework`, `e2e`): the tests of a program run one at a time, and as many programs side by side as
//! there are cores, four at most. Guests boot and tests wait most of the time. Those that measure how busy processors are
//! run alone after them. What a program says is shown when it has ended. All others run as cargo likes.
//!
//! A test with guests that failed is run once more when nothing else runs, if they are few: on a machine that boots and
//! moves guests with every core busy, one may miss its time. It passes if it does so then, and the end says which tests
//! needed that, so that one that keeps doing so is seen; what it said the first time is shown.
//!
//! Cargo is always asked for the whole workspace, and told by the names of programs what of it to build or run: another
//! choice of packages needs other features of what they depend on, and each such choice would compile all of that anew
//! and keep it. So test programs with guests have names that no other has.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use crate::run::{cargo, run, shown, step};
use crate::setup::{self, Environment};

/// Packages whose test programs start guests.
const WITH_GUESTS: [&str; 2] = ["tests/framework", "tests/e2e"];

/// Packages with test programs that start none.
const WITHOUT_GUESTS: [&str; 5] =
    ["migrate-core", "transport", "qemu-glue", "qemu-glue/preload", "scheduler"];

/// Test programs that take minutes: they begin first, so that no long one is left for the end.
const LONG: [&str; 14] = [
    "moves",
    "faults",
    "split",
    "send_stream",
    "stream_postcopy",
    "disks",
    "split_leaves",
    "postcopy",
    "split_faults",
    "guests",
    "split_guests",
    "gateway_reconnect",
    "libvirt",
    "scheduler_kills",
];

/// Test programs in which it matters what else the machine does.
const ALONE: [&str; 2] = ["scheduler", "scheduler_cluster"];

/// Most programs with guests side by side: each takes gigabytes.
const SIDE_BY_SIDE_MAX: usize = 4;

/// Most tests that are run once more: if more fail, it is not for want of time.
const SECOND_LOOKS_MAX: usize = 3;

/// A thread of these that panicked.
const PANICKED: &str = "another program's thread panicked";

/// Sums over all test programs.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }

    /// Adds a line `test result: ok. 5 passed; 0 failed; 1 ignored; ...`; other lines change nothing.
    fn add_line(&mut self, line: &str) {
        let Some((_, rest)) =
            line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". "))
        else {
            return;
        };
        for part in rest.split(';') {
            let mut words = part.split_ascii_whitespace();
            let (Some(number), Some(word)) = (words.next(), words.next()) else { continue };
            let Ok(number) = number.parse::<u64>() else { continue };
            match word {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

/// Runs a test command, shows its output as it comes and counts; false if it failed.
fn tests(command: &mut Command, tally: &mut Tally) -> Result<bool> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("Cannot start `{}`", shown(command)))?;
    let stdout = child.stdout.take().context("No pipe from the tests")?;
    let mut terminal = std::io::stdout().lock();
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.context("Cannot read the tests' output")?;
        tally.add_line(&String::from_utf8_lossy(&line));
        // A closed pipe at our end is no reason to stop the tests.
        drop(terminal.write_all(&line).and_then(|()| terminal.write_all(b"\n")));
    }
    Ok(child.wait().context("Cannot wait for the tests")?.success())
}

/// A test program: the folder of its package, and its name.
type Program = (&'static str, String);

/// The test programs of these folders, those first that take long.
fn programs(root: &Path, packages: &[&'static str]) -> Result<VecDeque<Program>> {
    let mut found = vec![];
    for package in packages {
        let folder = root.join(package).join("tests");
        let files = std::fs::read_dir(&folder);
        for file in files.with_context(|| format!("No {}", folder.display()))? {
            let path = file.context("A folder cannot be read")?.path();
            let is_file = path.extension().is_some_and(|ending| ending == "rs");
            if (is_file || path.join("main.rs").exists())
                && let Some(name) = path.file_stem()
            {
                found.push((*package, name.to_string_lossy().into_owned()));
            }
        }
    }
    found.sort_by_key(|(_, name)| {
        let place = LONG.iter().position(|long| long == name);
        (place.unwrap_or(LONG.len()), name.clone())
    });
    Ok(found.into())
}

/// A test that failed.
#[derive(Debug, PartialEq, Eq)]
struct Failed {
    program: Program,
    test: String,
}

/// What programs with guests came to.
#[derive(Debug, Default)]
struct Outcome {
    tally: Tally,
    failed: Vec<Failed>,
    /// A program ended in a way that names no test.
    is_broken: bool,
}

impl Outcome {
    /// Adds a program that has ended, by what it wrote.
    fn add(&mut self, program: &Program, is_success: bool, said: &str) {
        said.lines().for_each(|line| self.tally.add_line(line));
        if !is_success {
            let failures = failures(said);
            self.is_broken |= failures.is_empty();
            self.failed
                .extend(failures.into_iter().map(|test| Failed { program: program.clone(), test }));
        }
    }
}

/// The names that a test program lists at its end, after its last `failures:`.
fn failures(said: &str) -> Vec<String> {
    let Some((_, list)) = said.rsplit_once("\nfailures:\n") else { return vec![] };
    list.lines().map_while(|line| line.strip_prefix("    ")).map(str::to_owned).collect()
}

/// Runs one program with guests and shows what it said.
fn guest_program(
    mut command: Command,
    program: &Program,
    filters: &[String],
    outcome: &Mutex<Outcome>,
) -> Result<()> {
    let (package, name) = program;
    command.args(["--test", name, "--", "--test-threads=1"]).args(filters);
    // Errors say what went wrong; where in a test they were made is some thirty lines each.
    command.env("RUST_LIB_BACKTRACE", "0");
    let began = Instant::now();
    let ended = command.output();
    let ended = ended.with_context(|| format!("Cannot start `{}`", shown(&command)))?;
    let mut outcome = outcome.lock().ok().context(PANICKED)?;
    show(&format!("{package} {name}"), &ended, began);
    outcome.add(program, ended.status.success(), &String::from_utf8_lossy(&ended.stdout));
    Ok(())
}

/// Runs all programs with guests, some side by side, and some tests that failed once more; false if one failed.
fn guest_tests(
    root: &Path,
    prepared: &(impl Fn() -> Command + Sync),
    filters: &[String],
    tally: &mut Tally,
) -> Result<bool> {
    let (alone, together): (VecDeque<Program>, VecDeque<Program>) = programs(root, &WITH_GUESTS)?
        .into_iter()
        .partition(|(_, name)| ALONE.contains(&name.as_str()));
    let outcome = Mutex::new(Outcome::default());
    let work = |left: &Mutex<VecDeque<Program>>| -> Result<()> {
        loop {
            let next = left.lock().ok().context(PANICKED)?.pop_front();
            let Some(program) = next else { return Ok(()) };
            guest_program(prepared(), &program, filters, &outcome)?;
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for (programs, workers) in [(together, cores.min(SIDE_BY_SIDE_MAX)), (alone, 1)] {
        let left = Mutex::new(programs);
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..workers).map(|_| scope.spawn(|| work(&left))).collect();
            all.into_iter().try_for_each(|one| one.join().ok().context(PANICKED)?)
        })?;
    }
    let mut outcome = outcome.into_inner().ok().context(PANICKED)?;
    tally.add(&outcome.tally);
    if outcome.is_broken || outcome.failed.len() > SECOND_LOOKS_MAX {
        return Ok(false);
    }
    let looked_at = std::mem::take(&mut outcome.failed);
    Ok(second_look(prepared, &looked_at, tally)? == looked_at.len())
}

/// Runs tests that failed once more, each alone, and says which pass now; how many do.
fn second_look(
    prepared: &impl Fn() -> Command,
    failed: &[Failed],
    tally: &mut Tally,
) -> Result<usize> {
    let mut passed = vec![];
    for Failed { program, test } in failed {
        println!("== once more, alone: {test}");
        let outcome = Mutex::new(Outcome::default());
        let only = [test.clone(), "--exact".to_owned()];
        guest_program(prepared(), program, &only, &outcome)?;
        let outcome = outcome.into_inner().ok().context(PANICKED)?;
        if outcome.tally == (Tally { passed: 1, failed: 0, ignored: 0 }) && !outcome.is_broken {
            passed.push(test.as_str());
        }
    }
    if !passed.is_empty() {
        println!("failed beside others and passed alone: {}", passed.join(", "));
    }
    let count = passed.len();
    tally.failed -= count as u64;
    tally.passed += count as u64;
    Ok(count)
}

/// Shows what a program said.
fn show(name: &str, ended: &Output, began: Instant) {
    let word = if ended.status.success() { "done" } else { "FAILED" };
    println!("== {name}: {word} after {:.1} s", began.elapsed().as_secs_f64());
    println!("{}", String::from_utf8_lossy(&ended.stdout));
    if !ended.status.success() {
        println!("{}", String::from_utf8_lossy(&ended.stderr));
    }
}

/// Builds all that tests use, and names the commands by the variables that tests know them by: `migrate`, the same with
/// failpoints, and `godwit-scheduler`.
fn build(root: &Path) -> Result<Vec<(PathBuf, &'static str)>> {
    let built = root.join("target/debug/migrate");
    let failpoints = root.join("target/failpoints/debug/migrate");
    // A test program beside it, no matter which: with one, cargo chooses the features that all tests need.
    let what = ["--bin", "migrate", "--test", "inventory", "--features", "migrate-cli/failpoints"];
    run(cargo(root).args(["build", "--workspace"]).args(what))?;
    std::fs::create_dir_all(root.join("target/failpoints/debug")).context("No folder for it")?;
    std::fs::copy(&built, &failpoints).context("Cannot set the command aside")?;
    run(cargo(root).args(["build", "--workspace", "--lib", "--bins", "--tests"]))?;
    Ok(vec![
        (built, "GODWIT_MIGRATE"),
        (failpoints, "GODWIT_MIGRATE_FAILPOINTS"),
        (root.join("target/debug/godwit-scheduler"), "GODWIT_SCHEDULER"),
    ])
}

/// Everything, or what the arguments name (passed on to the test programs).
pub(crate) fn test(root: &Path, filters: &[String]) -> Result<()> {
    let environment = step("setup", || setup::setup(root))?;
    let commands = step("build", || build(root))?;
    test_with(root, &environment, &commands, filters)
}

fn test_with(
    root: &Path,
    environment: &Environment,
    commands: &[(PathBuf, &str)],
    filters: &[String],
) -> Result<()> {
    let mut tally = Tally::default();
    let prepared = || {
        let mut command = cargo(root);
        command.args(["test", "--workspace", "--no-fail-fast"]);
        environment.pass_to(&mut command);
        for (path, name) in commands {
            command.env(name, path);
        }
        command
    };
    let mut plain = prepared();
    plain.args(["--lib", "--bins"]);
    for (_, name) in programs(root, &WITHOUT_GUESTS)? {
        plain.args(["--test", &name]);
    }
    plain.arg("--").args(filters);
    let plain_ok = step("tests without guests", || tests(&mut plain, &mut tally))?;
    let guests_ok =
        step("tests with guests", || guest_tests(root, &prepared, filters, &mut tally))?;
    if tally.ignored > 0 {
        println!("{} ignored", tally.ignored);
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    if !plain_ok || !guests_ok {
        bail!("Tests failed or could not be run; see above");
    }
    Ok(())
}

#[cfg(test)]
mod tests_of_tests {
    use super::*;
    use crate::run::repository;

    /// Adds the folders of packages with test programs at and below `folder`, by their paths from `root`.
    fn add_packages(root: &Path, folder: &Path, found: &mut Vec<String>) {
        if folder.join("Cargo.toml").exists() && folder.join("tests").exists() {
            found.push(folder.strip_prefix(root).unwrap().to_str().unwrap().to_owned());
        }
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() && !name.starts_with('.') && name != "target" {
                add_packages(root, &path, found);
            }
        }
    }

    #[test]
    fn no_test_program_is_left_out() {
        let root = repository().unwrap();
        let mut found = vec![];
        add_packages(&root, &root, &mut found);
        found.retain(|package| !package.is_empty());
        found.sort();
        let mut known = [&WITH_GUESTS[..], &WITHOUT_GUESTS].concat();
        known.sort_unstable();
        assert_eq!(found, known, "xtask/src/tests.rs names the packages with test programs");
        let all = programs(&root, &known).unwrap();
        for name in LONG.iter().chain(&ALONE) {
            assert!(all.iter().any(|(_, known)| known == name), "there is no test program {name}");
        }
        // Two of a name run together.
        for (_, name) in programs(&root, &WITH_GUESTS).unwrap() {
            assert_eq!(all.iter().filter(|(_, other)| *other == name).count(), 1, "{name}");
        }
    }

    #[test]
    fn failed_tests_are_told_from_programs_that_broke() {
        let program: Program = ("tests/e2e", "moves".to_owned());
        let mut outcome = Outcome::default();
        let said = "running 3 tests\ntest a ... FAILED\n\nfailures:\n\n---- a stdout ----\n    said\n\nfailures:\n    a\n    \
                    b::c\n\ntest result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured\n";
        outcome.add(&program, false, said);
        let failed: Vec<_> = outcome.failed.iter().map(|failed| failed.test.as_str()).collect();
        assert_eq!((failed, outcome.is_broken), (vec!["a", "b::c"], false));
        assert_eq!(outcome.tally, Tally { passed: 1, failed: 2, ignored: 0 });
        outcome.add(&program, false, "running 1 test\ntest a ... ");
        assert!(outcome.is_broken, "It was killed in a test");
    }

    #[test]
    fn adds_up_results() {
        let mut tally = Tally::default();
        for line in [
            "running 3 tests",
            "test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.10s",
            "test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 7 filtered out",
            "noise test result: ok. 9 passed",
        ] {
            tally.add_line(line);
        }
        assert_eq!(tally, Tally { passed: 7, failed: 3, ignored: 1 });
    }
}
