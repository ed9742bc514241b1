//! System calls made by a thread of another process, without leaving a trace of it.
//!
//! ```text
//!            SEIZE, INTERRUPT              frame written, SETREGS, SETSIGMASK(all)
//!   running ------------------> held ------------------------------------------> prepared
//!      ^                                                                            |
//!      |                      SYSCALL       at entry: INTERRUPT, CONT               v
//!      |                  prepared -------> at the call -----------------> at the result
//!      |  SETSIGMASK(own), SETREGS(own),                                            |
//!      +--- stack put back, DETACH -------------------------------------------------+
//! ```
//!
//! Invariants:
//! - From the moment at which a register differs from what was found, the thread's stack holds a
//!   frame that brings it back without help ([`super::frame`]). If the engine dies anywhere, the
//!   thread goes on; at worst a userfaultfd that nobody uses stays open until the next attach.
//! - No single-stepping: a thread whose tracer dies with the trap flag set is killed by SIGTRAP.
//! - The last stop is one at which the kernel looks for signals afterwards, with the registers as
//!   found: an interrupted call is restarted, or ended by a signal, as if nothing had happened.
//! - Signals that come meanwhile stay pending; one whose delivery stops the thread is delivered.
//! - Every wait is bounded. What cannot be held is let go of by the end of the OS thread.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::time::{Duration, Instant};

use libc::user_regs_struct;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;

use super::frame::{self, Frame, FrameInput};
use super::gadget::Gadgets;
use super::ptrace::{Held, Stop};
use super::seccomp::{self, Call};
use crate::error::{AttachError, ProcError};
use crate::procfs::{self, Mapping};

/// How long a thread may take to stop or to make a call. In uninterruptible sleep it takes longer.
pub(super) const STOP_TIMEOUT: Duration = Duration::from_millis(500);

/// How long a thread whose registers are not its own is waited for before the frame is relied on.
const RESCUE_TIMEOUT: Duration = Duration::from_secs(2);

/// Most stops for other reasons (signals, stops of the whole process) before a thread is given up.
const OTHER_STOPS_MAX: usize = 256;

/// Most seccomp filters that are looked at.
const FILTERS_MAX: usize = 64;

const ALL_SIGNALS: u64 = u64::MAX;

/// Synchronous faults: they would come from the injected code, not from the thread's own.
const FAULTS: [i32; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGTRAP, libc::SIGFPE, libc::SIGSYS];

/// What is found out about a process before any of its threads is stopped.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) pid: i32,
    pub(super) memory: File,
    pub(super) mappings: Vec<Mapping>,
    pub(super) gadgets: Gadgets,
}

impl Target {
    /// Examines a process.
    pub(super) fn examine(pid: i32) -> Result<Self, AttachError> {
        let mappings = procfs::mappings(pid).map_err(|source| AttachError::Proc { pid, source })?;
        let path = format!("/proc/{pid}/mem");
        let memory = File::open(&path).map_err(|source| match source.raw_os_error() {
            Some(libc::EACCES | libc::EPERM) => AttachError::PtraceDenied { pid, source },
            Some(libc::ENOENT | libc::ESRCH) => {
                AttachError::Proc { pid, source: ProcError::Gone { pid } }
            }
            _ => AttachError::Proc {
                pid,
                source: ProcError::Read { path: path.clone().into(), source },
            },
        })?;
        let gadgets = Gadgets::find(pid, &memory, &mappings)?;
        Ok(Self { pid, memory, mappings, gadgets })
    }
}

/// A thread that can make calls.
#[derive(Debug)]
pub(super) struct Session<'a> {
    target: &'a Target,
    held: Held,
    found: user_regs_struct,
    signal_mask: u64,
    frame: Frame,
    /// What was on the stack where the frame is.
    below: Vec<u8>,
    began: Instant,
    /// When it was seen to stand still.
    stopped: Instant,
}

/// For how long a thread was held.
#[derive(Debug, Clone, Copy)]
pub(super) struct HeldFor {
    /// From the request to stop it until it was let go of.
    pub(super) from_request: Duration,
    /// From when it was seen to stand still.
    pub(super) from_stop: Duration,
}

/// Points at which tests let the engine die.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Point {
    Held = 1,
    FrameWritten,
    RegistersChanged,
    SignalsBlocked,
    Resumed,
    AtEntry,
    InCall,
    AtResult,
    BetweenCalls,
    MaskRestored,
    RegistersRestored,
    StackRestored,
}

#[cfg(not(test))]
fn reach(_: Point) {}
#[cfg(test)]
use super::tests::reach;

impl<'a> Session<'a> {
    /// Stops a thread and prepares it. On an error the thread runs on as it was.
    pub(super) fn open(target: &'a Target, tid: i32) -> Result<Self, AttachError> {
        let pid = target.pid;
        let status =
            procfs::status(pid, tid).map_err(|source| AttachError::Proc { pid, source })?;
        if status.tracer_pid != 0 {
            return Err(AttachError::AlreadyTraced { pid, tid, tracer_pid: status.tracer_pid });
        }
        if status.shadow_stack {
            return Err(unsuitable(
                tid,
                "it has a shadow stack, which a changed return would upset",
            ));
        }
        let held = Held::seize(tid).map_err(|source| seize_failed(pid, tid, source))?;
        let began = Instant::now();
        held.interrupt().map_err(|source| ptrace_failed("interrupt", tid, source))?;
        // A thread that does not stop is let go of when this OS thread ends.
        wait_held(&held)?;
        let stopped = Instant::now();
        match Self::prepare(target, &held, status.seccomp) {
            Ok((found, signal_mask, frame, below)) => {
                let session =
                    Self { target, held, found, signal_mask, frame, below, began, stopped };
                match session.change() {
                    Ok(()) => Ok(session),
                    Err(error) => {
                        session.close()?;
                        Err(error)
                    }
                }
            }
            Err(error) => {
                held.detach(0).map_err(|source| ptrace_failed("let go of", tid, source))?;
                Err(error)
            }
        }
    }

    /// Reads the thread's state and writes the frame. Changes nothing that the thread can notice.
    fn prepare(
        target: &Target,
        held: &Held,
        seccomp_mode: u32,
    ) -> Result<(user_regs_struct, u64, Frame, Vec<u8>), AttachError> {
        let tid = held.tid();
        let failed = |what| move |source| ptrace_failed(what, tid, source);
        reach(Point::Held);
        let found = held.registers().map_err(failed("read the registers of"))?;
        let signal_mask = held.signal_mask().map_err(failed("read the signal mask of"))?;
        let extended = held.extended_state().map_err(failed("read the vector state of"))?;
        check_restartable_sequence(held, found.rip)?;
        if seccomp_mode != 0 {
            check_filters(target, held, seccomp_mode)?;
        }
        let stack = procfs::find(&target.mappings, found.rsp)
            .filter(|stack| stack.read && stack.write && !stack.shared && stack.path != "[heap]")
            .ok_or_else(|| {
                unsuitable(tid, "its stack pointer is not in private writable memory")
            })?;
        if !target.gadgets.intact(&target.memory) {
            return Err(unsuitable(tid, "the code that was found in its process is gone"));
        }
        let frame = frame::build(&FrameInput {
            registers: &found,
            signal_mask,
            extended_state: &extended,
            restorer: target.gadgets.restorer,
            stack_start: stack.start,
        })
        .map_err(|reason| AttachError::Unsuitable { tid, reason })?;
        let mut below = vec![0; frame.bytes.len()];
        read_memory(tid, frame.address, &mut below).map_err(failed("read the stack of"))?;
        write_memory(tid, frame.address, &frame.bytes).map_err(failed("write the stack of"))?;
        reach(Point::FrameWritten);
        Ok((found, signal_mask, frame, below))
    }

    /// Registers at the gadget; the call itself is filled in by [`call`](Self::call).
    fn at_gadget(&self, number: i64, arguments: [u64; 3]) -> user_regs_struct {
        let mut registers = self.found;
        registers.rip = self.target.gadgets.call;
        registers.rsp = self.frame.address;
        registers.rax = number as u64;
        // Keeps the kernel's restart logic away from the changed registers.
        registers.orig_rax = u64::MAX;
        registers.eflags &= !frame::FLAG_TRAP;
        [registers.rdi, registers.rsi, registers.rdx] = arguments;
        registers
    }

    /// First registers, then signals: from here on the frame brings both back.
    fn change(&self) -> Result<(), AttachError> {
        let tid = self.held.tid();
        let harmless = self.at_gadget(libc::SYS_getpid, [0; 3]);
        let changed = self.held.set_registers(&harmless);
        changed.map_err(|source| ptrace_failed("set the registers of", tid, source))?;
        reach(Point::RegistersChanged);
        let blocked = self.held.set_signal_mask(ALL_SIGNALS);
        blocked.map_err(|source| ptrace_failed("block the signals of", tid, source))?;
        reach(Point::SignalsBlocked);
        Ok(())
    }

    /// Makes one call; returns what the kernel returned (a negative error number on failure).
    pub(super) fn call(&self, number: i64, arguments: [u64; 3]) -> Result<i64, AttachError> {
        let tid = self.held.tid();
        let failed = |what| move |source| ptrace_failed(what, tid, source);
        let registers = self.at_gadget(number, arguments);
        self.held.set_registers(&registers).map_err(failed("set the registers of"))?;
        self.held.cont_to_syscall(0).map_err(failed("resume"))?;
        reach(Point::Resumed);
        self.wait_for(Stop::Syscall, "make a call")?;
        let entry = self.held.registers().map_err(failed("read the registers of"))?;
        let expected = (number, self.target.gadgets.after_call());
        let ours = (entry.orig_rax as i64, entry.rip) == expected;
        reach(Point::AtEntry);
        // Becomes effective on the way back from the call, before user code runs.
        self.held.interrupt().map_err(failed("interrupt"))?;
        self.held.cont(0).map_err(failed("resume"))?;
        reach(Point::InCall);
        self.wait_for(Stop::Event, "return from a call")?;
        if !ours {
            return Err(unsuitable(tid, "it made another call than the one injected"));
        }
        let result = self.held.registers().map_err(failed("read the registers of"))?;
        if result.rip != self.target.gadgets.after_call() {
            return Err(unsuitable(tid, "it did not return from the injected call"));
        }
        reach(Point::AtResult);
        Ok(result.rax as i64)
    }

    /// Waits for a kind of stop; others are passed on.
    fn wait_for(&self, wanted: Stop, what: &'static str) -> Result<(), AttachError> {
        let tid = self.held.tid();
        let deadline = Instant::now() + STOP_TIMEOUT;
        for _ in 0..OTHER_STOPS_MAX {
            let left = deadline.saturating_duration_since(Instant::now());
            let stop =
                self.held.wait(left).map_err(|source| ptrace_failed("wait for", tid, source))?;
            let signal = match stop {
                Some(stop) if stop == wanted => return Ok(()),
                Some(Stop::Exited) => return Err(AttachError::ThreadExited { tid }),
                Some(Stop::Signal(signal)) if FAULTS.contains(&signal) => {
                    return Err(unsuitable(tid, "the injected call raised a fault"));
                }
                // All but SIGSTOP and SIGKILL are blocked.
                Some(Stop::Signal(signal)) => signal,
                // The whole process is being stopped or continued: this thread goes on, and joins
                // the others when it is let go of.
                Some(Stop::Event | Stop::Syscall) => 0,
                None => return Err(timeout(tid, what)),
            };
            let resumed = self.held.cont_to_syscall(signal);
            resumed.map_err(|source| ptrace_failed("resume", tid, source))?;
        }
        Err(unsuitable(tid, "it was stopped again and again by others"))
    }

    /// Puts everything back and lets go. Returns how long the thread was held.
    pub(super) fn close(self) -> Result<HeldFor, AttachError> {
        let tid = self.held.tid();
        let failed = |what| move |source| ptrace_failed(what, tid, source);
        let now = match self.held.registers() {
            Ok(now) => now,
            // It runs (a wait timed out) or is gone.
            Err(_) => self.stop_again()?,
        };
        if !self.target.gadgets.holds(now.rip) {
            // The frame brought it back before it could be stopped.
            self.held.detach(0).map_err(failed("let go of"))?;
            return Ok(self.held_for());
        }
        reach(Point::BetweenCalls);
        // In this order: the frame is valid until the registers are the thread's own again.
        let result = self.held.set_signal_mask(self.signal_mask);
        result.map_err(failed("restore the signal mask of"))?;
        reach(Point::MaskRestored);
        self.held.set_registers(&self.found).map_err(failed("restore the registers of"))?;
        reach(Point::RegistersRestored);
        let put_back = write_memory(tid, self.frame.address, &self.below);
        reach(Point::StackRestored);
        self.held.detach(0).map_err(failed("let go of"))?;
        let took = self.held_for();
        put_back.map_err(failed("restore the free part of the stack of"))?;
        Ok(took)
    }

    fn held_for(&self) -> HeldFor {
        HeldFor { from_request: self.began.elapsed(), from_stop: self.stopped.elapsed() }
    }

    fn stop_again(&self) -> Result<user_regs_struct, AttachError> {
        let tid = self.held.tid();
        let failed = |what| move |source| ptrace_failed(what, tid, source);
        self.held.interrupt().map_err(|source| match source.raw_os_error() {
            Some(libc::ESRCH) => AttachError::ThreadExited { tid },
            _ => ptrace_failed("interrupt", tid, source),
        })?;
        let deadline = Instant::now() + RESCUE_TIMEOUT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.held.wait(left).map_err(failed("wait for"))? {
                Some(Stop::Event) => return self.held.registers().map_err(failed("read")),
                Some(Stop::Exited) => return Err(AttachError::ThreadExited { tid }),
                Some(Stop::Signal(signal)) => self.held.cont(signal).map_err(failed("resume"))?,
                Some(Stop::Syscall) => self.held.cont(0).map_err(failed("resume"))?,
                None => return Err(timeout(tid, "stop again")),
            }
        }
    }
}

/// Waits until an interrupted thread stands still; signals that come first are delivered.
fn wait_held(held: &Held) -> Result<(), AttachError> {
    let tid = held.tid();
    let deadline = Instant::now() + STOP_TIMEOUT;
    for _ in 0..OTHER_STOPS_MAX {
        let left = deadline.saturating_duration_since(Instant::now());
        let stop = held.wait(left).map_err(|source| ptrace_failed("wait for", tid, source))?;
        let signal = match stop {
            Some(Stop::Event) => return Ok(()),
            Some(Stop::Exited) => return Err(AttachError::ThreadExited { tid }),
            Some(Stop::Signal(signal)) => signal,
            Some(Stop::Syscall) => 0,
            None => return Err(timeout(tid, "stop")),
        };
        held.cont(signal).map_err(|source| ptrace_failed("resume", tid, source))?;
    }
    Err(unsuitable(tid, "signals kept it from stopping"))
}

/// A restartable sequence must not be left and entered again in its middle: the kernel, which would
/// restart it, cannot know. Source: include/uapi/linux/rseq.h.
fn check_restartable_sequence(held: &Held, rip: u64) -> Result<(), AttachError> {
    let tid = held.tid();
    let word = |address: u64| -> io::Result<u64> {
        let mut bytes = [0; 8];
        read_memory(tid, address, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    };
    let Some(rseq) = held.rseq_address() else { return Ok(()) };
    let inside = (|| {
        let sequence = word(rseq + 8)?;
        if sequence == 0 {
            return Ok(false);
        }
        let (start, length) = (word(sequence + 8)?, word(sequence + 16)?);
        io::Result::Ok(rip.wrapping_sub(start) < length)
    })();
    match inside {
        Ok(false) => Ok(()),
        Ok(true) => Err(unsuitable(tid, "it is inside a restartable sequence")),
        Err(_) => Err(unsuitable(tid, "its restartable sequence cannot be read")),
    }
}

fn check_filters(target: &Target, held: &Held, mode: u32) -> Result<(), AttachError> {
    let refused = |call, action: &str| AttachError::Seccomp {
        pid: target.pid,
        call,
        action: action.to_owned(),
    };
    if mode != 2 {
        return Err(refused("userfaultfd", "strict mode: only read and write"));
    }
    let mut filters = Vec::new();
    for index in 0..FILTERS_MAX {
        match held.seccomp_filter(index) {
            Ok(Some(filter)) => filters.push(filter),
            Ok(None) => break,
            Err(_) => {
                return Err(refused(
                    "userfaultfd",
                    "unknown: reading the filter needs CAP_SYS_ADMIN and CONFIG_CHECKPOINT_RESTORE",
                ));
            }
        }
    }
    let address = target.gadgets.after_call();
    let calls = [
        ("userfaultfd", libc::SYS_userfaultfd),
        ("close", libc::SYS_close),
        ("rt_sigreturn", libc::SYS_rt_sigreturn),
    ];
    for (name, number) in calls {
        let call = Call { number, address, arguments: [0; 6] };
        let action = seccomp::verdict(&filters, &call);
        if !action.lets_through() {
            return Err(refused(name, &format!("{action:?}")));
        }
    }
    Ok(())
}

/// Reads memory of a thread's process, respecting its protections (unlike /proc/PID/mem).
fn read_memory(tid: i32, address: u64, buffer: &mut [u8]) -> io::Result<()> {
    let remote = remote(address, buffer.len())?;
    let wanted = buffer.len();
    let count = process_vm_readv(Pid::from_raw(tid), &mut [IoSliceMut::new(buffer)], &[remote])?;
    complete(count, wanted)
}

/// Writes memory of a thread's process, respecting its protections.
fn write_memory(tid: i32, address: u64, bytes: &[u8]) -> io::Result<()> {
    let remote = remote(address, bytes.len())?;
    let count = process_vm_writev(Pid::from_raw(tid), &[IoSlice::new(bytes)], &[remote])?;
    complete(count, bytes.len())
}

fn remote(address: u64, len: usize) -> io::Result<RemoteIoVec> {
    let base = usize::try_from(address).map_err(io::Error::other)?;
    Ok(RemoteIoVec { base, len })
}

fn complete(count: usize, wanted: usize) -> io::Result<()> {
    if count == wanted { Ok(()) } else { Err(io::Error::from(io::ErrorKind::UnexpectedEof)) }
}

fn unsuitable(tid: i32, reason: &str) -> AttachError {
    AttachError::Unsuitable { tid, reason: reason.to_owned() }
}

fn timeout(tid: i32, what: &'static str) -> AttachError {
    let timeout_ms = u64::try_from(STOP_TIMEOUT.as_millis()).unwrap_or(u64::MAX);
    AttachError::Timeout { tid, what, timeout_ms }
}

fn ptrace_failed(what: &'static str, tid: i32, source: io::Error) -> AttachError {
    match source.raw_os_error() {
        // A thread that was killed cannot be asked anything.
        Some(libc::ESRCH) => AttachError::ThreadExited { tid },
        _ => AttachError::Ptrace { what, tid, source },
    }
}

fn seize_failed(pid: i32, tid: i32, source: io::Error) -> AttachError {
    match source.raw_os_error() {
        Some(libc::ESRCH) => AttachError::ThreadExited { tid },
        Some(libc::EPERM) => match procfs::status(pid, tid) {
            Ok(status) if status.tracer_pid != 0 => {
                AttachError::AlreadyTraced { pid, tid, tracer_pid: status.tracer_pid }
            }
            // A thread that has ended but was not reaped cannot be seized either.
            Ok(_) if matches!(procfs::thread_state(pid, tid), Ok('Z' | 'X')) => {
                AttachError::ThreadExited { tid }
            }
            Err(ProcError::Gone { .. }) => AttachError::ThreadExited { tid },
            _ => AttachError::PtraceDenied { pid, source },
        },
        _ => AttachError::Ptrace { what: "seize", tid, source },
    }
}
