//! What commands do.

pub(crate) mod agent;
pub(crate) mod explain;
mod kept;
mod plot;
pub(crate) mod simulate;
mod story;
mod summary;
mod timed;
pub(crate) mod web;

use anyhow::{Context as _, Result};
use tokio::runtime::{Builder, Runtime};

/// What commands run in that wait for answers.
fn runtime() -> Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("No threads or descriptors")
}
