//! The VMCOREINFO note: the text by which a Linux kernel describes itself to whoever dumps its memory.
//!
//! ```text
//!   0   namesz = 11, descsz, type = 0            (ELF note, 12 bytes)
//!   12  "VMCOREINFO\0" and one byte of padding
//!   24  "OSRELEASE=6.1.0-...\nBUILD-ID=...\nSYMBOL(mem_section)=ffff...\nOFFSET(page.flags)=0\n..."
//! ```
//!
//! The kernel allocates it in whole pages (kernel/crash_core.c, from 6.9 on kernel/vmcore_info.c), so that it
//! begins a page. What it holds is not trusted: it may be left from a kernel that ran before, or be forged.
//! Symbols are hexadecimal, all other numbers decimal.

use std::collections::BTreeMap;

use crate::error::IntrospectError;
use crate::memory::{Gpa, Gva, PAGE, PhysicalMemory};

/// `namesz` and `type` with the name, and `descsz` between them.
const HEADER_BYTES: usize = 24;

/// Longest text in bytes that is read; x86 has 4096 less the header, others up to 64 KiB.
pub(crate) const TEXT_BYTES_MAX: usize = 64 << 10;

/// Most lines; 6.18 has some 130.
const LINES_MAX: usize = 2048;

/// Most pages at the beginning of which one is looked for: some 0.4 s. It is only looked for there if no variable of the
/// kernel leads to it.
const PAGES_MAX: usize = 1 << 20;

/// Most notes that are looked at: each kernel that was started leaves one.
pub(crate) const NOTES_MAX: usize = 64;

/// With what the text begins.
const BEGINNING: &[u8] = b"OSRELEASE=";

/// A note's text, by its keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    lines: BTreeMap<String, String>,
}

impl Note {
    /// Parses the text of a note.
    ///
    /// # Errors
    /// [`IntrospectError::Note`] if it is too long or no text.
    pub fn parse(text: &[u8]) -> Result<Self, IntrospectError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(IntrospectError::Note { why: "it is too long" });
        }
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        let text =
            str::from_utf8(text).map_err(|_| IntrospectError::Note { why: "it is no text" })?;
        let mut lines = BTreeMap::new();
        for (number, line) in text.lines().enumerate() {
            if number >= LINES_MAX {
                return Err(IntrospectError::Note { why: "it has too many lines" });
            }
            if let Some((key, value)) = line.split_once('=') {
                // The first one counts, as for crash(8).
                lines.entry(key.to_owned()).or_insert_with(|| value.to_owned());
            }
        }
        Ok(Self { lines })
    }

    /// The value of a line such as `OSRELEASE`.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.lines.get(key).map(String::as_str)
    }

    /// The value of a line that there must be.
    ///
    /// # Errors
    /// [`IntrospectError::Missing`].
    pub fn need(&self, key: &str) -> Result<&str, IntrospectError> {
        self.text(key).ok_or_else(|| IntrospectError::Missing { key: key.to_owned() })
    }

    /// `SYMBOL(name)`: the address of a variable, or what an array's name stands for.
    ///
    /// # Errors
    /// [`IntrospectError::Missing`], [`IntrospectError::Implausible`].
    pub fn symbol(&self, name: &str) -> Result<Gva, IntrospectError> {
        let key = format!("SYMBOL({name})");
        let value = self.need(&key)?;
        u64::from_str_radix(value, 16).map(Gva).map_err(|_| implausible(&key, value))
    }

    /// A decimal number such as `NUMBER(phys_base)` or `SIZE(page)`.
    ///
    /// # Errors
    /// [`IntrospectError::Missing`], [`IntrospectError::Implausible`].
    pub fn decimal(&self, key: &str) -> Result<i64, IntrospectError> {
        let value = self.need(key)?;
        value.parse().map_err(|_| implausible(key, value))
    }

    /// A decimal number that may not be there.
    ///
    /// # Errors
    /// [`IntrospectError::Implausible`] if it is there and is none.
    pub fn decimal_or(&self, key: &str, default: i64) -> Result<i64, IntrospectError> {
        match self.text(key) {
            None => Ok(default),
            Some(_) => self.decimal(key),
        }
    }

    /// A size or offset below `limit`.
    ///
    /// # Errors
    /// [`IntrospectError::Missing`], [`IntrospectError::Implausible`].
    pub fn below(&self, key: &str, limit: u64) -> Result<u64, IntrospectError> {
        let value = self.decimal(key)?;
        let value = u64::try_from(value).ok().filter(|value| *value < limit);
        value.ok_or_else(|| implausible(key, self.text(key).unwrap_or_default()))
    }
}

pub(crate) fn implausible(key: &str, value: &str) -> IntrospectError {
    IntrospectError::Implausible { key: key.to_owned(), value: value.chars().take(40).collect() }
}

/// Where a note begins, and its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Address of its header.
    pub at: Gpa,
    /// The text as it lies there.
    pub text: Vec<u8>,
}

/// Notes in the guest's memory, by ascending address.
///
/// # Errors
/// [`IntrospectError::Ram`] if memory cannot be read.
pub fn find(memory: &impl PhysicalMemory) -> Result<Vec<Found>, IntrospectError> {
    let data = memory.data()?;
    let (mut found, mut looked) = (vec![], 0);
    for range in memory.ranges() {
        for frame in range.frames().filter(|frame| data.contains(range.page(*frame))) {
            looked += 1;
            if looked > PAGES_MAX {
                return Ok(found);
            }
            let at = Gpa(frame * PAGE);
            if let Some(text) = read(memory, at)? {
                found.push(Found { at, text });
                if found.len() >= NOTES_MAX {
                    return Ok(found);
                }
            }
        }
    }
    Ok(found)
}

/// The text of the note at `at`, if there is one.
///
/// # Errors
/// [`IntrospectError::Ram`] if memory cannot be read.
pub fn read(memory: &impl PhysicalMemory, at: Gpa) -> Result<Option<Vec<u8>>, IntrospectError> {
    match read_text(memory, at) {
        // There is no RAM, or the note says that it goes on beyond its end.
        Err(IntrospectError::NoRam { .. }) => Ok(None),
        other => other,
    }
}

fn read_text(memory: &impl PhysicalMemory, at: Gpa) -> Result<Option<Vec<u8>>, IntrospectError> {
    let mut head = [0; HEADER_BYTES + BEGINNING.len()];
    memory.read(at, &mut head)?;
    let Some(bytes) = text_bytes(&head) else { return Ok(None) };
    let mut text = vec![0; bytes];
    memory.read(Gpa(at.0.saturating_add(HEADER_BYTES as u64)), &mut text)?;
    Ok(Some(text))
}

/// The length of the text behind a header that is one.
fn text_bytes(head: &[u8; HEADER_BYTES + BEGINNING.len()]) -> Option<usize> {
    let (header, beginning) = head.split_at(HEADER_BYTES);
    let (namesz, rest) = header.split_first_chunk::<4>()?;
    let (descsz, rest) = rest.split_first_chunk::<4>()?;
    let (kind, name) = rest.split_first_chunk::<4>()?;
    let is_note = u32::from_le_bytes(*namesz) == 11
        && u32::from_le_bytes(*kind) == 0
        && name.starts_with(b"VMCOREINFO\0")
        && beginning == BEGINNING;
    let bytes = u32::from_le_bytes(*descsz) as usize;
    (is_note && (BEGINNING.len()..=TEXT_BYTES_MAX).contains(&bytes)).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_read_by_kind_of_number() {
        let text = b"OSRELEASE=6.1.0\nSYMBOL(a)=ffffffff81000000\nNUMBER(phys_base)=-4096\nSIZE(page)=64\n\
            SIZE(page)=63\nNUMBER(x)=0x10\nnothing\n\0rubbish=1\n";
        let note = Note::parse(text).expect("a note");
        assert_eq!(note.text("OSRELEASE"), Some("6.1.0"));
        assert_eq!(note.symbol("a").expect("a symbol"), Gva(0xffff_ffff_8100_0000));
        assert_eq!(note.decimal("NUMBER(phys_base)").expect("a number"), -4096);
        assert_eq!(note.below("SIZE(page)", 65).expect("a size"), 64);
        assert_eq!(note.text("rubbish"), None);
        let wrong = |error: Result<u64, IntrospectError>| error.expect_err("no number").to_string();
        assert!(wrong(note.below("SIZE(page)", 64)).contains("SIZE(page) = 64"));
        assert!(wrong(note.below("NUMBER(phys_base)", 64)).contains("-4096"));
        assert!(wrong(note.below("NUMBER(x)", 64)).contains("0x10"));
        assert!(wrong(note.below("SIZE(zone)", 64)).contains("does not have SIZE(zone)"));
    }

    #[test]
    fn a_note_without_end_is_refused() {
        let long = vec![b'a'; TEXT_BYTES_MAX + 1];
        assert!(matches!(Note::parse(&long), Err(IntrospectError::Note { .. })));
        let lines = b"a=b\n".repeat(LINES_MAX + 1);
        assert!(matches!(Note::parse(&lines), Err(IntrospectError::Note { .. })));
        assert!(matches!(Note::parse(&[0xff, 0xfe]), Err(IntrospectError::Note { .. })));
    }

    #[test]
    fn a_header_is_told_from_what_resembles_one() {
        let head = |change: fn(&mut [u8; 34])| {
            let mut head = [0; 34];
            let bytes = [
                &11u32.to_le_bytes()[..],
                &100u32.to_le_bytes(),
                &[0; 4],
                b"VMCOREINFO\0\0",
                BEGINNING,
            ];
            for (to, from) in head.iter_mut().zip(bytes.concat()) {
                *to = from;
            }
            change(&mut head);
            text_bytes(&head)
        };
        assert_eq!(head(|_| {}), Some(100));
        assert_eq!(head(|head| head[0] = 12), None);
        assert_eq!(head(|head| head[7] = 1), None);
        assert_eq!(head(|head| head[8] = 1), None);
        assert_eq!(head(|head| head[12] = b'v'), None);
        assert_eq!(head(|head| head[30] = b'x'), None);
    }
}
