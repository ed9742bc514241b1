//! The binary `migrate`.

use std::process::ExitCode;

use clap::Parser;
use migrate_cli::args::Cli;
use migrate_cli::commands;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let level = match cli.verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: no threads or descriptors for the engine: {error}");
            return ExitCode::from(1);
        }
    };
    let code = runtime.block_on(commands::run(cli.command));
    // Whatever still blocks (a thread that reads memory) must not keep the process.
    runtime.shutdown_background();
    code
}
