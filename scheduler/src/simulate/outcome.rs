//! What a run came to, and how it is added up.

use serde::Serialize;

use super::moment::{Moment, Settings};
use super::response::response;
use super::world::World;

/// A migration.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Moved {
    /// When it began, seconds from the start.
    pub at_s: f64,
    /// When it ended.
    pub end_s: f64,
    /// The guest.
    pub vm: String,
    /// Where it ran.
    pub from: String,
    /// Where it went.
    pub to: String,
    /// What it sent, MiB.
    pub wire_mib: f64,
    /// For how long the guest stood still.
    pub downtime_ms: f64,
    /// Whether it ended before the run did.
    pub is_done: bool,
    /// The policy's reason.
    pub reason: String,
}

/// A change of a guest's memory.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Resized {
    /// When, seconds from the start.
    pub at_s: f64,
    /// The guest.
    pub vm: String,
    /// What it had.
    pub from_mib: f64,
    /// What it has then.
    pub to_mib: f64,
    /// The policy's reason.
    pub reason: String,
}

/// A step that could not be done.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Refused {
    /// When, seconds from the start.
    pub at_s: f64,
    /// The guest.
    pub vm: String,
    /// Why.
    pub why: String,
}

/// What a policy was asked.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Asked {
    /// When, seconds from the start.
    pub at_s: f64,
    /// What was found, in the detectors' words.
    pub hotspots: Vec<String>,
    /// What the policy considered and left, in its words.
    pub notes: Vec<String>,
}

/// Host-seconds, for each resource.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct ByResource {
    /// More CPU was wanted than there was.
    pub cpu_s: f64,
    /// A guest swapped for lack of memory.
    pub memory_s: f64,
    /// The interface was to carry all that it could, or more.
    pub network_s: f64,
    /// More was wanted of the disks than they could.
    pub disk_s: f64,
}

/// A group of guests that users wait for.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ServiceOutcome {
    /// Its name.
    pub name: String,
    /// Mean response time, weighted by requests; `None` where nobody waited.
    pub response_ms: Option<f64>,
    /// Mean traffic between its guests, Mbit/s.
    pub talk_mbit: f64,
}

/// A host's means.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HostOutcome {
    /// Its name.
    pub name: String,
    /// Share of its CPU in use.
    pub cpu_share: f64,
    /// Share of its interface in use.
    pub network_share: f64,
}

/// What a run came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// The policy's name.
    pub policy: String,
    /// The seed.
    pub seed: u64,
    /// How much time was simulated.
    pub duration_s: f64,
    /// Host-seconds in which more was wanted of some resource than the host has.
    pub overload_s: f64,
    /// The same by resource; a host can lack several.
    pub overload: ByResource,
    /// Mean response time in ms, weighted by requests; 0 if nobody waited.
    pub response_mean_ms: f64,
    /// 95 % of requests were answered within, ms.
    pub response_p95_ms: f64,
    /// Migrations.
    pub moves: Vec<Moved>,
    /// Their bytes, MiB.
    pub wire_mib: f64,
    /// For how long guests stood still in all.
    pub downtime_ms: f64,
    /// Moves to a host that the guest had left less than 10 minutes before.
    pub ping_pongs: usize,
    /// Changes of memory.
    pub resizes: Vec<Resized>,
    /// Steps that could not be done.
    pub refused: Vec<Refused>,
    /// How often the policy was asked.
    pub decisions: usize,
    /// What it was asked, where it did something or said something new.
    pub asked: Vec<Asked>,
    /// Services, if the scenario names them.
    pub services: Vec<ServiceOutcome>,
    /// Hosts, if the scenario names them.
    pub hosts: Vec<HostOutcome>,
    /// Hosts with too much to do, mean of each report interval.
    pub overloaded_hosts: Vec<f64>,
}

/// Classes of response times: each 2 % above the one before, from 0.1 ms to about 12 hours.
const CLASSES: usize = 1000;
const CLASS_RATIO: f64 = 1.02;
const CLASS_FIRST_MS: f64 = 0.1;

/// Within this time a guest should not come back.
const BACK_S: f64 = 600.0;

/// Adds up what happens.
#[derive(Debug)]
pub(super) struct Measure {
    overload_s: f64,
    by_resource: [f64; 4],
    classes: Vec<f64>,
    requests: f64,
    waited_ms: f64,
    /// Requests and what they waited, of each service.
    services: Vec<(f64, f64)>,
    talk_mbit_s: Vec<f64>,
    hosts: Vec<(f64, f64)>,
    interval_overload_s: f64,
    overloaded_hosts: Vec<f64>,
}

impl Measure {
    pub(super) fn new(world: &World) -> Self {
        Self {
            overload_s: 0.0,
            by_resource: [0.0; 4],
            classes: vec![0.0; CLASSES],
            requests: 0.0,
            waited_ms: 0.0,
            services: vec![(0.0, 0.0); world.services.len()],
            talk_mbit_s: vec![0.0; world.services.len()],
            hosts: vec![(0.0, 0.0); world.machines.len()],
            interval_overload_s: 0.0,
            overloaded_hosts: vec![],
        }
    }

    /// Counts a moment that lasts so long.
    pub(super) fn count(&mut self, world: &World, moment: &Moment, now: &Settings, lasts_s: f64) {
        for (host, machine) in world.machines.iter().enumerate() {
            let overloaded = moment.hosts[host].overloaded(machine);
            for (sum, is_overloaded) in self.by_resource.iter_mut().zip(overloaded) {
                *sum += if is_overloaded { lasts_s } else { 0.0 };
            }
            if overloaded.contains(&true) {
                self.overload_s += lasts_s;
                self.interval_overload_s += lasts_s;
            }
            let shares = moment.hosts[host].used.share_of(&machine.capacity);
            self.hosts[host].0 += shares.cpu_cores.min(1.0) * lasts_s;
            self.hosts[host].1 += shares.network_mbit.min(1.0) * lasts_s;
        }
        for (at, service) in world.services.iter().enumerate() {
            for flow in &service.flows {
                self.talk_mbit_s[at] += moment.flow_mbit[*flow] * lasts_s;
            }
            let Some(response) = response(world, service, moment, now) else { continue };
            let requests = response.requests_per_s * lasts_s;
            let waited_ms = requests * response.response_ms;
            self.requests += requests;
            self.waited_ms += waited_ms;
            self.services[at].0 += requests;
            self.services[at].1 += waited_ms;
            if let Some(class) = self.classes.get_mut(class_of(response.response_ms)) {
                *class += requests;
            }
        }
    }

    /// A report interval is over.
    pub(super) fn interval(&mut self, lasted_s: f64) {
        self.overloaded_hosts.push(self.interval_overload_s / lasted_s);
        self.interval_overload_s = 0.0;
    }

    /// What it came to. What is known of policy and plans is the caller's to fill in.
    pub(super) fn outcome(self, world: &World, duration_s: f64, is_named: bool) -> Outcome {
        let [cpu_s, memory_s, network_s, disk_s] = self.by_resource;
        let services = world.services.iter().enumerate().filter(|_| is_named);
        let services = services.map(|(at, service)| ServiceOutcome {
            name: service.name.clone(),
            response_ms: mean(self.services[at]),
            talk_mbit: self.talk_mbit_s[at] / duration_s,
        });
        let hosts = world.machines.iter().zip(&self.hosts).filter(|_| is_named);
        let hosts = hosts.map(|(machine, (cpu, network))| HostOutcome {
            name: machine.name.clone(),
            cpu_share: cpu / duration_s,
            network_share: network / duration_s,
        });
        Outcome {
            policy: String::new(),
            seed: 0,
            duration_s,
            overload_s: self.overload_s,
            overload: ByResource { cpu_s, memory_s, network_s, disk_s },
            response_mean_ms: mean((self.requests, self.waited_ms)).unwrap_or(0.0),
            response_p95_ms: self.percentile(0.95),
            services: services.collect(),
            hosts: hosts.collect(),
            overloaded_hosts: self.overloaded_hosts,
            moves: vec![],
            wire_mib: 0.0,
            downtime_ms: 0.0,
            ping_pongs: 0,
            resizes: vec![],
            refused: vec![],
            decisions: 0,
            asked: vec![],
        }
    }

    fn percentile(&self, share: f64) -> f64 {
        let mut left = self.requests * share;
        for (class, requests) in self.classes.iter().enumerate() {
            left -= requests;
            if left <= 0.0 && self.requests > 0.0 {
                return CLASS_FIRST_MS * CLASS_RATIO.powi(class as i32);
            }
        }
        0.0
    }
}

fn class_of(response_ms: f64) -> usize {
    let class = (response_ms / CLASS_FIRST_MS).max(1.0).ln() / CLASS_RATIO.ln();
    (class.round() as usize).min(CLASSES - 1)
}

fn mean((count, sum): (f64, f64)) -> Option<f64> {
    (count > 0.0).then(|| sum / count)
}

/// Moves to a host that the guest had left less than 10 minutes before.
pub(super) fn ping_pongs(moves: &[Moved]) -> usize {
    let mut left: std::collections::HashMap<(&str, &str), f64> = std::collections::HashMap::new();
    let mut count = 0;
    for moved in moves {
        let back = left.get(&(moved.vm.as_str(), moved.to.as_str()));
        count += usize::from(back.is_some_and(|left_s| moved.at_s - left_s < BACK_S));
        left.insert((&moved.vm, &moved.from), moved.end_s);
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moved(at_s: f64, vm: &str, from: &str, to: &str) -> Moved {
        let (vm, from, to) = (vm.to_owned(), from.to_owned(), to.to_owned());
        let (end_s, reason) = (at_s + 5.0, String::new());
        Moved { at_s, end_s, vm, from, to, wire_mib: 1.0, downtime_ms: 1.0, is_done: true, reason }
    }

    #[test]
    fn who_is_back_within_ten_minutes_is_a_ping_pong() {
        let there = moved(0.0, "a", "one", "two");
        assert_eq!(ping_pongs(&[there.clone(), moved(604.0, "a", "two", "one")]), 1);
        assert_eq!(ping_pongs(&[there.clone(), moved(605.0, "a", "two", "one")]), 0);
        assert_eq!(ping_pongs(&[there.clone(), moved(10.0, "b", "two", "one")]), 0);
        let round = [there, moved(10.0, "a", "two", "three"), moved(20.0, "a", "three", "one")];
        assert_eq!(ping_pongs(&round), 1);
    }

    #[test]
    fn classes_are_as_fine_as_they_say() {
        for response_ms in [0.1, 1.0, 57.0, 415.25, 7075.0, 1e7] {
            let class = CLASS_FIRST_MS * CLASS_RATIO.powi(class_of(response_ms) as i32);
            assert!((class / response_ms - 1.0).abs() < 0.011, "{response_ms} is in {class}");
        }
        assert_eq!(class_of(1e300), CLASSES - 1);
        assert_eq!(class_of(f64::NAN), 0);
    }
}
