//! What the cluster's owner wants of places, and why a guest may not go somewhere.

use std::collections::HashMap;
use std::fmt::{self, Display, Formatter};

use super::{Cluster, HostIndex, HostState, Placement, Resource, VmIndex};

/// Wishes that plans respect.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Rules {
    /// Guests that stay where they are.
    pub pinned: Vec<VmIndex>,
    /// Guests that run on one host each group, and move one after the other.
    pub together: Vec<Vec<VmIndex>>,
    /// Guests of which no two of a group run on the same host.
    pub apart: Vec<Vec<VmIndex>>,
    /// Hosts that a guest may run on, where not all.
    pub only_on: HashMap<VmIndex, Vec<HostIndex>>,
}

impl Rules {
    pub(super) fn check(&self, cluster: &Cluster) -> Result<(), String> {
        let groups = self.together.iter().chain(&self.apart).flatten();
        let mut vms = groups.chain(&self.pinned).chain(self.only_on.keys());
        let mut hosts = self.only_on.values().flatten();
        if vms.any(|vm| vm.0 >= cluster.vms.len())
            || hosts.any(|host| host.0 >= cluster.hosts.len())
        {
            return Err("A rule names a guest or a host that is not known".into());
        }
        Ok(())
    }
}

/// Why a guest may not go to a host.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Obstacle {
    /// It is there.
    SameHost,
    /// It is to stay where it is.
    Pinned,
    /// It is on its way already.
    OnItsWay,
    /// The host does not take guests at present.
    HostState(HostState),
    /// A guest is on its way from or to that host.
    HostMigrates,
    /// A rule names other hosts.
    OtherHosts,
    /// A guest from which it is to keep apart runs there.
    Apart(VmIndex),
    /// A guest with which it is to stay does not run there.
    Together(VmIndex),
    /// There would be too little of this.
    Room(Resource),
    /// It came from there not long ago.
    CameFromThere,
    /// It has moved not long ago, and stays a while.
    MovedLately,
    /// Those with whom it talks inside of its host would then fill that host's network.
    TalkLeftBehind,
}

impl Display for Obstacle {
    fn fmt(&self, to: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::SameHost => to.write_str("it runs there"),
            Self::Pinned => to.write_str("it is pinned"),
            Self::OnItsWay => to.write_str("it is on its way already"),
            Self::HostState(HostState::Draining) => to.write_str("that host is being emptied"),
            Self::HostState(_) => to.write_str("nothing was heard of that host"),
            Self::HostMigrates => to.write_str("another migration uses that host"),
            Self::OtherHosts => to.write_str("a rule names other hosts"),
            Self::Apart(_) => to.write_str("a guest that it keeps apart from runs there"),
            Self::Together(_) => to.write_str("a guest that it stays with does not run there"),
            Self::Room(resource) => write!(to, "not enough {} there", resource.name()),
            Self::CameFromThere => to.write_str("it came from there not long ago"),
            Self::MovedLately => to.write_str("it has moved not long ago"),
            Self::TalkLeftBehind => {
                to.write_str("its talk with guests that stay would fill the network")
            }
        }
    }
}

impl Placement<'_> {
    /// Whether rules, and what is going on, let a guest go to a host; room is not looked at.
    ///
    /// # Errors
    /// The first obstacle. [`Obstacle::Together`] is not among them: a group moves one after the other.
    pub fn may_go(&self, vm: VmIndex, to: HostIndex) -> Result<(), Obstacle> {
        let cluster = self.cluster();
        let (guest, host, rules) = (cluster.vm(vm), cluster.host(to), &cluster.rules);
        if self.host_of(vm) == to {
            return Err(Obstacle::SameHost);
        }
        if rules.pinned.contains(&vm) {
            return Err(Obstacle::Pinned);
        }
        if guest.is_migrating {
            return Err(Obstacle::OnItsWay);
        }
        if host.state != HostState::Active {
            return Err(Obstacle::HostState(host.state));
        }
        if rules.only_on.get(&vm).is_some_and(|hosts| !hosts.contains(&to)) {
            return Err(Obstacle::OtherHosts);
        }
        for group in rules.apart.iter().filter(|group| group.contains(&vm)) {
            let there = group.iter().find(|other| **other != vm && self.host_of(**other) == to);
            if let Some(other) = there {
                return Err(Obstacle::Apart(*other));
            }
        }
        Ok(())
    }
}
