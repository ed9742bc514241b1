//! `godwit-scheduler`.

use clap::Parser;

/// Finds hotspots on a cluster's hosts and moves guests away from them.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {}

fn main() {
    let _args = Args::parse();
}
