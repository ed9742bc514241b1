//! Whether a RAM block is still mapped as it was found.
//!
//! A block that was unplugged, moved or mapped anew is other memory than the one that its file holds.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use crate::error::ProcError;
use crate::pagemap;
use crate::procfs;
use crate::ram::{Backing, RamRegion, covering};

/// Whether a block is mapped from its file, shared and without gaps. `maps` is /proc/PID/maps; a
/// process that ended has nothing mapped.
pub(crate) fn intact(
    pid: i32,
    maps: &File,
    region: &RamRegion,
    backing: &Backing,
) -> Result<bool, ProcError> {
    match by_query(maps, region, backing) {
        Ok(intact) => Ok(intact),
        // Before Linux 6.11.
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => by_list(pid, region, backing),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
        Err(source) => {
            Err(ProcError::Read { path: PathBuf::from(format!("/proc/{pid}/maps")), source })
        }
    }
}

fn by_query(maps: &File, region: &RamRegion, backing: &Backing) -> io::Result<bool> {
    let range = region.addresses();
    let mut address = range.start;
    while address < range.end {
        let Some(vma) = pagemap::vma_at(maps, address)? else { return Ok(false) };
        let offset = vma.offset_bytes.wrapping_add(address.wrapping_sub(vma.start));
        let expected = backing.offset_bytes + (address - range.start);
        let same = (vma.device, vma.inode) == (backing.device, backing.inode);
        if !vma.shared || !same || offset != expected || vma.end <= address {
            return Ok(false);
        }
        address = vma.end;
    }
    Ok(true)
}

fn by_list(pid: i32, region: &RamRegion, backing: &Backing) -> Result<bool, ProcError> {
    let mappings = procfs::mappings(pid)?;
    let covering = covering(pid, region, &mappings);
    let first = covering.ok().and_then(|found| found.first().copied());
    Ok(first.is_some_and(|mapping| {
        let offset = mapping.offset_bytes + (region.hva - mapping.start);
        let file = (mapping.device, mapping.inode);
        file == (backing.device, backing.inode) && offset == backing.offset_bytes
    }))
}
