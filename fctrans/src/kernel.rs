//! A kernel that was found in the guest's memory, and proved to be the one that runs.
//!
//! ```text
//!  note ──► page tables ──► do the processors' tables lead to the same? ──► mem_section ──► struct pages
//!   │                                  │
//!   └── as it was? ◄──── check ────────┘  before each use
//! ```
//!
//! A guest that was started anew leaves notes, tables and flags of the kernel before, all consistent. What tells is
//! where the processors are: the tables that they use must lead from the note's addresses to the note's places.

use qemu_glue::vm::Processor;

use crate::error::IntrospectError;
use crate::memory::{Gpa, Gva, PhysicalMemory};
use crate::note::{self, Found, Note, implausible};
use crate::search;
use crate::translate::Translator;

/// Where the kernel's own text and data are mapped (arch/x86/include/asm/page_64_types.h: `__START_KERNEL_map`).
pub(crate) const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// With page-table isolation, user space has tables of its own right behind those of the kernel
/// (arch/x86/include/asm/pgtable.h: `PTI_PGTABLE_SWITCH_BIT`).
const USER_TABLES: u64 = 1 << 12;

/// Bits of CR3 that are an address.
const CR3_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Size in bytes of a page of the root of `mem_section`.
const ROOT_BYTES: u64 = 4096;

/// Where the tables of the kernel may be in which a processor is.
pub(crate) fn roots(processor: &Processor) -> [Gpa; 2] {
    let root = processor.cr3 & CR3_ADDRESS;
    [root & !USER_TABLES, root].map(Gpa)
}

/// How the kernel describes a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageLayout {
    /// Size of `struct page` in bytes.
    pub bytes: u64,
    /// Offset of `flags`.
    pub flags_at: usize,
    /// Offset of `_mapcount`, which page types share.
    pub mapcount_at: usize,
    /// Offset of `private`, which holds the order of a free block.
    pub private_at: usize,
    /// Offset of `compound_head`.
    pub compound_head_at: usize,
    /// What `_mapcount` holds in the first page of a free block.
    pub buddy: u32,
    /// What it holds in a page that is offline, such as a balloon's.
    pub offline: Option<u32>,
    /// Number of orders: a free block has fewer than two to the power of this many pages.
    pub orders: u32,
    /// Number of the flag of pages that can be reclaimed.
    pub lru_bit: Option<u32>,
}

impl PageLayout {
    fn of(note: &Note) -> Result<Self, IntrospectError> {
        let bytes = note.below("SIZE(page)", 257)?;
        if bytes < 32 || !bytes.is_multiple_of(8) {
            return Err(implausible("SIZE(page)", &bytes.to_string()));
        }
        let offset = |field: &str, width: u64| {
            note.below(&format!("OFFSET(page.{field})"), bytes - width + 1).map(|at| at as usize)
        };
        let marker = |key: &str| note.decimal(key).and_then(|value| word(key, value));
        let offline = "NUMBER(PAGE_OFFLINE_MAPCOUNT_VALUE)";
        let lru = note.text("NUMBER(PG_lru)").map(|_| note.below("NUMBER(PG_lru)", 64));
        Ok(Self {
            bytes,
            flags_at: offset("flags", 8)?,
            mapcount_at: offset("_mapcount", 4)?,
            private_at: offset("private", 8)?,
            compound_head_at: offset("compound_head", 8)?,
            buddy: marker("NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)")?,
            offline: note.text(offline).map(|_| marker(offline)).transpose()?,
            // 16: blocks of 128 MiB, the size of a section.
            orders: note.below("LENGTH(zone.free_area)", 17)? as u32,
            lru_bit: lru.transpose()?.map(|bit| bit as u32),
        })
    }
}

/// The 32 bits that the kernel means by a number, which it prints with a sign or without.
fn word(key: &str, value: i64) -> Result<u32, IntrospectError> {
    let word = i32::try_from(value).map(i32::cast_unsigned).or_else(|_| u32::try_from(value));
    // A page that is in use has -1 or a count.
    word.ok()
        .filter(|word| *word >= 1 << 31 && *word != u32::MAX)
        .ok_or_else(|| implausible(key, &value.to_string()))
}

/// Where the descriptions of pages are found.
#[derive(Debug, Clone, PartialEq, Eq)]
struct SectionLayout {
    roots_at: Gva,
    roots: u64,
    bytes: u64,
    mem_map_at: u64,
    /// Frames of a section.
    frames: u64,
}

impl SectionLayout {
    fn of(note: &Note) -> Result<Self, IntrospectError> {
        let bytes = note.below("SIZE(mem_section)", ROOT_BYTES)?;
        if bytes < 8 {
            return Err(implausible("SIZE(mem_section)", &bytes.to_string()));
        }
        let key = "NUMBER(SECTION_SIZE_BITS)";
        let bits = note.decimal_or(key, 27)?;
        if !(24..=34).contains(&bits) {
            return Err(implausible(key, &bits.to_string()));
        }
        Ok(Self {
            // Named as an array, though it is a pointer to one (4.15 and later): its value.
            roots_at: note.symbol("mem_section")?,
            roots: note.below("LENGTH(mem_section)", 1 << 32)?,
            bytes,
            mem_map_at: note.below("OFFSET(mem_section.section_mem_map)", bytes - 7)?,
            frames: 1 << (bits - 12),
        })
    }
}

/// The pages that one section describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Section {
    /// First frame.
    pub(crate) first: u64,
    /// Where the descriptions are.
    pub(crate) pages_at: Gva,
}

/// A section has descriptions, and its memory is in use (include/linux/mmzone.h: `SECTION_MARKED_PRESENT`,
/// `SECTION_HAS_MEM_MAP`, `SECTION_IS_ONLINE`).
const SECTION_FLAGS: u64 = 0b111;

/// The lowest bits of `section_mem_map` are flags: descriptions begin a page.
const SECTION_ADDRESS: u64 = !0xfff;

/// A kernel that runs in the guest.
#[derive(Debug, Clone)]
pub struct Kernel {
    at: Found,
    variable: Option<u64>,
    note: Note,
    translator: Translator,
    tables_at: Gva,
    tables: Gpa,
    layout: PageLayout,
    sections: SectionLayout,
}

impl Kernel {
    /// Looks for the kernel that runs: among what its variables point to, or else at the beginning of pages that
    /// hold data.
    ///
    /// # Errors
    /// [`IntrospectError::NoKernel`] if there is no note; why the last one does not hold if there are some;
    /// [`IntrospectError::Ram`].
    pub fn find(
        memory: &impl PhysicalMemory,
        processors: &[Processor],
    ) -> Result<Self, IntrospectError> {
        Self::find_again(memory, processors, None)
    }

    /// As [`Self::find`], but looks first at the [variable](Self::variable) by which one was found that ran in this guest
    /// before.
    ///
    /// # Errors
    /// As [`Self::find`].
    pub fn find_again(
        memory: &impl PhysicalMemory,
        processors: &[Processor],
        likely: Option<u64>,
    ) -> Result<Self, IntrospectError> {
        let mut why = IntrospectError::NoKernel;
        let led = |led: search::Led| {
            let kernel = Self::holds(memory, led.note, processors, &mut why)?;
            Ok(kernel.map(|kernel| Self { variable: Some(led.variable), ..kernel }))
        };
        if let Some(kernel) = search::by_variables(memory, processors, likely, led)? {
            return Ok(kernel);
        }
        if matches!(why, IntrospectError::NoKernel) {
            for note in note::find(memory)? {
                if let Some(kernel) = Self::holds(memory, note, processors, &mut why)? {
                    return Ok(kernel);
                }
            }
        }
        Err(why)
    }

    /// The kernel of a note that holds; otherwise `why` it does not.
    fn holds(
        memory: &impl PhysicalMemory,
        note: Found,
        processors: &[Processor],
        why: &mut IntrospectError,
    ) -> Result<Option<Self>, IntrospectError> {
        match Self::at(memory, note, processors) {
            Ok(kernel) => Ok(Some(kernel)),
            Err(error @ IntrospectError::Ram(_)) => Err(error),
            Err(error) => {
                *why = error;
                Ok(None)
            }
        }
    }

    /// Where the variable is by which it was found, if it was by one, in bytes from the first variable on.
    pub fn variable(&self) -> Option<u64> {
        self.variable
    }

    fn at(
        memory: &impl PhysicalMemory,
        at: Found,
        processors: &[Processor],
    ) -> Result<Self, IntrospectError> {
        let note = Note::parse(&at.text)?;
        let layout = PageLayout::of(&note)?;
        let sections = SectionLayout::of(&note)?;
        let tables_at = note.symbol("swapper_pg_dir")?;
        let phys_base = note.decimal("NUMBER(phys_base)")?;
        let tables = tables_at.0.checked_sub(KERNEL_MAP);
        let tables = tables.and_then(|offset| offset.checked_add_signed(phys_base)).map(Gpa);
        let tables =
            tables.ok_or_else(|| implausible("NUMBER(phys_base)", &phys_base.to_string()))?;
        let has_five_levels = note.decimal_or("NUMBER(pgtable_l5_enabled)", 0)? != 0;
        let encryption = note.decimal_or("NUMBER(sme_mask)", 0)?.cast_unsigned();
        let translator = Translator::new(tables, has_five_levels, encryption);
        let kernel =
            Self { at, variable: None, note, translator, tables_at, tables, layout, sections };
        kernel.check(memory, processors)?;
        Ok(kernel)
    }

    /// Whether this kernel is still the one that runs, by what its processors hold now.
    ///
    /// # Errors
    /// [`IntrospectError::NotRunning`] if not; [`IntrospectError::Nested`] if that cannot be known;
    /// [`IntrospectError::Ram`].
    pub fn check(
        &self,
        memory: &impl PhysicalMemory,
        processors: &[Processor],
    ) -> Result<(), IntrospectError> {
        if note::read(memory, self.at.at)?.as_ref() != Some(&self.at.text) {
            return Err(IntrospectError::NotRunning);
        }
        if !self.leads_to_tables(memory, self.tables)? {
            return Err(IntrospectError::NotRunning);
        }
        let mut are_in_it = false;
        for processor in processors {
            if processor.may_nest {
                return Err(IntrospectError::Nested);
            }
            // One that was not started yet is in no kernel. All others must be in this one: while another kernel begins
            // (kexec), processors that it did not start yet stand where the last one halted them.
            if processor.is_paging {
                let [kernel, user] = roots(processor);
                are_in_it =
                    self.leads_to_tables(memory, kernel)? || self.leads_to_tables(memory, user)?;
                if !are_in_it {
                    break;
                }
            }
        }
        if are_in_it { Ok(()) } else { Err(IntrospectError::NotRunning) }
    }

    /// Whether tables lead from the address of the kernel's own to their place.
    fn leads_to_tables(
        &self,
        memory: &impl PhysicalMemory,
        root: Gpa,
    ) -> Result<bool, IntrospectError> {
        match self.translator.with_root(root).translate(memory, self.tables_at) {
            Ok(mapped) => Ok(mapped.at == self.tables),
            Err(error @ IntrospectError::Ram(_)) => Err(error),
            Err(_) => Ok(false),
        }
    }

    /// The kernel's release, such as `6.1.0-49-amd64`.
    pub fn release(&self) -> &str {
        self.note.text("OSRELEASE").unwrap_or_default()
    }

    /// What the kernel says of itself.
    pub fn note(&self) -> &Note {
        &self.note
    }

    /// How it describes a page.
    pub fn layout(&self) -> &PageLayout {
        &self.layout
    }

    /// From its addresses to the guest's memory.
    pub fn translator(&self) -> &Translator {
        &self.translator
    }

    /// The first frame behind the section of `frame`.
    pub(crate) fn section_end(&self, frame: u64) -> u64 {
        (frame / self.sections.frames + 1) * self.sections.frames
    }

    /// The section that describes `frame`, if it is there and in use.
    pub(crate) fn section(
        &self,
        memory: &impl PhysicalMemory,
        frame: u64,
    ) -> Result<Option<Section>, IntrospectError> {
        match self.read_section(memory, frame) {
            // What cannot be looked up counts as used.
            Err(IntrospectError::NotMapped { .. } | IntrospectError::NoRam { .. }) => Ok(None),
            other => other,
        }
    }

    fn read_section(
        &self,
        memory: &impl PhysicalMemory,
        frame: u64,
    ) -> Result<Option<Section>, IntrospectError> {
        let SectionLayout { roots_at, roots, bytes, mem_map_at, frames } = self.sections;
        let number = frame / frames;
        let in_root = ROOT_BYTES / bytes;
        if number / in_root >= roots {
            return Ok(None);
        }
        let Some(root_at) = roots_at.plus(number / in_root * 8) else { return Ok(None) };
        let root = self.translator.read_u64(memory, root_at)?;
        let Some(at) = Gva(root).plus(number % in_root * bytes + mem_map_at) else {
            return Ok(None);
        };
        if root == 0 {
            return Ok(None);
        }
        let coded = self.translator.read_u64(memory, at)?;
        if coded & SECTION_FLAGS != SECTION_FLAGS {
            return Ok(None);
        }
        let first = number * frames;
        // Coded so that the description of frame 0 would lie there.
        let pages_at =
            (coded & SECTION_ADDRESS).wrapping_add(first.wrapping_mul(self.layout.bytes));
        Ok(Some(Section { first, pages_at: Gva(pages_at) }))
    }
}

#[cfg(test)]
mod tests;
