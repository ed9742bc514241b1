//! Delay and loss where the kernel has no netem: a relay in user space.
//!
//! ```text
//!   source's namespace                     destination's namespace
//!   migrate send ==== link0 (TBF) ====> relay :P+1 ── delay, loss ──> migrate receive :P
//! ```
//! It stands behind the link, so that the link's counters and its shaping see all that was sent,
//! also what the relay loses. UDP: every datagram waits for the delay, and a share of them is lost
//! by a seeded generator, one a direction. TCP: bytes wait for the delay; there is no loss, since a
//! program above TCP cannot lose a segment, and TCP itself ends at the relay, so that neither its
//! handshake nor its congestion control sees the delay. There is no jitter and no reordering.
//!
//! The relay is a process of its own and costs CPU time of the machine, which is recorded.

mod line;
mod tcp;
mod udp;

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use framework::Engine;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::args::RelayArgs;
use crate::interrupt;
use crate::scenario::LinkPart;

/// Longest wait for the relay to listen, and to end.
const TIMEOUT: Duration = Duration::from_secs(20);

/// What the relay does to what passes it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Impairment {
    /// Delay of each direction.
    pub(crate) delay: Duration,
    /// Share of datagrams that are lost, 0 to 1.
    pub(crate) loss: f64,
    /// Seed of the losses.
    pub(crate) seed: u64,
}

/// What has passed, both directions together.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Datagrams passed on.
    datagrams: AtomicU64,
    /// Datagrams lost by intent.
    lost: AtomicU64,
    /// Datagrams that the kernel would not take, or for which there was no room.
    dropped: AtomicU64,
    /// Bytes passed on over TCP.
    tcp_bytes: AtomicU64,
}

impl Counters {
    fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }

    fn json(&self) -> Value {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({
            "datagrams": read(&self.datagrams),
            "lost": read(&self.lost),
            "dropped": read(&self.dropped),
            "tcp_bytes": read(&self.tcp_bytes),
        })
    }
}

/// `bench relay`: passes on until a signal comes, then prints what it has counted.
///
/// # Errors
/// It cannot listen, or a socket failed.
pub(crate) fn run(args: &RelayArgs) -> Result<()> {
    ensure!((0.0..=10_000.0).contains(&args.delay_ms), "--delay-ms: 0 to 10000");
    ensure!((0.0..=100.0).contains(&args.loss_percent), "--loss-percent: 0 to 100");
    let impairment = Impairment {
        delay: Duration::from_secs_f64(args.delay_ms / 1e3),
        loss: args.loss_percent / 100.0,
        seed: args.seed,
    };
    let shown = args.listen;
    let datagrams = UdpSocket::bind(shown).with_context(|| format!("Cannot bind UDP {shown}"))?;
    let streams = TcpListener::bind(shown).with_context(|| format!("Cannot bind TCP {shown}"))?;
    let counters = Arc::new(Counters::default());
    let (to, own) = (args.to, Arc::clone(&counters));
    std::thread::spawn(move || tcp::accept(&streams, to, impairment.delay, &own));
    eprintln!("relay listening on {shown}, to {to}");
    udp::run(&datagrams, to, impairment, &counters, interrupt::is_asked)?;
    println!("{}", counters.json());
    Ok(())
}

/// A relay that runs in a namespace; it ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Relay(Engine);

impl Relay {
    /// Starts one in a namespace, which listens at `listen` for what shall go `to`. The losses of
    /// one turn are the same for all modes.
    ///
    /// # Errors
    /// It does not start.
    pub(crate) fn start(
        netns: &str,
        listen: SocketAddr,
        to: SocketAddr,
        link: &LinkPart,
        turn: u32,
    ) -> Result<Self> {
        let program = std::env::current_exe().context("This program has no path")?;
        let words = [
            ("--listen", listen.to_string()),
            ("--to", to.to_string()),
            ("--delay-ms", link.delay_ms.to_string()),
            ("--loss-percent", link.loss_percent.to_string()),
            ("--seed", link.seed.wrapping_add(u64::from(turn)).to_string()),
        ];
        let mut all = vec!["relay"];
        all.extend(words.iter().flat_map(|(name, value)| [*name, value.as_str()]));
        let mut engine = Engine::start(&program, &all, Some(netns))?;
        engine.wait_stderr("relay listening on", TIMEOUT)?;
        Ok(Self(engine))
    }

    /// Ends it: what it has counted, with the CPU seconds it took.
    ///
    /// # Errors
    /// It does not end.
    pub(crate) fn end(mut self) -> Result<Value> {
        self.0.signal(Signal::SIGTERM)?;
        let output = self.0.wait(TIMEOUT)?.success().context("The relay failed")?;
        let mut counted = output.json()?.clone();
        counted["cpu_s"] = json!(output.cpu_seconds);
        Ok(counted)
    }
}
