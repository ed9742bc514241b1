//! Why a stream, or one direction of it, is not read or written any further.

use migrate_core::error::{Classify, ErrorBin};
use thiserror::Error;

use super::configuration::HeaderError;

/// The reader stopped. It stays stopped: what follows has no known meaning any more.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("QEMU's migration stream cannot be used from byte {at_byte} on")]
pub struct StreamError {
    /// Where the element begins that was refused, in bytes from the stream's start.
    pub at_byte: u64,
    /// Why.
    #[source]
    pub refusal: Refusal,
}

impl Classify for StreamError {
    fn bin(&self) -> ErrorBin {
        self.refusal.bin()
    }
}

/// What is wrong with an element of the stream, or why it is not supported.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The beginning is not what it should be.
    #[error("Its header is refused")]
    Header(#[from] HeaderError),
    /// These bytes belong to another kind of channel.
    #[error("This is {what}, not the main stream of a migration; {remedy}")]
    Channel {
        /// What it is.
        what: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// The source uses a capability that changes the stream in ways that are not read.
    #[error("The source uses the capability {name:?}; {remedy}")]
    Capability {
        /// The capability.
        name: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A section whose length only its own code knows.
    #[error("The stream carries the state of {id:?} in a form that is not read; {remedy}")]
    Section {
        /// Its name.
        id: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A page travels in a form that is not read.
    #[error("RAM travels {how}; {remedy}")]
    RamForm {
        /// In which form.
        how: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// Guest pages have another size.
    #[error(
        "The guest's pages have 2^{bits} bytes; only x86-64 guests with pages of 4096 are read"
    )]
    PageBits {
        /// The binary logarithm of the size in bytes.
        bits: u32,
    },
    /// Another version of a section.
    #[error("Section {id:?} has version {found}; {known} is known")]
    Version {
        /// Its name.
        id: String,
        /// Its version.
        found: u32,
        /// The version that is known.
        known: u32,
    },
    /// An element that QEMU does not have, or not here.
    #[error("An element of type {found:#04x} comes {place}, where none such belongs")]
    Element {
        /// Its type.
        found: u8,
        /// Where.
        place: &'static str,
    },
    /// A section's number is not the one that was announced.
    #[error("A section has number {found} where {known} belongs")]
    SectionNumber {
        /// The number.
        found: u32,
        /// The number that belongs there.
        known: u32,
    },
    /// A command that neither 7.2 nor 10.0 has.
    #[error("Command {number} is not known; is the source a QEMU newer than 10.0?")]
    UnknownCommand {
        /// Its number.
        number: u16,
    },
    /// A command's body is not as its kind has it.
    #[error("Command {name} is damaged: {what}")]
    Command {
        /// Which one.
        name: &'static str,
        /// What is wrong.
        what: &'static str,
    },
    /// The list of RAM blocks is damaged.
    #[error("The list of RAM blocks is damaged: {what}")]
    Blocks {
        /// What is wrong.
        what: &'static str,
    },
    /// A name is empty or not readable.
    #[error("The name of {what} is empty or not readable")]
    Name {
        /// Whose name.
        what: &'static str,
    },
    /// A page of a block that was not listed.
    #[error("A page belongs to RAM block {name:?}, which was not listed")]
    UnknownBlock {
        /// The block.
        name: String,
    },
    /// A page continues a block, but none came before.
    #[error("A page continues the block of the page before, but there is none")]
    NothingToContinue,
    /// A page outside its block.
    #[error("A page at offset {offset_bytes:#x} lies outside RAM block {block:?}")]
    OutOfBlock {
        /// The block.
        block: String,
        /// The page's offset in bytes.
        offset_bytes: u64,
    },
    /// Flags of a record that do not exist, or not together.
    #[error("A record of RAM has flags {flags:#x}, which have no meaning")]
    Flags {
        /// The flags.
        flags: u64,
    },
    /// The description of a delta is damaged.
    #[error("The delta of a page is damaged: {what}")]
    Delta {
        /// What is wrong.
        what: &'static str,
    },
    /// A length is above its limit.
    #[error("{what} takes {found} bytes; at most {max} are read")]
    TooLong {
        /// What is too long.
        what: &'static str,
        /// Its length in bytes.
        found: u64,
        /// The limit in bytes.
        max: u64,
    },
    /// More comes after the end.
    #[error("Bytes follow the end of the stream")]
    AfterEnd,
    /// The stream ends too early.
    #[error("The stream ends {place}; QEMU's log at the source says why")]
    Cut {
        /// Within what.
        place: &'static str,
    },
    /// The reader has refused before.
    #[error("The stream was refused here before; open another one, and read it with a new reader")]
    Stopped,
}

impl Classify for Refusal {
    fn bin(&self) -> ErrorBin {
        match self {
            Self::Header(error) => error.bin(),
            Self::Channel { .. }
            | Self::Capability { .. }
            | Self::Section { .. }
            | Self::RamForm { .. }
            | Self::PageBits { .. }
            | Self::Version { .. }
            | Self::UnknownCommand { .. } => ErrorBin::PeerIncompatible,
            Self::Stopped => ErrorBin::CallerMisuse,
            Self::Cut { .. } => ErrorBin::System,
            _ => ErrorBin::PeerMisbehaved,
        }
    }
}

/// What the writer was given cannot be written. Nothing of it has been.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum WriteError {
    /// A length does not fit its field, or is above what a reader accepts.
    #[error("{what} takes {found}; at most {max} can be written")]
    TooLong {
        /// What is too long.
        what: &'static str,
        /// Its length.
        found: usize,
        /// The limit.
        max: usize,
    },
    /// Something must not be empty.
    #[error("{what} is empty")]
    Empty {
        /// What is empty.
        what: &'static str,
    },
    /// A page before the list of RAM blocks, or of a block that is not in it.
    #[error("A page belongs to RAM block number {number}; the writer has a list of {known} blocks")]
    UnknownBlock {
        /// The block's place in the list.
        number: usize,
        /// Length of the list.
        known: usize,
    },
    /// A page outside its block.
    #[error("A page at offset {offset_bytes:#x} does not lie in RAM block {block:?}")]
    OutOfBlock {
        /// The block.
        block: String,
        /// The page's offset in bytes.
        offset_bytes: u64,
    },
}

impl Classify for WriteError {
    fn bin(&self) -> ErrorBin {
        ErrorBin::CallerMisuse
    }
}

/// Checks a length against the most that can be written.
pub(super) fn fits(what: &'static str, found: usize, max: usize) -> Result<(), WriteError> {
    if found > max { Err(WriteError::TooLong { what, found, max }) } else { Ok(()) }
}

/// Writes bytes with their number in one byte before them.
pub(super) fn put_counted(
    what: &'static str,
    bytes: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), WriteError> {
    let max = usize::from(u8::MAX);
    let length = u8::try_from(bytes.len());
    out.push(length.map_err(|_| WriteError::TooLong { what, found: bytes.len(), max })?);
    out.extend_from_slice(bytes);
    Ok(())
}

/// The same for a name, which is never empty.
pub(super) fn put_name(
    what: &'static str,
    name: &str,
    out: &mut Vec<u8>,
) -> Result<(), WriteError> {
    if name.is_empty() {
        return Err(WriteError::Empty { what });
    }
    put_counted(what, name.as_bytes(), out)
}
