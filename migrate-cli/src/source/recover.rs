//! Unfinished migrations of a source, found in its journal.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use migrate_core::codec_choice::Wanted;
use migrate_core::handover::source::Input;
use migrate_core::handover::{Outcome, Source, SourceRecord};
use qemu_glue::qmp::Client;
use qemu_glue::ram::GuestRam;
use qemu_glue::{device_state, procfs, vm};
use transport::{Identity, Options};

use super::contact::Contact;
use super::feed::Feed;
use super::handover::{Owner, take_back};
use super::serve::Server;
use super::{parse_migration, prepare};
use crate::args::{CommonArgs, SendArgs};
use crate::destination::answer::Archive;
use crate::error::EngineError;
use crate::journal::{self, Entry, Found, Journal, Record};

/// Unfinished migrations whose source is the VM at `qmp`; one that may be at its destination comes
/// last.
///
/// # Errors
/// [`EngineError::Misuse`] if another process is at work on one of them.
pub fn unfinished(dir: Option<&Path>, qmp: &Path) -> Result<Vec<Journal>, EngineError> {
    let dir = dir.map_or_else(journal::default_dir, PathBuf::from);
    let is_ours = |record| matches!(record, Record::Source(_));
    let mut found = free_journals(&dir, qmp, is_ours)?;
    found.sort_by_key(|journal| {
        let entry = journal.entry();
        (is_same_qemu(entry), is_gone(entry))
    });
    Ok(found)
}

/// Whether the guest may run at the destination, and may still need memory from here.
pub fn is_gone(entry: &Entry) -> bool {
    use SourceRecord::{HandedOver, Serving};
    matches!(entry.record, Record::Source(HandedOver | Serving))
}

/// The journals in `dir` about the VM at `qmp` whose record `is_ours`.
///
/// # Errors
/// [`EngineError::Misuse`] if another process is at work on one of them.
pub fn free_journals(
    dir: &Path,
    qmp: &Path,
    is_ours: impl Fn(Record) -> bool,
) -> Result<Vec<Journal>, EngineError> {
    let qmp = std::path::absolute(qmp).unwrap_or_else(|_| qmp.to_owned());
    let mut free = vec![];
    for found in Journal::list(dir, |entry| entry.qmp == qmp && is_ours(entry.record)) {
        match found {
            Found::Free(journal) => free.push(journal),
            Found::Held(entry) => {
                return Err(EngineError::Misuse {
                    what: format!(
                        "Another `migrate` is at work on migration {} of this VM",
                        entry.migration
                    ),
                    remedy: "Wait for its end, or end it with Ctrl-C".into(),
                });
            }
        }
    }
    Ok(free)
}

/// Whether the QEMU that a journal speaks of is still the one it was.
pub fn is_same_qemu(entry: &Entry) -> bool {
    procfs::start_time_ticks(entry.qemu_pid).is_ok_and(|start| start == entry.qemu_start_ticks)
}

/// Cleans up after an engine that died: a guest that was never handed over is taken back; one that
/// may have been is not touched, one that was is released. A guest whose arrival here is not over
/// is not sent on.
///
/// # Errors
/// [`EngineError::Unresolved`] if the guest may be at the destination, [`EngineError::Misuse`] if it
/// is there for certain, or what kept it from being taken back.
pub async fn before_sending(args: &SendArgs) -> Result<(), EngineError> {
    let qmp = &args.common.qmp;
    for mut journal in unfinished(args.common.journal.as_deref(), qmp)? {
        let entry = journal.entry().clone();
        if !is_same_qemu(&entry) {
            tracing::warn!(migration = entry.migration, "journal of a QEMU that is gone");
            if !is_gone(&entry) {
                journal.remove();
            }
            continue;
        }
        if is_gone(&entry) {
            let (migration, qmp) = (entry.migration, entry.qmp);
            return Err(EngineError::Unresolved { migration, qmp });
        }
        eprintln!("an earlier migration of this VM was interrupted; it is ended first");
        let client = Client::connect(qmp).await?;
        let identity = Identity::load(&args.common.identity)?;
        let mut contact = contact(&entry, Arc::new(identity), &args.to).await?;
        let done = finish(Some(&client), &mut journal, &mut contact, None, None, Duration::ZERO);
        let done = done.await?;
        journal.remove();
        if done == Outcome::Completed {
            return Err(EngineError::Misuse {
                what: format!("This guest was handed over to {} and runs there", entry.peer),
                remedy: "Migrate it from that host".into(),
            });
        }
    }
    let dir = args.common.journal_dir();
    Archive::open(&dir, qmp)?.settle_before_sending(qmp).await
}

/// Refuses to touch a guest that may be at a destination, or was seen there.
///
/// # Errors
/// [`EngineError::Unresolved`] if it may.
pub fn refuse_gone(common: &CommonArgs) -> Result<(), EngineError> {
    for journal in unfinished(common.journal.as_deref(), &common.qmp)? {
        let entry = journal.entry();
        let is_done = entry.record == Record::Source(SourceRecord::Done);
        if (is_gone(entry) || is_done) && is_same_qemu(entry) {
            let (migration, qmp) = (entry.migration.clone(), entry.qmp.clone());
            return Err(EngineError::Unresolved { migration, qmp });
        }
    }
    Ok(())
}

/// As [`before_sending`], for a guest that is paged by this process: one that was about to leave is taken back. Returns
/// the hosts for which it was.
///
/// # Errors
/// [`EngineError::Unresolved`] if it may have left, or what kept it from being taken back.
pub async fn before_leaving(
    client: &Client,
    common: &CommonArgs,
) -> Result<Vec<String>, EngineError> {
    refuse_gone(common)?;
    let mut peers = vec![];
    for journal in unfinished(common.journal.as_deref(), &common.qmp)? {
        let entry = journal.entry();
        if is_same_qemu(entry) {
            take_back(client, entry.was_running).await?;
            peers.extend(entry.peer_name.clone());
        }
        if !is_gone(entry) {
            journal.remove();
        }
    }
    Ok(peers)
}

/// The destination of an interrupted migration.
///
/// # Errors
/// If the journal's id or the address cannot be read.
pub async fn contact(
    entry: &Entry,
    identity: Arc<Identity>,
    addr: &str,
) -> Result<Contact, EngineError> {
    let migration = parse_migration(&entry.migration).ok_or_else(|| {
        EngineError::Internal(format!("the journal names the migration {:?}", entry.migration))
    })?;
    Ok(Contact {
        addr: prepare::resolve_address(addr).await?,
        identity,
        options: Options { expected_peer: entry.peer_name.clone(), ..Options::default() },
        migration,
        session: None,
        resume: entry.was_running,
        running_at: None,
    })
}

/// What serves the guest's memory if it turns out that the destination still needs it; nothing where QEMU alone does that.
///
/// # Errors
/// If QEMU's memory cannot be opened.
pub async fn server(client: &Client) -> Result<Option<Server>, EngineError> {
    let vm = vm::inventory(client).await?;
    if vm.regions.is_empty() || device_state::is_in_postcopy(client).await? {
        return Ok(None);
    }
    let ram = Arc::new(GuestRam::open(vm.pid, &vm.regions, false)?);
    // What the destination has of it, it will not ask for.
    let feed = Feed::new(ram.layout(), ram.data_ranges()?);
    Ok(Some(Server::new(ram, Arc::new(feed), Wanted::Auto, None, None)))
}

/// Brings an interrupted hand-over to its end; `operator` is what an operator says of it.
///
/// # Errors
/// The guest belongs here and could not be resumed; the journal is to be kept.
pub async fn finish(
    client: Option<&Client>,
    journal: &mut Journal,
    contact: &mut Contact,
    server: Option<&mut Server>,
    operator: Option<Input>,
    ask_for: Duration,
) -> Result<Outcome, EngineError> {
    let Record::Source(record) = journal.entry().record else { return Ok(Outcome::InDoubt) };
    let state = Source::recovered(record);
    let input = operator.unwrap_or(Input::Lost);
    let keep_source = journal.entry().keep_source;
    let mut owner = Owner { server, ..Owner::new(client, journal, contact, ask_for, keep_source) };
    // A crash between the record and the act: do what the record says once more.
    match state {
        Source::Ended(Outcome::RolledBack) => owner.resume().await,
        Source::Ended(Outcome::Completed) => owner.release().await,
        _ => {}
    }
    let outcome = owner.drive(state, input).await;
    owner.stuck.map_or(Ok(outcome), Err)
}
