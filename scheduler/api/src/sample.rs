//! A cluster as an agent may tell it, and an agent that tells it and remembers what it was asked: for tests of what shows
//! and passes on.
//!
//! It holds what is hard to show: names that look like markup, a silent host, a hotspot, migrations in all stages.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::amounts::{Amounts, Resource};
use crate::control::{
    ApiError, Caller, Control, MoveAnswer, MoveRequest, ReceiveAnswer, ReceiveRequest,
    ResizeRequest,
};
use crate::figures::{GrayBox, GuestState, HostState, MigrationCost, Pressure};
use crate::view::{
    GuestView, HistoryPoint, HistoryView, HostView, HotspotView, MovePoint, MoveStage, MoveView,
    PlanView, StepAction, StepState, StepView, StoreView, TalkView, VERSION, View,
};

/// When the sample was taken, seconds since 1970.
pub const AT_S: f64 = 1_790_000_000.0;

/// The guest whose name looks like markup; it is the first one.
pub const MARKUP: &str = "<script>alert(1)</script>";

/// The host that was silent for two minutes: the last one.
#[must_use]
pub fn silent_host(hosts: usize) -> String {
    host_name(hosts.saturating_sub(1))
}

/// The name of a host by its place.
#[must_use]
pub fn host_name(index: usize) -> String {
    format!("host-{:03}", index + 1)
}

/// The name of a guest by its place.
#[must_use]
pub fn guest_name(index: usize) -> String {
    if index == 0 { MARKUP.to_owned() } else { format!("vm-{index:04}") }
}

/// A cluster of so many hosts (at least 3) and guests (at least 4), at a time.
#[must_use]
pub fn view(hosts: usize, guests: usize, at_s: f64) -> View {
    let (hosts, guests) = (hosts.max(3), guests.max(4));
    let guests: Vec<_> = (0..guests).map(|index| guest(index, hosts)).collect();
    View {
        v: VERSION,
        agent: host_name(0),
        at_s,
        interval_s: 5.0,
        policy: "godwit".into(),
        is_dry_run: false,
        store: StoreView { kind: "etcd".into(), trouble: None },
        hosts: (0..hosts).map(|index| host(index, hosts, &guests, at_s)).collect(),
        talks: (1..guests.len() / 2)
            .map(|index| TalkView {
                one: guest_name(2 * index),
                other: guest_name(2 * index + 1),
                mbit: 400.0 / index as f64,
            })
            .collect(),
        guests,
        hotspots: hotspots(at_s),
        moves: moves(at_s),
        plan: Some(plan(at_s)),
        remarks: vec![format!("{} says that it runs on two hosts", guest_name(3))],
    }
}

/// Figures between 0 and 1 that differ from place to place.
fn spread(index: usize, factor: usize) -> f64 {
    ((index * factor) % 101) as f64 / 100.0
}

fn guest(index: usize, hosts: usize) -> GuestView {
    let busy = spread(index, 37);
    let usage = Amounts {
        cpu_cores: 0.1 + 0.6 * busy,
        memory_mib: 1024.0 + 1024.0 * spread(index, 53),
        network_mbit: 40.0 * spread(index, 71),
        disk_mib: 10.0 * spread(index, 29),
    };
    GuestView {
        name: guest_name(index),
        host: host_name(index % hosts),
        state: if index % 97 == 96 { GuestState::Paused } else { GuestState::Running },
        is_migrating: index == 1,
        is_pinned: index == 2,
        priority: (index % 3) as u8,
        vcpus: 2,
        usage,
        peak: usage.times(1.2),
        steal: 0.05 * busy,
        memory_used_mib: 0.7 * usage.memory_mib,
        memory_needed_mib: 0.4 * usage.memory_mib,
        memory_max_mib: 2048.0,
        swap_writes_per_s: if index == 3 { 180.0 } else { 0.0 },
        gray_box: (index == 2).then_some(GrayBox {
            served_per_s: 120.0,
            response_s: 0.35,
            promised_response_s: 0.3,
            ..GrayBox::default()
        }),
    }
}

fn host(index: usize, hosts: usize, guests: &[GuestView], at_s: f64) -> HostView {
    let name = host_name(index);
    let is_silent = index + 1 == hosts;
    let mut used = Amounts { cpu_cores: 0.3, memory_mib: 900.0, ..Amounts::ZERO };
    for guest in guests.iter().filter(|guest| guest.host == name) {
        used += guest.usage;
    }
    let per_host = guests.len().div_ceil(hosts) as f64;
    let mut capacity = Amounts {
        cpu_cores: per_host + 1.0,
        memory_mib: 3072.0 * (per_host + 1.0),
        network_mbit: 1000.0,
        disk_mib: 400.0,
    };
    if index == 0 {
        capacity.cpu_cores = used.cpu_cores / 0.96;
    }
    HostView {
        api: (!is_silent).then(|| format!("10.0.{}.{}:7710", index / 250, index % 250 + 1)),
        state: match index {
            _ if is_silent => HostState::Silent,
            1 => HostState::Draining,
            _ => HostState::Active,
        },
        is_migrating: index < 2,
        heard_at_s: if is_silent { at_s - 120.0 } else { at_s - 2.0 },
        is_stale: is_silent,
        capacity,
        used,
        pressure: Pressure { cpu: if index == 0 { 0.4 } else { 0.01 }, ..Pressure::default() },
        troubles: if index == 1 { vec!["nftables cannot be read".into()] } else { Vec::new() },
        name,
    }
}

fn hotspots(at_s: f64) -> Vec<HotspotView> {
    vec![
        HotspotView {
            host: host_name(0),
            guest: None,
            resource: Resource::Cpu,
            current: 0.96,
            predicted: 0.98,
            threshold: 0.85,
            since_s: at_s - 15.0,
            ended_s: None,
            why: "CPU was above 85 % in 4 of 5 intervals and is expected to stay there".into(),
        },
        HotspotView {
            host: host_name(2),
            guest: Some(guest_name(3)),
            resource: Resource::Memory,
            current: 180.0,
            predicted: 170.0,
            threshold: 150.0,
            since_s: at_s - 300.0,
            ended_s: Some(at_s - 240.0),
            why: "The guest wrote 180 pages a second to its swap".into(),
        },
    ]
}

fn moves(at_s: f64) -> Vec<MoveView> {
    let moved = |guest: usize, stage, ended_s: Option<f64>| MoveView {
        guest: guest_name(guest),
        from: host_name(0),
        to: host_name(1),
        agent: host_name(0),
        reason: "relieves host-001 of CPU".into(),
        stage,
        began_s: at_s - 12.0,
        ended_s,
        curve: curve(at_s - 12.0),
        ..MoveView::default()
    };
    vec![
        moved(1, MoveStage::Moving, None),
        MoveView {
            downtime_ms: Some(42.0),
            wire_bytes: Some(700 << 20),
            began_s: at_s - 400.0,
            curve: curve(at_s - 400.0),
            ..moved(2, MoveStage::Completed, Some(at_s - 380.0))
        },
        MoveView {
            error: Some("The destination has no room for its memory".into()),
            began_s: at_s - 600.0,
            curve: Vec::new(),
            ..moved(3, MoveStage::Failed, Some(at_s - 598.0))
        },
    ]
}

/// A first round and two that shrink.
fn curve(began_s: f64) -> Vec<MovePoint> {
    (0..12_u32)
        .map(|tick| {
            let share = f64::from(tick) / 12.0;
            MovePoint {
                at_s: began_s + f64::from(tick),
                round: 1 + tick / 5,
                applied_bytes: (share * 1.1e9) as u64,
                expected_bytes: (1e9 + share * 2e8) as u64,
                rate_bytes_per_s: (tick > 0).then_some(9e7 + 1e7 * spread(tick as usize, 43)),
                predicted_ms: (tick > 3).then_some(400.0 * (1.0 - share)),
            }
        })
        .collect()
}

/// A plan of two migrations and a change of memory.
#[must_use]
pub fn plan(at_s: f64) -> PlanView {
    let step = |guest: usize, wave: u32, state, action| StepView {
        guest: guest_name(guest),
        action,
        wave,
        state,
        reason: "host-001 wants 0.9 cores more than it has".into(),
        error: None,
    };
    let cost = MigrationCost { wire_mib: 640.0, total_s: 11.0, downtime_ms: 35.0 };
    let migrate = |from: usize, to: usize| StepAction::Migrate {
        from: host_name(from),
        to: host_name(to),
        cost,
    };
    PlanView {
        at_s: at_s - 12.0,
        policy: "godwit".into(),
        steps: vec![
            step(3, 0, StepState::Done, StepAction::Resize { from_mib: 1024.0, to_mib: 1536.0 }),
            step(1, 0, StepState::Running, migrate(0, 1)),
            step(0, 1, StepState::Planned, migrate(0, 2)),
        ],
        notes: vec![format!("{} stays: it is pinned", guest_name(2))],
    }
}

/// A host's history: it rises to what it is now.
#[must_use]
pub fn history(host: &str, at_s: f64) -> HistoryView {
    let share =
        |cpu_cores| Amounts { cpu_cores, memory_mib: 0.5, network_mbit: 0.2, disk_mib: 0.1 };
    HistoryView {
        host: host.to_owned(),
        threshold: Amounts { cpu_cores: 0.85, memory_mib: 0.95, network_mbit: 0.8, disk_mib: 0.9 },
        points: (0..60_u32)
            .map(|tick| HistoryPoint {
                at_s: at_s - 5.0 * f64::from(59 - tick),
                share: share(0.3 + 0.66 * f64::from(tick) / 59.0),
            })
            .collect(),
        predicted: Some(share(0.98)),
    }
}

/// An agent that does nothing but remember.
#[derive(Debug)]
pub struct Remembering {
    view: Mutex<Arc<View>>,
    asked: Mutex<Vec<String>>,
    refusal: Mutex<Option<ApiError>>,
}

impl Remembering {
    /// Tells this.
    #[must_use]
    pub fn new(view: View) -> Self {
        Self {
            view: Mutex::new(Arc::new(view)),
            asked: Mutex::new(Vec::new()),
            refusal: Mutex::new(None),
        }
    }

    /// Tells something else from now on.
    pub fn set(&self, view: View) {
        *self.view.lock() = Arc::new(view);
    }

    /// Refuses everything from now on, or nothing.
    pub fn refuse(&self, refusal: Option<ApiError>) {
        *self.refusal.lock() = refusal;
    }

    /// What was asked to be done, by whom, in order.
    #[must_use]
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().clone()
    }

    fn remember(&self, caller: &Caller, what: &str) -> Result<(), ApiError> {
        self.asked.lock().push(format!("{}: {what}", caller.name));
        self.refusal.lock().clone().map_or(Ok(()), Err)
    }
}

impl Control for Remembering {
    fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.lock())
    }

    fn history(&self, host: &str) -> Option<HistoryView> {
        let view = self.view();
        let is_known = view.hosts.iter().any(|known| known.name == host);
        is_known.then(|| history(host, view.at_s))
    }

    fn metrics(&self) -> String {
        "# TYPE godwit_hosts gauge\ngodwit_hosts 3\n# EOF\n".into()
    }

    async fn propose(&self) -> Result<PlanView, ApiError> {
        Ok(plan(self.view().at_s))
    }

    async fn begin_move(
        &self,
        caller: &Caller,
        request: MoveRequest,
    ) -> Result<MoveAnswer, ApiError> {
        let MoveRequest { guest, to, reason } = request;
        self.remember(caller, &format!("move {guest} to {to:?} ({reason})"))?;
        let view = self.view();
        let found = view.guests.iter().find(|known| known.name == guest);
        let found =
            found.ok_or_else(|| ApiError::not_found(format!("There is no guest {guest:?}")))?;
        let from = found.host.clone();
        let to = to.unwrap_or_else(|| host_name(1));
        Ok(MoveAnswer { guest, agent: from.clone(), from, to })
    }

    async fn abort_move(&self, caller: &Caller, guest: &str) -> Result<(), ApiError> {
        self.remember(caller, &format!("abort {guest}"))
    }

    async fn drain(&self, caller: &Caller, host: &str, is_drained: bool) -> Result<(), ApiError> {
        let what = if is_drained { "drain" } else { "undrain" };
        self.remember(caller, &format!("{what} {host}"))
    }

    async fn receive(
        &self,
        caller: &Caller,
        request: ReceiveRequest,
    ) -> Result<ReceiveAnswer, ApiError> {
        self.remember(caller, &format!("receive {} {}", request.guest, request.uuid))?;
        Ok(ReceiveAnswer { addr: "127.0.0.1:7700".into() })
    }

    async fn stop_receiving(&self, caller: &Caller, guest: &str) -> Result<(), ApiError> {
        self.remember(caller, &format!("stop receiving {guest}"))
    }

    async fn resize(
        &self,
        caller: &Caller,
        guest: &str,
        request: ResizeRequest,
    ) -> Result<(), ApiError> {
        self.remember(caller, &format!("resize {guest} to {} MiB", request.to_mib))
    }

    async fn set_gray_box(
        &self,
        caller: &Caller,
        guest: &str,
        figures: GrayBox,
    ) -> Result<(), ApiError> {
        self.remember(caller, &format!("{guest} serves {}", figures.served_per_s))
    }
}
