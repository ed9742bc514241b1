//! A split guest on its testbed: memory servers before it, its pager and its work after it.
//!
//! ```text
//!  start_servers ──> migrate split ──> work: each phase of the worker, warm-up then measured
//!                                       └─ status of the pager before and after each
//!                                      then all that the worker filled is compared
//! ```
//! Work is measured in the same way for a guest that was not split. Invariant: what is recorded was read from
//! memory that proved to be right afterwards.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use framework::memory_server::ServerOptions;
use framework::split::{Pager, Status};
use framework::worker;
use framework::{Engine, MemoryServer, Vm};
use serde::{Deserialize, Serialize};

use crate::godwit::tail;
use crate::interrupt;
use crate::scenario::{AccessPhase, SplitPart};
use crate::testbed::{Bed, Link};

/// Where a memory server listens; its namespace is ours.
const PORT: u16 = 7701;

/// Longest wait until all that a worker filled, up to 5 GiB, was brought to the main host once and compared.
const CHECK_WITHIN: Duration = Duration::from_secs(900);

/// Who pages a guest. All end when it is dropped.
#[derive(Debug)]
pub(crate) struct Paged {
    /// `migrate receive`.
    pub(crate) receive: Engine,
    /// The memory servers.
    pub(crate) servers: Vec<MemoryServer>,
}

impl Paged {
    /// What all of them have said, for the text of a failure.
    pub(crate) fn said(&self) -> String {
        let servers = self.servers.iter();
        let servers = servers.map(|one| format!("{}: {}", one.address(), tail(&one.stderr())));
        let receive = format!("receive: {}", tail(&self.receive.stderr()));
        std::iter::once(receive).chain(servers).collect::<Vec<_>>().join("\n")
    }
}

/// What a guest did in a phase.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Access {
    /// Which.
    pub(crate) phase: AccessPhase,
    /// MiB a second that it went through.
    pub(crate) mib_per_s: f64,
    /// Of a split guest: faults that a server served meanwhile.
    pub(crate) fetched: Option<u64>,
    /// Of a split guest: pages that left the main host meanwhile.
    pub(crate) evicted: Option<u64>,
}

/// What a guest did after its arrival.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Worked {
    /// The phases in their order.
    pub(crate) access: Vec<Access>,
    /// The pager's status right after the split.
    pub(crate) arrived: Option<Status>,
    /// The same after the phases.
    pub(crate) status: Option<Status>,
}

impl Worked {
    /// MiB a second of a phase, of the first if it ran several times.
    pub(crate) fn mib_per_s(&self, phase: AccessPhase) -> Option<f64> {
        self.access.iter().find(|one| one.phase == phase).map(|one| one.mib_per_s)
    }
}

/// Starts the memory servers of a scenario, each in its namespace.
///
/// # Errors
/// One does not start.
pub(crate) fn start_servers(bed: &Bed, link: &Link, part: &SplitPart) -> Result<Vec<MemoryServer>> {
    let start = |((netns, address), identity): ((&str, Ipv4Addr), &PathBuf)| {
        MemoryServer::start(&ServerOptions {
            program: &bed.migrate,
            identity,
            listen: &format!("{address}:{PORT}"),
            capacity_mib: part.capacity_mib,
            netns: Some(netns),
            extra: &[],
        })
    };
    link.servers().into_iter().zip(&bed.servers).map(start).collect()
}

/// Has the guest's worker go through the phases, then compare all its memory.
///
/// # Errors
/// It or the pager does not answer, its memory is wrong, or an interruption.
pub(crate) fn work(
    bed: &Bed,
    vm: &mut Vm,
    part: &SplitPart,
    paged: Option<&Paged>,
) -> Result<Worked> {
    let status = |vm: &Vm| -> Result<Option<Status>> {
        let pager = || Pager::of(&bed.migrate, vm, bed.journal("destination"));
        paged.map(|_| pager().status()).transpose()
    };
    let arrived = status(vm)?;
    let mut access = vec![];
    let mut before = arrived.clone();
    for phase in &part.phases {
        interrupt::check()?;
        worker::set_phase(vm, phase.worker())?;
        std::thread::sleep(Duration::from_secs(part.warm_up_s));
        let first = worker::report(vm)?;
        std::thread::sleep(Duration::from_secs(part.phase_s));
        let last = worker::report(vm)?;
        let mib_per_s = last.mib_per_s(&first).context("The guest's clock stands still")?;
        let after = status(vm)?;
        let since = |count: fn(&Status) -> u64| {
            let (before, after) = (before.as_ref()?, after.as_ref()?);
            Some(count(after).saturating_sub(count(before)))
        };
        access.push(Access {
            phase: *phase,
            mib_per_s,
            fetched: since(|status| status.faults.fetched),
            evicted: since(|status| status.evicted.pages),
        });
        before = after;
    }
    worker::set_phase(vm, worker::Phase::Idle)?;
    let status = before;
    worker::check(vm, CHECK_WITHIN).context("Its memory is not what it was")?;
    Ok(Worked { access, arrived, status })
}
