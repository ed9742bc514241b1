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

/// Bytes that are read at a time.
const PIECE_BYTES: u64 = 256 << 10;

/// Notes that the variables of a kernel lead to, in which a processor is.
///
/// # Errors
/// [`IntrospectError::Ram`].
pub fn by_variables(
    memory: &impl PhysicalMemory,
    processors: &[Processor],
) -> Result<Vec<Found>, IntrospectError> {
    let mut tried = BTreeSet::new();
    for processor in processors {
        for root in roots(processor).into_iter().filter(|root| tried.insert(*root)) {
            let translator = Translator::new(root, processor.has_five_levels, 0);
            let found = below(memory, &translator)?;
            if !found.is_empty() {
                return Ok(found);
            }
        }
        // What one kernel's processors do not lead to, those beside it do not either.
        if tried.len() >= 4 {
            break;
        }
    }
    Ok(vec![])
}

fn below(
    memory: &impl PhysicalMemory,
    translator: &Translator,
) -> Result<Vec<Found>, IntrospectError> {
    let variables = translator.variables(memory, Gva(KERNEL_MAP), IMAGE_BYTES)?;
    let mut left = VARIABLES_BYTES_MAX;
    let (mut addresses, mut found) = (BTreeSet::new(), vec![]);
    for part in variables {
        let bytes = part.bytes.min(left);
        left -= bytes;
        addresses_in(memory, Mapped { bytes, ..part }, &mut addresses)?;
    }
    let mut seen = BTreeSet::new();
    for address in addresses {
        match translator.translate(memory, Gva(address)) {
            // Many addresses may lead to one place.
            Ok(mapped) if seen.insert(mapped.at) => {
                if let Some(text) = note::read(memory, mapped.at)? {
                    found.push(Found { at: mapped.at, text });
                    if found.len() >= NOTES_MAX {
                        break;
                    }
                }
            }
            Ok(_) => {}
            Err(error @ IntrospectError::Ram(_)) => return Err(error),
            Err(_) => {}
        }
    }
    Ok(found)
}

/// Adds the words that are addresses of pages beside the image.
fn addresses_in(
    memory: &impl PhysicalMemory,
    part: Mapped,
    addresses: &mut BTreeSet<u64>,
) -> Result<(), IntrospectError> {
    let mut buffer = vec![];
    for begin in (0..part.bytes).step_by(PIECE_BYTES as usize) {
        buffer.resize(PIECE_BYTES.min(part.bytes - begin) as usize, 0);
        match memory.read(Gpa(part.at.0 + begin), &mut buffer) {
            Ok(()) => {}
            Err(error @ IntrospectError::Ram(_)) => return Err(error),
            Err(_) => return Ok(()),
        }
        let (words, _) = buffer.as_chunks::<8>();
        let words = words.iter().map(|word| u64::from_le_bytes(*word));
        let is_page =
            |word: &u64| (KERNEL_HALF..KERNEL_MAP).contains(word) && word.is_multiple_of(PAGE);
        for word in words.filter(is_page) {
            if addresses.len() < ADDRESSES_MAX {
                addresses.insert(word);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::{Guest, MIB, VERSIONS};

    #[test]
    fn a_note_is_found_by_the_variable_that_holds_its_address() {
        for has_five_levels in [false, true] {
            let mut guest = Guest::new(VERSIONS[2], has_five_levels, 0x0400_0000);
            let found =
                |guest: &Guest| by_variables(&guest.memory, &[guest.processor()]).expect("memory");
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
            assert_eq!(notes[0].at.0, 3 * MIB);
            // The tables of user space lie behind those of the kernel, which are looked at.
            let mut user = guest.processor();
            user.cr3 |= 0x1000;
            assert_eq!(by_variables(&guest.memory, &[user]).expect("memory").len(), 1);
        }
    }
}
