//! What each command does, and its exit code.

mod check;
mod demo;
mod inspect;
mod pager;
mod pki;
mod resolve;
mod top;

use std::process::ExitCode;

use migrate_core::handover::Outcome;

use crate::args::{AgentArgs, Command, GatewayCommand, MemoryServerArgs, ReceiveArgs, SendArgs};
use crate::destination::remote::Watched;
use crate::error::EngineError;
use crate::report::{Report, ReportOutcome};
use crate::{agent, destination, gateway, http, memory_server, progress, source};

/// Runs a command; errors are told on stderr.
pub async fn run(command: Command) -> ExitCode {
    match command {
        Command::Check(args) => check::run(&args).await,
        Command::Inspect(args) => inspect::run(&args).await,
        Command::Pki(command) => pki::run(&command),
        Command::Receive(args) => receive(&args).await,
        Command::Split(args) if pager::is_here(&args.send.common) => pager::leave(&args).await,
        Command::Send(args) if pager::is_here(&args.common) => pager::refuse_send(),
        Command::Send(args) => send(&args).await,
        Command::Split(args) => match write_progress(&args.send) {
            Ok(()) => sent(&source::split(&args).await, args.send.json),
            Err(error) => misused(&error),
        },
        Command::Status(args) => pager::status(&args).await,
        Command::Merge(args) => pager::merge(&args).await,
        Command::MoveFragment(args) => pager::move_fragment(&args).await,
        Command::Resolve(args) => resolve::run(&args).await,
        Command::MemoryServer(args) => serve_memory(&args).await,
        Command::Agent(args) => run_agent(&args).await,
        Command::Gateway(GatewayCommand::Source(args)) => over(gateway::source(&args).await),
        Command::Gateway(GatewayCommand::Destination(args)) => {
            over(gateway::destination(&args).await)
        }
        Command::Top(args) => top::run(&args).await,
        Command::Demo(args) => demo::run(&args).await,
    }
}

async fn send(args: &SendArgs) -> ExitCode {
    match write_progress(args) {
        Ok(()) => sent(&source::send(args).await, args.json),
        Err(error) => misused(&error),
    }
}

fn write_progress(args: &SendArgs) -> Result<(), EngineError> {
    args.progress_file.as_deref().map_or(Ok(()), progress::write_to)
}

/// Nothing was begun.
fn misused(error: &EngineError) -> ExitCode {
    eprintln!("error: {}", error.tell());
    ExitCode::from(2)
}

fn sent(report: &Report, json: bool) -> ExitCode {
    if json {
        print_json(report);
    }
    tell(report);
    ExitCode::from(report.outcome.exit_code())
}

fn print_json(report: &impl serde::Serialize) {
    match serde_json::to_string(report) {
        Ok(text) => println!("{text}"),
        Err(error) => eprintln!("error: the report cannot be written: {error}"),
    }
}

/// The report for people.
fn tell(report: &Report) {
    if let Some(error) = &report.error {
        eprintln!("error: {}", error.message);
        eprintln!(
            "guest: {} at the source, {} at the destination",
            error.source_vm, error.destination_vm
        );
    }
    if let Some(verify) = report.verify {
        eprintln!("verify: {} pages compared, {} differ", verify.pages, verify.mismatches);
    }
    if report.outcome == ReportOutcome::Completed {
        eprintln!(
            "{} moved in {:.2} s, downtime {:.1} ms, {:.1} MB over the wire for {:.1} MB of memory in use",
            report.vm,
            report.total_ms / 1e3,
            report.downtime_ms,
            report.bytes.wire as f64 / 1e6,
            report.bytes.populated as f64 / 1e6,
        );
        if let Some(split) = &report.split {
            let remote: u64 = split.remote_pages.iter().map(|remote| remote.pages).sum();
            let mib = |pages: u64| pages as f64 / 256.0;
            eprintln!(
                "{:.1} MiB are on its main host, {:.1} MiB on {} memory servers",
                mib(split.resident_pages),
                mib(remote),
                split.remote_pages.len()
            );
        }
    }
}

async fn receive(args: &ReceiveArgs) -> ExitCode {
    match receive_and_tell(args).await {
        Ok(Outcome::Completed) => ExitCode::SUCCESS,
        Ok(Outcome::RolledBack) => ExitCode::from(1),
        Ok(Outcome::InDoubt) => ExitCode::from(3),
        Err(error) => {
            eprintln!("error: {}", error.tell());
            ExitCode::from(1)
        }
    }
}

/// Receives guests, and tells metrics if asked for.
async fn receive_and_tell(args: &ReceiveArgs) -> Result<Outcome, EngineError> {
    let watched = Watched::new(&args.common.qmp);
    if let Some(http) = http::bind_if(args.metrics).await? {
        let watched = watched.clone();
        http.begin(move || watched.text());
    }
    destination::receive(args, &watched).await
}

async fn serve_memory(args: &MemoryServerArgs) -> ExitCode {
    over(memory_server::serve(args).await)
}

async fn run_agent(args: &AgentArgs) -> ExitCode {
    over(agent::run(args).await)
}

fn over(ended: Result<(), EngineError>) -> ExitCode {
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", error.tell());
            ExitCode::from(1)
        }
    }
}
