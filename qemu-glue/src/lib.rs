//! QMP, attaching to a QEMU process, guest RAM access and dirty tracking.

pub mod check;
pub mod device_state;
pub mod qmp;
