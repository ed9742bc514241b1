//! The answers that a client waits for: a server's answers are checked against what was asked.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::collections::VecDeque;

use super::{Extent, PageAnswer, PageRequest};
use crate::error::WireError;

/// Most requests without an answer.
pub const REQUESTS_UNDER_WAY_MAX: usize = 1024;

/// Most pages that may be on their way to a client, 64 MiB: they wait in its memory if it takes none.
pub const PAGES_UNDER_WAY_MAX: u64 = 16_384;

/// What the answer to a request for a list takes at most, in pages: 4096 entries of 24 bytes, and a header.
const LISTED_PAGES: u64 = 25;

/// What answers a request.
#[derive(Debug)]
enum Kind {
    Done,
    Stat,
    /// Pages from this one on.
    List(u64),
    /// These pages, from the end on.
    Pages(Vec<u64>),
}

/// Requests without an answer, oldest first.
#[derive(Debug, Default)]
pub(super) struct Due {
    requests: VecDeque<(u32, Kind)>,
    /// Pages that are still to come.
    pages: u64,
}

impl Due {
    /// How many requests are not answered.
    pub(super) fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether there is room for the answers to `request`.
    pub(super) fn has_room(&self, request: &PageRequest) -> bool {
        let pages = match request {
            PageRequest::Get { extents, .. } => Extent::count(extents),
            PageRequest::List { .. } => LISTED_PAGES,
            _ => 0,
        };
        self.len() < REQUESTS_UNDER_WAY_MAX
            && self.pages.saturating_add(pages) <= PAGES_UNDER_WAY_MAX
    }

    /// Notes a request that was sent, and keeps the rules.
    pub(super) fn add(&mut self, tag: u32, request: &PageRequest) {
        let kind = match request {
            PageRequest::Stat => Kind::Stat,
            PageRequest::List { from_page } => {
                self.pages = self.pages.saturating_add(LISTED_PAGES);
                Kind::List(*from_page)
            }
            PageRequest::Get { extents, .. } => {
                self.pages = self.pages.saturating_add(Extent::count(extents));
                let mut pages: Vec<u64> = extents.iter().flat_map(Extent::iter).collect();
                pages.reverse();
                Kind::Pages(pages)
            }
            _ => Kind::Done,
        };
        self.requests.push_back((tag, kind));
    }

    /// Checks an answer, and notes it.
    pub(super) fn check(&mut self, answer: &PageAnswer) -> Result<(), WireError> {
        let found = u64::from(answer.tag());
        let rule = |holds, field, rule| match holds {
            true => Ok(()),
            false => Err(WireError::Field { what: "Answer", field, value: found, rule }),
        };
        let Some((tag, kind)) = self.requests.front_mut() else {
            return rule(false, "tag", "nothing was asked for");
        };
        if answer.tag() != *tag {
            let expected = u64::from(*tag);
            return Err(WireError::Sequence { what: "Answer", expected, found });
        }
        match (answer, kind) {
            (PageAnswer::Done { .. }, Kind::Done) | (PageAnswer::Stat { .. }, Kind::Stat) => {}
            (PageAnswer::Failed { .. }, Kind::Pages(rest)) => {
                self.pages = self.pages.saturating_sub(rest.len() as u64);
            }
            (PageAnswer::Failed { .. }, Kind::List(_)) => {
                self.pages = self.pages.saturating_sub(LISTED_PAGES);
            }
            (PageAnswer::Listed { entries, .. }, Kind::List(from_page)) => {
                let first = entries.first().map_or(*from_page, |(extent, _)| extent.first_page);
                rule(first >= *from_page, "entries", "those from the page asked for on are due")?;
                self.pages = self.pages.saturating_sub(LISTED_PAGES);
            }
            (PageAnswer::Failed { .. }, Kind::Done | Kind::Stat) => {}
            (PageAnswer::Pages { extents, last, .. }, Kind::Pages(rest)) => {
                for page in extents.iter().flat_map(Extent::iter) {
                    rule(rest.pop() == Some(page), "pages", "those that were asked for are due")?;
                }
                self.pages = self.pages.saturating_sub(Extent::count(extents));
                rule(*last == rest.is_empty(), "flags", "the last piece is marked, and no other")?;
            }
            _ => return rule(false, "kind", "another kind of answer is due"),
        }
        if answer.is_last() {
            self.requests.pop_front();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(extents: &[(u64, u32)]) -> PageRequest {
        let extents = extents.iter().map(|(first, pages)| Extent::new(*first, *pages)).collect();
        PageRequest::Get { extents, take: false, packed: false }
    }

    fn pages(tag: u32, first: u64, count: u32, last: bool) -> PageAnswer {
        let extents = vec![Extent::new(first, count)];
        let contents = vec![0; (count as usize).saturating_mul(4096)].into();
        PageAnswer::Pages { tag, extents, contents, packed: false, last }
    }

    fn listed(tag: u32, first: u64) -> PageAnswer {
        PageAnswer::Listed { tag, entries: vec![(Extent::new(first, 3), 1)], next_page: None }
    }

    fn due() -> Due {
        let mut due = Due::default();
        due.add(1, &get(&[(7, 1), (3, 4)]));
        due.add(2, &PageRequest::Stat);
        due.add(3, &PageRequest::Keep);
        due.add(4, &PageRequest::List { from_page: 6 });
        due
    }

    #[test]
    fn answers_come_in_order_and_as_asked() {
        let mut due = due();
        due.check(&pages(1, 7, 1, false)).unwrap();
        due.check(&pages(1, 3, 2, false)).unwrap();
        assert_eq!((due.len(), due.pages), (4, 2 + LISTED_PAGES));
        due.check(&pages(1, 5, 2, true)).unwrap();
        let stat = Default::default();
        due.check(&PageAnswer::Stat { tag: 2, stat }).unwrap();
        let error = super::super::StoreError::NotOpen;
        due.check(&PageAnswer::Failed { tag: 3, error }).unwrap();
        due.check(&listed(4, 6)).unwrap();
        assert_eq!((due.len(), due.pages), (0, 0));
        assert!(due.check(&PageAnswer::Done { tag: 5 }).is_err(), "nothing is due");
    }

    #[test]
    fn any_other_answer_is_refused() {
        let done = |tag| PageAnswer::Done { tag };
        for bad in [
            done(1),
            done(2),
            pages(1, 8, 1, false),
            pages(1, 7, 1, true),
            pages(1, 7, 2, false),
            PageAnswer::Stat { tag: 1, stat: Default::default() },
            listed(1, 7),
        ] {
            assert!(due().check(&bad).is_err(), "{bad:?}");
        }
        let mut due = due();
        due.check(&pages(1, 7, 1, false)).unwrap();
        assert!(due.check(&pages(1, 3, 4, false)).is_err(), "the last piece says so");
        let mut due = Due::default();
        due.add(1, &PageRequest::List { from_page: 6 });
        assert!(due.check(&listed(1, 5)).is_err(), "it begins before what was asked for");
    }

    #[test]
    fn what_is_under_way_is_bounded() {
        let mut due = Due::default();
        let request = get(&[(0, 256)]);
        let mut tag = 0;
        while due.has_room(&request) {
            tag += 1;
            due.add(tag, &request);
        }
        assert_eq!(u64::from(tag) * 256, PAGES_UNDER_WAY_MAX);
        assert!(due.has_room(&PageRequest::Keep));
        let error = super::super::StoreError::NotOpen;
        due.check(&PageAnswer::Failed { tag: 1, error }).unwrap();
        assert!(due.has_room(&request), "a failure makes room");
        let mut due = Due::default();
        (0..REQUESTS_UNDER_WAY_MAX).for_each(|tag| due.add(tag as u32, &PageRequest::Stat));
        assert!(!due.has_room(&PageRequest::Stat));
        let mut due = Due::default();
        let list = PageRequest::List { from_page: 0 };
        let mut lists = 0;
        while due.has_room(&list) {
            lists += 1;
            due.add(lists, &list);
        }
        assert_eq!(u64::from(lists), PAGES_UNDER_WAY_MAX / LISTED_PAGES);
        let error = super::super::StoreError::NotOpen;
        due.check(&PageAnswer::Failed { tag: 1, error }).unwrap();
        assert!(due.has_room(&list), "a failure makes room");
    }
}
