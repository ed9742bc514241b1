//! The destination's side of the hand-over; see [`super`] for the drawing and the invariant.

use super::{DestinationRecord, DestinationState, Outcome};

/// The destination's state. Consumed by [`Destination::handle`], which returns the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// Pages and device state come in; the guest belongs to the source.
    Receiving,
    /// Everything is loaded, the guest is paused; waits for the commit until its lease ends.
    Ready,
    /// `owned` is being written; the guest does not run yet.
    Owning,
    /// The guest belongs here and is being resumed.
    Owned,
    /// The guest runs here, and pages of it are still at the source (post-copy).
    Fetching,
    /// The guest runs here.
    Running,
    /// `refused` is being written; nobody was told yet.
    Refusing,
    /// The guest will never run here.
    Refused,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// All pages are in place, the device state is loaded and the guest is paused.
    Loaded,
    /// Loading failed, or what arrived does not agree with what was sent.
    LoadFailed,
    /// The record last asked for is durable.
    Recorded,
    /// The record last asked for could not be written.
    RecordFailed,
    /// The source says: run the guest.
    Commit,
    /// The guest was resumed and its run state read back.
    Resumed {
        /// Whether all of its pages are here.
        complete: bool,
    },
    /// The last missing page is in place.
    Fetched,
    /// The guest cannot be resumed: its QEMU is gone or refuses.
    ResumeFailed,
    /// The source asks what was done.
    Asked,
    /// Contact with the source was lost.
    Lost,
    /// The source gave up.
    PeerAborted,
    /// No commit came within the lease.
    LeaseEnded,
    /// Some time has passed since a record or a resumption failed: try it again.
    Retry,
    /// An operator made sure that the source does not and will not run the guest.
    OperatorRunHere,
}

/// What to do about it, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Write this durably, then report [`Input::Recorded`] or [`Input::RecordFailed`].
    Record(DestinationRecord),
    /// Tell the source that everything is loaded.
    SayReady,
    /// Let the guest run, read its state back, then report [`Input::Resumed`]. Where
    /// pages are missing, faults are served before that.
    ResumeGuest,
    /// Answer the source, if it is listening.
    Say(DestinationState),
    /// The guest here is not needed: its memory can go.
    DiscardGuest,
}

impl Destination {
    /// The state to start from with what a journal holds after a crash, and the first things to do.
    ///
    /// A crash while receiving ends in a refusal: what was loaded cannot be vouched for, and the
    /// source either still owns the guest or is about to ask.
    pub fn recovered(record: DestinationRecord) -> (Self, Vec<Output>) {
        match record {
            DestinationRecord::Receiving => Self::refuse(),
            DestinationRecord::Owned => (Self::Owned, vec![Output::ResumeGuest]),
            DestinationRecord::Fetching => (Self::Fetching, vec![]),
            // Whether it still runs is its user's business, and it may have moved on.
            DestinationRecord::Running => (Self::Running, vec![]),
            DestinationRecord::Refused => (Self::Refused, vec![Output::DiscardGuest]),
        }
    }

    /// How it ended here, once it has.
    pub fn outcome(self) -> Option<Outcome> {
        match self {
            Self::Running => Some(Outcome::Completed),
            Self::Refused => Some(Outcome::RolledBack),
            _ => None,
        }
    }

    /// Advances by one input. Inputs that mean nothing in a state change nothing.
    #[must_use]
    pub fn handle(self, input: Input) -> (Self, Vec<Output>) {
        match self {
            Self::Receiving => match input {
                Input::Loaded => (Self::Ready, vec![Output::SayReady]),
                Input::OperatorRunHere
                | Input::Recorded
                | Input::Resumed { .. }
                | Input::Fetched
                | Input::Retry => (self, vec![]),
                _ => Self::refuse(),
            },
            Self::Ready => match input {
                Input::Commit | Input::OperatorRunHere => {
                    (Self::Owning, vec![Output::Record(DestinationRecord::Owned)])
                }
                Input::Asked => (self, vec![Output::Say(DestinationState::Ready)]),
                Input::LeaseEnded | Input::PeerAborted | Input::ResumeFailed => Self::refuse(),
                _ => (self, vec![]),
            },
            Self::Owning => match input {
                Input::Recorded => (Self::Owned, vec![Output::ResumeGuest]),
                // Whether it reached the disk is unknown: write the refusal over it.
                Input::RecordFailed => Self::refuse(),
                _ => (self, vec![]),
            },
            Self::Owned => match input {
                Input::Resumed { complete: true } => Self::arrived(),
                Input::Resumed { complete: false } => {
                    let told = Output::Say(DestinationState::Fetching);
                    (Self::Fetching, vec![told, Output::Record(DestinationRecord::Fetching)])
                }
                Input::Retry => (self, vec![Output::ResumeGuest]),
                Input::Asked => (self, vec![Output::Say(DestinationState::Owned)]),
                _ => (self, vec![]),
            },
            Self::Fetching => match input {
                Input::Fetched => Self::arrived(),
                Input::Asked | Input::Commit => {
                    (self, vec![Output::Say(DestinationState::Fetching)])
                }
                _ => (self, vec![]),
            },
            Self::Running => match input {
                Input::Asked | Input::Commit => {
                    (self, vec![Output::Say(DestinationState::Running)])
                }
                _ => (self, vec![]),
            },
            Self::Refusing => match input {
                Input::Recorded => {
                    let told = Output::Say(DestinationState::Refused);
                    (Self::Refused, vec![told, Output::DiscardGuest])
                }
                // Not durable: say nothing, try again when somebody asks.
                Input::Asked | Input::Commit | Input::Retry => Self::refuse(),
                _ => (self, vec![]),
            },
            Self::Refused => match input {
                Input::Asked | Input::Commit => {
                    (self, vec![Output::Say(DestinationState::Refused)])
                }
                _ => (self, vec![]),
            },
        }
    }

    fn arrived() -> (Self, Vec<Output>) {
        let told = Output::Say(DestinationState::Running);
        (Self::Running, vec![told, Output::Record(DestinationRecord::Running)])
    }

    fn refuse() -> (Self, Vec<Output>) {
        (Self::Refusing, vec![Output::Record(DestinationRecord::Refused)])
    }
}
