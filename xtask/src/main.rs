//! Project tasks: `cargo xtask setup | demo | test | bench | applications | ci | tidy`.
//!
//! Everything that needs more than cargo starts here. `setup` fetches and builds what guests need
//! and is run by all others; it does nothing when all is there.

mod applications;
mod apt;
mod checks;
mod etcd;
mod initrd;
mod kernel;
mod qemu;
mod run;
mod setup;
mod tests;
mod tidy;

use std::process::ExitCode;

use anyhow::{Result, bail};

const HELP: &str = "\
Usage: cargo xtask TASK [ARGUMENTS]

  setup   install and unpack what is missing: QEMU 7.2 and 10.0, a guest kernel, the initramfs
  demo    migrate a guest on this machine and show it; arguments go to `migrate demo`
  demo split
          split a guest over two memory servers on this machine, let it work, merge it, and show it
  demo scheduler
          three hosts on this machine, guests that work too much, and agents that see to it
  test    all tests; arguments filter them by name, and go to the test programs: --nocapture shows
          what a test measured
  bench   the comparison and the reports; arguments go to the bench program
  applications
          fetch and unpack Debian's programs that some of bench's scenarios run in the guest; bench
          does so by itself
  ci      format, lints, dependencies, documentation, then all tests
  tidy    only the style lints that rustfmt and clippy do not have";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let Some((task, arguments)) = words.split_first() else {
        eprintln!("{HELP}");
        return ExitCode::from(2);
    };
    match dispatch(task, arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask {task}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(task: &str, arguments: &[String]) -> Result<()> {
    let root = run::repository()?;
    match task {
        "setup" => run::step("setup", || setup::setup(&root)).map(drop),
        "demo" if arguments == ["split"] => checks::demo_split(&root),
        "demo" if arguments == ["scheduler"] => checks::demo_scheduler(&root),
        "demo" => checks::demo(&root, arguments),
        "test" => tests::test(&root, arguments),
        "bench" => checks::bench(&root, arguments),
        "applications" => {
            let provide = || applications::provide(&root);
            run::step("applications", provide).map(|path| println!("{}", path.display()))
        }
        "ci" => checks::ci(&root),
        "tidy" => run::step("tidy", || tidy::tidy(&root)),
        "help" | "--help" | "-h" => {
            println!("{HELP}");
            Ok(())
        }
        other => bail!("Unknown task {other:?}\n\n{HELP}"),
    }
}
