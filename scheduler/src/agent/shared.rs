//! What the parts of an agent share.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use transport::Identity;

use super::board::Board;
use super::clock::Clock;
use super::config::Config;
use super::history::History;
use super::moves::Moves;
use super::world::World;
use crate::api::client::Client;
use crate::api::view::{PlanView, View};
use crate::model::GrayBox;
use crate::plan::Hotspot;
use crate::store::AnyStore;
use crate::store::claims::Claims;

/// All of it.
#[derive(Debug)]
pub struct Shared {
    /// This host's name.
    pub host: String,
    /// Its identity.
    pub identity: Arc<Identity>,
    /// Time.
    pub clock: Clock,
    /// The store.
    pub store: AnyStore,
    /// Who moves which guest.
    pub claims: Claims<AnyStore>,
    /// What others said.
    pub board: Board,
    /// Asks other agents.
    pub client: Client,
    /// Migrations from here.
    pub moves: Moves,
    /// How loads were of late.
    pub history: History,
    /// Monitors that an engine needs, by guest: nobody else asks them meanwhile.
    pub left_alone: Mutex<BTreeMap<String, PathBuf>>,
    /// Guests that are left alone after a move failed, and until when.
    pub failed: Mutex<BTreeMap<String, f64>>,
    /// What applications said, and when.
    pub gray_boxes: Mutex<BTreeMap<String, (f64, GrayBox)>>,
    /// Monitors of the guests here.
    pub sockets: Mutex<BTreeMap<String, PathBuf>>,
    /// The last plan.
    pub plan: Mutex<Option<PlanView>>,
    /// The hotspots that were seen last.
    pub hotspots: Mutex<Vec<Hotspot>>,
    /// What is shown.
    pub view: Mutex<Arc<View>>,
    config: RwLock<Arc<Config>>,
    world: Mutex<Arc<World>>,
}

impl Shared {
    /// With nothing known yet.
    pub fn new(config: Config, identity: Arc<Identity>, store: AnyStore) -> Self {
        Self {
            claims: Claims::new(store.clone(), identity.name()),
            host: identity.name().to_owned(),
            client: Client::new(Arc::clone(&identity)),
            identity,
            clock: Clock::start(),
            store,
            board: Board::default(),
            moves: Moves::default(),
            history: History::default(),
            left_alone: Mutex::default(),
            failed: Mutex::default(),
            gray_boxes: Mutex::default(),
            sockets: Mutex::default(),
            plan: Mutex::default(),
            hotspots: Mutex::default(),
            view: Mutex::default(),
            config: RwLock::new(Arc::new(config)),
            world: Mutex::default(),
        }
    }

    /// What it is told now.
    pub fn config(&self) -> Arc<Config> {
        Arc::clone(&self.config.read())
    }

    /// It is told something else.
    pub fn set_config(&self, config: Config) {
        *self.config.write() = Arc::new(config);
    }

    /// The cluster as it was seen last.
    pub fn world(&self) -> Arc<World> {
        Arc::clone(&self.world.lock())
    }

    /// It is seen anew.
    pub fn set_world(&self, world: World) {
        *self.world.lock() = Arc::new(world);
    }

    /// Where a host's agent is asked, if it is there.
    pub fn api_of(&self, host: &str) -> Option<String> {
        self.board.with(|heard| heard.agents.get(host).map(|agent| agent.api.clone()))
    }

    /// The monitor of a guest here.
    pub fn socket_of(&self, guest: &str) -> Option<PathBuf> {
        self.sockets.lock().get(guest).cloned()
    }

    /// Where engines remember unfinished migrations.
    pub fn journal(&self) -> PathBuf {
        self.config().state.join("journal")
    }

    /// Guests that are left alone because a move of theirs failed.
    pub fn failed(&self) -> BTreeSet<String> {
        let now_s = self.clock.now_s();
        let mut failed = self.failed.lock();
        failed.retain(|_, until_s| *until_s > now_s);
        failed.keys().cloned().collect()
    }
}
