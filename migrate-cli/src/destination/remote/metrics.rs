//! What the pager of a split guest tells Prometheus: what `migrate status` tells.

use std::sync::{Arc, Weak};

use migrate_core::layout::PAGE_BYTES;
use parking_lot::Mutex;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::Registry;

use super::{Shared, socket};
use crate::pager_socket::{PagerState, ServerState, Status};

/// The guest that is paged here, if there is one.
#[derive(Debug, Clone, Default)]
pub struct Watched(Arc<Mutex<Weak<Shared>>>);

impl Watched {
    /// This one is, from now on.
    pub(super) fn begin(&self, shared: &Arc<Shared>) {
        *self.0.lock() = Arc::downgrade(shared);
    }

    /// Its metrics as text; none without a guest.
    pub fn text(&self) -> String {
        let shared = self.0.lock().upgrade();
        text(shared.map(|shared| socket::status(&shared)).as_ref())
    }
}

type Label<const N: usize> = [(&'static str, String); N];

fn text(status: Option<&Status>) -> String {
    let mut registry = Registry::with_prefix("godwit_pager");
    if let Some(status) = status {
        register(&mut registry, status);
    }
    let mut text = String::new();
    // Writing to a string does not fail.
    let _infallible = encode(&mut text, &registry);
    text
}

fn register(registry: &mut Registry, status: &Status) {
    let guest = Family::<Label<2>, Gauge>::default();
    let state = status.state.to_string();
    guest.get_or_create(&[("vm", status.vm.clone()), ("state", state)]).set(1);
    registry.register("guest", "The guest and its state", guest);
    let bytes = |pages: u64| pages * PAGE_BYTES as u64;
    let is_lost = u64::from(status.state == PagerState::Lost);
    let faults = &status.faults;
    for (name, help, value) in [
        ("lost", "Whether memory is on no server any more", is_lost),
        ("resident_bytes", "Memory that is here", bytes(status.resident_pages)),
        ("resident_limit_bytes", "The most that may be", bytes(status.resident_limit_pages)),
        ("under_copied_pages", "Pages on fewer servers than asked for", status.under_copied_pages),
        (
            "unflushed_pages",
            "Pages that are only here, of a guest that leaves",
            status.unflushed_pages,
        ),
        ("fault_p50_us", "Median time from fault to page, in microseconds", faults.p50_us),
        ("fault_p99_us", "What 99 % of them stay below, in microseconds", faults.p99_us),
    ] {
        registry.register(name, help, ConstGauge::new(value as i64));
    }
    for (name, help, value) in [
        ("zero_faults", "Faults on memory that held nothing", faults.zero),
        ("fetched_faults", "Faults on pages that were fetched", faults.fetched),
        ("read_ahead_pages", "Pages fetched before they were asked for", status.read_ahead.pages),
        ("read_ahead_used_pages", "Of those, known to have been used", status.read_ahead.used),
        ("evicted_pages", "Pages taken away", status.evicted.pages),
        ("evicted_clean_pages", "Of those, not sent again", status.evicted.clean),
        ("evictions_cancelled", "Given up since the guest wrote", status.evicted.cancelled),
        ("reclaimed_pages", "Pages dropped that the guest had freed", status.reclaimed_pages),
        ("sent_bytes", "TCP payload to memory servers", status.bytes.sent),
        ("received_bytes", "TCP payload from memory servers", status.bytes.received),
    ] {
        registry.register(name, help, ConstCounter::new(value));
    }
    let held = Family::<Label<1>, Gauge>::default();
    let reached = Family::<Label<1>, Gauge>::default();
    for server in &status.remote_pages {
        let label = [("server", server.server.clone())];
        let answers = matches!(server.state, ServerState::Connected | ServerState::Draining);
        // One that was drained may have come back under the same address: the later one counts.
        held.get_or_create(&label).set(server.bytes as i64);
        reached.get_or_create(&label).set(i64::from(answers));
    }
    registry.register("server_bytes", "Valid copies on a memory server", held);
    registry.register("server_up", "Whether it answers", reached);
}

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
            faults: FaultStatus {
                count: 9,
                zero: 4,
                fetched: 5,
                p50_us: 60,
                p99_us: 300,
                max_us: 400,
            },
            read_ahead: ReadAheadStatus { pages: 8, used: 7 },
            evicted: EvictedStatus { pages: 6, clean: 2, cancelled: 1 },
            reclaimed_pages: 11,
            bytes: BytesStatus { sent: 12, received: 13 },
        };
        let told = text(Some(&status));
        for line in [
            "godwit_pager_guest{vm=\"a \\\"b\\\"\",state=\"split\"} 1",
            "godwit_pager_resident_bytes 36864",
            "godwit_pager_under_copied_pages 3",
            "godwit_pager_fault_p99_us 300",
            "godwit_pager_fetched_faults_total 5",
            "godwit_pager_server_bytes{server=\"127.0.0.1:1\"} 8192",
            "godwit_pager_server_up{server=\"127.0.0.1:2\"} 0",
        ] {
            assert!(told.lines().any(|other| other == line), "{line}\nis not in\n{told}");
        }
        assert_eq!(text(None), "# EOF\n");
    }
}
