//! Tables and plots of split guests, and the speed-up by the share of memory in use over all records of a
//! folder.
//!
//! Speed-up: the baseline's total time by that of the scenario's first mode that splits, pair by pair. The ideal is
//! that time follows what the guest uses: 1 by the share in use.

use super::{MIB, Value, is_ours, modes as names};
use crate::document::Block;
use crate::record::{Migration, Record, Recorded};
use crate::scenario::{AccessPhase, Kind, Scenario};
use crate::split::{Access, Worked};
use crate::stats::{Span, ratios};
use crate::svg::{Line, Series, bars, lines};
use crate::table::{Table, span};
use crate::targets::by_turn;

const PAGE_BYTES: f64 = 4096.0;

/// Points of the ideal line.
const IDEAL_POINTS: u32 = 60;

/// What is shown of an account of a guest's work.
type OfWorked = fn(&Worked) -> Option<f64>;

/// What is shown of an account of a phase.
type OfAccess = fn(&Access) -> Option<f64>;

/// Columns of what went where, by the report of `migrate split`.
const COLUMNS: [(&str, Value); 5] = [
    ("in use %", |one| Some(100.0 * in_use(one)?)),
    ("at the main host MiB", |one| pages_mib(&one.report["split"]["resident_pages"])),
    ("on servers MiB", remote_mib),
    ("sent to servers MiB", |one| Some(one.report["split"]["to_servers_bytes"].as_f64()? / MIB)),
    ("total ms", |one| Some(one.total_ms)),
];

/// Columns of the pager's account from the split until the end of the work.
const PAGER_COLUMNS: [(&str, OfWorked); 8] = [
    ("faults", |one| Some(one.status.as_ref()?.faults.count as f64)),
    ("of them served by a server", |one| Some(one.status.as_ref()?.faults.fetched as f64)),
    ("median us", |one| Some(one.status.as_ref()?.faults.p50_us as f64)),
    ("99 % us", |one| Some(one.status.as_ref()?.faults.p99_us as f64)),
    ("read ahead, used %", |one| {
        let ahead = one.status.as_ref()?.read_ahead;
        (ahead.pages > 0).then(|| 100.0 * ahead.used as f64 / ahead.pages as f64)
    }),
    ("evicted pages", |one| Some(one.status.as_ref()?.evicted.pages as f64)),
    ("of them clean", |one| Some(one.status.as_ref()?.evicted.clean as f64)),
    ("reclaimed pages", |one| Some(one.status.as_ref()?.reclaimed_pages as f64)),
];

/// Plots of work, by phase.
const PHASES: [(AccessPhase, &str); 4] = [
    (AccessPhase::Hot, "work-hot"),
    (AccessPhase::Fresh, "work-fresh"),
    (AccessPhase::Used, "work-used"),
    (AccessPhase::Both, "work-both"),
];

/// Share of the guest's memory that it uses, as `migrate split` found it.
fn in_use(one: &Migration) -> Option<f64> {
    let total = one.report["pages"]["total"].as_f64().filter(|pages| *pages > 0.0)?;
    Some(one.report["split"]["in_use_pages"].as_f64()? / total)
}

fn pages_mib(pages: &serde_json::Value) -> Option<f64> {
    Some(pages.as_f64()? * PAGE_BYTES / MIB)
}

fn remote_mib(one: &Migration) -> Option<f64> {
    let servers = one.report["split"]["remote_pages"].as_array()?;
    servers.iter().map(|server| pages_mib(&server["pages"])).sum()
}

fn worked(one: &Migration, value: OfWorked) -> Option<f64> {
    one.split.as_ref().and_then(value)
}

/// An account of a phase, of the first if it ran several times.
fn access(one: &Migration, phase: AccessPhase, value: OfAccess) -> Option<f64> {
    value(one.split.as_ref()?.access.iter().find(|access| access.phase == phase)?)
}

/// The first mode that splits.
fn ours(scenario: &Scenario) -> Option<String> {
    scenario.modes.plans().into_iter().find(|plan| plan.splits).map(|plan| plan.name)
}

/// Baseline by the first mode that splits, of each turn.
fn speed_up(scenario: &Scenario, moved: &[&Migration]) -> Option<Span> {
    let baseline = scenario.split.as_ref()?.baseline.as_ref()?;
    let ours = ours(scenario)?;
    let total = |mode: &str| by_turn(moved, mode, |one| Some(one.total_ms));
    Span::of(ratios(&total(baseline), &total(&ours)))
}

/// Tables and plots of one scenario.
pub(super) fn blocks(name: &str, scenario: &Scenario, moved: &[&Migration]) -> Vec<Block> {
    let all = |mode: &str, value: &dyn Fn(&Migration) -> Option<f64>| {
        span(Span::of(by_turn(moved, mode, value).into_values()))
    };
    let mut heads = vec!["mode"];
    heads.extend(COLUMNS.iter().map(|(head, _)| *head));
    let mut parts = Table::new(&heads);
    let mut heads = vec!["mode"];
    heads.extend(PAGER_COLUMNS.iter().map(|(head, _)| *head));
    let (mut pager, mut paged) = (Table::new(&heads), 0);
    for mode in names(moved) {
        let cells = COLUMNS.iter().map(|(_, value)| all(mode, value));
        parts.row(std::iter::once(mode.to_owned()).chain(cells).collect());
        let is_paged = |one: &Migration| {
            one.mode == mode && one.split.as_ref().is_some_and(|split| split.status.is_some())
        };
        if moved.iter().any(|one| is_paged(one)) {
            let cells = PAGER_COLUMNS.iter();
            let cells = cells.map(|(_, value)| all(mode, &|one| worked(one, *value)));
            pager.row(std::iter::once(mode.to_owned()).chain(cells).collect());
            paged += 1;
        }
    }
    let mut blocks =
        vec![Block::Heading("What went where: median (min-max)".into()), Block::Table(parts)];
    if let Some(all) = speed_up(scenario, moved) {
        let baseline = scenario.split.as_ref().and_then(|split| split.baseline.as_deref());
        blocks.push(Block::Text(format!(
            "Speed-up: {} of {}'s total time; see the page of all records for the ideal.",
            span(Some(all)),
            baseline.unwrap_or_default()
        )));
    }
    blocks.extend(work(name, moved));
    if paged > 0 {
        blocks.extend([
            Block::Heading("The pager, until the end of the work: median (min-max)".into()),
            Block::Table(pager),
        ]);
    }
    blocks
}

/// Work after the arrival, if there was any.
fn work(name: &str, moved: &[&Migration]) -> Vec<Block> {
    const ROWS: [(&str, OfAccess); 3] = [
        ("MiB/s", |access| Some(access.mib_per_s)),
        ("faults served by a server", |access| Some(access.fetched? as f64)),
        ("pages evicted", |access| Some(access.evicted? as f64)),
    ];
    let modes = names(moved);
    let mut table = Table::new(&[&["phase"], &modes[..]].concat());
    let mut blocks = vec![Block::Heading("Work after the arrival: median (min-max)".into())];
    let mut plots = vec![];
    for (phase, plot) in PHASES {
        for (what, value) in ROWS {
            let of = |mode: &&str| {
                Span::of(by_turn(moved, mode, |one| access(one, phase, value)).into_values())
            };
            let all: Vec<Option<Span>> = modes.iter().map(of).collect();
            if all.iter().any(Option::is_some) {
                let cells = all.into_iter().map(span);
                let head = format!("{}, {what}", phase.label());
                table.row(std::iter::once(head).chain(cells).collect());
            }
        }
        let series = |mode: &&str| Series {
            label: (*mode).to_owned(),
            values: by_turn(moved, mode, |one| access(one, phase, |access| Some(access.mib_per_s)))
                .into_values()
                .collect(),
            ours: is_ours(moved, mode),
        };
        let rows: Vec<Series> = modes.iter().map(series).collect();
        if rows.iter().any(|row| !row.values.is_empty()) {
            let title = format!("Work on {} memory: {name}", phase.label());
            plots.push(Block::Plot { name: plot, svg: bars(&title, "MiB/s", &rows) });
        }
    }
    if plots.is_empty() {
        return vec![];
    }
    blocks.push(Block::Table(table));
    blocks.push(Block::Text(
        "hot: pages of an area are read and written whole; fresh: memory is allocated, written, read and \
         freed again; used: pages that were filled before the split are read. All that is read is verified."
            .into(),
    ));
    blocks.extend(plots);
    blocks
}

/// A point of the plot over all records.
#[derive(Debug, Clone, PartialEq)]
struct Point {
    scenario: String,
    memory_mib: u64,
    in_use: f64,
    speed_up: Span,
}

fn point(recorded: &Recorded) -> Option<Point> {
    let mut scenario = None;
    let mut moved = vec![];
    for record in &recorded.records {
        match record {
            Record::Scenario { scenario: one } if one.kind == Kind::Split => scenario = Some(one),
            Record::Migration(one) => moved.push(&**one),
            _ => {}
        }
    }
    let scenario = scenario?;
    // The baseline calls in use whatever was ever touched.
    let ours = ours(scenario)?;
    let shares = moved.iter().filter(|one| one.is_complete() && one.mode == ours);
    Some(Point {
        scenario: scenario.name.clone(),
        memory_mib: scenario.guest.memory_mib,
        in_use: Span::of(shares.filter_map(|one| in_use(one)))?.median,
        speed_up: speed_up(scenario, &moved)?,
    })
}

/// The speed-up over the share of memory in use, if any record tells it.
pub(super) fn across<'a>(records: impl Iterator<Item = &'a Recorded>) -> Option<Vec<Block>> {
    let mut points: Vec<Point> = records.filter_map(point).collect();
    points.sort_by(|a, b| a.in_use.total_cmp(&b.in_use));
    let least = points.first()?.in_use;
    let mut table = Table::new(&["scenario", "in use %", "speed-up", "ideal", "of it %"]);
    for point in &points {
        let ideal = 1.0 / point.in_use;
        table.row(vec![
            point.scenario.clone(),
            format!("{:.1}", 100.0 * point.in_use),
            span(Some(point.speed_up)),
            format!("{ideal:.2}"),
            format!("{:.0}", 100.0 * point.speed_up.median / ideal),
        ]);
    }
    let step = |at: u32| least + (1.0 - least) * f64::from(at) / f64::from(IDEAL_POINTS);
    let ideal = (0..=IDEAL_POINTS).map(step).map(|share| (100.0 * share, 1.0 / share));
    let mut all =
        vec![Line { label: "ideal".into(), points: ideal.collect(), ours: false, has_dots: false }];
    let mut sizes: Vec<u64> = points.iter().map(|point| point.memory_mib).collect();
    sizes.sort_unstable();
    sizes.dedup();
    all.extend(sizes.into_iter().map(|size| {
        let own = points.iter().filter(|point| point.memory_mib == size);
        let points = own.map(|point| (100.0 * point.in_use, point.speed_up.median)).collect();
        Line { label: format!("{} GiB", size as f64 / 1024.0), points, ours: true, has_dots: true }
    }));
    let labels = ("% of the guest's memory in use", "times as fast");
    let svg = lines("Split: speed-up by leaving out what is unused", labels, &all);
    Some(vec![
        Block::Title("Split: speed-up".into()),
        Block::Text(
            "Total time with all memory by that without what the guest does not use, pairs of one turn; the ideal \
             is 1 by the share in use."
                .into(),
        ),
        Block::Table(table),
        Block::Plot { name: "plot", svg },
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::markdown;
    use crate::mode::Mode;
    use crate::record::samples::{host, migration};

    fn one(mode: &str, turn: u32, total_ms: f64, in_use_pages: u64) -> Migration {
        let access =
            |phase, mib_per_s| Access { phase, mib_per_s, fetched: Some(7), evicted: None };
        Migration {
            mode: mode.into(),
            split: Some(Worked {
                access: vec![access(AccessPhase::Fresh, total_ms / 100.0)],
                arrived: None,
                status: None,
            }),
            report: serde_json::json!({
                "pages": { "total": 1000 },
                "split": {
                    "in_use_pages": in_use_pages, "resident_pages": 256, "to_servers_bytes": 1 << 20,
                    "remote_pages": [{ "server": "a", "pages": 512 }, { "server": "b", "pages": 256 }],
                },
            }),
            ..migration(Mode::Godwit, turn, 50.0, total_ms)
        }
    }

    fn recorded(name: &str, runs: Vec<Migration>) -> Recorded {
        let scenario = Box::new(Scenario::load(name).unwrap());
        let runs = runs.into_iter().map(|one| Record::Migration(Box::new(one)));
        let records = std::iter::once(Record::Scenario { scenario }).chain(runs).collect();
        Recorded { host: host(), records }
    }

    fn quarter() -> Vec<Migration> {
        (0..3)
            .flat_map(|turn| {
                let off = 3600.0 + f64::from(turn) * 100.0;
                [one("split", turn, 1000.0, 250), one("split-all", turn, off, 970)]
            })
            .collect()
    }

    #[test]
    fn parts_work_and_speed_up_are_told() {
        let scenario = Scenario::load("split-12g-25").unwrap();
        let runs = quarter();
        let all: Vec<&Migration> = runs.iter().collect();
        assert_eq!(speed_up(&scenario, &all).map(|span| span.median), Some(3.7));
        let text = markdown("x", &blocks("x", &scenario, &all));
        for wanted in ["3.70 (3.60-3.80)", "25.0", "3.00", "fresh, MiB/s", "x-work-fresh.svg"] {
            assert!(text.contains(wanted), "{wanted} in\n{text}");
        }
        assert!(!text.contains("work-hot"), "{text}");
    }

    #[test]
    fn speed_ups_of_all_records_stand_beside_the_ideal() {
        let other = vec![one("split", 0, 1000.0, 500), one("split-all", 0, 1900.0, 960)];
        let all = [recorded("split-12g-25", quarter()), recorded("split-5g-50", other)];
        let blocks = across(all.iter()).unwrap();
        let text = markdown("x", &blocks);
        for wanted in ["split-12g-25", "25.0", "3.70", "4.00", "92", "50.0", "95"] {
            assert!(text.contains(wanted), "{wanted} in\n{text}");
        }
        let Some(Block::Plot { svg, .. }) = blocks.last() else { panic!("{blocks:?}") };
        assert_eq!(svg.matches("<polyline").count(), 3, "the ideal and two sizes of guests");
        assert_eq!(svg.matches("<circle").count(), 2);
    }

    #[test]
    fn records_without_a_pair_tell_nothing() {
        let alone = recorded("split-12g-25", vec![one("split", 0, 1000.0, 250)]);
        let idle = recorded("idle", vec![migration(Mode::Godwit, 0, 50.0, 1000.0)]);
        assert!(across([alone, idle].iter()).is_none());
    }
}
