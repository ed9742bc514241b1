//! Figures and states of hosts and guests that are told, and that decisions are made with.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What may be done with a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum HostState {
    /// Guests run there and may come.
    #[default]
    Active,
    /// Guests are to leave.
    Draining,
    /// Nothing was heard of it for too long: nothing is decided about it.
    Silent,
}

/// What a guest's application says of itself, where it was asked (gray box).
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GrayBox {
    /// Requests that were served, a second.
    pub served_per_s: f64,
    /// Requests that were turned away or not answered, a second.
    pub dropped_per_s: f64,
    /// Mean time from a request to its answer, seconds.
    pub response_s: f64,
    /// Mean time that the whole guest is busy with one request, seconds.
    pub service_s: f64,
    /// Variance of the times between requests, s².
    pub arrival_variance_s2: f64,
    /// Variance of the times that requests keep the guest busy, s².
    pub service_variance_s2: f64,
    /// Response time that was promised, seconds; 0 if none was.
    pub promised_response_s: f64,
    /// Share of requests that may be dropped, 0 to 1; 1 if nothing was promised.
    pub promised_drops: f64,
}

/// What a migration takes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MigrationCost {
    /// Over the wire, MiB.
    pub wire_mib: f64,
    /// From start to end, seconds.
    pub total_s: f64,
    /// The guest stands still, milliseconds.
    pub downtime_ms: f64,
}

/// Shares of time in which something waited, 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Pressure {
    /// Some task waited for a processor.
    pub cpu: f64,
    /// Some task waited for memory.
    pub memory: f64,
    /// All tasks waited for memory.
    pub memory_full: f64,
    /// Some task waited for a disk.
    pub disk: f64,
}

/// What a guest is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum GuestState {
    /// It runs.
    #[default]
    Running,
    /// It stands still.
    Paused,
    /// It is expected: its QEMU waits for a migration.
    Incoming,
}
