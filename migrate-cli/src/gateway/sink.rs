//! Pages into the stream of the QEMU that loads the guest.
//!
//! Each batch becomes parts of the section `ram` that stand by themselves: they begin with the name of a block. So
//! batches of several lanes may follow each other in any order, with other bytes of the stream between them. A delta
//! of lines becomes one of XBZRLE, which that QEMU applies to the page that it has.

use std::fmt;
use std::io::{self, IoSlice, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use migrate_core::delta::LINE_BYTES;
use migrate_core::layout::{PAGE_BYTES, PageIndex, RamLayout};
use migrate_core::xbzrle::{self, Encoded};
use parking_lot::{Mutex, MutexGuard};
use qemu_glue::stream::{BlockIndex, BlockList, PageContent, PageRecord, RamParts, Writer};

use super::socket::QemuSocket;
use crate::destination::apply::ApplyError;
use crate::destination::sink::{PageSink, PageWriter, Take};

/// Bytes of the stream from which on they are written before a batch is through: a batch of zeros becomes many.
const HELD_BYTES: usize = 1 << 20;

/// The connection to the QEMU, for whoever writes to it.
#[derive(Debug)]
pub struct QemuOut(Mutex<QemuSocket>);

impl QemuOut {
    /// Over this connection.
    pub fn new(socket: QemuSocket) -> Self {
        Self(Mutex::new(socket))
    }

    /// Writes bytes that belong together, in turn with others who do. Blocks while QEMU takes nothing.
    ///
    /// # Errors
    /// If the connection has ended.
    pub fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let socket = self.0.lock();
        let written = (&*socket).write_all(bytes);
        // A page that the guest waits for does not wait for more than what waits already.
        MutexGuard::unlock_fair(socket);
        written
    }
}

/// Takes the pages of a guest whose RAM is this.
pub struct StreamSink {
    layout: RamLayout,
    blocks: Arc<BlockList>,
    section: u32,
    out: Arc<QemuOut>,
    /// The guest is handed over by post-copy.
    is_handed_over: AtomicBool,
    /// Room for the bytes of a batch that was written.
    spare: Mutex<Vec<Vec<u8>>>,
}

impl fmt::Debug for StreamSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamSink").field("section", &self.section).finish_non_exhaustive()
    }
}

impl StreamSink {
    /// For the stream's section of RAM with this number, whose blocks those of the layout are.
    pub fn new(layout: RamLayout, blocks: BlockList, section: u32, out: Arc<QemuOut>) -> Self {
        let (blocks, is_handed_over) = (Arc::new(blocks), AtomicBool::new(false));
        Self { layout, blocks, section, out, is_handed_over, spare: Mutex::default() }
    }

    /// From now on, QEMU takes pages only as wholes: it holds nothing of those that come.
    pub fn begin_postcopy(&self) {
        self.is_handed_over.store(true, Ordering::Release);
    }
}

impl PageSink for StreamSink {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn begin(&self) -> Box<dyn PageWriter + '_> {
        Box::new(BatchWriter {
            sink: self,
            writer: Writer::resumed(Arc::clone(&self.blocks)),
            parts: RamParts::new(self.section),
            bytes: self.spare.lock().pop().unwrap_or_default(),
        })
    }
}

/// The parts that a batch becomes.
struct BatchWriter<'a> {
    sink: &'a StreamSink,
    writer: Writer,
    parts: RamParts,
    bytes: Vec<u8>,
}

impl BatchWriter<'_> {
    fn page(&mut self, page: PageIndex, content: PageContent<'_>) -> Result<(), ApplyError> {
        let place = self.sink.layout.locate(page);
        let record = place.and_then(|place| {
            let block = BlockIndex(u16::try_from(place.block).ok()?);
            Some(PageRecord { block, offset_bytes: place.offset_bytes, continued: true, content })
        });
        let record = record.ok_or(ApplyError::Length)?;
        let written = self.parts.page(&mut self.writer, &record, &mut self.bytes);
        written.map_err(|error| ApplyError::Stream(io::Error::other(error)))?;
        match self.bytes.len() >= HELD_BYTES {
            true => self.write_out(),
            false => Ok(()),
        }
    }

    /// Writes the parts so far, which stand by themselves.
    fn write_out(&mut self) -> Result<(), ApplyError> {
        let closed = self.parts.close(&mut self.writer, &mut self.bytes);
        closed.map_err(|error| ApplyError::Stream(io::Error::other(error)))?;
        self.sink.out.write(&self.bytes).map_err(ApplyError::Stream)?;
        self.bytes.clear();
        Ok(())
    }
}

impl PageWriter for BatchWriter<'_> {
    fn zeros(&mut self, first: PageIndex, pages: u64) -> Result<(), ApplyError> {
        (first.0..first.0 + pages)
            .try_for_each(|page| self.page(PageIndex(page), PageContent::Zero { fill: 0 }))
    }

    fn whole(&mut self, first: PageIndex, contents: &mut [IoSlice<'_>]) -> Result<(), ApplyError> {
        let (mut page, mut begun) = (first.0, Vec::new());
        for piece in contents.iter() {
            let mut piece: &[u8] = piece;
            while !piece.is_empty() {
                let whole = piece.split_first_chunk().filter(|_| begun.is_empty());
                if let Some((content, rest)) = whole {
                    self.page(PageIndex(page), PageContent::Whole(content))?;
                    piece = rest;
                } else {
                    let missing = PAGE_BYTES.saturating_sub(begun.len()).min(piece.len());
                    let (taken, rest) = piece.split_at(missing);
                    begun.extend_from_slice(taken);
                    piece = rest;
                    let Some(content) = begun.first_chunk::<PAGE_BYTES>().copied() else {
                        continue;
                    };
                    self.page(PageIndex(page), PageContent::Whole(&content))?;
                    begun.clear();
                }
                page += 1;
            }
        }
        Ok(())
    }

    fn delta(&mut self, page: PageIndex, mask: u64, take: Take<'_, '_>) -> Result<(), ApplyError> {
        if self.sink.is_handed_over.load(Ordering::Acquire) {
            return Err(ApplyError::DeltaOfMissing(page));
        }
        let bytes = mask.count_ones() as usize * LINE_BYTES;
        let pieces = take(bytes).ok_or(ApplyError::Length)?;
        let joined: Vec<u8>;
        let lines: &[u8] = match pieces.as_slice() {
            [lines] => lines,
            pieces => {
                joined = pieces.iter().flat_map(|piece| piece.iter().copied()).collect();
                &joined
            }
        };
        let mut room = [0; PAGE_BYTES];
        match xbzrle::from_lines(mask, lines, &mut room) {
            Encoded::Delta(bytes) => {
                let delta = room.get(..bytes).unwrap_or_default();
                self.page(page, PageContent::Xbzrle(delta))
            }
            // A source sends such a page whole.
            Encoded::Unchanged | Encoded::Overflow => Err(ApplyError::EmptyDelta(page)),
        }
    }

    fn same(&mut self, page: PageIndex, _of: PageIndex) -> Result<(), ApplyError> {
        Err(ApplyError::ReferenceInStream(page))
    }

    fn end(mut self: Box<Self>) -> Result<(), ApplyError> {
        self.write_out()?;
        self.sink.spare.lock().push(self.bytes);
        Ok(())
    }
}
