//! Entry points for fuzzers: bytes as QEMU or a peer might send them. `migrate-core/fuzz` calls
//! these with libFuzzer; a test replays its corpus.

use crate::delta::Page;
use crate::layout::PAGE_BYTES;
use crate::xbzrle::{Encoded, decode, encode};

/// A delta in XBZRLE. What is accepted changes nothing behind its end, and the page that it makes
/// must come out of the encoder's delta again. Returns whether it was accepted.
pub fn xbzrle(bytes: &[u8]) -> bool {
    let old: Page = std::array::from_fn(|at| (at % 251) as u8);
    let mut new = old;
    let Ok(end) = decode(bytes, &mut new) else { return false };
    assert!(end <= PAGE_BYTES && new.get(end..) == old.get(end..));
    // No delta is longer: in place of two bytes, an equal and a changed one, come three at most.
    let mut delta = [0; 2 * PAGE_BYTES];
    let mut again = old;
    match encode(&old, &new, &mut delta) {
        Encoded::Delta(bytes) => {
            let decoded = decode(delta.get(..bytes).unwrap_or_default(), &mut again);
            assert!(decoded.is_ok_and(|again_end| again_end <= end));
        }
        encoded => assert_eq!(encoded, Encoded::Unchanged),
    }
    assert!(again == new);
    true
}
