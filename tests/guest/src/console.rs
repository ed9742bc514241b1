//! The serial ports, and the clock.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;

use anyhow::{Context as _, Result};
use nix::fcntl::OFlag;
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::time::{ClockId, clock_gettime};

/// Console of the kernel and of init.
pub(crate) const CONSOLE: &str = "/dev/ttyS0";
/// The heartbeat's port; failures are repeated here.
pub(crate) const HEARTBEAT: &str = "/dev/ttyS1";
/// Commands and answers.
pub(crate) const COMMANDS: &str = "/dev/ttyS2";

/// Opens a serial port without line editing, echo or newline translation.
pub(crate) fn open_raw(path: &str, flags: OFlag) -> Result<File> {
    let port = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags((flags | OFlag::O_NOCTTY).bits())
        .open(path)
        .with_context(|| format!("Cannot open {path}"))?;
    let mut settings = tcgetattr(&port).with_context(|| format!("{path} is no terminal"))?;
    cfmakeraw(&mut settings);
    tcsetattr(&port, SetArg::TCSANOW, &settings)
        .with_context(|| format!("Cannot set {path} to raw mode"))?;
    Ok(port)
}

fn append(path: &str, line: &str) {
    let port = OpenOptions::new()
        .write(true)
        .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
        .open(path);
    if let Ok(mut port) = port {
        // Nobody is left to tell when the console itself fails.
        drop(port.write_all(format!("{line}\r\n").as_bytes()));
    }
}

/// Writes a line to the console, in one write so that lines do not mix.
pub(crate) fn tell(line: &str) {
    append(CONSOLE, line);
}

/// Writes a failure to the console and among the heartbeat's lines.
pub(crate) fn tell_failure(line: &str) {
    append(CONSOLE, line);
    append(HEARTBEAT, line);
}

/// Microseconds of CLOCK_MONOTONIC.
pub(crate) fn monotonic_us() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |now| now.tv_sec() as u64 * 1_000_000 + now.tv_nsec() as u64 / 1000)
}
