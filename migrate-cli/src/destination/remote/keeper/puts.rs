//! Puts pages to servers, to several at the same time, and finishes them as the answers come.
//!
//! ```text
//!   protected pages ─► copied ─► queued a server ─► sent, so many at a time ─► answered ─► punched, or kept
//!          ▲                          ▲                                            │
//!          └─ further victims         └──────────────── another server is to take it
//! ```
//!
//! Invariant: a page is put once at a time: it is not queued again before all servers have answered for it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use migrate_core::remote::{PutDone, PutFailed, Remote};
use transport::pages::{Extent, PageRequest};

use super::{Failed, Keeper, LOCKED_PAGES, accepted, put_of};
use crate::error::EngineError;

/// Pages of one request: what comes of them is known soon, and servers take turns.
const REQUEST_PAGES: usize = 64;

/// Pages that may be sent and not answered: what links and servers carry while others are copied or finished.
const UNDER_WAY_PAGES: usize = 256;

/// Pages that are being put.
#[derive(Debug, Default)]
struct Puts {
    /// To be sent, the next one first.
    queued: VecDeque<Put>,
    /// Sent, by server, the oldest first.
    sent: BTreeMap<usize, VecDeque<Put>>,
    sent_pages: usize,
    requests: u64,
    /// Something was not taken: what else is to leave waits until that was looked after.
    has_failed: bool,
    /// What is put, or was.
    copies: BTreeMap<u64, Vec<u8>>,
}

/// Pages for one server.
#[derive(Debug)]
struct Put {
    server: usize,
    pages: Vec<u64>,
    /// The same at all servers: by it the next pager knows which copies are the last ones.
    version: u64,
    /// Its place among all that were sent.
    number: u64,
}

impl Puts {
    fn queue(&mut self, by_server: BTreeMap<usize, Vec<u64>>, version: u64) {
        for (server, pages) in by_server {
            for pages in pages.chunks(REQUEST_PAGES) {
                self.queued.push_back(Put { server, pages: pages.to_vec(), version, number: 0 });
            }
        }
    }

    fn request(&self, put: &Put) -> PageRequest {
        let copies = put.pages.iter().filter_map(|page| self.copies.get(page));
        put_of(&put.pages, copies.flatten().copied().collect(), put.version)
    }

    fn sent(&mut self, put: Put) {
        self.sent_pages += put.pages.len();
        self.requests += 1;
        let put = Put { number: self.requests, ..put };
        self.sent.entry(put.server).or_default().push_back(put);
    }

    /// The server that has been asked longest.
    fn oldest(&self) -> Option<usize> {
        let fronts = self.sent.values().filter_map(VecDeque::front);
        fronts.min_by_key(|put| put.number).map(|put| put.server)
    }

    /// The oldest put to a server is over.
    fn answered(&mut self, server: usize) -> Option<Put> {
        let put = self.sent.get_mut(&server)?.pop_front()?;
        self.sent_pages -= put.pages.len();
        Some(put)
    }
}

impl Keeper {
    /// Puts protected pages to their servers and punches those that were not written meanwhile; goes on with
    /// further victims until there are none, or so many `pages_max`. Says whether any server took any.
    pub(super) fn put(&mut self, pages: Vec<u64>, pages_max: usize) -> Result<bool, EngineError> {
        let mut puts = Puts::default();
        let (mut any, mut count) = (false, pages.len());
        let mut has_more = !pages.is_empty();
        self.begin_puts(&mut puts, pages)?;
        loop {
            if self.shared.is_over.load(Ordering::Acquire) {
                // Nothing becomes of them any more; the connections have to be free of answers.
                puts.queued.clear();
                has_more = false;
            }
            if puts.sent_pages >= UNDER_WAY_PAGES {
                any |= self.end_puts(&mut puts)?;
                continue;
            }
            if puts.queued.is_empty() && has_more && count < pages_max && !puts.has_failed {
                let victims = self.take_victims()?;
                has_more = !victims.dirty.is_empty();
                count += victims.dirty.len();
                self.begin_puts(&mut puts, victims.dirty)?;
            }
            if let Some(put) = puts.queued.pop_front() {
                self.send_put(&mut puts, put)?;
            } else if puts.sent_pages > 0 {
                any |= self.end_puts(&mut puts)?;
            } else {
                break;
            }
        }
        Ok(any)
    }

    /// Copies pages and queues them for their servers.
    fn begin_puts(&mut self, puts: &mut Puts, pages: Vec<u64>) -> Result<(), EngineError> {
        let shared = Arc::clone(&self.shared);
        let mut by_server: BTreeMap<usize, Vec<u64>> = BTreeMap::new();
        for page in &pages {
            puts.copies.insert(*page, shared.copy(*page)?);
        }
        let remote = shared.remote.lock();
        for page in pages {
            for server in remote.put_to(page) {
                by_server.entry(server).or_default().push(page);
            }
        }
        puts.queue(by_server, self.next_version());
        Ok(())
    }

    fn send_put(&mut self, puts: &mut Puts, put: Put) -> Result<(), EngineError> {
        let request = puts.request(&put);
        match self.with(put.server, |client| client.send(&request)) {
            Ok(_tag) => {
                puts.sent(put);
                Ok(())
            }
            Err(why) => self.put_over(puts, &put, Err(&why)),
        }
    }

    /// Takes in what the server has answered that was asked longest. Says whether it took any.
    fn end_puts(&mut self, puts: &mut Puts) -> Result<bool, EngineError> {
        let Some(server) = puts.oldest() else { return Ok(false) };
        let mut answers = vec![];
        if let Err(why) = self.with(server, |client| client.receive_in_time(&mut answers)) {
            // What it has taken of them is not known: it drops all before anything else is put there.
            while let Some(put) = puts.answered(server) {
                if self.shared.is_settled.load(Ordering::Acquire) {
                    let extents = Extent::join(put.pages.iter().copied());
                    self.undropped.entry(server).or_default().extend(extents);
                }
                self.put_over(puts, &put, Err(&why))?;
            }
            return Ok(false);
        }
        let mut any = false;
        for answer in answers {
            let Some(put) = puts.answered(server) else { break };
            let taken = accepted(answer);
            any |= taken.is_ok();
            self.put_over(puts, &put, taken.as_ref().map(|_| ()))?;
        }
        Ok(any)
    }

    /// A server has taken pages or not.
    fn put_over(
        &mut self,
        puts: &mut Puts,
        put: &Put,
        taken: Result<(), &Failed>,
    ) -> Result<(), EngineError> {
        let shared = Arc::clone(&self.shared);
        // The next pager may be at work.
        if shared.is_over.load(Ordering::Acquire) {
            return Ok(());
        }
        puts.has_failed |= taken.is_err();
        let mut again: BTreeMap<usize, Vec<u64>> = BTreeMap::new();
        for pages in put.pages.chunks(LOCKED_PAGES) {
            let mut over = vec![];
            let mut remote = shared.remote.lock();
            for page in pages {
                let Some(copy) = puts.copies.get(page) else { continue };
                let is_unchanged = || shared.is_unchanged(*page, copy);
                let done = match taken {
                    Ok(()) => remote.put_done(*page, put.server, shared.now(), is_unchanged),
                    Err(why) => match remote.put_failed(*page, put.server, why.into()) {
                        PutFailed::Another(another) => {
                            again.entry(another).or_default().push(*page);
                            PutDone::More
                        }
                        PutFailed::More => PutDone::More,
                        PutFailed::Enough => remote.finish_put(*page, shared.now(), is_unchanged),
                        PutFailed::Back => PutDone::Changed,
                        PutFailed::Cancelled => PutDone::Cancelled,
                    },
                };
                over.push((*page, done, copy));
            }
            self.finish(&mut remote, &over)?;
        }
        puts.queue(again, put.version);
        self.hand_over_fetches();
        Ok(())
    }

    /// Carries out what becomes of pages whose puts were answered.
    pub(super) fn finish(
        &mut self,
        remote: &mut Remote,
        over: &[(u64, PutDone, &Vec<u8>)],
    ) -> Result<(), EngineError> {
        let (mut gone, mut changed) = (vec![], vec![]);
        for (page, done, copy) in over {
            match done {
                PutDone::Punch => gone.push(*page),
                PutDone::Changed => changed.push(*page),
                PutDone::NotYet(until) => {
                    self.later.insert(*page, (*until, (*copy).clone()));
                }
                PutDone::Keep | PutDone::More | PutDone::Cancelled => {}
            }
        }
        self.shared.protect(&changed, false)?;
        if !gone.is_empty() {
            self.shared.punch(&gone)?;
            self.shared.serve_waiting(remote, &mut self.fetches)?;
        }
        Ok(())
    }

    /// A version that no page has yet.
    pub(super) fn next_version(&self) -> u64 {
        self.shared.version.fetch_add(1, Ordering::AcqRel)
    }
}
