//! Ctrl-C and SIGTERM: the migration is undone and the guest stays where it is.

use tokio::signal::unix::{SignalKind, signal};

/// Returns when the user wants out. Pends for ever if the signals cannot be watched.
pub async fn requested() {
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}
