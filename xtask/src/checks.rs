//! `ci`, `demo` and `bench`.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::run::{cargo, run, step, succeeds};
use crate::{setup, tests, tidy};

/// Builds the command for release and runs its demonstration.
pub(crate) fn demo(root: &Path, arguments: &[String]) -> Result<()> {
    let environment = step("setup", || setup::setup(root))?;
    step("build", || run(cargo(root).args(["build", "--release", "-p", "migrate-cli"])))?;
    let mut command = Command::new(root.join("target/release/migrate"));
    command.arg("demo").arg("--kernel").arg(&environment.kernel);
    command.arg("--initrd").arg(&environment.initrd);
    command.arg("--qemu").arg(&environment.qemu_7_2.bin).args(arguments);
    environment.pass_to(&mut command);
    step("demo", || run(&mut command))
}

/// Builds the command for release and shows a split guest by it.
pub(crate) fn demo_split(root: &Path) -> Result<()> {
    demo_program(root, "demo-split", &["migrate-cli"])
}

/// Builds the commands for release and shows the scheduler by them.
pub(crate) fn demo_scheduler(root: &Path) -> Result<()> {
    demo_program(root, "demo-scheduler", &["migrate-cli", "scheduler"])
}

/// Builds commands by their packages, and a program that shows something by them, and runs it.
fn demo_program(root: &Path, name: &str, commands: &[&str]) -> Result<()> {
    let environment = step("setup", || setup::setup(root))?;
    let packages = commands.iter().chain(&["e2e"]).flat_map(|package| ["-p", package]);
    step("build", || run(cargo(root).args(["build", "--release"]).args(packages.clone())))?;
    let built = root.join("target/release");
    let mut command = Command::new(built.join(name));
    command.env("GODWIT_MIGRATE", built.join("migrate"));
    command.env("GODWIT_SCHEDULER", built.join("godwit-scheduler"));
    environment.pass_to(&mut command);
    step("demo", || run(&mut command))
}

/// Runs the bench program.
pub(crate) fn bench(root: &Path, arguments: &[String]) -> Result<()> {
    let environment = step("setup", || setup::setup(root))?;
    let mut command = cargo(root);
    step("build", || run(cargo(root).args(["build", "--release", "-p", "migrate-cli"])))?;
    command.args(["run", "--release", "-p", "bench", "--"]).args(arguments);
    command.env("GODWIT_MIGRATE", root.join("target/release/migrate"));
    environment.pass_to(&mut command);
    step("bench", || run(&mut command))
}

fn deny(root: &Path) -> Result<()> {
    if !succeeds(cargo(root).args(["deny", "--version"])) {
        println!("   cargo-deny is missing: compiling it takes some minutes, once");
        run(cargo(root).args(["install", "--locked", "cargo-deny"]))
            .context("cargo-deny cannot be installed; install it by hand and try again")?;
    }
    // The advisory database is a repository of its own that is not always within reach; the other
    // checks need nothing but the lock file.
    run(cargo(root).args(["deny", "check", "bans", "licenses", "sources"]))
}

/// What must hold before a change is merged.
pub(crate) fn ci(root: &Path) -> Result<()> {
    step("setup", || setup::setup(root))?;
    step("tidy", || tidy::tidy(root))?;
    step("format", || run(cargo(root).args(["fmt", "--all", "--check"])))?;
    step("clippy", || {
        run(cargo(root).args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))
    })?;
    step("dependencies", || deny(root))?;
    step("documentation", || {
        run(cargo(root)
            .args(["doc", "--workspace", "--no-deps", "--document-private-items"])
            .env("RUSTDOCFLAGS", "-D warnings"))
    })?;
    tests::test(root, &[])
}
