//! What the QEMU at the destination asks for, seen on the return path as it passes.

use std::sync::{Mutex, OnceLock, PoisonError};

use migrate_core::layout::{PAGE_BYTES, RamLayout};
use qemu_glue::stream::return_path::{PageRequest, ReturnMessage, ReturnReader};

use super::backlog::Backlog;

/// Pages of one request that are looked at: one page of a block, which may be a huge one.
const PAGES_MAX: u64 = (1 << 30) / PAGE_BYTES as u64;

/// A guest's requests.
#[derive(Debug, Default)]
pub struct Requests {
    /// The guest's RAM, once the stream has listed it.
    layout: OnceLock<RamLayout>,
    backlog: Backlog,
    path: Mutex<Path>,
}

#[derive(Debug, Default)]
struct Path {
    reader: ReturnReader,
    /// The block of the request before, by its place.
    block: Option<usize>,
    /// It is not understood: pages are not hurried any more.
    has_failed: bool,
}

impl Requests {
    /// The guest has this RAM.
    pub fn begin(&self, layout: RamLayout) {
        let _only_one_comes = self.layout.set(layout);
    }

    /// Where requested pages are hurried.
    pub fn backlog(&self) -> &Backlog {
        &self.backlog
    }

    /// Takes note of bytes of the return path that are passed on.
    pub fn hear(&self, mut bytes: &[u8]) {
        let mut path = self.path.lock().unwrap_or_else(PoisonError::into_inner);
        let Path { reader, block, has_failed } = &mut *path;
        while !*has_failed {
            match reader.next(&mut bytes) {
                Ok(Some(ReturnMessage::RequestPages(request))) => self.note(request, block),
                Ok(Some(_)) => {}
                Ok(None) => return,
                Err(error) => {
                    // It is for the QEMU here to complain.
                    tracing::warn!(%error, "pages that are asked for are not hurried");
                    *has_failed = true;
                }
            }
        }
    }

    fn note(&self, request: PageRequest<'_>, block: &mut Option<usize>) {
        let Some(layout) = self.layout.get() else { return };
        if let Some(name) = request.block {
            *block = layout.blocks().iter().position(|block| block.name == name);
        }
        let Some(number) = *block else { return };
        let pages = layout.block_pages(number);
        let first = pages.start.saturating_add(request.start_bytes / PAGE_BYTES as u64);
        let count = u64::from(request.length_bytes).div_ceil(PAGE_BYTES as u64).min(PAGES_MAX);
        let end = first.saturating_add(count).min(pages.end);
        (first..end).for_each(|page| self.backlog.request(page));
    }
}

#[cfg(test)]
mod tests {
    use migrate_core::layout::BlockSpec;

    use super::*;

    #[test]
    fn requests_name_pages_of_blocks() {
        let requests = Requests::default();
        let block = |name: &str, pages: u64| BlockSpec {
            name: name.into(),
            length_bytes: pages * PAGE_BYTES as u64,
            page_bytes: PAGE_BYTES as u64,
        };
        requests.begin(RamLayout::new(vec![block("a", 10), block("b", 20)]).unwrap());
        requests.backlog().begin(30);
        let mut path = Vec::new();
        let mut ask = |block, page: u64, length_bytes| {
            let start_bytes = page * PAGE_BYTES as u64;
            let request = PageRequest { block, start_bytes, length_bytes };
            ReturnMessage::RequestPages(request).write(&mut path).unwrap();
        };
        ask(Some("b"), 3, 4096);
        ask(None, 19, 8192);
        ask(None, u64::MAX >> 12, u32::MAX);
        ask(Some("none"), 1, 4096);
        ask(None, 2, 4096);
        ask(Some("a"), 9, 4096);
        path.chunks(5).for_each(|piece| requests.hear(piece));
        // What is not understood is passed by.
        requests.hear(&[0xff; 64]);
        requests.hear(&[0xff; 64]);
        for page in 0..30 {
            requests.backlog().push(page, None).unwrap();
        }
        let urgent = requests.backlog().urgent(30).unwrap();
        assert_eq!(urgent.iter().map(|(page, _)| *page).collect::<Vec<_>>(), [9, 13, 29]);
    }
}
