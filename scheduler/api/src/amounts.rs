//! Amounts of what hosts have and guests take.

use std::ops::{Add, AddAssign, Index, IndexMut, Sub, SubAssign};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a host can run out of.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Resource {
    /// Processor time.
    Cpu,
    /// Memory.
    Memory,
    /// The network interface's rate.
    Network,
    /// Disks' rate.
    Disk,
}

impl Resource {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Cpu, Self::Memory, Self::Network, Self::Disk];

    /// What people call it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "CPU",
            Self::Memory => "memory",
            Self::Network => "network",
            Self::Disk => "disk",
        }
    }
}

/// So much of everything. Differences may be negative.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Amounts {
    /// Processors kept busy.
    pub cpu_cores: f64,
    /// Memory in MiB.
    pub memory_mib: f64,
    /// Traffic through the network interface, both directions together, in Mbit/s.
    pub network_mbit: f64,
    /// Disk traffic, both directions together, in MiB/s.
    pub disk_mib: f64,
}

impl Amounts {
    /// Nothing.
    pub const ZERO: Self =
        Self { cpu_cores: 0.0, memory_mib: 0.0, network_mbit: 0.0, disk_mib: 0.0 };

    /// Whether no amount is larger than the other's.
    #[must_use]
    pub fn fits(&self, room: &Self) -> bool {
        Resource::ALL.into_iter().all(|resource| self[resource] <= room[resource])
    }

    /// The larger of both, for each resource.
    #[must_use]
    pub fn max(&self, other: &Self) -> Self {
        let mut larger = *self;
        for resource in Resource::ALL {
            larger[resource] = larger[resource].max(other[resource]);
        }
        larger
    }

    /// All amounts times a factor.
    #[must_use]
    pub fn times(&self, factor: f64) -> Self {
        let mut product = *self;
        for resource in Resource::ALL {
            product[resource] *= factor;
        }
        product
    }

    /// The share of `capacity` that this is, for each resource. Of what there is none, nothing can be taken: 0 without
    /// need, infinite with.
    #[must_use]
    pub fn share_of(&self, capacity: &Self) -> Self {
        let mut shares = Self::ZERO;
        for resource in Resource::ALL {
            shares[resource] = match (self[resource] > 0.0, capacity[resource] > 0.0) {
                (_, true) => self[resource] / capacity[resource],
                (true, false) => f64::INFINITY,
                (false, false) => 0.0,
            };
        }
        shares
    }
}

impl Index<Resource> for Amounts {
    type Output = f64;

    fn index(&self, resource: Resource) -> &f64 {
        match resource {
            Resource::Cpu => &self.cpu_cores,
            Resource::Memory => &self.memory_mib,
            Resource::Network => &self.network_mbit,
            Resource::Disk => &self.disk_mib,
        }
    }
}

impl IndexMut<Resource> for Amounts {
    fn index_mut(&mut self, resource: Resource) -> &mut f64 {
        match resource {
            Resource::Cpu => &mut self.cpu_cores,
            Resource::Memory => &mut self.memory_mib,
            Resource::Network => &mut self.network_mbit,
            Resource::Disk => &mut self.disk_mib,
        }
    }
}

impl AddAssign for Amounts {
    fn add_assign(&mut self, other: Self) {
        self.cpu_cores += other.cpu_cores;
        self.memory_mib += other.memory_mib;
        self.network_mbit += other.network_mbit;
        self.disk_mib += other.disk_mib;
    }
}

impl SubAssign for Amounts {
    fn sub_assign(&mut self, other: Self) {
        self.cpu_cores -= other.cpu_cores;
        self.memory_mib -= other.memory_mib;
        self.network_mbit -= other.network_mbit;
        self.disk_mib -= other.disk_mib;
    }
}

impl Add for Amounts {
    type Output = Self;

    fn add(mut self, other: Self) -> Self {
        self += other;
        self
    }
}

impl Sub for Amounts {
    type Output = Self;

    fn sub(mut self, other: Self) -> Self {
        self -= other;
        self
    }
}
