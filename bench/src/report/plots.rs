//! Plots of a report.

use super::{MIB, Value, is_ours, modes};
use crate::document::Block;
use crate::mode::Mode;
use crate::record::{Bulk, Migration};
use crate::svg::{Line, Series, bars, distribution, lines};
use crate::targets::{PLAIN, by_turn, plain_gbps, round_one_gbps};

fn series(moved: &[&Migration], value: Value) -> Vec<Series> {
    let one = |mode: &str| Series {
        label: mode.to_owned(),
        values: by_turn(moved, mode, value).into_values().collect(),
        ours: is_ours(moved, mode),
    };
    modes(moved).into_iter().map(one).collect()
}

/// The run of a mode that stands for the others: of those that completed, the middle one by its
/// total time; the first if none did.
fn middle<'a>(moved: &[&'a Migration], mode: &str) -> Option<&'a Migration> {
    let own = || moved.iter().copied().filter(|one| one.mode == mode);
    let mut completed: Vec<&Migration> = own().filter(|one| one.is_complete()).collect();
    completed.sort_by(|a, b| a.total_ms.total_cmp(&b.total_ms));
    completed.get(completed.len() / 2).copied().or_else(|| own().next())
}

/// A line a mode, of its middle run.
fn over_time(moved: &[&Migration], points: impl Fn(&Migration) -> Vec<(f64, f64)>) -> Vec<Line> {
    let one = |mode: &str| {
        let points = points(middle(moved, mode)?);
        (!points.is_empty()).then(|| Line {
            label: mode.to_owned(),
            points,
            ours: is_ours(moved, mode),
            has_dots: false,
        })
    };
    modes(moved).into_iter().filter_map(one).collect()
}

/// Of a comparison; `name` begins the titles.
pub(super) fn compare(name: &str, moved: &[&Migration]) -> Vec<Block> {
    if moved.is_empty() {
        return vec![];
    }
    let title = |what: &str| format!("{what}: {name}");
    let outages = series(moved, |one| one.outage_ms);
    let totals = series(moved, |one| Some(one.total_ms / 1e3));
    let bytes = series(moved, |one| Some(one.wire_bytes() / MIB));
    let mut blocks = vec![
        Block::Heading("Plots".into()),
        plot("outage", bars(&title("Outage"), "ms without a heartbeat", &outages)),
        plot(
            "distribution",
            distribution(&title("Outage, every run"), "ms without a heartbeat (log)", &outages),
        ),
        plot("total", bars(&title("Total time"), "seconds", &totals)),
        plot("wire", bars(&title("Bytes on the link, both ways"), "MiB", &bytes)),
    ];
    let carried = over_time(moved, |one| {
        let point = |at: &crate::sample::Sample| (at.ms / 1e3, at.out_bytes as f64 / MIB);
        one.samples.iter().map(point).collect()
    });
    if !carried.is_empty() {
        let text = lines(&title("Bytes over time, middle runs"), ("seconds", "MiB sent"), &carried);
        blocks.push(plot("bytes", text));
    }
    let dirty = over_time(moved, |one| {
        one.dirty.iter().map(|at| (at.ms / 1e3, at.bytes as f64 / MIB)).collect()
    });
    if !dirty.is_empty() {
        let text = lines(
            &title("Left to send when a round or pass began, middle runs"),
            ("seconds", "MiB"),
            &dirty,
        );
        blocks.push(plot("dirty", text));
        blocks.push(Block::Text(
            "Left to send: at the beginning of each round by Godwit's report, and of each pass by \
             QEMU's account, at most five times a second. QEMU counts pages that it has not looked \
             at, zeros and holes included; Godwit counts pages that are no holes."
                .into(),
        ));
    }
    blocks
}

fn plot(name: &'static str, svg: String) -> Block {
    Block::Plot { name, svg }
}

/// Of goodput on an unshaped link.
pub(super) fn throughput(moved: &[&Migration], plain: &[&Bulk]) -> Block {
    let mut rows: Vec<Series> = PLAIN
        .into_iter()
        .map(|(kind, words)| Series {
            label: format!("plain quinn {words}"),
            values: plain_gbps(plain, kind).into_values().collect(),
            ours: false,
        })
        .collect();
    for link in ["loopback", "veth"] {
        let own: Vec<&Migration> = moved.iter().copied().filter(|one| one.link == link).collect();
        if !own.is_empty() {
            let values =
                by_turn(&own, Mode::Godwit.label(), round_one_gbps).into_values().collect();
            rows.push(Series { label: format!("godwit, {link}"), values, ours: true });
        }
    }
    plot("goodput", bars("Goodput on an unshaped link", "Gbit/s", &rows))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Outcome;
    use crate::record::samples::migration;

    #[test]
    fn the_middle_run_is_one_that_completed() {
        let mut runs: Vec<Migration> = [900.0, 100.0, 500.0, 50.0]
            .into_iter()
            .zip(0..)
            .map(|(total, turn)| migration(Mode::Godwit, turn, 1.0, total))
            .collect();
        runs[3].outcome = Outcome::Failed;
        let all: Vec<&Migration> = runs.iter().collect();
        assert_eq!(middle(&all, "godwit").unwrap().total_ms, 500.0);
        assert_eq!(middle(&all[3..], "godwit").unwrap().total_ms, 50.0);
        assert!(middle(&all, "xbzrle").is_none());
    }
}
