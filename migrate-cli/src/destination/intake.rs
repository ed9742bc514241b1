//! The lanes of a session: from the network to the decoder threads, and word of it back.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use migrate_core::error::{Classify, ErrorBin};
use migrate_core::page_table::DestinationPages;
use qemu_glue::ram::GuestRam;
use tokio::task::JoinHandle;
use transport::messages::{Message, Progress};
use transport::{Closer, ControlSender, LaneReceiver, close_code};

use super::apply::{Applier, LaneInlet};
use crate::blocking::worker_threads;
use crate::error::EngineError;

/// How often the source is told what was applied.
const PROGRESS_EVERY: Duration = Duration::from_millis(5);

/// The same once the guest runs here: little is under way then, so that faults need not queue.
const PROGRESS_EVERY_FETCHING: Duration = Duration::from_millis(1);

/// What takes pages in.
#[derive(Debug)]
pub struct Intake {
    applier: Arc<Applier>,
    tasks: Vec<JoinHandle<()>>,
}

impl Intake {
    /// Takes over a session's lanes.
    pub fn start(
        ram: Arc<GuestRam>,
        pages: Arc<DestinationPages>,
        lanes: Vec<LaneReceiver>,
        control: ControlSender,
        closer: &Closer,
    ) -> Self {
        let (applier, inlets) = Applier::start(ram, pages, lanes.len(), worker_threads());
        let applier = Arc::new(applier);
        let last = lanes.len().saturating_sub(1);
        let drains = lanes.into_iter().zip(inlets).map(|(lane, inlet)| {
            let urgent = (lane.index() == last).then(|| Arc::clone(&applier));
            tokio::spawn(drain(lane, inlet, urgent, closer.clone()))
        });
        let mut tasks: Vec<_> = drains.collect();
        tasks.push(tokio::spawn(tell_progress(control, Arc::clone(&applier))));
        Self { applier, tasks }
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
        let applier = Arc::clone(&self.applier);
        let _joined = tokio::task::spawn_blocking(move || applier.join()).await;
    }
}

/// Hands a lane's batches to its thread; those that the guest waits for (`urgent`, once there is a
/// fetcher) are applied here, since waking a thread takes longer.
async fn drain(
    mut lane: LaneReceiver,
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

async fn tell_progress(control: ControlSender, applier: Arc<Applier>) {
    let mut told = 0;
    loop {
        let fetches = applier.fetcher().is_some();
        let every = if fetches { PROGRESS_EVERY_FETCHING } else { PROGRESS_EVERY };
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
