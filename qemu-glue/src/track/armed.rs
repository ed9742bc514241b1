//! Which stretches of a block are write-protected, and scanned.
//!
//! To protect a page that does not exist the kernel makes a page table for it, and every scan walks that:
//! of a large guest that is nearly all holes, mostly page tables would be looked at. So stretches
//! without data are left alone until the file has data there. What came into being in such a stretch is
//! not protected, which a scan reports as written, as it should. With it are reported the pages around it that do not exist,
//! since they are not protected either; they are dropped. The same scan protects all of them, and from then
//! on the stretch is like any other.
//!
//! ```text
//!   no data: neither protected nor scanned ──► data found ──► scanned: what is no hole counts as written
//!                                                                │
//!                                          armed: what is reported was written
//! ```
//!
//! Source: fs/proc/task_mmu.c (`pagemap_scan_pmd_entry`, `pagemap_scan_pte_hole`), Linux 6.7 to 6.18. Kernels
//! differ in whether a stretch without a page table counts as written.

use std::ops::Range;

use migrate_core::pageset::PageSet;

/// Bytes that a page table of the lowest level maps.
const STRETCH_BYTES: u64 = 2 << 20;

/// The armed stretches of a block.
#[derive(Debug)]
pub(super) struct Armed {
    /// The block's addresses.
    addresses: Range<u64>,
    stretches: PageSet,
}

impl Armed {
    /// A block of which nothing is armed.
    pub(super) fn nothing(addresses: Range<u64>) -> Self {
        let stretches = addresses.end.div_ceil(STRETCH_BYTES) - addresses.start / STRETCH_BYTES;
        Self { addresses, stretches: PageSet::new(stretches) }
    }

    /// Counts the stretches of these addresses as armed.
    pub(super) fn add(&mut self, addresses: &Range<u64>) {
        let last = addresses.end.saturating_sub(1).max(addresses.start);
        self.stretches.insert_range(self.number(addresses.start)..self.number(last) + 1);
    }

    fn number(&self, address: u64) -> u64 {
        address / STRETCH_BYTES - self.addresses.start / STRETCH_BYTES
    }

    /// The addresses of stretch `number`, as far as they belong to the block.
    fn stretch(&self, number: u64) -> Range<u64> {
        let start = (self.addresses.start / STRETCH_BYTES + number) * STRETCH_BYTES;
        start.max(self.addresses.start)..(start + STRETCH_BYTES).min(self.addresses.end)
    }

    /// Counts as armed what is armed in `other`, which is of the same block.
    pub(super) fn add_all(&mut self, other: &Self) {
        self.stretches.union_with(&other.stretches);
    }

    /// All armed addresses.
    pub(super) fn ranges(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = vec![];
        for stretch in self.stretches.iter().map(|number| self.stretch(number)) {
            match ranges.last_mut() {
                Some(last) if last.end == stretch.start => last.end = stretch.end,
                _ => ranges.push(stretch),
            }
        }
        ranges
    }

    /// The addresses between them.
    pub(super) fn gaps(&self) -> Vec<Range<u64>> {
        let mut gaps = vec![];
        let mut at = self.addresses.start;
        for armed in self.ranges() {
            gaps.push(at..armed.start);
            at = armed.end;
        }
        gaps.push(at..self.addresses.end);
        gaps.retain(|gap| !gap.is_empty());
        gaps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = STRETCH_BYTES;

    /// A block that begins and ends within a stretch.
    fn block() -> Armed {
        Armed::nothing(10 * S + 4096..14 * S + 8192)
    }

    #[test]
    fn stretches_are_clipped_to_the_block() {
        let mut armed = block();
        assert!(armed.ranges().is_empty());
        armed.add(&(11 * S - 4096..11 * S));
        assert_eq!(armed.ranges(), vec![10 * S + 4096..11 * S; 1]);
        armed.add(&(11 * S..11 * S + 1));
        armed.add(&(14 * S..14 * S + 8192));
        assert_eq!(armed.ranges(), [10 * S + 4096..12 * S, 14 * S..14 * S + 8192]);
        let mut all = block();
        all.add(&(10 * S + 4096..14 * S + 8192));
        assert_eq!(all.ranges(), vec![10 * S + 4096..14 * S + 8192; 1]);
    }

    #[test]
    fn gaps_are_what_is_not_armed() {
        let mut armed = block();
        assert_eq!(armed.gaps(), vec![10 * S + 4096..14 * S + 8192; 1]);
        let mut more = block();
        more.add(&(12 * S..12 * S + 1));
        armed.add_all(&more);
        assert_eq!(armed.gaps(), [10 * S + 4096..12 * S, 13 * S..14 * S + 8192]);
        armed.add(&(10 * S + 4096..11 * S + 1));
        assert_eq!(armed.gaps(), vec![13 * S..14 * S + 8192; 1]);
        armed.add(&(13 * S..14 * S + 1));
        assert!(armed.gaps().is_empty());
    }
}
