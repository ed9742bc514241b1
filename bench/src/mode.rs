//! Ways to migrate: Godwit and QEMU's own.

use clap::ValueEnum;
use framework::Backend;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// Cache of XBZRLE in bytes.
const XBZRLE_CACHE_BYTES: u64 = 512 << 20;

/// A way to migrate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Mode {
    /// `migrate send`.
    Godwit,
    /// QEMU's pre-copy, bandwidth unlimited.
    PreCopy,
    /// QEMU's pre-copy with all its defaults (128 MiB/s at most, downtime 300 ms).
    PreCopyDefault,
    /// QEMU's pre-copy of a guest with private memory, bandwidth unlimited: QEMU's ordinary setup.
    /// On shared tmpfs its search for zero pages populates every hole, at both ends.
    PreCopyPrivate,
    /// QEMU's pre-copy with XBZRLE, a cache of 512 MiB.
    Xbzrle,
    /// QEMU's multifd with zstd.
    MultifdZstd,
    /// QEMU's multifd over TLS of a guest with private memory, nothing packed.
    MultifdTls,
    /// QEMU's post-copy, begun after the first pass.
    PostCopy,
}

impl Mode {
    /// All, in the order of their turns.
    pub(crate) const ALL: [Self; 8] = [
        Self::Godwit,
        Self::PreCopy,
        Self::PreCopyDefault,
        Self::PreCopyPrivate,
        Self::Xbzrle,
        Self::MultifdZstd,
        Self::MultifdTls,
        Self::PostCopy,
    ];

    /// As typed and shown.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Godwit => "godwit",
            Self::PreCopy => "pre-copy",
            Self::PreCopyDefault => "pre-copy-default",
            Self::PreCopyPrivate => "pre-copy-private",
            Self::Xbzrle => "xbzrle",
            Self::MultifdZstd => "multifd-zstd",
            Self::MultifdTls => "multifd-tls",
            Self::PostCopy => "post-copy",
        }
    }

    /// QEMU's capabilities that are switched on at both ends, beside `events`.
    pub(crate) fn capabilities(self) -> &'static [&'static str] {
        match self {
            Self::Godwit | Self::PreCopy | Self::PreCopyDefault | Self::PreCopyPrivate => &[],
            Self::Xbzrle => &["xbzrle"],
            Self::MultifdZstd | Self::MultifdTls => &["multifd"],
            Self::PostCopy => &["postcopy-ram"],
        }
    }

    /// Whether both ends encrypt.
    pub(crate) fn is_encrypted(self) -> bool {
        self == Self::MultifdTls
    }

    /// Where the guest's memory lies, at both ends.
    pub(crate) fn backend(self) -> Backend {
        match self {
            Self::PreCopyPrivate | Self::MultifdTls => Backend::Private,
            _ => Backend::Tmpfs,
        }
    }

    /// QEMU's parameters that differ from its defaults, set at both ends.
    pub(crate) fn parameters(self, channels: u32) -> Value {
        let mut map = Map::new();
        if self != Self::PreCopyDefault {
            // 0 is unlimited (migration/qemu-file.c); the default is 128 MiB/s.
            map.insert("max-bandwidth".into(), json!(0));
        }
        match self {
            Self::Xbzrle => {
                map.insert("xbzrle-cache-size".into(), json!(XBZRLE_CACHE_BYTES));
            }
            Self::MultifdZstd => {
                map.insert("multifd-channels".into(), json!(channels));
                map.insert("multifd-compression".into(), json!("zstd"));
            }
            Self::MultifdTls => {
                map.insert("multifd-channels".into(), json!(channels));
            }
            _ => {}
        }
        Value::Object(map)
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.label())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_those_of_the_command_line_and_the_records() {
        for mode in Mode::ALL {
            assert_eq!(Mode::from_str(mode.label(), false), Ok(mode));
            assert_eq!(serde_json::to_value(mode).unwrap(), mode.label());
        }
    }

    #[test]
    fn only_the_default_keeps_the_bandwidth_cap() {
        for mode in Mode::ALL {
            let capped = mode.parameters(2).get("max-bandwidth").is_none();
            assert_eq!(capped, mode == Mode::PreCopyDefault);
        }
    }
}
