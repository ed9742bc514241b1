//! Whether a guest was reset: what is known of its kernel does not hold then, and the next one may look just like it.

use parking_lot::Mutex;
use qemu_glue::qmp::{Client, Event};
use tokio::sync::broadcast::{self, error::TryRecvError};

/// Looks for resets from its beginning on.
#[derive(Debug)]
pub struct Resets(Mutex<broadcast::Receiver<Event>>);

impl Resets {
    /// Begins to look.
    pub fn watch(client: &Client) -> Self {
        Self(Mutex::new(client.subscribe()))
    }

    /// Whether the guest was reset since the last look, as far as QEMU told; also if it may have been.
    pub fn happened(&self) -> bool {
        let mut events = self.0.lock();
        loop {
            match events.try_recv() {
                Ok(event) if event.name == "RESET" => return true,
                Ok(_) => {}
                // Some were missed, or there will be none: who knows.
                Err(TryRecvError::Lagged(_) | TryRecvError::Closed) => return true,
                Err(TryRecvError::Empty) => return false,
            }
        }
    }
}
