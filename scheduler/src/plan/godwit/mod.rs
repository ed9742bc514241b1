//! Godwit's own policy: as little overload as possible, for as few bytes and pauses as possible.
//!
//! All of it is one sum in seconds: the overload to be expected of all hosts over the next ten minutes (`outlook`), what
//! guests exchange across network interfaces, and against it what migrations take, as the engine predicts it. A move is
//! made if it lowers that sum by enough. Moves are looked for from hosts that are hotspots or are to be emptied, the worst
//! first:
//!
//! ```text
//!   one guest to one host           (search)
//!   ─► if none helps enough: room is made at the other host, whose guest goes to a third or comes here  (chain)
//!   ─► again, until no hotspot is left, no move helps, or there are enough moves
//! ```
//!
//! What keeps guests from wandering: a move must be worth a share of what is wrong with its host; a guest that has moved
//! stays for a while and does not go back for longer; a destination must carry the guest within the limits, and its expected
//! overload counts. Memory is grown before anything moves, as the papers do, since a guest that swaps needs processors for
//! that, too.

mod chain;
mod memory;
mod outlook;
mod search;
#[cfg(test)]
mod tests;
mod words;

use serde::{Deserialize, Serialize};

use self::search::Search;
use super::{Plan, Policy, Problem};

/// What counts how much.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// How far it is looked ahead, seconds.
    pub horizon_s: f64,
    /// Seconds of overload that a MiB over the wire must save.
    pub mib_weight_s: f64,
    /// Seconds of overload that a second of pause must save.
    pub pause_weight_s: f64,
    /// Seconds of overload that a second of migration must save: it takes processors and network of two hosts.
    pub moving_weight_s: f64,
    /// Share of a second of overload that a second of traffic across interfaces counts, where it fills an interface.
    pub talk_weight: f64,
    /// Share of its host's expected overload that a move must save to be made.
    pub margin: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            horizon_s: 600.0,
            mib_weight_s: 0.01,
            pause_weight_s: 20.0,
            moving_weight_s: 0.2,
            talk_weight: 0.2,
            margin: 0.1,
        }
    }
}

/// The policy.
#[derive(Debug, Clone, Default)]
pub struct Godwit {
    settings: Settings,
}

impl Godwit {
    /// With other weights.
    #[must_use]
    pub const fn new(settings: Settings) -> Self {
        Self { settings }
    }
}

impl Policy for Godwit {
    fn name(&self) -> &'static str {
        "godwit"
    }

    fn plan(&self, problem: &Problem<'_>) -> Plan {
        Search::new(problem, &self.settings).run()
    }
}
