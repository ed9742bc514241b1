//! What a policy's runs came to, as tables.

use std::fmt::Write as _;

use serde::Serialize;

use super::kept::Kept;
use super::timed::Timing;

/// A policy over all seeds: sums, and means over the seeds where that is said.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Summary {
    pub(super) policy: String,
    pub(super) seeds: usize,
    pub(super) overload_s: f64,
    pub(super) cpu_s: f64,
    pub(super) memory_s: f64,
    pub(super) network_s: f64,
    pub(super) disk_s: f64,
    pub(super) moves: usize,
    pub(super) wire_mib: f64,
    pub(super) ping_pongs: usize,
    pub(super) resizes: usize,
    pub(super) refused: usize,
    /// Mean over the seeds of the runs' means.
    pub(super) response_mean_ms: f64,
    /// Mean over the seeds of the runs' 95th percentiles.
    pub(super) response_p95_ms: f64,
    pub(super) decide: Timing,
}

impl Summary {
    /// Of a policy's runs.
    pub(super) fn of(policy: &str, runs: &[Kept]) -> Self {
        let mut all = Self { policy: policy.to_owned(), ..Self::default() };
        for run in runs.iter().filter(|run| run.policy == policy) {
            all.seeds += 1;
            all.overload_s += run.overload_s;
            all.cpu_s += run.cpu_s;
            all.memory_s += run.memory_s;
            all.network_s += run.network_s;
            all.disk_s += run.disk_s;
            all.moves += run.moves;
            all.wire_mib += run.wire_mib;
            all.ping_pongs += run.ping_pongs;
            all.resizes += run.resizes;
            all.refused += run.refused;
            all.response_mean_ms += run.response_mean_ms;
            all.response_p95_ms += run.response_p95_ms;
            all.decide.add(&run.decide);
        }
        let seeds = all.seeds.max(1) as f64;
        all.response_mean_ms /= seeds;
        all.response_p95_ms /= seeds;
        all
    }
}

/// A number with as many places as its size deserves.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Columns as wide as they must be; the first is text.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max()
    };
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        for (at, (cell, width)) in row.iter().zip(&widths).enumerate() {
            // Writing to a String does not fail.
            let _ = match at {
                0 => write!(text, "  {cell:<width$}"),
                _ => write!(text, "  {cell:>width$}"),
            };
        }
        text.push('\n');
    }
    text
}

fn texts(cells: &[&str]) -> Vec<String> {
    cells.iter().map(|&cell| cell.to_owned()).collect()
}

/// A row a policy.
pub(super) fn table(summary: &[Summary]) -> String {
    let mut rows = vec![
        texts(&[
            "policy", "overload", "CPU", "memory", "network", "disk", "moves", "moved", "back",
            "grows", "refused", "mean", "p95", "decide",
        ]),
        texts(&[
            "",
            "host-s",
            "host-s",
            "host-s",
            "host-s",
            "host-s",
            "",
            "GiB",
            "",
            "",
            "",
            "ms",
            "ms",
            "ms, 99 %, longest",
        ]),
    ];
    for one in summary {
        let decide = format!(
            "{:.2} {:.1} {:.1}",
            one.decide.mean_ms(),
            one.decide.p99_ms,
            one.decide.max_ms
        );
        rows.push(vec![
            one.policy.clone(),
            number(one.overload_s),
            number(one.cpu_s),
            number(one.memory_s),
            number(one.network_s),
            number(one.disk_s),
            one.moves.to_string(),
            number(one.wire_mib / 1024.0),
            one.ping_pongs.to_string(),
            one.resizes.to_string(),
            one.refused.to_string(),
            number(one.response_mean_ms),
            number(one.response_p95_ms),
            decide,
        ]);
    }
    aligned(&rows)
}

/// Each policy that does something against the best of the others that do.
pub(super) fn ratios(summary: &[Summary]) -> Option<String> {
    let acting: Vec<_> = summary.iter().filter(|one| one.policy != "none").collect();
    let mut rows =
        vec![texts(&["policy", "best other", "overload", "moves", "moved", "mean", "p95"])];
    for one in &acting {
        let others = acting.iter().filter(|other| other.policy != one.policy);
        let best = others.min_by(|one, other| one.overload_s.total_cmp(&other.overload_s))?;
        rows.push(vec![
            one.policy.clone(),
            best.policy.clone(),
            ratio(one.overload_s, best.overload_s),
            ratio(one.moves as f64, best.moves as f64),
            ratio(one.wire_mib, best.wire_mib),
            ratio(one.response_mean_ms, best.response_mean_ms),
            ratio(one.response_p95_ms, best.response_p95_ms),
        ]);
    }
    Some(aligned(&rows))
}

fn ratio(one: f64, other: f64) -> String {
    if other > 0.0 {
        format!("{:.3}", one / other)
    } else if one > 0.0 {
        "more than 0".to_owned()
    } else {
        "both 0".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(policy: &str, overload_s: f64) -> Summary {
        Summary { policy: policy.to_owned(), overload_s, wire_mib: 10.0, ..Summary::default() }
    }

    #[test]
    fn each_is_compared_with_the_best_of_the_others_that_act() {
        let text = ratios(&[summary("none", 1.0), summary("a", 50.0), summary("b", 100.0)]);
        let text = text.expect("two policies that act");
        let rows: Vec<Vec<&str>> =
            text.lines().map(|row| row.split_whitespace().collect()).collect();
        assert_eq!(rows[1][..3], ["a", "b", "0.500"]);
        assert_eq!(rows[2][..3], ["b", "a", "2.000"]);
        assert!(ratios(&[summary("none", 1.0), summary("a", 1.0)]).is_none());
        assert_eq!(ratio(1.0, 0.0), "more than 0");
    }

    #[test]
    fn columns_line_up() {
        let text = table(&[summary("none", 1.0), summary("sandpiper", 123_456.0)]);
        let lengths: Vec<usize> = text.lines().map(str::len).collect();
        assert!(lengths.windows(2).all(|pair| pair[0] == pair[1]), "{text}");
    }
}
