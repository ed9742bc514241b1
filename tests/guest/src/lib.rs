//! What the guest's programs and the host's test framework must agree on: contents of memory pages
//! and of disk blocks that either side can recompute from a few numbers, pacing, and options.
//!
//! Nothing here does I/O. The programs themselves are in the binary `guest-programs`.

pub mod options;
pub mod pacer;
pub mod pattern;
pub mod rng;

/// Bytes of a memory page and of a disk block.
pub const PAGE_BYTES: usize = 4096;
