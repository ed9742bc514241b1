//! The scheduler for real: hosts in namespaces with processors of their own, agents on them, and guests that work.

mod decides;
mod memory;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::fleet::{Fleet, INTERVAL_S};
use e2e::members::Members;
use e2e::turn;
use framework::cluster::guest_address;
use framework::{HostPlan, load};
use scheduler_api::View;
use scheduler_api::amounts::Resource;
use scheduler_api::view::MoveStage;

/// A hotspot is to be found within this time (Sandpiper's figure).
const FOUND_WITHIN: Duration = Duration::from_secs(20);

/// A guest moves within this time on a machine that has something else to do.
const MOVED_WITHIN: Duration = Duration::from_secs(60);

/// Three hosts, which have the machine's two processors together.
fn hosts() -> Vec<HostPlan> {
    let plan = |name: &&str| {
        // 40 Mbit/s in both directions together.
        HostPlan { bits_per_s: 20_000_000, ..HostPlan::new(name, 0.7, 1000) }
    };
    ["a", "b", "c"].iter().map(plan).collect()
}

/// Links count as full early: more takes guests under TCG too much processor time. What guests wait for
/// processors is no measure here: tests share them with others.
const RULES: &str = "[limits]\nback_after_s = 120.0\nstay_s = 10.0\n[limits.share_max]\nnetwork_mbit = 0.015\n\
                     [detect.threshold]\nnetwork = 0.015\nsteal = 1.0\n";

/// What each of three guests wants of a host: with what idle guests take, more than it has.
const BUSY_PERCENT: u64 = 24;

/// The guests of a that are given work.
const BUSY: [&str; 3] = ["vm1", "vm2", "vm3"];

/// What two guests send each other, kbit/s.
const TALK_KBIT: u64 = 500;

fn is_hot(view: &View, host: &str, resource: Resource) -> bool {
    let mut open = view.hotspots.iter().filter(|hotspot| hotspot.ended_s.is_none());
    open.any(|hotspot| hotspot.host == host && hotspot.resource == resource)
}

fn completed(view: &View) -> usize {
    view.moves.iter().filter(|one| one.stage == MoveStage::Completed).count()
}

fn is_quiet(view: &View) -> bool {
    view.moves.iter().all(|one| one.ended_s.is_some())
}

/// A host with three guests that want more than it has: one leaves, and all have what they want.
fn cpu_hotspot(fleet: &Fleet) -> Result<()> {
    let before = fleet.places()?;
    let began = Instant::now();
    for guest in BUSY {
        fleet.with(guest, |vm| load::cpu(vm, BUSY_PERCENT))?;
    }
    fleet.wait(0, "a CPU hotspot on a", FOUND_WITHIN, |view| is_hot(view, "a", Resource::Cpu))?;
    let found = began.elapsed();
    fleet.wait(0, "a guest has left a", MOVED_WITHIN, |view| {
        completed(view) >= 1 && is_quiet(view)
    })?;
    let moved = began.elapsed();
    let (_, view) = fleet
        .wait(0, "the hotspot is gone", MOVED_WITHIN, |view| !is_hot(view, "a", Resource::Cpu))?;
    println!(
        "CPU hotspot: found after {found:?}, guest moved after {moved:?}, gone after {:?}",
        began.elapsed()
    );
    let after = fleet.places()?;
    let left = BUSY.iter().filter(|name| before[**name] == 0 && after[**name] != 0).count();
    // Others may have made room for it.
    ensure!(left >= 1, "{before:?} has become {after:?}");
    let plan = view.plan.context("There is no plan")?;
    let reason = &plan.steps.first().context("The plan is empty")?.reason;
    ensure!(reason.contains("CPU"), "{reason}");
    for guest in BUSY {
        fleet.with(guest, |vm| load::cpu(vm, 0))?;
    }
    Ok(())
}

/// One interval of work is no hotspot.
fn transient_spike(fleet: &Fleet) -> Result<()> {
    let before = fleet.places()?;
    let spike = Duration::from_secs_f64(INTERVAL_S);
    fleet.with("vm4", |vm| load::spike(vm, 100, spike))?;
    let until = Instant::now() + FOUND_WITHIN;
    while Instant::now() < until {
        let view = fleet.view(1)?;
        ensure!(is_quiet(&view), "Something moves: {:?}", view.moves);
        std::thread::sleep(Duration::from_secs(1));
    }
    ensure!(fleet.places()? == before, "A spike has moved a guest");
    Ok(())
}

/// Two guests of different hosts that fill their hosts' network end on one host, where their talk costs nothing.
fn talking_pair(fleet: &Fleet) -> Result<()> {
    let places = fleet.places()?;
    let pairs = places.iter().flat_map(|one| places.iter().map(move |other| (one, other)));
    let (one, other) = pairs
        .filter(|((one, here), (other, there))| one < other && here != there)
        .map(|((one, _), (other, _))| (one.as_str(), other.as_str()))
        .next_back()
        .context("All guests are on one host")?;
    let talk = |kbit: u64| {
        for (guest, to) in [(one, other), (other, one)] {
            let number = to.trim_start_matches("vm").parse()?;
            fleet.with(guest, |vm| load::send(vm, guest_address(number), kbit))?;
        }
        Ok::<_, anyhow::Error>(())
    };
    let began = Instant::now();
    talk(TALK_KBIT)?;
    fleet.wait(0, "the talking pair is on one host", FOUND_WITHIN + MOVED_WITHIN, |view| {
        let host = |name: &str| {
            view.guests.iter().find(|guest| guest.name == name).map(|guest| &guest.host)
        };
        is_quiet(view) && host(one).is_some() && host(one) == host(other)
    })?;
    println!("{one} and {other} are on one host after {:?}", began.elapsed());
    let places = fleet.places()?;
    ensure!(places[one] == places[other], "{places:?}");
    talk(0)
}

/// All guests leave a host that is to be emptied; none comes.
fn drain(fleet: &Fleet, host: usize) -> Result<()> {
    let name = fleet.cluster().host(host).plan().name.clone();
    let began = Instant::now();
    let drained = name.clone();
    fleet
        .ask(host, |client, addr| async move { client.drain(&addr, None, &drained, true).await })?;
    fleet.wait(host, "the host is empty", MOVED_WITHIN * 3, |view| {
        is_quiet(view) && view.guests.iter().all(|guest| guest.host != name)
    })?;
    println!("{name} is empty after {:?}", began.elapsed());
    ensure!(fleet.places()?.values().all(|place| *place != host), "It is not empty");
    fleet.ask(host, |client, addr| async move { client.drain(&addr, None, &name, false).await })
}

#[test]
fn hotspots_are_found_and_gone_spikes_move_nothing_talkers_meet_and_a_drain_empties_a_host()
-> Result<()> {
    let _turn = turn();
    let mut fleet = Fleet::create(&hosts())?;
    let store = fleet.embedded_store();
    fleet.configure(&store, RULES);
    fleet.boot(&[(1, 0), (2, 0), (3, 0), (4, 1), (5, 2), (6, 2)], |_, spec| Ok(spec))?;
    fleet.start_agents()?;
    let explained = fleet.explain(1)?;
    ensure!(explained.starts_with("As b sees it, by policy godwit\n\nHotspots\n"), "{explained}");
    transient_spike(&fleet)?;
    cpu_hotspot(&fleet)?;
    talking_pair(&fleet)?;
    drain(&fleet, 2)?;
    fleet.assert_guests_are_well()
}

#[test]
fn guests_that_swap_get_memory_or_another_host() -> Result<()> {
    let _turn = turn();
    let fleet = Fleet::create(&hosts())?;
    let store = fleet.embedded_store();
    memory_hotspots(fleet, &store)
}

#[test]
fn so_do_they_with_etcd() -> Result<()> {
    let _turn = turn();
    let fleet = Fleet::create(&hosts())?;
    let members = Members::start(&fleet.cluster())?;
    memory_hotspots(fleet, &members.store())
}

fn memory_hotspots(mut fleet: Fleet, store: &str) -> Result<()> {
    let disks = fleet.shared("");
    fleet.configure(store, memory::RULES);
    fleet.boot(&[(1, 0), (2, 0), (3, 1), (4, 1), (5, 2)], |number, spec| {
        memory::guest(&disks, number, spec)
    })?;
    fleet.start_agents()?;
    memory::grows(&fleet)?;
    memory::makes_room(&mut fleet)?;
    fleet.assert_guests_are_well()
}

#[test]
fn an_agent_may_die_while_it_decides() -> Result<()> {
    let _turn = turn();
    let mut fleet = Fleet::create(&hosts())?;
    let members = Members::start(&fleet.cluster())?;
    fleet.configure(&members.store(), decides::RULES);
    fleet.boot(&[(1, 0), (2, 0), (3, 1), (4, 2)], |_, spec| Ok(spec))?;
    fleet.start_agents()?;
    decides::and_dies(&mut fleet)?;
    fleet.assert_guests_are_well()
}

#[test]
fn members_and_agents_may_die_at_any_moment() -> Result<()> {
    let _turn = turn();
    let mut fleet = Fleet::create(&hosts())?;
    let mut members = Members::start(&fleet.cluster())?;
    fleet.configure(&members.store(), RULES);
    fleet.boot(&[(1, 0), (2, 0), (3, 0), (4, 1), (5, 2)], |_, spec| Ok(spec))?;
    fleet.start_agents()?;
    transient_spike(&fleet)?;
    // A member dies; decisions go on.
    members.kill(1)?;
    cpu_hotspot(&fleet)?;
    members.restart(1, &fleet.cluster())?;
    talking_pair(&fleet)?;
    // The agent that moves a guest dies in the middle of it, and is started again.
    let places = fleet.places()?;
    let mover = places["vm4"];
    let to = (mover + 1) % 3;
    fleet.begin_move("vm4", mover, to, MOVED_WITHIN)?;
    fleet.wait(mover, "the engine runs", MOVED_WITHIN, |view| {
        view.moves.iter().any(|one| one.guest == "vm4" && one.stage != MoveStage::Preparing)
    })?;
    fleet.kill_agent(mover)?;
    let observer = (mover + 2) % 3;
    fleet.wait(observer, "the agent is missed", MOVED_WITHIN, |view| {
        view.hosts.iter().filter(|host| host.api.is_none()).count() == 1
    })?;
    // The engine needs no agent.
    fleet.start_agent(mover)?;
    fleet.wait(observer, "nothing is under way any more", MOVED_WITHIN * 2, |view| {
        is_quiet(view) && view.hosts.iter().all(|host| host.api.is_some() && !host.is_migrating)
    })?;
    let after = fleet.places()?;
    let (view, log) = (fleet.view(mover)?, fleet.agent_log(mover));
    ensure!(after["vm4"] == to, "The move did not go on: {after:?}, {:?}\n{log}", view.moves);
    // The destination's agent dies while a guest comes.
    let from = after["vm5"];
    let to = (from + 1) % 3;
    fleet.begin_move("vm5", from, to, MOVED_WITHIN)?;
    fleet.kill_agent(to)?;
    fleet.start_agent(to)?;
    fleet.wait(from, "the move has ended", MOVED_WITHIN * 2, |view| {
        is_quiet(view) && view.hosts.iter().all(|host| !host.is_migrating)
    })?;
    fleet.places()?;
    drain(&fleet, from)?;
    fleet.assert_guests_are_well()
}
