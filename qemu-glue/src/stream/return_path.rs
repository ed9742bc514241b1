//! What the destination tells the source on the same connection (migration/migration.c,
//! `migrate_send_rp_*`, `source_return_path_thread`).
//!
//! ```text
//! be16 type | be16 length | body            and, behind a RECV_BITMAP, outside of any length:
//! be64 size | bitmap | be64 0x0123456789abcdef
//!
//!             ┌──────────────── end mark ────────────────┐
//!  message ───┴─ RECV_BITMAP ─► size ─► bits (size) ─► end mark
//! ```
//!
//! Invariants: no message is longer than QEMU's source takes; bitmaps pass in pieces and are never
//! held.

use migrate_core::error::{Classify, ErrorBin};
use migrate_core::layout::{PAGE_BYTES, RAM_BYTES_MAX};
use thiserror::Error;

use super::cursor::{Cursor, Gather, Need, Stop, name};
use super::error::{WriteError, fits, put_name};

/// Longest body of a message in bytes, as in QEMU's source.
pub const BODY_BYTES_MAX: usize = 512;

/// Longest bitmap in bytes: a bit a page of the largest guest.
pub const BITMAP_BYTES_MAX: u64 = RAM_BYTES_MAX / PAGE_BYTES as u64 / 8;

/// `RAMBLOCK_RECV_BITMAP_ENDING`.
const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;

/// A message, or a part of the bitmap behind one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReturnMessage<'a> {
    /// The destination is done: with success if 0.
    Shut {
        /// What went wrong, by a number without a fixed meaning.
        error: u32,
    },
    /// The answer to a `PING` with its number.
    Pong(u32),
    /// Pages on which the guest waits.
    RequestPages(PageRequest<'a>),
    /// A bitmap of the pages of this block that have arrived follows: its size, bits, end.
    RecvBitmap {
        /// The RAM block.
        block: &'a str,
    },
    /// Size of the bitmap in bytes, a multiple of 8.
    BitmapSize(u64),
    /// Bytes of the bitmap, in pieces of any size; the first page is the lowest bit of the first
    /// byte.
    BitmapBits(&'a [u8]),
    /// The bitmap was complete.
    BitmapEnd,
    /// After a broken connection: the destination goes on. QEMU sends 1.
    ResumeAck(u32),
    /// The source may stop the guest (8.1 and later).
    SwitchoverAck,
}

/// Which pages the destination asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRequest<'a> {
    /// Their RAM block; nothing if it is that of the request before.
    pub block: Option<&'a str>,
    /// Where they begin in it, in bytes.
    pub start_bytes: u64,
    /// Their length in bytes: one page of the block.
    pub length_bytes: u32,
}

/// The return path is damaged.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("The destination's answers cannot be used from byte {at_byte} on")]
pub struct ReturnError {
    /// Where the message begins that was refused, in bytes from the first one.
    pub at_byte: u64,
    /// Why.
    #[source]
    pub refusal: ReturnRefusal,
}

/// What is wrong with a message.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ReturnRefusal {
    /// A message that neither 7.2 nor 10.0 has.
    #[error("Message {number} is not known; is the destination a QEMU newer than 10.0?")]
    Unknown {
        /// Its number.
        number: u16,
    },
    /// A message of another length than its kind has.
    #[error("Message {name} is damaged: its length is {found}")]
    Length {
        /// Which one.
        name: &'static str,
        /// Its length in bytes.
        found: u16,
    },
    /// A name is empty or not readable.
    #[error("Message {name} is damaged: its RAM block has no readable name")]
    Name {
        /// Which one.
        name: &'static str,
    },
    /// Pages of the same block as before, but there was none.
    #[error("The first request for pages does not name their RAM block")]
    NothingBefore,
    /// A bitmap's size is not one of whole words, or above the limit.
    #[error("A bitmap has {found} bytes; up to {BITMAP_BYTES_MAX} are read, in words of 8")]
    BitmapSize {
        /// The size in bytes.
        found: u64,
    },
    /// The end mark is missing.
    #[error("A bitmap is not followed by its end mark")]
    BitmapEnd,
    /// It ends within a message.
    #[error("The connection ended within a message")]
    Cut,
    /// The reader has refused before.
    #[error("An answer was refused here before; open another connection, with a new reader")]
    Stopped,
}

impl Classify for ReturnError {
    fn bin(&self) -> ErrorBin {
        match self.refusal {
            ReturnRefusal::Unknown { .. } => ErrorBin::PeerIncompatible,
            ReturnRefusal::Cut => ErrorBin::System,
            ReturnRefusal::Stopped => ErrorBin::CallerMisuse,
            _ => ErrorBin::PeerMisbehaved,
        }
    }
}

const SHUT: u16 = 1;
const PONG: u16 = 2;
const REQ_PAGES_ID: u16 = 3;
const REQ_PAGES: u16 = 4;
const RECV_BITMAP: u16 = 5;
const RESUME_ACK: u16 = 6;
const SWITCHOVER_ACK: u16 = 7;

/// Bytes of a request for pages without a name.
const REQUEST_BYTES: u16 = 12;

/// Name and, where it is the same for all, length of a message's body in bytes.
fn known(number: u16) -> Option<(&'static str, Option<u16>)> {
    Some(match number {
        SHUT => ("SHUT", Some(4)),
        PONG => ("PONG", Some(4)),
        REQ_PAGES_ID => ("REQ_PAGES_ID", None),
        REQ_PAGES => ("REQ_PAGES", Some(REQUEST_BYTES)),
        RECV_BITMAP => ("RECV_BITMAP", None),
        RESUME_ACK => ("RESUME_ACK", Some(4)),
        SWITCHOVER_ACK => ("SWITCHOVER_ACK", Some(0)),
        _ => return None,
    })
}

/// Where the reader stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Message,
    BitmapSize,
    Bits { left: u64 },
    BitmapEnd,
}

/// What is known between two messages.
#[derive(Debug)]
struct Progress {
    place: Place,
    at_byte: u64,
    /// A request has named a block.
    has_block: bool,
    stopped: bool,
}

/// Takes the return path in pieces of any size and hands out its messages.
#[derive(Debug)]
pub struct ReturnReader {
    progress: Progress,
    gather: Gather,
}

type Read<'a> = Result<(ReturnMessage<'a>, usize), Stop<ReturnRefusal>>;

impl Default for ReturnReader {
    fn default() -> Self {
        Self::new()
    }
}

impl ReturnReader {
    /// For a return path from its first byte on.
    pub fn new() -> Self {
        let progress =
            Progress { place: Place::Message, at_byte: 0, has_block: false, stopped: false };
        Self { progress, gather: Gather::default() }
    }

    /// How many bytes have been handed out.
    pub fn at_byte(&self) -> u64 {
        self.progress.at_byte
    }

    /// How much memory a message takes that waits for its rest, in bytes.
    pub fn held_capacity_bytes(&self) -> usize {
        self.gather.capacity_bytes()
    }

    /// The next message; nothing if more input is needed. Takes what it uses off the front of
    /// `input`, and all of it when it returns nothing.
    ///
    /// # Errors
    /// [`ReturnError`] if a message is damaged or not known. From then on every call says so.
    pub fn next<'e, 'i: 'e>(
        &'e mut self,
        input: &mut &'i [u8],
    ) -> Result<Option<ReturnMessage<'e>>, ReturnError> {
        self.progress.check()?;
        self.gather.clear_spent();
        if let Place::Bits { left } = self.progress.place {
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(input.len());
            let (bits, rest) = input.split_at(most);
            *input = rest;
            return Ok(self.progress.bits(left, bits));
        }
        let place = self.progress.place;
        if self.gather.is_empty() {
            match read(place, input) {
                Err(Stop::Need(_)) => {
                    self.gather.take_all(input);
                    return Ok(None);
                }
                found => {
                    let (message, length) = self.progress.enter(found)?;
                    *input = input.get(length..).unwrap_or_default();
                    return Ok(Some(message));
                }
            }
        }
        while let Err(Stop::Need(bytes)) = read(place, self.gather.bytes()) {
            if !self.gather.fill(bytes, input) {
                return Ok(None);
            }
        }
        // It has been filled with exactly one message.
        let all = self.gather.bytes().len();
        let (message, _) = self.progress.enter(read(place, self.gather.spend(all)))?;
        Ok(Some(message))
    }

    /// The connection was closed.
    ///
    /// # Errors
    /// [`ReturnRefusal::Cut`] if that was within a message.
    pub fn finish(&mut self) -> Result<(), ReturnError> {
        self.progress.check()?;
        if self.progress.place != Place::Message || !self.gather.is_empty() {
            return Err(self.progress.stop(ReturnRefusal::Cut));
        }
        Ok(())
    }
}

impl Progress {
    fn check(&self) -> Result<(), ReturnError> {
        match self.stopped {
            true => Err(ReturnError { at_byte: self.at_byte, refusal: ReturnRefusal::Stopped }),
            false => Ok(()),
        }
    }

    fn stop(&mut self, refusal: ReturnRefusal) -> ReturnError {
        self.stopped = true;
        ReturnError { at_byte: self.at_byte, refusal }
    }

    /// Takes note of what was found, if it can be handed out.
    fn enter<'a>(&mut self, found: Read<'a>) -> Result<(ReturnMessage<'a>, usize), ReturnError> {
        let (message, length) = match found {
            Ok(found) => found,
            Err(Stop::Refused(refusal)) => return Err(self.stop(refusal)),
            Err(Stop::Need(_)) => return Err(self.stop(ReturnRefusal::Cut)),
        };
        match message {
            ReturnMessage::RequestPages(request) => {
                self.has_block |= request.block.is_some();
                if !self.has_block {
                    return Err(self.stop(ReturnRefusal::NothingBefore));
                }
            }
            ReturnMessage::RecvBitmap { .. } => self.place = Place::BitmapSize,
            ReturnMessage::BitmapSize(0) => self.place = Place::BitmapEnd,
            ReturnMessage::BitmapSize(left) => self.place = Place::Bits { left },
            ReturnMessage::BitmapEnd => self.place = Place::Message,
            _ => {}
        }
        self.at_byte = self.at_byte.saturating_add(length as u64);
        Ok((message, length))
    }

    /// Hands out bits of a bitmap, of which `left` bytes are left.
    fn bits<'a>(&mut self, left: u64, bits: &'a [u8]) -> Option<ReturnMessage<'a>> {
        if bits.is_empty() {
            return None;
        }
        let left = left.saturating_sub(bits.len() as u64);
        self.place = if left == 0 { Place::BitmapEnd } else { Place::Bits { left } };
        self.at_byte = self.at_byte.saturating_add(bits.len() as u64);
        Some(ReturnMessage::BitmapBits(bits))
    }
}

fn read(place: Place, bytes: &[u8]) -> Read<'_> {
    let mut cursor = Cursor::new(bytes);
    let message = match place {
        Place::Message => ReturnMessage::read(&mut cursor)?,
        Place::BitmapSize => match cursor.u64()? {
            size if size.is_multiple_of(8) && size <= BITMAP_BYTES_MAX => {
                ReturnMessage::BitmapSize(size)
            }
            found => return Err(Stop::Refused(ReturnRefusal::BitmapSize { found })),
        },
        // Handed out without being read.
        Place::Bits { .. } => return Err(Stop::Need(bytes.len())),
        Place::BitmapEnd => match cursor.u64()? {
            BITMAP_END => ReturnMessage::BitmapEnd,
            _ => return Err(Stop::Refused(ReturnRefusal::BitmapEnd)),
        },
    };
    Ok((message, cursor.at()))
}

impl<'a> ReturnMessage<'a> {
    fn read(cursor: &mut Cursor<'a>) -> Result<Self, Stop<ReturnRefusal>> {
        let number = cursor.u16()?;
        let (name, length) =
            known(number).ok_or(Stop::Refused(ReturnRefusal::Unknown { number }))?;
        let found = cursor.u16()?;
        let damaged = Stop::Refused(ReturnRefusal::Length { name, found });
        if length.is_some_and(|length| length != found) || usize::from(found) > BODY_BYTES_MAX {
            return Err(damaged);
        }
        let mut body = Cursor::new(cursor.take(usize::from(found))?);
        match Self::body(number, &mut body) {
            Ok(Some(message)) if body.at() == usize::from(found) => Ok(message),
            Ok(Some(_)) | Err(Need(_)) => Err(damaged),
            Ok(None) => Err(Stop::Refused(ReturnRefusal::Name { name })),
        }
    }

    /// The body of a message; nothing if a name in it is not readable.
    fn body(number: u16, body: &mut Cursor<'a>) -> Result<Option<Self>, Need> {
        Ok(Some(match number {
            SHUT => Self::Shut { error: body.u32()? },
            PONG => Self::Pong(body.u32()?),
            REQ_PAGES | REQ_PAGES_ID => {
                let (start_bytes, length_bytes) = (body.u64()?, body.u32()?);
                let block = match number {
                    REQ_PAGES => None,
                    _ => match name(body.counted()?) {
                        None => return Ok(None),
                        block => block,
                    },
                };
                Self::RequestPages(PageRequest { block, start_bytes, length_bytes })
            }
            RECV_BITMAP => match name(body.counted()?) {
                Some(block) => Self::RecvBitmap { block },
                None => return Ok(None),
            },
            RESUME_ACK => Self::ResumeAck(body.u32()?),
            _ => Self::SwitchoverAck,
        }))
    }

    /// Adds the message's bytes to `out`.
    ///
    /// # Errors
    /// [`WriteError`] if a name or a bitmap is too long. Then nothing was added.
    pub fn write(&self, out: &mut Vec<u8>) -> Result<(), WriteError> {
        let (number, body) = match *self {
            Self::Shut { error } => (SHUT, error.to_be_bytes().to_vec()),
            Self::Pong(number) => (PONG, number.to_be_bytes().to_vec()),
            Self::ResumeAck(value) => (RESUME_ACK, value.to_be_bytes().to_vec()),
            Self::SwitchoverAck => (SWITCHOVER_ACK, Vec::new()),
            Self::RequestPages(request) => request.body()?,
            Self::RecvBitmap { block } => {
                let mut body = Vec::new();
                put_name("A RAM block's name", block, &mut body)?;
                (RECV_BITMAP, body)
            }
            Self::BitmapSize(size) => {
                let max = usize::try_from(BITMAP_BYTES_MAX).unwrap_or(usize::MAX);
                fits("A bitmap", usize::try_from(size).unwrap_or(usize::MAX), max)?;
                out.extend_from_slice(&size.to_be_bytes());
                return Ok(());
            }
            Self::BitmapBits(bits) => {
                out.extend_from_slice(bits);
                return Ok(());
            }
            Self::BitmapEnd => {
                out.extend_from_slice(&BITMAP_END.to_be_bytes());
                return Ok(());
            }
        };
        out.extend_from_slice(&number.to_be_bytes());
        out.extend_from_slice(&(body.len() as u16).to_be_bytes());
        out.extend_from_slice(&body);
        Ok(())
    }
}

impl PageRequest<'_> {
    fn body(&self) -> Result<(u16, Vec<u8>), WriteError> {
        let mut body = self.start_bytes.to_be_bytes().to_vec();
        body.extend_from_slice(&self.length_bytes.to_be_bytes());
        match self.block {
            None => Ok((REQ_PAGES, body)),
            Some(block) => {
                put_name("A RAM block's name", block, &mut body)?;
                Ok((REQ_PAGES_ID, body))
            }
        }
    }
}
