//! Reports of several hosts, as a cluster.
//!
//! Hosts may contradict each other, or themselves. What was decided, each time with a remark that says so:
//!
//! | contradiction | what is believed |
//! |---|---|
//! | a host was not heard of for long, by the clock of whoever reads | its guests are where they were; it is silent |
//! | a host's clock differs | nothing depends on it |
//! | two reports of one host | the later one that was received |
//! | a host has nothing, or its guests take far more than it has | it is silent: nothing is decided by its figures |
//! | a guest on two hosts, on one of which it is expected | it is on its way, and so both hosts are in a migration |
//! | a guest on two hosts, one of them silent | it is where it was heard of |
//! | a guest runs on two hosts | nobody may touch it: it counts as on its way, and both hosts as in a migration |
//! | a guest's monitor does not answer | the guest counts as on its way: nobody can do anything with it |
//! | two guests of one name | both are there; the second one's name has its UUID behind it |
//! | two guests of one Ethernet address | what is sent there is sent to nobody that is known |
//! | a guest sends more than goes through its interfaces | what it sends is scaled down to that |
//!
//! Invariants: [`Cluster::check`] accepts the result of whatever reports; the same reports, in any order, have the same
//! result.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::report::{GuestReport, GuestState, HostReport};
use crate::model::{
    Amounts, Cluster, Host, HostIndex, HostState, Memory, Resource, Traffic, UNBOUNDED, Vm, VmIndex,
};

/// Most remarks.
const REMARKS_MAX: usize = 256;

/// What a host's guests may seem to take of it, since figures are of slightly different moments.
const BELIEVED_SHARE: f64 = 1.25;

/// A report, and when it was received.
#[derive(Debug, Clone, PartialEq)]
pub struct Received {
    /// The report.
    pub report: HostReport,
    /// When it was received, on the clock of whoever assembles, seconds since 1970.
    pub at_s: f64,
}

/// Settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// A host is silent when nothing was heard of it for this time, seconds.
    pub stale_after_s: f64,
    /// From this difference on, a host's clock is remarked upon, seconds.
    pub clock_off_s: f64,
    /// No guest is given less memory than this, MiB.
    pub reserve_mib: f64,
    /// Memory that a guest is taken to write where no sample was taken, MiB/s.
    pub dirty_mib_per_s: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { stale_after_s: 35.0, clock_off_s: 5.0, reserve_mib: 200.0, dirty_mib_per_s: 10.0 }
    }
}

/// A cluster, and what was odd about it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Assembled {
    /// The cluster. Peaks are what is taken now; rules, priorities and earlier moves are not in reports.
    pub cluster: Cluster,
    /// What was odd, in words.
    pub remarks: Vec<String>,
}

/// A guest that a host says it has.
#[derive(Debug, Clone, Copy)]
struct Claim<'a> {
    host: usize,
    is_heard: bool,
    received_s: f64,
    guest: &'a GuestReport,
}

#[derive(Debug, Default)]
struct Assembly<'a> {
    cluster: Cluster,
    reports: Vec<&'a Received>,
    guests: Vec<&'a GuestReport>,
    names: BTreeSet<String>,
    remarks: Vec<String>,
}

/// Puts reports together.
#[must_use]
pub fn assemble(received: &[Received], settings: &Settings, now_s: f64) -> Assembled {
    let mut assembly = Assembly::default();
    for of_host in by_host(received, &mut assembly.remarks) {
        assembly.add_host(of_host, settings, now_s);
    }
    for (_, claims) in assembly.claims() {
        assembly.add_guest(&claims, settings);
    }
    assembly.add_traffic();
    assembly.add_rest();
    assembly.remarks.truncate(REMARKS_MAX);
    Assembled { cluster: assembly.cluster, remarks: assembly.remarks }
}

/// The report of each host that counts, by its name.
fn by_host<'a>(received: &'a [Received], remarks: &mut Vec<String>) -> Vec<&'a Received> {
    let mut found: BTreeMap<&str, &Received> = BTreeMap::new();
    let mut doubles = BTreeSet::new();
    for one in received {
        if let Err(error) = one.report.check() {
            remarks.push(error.to_string());
            continue;
        }
        let name = one.report.host.as_str();
        let other = found.entry(name).or_insert(one);
        if other.report.boot_id != one.report.boot_id {
            doubles.insert(name);
        }
        // The last comparison only makes the result independent of the order.
        let later = one.at_s.total_cmp(&other.at_s).then(one.report.seq.cmp(&other.report.seq));
        let later = later.then_with(|| one.report.boot_id.cmp(&other.report.boot_id));
        if later.is_gt() {
            *other = one;
        }
    }
    let told = |name| format!("Two hosts call themselves {name}, or it was started anew");
    remarks.extend(doubles.into_iter().map(told));
    // Remarks on what was not believed are in the order of the reports.
    remarks.sort();
    found.into_values().collect()
}

/// Links and disks of which a host cannot say what they can do bound nothing. Without processors and memory nobody runs:
/// of these, nothing is nothing.
fn bounded(capacity: &Amounts) -> Amounts {
    let or_unbounded = |amount: f64| if amount > 0.0 { amount } else { UNBOUNDED };
    Amounts {
        network_mbit: or_unbounded(capacity.network_mbit),
        disk_mib: or_unbounded(capacity.disk_mib),
        ..*capacity
    }
}

impl<'a> Assembly<'a> {
    fn add_host(&mut self, received: &'a Received, settings: &Settings, now_s: f64) {
        let report = &received.report;
        let name = &report.host;
        let age_s = now_s - received.at_s;
        let mut state = HostState::Active;
        if age_s.is_nan() || age_s > settings.stale_after_s {
            self.remarks.push(format!("Nothing was heard of {name} for {age_s:.0} s"));
            state = HostState::Silent;
        }
        let off_s = report.at_s - received.at_s;
        if off_s.abs() > settings.clock_off_s {
            self.remarks.push(format!("The clock of {name} differs by {off_s:.0} s"));
        }
        if let Some(lie) = lie(report) {
            self.remarks
                .push(format!("What {name} says cannot be, so nothing is decided by it: {lie}"));
            state = HostState::Silent;
        }
        self.remarks.extend(report.troubles.iter().map(|trouble| format!("{name}: {trouble}")));
        self.reports.push(received);
        self.cluster.hosts.push(Host {
            name: name.clone(),
            capacity: bounded(&report.capacity),
            own: Amounts::ZERO,
            state,
            is_migrating: report.guests.iter().any(|guest| guest.is_migrating),
        });
    }

    /// Who says to have which guest, by the guest's identity.
    fn claims(&self) -> BTreeMap<(&'a str, &'a str), Vec<Claim<'a>>> {
        let mut claims: BTreeMap<_, Vec<Claim<'a>>> = BTreeMap::new();
        for (host, received) in self.reports.iter().enumerate() {
            let is_heard = self.cluster.hosts[host].state == HostState::Active;
            for guest in &received.report.guests {
                let claim = Claim { host, is_heard, received_s: received.at_s, guest };
                claims.entry(identity(guest)).or_default().push(claim);
            }
        }
        claims
    }

    fn add_guest(&mut self, claims: &[Claim<'a>], settings: &Settings) {
        let rank = |claim: &Claim<'_>| {
            let state = match claim.guest.state {
                GuestState::Running => 2,
                GuestState::Paused => 1,
                GuestState::Incoming => 0,
            };
            (claim.is_heard, state)
        };
        let best = claims.iter().reduce(|best, claim| {
            let order = rank(claim).cmp(&rank(best));
            let order = order.then(claim.received_s.total_cmp(&best.received_s));
            if order.is_gt() { claim } else { best }
        });
        let Some(best) = best else { return };
        let is_there =
            |claim: &&Claim<'_>| claim.is_heard && !std::ptr::eq(claim.guest, best.guest);
        let others: Vec<&Claim<'_>> = claims.iter().filter(is_there).collect();
        for claim in claims.iter().filter(|claim| claim.guest.state == GuestState::Incoming) {
            // Its memory is taken there already: what of it is there counts as the host's own below.
            let host = &mut self.cluster.hosts[claim.host];
            let memory = &claim.guest.memory;
            host.own.memory_mib += (memory.max_mib - memory.resident_mib).max(0.0);
            host.is_migrating = true;
        }
        if best.guest.state == GuestState::Incoming {
            return;
        }
        let is_migrating = best.guest.is_migrating || (best.is_heard && !others.is_empty());
        if is_migrating {
            for claim in others.iter().copied().chain([best]) {
                self.cluster.hosts[claim.host].is_migrating = true;
            }
        }
        self.tell_of_doubles(best, &others);
        let name = self.free_name(best.guest);
        // Nobody can move a guest whose monitor does not answer; its host is judged as ever.
        let is_migrating = is_migrating || best.guest.is_held;
        self.cluster.vms.push(vm(name, best, is_migrating, settings));
        self.guests.push(best.guest);
    }

    fn tell_of_doubles(&mut self, best: &Claim<'_>, others: &[&Claim<'_>]) {
        let running = others.iter().filter(|other| other.guest.state == GuestState::Running);
        for other in running.filter(|_| best.guest.state == GuestState::Running) {
            let [here, there] = [best, other].map(|claim| &self.cluster.hosts[claim.host].name);
            let name = &best.guest.name;
            self.remarks.push(format!(
                "{name} runs on {here} and on {there}: nothing is done with it until it is on one"
            ));
        }
    }

    fn free_name(&mut self, guest: &GuestReport) -> String {
        let mut name = guest.name.clone();
        if self.names.contains(&name) {
            self.remarks.push(format!("Two guests are called {name}: give them different names"));
            name = format!("{name} ({})", identity(guest).0);
        }
        while !self.names.insert(name.clone()) {
            name.push('\'');
        }
        name
    }

    fn add_traffic(&mut self) {
        let mut at: BTreeMap<&str, Option<usize>> = BTreeMap::new();
        for (index, guest) in self.guests.iter().enumerate() {
            for address in BTreeSet::from_iter(&guest.addresses) {
                let known = at.entry(address).or_insert(Some(index));
                if *known != Some(index) {
                    *known = None;
                    self.remarks.push(format!("Two guests have the Ethernet address {address}"));
                }
            }
        }
        let mut pairs: BTreeMap<(usize, usize), f64> = BTreeMap::new();
        for (index, guest) in self.guests.iter().enumerate() {
            let all_mbit: f64 = guest.sent.iter().map(|sent| sent.mbit).sum();
            let scale =
                if all_mbit > guest.network_mbit { guest.network_mbit / all_mbit } else { 1.0 };
            for sent in &guest.sent {
                let Some(Some(to)) = at.get(sent.to.as_str()) else { continue };
                *pairs.entry((index.min(*to), index.max(*to))).or_default() += sent.mbit * scale;
            }
        }
        let mut traffic = Traffic::silent(self.guests.len());
        for ((one, other), mbit) in pairs {
            traffic.set(VmIndex(one), VmIndex(other), mbit);
        }
        for (index, vm) in self.cluster.vms.iter_mut().enumerate() {
            let known_mbit: f64 = traffic.peers(VmIndex(index)).iter().map(|(_, mbit)| mbit).sum();
            vm.usage.network_mbit = (vm.usage.network_mbit - known_mbit).max(0.0);
            vm.peak = vm.usage;
        }
        self.cluster.traffic = traffic;
    }

    /// What hosts' own programs take: what is not the guests'.
    fn add_rest(&mut self) {
        let mut guests = vec![Amounts::ZERO; self.reports.len()];
        for (vm, guest) in self.cluster.vms.iter().zip(&self.guests) {
            let Some(sum) = guests.get_mut(vm.host.0) else { continue };
            // What QEMU takes for itself beside the guest's memory is in its host's load.
            let memory_mib = guest.memory.resident_mib.min(guest.memory.allocated_mib);
            *sum += Amounts { memory_mib, ..vm.usage };
        }
        for vm in self.cluster.vm_indices() {
            let host = self.cluster.vm(vm).host;
            let peers = self.cluster.traffic.peers(vm).iter();
            let leaves = |peer: &&(VmIndex, f64)| self.cluster.vm(peer.0).host != host;
            let crossing_mbit: f64 = peers.filter(leaves).map(|(_, mbit)| mbit).sum();
            guests[host.0].network_mbit += crossing_mbit;
        }
        for ((host, received), guests) in
            self.cluster.hosts.iter_mut().zip(&self.reports).zip(guests)
        {
            let rest = received.report.used - guests;
            for resource in Resource::ALL {
                host.own[resource] += rest[resource].max(0.0);
            }
        }
    }
}

/// By its UUID where it has one: two guests may have one name.
fn identity(guest: &GuestReport) -> (&str, &str) {
    let has_uuid = guest.uuid.bytes().any(|digit| !matches!(digit, b'0' | b'-'));
    if has_uuid { (&guest.uuid, "") } else { ("", &guest.name) }
}

/// What cannot be of what a host says of itself.
fn lie(report: &HostReport) -> Option<String> {
    let Amounts { cpu_cores, memory_mib, .. } = report.capacity;
    if cpu_cores <= 0.0 || memory_mib <= 0.0 {
        return Some(format!("it has {cpu_cores} processors and {memory_mib:.0} MiB"));
    }
    let sum = |figure: fn(&GuestReport) -> f64| report.guests.iter().map(figure).sum::<f64>();
    let (cores, resident_mib) =
        (sum(|guest| guest.cpu_cores), sum(|guest| guest.memory.resident_mib));
    if cores > cpu_cores * BELIEVED_SHARE {
        return Some(format!("its guests use {cores:.1} of {cpu_cores:.1} processors"));
    }
    if resident_mib > memory_mib * BELIEVED_SHARE {
        return Some(format!("its guests have {resident_mib:.0} of {memory_mib:.0} MiB"));
    }
    None
}

fn vm(name: String, claim: &Claim<'_>, is_migrating: bool, settings: &Settings) -> Vm {
    let guest = claim.guest;
    let memory = &guest.memory;
    let max_mib = memory.max_mib.max(memory.allocated_mib);
    let usage = Amounts {
        cpu_cores: guest.cpu_cores,
        memory_mib: memory.allocated_mib,
        network_mbit: guest.network_mbit,
        disk_mib: guest.disk_mib,
    };
    Vm {
        name,
        host: HostIndex(claim.host),
        vcpus: guest.vcpus,
        usage,
        peak: usage,
        steal: guest.steal.min(1.0),
        memory: Memory {
            allocated_mib: memory.allocated_mib,
            used_mib: memory.used_mib.min(memory.allocated_mib),
            needed_mib: memory.needed_mib.min(memory.allocated_mib),
            reserve_mib: settings.reserve_mib.min(max_mib),
            max_mib,
            swap_writes_per_s: memory.swap_writes_per_s,
        },
        gray_box: guest.gray_box,
        dirty_mib_per_s: settings.dirty_mib_per_s,
        sampled: guest.sampled,
        priority: 0,
        is_migrating,
        last_move: None,
    }
}

#[cfg(test)]
mod tests;
