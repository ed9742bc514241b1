//! What happens at a moment: who wants how much, and what it gets.
//!
//! Order of things, none of which is repeated:
//! 1. A guest that has less memory than it needs writes to swap; its service's requests take longer, so that fewer come
//!    (users are a closed loop), and each takes more CPU.
//! 2. Interfaces: [`super::network`].
//! 3. CPU that is wanted: the guest's own work and what its traffic costs. It is shared fairly among the host's guests;
//!    who wants more gets a little more ([`LEANS`]): a guest whose work wavers cannot take its share at every moment.
//!    What is not given is stolen.
//! 4. Traffic is done as far as both ends have the CPU for it.
//!
//! Invariants: of no resource more is given than there is; all of it is given while somebody wants more.

use super::calibration::{
    INSIDE_CORES, RECEIVE_CORES, SEND_CORES, SWAP_CPU, SWAP_MS, SWAP_WRITES_PER_MIB,
};
use super::network::Rates;
use super::share::share;
use super::world::{Machine, World};
use crate::model::Amounts;

/// By how much a guest's weight rises with the share of its processors that it wants.
const LEANS: f64 = 0.3;

/// Swap writes a second from which on a host counts as having too little memory: what the detectors' thesis takes.
const SWAP_WRITES_MAX: f64 = 150.0;

/// What the world's parts are set to at present.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    /// Where each guest runs.
    pub(super) at: Vec<usize>,
    /// The guests of each host.
    pub(super) guests: Vec<Vec<usize>>,
    /// What each may use of memory, MiB.
    pub(super) allocated_mib: Vec<f64>,
    /// What each needs, MiB.
    pub(super) needed_mib: Vec<f64>,
    /// Its level by events.
    pub(super) factor: Vec<f64>,
    /// Its level by the time of day, and noise.
    pub(super) level: Vec<f64>,
    /// What migrations take of each host.
    pub(super) engine: Vec<Amounts>,
}

impl Settings {
    /// As the world begins.
    pub(super) fn new(world: &World) -> Self {
        let mut guests = vec![vec![]; world.machines.len()];
        for (at, guest) in world.guests.iter().enumerate() {
            guests[guest.host].push(at);
        }
        Self {
            at: world.guests.iter().map(|guest| guest.host).collect(),
            guests,
            allocated_mib: world.guests.iter().map(|guest| guest.allocated_mib).collect(),
            needed_mib: world.guests.iter().map(|guest| guest.needed_mib).collect(),
            factor: vec![1.0; world.guests.len()],
            level: vec![1.0; world.guests.len()],
            engine: vec![Amounts::ZERO; world.machines.len()],
        }
    }

    /// Moves a guest.
    pub(super) fn go(&mut self, guest: usize, to: usize) {
        let from = self.at[guest];
        self.guests[from].retain(|other| *other != guest);
        self.guests[to].push(guest);
        self.at[guest] = to;
    }
}

/// What a guest has of it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct GuestMoment {
    /// How much there is to do, 1 for what its figures say.
    pub(super) level: f64,
    /// CPU that it wants, cores.
    pub(super) wanted_cores: f64,
    /// CPU that it gets, cores.
    pub(super) cores: f64,
    /// Share of what it wants that it gets, 0 to 1.
    pub(super) done: f64,
    /// With the outside, Mbit/s.
    pub(super) outside_mbit: f64,
    /// MiB/s.
    pub(super) disk_mib: f64,
    /// Share of the memory it needs that is missing.
    pub(super) missing: f64,
    /// Pages a second.
    pub(super) swap_writes_per_s: f64,
}

/// What a host has of it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct HostMoment {
    /// What would be used if there were enough of everything. Elastic traffic wants what it gets.
    pub(super) wanted: Amounts,
    /// What is used.
    pub(super) used: Amounts,
    /// A guest swaps because it was given less than it needs.
    pub(super) swaps: bool,
}

impl HostMoment {
    /// Whether more is wanted than there is, for each resource in the order of `Resource::ALL`. An interface of which
    /// everything is used counts, too: elastic traffic never wants more than it gets.
    pub(super) fn overloaded(&self, machine: &Machine) -> [bool; 4] {
        let has = &machine.capacity;
        let above = |wanted: f64, has: f64| wanted > has * (1.0 + 1e-9);
        [
            above(self.wanted.cpu_cores, has.cpu_cores),
            above(self.wanted.memory_mib, has.memory_mib) || self.swaps,
            above(self.wanted.network_mbit, has.network_mbit * (1.0 - 1e-6)),
            above(self.wanted.disk_mib, has.disk_mib),
        ]
    }
}

/// A moment.
#[derive(Debug, Clone)]
pub(super) struct Moment {
    pub(super) guests: Vec<GuestMoment>,
    pub(super) hosts: Vec<HostMoment>,
    /// What each flow gets, Mbit/s.
    pub(super) flow_mbit: Vec<f64>,
    rates: Rates,
    offered_mbit: Vec<f64>,
    wants: Vec<(f64, f64)>,
    given: Vec<f64>,
}

impl Moment {
    pub(super) fn new(world: &World) -> Self {
        Self {
            guests: vec![GuestMoment::default(); world.guests.len()],
            hosts: vec![HostMoment::default(); world.machines.len()],
            flow_mbit: vec![0.0; world.flows.len()],
            rates: Rates::new(world),
            offered_mbit: vec![0.0; world.flows.len()],
            wants: vec![],
            given: vec![],
        }
    }

    /// Works it out.
    pub(super) fn settle(&mut self, world: &World, now: &Settings) {
        self.begin(world, now);
        self.levels(world, now);
        self.traffic(world, now);
        self.cores(world, now);
        for host in 0..world.machines.len() {
            self.divide_cores(world, now, host);
            self.divide_disk(world, now, host);
        }
        self.finish(world, now);
    }

    /// What hosts' own programs and migrations take.
    fn begin(&mut self, world: &World, now: &Settings) {
        for (host, machine) in world.machines.iter().enumerate() {
            let own = machine.own + now.engine[host];
            self.hosts[host] = HostMoment { wanted: own, used: own, swaps: false };
            self.rates.line_mbit[host] =
                (machine.capacity.network_mbit - own.network_mbit).max(0.0);
        }
    }

    /// How much there is to do, and what lack of memory makes of it.
    fn levels(&mut self, world: &World, now: &Settings) {
        for service in &world.services {
            let missing = |guest: usize| {
                let needed = now.needed_mib[guest];
                let short = (needed - now.allocated_mib[guest]).max(0.0);
                (short, if needed > 0.0 { short / needed } else { 0.0 })
            };
            let worst = service.guests.iter().map(|at| missing(*at).1).fold(0.0, f64::max);
            let turn_ms = service.think_s * 1000.0 + service.base_ms;
            let slowed = turn_ms / (turn_ms + SWAP_MS * worst);
            for at in &service.guests {
                let (short, share) = missing(*at);
                let guest = &mut self.guests[*at];
                guest.level = now.level[*at] * now.factor[*at] * slowed;
                guest.missing = share;
                guest.swap_writes_per_s = short * SWAP_WRITES_PER_MIB;
                let host = &mut self.hosts[now.at[*at]];
                host.swaps |= guest.swap_writes_per_s > SWAP_WRITES_MAX;
                host.used.memory_mib += now.allocated_mib[*at];
                host.wanted.memory_mib += now.allocated_mib[*at];
            }
        }
    }

    /// What is said, as far as interfaces let it.
    fn traffic(&mut self, world: &World, now: &Settings) {
        for (at, flow) in world.flows.iter().enumerate() {
            let level = (self.guests[flow.one].level + self.guests[flow.other].level) / 2.0;
            self.offered_mbit[at] = flow.mbit * if flow.is_elastic { 1.0 } else { level };
        }
        self.rates.flow_mbit.copy_from_slice(&self.offered_mbit);
        for (at, guest) in world.guests.iter().enumerate() {
            let mbit = guest.outside_mbit * self.guests[at].level;
            self.rates.outside_mbit[at] = mbit;
            self.guests[at].outside_mbit = mbit;
            self.hosts[now.at[at]].wanted.network_mbit += mbit;
        }
        self.rates.contend(world, &now.at, &now.guests);
        for (at, flow) in world.flows.iter().enumerate() {
            let (one, other) = (now.at[flow.one], now.at[flow.other]);
            if one != other {
                let offered =
                    if flow.is_elastic { self.rates.flow_mbit[at] } else { self.offered_mbit[at] };
                self.hosts[one].wanted.network_mbit += offered;
                self.hosts[other].wanted.network_mbit += offered;
            }
        }
    }

    /// CPU that is wanted: for work, and for the traffic that gets through.
    fn cores(&mut self, world: &World, now: &Settings) {
        for (at, guest) in world.guests.iter().enumerate() {
            let moment = &mut self.guests[at];
            let work = guest.cpu_cores * moment.level * (1.0 + SWAP_CPU * moment.missing);
            let (mbit, sent) = (self.rates.outside_mbit[at], guest.outside_sent);
            let speed = world.machines[now.at[at]].speed;
            moment.wanted_cores = work + mbit * interface_cores(sent) / speed;
        }
        for (at, flow) in world.flows.iter().enumerate() {
            let mbit = self.rates.flow_mbit[at];
            let crosses = now.at[flow.one] != now.at[flow.other];
            for (guest, sent) in [(flow.one, flow.sent), (flow.other, 1.0 - flow.sent)] {
                let cores = if crosses { interface_cores(sent) } else { INSIDE_CORES };
                self.guests[guest].wanted_cores +=
                    mbit * cores / world.machines[now.at[guest]].speed;
            }
        }
        for (at, guest) in world.guests.iter().enumerate() {
            let moment = &mut self.guests[at];
            moment.wanted_cores = moment.wanted_cores.min(f64::from(guest.vcpus));
            self.hosts[now.at[at]].wanted.cpu_cores += moment.wanted_cores;
        }
    }

    fn divide_cores(&mut self, world: &World, now: &Settings, host: usize) {
        let moment = &mut self.hosts[host];
        let left = world.machines[host].capacity.cpu_cores - moment.used.cpu_cores;
        self.wants.clear();
        for guest in &now.guests[host] {
            let wanted = self.guests[*guest].wanted_cores;
            let vcpus = f64::from(world.guests[*guest].vcpus.max(1));
            self.wants.push((wanted, vcpus * (1.0 + LEANS * wanted / vcpus)));
        }
        share(left, &self.wants, &mut self.given);
        for (guest, given) in now.guests[host].iter().zip(&self.given) {
            let guest = &mut self.guests[*guest];
            guest.cores = *given;
            guest.done = if guest.wanted_cores > 0.0 { given / guest.wanted_cores } else { 1.0 };
            moment.used.cpu_cores += given;
        }
    }

    fn divide_disk(&mut self, world: &World, now: &Settings, host: usize) {
        let moment = &mut self.hosts[host];
        let left = world.machines[host].capacity.disk_mib - moment.used.disk_mib;
        self.wants.clear();
        for at in &now.guests[host] {
            let guest = &self.guests[*at];
            // Each page that is written to swap is read again some time, 4096 bytes each.
            let swap_mib = guest.swap_writes_per_s * 2.0 / 256.0;
            let wanted = world.guests[*at].disk_mib * guest.level + swap_mib;
            moment.wanted.disk_mib += wanted;
            self.wants.push((wanted, 1.0));
        }
        share(left, &self.wants, &mut self.given);
        for (guest, given) in now.guests[host].iter().zip(&self.given) {
            self.guests[*guest].disk_mib = *given;
            moment.used.disk_mib += given;
        }
    }

    /// Traffic, as far as there is CPU for it at both ends.
    fn finish(&mut self, world: &World, now: &Settings) {
        for at in 0..world.guests.len() {
            let guest = &mut self.guests[at];
            guest.outside_mbit = self.rates.outside_mbit[at] * guest.done;
            self.hosts[now.at[at]].used.network_mbit += guest.outside_mbit;
        }
        for (at, flow) in world.flows.iter().enumerate() {
            let done = self.guests[flow.one].done.min(self.guests[flow.other].done);
            let mbit = self.rates.flow_mbit[at] * done;
            self.flow_mbit[at] = mbit;
            let (one, other) = (now.at[flow.one], now.at[flow.other]);
            if one != other {
                self.hosts[one].used.network_mbit += mbit;
                self.hosts[other].used.network_mbit += mbit;
            }
        }
    }
}

/// Cores for a Mbit/s through an interface of which such a share is sent.
fn interface_cores(sent: f64) -> f64 {
    sent * SEND_CORES + (1.0 - sent) * RECEIVE_CORES
}
