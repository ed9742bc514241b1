//! Streams made by hand and at random.

#![expect(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "a test fails where it is wrong"
)]

mod answers;
mod ends;
mod names;
mod others;
mod random;
mod refusals;

use std::sync::Arc;

use super::*;

/// An event that owns what it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Owned {
    Plain(Event<'static>),
    Start(u32, String, u32, u32),
    Full(u32, String, u32, u32),
    Page(BlockIndex, u64, bool, Content),
    Discard(String, Vec<DiscardRange>),
    RecvBitmap(String),
    Bytes(Vec<u8>),
    DeviceState(Vec<u8>),
    Description(Vec<u8>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Content {
    Zero(u8),
    Whole(u8, Vec<u8>),
    Delta(Vec<u8>),
}

/// A page of one byte, but for its beginning.
pub(super) fn page_of(fill: u8, start: &[u8]) -> [u8; 4096] {
    let mut page = [fill; 4096];
    page[..start.len()].copy_from_slice(start);
    page
}

impl Owned {
    fn from(event: &Event<'_>) -> Self {
        let header = |header: &SectionHeader<'_>| {
            (header.section, header.id.to_owned(), header.instance, header.version)
        };
        match event {
            Event::SectionStart(start) => {
                let (section, id, instance, version) = header(start);
                Self::Start(section, id, instance, version)
            }
            Event::SectionFull(full) => {
                let (section, id, instance, version) = header(full);
                Self::Full(section, id, instance, version)
            }
            Event::Page(page) => {
                let content = match page.content {
                    PageContent::Zero { fill } => Content::Zero(fill),
                    PageContent::Whole(bytes) => {
                        let fill = bytes[4095];
                        let end = bytes.iter().rposition(|byte| *byte != fill);
                        Content::Whole(fill, bytes[..end.map_or(0, |end| end + 1)].to_vec())
                    }
                    PageContent::Xbzrle(delta) => Content::Delta(delta.to_vec()),
                };
                Self::Page(page.block, page.offset_bytes, page.continued, content)
            }
            Event::Command(Command::PostcopyRamDiscard(discard)) => {
                Self::Discard(discard.block.to_owned(), discard.ranges.to_vec())
            }
            Event::Command(Command::RecvBitmap { block }) => Self::RecvBitmap((*block).to_owned()),
            Event::Bytes(bytes) => Self::Bytes(bytes.to_vec()),
            Event::DeviceState(bytes) => Self::DeviceState(bytes.to_vec()),
            Event::Description(bytes) => Self::Description(bytes.to_vec()),
            Event::Header(configuration) => Self::Plain(Event::Header(configuration.clone())),
            Event::RamBlocks(blocks) => Self::Plain(Event::RamBlocks(Arc::clone(blocks))),
            Event::SectionPart(number) => Self::Plain(Event::SectionPart(*number)),
            Event::SectionEnd(number) => Self::Plain(Event::SectionEnd(*number)),
            Event::Footer(number) => Self::Plain(Event::Footer(*number)),
            Event::MultifdFlush => Self::Plain(Event::MultifdFlush),
            Event::EndOfRecords => Self::Plain(Event::EndOfRecords),
            Event::EndOfState => Self::Plain(Event::EndOfState),
            Event::Command(command) => Self::Plain(Event::Command(match command {
                Command::OpenReturnPath => Command::OpenReturnPath,
                Command::Ping(number) => Command::Ping(*number),
                Command::PostcopyAdvise(advise) => Command::PostcopyAdvise(*advise),
                Command::PostcopyListen => Command::PostcopyListen,
                Command::PostcopyRun => Command::PostcopyRun,
                Command::Packaged { size_bytes } => Command::Packaged { size_bytes: *size_bytes },
                Command::EnableColo => Command::EnableColo,
                Command::PostcopyResume => Command::PostcopyResume,
                _ => Command::SwitchoverStart,
            })),
        }
    }

    /// Calls `with` with the event that this is.
    fn with<T>(&self, with: impl FnOnce(&Event<'_>) -> T) -> T {
        let header = |section: &u32, id, instance: &u32, version: &u32| SectionHeader {
            section: *section,
            id,
            instance: *instance,
            version: *version,
        };
        match self {
            Self::Plain(event) => with(event),
            Self::Start(section, id, instance, version) => {
                with(&Event::SectionStart(header(section, id, instance, version)))
            }
            Self::Full(section, id, instance, version) => {
                with(&Event::SectionFull(header(section, id, instance, version)))
            }
            Self::Page(block, offset_bytes, continued, content) => {
                let whole;
                let content = match content {
                    Content::Zero(fill) => PageContent::Zero { fill: *fill },
                    Content::Whole(fill, start) => {
                        whole = page_of(*fill, start);
                        PageContent::Whole(&whole)
                    }
                    Content::Delta(delta) => PageContent::Xbzrle(delta),
                };
                let (block, offset_bytes, continued) = (*block, *offset_bytes, *continued);
                with(&Event::Page(PageRecord { block, offset_bytes, continued, content }))
            }
            Self::Discard(block, ranges) => {
                with(&Event::Command(Command::PostcopyRamDiscard(Discard { block, ranges })))
            }
            Self::RecvBitmap(block) => with(&Event::Command(Command::RecvBitmap { block })),
            Self::Bytes(bytes) => with(&Event::Bytes(bytes)),
            Self::DeviceState(bytes) => with(&Event::DeviceState(bytes)),
            Self::Description(bytes) => with(&Event::Description(bytes)),
        }
    }
}

/// The bytes of events.
pub(super) fn written(events: &[Owned]) -> Vec<u8> {
    let (mut writer, mut out) = (Writer::new(), Vec::new());
    for event in events {
        event.with(|event| writer.write(event, &mut out)).unwrap();
    }
    out
}

/// Reads pieces with a reader to the end; adjoining bytes that are not looked into are put together.
pub(super) fn read_with<'a>(
    reader: &mut Reader,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> Result<Vec<Owned>, StreamError> {
    let mut events = Vec::new();
    let mut take = |reader: &mut Reader, mut input: &[u8]| -> Result<(), StreamError> {
        while let Some(event) = reader.next(&mut input)? {
            match (events.last_mut(), Owned::from(&event)) {
                (Some(Owned::Bytes(before)), Owned::Bytes(more))
                | (Some(Owned::DeviceState(before)), Owned::DeviceState(more)) => {
                    before.extend(more);
                }
                (_, event) => events.push(event),
            }
        }
        assert!(input.is_empty(), "all input is taken");
        Ok(())
    };
    pieces.into_iter().try_for_each(|piece| take(reader, piece))?;
    reader.finish()?;
    take(reader, &[])?;
    Ok(events)
}

/// Reads a whole stream.
pub(super) fn read(bytes: &[u8]) -> Result<Vec<Owned>, StreamError> {
    read_with(&mut Reader::new(), [bytes])
}

/// What a stream is refused for.
pub(super) fn refusal(bytes: &[u8]) -> Refusal {
    let whole = read(bytes).unwrap_err();
    // In pieces it is the same.
    assert_eq!(read_with(&mut Reader::new(), bytes.chunks(1)).unwrap_err(), whole);
    whole.refusal
}

pub(super) fn configuration(capabilities: &[&str]) -> Configuration {
    let names: Vec<_> = capabilities.iter().map(|name| (*name).to_owned()).collect();
    let subsections = if names.is_empty() { vec![] } else { vec![Subsection::Capabilities(names)] };
    Configuration { machine: "pc-i440fx-7.2".to_owned(), subsections }
}

pub(super) fn block(name: &str, pages: u64) -> RamBlock {
    let (name, length_bytes) = (name.to_owned(), pages * 4096);
    RamBlock { name, length_bytes, page_bytes: None, address: None }
}

pub(super) fn list(blocks: Vec<RamBlock>) -> Arc<BlockList> {
    Arc::new(BlockList::new(blocks).unwrap())
}

/// Header, and the section `ram` with two blocks up to its first part.
pub(super) fn setup() -> Vec<Owned> {
    vec![
        Owned::Plain(Event::Header(configuration(&[]))),
        Owned::Start(2, RAM_ID.to_owned(), 0, RAM_VERSION),
        Owned::Plain(Event::RamBlocks(list(vec![block("pc.ram", 16), block("pc.bios", 2)]))),
        Owned::Plain(Event::EndOfRecords),
        Owned::Plain(Event::Footer(2)),
    ]
}

pub(super) fn zero(block: u16, page: u64, continued: bool) -> Owned {
    Owned::Page(BlockIndex(block), page * 4096, continued, Content::Zero(0))
}

/// A section as a whole with a footer: device state.
pub(super) fn device(body: &[u8]) -> Vec<u8> {
    [b"\x04\0\0\0\x05\x05timer\0\0\0\0\0\0\0\x02", body, b"\x7e\0\0\0\x05"].concat()
}

/// The last part of `ram`, without pages.
pub(super) fn end_of_ram() -> [Owned; 3] {
    [Event::SectionEnd(2), Event::EndOfRecords, Event::Footer(2)].map(Owned::Plain)
}
