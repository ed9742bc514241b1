//! The RAM blocks of a guest as the start of section `ram` lists them (migration/ram.c,
//! `ram_save_setup`, `parse_ramblocks`).
//!
//! ```text
//! be64 total | MEM_SIZE | ( name | be64 length | [ be64 page size ] | [ be64 address ] )*
//! ```
//!
//! The list ends where the lengths add up to the total. An address is there with the capability
//! `x-ignore-shared`. A page size is there if post-copy was announced and the block has huge pages.
//! Nothing says so, but what follows does: a name is never empty, so its length is not 0 as the
//! first byte of a page size is, and the record behind the last block has flags where a page size
//! has zeros.

use std::collections::HashMap;

use migrate_core::layout::{BLOCKS_MAX, PAGE_BYTES, RAM_BYTES_MAX};

use super::cursor::{Cursor, Stop, name};
use super::error::{Refusal, WriteError, put_name};
use super::record::{FLAG_MEM_SIZE, FLAGS};

/// Place of a block in the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockIndex(pub u16);

const _: () = assert!(BLOCKS_MAX <= 1 << u16::BITS, "an index tells every block");

/// A RAM block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// QEMU's name of it, the same at both ends.
    pub name: String,
    /// Its length in bytes.
    pub length_bytes: u64,
    /// Size in bytes of its pages, if post-copy was announced and they are not of 4096.
    pub page_bytes: Option<u64>,
    /// Its offset in what contains it, with `x-ignore-shared`: often its guest-physical address.
    pub address: Option<u64>,
}

/// Which optional fields the entries of a list have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EntryForm {
    /// The source has `x-ignore-shared`.
    pub(crate) has_address: bool,
    /// Post-copy was announced.
    pub(crate) may_have_page_size: bool,
}

/// All blocks of a guest, with different names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockList {
    blocks: Vec<RamBlock>,
    by_name: HashMap<String, BlockIndex>,
    total_bytes: u64,
}

impl BlockList {
    /// The list of these blocks.
    ///
    /// # Errors
    /// [`Refusal::Blocks`] or [`Refusal::Name`] if a name is empty, unreadable or used twice, a
    /// length no multiple of the page size, or something above its limit.
    pub fn new(blocks: Vec<RamBlock>) -> Result<Self, Refusal> {
        let mut list = Self::default();
        blocks.into_iter().try_for_each(|block| list.push(block))?;
        Ok(list)
    }

    /// Adds a block at the end.
    pub(crate) fn push(&mut self, block: RamBlock) -> Result<(), Refusal> {
        if self.blocks.len() >= BLOCKS_MAX {
            return Err(Refusal::Blocks { what: "there are too many" });
        }
        if name(block.name.as_bytes()).is_none() || block.name.len() > usize::from(u8::MAX) {
            return Err(Refusal::Name { what: "a RAM block" });
        }
        if block.length_bytes == 0 || !block.length_bytes.is_multiple_of(PAGE_BYTES as u64) {
            return Err(Refusal::Blocks { what: "a length is not one of whole pages" });
        }
        if block.page_bytes.is_some_and(|bytes| !is_huge(bytes)) {
            return Err(Refusal::Blocks { what: "a page size is not one of huge pages" });
        }
        let total_bytes = self.total_bytes.saturating_add(block.length_bytes);
        if total_bytes > RAM_BYTES_MAX {
            return Err(Refusal::Blocks { what: "there is too much RAM" });
        }
        let index = BlockIndex(self.blocks.len() as u16);
        if self.by_name.insert(block.name.clone(), index).is_some() {
            return Err(Refusal::Blocks { what: "a name comes twice" });
        }
        self.total_bytes = total_bytes;
        self.blocks.push(block);
        Ok(())
    }

    /// The blocks in their order.
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// A block.
    pub fn get(&self, index: BlockIndex) -> Option<&RamBlock> {
        self.blocks.get(usize::from(index.0))
    }

    /// The place of the block with that name.
    pub fn find(&self, name: &str) -> Option<BlockIndex> {
        self.by_name.get(name).copied()
    }

    /// Length of all blocks in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Writes the list, its total first.
    pub(super) fn write(&self, out: &mut Vec<u8>) -> Result<(), WriteError> {
        out.extend_from_slice(&(self.total_bytes | FLAG_MEM_SIZE).to_be_bytes());
        for block in &self.blocks {
            put_name("A RAM block's name", &block.name, out)?;
            out.extend_from_slice(&block.length_bytes.to_be_bytes());
            for field in [block.page_bytes, block.address].into_iter().flatten() {
                out.extend_from_slice(&field.to_be_bytes());
            }
        }
        Ok(())
    }
}

/// Whether it can be the size of huge pages: `ram_save_setup` writes no other.
fn is_huge(bytes: u64) -> bool {
    bytes.is_power_of_two() && bytes > PAGE_BYTES as u64
}

/// Reads the total, and with it that a list follows.
pub(crate) fn read_total(cursor: &mut Cursor<'_>) -> Result<u64, Stop<Refusal>> {
    let word = cursor.u64()?;
    let total_bytes = word & !FLAGS;
    if word != total_bytes | FLAG_MEM_SIZE {
        return Err(Stop::Refused(Refusal::Blocks { what: "it is not where it belongs" }));
    }
    if total_bytes > RAM_BYTES_MAX {
        return Err(Stop::Refused(Refusal::Blocks { what: "there is too much RAM" }));
    }
    Ok(total_bytes)
}

/// Reads one entry of a list that has `left_bytes` of RAM to tell yet.
pub(crate) fn read_entry(
    cursor: &mut Cursor<'_>,
    form: EntryForm,
    left_bytes: u64,
) -> Result<RamBlock, Stop<Refusal>> {
    let name =
        name(cursor.counted()?).ok_or(Stop::Refused(Refusal::Name { what: "a RAM block" }))?;
    let length_bytes = cursor.u64()?;
    if length_bytes > left_bytes {
        return Err(Stop::Refused(Refusal::Blocks { what: "the lengths exceed the total" }));
    }
    let page_bytes = if form.may_have_page_size { read_page_size(cursor)? } else { None };
    let address = if form.has_address { Some(cursor.u64()?) } else { None };
    Ok(RamBlock { name: name.to_owned(), length_bytes, page_bytes, address })
}

/// Reads a page size if one is there; in any case something follows.
fn read_page_size(cursor: &mut Cursor<'_>) -> Result<Option<u64>, Stop<Refusal>> {
    let mut ahead = cursor.clone();
    if ahead.u8()? != 0 {
        return Ok(None);
    }
    let mut ahead = cursor.clone();
    let bytes = ahead.u64()?;
    if !is_huge(bytes) {
        return Ok(None);
    }
    *cursor = ahead;
    Ok(Some(bytes))
}
