//! Guest-physical memory, as copies.
//!
//! ```text
//!   guest-physical     0        PCI hole        4 GiB
//!                      [ range ]      ·         [ range     ]
//!   page numbers       0 ...  n-1               n ...
//! ```
//!
//! Invariant: no reference to live guest memory exists; what is looked at is a private copy.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use migrate_core::layout::{PAGE_BYTES, PageIndex, RamLayout};
use migrate_core::pageset::PageSet;
use qemu_glue::ram::ReadRam;
use qemu_glue::vm::GpaRange;

use crate::error::IntrospectError;

/// Bytes of a page.
pub(crate) const PAGE: u64 = PAGE_BYTES as u64;

/// A guest-physical address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

/// A virtual address of the guest's kernel.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gva(pub u64);

impl fmt::Debug for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpa({:#x})", self.0)
    }
}

impl fmt::Debug for Gva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gva({:#x})", self.0)
    }
}

impl Gva {
    /// The address `bytes` further on; nothing beyond the last one.
    pub fn plus(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }
}

/// Consecutive RAM of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamRange {
    /// Guest-physical addresses, whole pages.
    pub gpa: Range<u64>,
    /// Number of the page that lies first in it.
    pub first: PageIndex,
}

impl RamRange {
    /// The frames (addresses by 4096) in it.
    pub fn frames(&self) -> Range<u64> {
        self.gpa.start / PAGE..self.gpa.end / PAGE
    }

    /// The number of the page at a frame of this range.
    pub fn page(&self, frame: u64) -> u64 {
        self.first.0 + (frame - self.gpa.start / PAGE)
    }
}

/// The guest's RAM by its guest-physical addresses.
pub trait PhysicalMemory {
    /// Where there is RAM, in ascending order.
    fn ranges(&self) -> &[RamRange];

    /// Number of pages in all.
    fn pages(&self) -> u64;

    /// Copies what lies at `at`, within one range.
    ///
    /// # Errors
    /// [`IntrospectError::NoRam`] where there is none; [`IntrospectError::Ram`] if it cannot be read.
    fn read(&self, at: Gpa, buffer: &mut [u8]) -> Result<(), IntrospectError>;

    /// The pages, by their numbers, that hold data: all others read as zeros.
    ///
    /// # Errors
    /// [`IntrospectError::Ram`].
    fn data(&self) -> Result<PageSet, IntrospectError>;
}

/// Reads a little-endian number of 8 bytes.
pub(crate) fn read_u64(memory: &impl PhysicalMemory, at: Gpa) -> Result<u64, IntrospectError> {
    let mut bytes = [0; 8];
    memory.read(at, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// The range that holds `bytes` from `at` on.
pub fn range_of(ranges: &[RamRange], at: Gpa, bytes: u64) -> Option<&RamRange> {
    let after = ranges.partition_point(|range| range.gpa.start <= at.0);
    let range = ranges.get(after.checked_sub(1)?)?;
    (at.0.checked_add(bytes)? <= range.gpa.end).then_some(range)
}

/// The RAM of a QEMU process.
#[derive(Debug, Clone)]
pub struct LiveMemory {
    ram: Arc<dyn ReadRam>,
    ranges: Vec<RamRange>,
}

impl LiveMemory {
    /// The memory of `ram` where the guest sees it: [`guest_physical`](qemu_glue::vm::VmInventory::guest_physical).
    pub fn new<R: ReadRam + 'static>(ram: Arc<R>, guest_physical: &[GpaRange]) -> Self {
        let mut ranges: Vec<RamRange> =
            guest_physical.iter().filter_map(|part| ram_range(ram.layout(), part)).collect();
        ranges.sort_by_key(|range| range.gpa.start);
        // Where two blocks claim one address, neither is known to be what the guest sees.
        let overlaps =
            ranges.windows(2).any(|pair| matches!(pair, [a, b] if a.gpa.end > b.gpa.start));
        if overlaps {
            ranges.clear();
        }
        Self { ram, ranges }
    }
}

fn ram_range(layout: &RamLayout, part: &GpaRange) -> Option<RamRange> {
    let block = layout.blocks().iter().position(|block| block.name == part.block)?;
    let pages = layout.block_pages(block);
    let whole = [part.gpa, part.bytes, part.offset].iter().all(|value| value.is_multiple_of(PAGE));
    let first = pages.start.checked_add(part.offset / PAGE)?;
    let end = first.checked_add(part.bytes / PAGE)?;
    (whole && end <= pages.end).then(|| RamRange {
        gpa: part.gpa..part.gpa.saturating_add(part.bytes),
        first: PageIndex(first),
    })
}

impl PhysicalMemory for LiveMemory {
    fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    fn pages(&self) -> u64 {
        self.ram.layout().pages()
    }

    fn read(&self, at: Gpa, buffer: &mut [u8]) -> Result<(), IntrospectError> {
        let range =
            range_of(&self.ranges, at, buffer.len() as u64).ok_or(IntrospectError::NoRam { at })?;
        let page = PageIndex(range.page(at.0 / PAGE));
        Ok(self.ram.read_part(page, (at.0 % PAGE) as usize, buffer)?)
    }

    fn data(&self) -> Result<PageSet, IntrospectError> {
        Ok(self.ram.data_ranges()?)
    }
}
