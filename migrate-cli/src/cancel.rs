//! Ctrl-C and SIGTERM: the migration is undone and the guest stays where it is.

use tokio::signal::unix::{Signal, SignalKind, signal};

/// What the user wants from now on.
#[derive(Debug)]
pub struct Requests(Option<[Signal; 2]>);

impl Requests {
    /// Begins to watch. What is asked for before [`Self::next`] is waited for is not lost.
    pub fn watch() -> Self {
        let (interrupt, terminate) =
            (signal(SignalKind::interrupt()), signal(SignalKind::terminate()));
        Self(
            interrupt.ok().zip(terminate.ok()).map(|(interrupt, terminate)| [interrupt, terminate]),
        )
    }

    /// Returns when the user wants out. Pends for ever if the signals cannot be watched.
    pub async fn next(&mut self) {
        let Some([interrupt, terminate]) = &mut self.0 else {
            return std::future::pending().await;
        };
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    }
}

/// Returns when the user wants out from now on. Pends for ever if the signals cannot be watched.
pub async fn requested() {
    Requests::watch().next().await;
}
