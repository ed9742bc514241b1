//! `godwit-scheduler`.

mod args;
mod commands;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match args::Cli::parse().command {
        args::Command::Simulate(args) => commands::simulate::run(&args),
        args::Command::Web(args) => commands::web::run(args),
    }
}
