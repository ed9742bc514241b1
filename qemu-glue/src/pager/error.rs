//! Why a QEMU's RAM could not be paged.

use std::io;

use migrate_core::error::{Classify, ErrorBin};
use migrate_core::layout::PageIndex;
use thiserror::Error;

use crate::error::ProcError;

/// What went wrong in demand paging.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PagerError {
    /// The kernel lacks what paging needs.
    #[error("The kernel lacks {what}; use a kernel that has it, or move the VM by pre-copy")]
    Unsupported {
        /// What is missing.
        what: &'static str,
    },
    /// Pages of this size cannot be taken away.
    #[error(
        "RAM block {block:?} has pages of {page_bytes} bytes; part of a guest's memory can lie elsewhere only \
         if its pages have 4096: start QEMU without hugetlb=on or hugepages for it"
    )]
    LargePages {
        /// The block.
        block: String,
        /// Size in bytes of its pages.
        page_bytes: u64,
    },
    /// The handshake with the userfaultfd failed.
    #[error("The userfaultfd of process {pid} refused the handshake; was it used before?")]
    Handshake {
        /// The process.
        pid: i32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Another userfaultfd owns the mapping.
    #[error(
        "RAM block {block:?} of process {pid} is registered with another userfaultfd; end the \
         other engine, postcopy or background snapshot of this QEMU, then try again"
    )]
    Busy {
        /// The block.
        block: String,
        /// The process.
        pid: i32,
    },
    /// A block was unplugged, moved or mapped anew.
    #[error(
        "RAM block {block:?} of process {pid} is no longer mapped as it was when it was opened"
    )]
    Changed {
        /// The block.
        block: String,
        /// The process.
        pid: i32,
    },
    /// Pages were to be placed, or a registration to be taken over, where none is.
    #[error(
        "RAM block {block:?} of process {pid} is not registered for paging: paging has ended or \
         never began, or the block was unplugged or mapped anew"
    )]
    NotRegistered {
        /// The block.
        block: String,
        /// The process.
        pid: i32,
    },
    /// No whole host pages, none at all, or not all of them within one block.
    #[error(
        "{bytes} bytes from {first} on are not whole host pages within one RAM block (host pages \
         of {page_bytes} bytes)"
    )]
    OutOfRange {
        /// First page.
        first: PageIndex,
        /// Length in bytes.
        bytes: u64,
        /// Size in bytes of the block's host pages; 0 if there is no such block.
        page_bytes: u64,
    },
    /// There is no memory for another page.
    #[error(
        "No memory for a page of RAM block {block:?} of process {pid}; enlarge its tmpfs (mount -o \
         remount,size=...) or huge page pool (nr_hugepages), or raise the memory limit of QEMU's \
         control group, then go on"
    )]
    Full {
        /// The block.
        block: String,
        /// The process.
        pid: i32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// QEMU has ended.
    #[error("Process {pid} has ended while its memory was being paged")]
    Gone {
        /// The process.
        pid: i32,
    },
    /// An operation on a block failed.
    #[error("Cannot {what} RAM block {block:?} of process {pid}")]
    Block {
        /// What was to be done.
        what: &'static str,
        /// The block.
        block: String,
        /// The process.
        pid: i32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// An operation on the descriptor failed.
    #[error("Cannot {what} the userfaultfd of process {pid}")]
    Descriptor {
        /// What was to be done.
        what: &'static str,
        /// The process.
        pid: i32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// /proc did not answer.
    #[error("Cannot check the mappings of process {pid}")]
    Proc {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: ProcError,
    },
}

impl Classify for PagerError {
    fn bin(&self) -> ErrorBin {
        match self {
            Self::Proc { source, .. } => source.bin(),
            Self::Unsupported { .. }
            | Self::LargePages { .. }
            | Self::Busy { .. }
            | Self::NotRegistered { .. }
            | Self::OutOfRange { .. } => ErrorBin::CallerMisuse,
            _ => ErrorBin::System,
        }
    }
}
