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

use std::io::{self, Cursor, Read};
use std::sync::Arc;
use std::time::Duration;

use migrate_core::codec_choice::Wanted;
use migrate_core::encode::PageCounts;
use migrate_core::layout::{BlockSpec, PAGE_BYTES, PageIndex, RamLayout};
use migrate_core::page_table::SourcePages;
use qemu_glue::stream::{BlockList, Command, Event, PageContent, PageRecord, Reader, Writer};
use tokio::sync::mpsc;
use transport::messages::STREAM_CHUNK_BYTES_MAX;

use super::encode::Encoder;
use super::socket::QemuSocket;
use crate::error::EngineError;
use crate::random;
use crate::source::gate::Gate;
use crate::source::outlet::LaneQueue;

/// How long nothing comes until what was taken is sent at once.
const QUIET: Duration = Duration::from_millis(1);

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
    /// These batches, by lane, come before what follows; with the digest of all versions, if no pages come behind it.
    Sync(Vec<u64>, Option<u64>),
    /// The stream is over.
    End,
}

/// How pages are to travel.
#[derive(Debug)]
pub struct Way {
    /// What was read of the stream already.
    pub first: Vec<u8>,
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
    /// The number of the section of RAM, once its list of blocks has ended.
    section: Option<u32>,
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
            section: None,
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
        let first = self.way.as_mut().map(|way| std::mem::take(&mut way.first));
        let mut stream = Cursor::new(first.unwrap_or_default()).chain(socket);
        let mut reader = Reader::open_ended();
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let count = read_some(&mut stream, &mut buffer).map_err(EngineError::QemuSocket)?;
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
            if let Some(encoder) = &mut self.encoder
                && socket.is_quiet(QUIET)
            {
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
                self.sync(true)?;
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
                self.section = Some(*section);
                self.write(event)?;
            }
            (Event::Footer(_), Within::End(_)) => {
                self.within = Within::Nothing;
                self.write(event)?;
            }
            (Event::Command(Command::EnableColo), _) => {
                let what =
                    "checkpoints: switch the capability x-colo off, gateways move guests once";
                return Err(EngineError::NotTaken(what));
            }
            _ => self.write(event)?,
        }
        Ok(())
    }

    /// Keeps what is to follow all pages that were taken.
    fn write(&mut self, event: &Event<'_>) -> Result<(), EngineError> {
        if self.has_pages {
            self.sync(false)?;
        }
        let written = self.writer.write(event, &mut self.bytes);
        written.map_err(|error| EngineError::Internal(error.to_string()))?;
        if self.bytes.len() >= STREAM_CHUNK_BYTES_MAX {
            self.send_bytes()?;
        }
        Ok(())
    }

    /// Sends all pages that were taken, and says which batches they are; and what is in place then, if they are the last.
    fn sync(&mut self, are_last: bool) -> Result<(), EngineError> {
        self.has_pages = false;
        let Some(encoder) = &mut self.encoder else { return Ok(()) };
        let batches = encoder.flush()?;
        let digest = are_last.then(|| encoder.digest());
        // Bytes from before them go before them.
        self.send_bytes()?;
        self.tell(Item::Sync(batches, digest))
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

    /// The first page is there. What came before it is sent before it may be.
    fn begin_pages(&mut self) -> Result<(), EngineError> {
        let (Some(layout), Some(section)) = (&self.layout, self.section) else {
            return Err(EngineError::NotTaken("pages before the list of blocks"));
        };
        let Some(way) = self.way.take() else {
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
        if self.encoder.is_none() {
            self.begin_pages()?;
        }
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

/// Reads what there is, however often a signal comes between.
fn read_some(stream: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match stream.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}
