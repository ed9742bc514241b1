//! The report that `migrate send --json` prints: one object, the shape of docs/ARCHITECTURE.md's
//! command-line contract. Scripts and measurements rely on its fields.

use std::collections::BTreeMap;

use migrate_core::codec::Codec;
use migrate_core::convergence::Prediction;
use migrate_core::encode::{Packed, PageCounts};
use migrate_core::error::{Classify, ErrorBin, GuestPlace};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use transport::messages::FaultStats;
use transport::{Closer, LaneKind};

use crate::error::EngineError;

/// Version of the report's shape.
pub const REPORT_VERSION: u32 = 1;

/// How a migration ended, as the user sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReportOutcome {
    /// The guest runs at the destination. Exit code 0.
    Completed,
    /// The guest runs at the source, as before. Exit code 1.
    Failed,
    /// It is not known who has the guest; none runs at the source. Exit code 3.
    InDoubt,
}

impl ReportOutcome {
    /// The process's exit code.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Completed => 0,
            Self::Failed => 1,
            Self::InDoubt => 3,
        }
    }
}

/// One round as it happened.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RoundReport {
    /// Number, from 1.
    pub round: u32,
    /// Pages found written before the round.
    pub dirty: u64,
    /// Pages looked at a second time.
    pub looked: u64,
    /// Pages that travelled.
    pub sent: u64,
    /// Time from its first page to the scan that ended it, in milliseconds.
    pub ms: f64,
    /// Prediction made by that scan; nothing for the rounds after the stop.
    pub predicted: Option<Prediction>,
}

/// Bytes, by what they were.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ByteReport {
    /// The guest's RAM.
    pub ram: u64,
    /// RAM that was populated (no hole) when tracking was armed.
    pub populated: u64,
    /// UDP or TCP payload in both directions, all of the session.
    pub wire: u64,
    /// Device state.
    pub device_state: u64,
}

/// Pages, by what became of them.
#[derive(Debug, Clone, Default, Serialize)]
pub struct PageReport {
    /// All pages of the guest.
    pub total: u64,
    /// Never populated.
    pub hole: u64,
    /// Sent as zero, or found zero and never sent.
    pub zero: u64,
    /// Skipped as unused by the guest.
    pub unused: u64,
    /// Sent as a reference to equal content.
    pub duplicate: u64,
    /// Sent as a difference.
    pub delta: u64,
    /// Reported written, but with the content that was sent before: not sent.
    pub unchanged: u64,
    /// Sent with their content.
    pub raw: u64,
    /// Held back because they were about to be rewritten.
    pub deferred: u64,
    /// Missing at the destination when the guest was handed over (post-copy).
    pub missing: u64,
    /// Of those, sent because the guest waited for them.
    pub urgent: u64,
    /// Of those, sent with such pages because they lie beside them.
    pub prefetched: u64,
    /// Sent more than once: sendings beyond a page's first.
    pub resent: u64,
}

impl PageReport {
    /// Adds what a round did.
    pub fn add(&mut self, counts: &PageCounts) {
        self.zero += counts.zero;
        self.raw += counts.raw;
        self.delta += counts.delta;
        self.duplicate += counts.duplicate;
        self.unchanged += counts.unchanged;
        self.deferred += counts.left_out;
        self.resent += counts.resent;
    }
}

/// What lies on one memory server.
#[derive(Debug, Clone, Serialize)]
pub struct RemoteReport {
    /// Its address.
    pub server: String,
    /// Pages of the guest.
    pub pages: u64,
}

/// Where the memory of a split guest went.
#[derive(Debug, Clone, Serialize)]
pub struct SplitReport {
    /// Pages that were sent to the main host.
    pub resident_pages: u64,
    /// Pages at the memory servers.
    pub remote_pages: Vec<RemoteReport>,
    /// Pages that the guest used when they were placed.
    pub in_use_pages: u64,
    /// Bytes that travelled to and from the memory servers.
    pub to_servers_bytes: u64,
}

/// What a codec did with the contents of batches.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct CodecReport {
    /// Which one.
    pub codec: Codec,
    /// How many bytes became how many.
    #[serde(flatten)]
    pub bytes: Packed,
}

/// What carried pages.
#[derive(Debug, Clone, Serialize)]
pub struct LaneReport {
    /// `quic` or `tcp`, at the end: lanes may begin on the one and go on over the other.
    pub kind: &'static str,
    /// How many side by side.
    pub count: usize,
}

impl LaneReport {
    /// As it is now.
    pub fn of(session: &Closer, count: usize) -> Self {
        let kind = match session.lane_kind() {
            LaneKind::Tcp => "tcp",
            LaneKind::Quic | LaneKind::Auto => "quic",
        };
        Self { kind, count }
    }
}

/// Faults served after the hand-over; only with post-copy.
#[derive(Debug, Clone, Serialize)]
pub struct FaultReport {
    /// How many.
    pub count: u64,
    /// Of those, how many found their page on its way.
    pub waited: u64,
    /// Median service time in microseconds.
    pub p50_us: u64,
    /// 99th percentile in microseconds.
    pub p99_us: u64,
    /// Longest in microseconds.
    pub max_us: u64,
}

impl From<FaultStats> for FaultReport {
    fn from(stats: FaultStats) -> Self {
        let FaultStats { count, waited, p50_us, p99_us, max_us } = stats;
        Self { count, waited, p50_us, p99_us, max_us }
    }
}

/// What `--verify` found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Pages compared.
    pub pages: u64,
    /// Pages that differed.
    pub mismatches: u64,
}

/// Why a migration did not complete.
#[derive(Debug, Clone, Serialize)]
pub struct ErrorReport {
    /// Who is at fault.
    pub kind: ErrorBin,
    /// In words, with the remedy.
    pub message: String,
    /// The source's guest, as read back.
    pub source_vm: GuestPlace,
    /// The destination's guest, as far as is known.
    pub destination_vm: GuestPlace,
}

/// The whole report.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// [`REPORT_VERSION`].
    pub v: u32,
    /// How it ended.
    pub outcome: ReportOutcome,
    /// The VM's name.
    pub vm: String,
    /// Mode used.
    pub mode: &'static str,
    /// Why this one, where it was chosen by measurement.
    pub mode_reason: Option<String>,
    /// Path used.
    pub path: &'static str,
    /// From the command's start to the word that the guest runs at the destination, or to the
    /// command's end if it does not, in milliseconds.
    pub total_ms: f64,
    /// From the stop of the guest here to the word that it runs there, in milliseconds.
    pub downtime_ms: f64,
    /// Its parts, in milliseconds.
    pub downtime_parts_ms: BTreeMap<&'static str, f64>,
    /// The rounds in order.
    pub rounds: Vec<RoundReport>,
    /// Bytes.
    pub bytes: ByteReport,
    /// Pages.
    pub pages: PageReport,
    /// Faults; nothing without post-copy.
    pub faults: Option<FaultReport>,
    /// Share of the prefetched pages that the guest went on to use; nothing without any.
    pub prefetch_hit_rate: Option<f64>,
    /// Why memory that the guest does not use was sent as well; nothing if it was skipped, or that was not wanted.
    pub not_skipped: Option<String>,
    /// Where memory went that was split over hosts; nothing otherwise.
    pub split: Option<SplitReport>,
    /// What `--verify` found; nothing without it.
    pub verify: Option<VerifyReport>,
    /// Time that a thread of QEMU was stopped to attach, in microseconds; nothing with the
    /// preloaded library.
    pub attach_stopped_us: Option<u64>,
    /// Contents that each codec packed, and what it packed them to, in bytes.
    pub codecs: [CodecReport; 3],
    /// What carried pages; nothing if there was no session.
    pub lanes: Option<LaneReport>,
    /// Processor time of this engine, user and system, for 10^9 bytes of `bytes.wire`, in seconds.
    pub cpu_s_per_gb: Option<f64>,
    /// Memory that `--delta-cache` took, in bytes.
    pub delta_cache_bytes: u64,
    /// Memory of the engine for its tables, in bytes a guest page.
    pub table_bytes_per_page: f64,
    /// Why it did not complete.
    pub error: Option<ErrorReport>,
}

impl Report {
    /// A report of a migration that is just beginning.
    pub fn begin(vm: &str) -> Self {
        Self {
            v: REPORT_VERSION,
            outcome: ReportOutcome::Failed,
            vm: vm.to_owned(),
            mode: "pre-copy",
            mode_reason: None,
            path: "direct",
            total_ms: 0.0,
            downtime_ms: 0.0,
            downtime_parts_ms: BTreeMap::new(),
            rounds: vec![],
            bytes: ByteReport::default(),
            pages: PageReport::default(),
            faults: None,
            prefetch_hit_rate: None,
            not_skipped: None,
            split: None,
            verify: None,
            attach_stopped_us: None,
            codecs: Codec::ALL.map(|codec| CodecReport { codec, ..Default::default() }),
            lanes: None,
            cpu_s_per_gb: None,
            delta_cache_bytes: 0,
            table_bytes_per_page: 0.0,
            error: None,
        }
    }

    /// Notes why it failed, and where the guest is.
    pub fn fail(&mut self, error: &EngineError, source: GuestPlace, destination: GuestPlace) {
        self.outcome = match error {
            EngineError::InDoubt { .. }
            | EngineError::Unserved { .. }
            | EngineError::Stranded { .. }
            | EngineError::Unresolved { .. } => ReportOutcome::InDoubt,
            _ => ReportOutcome::Failed,
        };
        self.error = Some(ErrorReport {
            kind: error.bin(),
            message: error.tell(),
            source_vm: source,
            destination_vm: destination,
        });
    }

    /// Notes what carried pages in the end and what that cost, once `bytes.wire` is known.
    pub fn end_of_lanes(&mut self, session: &Closer) {
        self.lanes = self.lanes.take().map(|lanes| LaneReport::of(session, lanes.count));
        let cpu = clock_gettime(ClockId::ProcessCPUTime);
        let cpu_s = cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9;
        self.cpu_s_per_gb = (self.bytes.wire > 0).then(|| cpu_s * 1e9 / self.bytes.wire as f64);
    }

    /// Adds what a round did.
    pub fn add(&mut self, counts: &PageCounts) {
        self.pages.add(counts);
        for (sum, packed) in self.codecs.iter_mut().zip(&counts.packed) {
            sum.bytes.content += packed.content;
            sum.bytes.packed += packed.packed;
        }
    }
}
