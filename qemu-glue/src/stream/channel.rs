//! Tells from its first bytes what a connection of a migration is for.
//!
//! QEMU opens connections beside the main one with the capabilities `multifd` (migration/multifd.c)
//! and `postcopy-preempt` (migration/postcopy-ram.c). Whoever carries a migration must know them,
//! if only to say what to switch off. The preempt channel has no magic, only records of RAM; of a
//! source before 8.0 it is silent until post-copy begins.

use migrate_core::layout::RAM_BYTES_MAX;

use super::command::TYPE_COMMAND;
use super::configuration::{HeaderError, MAGIC};
use super::error::Refusal;
use super::multifd;
use super::record;

/// As many bytes tell in any case.
pub const FIRST_BYTES: usize = 8;

/// How a stream goes on: with a command, whose number has one byte.
const COMMAND: [u8; 2] = [TYPE_COMMAND, 0];

/// How a TLS handshake begins.
const TLS_HANDSHAKE: [u8; 2] = [0x16, 3];

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Channel {
    /// The main stream, for [`Reader`](super::Reader).
    Main,
    /// The main stream, after its connection was broken in post-copy: for
    /// [`Reader::resumed`](super::Reader::resumed).
    Resumed,
    /// Pages, with `multifd`.
    Multifd,
    /// Pages that were asked for, with `postcopy-preempt`.
    Preempt,
    /// Encrypted by QEMU.
    Tls,
    /// Nothing that a migration has.
    Unknown,
}

/// What a connection is for that begins with these bytes; nothing if they are too few to tell.
pub fn recognise(first: &[u8]) -> Option<Channel> {
    let (magic, _) = first.split_first_chunk::<4>()?;
    if *magic == MAGIC {
        return Some(Channel::Main);
    }
    if u32::from_be_bytes(*magic) == multifd::MAGIC {
        return Some(Channel::Multifd);
    }
    if magic.starts_with(&TLS_HANDSHAKE) {
        return Some(Channel::Tls);
    }
    if magic.starts_with(&COMMAND) {
        return Some(Channel::Resumed);
    }
    let (word, _) = first.split_first_chunk::<FIRST_BYTES>()?;
    let word = u64::from_be_bytes(*word);
    Some(match record::names_a_page(word) && word < RAM_BYTES_MAX {
        true => Channel::Preempt,
        false => Channel::Unknown,
    })
}

impl Channel {
    /// Why it is not carried, with the remedy; nothing if it is.
    pub fn refusal(self) -> Option<Refusal> {
        let (what, remedy) = match self {
            Self::Main => return None,
            Self::Resumed => (
                "a stream that goes on after a broken connection",
                "let QEMU send it to where the first one went",
            ),
            Self::Unknown => return Some(HeaderError::Magic.into()),
            Self::Multifd => (
                "a channel of multifd",
                "switch the capability multifd off at both ends; Godwit has lanes of its own",
            ),
            Self::Preempt => (
                "the channel of postcopy-preempt",
                "switch the capability postcopy-preempt off at both ends; Godwit lets urgent \
                 pages overtake by itself",
            ),
            Self::Tls => (
                "a connection that QEMU encrypts",
                "clear the migration parameter tls-creds at both ends; Godwit encrypts what \
                 leaves the host",
            ),
        };
        Some(Refusal::Channel { what, remedy })
    }
}
