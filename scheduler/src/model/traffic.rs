//! Who talks to whom.

use super::VmIndex;

/// What guests exchange with each other, in Mbit/s, both directions together.
///
/// Invariants: symmetric; at most one entry for a pair; no guest talks to itself.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Traffic {
    peers: Vec<Vec<(VmIndex, f64)>>,
}

impl Traffic {
    /// Of so many guests that do not talk.
    #[must_use]
    pub fn silent(vms: usize) -> Self {
        Self { peers: vec![vec![]; vms] }
    }

    /// Sets what two guests exchange. A guest with itself, and rates that are no positive number, count as silence.
    pub fn set(&mut self, one: VmIndex, other: VmIndex, mbit: f64) {
        if one == other {
            return;
        }
        let len = self.peers.len().max(one.0 + 1).max(other.0 + 1);
        self.peers.resize(len, vec![]);
        for (from, to) in [(one, other), (other, one)] {
            let peers = &mut self.peers[from.0];
            peers.retain(|(peer, _)| *peer != to);
            if mbit.is_finite() && mbit > 0.0 {
                peers.push((to, mbit));
            }
        }
    }

    /// With whom a guest talks, and how much.
    #[must_use]
    pub fn peers(&self, vm: VmIndex) -> &[(VmIndex, f64)] {
        self.peers.get(vm.0).map_or(&[], Vec::as_slice)
    }

    /// What two guests exchange.
    #[must_use]
    pub fn between(&self, one: VmIndex, other: VmIndex) -> f64 {
        let found = self.peers(one).iter().find(|(peer, _)| *peer == other);
        found.map_or(0.0, |(_, mbit)| *mbit)
    }

    pub(super) fn check(&self, vms: usize) -> Result<(), String> {
        if self.peers.iter().skip(vms).any(|peers| !peers.is_empty()) {
            return Err("Traffic of a guest that is not known".into());
        }
        Ok(())
    }
}
