//! `migrate agent`: what a host does for guests of others and for those that come, in one process.
//!
//! ```text
//!   configuration ─► memory server ────────────────┐
//!                └─► a receiver a VM ([`receiver`]) ┴─► metrics, one page ([`metrics`])
//! ```
//!
//! Invariant: a part that fails leaves the others alone; only what is wrong from the beginning ends the agent.

pub mod config;
pub mod metrics;
pub mod receiver;

use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinSet;
use transport::Identity;

use self::config::Config;
use self::metrics::Parts;
use self::receiver::Receiver;
use crate::args::AgentArgs;
use crate::error::EngineError;
use crate::memory_server::Server;
use crate::tell::speaking_as;
use crate::{cancel, http, memory_server, tell};

/// How the memory server is called in what is said.
const MEMORY_SERVER: &str = "memory-server";

/// Does what the configuration says until Ctrl-C; while guests need it, until the second.
///
/// # Errors
/// What is wrong with the configuration, or kept a port from being opened.
pub async fn run(args: &AgentArgs) -> Result<(), EngineError> {
    let Config { metrics, memory_server, receive } = Config::read(&args.config)?;
    for args in &receive {
        Identity::load(&args.common.identity)?;
    }
    let http = http::bind_if(metrics).await?;
    let (interrupts, mut interrupted) = watch::channel(0);
    tokio::spawn(count_interrupts(cancel::Requests::watch(), interrupts));
    let server = memory_server.map(|args| memory_server::start(&args)).transpose()?;
    if let Some(server) = &server {
        let told = async { tell!("listening on {}", server.addr) };
        speaking_as(MEMORY_SERVER.into(), told).await;
    }
    let mut work = JoinSet::new();
    let receivers: Vec<_> = receive.into_iter().map(|args| Arc::new(Receiver::new(args))).collect();
    for receiver in &receivers {
        let speaker: Arc<str> = receiver.qmp().display().to_string().into();
        let (receiver, interrupted) = (Arc::clone(receiver), interrupted.clone());
        let runtime = Handle::current();
        // On a thread of its own, so that none holds another up.
        work.spawn_blocking(move || {
            runtime.block_on(speaking_as(speaker, receiver.run(interrupted)));
        });
    }
    if let Some(http) = http {
        let memory_server = server.as_ref().map(Server::shared);
        let parts = Parts { memory_server, receivers };
        http.begin(move || parts.text());
    }
    while let Some(ended) = work.join_next().await {
        if let Err(error) = ended {
            tell!("a part of the agent ended unexpectedly, the others go on: {error}");
        }
    }
    if let Some(server) = server {
        // Last, since guests of other hosts may come to need it until then.
        speaking_as(MEMORY_SERVER.into(), end(&server, &mut interrupted)).await;
    }
    Ok(())
}

/// Returns when the user wants out; while guests need the server, when that is said again.
async fn end(server: &Server, interrupted: &mut watch::Receiver<u32>) {
    drop(interrupted.wait_for(|count| *count > 0).await);
    if server.is_needed() {
        drop(interrupted.wait_for(|count| *count > 1).await);
    }
}

/// Counts how often the user wanted out.
async fn count_interrupts(mut requests: cancel::Requests, count: watch::Sender<u32>) {
    loop {
        requests.next().await;
        count.send_modify(|count| *count += 1);
    }
}
