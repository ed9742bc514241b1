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
