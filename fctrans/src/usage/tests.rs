//! What is marked is found, and what is inconsistent counts as used.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::synthetic::{Guest, HIGH, LOW, MIB, VERSIONS};

const PAGE: u64 = 4096;
const HIGH_FRAME: u64 = HIGH.0 / PAGE;
const LOW_PAGES: u64 = LOW.1 / PAGE;

fn usage(guest: &Guest) -> Usage {
    let kernel = guest.kernel().expect("a kernel");
    kernel.usage(&guest.memory).expect("memory")
}

fn pages(set: &PageSet) -> Vec<u64> {
    set.iter().collect()
}

#[test]
fn free_blocks_and_offline_pages_are_found_in_all_layouts() {
    for version in VERSIONS {
        let mut guest = Guest::new(version, false, 0);
        guest.free(20_480, 10);
        guest.free(40_000, 5);
        // The page with the highest number, beyond the hole.
        guest.free(HIGH_FRAME + 32_767, 0);
        guest.mark(50_001, version.offline.expect("a mark"), 0);
        let found = usage(&guest);
        let mut free: Vec<u64> = (20_480..21_504).chain(40_000..40_032).collect();
        free.push(LOW_PAGES + 32_767);
        assert_eq!(pages(&found.free), free, "{}", version.release);
        assert_eq!(pages(&found.offline), [50_001], "{}", version.release);
        assert_eq!(found.free_blocks, [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]);
        assert_eq!(found.described_pages, (LOW.1 + HIGH.1) / PAGE);
        assert_eq!(found.unused().len(), 1024 + 32 + 1 + 1);
    }
}

#[test]
fn what_is_inconsistent_counts_as_used() {
    let mut guest = Guest::new(VERSIONS[2], false, 0);
    // An order that does not exist, one that is no number of pages, blocks that are not aligned or end beyond RAM.
    guest.free(20_480, 11);
    guest.free(22_528, 63);
    guest.free(24_576, u64::MAX);
    guest.free(26_625, 1);
    guest.free(28_676, 3);
    guest.free(HIGH_FRAME + 32_767, 1);
    // Nearly the mark.
    guest.mark(30_000, VERSIONS[2].buddy + 1, 0);
    let found = usage(&guest);
    assert!(found.unused().is_empty());
    assert_eq!(found.free_blocks, [0; 11]);
}

#[test]
fn sections_that_are_absent_offline_or_lead_nowhere_count_as_used() {
    let mut guest = Guest::new(VERSIONS[2], false, 0);
    guest.free(1024, 10);
    guest.free(HIGH_FRAME + 1024, 10);
    assert_eq!(usage(&guest).unused().len(), 2048);
    // The third section's entry in the table behind the roots.
    let entry = 4 * MIB + PAGE + HIGH_FRAME / 32_768 * 16;
    let mut bytes = [0; 8];
    guest.memory.read(crate::memory::Gpa(entry), &mut bytes).expect("an entry");
    let coded = u64::from_le_bytes(bytes);
    for wrong in [0, coded & !1, coded & !2, coded & !4, coded ^ 0x0000_7000_0000_0000, 0xf] {
        guest.memory.write_u64(entry, wrong);
        let found = usage(&guest);
        assert_eq!(found.unused().len(), 1024, "{wrong:#x}");
    }
    // The root, which is outside RAM.
    guest.memory.write_u64(4 * MIB, u64::MAX);
    let found = usage(&guest);
    assert!(found.unused().is_empty());
    assert_eq!(found.described_pages, 0);
}

#[test]
fn what_was_unused_is_looked_at_again_where_it_lies_alone() {
    let mut guest = Guest::new(VERSIONS[2], false, 0);
    guest.free(20_480, 10);
    guest.free(HIGH_FRAME, 4);
    let before = usage(&guest).unused();
    let kernel = guest.kernel().expect("a kernel");
    // Half of the large block is used now, and another page was freed.
    guest.mark(20_480, -1, 0);
    guest.free(20_992, 9);
    guest.free(50_000, 0);
    *guest.memory.read_bytes.borrow_mut() = 0;
    let still = kernel.still_unused(&guest.memory, &before).expect("memory");
    let expected: Vec<u64> = (20_992..21_504).chain(LOW_PAGES..LOW_PAGES + 16).collect();
    assert_eq!(pages(&still), expected);
    // Two pieces of 64 KiB, and what leads to them and to others.
    let read = *guest.memory.read_bytes.borrow();
    assert!(read < 150 << 10, "{read} bytes");
}

#[derive(Debug, Clone)]
enum Change {
    Free { slot: u64, order: u64 },
    Offline { slot: u64 },
    Rubbish { slot: u64, mark: i64, private: u64 },
}

/// Blocks of 1024 pages, each changed once at most.
const SLOTS: u64 = (LOW.1 + HIGH.1) / PAGE / 1024;

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        (0..SLOTS, 0..11u64).prop_map(|(slot, order)| Change::Free { slot, order }),
        (0..SLOTS).prop_map(|slot| Change::Offline { slot }),
        (0..SLOTS, any::<i64>(), any::<u64>()).prop_map(|(slot, mark, private)| Change::Rubbish {
            slot,
            mark,
            private
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn found_is_what_was_marked(
        changes in prop::collection::vec(change(), 0..40),
        version in 0..VERSIONS.len(),
        first in 0..SLOTS * 1024,
        count in 1..3000u64,
    ) {
        let version = VERSIONS[version];
        let mut guest = Guest::new(version, false, 0x0400_0000);
        let (mut slots, mut expected) = (BTreeSet::new(), BTreeSet::new());
        for change in changes {
            let (Change::Free { slot, .. } | Change::Offline { slot } | Change::Rubbish { slot, .. }) = change;
            if !slots.insert(slot) {
                continue;
            }
            let page = slot * 1024;
            let frame = if page < LOW_PAGES { page } else { page - LOW_PAGES + HIGH_FRAME };
            match change {
                Change::Free { order, .. } => {
                    guest.free(frame, order);
                    expected.extend(page..page + (1 << order));
                }
                Change::Offline { .. } => {
                    guest.mark(frame, version.offline.expect("a mark"), 0);
                    expected.insert(page);
                }
                Change::Rubbish { mark, private, .. } => {
                    let marks = [Some(version.buddy), version.offline];
                    if marks.into_iter().flatten().all(|known| known as u32 != mark as u32) {
                        guest.mark(frame, mark, private);
                    }
                }
            }
        }
        let found = usage(&guest).unused();
        let within = first..first + count;
        let kernel = guest.kernel().expect("a kernel");
        let parts = kernel.unused_in(&guest.memory, within.clone()).expect("memory");
        let parts: Vec<u64> = parts.into_iter().flatten().collect();
        prop_assert_eq!(parts, expected.range(within).copied().collect::<Vec<_>>());
        prop_assert_eq!(pages(&found), expected.into_iter().collect::<Vec<_>>());
    }
}
