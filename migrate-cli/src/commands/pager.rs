//! `migrate status`, `migrate merge` and `migrate move-fragment`: what is asked of the pager of a split guest.

use std::process::ExitCode;

use migrate_core::error::{Classify, ErrorBin};

use super::print_json;
use crate::args::{CommonArgs, MergeArgs, MoveFragmentArgs, PagerArgs, SplitArgs};
use crate::error::EngineError;
use crate::pager_socket::{
    Ask, Heard, Leave, PagerClient, PagerState, ServerStatus, Status, is_split_here,
};
use crate::report::ReportOutcome;
use crate::source::prepare::resolve_address;

/// Shows how a guest is doing.
pub(super) async fn status(args: &PagerArgs) -> ExitCode {
    end(ask(args, Ask::Status).await, args)
}

/// Brings all of a guest's memory to its main host, or to another; shows how far that is.
pub(super) async fn merge(args: &MergeArgs) -> ExitCode {
    if let Some(to) = &args.to {
        let leave = Leave {
            to: to.clone(),
            peer: args.peer.clone(),
            resident_bytes: None,
            memory: None,
            merge: true,
            max_downtime_ms: args.max_downtime_ms,
            patience_s: args.patience_s,
            ask_s: args.ask_s,
        };
        return go(&args.pager, leave).await;
    }
    let merged = ask(&args.pager, Ask::Merge).await.and_then(|status| match status.state {
        PagerState::Merged => Ok(status),
        state => Err(EngineError::Internal(format!("the merge ended, the guest is {state:?}"))),
    });
    end(merged, &args.pager)
}

/// Whether a split guest runs here whose QMP socket is this one.
pub(super) fn is_here(common: &CommonArgs) -> bool {
    is_split_here(common.journal.as_deref(), &common.qmp)
}

/// A split guest cannot be sent as others are.
pub(super) fn refuse_send() -> ExitCode {
    eprintln!(
        "error: This guest is split over hosts. Use `migrate split` to give it another main host, or `migrate merge --to` to \
         bring all of it to one"
    );
    ExitCode::from(2)
}

/// Lets a split guest go to another main host, and have other memory servers.
pub(super) async fn leave(args: &SplitArgs) -> ExitCode {
    let SplitArgs { send, memory, resident, .. } = args;
    let pager = PagerArgs {
        qmp: Some(send.common.qmp.clone()),
        journal: send.common.journal.clone(),
        json: send.json,
    };
    let mut servers = vec![];
    for address in memory {
        match resolve_address(address).await {
            Ok(address) => servers.push(address),
            Err(error) => return end(Err(error), &pager),
        }
    }
    let leave = Leave {
        to: send.to.clone(),
        peer: send.common.peer.clone(),
        resident_bytes: *resident,
        memory: Some(servers),
        merge: false,
        max_downtime_ms: send.max_downtime_ms,
        patience_s: send.patience_s,
        ask_s: send.ask_s,
    };
    go(&pager, leave).await
}

async fn go(args: &PagerArgs, leave: Leave) -> ExitCode {
    match hear(args, Ask::Leave(leave)).await {
        Ok(Heard::Left(left)) => left_as(&left, args.json),
        Ok(Heard::Status(_)) => end(Err(EngineError::Internal("the pager has ended".into())), args),
        Err(error) => end(Err(error), args),
    }
}

/// Tells how a guest has left.
fn left_as(left: &serde_json::Value, json: bool) -> ExitCode {
    if json {
        print_json(left);
    }
    let text = |at: &str| left.pointer(at).and_then(serde_json::Value::as_str).unwrap_or_default();
    if let Some(message) = left.pointer("/error/message").and_then(serde_json::Value::as_str) {
        eprintln!("error: {message}");
        let (here, there) = (text("/error/source_vm"), text("/error/destination_vm"));
        eprintln!("guest: {here} at the source, {there} at the destination");
    }
    let number =
        |at: &str| left.pointer(at).and_then(serde_json::Value::as_f64).unwrap_or_default();
    match text("/outcome") {
        "completed" => {
            eprintln!(
                "{} has left in {:.2} s, downtime {:.1} ms, {:.1} MB to memory servers",
                text("/vm"),
                number("/total_ms") / 1e3,
                number("/downtime_ms"),
                number("/split/to_servers_bytes") / 1e6,
            );
            ExitCode::SUCCESS
        }
        "in-doubt" => ExitCode::from(ReportOutcome::InDoubt.exit_code()),
        _ => ExitCode::from(ReportOutcome::Failed.exit_code()),
    }
}

/// Moves what a server has to others; shows how far that is.
pub(super) async fn move_fragment(args: &MoveFragmentArgs) -> ExitCode {
    let moved = async {
        let from = resolve_address(&args.from).await?;
        let to = match &args.to {
            Some(to) => Some(resolve_address(to).await?),
            None => None,
        };
        let status = ask(&args.pager, Ask::MoveFragment { from, to }).await?;
        match status.drains(from) {
            false => Ok(status),
            true => Err(EngineError::Internal(format!(
                "pages are left at {from}, the guest is {:?}",
                status.state
            ))),
        }
    };
    end(moved.await, &args.pager)
}

fn end(status: Result<Status, EngineError>, args: &PagerArgs) -> ExitCode {
    match status {
        Ok(status) if args.json => print_json(&status),
        Ok(status) => tell(&status),
        Err(error) => {
            eprintln!("error: {}", error.tell());
            let is_misuse = error.bin() == ErrorBin::CallerMisuse;
            return ExitCode::from(if is_misuse { 2 } else { 1 });
        }
    }
    ExitCode::SUCCESS
}

/// The last status that the pager tells; what comes before it is progress.
async fn ask(args: &PagerArgs, ask: Ask) -> Result<Status, EngineError> {
    match hear(args, ask).await? {
        Heard::Status(status) => Ok(*status),
        Heard::Left(_) => Err(EngineError::Internal("the guest has left".into())),
    }
}

/// The last thing that the pager says; what comes before it is progress.
async fn hear(args: &PagerArgs, ask: Ask) -> Result<Heard, EngineError> {
    let mut pager = PagerClient::find(args.journal.as_deref(), args.qmp.as_deref()).await?;
    pager.ask(&ask).await?;
    let mut last = None;
    while let Some(heard) = pager.next().await? {
        if let Heard::Status(status) = &heard
            && !ask.is_over(status)
        {
            eprintln!("{}", progress(&ask, status));
        }
        last = Some(heard);
    }
    last.ok_or_else(|| EngineError::Internal("the pager said nothing".into()))
}

/// How far something is that was asked for.
fn progress(ask: &Ask, status: &Status) -> String {
    let left = |is_meant: &dyn Fn(&ServerStatus) -> bool| {
        let meant = status.remote_pages.iter().filter(|server| is_meant(server));
        mib(meant.map(|server| server.pages).sum())
    };
    match ask {
        Ask::MoveFragment { from, .. } => {
            let left = left(&|server| server.server.parse() == Ok(*from));
            format!("moving: {left:.1} MiB are left at {from}")
        }
        Ask::Leave(_) => {
            format!("leaving: {:.1} MiB are only here", mib(status.unflushed_pages))
        }
        Ask::Merge | Ask::Status => {
            format!("merging: {:.1} MiB are not here yet", left(&|_| true))
        }
    }
}

fn mib(pages: u64) -> f64 {
    pages as f64 / 256.0
}

fn tell(status: &Status) {
    let Status { faults, read_ahead, evicted, bytes, .. } = status;
    println!("{}: {}", status.vm, status.state);
    println!(
        "here       {:.1} MiB of at most {:.1}",
        mib(status.resident_pages),
        mib(status.resident_limit_pages)
    );
    for server in &status.remote_pages {
        println!("copies     {:.1} MiB at {} ({})", mib(server.pages), server.server, server.state);
    }
    if status.under_copied_pages > 0 {
        println!(
            "           {:.1} MiB have fewer copies than asked for",
            mib(status.under_copied_pages)
        );
    }
    if status.is_stuck {
        println!(
            "stuck      the memory servers are full, threads of the guest wait for room: give it another server \
             (`migrate move-fragment --to`) or another main host (`migrate split`, `migrate merge --to`)"
        );
    }
    println!(
        "faults     {} ({} fetched, {} of memory that held nothing): {} us in the median, {} at 99 %, {} at most",
        faults.count, faults.fetched, faults.zero, faults.p50_us, faults.p99_us, faults.max_us
    );
    println!(
        "read ahead {} pages, {} of them used; {} of memory that held nothing",
        read_ahead.pages, read_ahead.used, read_ahead.zeros
    );
    println!(
        "evicted    {} pages ({} not sent again), {} kept because they were written",
        evicted.pages, evicted.clean, evicted.cancelled
    );
    println!("reclaimed  {} pages that the guest freed", status.reclaimed_pages);
    println!(
        "traffic    {:.1} MB sent, {:.1} MB received",
        bytes.sent as f64 / 1e6,
        bytes.received as f64 / 1e6
    );
}
