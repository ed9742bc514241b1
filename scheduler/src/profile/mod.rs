//! A host's real figures, and a cluster made of several hosts'.
//!
//! ```text
//!   /proc, cgroup ─┐
//!   QMP ───────────┼─► Profiler ─► HostReport ─► (published) ─► assemble ─► model::Cluster
//!   guest memory ──┤
//!   nftables ──────┘
//! ```
//!
//! | module | what it does | I/O |
//! |---|---|---|
//! | [`parse`] | what the kernel, QEMU and nft say, as figures | none |
//! | [`rates`] | counters, as rates | none |
//! | [`report`] | what a host says of itself and its guests | none |
//! | [`mod@assemble`] | reports of several hosts, as a cluster | none |
//! | [`read`] | files, up to a limit | yes |
//! | [`cgroup`] | limits and use of control groups | yes |
//! | [`host`] | the host's own figures | yes |
//! | [`guest`] | a guest's process, processors, interfaces and disks | yes |
//! | `monitor` | what QEMU says of it | yes |
//! | [`memory`] | a guest's memory, without its help | yes |
//! | `sample` | what a guest's memory would take to move | yes |
//! | [`graybox`] | applications' figures out of logs | yes |
//! | [`traffic`] | what guests send to whom | yes |
//! | [`profiler`] | all of it, at an interval | yes |
//!
//! This is the only module of the crate's decisions and figures that reads files, sockets and clocks. It changes one thing
//! beside its own tables in nftables: a balloon is told to ask its guest for figures.
//!
//! Invariants: whatever cannot be read is said so in the report and left out, and nothing that a guest or a file says can
//! be longer or larger than a named limit; a monitor is held only while its guest is asked, since QEMU serves one client
//! at a time.

pub mod assemble;
pub mod cgroup;
pub mod graybox;
pub mod guest;
pub mod host;
pub mod memory;
mod monitor;
pub mod parse;
pub mod profiler;
pub mod rates;
pub mod read;
pub mod report;
mod sample;
pub mod traffic;

pub use self::assemble::{Assembled, Received, assemble};
pub use self::profiler::{Profiler, Settings};
pub use self::report::{GuestReport, HostReport, ReportError};
