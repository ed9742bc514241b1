//! Commands of the source to the destination within the stream (migration/savevm.c, `MIG_CMD_*`).
//!
//! ```text
//! 08 | be16 number | be16 length | body
//! ```
//!
//! What `PACKAGED` announces, so many bytes of a stream without a header, follows behind the body
//! and is not part of the command.

use zerocopy::big_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::cursor::{Cursor, Stop, name};
use super::error::{Refusal, WriteError, fits, put_name};

/// `QEMU_VM_COMMAND`.
pub(super) const TYPE_COMMAND: u8 = 8;

/// `postcopy_ram_discard_version`.
const DISCARD_VERSION: u8 = 0;

/// Most ranges of one discard: what a length of 16 bits leaves beside the longest name. QEMU
/// itself sends 12 at most.
pub const DISCARD_RANGES_MAX: usize = (u16::MAX as usize - 3 - 255) / size_of::<DiscardRange>();

/// A command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command<'a> {
    /// The destination shall answer on the same connection.
    OpenReturnPath,
    /// The destination shall answer with `PONG` and this number. QEMU sends 1 at the beginning, 2
    /// to 4 around the package.
    Ping(u32),
    /// Post-copy may follow; nothing inside if only dirty bitmaps will.
    PostcopyAdvise(Option<Advise>),
    /// The destination shall catch page faults from now on.
    PostcopyListen,
    /// The destination shall run the guest.
    PostcopyRun,
    /// Pages that the destination holds are out of date.
    PostcopyRamDiscard(Discard<'a>),
    /// So many bytes of a stream follow that the destination shall read as a whole first.
    Packaged {
        /// Their number.
        size_bytes: u32,
    },
    /// Checkpoints will follow the migration.
    EnableColo,
    /// After a broken connection: bitmaps were exchanged, go on.
    PostcopyResume,
    /// After a broken connection: which pages of this block have arrived?
    RecvBitmap {
        /// The RAM block.
        block: &'a str,
    },
    /// The guest is stopped and what is left will come now (10.0, machine types from 10.0 on).
    SwitchoverStart,
}

/// What post-copy announces: page sizes, which must be the destination's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Advise {
    /// All page sizes of RAM blocks in bytes, or-ed together.
    pub ram_page_sizes: u64,
    /// The guest's page size in bytes.
    pub target_page_bytes: u64,
}

/// Pages of one block that are out of date.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Discard<'a> {
    /// The RAM block.
    pub block: &'a str,
    /// Where in it, at least one range.
    pub ranges: &'a [DiscardRange],
}

/// A range of a block as it travels.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct DiscardRange {
    start_bytes: U64,
    length_bytes: U64,
}

impl DiscardRange {
    /// The range of `length_bytes` bytes from `start_bytes` on.
    pub fn new(start_bytes: u64, length_bytes: u64) -> Self {
        Self { start_bytes: start_bytes.into(), length_bytes: length_bytes.into() }
    }

    /// Where it begins within the block, in bytes.
    pub fn start_bytes(&self) -> u64 {
        self.start_bytes.get()
    }

    /// Its length in bytes.
    pub fn length_bytes(&self) -> u64 {
        self.length_bytes.get()
    }
}

/// Name and, where it is the same for all, length of a command's body in bytes.
fn known(number: u16) -> Option<(&'static str, Option<u16>)> {
    Some(match number {
        1 => ("OPEN_RETURN_PATH", Some(0)),
        2 => ("PING", Some(4)),
        3 => ("POSTCOPY_ADVISE", None),
        4 => ("POSTCOPY_LISTEN", Some(0)),
        5 => ("POSTCOPY_RUN", Some(0)),
        6 => ("POSTCOPY_RAM_DISCARD", None),
        7 => ("PACKAGED", Some(4)),
        8 => ("ENABLE_COLO", Some(0)),
        9 => ("POSTCOPY_RESUME", Some(0)),
        10 => ("RECV_BITMAP", None),
        11 => ("SWITCHOVER_START", Some(0)),
        _ => return None,
    })
}

impl<'a> Command<'a> {
    /// Its number in the stream.
    pub fn number(&self) -> u16 {
        match self {
            Self::OpenReturnPath => 1,
            Self::Ping(_) => 2,
            Self::PostcopyAdvise(_) => 3,
            Self::PostcopyListen => 4,
            Self::PostcopyRun => 5,
            Self::PostcopyRamDiscard(_) => 6,
            Self::Packaged { .. } => 7,
            Self::EnableColo => 8,
            Self::PostcopyResume => 9,
            Self::RecvBitmap { .. } => 10,
            Self::SwitchoverStart => 11,
        }
    }

    /// Its name as QEMU has it.
    pub fn name(&self) -> &'static str {
        known(self.number()).map_or("", |(name, _)| name)
    }

    /// Reads a command, whose type is still to be taken.
    pub(super) fn read(cursor: &mut Cursor<'a>) -> Result<Self, Stop<Refusal>> {
        cursor.u8()?;
        let number = cursor.u16()?;
        let (name, length) =
            known(number).ok_or(Stop::Refused(Refusal::UnknownCommand { number }))?;
        let damaged = |what| Stop::Refused(Refusal::Command { name, what });
        let found = cursor.u16()?;
        if length.is_some_and(|length| length != found) {
            return Err(damaged("its length"));
        }
        let body = cursor.take(usize::from(found))?;
        // From here on all is there: what is missing does not come.
        Self::body(number, body).map_err(|fault| match fault {
            Fault::Short => damaged("its length"),
            Fault::What(what) => damaged(what),
        })
    }

    fn body(number: u16, body: &'a [u8]) -> Result<Self, Fault> {
        let mut cursor = Cursor::new(body);
        let command = match number {
            1 => Self::OpenReturnPath,
            2 => Self::Ping(cursor.u32()?),
            3 if body.is_empty() => Self::PostcopyAdvise(None),
            3 => Self::PostcopyAdvise(Some(Advise {
                ram_page_sizes: cursor.u64()?,
                target_page_bytes: cursor.u64()?,
            })),
            4 => Self::PostcopyListen,
            5 => Self::PostcopyRun,
            6 => Self::PostcopyRamDiscard(Discard::read(&mut cursor)?),
            7 => Self::Packaged { size_bytes: cursor.u32()? },
            8 => Self::EnableColo,
            9 => Self::PostcopyResume,
            10 => {
                let block = name(cursor.counted()?).ok_or(Fault::What("the block's name"))?;
                Self::RecvBitmap { block }
            }
            _ => Self::SwitchoverStart,
        };
        if cursor.at() == body.len() { Ok(command) } else { Err(Fault::Short) }
    }

    /// Writes the command.
    pub(super) fn write(&self, out: &mut Vec<u8>) -> Result<(), WriteError> {
        out.push(TYPE_COMMAND);
        out.extend_from_slice(&self.number().to_be_bytes());
        let length_at = out.len();
        out.extend_from_slice(&[0; 2]);
        self.write_body(out)?;
        let length = out.len().saturating_sub(length_at).saturating_sub(2);
        fits("A command's body", length, usize::from(u16::MAX))?;
        if let Some(field) = out.get_mut(length_at..).and_then(|rest| rest.first_chunk_mut()) {
            *field = (length as u16).to_be_bytes();
        }
        Ok(())
    }

    fn write_body(&self, out: &mut Vec<u8>) -> Result<(), WriteError> {
        match self {
            Self::Ping(number) | Self::Packaged { size_bytes: number } => {
                out.extend_from_slice(&number.to_be_bytes());
            }
            Self::PostcopyAdvise(Some(advise)) => {
                out.extend_from_slice(&advise.ram_page_sizes.to_be_bytes());
                out.extend_from_slice(&advise.target_page_bytes.to_be_bytes());
            }
            Self::PostcopyRamDiscard(discard) => discard.write(out)?,
            Self::RecvBitmap { block } => put_name("A block's name", block, out)?,
            Self::PostcopyAdvise(None)
            | Self::OpenReturnPath
            | Self::PostcopyListen
            | Self::PostcopyRun
            | Self::EnableColo
            | Self::PostcopyResume
            | Self::SwitchoverStart => {}
        }
        Ok(())
    }
}

impl<'a> Discard<'a> {
    fn read(cursor: &mut Cursor<'a>) -> Result<Self, Fault> {
        if cursor.u8()? != DISCARD_VERSION {
            return Err(Fault::What("its version"));
        }
        let block = name(cursor.counted()?).ok_or(Fault::What("the block's name"))?;
        if cursor.u8()? != 0 {
            return Err(Fault::What("the end of the block's name"));
        }
        let rest = cursor.rest();
        match <[DiscardRange]>::ref_from_bytes(rest) {
            Ok(ranges) if !ranges.is_empty() => Ok(Self { block, ranges }),
            _ => Err(Fault::What("its ranges")),
        }
    }

    fn write(&self, out: &mut Vec<u8>) -> Result<(), WriteError> {
        if self.ranges.is_empty() {
            return Err(WriteError::Empty { what: "A list of ranges" });
        }
        fits("A list of ranges", self.ranges.len(), DISCARD_RANGES_MAX)?;
        out.push(DISCARD_VERSION);
        put_name("A block's name", self.block, out)?;
        out.push(0);
        out.extend_from_slice(self.ranges.as_bytes());
        Ok(())
    }
}

/// What is wrong with a body that is all there.
enum Fault {
    Short,
    What(&'static str),
}

impl From<super::cursor::Need> for Fault {
    fn from(_: super::cursor::Need) -> Self {
        Self::Short
    }
}
