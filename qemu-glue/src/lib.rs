//! QMP, attaching to a QEMU process, guest RAM access, dirty tracking, QEMU's migration stream.

pub mod attach;
pub mod check;
pub mod device_state;
pub mod error;
pub mod fuzz;
mod mapped;
pub mod pagemap;
pub mod pager;
pub mod procfs;
pub mod qmp;
pub mod ram;
pub mod stream;
pub mod track;
pub mod uffd;
pub mod vm;
