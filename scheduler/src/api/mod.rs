//! What agents tell the world, and each other, over HTTP.
//!
//! ```text
//!   page, top, scripts ─► server ─► routes ─► Control (an agent) ─► View
//!   other agents ────────►    │
//!                             └─ only with a client certificate of the cluster's authority
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`view`] | what is told, as types with a stable JSON form |
//! | [`control`] | what may be asked of an agent |
//! | [`client`] | asks an agent |
//! | [`server`] | connections, certificates and limits |
//! | `routes` | paths, and how they are answered |
//! | [`openapi`] | the description for other programs |
//! | `page` | the web page's files |
//! | [`web`] | the page for a browser without a certificate |
//!
//! The first three are the crate `scheduler-api`, for programs that only ask.

pub mod openapi;
mod page;
mod places;
mod routes;
pub mod server;
pub mod web;

pub use scheduler_api::{ApiError, Client, Control, View, client, control, view};

pub use self::server::serve;
