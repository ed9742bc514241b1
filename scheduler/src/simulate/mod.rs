//! Clusters that exist on paper only: the same policies and detectors, events instead of hosts.
//!
//! ```text
//!   scenario ─► world: hosts, guests, flows, services
//!                 │  changes of workloads, ends of migrations, reports
//!                 ▼
//!   moment: who wants how much and gets what ─► response ─► outcome
//!                 │ averages of 10 s
//!                 ▼
//!   Estimates ─► Watch ─► Policy ─► moves ─► world
//! ```
//!
//! | module | what is in it |
//! |---|---|
//! | `calibration` | what was measured, how it is read, what is assumed beside it |
//! | `world` | hosts, guests, who talks to whom, who waits for them |
//! | `moment`, `network`, `share` | contention: fair shares of CPU, disk and interfaces; steal; swap |
//! | `response` | how long users wait |
//! | `moves` | plans become true |
//! | `snapshot` | what agents would report |
//! | `run` | events |
//! | `outcome` | what it came to |
//! | `scenario` | files, their check, generated clusters, expectations |
//!
//! Architecture invariant: no I/O, no clock; randomness by the scenario's seed alone.

mod calibration;
mod moment;
mod moves;
mod network;
mod outcome;
mod random;
mod response;
mod run;
mod scenario;
mod share;
mod snapshot;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod thesis;
mod world;

pub use self::outcome::{
    Asked, ByResource, HostOutcome, Moved, Outcome, Refused, Resized, ServiceOutcome,
};
pub use self::scenario::{Scenario, ScenarioError, Verdict};
