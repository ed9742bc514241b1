//! Receives guests into one VM's QEMUs, one after the other.
//!
//! ```text
//!   no socket ─► receives ─► occupied: a guest runs in this QEMU, or it is of no more use
//!       ▲            │  ▲        │
//!       │            ▼  │        │ another QEMU's socket
//!       │          failed ◄──────┘ (after a while, or with another socket)
//! ```
//!
//! Invariant: the monitor of a QEMU that runs a guest is connected to once, to see that: it is for others then.

use std::path::Path;
use std::time::Duration;

use migrate_core::handover::Outcome;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::args::ReceiveArgs;
use crate::destination::remote::Watched;
use crate::error::EngineError;
use crate::{destination, qmp_socket, tell};

/// Pause after something failed.
const AGAIN_AFTER: Duration = Duration::from_secs(30);

/// Pause before a receiver begins again that is still asked about its last guest.
const ANSWERS_AFTER: Duration = Duration::from_secs(1);

/// What a receiver is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// No QEMU was seen yet, or the last one is gone.
    NoSocket,
    /// It waits for a guest, takes one in or pages it.
    Receives,
    /// Its QEMU takes no guest; the next one will.
    Occupied,
    /// Something is wrong; it will try again.
    Failed,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::NoSocket, Self::Receives, Self::Occupied, Self::Failed];

    /// As metrics tell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoSocket => "no-socket",
            Self::Receives => "receives",
            Self::Occupied => "occupied",
            Self::Failed => "failed",
        }
    }
}

/// One VM's receiver.
#[derive(Debug)]
pub struct Receiver {
    args: ReceiveArgs,
    state: Mutex<State>,
    /// The guest that it pages.
    pub watched: Watched,
}

/// What a receiver does after it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// It is over.
    End,
    /// The next QEMU's turn.
    AnotherQemu,
    /// Once more after this time, or with another QEMU.
    Again(Duration),
}

impl Receiver {
    /// One that has not begun.
    pub fn new(args: ReceiveArgs) -> Self {
        let watched = Watched::new(&args.common.qmp);
        Self { args, state: Mutex::new(State::NoSocket), watched }
    }

    /// The VM's QMP socket.
    pub fn qmp(&self) -> &Path {
        &self.args.common.qmp
    }

    /// What it is doing.
    pub fn state(&self) -> State {
        *self.state.lock()
    }

    /// Receives until the user wants out.
    pub async fn run(&self, mut interrupts: watch::Receiver<u32>) {
        let mut told = None;
        let mut known = None;
        loop {
            if qmp_socket::at(self.qmp()).is_none() {
                self.set(State::NoSocket);
            }
            tokio::select! {
                found = qmp_socket::other_than(self.qmp(), known) => known = Some(found),
                _ = interrupts.wait_for(|count| *count > 0) => return,
            }
            loop {
                self.set(State::Receives);
                let ended = tokio::select! {
                    ended = destination::receive_or_another(&self.args, &self.watched) => ended,
                    // At the first interrupt it ends by itself, or says why it does not.
                    _ = interrupts.wait_for(|count| *count > 1) => return,
                };
                let Some(ended) = ended.transpose() else {
                    known = qmp_socket::at(self.qmp());
                    continue;
                };
                let next = self.after(&ended);
                self.tell(&ended, &mut told);
                let pause = match next {
                    Next::End => return,
                    Next::AnotherQemu => break,
                    Next::Again(pause) => pause,
                };
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    found = qmp_socket::other_than(self.qmp(), known) => known = Some(found),
                    _ = interrupts.wait_for(|count| *count > 0) => return,
                }
            }
        }
    }

    fn set(&self, state: State) {
        *self.state.lock() = state;
    }

    fn after(&self, ended: &Result<Outcome, EngineError>) -> Next {
        let next = next(ended, destination::is_asked_for(&self.args.common));
        self.set(match next {
            Next::Again(_) if ended.is_err() => State::Failed,
            _ => State::Occupied,
        });
        next
    }

    /// Says how it ended, what comes again only once.
    fn tell(&self, ended: &Result<Outcome, EngineError>, told: &mut Option<String>) {
        let text = match ended {
            Ok(_) => None,
            Err(EngineError::Cancelled) => return,
            Err(EngineError::NotWaiting { state }) => {
                Some(format!("its QEMU is {state} and takes no guest; the next one will"))
            }
            Err(error) => Some(error.tell()),
        };
        if let Some(text) = text.as_ref().filter(|_| *told != text) {
            tell!("{text}");
        }
        *told = text;
    }
}

fn next(ended: &Result<Outcome, EngineError>, is_asked_for: bool) -> Next {
    match ended {
        Err(EngineError::Cancelled) => Next::End,
        Ok(_) if is_asked_for => Next::Again(ANSWERS_AFTER),
        Ok(_) | Err(EngineError::NotWaiting { .. }) => Next::AnotherQemu,
        Err(_) => Next::Again(AGAIN_AFTER),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_next_follows_from_the_end() {
        assert_eq!(next(&Err(EngineError::Cancelled), true), Next::End);
        assert_eq!(next(&Ok(Outcome::Completed), false), Next::AnotherQemu);
        assert_eq!(next(&Ok(Outcome::Completed), true), Next::Again(ANSWERS_AFTER));
        let running = EngineError::NotWaiting { state: "running".into() };
        assert_eq!(next(&Err(running), false), Next::AnotherQemu);
        let broken = EngineError::Internal("x".into());
        assert_eq!(next(&Err(broken), false), Next::Again(AGAIN_AFTER));
    }
}
