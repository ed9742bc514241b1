//! Buffers of batches, used again once QUIC has no more need of them.
//!
//! There are as many as were ever under way at once, which the gate and the lanes' windows bound.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use migrate_core::encode::PageBuffer;

/// The buffers that are free.
#[derive(Debug, Clone, Default)]
pub struct Buffers(Arc<Mutex<Vec<PageBuffer>>>);

impl Buffers {
    /// A free buffer, or a new one.
    pub fn take(&self) -> PageBuffer {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    /// Gives back a buffer that did not travel.
    pub fn put(&self, buffer: PageBuffer) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
    }

    /// The contents as bytes that travel; the buffer is free again when the last reference is gone,
    /// that is, when the peer has acknowledged them.
    pub fn lend(&self, buffer: PageBuffer) -> Bytes {
        Bytes::from_owner(Lent { buffer, home: self.clone() })
    }
}

struct Lent {
    buffer: PageBuffer,
    home: Buffers,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        self.buffer.as_ref()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.home.put(std::mem::take(&mut self.buffer));
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use migrate_core::encode::{BatchBuilder, Reason};
    use migrate_core::layout::{PAGE_BYTES, PageIndex};
    use migrate_core::page_table::SourcePages;

    use super::*;

    #[test]
    fn a_buffer_comes_back_when_nobody_holds_its_bytes() {
        let (buffers, table) = (Buffers::default(), SourcePages::new(1, false, 0));
        let mut builder = BatchBuilder::new();
        let mut address = None;
        for fill in 1u8..4 {
            builder.reuse(buffers.take());
            let read = |_, buffer: &mut [u8]| {
                buffer.fill(fill);
                Ok::<(), Infallible>(())
            };
            builder.push(&table, PageIndex(0), 1, Reason::Dirty, read).unwrap();
            let bytes = buffers.lend(builder.take().unwrap().content);
            assert_eq!(bytes, vec![fill; PAGE_BYTES]);
            assert_eq!(*address.get_or_insert(bytes.as_ptr()), bytes.as_ptr(), "another buffer");
            let rest = bytes.slice(PAGE_BYTES / 2..);
            drop(bytes);
            assert!(buffers.take().is_empty(), "a buffer that is still in use");
            drop(rest);
        }
    }
}
