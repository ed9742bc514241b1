//! Metrics of a gateway.

use std::sync::Arc;

use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::report::GatewayReport;
use crate::http;
use crate::report::ReportOutcome;

/// Which end of a gateway this is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Side {
    Source,
    Destination,
}

#[derive(Debug, Default)]
struct Counts {
    under_way: i64,
    completed: u64,
    failed: u64,
    stream_bytes: u64,
    wire_bytes: u64,
    reconnects: u64,
}

/// What passes through a gateway, all guests together.
#[derive(Debug, Clone)]
pub(super) struct Passing {
    side: Side,
    counts: Arc<Mutex<Counts>>,
}

/// A guest that is under way; however it ends, it is counted.
#[derive(Debug)]
pub(super) struct UnderWay {
    counts: Arc<Mutex<Counts>>,
    has_completed: bool,
}

impl Passing {
    pub(super) fn new(side: Side) -> Self {
        Self { side, counts: Arc::default() }
    }

    /// One more guest is under way.
    pub(super) fn begin(&self) -> UnderWay {
        self.counts.lock().under_way += 1;
        UnderWay { counts: Arc::clone(&self.counts), has_completed: false }
    }

    /// All of it as text.
    pub(super) fn text(&self) -> String {
        let mut registry = Registry::default();
        let registered = registry.sub_registry_with_prefix("godwit_gateway");
        let side = match self.side {
            Side::Source => "source",
            Side::Destination => "destination",
        };
        let counts = self.counts.lock();
        let under_way = Family::<[(&'static str, &'static str); 1], Gauge>::default();
        under_way.get_or_create(&[("side", side)]).set(counts.under_way);
        registered.register("guests", "Guests under way", under_way);
        let ended = Family::<[(&'static str, &'static str); 2], Counter>::default();
        for (outcome, count) in [("completed", counts.completed), ("failed", counts.failed)] {
            ended.get_or_create(&[("side", side), ("outcome", outcome)]).inc_by(count);
        }
        registered.register("guests_ended", "Guests by how they ended", ended);
        for (name, help, bytes) in [
            ("stream_bytes", "What QEMUs sent here, of guests that ended", counts.stream_bytes),
            ("wire_bytes", "Payload between the gateways, of guests that ended", counts.wire_bytes),
        ] {
            let family = Family::<[(&'static str, &'static str); 1], Counter>::default();
            family.get_or_create(&[("side", side)]).inc_by(bytes);
            registered.register(name, help, family);
        }
        let reconnects = Family::<[(&'static str, &'static str); 1], Counter>::default();
        reconnects.get_or_create(&[("side", side)]).inc_by(counts.reconnects);
        let help = "Sessions that took the place of a lost one, of guests that ended";
        registered.register("reconnects", help, reconnects);
        drop(counts);
        http::page(&registry)
    }
}

impl UnderWay {
    /// It ended as this says.
    pub(super) fn end(self, report: &GatewayReport) {
        self.counts.lock().stream_bytes += report.stream_bytes;
        let has_completed = report.outcome == ReportOutcome::Completed;
        self.end_with(report.wire_bytes, report.reconnects, has_completed);
    }

    /// It ended after so many bytes between the gateways, whose session was replaced so often.
    pub(super) fn end_with(mut self, wire_bytes: u64, reconnects: u64, has_completed: bool) {
        let mut counts = self.counts.lock();
        counts.wire_bytes += wire_bytes;
        counts.reconnects += reconnects;
        drop(counts);
        self.has_completed = has_completed;
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut counts = self.counts.lock();
        counts.under_way -= 1;
        match self.has_completed {
            true => counts.completed += 1,
            false => counts.failed += 1,
        }
    }
}
