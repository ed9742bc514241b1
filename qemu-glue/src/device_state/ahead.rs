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

use super::header::{HeaderError, StreamHeader};

/// Pages of which the last one with contents is held back: more than are zero at the end of any block
/// that is common, few enough to travel in a millisecond.
const HELD_PAGES: u64 = 32;

const PAGE_BYTES: usize = 4096;

/// `QEMU_VM_SECTION_START`, `QEMU_VM_SECTION_PART`, `QEMU_VM_SECTION_FOOTER`.
const SECTION_START: u8 = 1;
const SECTION_PART: u8 = 2;
const SECTION_FOOTER: u8 = 0x7e;

/// `RAM_SAVE_FLAG_*`.
const FLAG_ZERO: u64 = 0x02;
const FLAG_MEM_SIZE: u64 = 0x04;
const FLAG_PAGE: u64 = 0x08;
const FLAG_EOS: u64 = 0x10;
const FLAG_CONTINUE: u64 = 0x20;
const FLAGS: u64 = PAGE_BYTES as u64 - 1;

/// Most blocks of RAM that are looked at.
const BLOCKS_MAX: usize = 4096;

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

impl From<HeaderError> for Step {
    fn from(error: HeaderError) -> Self {
        match error {
            HeaderError::Cut { at } => Self::Read(at + 1),
            _ => Self::Unknown,
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
            let mut reader = Reader { bytes, at: self.at };
            let taken = match self.pages_left {
                None => self.setup(&mut reader),
                Some(left) if self.in_section => self.page(&mut reader, left),
                Some(_) => self.section(&mut reader),
            };
            match taken {
                Ok(()) => self.at = reader.at,
                Err(step) => return step,
            }
        }
    }

    fn setup(&mut self, reader: &mut Reader<'_>) -> Result<(), Step> {
        reader.at = StreamHeader::parse(reader.bytes)?.length_bytes;
        let start = reader.u8()?;
        reader.skip(4)?;
        if start != SECTION_START || reader.name()? != b"ram" {
            return Err(Step::Unknown);
        }
        reader.skip(8)?;
        let word = reader.u64()?;
        if word & FLAGS != FLAG_MEM_SIZE {
            return Err(Step::Unknown);
        }
        let total_bytes = word & !FLAGS;
        let mut listed_bytes: u64 = 0;
        for _ in 0..BLOCKS_MAX {
            if listed_bytes >= total_bytes {
                break;
            }
            reader.name()?;
            listed_bytes = listed_bytes.saturating_add(reader.u64()?);
            // Its address, as with x-ignore-shared.
            reader.skip(8)?;
        }
        if listed_bytes != total_bytes || reader.u64()? != FLAG_EOS {
            return Err(Step::Unknown);
        }
        reader.footer()?;
        let to_come_bytes = total_bytes.checked_sub(self.shared_bytes).ok_or(Step::Unknown)?;
        self.pages_left = Some(to_come_bytes / PAGE_BYTES as u64);
        Ok(())
    }

    fn section(&mut self, reader: &mut Reader<'_>) -> Result<(), Step> {
        if reader.u8()? != SECTION_PART {
            return Err(Step::Unknown);
        }
        reader.skip(4)?;
        self.in_section = true;
        Ok(())
    }

    fn page(&mut self, reader: &mut Reader<'_>, left: u64) -> Result<(), Step> {
        let flags = reader.u64()? & FLAGS;
        if flags == FLAG_EOS {
            reader.footer()?;
            self.in_section = false;
            return Ok(());
        }
        if flags & FLAG_CONTINUE == 0 {
            reader.name()?;
        }
        match flags & !FLAG_CONTINUE {
            FLAG_ZERO => reader.skip(1)?,
            FLAG_PAGE if left > HELD_PAGES => reader.skip(PAGE_BYTES)?,
            FLAG_PAGE => return Err(Step::Hold),
            _ => return Err(Step::Unknown),
        }
        self.pages_left = Some(left.saturating_sub(1));
        Ok(())
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Step> {
        let end = self.at.checked_add(count).ok_or(Step::Unknown)?;
        let taken = self.bytes.get(self.at..end).ok_or(Step::Read(end))?;
        self.at = end;
        Ok(taken)
    }

    fn skip(&mut self, count: usize) -> Result<(), Step> {
        self.take(count).map(drop)
    }

    fn u8(&mut self) -> Result<u8, Step> {
        Ok(self.take(1)?.first().copied().unwrap_or_default())
    }

    fn u64(&mut self) -> Result<u64, Step> {
        Ok(self.take(8)?.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    fn name(&mut self) -> Result<&'a [u8], Step> {
        let length = self.u8()?;
        self.take(usize::from(length))
    }

    /// The end of a section, with the section's number.
    fn footer(&mut self) -> Result<(), Step> {
        if self.u8()? != SECTION_FOOTER {
            return Err(Step::Unknown);
        }
        self.skip(4)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device_state::header::tests::head;

    const SHARED_BYTES: u64 = 1 << 20;

    /// A stream of pages: `true` has contents. Returns where each record ends, too.
    fn stream(pages: &[bool]) -> (Vec<u8>, Vec<usize>) {
        let mut bytes = head();
        let private_bytes = (pages.len() * PAGE_BYTES) as u64;
        bytes.extend([SECTION_START, 0, 0, 0, 2, 3]);
        bytes.extend(b"ram\0\0\0\0\0\0\0\x04");
        bytes.extend(((SHARED_BYTES + private_bytes) | FLAG_MEM_SIZE).to_be_bytes());
        for (name, length) in [("m0", SHARED_BYTES), ("rom", private_bytes)] {
            bytes.push(name.len() as u8);
            bytes.extend(name.bytes());
            bytes.extend(length.to_be_bytes());
            bytes.extend([0; 8]);
        }
        bytes.extend(FLAG_EOS.to_be_bytes());
        bytes.extend([SECTION_FOOTER, 0, 0, 0, 2]);
        let mut ends = vec![];
        for (number, has_contents) in pages.iter().enumerate() {
            if number % 7 == 0 {
                if number > 0 {
                    bytes.extend(FLAG_EOS.to_be_bytes());
                    bytes.extend([SECTION_FOOTER, 0, 0, 0, 2]);
                }
                bytes.extend([SECTION_PART, 0, 0, 0, 2]);
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
            bytes.extend(FLAG_EOS.to_be_bytes());
            bytes.extend([SECTION_FOOTER, 0, 0, 0, 2, 3, 0, 0, 0, 2]);
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
