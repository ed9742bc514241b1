//! A stream that goes on while its guest is handed over: by post-copy, the guest needs it until all of its memory is there.

use std::time::Duration;

use migrate_core::handover::DestinationState;
use migrate_core::handover::source::Input;
use qemu_glue::device_state::{Outgoing, Settling};
use tokio::task::JoinHandle;
use transport::For;
use transport::messages::Message;

use crate::cancel;
use crate::error::EngineError;
use crate::gateway::channels::Kind;
use crate::gateway::intake::Taken;
use crate::gateway::passage::Passage;
use crate::progress::Progress;
use crate::source::contact::Contact;
use crate::source::link::Link;

/// Longest wait for QEMU to say how its migration ended, once its stream has.
const ENDS_WITHIN: Duration = Duration::from_secs(10);

/// How long a stream may take to say why it ended, where the session has.
const WHY_WITHIN: Duration = Duration::from_secs(2);

/// How often is looked whether somebody wants this to end.
const TICK: Duration = Duration::from_millis(100);

/// What of a session's messages is the stream's (first), and what is of the hand-over.
pub fn is_for(message: &Message) -> For {
    match message {
        Message::StreamBytes(_)
        | Message::StreamBlocks(_)
        | Message::StreamBack(_)
        | Message::StreamPostcopy(_)
        | Message::StreamEnd(_)
        | Message::Sync(_)
        | Message::Synced(_)
        | Message::Progress(_) => For::First,
        Message::Abort(_) => For::Both,
        _ => For::Second,
    }
}

/// A guest's stream on its way from its QEMU here. Dropping it ends the connection to QEMU, whose migration then fails or,
/// in post-copy, waits for another connection.
#[derive(Debug)]
pub struct Passing {
    passage: Ended<(Taken, Result<(), EngineError>)>,
    /// What came of it.
    passed: Option<(Taken, Result<(), EngineError>)>,
    /// Until it has completed.
    outgoing: Option<Outgoing>,
    /// Since then.
    settling: Option<Settling>,
}

impl Passing {
    /// Passes everything on over a link that has nothing else to carry.
    pub fn start(mut passage: Passage, mut link: Link, outgoing: Outgoing) -> Self {
        let passage = tokio::spawn(async move { passage.pass(&mut link, Kind::Stream).await });
        let passage = Ended(passage);
        Self { passage, passed: None, outgoing: Some(outgoing), settling: None }
    }

    /// Waits until the stream is over at both ends; what kept it from that is returned by [`Self::completed`]. Cancel-safe.
    pub async fn over(&mut self) {
        if self.passed.is_none() {
            let passed = (&mut self.passage.0).await;
            let lost = |error: tokio::task::JoinError| {
                (Taken::default(), Err(EngineError::Internal(error.to_string())))
            };
            self.passed = Some(passed.unwrap_or_else(lost));
        }
    }

    /// What ended the stream, where the session seems to have; else that.
    pub async fn why_over(&mut self, seen: EngineError) -> EngineError {
        let _still_going_on = tokio::time::timeout(WHY_WITHIN, self.over()).await;
        match &mut self.passed {
            Some((_, passed)) => std::mem::replace(passed, Ok(())).err().unwrap_or(seen),
            None => seen,
        }
    }

    /// Passes on until the destination says that it has all of the guest's memory, or contact is lost.
    pub async fn serve(&mut self, contact: &mut Contact) -> Input {
        let (mut is_over, progress) = (false, Progress::new());
        let input = loop {
            let said = tokio::select! {
                said = contact.next() => said,
                () = self.over(), if !is_over => {
                    is_over = true;
                    match &mut self.passed {
                        Some((_, passed)) if passed.is_err() => Err(self.why_over(EngineError::Cancelled).await),
                        _ => continue,
                    }
                }
                () = cancel::requested() => {
                    progress.say(
                        "the guest runs at the destination and needs its memory from here: going on \
                         until all of it is over",
                    );
                    continue;
                }
                () = tokio::time::sleep(TICK) => continue,
            };
            match said {
                Ok(Message::Running(_)) => {
                    // The last words are under way, and QEMU is not quit before it has heard them.
                    let completed = self.completed(true);
                    match tokio::time::timeout(ENDS_WITHIN, completed).await {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => tracing::debug!(error = error.tell(), "QEMU's end"),
                        Err(_elapsed) => tracing::debug!("QEMU's end is not known"),
                    }
                    break Input::Verdict(DestinationState::Running);
                }
                Ok(Message::Verdict(verdict)) => break Input::Verdict(verdict.state),
                Ok(other) => {
                    tracing::warn!(message = other.name(), "out of place");
                    break Input::Lost;
                }
                Err(error) => {
                    eprintln!(
                        "{}; the guest waits for its memory, contact is sought",
                        error.tell()
                    );
                    break Input::Lost;
                }
            }
        };
        progress.finish();
        input
    }

    /// Waits for QEMU to say how its migration ended. Where its connection is what went wrong, it knows why, unless the
    /// guest `is_handed_over` by post-copy: then it does not end, but waits.
    ///
    /// # Errors
    /// What kept the guest from being sent as a whole.
    pub async fn completed(&mut self, is_handed_over: bool) -> Result<(), EngineError> {
        self.over().await;
        let Some(outgoing) = self.outgoing.take() else { return Ok(()) };
        let passed = match &mut self.passed {
            Some((_, passed)) => std::mem::replace(passed, Ok(())),
            None => Ok(()),
        };
        let is_qemus = |error: &EngineError| {
            matches!(error, EngineError::QemuSocket(_) | EngineError::Stream(_))
        };
        if let Err(error) = passed.as_ref()
            && (is_handed_over || !is_qemus(error))
        {
            return passed;
        }
        let ended = tokio::time::timeout(ENDS_WITHIN, outgoing.completed()).await;
        match (passed, ended) {
            (_, Ok(Err(why))) => Err(why.into()),
            (Err(error), _) => Err(error),
            (Ok(()), Ok(Ok(settling))) => {
                self.settling = Some(settling);
                Ok(())
            }
            (Ok(()), Err(_elapsed)) => Err(EngineError::TooSlow {
                wanted: "that QEMU ends its migration",
                seconds: ENDS_WITHIN.as_secs(),
            }),
        }
    }

    /// Waits until QEMU is as it was, once all has been sent.
    ///
    /// # Errors
    /// As [`Self::completed`], or that QEMU did not take its settings back.
    pub async fn settled(&mut self, is_handed_over: bool) -> Result<(), EngineError> {
        let completed = tokio::time::timeout(ENDS_WITHIN, self.completed(is_handed_over)).await;
        completed.unwrap_or(Err(EngineError::Cancelled))?;
        match self.settling.take() {
            Some(settling) => Ok(settling.settled().await?),
            None => Ok(()),
        }
    }

    /// What came of the stream, once it is over.
    pub fn taken(&self) -> Taken {
        self.passed.as_ref().map_or_else(Taken::default, |(taken, _)| *taken)
    }
}

/// A task that ends when it is dropped.
#[derive(Debug)]
pub(super) struct Ended<T>(pub(super) JoinHandle<T>);

impl<T> Drop for Ended<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}
