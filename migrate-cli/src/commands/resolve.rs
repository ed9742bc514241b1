//! `migrate resolve`: ends what an engine or a link left unfinished, at either end.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use migrate_core::error::GuestPlace;
use migrate_core::handover::source::Input;
use migrate_core::handover::{Outcome, SourceRecord};
use qemu_glue::device_state;
use qemu_glue::qmp::Client;
use serde::Serialize;
use transport::Identity;

use crate::args::ResolveArgs;
use crate::destination::answer::Archive;
use crate::error::EngineError;
use crate::journal::{Journal, Record, default_dir};
use crate::report::ReportOutcome;
use crate::source::handover::{place, quit_left};
use crate::source::recover;

/// How long an unreachable destination is asked.
const ASK_FOR: Duration = Duration::from_secs(3);

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Resolution {
    v: u32,
    outcome: ReportOutcome,
    migration: Option<String>,
    role: &'static str,
    vm: GuestPlace,
    message: String,
}

pub(super) async fn run(args: &ResolveArgs) -> ExitCode {
    let resolution = match resolve(args).await {
        Ok(resolution) => resolution,
        Err(error) => {
            eprintln!("error: {}", error.tell());
            return ExitCode::from(1);
        }
    };
    if args.json {
        super::print_json(&resolution);
    }
    eprintln!("{}; the guest here is {}", resolution.message, resolution.vm);
    ExitCode::from(resolution.outcome.exit_code())
}

async fn resolve(args: &ResolveArgs) -> Result<Resolution, EngineError> {
    let mut unfinished = recover::unfinished(args.journal.as_deref(), &args.qmp)?;
    match unfinished.pop() {
        Some(journal) => resolve_source(args, journal).await,
        None => resolve_destination(args).await,
    }
}

/// QEMU's monitor; nothing if the QEMU that the migration was about is gone. One that lives but
/// does not answer is an error: its guest would be left as it is without a word.
async fn monitor(args: &ResolveArgs, lives: bool) -> Result<Option<Client>, EngineError> {
    match Client::connect(&args.qmp).await {
        Ok(client) => Ok(Some(client)),
        Err(_) if !lives => Ok(None),
        Err(error) => Err(error.into()),
    }
}

async fn resolve_source(
    args: &ResolveArgs,
    mut journal: Journal,
) -> Result<Resolution, EngineError> {
    let entry = journal.entry().clone();
    let lives = recover::is_same_qemu(&entry);
    let client = monitor(args, lives).await?;
    let client = client.as_ref().filter(|_| lives);
    let serving = entry.record == Record::Source(SourceRecord::Serving);
    if serving && (args.run_here || args.runs_there) {
        return Err(EngineError::Misuse {
            what: "The guest runs at the destination and still needs memory that is here, so \
                   there is nothing to decide"
                .into(),
            remedy: "Make the destination reachable and leave --run-here and --runs-there out"
                .into(),
        });
    }
    if args.runs_there && place(client).await == GuestPlace::Running {
        return Err(EngineError::Misuse {
            what: "The guest runs here, so it does not run there".into(),
            remedy: "Leave --runs-there out".into(),
        });
    }
    let addr = args.to.as_deref().unwrap_or(&entry.peer);
    let identity = args.identity.as_ref().unwrap_or(&entry.identity);
    let identity = Identity::load(identity)?;
    let mut contact = recover::contact(&entry, Arc::new(identity), addr).await?;
    let operator = match (args.run_here, args.runs_there, entry.record) {
        (true, _, _) => Some(Input::OperatorRunHere),
        (_, true, Record::Source(SourceRecord::HandedOver)) => Some(Input::OperatorRunThere),
        _ => None,
    };
    let is_sending = match client {
        Some(client) => device_state::is_in_postcopy(client).await?,
        None => false,
    };
    let mut server = match client {
        Some(client) if recover::is_gone(&entry) => recover::server(client).await?,
        _ => None,
    };
    let dir = args.journal.clone().unwrap_or_else(default_dir);
    let mut archive = Archive::open(&dir, &args.qmp)?;
    // One whose pager has ended must not run before the next one serves its page faults.
    let is_split = archive.has_split();
    let acting = client.filter(|_| !is_split);
    let outcome =
        recover::finish(acting, &mut journal, &mut contact, server.as_mut(), operator, ASK_FOR);
    let outcome = outcome.await?;
    if let Some(server) = &mut server {
        server.stop().await;
    }
    contact.close("resolved").await;
    if outcome == Outcome::Completed && is_split {
        archive.paging_ended();
        if let Some(client) = client {
            quit_left(client).await;
        }
    }
    let vm = place(client).await;
    let is_due = outcome == Outcome::RolledBack && is_split;
    let (outcome, message) = match outcome {
        Outcome::RolledBack if is_split => {
            let text = "the guest belongs to this host and is split: start `migrate receive` here, \
                        which pages it and lets it run";
            (ReportOutcome::Failed, text.into())
        }
        Outcome::Completed => {
            (ReportOutcome::Completed, "the guest runs at the destination".into())
        }
        Outcome::RolledBack => (ReportOutcome::Failed, "the guest belongs to this host".into()),
        Outcome::InDoubt if is_sending => {
            let stranded = EngineError::Stranded { qmp: entry.qmp.clone() };
            let text = format!("still in doubt, or at the destination. {stranded}");
            (ReportOutcome::InDoubt, text)
        }
        Outcome::InDoubt => {
            let text = format!(
                "still in doubt: {addr} does not say what became of the guest. Start `migrate \
                 receive` there, or decide with --run-here or --runs-there"
            );
            (ReportOutcome::InDoubt, text)
        }
    };
    if outcome != ReportOutcome::InDoubt && !is_due {
        journal.remove();
    }
    let migration = Some(entry.migration);
    Ok(Resolution { v: 1, outcome, migration, role: "source", vm, message })
}

async fn resolve_destination(args: &ResolveArgs) -> Result<Resolution, EngineError> {
    let dir = args.journal.clone().unwrap_or_else(default_dir);
    let mut archive = Archive::open(&dir, &args.qmp)?;
    let client = monitor(args, archive.has_living_qemu()).await?;
    let client = client.as_ref();
    if args.run_here {
        archive.operator_run_here(client).await?;
    }
    archive.recover(client, false).await;
    let vm = place(client).await;
    let (outcome, message) = match archive.latest() {
        None => (ReportOutcome::Completed, "nothing is unfinished here".to_owned()),
        Some((_, true)) if archive.lacks_pages() => {
            let text = "the guest belongs to this host and lacks pages: start `migrate receive` here, \
                        which fetches them";
            (ReportOutcome::InDoubt, text.to_owned())
        }
        Some((_, true)) => (ReportOutcome::Completed, "the guest belongs to this host".to_owned()),
        Some((_, false)) => (ReportOutcome::Failed, "the guest belongs to its source".to_owned()),
    };
    let migration = archive.latest().map(|(id, _)| id);
    Ok(Resolution { v: 1, outcome, migration, role: "destination", vm, message })
}
