//! Entry point for fuzzers: guests as a hostile kernel might make them. `fctrans/fuzz` calls it with libFuzzer; a test
//! replays its corpus.
//!
//! ```text
//!   kind │ place, length, bytes │ place, length, bytes │ ...       written over a guest that is whole
//!    1        4      1      n        4 (all ones), 2, n: the note's text
//! ```
//!
//! Nothing here may panic, and what is read is bounded by the guest's RAM and named limits.

use crate::kernel::Kernel;
use crate::memory::PhysicalMemory as _;
use crate::note;
use crate::summary::Figures;
use crate::synthetic::{Guest, HIGH, LOW, VERSIONS};

/// Bytes of guest memory that all looks together may read: 384 MiB of RAM have 6 MiB of descriptions, which are read
/// five times; names are bounded by 48 MiB; and what leads there.
pub const READ_BYTES_MAX: u64 = 256 << 20;

/// Stands for the note's text.
const TEXT: u32 = u32::MAX;

thread_local! {
    /// Made once, since that takes longer than all else.
    static BASES: [Guest; VERSIONS.len()] = VERSIONS.map(|version| Guest::new(version, false, 0));
}

/// What was made of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Whether a kernel was found.
    pub kernel: bool,
    /// Pages that are unused.
    pub unused_pages: u64,
    /// Whether memory use could be read.
    pub figures: bool,
}

/// Looks at a guest over which `bytes` were written.
pub fn guest(bytes: &[u8]) -> Seen {
    let mut guest = changed(bytes);
    *guest.memory.read_bytes.get_mut() = 0;
    let seen = look(&guest);
    let read = *guest.memory.read_bytes.borrow();
    assert!(read <= READ_BYTES_MAX, "{read} bytes were read");
    seen
}

fn look(guest: &Guest) -> Seen {
    let memory = &guest.memory;
    let none = Seen { kernel: false, unused_pages: 0, figures: false };
    let Ok(kernel) = Kernel::find(memory, &[guest.processor()]) else { return none };
    let Ok(usage) = kernel.usage(memory) else { return none };
    let unused = usage.unused();
    assert!(unused.len() <= memory.pages(), "more is unused than there is");
    let still = kernel.still_unused(memory, &unused);
    assert_eq!(still.ok().as_ref(), Some(&unused), "what is seen twice is the same");
    let working_set = kernel.working_set(memory, &unused).ok().flatten();
    if let Some(set) = working_set {
        assert!(set.pages.len() + set.cold.len() + unused.len() <= memory.pages());
    }
    let figures = Figures::find(&kernel, memory).ok();
    let pattern = kernel.pattern(memory, &unused);
    let figures = figures.is_some_and(|figures| figures.read(&kernel, memory).is_ok());
    Seen { kernel: pattern.is_ok(), unused_pages: unused.len(), figures }
}

/// A guest with these changes.
fn changed(bytes: &[u8]) -> Guest {
    let (kind, mut rest) = bytes.split_first().unwrap_or((&0, &[]));
    let mut guest = BASES.with(|bases| bases[usize::from(*kind) % bases.len()].clone());
    while let Some((place, after)) = rest.split_first_chunk::<4>() {
        let place = u32::from_le_bytes(*place);
        if place == TEXT {
            let Some((bytes, after)) = after.split_first_chunk::<2>() else { break };
            let (text, after) = split(after, usize::from(u16::from_le_bytes(*bytes)));
            guest.put_note_bytes(text);
            rest = after;
        } else {
            let Some((bytes, after)) = after.split_first() else { break };
            let (content, after) = split(after, usize::from(*bytes));
            let at = u64::from(place);
            // RAM from 0 on, and what lies beyond the hole.
            let at = if at + 256 <= LOW.1 { at } else { HIGH.0 + at % (HIGH.1 - 256) };
            guest.memory.write(at, content);
            rest = after;
        }
    }
    guest
}

fn split(bytes: &[u8], at: usize) -> (&[u8], &[u8]) {
    bytes.split_at(at.min(bytes.len()).min(note::TEXT_BYTES_MAX))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;
    use crate::synthetic::MIB;

    fn change(place: u64, content: &[u8]) -> Vec<u8> {
        [&(place as u32).to_le_bytes()[..], &[content.len() as u8], content].concat()
    }

    fn text(text: &str) -> Vec<u8> {
        [&TEXT.to_le_bytes()[..], &(text.len() as u16).to_le_bytes(), text.as_bytes()].concat()
    }

    /// Guests with names: whole ones, and such as lie.
    fn corpus() -> Vec<(&'static str, Vec<u8>)> {
        let base = |kind: u8| Guest::new(VERSIONS[usize::from(kind)], false, 0);
        let with = |kind: u8, changes: &[Vec<u8>]| [vec![kind], changes.concat()].concat();
        let free = |kind: u8, frame: u64, order: u64| {
            let (guest, version) = (base(kind), VERSIONS[usize::from(kind)]);
            let at = guest.description(frame);
            let mark = (version.buddy as u32).to_le_bytes();
            let mark = change(at + version.mapcount_at, &mark);
            [mark, change(at + version.private_at, &order.to_le_bytes())].concat()
        };
        let forged = |key: &str, value: &str| {
            let note = base(2).note();
            let lines = note.lines().map(|line| match line.split_once('=') {
                Some((found, _)) if found == key => format!("{key}={value}\n"),
                _ => format!("{line}\n"),
            });
            text(&lines.collect::<String>())
        };
        // The root of the tables, and the first table of sections.
        let (tables, sections) = (Guest::place(MIB), 4 * MIB);
        let itself = (tables | 3).to_le_bytes();
        vec![
            ("good", with(2, &[])),
            ("good-free", with(2, &[free(2, 20_480, 10), free(2, 40_000, 0)])),
            ("good-free-newest", with(6, &[free(6, 20_480, 10)])),
            ("order-beyond", with(2, &[free(2, 20_480, 64)])),
            ("block-not-aligned", with(2, &[free(2, 20_481, 3)])),
            ("tables-lead-to-themselves", with(2, &[change(tables, &itself.repeat(31))])),
            ("sections-everywhere", with(2, &[change(sections, &[0xff; 255])])),
            ("huge-page", with(2, &[forged("SIZE(page)", "18446744073709551615")])),
            ("many-roots", with(2, &[forged("LENGTH(mem_section)", "4294967295")])),
            ("far-sections", with(2, &[forged("SYMBOL(mem_section)", "ffffffffffffffff")])),
            ("small-sections", with(2, &[forged("NUMBER(SECTION_SIZE_BITS)", "24")])),
            ("note-without-end", with(2, &[text(&"OSRELEASE=1\n".repeat(4000))])),
            ("cut", vec![2, 0, 0, 0]),
            ("empty", vec![]),
        ]
    }

    /// `GODWIT_WRITE_GOLDEN=1` writes the fuzzer's first corpus.
    #[test]
    fn the_corpus_is_handled_and_the_good_ones_are_good() {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/guest");
        for (name, bytes) in corpus() {
            let path = folder.join(name);
            if std::env::var_os("GODWIT_WRITE_GOLDEN").is_some() {
                fs::write(&path, &bytes).expect("a file of the corpus");
            }
            assert!(fs::read(&path).is_ok_and(|found| found == bytes), "{name} is another");
        }
        for entry in fs::read_dir(&folder).expect("a corpus") {
            let path = entry.expect("a file").path();
            let bytes = fs::read(&path).expect("a file");
            let seen = guest(&bytes);
            // Cut anywhere, and with any bit turned, it must not panic either.
            for at in (0..bytes.len()).step_by(1 + bytes.len() / 12) {
                guest(bytes.get(..at).unwrap_or_default());
                let mut broken = bytes.clone();
                broken[at] ^= 1 << (at % 8);
                guest(&broken);
            }
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            println!("{name}: {seen:?}");
            assert!(seen.kernel || !name.starts_with("good"), "{name}");
            assert_eq!(seen.unused_pages > 0, name.starts_with("good-free"), "{name}");
        }
    }
}
