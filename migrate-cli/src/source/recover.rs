//! Unfinished migrations of a source, found in its journal.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use migrate_core::handover::source::Input;
use migrate_core::handover::{Outcome, Source, SourceRecord};
use qemu_glue::procfs;
use qemu_glue::qmp::Client;
use transport::{Identity, Options};

use super::contact::Contact;
use super::handover::Owner;
use super::{parse_migration, prepare};
use crate::args::SendArgs;
use crate::error::EngineError;
use crate::journal::{self, Entry, Journal, Record};

/// Unfinished migrations whose source is the VM at `qmp`.
pub fn unfinished(dir: Option<&Path>, qmp: &Path) -> Vec<Journal> {
    let dir = dir.map_or_else(journal::default_dir, PathBuf::from);
    let qmp = std::path::absolute(qmp).unwrap_or_else(|_| qmp.to_owned());
    Journal::list(&dir)
        .into_iter()
        .filter(|journal| {
            let entry = journal.entry();
            entry.qmp == qmp && matches!(entry.record, Record::Source(_))
        })
        .collect()
}

/// Whether the QEMU that a journal speaks of is still the one it was.
pub fn is_same_qemu(entry: &Entry) -> bool {
    procfs::start_time_ticks(entry.qemu_pid).is_ok_and(|start| start == entry.qemu_start_ticks)
}

/// Cleans up after an engine that died: a guest that was never handed over is taken back; one that
/// may have been is not touched.
///
/// # Errors
/// [`EngineError::Unresolved`] if the guest may be at the destination.
pub async fn before_sending(args: &SendArgs) -> Result<(), EngineError> {
    for mut journal in unfinished(args.common.journal.as_deref(), &args.common.qmp) {
        let entry = journal.entry().clone();
        if !is_same_qemu(&entry) {
            tracing::warn!(migration = entry.migration, "journal of a QEMU that is gone");
            if entry.record != Record::Source(SourceRecord::HandedOver) {
                journal.remove();
            }
            continue;
        }
        if entry.record == Record::Source(SourceRecord::HandedOver) {
            let (migration, qmp) = (entry.migration, entry.qmp);
            return Err(EngineError::Unresolved { migration, qmp });
        }
        eprintln!("an earlier migration of this VM was interrupted; its guest is taken back first");
        let client = Client::connect(&args.common.qmp).await?;
        let identity = Identity::load(&args.common.identity)
            .map_err(|error| EngineError::Transport(transport::TransportError::Identity(error)))?;
        let mut contact = contact(&entry, Arc::new(identity), &args.to).await?;
        finish(Some(&client), &mut journal, &mut contact, None, Duration::ZERO).await;
        journal.remove();
    }
    Ok(())
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
        options: Options::default(),
        migration,
        session: None,
        resume: entry.was_running,
        running_at: None,
    })
}

/// Brings an interrupted hand-over to its end; `operator` is what an operator says of it.
pub async fn finish(
    client: Option<&Client>,
    journal: &mut Journal,
    contact: &mut Contact,
    operator: Option<Input>,
    ask_for: Duration,
) -> Outcome {
    let Record::Source(record) = journal.entry().record else { return Outcome::InDoubt };
    let state = Source::recovered(record);
    let input = operator.unwrap_or(Input::Lost);
    let was_running = journal.entry().was_running;
    let mut owner =
        Owner { client, journal, contact, ask_for, keep_source: false, why: None };
    let outcome = owner.drive(state, input).await;
    // A crash between the record and the act: do what the record says once more.
    if let (Source::Ended(Outcome::RolledBack), Some(client)) = (state, client)
        && let Err(error) = super::handover::take_back(client, was_running).await
    {
        tracing::error!(error = %error.tell(), "the guest could not be resumed here");
    }
    outcome
}
