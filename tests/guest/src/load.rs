//! Work that a host sees: processor time, memory and traffic, each from nothing and changed by command.
//!
//! Options: `cpu` (percent of each processor), `mib` (memory), `port` (UDP), `touch` (pages written a second). Commands:
//! `cpu PERCENT`, `cpu PERCENT MS` (and then as before), `memory MIB`, `send ADDRESS KBIT`, `report`.
//!
//! Memory that is held is written all over again, so that a guest with too little of it swaps. What is sent are datagrams
//! of [`DATAGRAM_BYTES`]; whoever has this program counts what it receives.
//!
//! Invariant: work is by the guest's clock: one that is stolen from does less, and catches up with nothing.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use guest_programs::options::Options;
use guest_programs::pacer::Pacer;
use guest_programs::rng::XorShift;

use crate::console::monotonic_us;
use crate::memory::{PAGES_PER_MIB, Page, pages};
use crate::shell;

/// Bytes of a datagram without headers: with them it fits a frame.
pub(crate) const DATAGRAM_BYTES: usize = 1400;

/// Work and rest alternate within this time.
const PERIOD_US: u64 = 20_000;

/// Pages written, and datagrams sent, before the command is looked at again.
const STEP: u64 = 32;

const MIB_MAX: u64 = 4096;
const KBIT_MAX: u64 = 1_000_000;

#[derive(Default)]
struct Shared {
    percent: AtomicU64,
    /// Until when the share is another one, and which.
    spike_until_us: AtomicU64,
    spike_percent: AtomicU64,
    mib_wanted: AtomicU64,
    mib_held: AtomicU64,
    pages_written: AtomicU64,
    worked_us: AtomicU64,
    sent_bytes: AtomicU64,
    received_bytes: AtomicU64,
    peer: Mutex<Option<(SocketAddr, u64)>>,
}

impl Shared {
    fn percent_now(&self, now_us: u64) -> u64 {
        let is_spike = now_us < self.spike_until_us.load(Ordering::Relaxed);
        let percent = if is_spike { &self.spike_percent } else { &self.percent };
        percent.load(Ordering::Relaxed)
    }

    fn peer(&self) -> MutexGuard<'_, Option<(SocketAddr, u64)>> {
        self.peer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self) -> String {
        let figure = |figure: &AtomicU64| figure.load(Ordering::Relaxed);
        let peer = self.peer().map_or_else(|| "none".to_owned(), |(to, _)| to.ip().to_string());
        format!(
            "LOAD OK cpu={} mib={} pages={} worked_us={} to={peer} sent={} received={} elapsed_us={}",
            self.percent_now(monotonic_us()),
            figure(&self.mib_held),
            figure(&self.pages_written),
            figure(&self.worked_us),
            figure(&self.sent_bytes),
            figure(&self.received_bytes),
            monotonic_us(),
        )
    }
}

/// On each processor.
fn work(shared: &Shared) -> ! {
    let mut sum = 1_u64;
    loop {
        let began_us = monotonic_us();
        let work_us = PERIOD_US * shared.percent_now(began_us).min(100) / 100;
        if work_us == 0 {
            std::thread::sleep(Duration::from_millis(50));
            continue;
        }
        let mut now_us = began_us;
        while now_us - began_us < work_us {
            for _ in 0..2000 {
                sum = std::hint::black_box(sum.wrapping_mul(6_364_136_223_846_793_005) + 1);
            }
            now_us = monotonic_us();
        }
        shared.worked_us.fetch_add(now_us - began_us, Ordering::Relaxed);
        let rest_us = PERIOD_US.saturating_sub(now_us - began_us);
        if work_us < PERIOD_US {
            std::thread::sleep(Duration::from_micros(rest_us.max(1000)));
        }
    }
}

fn hold_memory(shared: &Shared, pages_per_s: u64) -> ! {
    let mut pacer = Pacer::new(pages_per_s, monotonic_us());
    let mut rng = XorShift::new(0x6c6f_6164);
    // By MiB: the allocator would waste as much again for single pages.
    let mut held: Vec<Vec<Page>> = vec![];
    let mut next = 0;
    loop {
        let wanted = shared.mib_wanted.load(Ordering::Relaxed) as usize;
        held.truncate(wanted);
        if held.len() < wanted {
            let mut mib = pages(PAGES_PER_MIB);
            mib.iter_mut().for_each(|page| write(page, &mut rng));
            held.push(mib);
        }
        shared.mib_held.store(held.len() as u64, Ordering::Relaxed);
        if held.len() < wanted {
            continue;
        }
        let granted = if held.is_empty() { 0 } else { pacer.grant(monotonic_us(), STEP) };
        for _ in 0..granted {
            next = (next + 1) % (held.len() * PAGES_PER_MIB as usize);
            let mib = held.get_mut(next / PAGES_PER_MIB as usize);
            let page = mib.and_then(|mib| mib.get_mut(next % PAGES_PER_MIB as usize));
            if let Some(page) = page {
                write(page, &mut rng);
            }
        }
        shared.pages_written.fetch_add(granted, Ordering::Relaxed);
        if granted < STEP {
            std::thread::sleep(Duration::from_millis(if held.is_empty() { 100 } else { 10 }));
        }
    }
}

fn write(page: &mut Page, rng: &mut XorShift) {
    // Not compressible and never equal to another page.
    for chunk in page.0.chunks_exact_mut(512) {
        chunk[..8].copy_from_slice(&rng.next_u64().to_le_bytes());
    }
    std::hint::black_box(page);
}

fn send(shared: &Shared, socket: &UdpSocket) -> ! {
    let datagram = [0x5a; DATAGRAM_BYTES];
    let (mut pacer, mut current) = (Pacer::new(1, monotonic_us()), None);
    loop {
        let peer = *shared.peer();
        let Some((to, kbit)) = peer else {
            current = None;
            std::thread::sleep(Duration::from_millis(100));
            continue;
        };
        if current != peer {
            pacer = Pacer::new((kbit * 125 / DATAGRAM_BYTES as u64).max(1), monotonic_us());
            current = peer;
        }
        for _ in 0..pacer.grant(monotonic_us(), STEP) {
            // Nobody may listen yet, or the queue be full: what is lost is lost.
            if let Ok(bytes) = socket.send_to(&datagram, to) {
                shared.sent_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
            }
        }
        std::thread::sleep(Duration::from_millis(4));
    }
}

fn receive(shared: &Shared, socket: &UdpSocket) -> ! {
    let mut buffer = [0; 2048];
    loop {
        if let Ok(bytes) = socket.recv(&mut buffer) {
            shared.received_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }
}

fn answer(shared: &Shared, port: u16, words: &[&str]) -> Result<String> {
    match words {
        ["report"] => {}
        ["cpu", percent] => {
            shared.spike_until_us.store(0, Ordering::Relaxed);
            shared.percent.store(percent_of(percent)?, Ordering::Relaxed);
        }
        ["cpu", percent, ms] => {
            shared.spike_percent.store(percent_of(percent)?, Ordering::Relaxed);
            let us = ms.parse::<u64>()?.saturating_mul(1000);
            shared.spike_until_us.store(monotonic_us().saturating_add(us), Ordering::Relaxed);
        }
        ["memory", mib] => {
            let mib: u64 = mib.parse()?;
            ensure!(mib <= MIB_MAX, "At most {MIB_MAX} MiB");
            shared.mib_wanted.store(mib, Ordering::Relaxed);
        }
        ["send", _, "0"] => *shared.peer() = None,
        ["send", address, kbit] => {
            let address: Ipv4Addr = address.parse().context("No address")?;
            let kbit: u64 = kbit.parse()?;
            ensure!(kbit <= KBIT_MAX, "At most {KBIT_MAX} kbit/s");
            *shared.peer() = Some((SocketAddr::from((address, port)), kbit));
        }
        _ => bail!(
            "Unknown command; there are report, cpu PERCENT [MS], memory MIB, send ADDRESS KBIT"
        ),
    }
    Ok(shared.report())
}

fn percent_of(text: &str) -> Result<u64> {
    let percent = text.parse()?;
    ensure!(percent <= 100, "A processor has 100 percent");
    Ok(percent)
}

/// Runs until stdin ends.
pub(crate) fn run(mut options: Options) -> Result<()> {
    let percent = options.number("cpu", 0)?;
    let mib = options.number("mib", 0)?;
    let port = u16::try_from(options.number("port", 7000)?).context("No port")?;
    let touch = options.number("touch", 2000)?;
    options.finish()?;
    let shared = Arc::new(Shared::default());
    answer(&shared, port, &["cpu", &percent.to_string()])?;
    answer(&shared, port, &["memory", &mib.to_string()])?;
    let socket = Arc::new(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).context("No socket")?);
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    for _ in 0..processors {
        let shared = Arc::clone(&shared);
        std::thread::spawn(move || work(&shared));
    }
    let own = Arc::clone(&shared);
    std::thread::spawn(move || hold_memory(&own, touch));
    let (own, end) = (Arc::clone(&shared), Arc::clone(&socket));
    std::thread::spawn(move || send(&own, &end));
    let own = Arc::clone(&shared);
    std::thread::spawn(move || receive(&own, &socket));
    println!("ready {}", shared.report());
    shell::serve(|words| answer(&shared, port, words))
}
