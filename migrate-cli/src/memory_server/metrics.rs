//! What a memory server counts, and how it is told to Prometheus.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use migrate_core::layout::PAGE_BYTES;
use migrate_core::store::StoreError;
use migrate_core::store::stores::{HostShare, StoreInfo};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::Registry;
use transport::PageRequest;

use super::Shared;
use crate::http;

/// A number that threads count up, and some down.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds, and returns what it was.
    pub fn add(&self, count: u64) -> u64 {
        self.0.fetch_add(count, Ordering::Relaxed)
    }

    /// Takes away.
    pub fn subtract(&self, count: u64) {
        self.0.fetch_sub(count, Ordering::Relaxed);
    }

    /// What it is.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Kinds of requests, as they are told.
const REQUESTS: [&str; 12] = [
    "create", "open", "keep", "grant", "revoke", "put", "get", "drop", "stat", "delete", "list",
    "reserve",
];

/// Reasons for which requests are refused, as they are told.
const REFUSALS: [&str; 7] =
    ["unknown", "full", "not-stored", "not-open", "rule", "system", "share"];

/// What is counted.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections now that have not shown yet who they are.
    pub handshakes: Counter,
    /// Connections so far.
    pub accepted: Counter,
    /// Of those, how many were closed or refused for want of room, or since the host is not one of --peer.
    pub turned_away: Counter,
    /// Of those, how many ended otherwise than by the client's word.
    pub broken: Counter,
    /// Stores whose lease has ended.
    pub expired: Counter,
    /// Pages that came.
    pub put_pages: Counter,
    /// Pages that went.
    pub got_pages: Counter,
    /// Bytes beneath TLS.
    pub sent_bytes: Counter,
    /// Bytes beneath TLS.
    pub received_bytes: Counter,
    requests: [Counter; REQUESTS.len()],
    refusals: [Counter; REFUSALS.len()],
}

impl Counters {
    /// Counts a request.
    pub fn count(&self, request: &PageRequest) {
        let kind = match request {
            PageRequest::Create(_) => 0,
            PageRequest::Open { .. } => 1,
            PageRequest::Keep => 2,
            PageRequest::Grant { .. } => 3,
            PageRequest::Revoke { .. } => 4,
            PageRequest::Put { .. } => 5,
            PageRequest::Get { .. } => 6,
            PageRequest::Drop { .. } => 7,
            PageRequest::Stat => 8,
            PageRequest::Delete => 9,
            PageRequest::List { .. } => 10,
            PageRequest::Reserve { .. } => 11,
        };
        self.requests[kind].add(1);
    }

    /// Counts a request that is refused.
    pub fn count_refused(&self, error: &StoreError) {
        let reason = match error {
            StoreError::Unknown => 0,
            StoreError::Full { .. } | StoreError::Reserved { .. } => 1,
            StoreError::NotStored { .. } => 2,
            StoreError::NotOpen | StoreError::OpenAlready => 3,
            StoreError::NoMemory | StoreError::Damaged { .. } => 5,
            StoreError::HostFull { .. } | StoreError::HostStores { .. } => 6,
            _ => 4,
        };
        self.refusals[reason].add(1);
    }
}

type Label = [(&'static str, String); 1];

/// All metrics as text.
pub fn text(shared: &Shared) -> String {
    let mut registry = Registry::default();
    register(&mut registry, shared);
    http::page(&registry)
}

/// Registers all metrics.
pub fn register(registry: &mut Registry, shared: &Shared) {
    let Shared { stores, counters, places, .. } = shared;
    let registry = registry.sub_registry_with_prefix("godwit_memory");
    let (capacity, reserved) = stores.capacity();
    let connections = places.hosts();
    let gauges = [
        ("capacity_bytes", "Bytes that may be reserved", capacity),
        ("reserved_bytes", "Bytes that are reserved", reserved),
        ("per_host_bytes", "Bytes that may be reserved by one host", stores.per_host_bytes()),
        ("connections", "Connections now", connections.values().sum()),
    ];
    for (name, help, value) in gauges {
        registry.register(name, help, ConstGauge::new(value as i64));
    }
    register_stores(registry, &stores.list());
    register_hosts(registry, &stores.hosts(), connections);
    let counted = [
        ("accepted", "Connections so far", &counters.accepted),
        ("turned_away", "Connections that were closed or refused at once", &counters.turned_away),
        ("broken", "Connections that ended without the client's word", &counters.broken),
        ("expired", "Stores whose lease has ended", &counters.expired),
        ("put_pages", "Pages that came", &counters.put_pages),
        ("got_pages", "Pages that went", &counters.got_pages),
        ("sent_bytes", "TCP payload sent", &counters.sent_bytes),
        ("received_bytes", "TCP payload received", &counters.received_bytes),
    ];
    for (name, help, counter) in counted {
        registry.register(name, help, ConstCounter::new(counter.get()));
    }
    let requests = ("requests", "Requests by kind", "kind");
    register_counts(registry, requests, &REQUESTS, &counters.requests);
    let refused = ("refused", "Requests that were refused, by reason", "reason");
    register_counts(registry, refused, &REFUSALS, &counters.refusals);
}

/// Metrics of every host: what its stores take, and its connections. Its name is the one in its certificate.
fn register_hosts(
    registry: &mut Registry,
    shares: &[HostShare],
    connections: BTreeMap<String, u64>,
) {
    let bytes = shares.iter().map(|share| (share.host.clone(), share.reserved_bytes)).collect();
    let stores = shares.iter().map(|share| (share.host.clone(), share.stores as u64)).collect();
    let of_host: [(&str, &str, BTreeMap<String, u64>); 3] = [
        ("host_reserved_bytes", "Bytes reserved for stores that a host created", bytes),
        ("host_stores", "Stores that a host created", stores),
        ("host_connections", "Connections of a host now", connections),
    ];
    for (name, help, values) in of_host {
        let family = Family::<Label, Gauge>::default();
        for (host, value) in values {
            family.get_or_create(&[("host", host)]).set(value as i64);
        }
        registry.register(name, help, family);
    }
}

/// Metrics of every VM. Two stores of one VM count together.
fn register_stores(registry: &mut Registry, stores: &[StoreInfo]) {
    type Of = fn(&StoreInfo) -> u64;
    let of_vm: [(&str, &str, Of); 5] = [
        ("stored_pages", "Pages stored for a VM", |store| store.stat.stored_pages),
        ("stored_bytes", "Bytes that they take, packed", |store| store.stat.stored_bytes),
        ("chunk_bytes", "Memory that holds them", |store| store.memory_bytes),
        ("vm_reserved_bytes", "Bytes reserved for a VM", |store| {
            store.stat.reserve_pages.saturating_mul(PAGE_BYTES as u64)
        }),
        ("kept_stores", "Stores that stay without requests", |store| u64::from(store.stat.kept)),
    ];
    for (name, help, of) in of_vm {
        let family = Family::<Label, Gauge>::default();
        for store in stores {
            family.get_or_create(&[("vm", store.vm.clone())]).inc_by(of(store) as i64);
        }
        registry.register(name, help, family);
    }
}

fn register_counts(
    registry: &mut Registry,
    (name, help, label): (&str, &str, &'static str),
    values: &[&str],
    counters: &[Counter],
) {
    type Counted = prometheus_client::metrics::counter::Counter;
    let family = Family::<Label, Counted>::default();
    for (value, counter) in values.iter().zip(counters) {
        family.get_or_create(&[(label, (*value).to_owned())]).inc_by(counter.get());
    }
    registry.register(name, help, family);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use migrate_core::store::{Extent, NewStore, StoreId, StoreSecret, Stores};

    use super::*;

    #[test]
    fn everything_is_told_with_its_vm_or_kind() {
        let stores = Stores::new(1 << 20, Duration::from_secs(60), false).with_per_host(1 << 19);
        let shared = Shared::new(stores, vec![]);
        let wanted = NewStore {
            store: StoreId([1; 16]),
            secret: StoreSecret::new([2; 32]),
            vm: "web \"1\"".into(),
            pages: 100,
            reserve_pages: 10,
            hosts: vec![],
        };
        let mut store = shared.stores.create(wanted, "a", Duration::ZERO).unwrap();
        store.put(&[Extent::new(0, 2)], &[7; 2 * PAGE_BYTES], 1, Duration::ZERO).unwrap();
        let counters = &shared.counters;
        counters.count(&PageRequest::Stat);
        counters.count_refused(&StoreError::NotStored { page: 3 });
        counters.count_refused(&StoreError::HostStores { max: 3 });
        counters.sent_bytes.add(11);
        let _places = ["b", "b", "c"].map(|host| shared.places.take(host).unwrap());
        let text = text(&shared);
        for line in [
            "godwit_memory_capacity_bytes 1048576",
            "godwit_memory_reserved_bytes 40960",
            "godwit_memory_stored_pages{vm=\"web \\\"1\\\"\"} 2",
            "godwit_memory_stored_bytes{vm=\"web \\\"1\\\"\"} 8192",
            "godwit_memory_requests_total{kind=\"stat\"} 1",
            "godwit_memory_requests_total{kind=\"get\"} 0",
            "godwit_memory_refused_total{reason=\"not-stored\"} 1",
            "godwit_memory_sent_bytes_total 11",
            "godwit_memory_refused_total{reason=\"share\"} 1",
            "godwit_memory_connections 3",
            "godwit_memory_per_host_bytes 524288",
            "godwit_memory_host_reserved_bytes{host=\"a\"} 40960",
            "godwit_memory_host_stores{host=\"a\"} 1",
            "godwit_memory_host_connections{host=\"b\"} 2",
        ] {
            assert!(text.lines().any(|other| other == line), "{line}\nis not in\n{text}");
        }
    }
}
