//! QEMU's migration settings while a transfer of ours uses them.
//!
//! What is changed is remembered twice: in memory, and in QEMU itself as the value of
//! `max-bandwidth`, whose low bits say which capabilities were on. So an engine that was killed
//! leaves enough behind for the next one. Only parameters are not kept there: the next engine sets
//! QEMU's defaults.

use serde_json::{Map, Value, json};
use tracing::{debug, info, warn};

use super::{DeviceStateError, refuse_active};
use crate::qmp::Client;

/// A capability's name, and what it has to be in the roles named with [`CAPABILITIES`].
type Capability = (&'static str, Option<bool>, Option<bool>, Option<bool>);

/// Capabilities that matter, with what saving and loading device state need, and what QEMU's whole stream needs at
/// either end; `None` leaves one as it is. The order is part of [`MARK`]: append only.
const CAPABILITIES: [Capability; 20] = [
    ("x-ignore-shared", Some(true), Some(true), Some(false)),
    ("events", Some(true), Some(true), Some(true)),
    ("late-block-activate", None, Some(true), Some(true)),
    ("xbzrle", Some(false), Some(false), Some(false)),
    ("compress", Some(false), Some(false), Some(false)),
    ("postcopy-ram", Some(false), Some(false), Some(false)),
    ("postcopy-preempt", Some(false), Some(false), Some(false)),
    ("release-ram", Some(false), Some(false), Some(false)),
    ("return-path", Some(false), Some(false), Some(true)),
    ("switchover-ack", Some(false), Some(false), Some(false)),
    ("pause-before-switchover", Some(false), Some(false), Some(false)),
    ("multifd", Some(false), Some(false), Some(false)),
    ("zero-copy-send", Some(false), Some(false), Some(false)),
    ("dirty-bitmaps", Some(false), Some(false), None),
    ("validate-uuid", Some(false), Some(false), Some(false)),
    ("background-snapshot", Some(false), Some(false), Some(false)),
    ("mapped-ram", Some(false), Some(false), Some(false)),
    ("block", Some(false), Some(false), Some(false)),
    ("x-colo", Some(false), Some(false), Some(false)),
    ("auto-converge", None, None, Some(false)),
];

/// `max-bandwidth` in bytes per second while a transfer runs, without the bits: far above any
/// memory's speed, and a value that nobody else uses.
const MARK: u64 = 0x6f_6477 << 24;

/// Bits of [`MARK`] that say which capabilities were on.
const MARK_BITS: u64 = (1 << 24) - 1;

/// QEMU's default of `max-bandwidth` in bytes per second (migration/options.c, `MAX_THROTTLE`).
const BANDWIDTH_DEFAULT: u64 = 128 << 20;

/// The bit of [`MARK`] that says that `downtime-limit` was changed.
const LIMITED: u64 = 1 << 23;

/// QEMU's default of `downtime-limit` in milliseconds.
const DOWNTIME_DEFAULT_MS: u64 = 300;

/// What the settings are needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Save,
    Load,
    StreamOut {
        /// QEMU's limit in milliseconds.
        downtime_ms: u64,
        /// Whether the guest may be handed over by post-copy.
        post_copy: bool,
    },
    StreamIn {
        /// The same.
        post_copy: bool,
    },
}

impl Role {
    /// Whether the guest may be handed over by post-copy.
    pub(super) fn may_switch(self) -> bool {
        matches!(self, Self::StreamOut { post_copy: true, .. })
    }

    fn wants(self, (name, save, load, stream): Capability) -> Option<bool> {
        match self {
            Self::Save => save,
            Self::Load => load,
            Self::StreamOut { post_copy, .. } | Self::StreamIn { post_copy }
                if name == "postcopy-ram" =>
            {
                Some(post_copy)
            }
            Self::StreamOut { .. } | Self::StreamIn { .. } => stream,
        }
    }
}

/// Settings as they were. Must be given back.
#[derive(Debug)]
#[must_use]
pub(super) struct Borrowed {
    capabilities: Vec<(String, bool)>,
    parameters: Map<String, Value>,
}

impl Borrowed {
    /// Notes the settings and changes them to what the role needs.
    pub(super) async fn take(client: &Client, role: Role) -> Result<Self, DeviceStateError> {
        // Asked at once: the guest is stopped meanwhile.
        let ask = || async { tokio::try_join!(client.capabilities(), client.migrate_parameters()) };
        let (mut known, mut parameters) = ask().await?;
        if read_mark(bandwidth_of(&parameters)).is_some() {
            restore(client).await?;
            (known, parameters) = ask().await?;
        }
        let (mut mark, mut wanted, mut before) = (MARK, Vec::new(), Vec::new());
        for (bit, capability) in CAPABILITIES.into_iter().enumerate() {
            let name = capability.0;
            let Some(&on) = known.get(name) else { continue };
            mark |= u64::from(on) << bit;
            if let Some(want) = role.wants(capability).filter(|want| *want != on) {
                wanted.push((name, want));
                before.push((name.to_owned(), on));
            }
        }
        let leaves_shared = matches!(role, Role::Save | Role::Load);
        if leaves_shared && !known.contains_key("x-ignore-shared") {
            let detail = "this QEMU has no capability x-ignore-shared".to_owned();
            return Err(DeviceStateError::Failed { detail });
        }
        let changes = changes(role, mark, &parameters);
        let kept = |name: &String| parameters.get(name).cloned().unwrap_or_else(|| json!(0));
        let parameters = changes.keys().map(|name| (name.clone(), kept(name))).collect();
        let borrowed = Self { capabilities: before, parameters };
        // In this order on the wire: the mark is set before anything else is changed.
        let changed = async {
            tokio::try_join!(
                client.set_migrate_parameters(Value::Object(changes)),
                client.set_capabilities(&wanted)
            )
        };
        if let Err(error) = changed.await {
            if let Err(second) = borrowed.give_back(client).await {
                warn!(error = %second, "migration settings could not be put back");
            }
            return Err(error.into());
        }
        Ok(borrowed)
    }

    /// Puts everything back. Every step is tried; the first error is returned.
    pub(super) async fn give_back(self, client: &Client) -> Result<(), DeviceStateError> {
        let list: Vec<(&str, bool)> =
            self.capabilities.iter().map(|(name, on)| (name.as_str(), *on)).collect();
        let capabilities = client.set_capabilities(&list).await;
        if capabilities.is_err() {
            // The mark stays: the next engine finds it.
            return Ok(capabilities?);
        }
        Ok(client.set_migrate_parameters(Value::Object(self.parameters)).await?)
    }
}

/// The parameters that a role changes.
fn changes(role: Role, mark: u64, now: &Map<String, Value>) -> Map<String, Value> {
    let mut changes = Map::new();
    let mut mark = mark;
    if let Role::StreamOut { downtime_ms, .. } = role {
        mark |= LIMITED;
        changes.insert("downtime-limit".to_owned(), json!(downtime_ms));
    }
    changes.insert("max-bandwidth".to_owned(), json!(mark));
    if now.get("tls-creds").and_then(Value::as_str).is_some_and(|creds| !creds.is_empty()) {
        changes.insert("tls-creds".to_owned(), json!(""));
    }
    changes
}

/// `max-bandwidth` in bytes per second; 0 (unlimited) if QEMU does not say.
fn bandwidth_of(parameters: &Map<String, Value>) -> u64 {
    parameters.get("max-bandwidth").and_then(Value::as_u64).unwrap_or(0)
}

/// The capabilities that were on, if `bandwidth` is a mark of ours.
fn read_mark(bandwidth: u64) -> Option<Vec<(&'static str, bool)>> {
    if bandwidth & !MARK_BITS != MARK {
        return None;
    }
    let was_on = |bit: usize| bandwidth >> bit & 1 == 1;
    let names = CAPABILITIES.iter().enumerate();
    Some(names.map(|(bit, (name, ..))| (*name, was_on(bit))).collect())
}

/// Puts QEMU's migration settings back after an engine was killed while it used them. Does nothing
/// to a QEMU in which no transfer of ours was interrupted.
///
/// The capabilities come back as they were; `max-bandwidth` and, if it was changed, `downtime-limit` get QEMU's
/// defaults; a TLS setting that the VM's manager had made has to be made again. A transfer of this same client that was
/// abandoned and still cleans up is waited for.
///
/// # Errors
/// [`DeviceStateError::MigrationActive`] while a migration runs, or what QMP says.
pub async fn restore_capabilities(client: &Client) -> Result<(), DeviceStateError> {
    let _turn = client.migration_turn().await;
    restore(client).await
}

async fn restore(client: &Client) -> Result<(), DeviceStateError> {
    refuse_active(client).await?;
    let parameters = client.migrate_parameters().await?;
    let mark = bandwidth_of(&parameters);
    let Some(before) = read_mark(mark) else {
        debug!("no migration settings of an earlier engine");
        return Ok(());
    };
    let known = client.capabilities().await?;
    let changes: Vec<(&str, bool)> = before
        .into_iter()
        .filter(|(name, on)| known.get(*name).is_some_and(|now| now != on))
        .collect();
    client.set_capabilities(&changes).await?;
    let mut defaults = json!({ "max-bandwidth": BANDWIDTH_DEFAULT });
    if let Some(fields) = defaults.as_object_mut()
        && mark & LIMITED != 0
    {
        fields.insert("downtime-limit".to_owned(), json!(DOWNTIME_DEFAULT_MS));
    }
    client.set_migrate_parameters(defaults).await?;
    info!(?changes, "restored migration settings that an earlier engine had left changed");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_says_what_was_on() {
        let before = read_mark(MARK | 0b10).unwrap();
        assert_eq!(before.len(), CAPABILITIES.len());
        for (name, on) in before {
            assert_eq!(on, name == "events", "{name}");
        }
    }

    #[test]
    fn ordinary_limits_are_no_marks() {
        for bandwidth in [0, BANDWIDTH_DEFAULT, 1 << 40, u64::MAX, MARK - 1, MARK + MARK_BITS + 1] {
            assert_eq!(read_mark(bandwidth), None, "{bandwidth:#x}");
        }
    }

    #[test]
    fn the_mark_has_room_for_every_capability() {
        const {
            assert!(CAPABILITIES.len() <= 23);
            assert!(MARK & MARK_BITS == 0);
            assert!(MARK > 100 << 40, "it must not slow a transfer down");
        }
    }
}
