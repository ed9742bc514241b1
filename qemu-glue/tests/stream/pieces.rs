//! However a capture is cut, cut short or damaged.

use std::cell::OnceCell;

use proptest::prelude::*;
use qemu_glue::fuzz;
use qemu_glue::stream::{EndSign, Event, Reader, Refusal, StreamError, Writer};

use crate::{VERSIONS, capture};

/// Captures of whole streams.
const WHOLE: [&str; 8] = [
    "plain",
    "no-description",
    "ignore-shared",
    "xbzrle",
    "return-path",
    "advised",
    "postcopy",
    "multifd",
];

fn whole_captures() -> impl Iterator<Item = (String, Vec<u8>)> {
    let all = VERSIONS.into_iter().flat_map(|version| WHOLE.map(|name| (version, name)));
    let all = all.chain([("10.0", "virtio-mem")]);
    all.map(|(version, name)| (format!("{version}-{name}"), capture(version, name)))
}

/// Writes what is read of these pieces.
fn again<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<u8>, StreamError> {
    let (mut reader, mut writer, mut out) = (Reader::new(), Writer::new(), Vec::new());
    let mut read = |reader: &mut Reader, mut input: &[u8]| -> Result<(), StreamError> {
        while let Some(event) = reader.next(&mut input)? {
            writer.write(&event, &mut out).unwrap();
        }
        Ok(())
    };
    for piece in pieces {
        read(&mut reader, piece)?;
    }
    reader.finish()?;
    read(&mut reader, &[])?;
    Ok(out)
}

#[test]
fn every_capture_comes_back() {
    for (name, bytes) in whole_captures() {
        assert!(again([&bytes[..]]).unwrap() == bytes, "{name} as a whole");
        assert!(again(bytes.chunks(1)).unwrap() == bytes, "{name} byte by byte");
        for size in [13, 4096, 4104, 65536] {
            assert!(again(bytes.chunks(size)).unwrap() == bytes, "{name} in pieces of {size}");
        }
    }
}

/// Contents of pages that came in one piece are where they were.
#[test]
fn pages_are_not_copied() {
    let bytes = capture("10.0", "xbzrle");
    let within = |page: &[u8]| bytes.as_ptr_range().contains(&page.as_ptr());
    let (mut reader, mut borrowed, mut copied, mut state) = (Reader::new(), 0, 0, false);
    for mut input in bytes.chunks(64 << 10) {
        while let Some(event) = reader.next(&mut input).unwrap() {
            state |= matches!(event, Event::DeviceState(_));
            if let Event::Page(page) = event
                && let qemu_glue::stream::PageContent::Whole(page) = page.content
            {
                *(if within(page) { &mut borrowed } else { &mut copied }) += 1;
            }
        }
        // What may be the end is held as a whole.
        assert!(state || reader.held_capacity_bytes() < 16 << 10);
    }
    assert_eq!(reader.end_sign(), EndSign::Described);
    assert!(copied <= bytes.len() / (64 << 10), "{copied} of {borrowed}");
    assert!(borrowed > 200);
}

#[test]
fn a_capture_cut_short_needs_more() {
    for (name, bytes) in whole_captures() {
        for cut in (0..bytes.len()).step_by(1 + bytes.len() / 97) {
            let mut reader = Reader::new();
            let mut input = &bytes[..cut];
            while reader.next(&mut input).unwrap().is_some() {}
            let refusal = reader.finish().map_err(|error| error.refusal);
            let is_cut = matches!(refusal, Err(Refusal::Cut { .. }));
            // A state that was cut behind any 0 might have been one without a description.
            assert!(is_cut || bytes[cut - 1] == 0, "{name} up to {cut}: {refusal:?}");
        }
    }
}

thread_local! {
    static LOADED: OnceCell<Vec<(String, Vec<u8>)>> = const { OnceCell::new() };
}

/// Calls `with` with one of the captures.
fn with_capture<T>(which: prop::sample::Index, with: impl FnOnce(&str, &[u8]) -> T) -> T {
    LOADED.with(|loaded| {
        let captures = loaded.get_or_init(|| whole_captures().collect());
        let (name, bytes) = &captures[which.index(captures.len())];
        with(name, bytes)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn any_pieces_give_the_same(
        which in any::<prop::sample::Index>(),
        sizes in prop::collection::vec(prop_oneof![1usize..30, 1usize..9000, 1usize..200_000], 1..50),
    ) {
        with_capture(which, |name, bytes| {
            let mut rest = bytes;
            let mut sizes = sizes.iter().cycle();
            let pieces = std::iter::from_fn(|| {
                let (piece, later) = rest.split_at(rest.len().min(*sizes.next()?));
                rest = later;
                (!piece.is_empty()).then_some(piece)
            });
            prop_assert!(again(pieces).unwrap() == bytes, "{name}");
            Ok(())
        })?;
    }

    /// Nothing panics, nothing grows, pieces change nothing: see [`fuzz::stream`].
    #[test]
    fn damage_does_no_harm(
        which in any::<prop::sample::Index>(),
        hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..3), 1..5),
    ) {
        let mut damaged = with_capture(which, |_, bytes| bytes.to_vec());
        for (place, value, how) in hits {
            let at = place.index(damaged.len() - 1);
            match how {
                0 => damaged[at] = value,
                1 => drop(damaged.drain(at..=at)),
                _ => damaged.insert(at, value),
            }
        }
        fuzz::stream(&damaged);
    }
}
