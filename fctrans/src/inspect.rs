//! All that can be seen of a guest, at once: what `migrate inspect` prints.

use std::time::{Duration, Instant};

use qemu_glue::vm::Processor;
use serde::Serialize;

use crate::error::IntrospectError;
use crate::kernel::Kernel;
use crate::memory::{PAGE, PhysicalMemory};
use crate::summary::{Figures, Summary};

/// Version of the shape of [`Inspection`].
const VERSION: u32 = 1;

/// What was seen.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// Version of this shape: 1.
    pub v: u32,
    /// The kernel's release.
    pub kernel: String,
    /// Memory use; nothing if the kernel's figures cannot be found.
    pub memory: Option<Summary>,
    /// Why there is none.
    pub memory_unknown: Option<String>,
    /// Number of free blocks of 4096 bytes times two to the power of the index.
    pub free_blocks: Vec<u64>,
    /// Bytes of free blocks.
    pub free_bytes: u64,
    /// Bytes that the guest has given away, such as a balloon's.
    pub offline_bytes: u64,
    /// Bytes that have no data at the host, whether the guest uses them or not.
    pub hole_bytes: u64,
    /// Bytes that hold data at the host and that the guest does not use: what a migration leaves out.
    pub skipped_bytes: u64,
    /// Bytes in use that the guest is likely to need soon; nothing if the kernel's flags are not known.
    pub working_set_bytes: Option<u64>,
    /// Bytes in use that it could reclaim, and has not used lately.
    pub cold_bytes: Option<u64>,
    /// Why unused memory is not left out; nothing if it is.
    pub not_skipped: Option<String>,
    /// Time to find the kernel, in milliseconds.
    pub find_ms: f64,
    /// Time to look at all pages, in milliseconds.
    pub scan_ms: f64,
}

/// Looks at a guest, which may run meanwhile: then what is seen is of several moments.
///
/// # Errors
/// If no kernel is found, or memory cannot be read.
pub fn inspect(
    memory: &impl PhysicalMemory,
    processors: &[Processor],
) -> Result<Inspection, IntrospectError> {
    let (kernel, find) = timed(|| Kernel::find(memory, processors));
    let kernel = kernel?;
    let (usage, scan) = timed(|| kernel.usage(memory));
    let usage = usage?;
    let (mut skipped, data) = (usage.unused(), memory.data()?);
    let working_set = kernel.working_set(memory, &skipped)?;
    skipped.intersect(&data);
    let figures = Figures::find(&kernel, memory);
    let pattern = kernel.pattern(memory, &skipped)?;
    let summary = figures.and_then(|figures| figures.read(&kernel, memory));
    let (summary, unknown) = match summary {
        Ok(summary) => (Some(summary), None),
        Err(error) => (None, Some(error.to_string())),
    };
    let bytes = |pages: u64| pages * PAGE;
    let used = |set: &migrate_core::pageset::PageSet| {
        let mut set = set.clone();
        set.intersect(&data);
        bytes(set.len())
    };
    Ok(Inspection {
        v: VERSION,
        kernel: kernel.release().to_owned(),
        memory: summary,
        memory_unknown: unknown,
        free_bytes: bytes(usage.free.len()),
        free_blocks: usage.free_blocks,
        offline_bytes: bytes(usage.offline.len()),
        hole_bytes: bytes(memory.pages() - data.len()),
        skipped_bytes: bytes(skipped.len()),
        working_set_bytes: working_set.as_ref().map(|set| used(&set.pages)),
        cold_bytes: working_set.as_ref().map(|set| used(&set.cold)),
        not_skipped: pattern.map(|how| IntrospectError::Poisoned { how }.to_string()),
        find_ms: milliseconds(find),
        scan_ms: milliseconds(scan),
    })
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let began = Instant::now();
    (work(), began.elapsed())
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
