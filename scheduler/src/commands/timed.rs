//! A policy that knows how long it thinks: the library has no clock.

use std::sync::{Mutex, PoisonError};

use rustix::time::{ClockId, clock_gettime};
use scheduler::plan::{Plan, Policy, Problem};
use serde::{Deserialize, Serialize};

/// How long decisions took of one core: time in which the thread did not run is not counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Timing {
    /// Decisions.
    pub(super) count: usize,
    /// All together.
    pub(super) total_ms: f64,
    /// 99 of 100 took no longer; over several runs, the longest of theirs.
    pub(super) p99_ms: f64,
    /// The longest.
    pub(super) max_ms: f64,
}

impl Timing {
    fn of(mut took_ms: Vec<f64>) -> Self {
        took_ms.sort_by(f64::total_cmp);
        let rank = (took_ms.len() * 99).div_ceil(100).saturating_sub(1);
        Self {
            count: took_ms.len(),
            total_ms: took_ms.iter().sum(),
            p99_ms: took_ms.get(rank).copied().unwrap_or(0.0),
            max_ms: took_ms.last().copied().unwrap_or(0.0),
        }
    }

    /// Adds others.
    pub(super) fn add(&mut self, other: &Self) {
        self.count += other.count;
        self.total_ms += other.total_ms;
        self.p99_ms = self.p99_ms.max(other.p99_ms);
        self.max_ms = self.max_ms.max(other.max_ms);
    }

    /// The mean.
    pub(super) fn mean_ms(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.total_ms / self.count as f64 }
    }
}

/// A policy and how long each decision took.
#[derive(Debug)]
pub(super) struct Timed {
    policy: Box<dyn Policy>,
    took_ms: Mutex<Vec<f64>>,
}

impl Timed {
    pub(super) fn new(policy: Box<dyn Policy>) -> Self {
        Self { policy, took_ms: Mutex::default() }
    }

    /// How long decisions took.
    pub(super) fn timing(self) -> Timing {
        Timing::of(self.took_ms.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What this thread has had of processors.
fn ran_ms() -> f64 {
    let ran = clock_gettime(ClockId::ThreadCPUTime);
    ran.tv_sec as f64 * 1e3 + ran.tv_nsec as f64 / 1e6
}

impl Policy for Timed {
    fn name(&self) -> &'static str {
        self.policy.name()
    }

    fn plan(&self, problem: &Problem<'_>) -> Plan {
        let begin_ms = ran_ms();
        let plan = self.policy.plan(problem);
        let took_ms = ran_ms() - begin_ms;
        self.took_ms.lock().unwrap_or_else(PoisonError::into_inner).push(took_ms);
        plan
    }

    fn anticipates(&self) -> bool {
        self.policy.anticipates()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_all_decisions() {
        let timing = Timing::of((1..=200).rev().map(f64::from).collect());
        assert_eq!((timing.count, timing.p99_ms, timing.max_ms), (200, 198.0, 200.0));
        assert_eq!(timing.mean_ms(), 100.5);
        assert_eq!(Timing::of(vec![]), Timing::default());
    }
}
