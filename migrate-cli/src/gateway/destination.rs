//! One guest's way in: from the other gateway to the QEMU that waits for it here.

use std::io::{self, Read};
use std::sync::Arc;
use std::time::Duration;

use migrate_core::layout::{PAGE_BYTES, RamLayout};
use migrate_core::page_table::DestinationPages;
use qemu_glue::stream::{BlockList, RamBlock};
use tokio::sync::mpsc;
use transport::messages::{
    self, FEATURE_STREAM, Message, Refuse, RefuseCode, STREAM_CHUNK_BYTES_MAX, StreamBack,
    StreamBlocks, StreamEnd, StreamOpen, StreamOpened, Sync, Synced,
};
use transport::{Closer, ControlSender, DestinationSession, LaneReceiver, close_code};

use super::addr::QemuAddr;
use super::sink::{QemuOut, StreamSink};
use super::socket::{self, QemuSocket};
use crate::blocking::on_thread;
use crate::destination::intake::Intake;
use crate::error::EngineError;

/// Longest wait for the first word.
const OPEN_WITHIN: Duration = Duration::from_secs(10);

/// Longest wait for a QEMU to listen: who starts it may be about to.
const REACHED_WITHIN: Duration = Duration::from_secs(10);

/// How long what was said last is looked for once a session is over.
const LAST_WORD_WITHIN: Duration = Duration::from_secs(1);

/// Messages of the return path that may wait.
const BACKS: usize = 16;

/// Takes a guest in; what went wrong.
///
/// # Errors
/// Anything that kept it from being handed to its QEMU in good order.
pub async fn receive(session: DestinationSession, qemu: &QemuAddr) -> Result<(), EngineError> {
    let (closer, sender) = (session.closer.clone(), session.control_sender.clone());
    let taken = Box::pin(run(session, qemu)).await;
    match &taken {
        Ok(()) => {
            // The other gateway closes once it has heard the last word.
            let _closed = tokio::time::timeout(OPEN_WITHIN, closer.closed()).await;
        }
        Err(EngineError::Refused { code, text }) => {
            let refuse = Refuse { code: *code, text: messages::text(text) };
            let _gone = sender.send(&Message::Refuse(refuse)).await;
            let _closed = tokio::time::timeout(OPEN_WITHIN, closer.closed()).await;
        }
        Err(error) => {
            let (code, text) = (error.abort_code(), messages::text(&error.tell()));
            let abort = messages::Abort { code, text: text.clone() };
            let _gone = sender.send(&Message::Abort(abort)).await;
            closer.close(close_code::ABORTED, &text).await;
        }
    }
    taken
}

async fn run(mut session: DestinationSession, qemu: &QemuAddr) -> Result<(), EngineError> {
    let open = opened(&mut session).await?;
    let socket = tokio::select! {
        reached = reach(qemu, &open) => reached?,
        // A QEMU that begins to listen for another guest is not taken.
        lost = session.closer.closed() => return Err(lost.into()),
    };
    tracing::info!(name = open.name, port = open.port, "a guest comes in");
    let result = async {
        session.control_sender.send(&Message::StreamOpened(StreamOpened {})).await?;
        let out = socket.another().map_err(EngineError::QemuSocket)?;
        let mut arrival = Arrival {
            out: Arc::new(QemuOut::new(out)),
            lane_count: session.lanes.len(),
            lanes: session.lanes,
            sender: session.control_sender,
            closer: session.closer,
            intake: None,
            sink: None,
            pages: Arc::new(DestinationPages::new(0)),
            has_begun: false,
            is_sent: false,
            is_answered: false,
        };
        let taken = arrival.take(&mut session.control_receiver, &socket).await;
        if let Some(intake) = &mut arrival.intake {
            if taken.is_err() {
                // Whoever writes to it is woken.
                socket.cut();
            }
            intake.stop().await;
        }
        taken
    };
    let taken = result.await;
    socket.cut();
    taken
}

async fn opened(session: &mut DestinationSession) -> Result<StreamOpen, EngineError> {
    let first = tokio::time::timeout(OPEN_WITHIN, session.control_receiver.recv()).await;
    let late = |_| EngineError::TooSlow {
        wanted: "a word about the guest",
        seconds: OPEN_WITHIN.as_secs(),
    };
    match first.map_err(late)?? {
        Message::StreamOpen(open) if session.selected.features & FEATURE_STREAM != 0 => Ok(open),
        _ => Err(EngineError::Refused {
            code: RefuseCode::NoPlace,
            text:
                "this is a gateway: start `migrate receive` for `migrate send` and `migrate split`"
                    .into(),
        }),
    }
}

async fn reach(qemu: &QemuAddr, open: &StreamOpen) -> Result<QemuSocket, EngineError> {
    let refuse = |text| Err(EngineError::Refused { code: RefuseCode::NoPlace, text });
    let Some(port) = qemu.port_for(open.port) else {
        return refuse(match open.port {
            0 => format!(
                "the source's QEMU uses a Unix socket: name the port of the one here, --qemu {qemu}:PORT"
            ),
            port => format!("port {port} is none of --qemu {qemu}"),
        });
    };
    match socket::connect(qemu, port, REACHED_WITHIN).await {
        Ok(socket) => Ok(socket),
        Err(error) => refuse(format!("no QEMU listens at {qemu}, port {port}: {error}")),
    }
}

/// A guest that comes in.
struct Arrival {
    out: Arc<QemuOut>,
    /// Until pages may come.
    lanes: Vec<LaneReceiver>,
    lane_count: usize,
    sender: ControlSender,
    closer: Closer,
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

impl Arrival {
    /// Passes everything on in both directions until both ends are done.
    async fn take(
        &mut self,
        control: &mut transport::ControlReceiver,
        socket: &QemuSocket,
    ) -> Result<(), EngineError> {
        let (backs, mut inbox) = mpsc::channel(BACKS);
        let reading = socket.another().map_err(EngineError::QemuSocket)?;
        let _ends_with_the_socket =
            tokio::task::spawn_blocking(move || read_back(&reading, &backs));
        let closer = self.closer.clone();
        while !(self.is_sent && self.is_answered) {
            let applier = self.intake.as_ref().map(|intake| Arc::clone(intake.applier()));
            let failed = async {
                match applier {
                    Some(applier) => applier.failed().await,
                    None => std::future::pending().await,
                }
            };
            // What is waited for does not come any more once the session is over.
            let over = tokio::select! {
                stepped = self.step(control, &mut inbox, socket) => {
                    stepped?;
                    continue;
                }
                error = failed => return Err(error.into()),
                lost = closer.closed() => EngineError::from(lost),
            };
            return Err(last_word(control).await.unwrap_or(over));
        }
        Ok(())
    }

    async fn step(
        &mut self,
        control: &mut transport::ControlReceiver,
        inbox: &mut mpsc::Receiver<io::Result<Vec<u8>>>,
        socket: &QemuSocket,
    ) -> Result<(), EngineError> {
        tokio::select! {
            message = control.recv(), if !self.is_sent => self.hear(message?, socket).await,
            back = inbox.recv(), if !self.is_answered => {
                self.answer(back.transpose().map_err(EngineError::QemuSocket)?).await
            }
        }
    }

    async fn hear(&mut self, message: Message, socket: &QemuSocket) -> Result<(), EngineError> {
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
            Message::StreamBlocks(blocks) => self.begin_pages(blocks),
            Message::Sync(sync) => self.sync(sync).await,
            Message::StreamPostcopy(_) => self.begin_postcopy(),
            Message::StreamEnd(_) => {
                self.is_sent = true;
                socket.end_writing();
                Ok(())
            }
            Message::Abort(abort) => {
                Err(EngineError::PeerAborted { code: abort.code, text: abort.text })
            }
            other => Err(EngineError::OutOfPlace { got: other.name(), wanted: "StreamBytes" }),
        }
    }

    fn begin_pages(&mut self, told: StreamBlocks) -> Result<(), EngineError> {
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
        let (pages, lanes) = (Arc::clone(&self.pages), std::mem::take(&mut self.lanes));
        let sender = self.sender.clone();
        self.intake = Some(Intake::start(sink, pages, lanes, sender, &self.closer));
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

    async fn sync(&self, sync: Sync) -> Result<(), EngineError> {
        if sync.batches.len() != self.lane_count {
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
        Ok(self.sender.send(&Message::Synced(Synced { sequence, version_digest })).await?)
    }

    /// Passes on what the QEMU here said, or that it says nothing more.
    async fn answer(&mut self, back: Option<Vec<u8>>) -> Result<(), EngineError> {
        let message = match back {
            Some(bytes) => Message::StreamBack(StreamBack { bytes }),
            None => {
                self.is_answered = true;
                Message::StreamEnd(StreamEnd {})
            }
        };
        Ok(self.sender.send(&message).await?)
    }
}

/// Why the other gateway gave up, if it said so before the session ended.
async fn last_word(control: &mut transport::ControlReceiver) -> Option<EngineError> {
    let aborted = async {
        loop {
            match control.recv().await {
                Ok(Message::Abort(abort)) => {
                    return Some(EngineError::PeerAborted { code: abort.code, text: abort.text });
                }
                Ok(_) => {}
                Err(_) => return None,
            }
        }
    };
    tokio::time::timeout(LAST_WORD_WITHIN, aborted).await.ok().flatten()
}

/// Reads what a QEMU says until it ends the connection.
fn read_back(socket: &QemuSocket, backs: &mpsc::Sender<io::Result<Vec<u8>>>) {
    let (mut socket, mut buffer) = (socket, vec![0; STREAM_CHUNK_BYTES_MAX]);
    loop {
        let back = match socket.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => Ok(buffer.get(..count).unwrap_or_default().to_vec()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => Err(error),
        };
        let is_over = back.is_err();
        if backs.blocking_send(back).is_err() || is_over {
            return;
        }
    }
}
