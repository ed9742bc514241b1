//! From the kernel's virtual addresses to the guest's memory: x86-64's page tables of four and five levels.
//!
//! Source: Intel SDM volume 3, 4.5; AMD APM volume 2, 5.3. Randomised addresses (KASLR) need nothing of their own, since
//! every address goes through the tables.
//!
//! Invariant: a walk reads one entry a level, whatever the tables say; cycles end with the levels.

use migrate_core::layout::PAGE_BYTES;

use crate::error::IntrospectError;
use crate::memory::{Gpa, Gva, PhysicalMemory, read_u64};

const ENTRY_PRESENT: u64 = 1;

/// What is mapped may be written.
const ENTRY_WRITABLE: u64 = 1 << 1;

/// What is mapped may not be executed.
const ENTRY_NOT_EXECUTABLE: u64 = 1 << 63;

/// The entry maps memory itself, not another table (second and third level).
const ENTRY_LARGE: u64 = 1 << 7;

/// Where an entry leads: bits 12 to 51.
const ENTRY_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

const INDEX_BITS: u32 = 9;
const PAGE_SHIFT: u32 = PAGE_BYTES.ilog2();

/// Where an address leads, and how much lies there without a gap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapped {
    /// The guest-physical address.
    pub at: Gpa,
    /// Bytes to the end of the page that maps it: of 4 KiB, 2 MiB or 1 GiB.
    pub bytes: u64,
}

/// An entry, and how many bits of an address it leaves.
#[derive(Debug, Clone, Copy)]
struct Leaf {
    entry: u64,
    shift: u32,
}

/// Page tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Translator {
    root: Gpa,
    levels: u32,
    address_mask: u64,
}

impl Translator {
    /// The tables below `root`, of five levels or four. `encryption_mask` is the bit that marks encrypted memory (AMD
    /// SME), or 0.
    pub fn new(root: Gpa, has_five_levels: bool, encryption_mask: u64) -> Self {
        let levels = if has_five_levels { 5 } else { 4 };
        Self {
            root: Gpa(root.0 & ENTRY_ADDRESS),
            levels,
            address_mask: ENTRY_ADDRESS & !encryption_mask,
        }
    }

    /// The same kind of tables below another root.
    #[must_use]
    pub fn with_root(&self, root: Gpa) -> Self {
        Self { root: Gpa(root.0 & self.address_mask), ..self.clone() }
    }

    /// Where `at` leads.
    ///
    /// # Errors
    /// [`IntrospectError::NotMapped`]; [`IntrospectError::NoRam`] if a table lies outside RAM;
    /// [`IntrospectError::Ram`].
    pub fn translate(
        &self,
        memory: &impl PhysicalMemory,
        at: Gva,
    ) -> Result<Mapped, IntrospectError> {
        let unmapped = IntrospectError::NotMapped { at };
        if !self.is_canonical(at) {
            return Err(unmapped);
        }
        let Leaf { entry, shift } = self.leaf(memory, at)?;
        if entry & ENTRY_PRESENT == 0 {
            return Err(unmapped);
        }
        let bytes = 1 << shift;
        let within = at.0 & (bytes - 1);
        let address = entry & self.address_mask & !(bytes - 1);
        Ok(Mapped { at: Gpa(address + within), bytes: bytes - within })
    }

    /// The last entry on the way to `at`: one that maps memory, or leads nowhere.
    fn leaf(&self, memory: &impl PhysicalMemory, at: Gva) -> Result<Leaf, IntrospectError> {
        let mut table = self.root;
        for level in (1..self.levels).rev() {
            let leaf = Self::entry(memory, table, at, level)?;
            let is_last = level <= 2 && leaf.entry & ENTRY_LARGE != 0;
            if leaf.entry & ENTRY_PRESENT == 0 || is_last {
                return Ok(leaf);
            }
            table = Gpa(leaf.entry & self.address_mask);
        }
        Self::entry(memory, table, at, 0)
    }

    fn entry(
        memory: &impl PhysicalMemory,
        table: Gpa,
        at: Gva,
        level: u32,
    ) -> Result<Leaf, IntrospectError> {
        let shift = PAGE_SHIFT + level * INDEX_BITS;
        let index = (at.0 >> shift) & ((1 << INDEX_BITS) - 1);
        Ok(Leaf { entry: read_u64(memory, Gpa(table.0 + index * 8))?, shift })
    }

    /// What is mapped for writing, and not for executing, within `bytes` from `from` on: a program's variables. What
    /// tables outside RAM map is left out.
    ///
    /// # Errors
    /// [`IntrospectError::Ram`].
    pub(crate) fn variables(
        &self,
        memory: &impl PhysicalMemory,
        from: Gva,
        bytes: u64,
    ) -> Result<Vec<Mapped>, IntrospectError> {
        let mut found = vec![];
        let mut at = from.0;
        let end = from.0.saturating_add(bytes);
        while at < end {
            let leaf = match self.leaf(memory, Gva(at)) {
                Ok(leaf) => leaf,
                Err(error @ IntrospectError::Ram(_)) => return Err(error),
                Err(_) => break,
            };
            let page = 1u64 << leaf.shift;
            let wanted = ENTRY_PRESENT | ENTRY_WRITABLE | ENTRY_NOT_EXECUTABLE;
            if leaf.entry & wanted == wanted {
                let address = leaf.entry & self.address_mask & !(page - 1);
                found.push(Mapped { at: Gpa(address), bytes: page });
            }
            let Some(next) = (at & !(page - 1)).checked_add(page) else { break };
            at = next;
        }
        Ok(found)
    }

    /// Copies what lies at a virtual address.
    ///
    /// # Errors
    /// As [`Self::translate`].
    pub fn read(
        &self,
        memory: &impl PhysicalMemory,
        at: Gva,
        buffer: &mut [u8],
    ) -> Result<(), IntrospectError> {
        let mut at = at;
        let mut rest = buffer;
        while !rest.is_empty() {
            let mapped = self.translate(memory, at)?;
            let bytes = usize::try_from(mapped.bytes).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(bytes);
            memory.read(mapped.at, now)?;
            rest = later;
            if !rest.is_empty() {
                at = at.plus(bytes as u64).ok_or(IntrospectError::NotMapped { at })?;
            }
        }
        Ok(())
    }

    /// Reads a little-endian number of 8 bytes.
    ///
    /// # Errors
    /// As [`Self::translate`].
    pub fn read_u64(&self, memory: &impl PhysicalMemory, at: Gva) -> Result<u64, IntrospectError> {
        let mut bytes = [0; 8];
        self.read(memory, at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Reads a little-endian number of 4 bytes.
    ///
    /// # Errors
    /// As [`Self::translate`].
    pub fn read_u32(&self, memory: &impl PhysicalMemory, at: Gva) -> Result<u32, IntrospectError> {
        let mut bytes = [0; 4];
        self.read(memory, at, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// The bits that no level translates repeat the highest one that is.
    fn is_canonical(&self, at: Gva) -> bool {
        let bits = PAGE_SHIFT + self.levels * INDEX_BITS;
        let above = (at.0 as i64) >> (bits - 1);
        above == 0 || above == -1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::Memory;

    const BASE: u64 = 0xffff_8880_0000_0000;

    fn at(level: u32, index: u64) -> u64 {
        index << (PAGE_SHIFT + level * INDEX_BITS)
    }

    /// Tables at 0x1000 and on, by the indexes of BASE.
    fn tables(memory: &mut Memory, levels: u32) {
        for level in (1..levels).rev() {
            let table = u64::from(levels - level) * 0x1000;
            let index = (BASE >> (PAGE_SHIFT + level * INDEX_BITS)) & 511;
            memory.write_u64(table + index * 8, (table + 0x1000) | ENTRY_PRESENT);
        }
    }

    #[test]
    fn small_and_large_pages_of_four_and_five_levels() {
        for levels in [4, 5] {
            let mut memory = Memory::new(16 << 20);
            tables(&mut memory, levels);
            let (lowest, second) = (u64::from(levels) * 0x1000, u64::from(levels - 1) * 0x1000);
            let third = second - 0x1000;
            memory.write_u64(lowest + 8, 0x8000_0000_0000_0000 | 0x0070_3000 | ENTRY_PRESENT);
            memory.write_u64(second + 8, 0x0080_0000 | 0x1000 | ENTRY_LARGE | ENTRY_PRESENT);
            memory.write_u64(third + 8, 0x4000_0000 | ENTRY_LARGE | ENTRY_PRESENT);
            let translator = Translator::new(Gpa(0x1000), levels == 5, 0);
            let to = |va: u64| translator.translate(&memory, Gva(va)).map(|to| (to.at.0, to.bytes));
            assert_eq!(to(BASE + at(0, 1) + 0x10).expect("4 KiB"), (0x0070_3010, 0xff0));
            // The bit of the page attributes is none of the address.
            assert_eq!(to(BASE + at(1, 1) + 0x1234).expect("2 MiB"), (0x0080_1234, 0x1f_edcc));
            assert_eq!(to(BASE + at(2, 1) + 1).expect("1 GiB"), (0x4000_0001, (1 << 30) - 1));
            for nowhere in [BASE, BASE + at(0, 2), BASE + at(1, 2), BASE ^ (1 << 63), 0x1000] {
                assert!(matches!(to(nowhere), Err(IntrospectError::NotMapped { .. })));
            }
        }
    }

    #[test]
    fn a_read_goes_on_where_the_next_page_leads_to() {
        let mut memory = Memory::new(16 << 20);
        tables(&mut memory, 4);
        memory.write_u64(0x4000, 0x0070_0000 | ENTRY_PRESENT);
        memory.write_u64(0x4008, 0x0050_0000 | ENTRY_PRESENT);
        memory.write(0x0070_0ffe, b"ab");
        memory.write(0x0050_0000, b"cd");
        let translator = Translator::new(Gpa(0x1000), false, 0);
        let mut found = [0; 4];
        translator.read(&memory, Gva(BASE + 0xffe), &mut found).expect("both pages");
        assert_eq!(&found, b"abcd");
        let beyond = translator.read(&memory, Gva(BASE + 0x1ffe), &mut found);
        assert!(matches!(beyond, Err(IntrospectError::NotMapped { .. })));
    }

    #[test]
    fn tables_outside_ram_and_tables_that_lead_to_themselves_end() {
        let mut memory = Memory::new(1 << 20);
        let index = (BASE >> (PAGE_SHIFT + 3 * INDEX_BITS)) & 511;
        memory.write_u64(0x1000 + index * 8, 0x7fff_f000 | ENTRY_PRESENT);
        let translator = Translator::new(Gpa(0x1000), false, 0);
        let outside = translator.translate(&memory, Gva(BASE));
        assert!(matches!(outside, Err(IntrospectError::NoRam { .. })));
        for slot in 0..512 {
            memory.write_u64(0x1000 + slot * 8, 0x1000 | ENTRY_PRESENT);
        }
        let itself = translator.translate(&memory, Gva(BASE)).expect("a page");
        assert_eq!(itself.at, Gpa(0x1000));
    }

    #[test]
    fn the_bit_of_encryption_is_none_of_the_address() {
        let mut memory = Memory::new(16 << 20);
        tables(&mut memory, 4);
        memory.write_u64(0x4000, (1 << 47) | 0x0070_0000 | ENTRY_PRESENT);
        let found = Translator::new(Gpa(0x1000), false, 1 << 47).translate(&memory, Gva(BASE));
        assert_eq!(found.expect("mapped").at, Gpa(0x0070_0000));
    }
}
