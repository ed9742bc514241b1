//! How many neighbours to send with a faulting page, and in which direction.
//!
//! Faults that continue one another are a stream. Of each stream the window is kept that its last
//! fault was answered with: a fault on the first unsent page right behind the window, or right
//! before it, continues the stream, and the next window is twice as wide. A fault that continues
//! none begins one; such windows become narrower with each of them and wider with each
//! continuation, so that scattered faults bring nothing but themselves. Pages that the background
//! push sent behind a window do not break its stream.
//!
//! ```text
//!   fault 1        fault 2                    fault 3
//!   ▼              ▼                          ▼
//!   [page, 1 more] [page, 3 more]  (pushed)   [page, 7 more]
//! ```
//!
//! Who pages over a network (`remote`) also asks for the window behind the last one before the guest
//! runs out of it ([`Windows::reached`]). That the guest is beyond the middle is seen where it waits
//! for a page that is under way. Where nothing makes it wait it is not seen; there the arrival of the
//! middle stands for it, but only once after each fault, so that no stream that the guest has left
//! goes on by itself.

use std::ops::Range;

use super::HostPage;
use crate::pageset::PageSet;

/// Streams that are told apart; the one that was idle longest makes room.
const STREAMS_MAX: usize = 16;

/// Longest distance in pages from a window to the fault that continues it: 4 MiB of pages that were
/// sent or never missing.
pub(crate) const REACH_PAGES: u64 = 1024;

/// Pages of the first window.
const FRESH_PAGES: u64 = 4;

/// A stream begins with at most this part of the widest window.
const FRESH_SHARE: u64 = 4;

/// Pages that a fault may be on.
pub(crate) trait Unsent {
    /// Whether any of these is one; asked about at most [`REACH_PAGES`].
    fn is_any_in(&self, pages: Range<u64>) -> bool;
}

impl Unsent for PageSet {
    fn is_any_in(&self, pages: Range<u64>) -> bool {
        self.first_in(pages).is_some()
    }
}

/// Where a stream leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Forward,
    Backward,
}

/// What to answer a fault with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Window {
    /// On which side of the faulting page its neighbours lie.
    pub(crate) direction: Direction,
    /// Pages, the faulting one included.
    pub(crate) pages: u64,
}

#[derive(Debug)]
struct Stream {
    block: Range<u64>,
    /// From the first to the last page of its last window.
    span: Range<u64>,
    window: Window,
    /// Pages of the window besides those that were asked for, until they are known to have been used.
    neighbours: u64,
    /// What was asked for last.
    last: Range<u64>,
    /// A fault continued it.
    went_on: bool,
    /// A window was asked for since the guest was last seen here.
    ahead: bool,
}

impl Stream {
    /// Whether `fault` is right behind or before the window, and how far the two are apart.
    fn continued(&self, fault: &HostPage, unsent: &impl Unsent) -> Option<(Direction, u64)> {
        let (direction, between) = if fault.pages.start >= self.span.end {
            (Direction::Forward, self.span.end..fault.pages.start)
        } else {
            (Direction::Backward, fault.pages.end..self.span.start)
        };
        let distance = between.end.checked_sub(between.start)?;
        let near = distance <= REACH_PAGES && self.block == fault.block;
        (near && !unsent.is_any_in(between)).then_some((direction, distance))
    }

    /// Whether `page` lies in the farther half of what was asked for last.
    fn is_beyond_middle(&self, page: u64) -> bool {
        let middle = self.last.start.midpoint(self.last.end);
        self.last.contains(&page)
            && match self.window.direction {
                Direction::Forward => page >= middle,
                Direction::Backward => page <= middle,
            }
    }
}

/// What to ask for before the guest faults on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ahead {
    /// All that the stream asked for lately: its next window lies behind it.
    pub(crate) span: Range<u64>,
    /// Where to, and how many pages.
    pub(crate) window: Window,
}

/// The streams of faults.
#[derive(Debug)]
pub(crate) struct Windows {
    /// The most recent one is the last.
    streams: Vec<Stream>,
    pages_max: u64,
    /// Width of the window that a stream begins with.
    fresh_pages: u64,
    used_pages: u64,
}

impl Windows {
    pub(crate) fn new(pages_max: u64) -> Self {
        let pages_max = pages_max.max(1);
        let fresh_pages = FRESH_PAGES.min(pages_max);
        Self { streams: Vec::new(), pages_max, fresh_pages, used_pages: 0 }
    }

    /// Takes out the stream that `fault` continues, and says where to.
    fn take(&mut self, fault: &HostPage, unsent: &impl Unsent) -> Option<(Stream, Direction)> {
        let found = self.streams.iter().enumerate().rev().filter_map(|(index, stream)| {
            let (direction, distance) = stream.continued(fault, unsent)?;
            Some((distance, index, direction))
        });
        let (_, index, direction) = found.min_by_key(|(distance, ..)| *distance)?;
        let mut stream = self.streams.remove(index);
        if direction == stream.window.direction {
            self.used_pages += std::mem::take(&mut stream.neighbours);
        }
        Some((stream, direction))
    }

    fn put(&mut self, stream: Stream) {
        if self.streams.len() >= STREAMS_MAX {
            self.streams.remove(0);
        }
        self.streams.push(stream);
    }

    /// The window for a fault on a page that was not sent.
    pub(crate) fn fault(&mut self, fault: &HostPage, unsent: &impl Unsent) -> Window {
        let stream = match self.take(fault, unsent) {
            Some((mut stream, direction)) => {
                let turned = direction != stream.window.direction;
                let pages =
                    if turned { FRESH_PAGES / 2 } else { stream.window.pages.saturating_mul(2) };
                stream.window = Window { direction, pages: pages.min(self.pages_max) };
                stream.span = fault.pages.clone();
                stream.last = fault.pages.clone();
                (stream.went_on, stream.ahead) = (true, false);
                let fresh_max = (self.pages_max / FRESH_SHARE).max(1);
                self.fresh_pages = (self.fresh_pages * 2).min(fresh_max);
                stream
            }
            None => {
                let window = Window { direction: Direction::Forward, pages: self.fresh_pages };
                self.fresh_pages = (self.fresh_pages / 2).max(1);
                let (block, span) = (fault.block.clone(), fault.pages.clone());
                let last = span.clone();
                Stream { block, span, window, neighbours: 0, last, went_on: false, ahead: false }
            }
        };
        let window = stream.window;
        self.put(stream);
        window
    }

    /// The last fault was answered with `run` besides the faulting page, or `run` was asked for ahead
    /// of one.
    pub(crate) fn answered(&mut self, run: &Range<u64>) {
        if let Some(stream) = self.streams.last_mut() {
            let join = |to: &Range<u64>| to.start.min(run.start)..to.end.max(run.end);
            stream.span = join(&stream.span);
            stream.last = join(&stream.last);
            stream.neighbours += run.end - run.start;
        }
    }

    /// `page` arrived or, with `by_guest`, the guest waits for it: the next window of its stream, if
    /// it is due. What is asked for of it is to be told by [`Self::answered`].
    pub(crate) fn reached(&mut self, page: u64, by_guest: bool) -> Option<Ahead> {
        let due = |stream: &Stream| {
            stream.went_on && (by_guest || !stream.ahead) && stream.is_beyond_middle(page)
        };
        let index = self.streams.iter().position(due)?;
        let mut stream = self.streams.remove(index);
        stream.window.pages = stream.window.pages.saturating_mul(2).min(self.pages_max);
        stream.ahead = !by_guest;
        stream.last = match stream.window.direction {
            Direction::Forward => stream.span.end..stream.span.end,
            Direction::Backward => stream.span.start..stream.span.start,
        };
        let ahead = Ahead { span: stream.span.clone(), window: stream.window };
        self.put(stream);
        Some(ahead)
    }

    /// A fault on a page that is under way already: its stream moves on, but no window grows.
    pub(crate) fn late(&mut self, fault: &HostPage, unsent: &impl Unsent) {
        let inside = |stream: &Stream| stream.span.contains(&fault.pages.start);
        if self.streams.iter().any(inside) {
            return;
        }
        if let Some((mut stream, direction)) = self.take(fault, unsent) {
            stream.window.direction = direction;
            stream.span = fault.pages.clone();
            stream.last = fault.pages.clone();
            self.put(stream);
        }
    }

    /// Nothing that was sent before is known to have arrived: windows begin anew.
    pub(crate) fn forget(&mut self) {
        self.streams.clear();
    }

    /// Neighbours whose window was continued.
    pub(crate) fn used_pages(&self) -> u64 {
        self.used_pages
    }
}
