//! A run: events in the order of time, and between them moments that last.
//!
//! ```text
//!   report (10 s) ─► averages ─► Estimates ─► Watch ─► Policy ─► Moves
//!   change of a workload ─┐                                        │
//!   end of a migration ───┴─► what everybody wants and gets ◄──────┘
//! ```

use super::moment::{Moment, Settings};
use super::moves::{Moves, Scene};
use super::outcome::{Asked, Measure, Outcome, ping_pongs};
use super::random::noise;
use super::scenario::Course;
use super::snapshot::Snapshot;
use super::world::{What, World};
use crate::detect::Watch;
use crate::model::HostState;
use crate::plan::{Policy, Problem};
use crate::provision::Estimates;

/// Entries of what was asked that are kept: enough for a day of a cluster that lacks something all the time.
const ASKED_MAX: usize = 10_000;

/// Everything that changes.
struct Run<'a> {
    world: &'a World,
    course: &'a Course,
    now_s: f64,
    now: Settings,
    moment: Moment,
    snapshot: Snapshot,
    moves: Moves,
    measure: Measure,
    next_change: usize,
    turn: u64,
    watch: Watch,
    estimates: Estimates,
    decisions: usize,
    asked: Vec<Asked>,
}

/// Runs a world under a policy.
pub(super) fn run(world: &World, course: &Course, policy: &dyn Policy, seed: u64) -> Outcome {
    let mut run = Run {
        world,
        course,
        now_s: 0.0,
        now: Settings::new(world),
        moment: Moment::new(world),
        snapshot: Snapshot::new(world, &course.rules),
        moves: Moves::new(course.engine_cores_per_gbit / 1000.0),
        measure: Measure::new(world),
        next_change: 0,
        turn: 0,
        watch: Watch::new(course.detect.clone()),
        estimates: Estimates::new(course.provision.clone()),
        decisions: 0,
        asked: vec![],
    };
    run.go(policy, seed);
    run.outcome(policy, seed)
}

impl Run<'_> {
    fn go(&mut self, policy: &dyn Policy, seed: u64) {
        let report_s = self.course.report_s;
        self.waver(seed);
        self.change();
        self.moment.settle(self.world, &self.now);
        let mut report = 1_u64;
        while self.now_s < self.course.duration_s {
            let report_at_s = report as f64 * report_s;
            let next_s = self.next_change_s().min(self.moves.next_end_s()).min(report_at_s);
            let next_s = next_s.clamp(self.now_s, self.course.duration_s);
            self.last(next_s - self.now_s);
            self.now_s = next_s;
            self.change();
            self.moves.end(next_s, &mut self.now, &mut self.snapshot.cluster);
            self.start();
            if next_s >= report_at_s {
                self.measure.interval(report_s);
                self.report(policy);
                report += 1;
                self.waver(seed);
            }
            self.moment.settle(self.world, &self.now);
        }
    }

    /// The moment lasts.
    fn last(&mut self, lasts_s: f64) {
        if lasts_s > 0.0 {
            self.measure.count(self.world, &self.moment, &self.now, lasts_s);
            self.snapshot.count(self.world, &self.moment, &self.now, lasts_s);
        }
    }

    fn next_change_s(&self) -> f64 {
        self.world.changes.get(self.next_change).map_or(f64::INFINITY, |change| change.at_s)
    }

    /// Changes what is due.
    fn change(&mut self) {
        while let Some(change) = self.world.changes.get(self.next_change) {
            if change.at_s > self.now_s {
                break;
            }
            match change.what {
                What::Factor(factor) => self.now.factor[change.guest] = factor,
                What::Needs(mib) => self.now.needed_mib[change.guest] = mib,
            }
            self.next_change += 1;
        }
    }

    /// Levels by the time of day, and noise.
    fn waver(&mut self, seed: u64) {
        for (at, guest) in self.world.guests.iter().enumerate() {
            let daily = &guest.daily;
            let mut level = 1.0;
            if daily.amplitude > 0.0 && daily.period_s > 0.0 {
                let turns = (self.now_s - daily.phase_s) / daily.period_s;
                level += daily.amplitude * (std::f64::consts::TAU * turns).sin();
            }
            if guest.noise > 0.0 {
                level *= 1.0 + guest.noise * noise(seed, at, self.turn);
            }
            self.now.level[at] = level.max(0.0);
        }
        self.turn += 1;
    }

    /// What agents would do at the end of an interval.
    fn report(&mut self, policy: &dyn Policy) {
        let Self { snapshot, world, now, moves, .. } = self;
        snapshot.report(world, now, self.course.report_s);
        moves.mark(&mut snapshot.cluster, self.now_s - self.course.report_s);
        self.estimates.observe(&mut snapshot.cluster, self.now_s);
        let hotspots = self.watch.observe(&snapshot.cluster, self.now_s);
        let drains = |host: usize| {
            world.machines[host].state == HostState::Draining && !now.guests[host].is_empty()
        };
        let is_asked = !hotspots.is_empty() || policy.anticipates();
        if !is_asked && !(0..world.machines.len()).any(drains) {
            return;
        }
        self.decisions += 1;
        let (cluster, limits) = (&snapshot.cluster, &self.course.limits);
        let problem = Problem { cluster, hotspots: &hotspots, limits, now_s: self.now_s };
        let plan = policy.plan(&problem);
        let is_new = self.asked.last().is_none_or(|last| last.notes != plan.notes);
        if (!plan.steps.is_empty() || is_new) && self.asked.len() < ASKED_MAX {
            let hotspots = hotspots.iter().map(|hotspot| hotspot.why.clone()).collect();
            self.asked.push(Asked { at_s: self.now_s, hotspots, notes: plan.notes.clone() });
        }
        self.moves.take(plan, self.now_s);
        self.start();
    }

    fn start(&mut self) {
        let (world, moment, now_s) = (self.world, &self.moment, self.now_s);
        let scene = Scene { world, moment, limits: &self.course.limits, now_s };
        // What began makes room in turn: memory that was taken back.
        while self.moves.start(&scene, &mut self.now, &self.snapshot.cluster) {}
    }

    fn outcome(self, policy: &dyn Policy, seed: u64) -> Outcome {
        let moves = self.moves;
        let course = self.course;
        Outcome {
            policy: policy.name().to_owned(),
            seed,
            wire_mib: moves.moved.iter().map(|moved| moved.wire_mib).sum(),
            downtime_ms: moves.moved.iter().map(|moved| moved.downtime_ms).sum(),
            ping_pongs: ping_pongs(&moves.moved),
            moves: moves.moved,
            resizes: moves.resized,
            refused: moves.refused,
            decisions: self.decisions,
            asked: self.asked,
            ..self.measure.outcome(self.world, course.duration_s, course.is_named)
        }
    }
}
