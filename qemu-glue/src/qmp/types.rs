//! What QEMU's answers say, as far as the engine uses it.
//!
//! Field names and values follow qapi/{run-state,migration,machine,machine-target}.json. Every
//! enumeration keeps values that it does not know: QEMU adds some in most releases.

use std::fmt;

use migrate_core::error::GuestPlace;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Declares an enumeration of QEMU with its wire names and a place for unknown ones.
macro_rules! qemu_enum {
    ($(#[$meta:meta])* $name:ident { $($(#[$vmeta:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(from = "String", into = "String")]
        #[non_exhaustive]
        pub enum $name {
            $($(#[$vmeta])* #[doc = concat!("`", $text, "`.")] $variant,)*
            /// A value that this engine does not know.
            Unknown(String),
        }

        impl $name {
            /// QEMU's name for it.
            pub fn as_str(&self) -> &str {
                match self {
                    $(Self::$variant => $text,)*
                    Self::Unknown(text) => text,
                }
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                match text.as_str() {
                    $($text => Self::$variant,)*
                    _ => Self::Unknown(text),
                }
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self::from(text.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.as_str().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

qemu_enum! {
    /// What a VM as a whole is doing (`RunState`).
    RunState {
        Debug = "debug",
        FinishMigrate = "finish-migrate",
        InMigrate = "inmigrate",
        InternalError = "internal-error",
        IoError = "io-error",
        Paused = "paused",
        PostMigrate = "postmigrate",
        Prelaunch = "prelaunch",
        RestoreVm = "restore-vm",
        Running = "running",
        SaveVm = "save-vm",
        Shutdown = "shutdown",
        Suspended = "suspended",
        Watchdog = "watchdog",
        GuestPanicked = "guest-panicked",
        Colo = "colo",
    }
}

qemu_enum! {
    /// Where a migration stands (`MigrationStatus`).
    MigrationStatus {
        None = "none",
        Setup = "setup",
        Cancelling = "cancelling",
        Cancelled = "cancelled",
        Active = "active",
        PostcopyActive = "postcopy-active",
        PostcopyDevice = "postcopy-device",
        PostcopyPaused = "postcopy-paused",
        PostcopyRecoverSetup = "postcopy-recover-setup",
        PostcopyRecover = "postcopy-recover",
        Completed = "completed",
        Failed = "failed",
        Failing = "failing",
        Colo = "colo",
        PreSwitchover = "pre-switchover",
        Device = "device",
        WaitUnplug = "wait-unplug",
    }
}

impl MigrationStatus {
    /// Whether a migration in this state is over, or none was begun.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::None | Self::Completed | Self::Failed | Self::Cancelled)
    }
}

/// QEMU's version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuVersion {
    /// `7` in 7.2.22.
    pub major: u32,
    /// `2` in 7.2.22.
    pub minor: u32,
    /// `22` in 7.2.22.
    pub micro: u32,
    /// The packager's text, often empty.
    pub package: String,
}

impl QemuVersion {
    /// From the `VersionInfo` of the greeting or of `query-version`.
    pub(super) fn from_value(version: &Value) -> Option<Self> {
        let qemu = version.get("qemu")?;
        let number = |key| u32::try_from(qemu.get(key)?.as_u64()?).ok();
        let package = version.get("package").and_then(Value::as_str).unwrap_or_default();
        Some(Self {
            major: number("major")?,
            minor: number("minor")?,
            micro: number("micro")?,
            package: package.trim().to_owned(),
        })
    }

    /// Major, minor and micro.
    pub fn numbers(&self) -> (u32, u32, u32) {
        (self.major, self.minor, self.micro)
    }

    /// Whether this is at least `major.minor`.
    pub fn at_least(&self, major: u32, minor: u32) -> bool {
        (self.major, self.minor) >= (major, minor)
    }
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)?;
        if !self.package.is_empty() {
            write!(f, " ({})", self.package)?;
        }
        Ok(())
    }
}

/// The answer to `query-status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Whether vCPUs execute.
    pub running: bool,
    /// The state.
    #[serde(rename = "status")]
    pub state: RunState,
}

impl Status {
    /// Where the guest is, in the engine's words.
    pub fn place(&self) -> GuestPlace {
        match (&self.state, self.running) {
            (_, true) => GuestPlace::Running,
            (RunState::InMigrate, false) => GuestPlace::Incoming,
            (RunState::Unknown(_), false) => GuestPlace::Unknown,
            (_, false) => GuestPlace::Paused,
        }
    }
}

/// The `ram` part of `query-migrate`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigrationRam {
    /// Bytes sent.
    pub transferred: u64,
    /// Bytes left; blocks that x-ignore-shared leaves out do not count.
    pub remaining: u64,
    /// Bytes of RAM that the migration covers.
    pub total: u64,
    /// Zero pages.
    pub duplicate: u64,
    /// Pages sent whole.
    pub normal: u64,
    /// Pages written a second, as of the last sync.
    pub dirty_pages_rate: u64,
    /// Rounds so far.
    pub dirty_sync_count: u64,
    /// Pages that the destination asked for, in post-copy.
    pub postcopy_requests: u64,
    /// Bytes sent after the switch to post-copy (8.1 and later).
    pub postcopy_bytes: u64,
}

/// The answer to `query-migrate`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigrationInfo {
    /// Where the last migration stands; nothing if there was none.
    pub status: Option<MigrationStatus>,
    /// Why it failed.
    pub error_desc: Option<String>,
    /// What forbids migrating this VM now.
    pub blocked_reasons: Vec<String>,
    /// Duration in ms.
    #[serde(rename = "total-time")]
    pub total_time_ms: Option<u64>,
    /// How long the guest stood, in ms.
    #[serde(rename = "downtime")]
    pub downtime_ms: Option<u64>,
    /// Memory; nothing before it began.
    pub ram: Option<MigrationRam>,
}

impl MigrationInfo {
    /// Whether a migration is under way.
    pub fn is_under_way(&self) -> bool {
        self.status.as_ref().is_some_and(|status| !status.is_over())
    }
}

/// One vCPU of `query-cpus-fast`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuThread {
    /// Number of the vCPU.
    pub cpu_index: i64,
    /// Its thread as QEMU sees it (in QEMU's own process namespace).
    pub thread_id: i32,
}

/// One memory backend of `query-memdev`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryBackend {
    /// Its id; backends that the machine made itself may have none.
    pub id: Option<String>,
    /// Size in bytes.
    pub size: u64,
    /// Whether other processes see what is written (`share=on`).
    #[serde(default)]
    pub share: bool,
}

/// One entry of `qom-list`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedChild {
    /// Name of the property.
    pub name: String,
    /// Its type: `child<T>` for an object of type `T`.
    #[serde(rename = "type")]
    pub kind: String,
}

impl NamedChild {
    /// The type of the object, if the property is one.
    pub fn child_type(&self) -> Option<&str> {
        self.kind.strip_prefix("child<")?.strip_suffix('>')
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn unknown_values_are_kept() {
        let status: Status =
            serde_json::from_value(json!({ "running": false, "status": "hibernating", "x": 1 }))
                .unwrap();
        assert_eq!(status.state, RunState::Unknown("hibernating".into()));
        assert_eq!(status.place(), GuestPlace::Unknown);
        assert_eq!(serde_json::to_value(&status.state).unwrap(), json!("hibernating"));
        let info: MigrationInfo =
            serde_json::from_value(json!({ "status": "teleporting", "ram": { "new": [] } }))
                .unwrap();
        assert!(info.is_under_way(), "an unknown status must not count as over");
    }

    #[test]
    fn places_follow_the_run_state() {
        let place = |state: &str, running| Status { running, state: state.into() }.place();
        assert_eq!(place("running", true), GuestPlace::Running);
        assert_eq!(place("inmigrate", false), GuestPlace::Incoming);
        assert_eq!(place("postmigrate", false), GuestPlace::Paused);
    }

    #[test]
    fn an_idle_migration_is_over() {
        let info: MigrationInfo = serde_json::from_value(json!({})).unwrap();
        assert!(!info.is_under_way() && info.blocked_reasons.is_empty());
    }

    #[test]
    fn versions_compare_by_number() {
        let version = QemuVersion::from_value(
            &json!({ "qemu": { "major": 10, "minor": 0, "micro": 2 }, "package": " deb " }),
        )
        .unwrap();
        assert!(version.at_least(9, 1) && version.at_least(10, 0) && !version.at_least(10, 1));
        assert_eq!(version.to_string(), "10.0.2 (deb)");
        assert_eq!(QemuVersion::from_value(&json!({ "qemu": { "major": -1 } })), None);
    }
}
