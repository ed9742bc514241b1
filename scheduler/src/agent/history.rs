//! How hosts' loads were of late, and which hotspots there were.

use std::collections::{BTreeMap, VecDeque};

use parking_lot::Mutex;

use crate::api::view::{ENDED_MAX, HistoryPoint, HotspotView, POINTS_MAX};
use crate::detect;
use crate::model::{Amounts, Cluster, HostIndex, HostState, Placement, Resource};
use crate::plan::Hotspot;
use crate::series::{Series, ar1};

/// What was.
#[derive(Debug, Default)]
pub struct History {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    shares: BTreeMap<String, VecDeque<HistoryPoint>>,
    open: Vec<HotspotView>,
    ended: VecDeque<HotspotView>,
}

impl History {
    /// Notes the loads of all hosts that are heard of.
    pub fn note(&self, cluster: &Cluster, now_s: f64) {
        let placement = Placement::new(cluster);
        let mut inner = self.inner.lock();
        let is_known = |name: &String| cluster.hosts.iter().any(|host| host.name == *name);
        inner.shares.retain(|name, _| is_known(name));
        for index in cluster.host_indices().filter(|index| is_heard(cluster, *index)) {
            let points = inner.shares.entry(cluster.host(index).name.clone()).or_default();
            points
                .push_back(HistoryPoint { at_s: now_s, share: known(cluster, &placement, index) });
            if points.len() > POINTS_MAX {
                points.pop_front();
            }
        }
    }

    /// Notes the hotspots that there are: those that are missing have ended.
    pub fn note_hotspots(&self, now: &[HotspotView], now_s: f64) {
        let mut inner = self.inner.lock();
        let same = |one: &HotspotView, other: &HotspotView| {
            (&one.host, &one.guest, one.resource) == (&other.host, &other.guest, other.resource)
        };
        let (_, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut inner.open)
            .into_iter()
            .partition(|before| now.iter().any(|hotspot| same(hotspot, before)));
        for hotspot in gone {
            inner.ended.push_front(HotspotView { ended_s: Some(now_s), ..hotspot });
        }
        inner.ended.truncate(ENDED_MAX);
        inner.open = now.to_vec();
    }

    /// The hotspots that there are, then those that ended.
    #[must_use]
    pub fn hotspots(&self) -> Vec<HotspotView> {
        let inner = self.inner.lock();
        inner.open.iter().chain(&inner.ended).cloned().collect()
    }

    /// A host's loads, the oldest first; nothing if there is no such host.
    #[must_use]
    pub fn of(&self, host: &str) -> Option<Vec<HistoryPoint>> {
        self.inner.lock().shares.get(host).map(|points| points.iter().copied().collect())
    }
}

fn is_heard(cluster: &Cluster, host: HostIndex) -> bool {
    cluster.host(host).state != HostState::Silent
}

/// Shares of what is known to be there; 0 of the rest.
fn known(cluster: &Cluster, placement: &Placement<'_>, host: HostIndex) -> Amounts {
    let mut share = placement.share(host);
    for resource in Resource::ALL {
        if cluster.host(host).capacity[resource] <= 0.0 {
            share[resource] = 0.0;
        }
    }
    share
}

/// What is expected next, as detectors would, once they judge.
#[must_use]
pub fn predicted(points: &[HistoryPoint], settings: &detect::Settings) -> Option<Amounts> {
    let recent = points.get(points.len().saturating_sub(settings.window)..)?;
    if recent.len() < settings.n {
        return None;
    }
    let mut next = Amounts::ZERO;
    for resource in Resource::ALL {
        let mut series = Series::new(settings.window);
        for point in recent {
            series.push(point.at_s, point.share[resource]);
        }
        next[resource] = ar1::predict(&series, settings.prediction)?;
    }
    Some(next)
}

/// Hotspots by names.
#[must_use]
pub fn shown(hotspots: &[Hotspot], cluster: &Cluster) -> Vec<HotspotView> {
    let view = |hotspot: &Hotspot| HotspotView {
        host: cluster.host(hotspot.host).name.clone(),
        guest: hotspot.vm.map(|vm| cluster.vm(vm).name.clone()),
        resource: hotspot.resource,
        current: hotspot.current,
        predicted: hotspot.predicted,
        threshold: hotspot.threshold,
        since_s: hotspot.since_s,
        ended_s: None,
        why: hotspot.why.clone(),
    };
    hotspots.iter().map(view).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::synthetic;

    fn hotspot(host: &str) -> HotspotView {
        let hotspot = Hotspot {
            host: HostIndex(0),
            vm: None,
            resource: Resource::Cpu,
            current: 0.9,
            predicted: 0.95,
            threshold: 0.85,
            since_s: 3.0,
            why: "busy".into(),
        };
        let view = shown(&[hotspot], &synthetic::cluster(1, 1));
        HotspotView { host: host.into(), ..view[0].clone() }
    }

    #[test]
    fn hotspots_that_are_gone_have_ended_and_are_shown_after_the_others() {
        let history = History::default();
        history.note_hotspots(&[hotspot("a"), hotspot("b")], 10.0);
        history.note_hotspots(&[hotspot("b"), hotspot("c")], 20.0);
        let shown = history.hotspots();
        let told: Vec<_> = shown.iter().map(|spot| (spot.host.as_str(), spot.ended_s)).collect();
        assert_eq!(told, [("b", None), ("c", None), ("a", Some(20.0))]);
    }

    #[test]
    fn loads_are_bounded_and_silent_hosts_have_none() {
        let history = History::default();
        let mut cluster = synthetic::cluster(2, 4);
        cluster.hosts[1].state = HostState::Silent;
        for at in 0..POINTS_MAX + 5 {
            history.note(&cluster, at as f64);
        }
        let points = history.of("host-0").unwrap();
        assert_eq!((points.len(), points[0].at_s), (POINTS_MAX, 5.0));
        assert!((points[0].share.cpu_cores - 0.25).abs() < 1e-9);
        assert_eq!(history.of("host-1"), None);
    }
}
