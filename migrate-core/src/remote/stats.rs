//! What was done for a split guest so far, for `migrate status`.

use serde::Serialize;

/// Whether a server takes pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServerPhase {
    /// It does.
    Serving,
    /// It does not: what it has moves elsewhere.
    Draining,
    /// It is gone with all it had.
    Gone,
}

/// What lies on one server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ServerStats {
    /// Pages of which it has a valid copy, those included that are resident and clean.
    pub pages: u64,
    /// Copies that are out of date and were not dropped yet.
    pub stale_pages: u64,
    /// Pages it has room for, by all that is known.
    pub reserve_pages: u64,
    /// Whether it takes pages.
    pub state: ServerPhase,
}

/// Faults on missing pages, by what they were answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct FaultCounts {
    /// With zeros: the page had no content.
    pub zero: u64,
    /// With the page, which was asked for.
    pub fetch: u64,
    /// With the page, which was under way already.
    pub wait: u64,
    /// Of those answered with zeros or a page, how many waited for room first.
    pub no_room: u64,
}

/// Pages that left the RAM file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct EvictionCounts {
    /// Without being sent: servers still had them.
    pub clean: u64,
    /// After they were put to servers.
    pub dirty: u64,
    /// Evictions that were given up since the guest wrote the page, or no server took it.
    pub cancelled: u64,
}

impl EvictionCounts {
    /// All that left.
    pub fn pages(&self) -> u64 {
        self.clean + self.dirty
    }
}

/// Counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Counts {
    pub(super) faults: FaultCounts,
    pub(super) evicted: EvictionCounts,
    pub(super) read_ahead_pages: u64,
    pub(super) zeros_ahead_pages: u64,
    pub(super) refaults: u64,
    pub(super) reclaimed_pages: u64,
}

/// The state of a split guest's memory. Times are from the first fault on a page until it arrived, the
/// wait for room included; faults that were answered with zeros at once are not among them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RemoteStats {
    /// Most pages the RAM file may have; nothing while the guest is merged.
    pub resident_limit_pages: Option<u64>,
    /// Pages in the RAM file.
    pub resident_pages: u64,
    /// Of those, pages that servers have too.
    pub clean_pages: u64,
    /// Pages that were asked for and did not arrive yet.
    pub coming_pages: u64,
    /// Pages that only servers have.
    pub remote_pages: u64,
    /// By server.
    pub servers: Vec<ServerStats>,
    /// Pages of which fewer copies are left than asked for.
    pub under_copied_pages: u64,
    /// Pages that no server has any more.
    pub lost_pages: u64,
    /// Faults on missing pages.
    pub faults: FaultCounts,
    /// Pages that were asked for before the guest needed them.
    pub read_ahead_pages: u64,
    /// Of those, pages of windows that the guest went on behind.
    pub read_ahead_used_pages: u64,
    /// Pages that hold nothing and that were provided before the guest used them.
    pub zeros_ahead_pages: u64,
    /// Pages that left the RAM file.
    pub evicted: EvictionCounts,
    /// Faults on pages that had been evicted shortly before.
    pub refaults: u64,
    /// Pages that were dropped since the guest did not use them.
    pub reclaimed_pages: u64,
    /// Median time to serve a fault, in microseconds.
    pub p50_us: u64,
    /// 99th percentile of that time, in microseconds.
    pub p99_us: u64,
    /// The longest of these times, in microseconds.
    pub max_us: u64,
}
