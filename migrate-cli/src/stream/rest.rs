//! What still comes of a guest that was loaded ahead of its memory.

use std::time::Duration;

use qemu_glue::device_state::{DeviceStateError, Settling};
use qemu_glue::qmp::{Client, MigrationStatus};
use tokio::task::JoinError;

use super::passing::Ended;
use crate::error::EngineError;

/// How long the last words may take once all memory is there.
const LAST_WORD_WITHIN: Duration = Duration::from_secs(5);

/// What a user can do about a connection that is broken.
pub const BROKEN: &str = "what of its memory is at the source does not come until both QEMUs are connected again. Leave both as they are: \
     `migrate send` or `migrate resolve` there says how";

/// The end of a task that passes a stream on.
pub(super) type Passed = Result<Result<(), EngineError>, JoinError>;

/// What became of it.
#[derive(Debug)]
pub enum Became {
    /// The stream does not come any more; QEMU waits for another connection.
    Broken(EngineError),
    /// All memory is here.
    Whole,
}

/// The stream, and the QEMU that takes it. Dropping it ends the connection to QEMU.
#[derive(Debug)]
pub struct Rest {
    passing: Ended<Result<(), EngineError>>,
    /// How its task ended, before anybody was told.
    passed: Option<Passed>,
    has_passed: bool,
    settling: Settling,
    /// QEMU is gone, or has failed: nothing more comes of it.
    is_over: bool,
}

impl Rest {
    /// Of a stream that is being passed on, or `passed`, to a QEMU that settles when it has all.
    pub(super) fn new(
        passing: Ended<Result<(), EngineError>>,
        passed: Option<Passed>,
        settling: Settling,
    ) -> Self {
        Self { passing, passed, has_passed: false, settling, is_over: false }
    }

    /// The next thing that becomes of it. Cancel-safe.
    pub async fn next(&mut self, client: &Client) -> Became {
        loop {
            if let Some(passed) = self.passed.take() {
                self.has_passed = true;
                if let Err(error) = over(passed) {
                    return Became::Broken(error);
                }
            }
            tokio::select! {
                passed = &mut self.passing.0, if !self.has_passed => self.passed = Some(passed),
                ended = self.settling.ended(), if !self.is_over => {
                    self.is_over = true;
                    if is_whole(client, ended).await {
                        self.say_last_words().await;
                        return Became::Whole;
                    }
                }
                else => std::future::pending().await,
            }
        }
    }

    async fn say_last_words(&mut self) {
        if !self.has_passed {
            let passing = &mut self.passing.0;
            let _its_end_is_known = tokio::time::timeout(LAST_WORD_WITHIN, passing).await;
            self.has_passed = true;
        }
    }
}

/// How a task ended that passes a stream on.
pub(super) fn over(passed: Passed) -> Result<(), EngineError> {
    passed.unwrap_or_else(|error| Err(EngineError::Internal(error.to_string())))
}

/// The next thing that becomes of a guest's rest; never where there is none. Cancel-safe.
pub async fn next(rest: &mut Option<Rest>, client: &Client) -> Became {
    match rest {
        Some(rest) => rest.next(client).await,
        None => std::future::pending().await,
    }
}

async fn is_whole(client: &Client, ended: Result<(), DeviceStateError>) -> bool {
    let Err(error) = ended else { return true };
    // Its settings may be all that it did not take back.
    let info = client.query_migrate().await;
    let is_whole = info.is_ok_and(|info| info.status == Some(MigrationStatus::Completed));
    match is_whole {
        true => tracing::warn!(%error, "migration settings not put back"),
        false => tracing::error!(%error, "the guest's memory does not come"),
    }
    is_whole
}
