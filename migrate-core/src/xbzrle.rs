//! XBZRLE: what changed in a page since a version that the other end holds, in the format of QEMU's
//! own migration stream.
//!
//! ```text
//! delta  = ( equal changed )*          what follows the last changed run is equal and left out
//! equal  = length                      bytes to leave as they are; 0 only at the page's start
//! changed = length byte...             at least one byte, none equal to the one it replaces
//! length = ULEB128 of one or two bytes, at most 0x3fff
//! ```
//!
//! [`encode`] writes byte for byte what `xbzrle_encode_buffer` of QEMU (migration/xbzrle.c, the
//! variant in plain C) writes, also in that a changed run ends at the first equal byte, and gives
//! up where that does; QEMU's variant for AVX-512 decides otherwise for some deltas that just fill
//! the limit. [`decode`] takes and refuses what `xbzrle_decode_buffer` takes and refuses.
//!
//! Speed comes from looking at lines of 64 bytes first: in those that are equal nothing else is
//! done, the others become a mask of a bit a byte, in which runs are found by counting bits.
//!
//! Invariants: nothing outside the page or the output is written, whatever comes in; a delta
//! brings the new page from exactly the old one that it was made of.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

#[cfg(test)]
#[expect(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "plain, and of trusted input"
)]
mod reference;

use thiserror::Error;

use crate::delta::{LINE_BYTES, LINES, Page, changed_ranges};
use crate::error::{Classify, ErrorBin};
use crate::layout::PAGE_BYTES;

/// Longest run that a length can tell, in bytes.
pub const RUN_LENGTH_MAX: usize = 0x3fff;

/// Bytes of the longest length.
const LENGTH_BYTES_MAX: usize = 2;

const _: () = assert!(PAGE_BYTES <= RUN_LENGTH_MAX, "one length tells a whole page");
const _: () = assert!(LINE_BYTES == u64::BITS as usize, "a bit a byte of a line");

/// What [`encode`] made of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoded {
    /// The page is as it was; QEMU sends nothing for it.
    Unchanged,
    /// A delta of so many bytes was written.
    Delta(usize),
    /// The delta does not fit; the page must travel whole.
    Overflow,
}

/// A delta that QEMU would refuse, too.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum XbzrleError {
    /// It ends where a run or its length is due.
    #[error("A delta ends within a run")]
    Cut,
    /// A length is above [`RUN_LENGTH_MAX`].
    #[error("A delta has a run whose length takes more than two bytes")]
    Length,
    /// A run that must not be empty is.
    #[error("A delta has an empty run")]
    Empty,
    /// A run reaches beyond the page.
    #[error("A delta reaches beyond its page")]
    BeyondPage,
}

impl Classify for XbzrleError {
    fn bin(&self) -> ErrorBin {
        ErrorBin::PeerMisbehaved
    }
}

/// Writes the delta from `old` to `new` into `out`. QEMU's limit is an `out` of [`PAGE_BYTES`];
/// what is in `out` after an overflow is of no use.
pub fn encode(old: &Page, new: &Page, out: &mut [u8]) -> Encoded {
    let limit = out.len();
    let mut out = Output { rest: out };
    let changes = Changes::between(old, new);
    let mut at = 0;
    while at < PAGE_BYTES {
        // QEMU wants room for a length before it looks whether there is anything to tell.
        if out.rest.len() < LENGTH_BYTES_MAX {
            return Encoded::Overflow;
        }
        let Some(start) = changes.next_changed(at) else { break };
        let end = changes.next_equal(start);
        let run = new.get(start..end).unwrap_or_default();
        if out.put_run(start.wrapping_sub(at), run).is_none() {
            return Encoded::Overflow;
        }
        at = end;
    }
    match limit.wrapping_sub(out.rest.len()) {
        0 => Encoded::Unchanged,
        bytes => Encoded::Delta(bytes),
    }
}

/// Writes the delta that brings the lines in `mask`, whose contents are `lines`, one after the other
/// ([`crate::delta`]). Bytes of them that did not change are told all the same, as QEMU's decoder
/// allows. A page of which [`LINES_CHANGED_MAX`](crate::delta::LINES_CHANGED_MAX) lines changed at
/// most fits an `out` of [`PAGE_BYTES`].
pub fn from_lines(mask: u64, lines: &[u8], out: &mut [u8]) -> Encoded {
    let limit = out.len();
    let mut out = Output { rest: out };
    let (mut at, mut left) = (0usize, lines);
    for range in changed_ranges(mask) {
        let Some((run, rest)) = left.split_at_checked(range.len()) else {
            return Encoded::Overflow;
        };
        if out.put_run(range.start.wrapping_sub(at), run).is_none() {
            return Encoded::Overflow;
        }
        (at, left) = (range.end, rest);
    }
    match limit.wrapping_sub(out.rest.len()) {
        0 => Encoded::Unchanged,
        bytes => Encoded::Delta(bytes),
    }
}

/// Applies a delta to the page that it was made against and returns where its last run ends, in
/// bytes from the page's start. An empty delta changes nothing.
///
/// # Errors
/// [`XbzrleError`] if the delta is not well formed. Runs before the offending one have been
/// applied, so the page is of no use.
pub fn decode(delta: &[u8], page: &mut Page) -> Result<usize, XbzrleError> {
    let mut input = delta;
    let mut rest = &mut page[..];
    while !input.is_empty() {
        let first = rest.len() == PAGE_BYTES;
        let equal = take_length(&mut input)?;
        if equal == 0 && !first {
            return Err(XbzrleError::Empty);
        }
        let (_, tail) = rest.split_at_mut_checked(equal).ok_or(XbzrleError::BeyondPage)?;
        let changed = take_length(&mut input)?;
        if changed == 0 {
            return Err(XbzrleError::Empty);
        }
        let (target, tail) = tail.split_at_mut_checked(changed).ok_or(XbzrleError::BeyondPage)?;
        let (bytes, left) = input.split_at_checked(changed).ok_or(XbzrleError::Cut)?;
        target.copy_from_slice(bytes);
        (input, rest) = (left, tail);
    }
    Ok(PAGE_BYTES.wrapping_sub(rest.len()))
}

/// Takes a length off the front. QEMU wants two bytes there even for a length of one.
fn take_length(input: &mut &[u8]) -> Result<usize, XbzrleError> {
    let (&[low, high], _) = input.split_first_chunk().ok_or(XbzrleError::Cut)?;
    let (length, bytes) = match (low & 0x80, high & 0x80) {
        (0, _) => (usize::from(low), 1),
        (_, 0) => (usize::from(low & 0x7f) | usize::from(high) << 7, 2),
        _ => return Err(XbzrleError::Length),
    };
    *input = input.get(bytes..).unwrap_or_default();
    Ok(length)
}

/// The part of the output that is not written yet.
struct Output<'a> {
    rest: &'a mut [u8],
}

impl Output<'_> {
    /// Writes an equal run's length and a changed run; nothing if there is no room where QEMU wants
    /// it.
    fn put_run(&mut self, equal: usize, changed: &[u8]) -> Option<()> {
        self.put_length(equal)?;
        if self.rest.len() < LENGTH_BYTES_MAX {
            return None;
        }
        self.put_length(changed.len())?;
        self.put(changed)
    }

    fn put_length(&mut self, length: usize) -> Option<()> {
        let low = (length & 0x7f) as u8;
        match length >> 7 {
            0 => self.put(&[low]),
            high => self.put(&[low | 0x80, high as u8]),
        }
    }

    fn put(&mut self, bytes: &[u8]) -> Option<()> {
        let (target, rest) = std::mem::take(&mut self.rest).split_at_mut_checked(bytes.len())?;
        target.copy_from_slice(bytes);
        self.rest = rest;
        Some(())
    }
}

/// Which bytes of a page differ from those of another.
struct Changes {
    /// Lines with a difference, the first lowest.
    lines: u64,
    /// The bytes of each line, the first lowest; 0 for lines without a difference.
    bytes: [u64; LINES],
}

impl Changes {
    fn between(old: &Page, new: &Page) -> Self {
        let mut changes = Self { lines: 0, bytes: [0; LINES] };
        let (old, new) = (old.as_chunks::<LINE_BYTES>().0, new.as_chunks::<LINE_BYTES>().0);
        for (number, (old, new)) in old.iter().zip(new).enumerate() {
            changes.lines |= u64::from(old != new).wrapping_shl(number as u32);
        }
        let mut rest = changes.lines;
        while rest != 0 {
            let number = rest.trailing_zeros() as usize;
            rest &= rest.wrapping_sub(1);
            if let (Some(old), Some(new), Some(bytes)) =
                (old.get(number), new.get(number), changes.bytes.get_mut(number))
            {
                *bytes = changed_bytes(old, new);
            }
        }
        changes
    }

    /// The first changed byte from `at` on.
    fn next_changed(&self, at: usize) -> Option<usize> {
        let (mut line, bit) = (at / LINE_BYTES, at % LINE_BYTES);
        let mut bits = self.bytes.get(line)? & u64::MAX.wrapping_shl(bit as u32);
        if bits == 0 {
            let later = self.lines & u64::MAX.wrapping_shl(line as u32) << 1;
            line = later.trailing_zeros() as usize;
            bits = *self.bytes.get(line)?;
        }
        Some((line << 6) | bits.trailing_zeros() as usize)
    }

    /// The first equal byte from `at` on; the page's end if there is none.
    fn next_equal(&self, at: usize) -> usize {
        let (first, bit) = (at / LINE_BYTES, at % LINE_BYTES);
        let mut sought = u64::MAX.wrapping_shl(bit as u32);
        for (line, bits) in self.bytes.iter().enumerate().skip(first) {
            let equal = !bits & sought;
            if equal != 0 {
                return (line << 6) | equal.trailing_zeros() as usize;
            }
            sought = u64::MAX;
        }
        PAGE_BYTES
    }
}

/// The bytes in which two lines differ, a bit each, the first lowest.
fn changed_bytes(old: &[u8; LINE_BYTES], new: &[u8; LINE_BYTES]) -> u64 {
    /// Every byte's bits but the highest.
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    /// Multiplies the lowest bits of all bytes into the highest byte, in order.
    const GATHER: u64 = 0x0102_0408_1020_4080;
    let words = old.as_chunks::<8>().0.iter().zip(new.as_chunks::<8>().0);
    words.rev().fold(0, |mask, (old, new)| {
        let differ = u64::from_le_bytes(*old) ^ u64::from_le_bytes(*new);
        // The highest bit of each byte that is not 0; no sum carries into the next byte.
        let high = ((differ & LOW).wrapping_add(LOW) | differ) & !LOW;
        mask << 8 | (high >> 7).wrapping_mul(GATHER) >> 56
    })
}

#[cfg(test)]
#[expect(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "a test fails where it is wrong"
)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The length that one length tells, by itself.
    fn length(length: usize) -> Vec<u8> {
        let mut bytes = [0; LENGTH_BYTES_MAX];
        let mut out = Output { rest: &mut bytes };
        out.put_length(length).unwrap();
        let left = out.rest.len();
        bytes[..LENGTH_BYTES_MAX - left].to_vec()
    }

    fn delta(old: &Page, new: &Page) -> Vec<u8> {
        let mut out = [0; PAGE_BYTES];
        match encode(old, new, &mut out) {
            Encoded::Delta(bytes) => out[..bytes].to_vec(),
            other => panic!("{other:?}"),
        }
    }

    proptest! {
        #[test]
        fn lines_become_a_delta(mask in any::<u64>(), few in any::<u64>(), seed in any::<u8>()) {
            use crate::delta::{LINES_CHANGED_MAX, MASK_BYTES, delta_bytes};
            let mask = if mask.count_ones() > LINES_CHANGED_MAX { mask & few } else { mask };
            let old = [seed; PAGE_BYTES];
            let mut new = old;
            for (at, byte) in new.iter_mut().enumerate() {
                // Every other byte of a line stays as it was.
                if mask >> (at / LINE_BYTES) & 1 == 1 && at % 2 == 0 {
                    *byte = byte.wrapping_add(1 + (at % 7) as u8);
                }
            }
            let mut lines = vec![0; delta_bytes(mask)];
            crate::delta::encode(&new, mask, &mut lines);
            let mut out = [0; PAGE_BYTES];
            let mut page = old;
            match from_lines(mask, &lines[MASK_BYTES..], &mut out) {
                Encoded::Unchanged => prop_assert_eq!(mask, 0),
                Encoded::Delta(bytes) => {
                    decode(&out[..bytes], &mut page).unwrap();
                }
                Encoded::Overflow => prop_assert!(false, "too long"),
            }
            prop_assert!(page == new);
        }
    }

    /// As QEMU's unit test `/xbzrle/uleb`.
    #[test]
    fn every_length_comes_back() {
        for want in 0..=RUN_LENGTH_MAX {
            let mut bytes = length(want);
            assert_eq!(bytes.len(), 1 + usize::from(want >= 0x80));
            bytes.push(0);
            let mut input = &bytes[..];
            assert_eq!((take_length(&mut input), input), (Ok(want), &[0][..]));
        }
        assert_eq!(length(0x3fff), [0xff, 0x7f]);
        assert_eq!(take_length(&mut &[0x80, 0x80][..]), Err(XbzrleError::Length));
        assert_eq!(take_length(&mut &[0x05][..]), Err(XbzrleError::Cut));
        let mut padded = &[0x80, 0x00, 0x07][..];
        assert_eq!((take_length(&mut padded), padded), (Ok(0), &[0x07][..]));
    }

    /// As `/xbzrle/encode_decode_zero` and `/xbzrle/encode_decode_unchanged`.
    #[test]
    fn an_equal_page_is_unchanged() {
        let mut page = [0; PAGE_BYTES];
        for (value, byte) in page[1000..3000].iter_mut().enumerate() {
            *byte = value as u8;
        }
        let mut out = [0; PAGE_BYTES];
        assert_eq!(encode(&page, &page, &mut out), Encoded::Unchanged);
        // Even then QEMU wants room for a length.
        assert_eq!(encode(&page, &page, &mut out[..2]), Encoded::Unchanged);
        assert_eq!(encode(&page, &page, &mut out[..1]), Encoded::Overflow);
    }

    /// As `/xbzrle/encode_decode_1_byte`: an equal run of two bytes, a changed one of one.
    #[test]
    fn the_last_byte() {
        let mut page = [0; PAGE_BYTES];
        let mut new = page;
        new[PAGE_BYTES - 1] = 1;
        let delta = delta(&page, &new);
        assert_eq!(delta, [0xff, 0x1f, 1, 1]);
        assert_eq!(decode(&delta, &mut page), Ok(PAGE_BYTES));
        assert_eq!(page, new);
    }

    /// As `/xbzrle/encode_decode_overflow`.
    #[test]
    fn every_other_byte_overflows() {
        let old = [0; PAGE_BYTES];
        let mut new = old;
        new[..PAGE_BYTES - 2].iter_mut().step_by(2).for_each(|byte| *byte = 1);
        assert_eq!(encode(&old, &new, &mut [0; PAGE_BYTES]), Encoded::Overflow);
        assert_eq!(encode(&old, &[1; PAGE_BYTES], &mut [0; PAGE_BYTES]), Encoded::Overflow);
        assert_eq!(
            encode(&old, &[1; PAGE_BYTES], &mut [0; PAGE_BYTES + 3]),
            Encoded::Delta(PAGE_BYTES + 3)
        );
    }

    /// The page of `/xbzrle/encode_decode`: a long run, and two bytes by themselves behind it.
    #[test]
    fn a_run_and_two_bytes() {
        let (mut old, mut new) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
        for at in 1..=200usize {
            (old[1000 + at], new[1000 + at]) = (at as u8 + 4, at as u8);
        }
        (old[1203], new[1203], old[1205], new[1205]) = (107, 103, 109, 105);
        let delta = delta(&old, &new);
        assert_eq!(delta[..4], [0xe9, 0x07, 0xc8, 0x01]);
        assert_eq!(delta[4..204], new[1001..1201]);
        assert_eq!(delta[204..], [2, 1, 103, 1, 1, 105]);
        assert_eq!(decode(&delta, &mut old), Ok(1206));
        assert_eq!(old, new);
    }

    #[test]
    fn a_changed_start_follows_an_empty_run() {
        let (mut old, mut new) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
        new[..130].fill(9);
        let delta = delta(&old, &new);
        assert_eq!(delta[..3], [0, 0x82, 0x01]);
        assert_eq!((delta.len(), decode(&delta, &mut old)), (133, Ok(130)));
        assert_eq!(old, new);
    }

    #[test]
    fn what_qemu_refuses_is_refused() {
        let refused = |delta: &[u8]| decode(delta, &mut [0; PAGE_BYTES]).unwrap_err();
        for cut in [&[5][..], &[0x85], &[5, 1], &[5, 2, 7], &[5, 0x81], &[5, 1, 7, 1]] {
            assert_eq!(refused(cut), XbzrleError::Cut, "{cut:?}");
        }
        assert_eq!(refused(&[0x80, 0x80, 1, 1]), XbzrleError::Length);
        assert_eq!(refused(&[1, 0xff, 0xff, 1]), XbzrleError::Length);
        assert_eq!(refused(&[1, 0, 1, 1]), XbzrleError::Empty);
        assert_eq!(refused(&[1, 1, 7, 0, 1, 7]), XbzrleError::Empty);
        assert_eq!(refused(&[0x81, 0x20, 1, 1]), XbzrleError::BeyondPage);
        assert_eq!(refused(&[0x80, 0x20, 1, 1]), XbzrleError::BeyondPage);
        assert_eq!(refused(&[0xff, 0x1f, 2, 1, 1]), XbzrleError::BeyondPage);
        // What it takes although it would not write it: nothing, a padded length, bytes that are
        // equal.
        let taken = |delta: &[u8]| decode(delta, &mut [0; PAGE_BYTES]);
        assert_eq!(taken(&[]), Ok(0));
        assert_eq!(taken(&[0x80, 0, 1, 0]), Ok(1));
        assert_eq!(taken(&[0, 1, 0]), Ok(1));
    }

    fn noise_page() -> impl Strategy<Value = Page> {
        prop::collection::vec(any::<u8>(), PAGE_BYTES).prop_map(|bytes| bytes.try_into().unwrap())
    }

    /// Runs of changes of every length, next to one another and apart.
    fn change() -> impl Strategy<Value = (usize, usize, u8)> {
        let length = prop_oneof![Just(1), 1usize..10, Just(64), 60usize..200, 1usize..PAGE_BYTES];
        (0..PAGE_BYTES, length, any::<u8>())
    }

    /// Two pages of which one came from the other.
    fn versions() -> impl Strategy<Value = (Page, Page)> {
        let old = prop_oneof![Just([0; PAGE_BYTES]), noise_page()];
        let changed = (old, prop::collection::vec(change(), 0..40)).prop_map(|(old, changes)| {
            let mut new = old;
            for (start, length, value) in changes {
                let end = PAGE_BYTES.min(start + length);
                new[start..end].fill(value);
            }
            (old, new)
        });
        let few_values = prop::collection::vec(0u8..2, 2 * PAGE_BYTES).prop_map(|bytes| {
            let (old, new) = bytes.split_at(PAGE_BYTES);
            (old.try_into().unwrap(), new.try_into().unwrap())
        });
        prop_oneof![8 => changed, 1 => few_values, 1 => (noise_page(), noise_page())]
    }

    proptest! {
        #[test]
        fn the_encoder_equals_the_reference(
            (old, new) in versions(),
            limit in prop_oneof![Just(PAGE_BYTES), 0..2 * PAGE_BYTES],
        ) {
            let (mut out, mut want) = ([0; 2 * PAGE_BYTES], [0; 2 * PAGE_BYTES]);
            let encoded = encode(&old, &new, &mut out[..limit]);
            prop_assert_eq!(encoded, reference::encode(&old, &new, &mut want[..limit]));
            match encoded {
                Encoded::Delta(bytes) => {
                    prop_assert_eq!(&out[..bytes], &want[..bytes]);
                    let mut page = old;
                    let end = decode(&out[..bytes], &mut page).unwrap();
                    prop_assert_eq!((page, &page[end..]), (new, &old[end..]));
                }
                Encoded::Unchanged => prop_assert_eq!(old, new),
                Encoded::Overflow => {}
            }
            prop_assert!(out[limit..].iter().all(|byte| *byte == 0));
        }

        /// A limit a byte below what is needed is kept, and where QEMU gives up nearby.
        #[test]
        fn limits_are_kept_as_the_reference_keeps_them((old, new) in versions(), less in 0usize..5) {
            let (mut out, mut want) = ([0; 2 * PAGE_BYTES], [0; 2 * PAGE_BYTES]);
            if let Encoded::Delta(bytes) = encode(&old, &new, &mut out) {
                let limit = (bytes + 2).saturating_sub(less);
                let encoded = encode(&old, &new, &mut out[..limit]);
                prop_assert_eq!(encoded, reference::encode(&old, &new, &mut want[..limit]));
            }
        }

        #[test]
        fn any_bytes_are_refused_or_stay_within_the_page(
            delta in prop::collection::vec(prop_oneof![0u8..4, any::<u8>()], 0..200),
        ) {
            let mut page = [7; PAGE_BYTES];
            if let Ok(end) = decode(&delta, &mut page) {
                prop_assert!(page[end..].iter().all(|byte| *byte == 7));
            }
        }
    }
}
