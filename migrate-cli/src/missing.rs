//! Sets of missing pages on the control stream.

use std::time::Duration;

use migrate_core::pageset::PageSet;
use transport::messages::{MISSING_WORDS_MAX, Message, Missing, MissingEnd};

use crate::error::EngineError;

/// Longest time that a set may take to arrive.
const RECEIVE_WITHIN: Duration = Duration::from_secs(20);

/// The messages that describe a set but for the last; stretches without a page are left out.
pub fn parts(set: &PageSet) -> impl Iterator<Item = Message> + '_ {
    let part_pages = MISSING_WORDS_MAX as u64 * u64::from(u64::BITS);
    let mut next = 0;
    std::iter::from_fn(move || {
        let first_page = set.first_in(next..set.size())? / part_pages * part_pages;
        next = first_page + part_pages;
        let words = set.words(first_page..next);
        Some(Message::Missing(Missing { first_page, words }))
    })
}

/// All messages that describe a set.
pub fn messages(set: &PageSet) -> impl Iterator<Item = Message> + '_ {
    let end = Message::MissingEnd(MissingEnd { pages: set.len() });
    parts(set).chain(std::iter::once(end))
}

/// A set that is being described.
#[derive(Debug)]
pub struct Arriving {
    set: PageSet,
    /// Where the next part may begin.
    next_word: usize,
}

impl Arriving {
    /// Nothing yet, of a guest with this many pages.
    pub fn new(pages: u64) -> Self {
        Self { set: PageSet::new(pages), next_word: 0 }
    }

    /// Takes a part and returns it alone.
    ///
    /// # Errors
    /// [`EngineError::Contradiction`] if parts overlap or are out of order.
    pub fn add(&mut self, part: &Missing) -> Result<PageSet, EngineError> {
        let first = usize::try_from(part.first_page / u64::from(u64::BITS)).unwrap_or(usize::MAX);
        if first < self.next_word {
            return Err(EngineError::Contradiction("missing pages out of order".into()));
        }
        self.next_word = first.saturating_add(part.words.len());
        let mut alone = PageSet::new(self.set.size());
        alone.insert_words(first, &part.words);
        self.set.union_with(&alone);
        Ok(alone)
    }

    /// The set is complete.
    ///
    /// # Errors
    /// [`EngineError::Contradiction`] if other pages came than there are.
    pub fn end(self, end: &MissingEnd) -> Result<PageSet, EngineError> {
        let found = self.set.len();
        if found != end.pages {
            let text = format!("{} missing pages, {found} of which exist", end.pages);
            return Err(EngineError::Contradiction(text));
        }
        Ok(self.set)
    }
}

/// Receives a whole set, `wanted` of the peer, with `next` for its next message.
///
/// # Errors
/// [`EngineError::TooSlow`], something else than a set, or what `next` says.
pub async fn receive(
    pages: u64,
    wanted: &'static str,
    mut next: impl AsyncFnMut() -> Result<Message, EngineError>,
) -> Result<PageSet, EngineError> {
    let mut arriving = Arriving::new(pages);
    let received = async {
        loop {
            match next().await? {
                Message::Missing(part) => drop(arriving.add(&part)?),
                Message::MissingEnd(end) => return arriving.end(&end),
                other => {
                    let (got, wanted) = (other.name(), "MissingEnd");
                    return Err(EngineError::OutOfPlace { got, wanted });
                }
            }
        }
    };
    let late = |_| EngineError::TooSlow { wanted, seconds: RECEIVE_WITHIN.as_secs() };
    tokio::time::timeout(RECEIVE_WITHIN, received).await.map_err(late)?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(
        messages: impl Iterator<Item = Message>,
        pages: u64,
    ) -> Result<PageSet, EngineError> {
        let mut arriving = Arriving::new(pages);
        for message in messages {
            match message {
                Message::Missing(part) => drop(arriving.add(&part)?),
                Message::MissingEnd(end) => return arriving.end(&end),
                other => panic!("{}", other.name()),
            }
        }
        panic!("no end");
    }

    #[test]
    fn sets_arrive_as_they_were() {
        let pages = 64 * MISSING_WORDS_MAX as u64 * 3 + 5;
        let mut set = PageSet::new(pages);
        assert_eq!(parts(&set).count(), 0);
        for page in [0, 63, 64 * MISSING_WORDS_MAX as u64 * 2, pages - 1] {
            set.insert(page);
        }
        assert_eq!(parts(&set).count(), 3, "the second stretch is empty");
        assert_eq!(receive(messages(&set), pages).unwrap(), set);
        assert!(receive(messages(&set), pages - 1).is_err(), "a page that does not exist");
        let doubled = parts(&set).chain(messages(&set));
        assert!(receive(doubled, pages).is_err(), "out of order");
    }
}
