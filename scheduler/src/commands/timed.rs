//! A policy that knows how long it thinks: the library has no clock.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use scheduler::plan::{Plan, Policy, Problem};
use serde::Serialize;

/// How long decisions took.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct Timing {
    /// Decisions.
    pub(super) count: usize,
    /// All together.
    pub(super) total_ms: f64,
    /// The longest.
    pub(super) max_ms: f64,
}

impl Timing {
    /// Adds others.
    pub(super) fn add(&mut self, other: &Self) {
        self.count += other.count;
        self.total_ms += other.total_ms;
        self.max_ms = self.max_ms.max(other.max_ms);
    }

    /// The mean.
    pub(super) fn mean_ms(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.total_ms / self.count as f64 }
    }
}

/// A policy and how long it took.
#[derive(Debug)]
pub(super) struct Timed {
    policy: Box<dyn Policy>,
    timing: Mutex<Timing>,
}

impl Timed {
    pub(super) fn new(policy: Box<dyn Policy>) -> Self {
        Self { policy, timing: Mutex::default() }
    }

    /// How long decisions took so far.
    pub(super) fn timing(&self) -> Timing {
        *self.timing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Policy for Timed {
    fn name(&self) -> &'static str {
        self.policy.name()
    }

    fn plan(&self, problem: &Problem<'_>) -> Plan {
        let begin = Instant::now();
        let plan = self.policy.plan(problem);
        let took_ms = begin.elapsed().as_secs_f64() * 1000.0;
        let mut timing = self.timing.lock().unwrap_or_else(PoisonError::into_inner);
        timing.add(&Timing { count: 1, total_ms: took_ms, max_ms: took_ms });
        plan
    }
}
