//! Why nothing could be found out about a guest.

use migrate_core::error::{Classify, ErrorBin};
use qemu_glue::ram::RamError;
use thiserror::Error;

use crate::memory::{Gpa, Gva};

/// Why introspection found nothing. None of these harms a migration: then all memory counts as used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum IntrospectError {
    /// There is no note, or none that holds.
    #[error(
        "No Linux kernel that describes itself (VMCOREINFO) runs in the guest; it needs CONFIG_CRASH_CORE or \
         CONFIG_VMCORE_INFO, as distributions have it"
    )]
    NoKernel,
    /// The note is longer than any kernel's, or no text.
    #[error("The kernel's note cannot be read: {why}")]
    Note {
        /// What is wrong.
        why: &'static str,
    },
    /// The note lacks something.
    #[error("The kernel's note does not have {key}")]
    Missing {
        /// What it lacks.
        key: String,
    },
    /// The note has a value that no kernel has.
    #[error("The kernel's note has {key} = {value}, which cannot be")]
    Implausible {
        /// Of what.
        key: String,
        /// The value.
        value: String,
    },
    /// An address of the kernel leads nowhere.
    #[error("The kernel has nothing at {:#x}", at.0)]
    NotMapped {
        /// The address.
        at: Gva,
    },
    /// An address that is none of the guest's RAM.
    #[error("The guest has no RAM at {:#x}", at.0)]
    NoRam {
        /// The address.
        at: Gpa,
    },
    /// A page that is not on this host.
    #[error("Page {page} of the guest is on another host")]
    Elsewhere {
        /// Its number.
        page: u64,
    },
    /// A name that the kernel does not export to its tables.
    #[error("The kernel has no symbol {name}")]
    NoSymbol {
        /// The name.
        name: String,
    },
    /// The tables of names are not as they should be.
    #[error("The kernel's tables of symbols are not what they should be: {why}")]
    Symbols {
        /// What is wrong.
        why: &'static str,
    },
    /// The kernel that was found is not the one that the processors run.
    #[error(
        "The kernel that was found is not the one that runs: the guest was started anew, or has no kernel yet"
    )]
    NotRunning,
    /// The registers of its processors may be those of a guest within the guest.
    #[error(
        "The guest may run guests of its own (VMX or SVM is on), so that it cannot be known which kernel runs"
    )]
    Nested,
    /// Free memory has a content that the kernel relies on.
    #[error(
        "The guest fills freed memory with a pattern ({how}), so that free memory cannot be left out"
    )]
    Poisoned {
        /// By what that is known.
        how: &'static str,
    },
    /// The guest's RAM could not be read.
    #[error("The guest's memory cannot be read")]
    Ram(#[from] RamError),
}

impl Classify for IntrospectError {
    fn bin(&self) -> ErrorBin {
        match self {
            Self::Ram(error) => error.bin(),
            _ => ErrorBin::System,
        }
    }
}
