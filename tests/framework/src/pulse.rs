//! One guest's heartbeat over the QEMUs that it ran in: outages, hand-overs, and proof that it
//! never ran in two at once.

use anyhow::{Context as _, Result, bail};

use crate::heartbeat::{Beat, Record, parse};

/// A beat and the QEMU that it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SidedBeat {
    /// Index into what [`Pulse::of`] was given.
    pub side: usize,
    /// The beat.
    pub beat: Beat,
}

/// Two beats in a row and the time between their arrivals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// The beat before.
    pub from: SidedBeat,
    /// The beat after.
    pub to: SidedBeat,
}

impl Gap {
    /// Between the two arrivals, microseconds.
    #[must_use]
    pub fn gap_us(&self) -> u64 {
        self.to.beat.at_us.saturating_sub(self.from.beat.at_us)
    }

    /// The same in milliseconds.
    #[must_use]
    pub fn outage_ms(&self) -> f64 {
        self.gap_us() as f64 / 1000.0
    }

    /// Sequences between the two that did not arrive.
    #[must_use]
    pub fn missing(&self) -> u64 {
        self.to.beat.sequence.saturating_sub(self.from.beat.sequence).saturating_sub(1)
    }
}

/// Beats of one guest from all its QEMUs, in the order of arrival.
#[derive(Debug, Clone)]
pub struct Pulse {
    beats: Vec<SidedBeat>,
}

impl Pulse {
    /// Merges records; a line that began at one QEMU and ended at another is put together.
    ///
    /// # Errors
    /// No beats at all, or beats of several guests (or starts of one: it has rebooted).
    pub fn of(records: &[&Record]) -> Result<Self> {
        let mut beats = Vec::new();
        for (side, record) in records.iter().enumerate() {
            beats.extend(record.beats.iter().map(|&beat| SidedBeat { side, beat }));
        }
        let nonce = beats.first().context("No heartbeat arrived")?.beat.nonce;
        if let Some(other) = beats.iter().find(|one| one.beat.nonce != nonce) {
            bail!(
                "Heartbeats of two guests, {nonce:08x} and {:08x}, or the guest has rebooted",
                other.beat.nonce
            );
        }
        beats.extend(stitched(records, nonce));
        beats.sort_by_key(|one| (one.beat.at_us, one.beat.sequence));
        Ok(Self { beats })
    }

    /// All beats.
    #[must_use]
    pub fn beats(&self) -> &[SidedBeat] {
        &self.beats
    }

    /// Every gap of which at least a part lies within `from_us..to_us` of the host's clock.
    pub fn gaps(&self, from_us: u64, to_us: u64) -> impl Iterator<Item = Gap> + '_ {
        let pairs = self.beats.windows(2).filter_map(|pair| match pair {
            [from, to] => Some(Gap { from: *from, to: *to }),
            _ => None,
        });
        pairs.filter(move |gap| gap.to.beat.at_us > from_us && gap.from.beat.at_us < to_us)
    }

    /// The longest gap within the window: what a user sees as the outage.
    #[must_use]
    pub fn outage(&self, from_us: u64, to_us: u64) -> Option<Gap> {
        self.gaps(from_us, to_us).max_by_key(Gap::gap_us)
    }

    /// The longest gap of all.
    #[must_use]
    pub fn longest(&self) -> Option<Gap> {
        self.outage(0, u64::MAX)
    }

    /// From the last beat of `source` to the first of `destination`.
    #[must_use]
    pub fn handover(&self, source: usize, destination: usize) -> Option<Gap> {
        let from = self.beats.iter().rfind(|one| one.side == source)?;
        let to = self.beats.iter().find(|one| one.side == destination)?;
        Some(Gap { from: *from, to: *to })
    }

    /// Percentile (0 to 100) of all gaps, microseconds.
    #[must_use]
    pub fn gap_percentile_us(&self, percent: f64) -> u64 {
        let mut gaps: Vec<u64> = self.gaps(0, u64::MAX).map(|gap| gap.gap_us()).collect();
        gaps.sort_unstable();
        let last = gaps.len().saturating_sub(1);
        let at = (last as f64 * percent / 100.0).round() as usize;
        gaps.get(at.min(last)).copied().unwrap_or(0)
    }

    /// How many sequences between the first and the last beat did not arrive.
    #[must_use]
    pub fn missing(&self) -> u64 {
        let mut sequences: Vec<u64> = self.beats.iter().map(|one| one.beat.sequence).collect();
        sequences.sort_unstable();
        sequences.dedup();
        match (sequences.first(), sequences.last()) {
            (Some(first), Some(last)) => last - first + 1 - sequences.len() as u64,
            _ => 0,
        }
    }

    /// Fails if the guest ran in two QEMUs at once, or twice from the same state.
    ///
    /// Two copies of one guest count on from the same sequence, so the second copy repeats a
    /// sequence that another QEMU has sent, or falls behind it. Late reading cannot look like that: it changes
    /// times, not sequences.
    ///
    /// # Errors
    /// It did; the text has both beats.
    pub fn assert_one_runs(&self) -> Result<()> {
        let mut by_sequence = self.beats.clone();
        by_sequence.sort_by_key(|one| (one.beat.sequence, one.side));
        for pair in by_sequence.windows(2) {
            if let [one, other] = pair
                && one.beat.sequence == other.beat.sequence
            {
                bail!("Sequence {} arrived twice: {one:?} and {other:?}", one.beat.sequence);
            }
        }
        // In the order of sequences, a guest that moves once changes sides once. Interleaved sides
        // without a repeat happen only if both ran and each lost the other's sequences.
        let mut order: Vec<usize> = by_sequence.iter().map(|one| one.side).collect();
        order.dedup();
        let mut seen = order.clone();
        seen.sort_unstable();
        seen.dedup();
        if seen.len() != order.len() {
            let changes = by_sequence.windows(2).filter(|pair| pair[0].side != pair[1].side);
            let changes: Vec<&[SidedBeat]> = changes.collect();
            bail!("The guest went back to a QEMU that it had left: sides {order:?}, {changes:?}");
        }
        // Within one side the sequences rise with the time of arrival.
        for side in seen {
            let own: Vec<&SidedBeat> = self.beats.iter().filter(|one| one.side == side).collect();
            if let Some([one, other]) = own
                .windows(2)
                .find(|pair| matches!(pair, [a, b] if a.beat.sequence >= b.beat.sequence))
            {
                bail!("Sequences went back within one QEMU: {one:?}, then {other:?}");
            }
        }
        Ok(())
    }
}

/// Beats whose line began at one QEMU and ended at another.
///
/// The end came after all whole lines of the QEMU where the line began: what a guest is just writing is
/// not the beginning of a line that ended where it was before.
fn stitched(records: &[&Record], nonce: u32) -> Vec<SidedBeat> {
    let mut found = Vec::new();
    for (side, record) in records.iter().enumerate() {
        let Some((head, at_us)) = &record.head else { continue };
        let was_silent = |other: &Record| other.beats.last().is_none_or(|last| last.at_us < *at_us);
        let others = records.iter().enumerate().filter(|(other, _)| *other != side);
        let others = others.filter(|(_, other)| was_silent(other));
        let lines = others.map(|(_, other)| format!("{}{head}", other.tail));
        let mut beats = lines.filter_map(|line| parse(&line, *at_us));
        if let Some(beat) = beats.find(|beat| beat.nonce == nonce) {
            found.push(SidedBeat { side, beat });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(beats: impl IntoIterator<Item = (u64, u64)>) -> Record {
        let mut record = Record::default();
        for (sequence, at_us) in beats {
            record.add(format!("HB {sequence} {at_us} 00c0ffee\n").as_bytes(), at_us);
        }
        record
    }

    fn every_5_ms(sequences: std::ops::Range<u64>, shift_us: u64) -> Record {
        record(sequences.map(|sequence| (sequence, sequence * 5000 + shift_us)))
    }

    #[test]
    fn measures_a_handover() {
        let source = every_5_ms(1..100, 0);
        let destination = every_5_ms(100..200, 70_000);
        let pulse = Pulse::of(&[&source, &destination]).unwrap();
        pulse.assert_one_runs().unwrap();
        let gap = pulse.handover(0, 1).unwrap();
        assert_eq!((gap.gap_us(), gap.missing()), (75_000, 0));
        assert_eq!(pulse.longest(), Some(gap));
        assert_eq!(pulse.outage(0, 400_000).unwrap().gap_us(), 5000);
        assert_eq!(pulse.missing(), 0);
        assert_eq!(pulse.gap_percentile_us(50.0), 5000);
        assert_eq!(pulse.gap_percentile_us(100.0), 75_000);
    }

    #[test]
    fn two_copies_are_found() {
        let source = every_5_ms(1..120, 0);
        let destination = every_5_ms(100..200, 70_000);
        let pulse = Pulse::of(&[&source, &destination]).unwrap();
        assert!(pulse.assert_one_runs().unwrap_err().to_string().contains("100"));
    }

    #[test]
    fn two_copies_that_lose_each_others_beats_are_found() {
        let odd = record((1..50).map(|n| (n * 2 + 1, n * 10_000)));
        let even = record((10..50).map(|n| (n * 2, n * 10_000 + 500)));
        let pulse = Pulse::of(&[&odd, &even]).unwrap();
        assert!(pulse.assert_one_runs().is_err());
    }

    #[test]
    fn a_restored_old_state_is_found() {
        let record = record([(1, 5), (2, 10), (3, 15), (2, 20)]);
        assert!(Pulse::of(&[&record]).unwrap().assert_one_runs().is_err());
    }

    #[test]
    fn a_rollback_is_fine() {
        let source = record((1..50).chain(51..90).map(|n| (n, n * 5000)));
        let pulse = Pulse::of(&[&source, &Record::default()]).unwrap();
        pulse.assert_one_runs().unwrap();
        assert_eq!(pulse.missing(), 1);
        assert!(pulse.handover(0, 1).is_none());
    }

    #[test]
    fn a_torn_line_is_put_together() {
        let mut source = every_5_ms(1..10, 0);
        source.add(b"HB 10 500", 50_000);
        let mut destination = Record::default();
        destination.add(b"00 00c0ffee\nHB 11 55000 00c0ffee\n", 60_000);
        let pulse = Pulse::of(&[&source, &destination]).unwrap();
        assert_eq!(pulse.missing(), 0);
        let torn = pulse.beats().iter().find(|one| one.beat.sequence == 10).unwrap();
        assert_eq!((torn.side, torn.beat.guest_us), (1, 50_000));
        pulse.assert_one_runs().unwrap();
    }

    #[test]
    fn a_torn_line_of_an_earlier_move_is_not_put_together() {
        let mut source = Record::default();
        source.add(b"0 50000 00c0ffee\nHB 11 55000 00c0ffee\n", 60_000);
        let mut destination = Record::default();
        destination.add(b"HB 12 60000 00c0ffee\nHB 13 65000 00c0ffee\nHB 1", 70_000);
        let pulse = Pulse::of(&[&source, &destination]).unwrap();
        assert_eq!(pulse.beats().len(), 3);
        pulse.assert_one_runs().unwrap();
    }

    #[test]
    fn a_reboot_and_silence_are_errors() {
        let mut record = every_5_ms(1..10, 0);
        record.add(b"HB 1 5 00000001\n", 99_000);
        assert!(Pulse::of(&[&record]).is_err());
        assert!(Pulse::of(&[&Record::default()]).is_err());
    }
}
