//! What a migration is expected to cost: bytes, time, pause.
//!
//! Where a sample of the guest's pages was taken ([`Sampled`]), the engine's own forecast is asked
//! ([`migrate_core::forecast`]), which packs the sample and goes through the rounds with the migration's own decisions.
//! Otherwise the geometric series of pre-copy rounds, with what Godwit was measured to make of pages (docs/BENCHMARKS.md):
//! unused memory does not travel, what is written again travels as changes.

use std::time::Duration;

use migrate_core::convergence::Config;
use migrate_core::forecast::{Load, forecast};
use migrate_core::layout::PAGE_BYTES;
use migrate_core::writes::Written;
pub use scheduler_api::figures::MigrationCost;
use serde::{Deserialize, Serialize};

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

/// What `migrate send` allows unless it is told otherwise, as agents run it.
const ALLOWED: Config =
    Config { max_downtime: Duration::from_millis(150), patience: Duration::from_secs(30) };

const MIB: f64 = 1_048_576.0;

/// What a guest's memory would take to move, from a sample of its pages.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampled {
    /// On the wire, once, MiB.
    pub first_wire_mib: f64,
    /// Different pages that it wrote, MiB.
    pub written_mib: f64,
    /// The time within which it wrote them, seconds.
    pub written_within_s: f64,
    /// On the wire for a byte of a page that was written again, bytes.
    pub again: f64,
}

impl Sampled {
    /// All figures, to be checked.
    #[must_use]
    pub const fn figures(&self) -> [f64; 4] {
        let Self { first_wire_mib, written_mib, written_within_s, again } = *self;
        [first_wire_mib, written_mib, written_within_s, again]
    }

    fn load(&self, used_mib: f64) -> Load {
        let pages = |mib: f64| mib * MIB / PAGE_BYTES as f64;
        Load {
            first_bytes: self.first_wire_mib * MIB,
            pages: pages(used_mib),
            written: Written { pages: pages(self.written_mib), seconds: self.written_within_s },
            bytes_a_written_page: self.again * PAGE_BYTES as f64,
        }
    }
}

/// What it takes to move a guest over a link with so much left for it, in Mbit/s.
#[must_use]
pub fn predict(vm: &Vm, link_mbit: f64) -> MigrationCost {
    let link_mib_per_s = (link_mbit / 8.0 / 1.048_576).max(0.1);
    from_sample(vm, link_mib_per_s).unwrap_or_else(|| from_series(vm, link_mib_per_s))
}

fn from_sample(vm: &Vm, link_mib_per_s: f64) -> Option<MigrationCost> {
    let load = vm.sampled?.load(vm.memory.used_mib);
    let overhead = Duration::from_secs_f64(FIXED_DOWNTIME_MS / 1e3);
    let seen = forecast(&load, link_mib_per_s * MIB, overhead, ALLOWED)?;
    Some(MigrationCost {
        wire_mib: seen.wire_bytes / MIB,
        total_s: FIXED_S + seen.total_s,
        downtime_ms: seen.downtime_s * 1e3,
    })
}

fn from_series(vm: &Vm, link_mib_per_s: f64) -> MigrationCost {
    let first_mib = vm.memory.used_mib * PACKED;
    let ratio = (vm.dirty_mib_per_s * CHANGED / link_mib_per_s).min(DIVERGES);
    let wire_mib = first_mib / (1.0 - ratio);
    MigrationCost {
        wire_mib,
        total_s: FIXED_S + wire_mib / link_mib_per_s,
        downtime_ms: FIXED_DOWNTIME_MS * (1.0 + ratio),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::synthetic;

    #[test]
    fn a_sample_counts_where_there_is_one() {
        let mut vm = synthetic::cluster(1, 1).vms.remove(0);
        vm.memory.used_mib = 600.0;
        let guessed = predict(&vm, 1000.0);
        assert!((guessed.wire_mib - 360.0).abs() < 5.0, "{guessed:?}");
        let sampled =
            Sampled { first_wire_mib: 100.0, written_mib: 20.0, written_within_s: 1.0, again: 0.1 };
        vm.sampled = Some(sampled);
        let seen = predict(&vm, 1000.0);
        assert!((100.0..105.0).contains(&seen.wire_mib), "{seen:?}");
        assert!((1.3..1.5).contains(&seen.total_s), "{seen:?}");
        // A busy writer over a slow link goes ahead of its memory, which is more than it has once.
        vm.sampled = Some(Sampled { written_mib: 500.0, again: 1.0, ..sampled });
        let busy = predict(&vm, 100.0);
        assert!(busy.wire_mib > 500.0 && busy.downtime_ms < 31.0, "{busy:?}");
    }

    #[test]
    fn a_sample_that_cannot_be_is_not_believed() {
        let mut vm = synthetic::cluster(1, 1).vms.remove(0);
        let guessed = predict(&vm, 1000.0);
        vm.sampled = Some(Sampled { first_wire_mib: 1.0, ..Sampled::default() });
        assert_eq!(predict(&vm, 1000.0), guessed, "written within no time");
    }
}
