//! What QEMU says, as figures. Forms: qapi/{block-core,net,machine}.json, hw/virtio/virtio-balloon.c.

use serde_json::Value;

const MIB: f64 = 1_048_576.0;

/// Most devices of a kind that are looked at.
const DEVICES_MAX: usize = 1024;

/// Bytes that disks have read and written since QEMU was started (`query-blockstats`). Of a chain of images only its
/// top is counted, since the others' reads are in its own.
#[must_use]
pub fn disk_bytes(answer: &Value) -> u64 {
    let devices = answer.as_array().map_or(&[][..], Vec::as_slice);
    let bytes = |device: &Value| {
        let stats = device.get("stats")?;
        let figure = |name| stats.get(name).and_then(Value::as_u64);
        Some(figure("rd_bytes")?.saturating_add(figure("wr_bytes")?))
    };
    let all = devices.iter().take(DEVICES_MAX).filter_map(bytes);
    all.fold(0, u64::saturating_add)
}

/// Ethernet addresses of a guest's interfaces (`query-rx-filter`), in lower case.
#[must_use]
pub fn ethernet_addresses(answer: &Value) -> Vec<String> {
    let devices = answer.as_array().map_or(&[][..], Vec::as_slice);
    let address = |device: &Value| {
        let address = device.get("main-mac")?.as_str()?.to_ascii_lowercase();
        is_ethernet_address(&address).then_some(address)
    };
    devices.iter().take(DEVICES_MAX).filter_map(address).collect()
}

/// Whether it is six bytes as `aa:bb:cc:dd:ee:ff`.
#[must_use]
pub fn is_ethernet_address(text: &str) -> bool {
    let parts: Vec<&str> = text.split(':').collect();
    let is_byte = |part: &&str| {
        part.len() == 2 && part.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
    };
    parts.len() == 6 && parts.iter().all(is_byte)
}

/// RAM with which a guest was started, and that was plugged in since (`query-memory-size-summary`).
#[must_use]
pub fn ram_mib(answer: &Value) -> Option<f64> {
    let base = answer.get("base-memory")?.as_u64()?;
    let plugged = answer.get("plugged-memory").and_then(Value::as_u64).unwrap_or(0);
    Some(base.checked_add(plugged)? as f64 / MIB)
}

/// What the balloon leaves (`query-balloon`).
#[must_use]
pub fn balloon_leaves_mib(answer: &Value) -> Option<f64> {
    Some(answer.get("actual")?.as_u64()? as f64 / MIB)
}

/// What a guest's balloon driver says of its memory.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct BalloonStats {
    /// When it said so last, in seconds on the host's clock; 0 if it never did.
    pub at_s: u64,
    /// In all, MiB.
    pub total_mib: f64,
    /// Not used at all, MiB.
    pub free_mib: f64,
    /// What programs can have without swapping, MiB.
    pub available_mib: f64,
    /// Pages written to swap since the guest was started.
    pub swapped_out_pages: Option<u64>,
}

/// The property `guest-stats` of a balloon; nothing if the guest has not answered, or its driver leaves a figure out.
#[must_use]
pub fn balloon_stats(answer: &Value) -> Option<BalloonStats> {
    let stats = answer.get("stats")?;
    // What the driver does not say is 2⁶⁴ − 1; QEMU prints it as that or as −1.
    let bytes = |name| stats.get(name).and_then(Value::as_u64).filter(|bytes| *bytes != u64::MAX);
    let at_s = answer.get("last-update")?.as_u64().filter(|at_s| *at_s > 0)?;
    let mib = |name| bytes(name).map(|bytes| bytes as f64 / MIB);
    Some(BalloonStats {
        at_s,
        total_mib: mib("stat-total-memory")?,
        free_mib: mib("stat-free-memory")?,
        available_mib: mib("stat-available-memory")?,
        swapped_out_pages: bytes("stat-swap-out").map(|bytes| bytes / 4096),
    })
}
