//! `test`: all tests, and one true line with their number at the end.
//!
//! Tests with guests (`framework`, `e2e`) run one at a time: two QEMUs and two engines fill the
//! machine. All others run as cargo likes.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::run::{cargo, run, shown, step};
use crate::setup::{self, Environment};

/// Packages whose tests start guests.
const GUEST_PACKAGES: [&str; 2] = ["framework", "e2e"];

/// Sums over all test programs.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Tally {
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

/// Builds `migrate` as tests use it: the plain one, and one with failpoints.
fn build_commands(root: &Path) -> Result<(PathBuf, PathBuf)> {
    let built = root.join("target/debug/migrate");
    let failpoints = root.join("target/failpoints/debug/migrate");
    // One after the other in the same place: their dependencies are compiled once.
    run(cargo(root).args(["build", "-p", "migrate-cli", "--features", "failpoints"]))?;
    std::fs::create_dir_all(root.join("target/failpoints/debug")).context("No folder for it")?;
    std::fs::copy(&built, &failpoints).context("Cannot set the command aside")?;
    run(cargo(root).args(["build", "-p", "migrate-cli", "-p", "qemu-glue-preload"]))?;
    Ok((built, failpoints))
}

/// Everything, or what the arguments name (passed on to the test programs).
pub(crate) fn test(root: &Path, filters: &[String]) -> Result<()> {
    let environment = step("setup", || setup::setup(root))?;
    let (migrate, failpoints) = step("build the command", || build_commands(root))?;
    test_with(
        root,
        &environment,
        &[(migrate, "GODWIT_MIGRATE"), (failpoints, "GODWIT_MIGRATE_FAILPOINTS")],
        filters,
    )
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
        command.args(["test", "--no-fail-fast"]);
        environment.pass_to(&mut command);
        for (path, name) in commands {
            command.env(name, path);
        }
        command
    };
    let mut plain = prepared();
    plain.arg("--workspace");
    let mut guests = prepared();
    for package in GUEST_PACKAGES {
        plain.args(["--exclude", package]);
        guests.args(["-p", package]);
    }
    plain.arg("--").args(filters);
    guests.args(["--", "--test-threads=1"]).args(filters);
    let plain_ok = step("tests without guests", || tests(&mut plain, &mut tally))?;
    let guests_ok = step("tests with guests", || tests(&mut guests, &mut tally))?;
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
