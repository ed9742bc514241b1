//! Tables of a report.

use std::collections::BTreeMap;

use super::{MIB, Value, is_ours, modes as names};
use crate::compulsory;
use crate::document::Block;
use crate::mode::Mode;
use crate::record::{Attach, Bulk, Migration};
use crate::scenario::Scenario;
use crate::stats::{Span, ratios};
use crate::table::{Table, number, span};
use crate::targets::{PLAIN, by_turn, plain_gbps, round_one_gbps, scan_us_per_gib, whole_gbps};

/// What a row shows of an attach.
type Quantity = fn(&Attach) -> f64;

/// Columns of the comparison: heading and value.
const COLUMNS: [(&str, Value); 9] = [
    ("outage ms", |one| one.outage_ms),
    ("worst gap ms", |one| one.worst_gap_ms),
    ("stalled ms", |one| one.stalled_ms),
    ("total ms", |one| Some(one.total_ms)),
    ("to arrival ms", |one| one.arrived_ms),
    ("wire MiB", |one| Some(one.wire_bytes() / MIB)),
    ("wire / compulsory", Migration::wire_per_compulsory),
    ("of it back MiB", |one| Some(one.wire_back_bytes as f64 / MIB)),
    ("own downtime ms", |one| one.reported_downtime_ms),
];

/// CPU columns.
const CPU_COLUMNS: [(&str, Value); 8] = [
    ("source engine s", |one| Some(one.cpu.engine_source_s)),
    ("destination engine s", |one| Some(one.cpu.engine_destination_s)),
    ("source QEMU s", |one| Some(one.cpu.qemu_source_s)),
    ("destination QEMU s", |one| Some(one.cpu.qemu_destination_s)),
    ("all four s", |one| Some(one.cpu_s())),
    ("all four s/GB", Migration::cpu_s_per_gb),
    ("all others s", |one| Some(one.cpu.others_s())),
    ("guest before, CPUs", |one| Some(one.cpu.guest_before_cpus)),
];

/// What pairs are compared by.
const RATIOS: [(&str, Value); 6] = [
    ("outage", |one| one.outage_ms),
    ("stalled", |one| one.stalled_ms),
    ("total", |one| Some(one.total_ms)),
    ("to arrival", |one| one.arrived_ms),
    ("wire", |one| Some(one.wire_bytes())),
    ("CPU", |one| Some(one.cpu_s())),
];

fn columns(moved: &[&Migration], columns: &[(&str, Value)]) -> Block {
    let mut heads = vec!["mode", "completed"];
    heads.extend(columns.iter().map(|(name, _)| *name));
    let mut table = Table::new(&heads);
    for mode in names(moved) {
        let own = || moved.iter().filter(|one| one.mode == mode);
        let completed = own().filter(|one| one.is_complete()).count();
        let mut cells = vec![mode.to_owned(), format!("{completed}/{}", own().count())];
        let all = |value: Value| Span::of(by_turn(moved, mode, value).into_values());
        cells.extend(columns.iter().map(|(_, value)| span(all(*value))));
        table.row(cells);
    }
    Block::Table(table)
}

/// Where the guest's memory was.
fn memory_note(is_private: bool) -> &'static str {
    if is_private {
        "The guest's memory is private in all modes, which is QEMU's ordinary setup."
    } else {
        "All modes but pre-copy-private, multifd-tls, stream and gateways have the guest's memory on shared \
         tmpfs, where QEMU's search for zero pages populates every hole at both ends: compare times with \
         pre-copy-private as well."
    }
}

/// What was seen of each mode.
pub(super) fn modes(moved: &[&Migration], is_private: bool) -> Vec<Block> {
    let mut blocks = vec![
        Block::Heading("Modes: median (min-max) of completed runs".into()),
        columns(moved, &COLUMNS),
        Block::Text(format!(
            "outage: from the last heartbeat at the source to the first at the destination (it beats \
             every 5 ms). stalled: what all gaps were longer than 20 ms, from the command until 0.5 s \
             after its end. total: until the command, or QEMU's migration, is over; wire: both ways, \
             with Ethernet headers. {}",
            memory_note(is_private)
        )),
        Block::Text(format!(
            "compulsory: the guest's memory as it was at the hand-over, pages that are not zero, each \
             content once, as one stream of Zstandard (level {}, long-distance matching over a window \
             of 8 MiB) in the order of addresses. Whether the guest uses a page is not looked at: an \
             upper bound.",
            compulsory::LEVEL
        )),
        Block::Heading("CPU time of a migration".into()),
        columns(moved, &CPU_COLUMNS),
        Block::Text(
            "An engine is `migrate send` or `receive`, or a gateway. QEMU's includes the guest that it emulates; s/GB is for 10^9 bytes on the wire; \"all \
             others\" is the kernel's share outside of these processes and what ran beside them."
                .into(),
        ),
    ];
    blocks.extend(names(moved).into_iter().filter_map(|mode| post_copy_note(moved, mode)));
    blocks.extend(relay_note(moved));
    blocks
}

/// Godwit's settings by each of QEMU's modes.
pub(super) fn ratios_of_pairs(moved: &[&Migration]) -> Vec<Block> {
    let (ours, others): (Vec<&str>, Vec<&str>) =
        names(moved).into_iter().partition(|mode| is_ours(moved, mode));
    if ours.is_empty() || others.is_empty() {
        return vec![];
    }
    let mut heads = vec!["pair"];
    heads.extend(RATIOS.iter().map(|(name, _)| *name));
    let mut table = Table::new(&heads);
    for one in &ours {
        for other in &others {
            let mut cells = vec![format!("{one} / {other}")];
            cells.extend(RATIOS.iter().map(|(_, value)| ratio(moved, one, other, *value)));
            table.row(cells);
        }
    }
    vec![
        Block::Heading("Ratios of pairs: median (min-max); below 1 is for Godwit".into()),
        Block::Table(table),
    ]
}

fn ratio(moved: &[&Migration], one: &str, other: &str, value: Value) -> String {
    let (ours, theirs) = (by_turn(moved, one, value), by_turn(moved, other, value));
    span(Span::of(ratios(&ours, &theirs)))
}

/// Every setting by the first, and what cannot be measured yet.
pub(super) fn ablation(scenario: &Scenario, moved: &[&Migration]) -> Vec<Block> {
    let plans = scenario.modes.plans();
    let Some(base) = plans.first() else { return vec![] };
    let mut heads = vec!["setting", "arguments of `migrate send`"];
    heads.extend(RATIOS.iter().map(|(name, _)| *name));
    let mut table = Table::new(&heads);
    for plan in &plans {
        let words = if plan.send.is_empty() { "none".to_owned() } else { plan.send.join(" ") };
        let mut cells = vec![plan.name.clone(), words];
        cells.extend(RATIOS.iter().map(|(_, value)| ratio(moved, &plan.name, &base.name, *value)));
        table.row(cells);
    }
    for missing in &scenario.modes.not_built {
        let dashes = RATIOS.iter().map(|_| "-".to_owned());
        let cells = [missing.name.clone(), "not built".to_owned()].into_iter();
        table.row(cells.chain(dashes).collect());
    }
    let missing = scenario.modes.not_built.iter();
    let missing = missing.map(|one| format!("{}: not built; {}.", one.name, one.why));
    let mut blocks = vec![
        Block::Heading(format!("Ablation: ratios of pairs to {}, median (min-max)", base.name)),
        Block::Table(table),
    ];
    blocks.extend(missing.map(Block::Text));
    blocks
}

/// What the relay did, if there was one.
fn relay_note(moved: &[&Migration]) -> Option<Block> {
    let sum = |what: &str| -> f64 {
        let relays = moved.iter().filter_map(|one| one.relay.as_ref());
        relays.filter_map(|relay| relay[what].as_f64()).sum()
    };
    moved.iter().any(|one| one.relay.is_some()).then(|| {
        Block::Text(format!(
            "relay, all runs together: {} datagrams passed on, {} lost by intent, {} not taken by the \
             kernel; {} MiB over TCP, which is delayed but cannot be lost and does not see the delay \
             in its own round trips; {} s of CPU time, which the migrations beside it did not have.",
            sum("datagrams"),
            sum("lost"),
            sum("dropped"),
            number(sum("tcp_bytes") / MIB),
            number(sum("cpu_s"))
        ))
    })
}

/// Whether post-copy came to pass: QEMU stays with pre-copy if little is left after the first pass.
fn post_copy_note(moved: &[&Migration], mode: &str) -> Option<Block> {
    let is_meant = |one: &&&Migration| one.mode == mode && one.by.is_post_copy();
    let own: Vec<&&Migration> = moved.iter().filter(is_meant).collect();
    if own.is_empty() {
        return None;
    }
    let begun = own
        .iter()
        .filter(|one| one.report["ram"]["postcopy-bytes"].as_u64().is_some_and(|bytes| bytes > 0));
    Some(Block::Text(format!(
        "{mode}: the guest moved before its memory in {} of {} runs; in the others QEMU found \
         so little left after the first pass that pre-copy completed.",
        begun.count(),
        own.len()
    )))
}

/// Goodput on an unshaped link.
pub(super) fn throughput(moved: &[&Migration], plain: &[&Bulk]) -> Vec<Block> {
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
            let ours = by_turn(&own, Mode::Godwit.label(), value);
            table.row(row(format!("godwit, {link}, {what}"), &ours));
        }
    }
    vec![
        Block::Heading("Goodput: median (min-max)".into()),
        Block::Table(table),
        Block::Text(
            "The baseline is transport's example `bulk`: as many QUIC connections with the same tuning \
             and cipher, both ends in one process, beside the same kind of guest. It moves the same \
             number of bytes from a file in memory into a new file in memory, as guests' memory is; and \
             from one buffer over and over into nothing, which no program that delivers pages can do: \
             the difference is what reading, finding and writing memory costs here. Godwit moreover \
             looks for zeros, tracks writes, and checks versions, in two processes. Before every \
             transfer free memory is touched, so that finding it costs the same for all. Round 1 ends \
             when its last page was handed to the lanes, which hold 60 ms of traffic at most."
                .into(),
        ),
    ]
}

/// Attaching to one QEMU again and again.
pub(super) fn attach(attached: &[&Attach]) -> Vec<Block> {
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
    vec![
        Block::Heading(format!("{} attaches to one running QEMU", attached.len())),
        Block::Table(table),
    ]
}

/// What the report says of faults, and its names for it.
const FAULT_FIELDS: [(&str, &str); 4] = [
    ("faults that waited for a page", "count"),
    ("fault to wake, us: median", "p50_us"),
    ("fault to wake, us: 99 %", "p99_us"),
    ("fault to wake, us: longest", "max_us"),
];

/// The downtime predicted last before the guest was stopped.
fn predicted_ms(one: &Migration) -> Option<f64> {
    let rounds = one.report["rounds"].as_array()?;
    rounds.iter().rev().find_map(|round| round["predicted"]["now_ms"].as_f64())
}

/// Downtime by its parts, rounds and pages, by Godwit's own reports; a column a setting.
pub(super) fn godwit(moved: &[&Migration]) -> Vec<Block> {
    let own: Vec<&Migration> =
        moved.iter().copied().filter(|one| one.is_ours() && one.is_complete()).collect();
    if own.is_empty() {
        return vec![];
    }
    let settings = names(&own);
    let mut parts: Vec<&String> = vec![];
    for one in &own {
        let own = one.report["downtime_parts_ms"].as_object();
        parts.extend(own.into_iter().flat_map(|parts| parts.keys()));
    }
    parts.sort();
    parts.dedup();
    let mut table = Table::new(&[&["by its own report"], &settings[..]].concat());
    let mut row = |what: String, value: &dyn Fn(&Migration) -> Option<f64>| {
        let all = |mode: &&str| {
            let own = own.iter().filter(|one| one.mode == **mode);
            Span::of(own.filter_map(|one| value(one)))
        };
        let all: Vec<Option<Span>> = settings.iter().map(all).collect();
        if all.iter().any(Option::is_some) {
            let cells = all.into_iter().map(span);
            table.row(std::iter::once(what).chain(cells).collect());
        }
    };
    row("downtime, ms".into(), &|one| one.reported_downtime_ms);
    row("- predicted before the stop, ms".into(), &predicted_ms);
    for name in parts {
        row(format!("- {name}, ms"), &|one| one.report["downtime_parts_ms"][name].as_f64());
    }
    row("outage less downtime, ms".into(), &|one| Some(one.outage_ms? - one.reported_downtime_ms?));
    row("total, ms".into(), &|one| one.reported_total_ms);
    row("rounds".into(), &|one| one.report["rounds"].as_array().map(|all| all.len() as f64));
    for name in ["hole", "zero", "raw", "delta", "duplicate", "unchanged", "deferred", "resent"] {
        row(format!("pages {name}"), &|one| {
            let by_gateway = || one.report["gateway"][format!("{name}_pages")].as_f64();
            one.report["pages"][name].as_f64().or_else(by_gateway)
        });
    }
    for name in ["missing", "urgent", "prefetched"] {
        row(format!("pages {name}"), &|one| {
            one.report["pages"][name].as_f64().filter(|_| !one.report["faults"].is_null())
        });
    }
    for (what, field) in FAULT_FIELDS {
        row(what.into(), &|one| one.report["faults"][field].as_f64());
    }
    row("prefetched pages that were used".into(), &|one| one.report["prefetch_hit_rate"].as_f64());
    row("UDP payload, MiB".into(), &|one| Some(one.report["bytes"]["wire"].as_f64()? / MIB));
    row("payload between gateways, MiB".into(), &|one| {
        Some(one.report["gateway"]["wire_bytes"].as_f64()? / MIB)
    });
    row("QEMU's stream into the gateway, MiB".into(), &|one| {
        Some(one.report["gateway"]["stream_bytes"].as_f64()? / MIB)
    });
    row("device state, KiB".into(), &|one| {
        Some(one.report["bytes"]["device_state"].as_f64()? / 1024.0)
    });
    row("attach, QEMU's thread stopped, us".into(), &|one| {
        one.report["attach_stopped_us"].as_f64()
    });
    row("tables, bytes a page".into(), &|one| one.report["table_bytes_per_page"].as_f64());
    row("memory of the source's engine, MiB".into(), &|one| {
        Some(one.engine_memory.source_bytes? as f64 / MIB)
    });
    row("memory of the destination's engine, MiB".into(), &|one| {
        Some(one.engine_memory.destination_bytes? as f64 / MIB)
    });
    vec![Block::Heading("Inside Godwit's migrations: median (min-max)".into()), Block::Table(table)]
}

/// Migrations that did not complete.
pub(super) fn failures(moved: &[&Migration]) -> Vec<Block> {
    let failed: Vec<&&Migration> = moved.iter().filter(|one| !one.is_complete()).collect();
    if failed.is_empty() {
        return vec![];
    }
    let one = |one: &&Migration| {
        let why = one.error.as_deref().unwrap_or("?").replace('\n', "\n  ");
        let ms = number(one.total_ms);
        format!("turn {}, {}, {:?} after {ms} ms: {why}", one.turn + 1, one.mode, one.outcome)
    };
    let points = failed.into_iter().map(one).collect();
    vec![Block::Heading("Not completed".into()), Block::List(points)]
}
