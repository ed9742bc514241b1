//! Sets of pages as bitmaps: one bit a page, walked word by word.

use std::ops::Range;

/// A set of page numbers below a fixed size. Numbers at or above the size are ignored on insertion,
/// so a set can be filled from sources that are not trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    size: u64,
}

impl PageSet {
    /// An empty set for pages `0..size`.
    pub fn new(size: u64) -> Self {
        let words = usize::try_from(size.div_ceil(64)).unwrap_or(usize::MAX);
        Self { words: vec![0; words], size }
    }

    /// Number of pages that the set can hold.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Inserts a page.
    pub fn insert(&mut self, page: u64) {
        if page < self.size
            && let Some(word) = self.words.get_mut((page / 64) as usize)
        {
            *word |= 1 << (page % 64);
        }
    }

    /// Removes a page.
    pub fn remove(&mut self, page: u64) {
        if let Some(word) = self.words.get_mut((page / 64) as usize) {
            *word &= !(1 << (page % 64));
        }
    }

    /// Whether the page is in the set.
    pub fn contains(&self, page: u64) -> bool {
        self.words.get((page / 64) as usize).is_some_and(|word| word & (1 << (page % 64)) != 0)
    }

    /// Inserts a range of pages.
    pub fn insert_range(&mut self, range: Range<u64>) {
        self.for_words(range, |word, mask| *word |= mask);
    }

    /// Removes a range of pages.
    pub fn remove_range(&mut self, range: Range<u64>) {
        self.for_words(range, |word, mask| *word &= !mask);
    }

    /// Calls `change` with every word that holds pages of the range, and the mask of these pages.
    fn for_words(&mut self, range: Range<u64>, change: impl Fn(&mut u64, u64)) {
        let end = range.end.min(self.size);
        let mut page = range.start;
        while page < end {
            let bit = page % 64;
            let count = (64 - bit).min(end - page);
            let mask = if count == 64 { u64::MAX } else { ((1 << count) - 1) << bit };
            if let Some(word) = self.words.get_mut((page / 64) as usize) {
                change(word, mask);
            }
            page += count;
        }
    }

    /// The set as words: page `n` is bit `n % 64` of word `n / 64`.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Adds pages given as words, the first of which begins with page 64 times `first_word`.
    pub fn insert_words(&mut self, first_word: usize, words: &[u64]) {
        let places = self.words.get_mut(first_word..).unwrap_or_default();
        for (word, add) in places.iter_mut().zip(words) {
            *word |= add;
        }
        let beyond = self.size % 64;
        if let Some(last) = self.words.last_mut().filter(|_| beyond != 0) {
            *last &= (1 << beyond) - 1;
        }
    }

    /// Adds all pages of `other`.
    pub fn union_with(&mut self, other: &Self) {
        for (word, add) in self.words.iter_mut().zip(&other.words) {
            *word |= add;
        }
    }

    /// Removes all pages of `other`.
    pub fn subtract(&mut self, other: &Self) {
        for (word, take) in self.words.iter_mut().zip(&other.words) {
            *word &= !take;
        }
    }

    /// Keeps only the pages that `other` holds too.
    pub fn intersect(&mut self, other: &Self) {
        for (word, keep) in self.words.iter_mut().zip(&other.words) {
            *word &= keep;
        }
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Number of pages in the set.
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
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
                let rest = self.words.get((next / 64) as usize)? >> (next % 64);
                if rest != 0 {
                    let page = next + u64::from(rest.trailing_zeros());
                    next = page + 1;
                    return (page < end).then_some(page);
                }
                next = (next / 64 + 1) * 64;
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
            let kept = self.words.get((last / 64) as usize)? << (63 - last % 64);
            if kept != 0 {
                let page = last - u64::from(kept.leading_zeros());
                return (page >= range.start).then_some(page);
            }
            end = last / 64 * 64;
        }
        None
    }

    /// Bytes of memory that the set occupies.
    pub fn memory_bytes(&self) -> usize {
        self.words.len() * size_of::<u64>()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Op {
        Insert(u64),
        Remove(u64),
        Range(u64, u64),
        RemoveRange(u64, u64),
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let page = 0u64..300;
        prop::collection::vec(
            prop_oneof![
                page.clone().prop_map(Op::Insert),
                page.clone().prop_map(Op::Remove),
                (page.clone(), page.clone()).prop_map(|(a, b)| Op::Range(a, b)),
                (page.clone(), page).prop_map(|(a, b)| Op::RemoveRange(a, b)),
            ],
            0..60,
        )
    }

    proptest! {
        #[test]
        fn words_go_in_as_they_come_out(
            size in 1u64..260, pages in prop::collection::vec(0u64..300, 0..60), at in 0usize..5,
        ) {
            let mut set = PageSet::new(size);
            pages.iter().for_each(|page| set.insert(*page));
            let mut copy = PageSet::new(size);
            for (index, words) in set.words().chunks(2).enumerate() {
                copy.insert_words(2 * index, words);
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
        fn behaves_like_a_set(size in 1u64..260, ops in ops(), from in 0u64..300, to in 0u64..300) {
            let mut set = PageSet::new(size);
            let mut model = BTreeSet::new();
            for op in ops {
                match op {
                    Op::Insert(page) => { set.insert(page); if page < size { model.insert(page); } }
                    Op::Remove(page) => { set.remove(page); model.remove(&page); }
                    Op::Range(a, b) => { set.insert_range(a..b); model.extend((a..b).filter(|p| *p < size)); }
                    Op::RemoveRange(a, b) => { set.remove_range(a..b); model.retain(|p| !(a..b).contains(p)); }
                }
            }
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.len(), model.len() as u64);
            prop_assert_eq!(set.is_empty(), model.is_empty());
            let part: Vec<_> = model.iter().copied().filter(|p| (from..to).contains(p)).collect();
            prop_assert_eq!(set.first_in(from..to), part.first().copied());
            prop_assert_eq!(set.last_in(from..to), part.last().copied());
            prop_assert_eq!(set.iter_range(from..to).collect::<Vec<_>>(), part);
        }
    }
}
