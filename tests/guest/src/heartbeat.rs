//! Writes `HB <sequence> <guest monotonic us> <nonce>` at a fixed period to the second serial port.
//!
//! The nonce is new with every start of the program, so that two beats with the same nonce and
//! sequence are proof of two running copies of one guest. Invariants: sequences never go back; a
//! line that has begun is finished before the next one begins; when the port takes no bytes, whole
//! lines are left out (their sequences are missing) instead of waiting.

use std::io::{ErrorKind, Read as _, Write as _};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use guest_programs::options::Options;
use nix::fcntl::OFlag;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, ClockNanosleepFlags, clock_nanosleep};

use crate::console::{HEARTBEAT, monotonic_us, open_raw};

fn nonce() -> Result<u32> {
    let mut bytes = [0; 4];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("Cannot read /dev/urandom")?;
    Ok(u32::from_le_bytes(bytes))
}

fn sleep_until(at_us: u64) {
    let at = TimeSpec::from_duration(Duration::from_micros(at_us));
    // An early return (a signal) makes one beat early, nothing else.
    let _ = clock_nanosleep(ClockId::CLOCK_MONOTONIC, ClockNanosleepFlags::TIMER_ABSTIME, &at);
}

/// Runs until the machine stops.
pub(crate) fn run(mut options: Options) -> Result<()> {
    let period_us = options.number("period_us", 5000)?;
    options.finish()?;
    ensure!(period_us >= 500, "A heartbeat period of {period_us} us is below the least, 500");
    let nonce = nonce()?;
    let mut port = open_raw(HEARTBEAT, OFlag::O_NONBLOCK)?;
    println!("ready period_us={period_us} nonce={nonce:08x}");
    let mut sequence = 0_u64;
    let mut line = Vec::with_capacity(64);
    let mut next_us = monotonic_us();
    loop {
        next_us += period_us;
        let now_us = monotonic_us();
        if now_us > next_us + period_us {
            next_us = now_us;
        }
        sleep_until(next_us);
        sequence += 1;
        if line.is_empty() {
            writeln!(line, "HB {sequence} {} {nonce:08x}", monotonic_us())?;
        }
        match port.write(&line) {
            Ok(count) => drop(line.drain(..count.min(line.len()))),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("Cannot write the heartbeat"),
        }
    }
}
