//! What a QEMU sends of its guest, taken apart: pages to the lanes, everything else in order to the other gateway.
//!
//! ```text
//!   header, commands, START ram ─► bytes ──────────────┐
//!   PART ram ─► pages ─► encoder ─► lanes              ├─► items, in this order
//!   END ram ─► pages ─► all of them sent ─► sync ──────┤
//!   device state ─► bytes ─────────────────────────────┘
//!
//!   post-copy: discards, package ─► bytes, sync ─► answer: written there ─► pages ─► server ─► lanes
//! ```
//!
//! The parts of the section `ram` are not kept: the other gateway makes parts of what arrives. Invariants: bytes that
//! follow pages in the stream come behind an [`Item::Sync`] with all batches of these pages; pages that follow the
//! commands of post-copy leave when the other gateway has said that these were written.

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use migrate_core::codec_choice::Wanted;
use migrate_core::encode::PageCounts;
use migrate_core::layout::{BlockSpec, PAGE_BYTES, PageIndex, RamLayout};
use migrate_core::page_table::SourcePages;
use qemu_glue::stream::{BlockList, Command, Event, PageContent, PageRecord, Reader, Writer};
use tokio::sync::mpsc;
use transport::messages::STREAM_CHUNK_BYTES_MAX;

use super::channels::Beside;
use super::encode::Encoder;
use super::postcopy::Server;
use super::requests::Requests;
use super::socket::QemuSocket;
use crate::error::EngineError;
use crate::random;
use crate::source::gate::Gate;
use crate::source::outlet::LaneQueue;
use crate::source::unused::streamed::Streamed;

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
    /// The guest is handed over by post-copy.
    Postcopy,
    /// These batches, by lane, come before what follows.
    Sync {
        /// The batches.
        batches: Vec<u64>,
        /// The digest of all versions then, if no pages come behind it until it was confirmed.
        digest: Option<u64>,
        /// Told when it was.
        done: Option<SyncSender<()>>,
    },
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
    /// Tells what need not be sent.
    pub unused: Option<Arc<Streamed>>,
    /// What the destination asks for.
    pub requests: Arc<Requests>,
    /// Other connections of the same guest.
    pub beside: Beside,
    /// Of the idle link.
    pub round_trip: Duration,
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
    /// Pages that went before others because the guest waited for them.
    pub urgent_pages: u64,
}

/// Who takes pages.
#[derive(Debug)]
enum Pages {
    /// Nobody.
    None,
    /// The guest runs here.
    Before(Encoder),
    /// It was handed over by post-copy.
    After(Server),
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
    wanted: Wanted,
    round_trip: Duration,
    requests: Arc<Requests>,
    beside: Beside,
    pages: Pages,
    /// The commands of post-copy have begun: pages that come are those that the destination lacks.
    is_handed_over: bool,
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
            wanted: way.wanted,
            round_trip: way.round_trip,
            requests: Arc::clone(&way.requests),
            beside: way.beside.clone(),
            way: Some(way),
            pages: Pages::None,
            is_handed_over: false,
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
        let mut reader = Reader::open_ended();
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let count = socket.read_some(&mut buffer).map_err(EngineError::QemuSocket)?;
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
            if let Pages::Before(encoder) = &mut self.pages
                && socket.is_quiet(QUIET)
            {
                encoder.flush()?;
            }
        }
    }

    /// What came so far.
    pub fn taken(&self) -> Taken {
        let counts = match &self.pages {
            Pages::None => PageCounts::default(),
            Pages::Before(encoder) => encoder.counts(),
            Pages::After(server) => server.counts(),
        };
        Taken { counts, urgent_pages: self.requests.backlog().urgent_pages(), ..self.taken }
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
            (Event::Command(command), _) => {
                self.command(command)?;
                self.write(event)?;
            }
            (Event::SectionPart(_), _) => self.within = Within::Part,
            (Event::EndOfRecords, Within::Part) => {}
            (Event::Footer(_), Within::Part) => self.within = Within::Nothing,
            // It begins where its pages have all been sent.
            (Event::SectionEnd(section), _) => self.within = Within::End(*section),
            (Event::EndOfRecords, Within::End(section)) => {
                self.look_again()?;
                self.sync(true, None)?;
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
            _ => self.write(event)?,
        }
        Ok(())
    }

    fn command(&mut self, command: &Command<'_>) -> Result<(), EngineError> {
        match command {
            // Refused while the guest runs here; later it would be lost.
            Command::PostcopyAdvise(Some(advise)) if advise.ram_page_sizes != PAGE_BYTES as u64 => {
                let what = "post-copy of huge pages: switch the capability postcopy-ram off, or give the guest RAM of \
                            4 KiB pages";
                Err(EngineError::NotTaken(what))
            }
            Command::EnableColo => {
                let what =
                    "checkpoints: switch the capability x-colo off, gateways move guests once";
                Err(EngineError::NotTaken(what))
            }
            Command::PostcopyRamDiscard(_)
            | Command::PostcopyListen
            | Command::PostcopyRun
            | Command::Packaged { .. } => {
                if !std::mem::replace(&mut self.is_handed_over, true) {
                    self.look_again()?;
                    self.beside.settle();
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The guest is stopped: pages that were left out and are used now.
    fn look_again(&mut self) -> Result<(), EngineError> {
        if let Pages::Before(encoder) = &mut self.pages {
            self.has_pages |= encoder.look_again()?;
        }
        Ok(())
    }

    /// Keeps what is to follow all pages that were taken.
    fn write(&mut self, event: &Event<'_>) -> Result<(), EngineError> {
        if self.has_pages {
            self.sync(false, None)?;
        }
        let written = self.writer.write(event, &mut self.bytes);
        written.map_err(|error| EngineError::Internal(error.to_string()))?;
        if self.bytes.len() >= STREAM_CHUNK_BYTES_MAX {
            self.send_bytes()?;
        }
        Ok(())
    }

    /// Sends all pages that were taken, and says which batches they are; and what is in place then, if they are the last.
    fn sync(&mut self, are_last: bool, done: Option<SyncSender<()>>) -> Result<(), EngineError> {
        self.has_pages = false;
        let (batches, digest) = match &mut self.pages {
            Pages::None => return Ok(()),
            Pages::Before(encoder) => (encoder.flush()?, encoder.digest()),
            Pages::After(server) => (server.flush()?, server.digest()),
        };
        // Bytes from before them go before them.
        self.send_bytes()?;
        self.tell(Item::Sync { batches, digest: are_last.then_some(digest), done })
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
        self.requests.begin(layout.clone());
        if let Some(unused) = &way.unused {
            unused.begin(layout);
        }
        self.send_bytes()?;
        self.tell(Item::Blocks { section, blocks })?;
        let table = SourcePages::new(pages, false, random::number()?).with_zeros();
        let table = match way.delta_bytes_max {
            0 => table,
            bytes => table.with_deltas(way.lanes.len(), bytes),
        };
        self.pages =
            Pages::Before(Encoder::start(table, way.gate, way.lanes, way.wanted, way.unused));
        Ok(())
    }

    /// Waits until what handed the guest over was written at the destination: pages that came there before would be
    /// dropped with those that are out of date.
    fn begin_postcopy(&mut self) -> Result<(), EngineError> {
        self.send_bytes()?;
        self.tell(Item::Postcopy)?;
        let (done, is_done) = sync_channel(1);
        self.sync(true, Some(done))?;
        // The session is over, and its own error says why.
        is_done.recv().map_err(|_| EngineError::Cancelled)?;
        let layout = self.layout.as_ref().map_or(0, RamLayout::pages);
        self.requests.backlog().begin(layout);
        if let Pages::Before(encoder) = std::mem::replace(&mut self.pages, Pages::None) {
            let (requests, wanted) = (Arc::clone(&self.requests), self.wanted);
            let server = Server::start(encoder.finish()?, requests, wanted, self.round_trip)?;
            self.pages = Pages::After(server);
        }
        Ok(())
    }

    fn page(&mut self, page: &PageRecord<'_>) -> Result<(), EngineError> {
        if let Pages::None = self.pages {
            self.begin_pages()?;
        }
        if self.is_handed_over && !matches!(self.pages, Pages::After(_)) {
            self.begin_postcopy()?;
        }
        let Some(layout) = &self.layout else {
            return Err(EngineError::NotTaken("pages before the list of blocks"));
        };
        let first = layout.block_pages(usize::from(page.block.0)).start;
        let number = PageIndex(first + page.offset_bytes / PAGE_BYTES as u64);
        self.has_pages = true;
        match page.content {
            PageContent::Zero { fill: 0 } => self.pages.push(number, None)?,
            PageContent::Zero { fill } => self.pages.push(number, Some(&[fill; PAGE_BYTES]))?,
            PageContent::Whole(content) => self.pages.push(number, Some(content))?,
            PageContent::Xbzrle(_) => {
                let what = "xbzrle: switch the capability off, the gateway's deltas replace it";
                return Err(EngineError::NotTaken(what));
            }
        }
        Ok(())
    }
}

impl Pages {
    fn push(
        &mut self,
        page: PageIndex,
        content: Option<&[u8; PAGE_BYTES]>,
    ) -> Result<(), EngineError> {
        let taken = match self {
            Self::None => return Err(EngineError::NotTaken("pages before the list of blocks")),
            Self::Before(encoder) => encoder.push(page, content),
            Self::After(server) => server.push(page, content),
        };
        Ok(taken?)
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
