//! Guest RAM of a QEMU process in whatever memory it is, read through the process.
//!
//! Invariant: what is read is what QEMU has mapped at the blocks' addresses, of the process that was opened: a later
//! one with its number is not read.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use migrate_core::layout::{BlockSpec, PAGE_BYTES, PageIndex, RamLayout};
use migrate_core::pageset::PageSet;

use super::{GuestRam, RamError, RamRegion};

const PAGE: u64 = PAGE_BYTES as u64;

/// Bytes of an entry of /proc/PID/pagemap, and how many are read at a time.
const ENTRY_BYTES: usize = 8;
const ENTRIES: u64 = 8192;

/// The page is in memory, or in swap (Documentation/admin-guide/mm/pagemap.rst).
const IS_THERE: u64 = 0b11 << 62;

/// Guest RAM that can be read.
pub trait ReadRam: std::fmt::Debug + Send + Sync {
    /// The blocks and the numbering of their pages.
    fn layout(&self) -> &RamLayout;

    /// Copies bytes, from `offset_bytes` of a page on, which may go on beyond its end within the block.
    ///
    /// # Errors
    /// [`RamError::OutOfRange`]; [`RamError::Io`].
    fn read_part(
        &self,
        page: PageIndex,
        offset_bytes: usize,
        buffer: &mut [u8],
    ) -> Result<(), RamError>;

    /// The pages that hold data: all others read as zeros.
    ///
    /// # Errors
    /// [`RamError::Io`].
    fn data_ranges(&self) -> Result<PageSet, RamError>;
}

impl ReadRam for GuestRam {
    fn layout(&self) -> &RamLayout {
        self.layout()
    }

    fn read_part(
        &self,
        page: PageIndex,
        offset_bytes: usize,
        buffer: &mut [u8],
    ) -> Result<(), RamError> {
        self.read_part(page, offset_bytes, buffer)
    }

    fn data_ranges(&self) -> Result<PageSet, RamError> {
        self.data_ranges()
    }
}

/// RAM blocks of a process, read by their addresses there.
#[derive(Debug, Clone)]
pub struct ProcessRam {
    layout: RamLayout,
    /// By block: its address in the process, if it is known.
    addresses: Vec<Option<u64>>,
    memory: Arc<File>,
    pagemap: Arc<File>,
}

impl ProcessRam {
    /// Opens the memory of a process, which takes the right to trace it. Pages are numbered over all `regions`.
    ///
    /// # Errors
    /// [`RamError::Layout`]; [`RamError::Trace`].
    pub fn open(pid: i32, regions: &[RamRegion]) -> Result<Self, RamError> {
        let blocks = regions.iter().map(|region| BlockSpec {
            name: region.name.clone(),
            length_bytes: region.length_bytes,
            page_bytes: PAGE,
        });
        let layout =
            RamLayout::new(blocks.collect()).map_err(|source| RamError::Layout { pid, source })?;
        let open = |what| {
            let file = File::open(format!("/proc/{pid}/{what}"));
            file.map(Arc::new).map_err(|source| RamError::Trace { pid, source })
        };
        let addresses = regions.iter().map(|region| Some(region.hva)).collect();
        Ok(Self { layout, addresses, memory: open("mem")?, pagemap: open("pagemap")? })
    }

    /// The same memory with pages numbered by another layout. Blocks that are not known here cannot be read.
    #[must_use]
    pub fn numbered_by(&self, layout: &RamLayout) -> Self {
        let address = |block: &BlockSpec| {
            let same =
                |own: &BlockSpec| own.name == block.name && own.length_bytes >= block.length_bytes;
            *self.addresses.get(self.layout.blocks().iter().position(same)?)?
        };
        let addresses = layout.blocks().iter().map(address).collect();
        Self { layout: layout.clone(), addresses, ..self.clone() }
    }

    /// The block that holds `bytes` from a page's `offset_bytes` on, the first one's offset there, and its address in the
    /// process.
    fn place(
        &self,
        page: PageIndex,
        offset_bytes: usize,
        bytes: usize,
    ) -> Result<(usize, u64, u64), RamError> {
        let pages = offset_bytes.saturating_add(bytes).div_ceil(PAGE_BYTES).max(1) as u64;
        let outside = || RamError::OutOfRange { first: page, pages, buffer_bytes: bytes };
        let location = self.layout.locate(page).ok_or_else(outside)?;
        if pages > self.layout.block_pages(location.block).end.saturating_sub(page.0) {
            return Err(outside());
        }
        let begin = self.addresses.get(location.block).copied().flatten().ok_or_else(outside)?;
        let offset = location.offset_bytes + offset_bytes as u64;
        Ok((location.block, offset, begin.saturating_add(offset)))
    }

    fn io(&self, block: usize, offset_bytes: u64, source: io::Error) -> RamError {
        let block = self.layout.blocks().get(block).map(|block| block.name.clone());
        RamError::Io { what: "read", block: block.unwrap_or_default(), offset_bytes, source }
    }
}

impl ReadRam for ProcessRam {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn read_part(
        &self,
        page: PageIndex,
        offset_bytes: usize,
        buffer: &mut [u8],
    ) -> Result<(), RamError> {
        let (block, offset, address) = self.place(page, offset_bytes, buffer.len())?;
        let read = self.memory.read_exact_at(buffer, address);
        read.map_err(|source| self.io(block, offset, source))
    }

    fn data_ranges(&self) -> Result<PageSet, RamError> {
        let mut set = PageSet::new(self.layout.pages());
        let mut buffer = vec![0; ENTRIES as usize * ENTRY_BYTES];
        for (block, address) in self.addresses.iter().enumerate() {
            let pages = self.layout.block_pages(block);
            let Some(address) = address else { continue };
            let first = address / PAGE;
            let mut page = pages.start;
            while page < pages.end {
                let count = ENTRIES.min(pages.end - page);
                let entries = buffer.get_mut(..count as usize * ENTRY_BYTES).unwrap_or_default();
                let at = (first + (page - pages.start)) * ENTRY_BYTES as u64;
                let read = self.pagemap.read_exact_at(entries, at);
                read.map_err(|source| self.io(block, (page - pages.start) * PAGE, source))?;
                let (entries, _) = entries.as_chunks::<ENTRY_BYTES>();
                for (number, entry) in (page..).zip(entries) {
                    if u64::from_ne_bytes(*entry) & IS_THERE != 0 {
                        set.insert(number);
                    }
                }
                page += count;
            }
        }
        Ok(set)
    }
}

#[cfg(test)]
mod tests;
