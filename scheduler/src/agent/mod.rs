//! The agent of a host: sees, decides, moves; one runs on every host, and none is above the others.
//!
//! ```text
//!   Profiler ─► report ─► Publisher ─► store ─► Board ─┐
//!                   └──────────────────────────────────┴► Eyes ─► World, hotspots ─► plan ─► sending, balloon
//!   API ─► Asked ─► sending, arrivals, drains
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`config`], [`wishes`] | what it is told |
//! | [`publishing`], [`board`] | what it tells others, and hears of them |
//! | [`world`], [`history`] | what it makes of that |
//! | [`deciding`] | hotspots, plans, steps |
//! | [`sending`], [`moves`] | migrations from here |
//! | [`arrivals`] | migrations to here |
//! | [`records`], [`child`] | what outlives the agent: what was begun, and the engines |
//! | [`balloon`] | guests' memory |
//! | [`control`], [`metrics`] | what it is asked |
//! | [`shared`], [`clock`] | what its parts share |
//!
//! Invariants: the agent's death, and the store's, change nothing about guests: engines run on and end by their own
//! protocol; whatever an earlier agent began is picked up.

pub mod arrivals;
pub mod balloon;
pub mod board;
pub mod child;
pub mod clock;
pub mod config;
pub mod control;
pub mod deciding;
pub mod history;
pub mod metrics;
pub mod moves;
pub mod publishing;
pub mod records;
pub mod sending;
pub mod shared;
pub mod wishes;
pub mod world;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use transport::Identity;

use self::config::Config;
use self::deciding::Eyes;
use self::publishing::Publisher;
use self::records::Records;
use self::shared::Shared;
use crate::api::view::{MoveStage, MoveView, StoreView, VERSION, View};
use crate::model::HostState;
use crate::profile::{HostReport, Profiler};
use crate::store::AnyStore;

/// What an application said counts for so long, seconds.
const GRAY_BOX_AGE_MAX_S: f64 = 60.0;

/// An agent.
#[derive(Debug)]
pub struct Agent {
    shared: Arc<Shared>,
    profiler: Profiler,
    eyes: Eyes,
    publisher: Publisher,
    /// The plan that is carried out.
    carrying: Option<JoinHandle<()>>,
    orphans: BTreeMap<String, f64>,
    /// In how many rounds one after the other the policy wanted to move guests from here without a hotspot.
    foreseen: usize,
    began_s: f64,
}

impl Agent {
    /// One that has not begun.
    #[must_use]
    pub fn new(config: Config, identity: Arc<Identity>, store: AnyStore) -> Self {
        let profiler = Profiler::new(identity.name().to_owned(), config.profile.clone());
        let eyes = Eyes::new(&config);
        let shared = Arc::new(Shared::new(config, identity, store));
        Self {
            began_s: shared.clock.now_s(),
            shared,
            profiler,
            eyes,
            publisher: Publisher::default(),
            carrying: None,
            orphans: BTreeMap::new(),
            foreseen: 0,
        }
    }

    /// What it shares with those who ask it.
    #[must_use]
    pub fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// Runs until `stop` says so, then leaves. Migrations under way go on without it.
    pub async fn run(
        mut self,
        mut stop: watch::Receiver<bool>,
        mut told: watch::Receiver<Option<Config>>,
    ) {
        let listening = {
            let shared = self.shared();
            tokio::spawn(
                async move { shared.board.listen(shared.store.clone(), shared.clock).await },
            )
        };
        self.pick_up();
        loop {
            let began = tokio::time::Instant::now();
            self.round().await;
            let interval = Duration::from_secs_f64(self.shared.config().profile.interval_s);
            tokio::select! {
                () = tokio::time::sleep_until(began + interval) => {}
                _ = stop.wait_for(|stop| *stop) => break,
                Ok(()) = told.changed() => {
                    let config = told.borrow_and_update().clone();
                    if let Some(config) = config {
                        self.reload(config);
                    }
                }
            }
        }
        self.publisher.leave(&self.shared).await;
        listening.abort();
        if let Err(why) = self.profiler.end().await {
            tracing::warn!(why, "Counters of traffic stay");
        }
    }

    /// Whatever an earlier agent began is carried to its end.
    fn pick_up(&self) {
        let state = self.shared.config().state.clone();
        for record in Records::of_moves(&state).all::<sending::Record>() {
            let shared = self.shared();
            tracing::info!(
                guest = record.claim.vm,
                "A migration that an earlier agent began is picked up"
            );
            tokio::spawn(async move { sending::pick_up(&shared, &record).await });
        }
        for record in Records::of_arrivals(&state).all::<arrivals::Record>() {
            let shared = self.shared();
            tracing::info!(
                guest = record.guest,
                "A guest that an earlier agent expected is awaited"
            );
            tokio::spawn(async move { arrivals::watch(&shared, &record).await });
        }
    }

    fn reload(&mut self, config: Config) {
        self.eyes = Eyes::new(&config);
        self.profiler.set(config.profile.clone());
        self.shared.set_config(config);
    }

    async fn round(&mut self) {
        let report = self.report().await;
        let heard = self.shared.board.heard();
        let (world, hotspots) = self.eyes.look(&self.shared, &report, &heard);
        let now_s = self.shared.clock.now_s();
        self.shared.history.note(&world.cluster, now_s);
        let own = self.shared.host.clone();
        let shown = history::shown(&hotspots, &world.cluster);
        let (ours, _): (Vec<_>, Vec<_>) = shown.into_iter().partition(|one| one.host == own);
        let told = self.publisher.tell(&self.shared, &report, &ours).await;
        // Each agent knows best about its own host.
        let of_others = heard.hotspots.iter().filter(|(host, _)| **host != own);
        let all: Vec<_> = ours.iter().chain(of_others.flat_map(|(_, all)| all)).cloned().collect();
        self.shared.history.note_hotspots(&all, now_s);
        *self.shared.hotspots.lock() = hotspots;
        self.shared.set_world(world);
        let trouble = told.err().map(|error| error.to_string()).or_else(|| heard.trouble.clone());
        if trouble.is_none() {
            arrivals::end_orphans(&self.shared, &mut self.orphans).await;
            self.decide(now_s);
        }
        self.show(&heard, trouble);
    }

    async fn report(&mut self) -> HostReport {
        let left_alone = self.shared.left_alone.lock().values().cloned().collect();
        self.profiler.leave_alone(left_alone);
        let mut report = self.profiler.report().await;
        *self.shared.sockets.lock() = self.profiler.sockets();
        let now_s = self.shared.clock.now_s();
        let mut said = self.shared.gray_boxes.lock();
        said.retain(|_, (at_s, _)| now_s - *at_s < GRAY_BOX_AGE_MAX_S);
        for guest in &mut report.guests {
            guest.gray_box = said.get(&guest.name).map(|(_, figures)| *figures).or(guest.gray_box);
        }
        report
    }

    fn decide(&mut self, now_s: f64) {
        if self.carrying.as_ref().is_some_and(|carrying| !carrying.is_finished()) {
            return;
        }
        let (config, world) = (self.shared.config(), self.shared.world());
        let Some(host) = world.host(&self.shared.host) else { return };
        let cluster_host = world.cluster.host(host);
        if cluster_host.is_migrating || cluster_host.state == HostState::Silent {
            return;
        }
        let hotspots = self.shared.hotspots.lock().clone();
        let plan = deciding::plan_for(&config, &world, &self.shared.host, &hotspots, now_s);
        // What is only foreseen has to be so as often as figures have to be too high for a hotspot, and by peaks of a whole
        // window, of which a spike is a small part: it passes.
        let is_foreseen = !deciding::is_urgent(&world, host, &hotspots);
        self.foreseen =
            if is_foreseen && plan.moves().next().is_some() { self.foreseen + 1 } else { 0 };
        let has_seen_peaks = now_s - self.began_s >= config.provision.window_s;
        if self.foreseen > 0 && (self.foreseen < config.detect.k || !has_seen_peaks) {
            return;
        }
        if plan.steps.is_empty() && plan.notes.is_empty() {
            return;
        }
        let view = deciding::shown(&plan, &world, &config.policy.name, now_s);
        let mut shown = self.shared.plan.lock();
        match shown.as_mut().filter(|_| view.steps.is_empty()) {
            // What was done last stays in sight; why nothing more is done is said beside it.
            Some(last) => last.notes = view.notes,
            None => {
                for step in &view.steps {
                    tracing::info!(guest = step.guest, reason = step.reason, "Planned");
                }
                *shown = Some(view);
            }
        }
        drop(shown);
        if !config.policy.dry_run && !plan.steps.is_empty() {
            let shared = self.shared();
            self.carrying = Some(tokio::spawn(async move { deciding::carry_out(&shared).await }));
        }
    }

    fn show(&self, heard: &board::Heard, trouble: Option<String>) {
        let (config, world) = (self.shared.config(), self.shared.world());
        let mut moves = self.shared.moves.all();
        let elsewhere = heard.claims.values().filter(|claim| claim.agent != self.shared.host);
        moves.extend(elsewhere.map(|claim| MoveView {
            guest: claim.vm.clone(),
            from: claim.from.clone(),
            to: claim.to.clone(),
            agent: claim.agent.clone(),
            reason: claim.reason.clone(),
            stage: MoveStage::Moving,
            ..MoveView::default()
        }));
        moves.sort_by_key(|one| one.ended_s.is_some());
        let view = View {
            v: VERSION,
            agent: self.shared.host.clone(),
            at_s: self.shared.clock.now_s(),
            interval_s: config.profile.interval_s,
            policy: config.policy.name.clone(),
            is_dry_run: config.policy.dry_run,
            store: StoreView { kind: self.shared.store.kind().into(), trouble },
            hosts: world.hosts(heard),
            guests: world.guests(),
            talks: world.talks(),
            hotspots: self.shared.history.hotspots(),
            moves,
            plan: self.shared.plan.lock().clone(),
            remarks: world.remarks.clone(),
        };
        *self.shared.view.lock() = Arc::new(view);
    }
}
