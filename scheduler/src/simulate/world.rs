//! The world: hosts, guests with what they want over time, who talks to whom, and the services that users wait for.
//!
//! Invariants: a [`World`] that [`World::seal`] made has valid indices and finite, non-negative figures; its changes are
//! in the order of time.

use crate::model::{Amounts, HostState};

/// A host.
#[derive(Debug, Clone)]
pub(super) struct Machine {
    pub(super) name: String,
    pub(super) capacity: Amounts,
    /// What its own programs take.
    pub(super) own: Amounts,
    /// What it can receive, Mbit/s.
    pub(super) receive_mbit: f64,
    /// Threads among which work queues.
    pub(super) threads: f64,
    /// By how much a core is faster with traffic than those of [`super::calibration`].
    pub(super) speed: f64,
    pub(super) state: HostState,
}

/// A guest.
#[derive(Debug, Clone)]
pub(super) struct Guest {
    pub(super) name: String,
    /// Where it runs at first.
    pub(super) host: usize,
    pub(super) vcpus: u32,
    /// What it wants at a level of 1, without what traffic costs.
    pub(super) cpu_cores: f64,
    /// With clients outside of the cluster, at a level of 1.
    pub(super) outside_mbit: f64,
    /// Of that, the share which it sends.
    pub(super) outside_sent: f64,
    pub(super) disk_mib: f64,
    /// Memory that it writes at a level of 1.
    pub(super) dirty_mib_per_s: f64,
    pub(super) allocated_mib: f64,
    /// What it needs at first; [`What::Needs`] changes it.
    pub(super) needed_mib: f64,
    /// Page cache that it uses beyond its needs where there is memory.
    pub(super) cache_mib: f64,
    pub(super) reserve_mib: f64,
    pub(super) max_mib: f64,
    pub(super) priority: u8,
    /// Its level by the time of day: 1 + amplitude * sin.
    pub(super) daily: Daily,
    /// Its level wavers from one report to the next by up to this share.
    pub(super) noise: f64,
    /// The service that it is part of.
    pub(super) service: usize,
}

/// A pattern that repeats.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Daily {
    pub(super) amplitude: f64,
    pub(super) period_s: f64,
    /// When it is first in its middle, rising.
    pub(super) phase_s: f64,
}

/// Two guests that talk.
#[derive(Debug, Clone)]
pub(super) struct Flow {
    pub(super) one: usize,
    pub(super) other: usize,
    /// At a level of 1; if it is [`Flow::is_elastic`], what it would take if it got it.
    pub(super) mbit: f64,
    /// Of that, what `one` sends.
    pub(super) sent: f64,
    /// Whether it takes all that it gets; then no interface has too much to do because of it.
    pub(super) is_elastic: bool,
}

/// What users wait for: guests that answer together.
#[derive(Debug, Clone)]
pub(super) struct Service {
    pub(super) name: String,
    pub(super) guests: Vec<usize>,
    pub(super) flows: Vec<usize>,
    /// Users at a level of 1; 0 where nobody waits.
    pub(super) users: f64,
    /// A response on an idle host, without talk.
    pub(super) base_ms: f64,
    /// What its guests say to each other for a response, over an idle network.
    pub(super) talk_ms: f64,
    /// Between a user's requests.
    pub(super) think_s: f64,
}

/// Something that changes by itself.
#[derive(Debug, Clone, Copy)]
pub(super) struct Change {
    pub(super) at_s: f64,
    pub(super) guest: usize,
    pub(super) what: What,
}

/// What changes.
#[derive(Debug, Clone, Copy)]
pub(super) enum What {
    /// The guest's level, by a factor of what it is without.
    Factor(f64),
    /// The memory that it needs, MiB.
    Needs(f64),
}

/// Everything.
#[derive(Debug, Clone, Default)]
pub(super) struct World {
    pub(super) machines: Vec<Machine>,
    pub(super) guests: Vec<Guest>,
    pub(super) flows: Vec<Flow>,
    pub(super) services: Vec<Service>,
    pub(super) changes: Vec<Change>,
    /// The flows of each guest.
    pub(super) flows_of: Vec<Vec<usize>>,
}

impl World {
    /// Puts in order what was put together. Guests without a service get one of their own, for which nobody waits.
    pub(super) fn seal(mut self) -> Self {
        self.changes.sort_by(|one, other| one.at_s.total_cmp(&other.at_s));
        self.flows_of = vec![vec![]; self.guests.len()];
        for (at, flow) in self.flows.iter().enumerate() {
            self.flows_of[flow.one].push(at);
            self.flows_of[flow.other].push(at);
        }
        for service in &mut self.services {
            service.guests.clear();
            service.flows.clear();
        }
        for (at, guest) in self.guests.iter().enumerate() {
            self.services[guest.service].guests.push(at);
        }
        for (at, flow) in self.flows.iter().enumerate() {
            let service = self.guests[flow.one].service;
            if service == self.guests[flow.other].service {
                self.services[service].flows.push(at);
            }
        }
        self
    }
}
