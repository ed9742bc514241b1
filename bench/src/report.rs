//! Tables and plots from what was recorded.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::args::ReportArgs;
use crate::mode::Mode;
use crate::record::{Attach, Bulk, Migration, Outcome, Record, Recorded, read};
use crate::stats::{Span, ratios};
use crate::svg::{Series, bars, distribution};
use crate::table::{Table, number, span};
use crate::targets::{
    PLAIN, by_turn, markdown as targets_markdown, of_attach, of_compare, of_throughput, plain_gbps,
    round_one_gbps, scan_us_per_gib, whole_gbps, wire_bytes,
};

const MIB: f64 = 1_048_576.0;

/// What a column or plot shows of a migration.
type Value = fn(&Migration) -> Option<f64>;

/// What a row shows of an attach.
type Quantity = fn(&Attach) -> f64;

/// `bench report`.
///
/// # Errors
/// A file cannot be read, or its tables not be written.
pub(crate) fn again(args: &ReportArgs) -> Result<()> {
    args.files.iter().try_for_each(|path| render(path))
}

/// Prints a file's tables and writes them and the plots beside it.
///
/// # Errors
/// The file cannot be read, or its folder not be written.
pub(crate) fn render(path: &Path) -> Result<()> {
    let recorded = read(path)?;
    let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or("bench");
    let (markdown, plots) = compose(name, &recorded);
    println!("{markdown}");
    let write = |file: String, text: &str| {
        let path = path.with_file_name(file);
        std::fs::write(&path, text).with_context(|| format!("Cannot write {}", path.display()))
    };
    write(format!("{name}.md"), &markdown)?;
    for (what, svg) in &plots {
        write(format!("{name}-{what}.svg"), svg)?;
    }
    eprintln!("Results: {} and, beside it, {name}.md and {} plots", path.display(), plots.len());
    Ok(())
}

/// The Markdown and the plots by their names.
fn compose(name: &str, recorded: &Recorded) -> (String, Vec<(&'static str, String)>) {
    let mut moved: Vec<&Migration> = vec![];
    let mut plain: Vec<&Bulk> = vec![];
    let mut attached: Vec<&Attach> = vec![];
    for record in &recorded.records {
        match record {
            Record::Migration(one) => moved.push(one),
            Record::Bulk(one) => plain.push(one),
            Record::Attach(one) => attached.push(one),
        }
    }
    let mut text = head(name, recorded, &moved);
    let mut plots = vec![];
    if !attached.is_empty() {
        text.push_str(&targets_markdown(&of_attach(&attached, &moved)));
        text.push_str(&attach_table(&attached));
    } else if !plain.is_empty() {
        let loopback: Vec<&Migration> =
            moved.iter().copied().filter(|one| one.link == "loopback").collect();
        text.push_str(&targets_markdown(&of_throughput(&loopback, &plain)));
        text.push_str(&throughput_table(&moved, &plain));
        plots.push(("goodput", throughput_plot(&moved, &plain)));
    } else {
        text.push_str(&targets_markdown(&of_compare(&moved)));
        text.push_str(&compare_tables(&moved));
        plots.extend(compare_plots(&moved));
    }
    text.push_str(&godwit_tables(&moved));
    text.push_str(&failures(&moved));
    if plots.is_empty() {
        return (text, plots);
    }
    text.push_str("## Plots\n\n");
    for (what, _) in &plots {
        let _ = writeln!(text, "![{what}]({name}-{what}.svg)\n");
    }
    (text, plots)
}

fn head(name: &str, recorded: &Recorded, moved: &[&Migration]) -> String {
    let host = &recorded.host;
    let mut text = format!(
        "# {name}\n\n- command: `bench {}`\n- machine: {} x {}, Linux {}\n- {}; {}; sources {}\n",
        host.command.join(" "),
        host.cpus,
        host.cpu,
        host.kernel,
        host.qemu,
        host.migrate,
        host.commit
    );
    if let Some(one) = moved.first() {
        let link = match one.link_bits {
            0 => format!("unshaped {}", one.link),
            bits => format!("{} of {} Mbit/s", one.link, bits / 1_000_000),
        };
        let _ = writeln!(
            text,
            "- guest: {} MiB, {} CPU (TCG), workload {}; link: {link}",
            one.memory_mib, one.smp, one.workload
        );
    }
    let load = Span::of(moved.iter().map(|one| one.load1));
    let _ = writeln!(text, "- load average when a migration began: {}", span(load));
    let rate = Span::of(moved.iter().filter_map(|one| one.writer_pages_per_s));
    if rate.is_some() {
        let _ = writeln!(text, "- pages a second that the guest wrote before: {}", span(rate));
    }
    let gaps = Span::of(moved.iter().filter_map(|one| one.gap_before_p99_ms));
    let _ = writeln!(text, "- heartbeat gaps before, 99th percentile, ms: {}\n", span(gaps));
    text
}

/// The modes that were measured, in the order of [`Mode::ALL`].
fn modes(moved: &[&Migration]) -> Vec<Mode> {
    Mode::ALL.into_iter().filter(|mode| moved.iter().any(|one| one.mode == *mode)).collect()
}

fn mode_span(moved: &[&Migration], mode: Mode, value: Value) -> Option<Span> {
    Span::of(by_turn(moved, mode, value).into_values())
}

/// Columns of the comparison: heading and value.
const COLUMNS: [(&str, Value); 8] = [
    ("outage ms", |one| one.outage_ms),
    ("worst gap ms", |one| one.worst_gap_ms),
    ("stalled ms", |one| one.stalled_ms),
    ("total ms", |one| Some(one.total_ms)),
    ("to arrival ms", |one| one.arrived_ms),
    ("wire MiB", |one| Some(wire_bytes(one) / MIB)),
    ("of it back MiB", |one| Some(one.wire_back_bytes as f64 / MIB)),
    ("own downtime ms", |one| one.reported_downtime_ms),
];

/// CPU columns.
const CPU_COLUMNS: [(&str, Value); 6] = [
    ("send s", |one| Some(one.cpu.engine_source_s)),
    ("receive s", |one| Some(one.cpu.engine_destination_s)),
    ("source QEMU s", |one| Some(one.cpu.qemu_source_s)),
    ("destination QEMU s", |one| Some(one.cpu.qemu_destination_s)),
    ("all others s", |one| Some(one.cpu.others_s())),
    ("guest before, CPUs", |one| Some(one.cpu.guest_before_cpus)),
];

/// What pairs are compared by.
const RATIOS: [(&str, Value); 5] = [
    ("outage", |one| one.outage_ms),
    ("stalled", |one| one.stalled_ms),
    ("total", |one| Some(one.total_ms)),
    ("to arrival", |one| one.arrived_ms),
    ("wire", |one| Some(wire_bytes(one))),
];

fn columns(moved: &[&Migration], columns: &[(&str, Value)]) -> String {
    let mut heads = vec!["mode", "completed"];
    heads.extend(columns.iter().map(|(name, _)| *name));
    let mut table = Table::new(&heads);
    for mode in modes(moved) {
        let own = || moved.iter().filter(|one| one.mode == mode);
        let completed = own().filter(|one| one.outcome == Outcome::Completed).count();
        let mut cells = vec![mode.to_string(), format!("{completed}/{}", own().count())];
        cells.extend(columns.iter().map(|(_, value)| span(mode_span(moved, mode, *value))));
        table.row(cells);
    }
    table.markdown()
}

fn compare_tables(moved: &[&Migration]) -> String {
    let mut text = format!(
        "## Modes: median (min-max) of completed runs\n\n{}\n\
         outage: from the last heartbeat at the source to the first at the destination (it beats \
         every 5 ms). stalled: what all gaps were longer than 20 ms, from the command until 0.5 s \
         after its end. total: until the command, or QEMU's migration, is over; wire: both ways, \
         with Ethernet headers. All modes but pre-copy-private have the guest's memory on \
         shared tmpfs, where QEMU's search for zero pages populates every hole at both ends: compare \
         times with pre-copy-private as well.\n\n## CPU time of a migration\n\n{}\n\
         QEMU's includes the guest that it emulates; \"all others\" is the kernel's share outside \
         of these processes and what ran beside them.\n\n",
        columns(moved, &COLUMNS),
        columns(moved, &CPU_COLUMNS)
    );
    text.push_str(&post_copy_note(moved));
    let mut heads = vec!["godwit /"];
    heads.extend(RATIOS.iter().map(|(name, _)| *name));
    let mut table = Table::new(&heads);
    for mode in modes(moved).into_iter().filter(|mode| *mode != Mode::Godwit) {
        let mut cells = vec![mode.to_string()];
        cells.extend(RATIOS.iter().map(|(_, value)| {
            let (ours, theirs) = (by_turn(moved, Mode::Godwit, value), by_turn(moved, mode, value));
            span(Span::of(ratios(&ours, &theirs)))
        }));
        table.row(cells);
    }
    let _ = write!(
        text,
        "## Ratios of pairs: median (min-max); below 1 is for Godwit\n\n{}\n",
        table.markdown()
    );
    text
}

/// Whether post-copy came to pass: QEMU stays with pre-copy if little is left after the first pass.
fn post_copy_note(moved: &[&Migration]) -> String {
    let own: Vec<&&Migration> = moved.iter().filter(|one| one.mode == Mode::PostCopy).collect();
    if own.is_empty() {
        return String::new();
    }
    let begun = own
        .iter()
        .filter(|one| one.report["ram"]["postcopy-bytes"].as_u64().is_some_and(|bytes| bytes > 0));
    format!(
        "post-copy: the guest moved before its memory in {} of {} runs; in the others QEMU found \
         so little left after the first pass that pre-copy completed.\n\n",
        begun.count(),
        own.len()
    )
}

fn throughput_table(moved: &[&Migration], plain: &[&Bulk]) -> String {
    let mut table = Table::new(&["what", "Gbit/s", "/ memory to memory", "/ into nothing"]);
    let by_kind = PLAIN.map(|(kind, words)| (plain_gbps(plain, kind), words));
    let row = |what: String, ours: &BTreeMap<u32, f64>| {
        let mut row = vec![what, span(Span::of(ours.values().copied()))];
        row.extend(by_kind.iter().map(|(plain, _)| span(Span::of(ratios(ours, plain)))));
        row
    };
    for (plain, words) in &by_kind {
        table.row(row(format!("plain quinn {words}, loopback"), plain));
    }
    for link in ["loopback", "veth"] {
        let own: Vec<&Migration> = moved.iter().copied().filter(|one| one.link == link).collect();
        if own.is_empty() {
            continue;
        }
        let rows: [(&str, Value); 2] = [("round 1", round_one_gbps), ("whole command", whole_gbps)];
        for (what, value) in rows {
            let ours = by_turn(&own, Mode::Godwit, value);
            table.row(row(format!("godwit, {link}, {what}"), &ours));
        }
    }
    format!(
        "## Goodput: median (min-max)\n\n{}\n\
         The baseline is transport's example `bulk`: as many QUIC connections with the same tuning \
         and cipher, both ends in one process, beside the same kind of guest. It moves the same \
         number of bytes from a file in memory into a new file in memory, as guests' memory is; and \
         from one buffer over and over into nothing, which no program that delivers pages can do: \
         the difference is what reading, finding and writing memory costs here. Godwit moreover \
         looks for zeros, tracks writes, and checks versions, in two processes. Before every \
         transfer free memory is touched, so that finding it costs the same for all. Round 1 ends \
         when its last page was handed to the \
         lanes, which hold 60 ms of traffic at most.\n\n",
        table.markdown()
    )
}

fn attach_table(attached: &[&Attach]) -> String {
    let mut table = Table::new(&["what", "median (min-max)"]);
    let rows: [(&str, Quantity); 7] = [
        ("QEMU's thread stopped, us", |one| one.stopped_us as f64),
        ("attach as a whole, us", |one| one.attach_us as f64),
        ("arming all memory, us", |one| one.arm_us as f64),
        ("longest heartbeat gap around it, us", |one| one.gap_us as f64),
        ("scan of clean memory, us/GiB populated", |one| scan_us_per_gib(one).unwrap_or(f64::NAN)),
        ("pages that a clean scan found written", |one| one.clean_scan_pages as f64),
        ("populated, MiB", |one| one.populated_bytes as f64 / MIB),
    ];
    for (what, value) in rows {
        table.row(vec![what.into(), span(Span::of(attached.iter().map(|one| value(one))))]);
    }
    format!("## {} attaches to one running QEMU\n\n{}\n", attached.len(), table.markdown())
}

/// Downtime by its parts, rounds and pages, by Godwit's own reports.
fn godwit_tables(moved: &[&Migration]) -> String {
    let own: Vec<&&Migration> = moved
        .iter()
        .filter(|one| one.mode == Mode::Godwit && one.outcome == Outcome::Completed)
        .collect();
    if own.is_empty() {
        return String::new();
    }
    let mut names: Vec<&String> = vec![];
    for one in &own {
        let parts = one.report["downtime_parts_ms"].as_object();
        names.extend(parts.into_iter().flat_map(|parts| parts.keys()));
    }
    names.sort();
    names.dedup();
    let mut table = Table::new(&["by its own report", "median (min-max)"]);
    let mut row = |what: String, value: &dyn Fn(&Migration) -> Option<f64>| {
        let all = Span::of(own.iter().filter_map(|one| value(one)));
        if all.is_some() {
            table.row(vec![what, span(all)]);
        }
    };
    row("downtime, ms".into(), &|one| one.reported_downtime_ms);
    for name in names {
        row(format!("- {name}, ms"), &|one| one.report["downtime_parts_ms"][name].as_f64());
    }
    row("outage less downtime, ms".into(), &|one| Some(one.outage_ms? - one.reported_downtime_ms?));
    row("total, ms".into(), &|one| one.reported_total_ms);
    row("rounds".into(), &|one| one.report["rounds"].as_array().map(|all| all.len() as f64));
    for name in ["hole", "zero", "raw", "delta", "unchanged", "deferred", "resent"] {
        row(format!("pages {name}"), &|one| one.report["pages"][name].as_f64());
    }
    row("UDP payload, MiB".into(), &|one| Some(one.report["bytes"]["wire"].as_f64()? / MIB));
    row("device state, KiB".into(), &|one| {
        Some(one.report["bytes"]["device_state"].as_f64()? / 1024.0)
    });
    row("attach, QEMU's thread stopped, us".into(), &|one| {
        one.report["attach_stopped_us"].as_f64()
    });
    row("tables, bytes a page".into(), &|one| one.report["table_bytes_per_page"].as_f64());
    format!("## Inside Godwit's migrations\n\n{}\n", table.markdown())
}

fn failures(moved: &[&Migration]) -> String {
    let mut text = String::new();
    for one in moved.iter().filter(|one| one.outcome != Outcome::Completed) {
        let why = one.error.as_deref().unwrap_or("?").replace('\n', "\n  ");
        let _ = writeln!(
            text,
            "- turn {}, {}, {:?} after {} ms: {why}",
            one.turn + 1,
            one.mode,
            one.outcome,
            number(one.total_ms)
        );
    }
    if text.is_empty() { text } else { format!("## Not completed\n\n{text}\n") }
}

fn series(moved: &[&Migration], value: Value) -> Vec<Series> {
    let one = |mode: Mode| Series {
        label: mode.to_string(),
        values: by_turn(moved, mode, value).into_values().collect(),
        ours: mode == Mode::Godwit,
    };
    modes(moved).into_iter().map(one).collect()
}

fn compare_plots(moved: &[&Migration]) -> Vec<(&'static str, String)> {
    let Some(first) = moved.first() else { return vec![] };
    let title =
        |what: &str| format!("{what}: {} guest of {} MiB", first.workload, first.memory_mib);
    let outages = series(moved, |one| one.outage_ms);
    let totals = series(moved, |one| Some(one.total_ms / 1e3));
    let bytes = series(moved, |one| Some(wire_bytes(one) / MIB));
    vec![
        ("outage", bars(&title("Outage"), "ms without a heartbeat", &outages)),
        (
            "distribution",
            distribution(&title("Outage, every run"), "ms without a heartbeat (log)", &outages),
        ),
        ("total", bars(&title("Total time"), "seconds", &totals)),
        ("wire", bars(&title("Bytes on the link, both ways"), "MiB", &bytes)),
    ]
}

fn throughput_plot(moved: &[&Migration], plain: &[&Bulk]) -> String {
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
            let values = by_turn(&own, Mode::Godwit, round_one_gbps).into_values().collect();
            rows.push(Series { label: format!("godwit, {link}"), values, ours: true });
        }
    }
    bars("Goodput on an unshaped link", "Gbit/s", &rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::samples::{host, migration};

    fn recorded(runs: Vec<Migration>) -> Recorded {
        let records = runs.into_iter().map(|one| Record::Migration(Box::new(one))).collect();
        Recorded { host: host(), records }
    }

    #[test]
    fn a_comparison_has_tables_ratios_targets_and_plots() {
        let mut failed = migration(Mode::Xbzrle, 0, 1.0, 120_000.0);
        failed.outcome = Outcome::NotConverged;
        failed.error = Some("too slow".into());
        let runs = vec![
            migration(Mode::Godwit, 0, 50.0, 1000.0),
            migration(Mode::PreCopy, 0, 100.0, 2000.0),
            failed,
        ];
        let (text, plots) = compose("x", &recorded(runs));
        assert_eq!(plots.len(), 4);
        for wanted in ["## Targets", "0.50", "0/1", "too slow", "- load, ms"] {
            assert!(text.contains(wanted), "{wanted} in\n{text}");
        }
        assert!(plots[0].1.contains("no run completed"));
    }

    #[test]
    fn a_file_is_rendered_beside_itself() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = crate::record::Log::create(folder.path(), "n", host()).unwrap();
        let one = migration(Mode::Godwit, 0, 50.0, 1000.0);
        log.add(Record::Migration(Box::new(one))).unwrap();
        again(&ReportArgs { files: vec![log.path().to_owned()] }).unwrap();
        for file in ["n.md", "n-outage.svg", "n-distribution.svg", "n-total.svg", "n-wire.svg"] {
            assert!(folder.path().join(file).exists(), "{file}");
        }
    }
}
