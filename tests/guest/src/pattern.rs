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

/// What [`fill_words`] takes for page `number` as it is in `generation`.
#[must_use]
pub fn page_key(seed: u64, number: u64, generation: u64) -> u64 {
    mix(mix(seed ^ mix(number)) ^ generation)
}

/// An odd number without a pattern in its bits.
const STRIDE: u64 = 0xd6e8_feb8_6659_fd93;

/// Word `at` of a page that [`fill_words`] filled.
fn word(key: u64, at: u64) -> u64 {
    key.wrapping_add(at.wrapping_mul(STRIDE))
}

/// Fills a page with words that do not compress, at the cost of an addition and a multiplication each: for programs that
/// measure access to memory.
pub fn fill_words(key: u64, out: &mut [u8; PAGE_BYTES]) {
    for (at, bytes) in (0..).zip(out.as_chunks_mut::<8>().0) {
        *bytes = word(key, at).to_le_bytes();
    }
}

/// The offset of the first word that [`fill_words`] did not write.
#[must_use]
pub fn wrong_word(key: u64, got: &[u8; PAGE_BYTES]) -> Option<usize> {
    let (words, _) = got.as_chunks::<8>();
    let wrong = (0..).zip(words).find(|(at, bytes)| u64::from_le_bytes(**bytes) != word(key, *at));
    wrong.map(|(at, _)| at as usize * 8)
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
    fn a_wrong_word_is_found_wherever_it_is() {
        let keys = [page_key(7, 3, 0), page_key(7, 3, 1), page_key(7, 4, 0), page_key(8, 3, 0)];
        for (at, key) in keys.into_iter().enumerate() {
            let mut page = [0; PAGE_BYTES];
            fill_words(key, &mut page);
            assert_eq!(wrong_word(key, &page), None);
            for other in keys.iter().skip(at + 1) {
                assert_eq!(wrong_word(*other, &page), Some(0));
            }
            for offset in [0, 8, 2000, 4095] {
                let mut wrong = page;
                wrong[offset] ^= 0x40;
                assert_eq!(wrong_word(key, &wrong), Some(offset / 8 * 8));
            }
        }
        assert_eq!(wrong_word(keys[0], &[0; PAGE_BYTES]), Some(0));
    }

    #[test]
    fn words_are_no_easy_prey_for_compression() {
        let mut page = [0; PAGE_BYTES];
        fill_words(page_key(1, 2, 3), &mut page);
        let mut seen = std::collections::BTreeSet::new();
        // What LZ4 looks for is four bytes that were there before.
        let repeats = page.windows(4).filter(|four| !seen.insert(four.to_vec())).count();
        assert!(repeats < 8, "{repeats}");
        let mut counts = [0_u32; 256];
        page.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
        assert!(counts.iter().all(|count| (1..64).contains(count)), "{counts:?}");
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
