//! An agent that dies while it decides over its host's hotspot: started again, it finds the hotspot again or goes on with what
//! it had begun. Until then nobody decides for it, as nobody else has its guests' figures.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::fleet::{Fleet, INTERVAL_S};
use framework::load;
use scheduler_api::View;
use scheduler_api::amounts::Resource;

use super::{FOUND_WITHIN, MOVED_WITHIN, is_hot, is_quiet};

/// As of the others, and guests may move again at once.
pub(super) const RULES: &str =
    "[limits]\nback_after_s = 0.0\nstay_s = 0.0\n[detect.threshold]\nsteal = 1.0\n";

/// Two guests that together want more than their host has.
const PAIR: [&str; 2] = ["vm1", "vm2"];

/// What each of them wants, percent of a processor: 0.7 for both and what QEMU takes besides.
const EACH_PERCENT: u64 = 38;

/// When the agent dies.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// It has just seen the hotspot; figures of all hosts are still to come.
    Found,
    /// Half an interval later: it plans, or has just begun.
    Planning,
    /// It has claimed guest and destination.
    Claimed,
}

fn hosts(fleet: &Fleet) -> Result<[usize; 2]> {
    let places = fleet.places()?;
    let place = |name: &str| places.get(name).copied().context("No such guest");
    Ok([place(PAIR[0])?, place(PAIR[1])?])
}

fn work(fleet: &Fleet, percent: u64) -> Result<()> {
    PAIR.iter().try_for_each(|name| fleet.with(name, |vm| load::cpu(vm, percent).map(drop)))
}

/// Both on one host that has nothing to do; its number.
fn meet(fleet: &Fleet) -> Result<usize> {
    work(fleet, 0)?;
    let [one, other] = hosts(fleet)?;
    let idle = |view: &View| {
        is_quiet(view)
            && view.hotspots.iter().all(|hotspot| hotspot.ended_s.is_some())
            && view.hosts.iter().all(|host| host.api.is_some() && !host.is_migrating)
    };
    fleet.wait(one, "nothing is hot", MOVED_WITHIN * 2, idle)?;
    if one != other {
        fleet.begin_move(PAIR[1], other, one, MOVED_WITHIN)?;
        let name = fleet.cluster().host(one).plan().name.clone();
        fleet.wait(one, "they are on one host", MOVED_WITHIN * 2, |view| {
            let is_there =
                |guest: &str| view.guests.iter().any(|one| one.name == guest && one.host == name);
            idle(view) && PAIR.iter().all(|guest| is_there(guest))
        })?;
    }
    ensure!(hosts(fleet)? == [one, one], "They are not on one host");
    Ok(one)
}

/// The agent of a hot host dies at several moments of its decision; the hotspot is cured all the same.
pub(super) fn and_dies(fleet: &mut Fleet) -> Result<()> {
    for (moment, away_s) in [(Moment::Found, 1), (Moment::Planning, 9), (Moment::Claimed, 9)] {
        let host = meet(fleet)?;
        let name = fleet.cluster().host(host).plan().name.clone();
        let observer = (host + 1) % 3;
        work(fleet, EACH_PERCENT)?;
        match moment {
            Moment::Found | Moment::Planning => {
                let found = |view: &View| is_hot(view, &name, Resource::Cpu);
                fleet.wait(observer, "a hotspot", FOUND_WITHIN, found)?;
            }
            Moment::Claimed => {
                let begun = |view: &View| !is_quiet(view);
                fleet.wait(observer, "a move", FOUND_WITHIN + MOVED_WITHIN, begun)?;
            }
        }
        if matches!(moment, Moment::Planning) {
            std::thread::sleep(Duration::from_secs_f64(INTERVAL_S / 2.0));
        }
        let died = Instant::now();
        fleet.kill_agent(host)?;
        std::thread::sleep(Duration::from_secs(away_s));
        fleet.start_agent(host)?;
        let within = FOUND_WITHIN + MOVED_WITHIN * 2;
        fleet.wait(observer, "the pair is parted and the hotspot gone", within, |view| {
            let host = |name: &str| view.guests.iter().find(|one| one.name == name);
            let [one, other] = PAIR.map(|name| host(name).map(|guest| &guest.host));
            let is_hot = view.hotspots.iter().any(|hotspot| hotspot.ended_s.is_none());
            is_quiet(view) && !is_hot && one.is_some() && other.is_some() && one != other
        })?;
        println!("{moment:?}, away for {away_s} s: parted {:?} after that", died.elapsed());
        let [one, other] = hosts(fleet)?;
        ensure!(one != other, "Both run on {one}");
    }
    work(fleet, 0)
}
