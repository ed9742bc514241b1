//! What a QEMU sends of its guest, taken apart: pages to the lanes, everything else in order to the other gateway.
//!
//! ```text
//!   header, commands, START ram ─► bytes ──────────────┐
//!   PART ram ─► pages ─► encoder ─► lanes              ├─► items, in this order
//!   END ram ─► pages ─► all of them sent ─► sync ──────┤
//!   device state ─► bytes ─────────────────────────────┘
//! ```
//!
//! The parts of the section `ram` are not kept: the other gateway makes parts of what arrives. Invariant: bytes that
//! follow pages in the stream come behind a [`Item::Sync`] with all batches of these pages.

use std::io::Read;
use std::sync::Arc;

use migrate_core::codec_choice::Wanted;
use migrate_core::encode::PageCounts;
use migrate_core::layout::{BlockSpec, PAGE_BYTES, PageIndex, RamLayout};
use migrate_core::page_table::SourcePages;
use qemu_glue::stream::{BlockList, Event, PageContent, PageRecord, Reader, Writer};
use tokio::sync::mpsc;
use transport::messages::STREAM_CHUNK_BYTES_MAX;

use super::encode::Encoder;
use super::socket::QemuSocket;
use crate::error::EngineError;
use crate::random;
use crate::source::gate::Gate;
use crate::source::outlet::LaneQueue;

/// Bytes that are read at a time.
const READ_BYTES: usize = 1 << 20;

/// What is to be told to the other gateway, in this order.
#[derive(Debug)]
pub enum Item {
    /// Bytes of the stream: at most [`STREAM_CHUNK_BYTES_MAX`].
    Bytes(Vec<u8>),
    /// The guest's RAM: pages follow.
    Blocks {
        /// The number of the section.
        section: u32,
        /// The blocks.
        blocks: Vec<BlockSpec>,
    },
    /// These batches, by lane, come before what follows; with the digest of all versions then.
    Sync(Vec<u64>, u64),
    /// The stream is over.
    End,
}

/// How pages are to travel.
#[derive(Debug)]
pub struct Way {
    /// The lanes' queues.
    pub lanes: Vec<LaneQueue>,
    /// Back-pressure.
    pub gate: Arc<Gate>,
    /// Codecs.
    pub wanted: Wanted,
    /// Memory for deltas in bytes; none are made without.
    pub delta_bytes_max: u64,
}

/// What came of a stream, for the report.
#[derive(Debug, Clone, Copy, Default)]
pub struct Taken {
    /// Bytes that QEMU sent.
    pub stream_bytes: u64,
    /// Bytes of the guest's RAM.
    pub ram_bytes: u64,
    /// What became of its pages.
    pub counts: PageCounts,
}

/// What part of the section `ram` is being read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Within {
    /// None.
    Nothing,
    /// The first, which lists the blocks.
    Start,
    /// One of pages, which is not kept.
    Part,
    /// The last one, of the section with this number.
    End(u32),
}

/// Takes a stream apart. Blocks.
#[derive(Debug)]
pub struct StreamIntake {
    items: mpsc::Sender<Item>,
    /// Until the encoder takes it over.
    way: Option<Way>,
    encoder: Option<Encoder>,
    writer: Writer,
    bytes: Vec<u8>,
    within: Within,
    layout: Option<RamLayout>,
    /// Pages were taken since the last [`Item::Sync`].
    has_pages: bool,
    taken: Taken,
}

impl StreamIntake {
    /// Pages will go this `way`, everything else to `items`.
    pub fn new(items: mpsc::Sender<Item>, way: Way) -> Self {
        Self {
            items,
            way: Some(way),
            encoder: None,
            writer: Writer::new(),
            bytes: vec![],
            within: Within::Nothing,
            layout: None,
            has_pages: false,
            taken: Taken::default(),
        }
    }

    /// Reads until QEMU ends the connection.
    ///
    /// # Errors
    /// [`EngineError::Stream`] if the stream carries what a gateway does not take, with the remedy; or if QEMU or a
    /// lane is gone.
    pub fn run(&mut self, socket: &QemuSocket) -> Result<(), EngineError> {
        let mut socket = socket;
        let mut reader = Reader::open_ended();
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let count = socket.read(&mut buffer).map_err(EngineError::QemuSocket)?;
            let mut input = buffer.get(..count).unwrap_or_default();
            self.taken.stream_bytes += count as u64;
            if count == 0 {
                reader.finish()?;
            }
            while let Some(event) = reader.next(&mut input)? {
                self.take(&event)?;
            }
            self.send_bytes()?;
            if count == 0 {
                return self.tell(Item::End);
            }
            if count < READ_BYTES / 2
                && let Some(encoder) = &mut self.encoder
            {
                // QEMU has no more at the moment.
                encoder.flush()?;
            }
        }
    }

    /// What came so far.
    pub fn taken(&self) -> Taken {
        let counts = self.encoder.as_ref().map(Encoder::counts).unwrap_or_default();
        Taken { counts, ..self.taken }
    }

    fn take(&mut self, event: &Event<'_>) -> Result<(), EngineError> {
        match (event, self.within) {
            (Event::Page(page), Within::Part | Within::End(_)) => return self.page(page),
            (Event::Page(_), _) => {
                return Err(EngineError::NotTaken("pages before the list of blocks has ended"));
            }
            (Event::MultifdFlush, _) => {
                let what = "multifd: switch the capability off, the gateway's lanes replace it";
                return Err(EngineError::NotTaken(what));
            }
            (Event::SectionPart(_), _) => self.within = Within::Part,
            (Event::EndOfRecords, Within::Part) => {}
            (Event::Footer(_), Within::Part) => self.within = Within::Nothing,
            // It begins where its pages have all been sent.
            (Event::SectionEnd(section), _) => self.within = Within::End(*section),
            (Event::EndOfRecords, Within::End(section)) => {
                self.write(&Event::SectionEnd(section))?;
                self.write(event)?;
            }
            (Event::SectionStart(_), _) => {
                self.within = Within::Start;
                self.write(event)?;
            }
            (Event::RamBlocks(blocks), _) => {
                self.layout = Some(layout(blocks)?);
                self.write(event)?;
            }
            (Event::Footer(section), Within::Start) => {
                self.within = Within::Nothing;
                self.write(event)?;
                self.begin_pages(*section)?;
            }
            (Event::Footer(_), Within::End(_)) => {
                self.within = Within::Nothing;
                self.write(event)?;
            }
            _ => self.write(event)?,
        }
        Ok(())
    }

    /// Keeps what is to follow all pages that were taken.
    fn write(&mut self, event: &Event<'_>) -> Result<(), EngineError> {
        if std::mem::take(&mut self.has_pages)
            && let Some(encoder) = &mut self.encoder
        {
            let batches = encoder.flush()?;
            let digest = encoder.digest();
            self.tell(Item::Sync(batches, digest))?;
        }
        let written = self.writer.write(event, &mut self.bytes);
        written.map_err(|error| EngineError::Internal(error.to_string()))?;
        if self.bytes.len() >= STREAM_CHUNK_BYTES_MAX {
            self.send_bytes()?;
        }
        Ok(())
    }

    fn send_bytes(&mut self) -> Result<(), EngineError> {
        let bytes = std::mem::take(&mut self.bytes);
        let chunks = bytes.chunks(STREAM_CHUNK_BYTES_MAX);
        chunks.map(<[u8]>::to_vec).try_for_each(|chunk| self.tell(Item::Bytes(chunk)))
    }

    fn tell(&self, item: Item) -> Result<(), EngineError> {
        // The session is over, and its own error says why.
        self.items.blocking_send(item).map_err(|_| EngineError::Cancelled)
    }

    /// The list of blocks has ended: pages may go.
    fn begin_pages(&mut self, section: u32) -> Result<(), EngineError> {
        let (Some(layout), Some(way)) = (&self.layout, self.way.take()) else {
            return Err(EngineError::NotTaken("RAM that comes a second time"));
        };
        let (pages, blocks) = (layout.pages(), layout.blocks().to_vec());
        self.taken.ram_bytes = layout.bytes();
        self.send_bytes()?;
        self.tell(Item::Blocks { section, blocks })?;
        let table = SourcePages::new(pages, false, random::number()?).with_zeros();
        let table = match way.delta_bytes_max {
            0 => table,
            bytes => table.with_deltas(way.lanes.len(), bytes),
        };
        self.encoder = Some(Encoder::start(Arc::new(table), way.gate, way.lanes, way.wanted));
        Ok(())
    }

    fn page(&mut self, page: &PageRecord<'_>) -> Result<(), EngineError> {
        let (Some(layout), Some(encoder)) = (&self.layout, &mut self.encoder) else {
            return Err(EngineError::NotTaken("pages before the list of blocks"));
        };
        let first = layout.block_pages(usize::from(page.block.0)).start;
        let number = PageIndex(first + page.offset_bytes / PAGE_BYTES as u64);
        self.has_pages = true;
        match page.content {
            PageContent::Zero { fill: 0 } => encoder.push(number, None)?,
            PageContent::Zero { fill } => encoder.push(number, Some(&[fill; PAGE_BYTES]))?,
            PageContent::Whole(content) => encoder.push(number, Some(content))?,
            PageContent::Xbzrle(_) => {
                let what = "xbzrle: switch the capability off, the gateway's deltas replace it";
                return Err(EngineError::NotTaken(what));
            }
        }
        Ok(())
    }
}

/// The blocks as both gateways number their pages.
fn layout(blocks: &BlockList) -> Result<RamLayout, EngineError> {
    let blocks = blocks.blocks().iter().map(|block| BlockSpec {
        name: block.name.clone(),
        length_bytes: block.length_bytes,
        page_bytes: PAGE_BYTES as u64,
    });
    Ok(RamLayout::new(blocks.collect())?)
}
