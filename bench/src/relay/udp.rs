//! The relay's UDP: one thread, one socket towards the sources and one for each of them towards
//! the target, so that answers find their way back.
//!
//! ```text
//!   client A ──┐                     ┌── socket A ──┐
//!              ├── socket ── line ───┤              ├── target
//!   client B ──┘                     └── socket B ──┘
//! ```
//! Datagrams are taken and given in batches (GRO, GSO), or a core would be busy with system calls.

use std::io::{ErrorKind, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use quinn_udp::{BATCH_SIZE, EcnCodepoint, RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::line::{DelayLine, Losses};
use super::{Counters, Impairment};

/// Largest batch that the kernel hands over.
const RECEIVE_BYTES: usize = 64 << 10;

/// Largest batch that the kernel takes: a datagram of IPv4 holds 65,507 bytes.
const SEND_BYTES: usize = 60_000;

/// Most bytes under way each direction: 100 ms at 10 Gbit/s.
const UNDER_WAY_BYTES: usize = 128 << 20;

/// Buffers of a socket, as far as the kernel allows them.
const SOCKET_BYTES: usize = 8 << 20;

/// Most sources; datagrams of further ones are dropped.
const FLOWS_MAX: usize = 64;

/// How long one wait lasts at most, so that the end is noticed.
const STEP: Duration = Duration::from_millis(50);

/// A socket and what quinn-udp knows of it.
struct Port {
    socket: UdpSocket,
    state: UdpSocketState,
}

impl Port {
    fn new(socket: UdpSocket) -> Result<Self> {
        let sock = UdpSockRef::from(&socket);
        let state = UdpSocketState::new(sock).context("A socket cannot be set up")?;
        // As much as there is: the defaults lose datagrams at a Gbit/s.
        drop(state.set_recv_buffer_size((&socket).into(), SOCKET_BYTES));
        drop(state.set_send_buffer_size((&socket).into(), SOCKET_BYTES));
        Ok(Self { socket, state })
    }

    /// Sends a batch; the number of its datagrams that the kernel took.
    fn send(&self, to: SocketAddr, parcel: &Parcel) -> u64 {
        let stride = parcel.stride.max(1);
        let segments = (SEND_BYTES / stride).clamp(1, self.state.max_gso_segments().max(1));
        let mut sent = 0;
        for part in parcel.contents.chunks(segments * stride) {
            let transmit = Transmit {
                destination: to,
                ecn: parcel.ecn,
                contents: part,
                segment_size: (part.len() > stride).then_some(stride),
                src_ip: None,
            };
            if self.state.try_send((&self.socket).into(), &transmit).is_ok() {
                sent += part.len().div_ceil(stride) as u64;
            }
        }
        sent
    }
}

/// Datagrams of one length, the last perhaps shorter, in a row.
struct Parcel {
    contents: Vec<u8>,
    stride: usize,
    ecn: Option<EcnCodepoint>,
    flow: usize,
}

impl Parcel {
    fn datagrams(&self) -> u64 {
        self.contents.len().div_ceil(self.stride.max(1)) as u64
    }
}

/// A source, and the socket by which the target sees it.
struct Flow {
    client: SocketAddr,
    port: Port,
}

struct Udp<'a> {
    to: SocketAddr,
    listening: Port,
    flows: Vec<Flow>,
    out: DelayLine<Parcel>,
    back: DelayLine<Parcel>,
    losses_out: Losses,
    losses_back: Losses,
    counters: &'a Counters,
    memory: Vec<Vec<u8>>,
}

/// Passes on until `is_over`.
pub(crate) fn run(
    socket: &UdpSocket,
    to: SocketAddr,
    impairment: Impairment,
    counters: &Counters,
    is_over: impl Fn() -> bool,
) -> Result<()> {
    let socket = socket.try_clone().context("Cannot duplicate a socket")?;
    let Impairment { delay, loss, seed } = impairment;
    let mut udp = Udp {
        to,
        listening: Port::new(socket)?,
        flows: vec![],
        out: DelayLine::new(delay, UNDER_WAY_BYTES),
        back: DelayLine::new(delay, UNDER_WAY_BYTES),
        losses_out: Losses::new(loss, seed),
        losses_back: Losses::new(loss, !seed),
        counters,
        memory: vec![vec![0; RECEIVE_BYTES]; BATCH_SIZE],
    };
    while !is_over() {
        udp.deliver();
        let ready = udp.wait()?;
        udp.take(&ready)?;
    }
    Ok(())
}

/// One receive: nothing if nothing is there.
fn receive(port: &Port, memory: &mut [Vec<u8>], meta: &mut [RecvMeta]) -> Result<usize> {
    let mut slices: Vec<IoSliceMut<'_>> =
        memory.iter_mut().map(|one| IoSliceMut::new(one)).collect();
    match port.state.recv((&port.socket).into(), &mut slices, meta) {
        Ok(count) => Ok(count),
        // Refused: what was sent before reached no socket. Later datagrams may.
        Err(error)
            if [ErrorKind::WouldBlock, ErrorKind::Interrupted, ErrorKind::ConnectionRefused]
                .contains(&error.kind()) =>
        {
            Ok(0)
        }
        Err(error) => Err(error).context("Cannot receive datagrams"),
    }
}

impl Udp<'_> {
    /// Sends what has arrived.
    fn deliver(&mut self) {
        let now = Instant::now();
        let (mut wanted, mut sent) = (0, 0);
        while let Some(parcel) = self.out.pop(now) {
            let Some(flow) = self.flows.get(parcel.flow) else { continue };
            wanted += parcel.datagrams();
            sent += flow.port.send(self.to, &parcel);
        }
        while let Some(parcel) = self.back.pop(now) {
            let Some(flow) = self.flows.get(parcel.flow) else { continue };
            wanted += parcel.datagrams();
            sent += self.listening.send(flow.client, &parcel);
        }
        Counters::add(&self.counters.datagrams, sent);
        Counters::add(&self.counters.dropped, wanted - sent);
    }

    /// Waits until something can be received or delivered; which sockets have something.
    fn wait(&self) -> Result<Vec<bool>> {
        let now = Instant::now();
        let due = [self.out.next_due(), self.back.next_due()].into_iter().flatten().min();
        let left = due.map_or(STEP, |due| due.saturating_duration_since(now).min(STEP));
        let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(left.subsec_nanos()) };
        let ports = std::iter::once(&self.listening).chain(self.flows.iter().map(|one| &one.port));
        let mut fds: Vec<PollFd<'_>> = ports
            .map(|port| PollFd::from_borrowed_fd(port.socket.as_fd(), PollFlags::IN))
            .collect();
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("Cannot wait for datagrams"),
        }
        Ok(fds.iter().map(|fd| !fd.revents().is_empty()).collect())
    }

    /// Receives from the sockets that have something.
    fn take(&mut self, ready: &[bool]) -> Result<()> {
        let mut memory = std::mem::take(&mut self.memory);
        let mut meta = vec![RecvMeta::default(); BATCH_SIZE];
        for (at, _) in ready.iter().enumerate().filter(|(_, ready)| **ready) {
            let port = match at.checked_sub(1) {
                None => Some(&self.listening),
                Some(flow) => self.flows.get(flow).map(|flow| &flow.port),
            };
            let Some(port) = port else { continue };
            let count = receive(port, &mut memory, &mut meta)?;
            for (meta, bytes) in meta.iter().zip(&memory).take(count) {
                let contents = bytes.get(..meta.len).unwrap_or_default();
                self.accept(at.checked_sub(1), meta, contents)?;
            }
        }
        self.memory = memory;
        Ok(())
    }

    /// Takes a batch that came from a source (`flow` is nothing) or from the target.
    fn accept(&mut self, flow: Option<usize>, meta: &RecvMeta, contents: &[u8]) -> Result<()> {
        let (flow, losses, line) = match flow {
            None => match self.flow_of(meta.addr)? {
                Some(flow) => (flow, &mut self.losses_out, &mut self.out),
                None => return Ok(()),
            },
            // Of the target alone: others have nothing to say to a source.
            Some(_) if meta.addr != self.to => return Ok(()),
            Some(flow) => (flow, &mut self.losses_back, &mut self.back),
        };
        let (contents, lost) = losses.thin(contents, meta.stride);
        Counters::add(&self.counters.lost, lost);
        let parcel = Parcel { contents, stride: meta.stride, ecn: meta.ecn, flow };
        let datagrams = parcel.datagrams();
        if !line.push(Instant::now(), parcel.contents.len(), parcel) {
            Counters::add(&self.counters.dropped, datagrams);
        }
        Ok(())
    }

    /// The flow of a source, made if it is new; nothing if there are too many.
    fn flow_of(&mut self, client: SocketAddr) -> Result<Option<usize>> {
        if let Some(at) = self.flows.iter().position(|flow| flow.client == client) {
            return Ok(Some(at));
        }
        if self.flows.len() >= FLOWS_MAX {
            return Ok(None);
        }
        let any: SocketAddr = match self.to {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = UdpSocket::bind(any).context("No socket towards the target")?;
        self.flows.push(Flow { client, port: Port::new(socket)? });
        Ok(Some(self.flows.len() - 1))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn local() -> UdpSocket {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }

    /// Runs a relay beside `work`, which is given its address and that of the target.
    fn relayed(
        delay_ms: u64,
        loss: f64,
        work: impl FnOnce(SocketAddr, &UdpSocket),
    ) -> Arc<Counters> {
        let (socket, target) = (local(), local());
        let (at, to) = (socket.local_addr().unwrap(), target.local_addr().unwrap());
        let counters = Arc::new(Counters::default());
        let over = Arc::new(AtomicBool::new(false));
        let (own, own_over) = (Arc::clone(&counters), Arc::clone(&over));
        let impairment = Impairment { delay: Duration::from_millis(delay_ms), loss, seed: 3 };
        let thread = std::thread::spawn(move || {
            run(&socket, to, impairment, &own, || own_over.load(Ordering::Relaxed))
        });
        work(at, &target);
        over.store(true, Ordering::Relaxed);
        thread.join().unwrap().unwrap();
        counters
    }

    #[test]
    fn answers_find_their_source_and_both_ways_are_delayed() {
        let counters = relayed(30, 0.0, |at, target| {
            let clients = [local(), local()];
            let start = Instant::now();
            for (number, client) in clients.iter().enumerate() {
                client.send_to(&[number as u8; 9], at).unwrap();
            }
            for _ in &clients {
                let mut bytes = [0; 64];
                let (count, from) = target.recv_from(&mut bytes).unwrap();
                assert!(start.elapsed() >= Duration::from_millis(30));
                target.send_to(&bytes[..count], from).unwrap();
            }
            for (number, client) in clients.iter().enumerate() {
                let mut bytes = [0; 64];
                let (count, from) = client.recv_from(&mut bytes).unwrap();
                assert_eq!((&bytes[..count], from), (&[number as u8; 9][..], at));
            }
            assert!(start.elapsed() >= Duration::from_millis(60));
        });
        assert_eq!(counters.datagrams.load(Ordering::Relaxed), 4);
    }

    #[test]
    fn what_is_lost_follows_the_seed_and_the_rest_arrives_in_order() {
        const COUNT: u16 = 400;
        let mut twin = Losses::new(0.25, 3);
        let survivors: Vec<u16> = (0..COUNT).filter(|_| !twin.next()).collect();
        let counters = relayed(1, 0.25, |at, target| {
            let client = local();
            let mut seen = vec![];
            // Few at a time: none is to be lost for want of room in a socket.
            for first in (0..COUNT).step_by(20) {
                for number in first..first + 20 {
                    client.send_to(&number.to_le_bytes(), at).unwrap();
                }
                while seen.len() < survivors.partition_point(|number| *number < first + 20) {
                    let mut bytes = [0; 64];
                    assert_eq!(target.recv_from(&mut bytes).unwrap().0, 2);
                    seen.push(u16::from_le_bytes([bytes[0], bytes[1]]));
                }
            }
            assert_eq!(seen, survivors);
        });
        let lost = u64::from(COUNT) - survivors.len() as u64;
        assert_eq!(counters.lost.load(Ordering::Relaxed), lost);
        assert!(lost > 50);
    }
}
