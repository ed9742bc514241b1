//! What a profiler says of guests is what they say themselves; and what it says when there is nobody to ask.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::{PATIENCE, turn};
use framework::cluster::{guest, swap_disk};
use framework::process::Process;
use framework::{Cgroup, Cluster, Env, HostPlan, QemuKind, Qmp, Vm, cpu, load, memory, wait};
use scheduler::profile::report::{GuestState, MemorySource};
use scheduler::profile::{GuestReport, HostReport, Profiler, Settings};
use tempfile::TempDir;
use tokio::runtime::Runtime;

const KIND: QemuKind = QemuKind::V10_0;
const GUEST_MIB: f64 = 128.0;

/// A profiler, and what makes it go on.
struct Probe {
    profiler: Profiler,
    runtime: Runtime,
}

impl Probe {
    fn new(settings: Settings) -> Result<Self> {
        settings.check()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { profiler: Profiler::new("here".into(), settings), runtime })
    }

    fn of(sockets: Vec<PathBuf>) -> Result<Self> {
        Self::new(Settings { sockets, traffic: false, ..Settings::default() })
    }

    fn report(&mut self) -> Result<HostReport> {
        let report = self.runtime.block_on(self.profiler.report());
        report.check()?;
        Ok(report)
    }

    /// Two readings: the second one looks into guests' memory.
    fn warm(&mut self) -> Result<()> {
        for _ in 0..2 {
            self.report()?;
        }
        Ok(())
    }
}

fn only(report: &HostReport) -> Result<&GuestReport> {
    ensure!(report.guests.len() == 1, "{report:?}");
    report.guests.first().context("No guest")
}

/// Figures of a file of the guest's kernel, by name.
fn figures(vm: &mut Vm, file: &str) -> Result<BTreeMap<String, f64>> {
    let text = vm.ask(&format!("sh cat {file}"))?;
    let figure = |line: &str| {
        let (name, rest) = line.split_once(|c: char| c == ':' || c.is_whitespace())?;
        Some((name.to_owned(), rest.split_whitespace().next()?.parse().ok()?))
    };
    Ok(text.lines().filter_map(figure).collect())
}

fn near(what: &str, seen: f64, said: f64, within: f64) -> Result<()> {
    println!("{what}: {seen:.3} was seen, {said:.3} is so");
    ensure!((seen - said).abs() <= within, "{what}: {seen} was seen, {said} is so");
    Ok(())
}

/// A guest on a host that has no limits.
fn boot(cluster: &Cluster, env: &Env, spec: framework::VmSpec) -> Result<Vm> {
    let mut vm = cluster.host(0).start(env, spec)?;
    vm.wait_ready(PATIENCE)?;
    Ok(vm)
}

fn one_host() -> Result<Cluster> {
    Cluster::create(&[HostPlan::new("a", 1.0, 1000)])
}

/// The guest's memory by its own words: used, and needed.
fn said_memory(vm: &mut Vm) -> Result<(f64, f64)> {
    let meminfo = figures(vm, "/proc/meminfo")?;
    let mib = |name: &str| meminfo.get(name).map(|kib| kib / 1024.0).context(name.to_owned());
    Ok((GUEST_MIB - mib("MemFree")?, GUEST_MIB - mib("MemAvailable")?))
}

#[test]
fn a_guest_is_seen_as_it_sees_itself() -> Result<()> {
    let _turn = turn();
    let (env, cluster, folder) = (Env::load()?, one_host()?, TempDir::new()?);
    let mut spec = guest("busy", 1, KIND).balloon();
    spec.disk = Some(swap_disk(folder.path(), "busy", 256)?);
    let mut vm = boot(&cluster, &env, spec)?;
    let mut probe = Probe::of(vec![vm.qmp_engine()])?;
    probe.warm()?;

    // At rest, and at work: what the kernel says of the process over the same time.
    for percent in [0, 50] {
        load::cpu(&mut vm, percent)?;
        probe.report()?;
        let (before, began) = (vm.cpu_seconds()?, Instant::now());
        std::thread::sleep(Duration::from_secs(3));
        let (report, after) = (probe.report()?, vm.cpu_seconds()?);
        let cores = (after - before) / began.elapsed().as_secs_f64();
        let seen = only(&report)?.clone();
        near("cores", seen.cpu_cores, cores, 0.03)?;
        // Others compile beside.
        ensure!(percent == 0 || seen.cpu_cores > 0.15, "{seen:?}");
        ensure!(percent == 50 || seen.cpu_cores < 0.15, "{seen:?}");
        ensure!((seen.vcpus, seen.state) == (1, GuestState::Running), "{seen:?}");
    }
    load::cpu(&mut vm, 0)?;

    for mib in [0, 30] {
        load::memory(&mut vm, mib)?;
        wait::until("the guest to hold it", PATIENCE, || {
            Ok((load::report(&mut vm)?.mib == mib).then_some(()))
        })?;
        std::thread::sleep(Duration::from_secs(2));
        let (used, needed) = said_memory(&mut vm)?;
        let memory = only(&probe.report()?)?.memory;
        ensure!(memory.source == MemorySource::Introspection, "{memory:?}");
        near("used MiB", memory.used_mib, used, 3.0)?;
        near("needed MiB", memory.needed_mib, needed, 3.0)?;
        ensure!((memory.allocated_mib, memory.max_mib) == (GUEST_MIB, GUEST_MIB), "{memory:?}");
    }

    // Twenty MiB from the disk.
    let began = Instant::now();
    vm.ask("sh dd if=/dev/vda of=/dev/null bs=1M count=20 2>/dev/null")?;
    let seen = only(&probe.report()?)?.disk_mib;
    near("MiB of disk", seen * began.elapsed().as_secs_f64(), 20.0, 3.0)?;

    // More memory than it has.
    load::swap_on(&mut vm)?;
    load::memory(&mut vm, 90)?;
    wait::until("the guest to swap", PATIENCE, || Ok((swapped(&mut vm)? > 500.0).then_some(())))?;
    probe.report()?;
    let (before, began) = (swapped(&mut vm)?, Instant::now());
    std::thread::sleep(Duration::from_secs(4));
    let (seen, after) = (only(&probe.report()?)?.memory, swapped(&mut vm)?);
    let writes = (after - before) / began.elapsed().as_secs_f64();
    near("pages to swap a second", seen.swap_writes_per_s, writes, 30.0 + writes / 3.0)?;
    ensure!(seen.swap_writes_per_s > 10.0 && seen.needed_mib > 60.0, "{seen:?}");
    load::memory(&mut vm, 0)?;

    // What its balloon driver says instead.
    let settings = Settings { introspection: false, traffic: false, ..Settings::default() };
    let mut probe = Probe::new(Settings { sockets: vec![vm.qmp_engine()], ..settings })?;
    // It asks every ten seconds.
    wait::until("the balloon's figures", PATIENCE, || {
        std::thread::sleep(Duration::from_millis(500));
        let (used, needed) = said_memory(&mut vm)?;
        let memory = only(&probe.report()?)?.memory;
        let off_mib = (memory.used_mib - used).abs().max((memory.needed_mib - needed).abs());
        Ok((memory.source == MemorySource::Balloon && off_mib < 6.0).then_some(()))
    })?;
    vm.qmp().execute("balloon", serde_json::json!({ "value": 110 << 20 }))?;
    let left = wait::until("the balloon to grow", PATIENCE, || {
        std::thread::sleep(Duration::from_millis(200));
        let memory = only(&probe.report()?)?.memory;
        Ok((memory.allocated_mib < GUEST_MIB).then_some(memory.allocated_mib))
    })?;
    ensure!((109.0..GUEST_MIB).contains(&left), "{left}");
    vm.assert_clean()
}

/// Pages that the guest has written to its swap.
fn swapped(vm: &mut Vm) -> Result<f64> {
    figures(vm, "/proc/vmstat")?.remove("pswpout").context("pswpout")
}

/// A guest that its own limit holds back is not stolen from; one that its host's limit holds back is.
#[test]
fn only_the_hosts_limit_is_steal() -> Result<()> {
    let _turn = turn();
    let (env, cluster) = (Env::load()?, one_host()?);
    // Before the guest, so that it outlives it.
    let own = Cgroup::create("own")?;
    own.limit(Some(0.1))?;
    let mut vm = boot(&cluster, &env, guest("limited", 1, KIND))?;
    own.add(vm.pid())?;
    load::cpu(&mut vm, 90)?;
    let sockets = vec![vm.qmp_engine()];
    for (cgroup, is_own) in [(None, true), (Some(own.folder().to_owned()), false)] {
        let mut settings =
            Settings { sockets: sockets.clone(), traffic: false, ..Settings::default() };
        settings.host.cgroup = cgroup;
        let mut probe = Probe::new(settings)?;
        probe.warm()?;
        std::thread::sleep(Duration::from_secs(4));
        let report = probe.report()?;
        let seen = only(&report)?;
        println!(
            "own {is_own}: {:.3} cores, steal {:.3}, host {:?}",
            seen.cpu_cores, seen.steal, report.used
        );
        ensure!((0.08..0.12).contains(&seen.cpu_cores), "{seen:?}");
        ensure!(if is_own { seen.steal == 0.0 } else { seen.steal > 0.5 }, "{seen:?}");
        if !is_own {
            ensure!(report.capacity.cpu_cores == 0.1, "{:?}", report.capacity);
            near("the host's cores", report.used.cpu_cores, seen.cpu_cores, 0.02)?;
        }
    }
    vm.kill()
}

#[test]
fn nobody_waits_for_a_qemu_that_says_nothing() -> Result<()> {
    let _turn = turn();
    let (env, cluster) = (Env::load()?, one_host()?);
    let mut vm = boot(&cluster, &env, guest("silent", 1, KIND))?;
    load::cpu(&mut vm, 50)?;
    let socket = vm.qmp_engine();
    // Two monitors of one QEMU are one guest.
    let mut probe = Probe::of(vec![socket.clone(), vm.folder().join("qmp-test.sock")])?;
    probe.warm()?;
    let report = probe.report()?;
    ensure!(!only(&report)?.is_held, "{report:?}");
    ensure!(report.troubles.iter().any(|why| why.contains("qmp-test.sock")), "{report:?}");
    let mut probe = Probe::of(vec![socket.clone()])?;
    probe.warm()?;

    let holder = Qmp::connect(&socket, PATIENCE)?;
    std::thread::sleep(Duration::from_secs(2));
    let began = Instant::now();
    let report = probe.report()?;
    let seen = only(&report)?;
    println!("held: {:?}, {seen:?}", began.elapsed());
    ensure!(began.elapsed() < Duration::from_secs(3), "It took {:?}", began.elapsed());
    ensure!(seen.is_held && seen.cpu_cores > 0.1 && seen.memory.used_mib > 10.0, "{seen:?}");
    ensure!(seen.memory.source == MemorySource::Introspection && report.troubles.len() == 1);
    drop(holder);
    std::thread::sleep(Duration::from_secs(1));
    ensure!(!only(&probe.report()?)?.is_held, "It is free again");

    vm.freeze()?;
    std::thread::sleep(Duration::from_secs(1));
    probe.report()?;
    std::thread::sleep(Duration::from_secs(1));
    let began = Instant::now();
    let report = probe.report()?;
    println!("frozen: {:?}, {:?}", began.elapsed(), report.troubles);
    ensure!(began.elapsed() < Duration::from_secs(3), "It took {:?}", began.elapsed());
    let seen = only(&report)?;
    ensure!(seen.is_held && seen.cpu_cores == 0.0, "{seen:?}");
    vm.thaw()?;
    wait::until("an answer again", PATIENCE, || {
        Ok((!only(&probe.report()?)?.is_held).then_some(()))
    })?;

    vm.kill()?;
    let report = probe.report()?;
    ensure!(report.guests.is_empty() && report.troubles.len() == 1, "{report:?}");
    println!("ended: {:?}", report.troubles);
    Ok(())
}

/// Processor seconds of a reading: of this program with nft, and of all QEMUs together.
fn cost(settings: Settings, qemus: &[u32]) -> Result<(HostReport, f64, f64)> {
    const READINGS: u32 = 10;
    let mut probe = Probe::new(settings)?;
    probe.warm()?;
    let of_qemus = || qemus.iter().map(|pid| cpu::seconds(*pid)).sum::<Result<f64>>();
    let own = || cpu::seconds(std::process::id());
    let (before, before_qemus) = (own()?, of_qemus()?);
    let mut last = HostReport::default();
    for _ in 0..READINGS {
        last = probe.report()?;
    }
    let each = |seconds: f64| seconds / f64::from(READINGS);
    let costs = (each(own()? - before), each(of_qemus()? - before_qemus));
    probe.runtime.block_on(probe.profiler.end()).map_err(anyhow::Error::msg)?;
    Ok((last, costs.0, costs.1))
}

/// Fifty guests cost less than a hundredth of a processor at the default interval.
#[test]
fn fifty_guests_are_read_for_little() -> Result<()> {
    const GUESTS: u8 = 50;
    let _turn = turn();
    let (env, cluster) = (Env::load()?, one_host()?);
    let host = cluster.host(0);
    let qemus: Vec<Process> =
        (0..GUESTS).map(|number| host.start_light(&env, number)).collect::<Result<_>>()?;
    let pids: Vec<u32> = qemus.iter().map(Process::pid).collect();
    for traffic in [false, true] {
        let socket_folder = Some(host.monitors());
        let settings = Settings { socket_folder, traffic, ..Settings::default() };
        let interval_s = settings.interval_s;
        let pids = pids.clone();
        let reading = host.spawn(move || cost(settings, &pids))?;
        let (report, own, of_qemus) =
            reading.join().map_err(|_| anyhow::anyhow!("A reading panicked"))??;
        let share = own / interval_s;
        println!(
            "traffic {traffic}: {:.1} ms a reading, {:.1} ms of QEMUs, {:.2} % of a processor; {:.1} MiB",
            own * 1e3,
            of_qemus * 1e3,
            share * 100.0,
            resident_mib()?
        );
        let is_expected = |why: &String| why.contains("pressure");
        ensure!(report.troubles.iter().all(is_expected), "{:?}", report.troubles);
        ensure!(report.guests.len() == usize::from(GUESTS), "{} guests", report.guests.len());
        for guest in &report.guests {
            ensure!(guest.addresses.len() == 1 && guest.state == GuestState::Paused, "{guest:?}");
        }
        ensure!(share < 0.01, "{share}");
        ensure!(resident_mib()? < 60.0, "{} MiB", resident_mib()?);
    }
    Ok(())
}

/// The most that this process had in memory.
fn resident_mib() -> Result<f64> {
    Ok(memory::peak_bytes(std::process::id())? as f64 / 1_048_576.0)
}
