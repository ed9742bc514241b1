//! Streams whose sessions may be replaced, and the sessions that come to do so.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use transport::messages::{self, Message, MigrationId, Refuse, RefuseCode};
use transport::{DestinationSession, close_code};

/// Longest wait for whoever is refused to go.
const REFUSED_WITHIN: Duration = Duration::from_secs(2);

/// A stream that goes on in whichever session comes.
#[derive(Debug)]
struct Entry {
    /// Whose it is.
    peer: String,
    sessions: mpsc::Sender<Resuming>,
    /// One session at a time.
    turn: Arc<Semaphore>,
}

/// A session that is to take another's place.
#[derive(Debug)]
pub(super) struct Resuming {
    pub(super) session: DestinationSession,
    /// As long as it is not decided whether it does, there is no other.
    pub(super) turn: OwnedSemaphorePermit,
}

/// All streams of a gateway that can be taken up.
#[derive(Debug, Clone, Default)]
pub struct Awaited(Arc<Mutex<HashMap<MigrationId, Entry>>>);

/// A stream among them, until this is dropped.
#[derive(Debug)]
pub struct Place {
    awaited: Awaited,
    migration: MigrationId,
    sessions: mpsc::Receiver<Resuming>,
}

impl Awaited {
    /// A stream that a session has begun; nothing if there is one of this migration already.
    pub fn enter(&self, session: &DestinationSession) -> Option<Place> {
        let (sender, sessions) = mpsc::channel(1);
        let mut waiting = self.0.lock();
        if waiting.contains_key(&session.migration) {
            return None;
        }
        let peer = session.peer.name.clone();
        let entry = Entry { peer, sessions: sender, turn: Arc::new(Semaphore::new(1)) };
        waiting.insert(session.migration, entry);
        Some(Place { awaited: self.clone(), migration: session.migration, sessions })
    }

    /// Gives a session to the stream that waits for it, or says why not.
    pub async fn hand_over(&self, session: DestinationSession) {
        let Err((session, (code, why))) = self.offer(session) else { return };
        tracing::warn!(peer = session.peer.name, migration = %session.migration, why, "a session is refused");
        let refuse = Refuse { code, text: messages::text(why) };
        let told = async {
            session.control_sender.send(&Message::Refuse(refuse)).await?;
            session.control_sender.finish(REFUSED_WITHIN).await
        };
        let _gone = tokio::time::timeout(REFUSED_WITHIN, told).await;
        let _gone = tokio::time::timeout(REFUSED_WITHIN, session.closer.closed()).await;
        session.close(close_code::REJECTED, why).await;
    }

    #[expect(clippy::result_large_err, reason = "the session goes on, one way or the other")]
    fn offer(
        &self,
        session: DestinationSession,
    ) -> Result<(), (DestinationSession, (RefuseCode, &'static str))> {
        let waiting = self.0.lock();
        let Some(entry) = waiting.get(&session.migration) else {
            let why = "no stream of this migration waits here: it has ended, was not taken up in time, or the gateway \
                       here was started anew";
            return Err((session, (RefuseCode::NoPlace, why)));
        };
        if entry.peer != session.peer.name {
            let why = "this migration is another host's";
            return Err((session, (RefuseCode::NoPlace, why)));
        }
        let busy = (RefuseCode::Busy, "this migration is being taken up already");
        let Ok(turn) = Arc::clone(&entry.turn).try_acquire_owned() else {
            return Err((session, busy));
        };
        let sent = entry.sessions.try_send(Resuming { session, turn });
        sent.map_err(|error| (error.into_inner().session, busy))
    }
}

impl Place {
    /// The next session that is to take the present one's place. Cancel-safe.
    pub(super) async fn next(&mut self) -> Resuming {
        match self.sessions.recv().await {
            Some(resuming) => resuming,
            // The other end of the queue is kept as long as this is.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.awaited.0.lock().remove(&self.migration);
    }
}
