//! Connections that are passed on as they are: beside a stream, or a stream that goes on after its connection was broken.
//!
//! All of them are of post-copy, where QEMU itself sends what is asked for before anything else; so little is under way
//! at any time.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use tokio::sync::mpsc;

use super::intake::{Item, Taken};
use super::socket::QemuSocket;
use crate::error::EngineError;
use crate::source::gate::Gate;

/// Bytes that are read at a time.
const READ_BYTES: usize = 32 << 10;

/// Pieces of so many bytes that may be under way.
const UNDER_WAY: usize = 8;

/// Passes on what QEMU sends until it ends the connection; `taken` says how much that was. Blocks.
///
/// # Errors
/// If the connection fails or the session is over.
pub fn pass_on(
    socket: &QemuSocket,
    items: &mpsc::Sender<Item>,
    lanes: usize,
    gate: &Arc<Gate>,
    taken: &mut Taken,
) -> Result<(), EngineError> {
    // The session's own error says why it is over.
    let tell = |item| items.blocking_send(item).map_err(|_| EngineError::Cancelled);
    let mut buffer = vec![0; READ_BYTES];
    let mut under_way = VecDeque::new();
    loop {
        let count = socket.read_some(&mut buffer).map_err(EngineError::QemuSocket)?;
        if count == 0 {
            return tell(Item::End);
        }
        taken.stream_bytes += count as u64;
        if !gate.pay(count as u64) {
            return Err(EngineError::Cancelled);
        }
        tell(Item::Bytes(buffer.get(..count).unwrap_or_default().to_vec()))?;
        let (done, is_done) = sync_channel(1);
        tell(Item::Sync { batches: vec![0; lanes], digest: None, done: Some(done) })?;
        under_way.push_back(is_done);
        if under_way.len() > UNDER_WAY
            && let Some(oldest) = under_way.pop_front()
        {
            oldest.recv().map_err(|_| EngineError::Cancelled)?;
        }
    }
}
