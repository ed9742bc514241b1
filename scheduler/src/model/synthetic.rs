//! Clusters for tests.

use super::{Amounts, Cluster, Host, HostIndex, HostState, Memory, Traffic, Vm};

/// Equal hosts of 4 processors, 16 GiB and 1 Gbit/s, and guests that take turns on them: each uses half a processor,
/// 1 GiB, and 10 Mbit/s to the outside.
pub(crate) fn cluster(hosts: usize, vms: usize) -> Cluster {
    let capacity =
        Amounts { cpu_cores: 4.0, memory_mib: 16384.0, network_mbit: 1000.0, disk_mib: 500.0 };
    let host = |index: usize| Host {
        name: format!("host-{index}"),
        capacity,
        own: Amounts::ZERO,
        state: HostState::Active,
        is_migrating: false,
    };
    let usage = Amounts { cpu_cores: 0.5, memory_mib: 1024.0, network_mbit: 10.0, disk_mib: 1.0 };
    let vm = |index: usize| Vm {
        name: format!("vm-{index}"),
        host: HostIndex(index % hosts),
        vcpus: 2,
        usage,
        peak: usage,
        steal: 0.0,
        memory: Memory {
            allocated_mib: 1024.0,
            used_mib: 700.0,
            needed_mib: 500.0,
            reserve_mib: 200.0,
            max_mib: 2048.0,
            swap_writes_per_s: 0.0,
        },
        gray_box: None,
        dirty_mib_per_s: 5.0,
        sampled: None,
        priority: 0,
        is_migrating: false,
        last_move: None,
    };
    Cluster {
        hosts: (0..hosts).map(host).collect(),
        vms: (0..vms).map(vm).collect(),
        traffic: Traffic::silent(vms),
        rules: Default::default(),
    }
}
