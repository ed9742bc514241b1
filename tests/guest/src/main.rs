//! The programs inside the test guest, in one static binary that runs as PID 1.
//!
//! ```text
//! init (PID 1) ── ttyS0 console: GUEST READY, CHECKER FAIL ...
//!   │          ── ttyS2 commands: "#7 writer stop" -> "#7 = ..." -> "#7 . ok"
//!   ├─ heartbeat ── ttyS1: HB <sequence> <guest monotonic us> <nonce>
//!   ├─ writer     dirties memory at a rate
//!   ├─ checker    owns memory and verifies every byte of it
//!   ├─ diskread   reads /dev/vda with O_DIRECT and verifies every block
//!   ├─ freed      fills page cache and frees it again
//!   ├─ load       takes processor time, memory and network of its host as it is told
//!   ├─ worker     works on memory in phases that are measured, and verifies it
//!   └─ app        drives one of Debian's programs, if the initramfs has them
//! ```
//! A program is a process of its own: it prints `ready ...` as its first line on stdout, then reads
//! commands from stdin and answers each with one line.

mod app;
mod checker;
mod console;
mod content;
mod diskread;
mod freed;
mod heartbeat;
mod init;
mod load;
mod memory;
mod shell;
mod worker;
mod writer;

use std::process::ExitCode;

use anyhow::{Result, bail};
use guest_programs::options::Options;

fn run(program: &str, options: &str) -> Result<()> {
    let options = Options::parse(options)?;
    match program {
        "heartbeat" => heartbeat::run(options),
        "writer" => writer::run(options),
        "checker" => checker::run(options),
        "diskread" => diskread::run(options),
        "freed" => freed::run(options),
        "load" => load::run(options),
        "worker" => worker::run(options),
        "app" => app::run(options),
        other => {
            bail!(
                "Unknown program {other}; there are heartbeat, writer, checker, diskread, freed, load, worker, app"
            )
        }
    }
}

fn main() -> ExitCode {
    if std::process::id() == 1 {
        let error = init::run();
        // PID 1 must not return: the kernel would panic with a less useful text.
        console::tell(&format!("GUEST FAIL init: {error:#}"));
        loop {
            std::thread::park();
        }
    }
    let words: Vec<String> = std::env::args().collect();
    let [_, program, rest @ ..] = words.as_slice() else {
        eprintln!("Usage: guest-programs PROGRAM [OPTIONS]");
        return ExitCode::from(2);
    };
    match run(program, rest.first().map_or("", String::as_str)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            console::tell(&format!("GUEST FAIL {program}: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
