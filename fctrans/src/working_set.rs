//! Which of the pages in use the guest is likely to need soon, by the flags of its own reclaim.
//!
//! Pages that can be reclaimed carry the flags by which the guest would choose among them: referenced, active, part of a
//! working set that was evicted before. All other pages in use, the kernel's own, count as needed.
//! Flags of compound pages stand in their first page.
//!
//! Source: include/linux/page-flags.h; numbers of flags changed once, between 6.1 and 6.12, which the number of `PG_lru` tells.

use migrate_core::pageset::PageSet;

use crate::error::IntrospectError;
use crate::kernel::{Kernel, PageLayout};
use crate::memory::PhysicalMemory;
use crate::usage::{Described, Piece};

/// An estimate.
#[derive(Debug, Clone)]
pub struct WorkingSet {
    /// Pages that are likely to be needed.
    pub pages: PageSet,
    /// Pages in use that could be reclaimed, and were not used lately.
    pub cold: PageSet,
}

/// Flags that say that a page was used lately, where the kernel's numbers are known.
fn recent(lru_bit: u32) -> Option<u64> {
    let bits = |numbers: [u32; 3]| numbers.iter().fold(0, |all, number| all | 1u64 << number);
    match lru_bit {
        // Referenced, active, workingset.
        4 => Some(bits([1, 5, 6])),
        5 => Some(bits([2, 8, 9])),
        _ => None,
    }
}

/// A page is not the first one of a compound page: the address of that one, plus 1.
const TAIL: u64 = 1;

impl Kernel {
    /// Estimates the working set. Nothing if the kernel's flags are not known. `unused` pages are left out.
    ///
    /// # Errors
    /// [`IntrospectError::Ram`].
    pub fn working_set(
        &self,
        memory: &impl PhysicalMemory,
        unused: &PageSet,
    ) -> Result<Option<WorkingSet>, IntrospectError> {
        let layout = self.layout();
        let Some((lru, recent)) = layout.lru_bit.and_then(|bit| Some((1 << bit, recent(bit)?)))
        else {
            return Ok(None);
        };
        let pages = memory.pages();
        let mut set = WorkingSet { pages: PageSet::new(pages), cold: PageSet::new(pages) };
        let is_cold = |page: &Described<'_>| {
            page.u64(layout.flags_at).is_some_and(|flags| flags & lru != 0 && flags & recent == 0)
        };
        self.describe(memory, |_| true, |piece| set.note(layout, piece, is_cold))?;
        set.pages.subtract(unused);
        set.cold.subtract(unused);
        Ok(Some(set))
    }
}

impl WorkingSet {
    fn note(
        &mut self,
        layout: &PageLayout,
        piece: &Piece<'_>,
        is_cold: impl Fn(&Described<'_>) -> bool,
    ) {
        let mut cold = false;
        for index in 0..piece.frames() {
            let Some(page) = piece.described(layout, index) else { break };
            let is_tail = page.u64(layout.compound_head_at).is_some_and(|head| head & TAIL != 0);
            // The first page of a compound page lies before its others; what began in another piece counts as needed.
            if !is_tail {
                cold = is_cold(&page);
            }
            let number = piece.first_page + index;
            if cold {
                self.cold.insert(number);
            } else {
                self.pages.insert(number);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::{Guest, VERSIONS};

    /// Numbers of flags: reclaimable, and those that say that a page was used lately.
    fn flags(lru_bit: u32) -> (u64, [u64; 3]) {
        let recent = if lru_bit == 4 { [1, 5, 6] } else { [2, 8, 9] };
        (1 << lru_bit, recent.map(|bit| 1 << bit))
    }

    #[test]
    fn pages_that_were_not_used_lately_are_told_from_others() {
        for version in VERSIONS {
            let mut guest = Guest::new(version, false, 0);
            let (lru, recent) = flags(version.lru_bit);
            // Cold: one page, and a compound page of four. In use: each flag, and pages of the kernel's own.
            guest.set_flags(50_000, lru);
            guest.set_flags(50_004, lru | 1 << 16);
            for tail in 50_005..50_008 {
                guest.set_compound_head(tail, 50_004);
            }
            for (frame, flag) in (50_100..).zip(recent) {
                guest.set_flags(frame, lru | flag);
            }
            guest.free(40_960, 3);
            let kernel = guest.kernel().expect("a kernel");
            let unused = kernel.usage(&guest.memory).expect("memory").unused();
            let found = kernel.working_set(&guest.memory, &unused).expect("memory");
            let found = found.expect("known flags");
            let cold: Vec<u64> = found.cold.iter().collect();
            assert_eq!(cold, [50_000, 50_004, 50_005, 50_006, 50_007], "{}", version.release);
            assert_eq!(found.pages.len() + 5 + 8, guest.memory.pages());
            assert!(!found.pages.contains(40_960));
        }
    }

    #[test]
    fn flags_of_unknown_numbers_are_not_guessed() {
        let mut guest = Guest::new(VERSIONS[3], false, 0);
        let text = guest.note().replace("NUMBER(PG_lru)=5", "NUMBER(PG_lru)=7");
        guest.rewrite_note(&text);
        let kernel = guest.kernel().expect("a kernel");
        let none = PageSet::new(guest.memory.pages());
        assert!(kernel.working_set(&guest.memory, &none).expect("memory").is_none());
    }
}
