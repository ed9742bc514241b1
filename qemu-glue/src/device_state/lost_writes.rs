//! Writes that QEMU itself forgets while it migrates.
//!
//! Before 9.0, and without KVM, `cpu_physical_memory_sync_dirty_bitmap` (include/exec/ram_addr.h) clears the marks of a block
//! of RAM by whole words if the block's length allows it, and leaves the processors' TLBs as they are: until a TLB is
//! flushed, writes to pages that it holds are not marked again. A page that is sent in between arrives out of date. By
//! single pages, for blocks of other lengths, it is right. QEMU mended this with its commit 03bfc2188f.

use migrate_core::layout::PAGE_BYTES;

use super::DeviceStateError;
use super::postcopy::ramblocks;
use crate::qmp::Client;

/// The length that a block's has to be a multiple of for the wrong way: 64 pages.
const WORD_BYTES: u64 = 64 * PAGE_BYTES as u64;

/// Why the guest may arrive with memory that is out of date if this QEMU sends it, with the remedy; nothing if it will not.
///
/// # Errors
/// A [`DeviceStateError`]: QEMU was not asked.
pub async fn lost_writes(client: &Client) -> Result<Option<String>, DeviceStateError> {
    if client.version().at_least(9, 0) || client.query_kvm().await? {
        return Ok(None);
    }
    let blocks = ramblocks(client).await?;
    let largest = blocks.iter().max_by_key(|block| block.used_bytes);
    Ok(largest.filter(|block| block.used_bytes.is_multiple_of(WORD_BYTES)).map(|block| {
        format!(
            "QEMU {} without KVM forgets writes now and then while it migrates: the guest may go wrong at the destination \
             (mended in QEMU 9.0). Use KVM, a newer QEMU, RAM that is shared with --path direct, or RAM of another length \
             than a multiple of 256 KiB for {}",
            client.version(),
            block.name
        )
    }))
}
