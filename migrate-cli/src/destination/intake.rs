//! The lanes of a session: from the network to the decoder threads, and word of it back.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use migrate_core::error::{Classify, ErrorBin};
use migrate_core::page_table::DestinationPages;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use transport::messages::{Message, Progress};
use transport::{
    Batch, Closer, ControlSender, LaneReceiver, TransportError, UrgentReceiver, close_code,
};

use super::apply::{Applier, LaneInlet};
use super::sink::PageSink;
use crate::blocking::worker_threads;
use crate::error::EngineError;

/// How often the source is told what was applied.
const PROGRESS_EVERY: Duration = Duration::from_millis(5);

/// The same once the guest runs here: little is under way then, so that faults need not queue.
const PROGRESS_EVERY_AWAITED: Duration = Duration::from_millis(1);

/// What takes pages in.
#[derive(Debug)]
pub struct Intake {
    applier: Arc<Applier>,
    tasks: Vec<JoinHandle<()>>,
    /// The lane that may be kept for what the guest waits for, if it can be, while a task reads it.
    last: Option<Last>,
}

#[derive(Debug)]
struct Last {
    give: oneshot::Sender<()>,
    task: JoinHandle<Result<UrgentReceiver, TransportError>>,
}

impl Intake {
    /// Takes over a session's lanes.
    pub fn start(
        sink: Arc<dyn PageSink>,
        pages: Arc<DestinationPages>,
        lanes: Vec<LaneReceiver>,
        control: ControlSender,
        closer: &Closer,
    ) -> Self {
        let (applier, inlets) = Applier::start(sink, pages, lanes.len(), worker_threads());
        let applier = Arc::new(applier);
        let mut lanes: Vec<_> = lanes.into_iter().zip(inlets).collect();
        let last = lanes.pop();
        let drains = lanes.into_iter().map(|(mut lane, inlet)| {
            let closer = closer.clone();
            tokio::spawn(async move { drain(&mut lane, inlet, None, closer).await })
        });
        let mut tasks: Vec<_> = drains.collect();
        tasks.push(tokio::spawn(tell_progress(control, Arc::clone(&applier))));
        let mut given_away = None;
        if let Some((mut lane, inlet)) = last {
            let (applier, closer) = (Arc::clone(&applier), closer.clone());
            if lane.has_tcp() {
                let (give, given) = oneshot::channel();
                let task = tokio::spawn(drain_last(lane, inlet, applier, closer, given));
                given_away = Some(Last { give, task });
            } else {
                tasks.push(tokio::spawn(async move {
                    drain(&mut lane, inlet, Some(applier), closer).await;
                }));
            }
        }
        Self { applier, tasks, last: given_away }
    }

    /// Takes batches that somebody else reads off the lanes, and tells how far it is.
    pub fn begin(
        sink: Arc<dyn PageSink>,
        pages: Arc<DestinationPages>,
        lanes: Vec<mpsc::Receiver<Batch>>,
    ) -> Self {
        let (applier, inlets) = Applier::start(sink, pages, lanes.len(), worker_threads());
        let tasks = lanes.into_iter().zip(inlets).map(|(mut batches, inlet)| {
            tokio::spawn(async move {
                while let Some(batch) = batches.recv().await {
                    if !inlet.push(batch).await {
                        return;
                    }
                }
            })
        });
        let tasks = tasks.collect();
        Self { applier: Arc::new(applier), tasks, last: None }
    }

    /// The lane on which the source is asked, if the session has one; to be called once.
    ///
    /// # Errors
    /// If its connection has ended.
    pub async fn urgent(&mut self) -> Result<Option<UrgentReceiver>, EngineError> {
        let Some(Last { give, task }) = self.last.take() else { return Ok(None) };
        let _waits_for_it = give.send(());
        let given = task.await.map_err(|error| EngineError::Internal(error.to_string()))?;
        Ok(Some(given?))
    }

    /// The decoder threads.
    pub fn applier(&self) -> &Arc<Applier> {
        &self.applier
    }

    /// After this, nothing is taken in any more.
    pub async fn stop(&mut self) {
        for task in self.tasks.drain(..) {
            task.abort();
            let _aborted = task.await;
        }
        if let Some(Last { task, .. }) = self.last.take() {
            task.abort();
            let _aborted = task.await;
        }
        let applier = Arc::clone(&self.applier);
        let _joined = tokio::task::spawn_blocking(move || applier.join()).await;
    }
}

/// As [`drain`], until the lane is wanted for something else.
async fn drain_last(
    mut lane: LaneReceiver,
    inlet: LaneInlet,
    applier: Arc<Applier>,
    closer: Closer,
    given: oneshot::Receiver<()>,
) -> Result<UrgentReceiver, TransportError> {
    let wanted = async {
        if given.await.is_err() {
            pending::<()>().await;
        }
    };
    tokio::select! {
        () = wanted => {}
        () = drain(&mut lane, inlet, Some(applier), closer) => {}
    }
    lane.into_urgent()
}

/// Hands a lane's batches to its thread; those that the guest waits for (`urgent`, once there is a
/// fetcher) are applied here, since waking a thread takes longer. Never returns.
async fn drain(
    lane: &mut LaneReceiver,
    inlet: LaneInlet,
    urgent: Option<Arc<Applier>>,
    closer: Closer,
) {
    loop {
        match lane.recv().await {
            Ok(Some(batch)) => {
                let now = urgent.as_ref().filter(|applier| applier.fetcher().is_some());
                let taken = match now {
                    Some(applier) => applier.apply_urgent(lane.index(), &batch),
                    None => inlet.push(batch).await,
                };
                if !taken {
                    break;
                }
            }
            Ok(None) => break,
            Err(error) if error.bin() == ErrorBin::PeerMisbehaved => {
                closer.close(close_code::PROTOCOL, &EngineError::from(error).tell()).await;
                break;
            }
            Err(error) => {
                tracing::info!(lane = lane.index(), %error, "lane ended");
                break;
            }
        }
    }
    // Nothing more comes on this lane; the control stream says what that means.
    drop(inlet);
    pending::<()>().await;
}

/// Tells the source what was applied, again and again while the session lasts.
pub async fn tell_progress(control: ControlSender, applier: Arc<Applier>) {
    let mut told = 0;
    loop {
        let every = if applier.is_awaited() { PROGRESS_EVERY_AWAITED } else { PROGRESS_EVERY };
        tokio::time::sleep(every).await;
        let (applied_bytes, applied_batches) = applier.applied();
        if applied_bytes == told {
            continue;
        }
        told = applied_bytes;
        let progress = Message::Progress(Progress { applied_bytes, applied_batches });
        if control.send(&progress).await.is_err() {
            return;
        }
    }
}
