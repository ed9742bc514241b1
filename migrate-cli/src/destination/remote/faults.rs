//! The thread that serves the page faults of a split guest.
//!
//! ```text
//!   userfaultfd ──┐          ┌─► zeros, or asks a server
//!   servers ──────┼─► poll ──┼─► places what came
//!   commands ─────┘          └─► asks for what the keeper found out, takes a connection anew
//! ```
//!
//! A thread of its own, since the guest waits for whatever lies between a fault and its page.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use migrate_core::remote::Fetch;
use qemu_glue::pager::Fault;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::{Errno, retry_on_intr};
use transport::TransportError;
use transport::pages::{Extent, PageAnswer, PageClient, PageRequest, StoreError};

use super::Shared;
use crate::blocking::{hurry, join};
use crate::error::EngineError;

/// Fewest pages that may travel packed: for fewer the guest would wait longer for that.
const PACKED_PAGES_MIN: u64 = 32;

/// How often the thread looks whether servers answer.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// What the keeper has the thread do.
#[derive(Debug)]
pub(super) enum Command {
    /// Ask for pages.
    Fetch(Vec<Fetch>),
    /// Use this connection to a server, which may be one more than there were.
    Connect(usize, Box<PageClient>),
    /// A server is not coming back.
    Forget(usize),
}

/// A way to tell the thread something.
#[derive(Debug, Clone)]
pub(super) struct FaultHandle {
    commands: mpsc::Sender<Command>,
    bell: Arc<OwnedFd>,
}

impl FaultHandle {
    /// Has the thread do something. One that has ended says so by itself.
    pub(super) fn tell(&self, command: Command) {
        let _ended = self.commands.send(command);
        ring(&self.bell);
    }
}

/// The thread's owner. Dropping it ends the thread and waits for that.
#[derive(Debug)]
pub(super) struct FaultThread {
    handle: FaultHandle,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl FaultThread {
    /// Begins to serve faults, over a connection a server.
    ///
    /// # Errors
    /// If there are no descriptors left.
    pub(super) fn start(
        shared: Arc<Shared>,
        clients: Vec<PageClient>,
    ) -> Result<Self, EngineError> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed)?;
        let bell = Arc::new(bell);
        let (commands, inbox) = mpsc::channel();
        let handle = FaultHandle { commands, bell: Arc::clone(&bell) };
        let ways = clients.into_iter().map(|client| Way::new(Some(client)));
        let mut serving = Serving {
            shared: Arc::clone(&shared),
            bell,
            inbox,
            ways: ways.collect(),
            fetches: vec![],
        };
        let thread = thread::spawn(move || {
            if let Err(error) = serving.run() {
                serving.shared.fail(error);
            }
        });
        Ok(Self { handle, shared, thread: Some(thread) })
    }

    /// To tell the thread something.
    pub(super) fn handle(&self) -> FaultHandle {
        self.handle.clone()
    }
}

impl Drop for FaultThread {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Release);
        ring(&self.handle.bell);
        if let Some(thread) = self.thread.take() {
            join(thread, None);
        }
    }
}

fn ring(bell: &OwnedFd) {
    // The counter is full only if the thread has long been woken.
    let _full = rustix::io::write(bell, &1u64.to_ne_bytes());
}

fn failed(error: Errno) -> EngineError {
    EngineError::Internal(format!("page faults: {error}"))
}

/// A server.
#[derive(Debug)]
struct Way {
    client: Option<PageClient>,
    /// Asked for and not there yet, by request, the oldest first.
    asked: VecDeque<(u32, BTreeSet<u64>)>,
    /// To be asked for as soon as there is room, those first that the guest waits for.
    queued: VecDeque<Fetch>,
    /// When something came last, or the first of these was asked for.
    heard: Instant,
}

impl Way {
    fn new(client: Option<PageClient>) -> Self {
        Self { client, asked: VecDeque::new(), queued: VecDeque::new(), heard: Instant::now() }
    }
}

#[derive(Debug)]
struct Serving {
    shared: Arc<Shared>,
    bell: Arc<OwnedFd>,
    inbox: mpsc::Receiver<Command>,
    ways: Vec<Way>,
    /// To be asked for.
    fetches: Vec<Fetch>,
}

impl Serving {
    fn run(&mut self) -> Result<(), EngineError> {
        hurry();
        let (mut faults, mut answers) = (vec![], vec![]);
        let mut looked = Instant::now();
        while !self.shared.is_over.load(Ordering::Acquire) {
            if looked.elapsed() > LOOK_EVERY {
                looked = Instant::now();
                self.cut_silent();
            }
            let (commands, has_faults, servers) = self.wait()?;
            if commands {
                self.obey();
            }
            if has_faults {
                self.serve(&mut faults)?;
            }
            for server in servers {
                self.take_in(server, &mut answers)?;
                // Who faults meanwhile does not wait for what others read ahead.
                self.serve(&mut faults)?;
            }
        }
        Ok(())
    }

    /// Waits until there is something to do: for commands, faults, or servers that have answered.
    fn wait(&mut self) -> Result<(bool, bool, Vec<usize>), EngineError> {
        let mut ready = vec![];
        for (number, way) in self.ways.iter_mut().enumerate() {
            if way.client.as_mut().is_some_and(PageClient::has_answers) {
                ready.push(number);
            }
        }
        if !ready.is_empty() {
            return Ok((false, true, ready));
        }
        let mut fds = vec![
            PollFd::new(&*self.bell, PollFlags::IN),
            PollFd::new(&self.shared.pager, PollFlags::IN),
        ];
        let mut numbers = vec![];
        for (number, way) in self.ways.iter().enumerate() {
            if let Some(client) = &way.client {
                fds.push(PollFd::new(client, PollFlags::IN));
                numbers.push(number);
            }
        }
        let every = Timespec::try_from(LOOK_EVERY).ok();
        let events = retry_on_intr(|| poll(&mut fds, every.as_ref())).map_err(failed)?;
        if events == 0 {
            return Ok((false, false, vec![]));
        }
        let mut fds = fds.iter().map(PollFd::revents);
        let mut next = || fds.next().unwrap_or(PollFlags::empty());
        let (bell, faults) = (next(), next());
        if faults.intersects(PollFlags::ERR | PollFlags::NVAL) {
            return Err(EngineError::Internal("page faults cannot be waited for".into()));
        }
        let ready = numbers.into_iter().filter(|_| !next().is_empty()).collect();
        Ok((!bell.is_empty(), !faults.is_empty(), ready))
    }

    /// Gives servers up that do not answer.
    fn cut_silent(&mut self) {
        let limit = self.shared.options.dead_peer;
        for server in 0..self.ways.len() {
            let Some(way) = self.ways.get(server) else { continue };
            let is_silent = !way.asked.is_empty() && way.heard.elapsed() > limit;
            if let Some(client) = way.client.as_ref().filter(|_| is_silent) {
                let peer = client.addr();
                self.lost(server, &TransportError::Ended { peer });
            }
        }
    }

    fn obey(&mut self) {
        let _count = rustix::io::read(&self.bell, &mut [0; 8]);
        while let Ok(command) = self.inbox.try_recv() {
            match command {
                Command::Fetch(fetches) => self.fetches.extend(fetches),
                Command::Connect(server, client) => self.reconnected(server, *client),
                Command::Forget(server) => {
                    if let Some(way) = self.ways.get_mut(server) {
                        *way = Way::new(None);
                    }
                }
            }
        }
        self.ask();
    }

    /// The way to a server, which may have joined just now.
    fn way(&mut self, server: usize) -> Option<&mut Way> {
        if server >= self.ways.len() {
            self.ways.resize_with(server + 1, || Way::new(None));
        }
        self.ways.get_mut(server)
    }

    /// Asks over a new connection for what was asked for over the last one, if there was one.
    fn reconnected(&mut self, server: usize, client: PageClient) {
        let Some(way) = self.way(server) else { return };
        way.client = Some(client);
        for (_, pages) in std::mem::take(&mut way.asked) {
            way.queued.push_back(Fetch::of(server, pages));
        }
        self.send(server);
    }

    fn serve(&mut self, faults: &mut Vec<Fault>) -> Result<(), EngineError> {
        while self.shared.pager.read_faults(faults)? {}
        for fault in faults.drain(..) {
            self.shared.fault(fault, &mut self.fetches)?;
            self.ask();
        }
        Ok(())
    }

    /// Asks for what there is to be asked for.
    fn ask(&mut self) {
        for fetch in std::mem::take(&mut self.fetches) {
            let server = fetch.server;
            let Some(way) = self.way(server) else { continue };
            // The guest may wait for it, and hardly for what was queued: that is what was read ahead.
            way.queued.push_front(fetch);
            self.send(server);
        }
    }

    /// Sends what is queued for a server, as far as there is room.
    fn send(&mut self, server: usize) {
        let Some(way) = self.ways.get_mut(server) else { return };
        let Some(client) = &mut way.client else { return };
        while let Some(fetch) = way.queued.pop_front() {
            let extents = Extent::join(fetch.runs.iter().cloned().flatten());
            let packed = Extent::count(&extents) >= PACKED_PAGES_MIN;
            let request = PageRequest::Get { extents, take: false, packed };
            if !client.has_room(&request) {
                way.queued.push_front(fetch);
                return;
            }
            match client.send(&request) {
                Ok(tag) => {
                    if way.asked.is_empty() {
                        way.heard = Instant::now();
                    }
                    way.asked.push_back((tag, fetch.runs.into_iter().flatten().collect()));
                }
                Err(error) => {
                    way.queued.push_front(fetch);
                    self.lost(server, &error);
                    return;
                }
            }
        }
    }

    fn take_in(&mut self, server: usize, answers: &mut Vec<PageAnswer>) -> Result<(), EngineError> {
        let Some(way) = self.ways.get_mut(server) else { return Ok(()) };
        let Some(client) = &mut way.client else { return Ok(()) };
        let mut received = client.receive_ready(answers);
        way.heard = Instant::now();
        for answer in answers.drain(..) {
            match answer {
                PageAnswer::Pages { extents, contents, last, .. } => {
                    let pages = || extents.iter().flat_map(Extent::iter);
                    if let Some((_, asked)) = way.asked.front_mut() {
                        pages().for_each(|page| {
                            asked.remove(&page);
                        });
                    }
                    if last {
                        way.asked.pop_front();
                    }
                    self.shared.arrived(server, pages(), &contents, &mut self.fetches)?;
                }
                PageAnswer::Failed { error: StoreError::NotStored { page }, .. } => {
                    let (_, mut asked) = way.asked.pop_front().unwrap_or_default();
                    asked.remove(&page);
                    // The others were not told of.
                    if !asked.is_empty() {
                        way.queued.push_back(Fetch::of(server, asked));
                    }
                    let again = self.shared.remote.lock().fetch_failed(server, &[page]);
                    self.fetches.extend(again);
                    self.shared.changed.notify_waiters();
                }
                PageAnswer::Failed { error, .. } => {
                    tracing::error!(%error, server, "a memory server does not give pages");
                    received = Err(TransportError::Ended { peer: client.addr() });
                }
                PageAnswer::Done { .. } | PageAnswer::Listed { .. } | PageAnswer::Stat { .. } => {}
            }
        }
        let (sent, read) = client.bytes();
        self.shared.traffic.faults.note(server, sent, read);
        if let Err(error) = received {
            self.lost(server, &error);
        }
        self.ask();
        self.send(server);
        Ok(())
    }

    /// A connection has ended; the keeper opens another.
    fn lost(&mut self, server: usize, error: &TransportError) {
        tracing::warn!(%error, server, "the connection to a memory server ended");
        if let Some(way) = self.ways.get_mut(server) {
            way.client = None;
        }
        self.shared.traffic.faults.ended(server);
        self.shared.traffic.lost(server);
        self.shared.keeper.notify_one();
    }
}
