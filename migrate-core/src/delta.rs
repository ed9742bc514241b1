//! Deltas: what changed in a page since the version that the destination holds, in lines of 64
//! bytes.
//!
//! ```text
//! delta = mask: u64, little-endian; bit i says that line i is new | the new lines, in order
//! ```
//!
//! Svärd et al. (VEE 2011) and QEMU's XBZRLE keep the whole page that was sent last and tell changed
//! bytes; what is told here is coarser, but needs only a hash a line of what was sent
//! ([`crate::bases`]): an eighth of the memory, so that every page can have a base.
//!
//! Invariants: a mask is never 0 (an unchanged page is not sent); a delta is applied to exactly the
//! version before its own, which [`crate::page_table`] proves.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::ops::Range;

use crate::layout::PAGE_BYTES;

/// Bytes of a line.
pub const LINE_BYTES: usize = 64;

/// Lines of a page.
pub const LINES: usize = PAGE_BYTES / LINE_BYTES;

/// Bytes of a mask.
pub const MASK_BYTES: usize = size_of::<u64>();

/// A page of which more lines changed travels whole: that is cheaper to take apart, and compresses
/// better.
pub const LINES_CHANGED_MAX: u32 = 48;

/// A page's content.
pub type Page = [u8; PAGE_BYTES];

const _: () = assert!(LINES == u64::BITS as usize);

/// Bytes of the delta with this mask.
pub fn delta_bytes(mask: u64) -> usize {
    (mask.count_ones() as usize).saturating_mul(LINE_BYTES).saturating_add(MASK_BYTES)
}

/// Writes the delta that brings the lines in `mask` of `page`; `out` is [`delta_bytes`] long.
pub fn encode(page: &Page, mask: u64, out: &mut [u8]) {
    let Some((head, mut rest)) = out.split_first_chunk_mut::<MASK_BYTES>() else { return };
    *head = mask.to_le_bytes();
    for range in changed_ranges(mask) {
        let Some(lines) = page.get(range) else { return };
        let Some((target, left)) = rest.split_at_mut_checked(lines.len()) else { return };
        target.copy_from_slice(lines);
        rest = left;
    }
}

/// The bytes of the page that a mask names, neighbours together, in order.
pub fn changed_ranges(mask: u64) -> impl Iterator<Item = Range<usize>> {
    let mut at = 0u32;
    std::iter::from_fn(move || {
        let rest = mask.checked_shr(at).filter(|rest| *rest != 0)?;
        let first = at.saturating_add(rest.trailing_zeros());
        let lines = mask.checked_shr(first)?.trailing_ones();
        at = first.saturating_add(lines);
        Some((first as usize).saturating_mul(LINE_BYTES)..(at as usize).saturating_mul(LINE_BYTES))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_mask() -> impl Strategy<Value = u64> {
        prop_oneof![any::<u64>(), (0u32..64).prop_map(|bit| 1 << bit), Just(u64::MAX), Just(0)]
    }

    proptest! {
        #[test]
        fn the_ranges_are_the_mask(mask in any_mask()) {
            let mut again = 0u64;
            let mut end_before = None;
            for range in changed_ranges(mask) {
                prop_assert!(!range.is_empty() && end_before < Some(range.start));
                end_before = Some(range.end);
                range.step_by(LINE_BYTES).for_each(|at| again |= 1 << (at / LINE_BYTES));
            }
            prop_assert_eq!(again, mask);
        }

        #[test]
        fn a_delta_brings_the_changed_lines(mask in any_mask(), old in any::<u8>(), new in any::<u8>()) {
            let mut delta = vec![0; delta_bytes(mask)];
            encode(&[new; PAGE_BYTES], mask, &mut delta);
            let (head, mut lines) = delta.split_first_chunk().unwrap();
            let mut page = [old; PAGE_BYTES];
            for range in changed_ranges(u64::from_le_bytes(*head)) {
                let (target, rest) = lines.split_at(range.len());
                page.get_mut(range).unwrap().copy_from_slice(target);
                lines = rest;
            }
            prop_assert!(lines.is_empty());
            for (at, byte) in page.iter().enumerate() {
                let changed = mask >> (at / LINE_BYTES) & 1 == 1;
                prop_assert_eq!(*byte, if changed { new } else { old });
            }
        }
    }
}
