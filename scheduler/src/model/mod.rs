//! A cluster as it is seen at one moment: hosts, guests, and who talks to whom.
//!
//! Everything that detects, plans and simulates works on these types; none of it reads a clock, a file or a socket.
//! Invariant: indices in a [`Cluster`] that [`Cluster::check`] accepts are valid, and its traffic is symmetric.

pub mod placement;
pub mod rules;
#[cfg(test)]
pub(crate) mod synthetic;
pub mod traffic;

pub use scheduler_api::amounts::{self, Amounts, Resource};
pub use scheduler_api::figures::{GrayBox, HostState};
use serde::{Deserialize, Serialize};

pub use self::placement::Placement;
pub use self::rules::{Obstacle, Rules};
pub use self::traffic::Traffic;
use crate::cost::Sampled;

/// What a host has of something of which it is not known how much that is: nobody is kept away by it, and it never has too
/// little of it.
pub const UNBOUNDED: f64 = 1e12;

/// A host, by its place in [`Cluster::hosts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct HostIndex(pub usize);

/// A guest, by its place in [`Cluster::vms`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct VmIndex(pub usize);

/// A host.
#[derive(Debug, Clone, PartialEq)]
pub struct Host {
    /// Its name, as in its certificate.
    pub name: String,
    /// What it has. Of memory, what is left for guests and the host's own programs.
    pub capacity: Amounts,
    /// What its own programs take.
    pub own: Amounts,
    /// What may be done with it.
    pub state: HostState,
    /// Whether a guest is on its way from here or to here.
    pub is_migrating: bool,
}

/// A guest's memory in MiB.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Memory {
    /// What the guest may use now: its RAM without what a balloon holds.
    pub allocated_mib: f64,
    /// What it uses, page cache included.
    pub used_mib: f64,
    /// What it uses and cannot give up, without page cache.
    pub needed_mib: f64,
    /// It is never given less than this.
    pub reserve_mib: f64,
    /// RAM that it was started with: it is never given more.
    pub max_mib: f64,
    /// Pages that it writes to its swap, a second.
    pub swap_writes_per_s: f64,
}

/// A move that a guest has made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LastMove {
    /// When it ended, in seconds on the scheduler's clock.
    pub at_s: f64,
    /// Where the guest was before.
    pub from: HostIndex,
}

/// A guest.
#[derive(Debug, Clone, PartialEq)]
pub struct Vm {
    /// Its name; the same guest has the same name wherever it runs.
    pub name: String,
    /// Where it runs.
    pub host: HostIndex,
    /// Virtual processors: it cannot use more.
    pub vcpus: u32,
    /// What it takes at present. Network: only what it exchanges with the world outside of the cluster; the rest is in
    /// [`Cluster::traffic`]. Memory: as [`Memory::allocated_mib`].
    pub usage: Amounts,
    /// What it is estimated to want at its peak, of the same kinds; never less than what it takes.
    pub peak: Amounts,
    /// Share of the time in which it wanted to run and had to wait, 0 to 1.
    pub steal: f64,
    /// Its memory.
    pub memory: Memory,
    /// What its application says of itself, if it does.
    pub gray_box: Option<GrayBox>,
    /// Memory that it writes, in MiB/s, each page counted once a second.
    pub dirty_mib_per_s: f64,
    /// What its memory would take to move, where a sample was taken: this counts, then, and not the figure above.
    pub sampled: Option<Sampled>,
    /// Guests of higher priority are moved and squeezed later.
    pub priority: u8,
    /// Whether it is on its way already.
    pub is_migrating: bool,
    /// Its last move.
    pub last_move: Option<LastMove>,
}

/// Everything that is known at one moment.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Cluster {
    /// The hosts.
    pub hosts: Vec<Host>,
    /// The guests.
    pub vms: Vec<Vm>,
    /// What guests exchange with each other.
    pub traffic: Traffic,
    /// What its owner wants of places.
    pub rules: Rules,
}

impl Cluster {
    /// A host.
    #[must_use]
    pub fn host(&self, index: HostIndex) -> &Host {
        &self.hosts[index.0]
    }

    /// A guest.
    #[must_use]
    pub fn vm(&self, index: VmIndex) -> &Vm {
        &self.vms[index.0]
    }

    /// All hosts' indices.
    pub fn host_indices(&self) -> impl Iterator<Item = HostIndex> + use<> {
        (0..self.hosts.len()).map(HostIndex)
    }

    /// All guests' indices.
    pub fn vm_indices(&self) -> impl Iterator<Item = VmIndex> + use<> {
        (0..self.vms.len()).map(VmIndex)
    }

    /// Checks that all indices lead somewhere and all figures are numbers that can be.
    ///
    /// # Errors
    /// The first that is not so, in words.
    pub fn check(&self) -> Result<(), String> {
        for host in &self.hosts {
            for resource in Resource::ALL {
                let (has, own) = (host.capacity[resource], host.own[resource]);
                if !(has.is_finite() && has >= 0.0 && own.is_finite() && own >= 0.0) {
                    let (name, resource) = (&host.name, resource.name());
                    return Err(format!("Host {name}: {resource} of {has} with {own} its own"));
                }
            }
        }
        for vm in &self.vms {
            let name = &vm.name;
            if vm.host.0 >= self.hosts.len() {
                return Err(format!("Guest {name} runs on a host that is not known"));
            }
            let mut figures = vec![vm.steal, vm.dirty_mib_per_s, vm.memory.allocated_mib];
            figures.extend(vm.sampled.iter().flat_map(Sampled::figures));
            figures.extend(Resource::ALL.map(|resource| vm.usage[resource]));
            figures.extend(Resource::ALL.map(|resource| vm.peak[resource]));
            if figures.iter().any(|figure| !figure.is_finite() || *figure < 0.0) {
                return Err(format!("Guest {name} has a figure that cannot be: {figures:?}"));
            }
        }
        self.traffic.check(self.vms.len())?;
        self.rules.check(self)
    }
}
