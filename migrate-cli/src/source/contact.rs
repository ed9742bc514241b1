//! The source's contact with the destination: the session it began with, or one opened later to ask.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migrate_core::handover::DestinationState;
use migrate_core::handover::source::Input;
use transport::messages::{self, Abort, Ask, Commit, Done, Intent, Message, MigrationId};
use transport::{Closer, Identity, Offer, Options, close_code};

use super::gate::Gate;
use super::link::Link;
use crate::ENGINE;
use crate::error::EngineError;
use crate::failpoint;

/// Longest wait for a word of the destination before contact counts as lost: it resumes the guest
/// and syncs its journal in this time.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);

/// Longest wait until a last word is on its way.
const ABORT_WITHIN: Duration = Duration::from_secs(2);

/// Longest wait for the destination to end the session once it was told that all is done.
const DONE_WITHIN: Duration = Duration::from_secs(1);

/// Pause between two attempts to ask.
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(500);

/// How the destination can be reached.
#[derive(Debug)]
pub struct Contact {
    /// Its address.
    pub addr: SocketAddr,
    /// Our identity.
    pub identity: Arc<Identity>,
    /// Session options.
    pub options: Options,
    /// The migration.
    pub migration: MigrationId,
    /// The session in use, if there is one.
    pub session: Option<(Link, Closer)>,
    /// Whether the guest is to run at the destination: it ran here before.
    pub resume: bool,
    /// When the destination said that the guest runs there.
    pub running_at: Option<Instant>,
}

impl Contact {
    /// By the session in which a migration began with the host of this name: whoever else of the authority answers at
    /// this address later is not believed.
    pub fn begun(
        (addr, identity): (SocketAddr, Arc<Identity>),
        options: &Options,
        migration: MigrationId,
        (peer_name, link, closer): (String, Link, Closer),
        resume: bool,
    ) -> Self {
        let options = Options { expected_peer: Some(peer_name), ..options.clone() };
        let session = Some((link, closer));
        Self { addr, identity, options, migration, session, resume, running_at: None }
    }

    /// Tells the destination to run the guest. Returns [`Input::Lost`] if that could not be said.
    pub async fn commit(&mut self) -> Option<Input> {
        let message = Commit { migration: self.migration, resume: self.resume };
        self.tell(Message::Commit(message)).await
    }

    /// Tells the destination that nothing will come of it, if it can be reached.
    pub async fn abort(&mut self, error: &EngineError) {
        let text = messages::text(&error.tell());
        let code = error.abort_code();
        if let Some((link, closer)) = self.session.take() {
            let told = link.send(Message::Abort(Abort { code, text: text.clone() }));
            let _lost_contact_is_noticed_there = tokio::time::timeout(ABORT_WITHIN, told).await;
            closer.close(close_code::ABORTED, &text).await;
        }
    }

    /// Opens a new session and asks what became of the migration. Until `deadline` it tries again;
    /// then it gives up.
    pub async fn ask(&mut self, deadline: Instant) -> Input {
        if let Some((_, closer)) = self.session.take() {
            closer.close_now(close_code::TIMEOUT, "asking anew");
        }
        loop {
            match self.ask_once().await {
                // What a destination does not know, or has and does not run, it may know in a while:
                // its engine is being restarted, or is about to resume the guest.
                Ok(state @ (DestinationState::Unknown | DestinationState::Owned)) => {
                    tracing::info!(?state, "the destination is not done");
                }
                Ok(state) => return Input::Verdict(state),
                Err(error) => {
                    tracing::info!(error = %error.tell(), "the destination was not asked");
                }
            }
            if Instant::now() >= deadline {
                return Input::GiveUpAsking;
            }
            tokio::time::sleep(ASK_AGAIN_AFTER).await;
        }
    }

    async fn ask_once(&mut self) -> Result<DestinationState, EngineError> {
        let offer = Offer::new(ENGINE, self.migration, Intent::Ask);
        let session = transport::connect(self.addr, &self.identity, &self.options, offer).await?;
        let closer = session.closer.clone();
        let gate = Arc::new(Gate::new(None));
        let mut link =
            Link::start(session.control_sender, session.control_receiver, gate, Instant::now());
        link.send(Message::Ask(Ask { migration: self.migration })).await?;
        match link.recv_within("a verdict", ANSWER_WITHIN).await? {
            Message::Verdict(verdict) => {
                tracing::info!(state = ?verdict.state, text = verdict.text, "the destination answered");
                self.session = Some((link, closer));
                Ok(verdict.state)
            }
            other => Err(EngineError::OutOfPlace { got: other.name(), wanted: "Verdict" }),
        }
    }

    /// Waits for the destination's next word about the hand-over.
    pub async fn hear(&mut self) -> Input {
        let Some((link, _)) = &mut self.session else { return Input::Lost };
        match link.recv_within("its word about the hand-over", ANSWER_WITHIN).await {
            Ok(Message::Running(_)) => {
                self.running_at.get_or_insert_with(Instant::now);
                Input::Verdict(DestinationState::Running)
            }
            Ok(Message::Verdict(verdict)) => {
                if verdict.state == DestinationState::Fetching {
                    self.running_at.get_or_insert_with(Instant::now);
                }
                Input::Verdict(verdict.state)
            }
            Ok(other) => {
                tracing::warn!(message = other.name(), "out of place");
                Input::Lost
            }
            Err(EngineError::PeerAborted { .. }) => Input::PeerAborted,
            Err(error) => {
                tracing::warn!(error = %error.tell(), "contact lost after the commit");
                Input::Lost
            }
        }
    }

    /// The destination's next message while it fetches missing pages, however long that takes.
    ///
    /// # Errors
    /// If contact is lost.
    pub async fn next(&mut self) -> Result<Message, EngineError> {
        match &mut self.session {
            Some((link, _)) => link.recv().await,
            None => Err(EngineError::Internal("there is no session".into())),
        }
    }

    /// Bytes that the destination took in this session.
    pub fn applied_bytes(&self) -> u64 {
        self.session.as_ref().map_or(0, |(link, _)| link.applied_bytes())
    }

    /// Ends the session in good order: the destination learns that its last word was heard.
    pub async fn close(&mut self, text: &str) {
        let Some((link, closer)) = self.session.take() else { return };
        let told = link.send(Message::Done(Done {}));
        let _or_else_closing_tells = tokio::time::timeout(DONE_WITHIN, told).await;
        failpoint::hit("source-done").await;
        match tokio::time::timeout(DONE_WITHIN, closer.closed()).await {
            Ok(_by_the_destination) => closer.close_now(close_code::DONE, text),
            Err(_elapsed) => closer.close(close_code::DONE, text).await,
        }
    }

    async fn tell(&mut self, message: Message) -> Option<Input> {
        let Some((link, _)) = &self.session else { return Some(Input::Lost) };
        match tokio::time::timeout(ANSWER_WITHIN, link.send(message)).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => {
                tracing::warn!(error = %error.tell(), "the destination cannot be told");
                Some(Input::Lost)
            }
            Err(_elapsed) => Some(Input::Lost),
        }
    }
}
