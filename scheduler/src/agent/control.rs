//! What is asked of an agent over HTTP.

use std::sync::Arc;

use super::shared::Shared;
use super::{arrivals, balloon, deciding, metrics, sending};
use crate::api::control::{
    ApiError, Caller, Control, MoveAnswer, MoveRequest, ReceiveAnswer, ReceiveRequest,
    ResizeRequest,
};
use crate::api::view::{HistoryView, PlanView, View};
use crate::model::{GrayBox, HostIndex, Placement, VmIndex};
use crate::store::claims::ROOT;
use crate::store::{Change, Store};

/// An agent, as it is asked.
#[derive(Debug)]
pub struct Asked(pub Arc<Shared>);

impl Asked {
    /// Agents may, and those whom the configuration names.
    fn may_change(&self, caller: &Caller) -> Result<(), ApiError> {
        let config = self.0.config();
        let is_operator = config.operators.is_empty() || config.operators.contains(&caller.name);
        if is_operator || self.is_agent(caller) {
            return Ok(());
        }
        let what = format!(
            "{} may look only; `operators` in the agent's configuration names those who may ask for changes",
            caller.name
        );
        Err(ApiError::forbidden(what))
    }

    fn is_agent(&self, caller: &Caller) -> bool {
        caller.name == self.0.host
            || self.0.board.with(|heard| heard.agents.contains_key(&caller.name))
    }

    fn only_agents(&self, caller: &Caller) -> Result<(), ApiError> {
        if self.is_agent(caller) {
            return Ok(());
        }
        let what = format!("Only agents ask this, and no agent of {} is known", caller.name);
        Err(ApiError::forbidden(what))
    }

    fn find(&self, guest: &str) -> Result<(VmIndex, String), ApiError> {
        let world = self.0.world();
        let vm = world.vm(guest);
        let vm = vm.ok_or_else(|| ApiError::not_found(format!("No guest is called {guest}")))?;
        Ok((vm, world.cluster.host(world.cluster.vm(vm).host).name.clone()))
    }

    /// The host where a guest leaves most room.
    fn best_place(&self, vm: VmIndex) -> Result<String, ApiError> {
        let (world, config) = (self.0.world(), self.0.config());
        let placement = Placement::new(&world.cluster);
        let fullest_after = |host: HostIndex| {
            let change = placement.change(vm, host);
            let after = placement.usage(host) + change.destination_usage;
            let share = after.share_of(&world.cluster.host(host).capacity);
            let tightest = Placement::tightest(&share, &config.limits.share_max);
            share[tightest] / config.limits.share_max[tightest]
        };
        let mut places: Vec<(f64, HostIndex)> = world
            .cluster
            .host_indices()
            .filter(|host| placement.may_go(vm, *host).is_ok())
            .map(|host| (fullest_after(host), host))
            .filter(|(share, _)| *share <= 1.0)
            .collect();
        places.sort_by(|one, other| one.0.total_cmp(&other.0));
        let Some((_, host)) = places.first() else {
            let name = &world.cluster.vm(vm).name;
            let what =
                format!("No host has room for {name} and may have it; name one to hear why not");
            return Err(ApiError::conflict(what));
        };
        Ok(world.cluster.host(*host).name.clone())
    }
}

impl Control for Asked {
    fn view(&self) -> Arc<View> {
        Arc::clone(&self.0.view.lock())
    }

    fn history(&self, host: &str) -> Option<HistoryView> {
        let points = self.0.history.of(host)?;
        let detect = &self.0.config().detect;
        let (threshold, predicted) =
            (detect.threshold.shares(), super::history::predicted(&points, detect));
        Some(HistoryView { host: host.into(), threshold, points, predicted })
    }

    fn metrics(&self) -> String {
        metrics::text(&self.view())
    }

    async fn propose(&self) -> Result<PlanView, ApiError> {
        let (world, config) = (self.0.world(), self.0.config());
        let hotspots = self.0.hotspots.lock().clone();
        let now_s = self.0.clock.now_s();
        // Planning for a large cluster takes a processor for a while.
        let planned = tokio::task::spawn_blocking(move || {
            deciding::propose(&config, &world, &hotspots, now_s)
        });
        planned.await.map_err(|error| ApiError::unavailable(error.to_string()))
    }

    async fn begin_move(
        &self,
        caller: &Caller,
        request: MoveRequest,
    ) -> Result<MoveAnswer, ApiError> {
        self.may_change(caller)?;
        let (vm, from) = self.find(&request.guest)?;
        let to = match request.to.clone() {
            Some(to) => to,
            None => self.best_place(vm)?,
        };
        let reason = match request.reason.as_str() {
            "" => format!("{} asked for it", caller.name),
            reason => reason.chars().filter(|letter| !letter.is_control()).take(512).collect(),
        };
        if from != self.0.host {
            let api = self.0.api_of(&from).ok_or_else(|| {
                ApiError::unavailable(format!(
                    "The agent of {from} is not there; {} runs on",
                    request.guest
                ))
            })?;
            let request = MoveRequest { to: Some(to), reason, ..request };
            return self.0.client.begin_move(&api, Some(&from), &request).await;
        }
        let record = sending::begin(&self.0, &request.guest, &to, &reason).await?;
        let shared = Arc::clone(&self.0);
        tokio::spawn(async move { sending::carry(&shared, &record).await });
        Ok(MoveAnswer { guest: request.guest, from: from.clone(), to, agent: from })
    }

    async fn abort_move(&self, caller: &Caller, guest: &str) -> Result<(), ApiError> {
        self.may_change(caller)?;
        if self.0.moves.abort(guest) {
            return Ok(());
        }
        let agent =
            self.0.board.with(|heard| heard.claims.get(guest).map(|claim| claim.agent.clone()));
        let agent = agent.filter(|agent| *agent != self.0.host);
        let agent =
            agent.ok_or_else(|| ApiError::not_found(format!("{guest} is not being moved")))?;
        let api = self.0.api_of(&agent).ok_or_else(|| {
            ApiError::unavailable(format!(
                "The agent of {agent}, which moves {guest}, is not there"
            ))
        })?;
        self.0.client.abort_move(&api, Some(&agent), guest).await
    }

    async fn drain(&self, caller: &Caller, host: &str, is_drained: bool) -> Result<(), ApiError> {
        self.may_change(caller)?;
        if self.0.world().host(host).is_none() {
            return Err(ApiError::not_found(format!("No host is called {host}")));
        }
        let key = format!("{ROOT}drained/{host}");
        let change = match is_drained {
            true => Change::Put { key, value: vec![], lease: None },
            false => Change::Delete(key),
        };
        let done = self.0.store.commit(&[], &[change]).await;
        done.map(|_| ()).map_err(|error| ApiError::unavailable(error.to_string()))
    }

    async fn receive(
        &self,
        caller: &Caller,
        request: ReceiveRequest,
    ) -> Result<ReceiveAnswer, ApiError> {
        self.only_agents(caller)?;
        arrivals::receive(&self.0, &caller.name, &request).await
    }

    async fn stop_receiving(&self, caller: &Caller, guest: &str) -> Result<(), ApiError> {
        self.only_agents(caller)?;
        arrivals::stop(&self.0, guest)
    }

    async fn resize(
        &self,
        caller: &Caller,
        guest: &str,
        request: ResizeRequest,
    ) -> Result<(), ApiError> {
        self.may_change(caller)?;
        let socket = self.0.socket_of(guest).ok_or_else(|| {
            ApiError::not_found(format!("{guest} does not run on {}", self.0.host))
        })?;
        if self.0.left_alone.lock().contains_key(guest) {
            return Err(ApiError::conflict(format!("{guest} is on its way")));
        }
        let done = balloon::set(&socket, request.to_mib).await;
        done.map_err(ApiError::unavailable)
    }

    async fn set_gray_box(
        &self,
        _caller: &Caller,
        guest: &str,
        figures: GrayBox,
    ) -> Result<(), ApiError> {
        let (_, host) = self.find(guest)?;
        if host != self.0.host {
            let what = format!("{guest} runs on {host}: tell its agent");
            return Err(ApiError::not_found(what));
        }
        if !crate::profile::report::is_possible(&figures) {
            let what = "Figures are finite, not negative, and no larger than 1e12";
            return Err(ApiError::bad_request(what));
        }
        self.0.gray_boxes.lock().insert(guest.into(), (self.0.clock.now_s(), figures));
        Ok(())
    }
}
