//! `migrate inspect`: what a guest does with its memory, seen from outside.

use std::process::ExitCode;
use std::sync::Arc;

use fctrans::inspect::{Inspection, inspect};
use fctrans::memory::LiveMemory;
use qemu_glue::qmp::Client;
use qemu_glue::ram::{GuestRam, ProcessRam};
use qemu_glue::vm;

use super::print_json;
use crate::args::InspectArgs;
use crate::blocking::on_thread;
use crate::error::EngineError;

pub(super) async fn run(args: &InspectArgs) -> ExitCode {
    match look(args).await {
        Ok(found) if args.json => {
            print_json(&found);
            ExitCode::SUCCESS
        }
        Ok(found) => {
            print!("{}", told(&found));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {}", error.tell());
            ExitCode::from(1)
        }
    }
}

async fn look(args: &InspectArgs) -> Result<Inspection, EngineError> {
    let client = Client::connect(&args.qmp).await?;
    let vm = vm::inventory(&client).await?;
    let processors = vm::processors(&client).await?;
    let memory = if vm.regions.is_empty() {
        LiveMemory::new(Arc::new(ProcessRam::open(vm.pid, &vm.placed)?), &vm.guest_physical)
    } else {
        let ram = GuestRam::open(vm.pid, &vm.regions, false)?;
        LiveMemory::new(Arc::new(ram), &vm.guest_physical)
    };
    Ok(on_thread(move || inspect(&memory, &processors)).await??)
}

/// For people.
fn told(found: &Inspection) -> String {
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let mut lines = vec![("kernel", found.kernel.clone())];
    match (&found.memory, &found.memory_unknown) {
        (Some(memory), _) => {
            let text = format!(
                "{} in all, {} used, {} free, {} shared, {} buffers and cache, {} available",
                mib(memory.total_bytes),
                mib(memory.used_bytes),
                mib(memory.free_bytes),
                mib(memory.shared_bytes),
                mib(memory.buff_cache_bytes),
                mib(memory.available_bytes),
            );
            lines.push(("memory", text));
            let pages =
                |count: Option<u64>| count.map_or_else(|| "?".into(), |count| count.to_string());
            let text = format!(
                "{} in all, {} free, {} pages in and {} pages out since it was started",
                mib(memory.swap_total_bytes),
                mib(memory.swap_free_bytes),
                pages(memory.swapped_in_pages),
                pages(memory.swapped_out_pages),
            );
            lines.push(("swap", text));
        }
        (None, why) => {
            lines.push(("memory", format!("not known: {}", why.as_deref().unwrap_or("?"))));
        }
    }
    let blocks: Vec<String> = found.free_blocks.iter().map(u64::to_string).collect();
    lines.push(("free blocks", format!("{} (of 4 KiB, 8 KiB, ...)", blocks.join(" "))));
    lines.push((
        "not used",
        format!("{} free, {} given away", mib(found.free_bytes), mib(found.offline_bytes)),
    ));
    let skipped = format!("{} of it hold data at the host", mib(found.skipped_bytes));
    lines.push(match &found.not_skipped {
        None => ("left out", format!("{skipped} and are not moved")),
        Some(why) => ("left out", format!("nothing, though {skipped}. {why}")),
    });
    if let (Some(needed), Some(cold)) = (found.working_set_bytes, found.cold_bytes) {
        let text = format!("{} likely to be needed, {} not used lately", mib(needed), mib(cold));
        lines.push(("in use", text));
    }
    lines.push((
        "took",
        format!(
            "{:.0} ms to find the kernel, {:.1} ms to look at all pages",
            found.find_ms, found.scan_ms
        ),
    ));
    lines.iter().map(|(what, text)| format!("{what:<12}{text}\n")).collect()
}
