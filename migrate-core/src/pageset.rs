//! Sets of pages as bitmaps in two levels: one bit a page, in leaves that exist only where there are
//! pages.
//!
//! ```text
//!   leaves:  [ ─ │ ■ │ ─ │ ─ │ ■ │ … ]     a slot for 4096 pages (16 MiB)
//!                  └► 64 words of 64 pages
//! ```
//!
//! What a set costs follows what is in it, not the size of the guest: sets of a few pages are made and
//! joined while the guest is stopped.
//!
//! Invariant: a leaf that exists holds a page.

use std::ops::Range;

const WORD_PAGES: u64 = u64::BITS as u64;
const LEAF_WORDS: usize = 64;
const LEAF_PAGES: u64 = LEAF_WORDS as u64 * WORD_PAGES;

type Leaf = [u64; LEAF_WORDS];

/// A set of page numbers below a fixed size. Numbers at or above the size are ignored on insertion,
/// so a set can be filled from sources that are not trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    leaves: Vec<Option<Box<Leaf>>>,
    size: u64,
}

impl PageSet {
    /// An empty set for pages `0..size`.
    pub fn new(size: u64) -> Self {
        let leaves = usize::try_from(size.div_ceil(LEAF_PAGES)).unwrap_or(usize::MAX);
        Self { leaves: vec![None; leaves], size }
    }

    /// Number of pages that the set can hold.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Inserts a page.
    pub fn insert(&mut self, page: u64) {
        if page < self.size
            && let Some(slot) = self.leaves.get_mut((page / LEAF_PAGES) as usize)
            && let Some(word) = leaf_in(slot).get_mut(word_in_leaf(page))
        {
            *word |= bit(page);
        }
    }

    /// Removes a page.
    pub fn remove(&mut self, page: u64) {
        self.remove_range(page..page.saturating_add(1));
    }

    /// Whether the page is in the set.
    pub fn contains(&self, page: u64) -> bool {
        self.word(page) & bit(page) != 0
    }

    /// The word that holds the page's bit.
    fn word(&self, page: u64) -> u64 {
        let leaf = self.leaves.get((page / LEAF_PAGES) as usize).and_then(Option::as_deref);
        leaf.and_then(|leaf| leaf.get(word_in_leaf(page))).copied().unwrap_or(0)
    }

    /// Inserts a range of pages.
    pub fn insert_range(&mut self, range: Range<u64>) {
        for_leaves(range.start..range.end.min(self.size), |number, part| {
            if let Some(slot) = self.leaves.get_mut(number) {
                for_words(leaf_in(slot), part, |word, mask| *word |= mask);
            }
        });
    }

    /// Removes a range of pages.
    pub fn remove_range(&mut self, range: Range<u64>) {
        for_leaves(range.start..range.end.min(self.size), |number, part| {
            if let Some(slot) = self.leaves.get_mut(number) {
                thin(slot, |leaf| for_words(leaf, part, |word, mask| *word &= !mask));
            }
        });
    }

    /// The pages of `range`, which begins at a multiple of 64, as words: page `n` of the range is bit `n % 64` of word
    /// `n / 64`.
    pub fn words(&self, range: Range<u64>) -> Vec<u64> {
        let end = range.end.min(self.size);
        (range.start..end).step_by(WORD_PAGES as usize).map(|page| self.word(page)).collect()
    }

    /// Adds pages given as words, the first of which begins with page 64 times `first_word`.
    pub fn insert_words(&mut self, first_word: usize, words: &[u64]) {
        for (number, word) in (first_word as u64..).zip(words) {
            let first = number.saturating_mul(WORD_PAGES);
            let mut rest = *word;
            while rest != 0 && first < self.size {
                self.insert(first + u64::from(rest.trailing_zeros()));
                rest &= rest - 1;
            }
        }
    }

    /// Adds all pages of `other`.
    pub fn union_with(&mut self, other: &Self) {
        for (slot, add) in self.leaves.iter_mut().zip(&other.leaves) {
            match (slot, add) {
                (Some(leaf), Some(add)) => join(leaf, add, |word, add| word | add),
                (slot @ None, Some(add)) => *slot = Some(add.clone()),
                (_, None) => {}
            }
        }
    }

    /// Removes all pages of `other`.
    pub fn subtract(&mut self, other: &Self) {
        for (slot, take) in self.leaves.iter_mut().zip(&other.leaves) {
            if let Some(take) = take {
                thin(slot, |leaf| join(leaf, take, |word, take| word & !take));
            }
        }
    }

    /// Keeps only the pages that `other` holds too.
    pub fn intersect(&mut self, other: &Self) {
        for (slot, keep) in self.leaves.iter_mut().zip(&other.leaves) {
            match keep {
                Some(keep) => thin(slot, |leaf| join(leaf, keep, |word, keep| word & keep)),
                None => *slot = None,
            }
        }
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.leaves.fill(None);
    }

    /// Number of pages in the set.
    pub fn len(&self) -> u64 {
        let words = self.leaves.iter().flatten().flat_map(|leaf| leaf.iter());
        words.map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.leaves.iter().all(Option::is_none)
    }

    /// The pages in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.iter_range(0..self.size)
    }

    /// The pages within `range` in ascending order.
    pub fn iter_range(&self, range: Range<u64>) -> impl Iterator<Item = u64> + '_ {
        let end = range.end.min(self.size);
        let mut next = range.start;
        std::iter::from_fn(move || {
            while next < end {
                let Some(leaf) = self.leaves.get((next / LEAF_PAGES) as usize)?.as_deref() else {
                    next = (next / LEAF_PAGES + 1) * LEAF_PAGES;
                    continue;
                };
                let rest = leaf.get(word_in_leaf(next))? >> (next % WORD_PAGES);
                if rest != 0 {
                    let page = next + u64::from(rest.trailing_zeros());
                    next = page + 1;
                    return (page < end).then_some(page);
                }
                next = (next / WORD_PAGES + 1) * WORD_PAGES;
            }
            None
        })
    }

    /// The first page within `range`.
    pub fn first_in(&self, range: Range<u64>) -> Option<u64> {
        self.iter_range(range).next()
    }

    /// The last page within `range`.
    pub fn last_in(&self, range: Range<u64>) -> Option<u64> {
        let mut end = range.end.min(self.size);
        while range.start < end {
            let last = end - 1;
            let Some(leaf) = self.leaves.get((last / LEAF_PAGES) as usize)?.as_deref() else {
                end = last / LEAF_PAGES * LEAF_PAGES;
                continue;
            };
            let kept = leaf.get(word_in_leaf(last))? << (WORD_PAGES - 1 - last % WORD_PAGES);
            if kept != 0 {
                let page = last - u64::from(kept.leading_zeros());
                return (page >= range.start).then_some(page);
            }
            end = last / WORD_PAGES * WORD_PAGES;
        }
        None
    }

    /// Bytes of memory that the set occupies.
    pub fn memory_bytes(&self) -> usize {
        self.leaves.len() * size_of::<Option<Box<Leaf>>>()
            + self.leaves.iter().flatten().count() * size_of::<Leaf>()
    }
}

fn bit(page: u64) -> u64 {
    1 << (page % WORD_PAGES)
}

fn word_in_leaf(page: u64) -> usize {
    (page % LEAF_PAGES / WORD_PAGES) as usize
}

/// The leaf in a slot that is about to hold a page.
fn leaf_in(slot: &mut Option<Box<Leaf>>) -> &mut Leaf {
    slot.get_or_insert_with(|| Box::new([0; LEAF_WORDS]))
}

/// Changes a leaf so that it may lose pages.
fn thin(slot: &mut Option<Box<Leaf>>, change: impl FnOnce(&mut Leaf)) {
    if let Some(leaf) = slot {
        change(leaf);
        if leaf.iter().all(|word| *word == 0) {
            *slot = None;
        }
    }
}

fn join(leaf: &mut Leaf, other: &Leaf, how: impl Fn(u64, u64) -> u64) {
    for (word, other) in leaf.iter_mut().zip(other) {
        *word = how(*word, *other);
    }
}

/// Calls `visit` with every leaf's number of which the range holds pages, and with these pages' numbers
/// in the leaf.
fn for_leaves(range: Range<u64>, mut visit: impl FnMut(usize, Range<u64>)) {
    let mut page = range.start;
    while page < range.end {
        let number = page / LEAF_PAGES;
        let first = number * LEAF_PAGES;
        let end = range.end.min(first + LEAF_PAGES);
        visit(number as usize, page - first..end - first);
        page = end;
    }
}

/// Calls `change` with every word of a leaf that holds pages of the range, and the mask of these pages.
fn for_words(leaf: &mut Leaf, range: Range<u64>, change: impl Fn(&mut u64, u64)) {
    let mut page = range.start;
    while page < range.end {
        let count = (WORD_PAGES - page % WORD_PAGES).min(range.end - page);
        let mask = (u64::MAX >> (WORD_PAGES - count)) << (page % WORD_PAGES);
        if let Some(word) = leaf.get_mut(word_in_leaf(page)) {
            change(word, mask);
        }
        page += count;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Close to where words and leaves end.
    fn page() -> impl Strategy<Value = u64> {
        prop_oneof![0u64..200, LEAF_PAGES - 70..LEAF_PAGES + 70, 2 * LEAF_PAGES - 3..3 * LEAF_PAGES]
    }

    fn size() -> impl Strategy<Value = u64> {
        page().prop_map(|page| page + 1)
    }

    #[derive(Debug, Clone)]
    enum Op {
        Insert(u64),
        Remove(u64),
        Range(u64, u64),
        RemoveRange(u64, u64),
        Union(BTreeSet<u64>),
        Subtract(BTreeSet<u64>),
        Intersect(BTreeSet<u64>),
        Clear,
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let pages = || prop::collection::btree_set(page(), 0..20);
        let op = prop_oneof![
            4 => page().prop_map(Op::Insert),
            4 => page().prop_map(Op::Remove),
            2 => (page(), page()).prop_map(|(a, b)| Op::Range(a, b)),
            2 => (page(), page()).prop_map(|(a, b)| Op::RemoveRange(a, b)),
            2 => pages().prop_map(Op::Union),
            1 => pages().prop_map(Op::Subtract),
            1 => pages().prop_map(Op::Intersect),
            1 => Just(Op::Clear),
        ];
        prop::collection::vec(op, 0..40)
    }

    fn set_of(size: u64, pages: &BTreeSet<u64>) -> PageSet {
        let mut set = PageSet::new(size);
        pages.iter().for_each(|page| set.insert(*page));
        set
    }

    proptest! {
        #[test]
        fn words_go_in_as_they_come_out(
            size in size(), pages in prop::collection::btree_set(page(), 0..60), at in 0usize..70,
        ) {
            let set = set_of(size, &pages);
            let mut copy = PageSet::new(size);
            for first in (0..size).step_by(128) {
                copy.insert_words(first as usize / 64, &set.words(first..first + 128));
            }
            prop_assert_eq!(&copy, &set);
            copy.insert_words(at, &[u64::MAX; 3]);
            let added = (64 * at as u64)..(64 * (at as u64 + 3));
            prop_assert!(copy.iter().all(|page| page < size));
            for page in 0..size {
                let expected = set.contains(page) || added.contains(&page);
                prop_assert_eq!(copy.contains(page), expected);
            }
        }

        #[test]
        fn behaves_like_a_set(size in size(), ops in ops(), from in page(), to in page()) {
            let mut set = PageSet::new(size);
            let mut model = BTreeSet::new();
            for op in ops {
                match op {
                    Op::Insert(page) => { set.insert(page); model.extend(Some(page).filter(|p| *p < size)); }
                    Op::Remove(page) => { set.remove(page); model.remove(&page); }
                    Op::Range(a, b) => { set.insert_range(a..b); model.extend((a..b).filter(|p| *p < size)); }
                    Op::RemoveRange(a, b) => { set.remove_range(a..b); model.retain(|p| !(a..b).contains(p)); }
                    Op::Union(other) => {
                        set.union_with(&set_of(size, &other));
                        model.extend(other.into_iter().filter(|page| *page < size));
                    }
                    Op::Subtract(other) => {
                        set.subtract(&set_of(size, &other));
                        model.retain(|page| !other.contains(page));
                    }
                    Op::Intersect(other) => {
                        set.intersect(&set_of(size, &other));
                        model.retain(|page| other.contains(page));
                    }
                    Op::Clear => { set.clear(); model.clear(); }
                }
            }
            prop_assert_eq!(&set, &set_of(size, &model));
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.len(), model.len() as u64);
            prop_assert_eq!(set.is_empty(), model.is_empty());
            let part: Vec<_> = model.iter().copied().filter(|p| (from..to).contains(p)).collect();
            prop_assert_eq!(set.first_in(from..to), part.first().copied());
            prop_assert_eq!(set.last_in(from..to), part.last().copied());
            prop_assert_eq!(set.iter_range(from..to).collect::<Vec<_>>(), part);
        }
    }

    #[test]
    fn takes_memory_where_pages_are() {
        let mut set = PageSet::new(1 << 24);
        let empty = set.memory_bytes();
        set.insert_range(LEAF_PAGES - 1..LEAF_PAGES + 1);
        assert_eq!(set.memory_bytes() - empty, 2 * size_of::<Leaf>());
        set.remove(LEAF_PAGES);
        set.remove(LEAF_PAGES - 1);
        assert_eq!((set.memory_bytes(), empty), (empty, (1 << 24) / LEAF_PAGES as usize * 8));
    }
}
