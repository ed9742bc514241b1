//! `cargo xtask demo scheduler`: three hosts on this machine, an agent on each, and guests that begin to work too much.

use std::io::{self, IsTerminal as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::fleet::Fleet;
use framework::{Cluster, Engine, HostPlan, load};
use scheduler_api::View;
use scheduler_api::amounts::Resource;
use scheduler_api::view::{MoveStage, PlanView, StepAction, StepState};

/// Processors of a host.
const CORES: f64 = 0.7;

/// The guests that begin to work.
const BUSY: [&str; 3] = ["vm1", "vm2", "vm3"];

/// After so long a hotspot has been judged by figures of the time after the moves.
const SETTLED_AFTER: Duration = Duration::from_secs(8);

/// Longest wait for anything.
const WITHIN: Duration = Duration::from_secs(120);

fn main() -> Result<()> {
    ensure!(std::env::args().len() == 1, "The demo takes no arguments");
    println!(
        "Three hosts on this machine, a, b and c: each a network namespace with {CORES} of a processor for its guests.\n\
         An agent runs on each; they share a store, see load, and move guests without anybody pressing a button.\n"
    );
    let plans = ["a", "b", "c"].map(|name| HostPlan::new(name, CORES, 1000));
    let mut fleet = Fleet::create(&plans)?;
    let store = fleet.embedded_store();
    // What guests wait for processors is no measure on a machine that does other things as well.
    fleet.configure(&store, "[detect.threshold]\nsteal = 1.0\n");
    let began = Instant::now();
    fleet.boot(&[(1, 0), (2, 0), (3, 0), (4, 1), (5, 2)], |_, spec| Ok(spec))?;
    println!("5 guests have booted ({:.1} s, QEMU under TCG)", began.elapsed().as_secs_f64());
    fleet.start_agents()?;
    let page = Page::open(&fleet)?;
    println!("3 agents know each other; the page: {}\n", page.address);
    show_hosts(&fleet.view(0)?);

    println!(
        "\nvm1, vm2 and vm3, all on a, begin to work: each wants a quarter of a processor, and a has {CORES}."
    );
    let began = Instant::now();
    for guest in BUSY {
        fleet.with(guest, |vm| load::cpu(vm, 24))?;
    }
    let (_, found) = fleet.wait(0, "a hotspot on a", WITHIN, |view| !hot(view).is_empty())?;
    let seconds = || began.elapsed().as_secs_f64();
    for why in hot(&found) {
        println!("  {:5.1} s  hotspot: {why}", seconds());
    }
    let before = waiting(&found);
    let (_, view) = fleet.wait(0, "a plan", WITHIN, |view| {
        view.plan.as_ref().is_some_and(|plan| !plan.steps.is_empty())
    })?;
    for step in view.plan.iter().flat_map(|plan| &plan.steps) {
        if let StepAction::Migrate { from, to, .. } = &step.action {
            println!(
                "  {:5.1} s  plan: {} from {from} to {to}: {}",
                seconds(),
                step.guest,
                step.reason
            );
        }
    }
    let (_, view) = fleet.wait(0, "moves that have ended", WITHIN, |view| {
        let is_carried_out = |plan: &PlanView| {
            plan.steps.iter().all(|step| [StepState::Done, StepState::Failed].contains(&step.state))
        };
        view.plan.as_ref().is_some_and(is_carried_out)
    })?;
    for one in view.moves.iter().filter(|one| one.stage == MoveStage::Completed) {
        println!(
            "  {:5.1} s  moved: {} runs on {} now, {:.1} s in all, downtime {:.1} ms, {:.1} MiB over the wire",
            seconds(),
            one.guest,
            one.to,
            one.ended_s.unwrap_or(one.began_s) - one.began_s,
            one.downtime_ms.unwrap_or_default(),
            one.wire_bytes.unwrap_or_default() as f64 / f64::from(1 << 20),
        );
    }
    std::thread::sleep(SETTLED_AFTER);
    let (_, view) = fleet.wait(0, "the hotspot is gone", WITHIN, |view| hot(view).is_empty())?;
    println!("  {:5.1} s  the hotspot is gone, as new figures say\n", seconds());
    show_hosts(&view);
    println!();
    for ((name, before), (_, after)) in before.iter().zip(&waiting(&view)) {
        println!(
            "{name} waited for a processor {before:.0} % of the time, and waits {after:.0} % now"
        );
    }
    fleet.assert_guests_are_well()?;
    println!("all guests are well, and none runs twice: {:?}", fleet.places()?);
    page.wait_for_the_reader(&fleet)
}

fn hot(view: &View) -> Vec<&str> {
    let open = view.hotspots.iter().filter(|hotspot| hotspot.ended_s.is_none());
    let of_cpu = open.filter(|hotspot| hotspot.resource == Resource::Cpu);
    of_cpu.map(|hotspot| hotspot.why.as_str()).collect()
}

/// Share of the time in which each working guest waits for a processor, in percent.
fn waiting(view: &View) -> Vec<(&str, f64)> {
    let busy = view.guests.iter().filter(|guest| BUSY.contains(&guest.name.as_str()));
    busy.map(|guest| (guest.name.as_str(), guest.steal * 100.0)).collect()
}

fn show_hosts(view: &View) {
    for host in &view.hosts {
        let guests: Vec<&str> = view
            .guests
            .iter()
            .filter(|guest| guest.host == host.name)
            .map(|guest| guest.name.as_str())
            .collect();
        println!(
            "  {}  {:.2} of {:.2} processors in use  {}",
            host.name,
            host.used.cpu_cores,
            host.capacity.cpu_cores,
            guests.join(" ")
        );
    }
}

/// The page, shown by a program in a host's namespace and passed on to this machine's own loopback.
struct Page {
    address: String,
    _web: Engine,
}

impl Page {
    fn open(fleet: &Fleet) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("No port for the page")?;
        let addr = listener.local_addr()?;
        let (agent, listen) = (fleet.address(0), addr.to_string());
        let identity = fleet.operator().display().to_string();
        let words = ["web", "--agent", &agent, "--identity", &identity, "--listen", &listen];
        let mut web = fleet.cluster().host(0).run(&fleet.env().scheduler()?, &words)?;
        web.wait_stderr("Ctrl-C ends it", Duration::from_secs(30))?;
        let address = web.stdout().trim().to_owned();
        let cluster = fleet.cluster();
        std::thread::spawn(move || pass_on(&listener, addr, &cluster));
        Ok(Self { address, _web: web })
    }

    /// The page stays as long as somebody sits there.
    fn wait_for_the_reader(&self, fleet: &Fleet) -> Result<()> {
        if !io::stdin().is_terminal() {
            return Ok(());
        }
        print!("\nThe page is still there: {}\nEnter ends the demo. ", self.address);
        io::stdout().flush()?;
        io::stdin().read_line(&mut String::new())?;
        fleet.assert_guests_are_well()
    }
}

/// Passes connections on to the same address in the first host's namespace.
fn pass_on(listener: &TcpListener, addr: SocketAddr, cluster: &Cluster) {
    for outside in listener.incoming().flatten() {
        if let Err(error) = join(outside, addr, cluster) {
            eprintln!("A connection to the page was lost: {error:#}");
        }
    }
}

fn join(outside: TcpStream, addr: SocketAddr, cluster: &Cluster) -> Result<()> {
    let connecting = cluster.host(0).spawn(move || Ok(TcpStream::connect(addr)?))?;
    let inside = connecting.join().map_err(|_| anyhow::anyhow!("Connecting panicked"))??;
    let (to_outside, to_inside) = (outside.try_clone()?, inside.try_clone()?);
    std::thread::spawn(move || copy(outside, to_inside));
    std::thread::spawn(move || copy(inside, to_outside));
    Ok(())
}

fn copy(mut from: TcpStream, mut to: TcpStream) {
    // Either end may close at any time.
    drop(io::copy(&mut from, &mut to));
    drop(to.shutdown(Shutdown::Write));
}
