//! `Listed`: extents, the version of each as the payload, and where the list goes on as the number.
//!
//! ```text
//!   header (number: next page or 0) | extent 0 | extent 1 | ... | version 0 | version 1 | ...
//! ```
//!
//! Invariant: a list that passes [`check`] is in ascending order, names no page twice, and goes on behind
//! its last entry. So whoever follows it comes to an end.

use bytes::{BufMut, Bytes, BytesMut};
use migrate_core::store::Extent;
use migrate_core::store::names::VERSION_MAX;
use zerocopy::FromBytes;
use zerocopy::little_endian::U64;

use super::VERSION_BYTES;
use crate::error::WireError;

/// Checks what extents alone do not show, and returns the frame's number.
pub(super) fn check(entries: &[(Extent, u64)], next_page: Option<u64>) -> Result<u64, WireError> {
    let rule = |holds, field, value, rule| match holds {
        true => Ok(()),
        false => Err(WireError::Field { what: "Listed", field, value, rule }),
    };
    let mut end = 0;
    for (extent, version) in entries {
        let first = extent.first_page;
        rule(first >= end, "first page", first, "entries are in ascending order")?;
        let is_version = (1..=VERSION_MAX).contains(version);
        rule(is_version, "version", *version, "1 to 2^63 are allowed")?;
        end = extent.end();
    }
    let Some(next_page) = next_page else { return Ok(0) };
    let follows = end > 0 && next_page >= end;
    rule(follows, "number", next_page, "a list goes on behind an entry")?;
    Ok(next_page)
}

/// What travels as extents, and what as the payload.
pub(super) fn split(entries: &[(Extent, u64)]) -> (Vec<Extent>, Bytes) {
    let mut versions = BytesMut::with_capacity(entries.len().saturating_mul(VERSION_BYTES));
    entries.iter().for_each(|(_, version)| versions.put_u64_le(*version));
    (entries.iter().map(|(extent, _)| *extent).collect(), versions.freeze())
}

/// The entries of a frame, which has a version for every extent.
pub(super) fn join(extents: Vec<Extent>, versions: &[u8]) -> Vec<(Extent, u64)> {
    let versions = <[U64]>::ref_from_bytes(versions).unwrap_or_default();
    extents.into_iter().zip(versions.iter().map(|version| version.get())).collect()
}
