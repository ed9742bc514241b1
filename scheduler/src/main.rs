//! `godwit-scheduler`.

mod args;
mod commands;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match args::Cli::parse().command {
        args::Command::Simulate(args) => commands::simulate::run(&args),
        args::Command::Agent(args) => told(commands::agent::run(&args), 2),
        args::Command::Explain(args) => told(commands::explain::run(&args), 1),
        args::Command::Web(args) => told(commands::web::run(args), 1),
    }
}

/// Says why it failed, and ends with this code then.
fn told(ran: anyhow::Result<()>, code: u8) -> ExitCode {
    let Err(error) = ran else { return ExitCode::SUCCESS };
    eprintln!("error: {error:#}");
    ExitCode::from(code)
}
