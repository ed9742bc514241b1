//! RAM blocks and the numbering of their pages.
//!
//! Both ends describe the guest's RAM as the same ordered list of blocks. Pages of
//! [`PAGE_BYTES`] are numbered through all blocks: the first page of block `n + 1` follows the last
//! page of block `n`. A block that is backed by larger pages (hugetlbfs) is still cut into parts of
//! [`PAGE_BYTES`]: dirtiness is found in units of the block's page size, but what is sent is
//! decided part by part (correctness rule 15).

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::error::{Classify, ErrorBin};

/// The unit in which memory is compared, versioned and sent, in bytes. QEMU's target page on x86-64.
pub const PAGE_BYTES: usize = 4096;

/// Most RAM blocks that a guest may have. QEMU has one per NUMA node or DIMM; 256 DIMM slots exist.
pub const BLOCKS_MAX: usize = 512;

/// Longest name of a RAM block in bytes (QEMU's `idstr` has a one-byte length).
pub const BLOCK_NAME_BYTES_MAX: usize = 255;

/// Largest RAM in bytes that a layout may describe: 64 TiB, far above what QEMU boots.
pub const RAM_BYTES_MAX: u64 = 64 << 40;

/// Number of a page, counted through all blocks of a [`RamLayout`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageIndex(pub u64);

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {:#x}", self.0)
    }
}

/// One RAM block as both ends must agree on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockSpec {
    /// QEMU's name of the block (`pc.ram`, or the id of the memory backend).
    pub name: String,
    /// Length in bytes; a multiple of `page_bytes`.
    pub length_bytes: u64,
    /// Size in bytes of the pages that back it: 4096, or 2 MiB and more on hugetlbfs.
    pub page_bytes: u64,
}

/// Where a page lies: block and byte offset within it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    /// Index of the block in [`RamLayout::blocks`].
    pub block: usize,
    /// Offset of the page's first byte within the block, in bytes.
    pub offset_bytes: u64,
}

/// Why a list of blocks is not a layout.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// There is no block at all.
    #[error("The guest has no RAM block")]
    Empty,
    /// More blocks than [`BLOCKS_MAX`].
    #[error("{count} RAM blocks; at most {BLOCKS_MAX} are supported")]
    TooManyBlocks {
        /// How many there were.
        count: usize,
    },
    /// A name is empty or longer than [`BLOCK_NAME_BYTES_MAX`].
    #[error(
        "RAM block {index} has a name of {bytes} bytes; 1 to {BLOCK_NAME_BYTES_MAX} are allowed"
    )]
    BadName {
        /// Position in the list.
        index: usize,
        /// Length of the name in bytes.
        bytes: usize,
    },
    /// Two blocks share a name.
    #[error("Two RAM blocks are named {name:?}")]
    DuplicateName {
        /// The name.
        name: String,
    },
    /// A page size that is no power of two or below [`PAGE_BYTES`].
    #[error(
        "RAM block {name:?} has pages of {page_bytes} bytes; a power of two from {PAGE_BYTES} on is needed"
    )]
    BadPageSize {
        /// The block.
        name: String,
        /// Its page size in bytes.
        page_bytes: u64,
    },
    /// A length that is zero or no multiple of the page size.
    #[error("RAM block {name:?} is {length_bytes} bytes long, not a multiple of its page size")]
    BadLength {
        /// The block.
        name: String,
        /// Its length in bytes.
        length_bytes: u64,
    },
    /// All blocks together exceed [`RAM_BYTES_MAX`].
    #[error("The RAM blocks add up to more than {RAM_BYTES_MAX} bytes")]
    TooLarge,
    /// The two ends differ.
    #[error("RAM differs: {0}")]
    Mismatch(String),
}

impl Classify for LayoutError {
    fn bin(&self) -> ErrorBin {
        match self {
            Self::Mismatch(_) => ErrorBin::PeerIncompatible,
            _ => ErrorBin::PeerMisbehaved,
        }
    }
}

/// The guest's RAM as an ordered list of blocks with their pages numbered through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamLayout {
    blocks: Vec<BlockSpec>,
    /// `first_page[i]` is the number of block `i`'s first page; one more entry holds the total.
    first_page: Vec<u64>,
}

impl RamLayout {
    /// Checks a list of blocks (it may come from a peer) and numbers its pages.
    ///
    /// # Errors
    /// A [`LayoutError`] that names the first block that breaks a rule.
    pub fn new(blocks: Vec<BlockSpec>) -> Result<Self, LayoutError> {
        if blocks.is_empty() {
            return Err(LayoutError::Empty);
        }
        if blocks.len() > BLOCKS_MAX {
            return Err(LayoutError::TooManyBlocks { count: blocks.len() });
        }
        let mut first_page = Vec::with_capacity(blocks.len() + 1);
        let mut total_bytes = 0u64;
        for (index, block) in blocks.iter().enumerate() {
            Self::check_block(index, block)?;
            if blocks.iter().take(index).any(|other| other.name == block.name) {
                return Err(LayoutError::DuplicateName { name: block.name.clone() });
            }
            first_page.push(total_bytes / PAGE_BYTES as u64);
            total_bytes = total_bytes
                .checked_add(block.length_bytes)
                .filter(|total| *total <= RAM_BYTES_MAX)
                .ok_or(LayoutError::TooLarge)?;
        }
        first_page.push(total_bytes / PAGE_BYTES as u64);
        Ok(Self { blocks, first_page })
    }

    fn check_block(index: usize, block: &BlockSpec) -> Result<(), LayoutError> {
        let bytes = block.name.len();
        if bytes == 0 || bytes > BLOCK_NAME_BYTES_MAX {
            return Err(LayoutError::BadName { index, bytes });
        }
        if !block.page_bytes.is_power_of_two() || block.page_bytes < PAGE_BYTES as u64 {
            return Err(LayoutError::BadPageSize {
                name: block.name.clone(),
                page_bytes: block.page_bytes,
            });
        }
        if block.length_bytes == 0 || !block.length_bytes.is_multiple_of(block.page_bytes) {
            return Err(LayoutError::BadLength {
                name: block.name.clone(),
                length_bytes: block.length_bytes,
            });
        }
        Ok(())
    }

    /// The blocks in order.
    pub fn blocks(&self) -> &[BlockSpec] {
        &self.blocks
    }

    /// Number of pages of [`PAGE_BYTES`] in all blocks.
    pub fn pages(&self) -> u64 {
        self.first_page.last().copied().unwrap_or(0)
    }

    /// RAM in bytes over all blocks.
    pub fn bytes(&self) -> u64 {
        self.pages() * PAGE_BYTES as u64
    }

    /// The pages of one block, as a range of page numbers; empty for a block that does not exist.
    pub fn block_pages(&self, block: usize) -> Range<u64> {
        match (self.first_page.get(block), self.first_page.get(block + 1)) {
            (Some(first), Some(end)) => *first..*end,
            _ => 0..0,
        }
    }

    /// Where a page lies, or nothing if no block holds it.
    pub fn locate(&self, page: PageIndex) -> Option<Location> {
        if page.0 >= self.pages() {
            return None;
        }
        let block = self.first_page.partition_point(|first| *first <= page.0).checked_sub(1)?;
        let first = *self.first_page.get(block)?;
        Some(Location { block, offset_bytes: (page.0 - first) * PAGE_BYTES as u64 })
    }

    /// The pages of [`PAGE_BYTES`] that one page of the size that backs the block holds together with
    /// `page`; nothing outside the layout.
    pub fn host_page(&self, page: PageIndex) -> Option<Range<u64>> {
        let location = self.locate(page)?;
        let pages = self.blocks.get(location.block)?.page_bytes / PAGE_BYTES as u64;
        let start = page.0 - location.offset_bytes / PAGE_BYTES as u64 % pages;
        Some(start..start + pages)
    }

    /// Cuts `pages` pages from `first` on where a block ends, as (first, count) pairs; pages outside
    /// the layout are left out.
    pub fn split(&self, first: PageIndex, pages: u64) -> impl Iterator<Item = (PageIndex, u64)> {
        let end = first.0.saturating_add(pages).min(self.pages());
        let mut next = first.0;
        std::iter::from_fn(move || {
            if next >= end {
                return None;
            }
            let block = self.locate(PageIndex(next))?.block;
            let stop = self.block_pages(block).end.min(end);
            let part = (PageIndex(next), stop - next);
            next = stop;
            Some(part)
        })
    }

    /// Compares the two ends' layouts.
    ///
    /// # Errors
    /// [`LayoutError::Mismatch`] with the first difference in words.
    pub fn check_same(&self, other: &Self) -> Result<(), LayoutError> {
        let differ = |text: String| Err(LayoutError::Mismatch(text));
        for (ours, theirs) in self.blocks.iter().zip(&other.blocks) {
            if ours.name != theirs.name {
                return differ(format!("block {:?} here, {:?} there", ours.name, theirs.name));
            }
            if ours.length_bytes != theirs.length_bytes {
                return differ(format!(
                    "block {:?} has {} bytes here, {} there",
                    ours.name, ours.length_bytes, theirs.length_bytes
                ));
            }
        }
        if self.blocks.len() != other.blocks.len() {
            return differ(format!(
                "{} blocks here, {} there",
                self.blocks.len(),
                other.blocks.len()
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(name: &str, length_bytes: u64) -> BlockSpec {
        BlockSpec { name: name.into(), length_bytes, page_bytes: 4096 }
    }

    #[test]
    fn pages_are_numbered_through() {
        let layout = RamLayout::new(vec![block("a", 8192), block("b", 4096)]).unwrap();
        assert_eq!(layout.pages(), 3);
        assert_eq!(layout.locate(PageIndex(2)), Some(Location { block: 1, offset_bytes: 0 }));
        assert_eq!(layout.locate(PageIndex(3)), None);
        assert_eq!(layout.block_pages(1), 2..3);
        assert_eq!(layout.block_pages(2), 0..0);
    }

    #[test]
    fn runs_are_cut_where_a_block_ends() {
        let layout = RamLayout::new(vec![block("a", 8192), block("b", 8192)]).unwrap();
        let parts: Vec<_> = layout.split(PageIndex(1), 9).collect();
        assert_eq!(parts, [(PageIndex(1), 1), (PageIndex(2), 2)]);
        assert_eq!(layout.split(PageIndex(4), u64::MAX).count(), 0);
    }

    #[test]
    fn hostile_layouts_are_refused() {
        assert_eq!(RamLayout::new(vec![]), Err(LayoutError::Empty));
        assert_eq!(
            RamLayout::new(vec![block("a", u64::MAX - 4095), block("b", 8192)]),
            Err(LayoutError::TooLarge)
        );
        assert!(matches!(
            RamLayout::new(vec![block("a", 4096), block("a", 4096)]),
            Err(LayoutError::DuplicateName { .. })
        ));
        assert!(matches!(RamLayout::new(vec![block("a", 5)]), Err(LayoutError::BadLength { .. })));
        assert!(matches!(RamLayout::new(vec![block("", 4096)]), Err(LayoutError::BadName { .. })));
    }

    #[test]
    fn the_first_difference_is_named() {
        let ours = RamLayout::new(vec![block("a", 8192)]).unwrap();
        let theirs = RamLayout::new(vec![block("a", 4096)]).unwrap();
        let text = ours.check_same(&theirs).unwrap_err().to_string();
        assert!(text.contains("8192") && text.contains("4096"), "{text}");
    }
}
