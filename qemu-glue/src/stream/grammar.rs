//! Which element may come next, what it looks like, and what it changes.
//!
//! Reading an element ([`Grammar::element`]) changes nothing, so that it can be tried until enough
//! bytes are there; [`Grammar::enter`] and [`Grammar::passed`] then make the change.

use std::sync::Arc;

use migrate_core::layout::RAM_BYTES_MAX;

use super::blocks::{self, BlockIndex, BlockList, EntryForm, RamBlock};
use super::channel;
use super::command::{Command, TYPE_COMMAND};
use super::configuration::{Configuration, Following, HeaderError};
use super::cursor::{Cursor, Stop, name};
use super::error::Refusal;
use super::event::{Event, SectionHeader};
use super::record::Record;
use super::{DESCRIPTION_BYTES_MAX, RAM_ID, RAM_VERSION};

pub(crate) const TYPE_END: u8 = 0;
pub(crate) const TYPE_START: u8 = 1;
pub(crate) const TYPE_PART: u8 = 2;
pub(crate) const TYPE_SECTION_END: u8 = 3;
pub(crate) const TYPE_FULL: u8 = 4;
pub(crate) const TYPE_DESCRIPTION: u8 = 6;
pub(crate) const TYPE_FOOTER: u8 = 0x7e;

/// How the name of virtio-mem's early section ends (hw/virtio/virtio-mem.c).
const EARLY_SUFFIX: &str = "/virtio-mem-device-early";

/// Bytes of that section before its bitmap.
const EARLY_FIELDS_BYTES: u64 = 36;

/// The least block of virtio-mem, which bounds the bitmap.
const EARLY_BLOCK_BYTES_MIN: u64 = 1 << 20;

/// What the stream is part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// A connection.
    Connection,
    /// A package of so many bytes.
    Package { size_bytes: u64 },
}

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Magic, version, configuration.
    Header,
    /// Commands and sections.
    Top,
    /// The total length of RAM.
    BlockTotal,
    /// A block of RAM.
    Block { left_bytes: u64 },
    /// Pages.
    Records,
    /// The end of a section, which closes the section `ram` for good if `last`.
    Footer { section: u32, last: bool },
    /// The fields of virtio-mem's early section that tell its length.
    Early { section: u32 },
    /// Bytes that are not looked into.
    Bytes { left: u64, then_footer: Option<u32> },
    /// Device state, which is not looked into, of unknown length.
    DeviceState,
    /// A description or nothing.
    Ended,
    /// Nothing.
    Over,
}

#[derive(Debug)]
struct Ram {
    section: u32,
    blocks: Arc<BlockList>,
    /// The block of the page before.
    current: Option<BlockIndex>,
    /// Its last part has begun.
    is_last: bool,
    /// All of it has come.
    is_complete: bool,
}

/// An element: one that is an event, or one that only changes what comes next.
#[derive(Debug)]
pub(super) enum Element<'a> {
    Event(Event<'a>),
    Silent(Silent),
}

/// An element, or a part of one, that is told later or not at all.
#[derive(Debug)]
pub(super) enum Silent {
    BlockTotal(u64),
    Block(RamBlock),
    EarlyBytes { section: u32, length_bytes: u64 },
    DeviceStateBegins,
}

type Read<'a> = Result<Element<'a>, Stop<Refusal>>;

#[derive(Debug)]
pub(super) struct Grammar {
    scope: Scope,
    place: Place,
    ram: Option<Ram>,
    form: EntryForm,
}

const PLAIN: EntryForm = EntryForm { has_address: false, may_have_page_size: false };

impl Grammar {
    pub(super) fn stream() -> Self {
        Self { scope: Scope::Connection, place: Place::Header, ram: None, form: PLAIN }
    }

    pub(super) fn package(size_bytes: u64) -> Self {
        let scope = Scope::Package { size_bytes };
        Self { scope, place: Place::Top, ram: None, form: PLAIN }
    }

    /// A stream that goes on with RAM after a broken connection.
    pub(super) fn resumed(section: u32, blocks: Arc<BlockList>) -> Self {
        let ram = Ram { section, blocks, current: None, is_last: false, is_complete: false };
        Self { scope: Scope::Connection, place: Place::Top, ram: Some(ram), form: PLAIN }
    }

    pub(super) fn place(&self) -> Place {
        self.place
    }

    pub(super) fn scope(&self) -> Scope {
        self.scope
    }

    /// The number of section `ram` and its blocks, once they came.
    pub(super) fn ram(&self) -> Option<(u32, &Arc<BlockList>)> {
        self.ram.as_ref().map(|ram| (ram.section, &ram.blocks))
    }

    fn is_ram_complete(&self) -> bool {
        match self.scope {
            Scope::Connection => self.ram.as_ref().is_some_and(|ram| ram.is_complete),
            Scope::Package { .. } => true,
        }
    }

    /// Reads the element that `bytes` begin with, and how long it is.
    pub(super) fn element<'a>(
        &self,
        bytes: &'a [u8],
    ) -> Result<(Element<'a>, usize), Stop<Refusal>> {
        let mut cursor = Cursor::new(bytes);
        let element = match self.place {
            Place::Records => self.record(&mut cursor)?,
            Place::Top => self.top(&mut cursor)?,
            Place::Footer { section, .. } => footer(&mut cursor, section)?,
            Place::Header => header(&mut cursor, bytes)?,
            Place::BlockTotal => {
                Element::Silent(Silent::BlockTotal(blocks::read_total(&mut cursor)?))
            }
            Place::Block { left_bytes } => {
                let block = blocks::read_entry(&mut cursor, self.form, left_bytes)?;
                Element::Silent(Silent::Block(block))
            }
            Place::Early { section } => {
                let length_bytes = early_bytes(&mut cursor)?;
                let early = Element::Silent(Silent::EarlyBytes { section, length_bytes });
                // They are handed out together with what follows.
                return Ok((early, 0));
            }
            Place::Ended => description(&mut cursor)?,
            Place::Bytes { .. } | Place::DeviceState | Place::Over => {
                return Err(Stop::Refused(Refusal::AfterEnd));
            }
        };
        Ok((element, cursor.at()))
    }

    fn record<'a>(&self, cursor: &mut Cursor<'a>) -> Read<'a> {
        let ram = self.ram.as_ref().ok_or(Stop::Refused(Refusal::NothingToContinue))?;
        let record = Record::read(cursor, &ram.blocks, ram.current)?;
        Ok(Element::Event(match record {
            Record::Page(page) => Event::Page(page),
            Record::MultifdFlush => Event::MultifdFlush,
            Record::End => Event::EndOfRecords,
        }))
    }

    fn top<'a>(&self, cursor: &mut Cursor<'a>) -> Read<'a> {
        let kind = cursor.peek().ok_or(Stop::Need(1))?;
        match kind {
            TYPE_COMMAND => {
                let command = Command::read(cursor)?;
                self.check(&command).map_err(Stop::Refused)?;
                Ok(Element::Event(Event::Command(command)))
            }
            TYPE_START => self.start(cursor),
            TYPE_PART | TYPE_SECTION_END => self.part(cursor),
            TYPE_FULL if self.is_ram_complete() => Ok(Element::Silent(Silent::DeviceStateBegins)),
            TYPE_FULL => full(cursor),
            TYPE_END if self.scope == Scope::Connection && self.is_ram_complete() => {
                cursor.u8()?;
                Ok(Element::Event(Event::EndOfState))
            }
            found => {
                let place =
                    if self.is_ram_complete() { "after RAM" } else { "before RAM is complete" };
                Err(Stop::Refused(Refusal::Element { found, place }))
            }
        }
    }

    /// Post-copy and shared RAM that stays out exclude each other in QEMU, and together would make
    /// the list of blocks ambiguous. A package has none within.
    fn check(&self, command: &Command<'_>) -> Result<(), Refusal> {
        let is_nested = self.scope != Scope::Connection;
        if is_nested && matches!(command, Command::Packaged { .. }) {
            let what = "a package within a package";
            return Err(Refusal::Command { name: command.name(), what });
        }
        if self.form.has_address && matches!(command, Command::PostcopyAdvise(Some(_))) {
            let name = "x-ignore-shared".to_owned();
            let remedy = "switch it off, or postcopy-ram: they do not go together";
            return Err(Refusal::Capability { name, remedy });
        }
        Ok(())
    }

    fn start<'a>(&self, cursor: &mut Cursor<'a>) -> Read<'a> {
        let header = section_header(cursor)?;
        let refused = |refusal| Err(Stop::Refused(refusal));
        if header.id != RAM_ID {
            let remedy = remedy_for(header.id);
            return refused(Refusal::Section { id: header.id.to_owned(), remedy });
        }
        if header.version != RAM_VERSION {
            let (id, found) = (header.id.to_owned(), header.version);
            return refused(Refusal::Version { id, found, known: RAM_VERSION });
        }
        if self.ram.is_some() || self.scope != Scope::Connection {
            return refused(Refusal::Element { found: TYPE_START, place: "a second time" });
        }
        Ok(Element::Event(Event::SectionStart(header)))
    }

    fn part<'a>(&self, cursor: &mut Cursor<'a>) -> Read<'a> {
        let kind = cursor.u8()?;
        let found = cursor.u32()?;
        let ram = self.ram.as_ref().filter(|ram| !ram.is_complete);
        let Some(ram) = ram else {
            let place = "after the last part";
            return Err(Stop::Refused(Refusal::Element { found: kind, place }));
        };
        if found != ram.section {
            return Err(Stop::Refused(Refusal::SectionNumber { found, known: ram.section }));
        }
        Ok(Element::Event(match kind {
            TYPE_PART => Event::SectionPart(found),
            _ => Event::SectionEnd(found),
        }))
    }

    /// Takes note of an event that is handed out.
    pub(super) fn enter(&mut self, event: &Event<'_>) -> Result<(), Refusal> {
        match event {
            Event::Page(page) => {
                if let Some(ram) = &mut self.ram {
                    ram.current = Some(page.block);
                }
            }
            Event::EndOfRecords => {
                let (section, last) =
                    self.ram.as_ref().map_or((0, false), |ram| (ram.section, ram.is_last));
                self.place = Place::Footer { section, last };
            }
            Event::Footer(_) => {
                if let (Place::Footer { last: true, .. }, Some(ram)) = (self.place, &mut self.ram) {
                    ram.is_complete = true;
                }
                self.place = Place::Top;
            }
            Event::Header(configuration) => self.enter_stream(configuration)?,
            Event::Command(Command::PostcopyAdvise(Some(_))) => {
                self.form.may_have_page_size = true;
            }
            Event::Command(Command::Packaged { size_bytes }) => {
                self.enter_bytes(u64::from(*size_bytes), None);
            }
            Event::SectionStart(header) => {
                let (section, blocks) = (header.section, Arc::default());
                let (is_last, is_complete) = (false, false);
                self.ram = Some(Ram { section, blocks, current: None, is_last, is_complete });
                self.place = Place::BlockTotal;
            }
            Event::SectionPart(_) | Event::SectionEnd(_) => {
                if let Some(ram) = &mut self.ram {
                    ram.is_last = matches!(event, Event::SectionEnd(_));
                }
                self.place = Place::Records;
            }
            Event::SectionFull(header) => self.place = Place::Early { section: header.section },
            Event::EndOfState => self.place = Place::Ended,
            Event::Description(_) => self.place = Place::Over,
            Event::Command(_)
            | Event::RamBlocks(_)
            | Event::MultifdFlush
            | Event::Bytes(_)
            | Event::DeviceState(_) => {}
        }
        Ok(())
    }

    fn enter_stream(&mut self, configuration: &Configuration) -> Result<(), Refusal> {
        configuration.check_supported()?;
        self.form.has_address = configuration.ignores_shared();
        self.place = Place::Top;
        Ok(())
    }

    fn enter_bytes(&mut self, left: u64, then_footer: Option<u32>) {
        self.place = match then_footer {
            _ if left > 0 => Place::Bytes { left, then_footer },
            Some(section) => Place::Footer { section, last: false },
            None => Place::Top,
        };
    }

    /// Takes note of an element that is no event. The last of the blocks makes one of them all.
    pub(super) fn enter_silent(
        &mut self,
        element: Silent,
    ) -> Result<Option<Event<'static>>, Refusal> {
        match element {
            Silent::BlockTotal(0) => return Ok(self.enter_records()),
            Silent::BlockTotal(left_bytes) => self.place = Place::Block { left_bytes },
            Silent::Block(block) => {
                let Place::Block { left_bytes } = self.place else { return Ok(None) };
                let left_bytes = left_bytes.saturating_sub(block.length_bytes);
                if let Some(ram) = &mut self.ram {
                    Arc::make_mut(&mut ram.blocks).push(block)?;
                }
                self.place = Place::Block { left_bytes };
                if left_bytes == 0 {
                    return Ok(self.enter_records());
                }
            }
            Silent::EarlyBytes { section, length_bytes } => {
                self.enter_bytes(length_bytes, Some(section));
            }
            Silent::DeviceStateBegins => self.place = Place::DeviceState,
        }
        Ok(None)
    }

    fn enter_records(&mut self) -> Option<Event<'static>> {
        self.place = Place::Records;
        self.ram.as_ref().map(|ram| Event::RamBlocks(Arc::clone(&ram.blocks)))
    }

    /// So many of the [`Place::Bytes`] were handed out.
    pub(super) fn passed(&mut self, count: usize) {
        if let Place::Bytes { left, then_footer } = self.place {
            self.enter_bytes(left.saturating_sub(count as u64), then_footer);
        }
    }

    /// The device state is over: what follows is commands of a package, or the end.
    pub(super) fn end_device_state(&mut self) {
        self.place = Place::Top;
    }
}

fn header<'a>(cursor: &mut Cursor<'a>, bytes: &[u8]) -> Read<'a> {
    match Configuration::read(cursor, Following::More) {
        Ok(configuration) => Ok(Element::Event(Event::Header(configuration))),
        Err(Stop::Need(bytes)) => Err(Stop::Need(bytes)),
        Err(Stop::Refused(HeaderError::Magic)) => match channel::recognise(bytes) {
            Some(found) => {
                Err(Stop::Refused(found.refusal().unwrap_or_else(|| HeaderError::Magic.into())))
            }
            // Whether it is one of the others takes a few bytes more to see.
            None => Err(Stop::Need(channel::FIRST_BYTES)),
        },
        Err(Stop::Refused(error)) => Err(Stop::Refused(error.into())),
    }
}

/// Reads how a section begins, its type first.
pub(crate) fn section_header<'a>(
    cursor: &mut Cursor<'a>,
) -> Result<SectionHeader<'a>, Stop<Refusal>> {
    cursor.u8()?;
    let section = cursor.u32()?;
    let id = name(cursor.counted()?).ok_or(Stop::Refused(Refusal::Name { what: "a section" }))?;
    Ok(SectionHeader { section, id, instance: cursor.u32()?, version: cursor.u32()? })
}

/// A section as a whole before RAM is complete.
fn full<'a>(cursor: &mut Cursor<'a>) -> Read<'a> {
    let header = section_header(cursor)?;
    if header.id.ends_with(EARLY_SUFFIX) {
        return Ok(Element::Event(Event::SectionFull(header)));
    }
    let remedy = "unplug the device that sends its state early";
    Err(Stop::Refused(Refusal::Section { id: header.id.to_owned(), remedy }))
}

/// The length of virtio-mem's early section: address, region size, block size, node and plugged
/// size, then a bit a block in whole words.
fn early_bytes(cursor: &mut Cursor<'_>) -> Result<u64, Stop<Refusal>> {
    let _address = cursor.u64()?;
    let region_bytes = cursor.u64()?;
    let block_bytes = cursor.u64()?;
    cursor.take(12)?;
    let blocks = region_bytes.checked_div(block_bytes);
    let blocks =
        blocks.filter(|_| region_bytes <= RAM_BYTES_MAX && block_bytes >= EARLY_BLOCK_BYTES_MIN);
    let what = "a virtio-mem device has impossible sizes";
    let blocks = blocks.ok_or(Stop::Refused(Refusal::Blocks { what }))?;
    let words = blocks.div_ceil(u64::from(u64::BITS));
    Ok(words.saturating_mul(8).saturating_add(EARLY_FIELDS_BYTES))
}

fn footer<'a>(cursor: &mut Cursor<'a>, known: u32) -> Read<'a> {
    let kind = cursor.u8()?;
    if kind != TYPE_FOOTER {
        let place = "instead of a section's footer";
        return Err(Stop::Refused(Refusal::Element { found: kind, place }));
    }
    let found = cursor.u32()?;
    if found != known {
        return Err(Stop::Refused(Refusal::SectionNumber { found, known }));
    }
    Ok(Element::Event(Event::Footer(found)))
}

fn description<'a>(cursor: &mut Cursor<'a>) -> Read<'a> {
    if cursor.u8()? != TYPE_DESCRIPTION {
        return Err(Stop::Refused(Refusal::AfterEnd));
    }
    let length = cursor.u32()? as usize;
    if length > DESCRIPTION_BYTES_MAX {
        let (found, max) = (length as u64, DESCRIPTION_BYTES_MAX as u64);
        return Err(Stop::Refused(Refusal::TooLong { what: "The description", found, max }));
    }
    Ok(Element::Event(Event::Description(cursor.take(length)?)))
}

/// What to do about a section that comes in parts and is not RAM.
fn remedy_for(id: &str) -> &'static str {
    match id {
        "dirty-bitmap" => "switch the capability dirty-bitmaps off at both ends",
        "block" => "do not migrate disks within the stream; mirror them to the destination first",
        "slirp" => "use another network backend than user",
        _ if id.ends_with("/vfio") => "unplug the VFIO device before the migration",
        _ if id.starts_with("spapr") || id.starts_with("s390") || id == "todclock" => {
            "only x86-64 guests are supported"
        }
        _ => "unplug the device that it belongs to, or migrate this VM with QEMU alone",
    }
}
