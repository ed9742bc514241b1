//! PID 1: mounts, modules, programs, reaping, and the command channel on the third serial port.
//!
//! ```text
//! mount -> modules -> start every program -> all of them said ready -> GUEST READY -> commands
//!                                                   └─ one died or refused -> GUEST FAIL
//! ```
//! A command is a line `#<id> <words>`. Its answer is any number of lines `#<id> = <text>` and one
//! line `#<id> . ok` or `#<id> . error`; a client that lost the thread simply uses a new id.
//! Invariant: init ends only when told to power off.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use guest_programs::options::{Request, requests};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::{WaitStatus, wait};

use crate::console::{COMMANDS, monotonic_us, open_raw, tell};

/// Longest wait for a program to be ready: it fills its memory first, up to 12 GiB of it under emulation.
const READY_TIMEOUT: Duration = Duration::from_secs(900);
/// Longest wait for a program's answer: it may fill a gigabyte first, beside other guests.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
const MODULE_LIST: &str = "/lib/modules.list";

struct Program {
    pid: u32,
    commands: ChildStdin,
    lines: Receiver<String>,
}

fn mounts() -> Result<()> {
    let none = None::<&str>;
    for (kind, at) in
        [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")]
    {
        std::fs::create_dir_all(at).with_context(|| format!("Cannot create {at}"))?;
        mount(Some(kind), at, Some(kind), MsFlags::empty(), none)
            .with_context(|| format!("Cannot mount {kind} at {at}"))?;
    }
    Ok(())
}

/// Loads the modules in the order of the list, which is the order of their dependencies.
fn load_modules() -> Result<()> {
    let list = std::fs::read_to_string(MODULE_LIST)
        .with_context(|| format!("Cannot read {MODULE_LIST}"))?;
    for path in list.lines() {
        let file = File::open(path).with_context(|| format!("Cannot open {path}"))?;
        match finit_module(&file, c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => bail!("Cannot load {path}: {error}"),
        }
    }
    Ok(())
}

/// Puts memory of DIMMs that the kernel left offline to use.
fn online_memory() {
    let Ok(blocks) = std::fs::read_dir("/sys/devices/system/memory") else { return };
    for block in blocks.flatten() {
        let state = block.path().join("state");
        if std::fs::read_to_string(&state).is_ok_and(|text| text.trim() == "offline") {
            drop(std::fs::write(&state, "online"));
        }
    }
}

/// `godwit.ip=10.77.0.5/24`: the address of eth0.
fn configure_network(address: &str) -> Result<()> {
    let steps: [&[&str]; 3] = [
        &["ip", "link", "set", "lo", "up"],
        &["ip", "addr", "add", address, "dev", "eth0"],
        &["ip", "link", "set", "eth0", "up"],
    ];
    for words in steps {
        let output = Command::new("/bin/busybox").args(words).stdin(Stdio::null()).output()?;
        if !output.status.success() {
            bail!("{} failed: {}", words.join(" "), String::from_utf8_lossy(&output.stderr));
        }
    }
    Ok(())
}

fn start(request: &Request) -> Result<Program> {
    let mut child: Child = Command::new("/init")
        .args([request.program(), &request.options])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("Cannot start {}", request.instance))?;
    let stdout = child.stdout.take().ok_or_else(|| anyhow!("No pipe from the program"))?;
    let commands = child.stdin.take().ok_or_else(|| anyhow!("No pipe to the program"))?;
    let (sender, lines) = channel();
    std::thread::spawn(move || forward(BufReader::new(stdout), &sender));
    Ok(Program { pid: child.id(), commands, lines })
}

fn forward(reader: BufReader<std::process::ChildStdout>, lines: &Sender<String>) {
    for line in reader.lines().map_while(Result::ok) {
        if lines.send(line).is_err() {
            return;
        }
    }
}

/// Waits for every child for ever, whoever started it, and tells of those that failed.
fn reap(pids: &BTreeMap<u32, String>) {
    loop {
        let (pid, how) = match wait() {
            Ok(WaitStatus::Exited(pid, code)) => (pid, format!("exit code {code}")),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, format!("signal {signal}")),
            Ok(_) => continue,
            Err(_) => {
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if let Some(name) = pids.get(&(pid.as_raw() as u32)) {
            tell(&format!("GUEST DIED {name}: {how}"));
        }
    }
}

fn ask(program: &mut Program, words: &str) -> Result<String> {
    // An answer that came too late for an earlier question must not answer this one.
    while program.lines.try_recv().is_ok() {}
    writeln!(program.commands, "{words}").context("The program is gone")?;
    program.lines.recv_timeout(ANSWER_TIMEOUT).map_err(|error| match error {
        RecvTimeoutError::Timeout => anyhow!("The program did not answer"),
        RecvTimeoutError::Disconnected => anyhow!("The program is gone"),
    })
}

fn shell(script: &str) -> Result<String> {
    // The reaper takes every exit status, also this one: the script reports its own.
    let wrapped = format!("{{ {script}\n}} 2>&1; echo \"exit $?\"");
    let mut child = Command::new("/bin/busybox")
        .args(["sh", "-c", &wrapped])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("Cannot start the shell")?;
    let mut text = String::new();
    if let Some(mut stdout) = child.stdout.take() {
        std::io::Read::read_to_string(&mut stdout, &mut text)?;
    }
    let text = text.trim_end();
    let (body, code) = text.rsplit_once('\n').unwrap_or(("", text));
    if code != "exit 0" {
        bail!("{body}\nThe shell ended with {code}");
    }
    Ok(body.to_owned())
}

fn status(programs: &mut BTreeMap<String, Program>) -> String {
    let mut lines = vec![format!("up_us={}", monotonic_us())];
    for (name, program) in programs {
        let text = match name.split('.').next() {
            Some("heartbeat") => format!("pid {}", program.pid),
            _ => ask(program, "report").unwrap_or_else(|error| format!("error {error:#}")),
        };
        lines.push(format!("{name}: {text}"));
    }
    lines.join("\n")
}

fn execute(programs: &mut BTreeMap<String, Program>, command: &str) -> Result<String> {
    let (word, rest) = command.split_once(' ').unwrap_or((command, ""));
    match word {
        "status" => Ok(status(programs)),
        "echo" => Ok(rest.to_owned()),
        "sh" => shell(rest),
        "poweroff" => {
            tell("GUEST POWEROFF");
            reboot(RebootMode::RB_POWER_OFF).map(|never| match never {})?
        }
        name => match programs.get_mut(name) {
            None => bail!("Neither a program that runs nor status, echo, sh or poweroff: {name}"),
            Some(program) => match ask(program, rest)? {
                answer if answer.starts_with("error ") => bail!("{answer}"),
                answer => Ok(answer),
            },
        },
    }
}

fn serve(mut programs: BTreeMap<String, Program>, port: File) -> Result<Infallible> {
    let mut output = port.try_clone().context("Cannot duplicate the command port")?;
    let mut input = BufReader::new(port);
    let mut line = Vec::new();
    loop {
        line.clear();
        input.read_until(b'\n', &mut line).context("Cannot read commands")?;
        let text = String::from_utf8_lossy(&line);
        let Some((id, command)) =
            text.trim().strip_prefix('#').and_then(|rest| rest.split_once(' '))
        else {
            continue;
        };
        let result = execute(&mut programs, command.trim());
        let (body, end) = match &result {
            Ok(body) => (body.clone(), "ok"),
            Err(error) => (format!("{error:#}"), "error"),
        };
        let mut answer = String::new();
        for line in body.lines() {
            answer.push_str(&format!("#{id} = {line}\n"));
        }
        answer.push_str(&format!("#{id} . {end}\n"));
        output.write_all(answer.as_bytes()).context("Cannot answer a command")?;
    }
}

fn prepare() -> Result<BTreeMap<String, Program>> {
    mounts()?;
    load_modules()?;
    online_memory();
    let cmdline = std::fs::read_to_string("/proc/cmdline").context("Cannot read /proc/cmdline")?;
    let mut wanted = requests(&cmdline);
    if let Some(at) = wanted.iter().position(|request| request.instance == "ip") {
        configure_network(&wanted.remove(at).options)?;
    }
    if !wanted.iter().any(|request| request.instance == "heartbeat") {
        let instance = "heartbeat".to_owned();
        wanted.insert(0, Request { instance, options: String::new() });
    }
    let mut programs = BTreeMap::new();
    for request in &wanted {
        programs.insert(request.instance.clone(), start(request)?);
    }
    let pids = programs.iter().map(|(name, program)| (program.pid, name.clone())).collect();
    std::thread::spawn(move || reap(&pids));
    for (name, program) in &programs {
        let line = program
            .lines
            .recv_timeout(READY_TIMEOUT)
            .with_context(|| format!("{name} did not become ready"))?;
        tell(&format!("GUEST PROGRAM {name}: {line}"));
    }
    Ok(programs)
}

/// Returns only what went wrong.
pub(crate) fn run() -> anyhow::Error {
    let outcome = prepare().and_then(|programs| {
        // Before READY: opening the port discards what has arrived, and hosts speak after READY.
        let port = open_raw(COMMANDS, OFlag::empty())?;
        tell(&format!("GUEST READY {}", monotonic_us()));
        serve(programs, port)
    });
    match outcome {
        Ok(never) => match never {},
        Err(error) => error,
    }
}
