//! What can go wrong between us and a QMP socket.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use migrate_core::error::{Classify, ErrorBin};
use thiserror::Error;

/// A QMP command or connection that failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum QmpError {
    /// The socket could not be connected to.
    #[error("The QMP socket {path:?} could not be opened; is QEMU running with -qmp unix:...?")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The connection was accepted but QEMU said nothing.
    #[error(
        "The QMP socket {path:?} sent no greeting within {seconds} s: another client holds this \
         monitor (QEMU serves one at a time); start QEMU with a -qmp socket for this engine"
    )]
    NoGreeting {
        /// The socket.
        path: PathBuf,
        /// How long was waited.
        seconds: u64,
    },
    /// What came first was no QMP greeting.
    #[error("The socket {path:?} does not speak QMP: {detail}")]
    NotQmp {
        /// The socket.
        path: PathBuf,
        /// What was seen.
        detail: String,
    },
    /// The connection ended before the command was answered.
    #[error("QEMU went away before {command:?} was answered: {reason}")]
    Closed {
        /// The command that waited.
        command: String,
        /// How the connection ended.
        reason: String,
    },
    /// No answer came in time. The command may still take effect.
    #[error(
        "QEMU has not answered {command:?} for {} ms; it may still act on it",
        waited.as_millis()
    )]
    Timeout {
        /// The command.
        command: String,
        /// How long was waited.
        waited: Duration,
    },
    /// QEMU refused the command.
    #[error("QEMU refused {command:?}: {desc} ({class})")]
    Command {
        /// The command.
        command: String,
        /// QMP's error class, mostly `GenericError`.
        class: String,
        /// QEMU's text.
        desc: String,
    },
    /// The answer does not have the form that the schema promises.
    #[error("QEMU's answer to {command:?} was not understood: {detail}")]
    Answer {
        /// The command.
        command: String,
        /// What is wrong with it.
        detail: String,
    },
    /// Out-of-band execution was asked for but the monitor does not offer it.
    #[error("The monitor does not offer out-of-band commands; {command:?} cannot be sent so")]
    NoOutOfBand {
        /// The command.
        command: String,
    },
    /// A command with its arguments is larger than QEMU or we accept.
    #[error("The command {command:?} is {bytes} bytes long; that is too much for QMP")]
    TooLong {
        /// The command.
        command: String,
        /// Its length in bytes.
        bytes: usize,
    },
}

impl QmpError {
    /// Whether QEMU answered that it does not know the command.
    pub fn is_command_not_found(&self) -> bool {
        matches!(self, Self::Command { class, .. } if class == "CommandNotFound")
    }

    /// Whether the connection to QEMU is over.
    pub fn is_closed(&self) -> bool {
        matches!(self, Self::Closed { .. })
    }

    pub(crate) fn answer(command: &str, detail: impl Into<String>) -> Self {
        Self::Answer { command: command.to_owned(), detail: detail.into() }
    }
}

impl Classify for QmpError {
    fn bin(&self) -> ErrorBin {
        match self {
            Self::NoGreeting { .. } | Self::NotQmp { .. } | Self::TooLong { .. } => {
                ErrorBin::CallerMisuse
            }
            _ => ErrorBin::System,
        }
    }
}
