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

pub mod control;
pub mod view;

pub use self::control::{ApiError, Control};
pub use self::view::View;
