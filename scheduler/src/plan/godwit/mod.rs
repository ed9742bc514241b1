//! Godwit's own policy: as little overload as possible, for as few bytes and pauses as possible.
//!
//! All of it is one sum in seconds: what is wrong with all hosts over the next ten minutes (`outlook`), what guests
//! exchange across network interfaces, and against it what migrations take, as the engine predicts it. A move is made if it
//! lowers that sum.
//!
//! ```text
//!   memory for guests that lack it, or soon will                        (memory)
//!   ─► hosts that have too much to do, the worst first                  (search)
//!        one guest to one host
//!        ─► if none helps: room is made at the other host, whose guest
//!           goes to a third or comes here                               (chain)
//!        ─► again, until the host is well and no move is worth its price
//!   ─► hosts that are to be emptied
//!   ─► hosts that are likely to have too much to do, while moves are worth much
//! ```
//!
//! What keeps guests from wandering: a move must be worth more than it costs, a guest that has moved lately is not moved if
//! another can be, and a destination must have room for what comes at its peak, and is judged by what is to be expected
//! there.

mod chain;
mod memory;
mod outlook;
mod search;
#[cfg(test)]
mod tests;
mod words;

use serde::{Deserialize, Serialize};

use self::search::Search;
use super::balloon::BalloonSettings;
use super::draft::Draft;
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
    /// Share of a second of overload that a second counts in which a host has more to do than it should.
    pub hot_weight: f64,
    /// By what share of what it wants a guest's load is taken to vary, beside what was seen.
    pub unknown: f64,
    /// Seconds of overload that a move must save beyond its price where no hotspot was found.
    pub margin_s: f64,
    /// When guests get memory before they lack it.
    pub balloon: BalloonSettings,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            horizon_s: 600.0,
            mib_weight_s: 0.02,
            pause_weight_s: 20.0,
            moving_weight_s: 0.2,
            talk_weight: 0.4,
            hot_weight: 0.1,
            unknown: 0.15,
            margin_s: 20.0,
            balloon: BalloonSettings::default(),
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
        match Draft::new(problem) {
            Ok(draft) => Search::new(draft, &self.settings).run(),
            Err(plan) => plan,
        }
    }

    fn anticipates(&self) -> bool {
        true
    }
}
