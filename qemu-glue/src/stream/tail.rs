//! Where device state ends that does not say how long it is.
//!
//! Only QEMU's own code for each device knows its length. But the stream ends right after it:
//!
//! ```text
//! connection  device state | 00 | 06 | be32 length | description in JSON       [end]
//!             device state | 00                        (suppress-vmdesc=on)    [end]
//! package     device state | PING 3 | RUN                                      [end]
//! ```
//!
//! Rule for a connection: a `00` may be the end as long as everything after it fits the first line
//! or is missing; a description is empty, or printable ASCII between braces, as QEMU writes it. What
//! may be the end is held back, all before it is handed out at once. It *is* the end only when nothing
//! follows: a guest can put bytes of that form into a device's state, and then more follows. If nothing
//! follows and the description is not complete, there is none, and the last byte must be the `00`.
//!
//! At most one place can be the end at a time, but for those within a header of six bytes: a
//! description has no byte that is 0. So every byte is looked at a few times at most.
//!
//! Rule for a package, whose length is known: its device state ends where its last commands begin.

use super::DESCRIPTION_BYTES_MAX;
use super::grammar::{TYPE_DESCRIPTION, TYPE_END};

/// `00`, `06` and the length.
const HEAD_BYTES: usize = 6;

const PING: [u8; 5] = [8, 0, 2, 0, 4];
const PING_BYTES: usize = PING.len() + size_of::<u32>();
const RUN: [u8; 5] = [8, 0, 5, 0, 0];

/// A `PING` and `RUN`, the longest end of a package.
pub(super) const PACKAGE_TAIL_BYTES: usize = PING_BYTES + RUN.len();

/// What was held back and how far it has been looked at.
#[derive(Debug, Default)]
pub(super) struct Tail {
    looked_at: usize,
}

impl Tail {
    /// Finds where a possible end begins; the length of `bytes` if nowhere. What is held back from
    /// then on must be the bytes from there.
    pub(super) fn find(&mut self, bytes: &[u8]) -> usize {
        let mut from = 0;
        while let Some(rest) = bytes.get(from..) {
            let Some(next) = rest.iter().position(|byte| *byte == TYPE_END) else { break };
            let candidate = rest.get(next..).unwrap_or_default();
            self.looked_at = 0;
            if self.may_be_end(candidate) {
                return from.saturating_add(next);
            }
            from = from.saturating_add(next).saturating_add(1);
        }
        bytes.len()
    }

    /// Whether what is held back, with what has been added to it, still may be the end.
    pub(super) fn may_be_end(&mut self, held: &[u8]) -> bool {
        let Some(text) = held.get(HEAD_BYTES..) else {
            return held.get(1).is_none_or(|kind| *kind == TYPE_DESCRIPTION);
        };
        let wanted = wanted_bytes(held);
        if held.get(1) != Some(&TYPE_DESCRIPTION)
            || wanted.saturating_sub(HEAD_BYTES) > DESCRIPTION_BYTES_MAX
            || held.len() > wanted
            || text.first().is_some_and(|first| *first != b'{')
            || held.len() == wanted && text.last().is_some_and(|last| *last != b'}')
        {
            return false;
        }
        let fresh = held.get(self.looked_at.max(HEAD_BYTES)..).unwrap_or_default();
        self.looked_at = held.len();
        fresh.iter().all(|byte| matches!(byte, b' '..=b'~'))
    }
}

/// How many bytes are wanted to see more of a possible end.
pub(super) fn wanted_bytes(held: &[u8]) -> usize {
    match held {
        [_, _, a, b, c, d, ..] => {
            (u32::from_be_bytes([*a, *b, *c, *d]) as usize).saturating_add(HEAD_BYTES)
        }
        _ => HEAD_BYTES,
    }
}

/// Whether what is held back is an end with a description, all of it.
pub(super) fn is_described(held: &[u8]) -> bool {
    held.len() >= HEAD_BYTES && held.len() == wanted_bytes(held)
}

/// Where the end begins in a stream that is all there, if it has a description.
pub(crate) fn described_end(stream: &[u8]) -> Option<usize> {
    let at = Tail::default().find(stream);
    stream.get(at..).is_some_and(is_described).then_some(at)
}

/// Length of the commands at the end of a package.
pub(super) fn package_tail(bytes: &[u8]) -> usize {
    let Some(before) = bytes.strip_suffix(&RUN) else { return 0 };
    let ping = before.len().checked_sub(PING_BYTES).and_then(|at| before.get(at..));
    match ping {
        Some(ping) if ping.starts_with(&PING) => PACKAGE_TAIL_BYTES,
        _ => RUN.len(),
    }
}
