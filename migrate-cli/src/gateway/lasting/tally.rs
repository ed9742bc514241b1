//! Which session a stream has, and how many it had.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::watch;
use transport::messages::{self, Abort, Message};
use transport::{Closer, ControlSender, close_code};

use super::{REPLACED, wire_bytes};
use crate::error::EngineError;

/// The sessions of a stream.
#[derive(Debug)]
pub(super) struct Tally {
    current: Mutex<Option<(ControlSender, Closer)>>,
    /// Whether there is one.
    is_there: watch::Sender<bool>,
    /// Payload bytes of those before.
    before_bytes: AtomicU64,
    reconnects: AtomicU64,
}

impl Tally {
    /// With its first session.
    pub(super) fn new(sender: ControlSender, closer: Closer) -> Self {
        Self {
            current: Mutex::new(Some((sender, closer))),
            is_there: watch::channel(true).0,
            before_bytes: AtomicU64::new(0),
            reconnects: AtomicU64::new(0),
        }
    }

    /// The session is lost. Streams of it that are dropped after this do not look as if they had ended.
    pub(super) fn lose(&self) {
        let Some((_, closer)) = self.current.lock().take() else { return };
        self.is_there.send_replace(false);
        closer.close_now(close_code::REPLACED, REPLACED);
        self.before_bytes.fetch_add(wire_bytes(&closer), Ordering::Relaxed);
    }

    /// Another one takes its place.
    pub(super) fn replace(&self, sender: ControlSender, closer: Closer) {
        *self.current.lock() = Some((sender, closer));
        self.is_there.send_replace(true);
        self.reconnects.fetch_add(1, Ordering::Relaxed);
    }

    /// Breaks the session off, as either end may.
    #[cfg(test)]
    pub(super) fn cut(&self) {
        if let Some((_, closer)) = &*self.current.lock() {
            closer.close_now(close_code::REPLACED, "a test");
        }
    }

    /// Whether there is none at the moment.
    pub(super) fn is_away(&self) -> bool {
        !*self.is_there.borrow()
    }

    /// Waits until there is one.
    pub(super) async fn there(&self) {
        let mut is_there = self.is_there.subscribe();
        let _cannot_fail = is_there.wait_for(|is_there| *is_there).await;
    }

    /// How often one took another's place.
    pub(super) fn reconnects(&self) -> u64 {
        self.reconnects.load(Ordering::Relaxed)
    }

    /// Payload bytes in both directions, over all sessions.
    pub(super) fn wire_bytes(&self) -> u64 {
        let now = self.current.lock().as_ref().map_or(0, |(_, closer)| wire_bytes(closer));
        self.before_bytes.load(Ordering::Relaxed) + now
    }

    /// Ends the session in good order, if there is one.
    pub(super) async fn close(&self) {
        let current = self.current.lock().clone();
        if let Some((_, closer)) = current {
            closer.close(close_code::DONE, "done").await;
        }
    }

    /// Tells the other end why nothing comes of it, if it can be told, and ends the session.
    pub(super) async fn abort(&self, error: &EngineError) {
        let current = self.current.lock().clone();
        if let Some((sender, closer)) = current {
            abort(&sender, &closer, error).await;
        }
    }
}

/// Tells the other end why nothing comes of it, and ends the session.
pub(super) async fn abort(sender: &ControlSender, closer: &Closer, error: &EngineError) {
    let (code, text) = (error.abort_code(), messages::text(&error.tell()));
    let told = async {
        sender.send(&Message::Abort(Abort { code, text: text.clone() })).await?;
        sender.finish(super::TOLD_WITHIN).await
    };
    let _lost_contact_is_noticed_there = tokio::time::timeout(super::TOLD_WITHIN, told).await;
    closer.close(close_code::ABORTED, &text).await;
}
