//! Balloons: what a guest may use of its memory.

use std::path::Path;
use std::time::Duration;

use qemu_glue::qmp::Client;
use serde_json::json;

const MIB: f64 = 1_048_576.0;

/// How long the monitor may be somebody else's.
const PATIENCE: Duration = Duration::from_secs(5);

/// Tells a guest's balloon how much memory to leave. The guest gives pages up as it can.
///
/// # Errors
/// Why not, in words: no balloon, or the monitor is somebody else's.
pub async fn set(socket: &Path, to_mib: f64) -> Result<(), String> {
    if !(1.0..=1e9).contains(&to_mib) {
        return Err(format!("{to_mib} MiB is no amount of memory"));
    }
    let told = |error: qemu_glue::qmp::QmpError| error.to_string();
    let client = Client::connect_within(socket, PATIENCE).await.map_err(told)?;
    let bytes = (to_mib * MIB).round();
    client.execute("balloon", json!({ "value": bytes as u64 })).await.map_err(told)?;
    Ok(())
}
