//! Servers that die, come, or hand over what they have.

use super::*;

impl World {
    /// A server dies.
    pub(in crate::remote::tests) fn kill(&mut self, number: usize, puts_first: bool) {
        let Some(server) = self.servers.get_mut(number).filter(|server| !server.gone) else {
            return;
        };
        *server = Server { gone: true, ..Server::default() };
        self.killed += 1;
        let from_it = |(page, job): (&u64, &Job)| (job.from == Some(number)).then_some(*page);
        self.interrupted.extend(self.jobs.iter().filter_map(from_it));
        let is_there = |out: &Out| match out {
            Out::Put { server, .. } | Out::Drop { server, .. } => *server != number,
        };
        self.out.retain(is_there);
        if puts_first {
            self.puts_failed(number);
        }
        let again = self.remote.server_lost(number);
        self.send_fetches(again);
        self.puts_failed(number);
        let (kept, ended) =
            std::mem::take(&mut self.moves).into_iter().partition(|order| order.from != number);
        self.moves = kept;
        let ended: VecDeque<Move> = ended;
        for order in ended {
            self.remote.move_failed(order.page, MoveFailure::NotStored);
        }
    }

    fn puts_failed(&mut self, server: usize) {
        let hit = |(page, job): (&u64, &Job)| job.unanswered.contains(&server).then_some(*page);
        for page in self.jobs.iter().filter_map(hit).collect::<Vec<_>>() {
            let job = self.jobs.get_mut(&page).unwrap();
            job.unanswered.remove(&server);
            if job.from.is_some() {
                self.jobs.remove(&page);
                self.remote.move_failed(page, MoveFailure::NotTaken(PutFailure::Gone));
            } else {
                self.put_failed(page, server, PutFailure::Gone);
            }
        }
        let moves = std::mem::take(&mut self.moves);
        for order in moves {
            if order.to == server {
                self.remote.move_failed(order.page, MoveFailure::NotTaken(PutFailure::Gone));
            } else {
                self.moves.push_back(order);
            }
        }
    }

    pub(in crate::remote::tests) fn add_server(&mut self, room: u64) {
        let number = self.remote.add_server(ServerRoom { reserve_pages: room }).unwrap();
        assert_eq!(number, self.servers.len());
        self.servers.push(Server { capacity_pages: room as usize, ..Server::default() });
    }

    /// Copies are to be made.
    pub(in crate::remote::tests) fn begin_moves(&mut self, pages_max: usize) {
        let moves = self.remote.next_to_move(pages_max, self.now);
        assert!(moves.len() <= pages_max);
        self.moves.extend(moves);
    }

    /// A copy is fetched and goes to the evictor's queue.
    pub(in crate::remote::tests) fn step_move(&mut self) {
        let Some(Move { page, from, to }) = self.moves.pop_front() else { return };
        assert!(from != to && !self.servers[from].gone);
        let Some(word) = self.servers[from].stored.get(&page).copied() else {
            return self.remote.move_failed(page, MoveFailure::NotStored);
        };
        let unanswered = BTreeSet::from([to]);
        let job = Job { word: Some(word), unanswered, from: Some(from) };
        assert!(self.jobs.insert(page, job).is_none(), "page {page} is being put already");
        self.out.push_back(Out::Put { page, server: to });
    }
}
