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
    /// `migrate send --path stream` of a guest with private memory.
    Stream,
    /// QEMU's pre-copy of a guest with private memory through a pair of gateways, bandwidth unlimited.
    Gateway,
    /// The same with QEMU's post-copy, begun after the first pass.
    GatewayPostCopy,
    /// As [`Mode::Gateway`] through gateways that pack nothing and send no deltas: what they cost.
    GatewayPlain,
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
    pub(crate) const ALL: [Self; 12] = [
        Self::Godwit,
        Self::Stream,
        Self::Gateway,
        Self::GatewayPostCopy,
        Self::GatewayPlain,
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
            Self::Stream => "stream",
            Self::Gateway => "gateway",
            Self::GatewayPostCopy => "gateway-post-copy",
            Self::GatewayPlain => "gateway-plain",
            Self::PreCopy => "pre-copy",
            Self::PreCopyDefault => "pre-copy-default",
            Self::PreCopyPrivate => "pre-copy-private",
            Self::Xbzrle => "xbzrle",
            Self::MultifdZstd => "multifd-zstd",
            Self::MultifdTls => "multifd-tls",
            Self::PostCopy => "post-copy",
        }
    }

    /// Whether Godwit has a part in it; else it is QEMU's alone.
    pub(crate) fn is_ours(self) -> bool {
        self.is_sent() || self.is_by_gateway()
    }

    /// Whether `migrate send` drives it.
    pub(crate) fn is_sent(self) -> bool {
        matches!(self, Self::Godwit | Self::Stream)
    }

    /// Whether QEMU drives it, through gateways.
    pub(crate) fn is_by_gateway(self) -> bool {
        matches!(self, Self::Gateway | Self::GatewayPostCopy | Self::GatewayPlain)
    }

    /// Whether QEMU is asked for post-copy after the first pass.
    pub(crate) fn is_post_copy(self) -> bool {
        matches!(self, Self::PostCopy | Self::GatewayPostCopy)
    }

    /// What tells it from others on the command line of `migrate send` or of the source's gateway.
    pub(crate) fn words(self) -> &'static [&'static str] {
        match self {
            Self::Stream => &["--path", "stream"],
            Self::GatewayPlain => &["--compression", "none", "--delta-cache", "0"],
            _ => &[],
        }
    }

    /// QEMU's capabilities that are switched on at both ends, beside `events`. Gateways need the return path:
    /// with it the source's QEMU says `completed` when that at the destination has the guest, without it when
    /// all was sent.
    pub(crate) fn capabilities(self) -> &'static [&'static str] {
        match self {
            Self::Godwit | Self::Stream => &[],
            Self::Gateway | Self::GatewayPlain => &["return-path"],
            Self::GatewayPostCopy => &["return-path", "postcopy-ram"],
            Self::PreCopy | Self::PreCopyDefault | Self::PreCopyPrivate => &[],
            Self::Xbzrle => &["xbzrle"],
            Self::MultifdZstd | Self::MultifdTls => &["multifd"],
            Self::PostCopy => &["postcopy-ram"],
        }
    }

    /// Whether both ends encrypt.
    pub(crate) fn is_encrypted(self) -> bool {
        self == Self::MultifdTls
    }

    /// Where the guest's memory lies, at both ends, unless the scenario wants it private for all.
    pub(crate) fn backend(self) -> Backend {
        match self {
            Self::Stream | Self::PreCopyPrivate | Self::MultifdTls => Backend::Private,
            gateway if gateway.is_by_gateway() => Backend::Private,
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

    #[test]
    fn what_needs_no_shared_memory_has_qemus_ordinary_setup() {
        for mode in Mode::ALL {
            let is_by_stream = mode.is_ours() && mode != Mode::Godwit;
            let is_named = [Mode::PreCopyPrivate, Mode::MultifdTls].contains(&mode);
            assert_eq!(mode.backend() == Backend::Private, is_by_stream || is_named, "{mode}");
        }
    }

    #[test]
    fn gateways_have_a_return_path_and_post_copy_its_capability() {
        for mode in Mode::ALL {
            let has = |name| mode.capabilities().contains(&name);
            assert_eq!(has("return-path"), mode.is_by_gateway(), "{mode}");
            assert_eq!(has("postcopy-ram"), mode.is_post_copy(), "{mode}");
            assert!(!(mode.is_sent() && mode.is_by_gateway()), "{mode}");
        }
    }
}
