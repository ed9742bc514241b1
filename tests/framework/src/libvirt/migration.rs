//! `virsh migrate` in the background.
//!
//! ```text
//! Domain::migrate ─► Migration ─┬─ job, abort          while it is under way
//!                               ├─ arrived ─► Moved    it completed
//!                               └─ failed  ─► Domain   it did not; the guest is where it was
//! ```

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::daemon::Libvirtd;
use super::domain::Domain;
use super::job::Job;
use crate::engine::Engine;
use crate::ports::{COMMAND, HEARTBEAT, Ports};
use crate::wait;

/// Longest time until the destination has a QEMU.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(60);

/// Who speaks to the destination's libvirtd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The source's libvirtd (`--p2p`).
    PeerToPeer,
    /// `virsh`, which speaks to both.
    Managed,
}

/// A migration under way. Drop ends `virsh` and destroys the domain at the source.
#[derive(Debug)]
pub struct Migration<'a> {
    // Dropped in this order: nobody may go on with what is destroyed.
    virsh: Engine,
    source: Domain<'a>,
    to: &'a Libvirtd,
    ports: Option<Ports>,
    words: Vec<String>,
}

/// A migration that completed.
#[derive(Debug)]
pub struct Moved<'a> {
    /// The domain where it is now.
    pub domain: Domain<'a>,
    /// What is left of it at the source: records.
    pub left: Domain<'a>,
}

impl<'a> Migration<'a> {
    pub(super) fn start(
        source: Domain<'a>,
        to: &'a Libvirtd,
        way: Way,
        extra: &[&str],
    ) -> Result<Self> {
        let (name, uri) = (source.spec().name.clone(), to.uri());
        let folder = to.ports_folder(&name)?;
        let mut words = vec!["migrate", "--live", "--persistent", "--undefinesource"];
        if way == Way::PeerToPeer {
            words.push("--p2p");
        }
        words.extend(extra);
        words.extend(["--domain", &name, "--desturi", &uri]);
        let virsh = source.daemon().start_virsh(&words)?;
        let words = words.into_iter().map(str::to_owned).collect();
        let mut migration = Self { virsh, source, to, ports: None, words };
        // Connected before the guest runs there, so that no beat is missed.
        if migration.wait_prepared(&folder)? {
            migration.ports = Some(Ports::connect(&folder)?);
        }
        Ok(migration)
    }

    /// Waits until the destination's QEMU has the guest's ports; false if `virsh` ended before.
    fn wait_prepared(&mut self, folder: &Path) -> Result<bool> {
        wait::until("a QEMU at the destination", PREPARE_TIMEOUT, || {
            let running = self.virsh.running()?;
            let ready = [HEARTBEAT, COMMAND].iter().all(|port| folder.join(port).exists());
            Ok((ready || !running).then_some(ready))
        })
    }

    /// The domain at the source.
    #[must_use]
    pub fn source(&self) -> &Domain<'a> {
        &self.source
    }

    /// How far it is; `None` as long as nothing was sent.
    ///
    /// # Errors
    /// As [`Domain::job`]; it may just have completed.
    pub fn job(&self) -> Result<Option<Job>> {
        self.source.job()
    }

    /// Waits until the migration has sent some of the guest's memory.
    ///
    /// # Errors
    /// It ended before, or `timeout` passed.
    pub fn wait_sending(&mut self, timeout: Duration) -> Result<Job> {
        let sending = wait::until("a migration that sends", timeout, || {
            ensure!(self.virsh.running()?, "`virsh {}` has ended", self.words.join(" "));
            Ok(self.source.job()?.filter(|job| job.processed_bytes > 0))
        });
        sending.with_context(|| self.virsh.stderr())
    }

    /// Calls it off.
    ///
    /// # Errors
    /// It was over.
    pub fn abort(&self) -> Result<()> {
        self.source.abort_job()
    }

    /// Waits until it has completed.
    ///
    /// # Errors
    /// It failed, or still runs after `timeout`; logs of both ends are in the text.
    pub fn arrived(self, timeout: Duration) -> Result<Moved<'a>> {
        let Self { virsh, mut source, to, ports, words } = self;
        let name = source.spec().name.clone();
        let logs = || format!("{}{}", source.daemon().log_of(&name), to.log_of(&name));
        let output = virsh.wait(timeout).with_context(logs)?;
        if output.code != Some(0) {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            bail!("{}\n{}", source.daemon().complaint(&words, &output), logs());
        }
        let ports = ports.context("`virsh` is done, but the destination never had a QEMU")?;
        source.leave();
        let domain = Domain::brought(to, source.spec().clone(), ports);
        Ok(Moved { domain, left: source })
    }

    /// Waits until it has failed and returns the domain at the source, and what `virsh` said.
    ///
    /// # Errors
    /// It completed, or still runs after `timeout`.
    pub fn failed(self, timeout: Duration) -> Result<(Domain<'a>, String)> {
        let output = self.virsh.wait(timeout)?;
        ensure!(output.code != Some(0), "The migration completed");
        Ok((self.source, output.stderr))
    }
}
