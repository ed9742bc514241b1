//! Contents of pages in the pieces in which they came.
//!
//! quinn hands out a received stream packet by packet. Joining the packets into one buffer would
//! copy every byte once more, into memory that has to be found first; the pieces are written to the
//! guest's memory as they are instead.
//!
//! Invariants: no piece is empty; pieces that came smaller than [`PIECE_BYTES_MIN`] are joined, so
//! that a peer that sends tiny packets cannot make the list long.

use bytes::{Bytes, BytesMut};

/// Received pieces below this many bytes are copied together.
pub const PIECE_BYTES_MIN: usize = 1024;

/// Bytes in one or more pieces. Two are equal if their bytes are.
#[derive(Debug, Clone, Default)]
pub struct Payload {
    pieces: Vec<Bytes>,
    bytes: usize,
}

impl Payload {
    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The pieces, in order.
    pub fn pieces(&self) -> &[Bytes] {
        &self.pieces
    }

    /// The pieces, given away.
    pub fn into_pieces(self) -> Vec<Bytes> {
        self.pieces
    }

    /// All bytes in one buffer.
    pub fn to_vec(&self) -> Vec<u8> {
        self.pieces.concat()
    }

    fn push(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.bytes = self.bytes.saturating_add(piece.len());
            self.pieces.push(piece);
        }
    }
}

impl PartialEq for Payload {
    fn eq(&self, other: &Self) -> bool {
        let of = |payload: &Self| payload.pieces.iter().flatten().copied().collect::<Vec<_>>();
        self.bytes == other.bytes && of(self) == of(other)
    }
}

impl Eq for Payload {}

impl FromIterator<Bytes> for Payload {
    fn from_iter<T: IntoIterator<Item = Bytes>>(pieces: T) -> Self {
        let mut payload = Self::default();
        pieces.into_iter().for_each(|piece| payload.push(piece));
        payload
    }
}

impl From<Bytes> for Payload {
    fn from(bytes: Bytes) -> Self {
        Self::from_iter([bytes])
    }
}

impl From<Vec<u8>> for Payload {
    fn from(bytes: Vec<u8>) -> Self {
        Bytes::from(bytes).into()
    }
}

/// Collects pieces as they arrive.
#[derive(Debug, Default)]
pub(crate) struct Collector {
    payload: Payload,
    /// Pieces too small to stand alone.
    small: BytesMut,
}

impl Collector {
    /// Bytes collected.
    pub(crate) fn len(&self) -> usize {
        self.payload.len().saturating_add(self.small.len())
    }

    /// Adds what came next.
    pub(crate) fn push(&mut self, piece: Bytes) {
        if piece.len() < PIECE_BYTES_MIN {
            self.small.extend_from_slice(&piece);
            return;
        }
        self.payload.push(self.small.split().freeze());
        self.payload.push(piece);
    }

    /// All that came.
    pub(crate) fn finish(mut self) -> Payload {
        self.payload.push(self.small.freeze());
        self.payload
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Nothing is lost or reordered, and the number of pieces is bounded by the bytes.
        #[test]
        fn pieces_keep_their_order(sizes in prop::collection::vec(0usize..4000, 0..40)) {
            let mut whole = Vec::new();
            let mut collector = Collector::default();
            for (number, size) in sizes.iter().enumerate() {
                let piece: Vec<u8> = (0..*size).map(|at| (at ^ number) as u8).collect();
                whole.extend_from_slice(&piece);
                collector.push(piece.into());
                prop_assert_eq!(collector.len(), whole.len());
            }
            let payload = collector.finish();
            prop_assert_eq!(payload.len(), whole.len());
            prop_assert!(payload.pieces().iter().all(|piece| !piece.is_empty()));
            prop_assert!(payload.pieces().len() <= 2 * (whole.len() / PIECE_BYTES_MIN) + 1);
            prop_assert_eq!(payload.to_vec(), whole.clone());
            prop_assert_eq!(payload, Payload::from(whole));
        }
    }

    #[test]
    fn different_bytes_are_different() {
        assert_ne!(Payload::from(vec![1, 2]), Payload::from(vec![1, 3]));
        assert_ne!(Payload::from(vec![1, 2]), Payload::default());
    }
}
