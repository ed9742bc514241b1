//! The kinds of frames, and what each may have: flags, extents, a payload, a number.
//!
//! Invariant: what is checked of a header bounds all that is allocated for its frame.

use migrate_core::layout::PAGE_BYTES;
use migrate_core::store::Extent;
use migrate_core::store::names::{LIST_ENTRIES_MAX, PAGES_MAX, VERSION_MAX};

use super::VERSION_BYTES;
use crate::error::WireError;

/// Longest body in bytes.
pub const BODY_BYTES_MAX: usize = 2048;

/// Flag of `Put`, `Get` and `Pages`: contents are packed as one LZ4 block; of `Get`: those of the
/// answer may be.
pub const FLAG_PACKED: u8 = 1;

/// Flag of `Get`: the pages are dropped once they were sent.
pub const FLAG_TAKE: u8 = 2;

/// Flag of `Pages`: nothing follows for this request.
pub const FLAG_LAST: u8 = 4;

/// Highest number of a page.
const PAGE_MAX: u64 = PAGES_MAX.saturating_sub(1);

pub(super) const CREATE: u8 = 1;
pub(super) const OPEN: u8 = 2;
pub(super) const KEEP: u8 = 3;
pub(super) const GRANT: u8 = 4;
pub(super) const REVOKE: u8 = 5;
pub(super) const PUT: u8 = 6;
pub(super) const GET: u8 = 7;
pub(super) const DROP: u8 = 8;
pub(super) const STAT: u8 = 9;
pub(super) const DELETE: u8 = 10;
pub(super) const LIST: u8 = 11;
pub(super) const RESERVE: u8 = 12;
pub(super) const DONE: u8 = 128;
pub(super) const PAGES: u8 = 129;
pub(super) const STATED: u8 = 130;
pub(super) const FAILED: u8 = 131;
pub(super) const LISTED: u8 = 132;

/// Name and number of every kind of frame, requests first.
pub const KINDS: [(&str, u8); 17] = [
    ("Create", CREATE),
    ("Open", OPEN),
    ("Keep", KEEP),
    ("Grant", GRANT),
    ("Revoke", REVOKE),
    ("Put", PUT),
    ("Get", GET),
    ("Drop", DROP),
    ("Stat", STAT),
    ("Delete", DELETE),
    ("List", LIST),
    ("Reserve", RESERVE),
    ("Done", DONE),
    ("Pages", PAGES),
    ("Stated", STATED),
    ("Failed", FAILED),
    ("Listed", LISTED),
];

/// Most pages in one request that puts or gets.
pub const REQUEST_PAGES_MAX: u64 = 256;

/// Most extents in one request that drops.
pub const DROP_EXTENTS_MAX: usize = 4096;

/// Most pages in one piece of an answer: 64 KiB.
pub const PIECE_PAGES_MAX: u64 = 16;

/// What follows a frame's extents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Payload {
    None,
    Contents,
    /// One for every extent.
    Versions,
    Body,
}

/// What a kind of frame may have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    pub(super) name: &'static str,
    pub(super) flags: u8,
    extents_min: usize,
    extents_max: usize,
    /// Of all extents together.
    pages_max: u64,
    pub(super) payload: Payload,
    number_min: u64,
    number_max: u64,
}

impl Rules {
    pub(super) fn of(kind: u8) -> Option<Self> {
        let (name, _) = KINDS.iter().find(|(_, number)| *number == kind)?;
        let plain = |payload| Self {
            name,
            flags: 0,
            extents_min: 0,
            extents_max: 0,
            pages_max: 0,
            payload,
            number_min: 0,
            number_max: 0,
        };
        let of_pages = |flags, max: u64, payload| {
            let extents_max = usize::try_from(max).unwrap_or(usize::MAX);
            Self { flags, extents_min: 1, extents_max, pages_max: max, ..plain(payload) }
        };
        Some(match kind {
            PUT => Self {
                number_min: 1,
                number_max: VERSION_MAX,
                ..of_pages(FLAG_PACKED, REQUEST_PAGES_MAX, Payload::Contents)
            },
            GET => of_pages(FLAG_PACKED | FLAG_TAKE, REQUEST_PAGES_MAX, Payload::None),
            DROP => Self {
                extents_min: 1,
                extents_max: DROP_EXTENTS_MAX,
                pages_max: u64::MAX,
                ..plain(Payload::None)
            },
            LIST => Self { number_max: PAGE_MAX, ..plain(Payload::None) },
            RESERVE => Self { number_min: 1, number_max: PAGES_MAX, ..plain(Payload::None) },
            LISTED => Self {
                extents_max: LIST_ENTRIES_MAX,
                pages_max: u64::MAX,
                number_max: PAGE_MAX,
                ..plain(Payload::Versions)
            },
            PAGES => of_pages(FLAG_PACKED | FLAG_LAST, PIECE_PAGES_MAX, Payload::Contents),
            KEEP | STAT | DELETE | DONE => plain(Payload::None),
            _ => plain(Payload::Body),
        })
    }

    pub(super) fn check(
        &self,
        holds: bool,
        field: &'static str,
        value: u64,
        rule: &'static str,
    ) -> Checked {
        let what = self.name;
        if holds { Ok(()) } else { Err(WireError::Field { what, field, value, rule }) }
    }
}

pub(super) type Checked = Result<(), WireError>;

pub(super) fn check_extents(rules: &Rules, extents: usize) -> Checked {
    let holds = (rules.extents_min..=rules.extents_max).contains(&extents);
    rules.check(holds, "extents", extents as u64, "as many as the kind allows")
}

pub(super) fn check_number(rules: &Rules, number: u64) -> Checked {
    let holds = (rules.number_min..=rules.number_max).contains(&number);
    rules.check(
        holds,
        "number",
        number,
        "a version, a page or a number of pages, as the kind says, or 0",
    )
}

pub(super) fn check_lengths(rules: &Rules, flags: u8, payload: usize, content: usize) -> Checked {
    let max = match rules.payload {
        Payload::None => 0,
        Payload::Body => BODY_BYTES_MAX,
        Payload::Contents => contents_max(rules),
        Payload::Versions => LIST_ENTRIES_MAX.saturating_mul(VERSION_BYTES),
    };
    if content > max {
        let (found, max) = (content as u64, max as u64);
        return Err(WireError::TooLong { what: rules.name, found, max });
    }
    let is_packed = rules.payload == Payload::Contents && flags & FLAG_PACKED != 0;
    let holds = if is_packed { payload < content } else { payload == content };
    let rule = "the content's bytes, or fewer if it is packed";
    rules.check(holds, "payload bytes", payload as u64, rule)
}

fn contents_max(rules: &Rules) -> usize {
    usize::try_from(rules.pages_max).unwrap_or(usize::MAX).saturating_mul(PAGE_BYTES)
}

pub(super) fn check_sum(rules: &Rules, extents: &[Extent], content: usize) -> Checked {
    for extent in extents {
        let pages = u64::from(extent.pages);
        rules.check(pages > 0, "pages", pages, "an extent has a page at least")?;
        let end = extent.first_page.checked_add(pages).filter(|end| *end <= PAGES_MAX);
        rules.check(end.is_some(), "first page", extent.first_page, "pages end at 2^34")?;
    }
    let pages = Extent::count(extents);
    rules.check(pages <= rules.pages_max, "pages", pages, "no more than the kind allows")?;
    let holds = match rules.payload {
        Payload::Contents => pages.saturating_mul(PAGE_BYTES as u64) == content as u64,
        Payload::Versions => extents.len().saturating_mul(VERSION_BYTES) == content,
        Payload::None | Payload::Body => true,
    };
    rules.check(holds, "content bytes", content as u64, "must be what the extents add up to")
}
