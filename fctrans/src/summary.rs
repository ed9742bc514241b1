//! Memory use of the guest, as `free` shows it inside.
//!
//! Source: fs/proc/meminfo.c, mm/show_mem.c (`si_mem_available`), free(1) of procps 4: used is what is not available; buffers
//! and cache are shown as one, since the kernel keeps no counter of the first alone.

use serde::Serialize;

use crate::counters::{self, Counters};
use crate::error::IntrospectError;
use crate::kernel::Kernel;
use crate::memory::{PAGE, PhysicalMemory};
use crate::symbols::Symbols;

/// Symbols besides those of counters.
const SYMBOLS: [&str; 6] = [
    "_totalram_pages",
    "totalreserve_pages",
    "min_free_kbytes",
    "watermark_scale_factor",
    "nr_swap_pages",
    "total_swap_pages",
];

/// Memory use in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// What the kernel manages.
    pub total_bytes: u64,
    /// Total less available.
    pub used_bytes: u64,
    /// Not used for anything.
    pub free_bytes: u64,
    /// Of tmpfs and shared memory.
    pub shared_bytes: u64,
    /// Buffers, page cache and what the kernel can reclaim of its own.
    pub buff_cache_bytes: u64,
    /// What new programs can have without swapping, by the kernel's estimate.
    pub available_bytes: u64,
    /// Swap space.
    pub swap_total_bytes: u64,
    /// Swap space that is free.
    pub swap_free_bytes: u64,
    /// Pages swapped in since the guest was started; nothing if it does not count them.
    pub swapped_in_pages: Option<u64>,
    /// Pages swapped out since then.
    pub swapped_out_pages: Option<u64>,
}

/// Where the kernel keeps its figures. Looked for once, read as often as wanted.
#[derive(Debug, Clone)]
pub struct Figures {
    symbols: Symbols,
    counters: Counters,
}

impl Figures {
    /// Finds them: looks through all names that the kernel has.
    ///
    /// # Errors
    /// [`IntrospectError::Missing`] for kernels before 6.0, whose note does not lead to their names;
    /// [`IntrospectError::NoSymbol`] for those whose tables have no variables (CONFIG_KALLSYMS_ALL).
    pub fn find(kernel: &Kernel, memory: &impl PhysicalMemory) -> Result<Self, IntrospectError> {
        let names = [&counters::SYMBOLS[..], &SYMBOLS].concat();
        let symbols = Symbols::find(kernel, memory, &names)?;
        let counters = Counters::find(kernel, memory, &symbols)?;
        Ok(Self { symbols, counters })
    }

    /// Reads memory use.
    ///
    /// # Errors
    /// [`IntrospectError::NoSymbol`] for a counter that the kernel does not have; what reading brings.
    pub fn read(
        &self,
        kernel: &Kernel,
        memory: &impl PhysicalMemory,
    ) -> Result<Summary, IntrospectError> {
        let maybe = |name: &str| self.counters.value(kernel, memory, name);
        let counter = |name: &str| {
            maybe(name)?.ok_or_else(|| IntrospectError::NoSymbol { name: name.to_owned() })
        };
        let long = |name: &str| -> Result<u64, IntrospectError> {
            let value = kernel.translator().read_u64(memory, self.symbols.address(name)?)?;
            Ok(u64::try_from(value.cast_signed()).unwrap_or(0))
        };
        let int = |name: &str| kernel.translator().read_u32(memory, self.symbols.address(name)?);
        let (total, free) = (long("_totalram_pages")?, counter("nr_free_pages")?);
        let swap_cache = maybe("nr_swapcached")?.unwrap_or(0);
        let slab = counter("nr_slab_reclaimable")?;
        let other = maybe("nr_kernel_misc_reclaimable")?.unwrap_or(0);
        let cache = counter("nr_file_pages")?.saturating_sub(swap_cache).saturating_add(slab);
        let low = low_mark(
            total,
            u64::from(int("min_free_kbytes")?),
            u64::from(int("watermark_scale_factor")?),
        );
        let files = counter("nr_active_file")?.saturating_add(counter("nr_inactive_file")?);
        let gains = [files, slab.saturating_add(other)].map(|pages| pages - (pages / 2).min(low));
        let available = gains.iter().fold(free, |all, gain| all.saturating_add(*gain));
        let available = available.saturating_sub(long("totalreserve_pages")?).min(total);
        let bytes = |pages: u64| pages.saturating_mul(PAGE);
        Ok(Summary {
            total_bytes: bytes(total),
            used_bytes: bytes(total - available),
            free_bytes: bytes(free),
            shared_bytes: bytes(counter("nr_shmem")?),
            buff_cache_bytes: bytes(cache),
            available_bytes: bytes(available),
            // Kernels without swap have no such symbols.
            swap_total_bytes: long("total_swap_pages").map_or(0, bytes),
            swap_free_bytes: long("nr_swap_pages").map_or(0, bytes),
            swapped_in_pages: maybe("pswpin")?,
            swapped_out_pages: maybe("pswpout")?,
        })
    }
}

/// Pages below which the kernel begins to reclaim, over all zones (mm/page_alloc.c: `__setup_per_zone_wmarks`).
fn low_mark(total_pages: u64, min_free_kib: u64, scale: u64) -> u64 {
    let min = min_free_kib / 4;
    min.saturating_add((min / 4).max(total_pages.saturating_mul(scale) / 10_000))
}

#[cfg(test)]
mod tests;
