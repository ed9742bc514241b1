//! Waiting for faults on the async runtime.
#![expect(unsafe_code, reason = "tokio's registration of a descriptor")]

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{Fault, Pager, PagerError};

/// Reads faults as they come, on the async runtime that it was made in.
#[derive(Debug)]
pub struct FaultStream {
    descriptor: AsyncFd<OwnedFd>,
}

impl FaultStream {
    /// Watches the pager's descriptor.
    ///
    /// # Errors
    /// If the descriptor cannot be duplicated or watched.
    pub fn of(pager: &Pager) -> io::Result<Self> {
        let duplicate = pager.as_fd().try_clone_to_owned()?;
        // SAFETY: the AsyncFd owns the duplicate, which nobody else closes, and gives it up only when
        // it is dropped.
        let descriptor = unsafe { AsyncFd::register_with_interest(duplicate, Interest::READABLE) }?;
        Ok(Self { descriptor })
    }

    /// Waits until there are faults and adds them to `faults`. Cancel-safe.
    ///
    /// # Errors
    /// As [`Pager::read_faults`], and [`PagerError::Descriptor`] when the runtime ends.
    pub async fn next(&self, pager: &Pager, faults: &mut Vec<Fault>) -> Result<(), PagerError> {
        loop {
            let ready = self.descriptor.readable().await;
            let mut ready = ready.map_err(|source| PagerError::Descriptor {
                what: "watch",
                pid: pager.pid(),
                source,
            })?;
            while pager.read_faults(faults)? {}
            if !faults.is_empty() {
                return Ok(());
            }
            ready.clear_ready();
        }
    }
}
