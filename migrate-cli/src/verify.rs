//! `--verify`: a digest of every page, made the same way on both sides while both are stopped.

use migrate_core::layout::{PAGE_BYTES, PageIndex};
use qemu_glue::ram::{GuestRam, RamError};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Pages read at once.
const STEP_PAGES: u64 = 256;

/// Digest of a page.
pub fn digest(page: &[u8], seed: u64) -> u64 {
    xxh3_64_with_seed(page, seed)
}

/// Digests of `pages` pages from `first` on, fewer at the end of RAM. Reads without populating
/// holes. Blocks.
///
/// # Errors
/// [`RamError`] if the memory cannot be read.
pub fn digests(
    ram: &GuestRam,
    seed: u64,
    first: PageIndex,
    pages: u64,
) -> Result<Vec<u64>, RamError> {
    let mut digests = Vec::with_capacity(pages.min(1 << 20) as usize);
    let mut buffer = vec![0; STEP_PAGES as usize * PAGE_BYTES];
    for (part, count) in ram.layout().split(first, pages) {
        for step in (0..count).step_by(STEP_PAGES as usize) {
            let bytes = STEP_PAGES.min(count - step) as usize * PAGE_BYTES;
            let content = buffer.get_mut(..bytes).unwrap_or_default();
            ram.read(PageIndex(part.0 + step), content)?;
            digests.extend(content.chunks(PAGE_BYTES).map(|page| digest(page, seed)));
        }
    }
    Ok(digests)
}
