//! The lanes' tasks: from the encoder threads to the network.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use transport::{Batch, LaneSender};

use super::outlet::{LANE_QUEUE, LaneQueue};
use crate::gateway::lasting::{Outgoing, weight};

/// One task a lane: from the encoder threads' queue to the network.
#[derive(Debug)]
pub struct LaneTasks {
    queues: Vec<LaneQueue>,
    tasks: Vec<JoinHandle<()>>,
}

impl LaneTasks {
    /// Starts a task for each lane.
    pub fn start(lanes: Vec<LaneSender>) -> Self {
        let (queues, tasks) = lanes
            .into_iter()
            .map(|lane| {
                let (queue, inbox) = mpsc::channel(LANE_QUEUE);
                (queue, tokio::spawn(feed(lane, inbox)))
            })
            .unzip();
        Self { queues, tasks }
    }

    /// Starts a task for each lane of a stream that outlives its sessions.
    pub fn lasting(lanes: &[Arc<Outgoing<Batch>>]) -> Self {
        let (queues, tasks) = lanes
            .iter()
            .map(|lane| {
                // As many as may wait wait there.
                let (queue, inbox) = mpsc::channel(1);
                (queue, tokio::spawn(keep(Arc::clone(lane), inbox)))
            })
            .unzip();
        Self { queues, tasks }
    }

    /// The entrances, for the encoder threads to take over.
    pub fn queues(&mut self) -> Vec<LaneQueue> {
        std::mem::take(&mut self.queues)
    }

    /// Ends the tasks: everything that matters was acknowledged, or is in vain.
    pub async fn stop(&mut self) {
        self.queues.clear();
        for task in self.tasks.drain(..) {
            task.abort();
            let _aborted = task.await;
        }
    }
}

async fn feed(mut lane: LaneSender, mut inbox: mpsc::Receiver<Batch>) {
    while let Some(batch) = inbox.recv().await {
        if let Err(error) = lane.send(batch).await {
            tracing::warn!(lane = lane.index(), %error, "lane ended");
            return;
        }
    }
    // The lane stays open until the session ends: closing it would look like the end of the pages.
    std::future::pending::<()>().await;
}

async fn keep(lane: Arc<Outgoing<Batch>>, mut inbox: mpsc::Receiver<Batch>) {
    while let Some(batch) = inbox.recv().await {
        let bytes = weight(&batch);
        if lane.push(batch, bytes).await.is_err() {
            return;
        }
    }
}
