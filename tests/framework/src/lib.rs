//! Boots guests, joins namespaces and reads the guest's heartbeat: what tests and bench share.
//!
//! ```text
//!  Vm ──┬─ console.log (ttyS0) ─ Console: GUEST READY, assert_clean
//!       ├─ heartbeat.sock (ttyS1) ─ Heartbeat: host time of every beat, gaps, two guests at once
//!       ├─ command.sock (ttyS2) ─ Guest: "checker report", "writer stop", ...
//!       ├─ qmp-test.sock ─ Qmp, for the test
//!       └─ qmp-engine.sock ─ for the engine, since a QMP socket takes one client at a time
//! ```
//! Under libvirt a guest has the same three ports ([`libvirt::Domain`]).
//!
//! Blocking code and threads, no async runtime. Everything that is started or created here is
//! stopped or removed by `Drop`, processes by their ids; and by the kernel if the test itself dies.

pub mod cgroup;
pub mod cluster;
pub mod cpu;
pub mod disk;
pub mod engine;
pub mod env;
pub mod guest;
pub mod heartbeat;
pub mod hugepages;
pub mod libvirt;
pub mod load;
pub mod machine;
pub mod memory;
pub mod memory_server;
pub mod metrics;
pub mod netns;
pub mod ports;
pub mod process;
pub mod pulse;
pub mod qmp;
pub mod ram_disk;
pub mod ram_watch;
pub mod slow_disk;
pub mod spec;
pub mod split;
pub mod split_net;
pub mod vm;
pub mod wait;
pub mod worker;

mod console;

pub use cgroup::Cgroup;
pub use cluster::{Cluster, ClusterHost, HostPlan};
pub use console::Console;
pub use engine::{Engine, EngineOutput, Pki};
pub use env::{Env, QemuKind};
pub use guest::Guest;
pub use heartbeat::{Beat, Heartbeat};
pub use libvirt::LibvirtPair;
pub use memory_server::MemoryServer;
pub use netns::NetnsPair;
pub use ports::Ports;
pub use pulse::Pulse;
pub use qmp::Qmp;
pub use ram_disk::RamDisk;
pub use ram_watch::{RamSeen, RamWatch};
pub use slow_disk::SlowDisk;
pub use spec::{Backend, Disk, Nic, VmSpec};
pub use split::{Pager, Status};
pub use split_net::SplitNet;
pub use vm::Vm;
