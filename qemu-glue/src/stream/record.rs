//! Records of section `ram`: a page each, or a mark (migration/ram.c, `RAM_SAVE_FLAG_*`).
//!
//! ```text
//! be64 offset | flags | [ name, unless CONTINUE ] | ZERO: fill byte
//!                                                 | PAGE: 4096 bytes
//!                                                 | XBZRLE: 01, be16 length, delta
//! ```
//!
//! `CONTINUE` stands for the block of the page before, also of one in an earlier section.

use migrate_core::delta::Page;
use migrate_core::layout::PAGE_BYTES;
use migrate_core::page_table::is_zero;
use migrate_core::xbzrle::{self, Encoded};

use super::blocks::{BlockIndex, BlockList};
use super::cursor::{Cursor, Stop, name};
use super::error::{Refusal, WriteError, fits, put_name};

// `RAM_SAVE_FLAG_*`.
pub(crate) const FLAG_ZERO: u64 = 0x002;
pub(crate) const FLAG_MEM_SIZE: u64 = 0x004;
pub(crate) const FLAG_PAGE: u64 = 0x008;
pub(crate) const FLAG_END: u64 = 0x010;
pub(crate) const FLAG_CONTINUE: u64 = 0x020;
const FLAG_XBZRLE: u64 = 0x040;
const FLAG_HOOK: u64 = 0x080;
const FLAG_COMPRESS_PAGE: u64 = 0x100;
const FLAG_MULTIFD_FLUSH: u64 = 0x200;

/// The bits of a record's first word that are flags.
pub(crate) const FLAGS: u64 = PAGE_BYTES as u64 - 1;

/// The record that ends a section's records.
pub(super) const END: [u8; 8] = FLAG_END.to_be_bytes();

/// The record that is a barrier for multifd.
pub(super) const MULTIFD_FLUSH: [u8; 8] = FLAG_MULTIFD_FLUSH.to_be_bytes();

/// `ENCODING_FLAG_XBZRLE`.
const ENCODING_XBZRLE: u8 = 1;

/// A page of the guest, or what makes it from the version that the destination holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRecord<'a> {
    /// Its block.
    pub block: BlockIndex,
    /// Where it begins in the block, in bytes.
    pub offset_bytes: u64,
    /// Whether it came without the block's name, or may go without it.
    pub continued: bool,
    /// What is in it.
    pub content: PageContent<'a>,
}

/// The contents of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageContent<'a> {
    /// All bytes are the same; 10.0 accepts 0 only.
    Zero {
        /// The byte.
        fill: u8,
    },
    /// All of it.
    Whole(&'a Page),
    /// A delta to the version that the destination holds, for [`migrate_core::xbzrle`].
    Xbzrle(&'a [u8]),
}

/// What a record can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Record<'a> {
    Page(PageRecord<'a>),
    MultifdFlush,
    End,
}

impl<'a> PageRecord<'a> {
    /// What QEMU would send so that a page which the destination holds as `old` becomes `new`;
    /// nothing if it is that already. A delta is put into `room`.
    pub fn update(
        block: BlockIndex,
        offset_bytes: u64,
        old: &Page,
        new: &'a Page,
        room: &'a mut Page,
    ) -> Option<Self> {
        let content = if is_zero(new) {
            PageContent::Zero { fill: 0 }
        } else {
            match xbzrle::encode(old, new, room) {
                Encoded::Unchanged => return None,
                Encoded::Delta(bytes) => PageContent::Xbzrle(room.get(..bytes)?),
                Encoded::Overflow => PageContent::Whole(new),
            }
        };
        Some(Self { block, offset_bytes, continued: true, content })
    }

    fn check(&self, blocks: &BlockList) -> Result<(), Refusal> {
        let Some(block) = blocks.get(self.block) else {
            return Err(Refusal::NothingToContinue);
        };
        if self.offset_bytes >= block.length_bytes {
            let (block, offset_bytes) = (block.name.clone(), self.offset_bytes);
            return Err(Refusal::OutOfBlock { block, offset_bytes });
        }
        Ok(())
    }

    /// Writes the record; without a name only where the page before was of the same block.
    pub(super) fn write(
        &self,
        blocks: Option<&BlockList>,
        current: Option<BlockIndex>,
        out: &mut Vec<u8>,
    ) -> Result<(), WriteError> {
        let number = usize::from(self.block.0);
        let known = blocks.map_or(0, |blocks| blocks.blocks().len());
        let block = blocks.and_then(|blocks| blocks.get(self.block));
        let block = block.ok_or(WriteError::UnknownBlock { number, known })?;
        let offset_bytes = self.offset_bytes;
        if offset_bytes & FLAGS != 0 || offset_bytes >= block.length_bytes {
            return Err(WriteError::OutOfBlock { block: block.name.clone(), offset_bytes });
        }
        let flag = match self.content {
            PageContent::Zero { .. } => FLAG_ZERO,
            PageContent::Whole(_) => FLAG_PAGE,
            PageContent::Xbzrle(_) => FLAG_XBZRLE,
        };
        if self.continued && current == Some(self.block) {
            out.extend_from_slice(&(offset_bytes | flag | FLAG_CONTINUE).to_be_bytes());
        } else {
            out.extend_from_slice(&(offset_bytes | flag).to_be_bytes());
            put_name("A RAM block's name", &block.name, out)?;
        }
        match self.content {
            PageContent::Zero { fill } => out.push(fill),
            PageContent::Whole(page) => out.extend_from_slice(page),
            PageContent::Xbzrle(delta) => {
                fits("A delta", delta.len(), PAGE_BYTES)?;
                out.push(ENCODING_XBZRLE);
                out.extend_from_slice(&(delta.len() as u16).to_be_bytes());
                out.extend_from_slice(delta);
            }
        }
        Ok(())
    }
}

impl<'a> Record<'a> {
    /// Reads a record. `current` is the block of the page before.
    pub(super) fn read(
        cursor: &mut Cursor<'a>,
        blocks: &BlockList,
        current: Option<BlockIndex>,
    ) -> Result<Self, Stop<Refusal>> {
        let word = cursor.u64()?;
        match word {
            FLAG_END => return Ok(Self::End),
            FLAG_MULTIFD_FLUSH => return Ok(Self::MultifdFlush),
            _ => {}
        }
        let kind = word & FLAGS & !FLAG_CONTINUE;
        if !matches!(kind, FLAG_ZERO | FLAG_PAGE | FLAG_XBZRLE) {
            return Err(Stop::Refused(refusal(word & FLAGS)));
        }
        let continued = word & FLAG_CONTINUE != 0;
        let block = if continued {
            current.ok_or(Stop::Refused(Refusal::NothingToContinue))?
        } else {
            find(cursor.counted()?, blocks).map_err(Stop::Refused)?
        };
        let content = match kind {
            FLAG_PAGE => PageContent::Whole(cursor.array()?),
            FLAG_ZERO => PageContent::Zero { fill: cursor.u8()? },
            _ => PageContent::Xbzrle(delta(cursor)?),
        };
        let page = PageRecord { block, offset_bytes: word & !FLAGS, continued, content };
        page.check(blocks).map_err(Stop::Refused)?;
        Ok(Self::Page(page))
    }
}

/// Whether a record's first word is that of a page with a name, as the preempt channel begins.
pub(super) fn names_a_page(word: u64) -> bool {
    matches!(word & FLAGS, FLAG_ZERO | FLAG_PAGE)
}

fn find(bytes: &[u8], blocks: &BlockList) -> Result<BlockIndex, Refusal> {
    let name = name(bytes).ok_or(Refusal::Name { what: "a page's RAM block" })?;
    blocks.find(name).ok_or_else(|| Refusal::UnknownBlock { name: name.to_owned() })
}

fn delta<'a>(cursor: &mut Cursor<'a>) -> Result<&'a [u8], Stop<Refusal>> {
    if cursor.u8()? != ENCODING_XBZRLE {
        return Err(Stop::Refused(Refusal::Delta { what: "its encoding" }));
    }
    let length = usize::from(cursor.u16()?);
    if length > PAGE_BYTES {
        return Err(Stop::Refused(Refusal::Delta { what: "its length" }));
    }
    Ok(cursor.take(length)?)
}

/// Why a record with these flags is not read.
fn refusal(flags: u64) -> Refusal {
    match flags & !FLAG_CONTINUE {
        FLAG_COMPRESS_PAGE => Refusal::RamForm {
            how: "in compressed pages",
            remedy: "switch the capability compress off at both ends; Godwit compresses by itself",
        },
        flags if flags & FLAG_HOOK != 0 => Refusal::RamForm {
            how: "by RDMA",
            remedy: "migrate to a Unix socket or TCP address instead of rdma:",
        },
        FLAG_MEM_SIZE => Refusal::Blocks { what: "it comes a second time" },
        _ => Refusal::Flags { flags },
    }
}
