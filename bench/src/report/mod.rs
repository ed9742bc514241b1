//! Tables and plots from what was recorded, as Markdown with SVGs beside it and as one HTML page.

mod plots;
mod split;
mod tables;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::args::ReportArgs;
use crate::document::{self, Block};
use crate::record::{Attach, Bulk, Migration, Record, Recorded, read};
use crate::scenario::{Kind, Scenario};
use crate::stats::Span;
use crate::table::span;
use crate::targets::{self, Target};

const MIB: f64 = 1_048_576.0;

/// Name of what is told of all records of split guests together.
const SPEED_UP: &str = "split-speed-up";

/// What a column or plot shows of a migration.
type Value = fn(&Migration) -> Option<f64>;

/// `bench report`.
///
/// # Errors
/// A file cannot be read, or its tables not be written.
pub(crate) fn again(args: &ReportArgs) -> Result<()> {
    let files = match args.files.is_empty() {
        true => records(&args.out)?,
        false => args.files.clone(),
    };
    files.iter().try_for_each(|path| render(path))?;
    if args.files.is_empty() { page(&args.out) } else { write_page(&args.out, &args.files) }
}

/// Prints a file's tables and writes them and the plots beside it.
///
/// # Errors
/// The file cannot be read, or its folder not be written.
pub(crate) fn render(path: &Path) -> Result<()> {
    let recorded = read(path)?;
    let name = name_of(path);
    let blocks = compose(name, &recorded);
    let markdown = document::markdown(name, &blocks);
    println!("{markdown}");
    write(&path.with_file_name(format!("{name}.md")), &markdown)?;
    let mut plots = 0;
    for block in &blocks {
        if let Block::Plot { name: plot, svg } = block {
            write(&path.with_file_name(format!("{name}-{plot}.svg")), svg)?;
            plots += 1;
        }
    }
    eprintln!("Results: {} and, beside it, {name}.md and {plots} plots", path.display());
    Ok(())
}

fn name_of(path: &Path) -> &str {
    path.file_stem().and_then(|stem| stem.to_str()).unwrap_or("bench")
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("Cannot write {}", path.display()))
}

/// The records of a folder, in alphabetical order.
fn records(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder)
        .with_context(|| format!("There are no results in {}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"))
        .collect();
    files.sort();
    Ok(files)
}

/// Writes `report.html` of all records of a folder, and the plot of what they tell together.
///
/// # Errors
/// The folder cannot be read or written.
pub(crate) fn page(folder: &Path) -> Result<()> {
    write_page(folder, &records(folder)?)
}

fn write_page(folder: &Path, files: &[PathBuf]) -> Result<()> {
    std::fs::create_dir_all(folder)
        .with_context(|| format!("Cannot create {}", folder.display()))?;
    let all: Vec<(&str, Result<Recorded>)> =
        files.iter().map(|path| (name_of(path), read(path))).collect();
    let one = |(name, recorded): &(&str, Result<Recorded>)| {
        let blocks = match recorded {
            Ok(recorded) => compose(name, recorded),
            // One broken file is no reason to show nothing of the others.
            Err(error) => {
                vec![Block::Title((*name).to_owned()), Block::Text(format!("{error:#}"))]
            }
        };
        ((*name).to_owned(), blocks)
    };
    let mut reports: Vec<(String, Vec<Block>)> = all.iter().map(one).collect();
    let together = split::across(all.iter().filter_map(|(_, recorded)| recorded.as_ref().ok()));
    if let Some(blocks) = together {
        write(&folder.join(format!("{SPEED_UP}.md")), &document::markdown(SPEED_UP, &blocks))?;
        for block in &blocks {
            if let Block::Plot { name, svg } = block {
                write(&folder.join(format!("{SPEED_UP}-{name}.svg")), svg)?;
            }
        }
        reports.push((SPEED_UP.to_owned(), blocks));
    }
    let path = folder.join("report.html");
    write(&path, &document::page(&reports))?;
    eprintln!("Report: {}", path.display());
    Ok(())
}

/// The scenario of a record. Older records name only what the guest did: where it is that of the
/// repository's scenario of this name, with the same memory and link, that one is taken.
fn scenario_of(recorded: &Recorded, moved: &[&Migration]) -> Option<Scenario> {
    let named = recorded.records.iter().find_map(|record| match record {
        Record::Scenario { scenario } => Some(scenario.as_ref().clone()),
        _ => None,
    });
    named.or_else(|| {
        let first = moved.first()?;
        let known = Scenario::load(&first.workload).ok()?;
        let same = known.guest.memory_mib == first.memory_mib && known.link.rate == first.link_bits;
        same.then_some(known)
    })
}

/// What was measured, by kind.
#[derive(Debug, Default)]
struct Measured<'a> {
    moved: Vec<&'a Migration>,
    plain: Vec<&'a Bulk>,
    attached: Vec<&'a Attach>,
}

impl<'a> Measured<'a> {
    fn of(recorded: &'a Recorded) -> Self {
        let mut all = Self::default();
        for record in &recorded.records {
            match record {
                Record::Migration(one) => all.moved.push(one),
                Record::Bulk(one) => all.plain.push(one),
                Record::Attach(one) => all.attached.push(one),
                Record::Scenario { .. } => {}
            }
        }
        all
    }

    /// The targets that it can judge.
    fn targets(&self, scenario: Option<&Scenario>) -> Vec<Target> {
        let Self { moved, plain, attached } = self;
        if !attached.is_empty() {
            return targets::of_attach(attached, moved);
        }
        if !plain.is_empty() {
            let loopback = moved.iter().copied().filter(|one| one.link == "loopback");
            return targets::of_throughput(&loopback.collect::<Vec<_>>(), plain);
        }
        scenario.map(|scenario| targets::of_scenario(scenario, moved)).unwrap_or_default()
    }
}

/// The targets that a record can judge.
pub(crate) fn judged(recorded: &Recorded) -> Vec<Target> {
    let measured = Measured::of(recorded);
    measured.targets(scenario_of(recorded, &measured.moved).as_ref())
}

/// All that a file has to show.
fn compose(name: &str, recorded: &Recorded) -> Vec<Block> {
    let measured = Measured::of(recorded);
    let Measured { moved, plain, attached } = &measured;
    let scenario = scenario_of(recorded, moved);
    let mut blocks = head(name, recorded, scenario.as_ref(), moved);
    add_targets(&mut blocks, &measured.targets(scenario.as_ref()));
    if !attached.is_empty() {
        blocks.extend(tables::attach(attached));
    } else if !plain.is_empty() {
        blocks.extend(tables::throughput(moved, plain));
        blocks.push(plots::throughput(moved, plain));
    } else {
        let is_private = scenario.as_ref().is_some_and(|scenario| scenario.guest.is_private);
        blocks.extend(tables::modes(moved, is_private));
        match &scenario {
            Some(scenario) if scenario.kind == Kind::Ablation => {
                blocks.extend(tables::ablation(scenario, moved));
            }
            Some(scenario) if scenario.kind == Kind::Split => {
                blocks.extend(split::blocks(name, scenario, moved));
            }
            _ => blocks.extend(tables::ratios_of_pairs(moved)),
        }
        blocks.extend(plots::compare(name, moved));
    }
    blocks.extend(tables::godwit(moved));
    blocks.extend(tables::failures(moved));
    blocks
}

fn add_targets(blocks: &mut Vec<Block>, targets: &[Target]) {
    if !targets.is_empty() {
        blocks.push(Block::Heading("Targets".into()));
        blocks.push(Block::Table(targets::table(targets)));
    }
}

fn head(
    name: &str,
    recorded: &Recorded,
    scenario: Option<&Scenario>,
    moved: &[&Migration],
) -> Vec<Block> {
    let host = &recorded.host;
    let mut blocks = vec![Block::Title(name.to_owned())];
    let mut facts = vec![];
    if let Some(scenario) = scenario {
        blocks.push(Block::Text(format!("{}.", scenario.about)));
        facts.push(format!("workload: {}", scenario.workload.shown()));
        facts.push(format!("link: {}", scenario.link.shown()));
        facts.extend(scenario.split.as_ref().map(|split| format!("hosts: {}", split.shown())));
    }
    facts.extend([
        format!("command: `bench {}`", host.command.join(" ")),
        format!("machine: {} x {}, Linux {}", host.cpus, host.cpu, host.kernel),
        format!("{}; {}; sources {}", host.qemu, host.migrate, host.commit),
    ]);
    if let Some(one) = moved.first() {
        let link = match one.link_bits {
            0 => format!("unshaped {}", one.link),
            bits => format!("{} of {} Mbit/s", one.link, bits / 1_000_000),
        };
        facts.push(format!(
            "guest: {} MiB, {} CPU (TCG), {}; {link}",
            one.memory_mib, one.smp, one.workload
        ));
    }
    let mut fact = |what: &str, all: Option<Span>| {
        if all.is_some() {
            facts.push(format!("{what}: {}", span(all)));
        }
    };
    let all = |value: Value| Span::of(moved.iter().filter_map(|one| value(one)));
    fact("load average when a migration began", all(|one| Some(one.load1)));
    fact("pages a second that the guest wrote before", all(|one| one.writer_pages_per_s));
    fact("operations a second of the application before", all(|one| one.application_per_s));
    fact("heartbeat gaps before, 99th percentile, ms", all(|one| one.gap_before_p99_ms));
    fact(
        "compulsory MiB",
        all(|one| one.compulsory.map(|compulsory| compulsory.bytes as f64 / MIB)),
    );
    blocks.push(Block::List(facts));
    blocks
}

/// The modes that were measured, in the order of the first turn.
fn modes<'a>(moved: &[&'a Migration]) -> Vec<&'a str> {
    let mut names: Vec<&str> = vec![];
    for one in moved {
        if !names.contains(&one.mode.as_str()) {
            names.push(&one.mode);
        }
    }
    names
}

/// Whether a mode is Godwit's.
fn is_ours(moved: &[&Migration], mode: &str) -> bool {
    moved.iter().any(|one| one.mode == mode && one.is_ours())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mode::Mode;
    use crate::record::samples::{host, migration};
    use crate::record::{Log, Outcome};
    use crate::scenario::NotBuilt;

    fn recorded(scenario: Option<&str>, runs: Vec<Migration>) -> Recorded {
        let scenario = scenario.map(|name| {
            let scenario = Box::new(Scenario::load(name).unwrap());
            Record::Scenario { scenario }
        });
        let runs = runs.into_iter().map(|one| Record::Migration(Box::new(one)));
        Recorded { host: host(), records: scenario.into_iter().chain(runs).collect() }
    }

    fn plots(blocks: &[Block]) -> Vec<&str> {
        let name = |block| match block {
            &Block::Plot { name, .. } => Some(name),
            _ => None,
        };
        blocks.iter().filter_map(name).collect()
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
        // Without its scenario, as in older records: it is found by its name.
        for scenario in [Some("idle"), None] {
            let blocks = compose("x", &recorded(scenario, runs.clone()));
            let text = document::markdown("x", &blocks);
            let wanted = ["outage", "distribution", "total", "wire", "bytes", "dirty"];
            assert_eq!(plots(&blocks), wanted);
            for wanted in ["## Targets", "0.50", "0/1", "too slow", "- load, ms", "compulsory"] {
                assert!(text.contains(wanted), "{wanted} in\n{text}");
            }
            assert!(text.contains("no run completed") || !text.contains("<svg"));
        }
    }

    #[test]
    fn gateways_are_ours_and_told_by_their_own_report() {
        let mut ours = migration(Mode::GatewayPostCopy, 0, 50.0, 1000.0);
        ours.report = serde_json::json!({
            "ram": { "postcopy-bytes": 4096 }, "gateway": { "delta_pages": 321, "wire_bytes": 1 << 20 },
        });
        let runs = vec![ours, migration(Mode::PostCopy, 0, 100.0, 2000.0)];
        let text = |scenario| {
            document::markdown("x", &compose("x", &recorded(Some(scenario), runs.clone())))
        };
        let (private, shared) = (text("stream-writer-pages"), text("writer-pages"));
        for wanted in [
            "gateway-post-copy / post-copy",
            "gateway-post-copy: the guest moved before its memory in 1 of 1",
            "post-copy: the guest moved before its memory in 0 of 1",
            "321",
            "payload between gateways",
        ] {
            assert!(private.contains(wanted), "{wanted} in\n{private}");
        }
        assert!(private.contains("private in all modes") && !private.contains("populates every"));
        assert!(shared.contains("populates every"));
    }

    #[test]
    fn an_ablation_is_compared_with_its_base_and_names_what_is_not_built() {
        let named = |name: &str, outage, total| Migration {
            mode: name.into(),
            ..migration(Mode::Godwit, 0, outage, total)
        };
        let runs = vec![named("base", 100.0, 4000.0), named("all", 50.0, 1000.0)];
        let mut recorded = recorded(Some("ablation"), runs);
        if let Some(Record::Scenario { scenario }) = recorded.records.first_mut() {
            let (name, why) = ("+split".to_owned(), "it takes more hosts".to_owned());
            scenario.modes.not_built.push(NotBuilt { name, why });
        }
        let blocks = compose("x", &recorded);
        let text = document::markdown("x", &blocks);
        for wanted in ["## Ablation", "0.25", "| +split", "not built"] {
            assert!(text.contains(wanted), "{wanted} in\n{text}");
        }
        assert!(!text.contains("Ratios of pairs"));
    }

    #[test]
    fn a_file_is_rendered_beside_itself_and_into_the_page() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = Log::create(folder.path(), "n", host()).unwrap();
        let one = migration(Mode::Godwit, 0, 50.0, 1000.0);
        log.add(Record::Migration(Box::new(one))).unwrap();
        std::fs::write(folder.path().join("broken.jsonl"), "x").unwrap();
        let out = folder.path().to_owned();
        again(&ReportArgs { files: vec![log.path().to_owned()], out: out.clone() }).unwrap();
        for file in ["n.md", "n-outage.svg", "n-distribution.svg", "n-bytes.svg", "n-dirty.svg"] {
            assert!(folder.path().join(file).exists(), "{file}");
        }
        page(&out).unwrap();
        let page = std::fs::read_to_string(out.join("report.html")).unwrap();
        assert!(page.contains("<polyline") && page.contains("is no record of this bench"));
    }
}
