//! What is seen of a guest from outside is what it says inside.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use e2e::Rig;
use framework::{QemuKind, Vm, VmSpec};
use serde_json::json;

const PAGE_BYTES: u64 = 4096;

/// What is wrong is so each time; what the guest does beside, seldom.
const ATTEMPTS: u32 = 4;

/// The first column of numbers behind a name.
fn figures(text: &str) -> BTreeMap<String, u64> {
    let figure = |line: &str| {
        let (name, rest) = line.split_once(|c: char| c == ':' || c.is_whitespace())?;
        Some((name.to_owned(), rest.split_whitespace().next()?.parse().ok()?))
    };
    text.lines().filter_map(figure).collect()
}

/// Free blocks by order, over all zones.
fn free_blocks(buddyinfo: &str) -> Vec<u64> {
    let mut orders = vec![];
    for line in buddyinfo.lines() {
        let numbers = line.split_whitespace().skip(4).filter_map(|word| word.parse::<u64>().ok());
        for (order, count) in numbers.enumerate() {
            if orders.len() <= order {
                orders.push(0);
            }
            orders[order] += count;
        }
    }
    orders
}

fn near(what: &str, seen: u64, said: u64, within: u64) -> Result<()> {
    ensure!(seen.abs_diff(said) <= within, "{what}: {seen} was seen, the guest says {said}");
    Ok(())
}

/// Compares until the guest did nothing of note between telling and being stopped.
fn agrees(rig: &Rig, vm: &mut Vm) -> Result<()> {
    for _ in 1..ATTEMPTS {
        match agrees_now(rig, vm) {
            Ok(()) => return Ok(()),
            Err(error) => println!("{}: once more: {error:#}", vm.spec().name),
        }
    }
    agrees_now(rig, vm)
}

/// Compares, with the guest stopped right after it has told.
fn agrees_now(rig: &Rig, vm: &mut Vm) -> Result<()> {
    let script = "cat /proc/buddyinfo; echo ===; cat /proc/meminfo; echo ===; cat /proc/vmstat; echo ===; uname -r";
    let said = vm.ask(&format!("sh {script}"))?;
    vm.qmp().execute("stop", json!({}))?;
    let parts: Vec<&str> = said.split("===").collect();
    let [buddyinfo, meminfo, vmstat, release] = parts[..] else {
        anyhow::bail!("the guest says {said}");
    };
    let (meminfo, vmstat) = (figures(meminfo), figures(vmstat));
    let seen = rig.inspect(vm);
    vm.qmp().execute("cont", json!({}))?;
    let seen = seen?;
    println!("{}: {seen}", vm.spec().name);
    let kib = |name: &str| meminfo.get(name).map(|kib| kib * 1024).context(name.to_owned());
    ensure!(seen["kernel"].as_str() == release.split_whitespace().next(), "{seen}");
    let memory =
        |name: &str| seen["memory"][name].as_u64().with_context(|| format!("{name}: {seen}"));
    // One in a hundred, and what the guest does between telling and stopping.
    let within = kib("MemTotal")? / 100;
    near("total", memory("total_bytes")?, kib("MemTotal")?, 0)?;
    near("free", memory("free_bytes")?, kib("MemFree")?, within)?;
    near("available", memory("available_bytes")?, kib("MemAvailable")?, within)?;
    let cache = kib("Buffers")? + kib("Cached")? + kib("SReclaimable")?;
    near("buffers and cache", memory("buff_cache_bytes")?, cache, within)?;
    near("shared", memory("shared_bytes")?, kib("Shmem")?, within)?;
    near("swapped in", memory("swapped_in_pages")?, vmstat["pswpin"], 0)?;
    let blocks = free_blocks(buddyinfo);
    let seen_blocks: Vec<u64> = seen["free_blocks"]
        .as_array()
        .context("no blocks")?
        .iter()
        .filter_map(serde_json::Value::as_u64)
        .collect();
    ensure!(seen_blocks.len() == blocks.len(), "{seen_blocks:?} {blocks:?}");
    let pages = |blocks: &[u64]| -> u64 {
        blocks.iter().enumerate().map(|(order, count)| count << order).sum()
    };
    // Lists of single processors are told by neither.
    near("free pages", pages(&seen_blocks), pages(&blocks), 512)?;
    near("largest blocks", seen_blocks[10], blocks[10], 1)?;
    near(
        "free by flags",
        seen["free_bytes"].as_u64().context("free")?,
        kib("MemFree")?,
        2048 * PAGE_BYTES,
    )
}

#[test]
fn guests_of_several_sizes_agree() -> Result<()> {
    let rig = Rig::new()?;
    let spec = |name: &str| VmSpec::new(name, QemuKind::V7_2);
    let guests = [
        spec("small").memory_mib(256),
        spec("two").memory_mib(2048).smp(2),
        spec("nokaslr").memory_mib(1024).with("nokaslr"),
        spec("five-levels").memory_mib(1024).extra(&["-cpu", "max"]),
        // Beyond the hole below 4 GiB.
        spec("large").memory_mib(6144),
        spec("newer").memory_mib(1024).newer_kernel(),
        spec("newer-five-levels").memory_mib(6144).smp(2).newer_kernel().extra(&["-cpu", "max"]),
        spec("newer-nokaslr").memory_mib(512).newer_kernel().with("nokaslr"),
    ];
    for guest in guests {
        let mut vm = Vm::boot(&rig.env, guest)?;
        agrees(&rig, &mut vm)?;
        // Used and freed again.
        let script = "sh dd if=/dev/zero of=/tmp/x bs=1M count=64 2>/dev/null; rm /tmp/x; sleep 2";
        vm.ask(script)?;
        agrees(&rig, &mut vm)?;
    }
    Ok(())
}
