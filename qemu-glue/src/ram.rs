//! Guest RAM of a QEMU process, read and written through the files that back it.
//!
//! ```text
//! RamRegion (what QEMU says)     mappings (what /proc says)          file
//!   "mem0" 1 GiB at 0x7f..00  ->  7f..00-7f..40 rw-s offset 0   \
//!                                 7f..40-7f..80 rw-s offset 1G/2 +-> /dev/shm/mem0, tmpfs
//! ```
//!
//! Invariants:
//! - Only shared mappings of tmpfs, hugetlbfs and memfd are opened: with anything else the file and
//!   QEMU's memory are not the same pages, or do not stay in memory.
//! - A block may be covered by several adjacent mappings (mbind splits them) of one file.
//! - Reading never fills a hole: pread(2) is used, not a mapping (design rule 10).
//! - No reference to live guest memory is ever formed (rule 2): contents are copied into the
//!   caller's private buffer by the kernel; on hugetlbfs, which has no write(2), a raw pointer is
//!   copied to.
#![expect(unsafe_code, reason = "copies into a mapping of hugetlbfs, which has no write(2)")]

mod process;

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use memmap2::{MmapOptions, MmapRaw};
use migrate_core::layout::{BlockSpec, PAGE_BYTES, PageIndex, RamLayout};
use migrate_core::pageset::PageSet;
use rustix::fs::{FallocateFlags, SeekFrom};
use serde::{Deserialize, Serialize};

use crate::error::ProcError;
pub use crate::error::RamError;
use crate::procfs::{self, Identity, Mapping};

pub use self::process::{ProcessRam, ReadRam};

/// `f_type` of tmpfs and memfd (include/uapi/linux/magic.h: TMPFS_MAGIC).
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// `f_type` of hugetlbfs and of memfds with MFD_HUGETLB (HUGETLBFS_MAGIC).
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

const PAGE: u64 = PAGE_BYTES as u64;

/// Pieces that one system call takes (include/uapi/linux/uio.h: UIO_MAXIOV).
const IOV_MAX: usize = 1024;

/// A RAM block as QEMU describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamRegion {
    /// QEMU's name of the block.
    pub name: String,
    /// Length in bytes.
    pub length_bytes: u64,
    /// Size in bytes of the pages that back it.
    pub page_bytes: u64,
    /// Where QEMU has mapped it (host virtual address).
    pub hva: u64,
}

impl RamRegion {
    /// QEMU's addresses of the block.
    pub fn addresses(&self) -> Range<u64> {
        self.hva..self.hva.saturating_add(self.length_bytes)
    }
}

/// Which file backs a block, and where in it the block begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backing {
    /// Device as st_dev has it.
    pub device: u64,
    /// Inode.
    pub inode: u64,
    /// Offset of the block's first byte in the file, in bytes.
    pub offset_bytes: u64,
    /// Whether it lies on hugetlbfs.
    pub huge: bool,
}

#[derive(Debug)]
struct Block {
    region: RamRegion,
    file: File,
    backing: Backing,
    /// For writing on hugetlbfs.
    map: Option<MmapRaw>,
    /// Held while tmpfs is written: the kernel takes one lock per inode for that and spins for it,
    /// so that a second writer would burn a core without writing sooner.
    writing: Mutex<()>,
}

/// The opened RAM blocks of one QEMU process.
#[derive(Debug)]
pub struct GuestRam {
    identity: Identity,
    layout: RamLayout,
    blocks: Vec<Block>,
    writable: bool,
}

impl GuestRam {
    /// Opens the files behind the blocks of a QEMU process, for reading or also for writing.
    ///
    /// # Errors
    /// [`RamError`] that names the first block that is private, not on tmpfs or hugetlbfs, not
    /// mapped as described, or cannot be opened.
    pub fn open(pid: i32, regions: &[RamRegion], write: bool) -> Result<Self, RamError> {
        let proc_failed = |source: ProcError| RamError::Proc { pid, source };
        let identity = Identity::of(pid).map_err(proc_failed)?;
        let specs = regions.iter().map(|region| BlockSpec {
            name: region.name.clone(),
            length_bytes: region.length_bytes,
            page_bytes: region.page_bytes,
        });
        let layout =
            RamLayout::new(specs.collect()).map_err(|source| RamError::Layout { pid, source })?;
        let mappings = procfs::mappings(pid).map_err(proc_failed)?;
        let blocks = regions.iter().map(|region| Block::open(pid, region, &mappings, write));
        let blocks = blocks.collect::<Result<Vec<_>, _>>()?;
        identity.check().map_err(proc_failed)?;
        Ok(Self { identity, layout, blocks, writable: write })
    }

    /// The blocks and the numbering of their pages.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// The process whose RAM this is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The blocks as they were passed to [`open`](Self::open), in layout order.
    pub fn regions(&self) -> impl ExactSizeIterator<Item = &RamRegion> {
        self.blocks.iter().map(|block| &block.region)
    }

    /// Which file backs each block, in layout order.
    pub fn backings(&self) -> impl ExactSizeIterator<Item = Backing> + '_ {
        self.blocks.iter().map(|block| block.backing)
    }

    /// The file behind each block, in layout order.
    pub(crate) fn files(&self) -> impl ExactSizeIterator<Item = &File> {
        self.blocks.iter().map(|block| &block.file)
    }

    /// QEMU's address of a page; nothing if there is no such page.
    pub fn address_of(&self, page: PageIndex) -> Option<u64> {
        let location = self.layout.locate(page)?;
        Some(self.blocks.get(location.block)?.region.hva + location.offset_bytes)
    }

    /// Copies pages into a private buffer, whose length is a multiple of [`PAGE_BYTES`]. Holes read
    /// as zeros and stay holes.
    ///
    /// # Errors
    /// [`RamError::OutOfRange`] if the pages do not lie within one block; [`RamError::Io`] if the
    /// file became shorter or cannot be read.
    pub fn read(&self, page: PageIndex, buffer: &mut [u8]) -> Result<(), RamError> {
        let (block, offset) = self.place_buffer(page, buffer.len())?;
        block.read(offset, buffer)
    }

    /// Copies bytes, from `offset_bytes` of a page on, which may go on beyond its end within the block.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_part(
        &self,
        page: PageIndex,
        offset_bytes: usize,
        buffer: &mut [u8],
    ) -> Result<(), RamError> {
        let pages = offset_bytes.saturating_add(buffer.len()).div_ceil(PAGE_BYTES).max(1) as u64;
        let (block, offset) = self.place(page, pages, buffer.len())?;
        block.read(offset + offset_bytes as u64, buffer)
    }

    /// Writes pages; the length of `data` is a multiple of [`PAGE_BYTES`].
    ///
    /// # Errors
    /// As [`read`](Self::read); [`RamError::ReadOnly`]; [`RamError::Io`] also if the file system is
    /// full or the huge pages are used up.
    pub fn write(&self, page: PageIndex, data: &[u8]) -> Result<(), RamError> {
        self.write_pieces(page, &mut [IoSlice::new(data)])
    }

    /// Writes pages whose contents lie in pieces, which may end anywhere; together they are a
    /// multiple of [`PAGE_BYTES`] long. The pieces are used up.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn write_pieces(
        &self,
        page: PageIndex,
        pieces: &mut [IoSlice<'_>],
    ) -> Result<(), RamError> {
        let bytes = pieces.iter().map(|piece| piece.len()).sum();
        let (block, offset) = self.place_buffer(page, bytes)?;
        self.check_writable(block)?;
        block.write_pieces(offset, pieces).map_err(|source| block.io("write", offset, source))
    }

    /// Writes part of a page, from `offset_bytes` on, and not beyond its end. The pieces are used up.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn write_part(
        &self,
        page: PageIndex,
        offset_bytes: usize,
        pieces: &mut [IoSlice<'_>],
    ) -> Result<(), RamError> {
        let bytes: usize = pieces.iter().map(|piece| piece.len()).sum();
        if offset_bytes.saturating_add(bytes) > PAGE_BYTES {
            return Err(RamError::OutOfRange { first: page, pages: 1, buffer_bytes: bytes });
        }
        let (block, offset) = self.place(page, 1, bytes)?;
        self.check_writable(block)?;
        let offset = offset + offset_bytes as u64;
        block.write_pieces(offset, pieces).map_err(|source| block.io("write", offset, source))
    }

    /// Makes pages read as zeros. Whole backing pages become holes; parts of larger ones are
    /// zeroed, unless they are holes already.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn discard(&self, page: PageIndex, pages: u64) -> Result<(), RamError> {
        let (block, offset) = self.place(page, pages, 0)?;
        self.check_writable(block)?;
        let result = block.discard(offset, pages.saturating_mul(PAGE));
        result.map_err(|source| block.io("discard part of", offset, source))
    }

    /// The pages that hold data, that is, are no holes. On hugetlbfs, where finding out costs more
    /// ([`Pager::present`](crate::pager::Pager::present) does), all pages of a file that has any.
    ///
    /// # Errors
    /// [`RamError::Io`].
    pub fn data_ranges(&self) -> Result<PageSet, RamError> {
        let mut set = PageSet::new(self.layout.pages());
        for (index, block) in self.blocks.iter().enumerate() {
            let pages = self.layout.block_pages(index);
            let result = block.data(|start, end| {
                set.insert_range(pages.start + start / PAGE..pages.start + end.div_ceil(PAGE));
            });
            result.map_err(|source| block.io("look for data in", 0, source))?;
        }
        Ok(set)
    }

    /// Bytes that the file systems of the blocks have room for: of several, the least. Nothing if they say no bound, as
    /// those of memfd do.
    ///
    /// # Errors
    /// [`RamError::Io`] if a file system does not say.
    pub fn room_bytes(&self) -> Result<Option<u64>, RamError> {
        let mut least = None;
        for block in &self.blocks {
            let stat = rustix::fs::fstatvfs(block.file.as_fd())
                .map_err(|errno| block.io("ask for room at", 0, errno.into()))?;
            if stat.f_blocks > 0 {
                let room = stat.f_bavail.saturating_mul(stat.f_frsize);
                least = Some(least.map_or(room, |least: u64| least.min(room)));
            }
        }
        Ok(least)
    }

    /// Adds to `dirty` those of the `known` pages that are holes now, and returns how many. A page
    /// that a balloon gives back while it is clean is not reported by the dirty tracking: ask this
    /// at the last scan, with the pages of which the other side holds contents other than zero.
    ///
    /// # Errors
    /// [`RamError::Io`].
    pub fn vanished(&self, known: &PageSet, dirty: &mut PageSet) -> Result<u64, RamError> {
        let mut holes = known.clone();
        holes.subtract(&self.data_ranges()?);
        dirty.union_with(&holes);
        Ok(holes.len())
    }

    /// Bytes of memory that the blocks occupy. On hugetlbfs, that of the whole file.
    ///
    /// # Errors
    /// [`RamError::Io`].
    pub fn resident_bytes(&self) -> Result<u64, RamError> {
        let mut total = 0u64;
        let mut huge_files = Vec::new();
        for block in &self.blocks {
            let failed = |source| block.io("measure", 0, source);
            if !block.backing.huge {
                let add = |start: u64, end: u64| total += end - start;
                block.data(add).map_err(failed)?;
                continue;
            }
            let file = (block.backing.device, block.backing.inode);
            if !huge_files.contains(&file) {
                huge_files.push(file);
                total += block.file.metadata().map_err(failed)?.blocks() * 512;
            }
        }
        Ok(total)
    }

    fn check_writable(&self, block: &Block) -> Result<(), RamError> {
        if self.writable {
            return Ok(());
        }
        Err(RamError::ReadOnly { block: block.region.name.clone() })
    }

    fn place_buffer(&self, page: PageIndex, bytes: usize) -> Result<(&Block, u64), RamError> {
        let pages = (bytes / PAGE_BYTES) as u64;
        if !bytes.is_multiple_of(PAGE_BYTES) {
            return Err(RamError::OutOfRange { first: page, pages, buffer_bytes: bytes });
        }
        self.place(page, pages, bytes)
    }

    /// The block that holds all of `pages` from `page` on, and the offset in it.
    fn place(&self, page: PageIndex, pages: u64, bytes: usize) -> Result<(&Block, u64), RamError> {
        let outside = || RamError::OutOfRange { first: page, pages, buffer_bytes: bytes };
        let location = self.layout.locate(page).ok_or_else(outside)?;
        let block = self.blocks.get(location.block).ok_or_else(outside)?;
        let end = self.layout.block_pages(location.block).end;
        if pages == 0 || pages > end.saturating_sub(page.0) {
            return Err(outside());
        }
        Ok((block, location.offset_bytes))
    }
}

impl Block {
    fn open(
        pid: i32,
        region: &RamRegion,
        mappings: &[Mapping],
        write: bool,
    ) -> Result<Self, RamError> {
        let name = || region.name.clone();
        let covering = covering(pid, region, mappings)?;
        let mapping = covering.first().ok_or_else(|| RamError::NotMapped {
            block: name(),
            pid,
            address: region.hva,
        })?;
        let file = open_backing(pid, region, mapping, write)?;
        let offset_bytes = mapping.offset_bytes + (region.hva - mapping.start);
        let huge = check_file(region, mapping, &file, offset_bytes)?;
        let backing = Backing { device: mapping.device, inode: mapping.inode, offset_bytes, huge };
        let map = if write && huge { Some(map_huge(region, &file, offset_bytes)?) } else { None };
        Ok(Self { region: region.clone(), file, backing, map, writing: Mutex::default() })
    }

    fn io(&self, what: &'static str, offset_bytes: u64, source: io::Error) -> RamError {
        RamError::Io { what, block: self.region.name.clone(), offset_bytes, source }
    }

    fn write_pieces(&self, offset: u64, mut pieces: &mut [IoSlice<'_>]) -> io::Result<()> {
        if let Some(map) = &self.map {
            return self.write_huge(map, offset, pieces);
        }
        let mut at = self.backing.offset_bytes + offset;
        let _turn = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        // Drops empty pieces at the front, as every advance does.
        IoSlice::advance_slices(&mut pieces, 0);
        while !pieces.is_empty() {
            let some = pieces.get(..pieces.len().min(IOV_MAX)).unwrap_or_default();
            match rustix::io::pwritev(&self.file, some, at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    at += written as u64;
                    IoSlice::advance_slices(&mut pieces, written);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn write_huge(&self, map: &MmapRaw, offset: u64, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        let bytes: usize = pieces.iter().map(|piece| piece.len()).sum();
        // Allocate first: a store to a page that the pool cannot supply would be a SIGBUS.
        let page = self.region.page_bytes;
        let start = offset / page * page;
        let end = (offset + bytes as u64).next_multiple_of(page);
        self.fallocate(FallocateFlags::KEEP_SIZE, start, end - start)?;
        let mut offset = usize::try_from(offset).map_err(io::Error::other)?;
        if offset.checked_add(bytes).is_none_or(|end| end > map.len()) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        for piece in pieces {
            let source = piece.as_ptr();
            // SAFETY: the target range lies within the mapping (all pieces together were checked
            // above), which lives as long as `self`; no Rust reference to it exists anywhere, the
            // source is private to the caller, and the pages exist (fallocate above), so the stores
            // do not fault for want of memory.
            unsafe {
                std::ptr::copy_nonoverlapping(source, map.as_mut_ptr().add(offset), piece.len());
            };
            offset += piece.len();
        }
        Ok(())
    }

    fn fallocate(&self, mode: FallocateFlags, offset: u64, bytes: u64) -> io::Result<()> {
        let at = self.backing.offset_bytes + offset;
        loop {
            match rustix::fs::fallocate(&self.file, mode, at, bytes) {
                Err(rustix::io::Errno::INTR) => {}
                other => return other.map_err(io::Error::from),
            }
        }
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), RamError> {
        let result = self.file.read_exact_at(buffer, self.backing.offset_bytes + offset);
        result.map_err(|source| self.io("read", offset, source))
    }

    fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let page = self.region.page_bytes;
        let end = offset + bytes;
        let whole_start = offset.next_multiple_of(page);
        let whole_end = end / page * page;
        if whole_start >= whole_end {
            return self.zero_part(offset, end);
        }
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.fallocate(punch, whole_start, whole_end - whole_start)?;
        self.zero_part(offset, whole_start)?;
        self.zero_part(whole_end, end)
    }

    /// Zeroes pages inside larger backing pages, without filling a hole to do so.
    fn zero_part(&self, start: u64, end: u64) -> io::Result<()> {
        const ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
        let mut buffer = [0; PAGE_BYTES];
        for offset in (start..end).step_by(PAGE_BYTES) {
            self.file.read_exact_at(&mut buffer, self.backing.offset_bytes + offset)?;
            if buffer != ZEROS {
                self.write_pieces(offset, &mut [IoSlice::new(&ZEROS)])?;
            }
        }
        Ok(())
    }

    /// Calls `found` with the start and end of every stretch of data, as offsets in the block.
    fn data(&self, mut found: impl FnMut(u64, u64)) -> io::Result<()> {
        let first = self.backing.offset_bytes;
        let end = first + self.region.length_bytes;
        if self.backing.huge {
            if self.file.metadata()?.blocks() != 0 {
                found(0, self.region.length_bytes);
            }
            return Ok(());
        }
        seek_data(&self.file, first..end, |start, stop| found(start - first, stop - first))
    }
}

/// Calls `found` with the start and end of every stretch of data within a range of a file on tmpfs.
pub(crate) fn seek_data(
    file: &File,
    range: Range<u64>,
    mut found: impl FnMut(u64, u64),
) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No data from here to the end of the file.
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if start >= range.end {
            return Ok(());
        }
        let stop = match rustix::fs::seek(file, SeekFrom::Hole(start)) {
            // A hole was punched here since: go on behind it.
            Ok(stop) if stop <= start => start + PAGE,
            Ok(stop) => stop.min(range.end),
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        found(start, stop.min(range.end));
        at = stop;
    }
    Ok(())
}

/// The mappings that cover a block: adjacent, shared, and one piece of one file.
pub(crate) fn covering<'a>(
    pid: i32,
    region: &RamRegion,
    mappings: &'a [Mapping],
) -> Result<Vec<&'a Mapping>, RamError> {
    let block = || region.name.clone();
    let end = region.addresses().end;
    let mut address = region.hva;
    let mut found: Vec<&Mapping> = Vec::new();
    while address < end {
        let mapping = procfs::find(mappings, address).ok_or_else(|| RamError::NotMapped {
            block: block(),
            pid,
            address,
        })?;
        if !mapping.shared {
            return Err(RamError::Private { block: block() });
        }
        if let Some(last) = found.last() {
            let expected = last.offset_bytes.wrapping_add(last.length_bytes());
            if !last.same_file(mapping) || mapping.offset_bytes != expected {
                return Err(RamError::Scattered { block: block(), address });
            }
        }
        address = mapping.end;
        found.push(mapping);
    }
    Ok(found)
}

/// Opens the mapped file: through map_files (needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE, works
/// without a name), by its name, or through a descriptor that QEMU has open.
fn open_backing(
    pid: i32,
    region: &RamRegion,
    mapping: &Mapping,
    write: bool,
) -> Result<File, RamError> {
    let map_file = format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end);
    let mut error = match open_if_same(Path::new(&map_file), mapping, write) {
        Ok(file) => return Ok(file),
        Err(error) => error,
    };
    let mut candidates = Vec::new();
    if mapping.path.starts_with('/') && !mapping.path.ends_with(" (deleted)") {
        // The name is valid in QEMU's file system namespace, which may not be ours.
        candidates.push(PathBuf::from(format!("/proc/{pid}/root{}", mapping.path)));
    }
    if let Ok(descriptors) = procfs::descriptors(pid) {
        let links = descriptors.iter().map(|fd| PathBuf::from(format!("/proc/{pid}/fd/{fd}")));
        // stat(2) through the link has no side effect; only the right file is opened.
        candidates.extend(
            links.filter(|link| std::fs::metadata(link).is_ok_and(|data| is_same(&data, mapping))),
        );
    }
    for candidate in candidates {
        match open_if_same(&candidate, mapping, write) {
            Ok(file) => return Ok(file),
            Err(other) => error = other,
        }
    }
    Err(RamError::Open { block: region.name.clone(), path: mapping.path.clone(), source: error })
}

fn is_same(metadata: &std::fs::Metadata, mapping: &Mapping) -> bool {
    metadata.is_file() && metadata.dev() == mapping.device && metadata.ino() == mapping.inode
}

fn open_if_same(path: &Path, mapping: &Mapping, write: bool) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)?;
    if !is_same(&file.metadata()?, mapping) {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the name leads to another file"));
    }
    Ok(file)
}

/// Checks file system, page size and length; returns whether it is hugetlbfs.
fn check_file(
    region: &RamRegion,
    mapping: &Mapping,
    file: &File,
    offset_bytes: u64,
) -> Result<bool, RamError> {
    let block = || region.name.clone();
    let failed = |source: io::Error| RamError::Io {
        what: "examine",
        block: block(),
        offset_bytes: 0,
        source,
    };
    let stat = rustix::fs::fstatfs(file.as_fd()).map_err(|errno| failed(errno.into()))?;
    let fs_type = u64::try_from(stat.f_type).unwrap_or(0);
    let found_bytes = match fs_type {
        TMPFS_MAGIC => PAGE,
        HUGETLBFS_MAGIC => u64::try_from(stat.f_bsize).unwrap_or(0),
        _ => {
            let path = mapping.path.clone();
            return Err(RamError::WrongFileSystem { block: block(), path, fs_type });
        }
    };
    if found_bytes != region.page_bytes {
        let claimed_bytes = region.page_bytes;
        return Err(RamError::PageSize { block: block(), claimed_bytes, found_bytes });
    }
    let needed_bytes = offset_bytes.saturating_add(region.length_bytes);
    let file_bytes = file.metadata().map_err(failed)?.len();
    if file_bytes < needed_bytes {
        return Err(RamError::Short { block: block(), file_bytes, needed_bytes });
    }
    Ok(fs_type == HUGETLBFS_MAGIC)
}

/// Maps a block on hugetlbfs for writing. Nothing is reserved: QEMU's own mapping did that.
fn map_huge(region: &RamRegion, file: &File, offset_bytes: u64) -> Result<MmapRaw, RamError> {
    let failed = |source: io::Error| RamError::Io {
        what: "map",
        block: region.name.clone(),
        offset_bytes: 0,
        source,
    };
    let length =
        usize::try_from(region.length_bytes).map_err(|error| failed(io::Error::other(error)))?;
    MmapOptions::new()
        .offset(offset_bytes)
        .len(length)
        .no_reserve_swap()
        .map_raw(file)
        .map_err(failed)
}

#[cfg(test)]
pub(crate) mod tests;
