//! What the pagers of split guests tell Prometheus: what `migrate status` tells.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use migrate_core::layout::PAGE_BYTES;
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::{Shared, socket};
use crate::http;
use crate::pager_socket::{PagerState, ServerState, Status};

/// The guest that is paged for one QMP socket, if there is one.
#[derive(Debug, Clone)]
pub struct Watched {
    qmp: PathBuf,
    shared: Arc<Mutex<Weak<Shared>>>,
}

impl Watched {
    /// None yet.
    pub fn new(qmp: &Path) -> Self {
        Self { qmp: qmp.to_owned(), shared: Arc::default() }
    }

    /// This one is, from now on.
    pub(super) fn begin(&self, shared: &Arc<Shared>) {
        *self.shared.lock() = Arc::downgrade(shared);
    }

    /// Its metrics as text; none without a guest.
    pub fn text(&self) -> String {
        let mut registry = Registry::default();
        register_pagers(&mut registry, [self]);
        http::page(&registry)
    }
}

/// Registers the metrics of all guests that are paged.
pub fn register_pagers<'a>(
    registry: &mut Registry,
    watched: impl IntoIterator<Item = &'a Watched>,
) {
    let paged = watched.into_iter().filter_map(|watched| {
        let shared = watched.shared.lock().upgrade()?;
        Some((watched.qmp.display().to_string(), socket::status(&shared)))
    });
    let paged: Vec<_> = paged.collect();
    if !paged.is_empty() {
        register_all(registry.sub_registry_with_prefix("godwit_pager"), &paged);
    }
}

type Label<const N: usize> = [(&'static str, String); N];

/// A family for each number of a guest.
fn register_all(registry: &mut Registry, paged: &[(String, Status)]) {
    let vm_of = |qmp: &str, status: &Status| [("vm", status.vm.clone()), ("qmp", qmp.to_owned())];
    let guests = Family::<Label<3>, Gauge>::default();
    let held = Family::<Label<3>, Gauge>::default();
    let reached = Family::<Label<3>, Gauge>::default();
    for (qmp, status) in paged {
        let [vm, qmp] = vm_of(qmp, status);
        let state = ("state", status.state.to_string());
        guests.get_or_create(&[vm.clone(), qmp.clone(), state]).set(1);
        for server in &status.remote_pages {
            let label = [vm.clone(), qmp.clone(), ("server", server.server.clone())];
            let answers = matches!(server.state, ServerState::Connected | ServerState::Draining);
            // One that was drained may have come back under the same address: the later one counts.
            held.get_or_create(&label).set(server.bytes as i64);
            reached.get_or_create(&label).set(i64::from(answers));
        }
    }
    registry.register("guest", "The guest and its state", guests);
    registry.register("server_bytes", "Valid copies on a memory server", held);
    registry.register("server_up", "Whether it answers", reached);
    for (name, help, value) in GAUGES {
        let family = Family::<Label<2>, Gauge>::default();
        for (qmp, status) in paged {
            family.get_or_create(&vm_of(qmp, status)).set(value(status) as i64);
        }
        registry.register(*name, *help, family);
    }
    for (name, help, value) in COUNTERS {
        let family = Family::<Label<2>, Counter>::default();
        for (qmp, status) in paged {
            family.get_or_create(&vm_of(qmp, status)).inc_by(value(status));
        }
        registry.register(*name, *help, family);
    }
}

/// A number of a guest: its name, its help, and where it is.
type Number = (&'static str, &'static str, fn(&Status) -> u64);

fn bytes(pages: u64) -> u64 {
    pages * PAGE_BYTES as u64
}

const GAUGES: &[Number] = &[
    ("lost", "Whether memory is on no server any more", |status| {
        u64::from(status.state == PagerState::Lost)
    }),
    ("resident_bytes", "Memory that is here", |status| bytes(status.resident_pages)),
    ("resident_limit_bytes", "The most that may be", |status| bytes(status.resident_limit_pages)),
    ("under_copied_pages", "Pages on fewer servers than asked for", |status| {
        status.under_copied_pages
    }),
    ("unflushed_pages", "Pages that are only here, of a guest that leaves", |status| {
        status.unflushed_pages
    }),
    ("stuck", "Whether threads wait for room that full servers do not make", |status| {
        u64::from(status.is_stuck)
    }),
    ("fault_p50_us", "Median time from fault to page, in microseconds", |status| {
        status.faults.p50_us
    }),
    ("fault_p99_us", "What 99 % of them stay below, in microseconds", |status| {
        status.faults.p99_us
    }),
];

const COUNTERS: &[Number] = &[
    ("zero_faults", "Faults on memory that held nothing", |status| status.faults.zero),
    ("fetched_faults", "Faults on pages that were fetched", |status| status.faults.fetched),
    ("read_ahead_pages", "Pages fetched before they were asked for", |status| {
        status.read_ahead.pages
    }),
    ("read_ahead_used_pages", "Of those, known to have been used", |status| status.read_ahead.used),
    ("zeros_ahead_pages", "Pages that held nothing, provided ahead", |status| {
        status.read_ahead.zeros
    }),
    ("evicted_pages", "Pages taken away", |status| status.evicted.pages),
    ("evicted_clean_pages", "Of those, not sent again", |status| status.evicted.clean),
    ("evictions_cancelled", "Given up since the guest wrote", |status| status.evicted.cancelled),
    ("reclaimed_pages", "Pages dropped that the guest had freed", |status| status.reclaimed_pages),
    ("sent_bytes", "TCP payload to memory servers", |status| status.bytes.sent),
    ("received_bytes", "TCP payload from memory servers", |status| status.bytes.received),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pager_socket::{
        BytesStatus, EvictedStatus, FaultStatus, ReadAheadStatus, STATUS_VERSION, ServerStatus,
    };

    #[test]
    fn a_status_is_told() {
        let server = |address: &str, pages, state| ServerStatus {
            server: address.into(),
            pages,
            bytes: pages * 4096,
            state,
        };
        let status = Status {
            v: STATUS_VERSION,
            vm: "a \"b\"".into(),
            state: PagerState::Split,
            resident_limit_pages: 10,
            resident_pages: 9,
            remote_pages: vec![
                server("127.0.0.1:1", 2, ServerState::Connected),
                server("127.0.0.1:2", 0, ServerState::Away),
            ],
            under_copied_pages: 3,
            unflushed_pages: 0,
            is_stuck: false,
            faults: FaultStatus {
                count: 9,
                zero: 4,
                fetched: 5,
                p50_us: 60,
                p99_us: 300,
                max_us: 400,
            },
            read_ahead: ReadAheadStatus { pages: 8, used: 7, zeros: 5 },
            evicted: EvictedStatus { pages: 6, clean: 2, cancelled: 1 },
            reclaimed_pages: 11,
            bytes: BytesStatus { sent: 12, received: 13 },
        };
        let other =
            Status { vm: "c".into(), under_copied_pages: 0, is_stuck: true, ..status.clone() };
        let mut registry = Registry::default();
        register_all(&mut registry, &[("/a".into(), status), ("/c".into(), other)]);
        let told = http::page(&registry);
        for line in [
            "guest{vm=\"a \\\"b\\\"\",qmp=\"/a\",state=\"split\"} 1",
            "resident_bytes{vm=\"c\",qmp=\"/c\"} 36864",
            "under_copied_pages{vm=\"a \\\"b\\\"\",qmp=\"/a\"} 3",
            "under_copied_pages{vm=\"c\",qmp=\"/c\"} 0",
            "stuck{vm=\"c\",qmp=\"/c\"} 1",
            "fault_p99_us{vm=\"c\",qmp=\"/c\"} 300",
            "fetched_faults_total{vm=\"c\",qmp=\"/c\"} 5",
            "zeros_ahead_pages_total{vm=\"c\",qmp=\"/c\"} 5",
            "server_bytes{vm=\"c\",qmp=\"/c\",server=\"127.0.0.1:1\"} 8192",
            "server_up{vm=\"c\",qmp=\"/c\",server=\"127.0.0.1:2\"} 0",
        ] {
            assert!(told.lines().any(|other| other == line), "{line}\nis not in\n{told}");
        }
        assert_eq!(Watched::new(Path::new("/a")).text(), "# EOF\n");
    }
}
