//! What a migration is expected to cost: bytes, time, pause.
//!
//! The engine's own prediction is taken where there is one ([`Vm::predicted`]); otherwise the geometric series of pre-copy
//! rounds, with what Godwit was measured to make of pages (docs/BENCHMARKS.md): unused memory does not travel, what is
//! written again travels as changes.

pub use scheduler_api::figures::MigrationCost;

use crate::model::Vm;

/// Wire bytes of a byte of memory in use, packed.
const PACKED: f64 = 0.6;

/// Wire bytes of a byte written again, as changed lines.
const CHANGED: f64 = 0.15;

/// Share of the rate at which memory is written, from which on rounds no longer shrink and the guest goes ahead of its
/// memory.
const DIVERGES: f64 = 0.9;

/// What a migration takes beside its bytes: attaching, device state, hand-over.
const FIXED_S: f64 = 0.5;

/// Pause of an idle guest.
const FIXED_DOWNTIME_MS: f64 = 30.0;

/// What it takes to move a guest over a link with so much left for it, in Mbit/s.
#[must_use]
pub fn predict(vm: &Vm, link_mbit: f64) -> MigrationCost {
    if let Some(predicted) = vm.predicted {
        return predicted;
    }
    let link_mib_per_s = (link_mbit / 8.0 / 1.048_576).max(0.1);
    let first_mib = vm.memory.used_mib * PACKED;
    let ratio = (vm.dirty_mib_per_s * CHANGED / link_mib_per_s).min(DIVERGES);
    let wire_mib = first_mib / (1.0 - ratio);
    MigrationCost {
        wire_mib,
        total_s: FIXED_S + wire_mib / link_mib_per_s,
        downtime_ms: FIXED_DOWNTIME_MS * (1.0 + ratio),
    }
}
