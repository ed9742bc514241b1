//! An agent's metrics, in OpenMetrics' text format.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::api::view::{MoveStage, View};
use crate::model::{Amounts, Resource};

type Figure = Gauge<f64, AtomicU64>;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfHost {
    host: String,
    resource: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfGuest {
    guest: String,
    host: String,
    resource: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfStage {
    stage: &'static str,
}

const fn label(resource: Resource) -> &'static str {
    match resource {
        Resource::Cpu => "cpu_cores",
        Resource::Memory => "memory_mib",
        Resource::Network => "network_mbit",
        Resource::Disk => "disk_mib",
    }
}

/// What an agent sees, as text.
#[must_use]
pub fn text(view: &View) -> String {
    let mut registry = Registry::with_prefix("godwit_scheduler");
    hosts(&mut registry, view);
    guests(&mut registry, view);
    rest(&mut registry, view);
    let mut text = String::new();
    // A string takes whatever is written.
    let _infallible = encode(&mut text, &registry);
    text
}

fn hosts(registry: &mut Registry, view: &View) {
    let (capacity, used) =
        (Family::<OfHost, Figure>::default(), Family::<OfHost, Figure>::default());
    let stale = Family::<OfHost, Gauge>::default();
    for host in &view.hosts {
        let set = |family: &Family<OfHost, Figure>, amounts: &Amounts| {
            for resource in Resource::ALL {
                let labels = OfHost { host: host.name.clone(), resource: label(resource) };
                family.get_or_create(&labels).set(amounts[resource]);
            }
        };
        set(&capacity, &host.capacity);
        set(&used, &host.used);
        let labels = OfHost { host: host.name.clone(), resource: "" };
        stale.get_or_create(&labels).set(host.is_stale.into());
    }
    registry.register("host_capacity", "What a host has", capacity);
    registry.register("host_used", "What is taken of a host", used);
    registry.register("host_stale", "1 if nothing was heard of a host for long", stale);
}

fn guests(registry: &mut Registry, view: &View) {
    let (used, peak) = (Family::<OfGuest, Figure>::default(), Family::<OfGuest, Figure>::default());
    for guest in &view.guests {
        for resource in Resource::ALL {
            let labels = OfGuest {
                guest: guest.name.clone(),
                host: guest.host.clone(),
                resource: label(resource),
            };
            used.get_or_create(&labels).set(guest.usage[resource]);
            peak.get_or_create(&labels).set(guest.peak[resource]);
        }
    }
    registry.register("guest_used", "What a guest takes", used);
    registry.register("guest_peak", "What a guest is estimated to want at its peak", peak);
}

fn rest(registry: &mut Registry, view: &View) {
    let hotspots: Gauge = Gauge::default();
    let open = view.hotspots.iter().filter(|hotspot| hotspot.ended_s.is_none()).count();
    hotspots.set(i64::try_from(open).unwrap_or(i64::MAX));
    registry.register("hotspots", "Hotspots at present", hotspots);
    let moves = Family::<OfStage, Gauge>::default();
    for (stage, name) in [
        (MoveStage::Preparing, "preparing"),
        (MoveStage::Moving, "moving"),
        (MoveStage::InDoubt, "in-doubt"),
    ] {
        let count = view.moves.iter().filter(|one| one.stage == stage).count();
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        moves.get_or_create(&OfStage { stage: name }).set(count);
    }
    registry.register("moves", "Migrations under way", moves);
    let store: Gauge = Gauge::default();
    store.set(view.store.trouble.is_none().into());
    registry.register("store_up", "1 if the store can be used", store);
    let at: Figure = Figure::default();
    at.set(view.at_s);
    registry.register("seen_at_seconds", "When this was seen, since 1970", at);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::view::HostView;

    #[test]
    fn figures_have_their_hosts_and_the_text_ends_as_it_must() {
        let mut host = HostView { name: "a".into(), is_stale: true, ..HostView::default() };
        host.used.cpu_cores = 1.5;
        let text = text(&View { hosts: vec![host], ..View::default() });
        assert!(
            text.contains("godwit_scheduler_host_used{host=\"a\",resource=\"cpu_cores\"} 1.5"),
            "{text}"
        );
        assert!(text.contains("godwit_scheduler_store_up 1"), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }
}
