//! Agents and members of etcd that die while a guest moves, at moments spread over all of a move, and a host that vanishes: the
//! guest always runs, in one place, nothing stays claimed, and guests move on afterwards.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use e2e::fleet::{Fleet, INTERVAL_S};
use e2e::members::Members;
use e2e::turn;
use framework::HostPlan;
use scheduler_api::View;
use scheduler_api::view::{HostView, MoveStage};

/// A move ends within this time on a machine that has something else to do, whoever died.
const ENDS_WITHIN: Duration = Duration::from_secs(150);

/// Nothing is a hotspot.
const RULES: &str = "[limits]\nback_after_s = 0.0\nstay_s = 0.0\n\
                     [detect.threshold]\ncpu = 1.0\nmemory = 1.0\nnetwork = 1.0\nsteal = 1.0\n\
                     [policy]\ndry-run = true\n";

/// Moves in which somebody dies, the first time as it begins and the last time as an undisturbed one has ended.
const MOVES: u32 = 12;

/// How long the dead stay dead: longer than an agent's lease (6 s), and shorter.
const AWAY: [Duration; 2] = [Duration::from_secs(9), Duration::from_secs(1)];

/// Who dies.
#[derive(Debug, Clone, Copy)]
enum Victim {
    /// The agent of the host that the guest leaves.
    Source,
    /// The agent of the host that it goes to.
    Destination,
    /// A member of etcd.
    Member,
    /// Both agents.
    Both,
}

/// Three hosts with agents and members, a guest on each of the first two.
fn hosts() -> Result<(Fleet, Members)> {
    let plan = |name: &&str| HostPlan { bits_per_s: 40_000_000, ..HostPlan::new(name, 0.7, 1000) };
    let mut fleet = Fleet::create(&["a", "b", "c"].iter().map(plan).collect::<Vec<_>>())?;
    let members = Members::start(&fleet.cluster())?;
    fleet.configure(&members.store(), RULES);
    fleet.boot(&[(1, 0), (2, 1)], |_, spec| Ok(spec))?;
    fleet.start_agents()?;
    Ok((fleet, members))
}

fn has_ended(view: &View) -> bool {
    let hosts = &view.hosts;
    hosts.len() == 3
        && view.moves.iter().all(|one| one.ended_s.is_some())
        && hosts.iter().all(|host| host.api.is_some() && !host.is_migrating && !host.is_stale)
}

/// The host where a guest is in the end.
fn settle(fleet: &Fleet, guest: &str, observer: usize) -> Result<usize> {
    // What agents know of each other is some seconds old.
    fleet.wait(observer, "nothing is under way", ENDS_WITHIN, has_ended)?;
    std::thread::sleep(Duration::from_secs_f64(2.0 * INTERVAL_S));
    fleet.wait(observer, "nothing is under way", ENDS_WITHIN, has_ended)?;
    let place = *fleet.places()?.get(guest).context("The guest")?;
    let name = fleet.cluster().host(place).plan().name.clone();
    fleet.wait(observer, "the cluster sees the guest there", ENDS_WITHIN, |view| {
        view.guests.iter().any(|one| one.name == guest && one.host == name)
    })?;
    Ok(place)
}

/// Moves the guest, and returns how long that took.
fn undisturbed(fleet: &Fleet) -> Result<Duration> {
    let from = *fleet.places()?.get("vm1").context("vm1")?;
    let (to, third) = ((from + 1) % 3, (from + 2) % 3);
    let (began, began_s) = (Instant::now(), SystemTime::now().duration_since(UNIX_EPOCH)?);
    fleet.begin_move("vm1", from, to, ENDS_WITHIN)?;
    fleet.wait(from, "the guest has moved", ENDS_WITHIN, |view| {
        let mut new = view.moves.iter().filter(|one| one.began_s >= began_s.as_secs_f64());
        new.any(|one| one.stage == MoveStage::Completed) && has_ended(view)
    })?;
    let lasted = began.elapsed();
    println!("a move takes {lasted:?}");
    ensure!(settle(fleet, "vm1", third)? == to, "It has not moved");
    Ok(lasted)
}

fn agents(victim: Victim, from: usize, to: usize) -> Vec<usize> {
    match victim {
        Victim::Source => vec![from],
        Victim::Destination => vec![to],
        Victim::Member => vec![],
        Victim::Both => vec![from, to],
    }
}

#[test]
fn whoever_dies_at_whatever_moment_of_a_move() -> Result<()> {
    const VICTIMS: [Victim; 4] =
        [Victim::Source, Victim::Destination, Victim::Both, Victim::Member];
    let _turn = turn();
    let (mut fleet, mut members) = hosts()?;
    let step = undisturbed(&fleet)? / (MOVES - 1);
    let mut there = 0;
    for number in 0..MOVES {
        let victim = VICTIMS[number as usize % VICTIMS.len()];
        let away = AWAY[number as usize / VICTIMS.len() % AWAY.len()];
        let from = *fleet.places()?.get("vm1").context("vm1")?;
        let (to, third) = ((from + 1) % 3, (from + 2) % 3);
        fleet.begin_move("vm1", from, to, ENDS_WITHIN)?;
        std::thread::sleep(step * number);
        for agent in agents(victim, from, to) {
            fleet.kill_agent(agent)?;
        }
        if matches!(victim, Victim::Member) {
            members.kill(third)?;
        }
        std::thread::sleep(away);
        for agent in agents(victim, from, to) {
            fleet.start_agent(agent)?;
        }
        if matches!(victim, Victim::Member) {
            members.restart(third, &fleet.cluster())?;
        }
        let place = settle(&fleet, "vm1", third)?;
        ensure!(
            place == from || place == to,
            "It was to go from {from} to {to}, and is at {place}"
        );
        println!(
            "{victim:?} after {:?}: it {}",
            step * number,
            if place == to { "moved" } else { "stayed" }
        );
        there += u32::from(place == to);
    }
    // Agents that are started again go on with what they had begun; some moves never began.
    ensure!(there >= MOVES / 2, "Only {there} of {MOVES} came to their end");
    undisturbed(&fleet)?;
    fleet.assert_guests_are_well()
}

/// Its memory is on its way when the destination vanishes, with its member of etcd: the guest runs on where it is and may go
/// elsewhere, and the host is one like others when it is back.
#[test]
fn a_host_vanishes_while_a_guest_comes() -> Result<()> {
    const FROM: usize = 0;
    const ELSEWHERE: usize = 1;
    const GONE: usize = 2;
    let _turn = turn();
    let (mut fleet, mut members) = hosts()?;
    fleet.begin_move("vm1", FROM, GONE, ENDS_WITHIN)?;
    fleet.wait(FROM, "its memory moves", ENDS_WITHIN, |view| {
        let mut moves = view.moves.iter().filter(|one| one.stage == MoveStage::Moving);
        moves.any(|one| one.curve.last().is_some_and(|point| point.at_s > one.began_s))
    })?;
    let began = Instant::now();
    fleet.vanish(GONE)?;
    members.kill(GONE)?;
    for observer in [FROM, ELSEWHERE] {
        fleet.wait(observer, "the host is missed and the move has ended", ENDS_WITHIN, |view| {
            let is_gone =
                |host: &HostView| host.name == "c" && (host.api.is_none() || host.is_stale);
            let is_missed = view.hosts.iter().all(|host| host.name != "c" || is_gone(host));
            is_missed && view.moves.iter().all(|one| one.ended_s.is_some())
        })?;
    }
    println!("missed, and the move has ended, after {:?}", began.elapsed());
    ensure!(fleet.places()?.get("vm1") == Some(&FROM), "It runs on {:?}", fleet.places()?);
    fleet.begin_move("vm1", FROM, ELSEWHERE, ENDS_WITHIN)?;
    fleet.wait(FROM, "it has gone elsewhere", ENDS_WITHIN, |view| {
        view.guests.iter().any(|guest| guest.name == "vm1" && guest.host == "b")
            && view.moves.iter().all(|one| one.ended_s.is_some())
    })?;
    fleet.cluster().host(GONE).come_back()?;
    members.restart(GONE, &fleet.cluster())?;
    fleet.start_agent(GONE)?;
    ensure!(settle(&fleet, "vm1", FROM)? == ELSEWHERE, "It is not where it was seen");
    fleet.begin_move("vm1", ELSEWHERE, GONE, ENDS_WITHIN)?;
    ensure!(settle(&fleet, "vm1", FROM)? == GONE, "It has not moved to the host that is back");
    fleet.assert_guests_are_well()
}
