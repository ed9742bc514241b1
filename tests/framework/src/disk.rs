//! Disk images whose every block tells its number (guest_programs::pattern).

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use guest_programs::PAGE_BYTES;
use guest_programs::pattern::fill_block;

/// Writes a raw image of `size_mib` MiB for the guest's `diskread` with the same `seed`.
///
/// # Errors
/// The file cannot be written.
pub fn create(path: &Path, size_mib: u64, seed: u64) -> Result<()> {
    let file = File::create(path).with_context(|| format!("Cannot create {}", path.display()))?;
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    let mut block = [0; PAGE_BYTES];
    for number in 0..(size_mib << 20) / PAGE_BYTES as u64 {
        fill_block(seed, number, &mut block);
        writer.write_all(&block).with_context(|| format!("Cannot write {}", path.display()))?;
    }
    let file = writer.into_inner().map_err(|error| error.into_error());
    // Direct reads bypass the page cache: the data must be on the disk.
    file.and_then(|file| file.sync_all())
        .with_context(|| format!("Cannot finish {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn has_size_and_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.raw");
        create(&path, 1, 9).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 1 << 20);
        assert_eq!(bytes[255 * PAGE_BYTES..][..8], 255_u64.to_le_bytes());
        assert_eq!(bytes[8..16], 9_u64.to_le_bytes());
    }
}
