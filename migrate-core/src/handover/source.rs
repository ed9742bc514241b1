//! The source's side of the hand-over; see [`super`] for the drawing and the invariant.

use super::{DestinationState, Outcome, SourceRecord};

/// The source's state. Consumed by [`Source::handle`], which returns the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The guest belongs here, running or stopped for its last pages.
    Moving,
    /// `handed over` is being written; nothing was said yet.
    Recording,
    /// The commit may have been sent. Only the destination's word, or an operator's, ends this.
    HandedOver,
    /// The destination refused; that is being written before the guest resumes.
    TakingBack,
    /// The destination runs the guest, whose missing pages are here (post-copy): they are served
    /// until the destination has them all. Only that ends this; nothing resumes the guest here.
    Serving,
    /// The destination runs the guest; that is being written before the guest here is released.
    Finishing,
    /// It is over.
    Ended(Outcome),
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// The destination loaded everything and `agrees` about versions and digests.
    Ready {
        /// Whether its digests equal ours.
        agrees: bool,
    },
    /// The record last asked for is durable.
    Recorded,
    /// The record last asked for could not be written.
    RecordFailed,
    /// The destination answered, on its own or when asked.
    Verdict(DestinationState),
    /// Contact with the destination was lost.
    Lost,
    /// The destination gave up.
    PeerAborted,
    /// The user, or the engine itself, wants the migration undone.
    Cancel,
    /// The destination was asked for as long as is sensible.
    GiveUpAsking,
    /// An operator made sure that the destination does not and will not run the guest.
    OperatorRunHere,
    /// An operator says that the destination has the guest.
    OperatorRunThere,
}

/// What to do about it, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Write this durably, then report [`Input::Recorded`] or [`Input::RecordFailed`].
    Record(SourceRecord),
    /// Tell the destination to run the guest.
    SendCommit,
    /// Tell the destination that nothing will come of it.
    SendAbort,
    /// Ask the destination what it did; report [`Input::Verdict`] or [`Input::Lost`].
    Ask,
    /// Let the guest run here, if it ran before.
    ResumeGuest,
    /// The guest here is no longer needed: quit its QEMU, or leave it paused.
    ReleaseGuest,
}

impl Source {
    /// The state to start from with what a journal holds after a crash.
    pub fn recovered(record: SourceRecord) -> Self {
        match record {
            SourceRecord::Moving => Self::Moving,
            SourceRecord::HandedOver => Self::HandedOver,
            SourceRecord::Serving => Self::Serving,
            SourceRecord::RolledBack => Self::Ended(Outcome::RolledBack),
            SourceRecord::Done => Self::Ended(Outcome::Completed),
        }
    }

    /// Advances by one input. Inputs that mean nothing in a state change nothing.
    #[must_use]
    pub fn handle(self, input: Input) -> (Self, Vec<Output>) {
        match self {
            Self::Moving => Self::moving(input),
            Self::Recording => Self::recording(input),
            Self::HandedOver => Self::handed_over(input),
            Self::Serving => Self::serving(input),
            Self::TakingBack => match input {
                // A journal that cannot be written does not keep the guest down: the destination
                // refused durably, and would say so again after a crash.
                Input::Recorded | Input::RecordFailed => {
                    (Self::Ended(Outcome::RolledBack), vec![Output::ResumeGuest])
                }
                _ => (self, vec![]),
            },
            Self::Finishing => match input {
                Input::Recorded | Input::RecordFailed => {
                    (Self::Ended(Outcome::Completed), vec![Output::ReleaseGuest])
                }
                _ => (self, vec![]),
            },
            Self::Ended(_) => (self, vec![]),
        }
    }

    fn moving(input: Input) -> (Self, Vec<Output>) {
        match input {
            Input::Ready { agrees: true } => {
                (Self::Recording, vec![Output::Record(SourceRecord::HandedOver)])
            }
            Input::Ready { agrees: false } | Input::Cancel | Input::Verdict(_) => {
                // No commit was sent, so the destination will not run it whether it is told or not:
                // the guest does not wait for that.
                let back = vec![Output::ResumeGuest, Output::SendAbort];
                (Self::Ended(Outcome::RolledBack), back)
            }
            Input::Lost | Input::PeerAborted | Input::OperatorRunHere => {
                (Self::Ended(Outcome::RolledBack), vec![Output::ResumeGuest])
            }
            _ => (Self::Moving, vec![]),
        }
    }

    fn recording(input: Input) -> (Self, Vec<Output>) {
        match input {
            Input::Recorded => (Self::HandedOver, vec![Output::SendCommit]),
            // The record may have reached the disk all the same; a restart would then ask, and be
            // refused, because no commit was ever sent.
            Input::RecordFailed => {
                let back = vec![Output::ResumeGuest, Output::SendAbort];
                (Self::Ended(Outcome::RolledBack), back)
            }
            _ => (Self::Recording, vec![]),
        }
    }

    fn handed_over(input: Input) -> (Self, Vec<Output>) {
        match input {
            Input::Verdict(DestinationState::Running) | Input::OperatorRunThere => {
                (Self::Finishing, vec![Output::Record(SourceRecord::Done)])
            }
            Input::Verdict(DestinationState::Fetching) => {
                (Self::Serving, vec![Output::Record(SourceRecord::Serving)])
            }
            Input::Verdict(DestinationState::Refused) | Input::OperatorRunHere => {
                (Self::TakingBack, vec![Output::Record(SourceRecord::RolledBack)])
            }
            Input::Verdict(DestinationState::Ready) => (Self::HandedOver, vec![Output::SendCommit]),
            Input::Verdict(DestinationState::Owned | DestinationState::Unknown)
            | Input::Lost
            | Input::PeerAborted => (Self::HandedOver, vec![Output::Ask]),
            Input::GiveUpAsking => (Self::Ended(Outcome::InDoubt), vec![]),
            _ => (Self::HandedOver, vec![]),
        }
    }

    /// The guest has run at the destination: its memory here is part of it, but it is not the guest
    /// any more. An operator cannot decide otherwise.
    fn serving(input: Input) -> (Self, Vec<Output>) {
        match input {
            Input::Verdict(DestinationState::Running) => {
                (Self::Finishing, vec![Output::Record(SourceRecord::Done)])
            }
            Input::Verdict(DestinationState::Fetching) | Input::Recorded | Input::RecordFailed => {
                (Self::Serving, vec![])
            }
            Input::Verdict(_) | Input::Lost | Input::PeerAborted => {
                (Self::Serving, vec![Output::Ask])
            }
            Input::GiveUpAsking => (Self::Ended(Outcome::InDoubt), vec![]),
            _ => (Self::Serving, vec![]),
        }
    }
}
