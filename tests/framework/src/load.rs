//! The guest's program `load`: takes processor time, memory and network of its host as it is told.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::guest::number;
use crate::vm::Vm;

/// What a guest's `load` does, and has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Share of each processor that it is busy with now.
    pub percent: u64,
    /// Memory that it holds, MiB.
    pub mib: u64,
    /// Time in which it was busy, microseconds over all processors.
    pub worked_us: u64,
    /// Bytes that it has sent, without headers.
    pub sent_bytes: u64,
    /// Bytes that it has received, without headers.
    pub received_bytes: u64,
    /// The guest's clock, microseconds.
    pub elapsed_us: u64,
}

impl Load {
    fn parse(report: &str) -> Result<Self> {
        ensure!(report.starts_with("LOAD OK"), "The guest says {report}");
        Ok(Self {
            percent: number(report, "cpu")?,
            mib: number(report, "mib")?,
            worked_us: number(report, "worked_us")?,
            sent_bytes: number(report, "sent")?,
            received_bytes: number(report, "received")?,
            elapsed_us: number(report, "elapsed_us")?,
        })
    }
}

/// What it does.
///
/// # Errors
/// The guest does not answer, or has no such program.
pub fn report(vm: &mut Vm) -> Result<Load> {
    Load::parse(&vm.ask("load report")?)
}

/// Keeps every processor busy for this share of the time.
///
/// # Errors
/// As [`report`].
pub fn cpu(vm: &mut Vm, percent: u64) -> Result<Load> {
    Load::parse(&vm.ask(&format!("load cpu {percent}"))?)
}

/// The same for a while, and then as before.
///
/// # Errors
/// As [`report`].
pub fn spike(vm: &mut Vm, percent: u64, time: Duration) -> Result<Load> {
    Load::parse(&vm.ask(&format!("load cpu {percent} {}", time.as_millis()))?)
}

/// Holds so much memory and goes on writing it: more than the guest has is swapped, if it has a swap.
///
/// # Errors
/// As [`report`].
pub fn memory(vm: &mut Vm, mib: u64) -> Result<Load> {
    Load::parse(&vm.ask(&format!("load memory {mib}"))?)
}

/// Sends so much to another guest with this program; 0 ends it.
///
/// # Errors
/// As [`report`].
pub fn send(vm: &mut Vm, to: Ipv4Addr, kbit: u64) -> Result<Load> {
    Load::parse(&vm.ask(&format!("load send {to} {kbit}"))?)
}

/// Makes the guest's disk its swap; what was on it is lost.
///
/// # Errors
/// It has none.
pub fn swap_on(vm: &mut Vm) -> Result<()> {
    vm.ask("sh busybox mkswap /dev/vda && busybox swapon /dev/vda").map(drop)
}
