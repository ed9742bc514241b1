//! What commands do.

pub(crate) mod agent;
mod plot;
pub(crate) mod simulate;
mod story;
mod summary;
mod timed;
pub(crate) mod web;
