//! A stream on its way from the source to a QEMU here, and what that QEMU says.
//!
//! Invariant: whichever way ends takes the other with it; the QEMU sees its connection end.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use migrate_core::layout::{PAGE_BYTES, RamLayout};
use migrate_core::page_table::DestinationPages;
use qemu_glue::stream::{BlockList, RamBlock};
use tokio::sync::mpsc;
use transport::messages::{
    Message, STREAM_CHUNK_BYTES_MAX, StreamBack, StreamBlocks, StreamEnd, Sync, Synced,
};

use super::ends::Ends;
use super::sink::{QemuOut, StreamSink};
use super::socket::{self, QemuSocket};
use crate::blocking::on_thread;
use crate::destination::intake::Intake;
use crate::error::EngineError;

/// How long what was said last is looked for once a session is over.
const LAST_WORD_WITHIN: Duration = Duration::from_secs(1);

/// Messages of the return path that may wait.
const BACKS: usize = 16;

/// A guest that comes in. Dropping it ends the connection to its QEMU.
pub struct Delivery {
    /// The QEMU.
    socket: QemuSocket,
    out: Arc<QemuOut>,
    intake: Option<Intake>,
    /// Where pages go, once they may come.
    sink: Option<Arc<StreamSink>>,
    pages: Arc<DestinationPages>,
    /// Bytes were written to the QEMU here.
    has_begun: bool,
    /// The source's QEMU has ended its stream.
    is_sent: bool,
    /// The QEMU here has said its last word.
    is_answered: bool,
}

impl std::fmt::Debug for Delivery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Delivery").field("is_sent", &self.is_sent).finish_non_exhaustive()
    }
}

impl Delivery {
    /// To the QEMU at the other end of the socket.
    ///
    /// # Errors
    /// If there are no descriptors left.
    pub fn new(socket: QemuSocket) -> Result<Self, EngineError> {
        let out = socket.another().map_err(EngineError::QemuSocket)?;
        Ok(Self {
            socket,
            out: Arc::new(QemuOut::new(out)),
            intake: None,
            sink: None,
            pages: Arc::new(DestinationPages::new(0)),
            has_begun: false,
            is_sent: false,
            is_answered: false,
        })
    }

    /// Passes everything on in both directions until both ends are done.
    ///
    /// # Errors
    /// Why the stream did not come to its end.
    pub async fn pass(&mut self, mut ends: Ends<'_>) -> Result<(), EngineError> {
        let passed = self.take(&mut ends).await;
        if let Some(intake) = &mut self.intake {
            if passed.is_err() {
                // Whoever writes to it is woken.
                self.socket.cut();
            }
            intake.stop().await;
        }
        passed
    }

    /// Of the versions of all pages that came.
    pub fn version_digest(&self) -> u64 {
        self.pages.digest()
    }

    async fn take(&mut self, ends: &mut Ends<'_>) -> Result<(), EngineError> {
        let (backs, mut inbox) = mpsc::channel(BACKS);
        let reading = self.socket.another().map_err(EngineError::QemuSocket)?;
        let _ends_with_the_socket =
            tokio::task::spawn_blocking(move || read_back(&reading, &backs));
        let over = ends.over();
        while !(self.is_sent && self.is_answered) {
            let applier = self.intake.as_ref().map(|intake| Arc::clone(intake.applier()));
            let failed = async {
                match applier {
                    Some(applier) => applier.failed().await,
                    None => std::future::pending().await,
                }
            };
            // What is waited for does not come any more once the session is over.
            let why = tokio::select! {
                stepped = self.step(ends, &mut inbox) => {
                    stepped?;
                    continue;
                }
                error = failed => return Err(error.into()),
                why = over.wait() => why,
            };
            let last = self.hear_rest(ends).await?;
            if !(self.is_sent && self.is_answered) {
                return Err(why.or(last).unwrap_or(EngineError::Cancelled));
            }
        }
        Ok(())
    }

    /// Hears what the source said before the session ended: that the stream is over, or why it gave up. What ends what
    /// is heard.
    async fn hear_rest(&mut self, ends: &mut Ends<'_>) -> Result<Option<EngineError>, EngineError> {
        let heard = async {
            loop {
                match ends.recv().await {
                    Ok(message @ (Message::StreamEnd(_) | Message::Abort(_))) => {
                        self.hear(message, ends).await?;
                    }
                    Ok(_) => {}
                    Err(error) => return Ok(Some(error)),
                }
            }
        };
        tokio::time::timeout(LAST_WORD_WITHIN, heard).await.unwrap_or(Ok(None))
    }

    async fn step(
        &mut self,
        ends: &mut Ends<'_>,
        inbox: &mut mpsc::Receiver<io::Result<Vec<u8>>>,
    ) -> Result<(), EngineError> {
        tokio::select! {
            message = ends.recv(), if !self.is_sent => self.hear(message?, ends).await,
            back = inbox.recv(), if !self.is_answered => {
                self.answer(back.transpose().map_err(EngineError::QemuSocket)?, ends).await
            }
        }
    }

    async fn hear(&mut self, message: Message, ends: &mut Ends<'_>) -> Result<(), EngineError> {
        match message {
            Message::StreamBytes(part) => {
                if !std::mem::replace(&mut self.has_begun, true) {
                    // Whatever else listens there is not written to.
                    socket::check_begins(&part.bytes)?;
                }
                let out = Arc::clone(&self.out);
                let written = on_thread(move || out.write(&part.bytes)).await?;
                written.map_err(EngineError::QemuSocket)
            }
            Message::StreamBlocks(blocks) => self.begin_pages(blocks, ends),
            Message::Sync(sync) => self.sync(sync, ends).await,
            Message::StreamPostcopy(_) => self.begin_postcopy(),
            Message::StreamEnd(_) => {
                self.is_sent = true;
                self.socket.end_writing();
                Ok(())
            }
            Message::Abort(abort) => {
                Err(EngineError::PeerAborted { code: abort.code, text: abort.text })
            }
            other => Err(EngineError::OutOfPlace { got: other.name(), wanted: "StreamBytes" }),
        }
    }

    fn begin_pages(&mut self, told: StreamBlocks, ends: &mut Ends<'_>) -> Result<(), EngineError> {
        if self.intake.is_some() {
            return Err(EngineError::OutOfPlace { got: "StreamBlocks", wanted: "StreamBytes" });
        }
        let blocks = told.blocks.iter().map(|block| RamBlock {
            name: block.name.clone(),
            length_bytes: block.length_bytes,
            page_bytes: None,
            address: None,
        });
        let list = BlockList::new(blocks.collect());
        let list = list.map_err(|error| EngineError::Contradiction(error.to_string()))?;
        let layout = RamLayout::new(told.blocks)?;
        self.pages = Arc::new(DestinationPages::new(layout.bytes() / PAGE_BYTES as u64));
        let sink = StreamSink::new(layout, list, told.section, Arc::clone(&self.out));
        let sink = Arc::new(sink);
        self.sink = Some(Arc::clone(&sink));
        self.intake = Some(ends.begin_pages(sink, Arc::clone(&self.pages)));
        Ok(())
    }

    fn begin_postcopy(&self) -> Result<(), EngineError> {
        let (Some(intake), Some(sink)) = (&self.intake, &self.sink) else {
            return Err(EngineError::OutOfPlace { got: "StreamPostcopy", wanted: "StreamBlocks" });
        };
        tracing::info!("the guest is handed over by post-copy");
        sink.begin_postcopy();
        intake.applier().await_pages();
        Ok(())
    }

    async fn sync(&self, sync: Sync, ends: &Ends<'_>) -> Result<(), EngineError> {
        if sync.batches.len() != ends.lane_count() {
            let what = format!("how far {} lanes are", sync.batches.len());
            return Err(EngineError::Contradiction(what));
        }
        match &self.intake {
            Some(intake) => intake.applier().reach(&sync.batches).await?,
            // Of a connection without pages.
            None if sync.batches.iter().all(|batches| *batches == 0) => {}
            None => return Err(EngineError::OutOfPlace { got: "Sync", wanted: "StreamBlocks" }),
        }
        let (sequence, version_digest) = (sync.sequence, self.pages.digest());
        ends.send(Message::Synced(Synced { sequence, version_digest })).await
    }

    /// Passes on what the QEMU here said, or that it says nothing more.
    async fn answer(&mut self, back: Option<Vec<u8>>, ends: &Ends<'_>) -> Result<(), EngineError> {
        let message = match back {
            Some(bytes) => Message::StreamBack(StreamBack { bytes }),
            None => {
                self.is_answered = true;
                Message::StreamEnd(StreamEnd {})
            }
        };
        ends.send(message).await
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        self.socket.cut();
    }
}

/// Reads what a QEMU says until it ends the connection.
fn read_back(socket: &QemuSocket, backs: &mpsc::Sender<io::Result<Vec<u8>>>) {
    let mut buffer = vec![0; STREAM_CHUNK_BYTES_MAX];
    loop {
        let back = match socket.read_some(&mut buffer) {
            Ok(0) => return,
            Ok(count) => Ok(buffer.get(..count).unwrap_or_default().to_vec()),
            Err(error) => Err(error),
        };
        let is_over = back.is_err();
        if backs.blocking_send(back).is_err() || is_over {
            return;
        }
    }
}
