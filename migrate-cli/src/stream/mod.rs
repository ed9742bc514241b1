//! Guests that their QEMU sends itself, over a socket of ours: `migrate send --path stream`.
//!
//! ```text
//!   QEMU ═ its stream ═► source: taken apart ═ lanes, control ═► destination: put together ═ a stream ═► QEMU
//!    ▲ QMP: begin, stop        │                                        │            QMP: take, do not run ▲
//!    └──── steering ───────────┘                                        └─── ready ─► own ─► run ──────────┘
//! ```
//!
//! The stream is taken apart and put together as between gateways ([`crate::gateway`]), the guest is handed over as by
//! the direct path ([`migrate_core::handover`]): the destination's QEMU loads it and runs it only after the commit.
//!
//! Invariants: QEMU at the source sends what is written again until [`steer`] stops the guest, or until next to nothing
//! is left; it counts as sent only when the QEMU at the destination has loaded all and said so; until the
//! commit the guest can go on at the source.

pub mod destination;
pub mod passing;
pub mod rest;
pub mod source;
pub mod steer;

use migrate_core::layout::{BlockSpec, PAGE_BYTES};
use qemu_glue::vm::VmInventory;

/// Names of blocks whose length QEMU changes to that of the guest that comes (hw/core/loader.c, `rom_add_blob`).
const RESIZED: &str = "/rom@";

/// The blocks of a guest that have the same length at both ends.
pub fn blocks(vm: &VmInventory) -> Vec<BlockSpec> {
    let regions = vm.regions.iter().map(|region| (region.name.clone(), region.length_bytes));
    let streamed = vm.streamed_blocks.iter().cloned();
    let page_bytes = PAGE_BYTES as u64;
    let block = |(name, length_bytes)| BlockSpec { name, length_bytes, page_bytes };
    let mut blocks: Vec<_> = regions
        .chain(streamed)
        .filter(|(name, bytes)| !name.starts_with(RESIZED) && bytes % page_bytes == 0)
        .map(block)
        .collect();
    blocks.sort_by(|a, b| a.name.cmp(&b.name));
    blocks
}
