//! The modes of a scenario, in the order of their turns: Godwit's settings, then QEMU's modes.

use std::collections::BTreeSet;

use anyhow::{Result, bail, ensure};
use clap::ValueEnum as _;
use serde::{Deserialize, Serialize};

use crate::mode::Mode;

/// A setting of Godwit: of `migrate send` or of gateways.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct GodwitMode {
    /// As shown.
    pub(crate) name: String,
    /// Who migrates, and how.
    #[serde(default = "GodwitMode::godwit", skip_serializing_if = "GodwitMode::is_godwit")]
    pub(crate) by: Mode,
    /// Whether `migrate split` runs instead of `migrate send`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) split: bool,
    /// Arguments of `migrate send`, `migrate split` or the source's gateway.
    #[serde(default)]
    pub(crate) send: Vec<String>,
    /// Arguments of `migrate receive` or the destination's gateway.
    #[serde(default)]
    pub(crate) receive: Vec<String>,
}

impl GodwitMode {
    fn godwit() -> Mode {
        Mode::Godwit
    }

    fn is_godwit(by: &Mode) -> bool {
        *by == Mode::Godwit
    }

    /// Without arguments.
    fn of(by: Mode) -> Self {
        Self { name: by.label().to_owned(), by, split: false, send: vec![], receive: vec![] }
    }
}

/// A mode that the tables are to name although nothing can measure it yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NotBuilt {
    /// As shown.
    pub(crate) name: String,
    /// What is missing.
    pub(crate) why: String,
}

/// The modes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Modes {
    /// Settings of Godwit.
    #[serde(default = "Modes::defaults")]
    pub(crate) godwit: Vec<GodwitMode>,
    /// QEMU's modes.
    #[serde(default)]
    pub(crate) qemu: Vec<Mode>,
    /// What cannot be measured yet.
    #[serde(default)]
    pub(crate) not_built: Vec<NotBuilt>,
    /// Channels of multifd.
    #[serde(default = "Modes::channels")]
    pub(crate) channels: u32,
}

impl Modes {
    /// Godwit as it is without arguments.
    fn defaults() -> Vec<GodwitMode> {
        vec![GodwitMode::of(Mode::Godwit)]
    }

    fn channels() -> u32 {
        2
    }

    /// All of them.
    pub(crate) fn plans(&self) -> Vec<ModePlan> {
        let godwit = self.godwit.iter().map(|one| ModePlan {
            name: one.name.clone(),
            by: one.by,
            splits: one.split,
            send: one.send.clone(),
            receive: one.receive.clone(),
        });
        godwit.chain(self.qemu.iter().map(|mode| ModePlan::of(*mode))).collect()
    }

    /// Those of these names, in their order; a name that the scenario does not have may be that of
    /// any mode without settings.
    pub(super) fn keep(&self, names: &[String]) -> Result<Self> {
        let mut kept = Self { godwit: vec![], qemu: vec![], ..self.clone() };
        kept.not_built.retain(|one| names.contains(&one.name));
        for name in names {
            if let Some(own) = self.godwit.iter().find(|one| one.name == *name) {
                kept.godwit.push(own.clone());
                continue;
            }
            match Mode::from_str(name, false) {
                Ok(mode) if mode.is_ours() => kept.godwit.push(GodwitMode::of(mode)),
                Ok(mode) => kept.qemu.push(mode),
                Err(_) if self.not_built.iter().any(|one| one.name == *name) => {}
                Err(_) => {
                    let known: Vec<String> = self.plans().into_iter().map(|one| one.name).collect();
                    bail!(
                        "No mode is called {name:?}; the scenario has {}, and there are {}",
                        known.join(", "),
                        Mode::ALL.map(Mode::label).join(", ")
                    )
                }
            }
        }
        Ok(kept)
    }

    pub(super) fn check(&self) -> Result<()> {
        let plans = self.plans();
        ensure!(!plans.is_empty(), "There is no mode to measure");
        ensure!((1..=16).contains(&self.channels), "channels: multifd has 1 to 16");
        if let Some(other) = self.godwit.iter().find(|one| !one.by.is_ours()) {
            bail!("godwit: {} is a mode of QEMU; it belongs to `qemu`", other.by);
        }
        if let Some(ours) = self.qemu.iter().find(|mode| mode.is_ours()) {
            bail!("qemu: {ours} is no mode of QEMU; its settings are [[modes.godwit]]");
        }
        let mut names = BTreeSet::new();
        for plan in &plans {
            let taken = Mode::from_str(&plan.name, false).is_ok_and(|mode| mode != plan.by);
            ensure!(!taken, "A setting is called {}, which is another mode", plan.name);
            ensure!(
                !plan.splits || plan.by == Mode::Godwit,
                "split: {} cannot split a guest",
                plan.by
            );
            ensure!(!plan.name.trim().is_empty(), "A mode has no name");
            ensure!(names.insert(&plan.name), "Two modes are called {}", plan.name);
        }
        Ok(())
    }
}

impl Default for Modes {
    fn default() -> Self {
        Self {
            godwit: Self::defaults(),
            qemu: vec![],
            not_built: vec![],
            channels: Self::channels(),
        }
    }
}

/// One mode as it is measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ModePlan {
    /// As shown and recorded.
    pub(crate) name: String,
    /// Who migrates, and how.
    pub(crate) by: Mode,
    /// Whether it splits the guest.
    pub(crate) splits: bool,
    /// Arguments of `migrate send`, `migrate split` or the source's gateway.
    pub(crate) send: Vec<String>,
    /// Arguments of `migrate receive` or the destination's gateway.
    pub(crate) receive: Vec<String>,
}

impl ModePlan {
    /// A mode without settings.
    pub(crate) fn of(by: Mode) -> Self {
        Self { name: by.label().to_owned(), by, splits: false, send: vec![], receive: vec![] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Modes> {
        let modes: Modes = toml::from_str(text)?;
        modes.check()?;
        Ok(modes)
    }

    fn names(modes: &Modes) -> Vec<String> {
        modes.plans().into_iter().map(|one| one.name).collect()
    }

    #[test]
    fn godwit_comes_first_and_qemu_in_its_order() {
        let text = "qemu = [\"xbzrle\", \"pre-copy\"]\n[[godwit]]\nname = \"all\"\n\
                    [[godwit]]\nname = \"base\"\nsend = [\"--delta-cache\", \"0\"]\n";
        let modes = read(text).unwrap();
        assert_eq!(names(&modes), ["all", "base", "xbzrle", "pre-copy"]);
        assert_eq!(modes.plans()[1].send, ["--delta-cache", "0"]);
        assert_eq!(names(&read("").unwrap()), ["godwit"]);
    }

    #[test]
    fn names_are_unique_and_not_taken() {
        let one = |name: &str| format!("[[godwit]]\nname = \"{name}\"\n");
        assert!(read(&(one("a") + &one("a"))).is_err());
        assert!(read(&one("pre-copy")).is_err());
        assert!(read(&one(" ")).is_err());
        assert!(read("qemu = [\"godwit\"]").is_err());
        assert!(read("godwit = []").is_err());
        let error = read("qemu = [\"precopy\"]").unwrap_err().to_string();
        assert!(error.contains("precopy") && error.contains("pre-copy-private"), "{error}");
    }

    #[test]
    fn streams_and_gateways_are_settings_of_godwit() {
        let text = "qemu = [\"pre-copy\"]\n[[godwit]]\nname = \"stream\"\nby = \"stream\"\n\
                    [[godwit]]\nname = \"packed\"\nby = \"gateway\"\nsend = [\"--lanes\", \"tcp\"]\n";
        let modes = read(text).unwrap();
        let by: Vec<Mode> = modes.plans().iter().map(|plan| plan.by).collect();
        assert_eq!(by, [Mode::Stream, Mode::Gateway, Mode::PreCopy]);
        assert_eq!(modes.plans()[1].send, ["--lanes", "tcp"]);
        let kept = modes.keep(&["gateway-plain".into(), "packed".into()]).unwrap();
        assert_eq!(names(&kept), ["gateway-plain", "packed"]);
        assert_eq!(kept.plans()[0], ModePlan::of(Mode::GatewayPlain));
        let error = |text: &str| read(text).unwrap_err().to_string();
        assert!(error("qemu = [\"gateway\"]").contains("gateway is no mode of QEMU"));
        let one =
            |by: &str, rest: &str| format!("[[godwit]]\nname = \"stream\"\nby = \"{by}\"\n{rest}");
        assert!(error(&one("xbzrle", "")).contains("xbzrle is a mode of QEMU"));
        assert!(error(&one("gateway", "")).contains("another mode"));
        assert!(error(&one("stream", "split = true\n")).contains("cannot split"));
    }

    #[test]
    fn a_selection_keeps_settings_and_may_add_modes() {
        let text =
            "qemu = [\"xbzrle\"]\n[[godwit]]\nname = \"base\"\nsend = [\"--lanes\", \"1\"]\n";
        let modes = read(text).unwrap();
        let kept = modes.keep(&["base".into(), "pre-copy".into(), "godwit".into()]).unwrap();
        assert_eq!(names(&kept), ["base", "godwit", "pre-copy"]);
        assert_eq!(kept.plans()[0].send, ["--lanes", "1"]);
        assert!(modes.keep(&["bas".into()]).unwrap_err().to_string().contains("base, xbzrle"));
    }
}
