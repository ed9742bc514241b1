//! What is known of every page: a byte for its state and why it is kept, and sets for what is done in bulk.
//!
//! Invariants: a page is in `resident` exactly if it is dirty or clean, in `remote` exactly if it is
//! remote, in `lost` exactly if it is lost; the counts are those of the table. Pages that never had
//! content take no memory: the table begins as zeros of the kernel's.

use std::ops::Range;

use crate::pageset::PageSet;
use crate::postcopy::window::Unsent;

/// Where a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// A hole in the RAM file: it reads as zeros.
    Empty,
    /// In the RAM file; no server has its content.
    Dirty,
    /// In the RAM file, write-protected; servers have its content too.
    Clean,
    /// On servers.
    Remote,
    /// On servers, asked for.
    Coming,
    /// In the RAM file, write-protected, being put to servers.
    Leaving,
    /// In the RAM file, write-protected; the guest is being asked whether it still uses it.
    Dropping,
    /// In the RAM file, write-protected, being put to servers; it stays.
    Flushing,
    /// No server has it any more: the guest cannot go on once it needs it.
    Lost,
}

const STATES: [State; 9] = [
    State::Empty,
    State::Dirty,
    State::Clean,
    State::Remote,
    State::Coming,
    State::Leaving,
    State::Dropping,
    State::Flushing,
    State::Lost,
];

impl State {
    /// Whether the page takes room in the RAM file, now or once it arrives.
    fn takes_room(self) -> bool {
        !matches!(self, Self::Empty | Self::Remote | Self::Lost)
    }
}

/// Why a page is kept: the queue that it waits in for its eviction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// Not in the RAM file, or pinned: in no queue that pages leave from.
    None,
    /// Read ahead, not known to have been used.
    Ahead,
    /// Used for the first time for long.
    Recent,
    /// Came back soon after it was evicted.
    Long,
}

const CLASSES: [Class; 4] = [Class::None, Class::Ahead, Class::Recent, Class::Long];

const CLASS_SHIFT: u32 = 4;
const STATE_MASK: u8 = (1 << CLASS_SHIFT) - 1;

/// The table of all pages.
#[derive(Debug)]
pub(super) struct Pages {
    table: Vec<u8>,
    resident: PageSet,
    remote: PageSet,
    lost: PageSet,
    counts: [u64; STATES.len()],
}

impl Pages {
    /// A guest of `pages` pages that are all empty.
    pub(super) fn new(pages: u64) -> Self {
        let count = usize::try_from(pages).unwrap_or(usize::MAX);
        let none = || PageSet::new(pages);
        let mut counts = [0; STATES.len()];
        counts[State::Empty as usize] = pages;
        Self {
            table: bytemuck::allocation::zeroed_vec(count),
            resident: none(),
            remote: none(),
            lost: none(),
            counts,
        }
    }

    /// Number of pages of the guest.
    pub(super) fn len(&self) -> u64 {
        self.table.len() as u64
    }

    /// The state of a page. One outside RAM counts as lost, since nothing can be placed there.
    pub(super) fn state(&self, page: u64) -> State {
        let entry = self.table.get(page as usize);
        let state = entry.and_then(|entry| STATES.get(usize::from(entry & STATE_MASK)));
        state.copied().unwrap_or(State::Lost)
    }

    /// Why a page is kept.
    pub(super) fn class(&self, page: u64) -> Class {
        let entry = self.table.get(page as usize);
        let class = entry.and_then(|entry| CLASSES.get(usize::from(entry >> CLASS_SHIFT)));
        class.copied().unwrap_or(Class::None)
    }

    /// Changes a page.
    pub(super) fn set(&mut self, page: u64, state: State, class: Class) {
        let before = self.state(page);
        let Some(entry) = self.table.get_mut(page as usize) else { return };
        *entry = state as u8 | (class as u8) << CLASS_SHIFT;
        if before == state {
            return;
        }
        self.counts[before as usize] -= 1;
        self.counts[state as usize] += 1;
        let is_resident = |state| matches!(state, State::Dirty | State::Clean);
        match (is_resident(before), is_resident(state)) {
            (false, true) => self.resident.insert(page),
            (true, false) => self.resident.remove(page),
            _ => {}
        }
        for (set, of) in [(&mut self.remote, State::Remote), (&mut self.lost, State::Lost)] {
            if before == of {
                set.remove(page);
            } else if state == of {
                set.insert(page);
            }
        }
    }

    /// Makes remote pages empty.
    pub(super) fn empty_remote(&mut self, pages: &PageSet) {
        self.remote.subtract(pages);
        let mut count = 0;
        for page in pages.iter() {
            if let Some(entry) = self.table.get_mut(page as usize) {
                *entry = State::Empty as u8;
                count += 1;
            }
        }
        self.counts[State::Remote as usize] -= count;
        self.counts[State::Empty as usize] += count;
    }

    /// Dirty and clean pages.
    pub(super) fn resident(&self) -> &PageSet {
        &self.resident
    }

    /// Remote pages.
    pub(super) fn remote(&self) -> &PageSet {
        &self.remote
    }

    /// Lost pages.
    pub(super) fn lost(&self) -> &PageSet {
        &self.lost
    }

    /// Number of pages in a state.
    pub(super) fn count(&self, state: State) -> u64 {
        self.counts[state as usize]
    }

    /// Pages that are in the RAM file or will be once they arrive.
    pub(super) fn taken(&self) -> u64 {
        STATES.iter().filter(|state| state.takes_room()).map(|state| self.count(*state)).sum()
    }

    /// Pages that are in the RAM file.
    pub(super) fn in_file(&self) -> u64 {
        self.taken() - self.count(State::Coming)
    }

    /// Bytes of memory in use, the part of the table included that was never touched.
    pub(super) fn memory_bytes(&self) -> usize {
        let sets = [&self.resident, &self.remote, &self.lost];
        self.table.len() + sets.map(PageSet::memory_bytes).iter().sum::<usize>()
    }
}

/// Of faults on memory that holds nothing.
impl Unsent for Pages {
    fn is_any_in(&self, mut pages: Range<u64>) -> bool {
        pages.any(|page| self.state(page) == State::Empty)
    }
}
