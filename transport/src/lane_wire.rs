//! Lane frames: a greeting of 32 bytes, then batches of pages.
//!
//! ```text
//! greeting   0       4         6      8          16
//!            | magic | version | lane | reserved | token (16 bytes)
//!
//! batch      0       4      5       6          8          16     20              24      28
//!            | magic | kind | codec | reserved | sequence | runs | payload bytes | round | content bytes
//!
//! run        0            8       10     11         12
//!            | first page | pages | kind | reserved | version      (16 bytes each)
//! ```
//!
//! All integers are little-endian, all reserved fields are 0, kind 0 does not exist. The runs follow
//! the header, then the contents of all runs in run order, packed as the codec says. The sequence
//! counts the batches of a lane from 1 on: a repeat or a gap is an error.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use bytes::{BufMut, Bytes, BytesMut};
use migrate_core::batch::{
    BATCH_PAYLOAD_BYTES_MAX, BATCH_RUNS_MAX, LANES_MAX, PageRun, RUN_PAGES_MAX, RunKind,
};
use migrate_core::codec::Codec;
use migrate_core::layout::PageIndex;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::WireError;
use crate::messages::PAGES_MAX;
use crate::payload::Payload;

/// First four bytes of a lane: `GDWH`.
pub const GREETING_MAGIC: u32 = u32::from_le_bytes(*b"GDWH");

/// First four bytes of every batch: `GDWL`.
pub const LANE_MAGIC: u32 = u32::from_le_bytes(*b"GDWL");

/// Length of the greeting in bytes.
pub const GREETING_BYTES: usize = 32;

/// Length of a batch's header in bytes.
pub const LANE_HEADER_BYTES: usize = 32;

/// Length of a run in bytes.
pub const RUN_BYTES: usize = 16;

/// The only kind of lane frame: a batch of pages.
pub const KIND_BATCH: u8 = 1;

/// A run whose contents are in the payload.
pub const RUN_RAW: u8 = 1;

/// A run of pages that read as zeros.
pub const RUN_ZERO: u8 = 2;

/// A run of deltas.
pub const RUN_DELTA: u8 = 3;

/// A run of references to pages with the same contents.
pub const RUN_SAME: u8 = 4;

/// Contents as they are.
pub const CODEC_PLAIN: u8 = 0;

/// Contents as one LZ4 block.
pub const CODEC_LZ4: u8 = 1;

/// Contents as the next part of the lane's Zstandard stream.
pub const CODEC_ZSTD: u8 = 2;

/// Pages of one round that travel together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// What travels; 1 to `BATCH_RUNS_MAX` runs.
    pub runs: Vec<PageRun>,
    /// Contents of all runs, in run order, packed; at most `BATCH_PAYLOAD_BYTES_MAX` bytes.
    pub payload: Payload,
    /// How they are packed.
    pub codec: Codec,
    /// Their length unpacked; at most `BATCH_PAYLOAD_BYTES_MAX` bytes.
    pub content_bytes: usize,
    /// Number of the pre-copy round.
    pub round: u32,
}

impl Batch {
    /// A batch whose contents travel as they are.
    pub fn plain(runs: Vec<PageRun>, content: impl Into<Payload>, round: u32) -> Self {
        let payload = content.into();
        let content_bytes = payload.len();
        Self { runs, payload, codec: Codec::Plain, content_bytes, round }
    }
}

/// What a lane says first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// The version that [`Select`](crate::messages::Select) named.
    pub version: u16,
    /// Which of the session's lanes this is, from 0 on.
    pub lane: u16,
    /// The token that [`Select`](crate::messages::Select) gave.
    pub token: [u8; 16],
}

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawGreeting {
    magic: U32,
    version: U16,
    lane: U16,
    reserved: U64,
    token: [u8; 16],
}

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    kind: u8,
    codec: u8,
    reserved: U16,
    sequence: U64,
    runs: U32,
    payload_bytes: U32,
    round: U32,
    content_bytes: U32,
}

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRun {
    first_page: U64,
    pages: U16,
    kind: u8,
    reserved: u8,
    version: U32,
}

const _: () = assert!(size_of::<RawGreeting>() == GREETING_BYTES);
const _: () = assert!(size_of::<RawHeader>() == LANE_HEADER_BYTES);
const _: () = assert!(size_of::<RawRun>() == RUN_BYTES);
const _: () = assert!(BATCH_RUNS_MAX <= u32::MAX as usize);
const _: () = assert!(BATCH_PAYLOAD_BYTES_MAX <= u32::MAX as usize);

impl Greeting {
    /// The greeting as it travels.
    pub fn encode(&self) -> [u8; GREETING_BYTES] {
        let raw = RawGreeting {
            magic: GREETING_MAGIC.into(),
            version: self.version.into(),
            lane: self.lane.into(),
            reserved: 0.into(),
            token: self.token,
        };
        zerocopy::transmute!(raw)
    }

    /// Checks a greeting.
    ///
    /// # Errors
    /// The first rule that is broken, in the order of the fields.
    pub fn parse(bytes: &[u8; GREETING_BYTES]) -> Result<Self, WireError> {
        let what = "Lane greeting";
        let raw: RawGreeting = zerocopy::transmute!(*bytes);
        if raw.magic.get() != GREETING_MAGIC {
            return Err(WireError::Magic { what, found: raw.magic.get() });
        }
        let lane = raw.lane.get();
        field(usize::from(lane) < LANES_MAX, what, "lane", u64::from(lane), "lanes end at 63")?;
        field(raw.reserved.get() == 0, what, "reserved", raw.reserved.get(), "must be 0")?;
        Ok(Self { version: raw.version.get(), lane, token: raw.token })
    }
}

/// A batch's header that keeps all rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneHeader {
    runs: usize,
    payload_bytes: usize,
    codec: Codec,
    content_bytes: usize,
    round: u32,
}

impl LaneHeader {
    /// Checks a header; `sequence` is the number that it must carry.
    ///
    /// # Errors
    /// The first rule that is broken, in the order of the fields.
    pub fn parse(bytes: &[u8; LANE_HEADER_BYTES], sequence: u64) -> Result<Self, WireError> {
        let what = "Batch";
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        if raw.magic.get() != LANE_MAGIC {
            return Err(WireError::Magic { what, found: raw.magic.get() });
        }
        field(raw.kind == KIND_BATCH, what, "kind", u64::from(raw.kind), "must be 1")?;
        let codec = parse_codec(raw.codec)?;
        let reserved = u64::from(raw.reserved.get());
        field(reserved == 0, what, "reserved", reserved, "must be 0")?;
        if raw.sequence.get() != sequence {
            let found = raw.sequence.get();
            return Err(WireError::Sequence { what, expected: sequence, found });
        }
        let runs = raw.runs.get() as usize;
        check_runs(runs)?;
        let payload_bytes = raw.payload_bytes.get() as usize;
        check_payload(payload_bytes)?;
        let content_bytes = raw.content_bytes.get() as usize;
        check_content(codec, payload_bytes, content_bytes)?;
        Ok(Self { runs, payload_bytes, codec, content_bytes, round: raw.round.get() })
    }

    /// Bytes that the runs occupy; they follow the header.
    pub fn run_bytes(&self) -> usize {
        self.runs.saturating_mul(RUN_BYTES)
    }

    /// Bytes of page contents that follow the runs.
    pub fn payload_bytes(&self) -> usize {
        self.payload_bytes
    }

    /// The batch of this header, whose runs were parsed and whose payload was read.
    pub fn batch(&self, runs: Vec<PageRun>, payload: Payload) -> Batch {
        let Self { codec, content_bytes, round, .. } = *self;
        Batch { runs, payload, codec, content_bytes, round }
    }

    /// Checks the runs that follow this header, and that they ask for the announced contents.
    ///
    /// # Errors
    /// The first run that breaks a rule, or other contents than announced.
    pub fn parse_runs(&self, bytes: &[u8]) -> Result<Vec<PageRun>, WireError> {
        let truncated = WireError::Truncated {
            what: "Runs of a batch",
            needed: self.run_bytes(),
            available: bytes.len(),
        };
        if bytes.len() != self.run_bytes() {
            return Err(truncated);
        }
        let raw_runs = <[RawRun]>::ref_from_bytes(bytes).map_err(|_| truncated)?;
        let mut runs = Vec::with_capacity(raw_runs.len());
        for raw in raw_runs {
            runs.push(parse_run(raw)?);
        }
        check_sum(&runs, self.content_bytes)?;
        Ok(runs)
    }
}

/// Encodes a batch's header and runs; the payload follows as it is.
///
/// # Errors
/// What the decoder would refuse.
pub fn encode_head(batch: &Batch, sequence: u64) -> Result<Bytes, WireError> {
    check_runs(batch.runs.len())?;
    check_payload(batch.payload.len())?;
    check_content(batch.codec, batch.payload.len(), batch.content_bytes)?;
    check_sum(&batch.runs, batch.content_bytes)?;
    let header = RawHeader {
        magic: LANE_MAGIC.into(),
        kind: KIND_BATCH,
        codec: match batch.codec {
            Codec::Plain => CODEC_PLAIN,
            Codec::Lz4 => CODEC_LZ4,
            Codec::Zstd => CODEC_ZSTD,
        },
        reserved: 0.into(),
        sequence: sequence.into(),
        runs: narrow(batch.runs.len()).into(),
        payload_bytes: narrow(batch.payload.len()).into(),
        round: batch.round.into(),
        content_bytes: narrow(batch.content_bytes).into(),
    };
    let run_bytes = batch.runs.len().saturating_mul(RUN_BYTES);
    let mut head = BytesMut::with_capacity(LANE_HEADER_BYTES.saturating_add(run_bytes));
    head.put_slice(header.as_bytes());
    for run in &batch.runs {
        check_run(run)?;
        let raw = RawRun {
            first_page: run.first.0.into(),
            pages: run.pages.into(),
            kind: match run.kind {
                RunKind::Raw => RUN_RAW,
                RunKind::Zero => RUN_ZERO,
                RunKind::Delta => RUN_DELTA,
                RunKind::Same => RUN_SAME,
            },
            reserved: 0,
            version: run.version.into(),
        };
        head.put_slice(raw.as_bytes());
    }
    Ok(head.freeze())
}

/// Decodes the batch at the start of `bytes`; returns it and the frame's length.
///
/// # Errors
/// As [`LaneHeader::parse`] and [`LaneHeader::parse_runs`], or [`WireError::Truncated`].
pub fn decode(bytes: &[u8], sequence: u64) -> Result<(Batch, usize), WireError> {
    let available = bytes.len();
    let truncated = |needed| WireError::Truncated { what: "Batch", needed, available };
    let (header, rest) = bytes
        .split_first_chunk::<LANE_HEADER_BYTES>()
        .ok_or_else(|| truncated(LANE_HEADER_BYTES))?;
    let header = LaneHeader::parse(header, sequence)?;
    let head_bytes = LANE_HEADER_BYTES.saturating_add(header.run_bytes());
    let (runs, rest) =
        rest.split_at_checked(header.run_bytes()).ok_or_else(|| truncated(head_bytes))?;
    let runs = header.parse_runs(runs)?;
    let frame_bytes = head_bytes.saturating_add(header.payload_bytes);
    let payload = rest.get(..header.payload_bytes).ok_or_else(|| truncated(frame_bytes))?;
    Ok((header.batch(runs, payload.to_vec().into()), frame_bytes))
}

fn parse_run(raw: &RawRun) -> Result<PageRun, WireError> {
    let what = "Run of a batch";
    let kind = match raw.kind {
        RUN_RAW => RunKind::Raw,
        RUN_ZERO => RunKind::Zero,
        RUN_DELTA => RunKind::Delta,
        RUN_SAME => RunKind::Same,
        found => {
            let value = u64::from(found);
            return Err(WireError::Field { what, field: "kind", value, rule: "must be 1 to 4" });
        }
    };
    field(raw.reserved == 0, what, "reserved", u64::from(raw.reserved), "must be 0")?;
    let run = PageRun {
        first: PageIndex(raw.first_page.get()),
        pages: raw.pages.get(),
        kind,
        version: raw.version.get(),
    };
    check_run(&run)?;
    Ok(run)
}

fn check_run(run: &PageRun) -> Result<(), WireError> {
    let what = "Run of a batch";
    let pages = u64::from(run.pages);
    let in_range = (1..=RUN_PAGES_MAX).contains(&run.pages);
    field(in_range, what, "pages", pages, "1 to 32768 pages are allowed")?;
    let end = run.first.0.checked_add(pages);
    let fits = end.is_some_and(|end| end <= PAGES_MAX);
    field(fits, what, "first page", run.first.0, "pages end at 2^34")?;
    field(run.version != 0, what, "version", 0, "the first version is 1")
}

fn check_runs(runs: usize) -> Result<(), WireError> {
    let in_range = (1..=BATCH_RUNS_MAX).contains(&runs);
    field(in_range, "Batch", "runs", runs as u64, "1 to 1024 runs are allowed")
}

fn parse_codec(codec: u8) -> Result<Codec, WireError> {
    match codec {
        CODEC_PLAIN => Ok(Codec::Plain),
        CODEC_LZ4 => Ok(Codec::Lz4),
        CODEC_ZSTD => Ok(Codec::Zstd),
        found => {
            let value = u64::from(found);
            let rule = "must be 0, 1 or 2";
            Err(WireError::Field { what: "Batch", field: "codec", value, rule })
        }
    }
}

fn check_content(codec: Codec, payload_bytes: usize, bytes: usize) -> Result<(), WireError> {
    let what = "Batch";
    let max = BATCH_PAYLOAD_BYTES_MAX;
    if bytes > max {
        let found = bytes as u64;
        return Err(WireError::TooLong { what: "Contents of a batch", found, max: max as u64 });
    }
    let plain = codec != Codec::Plain || bytes == payload_bytes;
    field(plain, what, "content bytes", bytes as u64, "are the payload bytes without a codec")
}

fn check_payload(bytes: usize) -> Result<(), WireError> {
    let max = BATCH_PAYLOAD_BYTES_MAX;
    if bytes > max {
        let found = bytes as u64;
        return Err(WireError::TooLong { what: "Payload of a batch", found, max: max as u64 });
    }
    Ok(())
}

fn check_sum(runs: &[PageRun], content_bytes: usize) -> Result<(), WireError> {
    let mut bounds = (0usize, 0usize);
    for run in runs {
        let (min, max) = run.content_bytes();
        bounds = (bounds.0.saturating_add(min), bounds.1.saturating_add(max));
    }
    let fits = bounds.0 <= content_bytes && content_bytes <= bounds.1;
    let rule = "must be what the runs add up to";
    field(fits, "Batch", "content bytes", content_bytes as u64, rule)
}

fn field(
    holds: bool,
    what: &'static str,
    field: &'static str,
    value: u64,
    rule: &'static str,
) -> Result<(), WireError> {
    if holds { Ok(()) } else { Err(WireError::Field { what, field, value, rule }) }
}

/// A count that was checked against a limit far below 2^32.
fn narrow(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
