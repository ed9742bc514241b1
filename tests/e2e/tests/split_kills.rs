//! Whoever dies at whatever step of a split: the guest runs whole at its source, or split at its main host.

use anyhow::Result;
use e2e::in_turn;
use e2e::stage::{End, Stage, Victim};
use framework::QemuKind;

#[test]
fn an_end_dies_in_a_split() -> Result<()> {
    use Victim::{DestinationEngine as There, DestinationQemu, SourceEngine as Here};
    in_turn(|| {
        Stage::of_splits(QemuKind::V10_0)?.play(&[
            ("source-precopy", Here, End::Source),
            ("source-precopy", There, End::Source),
            ("source-stopped", Here, End::Source),
            ("destination-split", There, End::Source),
            ("destination-loaded", There, End::Source),
            ("destination-loaded", DestinationQemu, End::Source),
            ("source-ready", Here, End::Source),
            ("source-recorded", Here, End::Destination),
            ("source-committed", Here, End::Destination),
            ("destination-recorded", There, End::Destination),
            ("destination-resumed", There, End::Destination),
        ])
    })
}

#[test]
fn a_split_is_cut_off_or_interrupted() -> Result<()> {
    use Victim::{Interrupt, Link};
    in_turn(|| {
        Stage::of_splits(QemuKind::V7_2)?.play(&[
            ("source-precopy", Link, End::Source),
            ("source-state-saved", Link, End::Source),
            ("destination-committed", Link, End::Destination),
            ("source-precopy", Interrupt, End::Source),
            ("source-stopped", Interrupt, End::Source),
            // Too late: the main host has the guest's only right to run.
            ("source-recorded", Interrupt, End::Destination),
        ])
    })
}
