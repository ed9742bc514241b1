//! The testbed, the comparison with QEMU's own migration, and its report.
//!
//! ```text
//!  compare ----+                      +--> NAME.jsonl   one object a measurement, raw
//!  throughput -+--> Testbed, drivers --+
//!  attach -----+                      +--> report ----> NAME.md, NAME-*.svg
//! ```
//!
//! What is compared runs in turns on one machine, each migration with a freshly booted guest of the
//! same seed, so that pairs share the machine's mood and no mode inherits memory that another has
//! populated. Everything is measured the same way for every mode and from outside: the clock of the
//! host, the guest's heartbeat, the counters of the link, the CPU time of the processes.

mod args;
mod attach;
mod compare;
mod driver;
mod godwit;
mod host;
mod interrupt;
mod mode;
mod qemu;
mod record;
mod report;
mod stats;
mod svg;
mod table;
mod targets;
mod testbed;
mod throughput;
mod workload;

use anyhow::Result;
use clap::Parser as _;

use crate::args::{Cli, Command};

fn main() -> Result<()> {
    let cli = Cli::parse();
    interrupt::watch()?;
    match &cli.command {
        Command::Compare(args) => compare::run(args),
        Command::Throughput(args) => throughput::run(args),
        Command::Attach(args) => attach::run(args),
        Command::Report(args) => report::again(args),
    }
}
