//! Entry points for fuzzers: bytes as QEMU might send them. `qemu-glue/fuzz` calls these with
//! libFuzzer; a test replays its corpus.
//!
//! QEMU is not trusted: a guest that broke out of its devices writes what it likes. Nothing here may
//! panic, and what is accepted keeps the limits.

use crate::device_state::StreamHeader;
use crate::qmp::wire;
use crate::vm::hmp;

/// One line of QMP. Returns whether it was taken as a message.
pub fn qmp_line(bytes: &[u8]) -> bool {
    let quoted = wire::quote(bytes);
    assert!(quoted.len() <= bytes.len().saturating_mul(8) + 64, "a quote is no copy");
    wire::parse(bytes).is_ok()
}

/// Answers of the human monitor. Returns how many blocks and ranges were found.
pub fn monitor_text(bytes: &[u8]) -> usize {
    let text = String::from_utf8_lossy(bytes);
    let blocks = hmp::ramblocks(&text).map_or(0, |blocks| blocks.len());
    let ranges = hmp::memory_ranges(&text).map_or(0, |ranges| ranges.len());
    assert!(blocks <= hmp::BLOCKS_MAX && ranges <= hmp::RANGES_MAX);
    blocks + ranges + usize::from(hmp::host_address(&text).is_some())
}

/// The head of a device state. Returns whether it was accepted.
pub fn stream_header(bytes: &[u8]) -> bool {
    StreamHeader::parse(bytes).is_ok()
}
