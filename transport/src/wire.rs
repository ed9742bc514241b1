//! Control frames: a header of 16 bytes, then the message's body.
//!
//! ```text
//!  0        4      6       8        12         16
//!  | magic  | type | flags | length | sequence | body ...
//! ```
//!
//! All integers are little-endian. Type 0 does not exist, flags are 0, the length is checked
//! against the limit of the type before anything is allocated, and the sequence counts the frames
//! of one direction from 1 on: a repeat or a gap is an error.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::WireError;
use crate::messages::{Message, message_type};

/// First four bytes of every control frame: `GDWC`.
pub const CONTROL_MAGIC: u32 = u32::from_le_bytes(*b"GDWC");

/// Length of a control frame's header in bytes.
pub const CONTROL_HEADER_BYTES: usize = 16;

/// Longest body of a control frame in bytes; every type has a limit of its own at or below it.
pub const CONTROL_BODY_BYTES_MAX: usize = 1 << 20;

/// The header as it travels.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    kind: U16,
    flags: U16,
    length: U32,
    sequence: U32,
}

const _: () = assert!(size_of::<RawHeader>() == CONTROL_HEADER_BYTES);

/// A header that keeps all rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ControlHeader {
    type_number: u16,
    body_bytes: usize,
}

impl ControlHeader {
    /// Checks a header; `sequence` is the number that it must carry.
    ///
    /// # Errors
    /// The first rule that is broken, in the order of the fields.
    pub fn parse(bytes: &[u8; CONTROL_HEADER_BYTES], sequence: u32) -> Result<Self, WireError> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        if raw.magic.get() != CONTROL_MAGIC {
            return Err(WireError::Magic { what: "Control frame", found: raw.magic.get() });
        }
        let type_number = raw.kind.get();
        let Some((what, bytes_max)) = message_type(type_number) else {
            return Err(WireError::UnknownType { found: type_number });
        };
        if raw.flags.get() != 0 {
            let value = u64::from(raw.flags.get());
            return Err(WireError::Field { what, field: "flags", value, rule: "must be 0" });
        }
        let body_bytes = raw.length.get() as usize;
        let max = bytes_max.min(CONTROL_BODY_BYTES_MAX);
        if body_bytes > max {
            return Err(WireError::TooLong { what, found: body_bytes as u64, max: max as u64 });
        }
        if raw.sequence.get() != sequence {
            return Err(WireError::Sequence {
                what,
                expected: u64::from(sequence),
                found: u64::from(raw.sequence.get()),
            });
        }
        Ok(Self { type_number, body_bytes })
    }

    /// Length of the body that follows, in bytes; within the limit of its type.
    pub fn body_bytes(&self) -> usize {
        self.body_bytes
    }

    /// Decodes and validates the body that follows this header.
    ///
    /// # Errors
    /// A body of another length than announced, one that does not decode, has bytes left over, or
    /// a field that breaks a rule.
    pub fn decode(&self, body: &[u8]) -> Result<Message, WireError> {
        if body.len() != self.body_bytes {
            return Err(WireError::Truncated {
                what: message_type(self.type_number).map_or("Control frame", |(name, _)| name),
                needed: self.body_bytes,
                available: body.len(),
            });
        }
        Message::decode_body(self.type_number, body)
    }
}

/// Encodes a message as one frame, header and body.
///
/// # Errors
/// What the decoder would refuse: a field that breaks a rule or a body above its limit.
pub fn encode(message: &Message, sequence: u32) -> Result<Vec<u8>, WireError> {
    message.validate()?;
    let what = message.name();
    let body = message.encode_body().map_err(|source| WireError::Body { what, source })?;
    let type_number = message.type_number();
    let max = message_type(type_number).map_or(0, |(_, bytes_max)| bytes_max);
    let max = max.min(CONTROL_BODY_BYTES_MAX);
    let too_long = WireError::TooLong { what, found: body.len() as u64, max: max as u64 };
    let length = match u32::try_from(body.len()) {
        Ok(length) if body.len() <= max => length,
        _ => return Err(too_long),
    };
    let header = RawHeader {
        magic: CONTROL_MAGIC.into(),
        kind: type_number.into(),
        flags: 0.into(),
        length: length.into(),
        sequence: sequence.into(),
    };
    let mut frame = Vec::with_capacity(CONTROL_HEADER_BYTES.saturating_add(body.len()));
    frame.extend_from_slice(header.as_bytes());
    frame.extend_from_slice(&body);
    Ok(frame)
}

/// Decodes the frame at the start of `bytes`; returns the message and the frame's length.
///
/// # Errors
/// As [`ControlHeader::parse`] and [`ControlHeader::decode`], or [`WireError::Truncated`].
pub fn decode(bytes: &[u8], sequence: u32) -> Result<(Message, usize), WireError> {
    let truncated =
        |needed| WireError::Truncated { what: "Control frame", needed, available: bytes.len() };
    let (header, rest) = bytes
        .split_first_chunk::<CONTROL_HEADER_BYTES>()
        .ok_or_else(|| truncated(CONTROL_HEADER_BYTES))?;
    let header = ControlHeader::parse(header, sequence)?;
    let frame_bytes = CONTROL_HEADER_BYTES.saturating_add(header.body_bytes);
    let body = rest.get(..header.body_bytes).ok_or_else(|| truncated(frame_bytes))?;
    Ok((header.decode(body)?, frame_bytes))
}

/// The sequence number that follows `sequence`.
///
/// # Errors
/// After 2^32 - 1 frames there is none: the session must end.
pub fn next_sequence(sequence: u32) -> Result<u32, WireError> {
    sequence.checked_add(1).ok_or_else(|| WireError::Sequence {
        what: "Control frame",
        expected: 1 << 32,
        found: u64::from(sequence),
    })
}
