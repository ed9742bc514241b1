//! What the cluster's owner wants of guests' places, by names, as configurations have it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::model::{Cluster, HostIndex, Rules, VmIndex};

/// Wishes by names. Guests and hosts that are not there at present are passed over.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Wishes {
    /// Guests that stay where they are.
    pub pinned: Vec<String>,
    /// Guests that run on one host each group.
    pub together: Vec<Vec<String>>,
    /// Guests of which no two of a group run on the same host.
    pub apart: Vec<Vec<String>>,
    /// Hosts that a guest may run on, where not all.
    pub only_on: BTreeMap<String, Vec<String>>,
}

impl Wishes {
    /// The same by indices.
    #[must_use]
    pub fn of(&self, cluster: &Cluster) -> Rules {
        let vms: BTreeMap<&str, VmIndex> =
            cluster.vm_indices().map(|vm| (cluster.vm(vm).name.as_str(), vm)).collect();
        let hosts: BTreeMap<&str, HostIndex> =
            cluster.host_indices().map(|host| (cluster.host(host).name.as_str(), host)).collect();
        let guests = |names: &Vec<String>| -> Vec<VmIndex> {
            names.iter().filter_map(|name| vms.get(name.as_str()).copied()).collect()
        };
        let only_on = self.only_on.iter().filter_map(|(vm, names)| {
            let places = names.iter().filter_map(|name| hosts.get(name.as_str()).copied());
            Some((*vms.get(vm.as_str())?, places.collect()))
        });
        Rules {
            pinned: guests(&self.pinned),
            together: self.together.iter().map(guests).collect(),
            apart: self.apart.iter().map(guests).collect(),
            only_on: only_on.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::synthetic;

    #[test]
    fn names_become_indices_and_those_that_are_not_there_are_passed_over() {
        let cluster = synthetic::cluster(2, 4);
        let name = |index: usize| cluster.vms[index].name.clone();
        let wishes = Wishes {
            pinned: vec![name(1), "gone".into()],
            together: vec![vec![name(0), name(2)]],
            apart: vec![vec![name(3), "gone".into()]],
            only_on: [(name(2), vec![cluster.hosts[1].name.clone()])].into(),
        };
        let rules = wishes.of(&cluster);
        assert_eq!(rules.pinned, [VmIndex(1)]);
        assert_eq!(rules.together, [vec![VmIndex(0), VmIndex(2)]]);
        assert_eq!(rules.apart, [vec![VmIndex(3)]]);
        assert_eq!(rules.only_on.get(&VmIndex(2)), Some(&vec![HostIndex(1)]));
    }
}
