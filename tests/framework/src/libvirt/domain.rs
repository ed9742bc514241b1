//! A domain: a test guest under one of the libvirtds.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::daemon::Libvirtd;
use super::job::Job;
use super::migration::{Migration, Way};
use super::xml;
use crate::console::Console;
use crate::env::Env;
use crate::heartbeat::Heartbeat;
use crate::ports::Ports;
use crate::spec::VmSpec;
use crate::vm::READY_TIMEOUT;

/// A domain that runs, or ran, at a host. Drop destroys it and its definition, unless it has left.
#[derive(Debug)]
pub struct Domain<'a> {
    daemon: &'a Libvirtd,
    spec: VmSpec,
    ports: Ports,
    left: bool,
}

impl<'a> Domain<'a> {
    /// Defines a domain and starts it; the guest boots from now on.
    ///
    /// # Errors
    /// The specification has what a domain cannot have, or libvirt refused.
    pub fn start(daemon: &'a Libvirtd, env: &Env, spec: VmSpec) -> Result<Self> {
        let folder = daemon.ports_folder(&spec.name)?;
        let definition = folder.join("domain.xml");
        std::fs::write(&definition, xml::definition(env, &spec)?).context("Cannot define it")?;
        daemon.virsh(&["define", &definition.to_string_lossy()])?;
        let started = daemon.virsh(&["start", &spec.name]);
        let connected = started.and_then(|_| Ports::connect(&folder));
        match connected {
            Ok(ports) => Ok(Self { daemon, spec, ports, left: false }),
            Err(error) => {
                forget(daemon, &spec.name);
                Err(error).with_context(|| daemon.log_of(&spec.name))
            }
        }
    }

    /// Starts a domain and waits until its guest is ready.
    ///
    /// # Errors
    /// As [`Domain::start`] and [`Domain::wait_ready`].
    pub fn boot(daemon: &'a Libvirtd, env: &Env, spec: VmSpec) -> Result<Self> {
        let domain = Self::start(daemon, env, spec)?;
        domain.wait_ready(READY_TIMEOUT)?;
        Ok(domain)
    }

    /// The domain that a migration has brought.
    pub(super) fn brought(daemon: &'a Libvirtd, spec: VmSpec, ports: Ports) -> Self {
        Self { daemon, spec, ports, left: false }
    }

    /// From now on it is another host's.
    pub(super) fn leave(&mut self) {
        self.left = true;
    }

    /// Waits until all of the guest's programs run and a first beat has arrived.
    ///
    /// # Errors
    /// The guest complained, QEMU ended, or `timeout` passed; its console's end is in the error.
    pub fn wait_ready(&self, timeout: Duration) -> Result<()> {
        let alive = || match self.daemon.has_qemu(&self.spec.name) {
            true => Ok(()),
            false => bail!("QEMU ended; {}", self.daemon.log_of(&self.spec.name)),
        };
        let ready = self.ports.wait_ready(timeout, alive);
        ready.with_context(|| format!("Domain {:?} is not ready", self.spec.name))
    }

    /// What it was started from.
    #[must_use]
    pub fn spec(&self) -> &VmSpec {
        &self.spec
    }

    /// The daemon that it is at.
    #[must_use]
    pub fn daemon(&self) -> &'a Libvirtd {
        self.daemon
    }

    /// Its guest's ports at this host. Their records stay when it has left.
    pub fn ports(&mut self) -> &mut Ports {
        &mut self.ports
    }

    /// The guest's heartbeat as seen at this host.
    #[must_use]
    pub fn heartbeat(&self) -> &Heartbeat {
        self.ports.heartbeat()
    }

    /// The guest's console as seen at this host.
    #[must_use]
    pub fn console(&self) -> &Console {
        self.ports.console()
    }

    /// Fails if the guest has complained at this host.
    ///
    /// # Errors
    /// As [`Ports::assert_clean`].
    pub fn assert_clean(&self) -> Result<()> {
        self.ports.assert_clean()
    }

    /// Its state as libvirt calls it: `running`, `paused`, `shut off`, ...
    ///
    /// # Errors
    /// The daemon does not know it (any more).
    pub fn state(&self) -> Result<String> {
        Ok(self.daemon.virsh(&["domstate", &self.spec.name])?.trim().to_owned())
    }

    /// Executes a command of its QEMU's own protocol, past libvirt.
    ///
    /// # Errors
    /// libvirt or QEMU refused.
    pub fn qmp(&self, command: &str) -> Result<Value> {
        let request = json!({ "execute": command }).to_string();
        let text = self.daemon.virsh(&["qemu-monitor-command", &self.spec.name, &request])?;
        let mut answer: Value =
            serde_json::from_str(&text).with_context(|| format!("No JSON: {text}"))?;
        match answer.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => bail!("QEMU refused {command}: {answer}"),
        }
    }

    /// The migration that takes it away; `None` if there is none or it has sent nothing so far.
    ///
    /// # Errors
    /// It is gone, or the figures are not understood.
    pub fn job(&self) -> Result<Option<Job>> {
        Job::parse(&self.daemon.virsh(&["domjobinfo", &self.spec.name, "--rawstats"])?)
    }

    /// Figures of the migration that brought it here or, at a host that it has left, took it away.
    /// libvirt tells them once.
    ///
    /// # Errors
    /// There was none, or the figures are not understood.
    pub fn last_job(&self) -> Result<Job> {
        let words = ["domjobinfo", &self.spec.name, "--completed", "--rawstats"];
        Job::parse(&self.daemon.virsh(&words)?)?.context("libvirt knows of no migration")
    }

    /// Calls off the migration that is under way.
    ///
    /// # Errors
    /// There is none.
    pub fn abort_job(&self) -> Result<()> {
        self.daemon.virsh(&["domjobabort", &self.spec.name]).map(drop)
    }

    /// Starts a live migration to another host, which has the domain's definition afterwards, and
    /// this one has not. `extra` are further arguments of `virsh migrate`, such as `--migrateuri`
    /// with where QEMU's stream is to go.
    ///
    /// # Errors
    /// `virsh` cannot be started. That it failed is told by what [`Migration`] is asked for.
    pub fn migrate(self, to: &'a Libvirtd, way: Way, extra: &[&str]) -> Result<Migration<'a>> {
        Migration::start(self, to, way, extra)
    }
}

impl Drop for Domain<'_> {
    fn drop(&mut self) {
        if !self.left {
            forget(self.daemon, &self.spec.name);
        }
    }
}

/// Takes a domain away from its daemon.
fn forget(daemon: &Libvirtd, name: &str) {
    // It may be gone, or its daemon: all of it ends with the host at the latest.
    for command in ["destroy", "undefine"] {
        drop(daemon.virsh(&[command, name]));
    }
}
