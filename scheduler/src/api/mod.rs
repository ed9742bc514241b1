//! What agents tell the world, and each other, over HTTP.
//!
//! ```text
//!   page, top, scripts ─► server ─► Control (an agent) ─► View
//!   other agents ────────►    │
//!                             └─ only with a client certificate of the cluster's authority
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`view`] | what is told, as types with a stable JSON form |
//! | [`control`] | what may be asked of an agent |
//! | [`client`] | asks an agent |

pub use scheduler_api::{ApiError, Client, Control, View, client, control, view};
