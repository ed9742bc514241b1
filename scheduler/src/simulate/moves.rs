//! Plans become true: memory changes at once, migrations take time, bytes, CPU and network.
//!
//! A host takes part in one migration at a time; what comes later waits its turn. A step begins when those of the plan's
//! earlier waves have ended. What cannot be done any more is refused, and with it the later waves of its plan.
//!
//! Invariants: a guest that moves counts at its source until the end, and has its memory at both; no host is ever given
//! more guest memory than it has.

use super::moment::{Moment, Settings};
use super::outcome::{Moved, Refused, Resized};
use super::world::World;
use crate::cost;
use crate::model::{Amounts, Cluster, HostIndex, HostState, LastMove, VmIndex};
use crate::plan::{Action, Limits, Plan, Step};

/// A step that has waited for longer is given up: what it was planned for is long gone.
const WAITS_S_MAX: f64 = 300.0;

/// Share of the link that a migration gets even where guests would fill it.
const LINK_SHARE_MIN: f64 = 0.25;

/// A step that has not begun.
#[derive(Debug)]
struct Waiting {
    plan: usize,
    since_s: f64,
    step: Step,
}

/// A migration in progress.
#[derive(Debug)]
struct Running {
    plan: usize,
    wave: u32,
    vm: usize,
    to: usize,
    source: Amounts,
    target: Amounts,
    /// Its place in [`Moves::moved`].
    record: usize,
    end_s: f64,
}

/// All that was planned, is done and was done.
#[derive(Debug)]
pub(super) struct Moves {
    waiting: Vec<Waiting>,
    running: Vec<Running>,
    plans: usize,
    /// Hosts of migrations that have ended, and when.
    ended: Vec<(usize, f64)>,
    /// CPU of the engine at either end, cores for a Mbit/s.
    cores_per_mbit: f64,
    /// Those that began; what has not ended yet has an end in the future.
    pub(super) moved: Vec<Moved>,
    pub(super) resized: Vec<Resized>,
    pub(super) refused: Vec<Refused>,
}

/// What starting needs to know.
#[derive(Debug)]
pub(super) struct Scene<'a> {
    pub(super) world: &'a World,
    pub(super) moment: &'a Moment,
    pub(super) limits: &'a Limits,
    pub(super) now_s: f64,
}

impl Moves {
    pub(super) const fn new(cores_per_mbit: f64) -> Self {
        Self {
            waiting: vec![],
            running: vec![],
            plans: 0,
            ended: vec![],
            cores_per_mbit,
            moved: vec![],
            resized: vec![],
            refused: vec![],
        }
    }

    /// Takes a plan over.
    pub(super) fn take(&mut self, plan: Plan, now_s: f64) {
        self.plans += 1;
        let plan_number = self.plans;
        let wait = |step| Waiting { plan: plan_number, since_s: now_s, step };
        self.waiting.extend(plan.steps.into_iter().map(wait));
    }

    /// When the next migration ends.
    pub(super) fn next_end_s(&self) -> f64 {
        self.running.iter().map(|running| running.end_s).fold(f64::INFINITY, f64::min)
    }

    /// Ends what is due.
    pub(super) fn end(&mut self, now_s: f64, now: &mut Settings, cluster: &mut Cluster) {
        let mut at = 0;
        while let Some(running) = self.running.get(at) {
            if running.end_s > now_s {
                at += 1;
                continue;
            }
            let running = self.running.remove(at);
            let from = now.at[running.vm];
            self.ended.extend([(from, now_s), (running.to, now_s)]);
            now.engine[from] = less(now.engine[from], running.source);
            now.engine[running.to] = less(now.engine[running.to], running.target);
            now.go(running.vm, running.to);
            let vm = &mut cluster.vms[running.vm];
            vm.host = HostIndex(running.to);
            vm.last_move = Some(LastMove { at_s: now_s, from: HostIndex(from) });
            if let Some(moved) = self.moved.get_mut(running.record) {
                moved.is_done = true;
            }
        }
    }

    /// Marks who takes part in what is done or planned. A host that took part in a migration since `since_s` is marked,
    /// too: its figures of that time are no one's load.
    pub(super) fn mark(&mut self, cluster: &mut Cluster, since_s: f64) {
        self.ended.retain(|(_, ended_s)| *ended_s > since_s);
        cluster.hosts.iter_mut().for_each(|host| host.is_migrating = false);
        cluster.vms.iter_mut().for_each(|vm| vm.is_migrating = false);
        let waiting = self.waiting.iter().filter_map(|waiting| match waiting.step.action {
            Action::Migrate { vm, from, to, .. } => Some((vm.0, from.0, to.0)),
            Action::Resize { .. } => None,
        });
        let running = self.running.iter().map(|run| (run.vm, cluster.vms[run.vm].host.0, run.to));
        let all: Vec<_> = waiting.chain(running).collect();
        for (host, _) in &self.ended {
            cluster.hosts[*host].is_migrating = true;
        }
        for (vm, from, to) in all {
            if let Some(vm) = cluster.vms.get_mut(vm) {
                vm.is_migrating = true;
            }
            for host in [from, to] {
                if let Some(host) = cluster.hosts.get_mut(host) {
                    host.is_migrating = true;
                }
            }
        }
    }

    /// Begins what can begin. Whether anything changed is returned.
    pub(super) fn start(
        &mut self,
        scene: &Scene<'_>,
        now: &mut Settings,
        cluster: &Cluster,
    ) -> bool {
        let mut changed = false;
        let mut waiting = std::mem::take(&mut self.waiting);
        let mut left: Vec<Waiting> = vec![];
        let mut failed: Vec<(usize, u32)> = vec![];
        for item in waiting.drain(..) {
            let (plan, wave) = (item.plan, item.step.wave);
            if failed.iter().any(|(other, from)| *other == plan && *from < wave) {
                self.refuse(&item, scene.now_s, cluster, "a step before it failed");
                continue;
            }
            let before = |other: (usize, u32)| other.0 == plan && other.1 < wave;
            if left.iter().any(|other| before((other.plan, other.step.wave)))
                || self.running.iter().any(|other| before((other.plan, other.wave)))
            {
                left.push(item);
                continue;
            }
            match self.begin(&item, scene, now, cluster) {
                Ok(true) => changed = true,
                Ok(false) if scene.now_s - item.since_s < WAITS_S_MAX => left.push(item),
                Ok(false) => {
                    self.refuse(&item, scene.now_s, cluster, "it waited for too long");
                    failed.push((plan, wave));
                }
                Err(why) => {
                    self.refuse(&item, scene.now_s, cluster, why);
                    failed.push((plan, wave));
                }
            }
        }
        self.waiting = left;
        changed
    }

    fn refuse(&mut self, item: &Waiting, at_s: f64, cluster: &Cluster, why: &str) {
        let vm = match item.step.action {
            Action::Migrate { vm, .. } | Action::Resize { vm, .. } => vm,
        };
        let vm = cluster.vms.get(vm.0).map_or_else(String::new, |vm| vm.name.clone());
        self.refused.push(Refused { at_s, vm, why: why.to_owned() });
    }

    /// Begins a step; `false`: not yet.
    fn begin(
        &mut self,
        item: &Waiting,
        scene: &Scene<'_>,
        now: &mut Settings,
        cluster: &Cluster,
    ) -> Result<bool, &'static str> {
        match item.step.action {
            Action::Resize { vm, to_mib, .. } => {
                self.resize(vm, to_mib, &item.step.reason, scene, now)
            }
            Action::Migrate { vm, from, to, .. } => {
                self.migrate(item, (vm, from, to), scene, now, cluster)
            }
        }
    }

    fn resize(
        &mut self,
        vm: VmIndex,
        to_mib: f64,
        reason: &str,
        scene: &Scene<'_>,
        now: &mut Settings,
    ) -> Result<bool, &'static str> {
        let guest = scene.world.guests.get(vm.0).ok_or("there is no such guest")?;
        if self.running.iter().any(|running| running.vm == vm.0) {
            return Err("it is on its way");
        }
        let from_mib = now.allocated_mib[vm.0];
        let most = from_mib + room_mib(scene.world, now, now.at[vm.0]);
        let least = guest.reserve_mib.min(guest.max_mib);
        let to_mib = to_mib.clamp(least, guest.max_mib).min(most);
        if !to_mib.is_finite() || (to_mib - from_mib).abs() < 1e-6 {
            return Err("there is no room for more memory");
        }
        now.allocated_mib[vm.0] = to_mib;
        let (vm, reason) = (guest.name.clone(), reason.to_owned());
        self.resized.push(Resized { at_s: scene.now_s, vm, from_mib, to_mib, reason });
        Ok(true)
    }

    fn migrate(
        &mut self,
        item: &Waiting,
        (vm, from, to): (VmIndex, HostIndex, HostIndex),
        scene: &Scene<'_>,
        now: &mut Settings,
        cluster: &Cluster,
    ) -> Result<bool, &'static str> {
        let world = scene.world;
        let guest = world.guests.get(vm.0).ok_or("there is no such guest")?;
        let target = world.machines.get(to.0).ok_or("there is no such host")?;
        if now.at[vm.0] != from.0 || from == to {
            return Err("it is not where the plan thinks");
        }
        if target.state != HostState::Active {
            return Err("the host takes no guests");
        }
        let is_busy = |running: &Running| {
            let hosts = [now.at[running.vm], running.to];
            running.vm == vm.0 || hosts.contains(&from.0) || hosts.contains(&to.0)
        };
        if self.running.iter().any(is_busy) {
            return Ok(false);
        }
        let memory_mib = now.allocated_mib[vm.0];
        if room_mib(world, now, to.0) < memory_mib {
            return Err("there is too little memory at the destination");
        }
        let link_mbit = link_mbit(scene, from.0, to.0);
        let cost = cost::predict(cluster.vm(vm), link_mbit);
        let total_s = cost.total_s.clamp(0.1, 86_400.0);
        let rate_mbit = (cost.wire_mib * 8.0 * 1.048_576 / total_s).min(link_mbit);
        let load = Amounts {
            cpu_cores: rate_mbit * self.cores_per_mbit,
            network_mbit: rate_mbit,
            ..Amounts::ZERO
        };
        let load_target = Amounts { memory_mib, ..load };
        now.engine[from.0] += load;
        now.engine[to.0] += load_target;
        self.running.push(Running {
            plan: item.plan,
            wave: item.step.wave,
            vm: vm.0,
            to: to.0,
            source: load,
            target: load_target,
            record: self.moved.len(),
            end_s: scene.now_s + total_s,
        });
        self.moved.push(Moved {
            at_s: scene.now_s,
            end_s: scene.now_s + total_s,
            vm: guest.name.clone(),
            from: world.machines[from.0].name.clone(),
            to: target.name.clone(),
            wire_mib: cost.wire_mib,
            downtime_ms: cost.downtime_ms,
            is_done: false,
            reason: item.step.reason.clone(),
        });
        Ok(true)
    }
}

/// Rounding leaves no debts.
fn less(amounts: Amounts, other: Amounts) -> Amounts {
    (amounts - other).max(&Amounts::ZERO)
}

/// Memory of a host that is nobody's.
fn room_mib(world: &World, now: &Settings, host: usize) -> f64 {
    let machine = &world.machines[host];
    let guests: f64 = now.guests[host].iter().map(|guest| now.allocated_mib[*guest]).sum();
    let own = machine.own.memory_mib + now.engine[host].memory_mib;
    (machine.capacity.memory_mib - own - guests).max(0.0)
}

/// What a migration gets of both hosts' networks.
fn link_mbit(scene: &Scene<'_>, from: usize, to: usize) -> f64 {
    let free = |host: usize| {
        let has = scene.world.machines[host].capacity.network_mbit;
        (has - scene.moment.hosts[host].used.network_mbit).max(LINK_SHARE_MIN * has)
    };
    free(from).min(free(to)).min(scene.limits.link_mbit).max(1.0)
}
