//! Redis as a cache under redis-benchmark. Options: `memory` (MiB, redis' maxmemory), `value` (bytes of
//! a value), `clients`.
//!
//! Keys and the digits of which values consist are drawn by redis-benchmark, so that nearly every
//! request stores a new pair; once memory is full each pushes a random other one out. An
//! operation is a command that the server has processed.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use guest_programs::options::Options;

use super::{Progress, load, program};

const SOCKET: &str = "/tmp/redis.sock";

/// redis-benchmark replaces each occurrence by twelve digits.
const RANDOM: &str = "__rand_int__";

/// Bytes of keys, pointers and allocators beside a value, about.
const OVERHEAD_BYTES: u64 = 120;

/// Requests of one run of redis-benchmark under load.
const REQUESTS: u64 = 20_000;

/// Longest wait for the server to listen, and for its answer.
const TIMEOUT: Duration = Duration::from_secs(60);

/// What redis-benchmark is asked for.
struct Benchmark {
    clients: u64,
    value: String,
}

impl Benchmark {
    /// Stores random pairs; `pipeline` requests travel together.
    fn run(&self, requests: u64, pipeline: u64) -> Result<()> {
        let output = program("redis-benchmark")
            .args(["-s", SOCKET, "-q", "-r", "2147483647"])
            .args(["-c", &self.clients.to_string(), "-P", &pipeline.to_string()])
            .args(["-n", &requests.to_string()])
            .args(["SET", &format!("key:{RANDOM}"), &self.value])
            .stdin(Stdio::null())
            .output()
            .context("Cannot start redis-benchmark")?;
        // It says "Error from server" and still ends well.
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        let wrong = text.lines().find(|line| line.to_lowercase().contains("error"));
        if !output.status.success() || wrong.is_some() {
            bail!("redis-benchmark ended with {}: {}", output.status, wrong.unwrap_or("?"));
        }
        Ok(())
    }
}

/// The number of a field that INFO prints.
fn info(section: &str, field: &str) -> Result<u64> {
    let mut stream = UnixStream::connect(SOCKET).context("redis-server does not listen")?;
    stream.set_read_timeout(Some(TIMEOUT)).context("Cannot set a timeout")?;
    write!(stream, "INFO {section}\r\n").context("redis-server takes no command")?;
    for line in BufReader::new(stream).lines() {
        let line = line.context("redis-server does not answer")?;
        if let Some(value) = line.strip_prefix(field).and_then(|rest| rest.strip_prefix(':')) {
            return value.trim().parse().with_context(|| format!("{line:?} has no number"));
        }
        ensure!(!line.starts_with('-'), "redis-server refused: {line}");
    }
    bail!("redis-server names no {field}")
}

/// Starts the server, fills it and puts it under load; what brings the progress up to date.
pub(super) fn start(
    mut options: Options,
    progress: &Arc<Progress>,
) -> Result<impl Fn(&Progress) -> Result<()> + use<>> {
    let memory_mib = options.number("memory", 128)?;
    let value_bytes = options.number("value", 1020)?;
    let clients = options.number("clients", 4)?;
    options.finish()?;
    ensure!((16..=8192).contains(&memory_mib), "memory is 16 to 8192 MiB");
    ensure!((12..=12_000).contains(&value_bytes), "value is 12 to 12000 bytes");
    let mut server = program("redis-server")
        .args(["--port", "0", "--unixsocket", SOCKET, "--dir", "/tmp", "--save", ""])
        .args(["--appendonly", "no", "--maxmemory", &format!("{memory_mib}mb")])
        .args(["--maxmemory-policy", "allkeys-random"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .context("Cannot start redis-server")?;
    let end = Instant::now() + TIMEOUT;
    while let Err(error) = info("server", "process_id") {
        if let Some(status) = server.try_wait().context("Cannot wait for redis-server")? {
            bail!("redis-server ended with {status}");
        }
        ensure!(Instant::now() < end, "redis-server is not ready: {error:#}");
        std::thread::sleep(Duration::from_millis(100));
    }
    let value = RANDOM.repeat((value_bytes / RANDOM.len() as u64) as usize);
    let benchmark = Benchmark { clients, value };
    benchmark.run((memory_mib << 20) / (value_bytes + OVERHEAD_BYTES), 32)?;
    load(progress, move |_| {
        if let Some(status) = server.try_wait().context("Cannot wait for redis-server")? {
            bail!("redis-server ended with {status}");
        }
        benchmark.run(REQUESTS, 1)
    });
    Ok(|progress: &Progress| {
        let commands = info("stats", "total_commands_processed")?;
        progress.operations.store(commands, Ordering::Relaxed);
        Ok(())
    })
}
