//! Page-aligned memory that the compiler must believe is read by somebody else.

use guest_programs::PAGE_BYTES;

/// One page.
#[derive(Clone)]
#[repr(C, align(4096))]
pub(crate) struct Page(pub(crate) [u8; PAGE_BYTES]);

/// Pages in one MiB.
pub(crate) const PAGES_PER_MIB: u64 = (1 << 20) / PAGE_BYTES as u64;

/// `count` pages of zeros, all of them touched.
pub(crate) fn pages(count: u64) -> Vec<Page> {
    let mut pages = vec![Page([0; PAGE_BYTES]); count as usize];
    std::hint::black_box(pages.as_mut_slice());
    pages
}
