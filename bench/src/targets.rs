//! Targets, judged by what a run recorded: those that a scenario names, and those of throughput and
//! of attaching.

use std::collections::BTreeMap;

use framework::split::Faults;

use crate::mode::Mode;
use crate::record::{Attach, Bulk, Migration};
use crate::scenario::{AccessPhase, Among, BEST_OF_QEMU, Quantity, Scenario, TargetPart};
use crate::stats::{Span, percentile, ratios};
use crate::table::{Table, number, span};

const PAGE_BYTES: f64 = 4096.0;
const MIB: f64 = 1_048_576.0;

/// One target.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Target {
    /// What is measured.
    pub(crate) what: String,
    /// The bound, in words.
    pub(crate) bound: String,
    /// What was found.
    pub(crate) found: String,
    /// Whether it is met; nothing if there was nothing to judge, or nothing to judge by.
    pub(crate) met: Option<bool>,
}

fn judge(
    what: &str,
    bound: &str,
    found: Option<(f64, Option<Span>)>,
    met: impl Fn(f64) -> Option<bool>,
) -> Target {
    Target {
        what: what.to_owned(),
        bound: bound.to_owned(),
        found: found.map_or_else(
            || "not measured".to_owned(),
            |(value, all)| format!("{}; {} of {}", number(value), span(all), count(all)),
        ),
        met: found.and_then(|(value, _)| met(value)),
    }
}

fn count(all: Option<Span>) -> usize {
    all.map_or(0, |all| all.count)
}

/// A value of each completed migration of a mode, by turn.
pub(crate) fn by_turn(
    all: &[&Migration],
    mode: &str,
    value: impl Fn(&Migration) -> Option<f64>,
) -> BTreeMap<u32, f64> {
    let own = all.iter().filter(|one| one.mode == mode && one.is_complete());
    own.filter_map(|one| Some((one.turn, value(one)?))).collect()
}

/// A quantity of one migration.
fn value(what: Quantity, one: &Migration) -> Option<f64> {
    match what {
        Quantity::OutageMs => one.outage_ms,
        Quantity::StalledMs => one.stalled_ms,
        Quantity::TotalMs => Some(one.total_ms),
        Quantity::ArrivalMs => one.arrived_ms,
        Quantity::WireBytes => Some(one.wire_bytes()),
        Quantity::WirePerCompulsory => one.wire_per_compulsory(),
        Quantity::FaultMedianUs => {
            paged_us(one, |faults| faults.p50_us).or_else(|| fault_us(one, "p50_us"))
        }
        Quantity::FaultP99Us => {
            paged_us(one, |faults| faults.p99_us).or_else(|| fault_us(one, "p99_us"))
        }
        Quantity::SendMemoryMib => one.engine_memory.source_bytes.map(mib),
        Quantity::ReceiveMemoryMib => one.engine_memory.destination_bytes.map(mib),
        Quantity::CpuSPerGb => one.cpu_s_per_gb(),
        Quantity::QemuMibPerS => qemu_mib_per_s(one),
        Quantity::ToServersBytes => one.report["split"]["to_servers_bytes"].as_f64(),
        Quantity::HotMibPerS => work_mib_per_s(one, AccessPhase::Hot),
        Quantity::FreshMibPerS => work_mib_per_s(one, AccessPhase::Fresh),
        Quantity::UsedMibPerS => work_mib_per_s(one, AccessPhase::Used),
        Quantity::BothMibPerS => work_mib_per_s(one, AccessPhase::Both),
        Quantity::Completed => Some(f64::from(u8::from(one.is_complete()))),
    }
}

/// A figure of the faults of a split guest, from the split until the end of its work.
fn paged_us(one: &Migration, figure: fn(&Faults) -> u64) -> Option<f64> {
    let faults = one.split.as_ref()?.status.as_ref()?.faults;
    (faults.fetched > 0).then(|| figure(&faults) as f64)
}

/// A figure of the faults that waited for a page, if there were any.
fn fault_us(one: &Migration, figure: &str) -> Option<f64> {
    let faults = &one.report["faults"];
    faults["count"].as_u64().filter(|count| *count > 0)?;
    faults[figure].as_f64()
}

/// What the guest's worker went through in a phase after its arrival.
fn work_mib_per_s(one: &Migration, phase: AccessPhase) -> Option<f64> {
    one.split.as_ref()?.mib_per_s(phase)
}

/// What the source's QEMU sent a second, to the destination or to its gateway.
fn qemu_mib_per_s(one: &Migration) -> Option<f64> {
    let bytes = one.report["ram"]["transferred"].as_u64()?;
    (one.total_ms > 0.0).then(|| mib(bytes) / one.total_ms * 1e3)
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB
}

/// The runs that a target speaks of: values, or ratios of pairs.
fn runs(target: &TargetPart, mode: &str, all: &[&Migration]) -> Option<Span> {
    let of = |mode: &str| by_turn(all, mode, |one| value(target.what, one));
    match target.against.as_deref() {
        None => Span::of(of(mode).into_values()),
        Some(BEST_OF_QEMU) => {
            let mut others: Vec<&str> =
                all.iter().filter(|one| !one.is_ours()).map(|one| one.mode.as_str()).collect();
            others.sort_unstable();
            others.dedup();
            let spans = others.iter().filter_map(|other| Span::of(ratios(&of(mode), &of(other))));
            spans.max_by(|a, b| a.median.total_cmp(&b.median))
        }
        Some(other) => Span::of(ratios(&of(mode), &of(other))),
    }
}

/// Those of a scenario.
pub(crate) fn of_scenario(scenario: &Scenario, all: &[&Migration]) -> Vec<Target> {
    let plans = scenario.modes.plans();
    let judged = |target: &TargetPart| {
        let mode = target.mode(&plans).unwrap_or_default();
        let own = || all.iter().filter(|one| one.mode == mode);
        let found = if target.what == Quantity::Completed {
            let share = Span::of(own().filter_map(|one| value(target.what, one)));
            let whole = own().count() as f64;
            let sum: f64 = own().filter_map(|one| value(target.what, one)).sum();
            share.map(|all| (sum / whole, Some(all)))
        } else {
            runs(target, mode, all).map(|all| {
                let value = match target.among {
                    Among::Median => all.median,
                    Among::Worst if target.at_most.is_some() => all.max,
                    Among::Worst => all.min,
                };
                (value, Some(all))
            })
        };
        judge(&target.shown(), &target.bound(), found, |value| target.is_met_by(value))
    };
    scenario.targets.iter().map(judged).collect()
}

/// Bits a second in round 1 by Godwit's report, in Gbit/s: from its first page until the last one
/// was handed to the lanes, which hold what 60 ms take at most.
pub(crate) fn round_one_gbps(one: &Migration) -> Option<f64> {
    let round = one.report["rounds"].get(0)?;
    let (pages, ms) = (round["sent"].as_f64()?, round["ms"].as_f64()?);
    (ms > 0.0).then(|| pages * PAGE_BYTES * 8.0 / 1e6 / ms)
}

/// Bits a second over the whole command, in Gbit/s: with contact, stop, device state and all.
pub(crate) fn whole_gbps(one: &Migration) -> Option<f64> {
    let pages = one.report["pages"]["raw"].as_f64()?;
    (one.total_ms > 0.0).then(|| pages * PAGE_BYTES * 8.0 / 1e6 / one.total_ms)
}

/// The plain transfers that Godwit is compared with: from memory to memory, as it moves pages; and
/// into nothing, which shows what finding and copying memory costs. (Field of the record, in words.)
pub(crate) const PLAIN: [(&str, &str); 2] =
    [("memory_gbps", "from memory to memory"), ("plain_gbps", "into nothing")];

/// Gbit/s of the plain transfers of a kind, by turn.
pub(crate) fn plain_gbps(all: &[&Bulk], kind: &str) -> BTreeMap<u32, f64> {
    all.iter().filter_map(|one| Some((one.turn, one.bulk[kind].as_f64()?))).collect()
}

/// Of an unshaped link.
pub(crate) fn of_throughput(moved: &[&Migration], plain: &[&Bulk]) -> Vec<Target> {
    let ours = by_turn(moved, Mode::Godwit.label(), round_one_gbps);
    let judged = |(kind, words)| {
        let pairs = Span::of(ratios(&ours, &plain_gbps(plain, kind)));
        let what = format!("goodput of round 1 / plain quinn {words} over loopback");
        let found = pairs.map(|all| (all.median, Some(all)));
        judge(&what, ">= 0.8", found, |ratio| Some(ratio >= 0.8))
    };
    PLAIN.into_iter().map(judged).collect()
}

/// Microseconds to scan a GiB of populated, clean memory: the median of an attach's scans.
pub(crate) fn scan_us_per_gib(one: &Attach) -> Option<f64> {
    let median = Span::of(one.clean_scan_us.iter().map(|us| *us as f64))?.median;
    (one.populated_bytes > 0).then(|| median * f64::from(1 << 30) / one.populated_bytes as f64)
}

/// Of attaching.
pub(crate) fn of_attach(attached: &[&Attach], moved: &[&Migration]) -> Vec<Target> {
    let stopped: Vec<u64> = attached.iter().map(|one| one.stopped_us).collect();
    let all = Span::of(stopped.iter().map(|us| *us as f64));
    let share = percentile(&stopped, 0.95).unwrap_or(0);
    let scans = Span::of(attached.iter().filter_map(|one| scan_us_per_gib(one)));
    let tables =
        Span::of(moved.iter().filter_map(|one| one.report["table_bytes_per_page"].as_f64()));
    let ms = scans.map(|all| (all.median / 1e3, Some(all)));
    vec![
        judge(
            &format!("attach, QEMU thread stopped, worst, us (95 %: {share})"),
            "< 1000",
            all.map(|all| (all.max, Some(all))),
            |us| Some(us < 1000.0),
        ),
        judge("scan of clean memory, ms/GiB (then us/GiB)", "<= 2", ms, |ms| Some(ms <= 2.0)),
        judge(
            "engine's tables, bytes a page",
            "<= 16",
            tables.map(|all| (all.max, Some(all))),
            |bytes| Some(bytes <= 16.0),
        ),
    ]
}

/// As a table.
pub(crate) fn table(targets: &[Target]) -> Table {
    let mut table = Table::new(&["target", "bound", "measured; median (min-max) of runs", "met"]);
    for target in targets {
        let met = match target.met {
            Some(true) => "yes",
            Some(false) => "NO",
            None => "-",
        };
        table.row(vec![
            target.what.clone(),
            target.bound.clone(),
            target.found.clone(),
            met.to_owned(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::samples::migration;

    fn met(name: &str, runs: &[Migration]) -> Vec<Option<bool>> {
        let scenario = Scenario::load(name).unwrap();
        let all: Vec<&Migration> = runs.iter().collect();
        of_scenario(&scenario, &all).iter().map(|one| one.met).collect()
    }

    #[test]
    fn an_idle_guest_is_judged_by_medians_and_pairs() {
        let runs: Vec<Migration> = (0..3)
            .flat_map(|turn| {
                let ours = migration(Mode::Godwit, turn, 50.0 + f64::from(turn) * 8.0, 1000.0);
                [ours, migration(Mode::PreCopy, turn, 300.0, 900.0)]
            })
            .collect();
        let met = met("idle", &runs);
        assert_eq!(met[..4], [Some(true), Some(false), Some(false), Some(true)]);
        assert_eq!(met[4..7], [None, None, None]);
        assert_eq!(met[7..9], [Some(false), Some(true)], "outage in the median and at worst");
    }

    #[test]
    fn the_writer_is_judged_by_its_worst_run() {
        let mut runs =
            vec![migration(Mode::Godwit, 0, 100.0, 1.0), migration(Mode::Godwit, 1, 160.0, 1.0)];
        assert_eq!(met("writer", &runs), [Some(true), Some(false)]);
        runs[1].outcome = crate::record::Outcome::NotConverged;
        assert_eq!(met("writer", &runs), [Some(false), Some(true)]);
    }

    #[test]
    fn the_best_of_qemu_is_the_one_that_is_hardest_to_beat() {
        let runs = [
            migration(Mode::Godwit, 0, 50.0, 1000.0),
            migration(Mode::PreCopy, 0, 50.0, 4000.0),
            migration(Mode::MultifdZstd, 0, 50.0, 1500.0),
        ];
        let scenario = Scenario::load("writer-text").unwrap();
        let all: Vec<&Migration> = runs.iter().collect();
        let total = &of_scenario(&scenario, &all)[1];
        assert!(total.found.starts_with("0.67"), "{total:?}");
        assert_eq!(total.met, Some(false));
    }

    fn named(mode: &str, total_ms: f64, wire_bytes: u64) -> Migration {
        Migration {
            mode: mode.into(),
            wire_out_bytes: wire_bytes,
            wire_back_bytes: 0,
            ..migration(Mode::Godwit, 0, 50.0, total_ms)
        }
    }

    #[test]
    fn faults_are_judged_by_the_report_of_the_mode() {
        let with = |mode: &str, p50_us: u32, p99_us: u32| Migration {
            report: serde_json::json!({
                "faults": { "count": 300, "p50_us": p50_us, "p99_us": p99_us },
            }),
            ..named(mode, 900.0, 1)
        };
        let runs = [with("idle-lanes", 75, 477), with("push", 2000, 603)];
        assert_eq!(met("faults", &runs), [Some(true), Some(false), Some(true)]);
        let mut quiet = with("idle-lanes", 0, 0);
        quiet.report["faults"]["count"] = 0.into();
        let unknown = named("push", 900.0, 1);
        assert_eq!(met("faults", &[quiet, unknown]), [None; 3], "no fault, and no word of faults");
        assert_eq!(met("writer-pages", &[with("godwit", 1, 1001)])[2], Some(false));
    }

    #[test]
    fn memory_is_that_of_the_worst_run() {
        let judged = |mib: &[Option<u64>]| {
            let one = |(turn, mib): (u32, &Option<u64>)| {
                let mut one = Migration { turn, ..named("godwit", 900.0, 1) };
                one.engine_memory.source_bytes = mib.map(|mib| mib << 20);
                one
            };
            met("sparse-64g", &(0..).zip(mib).map(one).collect::<Vec<_>>())[1]
        };
        assert_eq!(judged(&[Some(306), Some(99)]), Some(true));
        assert_eq!(judged(&[Some(600), Some(99), Some(99)]), Some(false));
        assert_eq!(judged(&[None]), None, "an older record");
    }

    #[test]
    fn processor_time_is_shown_for_both_and_not_judged() {
        let ours = Migration { mode: "godwit".into(), ..named("godwit", 900.0, 500_000_000) };
        let theirs = Migration {
            wire_out_bytes: 250_000_000,
            wire_back_bytes: 0,
            ..migration(Mode::MultifdTls, 0, 50.0, 1000.0)
        };
        let scenario = Scenario::load("incompressible").unwrap();
        let targets = of_scenario(&scenario, &[&ours, &theirs]);
        let found: Vec<&str> = targets[1..].iter().map(|one| one.found.as_str()).collect();
        assert!(found[0].starts_with("2.00") && found[1].starts_with("4.00"), "{targets:?}");
        assert_eq!(targets[1..].iter().map(|one| one.met).collect::<Vec<_>>(), [None; 2]);
    }

    #[test]
    fn streams_and_gateways_are_judged_by_the_best_of_qemu_each() {
        let run = |mode: Mode, outage_ms, total_ms, wire_out_bytes| Migration {
            wire_out_bytes,
            wire_back_bytes: 0,
            ..migration(mode, 0, outage_ms, total_ms)
        };
        let runs = [
            run(Mode::Stream, 90.0, 690.0, 610),
            run(Mode::Gateway, 300.0, 710.0, 590),
            run(Mode::PreCopy, 50.0, 1000.0, 4000),
            run(Mode::Xbzrle, 50.0, 4000.0, 1000),
        ];
        let wanted = [false, true, true, false, true].map(Some);
        for name in ["stream-writer-text", "stream-writer-text-100m"] {
            assert_eq!(met(name, &runs), wanted, "{name}");
        }
        for name in ["stream-idle", "stream-idle-100m"] {
            assert_eq!(met(name, &runs), [Some(true); 2], "{name}");
            assert_eq!(met(name, &runs[..2]), [None; 2], "{name} without QEMU's modes");
        }
    }

    #[test]
    fn a_gateways_throughput_is_that_of_qemus_stream() {
        let judged = |gateway_ms| {
            let run = |mode: Mode, total_ms| Migration {
                report: serde_json::json!({ "ram": { "transferred": 1u64 << 30 } }),
                ..migration(mode, 0, 50.0, total_ms)
            };
            let runs = [run(Mode::GatewayPlain, gateway_ms), run(Mode::PreCopyPrivate, 1000.0)];
            met("gateway-overhead", &runs)[0]
        };
        assert_eq!([1600.0, 1700.0].map(judged), [Some(true), Some(false)]);
        let silent = migration(Mode::GatewayPlain, 0, 50.0, 1.0);
        let other = migration(Mode::PreCopyPrivate, 0, 50.0, 1.0);
        assert_eq!(met("gateway-overhead", &[silent, other])[0], None, "QEMU told nothing");
    }

    #[test]
    fn parts_of_an_ablation_are_judged_by_its_base_and_all_of_them_by_compression() {
        let runs = [
            named("base", 1000.0, 1000),
            named("+delta", 700.0, 740),
            named("+order", 930.0, 1010),
            named("+compression", 300.0, 40),
            named("all", 300.0, 90),
        ];
        let wanted = [false, true, true, false, true, false].map(Some);
        for name in ["ablation", "ablation-100m"] {
            assert_eq!(met(name, &runs), wanted, "{name}");
            assert_eq!(met(name, &runs[1..3])[..4], [None; 4], "{name} without its base");
        }
    }

    #[test]
    fn goodput_is_of_the_first_round() {
        let mut one = migration(Mode::Godwit, 0, 1.0, 2000.0);
        one.report = serde_json::json!({
            "rounds": [{ "sent": 250_000, "ms": 1000.0 }], "pages": { "raw": 250_000 },
        });
        assert!((round_one_gbps(&one).unwrap() - 8.192).abs() < 1e-9);
        assert!((whole_gbps(&one).unwrap() - 4.096).abs() < 1e-9);
        let plain = serde_json::json!({ "memory_gbps": 10.24, "plain_gbps": 20.48 });
        let bulk = Bulk { turn: 0, load1: 0.0, bulk: plain };
        let targets = of_throughput(&[&one], &[&bulk]);
        assert_eq!(targets[0].met, Some(true));
        assert!(targets[0].found.starts_with("0.80"), "{targets:?}");
        assert_eq!(targets[1].met, Some(false));
        assert!(targets[1].found.starts_with("0.40"), "{targets:?}");
        assert_eq!(of_throughput(&[], &[&bulk])[0].met, None);
    }

    #[test]
    fn scans_are_per_populated_gib() {
        let one = Attach {
            turn: 0,
            stopped_us: 1200,
            attach_us: 2000,
            arm_us: 1,
            gap_us: 1,
            ram_bytes: 4 << 30,
            populated_bytes: 2 << 30,
            clean_scan_us: vec![3000, 3400, 3200],
            clean_scan_pages: 0,
        };
        assert_eq!(scan_us_per_gib(&one), Some(1600.0));
        let met: Vec<Option<bool>> = of_attach(&[&one], &[]).iter().map(|t| t.met).collect();
        assert_eq!(met, [Some(false), Some(true), None]);
    }
}
