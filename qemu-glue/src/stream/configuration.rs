//! The beginning of a stream: magic, version and configuration section (migration/savevm.c,
//! `vmstate_configuration`).
//!
//! ```text
//! QEVM | be32 3 | 07 | be32 length, machine | ( 05 | name | be32 1 | body )*
//! ```
//!
//! Nothing says how long the section is: it ends where no further subsection begins, so the byte
//! that follows belongs to what is needed to read it.

use migrate_core::error::{Classify, ErrorBin};
use migrate_core::layout::PAGE_BYTES;
use thiserror::Error;

use super::cursor::{Cursor, Stop, name};
use super::error::{Refusal, WriteError, fits, put_counted, put_name};

/// `QEVM` (`QEMU_VM_FILE_MAGIC`).
pub(super) const MAGIC: [u8; 4] = *b"QEVM";

/// `QEMU_VM_FILE_VERSION`.
const VERSION: u32 = 3;

/// `QEMU_VM_CONFIGURATION`.
const TYPE_CONFIGURATION: u8 = 7;

/// `QEMU_VM_SUBSECTION`.
const TYPE_SUBSECTION: u8 = 5;

/// The version that all subsections have.
const SUBSECTION_VERSION: u32 = 1;

/// Longest machine name in bytes; real ones have about 30.
pub const MACHINE_BYTES_MAX: usize = 256;

/// Most capabilities that a stream may list.
pub const CAPABILITIES_MAX: usize = 64;

/// Most subsections; three kinds exist.
pub const SUBSECTIONS_MAX: usize = 8;

/// The capability that leaves shared RAM out.
const IGNORE_SHARED: &str = "x-ignore-shared";

/// The binary logarithm of the size of x86-64's pages.
const PAGE_BITS: u32 = PAGE_BYTES.trailing_zeros();

const NAME_PAGE_BITS: &str = "configuration/target-page-bits";
const NAME_CAPABILITIES: &str = "configuration/capabilities";
const NAME_UUID: &str = "configuration/uuid";

/// A stream whose beginning is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// It ends within the header.
    #[error("The migration stream ends at byte {at}, within its header")]
    Cut {
        /// How many bytes there were.
        at: usize,
    },
    /// It does not begin with QEMU's magic.
    #[error("This is no QEMU migration stream")]
    Magic,
    /// Another version of the stream.
    #[error("The migration stream has version {found}; {VERSION} is supported")]
    Version {
        /// The version.
        found: u32,
    },
    /// Something else comes where the configuration is expected.
    #[error(
        "The migration stream has no configuration section; is the machine type older than 2.4?"
    )]
    NoConfiguration,
    /// A field of the configuration is out of bounds.
    #[error("The migration stream's configuration section is damaged: {what}")]
    Configuration {
        /// Which field.
        what: &'static str,
    },
    /// The stream would contain shared RAM.
    #[error("The migration stream was written without x-ignore-shared")]
    SharedNotIgnored,
}

impl Classify for HeaderError {
    fn bin(&self) -> ErrorBin {
        match self {
            Self::Version { .. } | Self::NoConfiguration | Self::SharedNotIgnored => {
                ErrorBin::PeerIncompatible
            }
            _ => ErrorBin::PeerMisbehaved,
        }
    }
}

/// What the source says of its machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configuration {
    /// The machine's full name, such as `pc-i440fx-7.2`. The destination's must be the same.
    pub machine: String,
    /// What else is said, in the stream's order.
    pub subsections: Vec<Subsection>,
}

/// An optional part of the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subsection {
    /// The binary logarithm of the guest's page size, where that is not the architecture's least;
    /// never on x86.
    TargetPageBits(u32),
    /// Those of the capabilities in use that both ends must agree on.
    Capabilities(Vec<String>),
    /// The guest's UUID, with the capability `validate-uuid`.
    Uuid([u8; 16]),
}

/// Whether more may follow the bytes at hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Following {
    /// The byte after the configuration must be seen before it counts as complete.
    More,
    /// The bytes are all that there is to look at.
    Nothing,
}

type HeadStop = Stop<HeaderError>;

fn damaged<T>(what: &'static str) -> Result<T, HeadStop> {
    Err(Stop::Refused(HeaderError::Configuration { what }))
}

impl Configuration {
    /// The capabilities that are listed, in the stream's order.
    pub fn capabilities(&self) -> impl Iterator<Item = &str> {
        self.subsections.iter().flat_map(|subsection| match subsection {
            Subsection::Capabilities(names) => names.iter().map(String::as_str),
            _ => [].iter().map(String::as_str),
        })
    }

    /// Whether the stream leaves shared RAM out, and its list of blocks has addresses.
    pub fn ignores_shared(&self) -> bool {
        self.capabilities().any(|name| name == IGNORE_SHARED)
    }

    /// Refuses what changes the stream in ways that are not read.
    pub(super) fn check_supported(&self) -> Result<(), Refusal> {
        for subsection in &self.subsections {
            match subsection {
                Subsection::TargetPageBits(bits) if *bits != PAGE_BITS => {
                    return Err(Refusal::PageBits { bits: *bits });
                }
                _ => {}
            }
        }
        let remedy = |name| match name {
            "mapped-ram" => "switch it off: it is for files, not for connections",
            _ => "switch it off at both ends",
        };
        match self.capabilities().find(|name| *name != IGNORE_SHARED) {
            Some(name) => Err(Refusal::Capability { name: name.to_owned(), remedy: remedy(name) }),
            None => Ok(()),
        }
    }

    /// Reads magic, version and configuration.
    pub(crate) fn read(cursor: &mut Cursor<'_>, following: Following) -> Result<Self, HeadStop> {
        if *cursor.array()? != MAGIC {
            return Err(Stop::Refused(HeaderError::Magic));
        }
        let found = cursor.u32()?;
        if found != VERSION {
            return Err(Stop::Refused(HeaderError::Version { found }));
        }
        if cursor.u8()? != TYPE_CONFIGURATION {
            return Err(Stop::Refused(HeaderError::NoConfiguration));
        }
        let length = cursor.u32()? as usize;
        if length == 0 || length > MACHINE_BYTES_MAX {
            return damaged("the machine name's length");
        }
        let Some(machine) = name(cursor.take(length)?) else { return damaged("the machine name") };
        let mut subsections = Vec::new();
        loop {
            match cursor.peek() {
                Some(TYPE_SUBSECTION) => subsections.push(Subsection::read(cursor)?),
                None if following == Following::More => {
                    return Err(Stop::Need(cursor.at().saturating_add(1)));
                }
                _ => return Ok(Self { machine: machine.to_owned(), subsections }),
            }
            if subsections.len() > SUBSECTIONS_MAX {
                return damaged("too many subsections");
            }
        }
    }

    /// Writes magic, version and configuration.
    pub(super) fn write(&self, out: &mut Vec<u8>) -> Result<(), WriteError> {
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_be_bytes());
        out.push(TYPE_CONFIGURATION);
        if self.machine.is_empty() {
            return Err(WriteError::Empty { what: "The machine's name" });
        }
        fits("The machine's name", self.machine.len(), MACHINE_BYTES_MAX)?;
        out.extend_from_slice(&(self.machine.len() as u32).to_be_bytes());
        out.extend_from_slice(self.machine.as_bytes());
        fits("The list of subsections", self.subsections.len(), SUBSECTIONS_MAX)?;
        self.subsections.iter().try_for_each(|subsection| subsection.write(out))
    }
}

impl Subsection {
    fn read(cursor: &mut Cursor<'_>) -> Result<Self, HeadStop> {
        cursor.u8()?;
        let kind = cursor.counted()?;
        if cursor.u32()? != SUBSECTION_VERSION {
            return damaged("a subsection's version");
        }
        match name(kind) {
            Some(NAME_PAGE_BITS) => Ok(Self::TargetPageBits(cursor.u32()?)),
            Some(NAME_UUID) => Ok(Self::Uuid(*cursor.array()?)),
            Some(NAME_CAPABILITIES) => {
                let count = cursor.u32()? as usize;
                if count > CAPABILITIES_MAX {
                    return damaged("the number of capabilities");
                }
                let mut names = Vec::with_capacity(count);
                for _ in 0..count {
                    let Some(name) = name(cursor.counted()?) else { return damaged("a name") };
                    names.push(name.to_owned());
                }
                Ok(Self::Capabilities(names))
            }
            _ => damaged("an unknown subsection"),
        }
    }

    fn write(&self, out: &mut Vec<u8>) -> Result<(), WriteError> {
        out.push(TYPE_SUBSECTION);
        let name = match self {
            Self::TargetPageBits(_) => NAME_PAGE_BITS,
            Self::Capabilities(_) => NAME_CAPABILITIES,
            Self::Uuid(_) => NAME_UUID,
        };
        put_counted("A subsection's name", name.as_bytes(), out)?;
        out.extend_from_slice(&SUBSECTION_VERSION.to_be_bytes());
        match self {
            Self::TargetPageBits(bits) => out.extend_from_slice(&bits.to_be_bytes()),
            Self::Uuid(uuid) => out.extend_from_slice(uuid),
            Self::Capabilities(names) => {
                fits("The list of capabilities", names.len(), CAPABILITIES_MAX)?;
                out.extend_from_slice(&(names.len() as u32).to_be_bytes());
                for name in names {
                    put_name("A capability's name", name, out)?;
                }
            }
        }
        Ok(())
    }
}
