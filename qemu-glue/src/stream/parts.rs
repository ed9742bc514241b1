//! Writes pages of one's own as parts of section `ram`.

use super::error::WriteError;
use super::event::Event;
use super::record::PageRecord;
use super::writer::Writer;

/// Longest part in bytes before the next one is begun: QEMU's destination answers its monitor only
/// between some records of a part, and a page that is asked for in post-copy waits for the part
/// before it.
pub const PART_BYTES_MAX: usize = 1 << 20;

/// Groups pages into parts of the section `ram`.
///
/// Between [`close`](Self::close) and the next page, anything else may be written, such as events
/// of a stream that is forwarded.
#[derive(Debug)]
pub struct RamParts {
    section: u32,
    part_bytes_max: usize,
    /// Bytes of the part that has been begun.
    open_bytes: Option<usize>,
}

impl RamParts {
    /// For the section `ram` with this number.
    pub fn new(section: u32) -> Self {
        Self::with_limit(section, PART_BYTES_MAX)
    }

    /// The same with a limit of its own in bytes; every part has a page at least.
    pub fn with_limit(section: u32, part_bytes_max: usize) -> Self {
        Self { section, part_bytes_max, open_bytes: None }
    }

    /// Writes a page, and what must come before it: the end of a part that has become too long, the
    /// beginning of one.
    ///
    /// # Errors
    /// [`WriteError`] as [`Writer::write`]; the page was not written.
    pub fn page(
        &mut self,
        writer: &mut Writer,
        page: &PageRecord<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), WriteError> {
        if self.open_bytes.is_some_and(|bytes| bytes >= self.part_bytes_max) {
            self.close(writer, out)?;
        }
        if self.open_bytes.is_none() {
            writer.write(&Event::SectionPart(self.section), out)?;
            self.open_bytes = Some(0);
        }
        let before = out.len();
        writer.write(&Event::Page(*page), out)?;
        let written = out.len().saturating_sub(before);
        self.open_bytes = self.open_bytes.map(|bytes| bytes.saturating_add(written));
        Ok(())
    }

    /// Ends the part that has been begun, if one has.
    ///
    /// # Errors
    /// None that a writer has for these events.
    pub fn close(&mut self, writer: &mut Writer, out: &mut Vec<u8>) -> Result<(), WriteError> {
        if self.open_bytes.take().is_some() {
            writer.write(&Event::EndOfRecords, out)?;
            writer.write(&Event::Footer(self.section), out)?;
        }
        Ok(())
    }

    /// Ends the section: no page may follow.
    ///
    /// # Errors
    /// None that a writer has for these events.
    pub fn end(mut self, writer: &mut Writer, out: &mut Vec<u8>) -> Result<(), WriteError> {
        self.close(writer, out)?;
        writer.write(&Event::SectionEnd(self.section), out)?;
        writer.write(&Event::EndOfRecords, out)?;
        writer.write(&Event::Footer(self.section), out)
    }
}
