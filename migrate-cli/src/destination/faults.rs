//! The thread that serves the page faults of a guest whose pages are still at the source.
//!
//! ```text
//!   userfaultfd ──┐          ┌─► asks, on the urgent lane or the control stream
//!   urgent lane ──┼─► poll ──┼─► places what came on the lane
//!   commands ─────┘          └─► another session's lane, or none
//! ```
//!
//! A thread of its own, since the guest waits for whatever lies between a fault and its page.
//! Invariant: [`Fetcher`] decides; what cannot be asked for now is asked for on the next route.

use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use migrate_core::layout::PageIndex;
use qemu_glue::pager::Fault;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::{Errno, retry_on_intr};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use transport::messages::{Message, Request};
use transport::{Batch, ControlSender, TransportError, UrgentReceiver, UrgentStop};

use super::apply::Applier;
use super::fetcher::Fetcher;
use crate::blocking::{hurry, join};
use crate::error::EngineError;

/// Where pages are asked for.
#[derive(Debug)]
pub enum Route {
    /// On the lane that brings them.
    Lane(UrgentReceiver, Arc<Applier>),
    /// On the control stream; they come on a lane that a task reads.
    Control(ControlSender),
}

#[derive(Debug)]
enum Command {
    Connect(Route),
    Disconnect,
}

/// The thread's owner. Dropping it ends the thread and waits for that, which may block.
#[derive(Debug)]
pub struct FaultThread {
    commands: Option<mpsc::Sender<Command>>,
    bell: Arc<OwnedFd>,
    /// Ends the route's lane.
    stop: Option<UrgentStop>,
    thread: Option<JoinHandle<()>>,
    ended: oneshot::Receiver<EngineError>,
}

impl FaultThread {
    /// Begins to serve faults; there is nowhere to ask yet.
    ///
    /// # Errors
    /// If there are no descriptors left.
    pub fn start(fetcher: Arc<Fetcher>) -> Result<Self, EngineError> {
        let failed = |error: Errno| EngineError::Internal(format!("page faults: {error}"));
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed)?;
        let bell = Arc::new(bell);
        let (commands, inbox) = mpsc::channel();
        let (tell, ended) = oneshot::channel();
        let runtime = Handle::current();
        let mut serving = Serving { fetcher, bell: Arc::clone(&bell), inbox, route: None, runtime };
        let thread = thread::spawn(move || {
            if let Err(error) = serving.run() {
                let _nobody_asks = tell.send(error);
            }
        });
        Ok(Self { commands: Some(commands), bell, stop: None, thread: Some(thread), ended })
    }

    /// Asks here from now on, also for what was asked for before.
    pub fn connect(&mut self, route: Route) {
        // Should the thread still be writing to the last one.
        if let Some(stop) = self.stop.take() {
            stop.cut();
        }
        if let Route::Lane(lane, _) = &route {
            self.stop = Some(lane.stop());
        }
        self.command(Command::Connect(route));
    }

    /// Asks nowhere until there is another route.
    pub fn disconnect(&self) {
        self.command(Command::Disconnect);
    }

    /// Returns when faults are not served any more. Cancel-safe; not to be called again after.
    pub async fn failed(&mut self) -> EngineError {
        let ended = (&mut self.ended).await;
        ended.unwrap_or_else(|_| EngineError::Internal("faults are not served".into()))
    }

    fn command(&self, command: Command) {
        if let Some(commands) = &self.commands {
            // A thread that has ended says so by itself.
            let _ended = commands.send(command);
            self.ring();
        }
    }

    fn ring(&self) {
        // The counter is full only if the thread has long been woken.
        let _full = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }
}

impl Drop for FaultThread {
    fn drop(&mut self) {
        self.commands = None;
        self.ring();
        if let Some(thread) = self.thread.take() {
            join(thread, self.stop.as_ref());
        }
    }
}

/// What there is to do.
#[derive(Debug, Default)]
struct Awake {
    commands: bool,
    faults: bool,
    batches: bool,
}

#[derive(Debug)]
struct Serving {
    fetcher: Arc<Fetcher>,
    bell: Arc<OwnedFd>,
    inbox: mpsc::Receiver<Command>,
    route: Option<Route>,
    runtime: Handle,
}

impl Serving {
    fn run(&mut self) -> Result<(), EngineError> {
        hurry();
        let (mut faults, mut batches) = (vec![], vec![]);
        loop {
            let awake = self.wait()?;
            if awake.commands {
                if !self.obey() {
                    return Ok(());
                }
                // The route may be another.
                continue;
            }
            if awake.faults {
                self.serve(&mut faults)?;
            }
            if awake.batches {
                self.take_in(&mut batches, &mut faults)?;
            }
        }
    }

    fn wait(&self) -> Result<Awake, EngineError> {
        let mut fds = vec![
            PollFd::new(&*self.bell, PollFlags::IN),
            PollFd::new(self.fetcher.pager(), PollFlags::IN),
        ];
        if let Some(Route::Lane(lane, _)) = &self.route {
            fds.push(PollFd::new(lane, PollFlags::IN));
        }
        let polled = retry_on_intr(|| poll(&mut fds, None));
        polled.map_err(|error| EngineError::Internal(format!("page faults: {error}")))?;
        let mut fds = fds.iter().map(PollFd::revents);
        let mut next = || fds.next().unwrap_or(PollFlags::empty());
        let (bell, faults, batches) = (next(), next(), next());
        if faults.intersects(PollFlags::ERR | PollFlags::NVAL) {
            return Err(EngineError::Internal("page faults cannot be waited for".into()));
        }
        let [commands, faults, batches] = [bell, faults, batches].map(|flags| !flags.is_empty());
        Ok(Awake { commands, faults, batches })
    }

    /// Says whether to go on.
    fn obey(&mut self) -> bool {
        let _count = rustix::io::read(&self.bell, &mut [0; 8]);
        loop {
            match self.inbox.try_recv() {
                Ok(Command::Connect(route)) => {
                    self.route = Some(route);
                    for page in self.fetcher.reconnected() {
                        self.ask(page);
                    }
                }
                Ok(Command::Disconnect) => self.route = None,
                Err(mpsc::TryRecvError::Empty) => return true,
                Err(mpsc::TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn serve(&mut self, faults: &mut Vec<Fault>) -> Result<(), EngineError> {
        while self.fetcher.pager().read_faults(faults)? {}
        for fault in faults.drain(..) {
            if let Some(page) = self.fetcher.fault(fault)? {
                self.ask(page);
            }
        }
        Ok(())
    }

    fn ask(&mut self, page: PageIndex) {
        match &mut self.route {
            None => {}
            Some(Route::Lane(lane, _)) => {
                if let Err(error) = lane.ask(page) {
                    self.lost(&error);
                }
            }
            Some(Route::Control(control)) => {
                let control = control.clone();
                self.runtime.spawn(async move {
                    let asked = control.send(&Message::Request(Request { page: page.0 })).await;
                    if let Err(error) = asked {
                        tracing::debug!(%page, %error, "not asked for");
                    }
                });
            }
        }
    }

    /// Places what has come. Who faults meanwhile does not wait for neighbours of others.
    fn take_in(
        &mut self,
        batches: &mut Vec<Batch>,
        faults: &mut Vec<Fault>,
    ) -> Result<(), EngineError> {
        let Some(Route::Lane(lane, _)) = &mut self.route else { return Ok(()) };
        let received = lane.receive(batches);
        for batch in batches.drain(..) {
            let Some(Route::Lane(lane, applier)) = &self.route else { break };
            // The applier keeps what is wrong with a batch, which ends the session.
            if !applier.apply_urgent(lane.index(), &batch) {
                self.route = None;
            }
            self.serve(faults)?;
        }
        if let (Err(error), Some(_)) = (received, &self.route) {
            self.lost(&error);
        }
        Ok(())
    }

    /// The session has ended, and the source opens another; or the lane has, and the control stream says why.
    fn lost(&mut self, error: &TransportError) {
        tracing::info!(%error, "the lane of urgent pages ended");
        self.route = None;
    }
}
