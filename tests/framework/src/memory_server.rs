//! A memory server, `migrate memory-server`, as a child process, and what its metrics tell.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::engine::{Engine, EngineOutput};
use crate::{metrics, wait};

/// Longest wait for it to listen.
const TIMEOUT: Duration = Duration::from_secs(60);

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
        let metrics = options.netns.is_none().then(metrics::free_port).transpose()?;
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
        Ok(metrics::sum(&self.metrics()?, STORED_PAGES)?.unwrap_or(0))
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
            let reserved = metrics::sum(&metrics, RESERVED_BYTES)?;
            let reserved = reserved.with_context(|| format!("No {RESERVED_BYTES}:\n{metrics}"))?;
            let stored = metrics::sum(&metrics, STORED_PAGES)?.unwrap_or(0);
            Ok((stored == 0 && reserved == 0).then_some(()))
        })
        .with_context(|| self.metrics().unwrap_or_default())
    }

    /// All of its metrics, in Prometheus' text format.
    ///
    /// # Errors
    /// As [`Self::stored_pages`].
    pub fn metrics(&self) -> Result<String> {
        metrics::get(self.metrics.as_deref().context("It runs in a namespace: no metrics")?)
    }
}
