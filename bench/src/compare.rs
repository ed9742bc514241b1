//! `bench compare`: the modes in turns.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::args::CompareArgs;
use crate::driver::{DriveOptions, measure};
use crate::mode::Mode;
use crate::record::{Log, Migration, Outcome, Record};
use crate::report;
use crate::table::number;
use crate::testbed::{Bed, GuestPlan, Link};
use crate::workload::Workload;

/// Resident data of [`Workload::Resident`], as a share of the guest's memory.
const RESIDENT_SHARE: f64 = 0.7;

/// Measures, records, and prints tables.
///
/// # Errors
/// The testbed does not work, or an interruption; what was measured is recorded.
pub(crate) fn run(args: &CompareArgs) -> Result<()> {
    ensure!(!args.modes.is_empty(), "No mode to measure");
    ensure!(
        args.memory >= 1024 || args.workload == Workload::Idle,
        "The workload {} needs a guest of 1024 MiB at least",
        args.workload
    );
    let bed = Bed::open(&args.common)?;
    let plan = GuestPlan {
        qemu: args.common.qemu,
        memory_mib: args.memory,
        smp: args.common.smp,
        workload: args.workload,
        resident_mib: (args.memory as f64 * RESIDENT_SHARE) as u64,
    };
    let options = DriveOptions {
        touch_mib: 0,
        limit: Duration::from_secs(args.common.limit_s),
        channels: args.channels,
        send_args: args.common.send_args.clone(),
    };
    let name = args.common.name.clone();
    let name = name.unwrap_or_else(|| format!("compare-{}", args.workload));
    let mut log = Log::create(&args.common.out, &name, bed.host.clone())?;
    let measured = turns(&bed, &plan, &options, args, &mut log);
    // What there is, is shown in any case.
    let shown = report::render(log.path());
    measured?;
    shown
}

fn turns(
    bed: &Bed,
    plan: &GuestPlan,
    options: &DriveOptions,
    args: &CompareArgs,
    log: &mut Log,
) -> Result<()> {
    let link = Link::veth(args.link)?;
    for turn in 0..args.repeats {
        for mode in order(&args.modes, turn) {
            let one = measure(bed, (&link, args.link), plan, mode, turn, options)?;
            say(&one, args.repeats);
            log.add(Record::Migration(Box::new(one)))?;
        }
    }
    Ok(())
}

/// Each turn begins with another mode, so that none always follows the same one.
fn order(modes: &[Mode], turn: u32) -> Vec<Mode> {
    let mut modes = modes.to_vec();
    let by = turn as usize % modes.len().max(1);
    modes.rotate_left(by);
    modes
}

/// One line on stderr.
pub(crate) fn say(one: &Migration, turns: u32) {
    let shown = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), number);
    eprintln!(
        "turn {}/{turns} {:<16} {:<8} outage {:>7} ms, total {:>7} ms, wire {:>7} MiB, load {}{}",
        one.turn + 1,
        one.mode.label(),
        one.link,
        shown(one.outage_ms),
        number(one.total_ms),
        number((one.wire_out_bytes + one.wire_back_bytes) as f64 / f64::from(1 << 20)),
        number(one.load1),
        match one.outcome {
            Outcome::Completed => String::new(),
            _ => format!("\n  {:?}: {}", one.outcome, one.error.as_deref().unwrap_or("?")),
        }
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_turn_has_every_mode_once_and_another_first() {
        let modes = [Mode::Godwit, Mode::PreCopy, Mode::PostCopy];
        let firsts: Vec<Mode> = (0..3).map(|turn| order(&modes, turn)[0]).collect();
        assert_eq!(firsts, modes);
        for turn in 0..7 {
            let mut sorted = order(&modes, turn);
            sorted.sort();
            assert_eq!(sorted, modes);
        }
    }
}
