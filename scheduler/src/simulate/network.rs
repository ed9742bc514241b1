//! Who gets how much of the hosts' interfaces.
//!
//! Traffic between guests of a host does not touch its interface. What crosses is limited at both ends by the cable
//! (both directions together) and by what the host can receive. Limits are looked at in the order of how much more is
//! wanted than there is, each shared fairly; what that leaves over is given to those who were cut, in order.
//!
//! Invariants: no rate is above what is wanted or below nothing; no limit is exceeded; no rate that was cut could be
//! raised without exceeding one.

use super::share::share;
use super::world::World;

/// A limit of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Limit {
    Line,
    Receive,
}

/// What takes part in traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stream {
    Flow(usize),
    Outside(usize),
}

/// Rates, and what hosts have of them.
#[derive(Debug, Clone, Default)]
pub(super) struct Rates {
    /// Of each flow, Mbit/s: what is wanted first, then what it gets.
    pub(super) flow_mbit: Vec<f64>,
    /// Of each guest with the outside, likewise.
    pub(super) outside_mbit: Vec<f64>,
    /// What may be used of each host's cable.
    pub(super) line_mbit: Vec<f64>,
    line: Vec<f64>,
    receive: Vec<f64>,
}

impl Rates {
    /// For a world's hosts, guests and flows.
    pub(super) fn new(world: &World) -> Self {
        Self {
            flow_mbit: vec![0.0; world.flows.len()],
            outside_mbit: vec![0.0; world.guests.len()],
            line_mbit: vec![0.0; world.machines.len()],
            line: vec![0.0; world.machines.len()],
            receive: vec![0.0; world.machines.len()],
        }
    }

    /// Cuts what is wanted to what there is.
    pub(super) fn contend(&mut self, world: &World, at: &[usize], guests: &[Vec<usize>]) {
        self.add_up(world, at);
        let mut tight: Vec<(f64, usize, Limit)> = vec![];
        for (host, machine) in world.machines.iter().enumerate() {
            for (limit, used, has) in [
                (Limit::Line, self.line[host], self.line_mbit[host]),
                (Limit::Receive, self.receive[host], machine.receive_mbit),
            ] {
                if used > has {
                    tight.push((used / has.max(1e-9), host, limit));
                }
            }
        }
        if tight.is_empty() {
            return;
        }
        tight.sort_by(|one, other| other.0.total_cmp(&one.0));
        let mut cut = vec![];
        for (_, host, limit) in tight {
            self.divide(world, at, &guests[host], (host, limit), &mut cut);
        }
        self.add_up(world, at);
        for (stream, wanted) in cut {
            self.raise(world, at, stream, wanted);
        }
    }

    /// What streams take of the hosts' limits.
    fn add_up(&mut self, world: &World, at: &[usize]) {
        self.line.fill(0.0);
        self.receive.fill(0.0);
        for flow in 0..world.flows.len() {
            self.count(world, at, Stream::Flow(flow), self.flow_mbit[flow]);
        }
        for guest in 0..world.guests.len() {
            self.count(world, at, Stream::Outside(guest), self.outside_mbit[guest]);
        }
    }

    fn count(&mut self, world: &World, at: &[usize], stream: Stream, mbit: f64) {
        for (host, received) in ends(world, at, stream).into_iter().flatten() {
            self.line[host] += mbit;
            self.receive[host] += mbit * received;
        }
    }

    fn rate(&mut self, stream: Stream) -> &mut f64 {
        match stream {
            Stream::Flow(flow) => &mut self.flow_mbit[flow],
            Stream::Outside(guest) => &mut self.outside_mbit[guest],
        }
    }

    /// Divides a limit among those who use it.
    fn divide(
        &mut self,
        world: &World,
        at: &[usize],
        guests: &[usize],
        (host, limit): (usize, Limit),
        cut: &mut Vec<(Stream, f64)>,
    ) {
        let mut streams = vec![];
        for guest in guests {
            streams.push(Stream::Outside(*guest));
            // Both ends of a flow that crosses are not here, so that it is found once.
            streams.extend(world.flows_of[*guest].iter().map(|flow| Stream::Flow(*flow)));
        }
        let mut used = vec![];
        for stream in streams {
            let end = ends(world, at, stream).into_iter().flatten().find(|end| end.0 == host);
            let weight = end.map_or(0.0, |end| if limit == Limit::Line { 1.0 } else { end.1 });
            if weight > 0.0 {
                used.push((stream, *self.rate(stream), weight));
            }
        }
        let wants: Vec<_> = used.iter().map(|(_, mbit, weight)| (mbit * weight, *weight)).collect();
        let has = match limit {
            Limit::Line => self.line_mbit[host],
            Limit::Receive => world.machines[host].receive_mbit,
        };
        let mut given = vec![];
        share(has, &wants, &mut given);
        for ((stream, wanted, weight), given) in used.into_iter().zip(given) {
            let rate = (given / weight).min(wanted);
            if rate < wanted {
                if cut.iter().all(|(known, _)| *known != stream) {
                    cut.push((stream, wanted));
                }
                *self.rate(stream) = rate;
            }
        }
    }

    /// Gives what both ends have left.
    fn raise(&mut self, world: &World, at: &[usize], stream: Stream, wanted: f64) {
        let mut more = wanted - *self.rate(stream);
        for (host, received) in ends(world, at, stream).into_iter().flatten() {
            more = more.min(self.line_mbit[host] - self.line[host]);
            if received > 0.0 {
                let left = world.machines[host].receive_mbit - self.receive[host];
                more = more.min(left / received);
            }
        }
        if more > 0.0 {
            *self.rate(stream) += more;
            self.count(world, at, stream, more);
        }
    }
}

/// The hosts whose interfaces a stream uses, and the share of it that each receives.
fn ends(world: &World, at: &[usize], stream: Stream) -> [Option<(usize, f64)>; 2] {
    match stream {
        Stream::Outside(guest) => [Some((at[guest], 1.0 - world.guests[guest].outside_sent)), None],
        Stream::Flow(flow) => {
            let flow = &world.flows[flow];
            let (one, other) = (at[flow.one], at[flow.other]);
            if one == other {
                return [None, None];
            }
            [Some((one, 1.0 - flow.sent)), Some((other, flow.sent))]
        }
    }
}
