//! The beginning of a device state as it travels: what the destination must agree with.
//!
//! Nothing after the configuration section is looked at.

use serde::{Deserialize, Serialize};

use crate::stream::cursor::{Cursor, Stop};
use crate::stream::{Configuration, Following, HeaderError};

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
        let mut cursor = Cursor::new(bytes);
        let configuration = match Configuration::read(&mut cursor, Following::Nothing) {
            Ok(configuration) => configuration,
            Err(Stop::Need(_)) => return Err(HeaderError::Cut { at: bytes.len() }),
            Err(Stop::Refused(error)) => return Err(error),
        };
        let capabilities = configuration.capabilities().map(str::to_owned).collect();
        Ok(Self { machine: configuration.machine, capabilities, length_bytes: cursor.at() })
    }

    /// Whether the stream leaves shared RAM out.
    pub fn ignores_shared(&self) -> bool {
        self.capabilities.iter().any(|name| name == "x-ignore-shared")
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
