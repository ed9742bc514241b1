//! Writes a stream.

use std::sync::Arc;

use super::DESCRIPTION_BYTES_MAX;
use super::blocks::{BlockIndex, BlockList};
use super::error::{WriteError, fits, put_name};
use super::event::{Event, SectionHeader};
use super::grammar::{
    TYPE_DESCRIPTION, TYPE_END, TYPE_FOOTER, TYPE_FULL, TYPE_PART, TYPE_SECTION_END, TYPE_START,
};
use super::record::{self, PageRecord};

/// Turns events into the bytes of a stream.
///
/// The events of a stream that was read give the same bytes. Where pages are dropped, put in
/// between or replaced, names are put right: a page goes without its block's name only if it may
/// ([`PageRecord::continued`]) and the page written before it was of the same block. The order of
/// events is the caller's; a [`Reader`](super::Reader) accepts what is in order.
#[derive(Debug, Default)]
pub struct Writer {
    blocks: Option<Arc<BlockList>>,
    /// The block of the page before.
    current: Option<BlockIndex>,
}

impl Writer {
    /// For a stream from its first byte on, or for the contents of a package.
    pub fn new() -> Self {
        Self::default()
    }

    /// For the connection that takes over after one was broken in post-copy.
    pub fn resumed(blocks: Arc<BlockList>) -> Self {
        Self { blocks: Some(blocks), current: None }
    }

    /// Adds an event's bytes to `out`.
    ///
    /// # Errors
    /// [`WriteError`] if the event cannot be written. Then nothing was added.
    pub fn write(&mut self, event: &Event<'_>, out: &mut Vec<u8>) -> Result<(), WriteError> {
        let start = out.len();
        let written = self.put(event, out);
        if written.is_err() {
            out.truncate(start);
        }
        written
    }

    fn put(&mut self, event: &Event<'_>, out: &mut Vec<u8>) -> Result<(), WriteError> {
        match event {
            Event::Page(page) => return self.page(page, out),
            Event::Header(configuration) => configuration.write(out)?,
            Event::Command(command) => command.write(out)?,
            Event::SectionStart(header) => section(TYPE_START, header, out)?,
            Event::SectionFull(header) => section(TYPE_FULL, header, out)?,
            Event::SectionPart(number) => numbered(TYPE_PART, *number, out),
            Event::SectionEnd(number) => numbered(TYPE_SECTION_END, *number, out),
            Event::Footer(number) => numbered(TYPE_FOOTER, *number, out),
            Event::RamBlocks(blocks) => {
                blocks.write(out)?;
                self.blocks = Some(Arc::clone(blocks));
                self.current = None;
            }
            Event::MultifdFlush => out.extend_from_slice(&record::MULTIFD_FLUSH),
            Event::EndOfRecords => out.extend_from_slice(&record::END),
            Event::Bytes(bytes) | Event::DeviceState(bytes) => out.extend_from_slice(bytes),
            Event::EndOfState => out.push(TYPE_END),
            Event::Description(text) => {
                fits("The description", text.len(), DESCRIPTION_BYTES_MAX)?;
                numbered(TYPE_DESCRIPTION, text.len() as u32, out);
                out.extend_from_slice(text);
            }
        }
        Ok(())
    }

    fn page(&mut self, page: &PageRecord<'_>, out: &mut Vec<u8>) -> Result<(), WriteError> {
        page.write(self.blocks.as_deref(), self.current, out)?;
        self.current = Some(page.block);
        Ok(())
    }
}

fn numbered(kind: u8, number: u32, out: &mut Vec<u8>) {
    out.push(kind);
    out.extend_from_slice(&number.to_be_bytes());
}

fn section(kind: u8, header: &SectionHeader<'_>, out: &mut Vec<u8>) -> Result<(), WriteError> {
    numbered(kind, header.section, out);
    put_name("A section's name", header.id, out)?;
    out.extend_from_slice(&header.instance.to_be_bytes());
    out.extend_from_slice(&header.version.to_be_bytes());
    Ok(())
}
