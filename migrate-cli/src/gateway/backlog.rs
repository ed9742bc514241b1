//! What QEMU has sent since it handed its guest over by post-copy, and has not left for the destination yet.
//!
//! ```text
//!   QEMU ─► push ─┬─ nobody asked for it ─► bulk ──► sender, behind the window
//!                 │                          │ asked for
//!                 └─ asked for ──────────────┴─────► sender that waits for nothing
//! ```
//!
//! QEMU puts a page that it is asked for next into its stream, behind what it has written already, and sends no page
//! twice. So a request is for a page that waits here, which then overtakes; or for one that is to come: until it does,
//! QEMU is read on although the backlog is full.
//!
//! Invariants: of each page one version is taken; what waits is bounded, with and without requests.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use migrate_core::layout::PAGE_BYTES;
use migrate_core::pageset::PageSet;
use migrate_core::postcopy::Budget;

use crate::source::outlet::PumpError;

/// Pages from which on QEMU is not read on, as long as none is wanted.
const PAGES_MAX: usize = 256;

/// Pages that wait at most: beyond the limit above, what QEMU and the kernel may hold of its stream.
const PAGES_MAX_WANTED: usize = 4096;

/// Requests for pages to come that are remembered; a guest has some threads that can fault.
const WANTED_MAX: usize = 4096;

/// Bytes of bulk that may be under way: the least, while the guest faults, and the most.
const WINDOW_BYTES: (u64, u64) = (128 << 10, 8 << 20);

/// A page's content; nothing for zeros.
pub type Content = Option<Box<[u8; PAGE_BYTES]>>;

/// Pages on their way from QEMU to the senders.
#[derive(Debug)]
pub struct Backlog {
    inner: Mutex<Inner>,
    /// For the senders: there is work.
    work: Condvar,
    /// For the reader: there is room, or reason to read on; everything is sent.
    room: Condvar,
    began: Instant,
}

#[derive(Debug)]
struct Inner {
    /// Pages that QEMU has sent.
    come: PageSet,
    held: HashMap<u64, Content>,
    /// Pages in the stream's order; those that are no longer held have overtaken.
    bulk: VecDeque<u64>,
    /// Pages that the guest waits for.
    urgent: VecDeque<u64>,
    /// Pages that the guest waits for and that are still to come.
    wanted: HashSet<u64>,
    /// Pages that a sender has.
    sending: usize,
    urgent_pages: u64,
    budget: Budget,
    is_over: bool,
    failure: Option<PumpError>,
}

impl Default for Backlog {
    fn default() -> Self {
        let (least, most) = WINDOW_BYTES;
        let inner = Inner {
            come: PageSet::new(0),
            held: HashMap::new(),
            bulk: VecDeque::new(),
            urgent: VecDeque::new(),
            wanted: HashSet::new(),
            sending: 0,
            urgent_pages: 0,
            budget: Budget::new(least, most),
            is_over: false,
            failure: None,
        };
        Self {
            inner: Mutex::new(inner),
            work: Condvar::new(),
            room: Condvar::new(),
            began: Instant::now(),
        }
    }
}

impl Backlog {
    /// The guest with so many pages is handed over: pages may come.
    pub fn begin(&self, pages: u64) {
        self.lock().come = PageSet::new(pages);
    }

    /// The destination asks for a page.
    pub fn request(&self, page: u64) {
        let mut inner = self.lock();
        inner.budget.fault(self.began.elapsed());
        if inner.held.contains_key(&page) {
            if !inner.urgent.contains(&page) {
                inner.urgent.push_back(page);
                self.work.notify_all();
            }
        } else if !inner.come.contains(page) && inner.wanted.len() < WANTED_MAX {
            inner.wanted.insert(page);
            self.room.notify_all();
        }
    }

    /// Takes a page from the stream. Blocks while there is no room.
    ///
    /// # Errors
    /// Why the senders have ended.
    pub fn push(&self, page: u64, content: Option<&[u8; PAGE_BYTES]>) -> Result<(), PumpError> {
        let mut inner = self.lock();
        loop {
            inner.check()?;
            let max = match inner.wanted.is_empty() {
                true => PAGES_MAX,
                false => PAGES_MAX_WANTED,
            };
            if inner.held.len() < max {
                break;
            }
            inner = wait(&self.room, inner);
        }
        // QEMU stopped the guest: a second time it would be the same.
        if inner.come.contains(page) {
            return Ok(());
        }
        inner.come.insert(page);
        inner.held.insert(page, content.map(|content| Box::new(*content)));
        match inner.wanted.remove(&page) {
            true => inner.urgent.push_back(page),
            false => inner.bulk.push_back(page),
        }
        self.work.notify_all();
        Ok(())
    }

    /// Up to `pages` pages that the guest waits for, once there are any; nothing at the end. Blocks.
    pub fn urgent(&self, pages: usize) -> Option<Vec<(u64, Content)>> {
        let mut inner = self.lock();
        while inner.urgent.is_empty() {
            if inner.is_over {
                return None;
            }
            inner = wait(&self.work, inner);
        }
        let taken = inner.take(pages, usize::MAX, |inner| inner.urgent.pop_front());
        inner.urgent_pages += taken.len() as u64;
        self.room.notify_all();
        Some(taken)
    }

    /// Waits until there are pages that nobody waits for: how many bytes may be under way then; nothing at the end.
    pub fn window(&self) -> Option<u64> {
        let mut inner = self.lock();
        while inner.bulk.is_empty() {
            if inner.is_over {
                return None;
            }
            inner = wait(&self.work, inner);
        }
        Some(inner.budget.bytes(self.began.elapsed()))
    }

    /// Such pages, `pages` at most and of them `contents` that are not zero; none if all have overtaken.
    pub fn bulk(&self, pages: usize, contents: usize) -> Vec<(u64, Content)> {
        let mut inner = self.lock();
        let taken = inner.take(pages, contents, |inner| inner.bulk.pop_front());
        self.room.notify_all();
        taken
    }

    /// A sender's pages have left.
    pub fn sent(&self, pages: usize) {
        self.lock().sending -= pages;
        self.room.notify_all();
    }

    /// Waits until everything has left.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn flush(&self) -> Result<(), PumpError> {
        let mut inner = self.lock();
        loop {
            inner.check()?;
            if inner.held.is_empty() && inner.sending == 0 {
                return Ok(());
            }
            inner = wait(&self.room, inner);
        }
    }

    /// Pages that overtook others because the guest waited for them.
    pub fn urgent_pages(&self) -> u64 {
        self.lock().urgent_pages
    }

    /// It is over: nobody waits here from now on.
    pub fn end(&self, failure: Option<PumpError>) {
        let mut inner = self.lock();
        inner.is_over = true;
        inner.failure = inner.failure.take().or(failure);
        drop(inner);
        self.work.notify_all();
        self.room.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wait<'a>(condition: &Condvar, inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
    condition.wait(inner).unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    fn check(&mut self) -> Result<(), PumpError> {
        match self.is_over {
            true => Err(self.failure.take().unwrap_or(PumpError::WorkerGone)),
            false => Ok(()),
        }
    }

    /// Takes pages that are held, in the order in which `next` names them.
    fn take(
        &mut self,
        pages: usize,
        mut contents: usize,
        next: impl Fn(&mut Self) -> Option<u64>,
    ) -> Vec<(u64, Content)> {
        let mut taken = Vec::new();
        while taken.len() < pages
            && contents > 0
            && let Some(page) = next(self)
        {
            let Some(content) = self.held.remove(&page) else { continue };
            contents -= usize::from(content.is_some());
            taken.push((page, content));
        }
        self.sending += taken.len();
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    fn numbers(taken: &[(u64, Content)]) -> Vec<u64> {
        taken.iter().map(|(page, _)| *page).collect()
    }

    #[test]
    fn pages_that_are_asked_for_overtake() {
        let backlog = Backlog::default();
        backlog.begin(100);
        backlog.request(7);
        for page in 0..10 {
            backlog.push(page, Some(&[page as u8; PAGE_BYTES])).unwrap();
        }
        backlog.request(4);
        // Under way already.
        backlog.request(4);
        assert_eq!(numbers(&backlog.urgent(16).unwrap()), [7, 4]);
        backlog.request(4);
        // A second time it does not come.
        backlog.push(3, None).unwrap();
        assert_eq!(numbers(&backlog.bulk(3, 9)), [0, 1, 2]);
        assert_eq!(numbers(&backlog.bulk(16, 4)), [3, 5, 6, 8]);
        let last = backlog.bulk(16, 16);
        assert_eq!(last, [(9, Some(Box::new([9; PAGE_BYTES])))]);
        backlog.sent(10);
        backlog.flush().unwrap();
        assert_eq!(backlog.urgent_pages(), 2);
        backlog.end(None);
        assert!(backlog.urgent(1).is_none() && backlog.window().is_none());
        assert!(backlog.push(11, None).is_err());
    }

    #[test]
    fn a_full_backlog_is_read_on_for_a_page_that_is_wanted() {
        let backlog = Arc::new(Backlog::default());
        backlog.begin(1 << 20);
        let (told, come) = channel();
        let reader = std::thread::spawn({
            let backlog = Arc::clone(&backlog);
            move || {
                for page in 0.. {
                    if backlog.push(page, None).is_err() {
                        return;
                    }
                    told.send(page).unwrap();
                }
            }
        });
        let soon = Duration::from_millis(100);
        let until_full = || {
            let mut last = 0;
            while let Ok(page) = come.recv_timeout(soon) {
                last = page;
            }
            last as usize
        };
        assert_eq!(until_full(), PAGES_MAX - 1);
        backlog.request(1000);
        assert_eq!(until_full(), 1000);
        assert_eq!(numbers(&backlog.urgent(16).unwrap()), [1000]);
        // One that never comes does not fill the memory.
        backlog.request(1 << 19);
        assert_eq!(until_full(), PAGES_MAX_WANTED);
        backlog.end(None);
        reader.join().unwrap();
    }

    #[test]
    fn windows_shrink_with_requests() {
        let backlog = Backlog::default();
        backlog.begin(10);
        backlog.push(1, None).unwrap();
        assert_eq!(backlog.window(), Some(WINDOW_BYTES.0));
        std::thread::sleep(Duration::from_millis(45));
        let grown = backlog.window().unwrap();
        assert!(grown >= WINDOW_BYTES.0 * 4);
        backlog.request(5);
        assert!(backlog.window().unwrap() < grown);
    }
}
