//! Hosts with agents and guests that the agents move.
//!
//! An agent's program for starting QEMUs asks this process by a file, which starts the QEMU as the framework does: so the
//! guest's heartbeat and program are in hand wherever it runs.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use framework::cluster::guest;
use framework::{Cluster, Engine, Env, HostPlan, Pki, QemuKind, Vm, VmSpec, machine, wait};
use scheduler_api::control::MoveRequest;
use scheduler_api::{ApiError, Client, View};
use transport::Identity;

use crate::stage::runs;

/// How often agents look. Three of five figures make a hotspot.
pub const INTERVAL_S: f64 = 2.0;

/// The name in the operator's certificate.
const OPERATOR: &str = "ops";

/// The port of every agent.
const PORT: u16 = 7790;

const BOOT_WITHIN: Duration = Duration::from_secs(240);

/// An answer that does not come within this time was lost on the guest's way.
const ANSWERS_WITHIN: Duration = Duration::from_secs(15);

/// Something has been done with a guest within this time, wherever it went.
const DONE_WITHIN: Duration = Duration::from_secs(120);

/// Longest wait for processors that others use.
const PROCESSORS_WITHIN: Duration = Duration::from_secs(180);

const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A guest: its QEMUs, the last one where it runs or goes to.
#[derive(Debug)]
pub struct Guest {
    /// The number of its host, of each of its QEMUs.
    pub qemus: Vec<(usize, Vm)>,
}

type Guests = Arc<Mutex<BTreeMap<String, Guest>>>;

/// Hosts, agents, guests.
#[derive(Debug)]
pub struct Fleet {
    agents: Vec<Option<Engine>>,
    guests: Guests,
    starter: Option<JoinHandle<Result<()>>>,
    end: Arc<AtomicBool>,
    identities: Pki,
    store: String,
    extra: String,
    /// Of each host, MiB.
    memory_mib: Vec<u64>,
    cluster: Arc<Cluster>,
    env: Env,
}

fn lock(guests: &Guests) -> std::sync::MutexGuard<'_, BTreeMap<String, Guest>> {
    guests.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fleet {
    /// Hosts without agents and guests yet.
    ///
    /// # Errors
    /// What went wrong.
    pub fn create(plans: &[HostPlan]) -> Result<Self> {
        let env = Env::load()?;
        let cluster = Arc::new(Cluster::create(plans)?);
        let identities = Pki::init(&env.migrate()?)?;
        for name in plans.iter().map(|plan| plan.name.as_str()).chain([OPERATOR]) {
            identities.issue(name)?;
        }
        let guests = Guests::default();
        let end = Arc::new(AtomicBool::new(false));
        let starter = {
            let (env, cluster) = (env.clone(), Arc::clone(&cluster));
            let (guests, end) = (Arc::clone(&guests), Arc::clone(&end));
            std::thread::spawn(move || start_what_is_asked_for(&env, &cluster, &guests, &end))
        };
        let agents = plans.iter().map(|_| None).collect();
        let (store, extra) = (String::new(), String::new());
        let starter = Some(starter);
        let memory_mib = plans.iter().map(|plan| plan.memory_mib).collect();
        Ok(Self {
            agents,
            guests,
            starter,
            end,
            identities,
            store,
            extra,
            memory_mib,
            cluster,
            env,
        })
    }

    /// What the tests have to hand.
    #[must_use]
    pub fn env(&self) -> &Env {
        &self.env
    }

    /// The hosts.
    #[must_use]
    pub fn cluster(&self) -> Arc<Cluster> {
        Arc::clone(&self.cluster)
    }

    /// Where a host's agent is asked.
    #[must_use]
    pub fn address(&self, host: usize) -> String {
        format!("{}:{PORT}", self.cluster.host(host).address())
    }

    /// The identity of an operator.
    #[must_use]
    pub fn operator(&self) -> PathBuf {
        self.identities.folder().join(OPERATOR)
    }

    /// The table `store` of agents' configurations; further tables behind it.
    pub fn configure(&mut self, store: &str, extra: &str) {
        (self.store, self.extra) = (store.to_owned(), extra.to_owned());
    }

    /// The table `store` of agents that share a file.
    #[must_use]
    pub fn embedded_store(&self) -> String {
        format!("kind = \"embedded\"\npath = {:?}", self.shared("store.sqlite"))
    }

    /// A file in a folder that all hosts see.
    pub fn shared(&self, name: &str) -> PathBuf {
        self.identities.folder().join(name)
    }

    /// Boots guests, each by its number on its host, and gives hosts their limits; then waits until this machine has the
    /// processors that hosts are to have.
    ///
    /// # Errors
    /// What went wrong.
    pub fn boot(
        &mut self,
        on: &[(u8, usize)],
        change: impl Fn(u8, VmSpec) -> Result<VmSpec>,
    ) -> Result<()> {
        for (number, host) in on {
            let name = format!("vm{number}");
            let spec = change(*number, guest(&name, *number, QemuKind::V10_0))?;
            let vm = self.cluster.host(*host).start(&self.env, spec)?;
            lock(&self.guests).insert(name, Guest { qemus: vec![(*host, vm)] });
        }
        for guest in lock(&self.guests).values_mut() {
            for (_, vm) in &mut guest.qemus {
                vm.wait_ready(BOOT_WITHIN)?;
            }
        }
        self.cluster.hosts().iter().try_for_each(framework::ClusterHost::limit)?;
        machine::wait_for_processors(PROCESSORS_WITHIN)
    }

    /// Starts a host's agent, or starts it again.
    ///
    /// # Errors
    /// What went wrong.
    pub fn start_agent(&mut self, host: usize) -> Result<()> {
        let config = self.write_config(host)?;
        let program = self.env.scheduler()?;
        let config = config.display().to_string();
        let mut agent = self.cluster.host(host).run(&program, &["agent", "--config", &config])?;
        agent.wait_stderr("listening on", Duration::from_secs(30))?;
        self.agents[host] = Some(agent);
        Ok(())
    }

    /// Starts all agents and waits until each knows all hosts.
    ///
    /// # Errors
    /// What went wrong.
    pub fn start_agents(&mut self) -> Result<()> {
        let count = self.cluster.hosts().len();
        (0..count).try_for_each(|host| self.start_agent(host))?;
        for host in 0..count {
            self.wait(host, "all hosts are known", Duration::from_secs(60), |view| {
                view.hosts.len() == count && view.hosts.iter().all(|host| !host.is_stale)
            })?;
        }
        Ok(())
    }

    fn write_config(&self, number: usize) -> Result<PathBuf> {
        let host = self.cluster.host(number);
        let folder = host.folder();
        let requests = folder.join("requests");
        fs::create_dir_all(&requests)?;
        let start = folder.join("start-guest");
        let script = format!(
            "#!/bin/sh\necho \"$2\" > {0}/.new && mv {0}/.new {0}/\"$1\"\n\
             while [ ! -e \"$2\" ]; do sleep 0.1; done\n",
            requests.display()
        );
        fs::write(&start, script)?;
        fs::set_permissions(&start, fs::Permissions::from_mode(0o755))?;
        let identity = self.identities.folder().join(&host.plan().name);
        let text = format!(
            "identity = {identity:?}\nlisten = \"{}:{PORT}\"\nstate = {:?}\nlease-s = {:?}\n\n\
             [store]\n{}\n{}\n[migrate]\nprogram = {:?}\nstart = [{start:?}, \"{{guest}}\", \"{{qmp}}\"]\n\n{}",
            host.address(),
            folder.join("state"),
            3.0 * INTERVAL_S,
            self.store,
            host.profile_toml(INTERVAL_S, self.memory_mib[number]),
            self.env.migrate()?,
            self.extra,
        );
        let path = folder.join("agent.toml");
        fs::write(&path, text)?;
        Ok(path)
    }

    /// A host has so much memory from now on, as far as its agent knows, which reads its configuration again.
    ///
    /// # Errors
    /// What went wrong.
    pub fn set_memory(&mut self, host: usize, mib: u64) -> Result<()> {
        self.memory_mib[host] = mib;
        self.write_config(host)?;
        let agent = self.agents[host].as_mut().context("It has no agent")?;
        agent.signal(nix::sys::signal::Signal::SIGHUP)
    }

    /// Ends an agent in an instant, as a crash does; engines that it started go on.
    ///
    /// # Errors
    /// What went wrong.
    pub fn kill_agent(&mut self, host: usize) -> Result<()> {
        let agent = self.agents[host].take().context("It has no agent")?;
        drop(agent);
        Ok(())
    }

    /// A host vanishes, with all that runs on it ([`framework::ClusterHost::vanish`]).
    ///
    /// # Errors
    /// What went wrong.
    pub fn vanish(&mut self, host: usize) -> Result<()> {
        self.cluster.host(host).vanish()?;
        self.agents[host] = None;
        Ok(())
    }

    /// What an agent says.
    pub fn agent_log(&self, host: usize) -> String {
        self.agents[host].as_ref().map(Engine::stderr).unwrap_or_default()
    }

    /// Asks a host's agent, as an operator.
    ///
    /// # Errors
    /// What went wrong.
    pub fn ask<T, F>(
        &self,
        host: usize,
        ask: impl FnOnce(Client, String) -> F + Send + 'static,
    ) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, ApiError>>,
    {
        let (identity, addr) = (Identity::load(&self.operator())?, self.address(host));
        let asking = self.cluster.host(host).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            Ok(runtime.block_on(ask(Client::new(Arc::new(identity)), addr))?)
        })?;
        asking.join().map_err(|_| anyhow::anyhow!("A question panicked"))?
    }

    /// Runs `godwit-scheduler explain` against a host's agent.
    ///
    /// # Errors
    /// It failed.
    pub fn explain(&self, host: usize) -> Result<String> {
        let identity = self.operator().display().to_string();
        let address = self.address(host);
        let words = ["explain", "--agent", &address, "--identity", &identity];
        let explain = self.cluster.host(host).run(&self.env.scheduler()?, &words)?;
        Ok(explain.wait(Duration::from_secs(30))?.success()?.stdout)
    }

    /// Asks a host's agent to move a guest to another host, again for so long as that has to wait for other migrations.
    ///
    /// # Errors
    /// What went wrong, or why it may not begin.
    pub fn begin_move(&self, guest: &str, from: usize, to: usize, within: Duration) -> Result<()> {
        let to = self.cluster.host(to).plan().name.clone();
        let request = MoveRequest { guest: guest.into(), to: Some(to), reason: String::new() };
        let mut refusal = String::new();
        let begun = wait::until("the move may begin", within, || {
            let request = request.clone();
            let refused = self.ask(from, |client, addr| async move {
                match client.begin_move(&addr, None, &request).await {
                    Err(ApiError::Conflict { what }) => Ok(Some(what)),
                    begun => begun.map(|_| None),
                }
            })?;
            let begun = refused.is_none().then_some(());
            refusal = refused.unwrap_or_default();
            Ok(begun)
        });
        begun.context(refusal)
    }

    /// What an agent sees.
    ///
    /// # Errors
    /// What went wrong.
    pub fn view(&self, host: usize) -> Result<View> {
        self.ask(host, |client, addr| async move { client.state(&addr, None).await })
    }

    /// Waits until an agent sees something, and returns how long that took.
    ///
    /// # Errors
    /// What went wrong.
    pub fn wait(
        &self,
        host: usize,
        what: &str,
        within: Duration,
        is_so: impl Fn(&View) -> bool,
    ) -> Result<(Duration, View)> {
        let began = Instant::now();
        let mut last = None;
        while began.elapsed() < within {
            if let Ok(view) = self.view(host) {
                if is_so(&view) {
                    return Ok((began.elapsed(), view));
                }
                last = Some(view);
            }
            std::thread::sleep(LOOK_EVERY * 3);
        }
        let logs: Vec<String> = (0..self.agents.len())
            .map(|host| format!("agent {host}:\n{}", self.agent_log(host)))
            .collect();
        bail!("After {within:?}, not so: {what}. Last seen: {last:?}\n{}", logs.join("\n"))
    }

    /// Does something with a guest where it runs; again if it moved away meanwhile, with what was said to it.
    ///
    /// # Errors
    /// What went wrong at last.
    pub fn with<T>(&self, name: &str, work: impl Fn(&mut Vm) -> Result<T>) -> Result<T> {
        let began = Instant::now();
        loop {
            match self.try_with(name, &work) {
                Err(error) if began.elapsed() >= DONE_WITHIN => return Err(error),
                Err(_) => std::thread::sleep(LOOK_EVERY),
                done => return done,
            }
        }
    }

    fn try_with<T>(&self, name: &str, work: impl Fn(&mut Vm) -> Result<T>) -> Result<T> {
        let mut guests = lock(&self.guests);
        let guest = guests.get_mut(name).with_context(|| format!("No guest {name}"))?;
        for (_, vm) in &mut guest.qemus {
            if vm.exited()?.is_none() && runs(vm)? {
                vm.ports().set_answers_within(ANSWERS_WITHIN);
                return work(vm);
            }
        }
        bail!("{name} runs nowhere")
    }

    /// Where all guests run, by asking their QEMUs. Fails if one runs twice or not at all.
    ///
    /// # Errors
    /// What went wrong.
    pub fn places(&self) -> Result<BTreeMap<String, usize>> {
        let mut places = BTreeMap::new();
        for (name, guest) in lock(&self.guests).iter_mut() {
            let mut running = vec![];
            for (host, vm) in &mut guest.qemus {
                if vm.exited()?.is_none() && runs(vm)? {
                    running.push(*host);
                }
            }
            ensure!(running.len() == 1, "{name} runs on {running:?}");
            places.insert(name.clone(), running[0]);
        }
        Ok(places)
    }

    /// Every guest answers, and found nothing wrong in its memory.
    ///
    /// # Errors
    /// What went wrong.
    pub fn assert_guests_are_well(&self) -> Result<()> {
        for guest in lock(&self.guests).values_mut() {
            for (_, vm) in &mut guest.qemus {
                if vm.exited()?.is_none() && runs(vm)? {
                    framework::load::report(vm)?;
                    vm.assert_clean()?;
                }
            }
        }
        Ok(())
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.agents.clear();
        self.end.store(true, Ordering::Relaxed);
        if let Some(Ok(Err(error))) = self.starter.take().map(JoinHandle::join) {
            eprintln!("QEMUs were not started as asked: {error:#}");
        }
    }
}

/// Starts the QEMUs that agents ask for.
fn start_what_is_asked_for(
    env: &Env,
    cluster: &Cluster,
    guests: &Guests,
    end: &AtomicBool,
) -> Result<()> {
    while !end.load(Ordering::Relaxed) {
        for (number, host) in cluster.hosts().iter().enumerate() {
            let Ok(requests) = fs::read_dir(host.folder().join("requests")) else { continue };
            for request in requests.flatten() {
                let name = request.file_name().to_string_lossy().into_owned();
                if name.starts_with('.') {
                    continue;
                }
                let socket = fs::read_to_string(request.path())?;
                fs::remove_file(request.path())?;
                start(env, cluster, guests, number, &name, Path::new(socket.trim()))
                    .with_context(|| format!("{name} on host {number}"))?;
            }
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

fn start(
    env: &Env,
    cluster: &Cluster,
    guests: &Guests,
    number: usize,
    name: &str,
    socket: &Path,
) -> Result<()> {
    let host = cluster.host(number);
    let mut guests = lock(guests);
    let guest = guests.get_mut(name).context("Nobody knows it")?;
    // QEMUs that have ended are of no more use.
    let mut qemus = std::mem::take(&mut guest.qemus);
    let mut living = vec![];
    for (host, mut vm) in qemus.drain(..) {
        if vm.exited()?.is_none() {
            living.push((host, vm));
        }
    }
    let spec = living.last().context("It runs nowhere")?.1.spec().successor(name, QemuKind::V10_0);
    let vm = host.start(env, spec)?;
    fs::rename(host.monitors().join(format!("{name}.sock")), socket)?;
    living.push((number, vm));
    guest.qemus = living;
    Ok(())
}
