//! From figures to migrations, round after round.
//!
//! ```text
//!   report ─► published ─┐
//!   heard of others ─────┴► World ─► estimates, hotspots ─► plan for this host ─► steps, one after the other
//! ```
//!
//! An agent decides about its own host: its hotspots, and emptying it. Steps of its plan that other hosts' guests take
//! (swaps) are asked of their agents. Invariants: while the store cannot be used nothing is decided; while a plan is
//! carried out no other one is made; a step that fails ends the plan, and its guest is left alone for a while.

use std::sync::Arc;
use std::time::Duration;

use super::board::Heard;
use super::config::Config;
use super::sending;
use super::shared::Shared;
use super::world::World;
use crate::api::control::{ApiError, MoveRequest, ResizeRequest};
use crate::api::view::{MoveStage, PlanView, StepAction, StepState, StepView};
use crate::detect::Watch;
use crate::model::{HostIndex, HostState};
use crate::plan::{self, Action, Hotspot, Plan, Problem};
use crate::profile::HostReport;
use crate::provision::Estimates;

/// Time between two tries of a step that has to wait.
const AGAIN_AFTER: Duration = Duration::from_secs(1);

/// What is known over time.
#[derive(Debug)]
pub struct Eyes {
    watch: Watch,
    estimates: Estimates,
}

impl Eyes {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self {
            watch: Watch::new(config.detect.clone()),
            estimates: Estimates::new(config.provision.clone()),
        }
    }

    /// Looks at the cluster: what it is like, and all hotspots.
    pub fn look(
        &mut self,
        shared: &Shared,
        own: &HostReport,
        heard: &Heard,
    ) -> (World, Vec<Hotspot>) {
        let (config, now_s) = (shared.config(), shared.clock.now_s());
        let mut world = World::new(&config, own, heard, &shared.failed(), now_s);
        self.estimates.observe(&mut world.cluster, now_s);
        let since_s = now_s - config.profile.interval_s;
        let hotspots =
            world.as_of_migrations(heard, since_s, |cluster| self.watch.observe(cluster, now_s));
        (world, hotspots)
    }
}

/// Whether something is to be done about a host that cannot wait: it has a hotspot, or is to be emptied.
#[must_use]
pub fn is_urgent(world: &World, host: HostIndex, hotspots: &[Hotspot]) -> bool {
    let is_draining = world.cluster.host(host).state == HostState::Draining;
    let has_guests = || world.cluster.vms.iter().any(|vm| vm.host == host);
    hotspots.iter().any(|hotspot| hotspot.host == host) || (is_draining && has_guests())
}

/// What is to be done about a host: its hotspots, emptying it, and what its policy sees coming.
#[must_use]
pub fn plan_for(
    config: &Config,
    world: &World,
    host: &str,
    hotspots: &[Hotspot],
    now_s: f64,
) -> Plan {
    let Some(index) = world.host(host) else { return Plan::default() };
    let own: Vec<Hotspot> =
        hotspots.iter().filter(|hotspot| hotspot.host == index).cloned().collect();
    // The name was checked when the configuration was read.
    let Some(policy) = plan::policy(&config.policy.name) else { return Plan::default() };
    let has_reason = is_urgent(world, index, hotspots);
    if !has_reason && !policy.anticipates() {
        return Plan::default();
    }
    let problem =
        Problem { cluster: &world.cluster, hotspots: &own, limits: &config.limits, now_s };
    part_of(policy.plan(&problem), world, index, has_reason)
}

/// Of a plan what a host's own agent sees to: other hosts see to themselves, unless what is done there makes room for
/// this one.
fn part_of(mut plan: Plan, world: &World, host: HostIndex, has_reason: bool) -> Plan {
    let is_ours = |step: &plan::Step| match step.action {
        Action::Migrate { from, .. } => from == host,
        Action::Resize { vm, .. } => world.cluster.vm(vm).host == host,
    };
    let helps_us = has_reason && plan.steps.iter().any(is_ours);
    plan.steps.retain(|step| match step.action {
        Action::Migrate { from, .. } => {
            let is_draining = world.cluster.host(from).state == HostState::Draining;
            from == host || (helps_us && !is_draining)
        }
        Action::Resize { .. } => helps_us || is_ours(step),
    });
    if !has_reason {
        plan.notes.clear();
    }
    plan
}

/// A plan by names.
#[must_use]
pub fn shown(plan: &Plan, world: &World, policy: &str, now_s: f64) -> PlanView {
    let cluster = &world.cluster;
    let step = |step: &plan::Step| {
        let (vm, action) = match step.action {
            Action::Migrate { vm, from, to, cost } => {
                let [from, to] = [from, to].map(|host| cluster.host(host).name.clone());
                (vm, StepAction::Migrate { from, to, cost })
            }
            Action::Resize { vm, from_mib, to_mib } => {
                (vm, StepAction::Resize { from_mib, to_mib })
            }
        };
        StepView {
            guest: cluster.vm(vm).name.clone(),
            action,
            wave: step.wave,
            state: StepState::Planned,
            reason: step.reason.clone(),
            error: None,
        }
    };
    PlanView {
        at_s: now_s,
        policy: policy.into(),
        steps: plan.steps.iter().map(step).collect(),
        notes: plan.notes.clone(),
    }
}

/// What the policy would do now about every host, each as its own agent would decide.
#[must_use]
pub fn propose(config: &Config, world: &World, hotspots: &[Hotspot], now_s: f64) -> PlanView {
    let name = &config.policy.name;
    let mut all = PlanView { at_s: now_s, policy: name.clone(), ..PlanView::default() };
    let Some(policy) = plan::policy(name) else { return all };
    let (cluster, limits) = (&world.cluster, &config.limits);
    // For all hosts that nothing urges on it is the same plan.
    let foreseen = if policy.anticipates() {
        policy.plan(&Problem { cluster, hotspots: &[], limits, now_s })
    } else {
        Plan::default()
    };
    for (index, host) in cluster.hosts.iter().enumerate() {
        let index = HostIndex(index);
        let plan = if is_urgent(world, index, hotspots) {
            plan_for(config, world, &host.name, hotspots, now_s)
        } else {
            part_of(foreseen.clone(), world, index, false)
        };
        let view = shown(&plan, world, name, now_s);
        all.steps.extend(view.steps);
        all.notes.extend(view.notes);
    }
    all
}

/// Carries the plan out that [`Shared::plan`] shows.
pub async fn carry_out(shared: &Arc<Shared>) {
    let steps = shared.plan.lock().as_ref().map(|plan| plan.steps.clone()).unwrap_or_default();
    for (index, step) in steps.iter().enumerate() {
        set_state(shared, index, StepState::Running, None);
        match do_step(shared, step).await {
            Ok(()) => set_state(shared, index, StepState::Done, None),
            Err(why) => {
                tracing::warn!(guest = step.guest, why, "A step of the plan failed");
                set_state(shared, index, StepState::Failed, Some(why));
                for rest in index + 1..steps.len() {
                    let why = "given up: a step before it failed".to_owned();
                    set_state(shared, rest, StepState::Failed, Some(why));
                }
                let until_s = shared.clock.now_s() + shared.config().policy.retry_after_s;
                shared.failed.lock().insert(step.guest.clone(), until_s);
                return;
            }
        }
    }
}

fn set_state(shared: &Shared, index: usize, state: StepState, error: Option<String>) {
    let mut plan = shared.plan.lock();
    if let Some(step) = plan.as_mut().and_then(|plan| plan.steps.get_mut(index)) {
        (step.state, step.error) = (state, error);
    }
}

async fn do_step(shared: &Arc<Shared>, step: &StepView) -> Result<(), String> {
    match &step.action {
        StepAction::Migrate { from, to, .. } => move_guest(shared, step, from, to).await,
        StepAction::Resize { to_mib, .. } => resize(shared, &step.guest, *to_mib).await,
    }
}

/// Moves a guest from where it runs and waits for the end.
async fn move_guest(
    shared: &Arc<Shared>,
    step: &StepView,
    from: &str,
    to: &str,
) -> Result<(), String> {
    if from != shared.host {
        return ask_to_move(shared, step, from, to).await;
    }
    let begin = || sending::begin(shared, &step.guest, to, &step.reason);
    let record = wait_for_hosts(shared, begin).await?;
    let ended = sending::carry(shared, &record).await;
    ended.error.map_or(Ok(()), Err)
}

/// Tries as long as a host takes part in another migration.
async fn wait_for_hosts<T, F>(shared: &Arc<Shared>, work: impl Fn() -> F) -> Result<T, String>
where
    F: Future<Output = Result<T, ApiError>>,
{
    let until_s = shared.clock.now_s() + shared.config().policy.wait_s;
    loop {
        match work().await {
            Ok(done) => return Ok(done),
            Err(ApiError::Conflict { .. }) if is_busy(shared) && shared.clock.now_s() < until_s => {
                tokio::time::sleep(AGAIN_AFTER).await;
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

fn is_busy(shared: &Shared) -> bool {
    shared.board.with(|heard| !heard.claims.is_empty())
}

/// Has another host's agent move a guest, and waits until it has.
async fn ask_to_move(
    shared: &Arc<Shared>,
    step: &StepView,
    from: &str,
    to: &str,
) -> Result<(), String> {
    let api = shared.api_of(from).ok_or_else(|| format!("The agent of {from} is not there"))?;
    let (guest, reason) = (step.guest.clone(), step.reason.clone());
    let request = MoveRequest { guest, to: Some(to.into()), reason };
    let asked_s = shared.clock.now_s();
    wait_for_hosts(shared, || shared.client.begin_move(&api, Some(from), &request)).await?;
    loop {
        tokio::time::sleep(AGAIN_AFTER).await;
        let view =
            shared.client.state(&api, Some(from)).await.map_err(|error| error.to_string())?;
        let same = view.moves.iter().find(|one| one.guest == step.guest && one.to == to);
        match same.map(|one| (one.stage, one.error.clone())) {
            Some((MoveStage::Completed, _)) => return Ok(()),
            Some((MoveStage::Failed, why)) => return Err(why.unwrap_or_default()),
            Some(_) => {}
            None if shared.clock.now_s() - asked_s > shared.config().policy.wait_s => {
                return Err(format!("The agent of {from} does not know of the move any more"));
            }
            None => {}
        }
    }
}

/// Changes what a guest may use of its memory.
///
/// # Errors
/// Why that did not go, in words.
pub async fn resize(shared: &Arc<Shared>, guest: &str, to_mib: f64) -> Result<(), String> {
    let Some(socket) = shared.socket_of(guest) else {
        let world = shared.world();
        let vm = world.vm(guest).ok_or_else(|| format!("No guest is called {guest}"))?;
        let host = world.cluster.host(world.cluster.vm(vm).host).name.clone();
        let api = shared.api_of(&host).filter(|_| host != shared.host);
        let api = api.ok_or_else(|| format!("{guest} cannot be asked on {host}"))?;
        let asked = shared.client.resize(&api, Some(&host), guest, &ResizeRequest { to_mib }).await;
        return asked.map_err(|error| error.to_string());
    };
    if shared.left_alone.lock().contains_key(guest) {
        return Err(format!("{guest} is on its way; its memory is changed later"));
    }
    super::balloon::set(&socket, to_mib).await
}
