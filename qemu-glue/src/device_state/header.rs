//! The beginning of QEMU's migration stream (migration/savevm.c): magic, version, configuration.
//!
//! All numbers are big-endian. Nothing after the configuration section is looked at.

use migrate_core::error::{Classify, ErrorBin};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// `QEVM` (`QEMU_VM_FILE_MAGIC`).
const MAGIC: [u8; 4] = *b"QEVM";

/// `QEMU_VM_FILE_VERSION`.
const VERSION: u32 = 3;

/// `QEMU_VM_CONFIGURATION`.
const TYPE_CONFIGURATION: u8 = 7;

/// `QEMU_VM_SUBSECTION`.
const TYPE_SUBSECTION: u8 = 5;

/// Longest machine name in bytes; real ones have about 30.
const MACHINE_BYTES_MAX: u32 = 256;

/// Most capabilities that a stream may list.
const CAPABILITIES_MAX: u32 = 64;

/// Subsections of the configuration that exist: target-page-bits, capabilities, uuid.
const SUBSECTIONS_MAX: usize = 8;

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

/// What the configuration section says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamHeader {
    /// The machine's full name, such as `pc-i440fx-7.2`. The destination's must be the same.
    pub machine: String,
    /// Capabilities that both ends must agree on.
    pub capabilities: Vec<String>,
    /// Length of the header in bytes.
    pub length_bytes: usize,
}

impl StreamHeader {
    /// Reads the header at the beginning of `bytes`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, HeaderError> {
        let mut reader = Reader { bytes, at: 0 };
        if reader.take(4)? != MAGIC {
            return Err(HeaderError::Magic);
        }
        let found = reader.u32()?;
        if found != VERSION {
            return Err(HeaderError::Version { found });
        }
        if reader.u8()? != TYPE_CONFIGURATION {
            return Err(HeaderError::NoConfiguration);
        }
        let length = reader.u32()?;
        if length == 0 || length > MACHINE_BYTES_MAX {
            return Err(HeaderError::Configuration { what: "the machine name's length" });
        }
        let machine = text(reader.take(length as usize)?, "the machine name")?;
        let mut capabilities = Vec::new();
        let mut subsections = 0;
        while reader.peek() == Some(TYPE_SUBSECTION) {
            subsections += 1;
            if subsections > SUBSECTIONS_MAX {
                return Err(HeaderError::Configuration { what: "too many subsections" });
            }
            reader.subsection(&mut capabilities)?;
        }
        Ok(Self { machine, capabilities, length_bytes: reader.at })
    }

    /// Whether the stream leaves shared RAM out.
    pub fn ignores_shared(&self) -> bool {
        self.capabilities.iter().any(|name| name == "x-ignore-shared")
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], HeaderError> {
        let cut = HeaderError::Cut { at: self.bytes.len() };
        let end = self.at.checked_add(count).ok_or_else(|| cut.clone())?;
        let piece = self.bytes.get(self.at..end).ok_or(cut)?;
        self.at = end;
        Ok(piece)
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn u8(&mut self) -> Result<u8, HeaderError> {
        Ok(self.take(1)?.first().copied().unwrap_or_default())
    }

    fn u32(&mut self) -> Result<u32, HeaderError> {
        Ok(self.take(4)?.iter().fold(0, |value, byte| value << 8 | u32::from(*byte)))
    }

    /// A text with its length in one byte before it.
    fn str8(&mut self) -> Result<String, HeaderError> {
        let length = self.u8()?;
        text(self.take(usize::from(length))?, "a name")
    }

    fn subsection(&mut self, capabilities: &mut Vec<String>) -> Result<(), HeaderError> {
        self.take(1)?;
        let name = self.str8()?;
        let _version = self.u32()?;
        match name.as_str() {
            "configuration/target-page-bits" => self.take(4).map(drop),
            "configuration/uuid" => self.take(16).map(drop),
            "configuration/capabilities" => {
                let count = self.u32()?;
                if count > CAPABILITIES_MAX {
                    return Err(HeaderError::Configuration { what: "the number of capabilities" });
                }
                for _ in 0..count {
                    capabilities.push(self.str8()?);
                }
                Ok(())
            }
            _ => Err(HeaderError::Configuration { what: "an unknown subsection" }),
        }
    }
}

fn text(bytes: &[u8], what: &'static str) -> Result<String, HeaderError> {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.chars().any(char::is_control) => Ok(text.to_owned()),
        _ => Err(HeaderError::Configuration { what }),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Written by QEMU 7.2.22, `-machine pc-i440fx-7.2`, with x-ignore-shared.
    pub(in super::super) fn head() -> Vec<u8> {
        let mut bytes = b"QEVM\0\0\0\x03\x07\0\0\0\x0dpc-i440fx-7.2".to_vec();
        bytes.extend_from_slice(b"\x05\x1aconfiguration/capabilities\0\0\0\x01");
        bytes.extend_from_slice(b"\0\0\0\x01\x0fx-ignore-shared");
        bytes
    }

    /// The same with what follows.
    fn sample() -> Vec<u8> {
        [&head()[..], b"\x01\0\0\0\x02\x03ram"].concat()
    }

    #[test]
    fn a_real_header_is_read() {
        let header = StreamHeader::parse(&sample()).unwrap();
        assert_eq!(header.machine, "pc-i440fx-7.2");
        assert!(header.ignores_shared());
        assert_eq!(header.length_bytes, 0x1a + 52);
    }

    #[test]
    fn every_cut_is_noticed() {
        let bytes = sample();
        for length in 0..0x1a {
            assert!(StreamHeader::parse(&bytes[..length]).is_err(), "{length}");
        }
        // Right behind the machine name there might be no subsection at all.
        let plain = StreamHeader::parse(&bytes[..0x1a]).unwrap();
        assert!(!plain.ignores_shared());
        for length in 0x1b..0x1a + 52 {
            assert!(StreamHeader::parse(&bytes[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn other_streams_are_named() {
        assert_eq!(StreamHeader::parse(b"GARBAGE!"), Err(HeaderError::Magic));
        let old = b"QEVM\0\0\0\x02";
        assert_eq!(StreamHeader::parse(old), Err(HeaderError::Version { found: 2 }));
        let bare = b"QEVM\0\0\0\x03\x01";
        assert_eq!(StreamHeader::parse(bare), Err(HeaderError::NoConfiguration));
        let long = b"QEVM\0\0\0\x03\x07\xff\xff\xff\xff";
        assert!(matches!(StreamHeader::parse(long), Err(HeaderError::Configuration { .. })));
    }

    proptest! {
        #[test]
        fn damage_never_panics(at in 0usize..78, value in any::<u8>(), length in 0usize..90) {
            let mut bytes = sample();
            bytes[at] = value;
            bytes.truncate(length);
            let _ = StreamHeader::parse(&bytes);
        }
    }
}
