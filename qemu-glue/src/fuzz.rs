//! Entry points for fuzzers: bytes as QEMU might send them. `qemu-glue/fuzz` calls these with
//! libFuzzer; a test replays its corpus.
//!
//! QEMU is not trusted: a guest that broke out of its devices writes what it likes. Nothing here may
//! panic, and what is accepted keeps the limits.

use crate::device_state::StreamHeader;
use crate::qmp::wire;
use crate::stream::return_path::{ReturnError, ReturnReader};
use crate::stream::{Command, Event, Reader, StreamError, Writer};
use crate::vm::hmp;

/// Most memory in bytes that a reader may hold of a stream of `bytes` bytes.
fn held_bytes_max(bytes: usize) -> usize {
    (bytes * 2).max(64)
}

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

/// A migration stream as a whole. Returns whether it was complete.
pub fn stream(bytes: &[u8]) -> bool {
    let whole = written_again(Reader::new(), [bytes]);
    assert!(bytes.starts_with(&whole.bytes), "what was read is written as it was");
    let pieces = written_again(Reader::new(), uneven(bytes));
    assert_eq!(whole.ended, pieces.ended, "pieces change nothing");
    assert!(whole.bytes == pieces.bytes, "pieces change nothing");
    assert!(whole.ended.is_err() || whole.bytes.len() == bytes.len());
    for package in &whole.packages {
        let again = written_again(Reader::package(package.len() as u32), uneven(package));
        assert!(package.starts_with(&again.bytes));
    }
    whole.ended.is_ok()
}

/// What the destination answers. Returns whether it was complete.
pub fn return_path(bytes: &[u8]) -> bool {
    let (whole, ended) = answers_again([bytes]);
    assert!(bytes.starts_with(&whole), "what was read is written as it was");
    let pieces = answers_again(uneven(bytes));
    assert_eq!((&whole, &ended), (&pieces.0, &pieces.1), "pieces change nothing");
    ended.is_ok()
}

/// The same bytes in pieces of lengths that are all different for a while.
fn uneven(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = bytes;
    let mut length = 1;
    std::iter::from_fn(move || {
        length = 1 + length * 3 % 1009;
        let (piece, later) = rest.split_at(rest.len().min(length));
        rest = later;
        (!piece.is_empty()).then_some(piece)
    })
}

/// What became of a stream.
struct Again {
    bytes: Vec<u8>,
    packages: Vec<Vec<u8>>,
    ended: Result<(), StreamError>,
}

/// Reads a stream and writes what was read.
fn written_again<'a>(mut reader: Reader, pieces: impl IntoIterator<Item = &'a [u8]>) -> Again {
    let (mut bytes, mut packages) = (Vec::new(), Vec::<Vec<u8>>::new());
    let mut writer = Writer::new();
    let mut total = 0;
    let mut read = |reader: &mut Reader, mut input: &[u8]| {
        total += input.len();
        while let Some(event) = reader.next(&mut input)? {
            match &event {
                Event::Command(Command::Packaged { .. }) => packages.push(Vec::new()),
                Event::Bytes(piece) => {
                    packages.last_mut().into_iter().for_each(|package| package.extend(*piece));
                }
                _ => {}
            }
            let written = writer.write(&event, &mut bytes);
            assert!(written.is_ok(), "what was read can be written");
        }
        assert!(reader.held_capacity_bytes() <= held_bytes_max(total));
        Ok(())
    };
    let ended = pieces.into_iter().try_for_each(|piece| read(&mut reader, piece));
    let ended = ended.and_then(|()| reader.finish()).and_then(|()| read(&mut reader, &[]));
    assert!(ended.is_ok() || reader.next(&mut &b"any"[..]).is_err(), "it stays refused");
    Again { bytes, packages, ended }
}

/// Reads answers and writes what was read.
fn answers_again<'a>(
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> (Vec<u8>, Result<(), ReturnError>) {
    let (mut reader, mut out) = (ReturnReader::new(), Vec::new());
    let read = pieces.into_iter().try_for_each(|mut input| {
        while let Some(message) = reader.next(&mut input)? {
            let written = message.write(&mut out);
            assert!(written.is_ok(), "what was read can be written");
        }
        assert!(reader.held_capacity_bytes() <= 4096);
        Ok(())
    });
    (out, read.and_then(|()| reader.finish()))
}
