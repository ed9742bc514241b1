//! `migrate status`, `migrate merge` and `migrate move-fragment`: what is asked of the pager of a split guest.

use std::process::ExitCode;

use migrate_core::error::{Classify, ErrorBin};

use super::print_json;
use crate::args::{MoveFragmentArgs, PagerArgs};
use crate::error::EngineError;
use crate::pager_socket::{Ask, PagerClient, PagerState, ServerStatus, Status};
use crate::source::prepare::resolve_address;

/// Shows how a guest is doing.
pub(super) async fn status(args: &PagerArgs) -> ExitCode {
    end(ask(args, Ask::Status).await, args)
}

/// Brings all of a guest's memory to its main host; shows how far that is.
pub(super) async fn merge(args: &PagerArgs) -> ExitCode {
    let merged = ask(args, Ask::Merge).await.and_then(|status| match status.state {
        PagerState::Merged => Ok(status),
        state => Err(EngineError::Internal(format!("the merge ended, the guest is {state:?}"))),
    });
    end(merged, args)
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

/// The last thing that the pager says; what comes before it is progress.
async fn ask(args: &PagerArgs, ask: Ask) -> Result<Status, EngineError> {
    let mut pager = PagerClient::find(args.journal.as_deref(), args.qmp.as_deref()).await?;
    pager.ask(ask).await?;
    let mut last: Option<Status> = None;
    while let Some(status) = pager.next().await? {
        if !ask.is_over(&status) {
            eprintln!("{}", progress(ask, &status));
        }
        last = Some(status);
    }
    last.ok_or_else(|| EngineError::Internal("the pager said nothing".into()))
}

/// How far something is that was asked for.
fn progress(ask: Ask, status: &Status) -> String {
    let left = |is_meant: &dyn Fn(&ServerStatus) -> bool| {
        let meant = status.remote_pages.iter().filter(|server| is_meant(server));
        mib(meant.map(|server| server.pages).sum())
    };
    match ask {
        Ask::MoveFragment { from, .. } => {
            let left = left(&|server| server.server.parse() == Ok(from));
            format!("moving: {left:.1} MiB are left at {from}")
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
    println!("{}: {}", status.vm, format!("{:?}", status.state).to_lowercase());
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
    println!(
        "faults     {} ({} fetched, {} of memory that held nothing): {} us in the median, {} at 99 %, {} at most",
        faults.count, faults.fetched, faults.zero, faults.p50_us, faults.p99_us, faults.max_us
    );
    println!("read ahead {} pages, {} of them used", read_ahead.pages, read_ahead.used);
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
