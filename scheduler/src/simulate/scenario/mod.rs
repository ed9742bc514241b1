//! Scenario files: hosts, guests and what they do over time, or a generator of such; and what is expected to come out.
//!
//! ```text
//!   text ─► File (serde, unknown keys refused) ─► check (line and remedy) ─► Scenario
//!   Scenario + seed ─► World ─► run under a policy ─► Outcome ─► judge
//! ```
//! Invariant: a [`Scenario`] can be run with any policy and seed without panic, and the run ends.

mod build;
mod check;
mod expect;
mod file;
mod generate;

use thiserror::Error;

pub use self::expect::Verdict;
use self::file::File;
use super::outcome::Outcome;
use super::run;
use super::world::World;
use crate::model::Rules;
use crate::plan::{Limits, Policy};
use crate::{detect, provision};

/// Why a file is no scenario.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ScenarioError {
    /// It is not TOML, or has a key or a type that does not belong there.
    #[error("{0}")]
    Syntax(String),
    /// It says something that cannot be.
    #[error("Line {line}: {what}; {remedy}")]
    Wrong {
        /// Where, from 1.
        line: usize,
        /// What.
        what: String,
        /// What to do about it.
        remedy: String,
    },
}

/// How a run goes.
#[derive(Debug, Clone)]
pub(super) struct Course {
    pub(super) duration_s: f64,
    pub(super) report_s: f64,
    pub(super) limits: Limits,
    pub(super) detect: detect::Settings,
    pub(super) provision: provision::Settings,
    pub(super) engine_cores_per_gbit: f64,
    pub(super) rules: Rules,
    /// Whether hosts and services are few, and named by somebody.
    pub(super) is_named: bool,
}

/// A scenario.
#[derive(Debug, Clone)]
pub struct Scenario {
    file: File,
    course: Course,
    /// The file's hosts and guests; `None` if they are generated.
    pub(super) world: Option<World>,
}

impl Scenario {
    /// Reads a file's text.
    ///
    /// # Errors
    /// What is wrong, with the line and what to do.
    pub fn parse(text: &str) -> Result<Self, ScenarioError> {
        let file: File = toml::from_str(text).map_err(|error| {
            ScenarioError::Syntax(format!(
                "{error}The keys are told in docs/SCHEDULER.md, \"Scenario files\""
            ))
        })?;
        check::check(&file, text)?;
        let course = Course {
            duration_s: file.duration_s,
            report_s: file.report_s,
            limits: file.limits.clone(),
            detect: file.detect.clone(),
            provision: file.provision.clone(),
            engine_cores_per_gbit: file.engine.cores_per_gbit,
            rules: build::rules(&file),
            is_named: file.generate.is_none(),
        };
        let world = file.generate.is_none().then(|| build::world(&file));
        Ok(Self { file, course, world })
    }

    /// What it is about, in the author's words.
    #[must_use]
    pub fn about(&self) -> &str {
        &self.file.about
    }

    /// The policies that the file compares; empty: whatever there is.
    #[must_use]
    pub fn policies(&self) -> &[String] {
        &self.file.policies
    }

    /// With how many seeds it is to be run.
    #[must_use]
    pub const fn seeds(&self) -> u64 {
        self.file.seeds
    }

    /// How much time it simulates, seconds.
    #[must_use]
    pub const fn duration_s(&self) -> f64 {
        self.file.duration_s
    }

    /// Between two reports, seconds.
    #[must_use]
    pub const fn report_s(&self) -> f64 {
        self.file.report_s
    }

    /// Hosts and guests.
    #[must_use]
    pub fn size(&self) -> (usize, usize) {
        match &self.file.generate {
            Some(part) => (part.hosts, part.vms),
            None => (self.file.host.len(), self.file.vm.len()),
        }
    }

    /// Runs it. The same policy and seed always give the same outcome.
    #[must_use]
    pub fn run(&self, policy: &dyn Policy, seed: u64) -> Outcome {
        match (&self.world, &self.file.generate) {
            (Some(world), _) => run::run(world, &self.course, policy, seed),
            (None, Some(part)) => {
                let world = generate::world(part, self.course.duration_s, seed);
                run::run(&world, &self.course, policy, seed)
            }
            (None, None) => run::run(&World::default(), &self.course, policy, seed),
        }
    }

    /// Compares outcomes with what the file expects. What is expected of policies that did not run is left out.
    #[must_use]
    pub fn judge(&self, outcomes: &[Outcome]) -> Vec<Verdict> {
        expect::judge(&self.file.expect, &self.file.compare, outcomes)
    }
}
