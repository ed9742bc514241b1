//! Work that blocks, off the async runtime's threads.

use crate::error::EngineError;

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
