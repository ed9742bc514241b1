//! Page and block contents that can be recomputed, so that one wrong byte anywhere is found.
//!
//! A disk block is a function of (seed, number). A checker page is a function of (seed, number,
//! generation); six kinds of pages take turns by number so that every way a page can travel is
//! used: whole new contents, small changes, text, duplicates of other pages, and pages that turn to
//! zeros and back.

use crate::PAGE_BYTES;
use crate::rng::{XorShift, mix};

/// How a checker page changes from one generation to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Every byte is new and looks random.
    Whole,
    /// 256 bytes change, the rest stays.
    Patch256,
    /// 16 bytes change, the rest stays.
    Patch16,
    /// All zeros in every odd generation.
    ZeroOrWhole,
    /// The same contents as all other pages of this kind and generation.
    Duplicate,
    /// Compressible text, new in every generation.
    Text,
}

impl Kind {
    /// The kind of page `number`.
    #[must_use]
    pub fn of(number: u64) -> Self {
        match number % 6 {
            0 => Self::Whole,
            1 => Self::Patch256,
            2 => Self::Patch16,
            3 => Self::ZeroOrWhole,
            4 => Self::Duplicate,
            _ => Self::Text,
        }
    }
}

/// The first difference between a page and what it should hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mismatch {
    /// Byte within the page.
    pub offset: usize,
    /// The byte that belongs there.
    pub want: u8,
    /// The byte found.
    pub got: u8,
    /// How many bytes of the page differ.
    pub bytes: usize,
}

/// Fills `out` with noise.
pub fn fill_random(seed: u64, out: &mut [u8]) {
    let mut rng = XorShift::new(seed);
    for chunk in out.chunks_mut(8) {
        let word = rng.next_u64().to_le_bytes();
        chunk.copy_from_slice(&word[..chunk.len()]);
    }
}

const WORDS: [&str; 16] = [
    "page ", "guest ", "memory ", "dirty ", "round ", "the ", "of ", "link ", "source ", "target ",
    "0 ", "1 ", "state ", "device ", "queue ", "\n",
];

/// Fills `out` with words of English in a seeded order: it compresses as logs do.
pub fn fill_text(seed: u64, out: &mut [u8]) {
    let mut rng = XorShift::new(seed);
    let mut at = 0;
    let mut bits = 0;
    while at < out.len() {
        if bits == 0 {
            bits = rng.next_u64();
        }
        let word = WORDS[(bits & 15) as usize].as_bytes();
        bits >>= 4;
        let length = word.len().min(out.len() - at);
        out[at..at + length].copy_from_slice(&word[..length]);
        at += length;
    }
}

/// Writes disk block `number`: it starts with its number and the seed.
pub fn fill_block(seed: u64, number: u64, out: &mut [u8; PAGE_BYTES]) {
    fill_random(mix(seed) ^ number, &mut out[16..]);
    out[..8].copy_from_slice(&number.to_le_bytes());
    out[8..16].copy_from_slice(&seed.to_le_bytes());
}

/// Writes checker page `number` as it is in `generation`.
pub fn fill_page(seed: u64, number: u64, generation: u64, out: &mut [u8; PAGE_BYTES]) {
    let base = mix(seed ^ mix(number));
    let fresh = mix(base ^ generation.wrapping_mul(0xd6e8_feb8_6659_fd93));
    let patch = |out: &mut [u8; PAGE_BYTES], bytes: usize| {
        fill_random(base, out);
        let at = (base % ((PAGE_BYTES - bytes) as u64)) as usize;
        fill_random(fresh, &mut out[at..at + bytes]);
    };
    match Kind::of(number) {
        Kind::Whole => fill_random(fresh, out),
        Kind::Patch256 => patch(out, 256),
        Kind::Patch16 => patch(out, 16),
        Kind::ZeroOrWhole if generation % 2 == 1 => out.fill(0),
        Kind::ZeroOrWhole => fill_random(fresh, out),
        Kind::Duplicate => fill_random(mix(seed ^ mix(generation)), out),
        Kind::Text => fill_text(fresh, out),
    }
}

/// Compares two pages.
#[must_use]
pub fn compare(want: &[u8; PAGE_BYTES], got: &[u8; PAGE_BYTES]) -> Option<Mismatch> {
    if want == got {
        return None;
    }
    let mut different = want.iter().zip(got).enumerate().filter(|(_, (want, got))| want != got);
    let (offset, (&want, &got)) = different.next()?;
    Some(Mismatch { offset, want, got, bytes: 1 + different.count() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(number: u64, generation: u64) -> [u8; PAGE_BYTES] {
        let mut out = [0xee; PAGE_BYTES];
        fill_page(7, number, generation, &mut out);
        out
    }

    fn changed(number: u64) -> usize {
        compare(&page(number, 4), &page(number, 5)).map_or(0, |mismatch| mismatch.bytes)
    }

    #[test]
    fn every_kind_changes_as_it_says() {
        assert!(changed(0) > 4000);
        assert!((1..=256).contains(&changed(1)));
        assert!((1..=16).contains(&changed(2)));
        assert_eq!(page(3, 5), [0; PAGE_BYTES]);
        assert_ne!(page(3, 4), [0; PAGE_BYTES]);
        assert_eq!(page(4, 4), page(10, 4));
        assert_ne!(page(4, 4), page(4, 5));
        assert!(page(5, 4).is_ascii() && changed(5) > 1000);
    }

    #[test]
    fn pages_of_different_numbers_differ() {
        for number in [0, 1, 2, 5] {
            assert_ne!(page(number, 4), page(number + 6, 4));
        }
    }

    #[test]
    fn compare_finds_the_first_wrong_byte() {
        let want = page(0, 0);
        let mut got = want;
        assert_eq!(compare(&want, &got), None);
        got[100] ^= 1;
        got[4095] ^= 1;
        let found = compare(&want, &got).unwrap();
        assert_eq!((found.offset, found.want, found.got), (100, want[100], want[100] ^ 1));
        assert_eq!(found.bytes, 2);
    }

    #[test]
    fn blocks_carry_number_and_seed() {
        let mut block = [0; PAGE_BYTES];
        fill_block(9, 0x0102, &mut block);
        assert_eq!(block[..8], 0x0102_u64.to_le_bytes());
        assert_eq!(block[8..16], 9_u64.to_le_bytes());
        let mut other = [0; PAGE_BYTES];
        fill_block(9, 0x0103, &mut other);
        assert!(compare(&block, &other).is_some_and(|mismatch| mismatch.bytes > 3000));
    }
}
