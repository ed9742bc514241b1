//! The project's targets, judged by what a run recorded.
//!
//! A target appears if the run measured what it speaks of: an idle guest of 2 GiB over 1 Gbit/s,
//! and so on. Where a target names no median, the worst run counts.

use std::collections::BTreeMap;

use crate::mode::Mode;
use crate::record::{Attach, Bulk, Migration, Outcome};
use crate::stats::{Span, percentile, ratios};
use crate::table::{Table, number, span};
use crate::workload::Workload;

/// The rate that the targets speak of.
const LINK_BITS: u64 = 1_000_000_000;

/// The rate that some of them speak of as well.
const SLOW_LINK_BITS: u64 = 100_000_000;

const PAGE_BYTES: f64 = 4096.0;

/// One target.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Target {
    /// What is measured.
    pub(crate) what: String,
    /// The bound, in words.
    pub(crate) bound: String,
    /// What was found.
    pub(crate) found: String,
    /// Whether it is met; nothing if there was nothing to judge by.
    pub(crate) met: Option<bool>,
}

fn judge(
    what: &str,
    bound: &str,
    found: Option<(f64, Option<Span>)>,
    met: fn(f64) -> bool,
) -> Target {
    Target {
        what: what.to_owned(),
        bound: bound.to_owned(),
        found: found.map_or_else(
            || "nothing measured".to_owned(),
            |(value, all)| format!("{}; {} of {}", number(value), span(all), count(all)),
        ),
        met: found.map(|(value, _)| met(value)),
    }
}

fn count(all: Option<Span>) -> usize {
    all.map_or(0, |all| all.count)
}

/// A value of each completed migration of a mode, by turn.
pub(crate) fn by_turn(
    all: &[&Migration],
    mode: Mode,
    value: impl Fn(&Migration) -> Option<f64>,
) -> BTreeMap<u32, f64> {
    let own = all.iter().filter(|one| one.mode == mode && one.outcome == Outcome::Completed);
    own.filter_map(|one| Some((one.turn, value(one)?))).collect()
}

/// Median of the ratios to that of QEMU's modes against which Godwit does worst.
fn against_best(
    all: &[&Migration],
    value: fn(&Migration) -> Option<f64>,
) -> Option<(f64, Option<Span>)> {
    let ours = by_turn(all, Mode::Godwit, value);
    let others = Mode::ALL.into_iter().filter(|mode| *mode != Mode::Godwit);
    let spans = others.filter_map(|mode| Span::of(ratios(&ours, &by_turn(all, mode, value))));
    let worst = spans.max_by(|a, b| a.median.total_cmp(&b.median))?;
    Some((worst.median, Some(worst)))
}

/// Bytes both ways.
pub(crate) fn wire_bytes(one: &Migration) -> f64 {
    (one.wire_out_bytes + one.wire_back_bytes) as f64
}

/// Of a shaped link: the idle guest's or the writer's targets.
pub(crate) fn of_compare(all: &[&Migration]) -> Vec<Target> {
    let Some(first) = all.first() else { return vec![] };
    let slow = first.link_bits == SLOW_LINK_BITS && first.workload == Workload::WriterText;
    if (first.link_bits != LINK_BITS && !slow) || first.memory_mib != 2048 {
        return vec![];
    }
    let outages = Span::of(by_turn(all, Mode::Godwit, |one| one.outage_ms).into_values());
    match first.workload {
        Workload::Idle => {
            let pair = |mode: Mode, value: fn(&Migration) -> Option<f64>| {
                let ours = by_turn(all, Mode::Godwit, value);
                let all = Span::of(ratios(&ours, &by_turn(all, mode, value)))?;
                Some((all.median, Some(all)))
            };
            let outage = outages.map(|all| (all.median, Some(all)));
            let mut targets =
                vec![judge("outage, idle guest, median, ms", "<= 60", outage, |ms| ms <= 60.0)];
            for mode in [Mode::PreCopy, Mode::PreCopyPrivate] {
                let text = |what: &str| format!("{what} / {mode}'s, median of pairs");
                let total = pair(mode, |one| Some(one.total_ms));
                let arrival = pair(mode, |one| one.arrived_ms);
                let wire = pair(mode, |one| Some(wire_bytes(one)));
                targets.extend([
                    judge(&text("total time"), "<= 1", total, |ratio| ratio <= 1.0),
                    judge(&text("time to arrival"), "<= 1", arrival, |ratio| ratio <= 1.0),
                    judge(&text("wire bytes"), "<= 1.05", wire, |ratio| ratio <= 1.05),
                ]);
            }
            targets
        }
        Workload::Writer | Workload::WriterRandom => {
            let ours: Vec<&&Migration> =
                all.iter().filter(|one| one.mode == Mode::Godwit).collect();
            let completed = ours.iter().filter(|one| one.outcome == Outcome::Completed).count();
            let worst = outages.map(|all| (all.max, Some(all)));
            vec![
                Target {
                    what: "migrations of the writer that completed".into(),
                    bound: "all".into(),
                    found: format!("{completed} of {}", ours.len()),
                    met: (!ours.is_empty()).then_some(completed == ours.len()),
                },
                judge("outage, writer, worst, ms", "<= 150", worst, |ms| ms <= 150.0),
            ]
        }
        Workload::WriterText => {
            let outage = outages.map(|all| (all.median, Some(all)));
            let best = |value: fn(&Migration) -> Option<f64>| against_best(all, value);
            let wire = best(|one| Some(wire_bytes(one)));
            let total = best(|one| Some(one.total_ms));
            vec![
                judge("wire bytes / the best of QEMU's modes", "<= 0.55", wire, |r| r <= 0.55),
                judge("total time / the best of QEMU's modes", "<= 0.6", total, |r| r <= 0.6),
                judge("outage, writer, median, ms", "<= 60", outage, |ms| ms <= 60.0),
            ]
        }
        Workload::Text | Workload::Resident => vec![],
    }
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
    let ours = by_turn(moved, Mode::Godwit, round_one_gbps);
    let judged = |(kind, words)| {
        let pairs = Span::of(ratios(&ours, &plain_gbps(plain, kind)));
        let what = format!("goodput of round 1 / plain quinn {words} over loopback");
        judge(&what, ">= 0.8", pairs.map(|all| (all.median, Some(all))), |ratio| ratio >= 0.8)
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
            |us| us < 1000.0,
        ),
        judge("scan of clean memory, ms/GiB (then us/GiB)", "<= 2", ms, |ms| ms <= 2.0),
        judge(
            "engine's tables, bytes a page",
            "<= 16",
            tables.map(|all| (all.max, Some(all))),
            |bytes| bytes <= 16.0,
        ),
    ]
}

/// As Markdown; empty if there is no target.
pub(crate) fn markdown(targets: &[Target]) -> String {
    if targets.is_empty() {
        return String::new();
    }
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
    format!("## Targets\n\n{}\n", table.markdown())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::samples::migration;

    #[test]
    fn an_idle_guest_is_judged_by_medians_and_pairs() {
        let runs: Vec<Migration> = (0..3)
            .flat_map(|turn| {
                let ours = migration(Mode::Godwit, turn, 50.0 + f64::from(turn) * 8.0, 1000.0);
                [ours, migration(Mode::PreCopy, turn, 300.0, 900.0)]
            })
            .collect();
        let all: Vec<&Migration> = runs.iter().collect();
        let met: Vec<Option<bool>> = of_compare(&all).iter().map(|one| one.met).collect();
        let private = [None, None, None];
        assert_eq!(met[..4], [Some(true), Some(false), Some(false), Some(true)]);
        assert_eq!(met[4..], private);
    }

    #[test]
    fn the_writer_is_judged_by_its_worst_run() {
        let mut runs =
            vec![migration(Mode::Godwit, 0, 100.0, 1.0), migration(Mode::Godwit, 1, 160.0, 1.0)];
        runs.iter_mut().for_each(|one| one.workload = Workload::Writer);
        let met = |runs: &[Migration]| -> Vec<Option<bool>> {
            of_compare(&runs.iter().collect::<Vec<_>>()).iter().map(|one| one.met).collect()
        };
        assert_eq!(met(&runs), [Some(true), Some(false)]);
        runs[1].outcome = Outcome::NotConverged;
        assert_eq!(met(&runs), [Some(false), Some(true)]);
        runs[0].link_bits = 1;
        assert!(met(&runs).is_empty());
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
