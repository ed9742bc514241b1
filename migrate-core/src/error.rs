//! The four bins of errors, and where the guest is when one is reported.
//!
//! Every error type of the workspace's libraries implements [`Classify`], so that the command can
//! tell its user who is at fault without matching on texts.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Who or what is at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ErrorBin {
    /// The other end broke the protocol: a bug there, or an attack.
    PeerMisbehaved,
    /// The other end follows the protocol but cannot take this guest or speaks another version.
    PeerIncompatible,
    /// What was asked for cannot be done as asked; the caller can change it.
    CallerMisuse,
    /// The world failed: kernel, disk, network, QEMU.
    System,
}

impl fmt::Display for ErrorBin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PeerMisbehaved => "peer-misbehaved",
            Self::PeerIncompatible => "peer-incompatible",
            Self::CallerMisuse => "caller-misuse",
            Self::System => "system",
        })
    }
}

/// Implemented by every error type of the libraries.
pub trait Classify {
    /// The bin that this error falls into.
    fn bin(&self) -> ErrorBin;
}

/// What one end's guest is doing, as read back from its QEMU, never as assumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum GuestPlace {
    /// The guest executes here.
    Running,
    /// The guest is complete here but does not execute.
    Paused,
    /// A QEMU waits here for a guest to come in.
    Incoming,
    /// There is no guest here: its QEMU is gone.
    Gone,
    /// It could not be found out.
    Unknown,
}

impl fmt::Display for GuestPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Incoming => "incoming",
            Self::Gone => "gone",
            Self::Unknown => "unknown",
        })
    }
}
