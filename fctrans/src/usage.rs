//! Which pages the guest does not use, by the flags of every page.
//!
//! ```text
//!  RAM ranges ∩ sections ──► descriptions, piece by piece ──► free blocks, offline pages
//! ```
//!
//! The kernel marks the first page of a free block and notes the block's order there (mm/page_alloc.c:
//! `set_buddy_order`). Lists are not followed: a processor that was stopped within one may have left it half linked. Pages on
//! the lists of single processors carry no mark and count as used.
//!
//! What it costs: 16 MiB of descriptions for each GiB are copied piece by piece and one word in 64 bytes is looked at;
//! holes of the guest's RAM are no shortcut, since their descriptions say the same as those of other free pages.
//!
//! Invariant: a page counts as unused only if the whole block that it belongs to is consistent: an order that exists,
//! aligned to its size, within one range of RAM.

use std::ops::Range;

use migrate_core::pageset::PageSet;

use crate::error::IntrospectError;
use crate::kernel::{Kernel, PageLayout, Section};
use crate::memory::{PhysicalMemory, RamRange};

/// Descriptions that are read at a time, unless the largest free block has more: 64 KiB of 64 bytes each.
const PIECE_FRAMES: u64 = 1024;

/// What was found.
#[derive(Debug, Clone)]
pub struct Usage {
    /// Pages of free blocks.
    pub free: PageSet,
    /// Pages that the guest has given away, such as a balloon's.
    pub offline: PageSet,
    /// Number of free blocks of each order.
    pub free_blocks: Vec<u64>,
    /// Pages that have a description.
    pub described_pages: u64,
}

impl Usage {
    fn new(pages: u64, layout: &PageLayout) -> Self {
        Self {
            free: PageSet::new(pages),
            offline: PageSet::new(pages),
            free_blocks: vec![0; layout.orders as usize],
            described_pages: 0,
        }
    }

    /// All pages that read as zeros at the destination, whatever they hold.
    pub fn unused(&self) -> PageSet {
        let mut unused = self.free.clone();
        unused.union_with(&self.offline);
        unused
    }

    fn note(&mut self, layout: &PageLayout, piece: &Piece<'_>) {
        piece.unused(layout, |block| match block {
            Block::Free { first, order } => {
                self.free.insert_range(first..first + (1 << order));
                if let Some(blocks) = self.free_blocks.get_mut(order as usize) {
                    *blocks += 1;
                }
            }
            Block::Offline { page } => self.offline.insert(page),
        });
        self.described_pages += piece.frames();
    }
}

/// Pages that the guest does not use.
#[derive(Debug, Clone, Copy)]
enum Block {
    /// Two to the power of `order` of them, free.
    Free { first: u64, order: u32 },
    /// Given away.
    Offline { page: u64 },
}

/// Consecutive descriptions.
#[derive(Debug)]
pub(crate) struct Piece<'a> {
    first_frame: u64,
    /// Number of the page at the first frame.
    pub(crate) first_page: u64,
    bytes: &'a [u8],
    frame_bytes: u64,
}

impl<'a> Piece<'a> {
    pub(crate) fn frames(&self) -> u64 {
        self.bytes.len() as u64 / self.frame_bytes
    }

    pub(crate) fn described(&self, layout: &PageLayout, index: u64) -> Option<Described<'a>> {
        let at = (index * layout.bytes) as usize;
        self.bytes.get(at..at + layout.bytes as usize).map(Described)
    }

    /// Calls `see` with what is unused, in ascending order.
    fn unused(&self, layout: &PageLayout, mut see: impl FnMut(Block)) {
        let mut index = 0;
        while let Some(described) = self.described(layout, index) {
            let mut step = 1;
            let page = self.first_page + index;
            match described.mapcount(layout) {
                Some(mark) if mark == layout.buddy => {
                    if let Some(order) = self.free_order(layout, index, &described) {
                        step = 1 << order;
                        see(Block::Free { first: page, order });
                    }
                }
                Some(mark) if Some(mark) == layout.offline => see(Block::Offline { page }),
                _ => {}
            }
            index += step;
        }
    }

    /// The order of the free block that begins here, if it can be one.
    fn free_order(&self, layout: &PageLayout, index: u64, first: &Described<'_>) -> Option<u32> {
        let order = u32::try_from(first.u64(layout.private_at)?).ok()?;
        let pages = 1u64.checked_shl(order).filter(|_| order < layout.orders)?;
        let is_aligned = (self.first_frame + index).is_multiple_of(pages);
        (is_aligned && pages <= self.frames() - index).then_some(order)
    }
}

/// The description of a page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Described<'a>(&'a [u8]);

impl Described<'_> {
    pub(crate) fn mapcount(&self, layout: &PageLayout) -> Option<u32> {
        let bytes = self.0.get(layout.mapcount_at..)?.first_chunk()?;
        Some(u32::from_le_bytes(*bytes))
    }

    pub(crate) fn u64(&self, at: usize) -> Option<u64> {
        Some(u64::from_le_bytes(*self.0.get(at..)?.first_chunk()?))
    }
}

impl Kernel {
    /// Looks at all pages of the guest. For a guest that runs, to be called after the marks of written pages were
    /// cleared: what is found free then and written later is marked again.
    ///
    /// # Errors
    /// [`IntrospectError::Ram`].
    pub fn usage(&self, memory: &impl PhysicalMemory) -> Result<Usage, IntrospectError> {
        let mut usage = Usage::new(memory.pages(), self.layout());
        self.describe(memory, |_| true, |piece| usage.note(self.layout(), piece))?;
        Ok(usage)
    }

    /// Those of `pages` that are unused now. Reads the descriptions around them alone.
    ///
    /// # Errors
    /// [`IntrospectError::Ram`].
    pub fn still_unused(
        &self,
        memory: &impl PhysicalMemory,
        pages: &PageSet,
    ) -> Result<PageSet, IntrospectError> {
        let mut usage = Usage::new(memory.pages(), self.layout());
        let wanted = |range: Range<u64>| pages.first_in(range).is_some();
        self.describe(memory, wanted, |piece| usage.note(self.layout(), piece))?;
        let mut unused = usage.unused();
        unused.intersect(pages);
        Ok(unused)
    }

    /// Parts of `pages`, which follow one another, that are unused now, in ascending order. Costs the same in a guest of
    /// any size.
    ///
    /// # Errors
    /// [`IntrospectError::Ram`].
    pub fn unused_in(
        &self,
        memory: &impl PhysicalMemory,
        pages: Range<u64>,
    ) -> Result<Vec<Range<u64>>, IntrospectError> {
        let step = self.piece_frames();
        let mut unused = vec![];
        for range in memory.ranges() {
            let frames = range.frames();
            let numbers = range.first.0..range.first.0 + (frames.end - frames.start);
            let (first, last) = (pages.start.max(numbers.start), pages.end.min(numbers.end));
            if first >= last {
                continue;
            }
            let frame = frames.start + (first - numbers.start);
            // A block that begins before the pages may reach into them.
            let begin = (frame / step * step).max(frames.start);
            let wanted = begin..frame + (last - first);
            self.describe_frames(
                memory,
                range,
                wanted,
                |_| true,
                |piece| {
                    piece.unused(self.layout(), |block| {
                        let block = match block {
                            Block::Free { first, order } => first..first + (1 << order),
                            Block::Offline { page } => page..page + 1,
                        };
                        let part = block.start.max(first)..block.end.min(last);
                        if !part.is_empty() {
                            unused.push(part);
                        }
                    });
                },
            )?;
        }
        Ok(unused)
    }

    /// Calls `see` with the descriptions of all RAM, piece by piece, where `is_wanted` says so of its page numbers.
    pub(crate) fn describe(
        &self,
        memory: &impl PhysicalMemory,
        is_wanted: impl Fn(Range<u64>) -> bool,
        mut see: impl FnMut(&Piece<'_>),
    ) -> Result<(), IntrospectError> {
        memory.ranges().iter().try_for_each(|range| {
            self.describe_frames(memory, range, range.frames(), &is_wanted, &mut see)
        })
    }

    /// Frames that are described at a time.
    fn piece_frames(&self) -> u64 {
        PIECE_FRAMES.max(1 << self.layout().orders.saturating_sub(1))
    }

    /// The same of one range, of the pieces that hold some of `frames`, the first of which begins one.
    fn describe_frames(
        &self,
        memory: &impl PhysicalMemory,
        range: &RamRange,
        frames: Range<u64>,
        is_wanted: impl Fn(Range<u64>) -> bool,
        mut see: impl FnMut(&Piece<'_>),
    ) -> Result<(), IntrospectError> {
        let step = self.piece_frames();
        let mut bytes = vec![];
        let mut frame = frames.start;
        while frame < frames.end {
            let section = self.section(memory, frame)?;
            let end = self.section_end(frame).min(range.frames().end);
            while frame < end.min(frames.end) {
                // Pieces begin where the largest block can.
                let next = ((frame / step + 1) * step).min(end);
                let pages = range.page(frame)..range.page(frame) + (next - frame);
                if let Some(section) = section.filter(|_| is_wanted(pages)) {
                    let piece = frame..next;
                    if self.read_piece(memory, section, piece.clone(), &mut bytes)? {
                        see(&Piece {
                            first_frame: piece.start,
                            first_page: range.page(piece.start),
                            bytes: &bytes,
                            frame_bytes: self.layout().bytes,
                        });
                    }
                }
                frame = next;
            }
        }
        Ok(())
    }

    /// Says whether there are descriptions.
    fn read_piece(
        &self,
        memory: &impl PhysicalMemory,
        section: Section,
        frames: Range<u64>,
        bytes: &mut Vec<u8>,
    ) -> Result<bool, IntrospectError> {
        let frame_bytes = self.layout().bytes;
        bytes.resize(((frames.end - frames.start) * frame_bytes) as usize, 0);
        let Some(at) = section.pages_at.plus((frames.start - section.first) * frame_bytes) else {
            return Ok(false);
        };
        match self.translator().read(memory, at, bytes) {
            Ok(()) => Ok(true),
            Err(IntrospectError::NotMapped { .. } | IntrospectError::NoRam { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests;
