//! Guests made for tests and fuzzers: sparse memory, and a kernel's tables in it as versions from 5.4 to 6.18 lay them out.

use std::cell::RefCell;
use std::collections::HashMap;

use migrate_core::layout::{PAGE_BYTES, PageIndex};
use migrate_core::pageset::PageSet;
use qemu_glue::vm::Processor;

use crate::error::IntrospectError;
use crate::kernel::Kernel;
use crate::memory::{Gpa, Gva, PAGE, PhysicalMemory, RamRange, range_of};

pub(crate) const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// RAM that holds zeros where nothing was written.
#[derive(Debug, Clone)]
pub(crate) struct Memory {
    ranges: Vec<RamRange>,
    frames: HashMap<u64, Box<[u8; PAGE_BYTES]>>,
    /// Bytes that were read.
    pub(crate) read_bytes: RefCell<u64>,
}

impl Memory {
    /// RAM from address 0 on.
    pub(crate) fn new(bytes: u64) -> Self {
        Self::with_ranges(&[(0, bytes)])
    }

    /// RAM at addresses, with lengths in bytes.
    pub(crate) fn with_ranges(ranges: &[(u64, u64)]) -> Self {
        let mut first = 0;
        let ranges = ranges.iter().map(|(at, bytes)| {
            let range = RamRange { gpa: *at..at + bytes, first: PageIndex(first) };
            first += bytes / PAGE;
            range
        });
        Self { ranges: ranges.collect(), frames: HashMap::new(), read_bytes: RefCell::default() }
    }

    pub(crate) fn write(&mut self, at: u64, bytes: &[u8]) {
        for (at, byte) in (at..).zip(bytes) {
            let frame = self.frames.entry(at / PAGE).or_insert_with(|| Box::new([0; PAGE_BYTES]));
            frame[(at % PAGE) as usize] = *byte;
        }
    }

    pub(crate) fn write_u64(&mut self, at: u64, value: u64) {
        self.write(at, &value.to_le_bytes());
    }
}

impl PhysicalMemory for Memory {
    fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    fn pages(&self) -> u64 {
        self.ranges.iter().map(|range| (range.gpa.end - range.gpa.start) / PAGE).sum()
    }

    fn read(&self, at: Gpa, buffer: &mut [u8]) -> Result<(), IntrospectError> {
        range_of(&self.ranges, at, buffer.len() as u64).ok_or(IntrospectError::NoRam { at })?;
        *self.read_bytes.borrow_mut() += buffer.len() as u64;
        let mut from = at.0;
        let mut rest = buffer;
        while !rest.is_empty() {
            let within = (from % PAGE) as usize;
            let bytes = rest.len().min(PAGE_BYTES - within);
            let (now, later) = rest.split_at_mut(bytes);
            match self.frames.get(&(from / PAGE)) {
                Some(frame) => now.copy_from_slice(&frame[within..within + bytes]),
                None => now.fill(0),
            }
            (from, rest) = (from + bytes as u64, later);
        }
        Ok(())
    }

    fn data(&self) -> Result<PageSet, IntrospectError> {
        let mut data = PageSet::new(self.pages());
        for range in &self.ranges {
            for frame in range.frames().filter(|frame| self.frames.contains_key(frame)) {
                data.insert(range.page(frame));
            }
        }
        Ok(data)
    }
}

/// What differs from version to version.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Version {
    pub(crate) release: &'static str,
    pub(crate) page_bytes: u64,
    pub(crate) private_at: u64,
    pub(crate) mapcount_at: u64,
    /// As the note prints it.
    pub(crate) buddy: i64,
    pub(crate) offline: Option<i64>,
    pub(crate) section_bytes: u64,
    /// Whether the note has the size of a section.
    pub(crate) tells_section_bits: bool,
    pub(crate) lru_bit: u32,
}

const OLD: Version = Version {
    release: "5.4.0",
    page_bytes: 64,
    private_at: 40,
    mapcount_at: 48,
    buddy: -129,
    offline: Some(-257),
    section_bytes: 16,
    tells_section_bits: false,
    lru_bit: 4,
};

/// Layouts that were in use, by when they came.
pub(crate) const VERSIONS: [Version; 7] = [
    OLD,
    // Without memory control groups a page has 56 bytes, rounded up where the architecture aligns it.
    Version { release: "5.10.0", page_bytes: 56, section_bytes: 32, ..OLD },
    Version { release: "6.1.0", tells_section_bits: true, ..OLD },
    Version { release: "6.6.0", tells_section_bits: true, lru_bit: 5, ..OLD },
    // Types as single bits below a base.
    Version {
        release: "6.11.0",
        buddy: -1_073_741_825,
        offline: Some(-536_870_913),
        tells_section_bits: true,
        lru_bit: 5,
        ..OLD
    },
    // Types as numbers in the highest byte.
    Version {
        release: "6.12.0",
        buddy: 0xf0 << 24,
        offline: Some(0xf1 << 24),
        tells_section_bits: true,
        lru_bit: 5,
        ..OLD
    },
    Version {
        release: "6.18.0",
        buddy: (0xf0 << 24) - (1 << 32),
        offline: Some((0xf1 << 24) - (1 << 32)),
        tells_section_bits: true,
        lru_bit: 5,
        ..OLD
    },
];

const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
const DIRECT_MAP: u64 = 0xffff_9180_0000_0000;
const MEM_MAP: u64 = 0xffff_fa80_0000_0000;

/// Where things lie in the guest's memory.
const TABLES: u64 = MIB;
const NOTE: u64 = 3 * MIB;
const ROOTS: u64 = 4 * MIB;
const MEM_MAPS: u64 = 8 * MIB;
const KERNEL: u64 = 32 * MIB;

/// A guest with RAM below and above the hole of PCI.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    pub(crate) memory: Memory,
    pub(crate) version: Version,
    pub(crate) has_five_levels: bool,
    /// From what KASLR moved the kernel by.
    pub(crate) moved: u64,
    tables_used: u64,
}

/// RAM: address and length.
pub(crate) const LOW: (u64, u64) = (0, 256 * MIB);
pub(crate) const HIGH: (u64, u64) = (4 * GIB, 128 * MIB);

impl Guest {
    pub(crate) fn new(version: Version, has_five_levels: bool, moved: u64) -> Self {
        let memory = Memory::with_ranges(&[LOW, HIGH]);
        let mut guest = Self { memory, version, has_five_levels, moved, tables_used: 1 };
        let kernel = KERNEL_MAP + 16 * MIB + moved;
        guest.map_large(kernel, KERNEL, 16);
        guest.map_large(DIRECT_MAP, 0, 128);
        for section in guest.sections() {
            guest.describe_section(section);
        }
        guest.write_note();
        guest
    }

    pub(crate) fn processor(&self) -> Processor {
        Processor {
            cr3: self.tables(),
            is_paging: true,
            has_five_levels: self.has_five_levels,
            may_nest: false,
        }
    }

    pub(crate) fn kernel(&self) -> Result<Kernel, IntrospectError> {
        Kernel::find(&self.memory, &[self.processor()])
    }

    /// Where the kernel's own tables begin: within its image.
    fn tables(&self) -> u64 {
        KERNEL + MIB
    }

    /// The kernel's address of a place in its image.
    pub(crate) fn address(&self, image_offset: u64) -> Gva {
        Gva(KERNEL_MAP + 16 * MIB + self.moved + image_offset)
    }

    /// The kernel's address of a place in memory.
    #[cfg(test)]
    pub(crate) fn direct(&self, place: u64) -> u64 {
        DIRECT_MAP + place
    }

    /// The place of an offset in the kernel's image.
    pub(crate) fn place(image_offset: u64) -> u64 {
        KERNEL + image_offset
    }

    fn sections(&self) -> [u64; 3] {
        [0, 1, HIGH.0 / (128 * MIB)]
    }

    /// Maps pages of 2 MiB.
    pub(crate) fn map_large(&mut self, from: u64, to: u64, pages: u64) {
        for page in 0..pages {
            let from = from + page * 2 * MIB;
            let levels = if self.has_five_levels { 5 } else { 4 };
            let mut table = self.tables();
            for level in (1..levels).rev() {
                let slot = table + ((from >> (12 + 9 * level)) & 511) * 8;
                if level == 1 {
                    self.memory.write_u64(slot, (to + page * 2 * MIB) | 1 << 63 | 0x83);
                    break;
                }
                table = match self.entry(slot) {
                    0 => {
                        let new = TABLES + self.tables_used * PAGE;
                        self.tables_used += 1;
                        self.memory.write_u64(slot, new | 3);
                        new
                    }
                    entry => entry & 0x000f_ffff_ffff_f000,
                };
            }
        }
    }

    fn entry(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read(Gpa(at), &mut bytes).expect("RAM");
        u64::from_le_bytes(bytes)
    }

    fn section_frames() -> u64 {
        128 * MIB / PAGE
    }

    /// Where the description of the first frame of a section lies in the guest's memory.
    fn mem_map(&self, section: u64) -> u64 {
        let index = self.sections().iter().position(|one| *one == section).expect("a section");
        MEM_MAPS + index as u64 * 4 * MIB
    }

    fn describe_section(&mut self, section: u64) {
        let bytes = self.version.section_bytes;
        let per_root = PAGE / bytes;
        let (root, index) = (section / per_root, section % per_root);
        let root_table = ROOTS + (1 + root) * PAGE;
        self.memory.write_u64(ROOTS + root * 8, DIRECT_MAP + root_table);
        let mem_map = MEM_MAP + section * 4 * MIB;
        let first = section * Self::section_frames();
        let coded = mem_map.wrapping_sub(first * self.version.page_bytes);
        self.memory.write_u64(root_table + index * bytes, coded | 0xf);
        self.map_large(mem_map, self.mem_map(section), 1);
        // Pages that are in use.
        for frame in 0..Self::section_frames() {
            let at = self.mem_map(section) + frame * self.version.page_bytes;
            self.memory.write(at + self.version.mapcount_at, &u32::MAX.to_le_bytes());
        }
    }

    /// Where the description of a frame lies.
    pub(crate) fn description(&self, frame: u64) -> u64 {
        let section = frame / Self::section_frames();
        self.mem_map(section) + frame % Self::section_frames() * self.version.page_bytes
    }

    pub(crate) fn mark(&mut self, frame: u64, mark: i64, private: u64) {
        let at = self.description(frame);
        self.memory.write(at + self.version.mapcount_at, &(mark as u32).to_le_bytes());
        self.memory.write_u64(at + self.version.private_at, private);
    }

    pub(crate) fn free(&mut self, frame: u64, order: u64) {
        self.mark(frame, self.version.buddy, order);
    }

    pub(crate) fn set_flags(&mut self, frame: u64, flags: u64) {
        let at = self.description(frame);
        self.memory.write_u64(at, flags);
    }

    /// Makes a page part of the compound page that begins with another.
    pub(crate) fn set_compound_head(&mut self, frame: u64, head: u64) {
        let (at, head_at) = (self.description(frame), self.description(head));
        // The kernel's address of the description, plus 1.
        self.memory.write_u64(at + 8, MEM_MAP + head_at + 1);
    }

    /// The note's text.
    pub(crate) fn note(&self) -> String {
        let Version { release, page_bytes, private_at, mapcount_at, buddy, .. } = self.version;
        // From -KERNEL_MAP to where the image lies.
        let phys_base = KERNEL as i64 - (16 * MIB + self.moved) as i64;
        let mut text = format!(
            "OSRELEASE={release}\nPAGESIZE=4096\nSYMBOL(swapper_pg_dir)={:x}\nSYMBOL(_stext)={:x}\n\
             SYMBOL(mem_section)={:x}\nLENGTH(mem_section)=2048\nSIZE(mem_section)={}\n\
             OFFSET(mem_section.section_mem_map)=0\nSIZE(page)={page_bytes}\nOFFSET(page.flags)=0\n\
             OFFSET(page._mapcount)={mapcount_at}\nOFFSET(page.private)={private_at}\n\
             OFFSET(page.compound_head)=8\nLENGTH(zone.free_area)=11\n\
             NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)={buddy}\nNUMBER(phys_base)={phys_base}\n\
             NUMBER(PG_lru)={}\nNUMBER(pgtable_l5_enabled)={}\nKERNELOFFSET={:x}\n",
            self.address(MIB).0,
            self.address(0).0,
            DIRECT_MAP + ROOTS,
            self.version.section_bytes,
            self.version.lru_bit,
            u8::from(self.has_five_levels),
            self.moved,
        );
        if self.version.tells_section_bits {
            text.push_str("NUMBER(SECTION_SIZE_BITS)=27\n");
        }
        if let Some(offline) = self.version.offline {
            text.push_str(&format!("NUMBER(PAGE_OFFLINE_MAPCOUNT_VALUE)={offline}\n"));
        }
        text
    }

    fn write_note(&mut self) {
        let text = self.note();
        self.put_note_bytes(text.as_bytes());
    }

    #[cfg(test)]
    pub(crate) fn put_note(&mut self, at: u64, text: &str) {
        self.put(at, text.as_bytes());
    }

    /// Another text, whatever it is, in place of the note.
    pub(crate) fn put_note_bytes(&mut self, text: &[u8]) {
        self.put(NOTE, text);
    }

    fn put(&mut self, at: u64, text: &[u8]) {
        let bytes = [
            &11u32.to_le_bytes()[..],
            &(text.len() as u32).to_le_bytes(),
            &[0; 4],
            b"VMCOREINFO\0\0",
            text,
        ];
        self.memory.write(at, &bytes.concat());
    }

    /// Another text in place of the note.
    pub(crate) fn rewrite_note(&mut self, text: &str) {
        self.memory.write(NOTE, &[0; PAGE_BYTES]);
        self.put_note_bytes(text.as_bytes());
    }
}

/// Names and variables in the kernel's image, as scripts/kallsyms.c lays them out.
#[derive(Debug, Default)]
pub(crate) struct Image {
    /// Name and offset in the image, or the address itself.
    symbols: Vec<(String, Place)>,
}

/// Where a symbol lies.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place {
    /// In the image.
    Image(u64),
    /// An address of its own: a variable of each processor.
    Absolute(u32),
}

/// Offsets of the tables in the image.
const NAMES: u64 = 4 * MIB;
const TOKEN_TABLE: u64 = 6 * MIB;
const TOKEN_INDEX: u64 = 6 * MIB + 0x4000;
const OFFSETS: u64 = 7 * MIB;
const COUNT: u64 = 8 * MIB;
const BASE: u64 = 8 * MIB + 8;

/// A token that stands for more than one letter.
const TOKEN: u8 = 0x90;
const TOKEN_TEXT: &str = "vm_";

impl Image {
    pub(crate) fn add(&mut self, name: &str, place: Place) {
        self.symbols.push((name.to_owned(), place));
    }

    /// Writes the tables and the note's lines that lead to them.
    pub(crate) fn write(&self, guest: &mut Guest, is_signed: bool) {
        let mut names = vec![];
        let mut offsets = vec![];
        for (name, place) in &self.symbols {
            let tokens = format!("D{name}").replace(TOKEN_TEXT, "\u{1}");
            let tokens = tokens.bytes().map(|byte| if byte == 1 { TOKEN } else { byte });
            let tokens: Vec<u8> = tokens.collect();
            match tokens.len() {
                short @ 0..0x80 => names.push(short as u8),
                long => names.extend([(long & 0x7f) as u8 | 0x80, (long >> 7) as u8]),
            }
            names.extend(tokens);
            let offset = match (is_signed, *place) {
                (true, Place::Image(offset)) => -1 - offset as i32,
                (true, Place::Absolute(address)) => address as i32,
                (false, Place::Image(offset)) => offset as i32,
                (false, Place::Absolute(_)) => 0,
            };
            offsets.extend(offset.to_le_bytes());
        }
        let (mut table, mut index) = (vec![], vec![]);
        for token in 0..=255u8 {
            index.extend((table.len() as u16).to_le_bytes());
            match token {
                TOKEN => table.extend(TOKEN_TEXT.as_bytes()),
                0x21..0x7f => table.push(token),
                _ => {}
            }
            table.push(0);
        }
        let base = guest.address(0).0;
        let mut text = guest.note();
        for (name, offset) in [
            ("names", NAMES),
            ("token_table", TOKEN_TABLE),
            ("token_index", TOKEN_INDEX),
            ("offsets", OFFSETS),
            ("num_syms", COUNT),
            ("relative_base", BASE),
        ] {
            text.push_str(&format!("SYMBOL(kallsyms_{name})={:x}\n", guest.address(offset).0));
        }
        for (offset, bytes) in
            [(NAMES, &names), (TOKEN_TABLE, &table), (TOKEN_INDEX, &index), (OFFSETS, &offsets)]
        {
            guest.memory.write(Guest::place(offset), bytes);
        }
        guest.memory.write_u64(Guest::place(COUNT), self.symbols.len() as u64);
        guest.memory.write_u64(Guest::place(BASE), base);
        guest.rewrite_note(&text);
    }
}
