//! What became of a guest that a gateway passed on: one JSON object, or a line for people.

use std::time::Duration;

use serde::Serialize;

use super::intake::Taken;
use crate::error::EngineError;
use crate::report::ReportOutcome;

/// Version of the report's shape.
const VERSION: u32 = 1;

/// A guest that left through a gateway. `completed` says that both QEMUs ended their connections in good order; whether
/// the guest runs is theirs to tell.
#[derive(Debug, Clone, Serialize)]
pub struct GatewayReport {
    /// 1.
    pub v: u32,
    /// Where its QEMU connected.
    pub name: String,
    /// How it ended.
    pub outcome: ReportOutcome,
    /// What went wrong.
    pub error: Option<String>,
    /// From the connection of its QEMU to the end, in milliseconds.
    pub total_ms: f64,
    /// The guest's RAM in bytes.
    pub ram_bytes: u64,
    /// What its QEMU sent, in bytes.
    pub stream_bytes: u64,
    /// UDP and TCP payload between the gateways, in both directions, in bytes.
    pub wire_bytes: u64,
    /// Pages that travelled whole.
    pub raw_pages: u64,
    /// Pages of which changed lines travelled.
    pub delta_pages: u64,
    /// Pages that became zero.
    pub zero_pages: u64,
    /// Pages that QEMU sent again although nothing in them had changed.
    pub unchanged_pages: u64,
    /// Pages that went before others because the guest, which ran at the destination, waited for them.
    pub urgent_pages: u64,
    /// How often the connection to the other gateway was lost and made again.
    pub reconnects: u64,
}

impl GatewayReport {
    /// Of a guest that is about to go.
    pub fn begin(name: &str) -> Self {
        Self {
            v: VERSION,
            name: name.to_owned(),
            outcome: ReportOutcome::Failed,
            error: None,
            total_ms: 0.0,
            ram_bytes: 0,
            stream_bytes: 0,
            wire_bytes: 0,
            raw_pages: 0,
            delta_pages: 0,
            zero_pages: 0,
            unchanged_pages: 0,
            urgent_pages: 0,
            reconnects: 0,
        }
    }

    /// Notes what travelled.
    pub fn note(&mut self, taken: &Taken, wire_bytes: u64, reconnects: u64) {
        self.ram_bytes = taken.ram_bytes;
        self.stream_bytes = taken.stream_bytes;
        self.wire_bytes = wire_bytes;
        self.raw_pages = taken.counts.raw;
        self.delta_pages = taken.counts.delta;
        self.zero_pages = taken.counts.zero;
        self.unchanged_pages = taken.counts.unchanged;
        self.urgent_pages = taken.urgent_pages;
        self.reconnects = reconnects;
    }

    /// Notes how it ended.
    pub fn end(&mut self, error: Option<&EngineError>, took: Duration) {
        self.total_ms = took.as_secs_f64() * 1e3;
        self.error = error.map(EngineError::tell);
        if error.is_none() {
            self.outcome = ReportOutcome::Completed;
        }
    }

    /// For people.
    pub fn line(&self) -> String {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let end = match &self.error {
            None => "passed on".to_owned(),
            Some(error) => format!("not passed on: {error}"),
        };
        let reconnects = match self.reconnects {
            0 => String::new(),
            1 => ", connected again once".to_owned(),
            times => format!(", connected again {times} times"),
        };
        format!(
            "{}: {end}; {:.2} s, {:.1} MiB of stream, {:.1} MiB over the wire{reconnects}",
            self.name,
            self.total_ms / 1e3,
            mib(self.stream_bytes),
            mib(self.wire_bytes)
        )
    }
}
