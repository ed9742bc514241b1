//! How much of QEMU's stream can be read while the guest runs, without letting QEMU come to its end.
//!
//! The stream begins with the blocks of RAM that are not shared: firmware, option ROMs, video memory
//! (migration/ram.c, `ram_save_setup`, `save_zero_page`, `save_normal_page`). Only when all of
//! it is written does QEMU stop the guest and go on to the devices. So it is read up to one of the last
//! pages that has contents: QEMU cannot get rid of that page.
//!
//! ```text
//!   header │ start of ram: blocks │ part: page, zero page, page, …  end │ part: … page ▌held here
//! ```
//!
//! All numbers are big-endian. Where something else comes, or no page is left to hold, QEMU must not be
//! held: it may have its global lock, and the monitor would wait for it.

use migrate_core::layout::PAGE_BYTES;

use crate::stream::blocks::{BlockList, EntryForm, read_entry, read_total};
use crate::stream::cursor::{Cursor, Need, Stop};
use crate::stream::grammar::{TYPE_FOOTER, TYPE_PART, TYPE_START, section_header};
use crate::stream::record::{FLAG_CONTINUE, FLAG_END, FLAG_PAGE, FLAG_ZERO, FLAGS};
use crate::stream::{Configuration, Following, RAM_ID};

/// Pages of which the last one with contents is held back: more than are zero at the end of any block
/// that is common, few enough to travel in a millisecond.
const HELD_PAGES: u64 = 32;

/// With x-ignore-shared each block has an address.
const ENTRY: EntryForm = EntryForm { has_address: true, may_have_page_size: false };

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Read until so many bytes are there in all.
    Read(usize),
    /// Read no more until the guest has stopped: QEMU waits with a page.
    Hold,
    /// What comes is not known; QEMU cannot be held.
    Unknown,
}

impl From<Need> for Step {
    fn from(Need(bytes): Need) -> Self {
        Self::Read(bytes)
    }
}

impl<R> From<Stop<R>> for Step {
    fn from(stop: Stop<R>) -> Self {
        match stop {
            Stop::Need(bytes) => Self::Read(bytes),
            Stop::Refused(_) => Self::Unknown,
        }
    }
}

/// Where in the stream it stands.
#[derive(Debug)]
pub(super) struct Ahead {
    /// Bytes of RAM that the stream leaves out.
    shared_bytes: u64,
    /// Where the next record begins.
    at: usize,
    /// Pages that are still to come; nothing before the list of blocks was read.
    pages_left: Option<u64>,
    in_section: bool,
}

impl Ahead {
    /// The beginning of a stream that leaves out `shared_bytes` bytes of RAM.
    pub(super) fn new(shared_bytes: u64) -> Self {
        Self { shared_bytes, at: 0, pages_left: None, in_section: false }
    }

    /// What to do when `bytes` are what was read so far.
    pub(super) fn step(&mut self, bytes: &[u8]) -> Step {
        loop {
            let mut cursor = Cursor::from(bytes, self.at);
            let taken = match self.pages_left {
                None => self.setup(&mut cursor),
                Some(left) if self.in_section => self.page(&mut cursor, left),
                Some(_) => self.section(&mut cursor),
            };
            match taken {
                Ok(()) => self.at = cursor.at(),
                Err(step) => return step,
            }
        }
    }

    fn setup(&mut self, cursor: &mut Cursor<'_>) -> Result<(), Step> {
        Configuration::read(cursor, Following::More)?;
        let start = cursor.peek().ok_or(Step::Unknown)?;
        if start != TYPE_START || section_header(cursor)?.id != RAM_ID {
            return Err(Step::Unknown);
        }
        let total_bytes = read_total(cursor)?;
        let mut blocks = BlockList::default();
        while blocks.total_bytes() < total_bytes {
            let left_bytes = total_bytes.saturating_sub(blocks.total_bytes());
            let block = read_entry(cursor, ENTRY, left_bytes)?;
            blocks.push(block).map_err(|_| Step::Unknown)?;
        }
        if cursor.u64()? != FLAG_END {
            return Err(Step::Unknown);
        }
        footer(cursor)?;
        let to_come_bytes = total_bytes.checked_sub(self.shared_bytes).ok_or(Step::Unknown)?;
        self.pages_left = Some(to_come_bytes / PAGE_BYTES as u64);
        Ok(())
    }

    fn section(&mut self, cursor: &mut Cursor<'_>) -> Result<(), Step> {
        if cursor.u8()? != TYPE_PART {
            return Err(Step::Unknown);
        }
        cursor.take(4)?;
        self.in_section = true;
        Ok(())
    }

    fn page(&mut self, cursor: &mut Cursor<'_>, left: u64) -> Result<(), Step> {
        let flags = cursor.u64()? & FLAGS;
        if flags == FLAG_END {
            footer(cursor)?;
            self.in_section = false;
            return Ok(());
        }
        if flags & FLAG_CONTINUE == 0 {
            cursor.counted()?;
        }
        match flags & !FLAG_CONTINUE {
            FLAG_ZERO => cursor.take(1)?,
            FLAG_PAGE if left > HELD_PAGES => cursor.take(PAGE_BYTES)?,
            FLAG_PAGE => return Err(Step::Hold),
            _ => return Err(Step::Unknown),
        };
        self.pages_left = Some(left.saturating_sub(1));
        Ok(())
    }
}

/// The end of a section, with the section's number.
fn footer(cursor: &mut Cursor<'_>) -> Result<(), Step> {
    if cursor.u8()? != TYPE_FOOTER {
        return Err(Step::Unknown);
    }
    cursor.take(4)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device_state::header::tests::head;
    use crate::stream::record::FLAG_MEM_SIZE;

    const SHARED_BYTES: u64 = 1 << 20;

    /// A stream of pages: `true` has contents. Returns where each record ends, too.
    fn stream(pages: &[bool]) -> (Vec<u8>, Vec<usize>) {
        let mut bytes = head();
        let private_bytes = (pages.len() * PAGE_BYTES) as u64;
        bytes.extend([TYPE_START, 0, 0, 0, 2, 3]);
        bytes.extend(b"ram\0\0\0\0\0\0\0\x04");
        bytes.extend(((SHARED_BYTES + private_bytes) | FLAG_MEM_SIZE).to_be_bytes());
        for (name, length) in [("m0", SHARED_BYTES), ("rom", private_bytes)] {
            bytes.push(name.len() as u8);
            bytes.extend(name.bytes());
            bytes.extend(length.to_be_bytes());
            bytes.extend([0; 8]);
        }
        bytes.extend(FLAG_END.to_be_bytes());
        bytes.extend([TYPE_FOOTER, 0, 0, 0, 2]);
        let mut ends = vec![];
        for (number, has_contents) in pages.iter().enumerate() {
            if number % 7 == 0 {
                if number > 0 {
                    bytes.extend(FLAG_END.to_be_bytes());
                    bytes.extend([TYPE_FOOTER, 0, 0, 0, 2]);
                }
                bytes.extend([TYPE_PART, 0, 0, 0, 2]);
            }
            let kind = if *has_contents { FLAG_PAGE } else { FLAG_ZERO };
            let again = if number % 7 == 0 { 0 } else { FLAG_CONTINUE };
            bytes.extend(((number * PAGE_BYTES) as u64 | kind | again).to_be_bytes());
            if again == 0 {
                bytes.extend(b"\x03rom");
            }
            bytes.resize(bytes.len() + if *has_contents { PAGE_BYTES } else { 1 }, 7);
            ends.push(bytes.len());
        }
        (bytes, ends)
    }

    /// Reads as it is told; returns how much was read, and how it ended.
    fn read(bytes: &[u8]) -> (usize, Step) {
        let (mut ahead, mut read) = (Ahead::new(SHARED_BYTES), 0);
        loop {
            match ahead.step(&bytes[..read]) {
                Step::Read(to) if to <= bytes.len() => {
                    assert!(to > read, "no progress at {read}");
                    read = to;
                }
                step => return (read, step),
            }
        }
    }

    proptest! {
        /// It is held before the contents of a page among the last ones, and only there.
        #[test]
        fn one_of_the_last_pages_with_contents_is_held(pages in prop::collection::vec(any::<bool>(), 1..200)) {
            let (mut bytes, ends) = stream(&pages);
            // QEMU goes on with the end of RAM.
            bytes.extend(FLAG_END.to_be_bytes());
            bytes.extend([TYPE_FOOTER, 0, 0, 0, 2, 3, 0, 0, 0, 2]);
            let first_held = pages.len().saturating_sub(HELD_PAGES as usize);
            match (first_held..pages.len()).find(|number| pages[*number]) {
                Some(held) => prop_assert_eq!(read(&bytes), (ends[held] - PAGE_BYTES, Step::Hold)),
                None => prop_assert_eq!(read(&bytes).1, Step::Unknown),
            }
        }

        #[test]
        fn damage_never_panics(pages in 0usize..60, at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let (mut bytes, _) = stream(&vec![true; pages]);
            let at = at.index(bytes.len());
            bytes[at] ^= 1u8 << bit;
            read(&bytes);
        }
    }

    #[test]
    fn other_sections_first_are_not_known() {
        let mut bytes = head();
        bytes.extend([4, 0, 0, 0, 1, 3, b'c', b'p', b'u']);
        assert_eq!(read(&bytes).1, Step::Unknown);
    }
}
