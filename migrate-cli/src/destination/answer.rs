//! What the destination's journal knows of migrations that are over, and answers about them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use migrate_core::handover::destination::{Input, Output};
use migrate_core::handover::{Destination, DestinationRecord, DestinationState};
use qemu_glue::device_state;
use qemu_glue::qmp::{Client, RunState};
use transport::messages::{Message, Split, Verdict};
use transport::{DestinationSession, TransportError, close_code};

use super::owner::{discard, farewell, resume_guest};
use super::paging::release_abandoned;
use crate::error::EngineError;
use crate::journal::{Entry, Journal, JournalError, PagingEntry, Record};
use crate::source::recover::{free_journals, is_same_qemu};
use crate::tell;

/// Longest wait for the question, and for the answer to be taken.
const PATIENCE: Duration = Duration::from_secs(5);

/// Journals older than this are not kept: their sources have stopped asking.
const KEEP: Duration = Duration::from_secs(30 * 24 * 3600);

/// An arrival whose guest is paged.
#[derive(Debug)]
pub struct Latest {
    /// Where its pager is asked.
    pub socket: PathBuf,
    /// The host from which the guest came, by the name in its certificate.
    pub from: Option<String>,
}

/// The journals of one VM's arrivals.
#[derive(Debug)]
pub struct Archive {
    journals: Vec<Journal>,
    qmp: PathBuf,
}

impl Archive {
    /// Reads the journals in `dir` that are about the VM at `qmp`.
    ///
    /// # Errors
    /// [`EngineError::Misuse`] if another process is at work on one of them.
    pub fn open(dir: &Path, qmp: &Path) -> Result<Self, EngineError> {
        let is_ours = |record| matches!(record, Record::Destination(_));
        let (old, mut journals): (Vec<_>, Vec<_>) =
            free_journals(dir, qmp, is_ours)?.into_iter().partition(|journal| journal.age() > KEEP);
        for journal in old {
            journal.remove();
        }
        journals.sort_by_key(|journal| std::cmp::Reverse(journal.age()));
        let qmp = std::path::absolute(qmp).unwrap_or_else(|_| qmp.to_owned());
        Ok(Self { journals, qmp })
    }

    /// Whether a QEMU that took a guest in still is the one at the socket.
    pub fn has_living_qemu(&self) -> bool {
        self.journals.iter().any(|journal| is_same_qemu(journal.entry()))
    }

    /// A guest that is sent on has arrived for good: what its journal says of its arrival must never
    /// resume it again.
    ///
    /// # Errors
    /// [`EngineError::Misuse`] if its arrival is not over, or a journal that cannot be written.
    pub async fn settle_before_sending(&mut self, qmp: &Path) -> Result<(), EngineError> {
        for journal in &mut self.journals {
            let over = match journal.entry().record {
                Record::Destination(DestinationRecord::Running) => true,
                Record::Destination(_) => !is_same_qemu(journal.entry()),
                Record::Source(_) => true,
            };
            if over {
                continue;
            }
            let owned = Record::Destination(DestinationRecord::Owned);
            let status = Client::connect(qmp).await?.query_status().await?;
            if journal.entry().record != owned || !status.running {
                return Err(EngineError::Misuse {
                    what: format!(
                        "The arrival of this guest ({}) was interrupted",
                        journal.entry().migration
                    ),
                    remedy: format!("End it with `migrate resolve --qmp {}` first", qmp.display()),
                });
            }
            journal.record(Record::Destination(DestinationRecord::Running))?;
        }
        Ok(())
    }

    /// Ends the paging of a guest that never came to run here: threads of QEMU may wait for pages, and
    /// its monitor with them. Only the latest arrival counts: the descriptor of an earlier one is
    /// closed, and its number may be another's.
    pub async fn release_abandoned(&self) {
        use DestinationRecord::{Receiving, Refused};
        let mut entries = self.journals.iter().map(Journal::entry);
        let latest = entries.rfind(|entry| is_same_qemu(entry));
        let never_ran =
            |entry: &&Entry| matches!(entry.record, Record::Destination(Receiving | Refused));
        if let Some(entry) = latest.filter(never_ran) {
            release_abandoned(entry).await;
        }
    }

    /// Whether a guest belongs here that lacks pages, and is not to run before its page faults are served.
    pub fn lacks_pages(&self) -> bool {
        self.journals.iter().any(|journal| fetches(journal.entry()) || is_split(journal.entry()))
    }

    /// The journal of a guest that runs here and lacks pages, if there is one.
    pub fn take_fetching(&mut self) -> Option<Journal> {
        let is_fetching = |journal: &Journal| fetches(journal.entry());
        let at = self.journals.iter().position(is_fetching)?;
        Some(self.journals.remove(at))
    }

    /// The journal of a guest that runs here while part of its memory is elsewhere, if there is one.
    pub fn take_split(&mut self) -> Option<Journal> {
        let is_split = |journal: &Journal| is_split(journal.entry());
        let at = self.journals.iter().position(is_split)?;
        Some(self.journals.remove(at))
    }

    /// Whether a guest belongs here, or did so last, that lies on memory servers in part.
    pub fn has_split(&self) -> bool {
        self.journals.iter().any(|journal| is_split(journal.entry()))
    }

    /// Ends what a killed engine left unfinished: an arrival is refused for ever, an owned guest is
    /// resumed, if it is split only when it `is_paged`.
    pub async fn recover(&mut self, client: Option<&Client>, is_paged: bool) {
        for journal in &mut self.journals {
            let Record::Destination(record) = journal.entry().record else { continue };
            // It must not run before its page faults are served.
            if fetches(journal.entry()) || is_split(journal.entry()) && !is_paged {
                continue;
            }
            let client = client.filter(|_| is_same_qemu(journal.entry()));
            recover_one(journal, record, client).await;
        }
    }

    /// Whether what becomes of a guest is to be seen at its QEMU alone.
    pub fn needs_monitor(&self) -> bool {
        let is_owned = |journal: &Journal| {
            journal.entry().record == Record::Destination(DestinationRecord::Owned)
        };
        self.journals.iter().any(|journal| is_owned(journal) && is_same_qemu(journal.entry()))
    }

    /// Whether somebody may ask about a migration that ended here without the source's knowledge.
    pub fn is_asked_for(&self) -> bool {
        self.journals.iter().any(|journal| !journal.entry().heard)
    }

    /// Whether the latest arrival's source is known to know how it ended.
    pub fn source_knows(&self) -> bool {
        self.journals.last().is_none_or(|journal| journal.entry().heard)
    }

    /// Id of the latest arrival, and whether the guest belongs here.
    pub fn latest(&self) -> Option<(String, bool)> {
        let entry = self.journals.last()?.entry();
        let owned = matches!(
            entry.record,
            Record::Destination(
                DestinationRecord::Owned | DestinationRecord::Fetching | DestinationRecord::Running
            )
        );
        Some((entry.migration.clone(), owned))
    }

    /// An operator made sure that the source does not and will not run the latest guest: it belongs
    /// here if it was loaded completely.
    ///
    /// # Errors
    /// If there is no loaded guest, it was refused already, or the decision cannot be recorded.
    pub async fn operator_run_here(&mut self, client: Option<&Client>) -> Result<(), EngineError> {
        let misuse = |what: &str, remedy: &str| EngineError::Misuse {
            what: what.to_owned(),
            remedy: remedy.to_owned(),
        };
        let Some(journal) = self.journals.last_mut() else {
            return Err(misuse("No migration to this VM is recorded", "Check --qmp and --journal"));
        };
        if journal.entry().record != Record::Destination(DestinationRecord::Receiving) {
            return Ok(());
        }
        let client = client.filter(|_| is_same_qemu(journal.entry()));
        let status = match client {
            Some(client) => client.query_status().await?,
            None => return Err(misuse("Its QEMU is gone", "Resume the guest at its source")),
        };
        if status.state != RunState::Paused {
            return Err(misuse(
                "The guest did not arrive completely",
                "Resume it at its source: migrate resolve --run-here there",
            ));
        }
        Ok(journal.record(Record::Destination(DestinationRecord::Owned))?)
    }

    /// The latest arrival, whose guest is paged.
    pub fn latest_paged(&self) -> Option<Latest> {
        let journal = self.journals.last()?;
        let (socket, from) = (journal.socket(), journal.entry().peer_name.clone());
        Some(Latest { socket, from })
    }

    /// Notes where the memory of the latest guest is.
    ///
    /// # Errors
    /// [`JournalError`] if that cannot be written.
    pub fn note_split(&mut self, split: Split) -> Result<(), JournalError> {
        let Some(journal) = self.journals.last_mut() else { return Ok(()) };
        match journal.entry().paging.clone() {
            Some(paging) => journal.set_paging(PagingEntry { split: Some(split), ..paging }),
            None => Ok(()),
        }
    }

    /// The latest guest is not paged any more. Says whether that is durable.
    pub fn paging_ended(&mut self) -> bool {
        self.journals.last_mut().is_none_or(Journal::end_paging)
    }

    /// Keeps the journal of an arrival that is over.
    pub fn add(&mut self, journal: Journal) {
        self.journals.push(journal);
    }

    /// Answers one question.
    pub async fn answer(&mut self, client: Option<&Client>, mut session: DestinationSession) {
        let asked = tokio::time::timeout(PATIENCE, session.control_receiver.recv()).await;
        let Ok(Ok(Message::Ask(ask))) = asked else {
            session.close(close_code::PROTOCOL, "a question is due").await;
            return;
        };
        let id = ask.migration.to_string();
        let mut known_at = None;
        let known = self.journals.iter().enumerate().find(|(_, one)| one.entry().migration == id);
        let (state, text) = match known {
            Some((at, journal)) => {
                let verdict = state_of(journal, client).await;
                known_at = Some(at);
                verdict
            }
            None => {
                let text = format!("no journal about {} knows it", self.qmp.display());
                (DestinationState::Unknown, text)
            }
        };
        tell!("{} asks about {id}: {state:?}", session.peer.name);
        let verdict = Message::Verdict(Verdict { state, text });
        if let Err(error) = session.control_sender.send(&verdict).await {
            tracing::info!(%error, "not answered");
        }
        // The asker says when it has heard; what is not final it will ask again.
        let heard = farewell(&mut session.control_receiver, &session.closer);
        let heard = tokio::time::timeout(PATIENCE, heard).await;
        let heard = matches!(heard, Ok(None | Some(TransportError::Closed { .. })));
        let last_word = matches!(state, DestinationState::Running | DestinationState::Refused);
        if heard
            && last_word
            && let Some(journal) = known_at.and_then(|at| self.journals.get_mut(at))
        {
            journal.mark_heard();
        }
        session.close(close_code::DONE, "answered").await;
    }
}

/// Whether an entry is about a guest that belongs here and lies on memory servers in part.
fn is_split(entry: &Entry) -> bool {
    use DestinationRecord::{Owned, Running};
    let owned = matches!(entry.record, Record::Destination(Owned | Running));
    let split = entry.paging.as_ref().is_some_and(|paging| paging.split.is_some());
    owned && split && is_same_qemu(entry)
}

/// Whether an entry is about a guest that belongs here and may lack pages.
pub fn fetches(entry: &Entry) -> bool {
    use DestinationRecord::{Fetching, Owned};
    let owned = matches!(entry.record, Record::Destination(Owned | Fetching));
    let lacks = entry.paging.as_ref().is_some_and(|paging| paging.split.is_none());
    owned && lacks && is_same_qemu(entry)
}

async fn recover_one(journal: &mut Journal, record: DestinationRecord, client: Option<&Client>) {
    let (mut state, outputs) = Destination::recovered(record);
    let mut todo = std::collections::VecDeque::from(outputs);
    while let Some(output) = todo.pop_front() {
        let input = match (output, client) {
            (Output::Record(record), _) => match journal.record(Record::Destination(record)) {
                Ok(()) => Input::Recorded,
                Err(error) => {
                    tracing::error!(%error, "refusal not recorded");
                    Input::RecordFailed
                }
            },
            (Output::ResumeGuest, Some(client)) => {
                tell!("the guest of migration {} belongs here", journal.entry().migration);
                match resume_guest(client, journal.entry().was_running).await {
                    Ok(()) => Input::Resumed { complete: !lacks_pages(client).await },
                    Err(error) => {
                        tracing::error!(error = %error.tell(), "the guest could not be resumed");
                        Input::ResumeFailed
                    }
                }
            }
            (Output::DiscardGuest, Some(client)) => {
                discard(client, None).await;
                continue;
            }
            _ => continue,
        };
        let (next, more) = state.handle(input);
        state = next;
        todo.extend(more);
    }
}

async fn state_of(journal: &Journal, client: Option<&Client>) -> (DestinationState, String) {
    match journal.entry().record {
        Record::Destination(DestinationRecord::Refused) => {
            (DestinationState::Refused, "it never ran here and never will".into())
        }
        Record::Destination(DestinationRecord::Running) => {
            (DestinationState::Running, "it ran here".into())
        }
        _ if fetches(journal.entry()) => {
            (DestinationState::Fetching, "it belongs here; pages of it are missing".into())
        }
        Record::Destination(DestinationRecord::Owned | DestinationRecord::Fetching) => {
            owned_state(journal.entry(), client).await
        }
        _ => (DestinationState::Unknown, "its arrival is not over".into()),
    }
}

/// Whether QEMU here still takes pages of its guest; also if that cannot be told.
async fn lacks_pages(client: &Client) -> bool {
    device_state::is_in_postcopy(client).await.unwrap_or(true)
}

async fn owned_state(entry: &Entry, client: Option<&Client>) -> (DestinationState, String) {
    let client = client.filter(|_| is_same_qemu(entry));
    let Some(client) = client else {
        return (DestinationState::Owned, "it belongs here, but its QEMU is gone".into());
    };
    if lacks_pages(client).await {
        return (DestinationState::Fetching, "it belongs here; QEMU lacks pages of it".into());
    }
    match client.query_status().await {
        Ok(status) if status.running || !entry.was_running => {
            (DestinationState::Running, "it runs here".into())
        }
        Ok(status) => (DestinationState::Owned, format!("it belongs here and is {}", status.state)),
        Err(error) => (DestinationState::Owned, format!("it belongs here; {error}")),
    }
}
