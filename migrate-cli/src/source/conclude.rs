//! The end of a migration: what the report says of it, and what is left behind.

use migrate_core::error::GuestPlace;
use migrate_core::handover::Outcome;
use qemu_glue::qmp::Client;
use transport::messages::AbortCode;

use super::contact::Contact;
use super::handover::place;
use crate::error::EngineError;
use crate::journal::Journal;
use crate::report::{Report, ReportOutcome};

/// A migration whose hand-over has ended.
#[derive(Debug)]
pub struct Ending<'a> {
    /// QEMU's monitor.
    pub client: &'a Client,
    /// The destination.
    pub contact: Contact,
    /// The migration's journal.
    pub journal: Journal,
    /// Why it did not come to the hand-over.
    pub why: Option<EngineError>,
    /// Why the guest, which belongs here, could not be resumed.
    pub stuck: Option<EngineError>,
    /// Pages that the guest still lacks at the destination.
    pub unserved: Option<u64>,
    /// The guest is at the destination and lacks pages that its QEMU here has.
    pub is_stranded: bool,
}

impl Ending<'_> {
    /// Puts the outcome into the report, takes leave of the destination, and removes the journal where nothing is left
    /// to do.
    pub async fn conclude(mut self, report: &mut Report, outcome: Outcome) {
        let client = Some(self.client);
        let qmp = self.journal.entry().qmp.clone();
        match outcome {
            Outcome::Completed => {
                report.outcome = ReportOutcome::Completed;
                self.contact.close("done").await;
                self.journal.remove();
            }
            Outcome::RolledBack => {
                let error = self.why.unwrap_or(EngineError::PeerAborted {
                    code: AbortCode::Internal,
                    text: "the destination refused the guest after the hand-over".into(),
                });
                report.fail(&error, place(client).await, GuestPlace::Incoming);
                self.contact.abort(&error).await;
                match self.stuck {
                    None => self.journal.remove(),
                    // `migrate resolve` can try again with it.
                    Some(stuck) => {
                        let (why, source) = (error.tell(), Box::new(stuck));
                        let error = EngineError::Stuck { qmp, why, source };
                        report.fail(&error, place(client).await, GuestPlace::Incoming);
                    }
                }
            }
            Outcome::InDoubt => {
                let error = match self.unserved {
                    Some(pages) => EngineError::Unserved { qmp, pages },
                    None if self.is_stranded => EngineError::Stranded { qmp },
                    None => EngineError::InDoubt { qmp },
                };
                report.fail(&error, place(client).await, GuestPlace::Unknown);
            }
        }
    }
}
