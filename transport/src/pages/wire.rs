//! Frames of the page channel: a header of 32 bytes, extents, then contents or a body.
//!
//! ```text
//! frame      0       4      5       6          8     12        16              20              24       32
//!            | magic | kind | flags | reserved | tag | extents | payload bytes | content bytes | number |
//!
//! extent     0            8       12         16
//!            | first page | pages | reserved |      (16 bytes each)
//! ```
//!
//! All integers are little-endian, all reserved fields are 0, kind 0 does not exist. The number is a version,
//! a page or a number of pages, or 0, as the kind says. So is the payload the pages' contents in the extents'
//! order, as they are or as one LZ4 block, or the extents' versions, or a body in postcard, or nothing. A body
//! does not describe itself: one that was released never changes.
//!
//! | module | what it holds |
//! |---|---|
//! | `rules` | the kinds of frames, and what each may have |
//! | `listed` | the list of a store's pages |
//!
//! Invariant: nothing is allocated for a frame before its header is checked; a frame that is complete
//! decodes or is refused.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::iter;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use migrate_core::codec::{Codec, Packer, Unpacker, packed_bytes_max};
use migrate_core::layout::PAGE_BYTES;
use migrate_core::store::{Extent, NewStore, ServerStat, StoreError, StoreId, StoreSecret};
use serde::{Deserialize, Serialize};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::WireError;
use crate::pages::{PageAnswer, PageRequest};

mod listed;
mod rules;

pub use self::rules::{
    BODY_BYTES_MAX, DROP_EXTENTS_MAX, FLAG_LAST, FLAG_PACKED, FLAG_TAKE, KINDS, PIECE_PAGES_MAX,
    REQUEST_PAGES_MAX,
};
use self::rules::{
    CREATE, Checked, DELETE, DONE, DROP, FAILED, GET, GRANT, KEEP, LIST, LISTED, OPEN, PAGES, PUT,
    Payload, RESERVE, REVOKE, Rules, STAT, STATED, check_extents, check_lengths, check_number,
    check_sum,
};

/// First four bytes of every frame: `GDWP`.
pub const PAGES_MAGIC: u32 = u32::from_le_bytes(*b"GDWP");

/// Length of a frame's header in bytes.
pub const HEADER_BYTES: usize = 32;

/// Length of an extent in bytes.
pub const EXTENT_BYTES: usize = 16;

/// Length of a version in bytes.
pub const VERSION_BYTES: usize = 8;

/// Contents from this length on are sampled before they are packed.
const SAMPLED_BYTES_MIN: usize = 32 << 10;

/// Pages of a sample.
const SAMPLE_PAGES: usize = 4;

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    kind: u8,
    flags: u8,
    reserved: U16,
    tag: U32,
    extents: U32,
    payload_bytes: U32,
    content_bytes: U32,
    number: U64,
}

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawExtent {
    first_page: U64,
    pages: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);
const _: () = assert!(size_of::<RawExtent>() == EXTENT_BYTES);

/// The body of `Open`.
#[derive(Debug, Serialize, Deserialize)]
struct OpenBody {
    store: StoreId,
    secret: StoreSecret,
}

/// A frame that keeps the rules of its kind, with its contents unpacked.
#[derive(Debug)]
struct Frame {
    rules: Rules,
    kind: u8,
    flags: u8,
    tag: u32,
    number: u64,
    extents: Vec<Extent>,
    payload: Bytes,
}

impl Frame {
    fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    fn body<'a, T: Deserialize<'a>>(&'a self) -> Result<T, WireError> {
        let what = self.rules.name;
        let (body, rest) = postcard::take_from_bytes(&self.payload)
            .map_err(|source| WireError::Body { what, source })?;
        match rest.len() {
            0 => Ok(body),
            bytes => Err(WireError::Trailing { what, bytes }),
        }
    }
}

/// Checks a header, and returns it with the length of the whole frame.
fn header(bytes: &[u8; HEADER_BYTES]) -> Result<(RawHeader, Rules, usize), WireError> {
    let raw: RawHeader = zerocopy::transmute!(*bytes);
    if raw.magic.get() != PAGES_MAGIC {
        return Err(WireError::Magic { what: "Frame of pages", found: raw.magic.get() });
    }
    let found = u16::from(raw.kind);
    let rules = Rules::of(raw.kind).ok_or(WireError::UnknownType { found })?;
    let flags = u64::from(raw.flags);
    rules.check(
        raw.flags & !rules.flags == 0,
        "flags",
        flags,
        "no other than the kind's may be set",
    )?;
    let reserved = u64::from(raw.reserved.get());
    rules.check(reserved == 0, "reserved", reserved, "must be 0")?;
    check_number(&rules, raw.number.get())?;
    let extents = raw.extents.get() as usize;
    check_extents(&rules, extents)?;
    let (payload_bytes, content_bytes) =
        (raw.payload_bytes.get() as usize, raw.content_bytes.get() as usize);
    check_lengths(&rules, raw.flags, payload_bytes, content_bytes)?;
    let head_bytes = extents.saturating_mul(EXTENT_BYTES).saturating_add(HEADER_BYTES);
    Ok((raw, rules, head_bytes.saturating_add(payload_bytes)))
}

/// Whether [`decode_answer`] or [`decode_request`] would take something off the front or refuse it.
pub(super) fn is_complete(bytes: &[u8]) -> bool {
    let Some(head) = bytes.first_chunk::<HEADER_BYTES>() else { return false };
    header(head).map_or(true, |(_, _, frame_bytes)| bytes.len() >= frame_bytes)
}

/// Takes the next frame off the front, if it is complete.
fn take_frame(bytes: &mut BytesMut) -> Result<Option<Frame>, WireError> {
    let Some(head) = bytes.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
    let (raw, rules, frame_bytes) = header(head)?;
    if bytes.len() < frame_bytes {
        return Ok(None);
    }
    let mut rest = bytes.split_to(frame_bytes);
    rest.advance(HEADER_BYTES);
    let extents = rest.split_to((raw.extents.get() as usize).saturating_mul(EXTENT_BYTES));
    let mut all = Vec::with_capacity(raw.extents.get() as usize);
    for raw in <[RawExtent]>::ref_from_bytes(&extents).unwrap_or_default() {
        let reserved = u64::from(raw.reserved.get());
        rules.check(reserved == 0, "reserved", reserved, "must be 0")?;
        all.push(Extent::new(raw.first_page.get(), raw.pages.get()));
    }
    let content_bytes = raw.content_bytes.get() as usize;
    check_sum(&rules, &all, content_bytes)?;
    let mut payload = rest.freeze();
    if rules.payload == Payload::Contents && raw.flags & FLAG_PACKED != 0 {
        let mut content = vec![0; content_bytes];
        Unpacker::default()
            .unpack(Codec::Lz4, iter::once(&payload[..]), &mut content)
            .map_err(|_damaged| WireError::Packed { what: rules.name })?;
        payload = content.into();
    }
    let (kind, flags, tag, number) = (raw.kind, raw.flags, raw.tag.get(), raw.number.get());
    Ok(Some(Frame { rules, kind, flags, tag, number, extents: all, payload }))
}

/// A frame as it travels: its head, and what follows.
pub type Pieces = [Bytes; 2];

fn frame(
    kind: u8,
    flags: u8,
    tag: u32,
    extents: &[Extent],
    content: Bytes,
) -> Result<Pieces, WireError> {
    numbered(kind, flags, (tag, 0), extents, content)
}

/// A frame with a tag and a number.
fn numbered(
    kind: u8,
    mut flags: u8,
    (tag, number): (u32, u64),
    extents: &[Extent],
    content: Bytes,
) -> Result<Pieces, WireError> {
    let unknown = || WireError::UnknownType { found: u16::from(kind) };
    let rules = Rules::of(kind).ok_or_else(unknown)?;
    check_number(&rules, number)?;
    check_extents(&rules, extents.len())?;
    let content_bytes = content.len();
    check_sum(&rules, extents, content_bytes)?;
    let mut payload = content;
    if rules.payload == Payload::Contents && flags & FLAG_PACKED != 0 {
        match pack(&payload) {
            Some(packed) => payload = packed,
            None => flags &= !FLAG_PACKED,
        }
    }
    check_lengths(&rules, flags, payload.len(), content_bytes)?;
    let raw = RawHeader {
        magic: PAGES_MAGIC.into(),
        kind,
        flags,
        reserved: 0.into(),
        tag: tag.into(),
        extents: narrow(extents.len()).into(),
        payload_bytes: narrow(payload.len()).into(),
        content_bytes: narrow(content_bytes).into(),
        number: number.into(),
    };
    let extent_bytes = extents.len().saturating_mul(EXTENT_BYTES);
    let mut head = BytesMut::with_capacity(HEADER_BYTES.saturating_add(extent_bytes));
    head.put_slice(raw.as_bytes());
    for extent in extents {
        let raw = RawExtent {
            first_page: extent.first_page.into(),
            pages: extent.pages.into(),
            reserved: 0.into(),
        };
        head.put_slice(raw.as_bytes());
    }
    Ok([head.freeze(), payload])
}

/// The content as one LZ4 block, if that is shorter and a sample does not say that it hardly would be.
fn pack(content: &[u8]) -> Option<Bytes> {
    if content.len() >= SAMPLED_BYTES_MIN && !is_worth_packing(content) {
        return None;
    }
    pack_all(content)
}

/// Whether pages from all over the content shrink by an eighth. They lie apart since what packs often begins with
/// what does not.
fn is_worth_packing(content: &[u8]) -> bool {
    let step = content.len().checked_div(SAMPLE_PAGES).unwrap_or_default();
    let pieces = content.chunks(step.max(PAGE_BYTES)).filter_map(|part| part.get(..PAGE_BYTES));
    let sample = pieces.collect::<Vec<_>>().concat();
    let most = sample.len().saturating_sub(sample.len() / 8);
    pack_all(&sample).is_some_and(|packed| packed.len() <= most)
}

fn pack_all(content: &[u8]) -> Option<Bytes> {
    let mut packed = vec![0; packed_bytes_max(content.len())];
    let bytes = Packer::default().pack(Codec::Lz4, content, &mut packed).ok()?;
    packed.truncate(bytes);
    (bytes < content.len()).then(|| packed.into())
}

/// A count that was checked against a limit far below 2^32.
fn narrow(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn body<T: Serialize>(what: &'static str, body: &T) -> Result<Bytes, WireError> {
    let bytes = postcard::to_stdvec(body).map_err(|source| WireError::Body { what, source })?;
    Ok(bytes.into())
}

/// Encodes a request.
///
/// # Errors
/// What the decoder would refuse.
pub fn encode_request(request: &PageRequest, tag: u32) -> Result<Pieces, WireError> {
    let flag = |set: bool, flag| if set { flag } else { 0 };
    let (none, empty) = (&[][..], Bytes::new);
    match request {
        PageRequest::Create(new) => frame(CREATE, 0, tag, none, body("Create", new)?),
        PageRequest::Open { store, secret } => {
            let open = OpenBody { store: *store, secret: secret.clone() };
            frame(OPEN, 0, tag, none, body("Open", &open)?)
        }
        PageRequest::Keep => frame(KEEP, 0, tag, none, empty()),
        PageRequest::Grant { host } => frame(GRANT, 0, tag, none, body("Grant", host)?),
        PageRequest::Revoke { host } => frame(REVOKE, 0, tag, none, body("Revoke", host)?),
        PageRequest::Put { extents, contents, version, packed } => {
            let flags = flag(*packed, FLAG_PACKED);
            numbered(PUT, flags, (tag, *version), extents, contents.clone())
        }
        PageRequest::Get { extents, take, packed } => {
            let flags = flag(*take, FLAG_TAKE) | flag(*packed, FLAG_PACKED);
            frame(GET, flags, tag, extents, empty())
        }
        PageRequest::Drop { extents } => frame(DROP, 0, tag, extents, empty()),
        PageRequest::List { from_page } => numbered(LIST, 0, (tag, *from_page), none, empty()),
        PageRequest::Reserve { pages } => numbered(RESERVE, 0, (tag, *pages), none, empty()),
        PageRequest::Stat => frame(STAT, 0, tag, none, empty()),
        PageRequest::Delete => frame(DELETE, 0, tag, none, empty()),
    }
}

/// Takes the next request off the front of what came, with its tag, if it is complete.
///
/// # Errors
/// The first rule that is broken.
pub fn decode_request(bytes: &mut BytesMut) -> Result<Option<(u32, PageRequest)>, WireError> {
    let Some(frame) = take_frame(bytes)? else { return Ok(None) };
    let packed = frame.has(FLAG_PACKED);
    let request = match frame.kind {
        CREATE => PageRequest::Create(frame.body::<NewStore>()?),
        OPEN => {
            let OpenBody { store, secret } = frame.body()?;
            PageRequest::Open { store, secret }
        }
        KEEP => PageRequest::Keep,
        GRANT => PageRequest::Grant { host: frame.body()? },
        REVOKE => PageRequest::Revoke { host: frame.body()? },
        PUT => {
            let (extents, contents, version) = (frame.extents, frame.payload, frame.number);
            PageRequest::Put { extents, contents, version, packed }
        }
        GET => {
            let take = frame.has(FLAG_TAKE);
            PageRequest::Get { extents: frame.extents, take, packed }
        }
        DROP => PageRequest::Drop { extents: frame.extents },
        LIST => PageRequest::List { from_page: frame.number },
        RESERVE => PageRequest::Reserve { pages: frame.number },
        STAT => PageRequest::Stat,
        DELETE => PageRequest::Delete,
        _ => return Err(out_of_place(&frame, "a request is due")),
    };
    Ok(Some((frame.tag, request)))
}

/// Encodes an answer.
///
/// # Errors
/// What the decoder would refuse.
pub fn encode_answer(answer: &PageAnswer) -> Result<Pieces, WireError> {
    match answer {
        PageAnswer::Done { tag } => frame(DONE, 0, *tag, &[], Bytes::new()),
        PageAnswer::Pages { tag, extents, contents, packed, last } => {
            let flags = if *packed { FLAG_PACKED } else { 0 } | if *last { FLAG_LAST } else { 0 };
            frame(PAGES, flags, *tag, extents, contents.clone())
        }
        PageAnswer::Listed { tag, entries, next_page } => {
            let next_page = listed::check(entries, *next_page)?;
            let (extents, versions) = listed::split(entries);
            numbered(LISTED, 0, (*tag, next_page), &extents, versions)
        }
        PageAnswer::Stat { tag, stat } => frame(STATED, 0, *tag, &[], body("Stated", stat)?),
        PageAnswer::Failed { tag, error } => {
            check_error(error)?;
            frame(FAILED, 0, *tag, &[], body("Failed", error)?)
        }
    }
}

/// Takes the next answer off the front of what came, if it is complete.
///
/// # Errors
/// The first rule that is broken.
pub fn decode_answer(bytes: &mut BytesMut) -> Result<Option<PageAnswer>, WireError> {
    let Some(frame) = take_frame(bytes)? else { return Ok(None) };
    let tag = frame.tag;
    Ok(Some(match frame.kind {
        DONE => PageAnswer::Done { tag },
        PAGES => PageAnswer::Pages {
            tag,
            packed: frame.has(FLAG_PACKED),
            last: frame.has(FLAG_LAST),
            extents: frame.extents,
            contents: frame.payload,
        },
        LISTED => {
            let entries = listed::join(frame.extents, &frame.payload);
            // No list goes on at page 0: it would have begun there.
            let next_page = Some(frame.number).filter(|page| *page > 0);
            listed::check(&entries, next_page)?;
            PageAnswer::Listed { tag, entries, next_page }
        }
        STATED => PageAnswer::Stat { tag, stat: frame.body::<ServerStat>()? },
        FAILED => {
            let error = frame.body::<StoreError>()?;
            check_error(&error)?;
            PageAnswer::Failed { tag, error }
        }
        _ => return Err(out_of_place(&frame, "an answer is due")),
    }))
}

fn check_error(error: &StoreError) -> Checked {
    if error.is_clean() {
        return Ok(());
    }
    let rule = "texts have at most 128 bytes and no control characters";
    Err(WireError::Field { what: "Failed", field: "error", value: 0, rule })
}

fn out_of_place(frame: &Frame, rule: &'static str) -> WireError {
    let (what, value) = (frame.rules.name, u64::from(frame.kind));
    WireError::Field { what, field: "kind", value, rule }
}
