//! The testbed, the comparison with QEMU's own migration, and its report.
//!
//! ```text
//!  scenario --> compare ----+                      +--> NAME.jsonl   one object a measurement, raw
//!               throughput -+--> testbed, drivers --+
//!               attach -----+                      +--> report ----> NAME.md, NAME-*.svg, report.html
//!  targets: all of these that have some
//! ```
//!
//! What is compared runs in turns on one machine, each migration with a freshly booted guest of the
//! same seed, so that pairs share the machine's mood and no mode inherits memory that another has
//! populated. Everything is measured the same way for every mode and from outside: the clock of the
//! host, the guest's heartbeat, the counters of the link, the CPU time of the processes.

mod applications;
mod args;
mod attach;
mod campaign;
mod compare;
mod compulsory;
mod document;
mod driver;
mod gateway;
mod godwit;
mod host;
mod interrupt;
mod mode;
mod qemu;
mod qemu_tls;
mod record;
mod relay;
mod report;
mod sample;
mod scenario;
mod split;
mod stats;
mod svg;
mod table;
mod targets;
mod testbed;
mod throughput;

use anyhow::Result;
use clap::Parser as _;

use crate::args::{Cli, Command};

fn main() -> Result<()> {
    let cli = Cli::parse();
    interrupt::watch()?;
    match &cli.command {
        None => compare::run(&cli.compare),
        Some(Command::Compare(args)) => compare::run(args),
        Some(Command::Targets(args)) => campaign::run(args),
        Some(Command::Scenarios) => scenario::list(),
        Some(Command::Relay(args)) => relay::run(args),
        Some(Command::Throughput(args)) => throughput::run(args),
        Some(Command::Attach(args)) => attach::run(args),
        Some(Command::Report(args)) => report::again(args),
    }
}
