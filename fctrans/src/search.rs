//! Where the note is, by the tables that the processors use: among what the kernel's variables point to.
//!
//! ```text
//!   CR3 ──► what is mapped for variables of the kernel ──► words that are addresses of pages ──► is it a note?
//! ```
//!
//! The kernel keeps the note's address in a variable. To look at its variables takes some tens of milliseconds
//! whatever the size of the guest; looking at the beginning of every page takes 0.1 s for each GiB in use. So that is done
//! for the first 4 GiB in use, where no variable leads to a note.

use std::collections::BTreeSet;

use qemu_glue::vm::Processor;

use crate::error::IntrospectError;
use crate::kernel::{KERNEL_MAP, roots};
use crate::memory::{Gpa, Gva, PAGE, PhysicalMemory};
use crate::note::{self, Found, NOTES_MAX};
use crate::translate::{Mapped, Translator};

/// The kernel's image, its variables included, ends before (arch/x86/include/asm/page_64_types.h:
/// `KERNEL_IMAGE_SIZE`).
const IMAGE_BYTES: u64 = 1 << 30;

/// Most bytes of variables that are looked at; Debian's kernels have some 20 MiB.
const VARIABLES_BYTES_MAX: u64 = 256 << 20;

/// Most addresses that are followed; Debian's kernels have some thousands.
const ADDRESSES_MAX: usize = 1 << 18;

/// Where the kernel's half of the addresses begins.
const KERNEL_HALF: u64 = 1 << 63;

/// Size in bytes of an address.
const WORD_BYTES: u64 = 8;

/// Bytes that are read at a time.
const PIECE_BYTES: u64 = 256 << 10;

/// A note, and the variable that leads to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Led {
    /// The note.
    pub note: Found,
    /// Where the variable is, in bytes from the first variable on: the same whenever this kernel is started, wherever it is
    /// put then.
    pub variable: u64,
}

/// The first that `take` makes of the notes to which the variables of a kernel lead in which a processor is. The variable
/// `likely` is looked at first. Memory that is elsewhere is passed over.
///
/// # Errors
/// [`IntrospectError::Ram`]; what `take` returns.
pub fn by_variables<T>(
    memory: &impl PhysicalMemory,
    processors: &[Processor],
    likely: Option<u64>,
    mut take: impl FnMut(Led) -> Result<Option<T>, IntrospectError>,
) -> Result<Option<T>, IntrospectError> {
    let mut tried = BTreeSet::new();
    for processor in processors {
        for root in roots(processor).into_iter().filter(|root| tried.insert(*root)) {
            let translator = Translator::new(root, processor.has_five_levels, 0);
            let mut search = Search {
                memory,
                translator,
                take: &mut take,
                addresses: BTreeSet::new(),
                places: BTreeSet::new(),
                notes: 0,
            };
            let taken = search.run(likely)?;
            // A kernel that has notes is not looked for in the tables of other processors.
            if taken.is_some() || search.notes > 0 {
                return Ok(taken);
            }
        }
        // What one kernel's processors do not lead to, those beside it do not either.
        if tried.len() >= 4 {
            break;
        }
    }
    Ok(None)
}

/// One kernel's variables, and what was looked at of what they lead to.
struct Search<'a, M, F> {
    memory: &'a M,
    translator: Translator,
    take: &'a mut F,
    addresses: BTreeSet<u64>,
    /// Many addresses may lead to one place.
    places: BTreeSet<Gpa>,
    notes: usize,
}

impl<M, F, T> Search<'_, M, F>
where
    M: PhysicalMemory,
    F: FnMut(Led) -> Result<Option<T>, IntrospectError>,
{
    fn run(&mut self, likely: Option<u64>) -> Result<Option<T>, IntrospectError> {
        let parts = self.translator.variables(self.memory, Gva(KERNEL_MAP), IMAGE_BYTES)?;
        let Some(first) = parts.first().map(|part| part.at) else { return Ok(None) };
        let likely = likely.map(|variable| first.0.wrapping_add(variable));
        let is_within = |at: &u64| {
            parts.iter().any(|part| (part.at.0..part.at.0.saturating_add(part.bytes)).contains(at))
        };
        if let Some(at) = likely.filter(is_within) {
            let word = Mapped { at: Gpa(at), bytes: WORD_BYTES };
            if let Some(taken) = self.part(first, word)? {
                return Ok(Some(taken));
            }
        }
        let mut left = VARIABLES_BYTES_MAX;
        for part in parts {
            let bytes = part.bytes.min(left);
            left -= bytes;
            if let Some(taken) = self.part(first, Mapped { bytes, ..part })? {
                return Ok(Some(taken));
            }
        }
        Ok(None)
    }

    /// Follows the words that are addresses of pages beside the image.
    fn part(&mut self, first: Gpa, part: Mapped) -> Result<Option<T>, IntrospectError> {
        let mut buffer = vec![];
        for begin in (0..part.bytes).step_by(PIECE_BYTES as usize) {
            buffer.resize(PIECE_BYTES.min(part.bytes - begin) as usize, 0);
            let at = Gpa(part.at.0 + begin);
            match self.memory.read(at, &mut buffer) {
                Ok(()) => {}
                Err(error @ IntrospectError::Ram(_)) => return Err(error),
                Err(_) => continue,
            }
            let (words, _) = buffer.as_chunks::<{ WORD_BYTES as usize }>();
            for (number, word) in words.iter().enumerate() {
                let word = u64::from_le_bytes(*word);
                let is_page = (KERNEL_HALF..KERNEL_MAP).contains(&word);
                if !is_page || !word.is_multiple_of(PAGE) {
                    continue;
                }
                // The parts may be in another order than their addresses.
                let variable = at.0.wrapping_sub(first.0).wrapping_add(number as u64 * WORD_BYTES);
                if let Some(taken) = self.follow(Gva(word), variable)? {
                    return Ok(Some(taken));
                }
            }
        }
        Ok(None)
    }

    fn follow(&mut self, address: Gva, variable: u64) -> Result<Option<T>, IntrospectError> {
        let is_over = self.addresses.len() >= ADDRESSES_MAX || self.notes >= NOTES_MAX;
        if is_over || !self.addresses.insert(address.0) {
            return Ok(None);
        }
        let mapped = self.translator.translate(self.memory, address);
        let text = mapped.and_then(|mapped| {
            let is_new = self.places.insert(mapped.at);
            let text = if is_new { note::read(self.memory, mapped.at)? } else { None };
            Ok(text.map(|text| Found { at: mapped.at, text }))
        });
        match text {
            Ok(Some(note)) => {
                self.notes += 1;
                (self.take)(Led { note, variable })
            }
            Err(error @ IntrospectError::Ram(_)) => Err(error),
            Ok(None) | Err(_) => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::{Guest, MIB, VERSIONS};

    /// All that are found, in the order in which they are.
    fn all(guest: &Guest, processor: Processor, likely: Option<u64>) -> Vec<Led> {
        let mut all = vec![];
        let none = by_variables(&guest.memory, &[processor], likely, |led| {
            all.push(led);
            Ok(None::<()>)
        });
        assert_eq!(none.expect("memory"), None);
        all
    }

    #[test]
    fn a_note_is_found_by_the_variable_that_holds_its_address() {
        for has_five_levels in [false, true] {
            let mut guest = Guest::new(VERSIONS[2], has_five_levels, 0x0400_0000);
            let found = |guest: &Guest| all(guest, guest.processor(), None);
            assert!(found(&guest).is_empty());
            // Addresses of nothing, of another page, of memory that is not mapped.
            for (offset, word) in [(8, 0), (16, guest.direct(5 * MIB)), (24, u64::MAX << 12)] {
                guest.memory.write_u64(Guest::place(20 * MIB + offset), word);
            }
            // What is mapped there is no RAM.
            guest.map_large(guest.direct(0) + 0x40_0000_0000, 0xfec0_0000, 1);
            let device = guest.direct(0) + 0x40_0000_0000;
            guest.memory.write_u64(Guest::place(20 * MIB + 32), device);
            assert!(found(&guest).is_empty());
            let address = guest.direct(3 * MIB);
            guest.memory.write_u64(Guest::place(21 * MIB + 0x18), address);
            let notes = found(&guest);
            assert_eq!(notes.len(), 1);
            assert_eq!(notes[0].note.at.0, 3 * MIB);
            // The tables of user space lie behind those of the kernel, which are looked at.
            let mut user = guest.processor();
            user.cr3 |= 0x1000;
            assert_eq!(all(&guest, user, None), notes);
        }
    }

    #[test]
    fn the_variable_that_led_to_a_note_is_looked_at_first() {
        let mut guest = Guest::new(VERSIONS[2], false, 0);
        let text = guest.note();
        guest.put_note(2 * MIB, &text);
        for (offset, note) in [(20 * MIB + 64, 2 * MIB), (24 * MIB + 8, 3 * MIB)] {
            let address = guest.direct(note);
            guest.memory.write_u64(Guest::place(offset), address);
        }
        let notes = |likely| -> Vec<u64> {
            all(&guest, guest.processor(), likely).iter().map(|led| led.note.at.0).collect()
        };
        let found = all(&guest, guest.processor(), None);
        assert_eq!(notes(None), [2 * MIB, 3 * MIB]);
        assert_eq!(notes(Some(found[1].variable)), [3 * MIB, 2 * MIB]);
        for wrong in [0, found[1].variable + 8, 1 << 40, u64::MAX - 7] {
            assert_eq!(notes(Some(wrong)), [2 * MIB, 3 * MIB]);
        }
        // The kernel that is started anew, at another place, has it where it was.
        let mut moved = Guest::new(VERSIONS[2], false, 0x0400_0000);
        let address = moved.direct(3 * MIB);
        moved.memory.write_u64(Guest::place(24 * MIB + 8), address);
        assert_eq!(all(&moved, moved.processor(), None)[0].variable, found[1].variable);
    }
}
