//! The fixed parts of a multifd channel (migration/multifd.c, `MultiFDInit_t`, `MultiFDPacket_t`).
//!
//! ```text
//! 64 bytes: magic, version, uuid, channel number
//! ( 1344 bytes: flags, block, offsets of up to 128 pages | payload )*
//! ```
//!
//! Everything is big-endian. Payloads are not read here: they are pages one after another, or
//! what a compressor made of them.

use migrate_core::layout::PAGE_BYTES;
use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::cursor::name;
use super::error::{Refusal, WriteError, fits};

/// `MULTIFD_MAGIC`, at the beginning of the channel and of every packet.
pub const MAGIC: u32 = 0x1122_3344;

/// `MULTIFD_VERSION`.
const VERSION: u32 = 1;

/// Length in bytes of how a channel begins.
pub const INIT_BYTES: usize = 64;

/// Length in bytes of what a packet has before its payload.
pub const PACKET_HEADER_BYTES: usize = 1344;

/// Most pages of a packet: `MULTIFD_PACKET_SIZE` in pages.
pub const PACKET_PAGES_MAX: usize = (512 << 10) / PAGE_BYTES;

/// Bytes for a block's name, the last one 0.
const NAME_BYTES: usize = 256;

/// `MULTIFD_FLAG_DEVICE_STATE`: no pages but a VFIO device's state, in another form.
const FLAG_DEVICE_STATE: u32 = 0x40;

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawInit {
    magic: U32,
    version: U32,
    uuid: [u8; 16],
    channel: u8,
    unused: [u8; 39],
}

const _: () = assert!(size_of::<RawInit>() == INIT_BYTES);

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawPacket {
    magic: U32,
    version: U32,
    flags: U32,
    pages_allocated: U32,
    normal_pages: U32,
    payload_bytes: U32,
    number: U64,
    zero_pages: U32,
    unused: [u8; 28],
    block: [u8; NAME_BYTES],
    offsets: [U64; PACKET_PAGES_MAX],
}

const _: () = assert!(size_of::<RawPacket>() == PACKET_HEADER_BYTES);

/// How a channel begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChannelInit {
    /// The guest's UUID; zeros if it has none.
    pub uuid: [u8; 16],
    /// The channel's number.
    pub channel: u8,
}

/// What a packet says before its payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PacketHeader {
    /// Bit 0: all channels wait for one another here. Bits 1 to 5: the compressor.
    pub flags: u32,
    /// The packet's number over all channels.
    pub number: u64,
    /// The RAM block of all its pages; empty if it has none.
    pub block: String,
    /// Where its pages begin in the block, in bytes; their contents are the payload.
    pub normal_offsets: Vec<u64>,
    /// The same for pages that are zero (9.0 and later).
    pub zero_offsets: Vec<u64>,
    /// Length of the payload in bytes.
    pub payload_bytes: u32,
}

fn refused(what: &'static str) -> Refusal {
    Refusal::Channel { what, remedy: "switch the capability multifd off at both ends" }
}

fn check_begin(magic: U32, version: U32) -> Result<(), Refusal> {
    match (magic.get(), version.get()) {
        (MAGIC, VERSION) => Ok(()),
        (MAGIC, _) => Err(refused("multifd of another version")),
        _ => Err(refused("no part of a multifd channel")),
    }
}

impl ChannelInit {
    /// Reads how a channel begins.
    ///
    /// # Errors
    /// [`Refusal::Channel`] if magic or version are others.
    pub fn parse(bytes: &[u8; INIT_BYTES]) -> Result<Self, Refusal> {
        let raw: RawInit = zerocopy::transmute!(*bytes);
        check_begin(raw.magic, raw.version)?;
        Ok(Self { uuid: raw.uuid, channel: raw.channel })
    }

    /// Writes it.
    pub fn to_bytes(self) -> [u8; INIT_BYTES] {
        let raw = RawInit {
            magic: MAGIC.into(),
            version: VERSION.into(),
            uuid: self.uuid,
            channel: self.channel,
            unused: [0; 39],
        };
        zerocopy::transmute!(raw)
    }
}

impl PacketHeader {
    /// Reads what a packet says before its payload.
    ///
    /// # Errors
    /// [`Refusal::Channel`] if magic or version are others or the packet carries a device's state,
    /// [`Refusal::Blocks`] or [`Refusal::Name`] if its pages or its block cannot be.
    pub fn parse(bytes: &[u8; PACKET_HEADER_BYTES]) -> Result<Self, Refusal> {
        let raw: RawPacket = zerocopy::transmute!(*bytes);
        check_begin(raw.magic, raw.version)?;
        let flags = raw.flags.get();
        if flags & FLAG_DEVICE_STATE != 0 {
            return Err(refused("a VFIO device's state on a channel of multifd"));
        }
        let (normal, zero) = (raw.normal_pages.get() as usize, raw.zero_pages.get() as usize);
        let too_many = Refusal::Blocks { what: "a packet has more pages than fit" };
        let all = raw.offsets.get(..normal.saturating_add(zero)).ok_or(too_many)?;
        if all.iter().any(|offset| !offset.get().is_multiple_of(PAGE_BYTES as u64)) {
            return Err(Refusal::Blocks { what: "a packet has an offset within a page" });
        }
        let (normal, zero) = all.split_at_checked(normal).unwrap_or_default();
        let offsets = |of: &[U64]| of.iter().map(|offset| offset.get()).collect();
        let end = raw.block.iter().position(|byte| *byte == 0);
        let block = match end.and_then(|end| raw.block.get(..end)) {
            Some([]) if all.is_empty() => "",
            found => found.and_then(name).ok_or(Refusal::Name { what: "a packet's RAM block" })?,
        };
        Ok(Self {
            flags,
            number: raw.number.get(),
            block: block.to_owned(),
            normal_offsets: offsets(normal),
            zero_offsets: offsets(zero),
            payload_bytes: raw.payload_bytes.get(),
        })
    }

    /// Writes it.
    ///
    /// # Errors
    /// [`WriteError::TooLong`] if it has too many pages or too long a name.
    pub fn to_bytes(&self) -> Result<[u8; PACKET_HEADER_BYTES], WriteError> {
        let pages = self.normal_offsets.len().saturating_add(self.zero_offsets.len());
        fits("A list of pages", pages, PACKET_PAGES_MAX)?;
        fits("A RAM block's name", self.block.len(), NAME_BYTES - 1)?;
        let mut raw = RawPacket {
            magic: MAGIC.into(),
            version: VERSION.into(),
            flags: self.flags.into(),
            pages_allocated: (PACKET_PAGES_MAX as u32).into(),
            normal_pages: (self.normal_offsets.len() as u32).into(),
            payload_bytes: self.payload_bytes.into(),
            number: self.number.into(),
            zero_pages: (self.zero_offsets.len() as u32).into(),
            unused: [0; 28],
            block: [0; NAME_BYTES],
            offsets: [U64::ZERO; PACKET_PAGES_MAX],
        };
        for (to, from) in raw.block.iter_mut().zip(self.block.bytes()) {
            *to = from;
        }
        let all = self.normal_offsets.iter().chain(&self.zero_offsets);
        for (to, from) in raw.offsets.iter_mut().zip(all) {
            *to = (*from).into();
        }
        Ok(zerocopy::transmute!(raw))
    }
}
