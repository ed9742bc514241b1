//! Work that blocks, off the async runtime's threads.

use crate::error::EngineError;

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
