//! What is recorded: one JSON object a measurement and line, in `NAME.jsonl`. A comparison begins
//! with its scenario.
//!
//! The file begins anew with every run. Everything that is shown is computed from it.
//!
//! Version 2 has scenarios, who carried a mode out, samples over time and compulsory bytes. Files of
//! version 1 are still read; what they lack is absent.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use clap::ValueEnum as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::compulsory::Compulsory;
use crate::host::Host;
use crate::mode::Mode;
use crate::sample::Sample;
use crate::scenario::Scenario;
use crate::split::Worked;

/// Version of the lines.
const VERSION: u32 = 2;

/// Longest line that is read, in bytes: a report has up to 500 rounds.
const LINE_BYTES_MAX: usize = 4 << 20;

/// How a migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Outcome {
    /// The guest runs at the destination, and every check of it passed.
    Completed,
    /// Given up after the limit, or by the engine since it would not converge.
    NotConverged,
    /// Anything else; `error` says what.
    Failed,
}

/// CPU seconds over the migration's time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Cpu {
    /// `migrate send`, or the source's gateway; 0 for QEMU's modes.
    pub(crate) engine_source_s: f64,
    /// `migrate receive`, or the destination's gateway; since its start.
    pub(crate) engine_destination_s: f64,
    /// The source's QEMU, with the guest that it emulates.
    pub(crate) qemu_source_s: f64,
    /// The destination's QEMU, with the guest from its arrival on.
    pub(crate) qemu_destination_s: f64,
    /// CPUs that the source's QEMU kept busy before the migration.
    pub(crate) guest_before_cpus: f64,
    /// The whole machine.
    pub(crate) machine_s: f64,
}

impl Cpu {
    /// Of the machine's, what none of the four processes used: the kernel's network work, this
    /// program, and whatever ran beside the measurement.
    pub(crate) fn others_s(&self) -> f64 {
        self.machine_s - self.four_s()
    }

    /// Of both engines and both QEMUs.
    fn four_s(&self) -> f64 {
        self.engine_source_s
            + self.engine_destination_s
            + self.qemu_source_s
            + self.qemu_destination_s
    }
}

/// The most memory that Godwit's engines had resident.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct EngineMemory {
    /// `migrate send`, or the source's gateway, in bytes; nothing for QEMU's modes.
    pub(crate) source_bytes: Option<u64>,
    /// `migrate receive`, or the destination's gateway, in bytes.
    pub(crate) destination_bytes: Option<u64>,
}

/// One migration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Migration {
    /// Name of the mode.
    pub(crate) mode: String,
    /// Who carried it out, and how.
    #[serde(default = "godwit")]
    pub(crate) by: Mode,
    /// Arguments that `migrate send`, or the source's gateway, was given.
    #[serde(default)]
    pub(crate) send_args: Vec<String>,
    /// The scenario, or what was measured instead.
    pub(crate) workload: String,
    /// Its memory in MiB.
    pub(crate) memory_mib: u64,
    /// Its CPUs.
    pub(crate) smp: u32,
    /// The link's rate in bits a second; 0 is unshaped.
    pub(crate) link_bits: u64,
    /// `veth` or `loopback`.
    pub(crate) link: String,
    /// Turn, from 0: migrations of one turn are a pair.
    pub(crate) turn: u32,
    /// Seconds since 1970 at its start.
    pub(crate) at_unix_s: u64,
    /// Load average at its start.
    pub(crate) load1: f64,
    /// How it ended.
    pub(crate) outcome: Outcome,
    /// Why, unless it completed.
    pub(crate) error: Option<String>,
    /// From the command to its end: `migrate send` exited, QEMU says `completed`.
    pub(crate) total_ms: f64,
    /// From the command to the first heartbeat at the destination.
    pub(crate) arrived_ms: Option<f64>,
    /// From the last heartbeat at the source to the first at the destination.
    pub(crate) outage_ms: Option<f64>,
    /// Longest gap between heartbeats from the command until half a second after its end.
    pub(crate) worst_gap_ms: Option<f64>,
    /// Sum of what gaps were longer than 20 ms in that time: stalls by faults, too.
    pub(crate) stalled_ms: Option<f64>,
    /// The 99th percentile of gaps before the command.
    pub(crate) gap_before_p99_ms: Option<f64>,
    /// Downtime by the mode's own account.
    pub(crate) reported_downtime_ms: Option<f64>,
    /// Total by the mode's own account.
    pub(crate) reported_total_ms: Option<f64>,
    /// Bytes that the link carried to the destination, with Ethernet headers.
    pub(crate) wire_out_bytes: u64,
    /// Bytes that it carried back.
    pub(crate) wire_back_bytes: u64,
    /// The link's counters over time.
    #[serde(default)]
    pub(crate) samples: Vec<Sample>,
    /// The dirty set over time, as the mode itself tells.
    #[serde(default)]
    pub(crate) dirty: Vec<Dirty>,
    /// What of the guest's memory no migration can do without.
    #[serde(default)]
    pub(crate) compulsory: Option<Compulsory>,
    /// What the relay counted, if there was one.
    #[serde(default)]
    pub(crate) relay: Option<Value>,
    /// CPU time.
    pub(crate) cpu: Cpu,
    /// Memory of the engines.
    #[serde(default)]
    pub(crate) engine_memory: EngineMemory,
    /// Pages a second that the guest wrote before the migration.
    pub(crate) writer_pages_per_s: Option<f64>,
    /// Operations a second of the guest's application before the migration.
    #[serde(default)]
    pub(crate) application_per_s: Option<f64>,
    /// What a guest did after its arrival, and its pager, in scenarios of split guests.
    #[serde(default)]
    pub(crate) split: Option<Worked>,
    /// Godwit's report, or QEMU's last `query-migrate`, with the report of the source's gateway as `gateway`.
    pub(crate) report: Value,
}

/// Who carried out a mode where the record does not say.
fn godwit() -> Mode {
    Mode::Godwit
}

impl Migration {
    /// Whether Godwit had a part in it.
    pub(crate) fn is_ours(&self) -> bool {
        self.by.is_ours()
    }

    /// Whether it completed.
    pub(crate) fn is_complete(&self) -> bool {
        self.outcome == Outcome::Completed
    }

    /// Bytes on the link both ways.
    pub(crate) fn wire_bytes(&self) -> f64 {
        (self.wire_out_bytes + self.wire_back_bytes) as f64
    }

    /// Processor seconds of both engines and both QEMUs.
    pub(crate) fn cpu_s(&self) -> f64 {
        self.cpu.four_s()
    }

    /// Those for 10^9 bytes on the link.
    pub(crate) fn cpu_s_per_gb(&self) -> Option<f64> {
        let gb = self.wire_bytes() / 1e9;
        (gb > 0.0).then(|| self.cpu_s() / gb)
    }

    /// Bytes on the link by the compulsory ones.
    pub(crate) fn wire_per_compulsory(&self) -> Option<f64> {
        let bytes = self.compulsory?.bytes;
        (bytes > 0).then(|| self.wire_bytes() / bytes as f64)
    }
}

/// Memory that was still to be sent at a time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Dirty {
    /// Since the command, in milliseconds.
    pub(crate) ms: f64,
    /// How much, in bytes.
    pub(crate) bytes: u64,
}

/// One plain quinn transfer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Bulk {
    /// Turn, from 0.
    pub(crate) turn: u32,
    /// Load average at its start.
    pub(crate) load1: f64,
    /// What transport's example `bulk` printed.
    pub(crate) bulk: Value,
}

/// One attach to a running QEMU.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Attach {
    /// Number, from 0.
    pub(crate) turn: u32,
    /// Time that a thread of QEMU was stopped, in microseconds.
    pub(crate) stopped_us: u64,
    /// The whole attach as the engine sees it, in microseconds.
    pub(crate) attach_us: u64,
    /// Registering and protecting all memory, in microseconds.
    pub(crate) arm_us: u64,
    /// Longest heartbeat gap from the attach until 100 ms later, in microseconds.
    pub(crate) gap_us: u64,
    /// Memory of the guest in bytes.
    pub(crate) ram_bytes: u64,
    /// Of it populated.
    pub(crate) populated_bytes: u64,
    /// Scans of clean memory, the guest stopped: microseconds each.
    pub(crate) clean_scan_us: Vec<u64>,
    /// Pages that the last of these scans found written.
    pub(crate) clean_scan_pages: u64,
}

/// A line of the file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub(crate) enum Record {
    /// What the migrations of the file have in common.
    Scenario {
        /// As it was measured, with what the command line changed.
        scenario: Box<Scenario>,
    },
    /// One migration.
    Migration(Box<Migration>),
    /// One plain quinn transfer.
    Bulk(Bulk),
    /// One attach.
    Attach(Attach),
}

#[derive(Debug, Serialize, Deserialize)]
struct Line {
    v: u32,
    host: Host,
    #[serde(flatten)]
    record: Record,
}

/// Seconds since 1970.
pub(crate) fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Writes a run's records.
#[derive(Debug)]
pub(crate) struct Log {
    file: File,
    path: PathBuf,
    host: Host,
}

impl Log {
    /// Begins `NAME.jsonl` in a folder.
    ///
    /// # Errors
    /// It cannot be written.
    pub(crate) fn create(folder: &Path, name: &str, host: Host) -> Result<Self> {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("Cannot create {}", folder.display()))?;
        let path = folder.join(format!("{name}.jsonl"));
        let file = File::create(&path)
            .with_context(|| format!("Cannot write results to {}", path.display()))?;
        Ok(Self { file, path, host })
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a record.
    ///
    /// # Errors
    /// It cannot be written.
    pub(crate) fn add(&mut self, record: Record) -> Result<()> {
        let line = Line { v: VERSION, host: self.host.clone(), record };
        let text = serde_json::to_string(&line).context("A record cannot be put in JSON")?;
        writeln!(self.file, "{text}")
            .with_context(|| format!("Cannot write {}", self.path.display()))
    }
}

/// What a file holds.
#[derive(Debug)]
pub(crate) struct Recorded {
    /// The machine, of the first line.
    pub(crate) host: Host,
    /// The records in order.
    pub(crate) records: Vec<Record>,
}

/// Reads a file back.
///
/// # Errors
/// It is missing, empty, or has a line that is no record.
pub(crate) fn read(path: &Path) -> Result<Recorded> {
    let shown = path.display();
    let file = File::open(path).with_context(|| format!("Cannot read {shown}"))?;
    let mut host = None;
    let mut records = Vec::new();
    for (at, text) in BufReader::new(file).lines().enumerate() {
        let text = text.with_context(|| format!("Cannot read {shown}"))?;
        anyhow::ensure!(text.len() <= LINE_BYTES_MAX, "Line {} of {shown} is too long", at + 1);
        let mut line: Line = serde_json::from_str(&text)
            .with_context(|| format!("Line {} of {shown} is no record of this bench", at + 1))?;
        if let (1, Record::Migration(one)) = (line.v, &mut line.record) {
            // Then a mode's name said who carried it out.
            one.by = Mode::from_str(&one.mode, false).unwrap_or(Mode::Godwit);
        }
        host.get_or_insert(line.host);
        records.push(line.record);
    }
    let host = host.with_context(|| format!("{shown} is empty: nothing was measured"))?;
    Ok(Recorded { host, records })
}

/// Samples for tests of tables, plots and targets.
#[cfg(test)]
pub(crate) mod samples {
    use super::*;

    pub(crate) fn host() -> Host {
        Host {
            command: vec!["compare".into()],
            kernel: "6.18".into(),
            cpu: "a CPU".into(),
            cpus: 2,
            qemu: "QEMU 7.2".into(),
            migrate: "migrate 0.1.0".into(),
            commit: "abc+".into(),
        }
    }

    pub(crate) fn migration(mode: Mode, turn: u32, outage_ms: f64, total_ms: f64) -> Migration {
        Migration {
            mode: mode.label().to_owned(),
            by: mode,
            send_args: vec![],
            workload: "idle".into(),
            memory_mib: 2048,
            smp: 1,
            link_bits: 1_000_000_000,
            link: "veth".into(),
            turn,
            at_unix_s: 1,
            load1: 0.5,
            outcome: Outcome::Completed,
            error: None,
            total_ms,
            arrived_ms: Some(total_ms - 1.0),
            outage_ms: Some(outage_ms),
            worst_gap_ms: Some(outage_ms),
            stalled_ms: Some(outage_ms - 20.0),
            gap_before_p99_ms: Some(6.0),
            reported_downtime_ms: Some(outage_ms - 5.0),
            reported_total_ms: Some(total_ms),
            wire_out_bytes: 100 << 20,
            wire_back_bytes: 1 << 20,
            samples: vec![
                Sample { ms: 0.0, out_bytes: 0, back_bytes: 0 },
                Sample { ms: total_ms, out_bytes: 100 << 20, back_bytes: 1 << 20 },
            ],
            dirty: vec![Dirty { ms: 0.0, bytes: 200 << 20 }, Dirty { ms: total_ms, bytes: 4096 }],
            compulsory: Some(Compulsory {
                pages: 50_000,
                nonzero_pages: 40_000,
                unique_pages: 30_000,
                bytes: 101 << 19,
            }),
            relay: None,
            cpu: Cpu { machine_s: 3.0, qemu_source_s: 1.0, ..Cpu::default() },
            engine_memory: EngineMemory { source_bytes: Some(50 << 20), destination_bytes: None },
            writer_pages_per_s: None,
            application_per_s: None,
            split: None,
            report: serde_json::json!({ "downtime_parts_ms": { "load": 4.0 } }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = Log::create(folder.path(), "x", samples::host()).unwrap();
        let scenario = Box::new(Scenario::load("ablation").unwrap());
        log.add(Record::Scenario { scenario: scenario.clone() }).unwrap();
        let one = samples::migration(Mode::Xbzrle, 3, 61.5, 4000.0);
        log.add(Record::Migration(Box::new(one))).unwrap();
        let bulk = Bulk { turn: 0, load1: 1.0, bulk: serde_json::json!({ "plain_gbps": 7.5 }) };
        log.add(Record::Bulk(bulk)).unwrap();
        let back = read(log.path()).unwrap();
        assert_eq!(back.host, samples::host());
        match &back.records[..] {
            [Record::Scenario { scenario: read }, Record::Migration(one), Record::Bulk(two)] => {
                assert_eq!(*read, scenario);
                assert_eq!((one.by, one.turn, one.outage_ms), (Mode::Xbzrle, 3, Some(61.5)));
                assert_eq!(one.wire_per_compulsory(), Some(2.0));
                assert_eq!(one.cpu.others_s(), 2.0);
                assert_eq!(two.bulk["plain_gbps"], 7.5);
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn records_of_version_1_are_still_read() {
        let mut one = serde_json::to_value(samples::migration(Mode::PreCopy, 0, 50.0, 900.0));
        let fields = one.as_mut().unwrap().as_object_mut().unwrap();
        for name in ["by", "send_args", "samples", "dirty", "compulsory", "relay", "split"] {
            fields.remove(name);
        }
        fields.insert("kind".into(), "migration".into());
        fields.insert("v".into(), 1.into());
        fields.insert("host".into(), serde_json::to_value(samples::host()).unwrap());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("old.jsonl");
        std::fs::write(&path, format!("{}\n", one.unwrap())).unwrap();
        match &read(&path).unwrap().records[..] {
            [Record::Migration(one)] => {
                assert_eq!((one.by, one.compulsory), (Mode::PreCopy, None));
                assert!(!one.is_ours() && one.is_complete());
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn nonsense_is_named_by_its_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("y.jsonl");
        std::fs::write(&path, "{\"v\":1}\n").unwrap();
        assert!(format!("{:#}", read(&path).unwrap_err()).contains("Line 1"));
        std::fs::write(&path, "").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("empty"));
    }
}
