//! What can be remembered of sent pages.

use migrate_core::delta::{self, Page, delta_bytes};
use migrate_core::layout::{PAGE_BYTES, PageIndex};
use migrate_core::page_cache::{PageCache, Sending};
use migrate_core::page_table::{PageVerdict, SourcePages};
use migrate_core::xbzrle::{self, Encoded};

use crate::guest::GUEST_PAGES;

/// Lanes, as many as a migration has by default.
const LANES: usize = 2;

/// How a page travels.
#[derive(Clone, Copy)]
pub(crate) enum Sent {
    /// Not at all.
    Unchanged,
    /// As a delta of so many bytes.
    Delta(usize),
    /// Whole.
    Whole,
}

/// A way to find out what changed in a page.
pub(crate) trait Method {
    fn name(&self) -> &'static str;

    fn begin_round(&mut self) {}

    /// Sends a page; a delta is written to `out`, which has room for a page.
    fn send(&mut self, page: PageIndex, content: &Page, sending: Sending, out: &mut [u8]) -> Sent;
}

/// All methods with the same budget in bytes.
pub(crate) fn with_budget(bytes: u64) -> [Box<dyn Method>; 4] {
    // Hashes of all lines take an eighth of the guest.
    let hashes = (bytes / 2).min(GUEST_PAGES * PAGE_BYTES as u64 / 8);
    [
        Box::new(LineHashes(line_hashes(bytes))),
        Box::new(Pages(PageCache::new(LANES, bytes))),
        Box::new(Both {
            hashes: line_hashes(hashes),
            pages: PageCache::new(LANES, bytes - hashes),
        }),
        Box::new(QemuCache::new(bytes)),
    ]
}

fn line_hashes(bytes: u64) -> SourcePages {
    SourcePages::new(GUEST_PAGES, false, 0x5eed).with_deltas(LANES, bytes)
}

fn judge(table: &SourcePages, page: PageIndex, content: &Page, out: &mut [u8]) -> Sent {
    match table.judge(page, content, |_| false) {
        PageVerdict::Keep | PageVerdict::Unchanged => Sent::Unchanged,
        PageVerdict::Zero(_) => Sent::Delta(0),
        PageVerdict::Raw(_) | PageVerdict::Same(..) => Sent::Whole,
        PageVerdict::Delta(_, mask) => {
            let bytes = delta_bytes(mask);
            delta::encode(content, mask, out.get_mut(..bytes).unwrap_or_default());
            Sent::Delta(bytes)
        }
    }
}

fn encode(old: &Page, new: &Page, out: &mut [u8]) -> Sent {
    match xbzrle::encode(old, new, out) {
        Encoded::Unchanged => Sent::Unchanged,
        Encoded::Delta(bytes) => Sent::Delta(bytes),
        Encoded::Overflow => Sent::Whole,
    }
}

/// A hash for each line: what direct mode does.
struct LineHashes(SourcePages);

impl Method for LineHashes {
    fn name(&self) -> &'static str {
        "hashes of lines"
    }

    fn send(&mut self, page: PageIndex, content: &Page, _: Sending, out: &mut [u8]) -> Sent {
        judge(&self.0, page, content, out)
    }
}

/// Copies of pages, and XBZRLE.
struct Pages(PageCache);

impl Method for Pages {
    fn name(&self) -> &'static str {
        "pages, XBZRLE"
    }

    fn begin_round(&mut self) {
        self.0.begin_round();
    }

    fn send(&mut self, page: PageIndex, content: &Page, sending: Sending, out: &mut [u8]) -> Sent {
        let sent = self.0.replace(page, content, sending, |old| encode(old, content, out));
        sent.unwrap_or(Sent::Whole)
    }
}

/// Half of the memory for hashes, at most what all lines need, and the rest for pages; the page's
/// own base is used if there is one.
struct Both {
    hashes: SourcePages,
    pages: PageCache,
}

impl Method for Both {
    fn name(&self) -> &'static str {
        "both, half each"
    }

    fn begin_round(&mut self) {
        self.pages.begin_round();
    }

    fn send(&mut self, page: PageIndex, content: &Page, sending: Sending, out: &mut [u8]) -> Sent {
        // Both have to know what is sent.
        let by_lines = judge(&self.hashes, page, content, out);
        let by_bytes = self.pages.replace(page, content, sending, |old| encode(old, content, out));
        by_bytes.unwrap_or(by_lines)
    }
}

/// A cache as QEMU has it: a page has one place, in which it replaces another that was not sent for
/// two rounds, and nothing is held in the first round.
struct QemuCache {
    places: Vec<Place>,
    round: u64,
}

#[derive(Clone, Default)]
struct Place {
    held: Option<(PageIndex, Box<Page>)>,
    round: u64,
}

impl QemuCache {
    /// Rounds for which a page keeps its place (`CACHED_PAGE_LIFETIME`).
    const LIFETIME_ROUNDS: u64 = 2;

    fn new(bytes: u64) -> Self {
        let pages = bytes / PAGE_BYTES as u64;
        Self { places: vec![Place::default(); pages as usize], round: 0 }
    }
}

impl Method for QemuCache {
    fn name(&self) -> &'static str {
        "pages as QEMU, XBZRLE"
    }

    fn begin_round(&mut self) {
        self.round += 1;
    }

    fn send(&mut self, page: PageIndex, content: &Page, _: Sending, out: &mut [u8]) -> Sent {
        if self.round < 2 {
            return Sent::Whole;
        }
        let number = page.0 as usize % self.places.len();
        let place = &mut self.places[number];
        match &mut place.held {
            Some((held, old)) if *held == page => {
                place.round = self.round;
                let sent = encode(old, content, out);
                **old = *content;
                sent
            }
            Some(_) if place.round + Self::LIFETIME_ROUNDS > self.round => Sent::Whole,
            _ => {
                *place = Place { held: Some((page, Box::new(*content))), round: self.round };
                Sent::Whole
            }
        }
    }
}
