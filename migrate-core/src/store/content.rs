//! One page as it is kept: zero, raw or packed. Which of them its length says.
//!
//! | length | content |
//! |---|---|
//! | 0 | a page of zeros |
//! | 1 to [`PACKED_BYTES_MAX`] | one LZ4 block |
//! | 4096 | the page as it is |

use std::fmt;

use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};

use crate::layout::PAGE_BYTES;
use crate::page_table::is_zero;

/// Longest packed page in bytes: what saves less than a quarter is not worth the unpacking.
pub const PACKED_BYTES_MAX: usize = PAGE_BYTES / 4 * 3;

/// Packs pages, some at a time, in memory that it uses again.
pub struct Packing {
    /// LZ4's, if pages are compressed.
    table: Option<CompressTable>,
    scratch: Vec<u8>,
}

impl fmt::Debug for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packing").field("compresses", &self.table.is_some()).finish()
    }
}

impl Packing {
    /// Packs pages if `compresses`; else only pages of zeros become shorter.
    pub fn new(compresses: bool) -> Self {
        Self { table: compresses.then(CompressTable::small), scratch: vec![] }
    }

    /// The pages of `contents`, 4096 bytes each, as they are kept.
    pub fn pack<'a>(&'a mut self, contents: &'a [u8]) -> Vec<&'a [u8]> {
        let (pages, rest) = contents.as_chunks::<PAGE_BYTES>();
        debug_assert!(rest.is_empty(), "whole pages only");
        let room = get_maximum_output_size(PAGE_BYTES);
        if self.table.is_some() {
            self.scratch.resize(self.scratch.len().max(pages.len() * room), 0);
        }
        let mut rooms = self.scratch.chunks_exact_mut(room);
        let lengths = pages.iter().map(|page| match (rooms.next(), &mut self.table) {
            _ if is_zero(page) => 0,
            // There is room for the longest output, so there is no error.
            (Some(room), Some(table)) => {
                compress_into_with_table(page, room, table).unwrap_or(PAGE_BYTES)
            }
            _ => PAGE_BYTES,
        });
        let lengths: Vec<usize> = lengths.collect();
        let mut rooms = self.scratch.chunks_exact(room);
        let kept = pages.iter().zip(lengths).map(|(page, length)| {
            let place = rooms.next().and_then(|place| place.get(..length));
            match place {
                Some(place) if length <= PACKED_BYTES_MAX => place,
                None if length == 0 => &[],
                _ => &page[..],
            }
        });
        kept.collect()
    }
}

/// Fills `page` with what `kept` stands for; false if it does not unpack.
#[must_use]
pub fn unpack(kept: &[u8], page: &mut [u8]) -> bool {
    match kept.len() {
        0 => {
            page.fill(0);
            true
        }
        length if length == page.len() => {
            page.copy_from_slice(kept);
            true
        }
        _ => decompress_into(kept, page).is_ok_and(|length| length == page.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: u64) -> Vec<u8> {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as u8
        };
        (0..PAGE_BYTES).map(|_| next()).collect()
    }

    #[test]
    fn every_kind_of_page_comes_back() {
        let text: Vec<u8> = (0..PAGE_BYTES).map(|at| b"some words "[at % 11]).collect();
        let contents = [vec![0; PAGE_BYTES], text, noise(7), vec![1; PAGE_BYTES]].concat();
        for compresses in [true, false] {
            let mut packing = Packing::new(compresses);
            for _ in 0..2 {
                let kept = packing.pack(&contents);
                let lengths: Vec<usize> = kept.iter().map(|kept| kept.len()).collect();
                assert_eq!((lengths[0], lengths[2]), (0, PAGE_BYTES));
                assert_eq!(lengths[1] < 200 && lengths[3] < 200, compresses);
                let mut again = vec![9; contents.len()];
                for (kept, page) in kept.iter().zip(again.chunks_exact_mut(PAGE_BYTES)) {
                    assert!(unpack(kept, page));
                }
                assert_eq!(again, contents);
            }
        }
    }

    #[test]
    fn what_is_damaged_does_not_unpack() {
        let page = vec![3; PAGE_BYTES];
        let mut packing = Packing::new(true);
        let mut kept = packing.pack(&page)[0].to_vec();
        let mut out = vec![0; PAGE_BYTES];
        assert!(unpack(&kept, &mut out));
        kept.pop();
        assert!(!unpack(&kept, &mut out));
    }
}
