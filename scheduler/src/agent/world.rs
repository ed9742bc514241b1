//! What an agent makes of everything that was heard: the cluster as policies see it, and as people do.

use std::collections::{BTreeMap, BTreeSet};

use super::board::Heard;
use super::config::Config;
use crate::api::view::{GuestView, HostView, TalkView};
use crate::model::{
    Amounts, Cluster, HostIndex, HostState, LastMove, Placement, Resource, VmIndex,
};
use crate::profile::report::GuestState;
use crate::profile::{GuestReport, HostReport, Received, assemble};

/// Most pairs of guests that are shown.
const TALKS_MAX: usize = 2000;

/// For so many rounds after a migration its traffic may still be in its hosts' figures.
const CALM_AFTER_ROUNDS: f64 = 3.0;

/// A cluster at one moment.
#[derive(Debug, Clone, Default)]
pub struct World {
    /// The cluster, with rules, drains, earlier moves and those under way.
    pub cluster: Cluster,
    /// What was odd, in words.
    pub remarks: Vec<String>,
    received: BTreeMap<String, Received>,
}

impl World {
    /// Puts together what was heard of others and read here. `failed` are guests that are left alone.
    #[must_use]
    pub fn new(
        config: &Config,
        own: &HostReport,
        heard: &Heard,
        failed: &BTreeSet<String>,
        now_s: f64,
    ) -> Self {
        let mut received = heard.received(&own.host, now_s);
        received.push(Received { report: own.clone(), at_s: now_s });
        let assembled = assemble(&received, &config.cluster, now_s);
        let mut world = Self {
            cluster: assembled.cluster,
            remarks: assembled.remarks,
            received: received.into_iter().map(|one| (one.report.host.clone(), one)).collect(),
        };
        world.remarks.extend(heard.foreign.values().cloned());
        world.apply_wishes(config, failed);
        world.apply_heard(heard, now_s);
        world.leave_out_migrations(heard, now_s - CALM_AFTER_ROUNDS * config.profile.interval_s);
        world
    }

    /// A host's place.
    #[must_use]
    pub fn host(&self, name: &str) -> Option<HostIndex> {
        self.cluster.hosts.iter().position(|host| host.name == name).map(HostIndex)
    }

    /// A guest's place.
    #[must_use]
    pub fn vm(&self, name: &str) -> Option<VmIndex> {
        self.cluster.vms.iter().position(|vm| vm.name == name).map(VmIndex)
    }

    fn apply_wishes(&mut self, config: &Config, failed: &BTreeSet<String>) {
        self.cluster.rules = config.rules.of(&self.cluster);
        let told = |name| format!("{name} is left alone for a while: its move failed");
        self.remarks.extend(failed.iter().map(told));
        let left_alone: Vec<VmIndex> = failed.iter().filter_map(|name| self.vm(name)).collect();
        self.cluster.rules.pinned.extend(left_alone);
        for vm in &mut self.cluster.vms {
            vm.priority = config.priority.get(&vm.name).copied().unwrap_or_default();
        }
    }

    fn apply_heard(&mut self, heard: &Heard, now_s: f64) {
        for host in &mut self.cluster.hosts {
            if host.state == HostState::Active && heard.drained.contains(&host.name) {
                host.state = HostState::Draining;
            }
            let takes_part = |claim: &crate::store::claims::Claim| {
                claim.from == host.name || claim.to == host.name
            };
            host.is_migrating |= heard.claims.values().any(takes_part);
        }
        for index in 0..self.cluster.vms.len() {
            let name = &self.cluster.vms[index].name;
            let last_move = heard.moved.get(name).and_then(|moved| {
                // Of a clock that is ahead, the move was now at the latest.
                Some(LastMove { at_s: moved.at_s.min(now_s), from: self.host(&moved.from)? })
            });
            let is_claimed = heard.claims.contains_key(name);
            let vm = &mut self.cluster.vms[index];
            vm.last_move = last_move;
            vm.is_migrating |= is_claimed;
        }
    }

    /// A migration's own traffic is no load that lasts: in figures of its hosts what is not the guests' does not count.
    fn leave_out_migrations(&mut self, heard: &Heard, since_s: f64) {
        for host in &mut self.cluster.hosts {
            if host.is_migrating || ended_after(heard, &host.name, since_s) {
                host.own.network_mbit = 0.0;
            }
        }
    }

    /// Looks at the cluster with hosts whose migration ended after a moment still in it: figures of the last interval are of
    /// a time when guests were elsewhere.
    pub fn as_of_migrations<T>(
        &mut self,
        heard: &Heard,
        since_s: f64,
        look: impl FnOnce(&Cluster) -> T,
    ) -> T {
        let before: Vec<bool> = self.cluster.hosts.iter().map(|host| host.is_migrating).collect();
        for host in &mut self.cluster.hosts {
            host.is_migrating |= ended_after(heard, &host.name, since_s);
        }
        let seen = look(&self.cluster);
        for (host, is_migrating) in self.cluster.hosts.iter_mut().zip(before) {
            host.is_migrating = is_migrating;
        }
        seen
    }

    /// The hosts, as people see them.
    #[must_use]
    pub fn hosts(&self, heard: &Heard) -> Vec<HostView> {
        let shown = self.cluster.hosts.iter().map(|host| {
            let received = self.received.get(&host.name);
            let report = received.map(|received| &received.report);
            HostView {
                name: host.name.clone(),
                api: heard.agents.get(&host.name).map(|agent| agent.api.clone()),
                state: host.state,
                is_migrating: host.is_migrating,
                heard_at_s: received.map_or(0.0, |received| received.at_s),
                is_stale: host.state == HostState::Silent,
                capacity: report.map(|report| report.capacity).unwrap_or_default(),
                used: report.map(|report| report.used).unwrap_or_default(),
                pressure: report.map(|report| report.pressure).unwrap_or_default(),
                troubles: report.map(|report| report.troubles.clone()).unwrap_or_default(),
            }
        });
        shown.collect()
    }

    /// The guests, as people see them.
    #[must_use]
    pub fn guests(&self) -> Vec<GuestView> {
        let mut guests: Vec<GuestView> =
            self.cluster.vm_indices().map(|vm| self.guest(vm)).collect();
        guests.sort_by(|one, other| one.name.cmp(&other.name));
        guests
    }

    fn guest(&self, index: VmIndex) -> GuestView {
        let vm = self.cluster.vm(index);
        let host = &self.cluster.host(vm.host).name;
        GuestView {
            name: vm.name.clone(),
            host: host.clone(),
            state: self.reported(host, &vm.name).map_or(GuestState::Running, |guest| guest.state),
            is_migrating: vm.is_migrating,
            is_pinned: self.cluster.rules.pinned.contains(&index),
            priority: vm.priority,
            vcpus: vm.vcpus,
            usage: vm.usage,
            peak: vm.peak,
            steal: vm.steal,
            memory_used_mib: vm.memory.used_mib,
            memory_needed_mib: vm.memory.needed_mib,
            memory_max_mib: vm.memory.max_mib,
            swap_writes_per_s: vm.memory.swap_writes_per_s,
            gray_box: vm.gray_box,
        }
    }

    /// What a host said of a guest.
    #[must_use]
    pub fn reported(&self, host: &str, guest: &str) -> Option<&GuestReport> {
        let report = &self.received.get(host)?.report;
        report.guests.iter().find(|one| one.name == guest)
    }

    /// Which guests talk, the most first.
    #[must_use]
    pub fn talks(&self) -> Vec<TalkView> {
        let mut talks = vec![];
        for vm in self.cluster.vm_indices() {
            for (peer, mbit) in self.cluster.traffic.peers(vm) {
                if vm < *peer {
                    let [one, other] = [vm, *peer].map(|vm| self.cluster.vm(vm).name.clone());
                    talks.push(TalkView { one, other, mbit: *mbit });
                }
            }
        }
        talks.sort_by(|one, other| other.mbit.total_cmp(&one.mbit));
        talks.truncate(TALKS_MAX);
        talks
    }

    /// What there would be too little of at a host if all of this came, in words.
    ///
    /// # Errors
    /// That.
    pub fn room(
        &self,
        host: HostIndex,
        comes: &[Amounts],
        share_max: &Amounts,
    ) -> Result<(), String> {
        let taken = Placement::new(&self.cluster).usage(host);
        let adds = comes.iter().fold(Amounts::ZERO, |sum, one| sum + *one);
        let capacity = self.cluster.host(host).capacity;
        for resource in Resource::ALL {
            let after = taken[resource] + adds[resource];
            let most = capacity[resource] * share_max[resource];
            // Of what guests bring nothing, nothing keeps them away.
            if adds[resource] > 0.0 && after > most {
                let name = resource.name();
                return Err(format!("{after:.1} of {name} would be used and {most:.1} may be"));
            }
        }
        Ok(())
    }
}

/// Whether a host's last migration ended after a moment.
fn ended_after(heard: &Heard, host: &str, since_s: f64) -> bool {
    heard.calm_since_s.get(host).is_some_and(|at_s| *at_s > since_s)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::agent::config::EXAMPLE;
    use crate::profile::report::VERSION;

    #[test]
    fn figures_of_the_last_interval_are_still_of_a_migration_that_has_ended() {
        let config = Config::parse(EXAMPLE, Path::new("agent.toml")).unwrap();
        let own = HostReport { v: VERSION, host: "a".into(), at_s: 100.0, ..HostReport::default() };
        let mut heard = Heard::default();
        heard.calm_since_s.insert("a".into(), 95.0);
        let mut world = World::new(&config, &own, &heard, &BTreeSet::new(), 100.0);
        let mut seen_since = |since_s| {
            world.as_of_migrations(&heard, since_s, |cluster| cluster.hosts[0].is_migrating)
        };
        assert!(seen_since(90.0), "it ended in the interval");
        assert!(!seen_since(96.0), "it ended before");
        assert!(!world.cluster.hosts[0].is_migrating, "guests may leave and come again");
    }
}
