//! `godwit-scheduler`.

mod args;
mod commands;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match args::Cli::parse().command {
        args::Command::Simulate(args) => commands::simulate::run(&args),
        args::Command::Agent(args) => told(commands::agent::run(&args)),
        args::Command::Explain(args) => commands::explain::run(&args),
        args::Command::Web(args) => commands::web::run(args),
    }
}

fn told(ran: anyhow::Result<()>) -> ExitCode {
    let Err(error) = ran else { return ExitCode::SUCCESS };
    eprintln!("error: {error:#}");
    ExitCode::from(2)
}
