//! The evictor, and all that is brought back in the end.

use super::*;

impl World {
    pub(super) fn put_answered(&mut self, server: usize, answer: Option<PutAnswer>) {
        let Some(PutAnswer::Done(page) | PutAnswer::Full(page)) = answer else { return };
        let full = matches!(answer, Some(PutAnswer::Full(_)));
        let job = self.jobs.get_mut(&page).expect("answered without having been put");
        assert!(job.unanswered.remove(&server));
        if job.from.is_some() {
            self.jobs.remove(&page);
            return match full {
                true => self.remote.move_failed(page, MoveFailure::NotTaken(PutFailure::Full)),
                false => self.remote.moved(page),
            };
        }
        if full {
            return self.put_failed(page, server, PutFailure::Full);
        }
        let unchanged = self.is_unchanged(page);
        let done = self.remote.put_done(page, server, self.now, || unchanged);
        self.put_ended(page, done);
    }

    pub(super) fn put_failed(&mut self, page: u64, server: usize, failure: PutFailure) {
        match self.remote.put_failed(page, server, failure) {
            PutFailed::Another(another) => {
                let job = self.jobs.get_mut(&page).unwrap();
                assert!(!self.servers[another].gone && job.unanswered.insert(another));
                self.out.push_back(Out::Put { page, server: another });
            }
            PutFailed::More => assert!(!self.jobs[&page].unanswered.is_empty()),
            PutFailed::Enough => self.finish_put(page),
            PutFailed::Back => self.put_ended(page, PutDone::Changed),
            PutFailed::Cancelled => self.put_ended(page, PutDone::Cancelled),
        }
    }

    pub(super) fn finish_put(&mut self, page: u64) {
        let unchanged = self.is_unchanged(page);
        let done = self.remote.finish_put(page, self.now, || unchanged);
        self.put_ended(page, done);
    }

    fn is_unchanged(&self, page: u64) -> bool {
        // A hole, which the balloon left, reads as zeros.
        let word = self.file.get(&page).map_or(0, |found| found.word);
        Some(word) == self.jobs[&page].word
    }

    fn put_ended(&mut self, page: u64, done: PutDone) {
        match done {
            PutDone::More => return assert!(!self.jobs[&page].unanswered.is_empty()),
            PutDone::NotYet(until) => {
                assert!(until > self.now && !self.stopped);
                self.later.insert((until, page));
                return;
            }
            PutDone::Punch => {
                let lands = self.dma.iter().any(|(target, ..)| *target == page);
                assert!(!lands, "direct I/O to page {page} is under way");
                self.punch(page);
                self.waiting();
            }
            PutDone::Keep => {
                let lands = self.dma.iter().any(|(target, ..)| *target == page);
                assert!(!lands, "direct I/O to clean page {page} is under way");
            }
            PutDone::Changed => self.unprotect(page),
            PutDone::Cancelled => {}
        }
        let job = self.jobs.remove(&page).unwrap();
        assert!(job.unanswered.is_empty());
    }

    /// The evictor looks for work.
    pub(in crate::remote::tests) fn evict(&mut self, pages_max: usize) {
        let want = pages_max.min(self.remote.wanted_evictions() as usize);
        let victims = self.remote.victims(want, self.now);
        assert!(victims.clean.len() + victims.dirty.len() <= want);
        victims.clean.iter().for_each(|page| self.punch(*page));
        self.put(victims.dirty);
        self.waiting();
    }

    /// These pages are protected, and to be put.
    pub(super) fn put(&mut self, pages: Vec<u64>) {
        for page in pages {
            if let Some(found) = self.file.get_mut(&page) {
                found.protected = true;
            }
            let to = self.remote.put_to(page);
            assert!(!to.is_empty());
            let unanswered = to.iter().copied().collect::<BTreeSet<_>>();
            assert_eq!(unanswered.len(), to.len());
            let job = Job { word: None, unanswered, from: None };
            assert!(self.jobs.insert(page, job).is_none(), "page {page} is being put already");
            self.out.extend(to.into_iter().map(|server| Out::Put { page, server }));
        }
    }

    /// Copies that are out of date are to be dropped.
    pub(in crate::remote::tests) fn stale(&mut self, pages_max: usize) {
        for Stale { server, runs } in self.remote.stale(pages_max) {
            self.out.extend(runs.into_iter().flatten().map(|page| Out::Drop { server, page }));
        }
    }

    /// The evictor copies and sends one thing.
    pub(in crate::remote::tests) fn send(&mut self) {
        match self.out.pop_front() {
            Some(Out::Put { page, server }) => {
                let word = self.file.get(&page).map_or(0, |found| found.word);
                let job = self.jobs.get_mut(&page).unwrap();
                let word = *job.word.get_or_insert(word);
                self.servers[server].requests.push_back(Request::Put { page, word });
            }
            Some(Out::Drop { server, page }) => {
                self.servers[server].requests.push_back(Request::Drop { page });
            }
            None => {}
        }
    }

    pub(in crate::remote::tests) fn begin_merge(&mut self) {
        self.remote.begin_merge();
        self.merging = true;
        self.waiting();
    }

    pub(in crate::remote::tests) fn fetch_more(&mut self, pages_max: usize) {
        let fetches = self.remote.next_to_fetch(pages_max);
        assert!(self.merging || fetches.is_empty());
        self.send_fetches(fetches);
    }

    /// Everything under way arrives, and the evictor does what it should; nothing new happens.
    pub(in crate::remote::tests) fn settle(&mut self) {
        self.settle_for(64);
    }

    /// The same, up to a number of rounds.
    pub(in crate::remote::tests) fn settle_for(&mut self, rounds: usize) {
        for _ in 0..rounds {
            self.evict(64);
            self.flush(64);
            self.stale(1000);
            while !self.out.is_empty() {
                self.send();
            }
            for server in 0..self.servers.len() {
                let steps = self.servers[server].requests.len() + self.servers[server].gets.len();
                for puts in (0..=steps).flat_map(|_| [true, false]) {
                    self.serve(server, puts);
                }
                while !self.servers[server].answers.is_empty()
                    || !self.servers[server].got.is_empty()
                {
                    self.hear(server, true);
                    self.hear(server, false);
                }
            }
            while !self.faults.is_empty() {
                self.fault();
            }
            while !self.moves.is_empty() {
                self.step_move();
            }
            while !self.dropping.is_empty() {
                self.reclaim_done();
            }
            self.pass(self.window.unwrap_or_default());
        }
    }

    /// Blocked accesses, those left out that wait for what no server has.
    pub(in crate::remote::tests) fn stuck(&self) -> Vec<u64> {
        let lost = self.remote.lost_pages();
        let pages = self.blocked.iter().map(|access| access.page);
        pages.filter(|page| !lost.contains(*page)).collect()
    }

    /// All comes back: what is there then is what the guest wrote, and no server has anything.
    pub(in crate::remote::tests) fn merge(&mut self) {
        if !self.merging {
            self.begin_merge();
        }
        for _ in 0..4 {
            self.fetch_more(PAGES as usize);
            self.settle();
        }
        assert_eq!(self.stuck(), [0u64; 0]);
        let lost = self.remote.lost_pages().clone();
        assert!(self.killed > 0 || lost.is_empty(), "lost without a reason");
        assert_eq!(self.remote.is_merged(), lost.is_empty());
        for page in (0..PAGES).filter(|page| !lost.contains(*page)) {
            let word = self.file.get(&page).map_or(0, |found| found.word);
            assert!(self.truth[page as usize].is_none_or(|truth| truth == word), "page {page}");
        }
        let left: Vec<usize> = self.servers.iter().map(|server| server.stored.len()).collect();
        assert!(left.iter().all(|pages| *pages == 0), "left on servers: {left:?}");
        self.check();
    }
}
