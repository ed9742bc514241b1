//! Hotspots out of series of figures.
//!
//! ```text
//!   snapshot ─► figures of hosts and guests ─► series of each ─► k of n, AR(1) ─┐
//!                                                  └───────────► CUSUM, EWMA ───┴─► hotspots, the worst first
//! ```
//!
//! | module | what it decides or holds |
//! |---|---|
//! | [`settings`] | what is too much, and when it is believed |
//! | [`threshold`] | k of n figures above, and the next one expected there |
//! | [`level`] | a level that has risen and is too high |
//! | [`words`] | why, for people |
//!
//! What is looked at: of a host its CPU, memory, network and disk as shares of what it has; of a guest what it writes to
//! its swap, how long it waits for processors, and what its application says of itself. A resource of which a host is
//! said to have nothing is not known, and not judged.
//!
//! Invariants: what a host in a migration does is neither judged nor remembered, since the migration itself is in the
//! figures; after it, and when a guest has come to another host, figures begin anew. Nothing is judged by one figure
//! unless `k` says so. Memory is bounded by the snapshot: who is no longer in it is forgotten.

pub mod level;
pub mod settings;
pub mod threshold;
mod watched;
pub mod words;

use std::collections::BTreeMap;

pub use self::settings::{Kind, Settings, SettingsError};
use self::watched::{Subject, Watched};
use crate::model::{Cluster, Host, HostIndex, HostState, Placement, Resource, VmIndex};
use crate::plan::Hotspot;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    /// Share of what a host has of it.
    Share(Resource),
    /// Pages that a guest writes to its swap, a second.
    SwapWrites,
    /// Share of the time in which a guest wanted to run and had to wait.
    Steal,
    /// A guest's response time as a share of what was promised.
    Response,
    /// Share of a guest's requests that were dropped, as a share of what was promised.
    Drops,
}

impl Metric {
    /// What there is too little of if this is too much, where that is certain.
    #[must_use]
    pub const fn resource(self) -> Option<Resource> {
        match self {
            Self::Share(resource) => Some(resource),
            Self::SwapWrites => Some(Resource::Memory),
            Self::Steal => Some(Resource::Cpu),
            Self::Response | Self::Drops => None,
        }
    }
}

/// Everything that is watched over time; keyed by names, since indices change between snapshots.
#[derive(Debug)]
pub struct Watch {
    settings: Settings,
    hosts: BTreeMap<String, Watched>,
    guests: BTreeMap<String, Watched>,
    now_s: f64,
    round: u64,
}

impl Watch {
    /// With nothing seen yet. Settings that [`Settings::check`] refuses are used as far as they make sense.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let (hosts, guests) = (BTreeMap::new(), BTreeMap::new());
        Self { settings, hosts, guests, now_s: 0.0, round: 0 }
    }

    /// Takes a snapshot, at the report interval, and says what is a hotspot now, the worst first.
    ///
    /// Hosts in a migration, and silent ones, are not judged; nor is anything in a snapshot that [`Cluster::check`]
    /// refuses.
    pub fn observe(&mut self, cluster: &Cluster, now_s: f64) -> Vec<Hotspot> {
        if cluster.check().is_err() {
            return vec![];
        }
        if now_s.is_finite() {
            self.now_s = now_s;
        }
        self.round += 1;
        let placement = Placement::new(cluster);
        let mut found = vec![];
        for index in cluster.host_indices() {
            found.extend(self.observe_host(&placement, index));
        }
        let mut waiting = BTreeMap::new();
        for index in cluster.vm_indices() {
            self.observe_guest(&placement, index, &mut found, &mut waiting);
        }
        for (host, waits) in waiting {
            words::add_waiting(&mut found, cluster, host, waits);
        }
        self.forget();
        worst_first(&mut found);
        found
    }

    fn observe_host(&mut self, placement: &Placement<'_>, index: HostIndex) -> Vec<Hotspot> {
        let host = placement.cluster().host(index);
        let watched = entry(&mut self.hosts, &host.name);
        watched.seen_in(self.round);
        if host.is_migrating {
            watched.begin_anew();
        }
        if !is_judged(host) {
            return vec![];
        }
        let shares = placement.share(index);
        let known = Resource::ALL.into_iter().filter(|resource| host.capacity[*resource] > 0.0);
        let subject = Subject { host: index, vm: None, host_name: &host.name, name: &host.name };
        known
            .filter_map(|resource| {
                let metric = Metric::Share(resource);
                let verdict =
                    watched.judge(&self.settings, metric, shares[resource], self.now_s)?;
                Some(subject.hotspot(metric, resource, &verdict))
            })
            .collect()
    }

    fn observe_guest(
        &mut self,
        placement: &Placement<'_>,
        index: VmIndex,
        found: &mut Vec<Hotspot>,
        waiting: &mut BTreeMap<HostIndex, Vec<Hotspot>>,
    ) {
        let vm = placement.cluster().vm(index);
        let host = placement.cluster().host(vm.host);
        let watched = entry(&mut self.guests, &vm.name);
        watched.seen_in(self.round);
        if watched.has_moved_to(&host.name) || vm.is_migrating {
            watched.begin_anew();
        }
        if !is_judged(host) || vm.is_migrating {
            return;
        }
        let subject =
            Subject { host: vm.host, vm: Some(index), host_name: &host.name, name: &vm.name };
        for (metric, figure) in watched::figures(vm) {
            let judged = watched.judge(&self.settings, metric, figure, self.now_s);
            let Some(verdict) = judged else { continue };
            let limits = self.settings.threshold.shares();
            let tightest = || Placement::tightest(&placement.share(vm.host), &limits);
            let resource = metric.resource().unwrap_or_else(tightest);
            let hotspot = subject.hotspot(metric, resource, &verdict);
            match metric {
                Metric::Steal => waiting.entry(vm.host).or_default().push(hotspot),
                _ => found.push(hotspot),
            }
        }
    }

    fn forget(&mut self) {
        let round = self.round;
        self.hosts.retain(|_, watched| watched.was_seen_in(round));
        self.guests.retain(|_, watched| watched.was_seen_in(round));
    }
}

fn is_judged(host: &Host) -> bool {
    !host.is_migrating && host.state != HostState::Silent
}

fn entry<'a>(all: &'a mut BTreeMap<String, Watched>, name: &str) -> &'a mut Watched {
    if !all.contains_key(name) {
        all.insert(name.to_owned(), Watched::default());
    }
    all.entry(name.to_owned()).or_default()
}

/// By how far above what they must not exceed they are; hosts before guests where that is the same.
fn worst_first(found: &mut [Hotspot]) {
    let excess = |hotspot: &Hotspot| {
        hotspot.current.max(hotspot.predicted) / hotspot.threshold.max(f64::MIN_POSITIVE)
    };
    found.sort_by(|one, other| {
        let order = excess(other).total_cmp(&excess(one));
        order.then_with(|| {
            (one.host, one.vm, one.resource).cmp(&(other.host, other.vm, other.resource))
        })
    });
}

#[cfg(test)]
mod tests;
