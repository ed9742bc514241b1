//! Reads the disk with O_DIRECT all the time and verifies every block that arrives.
//!
//! Options: `device`, `threads`, `request` (KiB a request), `buffers` (reused in turn by each
//! thread), `order` (`random` or `sequential`), `seed` (of the image), `rate` (requests a second and
//! thread, 0 = unpaced), `every` (one request in so many is verified: an emulated processor verifies
//! more slowly than a disk reads, and reads are to be in flight all the time). Commands: `report`, `stop`, `start`.
//!
//! Invariant: a buffer that is verified at all is verified right after its read and once more just before it is reused, so
//! that data which a migration lost after the first look is found too.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use guest_programs::PAGE_BYTES;
use guest_programs::options::Options;
use guest_programs::pacer::Pacer;
use guest_programs::pattern::{compare, fill_block};
use guest_programs::rng::XorShift;
use nix::fcntl::OFlag;

use crate::console::{monotonic_us, tell_failure};
use crate::shell;

const PRINTED_FAILURES: u64 = 20;

#[derive(Default)]
struct Counters {
    requests: AtomicU64,
    blocks: AtomicU64,
    failures: AtomicU64,
    stopped: AtomicBool,
}

impl Counters {
    fn fail(&self, text: &str) {
        if self.failures.fetch_add(1, Ordering::Relaxed) < PRINTED_FAILURES {
            tell_failure(&format!("DISKREAD FAIL {text}"));
        }
    }
}

/// Memory of one request, aligned for direct I/O, and what was read into it.
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    first_block: Option<u64>,
}

impl Buffer {
    fn new(request_bytes: usize) -> Self {
        let bytes = vec![0; request_bytes + PAGE_BYTES];
        let start = bytes.as_ptr().align_offset(PAGE_BYTES);
        Self { bytes, start, first_block: None }
    }

    fn data(&mut self, request_bytes: usize) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + request_bytes]
    }
}

struct Reader {
    device: File,
    seed: u64,
    request_bytes: usize,
    disk_blocks: u64,
    sequential: bool,
    every: u64,
    counters: Arc<Counters>,
}

impl Reader {
    fn verify(&self, buffer: &mut Buffer, moment: &str) {
        let Some(first) = buffer.first_block else { return };
        let mut want = [0; PAGE_BYTES];
        let (blocks, _) = buffer.data(self.request_bytes).as_chunks::<PAGE_BYTES>();
        for (number, got) in (first..).zip(blocks) {
            fill_block(self.seed, number, &mut want);
            if let Some(wrong) = compare(&want, std::hint::black_box(got)) {
                self.counters.fail(&format!(
                    "block={number} offset={} want={:02x} got={:02x} bytes={} when={moment}",
                    wrong.offset, wrong.want, wrong.got, wrong.bytes
                ));
            }
        }
        self.counters.blocks.fetch_add(blocks.len() as u64, Ordering::Relaxed);
    }

    fn is_verified(&self) -> bool {
        self.counters.requests.load(Ordering::Relaxed).is_multiple_of(self.every)
    }

    fn read(&self, buffer: &mut Buffer, first: u64) {
        self.verify(buffer, "reuse");
        buffer.first_block = None;
        let offset = first * PAGE_BYTES as u64;
        match self.device.read_exact_at(buffer.data(self.request_bytes), offset) {
            Ok(()) if self.is_verified() => buffer.first_block = Some(first),
            Ok(()) => {}
            Err(error) => self.counters.fail(&format!("block={first} read error: {error}")),
        }
        self.verify(buffer, "read");
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
    }

    fn run(&self, buffers: usize, rate: u64, thread: u64) -> ! {
        let request_blocks = (self.request_bytes / PAGE_BYTES) as u64;
        let requests = self.disk_blocks / request_blocks;
        let mut ring: Vec<Buffer> = (0..buffers).map(|_| Buffer::new(self.request_bytes)).collect();
        let mut rng = XorShift::new(self.seed ^ (thread + 1));
        let mut pacer = Pacer::new(rate, monotonic_us());
        let mut next = rng.below(requests);
        loop {
            for buffer in &mut ring {
                let paused = || self.counters.stopped.load(Ordering::Relaxed);
                while paused() || pacer.grant(monotonic_us(), 1) == 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
                self.read(buffer, next * request_blocks);
                next = if self.sequential { (next + 1) % requests } else { rng.below(requests) };
            }
        }
    }
}

fn answer(counters: &Counters, words: &[&str]) -> Result<String> {
    match words {
        ["report"] => {}
        ["stop"] => counters.stopped.store(true, Ordering::Relaxed),
        ["start"] => counters.stopped.store(false, Ordering::Relaxed),
        _ => bail!("Unknown command; there are report, stop, start"),
    }
    let requests = counters.requests.load(Ordering::Relaxed);
    let blocks = counters.blocks.load(Ordering::Relaxed);
    Ok(match counters.failures.load(Ordering::Relaxed) {
        0 => format!("DISKREAD OK requests={requests} blocks={blocks}"),
        count => format!("DISKREAD FAIL count={count} requests={requests} blocks={blocks}"),
    })
}

fn device_bytes(path: &str) -> Result<u64> {
    let name = path.rsplit('/').next().unwrap_or(path);
    let size = format!("/sys/class/block/{name}/size");
    let text = std::fs::read_to_string(&size).with_context(|| format!("Cannot read {size}"))?;
    Ok(text.trim().parse::<u64>().with_context(|| format!("{size} holds no number"))? * 512)
}

/// Runs until stdin ends.
pub(crate) fn run(mut options: Options) -> Result<()> {
    let path = options.word("device", "/dev/vda");
    let threads = options.number("threads", 2)?;
    let request_kib = options.number("request", 1024)?;
    let buffers = options.number("buffers", 4)?;
    let order = options.word("order", "random");
    let seed = options.number("seed", 1)?;
    let rate = options.number("rate", 0)?;
    let every = options.number("every", 1)?.max(1);
    options.finish()?;
    ensure!(["random", "sequential"].contains(&order.as_str()), "Unknown order {order:?}");
    ensure!(threads >= 1 && buffers >= 1, "threads and buffers are at least 1");
    ensure!(request_kib >= 4 && request_kib.is_multiple_of(4), "request is a multiple of 4 KiB");
    let disk_blocks = device_bytes(&path)? / PAGE_BYTES as u64;
    let request_bytes = request_kib as usize * 1024;
    ensure!(disk_blocks >= request_kib / 4, "{path} is smaller than one request");
    let counters = Arc::new(Counters::default());
    for thread in 0..threads {
        let device = OpenOptions::new()
            .read(true)
            .custom_flags(OFlag::O_DIRECT.bits())
            .open(&path)
            .with_context(|| format!("Cannot open {path} for direct reads"))?;
        let reader = Reader {
            device,
            seed,
            request_bytes,
            disk_blocks,
            sequential: order == "sequential",
            every,
            counters: Arc::clone(&counters),
        };
        std::thread::spawn(move || reader.run(buffers as usize, rate, thread));
    }
    println!("ready device={path} threads={threads} request={request_kib} buffers={buffers}");
    shell::serve(|words| answer(&counters, words))
}
