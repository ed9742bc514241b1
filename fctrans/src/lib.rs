//! FCtrans: memory that the guest does not use is neither moved nor kept.
//!
//! | module | what it does |
//! |---|---|
//! | [`memory`] | guest-physical memory, as copies |
//! | [`note`] | the text by which a Linux kernel describes itself |
//! | [`search`] | where that text is |
//! | [`translate`] | from the kernel's addresses to the guest's memory |
//! | [`kernel`] | a kernel that was found and proved to be the one that runs |
//! | [`usage`] | which pages are free, from the flags of every page |
//! | [`working_set`] | which pages in use it is likely to need soon |
//! | [`symbols`] | addresses of the kernel's variables, by name |
//! | [`counters`] | the kernel's own counters of memory |
//! | [`summary`] | memory use, as `free` shows it inside the guest |
//! | [`pattern`] | whether free memory must not be left out |
//! | [`inspect`] | all of it at once |
//! | [`error`] | why nothing could be found out |
//!
//! Guest memory is hostile: every walk is bounded, and what is inconsistent counts as used. A guest's kernel can lie
//! about its own pages, which then read as zeros for itself. Who is not its kernel cannot, in a guest that runs no guests of its own: the processors' registers prove
//! which tables to believe.

pub mod counters;
pub mod error;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
pub mod inspect;
pub mod kernel;
pub mod memory;
pub mod note;
pub mod pattern;
pub mod search;
pub mod summary;
pub mod symbols;
pub mod translate;
pub mod usage;
pub mod working_set;

#[cfg(any(test, feature = "fuzz"))]
mod synthetic;
