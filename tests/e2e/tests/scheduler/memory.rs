//! Guests that have too little memory: their host's agent gives them more, and where the host has none, one leaves.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use e2e::fleet::Fleet;
use framework::cluster::swap_disk;
use framework::{VmSpec, load};
use scheduler_api::View;
use scheduler_api::amounts::Resource;
use scheduler_api::control::ResizeRequest;

use super::{FOUND_WITHIN, MOVED_WITHIN, is_hot, is_quiet};

/// Rules for hosts on which guests that swap may take all processors.
pub(crate) const RULES: &str =
    "[limits]\nstay_s = 10.0\n[detect.threshold]\ncpu = 1.0\nsteal = 1.0\n";

/// A guest that is to swap may use so much of its 128 MiB.
const SMALL_MIB: f64 = 96.0;

/// What a guest's program holds, MiB: more than such a guest has room for beside its kernel, and less than a whole one has.
const HELD_MIB: u64 = 42;

/// Share of a host's memory that is taken before a guest wants more.
const TAKEN: f64 = 0.93;

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

/// Has a guest's balloon leave it little.
fn shrink(fleet: &Fleet, guest: &'static str) -> Result<()> {
    fleet.with(guest, load::swap_on)?;
    fleet.ask(0, move |client, addr| async move {
        client.resize(&addr, None, guest, &ResizeRequest { to_mib: SMALL_MIB }).await
    })?;
    let is_small = |view: &View| has_mib(view, guest) < SMALL_MIB + 1.0;
    fleet.wait(0, "the guest has less", MOVED_WITHIN, is_small).map(drop)
}

/// A guest swaps: it is found, and it gets what its host has left. Nobody moves.
pub(crate) fn grows(fleet: &Fleet) -> Result<()> {
    let before = fleet.places()?;
    shrink(fleet, "vm1")?;
    let began = Instant::now();
    fleet.with("vm1", |vm| load::memory(vm, HELD_MIB))?;
    let (found, _) = fleet.wait(0, "a memory hotspot on a", FOUND_WITHIN, |view| {
        is_hot(view, "a", Resource::Memory)
    })?;
    let (_, view) = fleet.wait(0, "vm1 has more and swaps no more", MOVED_WITHIN, |view| {
        has_mib(view, "vm1") > SMALL_MIB + 1.0 && !is_hot(view, "a", Resource::Memory)
    })?;
    println!(
        "memory hotspot: found after {found:?}, gone after {:?}: vm1 has {:.0} MiB",
        began.elapsed(),
        has_mib(&view, "vm1")
    );
    ensure!(fleet.places()? == before, "A guest has moved where memory was left");
    fleet.with("vm1", |vm| load::memory(vm, 0)).map(drop)
}

/// The same on a host that has nothing left: one of its guests leaves.
pub(crate) fn makes_room(fleet: &mut Fleet) -> Result<()> {
    let before = fleet.places()?;
    ensure!(before["vm3"] == 1 && before["vm4"] == 1, "{before:?}");
    shrink(fleet, "vm3")?;
    // It has nothing to give.
    fleet.with("vm4", |vm| load::memory(vm, HELD_MIB))?;
    let settled = Instant::now();
    let (_, view) = fleet
        .wait(1, "what b uses is known", MOVED_WITHIN, |_| settled.elapsed().as_secs() > 10)?;
    let b = view.hosts.iter().find(|host| host.name == "b").context("b")?;
    fleet.set_memory(1, (b.used.memory_mib / TAKEN) as u64)?;
    let began = Instant::now();
    fleet.with("vm3", |vm| load::memory(vm, HELD_MIB))?;
    let (found, _) = fleet.wait(1, "a memory hotspot on b", FOUND_WITHIN, |view| {
        is_hot(view, "b", Resource::Memory)
    })?;
    let (_, view) = fleet.wait(1, "b has room, and vm3 enough", MOVED_WITHIN * 3, |view| {
        let open = view.hotspots.iter().filter(|hotspot| hotspot.ended_s.is_none());
        let mut of_memory = open.filter(|hotspot| hotspot.resource == Resource::Memory);
        is_quiet(view) && has_mib(view, "vm3") > SMALL_MIB + 1.0 && of_memory.next().is_none()
    })?;
    println!(
        "memory hotspot on a full host: found after {found:?}, gone after {:?}: vm3 has {:.0} MiB",
        began.elapsed(),
        has_mib(&view, "vm3")
    );
    let after = fleet.places()?;
    ensure!(after["vm3"] != 1 || after["vm4"] != 1, "Nobody left: {after:?}");
    Ok(())
}
