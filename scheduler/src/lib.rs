//! Godwit's scheduler: hotspots are found, and guests grow, shrink or move until they are gone.
//!
//! ```text
//!   figures ─► detect ─► hotspots ─► plan ─► steps ─► migrate, balloon
//!                 ▲                    ▲
//!               series          model: hosts, guests, traffic
//! ```
//!
//! | module | what it decides or holds |
//! |---|---|
//! | [`model`] | a cluster at one moment, and what a move would change |
//! | [`series`] | figures over time, and what is expected next |
//! | [`detect`] | hotspots out of series of figures |
//! | [`provision`] | what guests are estimated to want at their peak |
//! | [`cost`] | what a migration is expected to take |
//! | [`plan`] | what to do about hotspots, by several policies |
//! | [`simulate`] | clusters on paper, for comparing policies |
//!
//! Architecture invariant: these modules have no I/O, clock or randomness; inputs and `now` in, decisions out.
//!
//! | module | what it does |
//! |---|---|
//! | [`agent`] | a host's agent: all of this together |
//! | [`api`] | what is told and asked over HTTP |
//! | [`profile`] | real hosts' figures, and the cluster that they make |
//! | [`store`] | what agents share: entries, leases, and who moves which guest |

pub mod agent;
pub mod api;
pub mod cost;
pub mod detect;
pub mod fuzz;
mod lines;
pub mod model;
pub mod plan;
pub mod profile;
pub mod provision;
pub mod series;
pub mod simulate;
pub mod store;
