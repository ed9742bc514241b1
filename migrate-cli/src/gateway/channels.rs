//! What a QEMU's connection is for, and which others belong to the same guest.
//!
//! ```text
//!   QEVM …              the stream of a guest
//!   a command …         the stream goes on, after its connection was broken in post-copy
//!   a page, or nothing  `postcopy-preempt`: pages that are asked for, beside a stream
//! ```
//!
//! Connections belong together if they came to the same socket or port. A connection beside a stream is opened at the
//! destination after that of the stream, which is how the QEMU there tells them apart; and before the guest is handed
//! over, since that of 7.2 wants it then.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use qemu_glue::stream::channel::{self, Channel};
use qemu_glue::stream::{HeaderError, StreamError};

use super::listen::Connected;
use super::socket::QemuSocket;
use crate::error::EngineError;

/// How long a connection says nothing until it counts as one beside a stream, if there is one.
const SILENT: Duration = Duration::from_millis(20);

/// How long a connection may say nothing while there is no stream.
const SILENT_MAX: Duration = Duration::from_secs(10);

/// Pause before a connection is looked at again.
const AGAIN_AFTER: Duration = Duration::from_millis(5);

/// How long a guest that is to be handed over waits for connections that are being opened.
const SETTLED_WITHIN: Duration = Duration::from_secs(5);

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The stream of a guest, from its beginning.
    Stream,
    /// The stream of a guest whose connection was broken.
    Resumed,
    /// Pages that are asked for.
    Urgent,
}

impl Kind {
    /// For people.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Stream => "",
            Self::Resumed => " (resumed)",
            Self::Urgent => " (pages asked for)",
        }
    }
}

#[derive(Debug, Default)]
struct Known {
    /// Streams that are open at the destination.
    streams: usize,
    /// Connections that are not open there, and are no streams as far as is known.
    pending: usize,
}

/// All connections of a gateway.
#[derive(Debug, Default)]
pub struct Channels {
    /// By where they came.
    known: Mutex<HashMap<String, Known>>,
    changed: Condvar,
}

/// A connection among them.
#[derive(Debug)]
pub struct Arrival {
    beside: Beside,
    counts_as: Option<Count>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Count {
    Stream,
    Pending,
}

/// The connections beside one.
#[derive(Debug, Clone)]
pub struct Beside {
    channels: Arc<Channels>,
    place: String,
}

impl Channels {
    /// A QEMU has connected.
    pub fn arrive(self: &Arc<Self>, connected: &Connected) -> Arrival {
        let place = match connected.port {
            0 => connected.name.clone(),
            port => port.to_string(),
        };
        let mut arrival =
            Arrival { beside: Beside { channels: Arc::clone(self), place }, counts_as: None };
        arrival.count_as(Some(Count::Pending));
        arrival
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Arrival {
    /// The connection is for that.
    pub fn is(&mut self, kind: Kind) {
        if kind != Kind::Urgent {
            self.count_as(None);
        }
    }

    /// The connection is open at the destination.
    pub fn opened(&mut self, kind: Kind) {
        self.count_as((kind != Kind::Urgent).then_some(Count::Stream));
    }

    /// The others.
    pub fn beside(&self) -> Beside {
        self.beside.clone()
    }

    fn count_as(&mut self, now: Option<Count>) {
        let before = std::mem::replace(&mut self.counts_as, now);
        let mut all = self.beside.channels.lock();
        let known = all.entry(self.beside.place.clone()).or_default();
        match before {
            Some(Count::Stream) => known.streams -= 1,
            Some(Count::Pending) => known.pending -= 1,
            None => {}
        }
        match now {
            Some(Count::Stream) => known.streams += 1,
            Some(Count::Pending) => known.pending += 1,
            None => {}
        }
        if known.streams == 0 && known.pending == 0 {
            all.remove(&self.beside.place);
        }
        drop(all);
        self.beside.channels.changed.notify_all();
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        self.count_as(None);
    }
}

impl Beside {
    /// No others: of a connection that nobody else can open.
    pub fn none() -> Self {
        Self { channels: Arc::default(), place: String::new() }
    }

    fn has_stream(&self) -> bool {
        self.channels.lock().get(&self.place).is_some_and(|known| known.streams > 0)
    }

    /// What a connection is for, once that is known. Blocks.
    ///
    /// # Errors
    /// [`EngineError::Stream`] with the remedy for what is not passed on, or if the connection ends.
    pub fn kind(&self, socket: &QemuSocket) -> Result<Kind, EngineError> {
        let arrived = Instant::now();
        loop {
            let mut first = [0; channel::FIRST_BYTES];
            let count = socket.peek(&mut first, AGAIN_AFTER).map_err(EngineError::QemuSocket)?;
            let first = first.get(..count.unwrap_or_default()).unwrap_or_default();
            let found = match count {
                Some(0) => {
                    let ended = io::Error::from(io::ErrorKind::UnexpectedEof);
                    return Err(EngineError::QemuSocket(ended));
                }
                Some(_) => channel::recognise(first),
                None if arrived.elapsed() >= SILENT && self.has_stream() => {
                    return Ok(Kind::Urgent);
                }
                None if arrived.elapsed() >= SILENT_MAX => {
                    let silent = "whoever connected said nothing";
                    let late = io::Error::new(io::ErrorKind::TimedOut, silent);
                    return Err(EngineError::QemuSocket(late));
                }
                None => continue,
            };
            match found {
                Some(Channel::Main) => return Ok(Kind::Stream),
                Some(Channel::Resumed) => return Ok(Kind::Resumed),
                Some(Channel::Preempt) if self.has_stream() => return Ok(Kind::Urgent),
                Some(other) => {
                    let refusal = other.refusal();
                    let refusal =
                        refusal.ok_or_else(|| EngineError::Internal("a stream".into()))?;
                    return Err(EngineError::Stream(StreamError { at_byte: 0, refusal }));
                }
                // A byte or two.
                None if arrived.elapsed() < SILENT_MAX => std::thread::sleep(AGAIN_AFTER),
                None => {
                    let refusal = HeaderError::Magic.into();
                    return Err(EngineError::Stream(StreamError { at_byte: 0, refusal }));
                }
            }
        }
    }

    /// Waits until all connections are open at the destination; not for ever, since anybody may have connected. Blocks.
    pub fn settle(&self) {
        let all = self.channels.lock();
        let is_pending = |all: &mut HashMap<String, Known>| {
            all.get(&self.place).is_some_and(|known| known.pending > 0)
        };
        let waited = self.channels.changed.wait_timeout_while(all, SETTLED_WITHIN, is_pending);
        let (_all, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            tracing::warn!(place = self.place, "a connection beside a guest's stream is not used");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (UnixStream, Connected) {
        let (theirs, ours) = UnixStream::pair().unwrap();
        let connected =
            Connected { socket: QemuSocket::Unix(ours), port: 0, name: "unix:/run/out".into() };
        (theirs, connected)
    }

    #[test]
    fn connections_tell_what_they_are_for() {
        let channels = Arc::new(Channels::default());
        let kind_of = |bytes: &[u8]| {
            let (mut theirs, connected) = pair();
            theirs.write_all(bytes).unwrap();
            let kind = channels.arrive(&connected).beside().kind(&connected.socket);
            kind.map_err(|error| error.tell())
        };
        assert_eq!(kind_of(b"QEVM\0\0\0\x03"), Ok(Kind::Stream));
        assert_eq!(kind_of(b"\x08\0\x0a\0\x07\x06pc.ram"), Ok(Kind::Resumed));
        let refused = |bytes: &[u8]| kind_of(bytes).unwrap_err();
        let page = b"\0\0\0\0\0\x0c\x10\x08\x06pc.ram";
        assert!(refused(page).contains("postcopy-preempt"), "{}", refused(page));
        assert!(refused(b"\x11\x22\x33\x44\0\0\0\x01").contains("multifd"));
        assert!(refused(b"GET / HTTP/1.1").contains("QEMU"), "{}", refused(b"GET / HTTP/1.1"));
        let (theirs, connected) = pair();
        drop(theirs);
        assert!(channels.arrive(&connected).beside().kind(&connected.socket).is_err());
        assert!(channels.lock().is_empty());
    }

    #[test]
    fn a_silent_connection_waits_for_a_stream_and_a_stream_for_it() {
        let channels = Arc::new(Channels::default());
        let (mut theirs, connected) = pair();
        let mut stream = channels.arrive(&connected);
        let (_silent, silent_here) = pair();
        let mut urgent = channels.arrive(&silent_here);
        let waiting = std::thread::spawn(move || {
            let kind = urgent.beside().kind(&silent_here.socket).unwrap();
            assert_eq!(kind, Kind::Urgent);
            std::thread::sleep(Duration::from_millis(50));
            urgent.opened(kind);
        });
        std::thread::sleep(SILENT * 3);
        assert!(!waiting.is_finished(), "there is no stream yet");
        theirs.write_all(b"QEVM\0\0\0\x03").unwrap();
        assert_eq!(stream.beside().kind(&connected.socket).unwrap(), Kind::Stream);
        stream.is(Kind::Stream);
        stream.opened(Kind::Stream);
        let began = Instant::now();
        stream.beside().settle();
        let took = began.elapsed();
        assert!((Duration::from_millis(40)..SETTLED_WITHIN).contains(&took), "{took:?}");
        waiting.join().unwrap();
        drop(stream);
        assert!(channels.lock().is_empty());
    }
}
