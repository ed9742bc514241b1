//! Entry points for fuzzers: bytes as a peer might send them. `transport/fuzz` calls these with
//! libFuzzer; a test replays its corpus.
//!
//! Each decodes as many frames as there are. What was accepted must encode again and decode to the
//! same, and may be no larger than its limits; anything else panics, which is what a fuzzer looks
//! for.

#![expect(clippy::panic, reason = "a fuzzer learns of a fault by a panic")]

use migrate_core::batch::{BATCH_PAYLOAD_BYTES_MAX, BATCH_RUNS_MAX};

use crate::lane_wire::{self, GREETING_BYTES, Greeting};
use crate::wire::{self, CONTROL_BODY_BYTES_MAX, CONTROL_HEADER_BYTES};

/// Control frames. Returns how many were accepted.
pub fn control_frame(bytes: &[u8]) -> u32 {
    let mut rest = bytes;
    let mut sequence = 1;
    while let Ok((message, frame_bytes)) = wire::decode(rest, sequence) {
        assert!(frame_bytes <= CONTROL_HEADER_BYTES + CONTROL_BODY_BYTES_MAX);
        let Ok(frame) = wire::encode(&message, sequence) else {
            panic!("{} was accepted but cannot be sent", message.name());
        };
        match wire::decode(&frame, sequence) {
            Ok((again, again_bytes)) => assert_eq!((again, again_bytes), (message, frame.len())),
            Err(error) => panic!("{} does not decode again: {error}", message.name()),
        }
        rest = rest.get(frame_bytes..).unwrap_or_default();
        sequence += 1;
    }
    sequence - 1
}

/// A lane: a greeting if there is one, then batches. Returns how many batches were accepted.
pub fn lane_frame(bytes: &[u8]) -> u64 {
    let mut rest = bytes;
    if let Some((head, tail)) = bytes.split_first_chunk::<GREETING_BYTES>()
        && let Ok(greeting) = Greeting::parse(head)
    {
        assert_eq!(&greeting.encode(), head);
        rest = tail;
    }
    let mut sequence = 1;
    while let Ok((batch, frame_bytes)) = lane_wire::decode(rest, sequence) {
        assert!(batch.runs.len() <= BATCH_RUNS_MAX);
        assert!(batch.payload.len() <= BATCH_PAYLOAD_BYTES_MAX);
        let Ok(head) = lane_wire::encode_head(&batch, sequence) else {
            panic!("A batch was accepted but cannot be sent");
        };
        let frame = [&head[..], &batch.payload.to_vec()[..]].concat();
        assert_eq!(rest.get(..frame_bytes), Some(&frame[..]));
        rest = rest.get(frame_bytes..).unwrap_or_default();
        sequence += 1;
    }
    sequence - 1
}
