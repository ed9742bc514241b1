//! Scenario files: what guest moves, what it does meanwhile, over what link, by what modes, how
//! often, and what is expected of that.
//!
//! ```text
//!  bench/scenarios/NAME.toml ── parse (serde, unknown keys refused) ── check ──> Scenario
//!  command line ── overrides ───────────────────────────────────────────────────────┘
//!  Scenario ── first line of NAME.jsonl: a report needs nothing but the record
//! ```
//! Invariant: a [`Scenario`] that was loaded has at least one mode, and names of modes are unique.

mod link;
mod modes;
mod split;
mod target;
mod workload;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use framework::QemuKind;
use serde::{Deserialize, Serialize};

pub(crate) use link::{LinkPart, parse_rate};
#[cfg(test)]
pub(crate) use modes::NotBuilt;
pub(crate) use modes::{ModePlan, Modes};
pub(crate) use split::{AccessPhase, SplitPart};
pub(crate) use target::{Among, BEST_OF_QEMU, Quantity, TargetPart};
pub(crate) use workload::Workload;

use crate::mode::Mode;

/// Where the scenarios of the repository lie.
const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scenarios");

/// Largest scenario file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Memory that a guest needs beside what its workload fills, in MiB.
const SPARE_MIB: u64 = 160;

/// Least memory of a guest in MiB.
const MEMORY_MIB_MIN: u64 = 256;

/// What a scenario compares.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// Modes with each other, pair by pair.
    #[default]
    Comparison,
    /// Godwit with parts of it switched off: every mode with the first one.
    Ablation,
    /// Guests that are split over a main host and memory servers, and then work.
    Split,
}

/// The guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct GuestPart {
    /// Its memory in MiB.
    #[serde(default = "GuestPart::memory_mib")]
    pub(crate) memory_mib: u64,
    /// Its virtual CPUs.
    #[serde(default = "GuestPart::smp")]
    pub(crate) smp: u32,
    /// QEMU of both ends: `7.2` or `10.0`.
    #[serde(default = "GuestPart::qemu")]
    qemu: String,
    /// Whether its memory is private in every mode, which is QEMU's ordinary setup; else each mode has its own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) is_private: bool,
}

impl GuestPart {
    fn memory_mib() -> u64 {
        2048
    }

    fn smp() -> u32 {
        1
    }

    fn qemu() -> String {
        QemuKind::V7_2.version().to_owned()
    }

    /// QEMU of both ends.
    ///
    /// # Errors
    /// There is no such version.
    pub(crate) fn qemu_kind(&self) -> Result<QemuKind> {
        parse_qemu(&self.qemu).map_err(|why| anyhow::anyhow!("guest.qemu: {why}"))
    }
}

impl Default for GuestPart {
    fn default() -> Self {
        let (memory_mib, smp, qemu) = (Self::memory_mib(), Self::smp(), Self::qemu());
        Self { memory_mib, smp, qemu, is_private: false }
    }
}

/// How often, and how long at most.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RunPart {
    /// Times that every mode is measured.
    #[serde(default = "RunPart::repeats")]
    pub(crate) repeats: u32,
    /// Seconds after which a migration is given up and counts as not converged.
    #[serde(default = "RunPart::limit_s")]
    pub(crate) limit_s: u64,
    /// Free memory to touch right before each migration, in MiB. Where the machine is itself a virtual one
    /// whose host takes free memory back, finding it again costs more than what is measured.
    #[serde(default)]
    pub(crate) touch_mib: u64,
}

impl RunPart {
    fn repeats() -> u32 {
        5
    }

    fn limit_s() -> u64 {
        120
    }
}

impl Default for RunPart {
    fn default() -> Self {
        Self { repeats: Self::repeats(), limit_s: Self::limit_s(), touch_mib: 0 }
    }
}

/// A scenario.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Scenario {
    /// The file's name without `.toml`; it does not stand in the file.
    #[serde(default)]
    pub(crate) name: String,
    /// In one sentence.
    pub(crate) about: String,
    /// What it compares.
    #[serde(default)]
    pub(crate) kind: Kind,
    /// The guest.
    #[serde(default)]
    pub(crate) guest: GuestPart,
    /// What it does while it moves.
    pub(crate) workload: Workload,
    /// What it moves over.
    #[serde(default)]
    pub(crate) link: LinkPart,
    /// Hosts of a split guest; for [`Kind::Split`] alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) split: Option<SplitPart>,
    /// How often.
    #[serde(default)]
    pub(crate) run: RunPart,
    /// How.
    #[serde(default)]
    pub(crate) modes: Modes,
    /// What is expected.
    #[serde(default)]
    pub(crate) targets: Vec<TargetPart>,
}

/// What the command line changes of a scenario.
#[derive(Debug, Clone, Default)]
pub(crate) struct Overrides {
    /// [`GuestPart::memory_mib`].
    pub(crate) memory_mib: Option<u64>,
    /// [`GuestPart::smp`].
    pub(crate) smp: Option<u32>,
    /// QEMU of both ends.
    pub(crate) qemu: Option<QemuKind>,
    /// [`LinkPart::rate`].
    pub(crate) rate: Option<u64>,
    /// [`RunPart::repeats`].
    pub(crate) repeats: Option<u32>,
    /// [`RunPart::limit_s`].
    pub(crate) limit_s: Option<u64>,
    /// Names of the scenario's modes to keep, or of modes to add.
    pub(crate) modes: Vec<String>,
    /// [`Modes::channels`].
    pub(crate) channels: Option<u32>,
}

impl Scenario {
    /// By name, among those of the repository, or by path.
    ///
    /// # Errors
    /// There is none, or it is not right; the text names the file, and the line where there is one.
    pub(crate) fn load(name: &str) -> Result<Self> {
        let is_path = name.ends_with(".toml") || name.contains('/');
        let path = if is_path {
            PathBuf::from(name)
        } else {
            Path::new(FOLDER).join(format!("{name}.toml"))
        };
        if !is_path && !path.exists() {
            bail!("There is no scenario {name:?}; there are {}", names()?.join(", "));
        }
        Self::read(&path)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// As [`Scenario::load`].
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let shown = path.display();
        let about = std::fs::metadata(path).with_context(|| format!("Cannot read {shown}"))?;
        ensure!(about.len() <= FILE_BYTES_MAX, "{shown} is larger than any scenario");
        let text = std::fs::read_to_string(path).with_context(|| format!("Cannot read {shown}"))?;
        let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        Self::parse(name, &text).with_context(|| format!("{shown} is no scenario"))
    }

    fn parse(name: &str, text: &str) -> Result<Self> {
        let mut scenario: Self = toml::from_str(text)?;
        ensure!(scenario.name.is_empty(), "A scenario is called as its file: leave `name` out");
        name.clone_into(&mut scenario.name);
        scenario.check()?;
        let splits = scenario.modes.plans().iter().any(|plan| plan.splits);
        ensure!(splits || scenario.split.is_none(), "[split]: no mode has `split = true`");
        Ok(scenario)
    }

    fn check(&self) -> Result<()> {
        let needed = self.workload.memory_mib() + SPARE_MIB;
        let memory = self.guest.memory_mib;
        ensure!(
            memory >= needed.max(MEMORY_MIB_MIN),
            "guest.memory_mib: {memory} MiB are too few; with this workload the guest needs {} MiB",
            needed.max(MEMORY_MIB_MIN)
        );
        ensure!((1..=8).contains(&self.guest.smp), "guest.smp: a guest has 1 to 8 CPUs");
        ensure!((1..=200).contains(&self.run.repeats), "run.repeats: 1 to 200");
        ensure!((5..=3600).contains(&self.run.limit_s), "run.limit_s: 5 to 3600 seconds");
        ensure!(self.run.touch_mib <= 65_536, "run.touch_mib: at most 65536");
        self.guest.qemu_kind()?;
        self.workload.check().context("workload")?;
        self.link.check().context("link")?;
        self.modes.check().context("modes")?;
        let plans = self.modes.plans();
        let direct = plans.iter().find(|plan| self.guest.is_private && plan.by == Mode::Godwit);
        if let Some(plan) = direct {
            bail!("guest.is_private: {} needs memory that is shared", plan.name);
        }
        match &self.split {
            Some(split) => {
                split.check(&self.workload, &self.modes).context("split")?;
                ensure!(!self.link.is_relayed(), "link: there is no relay between split hosts");
            }
            None => ensure!(!plans.iter().any(|plan| plan.splits), "A mode splits without [split]"),
        }
        ensure!(
            self.split.is_some() == (self.kind == Kind::Split),
            "kind = \"split\" and [split] belong together"
        );
        for target in &self.targets {
            target.check(&plans).with_context(|| format!("targets: {}", target.shown()))?;
        }
        ensure!(
            self.kind != Kind::Ablation || plans.len() > 1,
            "An ablation needs modes to compare with its first"
        );
        Ok(())
    }

    /// With what the command line says. Targets speak of the guest and link in the file, so that
    /// another guest or link has none.
    ///
    /// # Errors
    /// A mode that nobody knows, or a guest too small.
    pub(crate) fn with(mut self, overrides: &Overrides) -> Result<Self> {
        let (guest, rate) = (self.guest.clone(), self.link.rate);
        let set = |to: &mut u64, from: Option<u64>| *to = from.unwrap_or(*to);
        set(&mut self.guest.memory_mib, overrides.memory_mib);
        set(&mut self.link.rate, overrides.rate);
        set(&mut self.run.limit_s, overrides.limit_s);
        self.guest.smp = overrides.smp.unwrap_or(self.guest.smp);
        self.run.repeats = overrides.repeats.unwrap_or(self.run.repeats);
        self.modes.channels = overrides.channels.unwrap_or(self.modes.channels);
        if let Some(kind) = overrides.qemu {
            kind.version().clone_into(&mut self.guest.qemu);
        }
        if !overrides.modes.is_empty() {
            self.modes = self.modes.keep(&overrides.modes)?;
            if let Some(split) = &mut self.split {
                split.keep(&self.modes);
            }
        }
        if self.guest != guest || self.link.rate != rate {
            self.targets.clear();
            self.about.push_str(&format!(
                " (here {} MiB, {} CPU, QEMU {}, {})",
                self.guest.memory_mib,
                self.guest.smp,
                self.guest.qemu,
                self.link.shown()
            ));
        }
        let plans = self.modes.plans();
        self.targets.retain(|target| target.check(&plans).is_ok());
        self.check().with_context(|| format!("Scenario {}", self.name))?;
        Ok(self)
    }
}

/// Names of the repository's scenarios, in alphabetical order.
///
/// # Errors
/// Their folder cannot be read.
pub(crate) fn names() -> Result<Vec<String>> {
    let entries = std::fs::read_dir(FOLDER).with_context(|| format!("Cannot list {FOLDER}"))?;
    let paths = entries.flatten().map(|entry| entry.path());
    let mut names: Vec<String> = paths
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    Ok(names)
}

/// `bench scenarios`: what there is.
///
/// # Errors
/// A file of the repository is not right.
pub(crate) fn list() -> Result<()> {
    for name in names()? {
        let scenario = Scenario::load(&name)?;
        println!("{name:<24} {}", scenario.about);
    }
    Ok(())
}

/// A version of QEMU that the setup provides.
pub(crate) fn parse_qemu(text: &str) -> Result<QemuKind, String> {
    let found = QemuKind::ALL.into_iter().find(|kind| kind.version() == text);
    found.ok_or_else(|| format!("there are 7.2 and 10.0, not {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITER: &str = "about = \"x\"\n[workload]\nkind = \"writer\"\nfill_mib = 100\n\
                          hot_mib = 10\npages_per_s = 5\n";

    fn error(text: &str) -> String {
        format!("{:#}", Scenario::parse("x", text).unwrap_err())
    }

    #[test]
    fn every_scenario_of_the_repository_is_right_and_survives_a_record() {
        let names = names().unwrap();
        for wanted in ["idle", "writer", "writer-random", "writer-text", "text", "resident"] {
            assert!(names.iter().any(|name| name == wanted), "{wanted}");
        }
        for name in names {
            let scenario = Scenario::load(&name).unwrap();
            assert_eq!(scenario.name, name);
            let json = serde_json::to_string(&scenario).unwrap();
            assert_eq!(serde_json::from_str::<Scenario>(&json).unwrap(), scenario);
        }
    }

    #[test]
    fn what_is_left_out_has_a_default() {
        let scenario = Scenario::parse("x", WRITER).unwrap();
        assert_eq!((scenario.guest.memory_mib, scenario.run.repeats), (2048, 5));
        assert_eq!(scenario.link.rate, 1_000_000_000);
        assert_eq!(scenario.modes.plans().len(), 1);
    }

    #[test]
    fn mistakes_are_named() {
        let with = |text: &str| error(&format!("{WRITER}{text}"));
        assert!(error("about = \"x\"\n").contains("workload"));
        assert!(error(&format!("spede = 1\n{WRITER}")).contains("spede"));
        assert!(with("fil = 1\n").contains("fil"));
        assert!(with("[guest]\nmemory_mib = 256\n").contains("needs 268 MiB"));
        assert!(with("[guest]\nqemu = \"9\"\n").contains("there are 7.2"));
        assert!(with("[link]\nrate = \"fast\"\n").contains("100k to 100G"));
        assert!(with("[run]\nrepeats = 0\n").contains("1 to 200"));
        assert!(error(&format!("name = \"y\"\n{WRITER}")).contains("as its file"));
        assert!(
            error(&format!("kind = \"ablation\"\n{WRITER}")).contains("compare with its first")
        );
    }

    #[test]
    fn private_memory_is_for_all_modes_but_the_one_that_reads_it_from_outside() {
        let private = format!("{WRITER}[guest]\nis_private = true\n");
        assert!(error(&private).contains("godwit needs memory that is shared"));
        let by_stream =
            "[modes]\nqemu = [\"xbzrle\"]\n[[modes.godwit]]\nname = \"stream\"\nby = \"stream\"\n";
        let scenario = Scenario::parse("x", &format!("{private}{by_stream}")).unwrap();
        assert!(scenario.guest.is_private && !GuestPart::default().is_private);
        let direct = Overrides { modes: vec!["godwit".into()], ..Overrides::default() };
        assert!(scenario.with(&direct).is_err());
    }

    #[test]
    fn a_split_needs_hosts_a_mode_that_splits_and_memory_for_its_phases() {
        let mode = "[[modes.godwit]]\nname = \"s\"\nsplit = true\n";
        let hosts = "[split]\nresident_mib = 64\ncapacity_mib = 900\n";
        let split = |rest: &str| format!("kind = \"split\"\n{WRITER}{hosts}{rest}");
        let right = Scenario::parse("x", &split(mode)).unwrap();
        assert_eq!(right.split.map(|split| (split.servers, split.phase_s)), Some((2, 20)));
        assert!(error(&split("")).contains("split = true"));
        assert!(error(&format!("{WRITER}{mode}")).contains("without [split]"));
        assert!(error(&format!("{WRITER}{hosts}{mode}")).contains("belong together"));
        let phases = format!("phases = [\"hot\"]\n{mode}");
        assert!(error(&split(&phases)).contains("needs a worker"));
        let baseline = format!("baseline = \"y\"\n{mode}");
        assert!(error(&split(&baseline)).contains("\"y\""));
        assert!(error(&split(&format!("{mode}[link]\ndelay_ms = 5\n"))).contains("no relay"));
        let some = Overrides { modes: vec!["send".into()], ..Overrides::default() };
        let whole = Scenario::load("split-access").unwrap().with(&some).unwrap();
        assert_eq!(whole.split.map(|split| split.baseline), Some(None));
    }

    #[test]
    fn a_name_that_nobody_has_is_answered_with_those_there_are() {
        let error = Scenario::load("idel").unwrap_err().to_string();
        assert!(error.contains("idle") && error.contains("writer-text"), "{error}");
    }

    #[test]
    fn another_guest_has_no_targets() {
        let scenario = Scenario::load("idle").unwrap();
        assert!(!scenario.targets.is_empty());
        let more = Overrides { repeats: Some(2), ..Overrides::default() };
        assert_eq!(scenario.clone().with(&more).unwrap().targets, scenario.targets);
        let small = Overrides { memory_mib: Some(512), ..Overrides::default() };
        assert!(scenario.clone().with(&small).unwrap().targets.is_empty());
        let slow = Overrides { rate: Some(100_000_000), ..Overrides::default() };
        assert!(scenario.with(&slow).unwrap().targets.is_empty());
    }
}
