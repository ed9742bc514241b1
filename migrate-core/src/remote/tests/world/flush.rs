//! A flush, a guest that stands still, and what servers have then.

use super::*;

impl World {
    pub(in crate::remote::tests) fn begin_flush(&mut self) {
        self.remote.begin_flush();
        assert_eq!(self.remote.is_flushing(), !self.merging);
    }

    /// Who flushes looks for work.
    pub(in crate::remote::tests) fn flush(&mut self, pages_max: usize) {
        let pages = self.remote.next_to_flush(pages_max, self.now);
        assert!(pages.len() <= pages_max && (self.remote.is_flushing() || pages.is_empty()));
        self.put(pages);
    }

    /// The guest stands still: its direct I/O ends first.
    pub(in crate::remote::tests) fn stop(&mut self) {
        let dma = std::mem::take(&mut self.dma);
        self.land(dma);
        self.stopped = true;
        self.remote.stopped();
        for (_, page) in std::mem::take(&mut self.later) {
            self.finish_put(page);
        }
    }

    pub(in crate::remote::tests) fn resume(&mut self) {
        self.stopped = false;
        self.remote.resumed();
        assert!(!self.remote.is_flushed());
    }

    pub(in crate::remote::tests) fn set_limit(&mut self, pages: u64) {
        self.limit = pages;
        self.bound = self.bound.max(pages);
        self.remote.set_resident_pages_max(pages).unwrap();
        self.waiting();
    }

    /// A server has another room from now on, and keeps to that.
    pub(in crate::remote::tests) fn set_reserve(&mut self, number: usize, pages: u64) {
        self.remote.set_reserve(number, pages);
        if let Some(server) = self.servers.get_mut(number) {
            server.capacity_pages = pages as usize;
        }
    }

    /// If all is said to lie on servers, who reads them finds what the guest has, and nothing else.
    pub(super) fn check_flushed(&self) {
        if !self.remote.is_flushed() {
            return;
        }
        assert!(self.stopped && self.dma.is_empty());
        assert!(self.jobs.is_empty() && self.moves.is_empty());
        let mut held = PageSet::new(PAGES);
        for (number, server) in self.servers.iter().enumerate().filter(|(_, server)| !server.gone) {
            let mut stored = server.stored.clone();
            stored.retain(|page, _| !self.is_dropping(number, *page));
            let said: Vec<u64> = self.remote.held(number).unwrap().iter().collect();
            let found: Vec<u64> = stored.keys().copied().collect();
            assert_eq!(said, found, "server {number}");
            for (page, word) in stored {
                let truth = self.truth[page as usize];
                assert!(truth.is_none_or(|truth| truth == word), "page {page} at server {number}");
                held.insert(page);
            }
        }
        for page in (0..PAGES).filter(|page| !held.contains(*page)) {
            assert!(matches!(self.truth[page as usize], None | Some(0)), "page {page} is nowhere");
        }
    }

    /// Whether a server has been told to drop a page.
    fn is_dropping(&self, number: usize, page: u64) -> bool {
        let sent = |request: &Request| matches!(request, Request::Drop { page: p } if *p == page);
        let named = |out: &Out| matches!(out, Out::Drop { server, page: p } if (*server, *p) == (number, page));
        self.servers[number].requests.iter().any(sent) || self.out.iter().any(named)
    }

    /// The guest goes on at another main host, which knows what the servers have; what waited there for a
    /// page waits here.
    pub(in crate::remote::tests) fn move_main(&mut self, limit: u64, copies: usize) {
        assert!(self.remote.is_flushed() && self.out.is_empty());
        let stats = self.remote.stats();
        let config = RemoteConfig {
            resident_pages_max: limit,
            copies,
            servers: stats
                .servers
                .iter()
                .map(|server| ServerRoom { reserve_pages: server.reserve_pages })
                .collect(),
            read_ahead_pages_max: 16,
            direct_io_window: self.window,
        };
        let held = (0..self.servers.len()).map(|server| self.remote.held(server).unwrap().clone());
        let held: Vec<PageSet> = held.collect();
        self.remote = Remote::new(PAGES, config, &PageSet::new(PAGES), held).unwrap();
        (self.limit, self.bound) = (limit, limit);
        (self.stopped, self.unused) = (false, None);
        self.file.clear();
        self.faults.clear();
        let blocked = std::mem::take(&mut self.blocked);
        blocked.into_iter().for_each(|access| self.attempt(access));
        self.check();
    }
}
