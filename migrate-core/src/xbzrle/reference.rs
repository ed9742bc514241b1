//! XBZRLE as its format is told, byte by byte: what the encoder is tested and measured against.

use crate::delta::Page;
use crate::xbzrle::Encoded;

/// Writes the delta from `old` to `new` into `out`.
pub(crate) fn encode(old: &Page, new: &Page, out: &mut [u8]) -> Encoded {
    let (mut at, mut written) = (0, 0);
    while at < new.len() {
        if written + 2 > out.len() {
            return Encoded::Overflow;
        }
        let start = at;
        while at < new.len() && old[at] == new[at] {
            at += 1;
        }
        if at == new.len() {
            break;
        }
        written += put_length(at - start, &mut out[written..]);
        if written + 2 > out.len() {
            return Encoded::Overflow;
        }
        let start = at;
        while at < new.len() && old[at] != new[at] {
            at += 1;
        }
        written += put_length(at - start, &mut out[written..]);
        if written + (at - start) > out.len() {
            return Encoded::Overflow;
        }
        out[written..written + (at - start)].copy_from_slice(&new[start..at]);
        written += at - start;
    }
    if written == 0 { Encoded::Unchanged } else { Encoded::Delta(written) }
}

fn put_length(length: usize, out: &mut [u8]) -> usize {
    if length < 0x80 {
        out[0] = length as u8;
        return 1;
    }
    out[0] = (length & 0x7f | 0x80) as u8;
    out[1] = (length >> 7) as u8;
    2
}
