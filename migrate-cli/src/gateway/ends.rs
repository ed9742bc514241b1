//! Where a guest's stream comes from: a session, or as many as it takes.

use std::sync::Arc;

use migrate_core::page_table::DestinationPages;
use transport::messages::Message;
use transport::{Closer, ControlReceiver, ControlSender, LaneReceiver};

use super::lasting::{Arriving, Control};
use crate::destination::intake::Intake;
use crate::destination::sink::PageSink;
use crate::error::EngineError;

/// One session's ends.
#[derive(Debug)]
pub struct One<'a> {
    /// Until pages may come.
    lanes: Vec<LaneReceiver>,
    lane_count: usize,
    sender: ControlSender,
    receiver: &'a mut ControlReceiver,
    closer: Closer,
}

/// What a stream comes by.
#[derive(Debug)]
pub enum Ends<'a> {
    /// One session.
    One(One<'a>),
    /// What outlives sessions.
    Lasting(&'a mut Arriving),
}

/// Tells when nothing more comes.
#[derive(Debug)]
pub enum Over {
    /// With a session.
    One(Closer),
    /// With the last of several.
    Lasting(Arc<Control>),
}

impl Over {
    /// Returns then: why, if that is not what is heard last.
    pub async fn wait(&self) -> Option<EngineError> {
        match self {
            Self::One(closer) => Some(closer.closed().await.into()),
            Self::Lasting(control) => {
                control.ended().await;
                None
            }
        }
    }
}

impl<'a> Ends<'a> {
    /// Those of a session.
    pub fn one(
        lanes: Vec<LaneReceiver>,
        sender: ControlSender,
        receiver: &'a mut ControlReceiver,
        closer: Closer,
    ) -> Self {
        Self::One(One { lane_count: lanes.len(), lanes, sender, receiver, closer })
    }

    /// When nothing more comes.
    pub fn over(&self) -> Over {
        match self {
            Self::One(one) => Over::One(one.closer.clone()),
            Self::Lasting(arriving) => Over::Lasting(Arc::clone(arriving.control())),
        }
    }

    /// How many lanes there are.
    pub fn lane_count(&self) -> usize {
        match self {
            Self::One(one) => one.lane_count,
            Self::Lasting(arriving) => arriving.lane_count(),
        }
    }

    /// The next message. Cancel-safe.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn recv(&mut self) -> Result<Message, EngineError> {
        match self {
            Self::One(one) => Ok(one.receiver.recv().await?),
            Self::Lasting(arriving) => arriving.recv().await,
        }
    }

    /// Says something.
    ///
    /// # Errors
    /// If it is over.
    pub async fn send(&self, message: Message) -> Result<(), EngineError> {
        match self {
            Self::One(one) => Ok(one.sender.send(&message).await?),
            Self::Lasting(arriving) => arriving.control().send(message).await,
        }
    }

    /// Pages may come from now on. To be called once.
    pub fn begin_pages(&mut self, sink: Arc<dyn PageSink>, pages: Arc<DestinationPages>) -> Intake {
        match self {
            Self::One(one) => {
                let lanes = std::mem::take(&mut one.lanes);
                Intake::start(sink, pages, lanes, one.sender.clone(), &one.closer)
            }
            Self::Lasting(arriving) => arriving.begin_pages(sink, pages),
        }
    }
}
