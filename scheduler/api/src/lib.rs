//! What the scheduler's agents tell and are asked, and how to ask them.
//!
//! ```text
//!   page, top, scripts ─► server ─► Control (an agent) ─► View
//!   other agents ────────►    │
//!       client                └─ only with a client certificate of the cluster's authority
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`amounts`], [`figures`] | what hosts have and guests take |
//! | [`view`] | what is told, as types with a stable JSON form |
//! | [`control`] | what may be asked of an agent |
//! | [`client`] | asks an agent |
//! | `sample` | a cluster and an agent for tests |
//!
//! This is apart from the scheduler so that programs which only ask need none of its dependencies.

pub mod amounts;
pub mod client;
pub mod control;
pub mod figures;
#[cfg(feature = "sample")]
pub mod sample;
pub mod text;
pub mod view;

pub use self::client::Client;
pub use self::control::{ApiError, Caller, Control};
pub use self::view::View;
