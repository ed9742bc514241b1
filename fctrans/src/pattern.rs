//! Whether free memory has a content that the guest's kernel relies on, so that it must not be left out.
//!
//! With `page_poison=1` the kernel fills what is freed and checks the filling when it is allocated again; zeros in its
//! place would look like a write to freed memory (mm/page_poison.c). Two signs: the kernel's own keys, and the
//! filling itself, for kernels whose keys cannot be found. `init_on_free=1` relies on zeros, which is what pages
//! that are left out read as.

use migrate_core::layout::PAGE_BYTES;
use migrate_core::pageset::PageSet;

use crate::error::IntrospectError;
use crate::kernel::Kernel;
use crate::memory::{Gpa, PhysicalMemory};
use crate::symbols::Symbols;

/// What freed memory is filled with (include/linux/poison.h: `PAGE_POISON`).
const POISON: u8 = 0xaa;

/// Pages that are looked at, spread over those that are free and hold data.
const SAMPLES: usize = 64;

/// Static keys of such kernels, and the options that turn them on.
const KEYS: [(&str, &str); 2] = [
    ("_page_poisoning_enabled", "page_poison=1"),
    ("_debug_pagealloc_enabled", "debug_pagealloc=on"),
];

impl Kernel {
    /// Why free memory must not be left out, if it must not. `free` are pages that are free and hold data.
    ///
    /// # Errors
    /// [`IntrospectError::Ram`].
    pub fn pattern(
        &self,
        memory: &impl PhysicalMemory,
        free: &PageSet,
    ) -> Result<Option<&'static str>, IntrospectError> {
        match Symbols::find(self, memory, &KEYS.map(|(name, _)| name)) {
            Ok(symbols) => {
                if let Some(option) = self.key(memory, &symbols)? {
                    return Ok(Some(option));
                }
            }
            Err(error @ IntrospectError::Ram(_)) => return Err(error),
            // Kernels before 6.0: what is in free pages has to tell.
            Err(_) => {}
        }
        let every = (free.len() as usize / SAMPLES).max(1);
        for page in free.iter().step_by(every).take(SAMPLES) {
            if is_filled(memory, page)? {
                return Ok(Some("it is filled with 0xaa"));
            }
        }
        Ok(None)
    }

    /// Makes sure that free memory may be left out.
    ///
    /// # Errors
    /// [`IntrospectError::Poisoned`] if the kernel relies on what it filled it with, or what cannot be read.
    pub fn check_unfilled(&self, memory: &impl PhysicalMemory) -> Result<(), IntrospectError> {
        let mut free = self.usage(memory)?.unused();
        free.intersect(&memory.data()?);
        match self.pattern(memory, &free)? {
            None => Ok(()),
            Some(how) => Err(IntrospectError::Poisoned { how }),
        }
    }

    /// The option whose key is on, or cannot be read.
    fn key(
        &self,
        memory: &impl PhysicalMemory,
        symbols: &Symbols,
    ) -> Result<Option<&'static str>, IntrospectError> {
        for (name, option) in KEYS {
            // Kernels that were built without it do not have it.
            let Ok(at) = symbols.address(name) else { continue };
            match self.translator().read_u32(memory, at) {
                Ok(0) => {}
                Err(error @ IntrospectError::Ram(_)) => return Err(error),
                Ok(_) | Err(_) => return Ok(Some(option)),
            }
        }
        Ok(None)
    }
}

fn is_filled(memory: &impl PhysicalMemory, page: u64) -> Result<bool, IntrospectError> {
    let at = memory.ranges().iter().find_map(|range| {
        let within = page.checked_sub(range.first.0)?;
        let frame = range.frames().start.checked_add(within)?;
        range.frames().contains(&frame).then_some(Gpa(frame * PAGE_BYTES as u64))
    });
    let Some(at) = at else { return Ok(false) };
    let mut content = [0; PAGE_BYTES];
    memory.read(at, &mut content)?;
    Ok(content.iter().all(|byte| *byte == POISON))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::{Guest, Image, Place, VERSIONS};

    /// Where the keys lie in the image.
    const VARIABLES: u64 = 0x0111_0000;

    #[test]
    fn a_filling_is_seen_without_the_kernels_keys() {
        let mut guest = Guest::new(VERSIONS[0], false, 0);
        for frame in 20_480..20_488 {
            guest.free(frame, 0);
            guest.memory.write(frame * PAGE_BYTES as u64, &[7; PAGE_BYTES]);
        }
        let kernel = guest.kernel().expect("a kernel");
        let pattern = |guest: &Guest| {
            let mut free = kernel.usage(&guest.memory).expect("memory").unused();
            free.intersect(&guest.memory.data().expect("memory"));
            assert_eq!(free.len(), 8);
            kernel.pattern(&guest.memory, &free).expect("memory")
        };
        assert_eq!(pattern(&guest), None);
        guest.memory.write(20_483 * PAGE_BYTES as u64, &[POISON; PAGE_BYTES]);
        assert_eq!(pattern(&guest), Some("it is filled with 0xaa"));
    }

    #[test]
    fn a_guest_that_fills_what_it_frees_is_known_by_its_keys() {
        let none = |guest: &Guest| PageSet::new(guest.memory.pages());
        for (number, (_, option)) in KEYS.iter().enumerate() {
            let mut guest = Guest::new(VERSIONS[3], false, 0);
            let mut image = Image::default();
            image.add("_stext", Place::Image(0));
            for (number, (name, _)) in KEYS.iter().enumerate() {
                image.add(name, Place::Image(VARIABLES + number as u64 * 8));
            }
            image.write(&mut guest, true);
            let kernel = guest.kernel().expect("a kernel");
            let pattern =
                |guest: &Guest| kernel.pattern(&guest.memory, &none(guest)).expect("memory");
            assert_eq!(pattern(&guest), None);
            guest.memory.write_u64(Guest::place(VARIABLES + number as u64 * 8), 1);
            assert_eq!(pattern(&guest), Some(*option));
        }
    }
}
