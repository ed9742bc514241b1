//! Entry points for fuzzers: bytes as a peer might send them. `transport/fuzz` calls these with
//! libFuzzer; a test replays its corpus.
//!
//! The first three decode as many frames as there are. What was accepted must encode again and decode to the
//! same, and may be no larger than its limits; anything else panics, which is what a fuzzer looks
//! for.

#![expect(clippy::panic, reason = "a fuzzer learns of a fault by a panic")]

use bytes::BytesMut;
use migrate_core::batch::{BATCH_PAYLOAD_BYTES_MAX, BATCH_RUNS_MAX};
use migrate_core::codec::{Codec, Packer, Unpacker, packed_bytes_max};

use crate::lane_wire::{self, GREETING_BYTES, Greeting};
use crate::pages::{PageAnswer, PageRequest, wire as pages_wire};
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

/// Frames of the page channel, as requests and as answers. Returns how many of either were accepted.
pub fn page_frame(bytes: &[u8]) -> u64 {
    let mut accepted = 0;
    let mut rest = BytesMut::from(bytes);
    while let Ok(Some((tag, request))) = pages_wire::decode_request(&mut rest) {
        let again = pages_wire::encode_request(&request, tag).map(|pieces| joined(&pieces));
        let Ok(Ok(Some((same_tag, same)))) =
            again.map(|mut again| pages_wire::decode_request(&mut again))
        else {
            panic!("A request was accepted but cannot be sent and received again: {request:?}");
        };
        assert_eq!((same_tag, plain_request(same)), (tag, plain_request(request)));
        accepted += 1;
    }
    let mut rest = BytesMut::from(bytes);
    while let Ok(Some(answer)) = pages_wire::decode_answer(&mut rest) {
        let again = pages_wire::encode_answer(&answer).map(|pieces| joined(&pieces));
        let Ok(Ok(Some(same))) = again.map(|mut again| pages_wire::decode_answer(&mut again))
        else {
            panic!("An answer was accepted but cannot be sent and received again: {answer:?}");
        };
        assert_eq!(plain_answer(same), plain_answer(answer));
        accepted += 1;
    }
    accepted
}

fn joined(pieces: &pages_wire::Pieces) -> BytesMut {
    pieces.concat()[..].into()
}

/// Contents that a peer has packed may not become shorter here.
fn plain_request(mut request: PageRequest) -> PageRequest {
    if let PageRequest::Put { packed, .. } = &mut request {
        *packed = false;
    }
    request
}

fn plain_answer(mut answer: PageAnswer) -> PageAnswer {
    if let PageAnswer::Pages { packed, .. } = &mut answer {
        *packed = false;
    }
    answer
}

/// The packed contents of a lane's batches, each behind its codec (1 byte, modulo 3), its announced
/// length and its packed length (2 bytes each, little-endian). What unpacks must pack and unpack to
/// the same. Returns how many did.
pub fn contents(bytes: &[u8]) -> u64 {
    let (mut packer, mut again) = (Packer::default(), Unpacker::default());
    let mut unpacker = Unpacker::default();
    let mut rest = bytes;
    let mut accepted = 0;
    while let Some(([codec, a, b, c, d], tail)) = rest.split_first_chunk() {
        let codec = Codec::ALL.into_iter().cycle().nth(usize::from(*codec)).unwrap_or_default();
        let announced = usize::from(u16::from_le_bytes([*a, *b]));
        let packed = usize::from(u16::from_le_bytes([*c, *d])).min(tail.len());
        let (packed, tail) = tail.split_at(packed);
        rest = tail;
        let mut content = vec![0; announced];
        if unpacker.unpack(codec, packed.chunks(100), &mut content).is_err() {
            break;
        }
        let mut packed = vec![0; packed_bytes_max(announced)];
        let Ok(length) = packer.pack(codec, &content, &mut packed) else {
            panic!("Contents unpack but do not pack");
        };
        let mut twice = vec![0; announced];
        let packed = packed.get(..length).unwrap_or_default();
        let unpacked = again.unpack(codec, packed.chunks(1000), &mut twice);
        assert!(unpacked.is_ok() && twice == content);
        accepted += 1;
    }
    accepted
}
