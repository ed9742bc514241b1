//! Guests that have too little memory: their host's agent gives them more, and where the host has none, one leaves.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use e2e::fleet::Fleet;
use framework::cluster::swap_disk;
use framework::{VmSpec, load};
use scheduler_api::View;
use scheduler_api::amounts::Resource;
use scheduler_api::control::ResizeRequest;
use scheduler_api::view::HotspotView;

use super::{MOVED_WITHIN, is_quiet};

/// Rules for hosts on which guests that swap may take all processors.
pub(crate) const RULES: &str =
    "[limits]\nstay_s = 10.0\n[detect.threshold]\ncpu = 1.0\nsteal = 1.0\n";

/// A guest that is to swap may use so much of its 128 MiB.
const SMALL_MIB: f64 = 96.0;

/// What a guest's program holds, MiB: more than such a guest has room for beside its kernel, and less than a whole one has.
const HELD_MIB: u64 = 42;

/// After so long a host's figures are of now.
const SETTLED_AFTER: Duration = Duration::from_secs(10);

/// A guest's swap, MiB.
const SWAP_MIB: u64 = 128;

/// A guest with a balloon and a swap.
pub(crate) fn guest(fleet_folder: &std::path::Path, number: u8, spec: VmSpec) -> Result<VmSpec> {
    let disk = swap_disk(fleet_folder, &format!("vm{number}"), SWAP_MIB)?;
    Ok(VmSpec { disk: Some(disk), ..spec.balloon() })
}

fn has_mib(view: &View, guest: &str) -> f64 {
    let found = view.guests.iter().find(|one| one.name == guest);
    found.map_or(f64::NAN, |guest| guest.usage.memory_mib)
}

fn of_memory<'a>(view: &'a View, host: &'a str) -> impl Iterator<Item = &'a HotspotView> {
    let of_host = view.hotspots.iter().filter(move |hotspot| hotspot.host == host);
    of_host.filter(|hotspot| hotspot.resource == Resource::Memory)
}

/// Whether a guest was given memory, swaps no more, and its host has enough.
fn is_over(view: &View, guest: &str, host: &str) -> bool {
    let found = view.guests.iter().find(|one| one.name == guest);
    let has_enough = found.is_some_and(|guest| {
        guest.usage.memory_mib > SMALL_MIB + 1.0 && guest.swap_writes_per_s < 1.0
    });
    has_enough && of_memory(view, host).all(|hotspot| hotspot.ended_s.is_some())
}

/// What became of it, in words. Memory may have come before there was a hotspot: a guest that swaps is seen at once.
fn told(view: &View, guest: &str, host: &str, began_s: f64) -> Result<String> {
    let has = has_mib(view, guest);
    let after_s = now_s()? - began_s;
    let hotspots: Vec<String> = of_memory(view, host)
        .map(|hotspot| {
            let from_s = hotspot.since_s - began_s;
            let to_s = hotspot.ended_s.map_or(f64::NAN, |ended_s| ended_s - began_s);
            format!("from {from_s:.1} to {to_s:.1} s")
        })
        .collect();
    Ok(format!("after {after_s:.1} s {guest} has {has:.0} MiB; hotspots of {host}: {hotspots:?}"))
}

fn now_s() -> Result<f64> {
    Ok(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64())
}

/// Has a guest's balloon leave it little.
fn shrink(fleet: &Fleet, host: usize, guest: &'static str) -> Result<()> {
    fleet.with(guest, load::swap_on)?;
    fleet.ask(host, move |client, addr| async move {
        client.resize(&addr, None, guest, &ResizeRequest { to_mib: SMALL_MIB }).await
    })?;
    let is_small = |view: &View| has_mib(view, guest) < SMALL_MIB + 1.0;
    fleet.wait(host, "the guest has less", MOVED_WITHIN, is_small).map(drop)
}

/// A guest swaps: it is found, and it gets what its host has left. Nobody moves.
pub(crate) fn grows(fleet: &Fleet) -> Result<()> {
    let before = fleet.places()?;
    shrink(fleet, 0, "vm1")?;
    let began_s = now_s()?;
    fleet.with("vm1", |vm| load::memory(vm, HELD_MIB))?;
    let (_, view) =
        fleet.wait(0, "vm1 swaps no more", MOVED_WITHIN, |view| is_over(view, "vm1", "a"))?;
    println!("too little memory: {}", told(&view, "vm1", "a", began_s)?);
    ensure!(
        fleet.places()? == before,
        "A guest has moved where memory was left\n{}",
        fleet.agent_log(0)
    );
    fleet.with("vm1", |vm| load::memory(vm, 0)).map(drop)
}

/// The same on a host that has nothing left: one of its guests leaves.
pub(crate) fn makes_room(fleet: &mut Fleet) -> Result<()> {
    let before = fleet.places()?;
    ensure!(before["vm3"] == 1 && before["vm4"] == 1, "{before:?}");
    shrink(fleet, 1, "vm3")?;
    // It has nothing to give.
    fleet.with("vm4", |vm| load::memory(vm, HELD_MIB))?;
    let settled = Instant::now();
    let (_, view) = fleet
        .wait(1, "what b uses is known", MOVED_WITHIN, |_| settled.elapsed() > SETTLED_AFTER)?;
    let b = view.hosts.iter().find(|host| host.name == "b").context("b")?;
    // It has what is taken, and no more.
    fleet.set_memory(1, b.used.memory_mib as u64)?;
    let began_s = now_s()?;
    fleet.with("vm3", |vm| load::memory(vm, HELD_MIB))?;
    let (_, view) = fleet.wait(1, "b has room, and vm3 enough", MOVED_WITHIN * 3, |view| {
        is_quiet(view) && is_over(view, "vm3", "b")
    })?;
    println!("too little memory on a full host: {}", told(&view, "vm3", "b", began_s)?);
    let after = fleet.places()?;
    ensure!(
        after["vm3"] != 1 || after["vm4"] != 1,
        "Nobody left: {after:?}\n{}",
        fleet.agent_log(1)
    );
    Ok(())
}
