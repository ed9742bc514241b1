//! Goes on with a guest that runs here and lacks pages, after the engine that fetched them died.
//!
//! QEMU may not answer: a thread of it that waits for a page may hold its main loop up. So pages come
//! first, then the monitor.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use migrate_core::handover::{Destination, DestinationState, Outcome};
use qemu_glue::qmp::Client;
use qemu_glue::ram::GuestRam;
use tokio::sync::mpsc;
use transport::messages::{Intent, Message, Verdict};
use transport::{DestinationSession, Identity, Listener, MigrationId, Options};

use super::answer::Archive;
use super::owner::{Owner, Voice};
use super::paging::Paging;
use super::{ASKS_WAITING, Attendant, describe, linger};
use crate::args::ReceiveArgs;
use crate::error::EngineError;
use crate::journal::{Journal, Record};
use crate::source::parse_migration;
use crate::tell;

/// Longest wait for QEMU's monitor once pages come in again.
const MONITOR_WITHIN: Duration = Duration::from_secs(60);

/// Takes the guest's page faults over, waits for the source and fetches the rest.
///
/// # Errors
/// What kept it from that; threads of the guest wait on.
pub async fn rescue(
    args: &ReceiveArgs,
    identity: &Identity,
    options: &Options,
    mut journal: Journal,
    archive: &mut Archive,
    fetches: &AtomicBool,
) -> Result<Outcome, EngineError> {
    let entry = journal.entry().clone();
    let migration = parse_migration(&entry.migration);
    let parts = migration.zip(entry.paging.as_ref());
    let (migration, left) =
        parts.ok_or_else(|| EngineError::Internal("the journal names no migration".into()))?;
    let ram = Arc::new(GuestRam::open(entry.qemu_pid, &left.regions, true)?);
    let paging = Paging::take_over(left, Arc::clone(&ram)).await?;
    let mut listener = Listener::bind(args.listen, identity, options)?;
    tell!("the guest runs here and lacks pages; listening on {}", listener.local_addr());
    let lease = Duration::from_secs(args.lease_s);
    let (forward, mut asks) = mpsc::channel(ASKS_WAITING);
    let work = async {
        let guest = Rescued { args, migration, journal: &mut journal, ram: &ram, lease, fetches };
        guest.go_on(paging, &mut asks).await
    };
    let attendant = Attendant::new(&mut listener, None, archive, Some((migration, &forward)));
    let outcome = attendant.attend(work).await?;
    tell!("{}", describe(outcome));
    let heard = journal.entry().heard;
    archive.add(journal);
    if !heard {
        linger(&mut listener, None, lease, archive).await;
    }
    Ok(outcome)
}

struct Rescued<'a> {
    args: &'a ReceiveArgs,
    migration: MigrationId,
    journal: &'a mut Journal,
    ram: &'a Arc<GuestRam>,
    lease: Duration,
    fetches: &'a AtomicBool,
}

impl Rescued<'_> {
    async fn go_on(
        self,
        mut paging: Option<Paging>,
        asks: &mut mpsc::Receiver<DestinationSession>,
    ) -> Result<Outcome, EngineError> {
        let Record::Destination(record) = self.journal.entry().record else {
            return Err(EngineError::Internal("the journal is a source's".into()));
        };
        let voice = first_session(&mut paging, asks).await?;
        let client = self.monitor().await?;
        let (state, outputs) = Destination::recovered(record);
        let mut owner = Owner {
            client: &client,
            journal: self.journal,
            voice,
            paging,
            rest: None,
            remote: None,
            faults: None,
            asks,
            migration: self.migration,
            lease: self.lease,
            ready: None,
            ram: Some(self.ram),
            commit: None,
            is_lost: false,
            fetches: self.fetches,
            source_knows: false,
        };
        Ok(owner.carry_on(state, outputs).await)
    }

    async fn monitor(&self) -> Result<Client, EngineError> {
        let began = tokio::time::Instant::now();
        loop {
            match Client::connect(&self.args.common.qmp).await {
                Ok(client) => return Ok(client),
                Err(error) if began.elapsed() > MONITOR_WITHIN => return Err(error.into()),
                Err(error) => {
                    tracing::info!(%error, "QEMU does not answer yet");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }
}

/// Answers questions until the source comes to go on with the pages; or, if none is missing, until
/// the first question.
async fn first_session(
    paging: &mut Option<Paging>,
    asks: &mut mpsc::Receiver<DestinationSession>,
) -> Result<Voice, EngineError> {
    loop {
        let session = asks.recv().await;
        let session = session.ok_or_else(|| EngineError::Internal("nobody listens".into()))?;
        let Some(paging) = paging else { return Ok(Voice::of(session)) };
        if session.intent == Intent::Resume {
            match paging.resume(session).await {
                Ok(voice) => return Ok(voice),
                Err(error) => tell!("{}; waiting for the source to come back", error.tell()),
            }
            continue;
        }
        let state = DestinationState::Fetching;
        let verdict = Message::Verdict(Verdict { state, text: "pages are missing".into() });
        if let Err(error) = session.control_sender.send(&verdict).await {
            tracing::info!(%error, "not answered");
            continue;
        }
        // The asker closes when it has heard.
        let _closed = tokio::time::timeout(Duration::from_secs(2), session.closer.closed()).await;
    }
}
