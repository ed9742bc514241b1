//! A memory server, `migrate memory-server`, as a child process, and what its metrics tell.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::engine::{Engine, EngineOutput};
use crate::wait;

/// Longest wait for it to listen, and for an answer with its metrics.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Longest answer with metrics that is believed.
const METRICS_BYTES_MAX: u64 = 4 << 20;

/// Pages that a server holds, one sample a VM.
const STORED_PAGES: &str = "godwit_memory_stored_pages";

/// Bytes that a server has promised to VMs.
const RESERVED_BYTES: &str = "godwit_memory_reserved_bytes";

/// How to start one.
#[derive(Debug, Clone, Copy)]
pub struct ServerOptions<'a> {
    /// The binary `migrate`.
    pub program: &'a Path,
    /// Directory of the server's identity.
    pub identity: &'a Path,
    /// Address to listen on; port 0 is any.
    pub listen: &'a str,
    /// What it offers, in MiB.
    pub capacity_mib: u64,
    /// The namespace that it runs in. Metrics are for those who are in none.
    pub netns: Option<&'a str>,
    /// Further arguments.
    pub extra: &'a [&'a str],
}

/// A running memory server, killed on drop.
#[derive(Debug)]
pub struct MemoryServer {
    engine: Engine,
    address: String,
    metrics: Option<String>,
}

impl MemoryServer {
    /// Starts one and waits until it listens.
    ///
    /// # Errors
    /// It ended instead; what it said is in the error.
    pub fn start(options: &ServerOptions<'_>) -> Result<Self> {
        let (identity, capacity) =
            (options.identity.display().to_string(), format!("{}M", options.capacity_mib));
        let metrics = options.netns.is_none().then(free_port).transpose()?;
        let mut words = vec!["memory-server", "--listen", options.listen];
        words.extend(["--identity", &identity, "--capacity", &capacity]);
        if let Some(metrics) = &metrics {
            words.extend(["--metrics", metrics]);
        }
        words.extend(options.extra);
        let mut engine = Engine::start(options.program, &words, options.netns)?;
        let address = engine.wait_line("listening on ", TIMEOUT)?;
        let address = address.split_ascii_whitespace().next().context("It listens nowhere")?;
        let address = address.to_owned();
        Ok(Self { engine, address, metrics })
    }

    /// Where it listens, as `--memory` takes it.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What it has written to stderr so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.engine.stderr()
    }

    /// The process.
    pub fn engine(&mut self) -> &mut Engine {
        &mut self.engine
    }

    /// Kills it with SIGKILL: what it held is lost.
    ///
    /// # Errors
    /// It is not gone after 20 s.
    pub fn kill(self) -> Result<EngineOutput> {
        self.engine.kill()
    }

    /// Pages that it holds, of all VMs.
    ///
    /// # Errors
    /// It has no metrics, or does not answer.
    pub fn stored_pages(&self) -> Result<u64> {
        Ok(sum(&self.metrics()?, STORED_PAGES)?.unwrap_or(0))
    }

    /// Waits until it holds `least` pages or more.
    ///
    /// # Errors
    /// It does not within `timeout`.
    pub fn wait_stored(&self, least: u64, timeout: Duration) -> Result<()> {
        let what = format!("{least} pages at {}", self.address);
        wait::until(&what, timeout, || Ok((self.stored_pages()? >= least).then_some(())))
    }

    /// Waits until it holds nothing and has promised nothing.
    ///
    /// # Errors
    /// Something is left after `timeout`.
    pub fn wait_empty(&self, timeout: Duration) -> Result<()> {
        wait::until(&format!("{} to be empty", self.address), timeout, || {
            let metrics = self.metrics()?;
            let reserved = sum(&metrics, RESERVED_BYTES)?;
            let reserved = reserved.with_context(|| format!("No {RESERVED_BYTES}:\n{metrics}"))?;
            let stored = sum(&metrics, STORED_PAGES)?.unwrap_or(0);
            Ok((stored == 0 && reserved == 0).then_some(()))
        })
        .with_context(|| self.metrics().unwrap_or_default())
    }

    /// All of its metrics, in Prometheus' text format.
    ///
    /// # Errors
    /// As [`Self::stored_pages`].
    pub fn metrics(&self) -> Result<String> {
        let address = self.metrics.as_deref().context("It runs in a namespace: no metrics")?;
        let what = || format!("No metrics from {address}");
        let mut socket = TcpStream::connect(address).with_context(what)?;
        socket.set_read_timeout(Some(TIMEOUT)).with_context(what)?;
        let request =
            format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).with_context(what)?;
        let mut answer = String::new();
        socket.take(METRICS_BYTES_MAX).read_to_string(&mut answer).with_context(what)?;
        let (head, body) = answer.split_once("\r\n\r\n").with_context(what)?;
        let status = head.lines().next().unwrap_or_default();
        ensure!(status.contains(" 200 "), "{}: {status}", what());
        Ok(body.to_owned())
    }
}

/// An address on loopback whose TCP port is free at the moment.
fn free_port() -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").context("No free port on loopback")?;
    Ok(listener.local_addr().context("No address")?.to_string())
}

/// Sum over all samples of a metric; nothing if there is none.
fn sum(metrics: &str, name: &str) -> Result<Option<u64>> {
    let mut sum = None;
    for line in metrics.lines() {
        let Some(rest) = line.strip_prefix(name).filter(|rest| rest.starts_with(['{', ' '])) else {
            continue;
        };
        let value = rest.rsplit(' ').next().and_then(|text| text.parse::<f64>().ok());
        match value {
            Some(value) if value >= 0.0 => sum = Some(sum.unwrap_or(0) + value as u64),
            _ => bail!("No number in {line:?}"),
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_one_metric_are_added() {
        let text = "# HELP a_pages x\n# TYPE a_pages gauge\na_pages{vm=\"x y\"} 3\n\
                    a_pages{vm=\"z\"} 4\na_pages_max 9\nb 1.5e3\n";
        assert_eq!(sum(text, "a_pages").unwrap(), Some(7));
        assert_eq!(sum(text, "b").unwrap(), Some(1500));
        assert_eq!(sum(text, "a").unwrap(), None);
        assert!(sum("a nonsense\n", "a").is_err());
    }
}
