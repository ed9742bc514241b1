//! What is shown of a cluster, as words. Names and reasons are from guests and hosts: what could steer a terminal is
//! taken out.

use std::cmp::Ordering;

use scheduler_api::amounts::{Amounts, Resource};
use scheduler_api::figures::{GuestState, HostState};
pub(super) use scheduler_api::text::clean;
use scheduler_api::view::{
    GuestView, HostView, HotspotView, MoveStage, MoveView, PlanView, StepAction, StepState, View,
};

/// Thresholds above this are no shares but figures of their own: swap writes, seconds.
const SHARE_MAX: f64 = 1.5;

/// A host.
#[derive(Debug, PartialEq)]
pub(super) struct HostRow {
    pub(super) name: String,
    /// Of what it has; nothing where that is not known.
    pub(super) shares: [Option<f64>; 4],
    pub(super) guests: usize,
    pub(super) notes: String,
    pub(super) is_hot: bool,
    pub(super) is_stale: bool,
}

/// Titles of the guests' columns, in the order of [`GuestColumn`].
pub(super) const GUEST_TITLES: [&str; 9] =
    ["guest", "host", "CPU", "waits", "uses", "may use", "Mbit/s", "MiB/s", "state"];

/// Titles of the hotspots' columns.
pub(super) const HOTSPOT_TITLES: [&str; 7] =
    ["host", "what", "now", "expected", "limit", "since", "why"];

/// Titles of the migrations' columns.
pub(super) const MOVE_TITLES: [&str; 6] = ["guest", "from", "to", "state", "progress", "remarks"];

/// Titles of the plan's columns.
pub(super) const PLAN_TITLES: [&str; 6] = ["wave", "guest", "what", "expected", "state", "why"];

/// By what guests are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GuestColumn {
    Name,
    Host,
    Cpu,
    Steal,
    Used,
    Allocated,
    Network,
    Disk,
    State,
}

impl GuestColumn {
    pub(super) const ALL: [Self; 9] = [
        Self::Name,
        Self::Host,
        Self::Cpu,
        Self::Steal,
        Self::Used,
        Self::Allocated,
        Self::Network,
        Self::Disk,
        Self::State,
    ];

    /// Names from the first on, figures from the largest on.
    fn compare(self, one: &GuestView, other: &GuestView) -> Ordering {
        let larger = |figure: fn(&GuestView) -> f64| figure(other).total_cmp(&figure(one));
        match self {
            Self::Name => one.name.cmp(&other.name),
            Self::Host => one.host.cmp(&other.host),
            Self::Cpu => larger(|guest| guest.usage.cpu_cores),
            Self::Steal => larger(|guest| guest.steal),
            Self::Used => larger(|guest| guest.memory_used_mib),
            Self::Allocated => larger(|guest| guest.usage.memory_mib),
            Self::Network => larger(|guest| guest.usage.network_mbit),
            Self::Disk => larger(|guest| guest.usage.disk_mib),
            Self::State => state(one).cmp(&state(other)),
        }
    }
}

/// Where all is from.
pub(super) fn head(view: &View) -> String {
    let View { agent, policy, store, hosts, guests, .. } = view;
    let (hosts, guests) = (hosts.len(), guests.len());
    clean(&format!(
        "agent of {agent}, policy {policy}, store {}: {hosts} hosts, {guests} guests",
        store.kind
    ))
}

/// What must not be overlooked.
pub(super) fn warnings(view: &View) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Some(trouble) = &view.store.trouble {
        warnings.push(format!(
            "The store cannot be used: {trouble}; nothing is decided, guests run on"
        ));
    }
    if view.is_dry_run {
        warnings.push("Dry run: plans are only shown".to_owned());
    }
    let silent: Vec<_> =
        view.hosts.iter().filter(|host| host.is_stale).map(|host| host.name.as_str()).collect();
    if !silent.is_empty() {
        let names = silent.iter().take(8).copied().collect::<Vec<_>>().join(", ");
        let more = match silent.len().saturating_sub(8) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        warnings.push(format!("Silent, with old figures: {names}{more}"));
    }
    warnings.iter().map(|text| clean(text)).collect()
}

pub(super) fn hosts(view: &View) -> Vec<HostRow> {
    let is_hot =
        |name: &str| view.hotspots.iter().any(|spot| spot.ended_s.is_none() && spot.host == name);
    let row = |host: &HostView| HostRow {
        name: clean(&host.name),
        shares: shares(&host.used, &host.capacity),
        guests: view.guests.iter().filter(|guest| guest.host == host.name).count(),
        notes: host_notes(host, view.at_s),
        is_hot: is_hot(&host.name),
        is_stale: host.is_stale,
    };
    view.hosts.iter().map(row).collect()
}

fn shares(used: &Amounts, capacity: &Amounts) -> [Option<f64>; 4] {
    Resource::ALL
        .map(|resource| (capacity[resource] > 0.0).then(|| used[resource] / capacity[resource]))
}

fn host_notes(host: &HostView, now_s: f64) -> String {
    let mut notes = Vec::new();
    if host.is_stale || host.state == HostState::Silent {
        notes.push(format!("silent for {}", span(now_s - host.heard_at_s)));
    }
    if host.state == HostState::Draining {
        notes.push("draining".to_owned());
    }
    if host.is_migrating {
        notes.push("migrating".to_owned());
    }
    notes.extend(host.troubles.first().map(|trouble| clean(trouble)));
    notes.join(", ")
}

/// In order of a column, or the other way round.
pub(super) fn guests(view: &View, by: GuestColumn, is_reversed: bool) -> Vec<[String; 9]> {
    let mut guests: Vec<_> = view.guests.iter().collect();
    guests.sort_by(|one, other| {
        let order = by.compare(one, other);
        let order = if is_reversed { order.reverse() } else { order };
        order.then_with(|| one.name.cmp(&other.name))
    });
    guests.into_iter().map(guest).collect()
}

fn guest(guest: &GuestView) -> [String; 9] {
    [
        clean(&guest.name),
        clean(&guest.host),
        format!("{:.2}", guest.usage.cpu_cores),
        percent(guest.steal),
        mib(guest.memory_used_mib),
        mib(guest.usage.memory_mib),
        format!("{:.1}", guest.usage.network_mbit),
        format!("{:.1}", guest.usage.disk_mib),
        state(guest),
    ]
}

fn state(guest: &GuestView) -> String {
    let mut words = vec![match guest.state {
        GuestState::Running => "running",
        GuestState::Paused => "paused",
        GuestState::Incoming => "incoming",
    }];
    if guest.is_migrating {
        words.push("migrating");
    }
    if guest.is_pinned {
        words.push("pinned");
    }
    words.join(", ")
}

pub(super) fn hotspots(view: &View) -> Vec<[String; 7]> {
    view.hotspots.iter().map(|spot| hotspot(spot, view.at_s)).collect()
}

fn hotspot(spot: &HotspotView, now_s: f64) -> [String; 7] {
    let figure = |value: f64| {
        if spot.threshold <= SHARE_MAX { percent(value) } else { format!("{value:.1}") }
    };
    let host = match &spot.guest {
        Some(guest) => clean(&format!("{} ({guest})", spot.host)),
        None => clean(&spot.host),
    };
    let since = match spot.ended_s {
        Some(ended_s) => format!("gone for {}", span(now_s - ended_s)),
        None => span(now_s - spot.since_s),
    };
    [
        host,
        spot.resource.name().to_owned(),
        figure(spot.current),
        figure(spot.predicted),
        figure(spot.threshold),
        since,
        clean(&spot.why),
    ]
}

/// How far a migration is, 0 to 1.
pub(super) fn progress(moved: &MoveView) -> Option<f64> {
    let last = moved.curve.last()?;
    let share = last.applied_bytes as f64 / last.expected_bytes as f64;
    share.is_finite().then(|| share.clamp(0.0, 1.0))
}

pub(super) fn moves(view: &View) -> Vec<[String; 6]> {
    view.moves.iter().map(|moved| one_move(moved, view.at_s)).collect()
}

fn one_move(moved: &MoveView, now_s: f64) -> [String; 6] {
    let stage = match moved.stage {
        MoveStage::Preparing => "preparing",
        MoveStage::Moving => "moving",
        MoveStage::Completed => "completed",
        MoveStage::Failed => "failed",
        MoveStage::InDoubt => "in doubt",
    };
    let took_s = moved.ended_s.unwrap_or(now_s) - moved.began_s;
    let progress = match (moved.ended_s, progress(moved)) {
        (None, Some(share)) => format!("{} {}", bar(share, 10), percent(share)),
        (None, None) => String::new(),
        (Some(_), _) => moved.wire_bytes.map_or_else(String::new, |bytes| {
            format!("{} sent", mib(bytes as f64 / f64::from(1 << 20)))
        }),
    };
    let mut remarks = Vec::new();
    remarks.extend(moved.downtime_ms.map(|pause| format!("pause {pause:.0} ms")));
    remarks.extend(moved.error.clone());
    remarks.push(moved.reason.clone());
    [
        clean(&moved.guest),
        clean(&moved.from),
        clean(&moved.to),
        format!("{stage} {}", span(took_s)),
        progress,
        clean(&remarks.join("; ")),
    ]
}

pub(super) fn plan(plan: &PlanView) -> Vec<[String; 6]> {
    let row = |step: &scheduler_api::view::StepView| {
        let (what, expected) = match &step.action {
            StepAction::Migrate { from, to, cost } => {
                let (sent, total) = (mib(cost.wire_mib), span(cost.total_s));
                let pause = cost.downtime_ms;
                (format!("{from} → {to}"), format!("{total}, {sent}, pause {pause:.0} ms"))
            }
            StepAction::Resize { from_mib, to_mib } => {
                (format!("memory {} → {}", mib(*from_mib), mib(*to_mib)), String::new())
            }
        };
        let state = match step.state {
            StepState::Planned => "planned",
            StepState::Running => "running",
            StepState::Done => "done",
            StepState::Failed => "failed",
        };
        [
            (u64::from(step.wave) + 1).to_string(),
            clean(&step.guest),
            clean(&what),
            expected,
            state.to_owned(),
            clean(step.error.as_ref().unwrap_or(&step.reason)),
        ]
    };
    plan.steps.iter().map(row).collect()
}

/// A bar of so many characters.
pub(super) fn bar(share: f64, width: usize) -> String {
    let full = (share.clamp(0.0, 1.0) * width as f64).round() as usize;
    "█".repeat(full) + &"░".repeat(width.saturating_sub(full))
}

pub(super) fn percent(share: f64) -> String {
    if share.is_finite() { format!("{:.0}%", share * 100.0) } else { "?".to_owned() }
}

fn mib(mib: f64) -> String {
    if mib.abs() >= 10_240.0 { format!("{:.1} GiB", mib / 1024.0) } else { format!("{mib:.0} MiB") }
}

/// A time in words.
pub(super) fn span(seconds: f64) -> String {
    // What is not known, or in the future since clocks differ, counts as now.
    let seconds = seconds.max(0.0) as u64;
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}
