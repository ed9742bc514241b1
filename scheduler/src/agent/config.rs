//! What an agent is told: one file in TOML.
//!
//! Invariant: a [`Config`] that was read makes sense as a whole; whatever does not is refused with its line and a remedy.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::wishes::Wishes;
use crate::detect::SettingsError;
use crate::lines::Lines;
use crate::plan::{self, Limits};
use crate::profile::assemble;
use crate::{detect, profile, provision};

/// Largest file, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Largest number of seconds that a setting may have.
const SECONDS_MAX: f64 = 86_400.0;

/// Why a file is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("{path}: {source}; `godwit-scheduler agent --example` prints one to begin with")]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        source: std::io::Error,
    },
    /// It is not TOML, or has a key that does not belong there.
    #[error("{path}: {what}`godwit-scheduler agent --example` prints a file with all keys")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and what.
        what: String,
    },
    /// It says something that cannot be.
    #[error("{path}, line {line}: {what}; {remedy}")]
    Wrong {
        /// The file.
        path: PathBuf,
        /// Where, from 1.
        line: usize,
        /// What.
        what: String,
        /// What to do about it.
        remedy: String,
    },
}

/// Where agents share what they know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum StoreSettings {
    /// A file: one machine, or a lab on it.
    Embedded {
        /// The file.
        path: PathBuf,
    },
    /// Members of etcd.
    Etcd {
        /// Each as `http://ADDRESS:PORT`, or `https` with the files below.
        endpoints: Vec<String>,
        /// The authority that signed the members' certificates, PEM.
        #[serde(default)]
        authority: Option<PathBuf>,
        /// Our certificate, PEM.
        #[serde(default)]
        certificate: Option<PathBuf>,
        /// Its key, PEM.
        #[serde(default)]
        key: Option<PathBuf>,
    },
}

/// How decisions are made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct PolicySettings {
    /// The policy's name.
    pub name: String,
    /// Whether plans are only made and shown.
    pub dry_run: bool,
    /// A guest whose move has failed is left alone for so long, seconds.
    pub retry_after_s: f64,
    /// For so long a move waits for a host that takes part in another one, seconds.
    pub wait_s: f64,
}

impl Default for PolicySettings {
    fn default() -> Self {
        Self { name: "godwit".into(), dry_run: false, retry_after_s: 60.0, wait_s: 120.0 }
    }
}

/// How guests are moved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct MigrateSettings {
    /// The engine.
    pub program: PathBuf,
    /// Further options for `migrate send`.
    pub send: Vec<String>,
    /// Further options for `migrate receive`.
    pub receive: Vec<String>,
    /// The address on which guests are received; that of the API if left out.
    pub address: Option<std::net::IpAddr>,
    /// First and last port on which guests are received.
    pub ports: [u16; 2],
    /// What starts a QEMU that waits for a guest: a program and its arguments, in which `{guest}`, `{uuid}` and `{qmp}`
    /// stand for the guest's name and UUID and for the monitor's socket. It must leave a QEMU behind that was started with
    /// `-incoming defer` and listens on that socket.
    pub start: Vec<String>,
    /// For so long that may take, seconds.
    pub start_within_s: f64,
    /// For so long a guest may take to arrive after its QEMU was started, seconds.
    pub arrive_within_s: f64,
}

impl Default for MigrateSettings {
    fn default() -> Self {
        Self {
            program: "migrate".into(),
            send: vec![],
            receive: vec![],
            address: None,
            ports: [7720, 7759],
            start: vec![],
            start_within_s: 30.0,
            arrive_within_s: 7200.0,
        }
    }
}

/// Everything that an agent is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Directory of this host's identity, made by `migrate pki issue`. Its name is the host's.
    pub identity: PathBuf,
    /// Address and port of the API and the page.
    pub listen: SocketAddr,
    /// The same as others reach it, if that is another one.
    #[serde(default)]
    pub advertise: Option<String>,
    /// Where the agent remembers its migrations.
    #[serde(default = "state_folder")]
    pub state: PathBuf,
    /// Names of certificates that may ask for changes, beside other agents; all of the authority's if there are none.
    #[serde(default)]
    pub operators: Vec<String>,
    /// An agent that is not heard of for so long counts as gone, seconds.
    #[serde(default = "lease_s")]
    pub lease_s: f64,
    /// What agents share.
    pub store: StoreSettings,
    /// What is read of this host and its guests.
    #[serde(default)]
    pub profile: profile::Settings,
    /// What is made of others' reports.
    #[serde(default)]
    pub cluster: assemble::Settings,
    /// What a hotspot is.
    #[serde(default)]
    pub detect: detect::Settings,
    /// What guests are estimated to want.
    #[serde(default)]
    pub provision: provision::Settings,
    /// How decisions are made.
    #[serde(default)]
    pub policy: PolicySettings,
    /// How far plans may go.
    #[serde(default)]
    pub limits: Limits,
    /// What is wanted of guests' places.
    #[serde(default)]
    pub rules: Wishes,
    /// Guests of higher priority are moved and squeezed later.
    #[serde(default)]
    pub priority: BTreeMap<String, u8>,
    /// How guests are moved.
    #[serde(default)]
    pub migrate: MigrateSettings,
}

fn state_folder() -> PathBuf {
    "/var/lib/godwit/scheduler".into()
}

fn lease_s() -> f64 {
    30.0
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ConfigError`] with the place and the remedy.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let failed = |source| ConfigError::File { path: path.to_owned(), source };
        if std::fs::metadata(path).map_err(failed)?.len() > FILE_BYTES_MAX {
            return Err(failed(std::io::Error::other("the file is too long")));
        }
        Self::parse(&std::fs::read_to_string(path).map_err(failed)?, path)
    }

    /// Reads a file's text.
    ///
    /// # Errors
    /// As [`Config::read`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| ConfigError::Syntax {
            path: path.to_owned(),
            what: error.to_string(),
        })?;
        match config.fault() {
            None => Ok(config),
            Some((key, what, remedy)) => Err(ConfigError::Wrong {
                path: path.to_owned(),
                line: Lines(text).of_path(&key),
                what,
                remedy,
            }),
        }
    }

    /// The first thing that cannot be: its key with its table, what, and what to do.
    fn fault(&self) -> Option<(String, String, String)> {
        let checks = [
            ("profile", self.profile.check()),
            ("detect", self.detect.check()),
            ("provision", self.provision.check()),
        ];
        for (table, checked) in checks {
            if let Err(SettingsError { key, value, remedy }) = checked {
                let what = format!("{key} = {value} cannot be");
                return Some((format!("{table}.{key}"), what, remedy.into()));
            }
        }
        if plan::policy(&self.policy.name).is_none() {
            let what = format!("there is no policy {:?}", self.policy.name);
            return Some((
                "policy.name".into(),
                what,
                format!("take one of {}", plan::NAMES.join(", ")),
            ));
        }
        let seconds = [
            ("lease-s", self.lease_s, 1.0),
            ("policy.retry-after-s", self.policy.retry_after_s, 0.0),
            ("policy.wait-s", self.policy.wait_s, 0.0),
            ("migrate.start-within-s", self.migrate.start_within_s, 0.1),
            ("migrate.arrive-within-s", self.migrate.arrive_within_s, 1.0),
            ("limits.back_after_s", self.limits.back_after_s, 0.0),
            ("limits.stay_s", self.limits.stay_s, 0.0),
        ];
        for (key, value, least) in seconds {
            if !(least..=SECONDS_MAX).contains(&value) {
                let remedy = format!("take seconds from {least} to {SECONDS_MAX}");
                return Some((key.into(), format!("{key} = {value} cannot be"), remedy));
            }
        }
        let shares = crate::model::Resource::ALL.map(|resource| self.limits.share_max[resource]);
        if let Some(share) = shares.into_iter().find(|share| !(0.01..=10.0).contains(share)) {
            let remedy = "take shares from 0.01 to 10 (1 for all of it)".to_owned();
            return Some((
                "limits.share_max.".into(),
                format!("a host may be filled up to {share}"),
                remedy,
            ));
        }
        if self.lease_s < 2.0 * self.profile.interval_s {
            let what = format!(
                "an agent is to count as gone after {} s, and is heard of every {} s",
                self.lease_s, self.profile.interval_s
            );
            return Some((
                "lease-s".into(),
                what,
                "let lease-s be three times profile.interval-s".into(),
            ));
        }
        let [first, last] = self.migrate.ports;
        if first == 0 || first > last {
            let what = format!("ports from {first} to {last}");
            return Some((
                "migrate.ports".into(),
                what,
                "name the first and the last one, such as [7720, 7759]".into(),
            ));
        }
        self.fault_of_the_store()
    }

    fn fault_of_the_store(&self) -> Option<(String, String, String)> {
        let StoreSettings::Etcd { endpoints, authority, certificate, key } = &self.store else {
            return None;
        };
        if endpoints.is_empty() {
            let remedy = "name all members, such as [\"http://10.0.0.1:2379\"]";
            return Some((
                "store.endpoints".into(),
                "no member of etcd is named".into(),
                remedy.into(),
            ));
        }
        let files = [authority, certificate, key].into_iter().flatten().count();
        if files != 0 && files != 3 {
            let remedy = "name authority, certificate and key, or none of them";
            return Some((
                "store.endpoints".into(),
                "a file for TLS is missing".into(),
                remedy.into(),
            ));
        }
        None
    }
}

/// A file with all keys, to begin with.
pub const EXAMPLE: &str = include_str!("example.toml");

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(change: impl Fn(&str) -> String) -> String {
        let text = change(EXAMPLE);
        assert_ne!(text, EXAMPLE);
        Config::parse(&text, Path::new("agent.toml")).unwrap_err().to_string()
    }

    #[test]
    fn the_example_has_every_key_with_its_default() {
        let config = Config::parse(EXAMPLE, Path::new("agent.toml")).unwrap();
        let said: toml::Table = toml::from_str(EXAMPLE).unwrap();
        let all = toml::Table::try_from(&config).unwrap();
        fn missing(all: &toml::Table, said: &toml::Table, at: &str, found: &mut Vec<String>) {
            for (key, value) in all {
                match (value, said.get(key)) {
                    (toml::Value::Table(all), Some(toml::Value::Table(said))) => {
                        missing(all, said, &format!("{at}{key}."), found);
                    }
                    (_, Some(_)) => {}
                    (_, None) => found.push(format!("{at}{key}")),
                }
            }
        }
        let mut found = vec![];
        missing(&all, &said, "", &mut found);
        assert_eq!(found, Vec::<String>::new());
        assert_eq!(
            config.profile,
            profile::Settings {
                socket_folder: config.profile.socket_folder.clone(),
                ..Default::default()
            }
        );
        assert_eq!(config.detect, detect::Settings::default());
        assert_eq!(config.provision, provision::Settings::default());
        assert_eq!(config.limits, Limits::default());
        assert_eq!(config.cluster, assemble::Settings::default());
        assert_eq!(config.policy, PolicySettings::default());
        let start = config.migrate.start.clone();
        assert_eq!(config.migrate, MigrateSettings { start, ..Default::default() });
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line_and_a_remedy() {
        let lines =
            |text: &str| EXAMPLE.lines().position(|line| line.starts_with(text)).unwrap() + 1;
        let told = fault(|text| text.replace("name = \"godwit\"", "name = \"best\""));
        assert!(
            told.contains(&format!("line {}: there is no policy \"best\"", lines("name ="))),
            "{told}"
        );
        assert!(told.contains("sandpiper"), "{told}");
        let told = fault(|text| text.replace("lease-s = 30.0", "lease-s = 15.0"));
        assert!(told.contains(&format!("line {}", lines("lease-s"))), "{told}");
        assert!(told.contains("three times"), "{told}");
        let told = fault(|text| text.replace("ports = [7720, 7759]", "ports = [9, 8]"));
        assert!(told.contains("the first and the last"), "{told}");
        let told = fault(|text| text.replace("retry-after-s = 60.0", "retry-after-s = -1.0"));
        assert!(told.contains("take seconds"), "{told}");
        let told = fault(|text| text.replace("cpu_cores = 0.85", "cpu_cores = nan"));
        let line = lines("[limits.share_max]");
        assert!(told.contains(&format!("line {line}: a host may be filled up to NaN")), "{told}");
        let told = fault(|text| text.replace("\ncpu = 0.85", "\ncpu = 85.0"));
        let line = lines("[detect.threshold]") + 1;
        assert!(told.contains(&format!("line {line}: threshold.cpu = 85")), "{told}");
        let told = fault(|text| text.replace("dry-run", "dryrun"));
        assert!(told.contains("unknown field `dryrun`") && told.contains("--example"), "{told}");
        let told = fault(|text| {
            text.replace(
                "kind = \"embedded\"\npath = \"/var/lib/godwit/store.sqlite\"",
                "kind = \"etcd\"\nendpoints = []",
            )
        });
        assert!(told.contains("no member of etcd"), "{told}");
    }
}
