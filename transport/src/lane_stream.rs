//! The streams of bytes beneath lanes: QUIC's or TCP's, which carry the same.
//!
//! Operations on TCP connections end with the session, whose control connection is the one that
//! notices a dead peer and hears the reason of a close.

use bytes::Bytes;
use quinn::{RecvStream, SendStream};

use crate::closer::Closer;
use crate::control::{StreamError, read_exact};
use crate::error::WireError;
use crate::payload::{Collector, Payload};
use crate::tcp::{TcpIn, TcpOut};

/// Where a lane's batches are written to.
#[derive(Debug)]
pub(crate) enum Outlet {
    Quic(SendStream),
    Tcp(Box<TcpOut>),
}

impl Outlet {
    /// Writes all pieces; they are in a send buffer when this returns.
    pub(crate) async fn write_all(
        &mut self,
        mut pieces: Vec<Bytes>,
        closer: &Closer,
    ) -> Result<(), StreamError> {
        match self {
            Self::Quic(stream) => Ok(stream.write_all_chunks(&mut pieces).await?),
            Self::Tcp(stream) => tokio::select! {
                biased;
                written = stream.write_all(pieces) => written.map_err(StreamError::Broken),
                error = closer.control_closed() => Err(StreamError::Lost(error)),
            },
        }
    }

    /// Ends the stream and waits until the peer has everything.
    pub(crate) async fn finish(&mut self, closer: &Closer) -> Result<(), StreamError> {
        match self {
            Self::Quic(stream) => {
                // An error says that the stream is finished already.
                let _finished = stream.finish();
                match stream.stopped().await {
                    Ok(None) => Ok(()),
                    Ok(Some(code)) => Err(StreamError::Cut(code.into_inner())),
                    Err(quinn::StoppedError::ConnectionLost(error)) => {
                        Err(StreamError::Lost(error))
                    }
                    Err(quinn::StoppedError::ZeroRttRejected) => Err(StreamError::Interrupted),
                }
            }
            Self::Tcp(stream) => tokio::select! {
                biased;
                finished = stream.finish() => finished.map_err(StreamError::Broken),
                error = closer.control_closed() => Err(StreamError::Lost(error)),
            },
        }
    }
}

/// Where a lane's batches are read from.
#[derive(Debug)]
pub(crate) enum Inlet {
    Quic(RecvStream),
    Tcp(Box<TcpIn>),
}

impl Inlet {
    /// Fills `bytes`; a clean end before the first byte is [`StreamError::Ended`].
    pub(crate) async fn read_exact(
        &mut self,
        bytes: &mut [u8],
        what: &'static str,
        closer: &Closer,
    ) -> Result<(), StreamError> {
        match self {
            Self::Quic(stream) => read_exact(stream, bytes, what).await,
            Self::Tcp(stream) => tokio::select! {
                biased;
                read = stream.read_exact(bytes, what) => read,
                error = closer.control_closed() => Err(StreamError::Lost(error)),
            },
        }
    }

    /// Reads `needed` bytes, which were checked against a limit.
    pub(crate) async fn read_bytes(
        &mut self,
        needed: usize,
        what: &'static str,
        closer: &Closer,
    ) -> Result<Payload, StreamError> {
        match self {
            Self::Quic(stream) => read_chunks(stream, needed, what).await,
            Self::Tcp(stream) => tokio::select! {
                biased;
                read = stream.read_bytes(needed, what) => read,
                error = closer.control_closed() => Err(StreamError::Lost(error)),
            },
        }
    }

    /// Acknowledges the stream's end, where the transport does not do so by itself.
    pub(crate) async fn answer_end(&mut self) {
        if let Self::Tcp(stream) = self {
            stream.answer_end().await;
        }
    }

    /// Makes sure that the sender learns that nothing is read any more.
    pub(crate) fn abandon(&mut self) {
        if let Self::Tcp(stream) = self {
            stream.handle().close();
        }
    }
}

/// Reads without copying.
async fn read_chunks(
    stream: &mut RecvStream,
    needed: usize,
    what: &'static str,
) -> Result<Payload, StreamError> {
    let mut bytes = Collector::default();
    while bytes.len() < needed {
        let available = bytes.len();
        let Some(chunk) = stream.read_chunk(needed - available, true).await? else {
            return Err(StreamError::Wire(WireError::Truncated { what, needed, available }));
        };
        bytes.push(chunk.bytes);
    }
    Ok(bytes.finish())
}
