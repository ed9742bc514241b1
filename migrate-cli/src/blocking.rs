//! Work that blocks, off the async runtime's threads.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use transport::UrgentStop;

use crate::error::EngineError;

/// The kernel's highest priority for ordinary threads.
const HASTE: i32 = -20;

/// How long a thread that was told to end may take for what it is at.
const END_WITHIN: Duration = Duration::from_secs(1);

/// Threads for reading, packing, unpacking and writing pages: one a core, at most 4.
pub fn worker_threads() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from).min(4)
}

/// Runs `work` on a thread where it may block.
///
/// # Errors
/// [`EngineError::Internal`] if it panicked or the runtime is ending.
pub async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, EngineError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| EngineError::Internal(error.to_string()))
}

/// Lets this thread go before all others of the machine that are not real-time, where the kernel allows
/// it: a guest waits for what it does, which is little.
pub fn hurry() {
    let thread = rustix::thread::gettid();
    if let Err(error) = rustix::process::setpriority_process(Some(thread), HASTE) {
        tracing::debug!(%error, "a thread that a guest waits for takes its turn");
    }
}

/// Waits for a thread that was told to end; one that goes on writing to its lane is cut off.
pub fn join(thread: JoinHandle<()>, lane: Option<&UrgentStop>) {
    let deadline = Instant::now() + END_WITHIN;
    while !thread.is_finished() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    if let Some(lane) = lane {
        lane.cut();
    }
    if thread.join().is_err() {
        tracing::error!("a thread of the engine panicked");
    }
}
