//! ptrace(2) as this crate uses it: one held thread, every wait bounded in time.
//!
//! Invariant: all requests for one thread come from the OS thread that seized it. When that thread
//! ends, the kernel lets go of everything that it held.
//!
//! Source: ptrace(2), kernel/ptrace.c, include/uapi/linux/ptrace.h.
#![expect(unsafe_code, reason = "ptrace and waitid on threads take raw pointers and numbers")]

use std::ffi::c_void;
use std::io;
use std::ptr;
use std::time::{Duration, Instant};

use libc::{c_int, c_long, c_uint, user_regs_struct};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Longest extended state that is read: XCR0 with all features defined today needs about 11 KiB.
pub(super) const XSTATE_BYTES_MAX: usize = 32 << 10;

/// Instructions of the longest seccomp filter (include/uapi/linux/filter.h: BPF_MAXINSNS).
const FILTER_INSTRUCTIONS_MAX: usize = 4096;

const NT_X86_XSTATE: usize = 0x202;
const PTRACE_SECCOMP_GET_FILTER: c_uint = 0x420c;
const PTRACE_GET_RSEQ_CONFIGURATION: c_uint = 0x420f;
const PTRACE_EVENT_STOP: c_int = 128;

/// For how long a wait burns its processor before it lets others run: a stop takes 5-30 us, unless
/// the thread that is waited for needs this very processor.
const SPIN: Duration = Duration::from_micros(20);

/// How long a wait sleeps between two looks after that.
const NAP: Duration = Duration::from_micros(20);

/// Why a held thread stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// As asked for with [`Held::interrupt`], or because the whole process was stopped.
    Event,
    /// At the entry or the exit of a system call.
    Syscall,
    /// A signal is about to be delivered.
    Signal(c_int),
    /// The thread ended.
    Exited,
}

/// A thread that this OS thread has seized. Dropping it does not let go of it: only
/// [`detach`](Self::detach) or the end of the OS thread does.
#[derive(Debug)]
pub(super) struct Held {
    tid: i32,
}

/// `struct ptrace_rseq_configuration`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct RseqConfiguration {
    abi_pointer: u64,
    abi_bytes: u32,
    signature: u32,
    flags: u32,
    padding: u32,
}

fn request(request: c_uint, tid: i32, addr: usize, data: usize) -> io::Result<c_long> {
    // SAFETY: callers pass in `addr` and `data` what the request takes: plain numbers, or pointers
    // to memory of theirs that is large enough and outlives the call. No request used here returns
    // its result through the return value's -1.
    let result = unsafe {
        libc::ptrace(request, tid, ptr::without_provenance_mut::<c_void>(addr), data as *mut c_void)
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

impl Held {
    /// Seizes a thread. It runs on until it is interrupted.
    pub(super) fn seize(tid: i32) -> io::Result<Self> {
        // TRACESYSGOOD is for the case that the tracer dies while the thread is at a system call:
        // without it the kernel would then send the thread a SIGTRAP.
        let options = usize::try_from(libc::PTRACE_O_TRACESYSGOOD).unwrap_or(0);
        request(libc::PTRACE_SEIZE, tid, 0, options)?;
        Ok(Self { tid })
    }

    pub(super) fn tid(&self) -> i32 {
        self.tid
    }

    /// Asks for a stop. Of a thread inside a system call the stop comes when that is over.
    pub(super) fn interrupt(&self) -> io::Result<()> {
        request(libc::PTRACE_INTERRUPT, self.tid, 0, 0).map(drop)
    }

    /// Lets the thread run, delivering `signal` if it is not 0.
    pub(super) fn cont(&self, signal: c_int) -> io::Result<()> {
        request(libc::PTRACE_CONT, self.tid, 0, signal_data(signal)).map(drop)
    }

    /// Lets the thread run to the next entry or exit of a system call.
    pub(super) fn cont_to_syscall(&self, signal: c_int) -> io::Result<()> {
        request(libc::PTRACE_SYSCALL, self.tid, 0, signal_data(signal)).map(drop)
    }

    /// Lets go of a stopped thread, delivering `signal` if it is not 0.
    pub(super) fn detach(&self, signal: c_int) -> io::Result<()> {
        request(libc::PTRACE_DETACH, self.tid, 0, signal_data(signal)).map(drop)
    }

    pub(super) fn registers(&self) -> io::Result<user_regs_struct> {
        let mut registers = super::cpu::zero_registers();
        request(libc::PTRACE_GETREGS, self.tid, 0, ptr::from_mut(&mut registers) as usize)?;
        Ok(registers)
    }

    pub(super) fn set_registers(&self, registers: &user_regs_struct) -> io::Result<()> {
        request(libc::PTRACE_SETREGS, self.tid, 0, ptr::from_ref(registers) as usize).map(drop)
    }

    /// The blocked signals; in a call that blocks others for its duration (ppoll), those that will
    /// be blocked again afterwards.
    pub(super) fn signal_mask(&self) -> io::Result<u64> {
        let mut mask = 0u64;
        let data = ptr::from_mut(&mut mask) as usize;
        request(libc::PTRACE_GETSIGMASK, self.tid, size_of::<u64>(), data)?;
        Ok(mask)
    }

    pub(super) fn set_signal_mask(&self, mask: u64) -> io::Result<()> {
        let data = ptr::from_ref(&mask) as usize;
        request(libc::PTRACE_SETSIGMASK, self.tid, size_of::<u64>(), data).map(drop)
    }

    /// Floating point and vector registers in the layout of the XSAVE instruction's standard form.
    pub(super) fn extended_state(&self) -> io::Result<Vec<u8>> {
        let mut state = vec![0u8; XSTATE_BYTES_MAX];
        let mut iovec = libc::iovec { iov_base: state.as_mut_ptr().cast(), iov_len: state.len() };
        let data = ptr::from_mut(&mut iovec) as usize;
        request(libc::PTRACE_GETREGSET, self.tid, NT_X86_XSTATE, data)?;
        state.truncate(iovec.iov_len);
        Ok(state)
    }

    /// Address of the thread's `struct rseq`; nothing if it has none or the kernel cannot tell.
    pub(super) fn rseq_address(&self) -> Option<u64> {
        let mut found = RseqConfiguration::default();
        let (size, data) = (size_of::<RseqConfiguration>(), ptr::from_mut(&mut found) as usize);
        request(PTRACE_GET_RSEQ_CONFIGURATION, self.tid, size, data).ok()?;
        (found.abi_pointer != 0).then_some(found.abi_pointer)
    }

    /// The thread's seccomp filter number `index`, counted from the last installed; nothing behind
    /// the first one. CAP_SYS_ADMIN and a kernel with CONFIG_CHECKPOINT_RESTORE are needed.
    pub(super) fn seccomp_filter(
        &self,
        index: usize,
    ) -> io::Result<Option<Vec<libc::sock_filter>>> {
        let empty = libc::sock_filter { code: 0, jt: 0, jf: 0, k: 0 };
        let mut filter = vec![empty; FILTER_INSTRUCTIONS_MAX];
        let data = filter.as_mut_ptr() as usize;
        match request(PTRACE_SECCOMP_GET_FILTER, self.tid, index, data) {
            Ok(count) => {
                filter.truncate(usize::try_from(count).unwrap_or(0));
                Ok(Some(filter))
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The stop that the thread has come to, if any. An end is seen, but left for the parent of the
    /// process to collect, which may be this process.
    fn look(&self) -> io::Result<Option<Stop>> {
        let result = match wait_id(self.tid, libc::WSTOPPED) {
            Ok(None) => wait_id(self.tid, libc::WEXITED | libc::WNOWAIT),
            other => other,
        };
        match result {
            Ok(None) => Ok(None),
            Ok(Some((libc::CLD_TRAPPED | libc::CLD_STOPPED, status))) => Ok(Some(decode(status))),
            Ok(Some(_)) => Ok(Some(Stop::Exited)),
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR) => Ok(None),
                Some(libc::ECHILD) => Ok(Some(Stop::Exited)),
                _ => Err(error),
            },
        }
    }

    /// Waits for the next stop, at most `timeout`; nothing if there was none.
    pub(super) fn wait(&self, timeout: Duration) -> io::Result<Option<Stop>> {
        let began = Instant::now();
        loop {
            if let Some(stop) = self.look()? {
                return Ok(Some(stop));
            }
            let waited = began.elapsed();
            if waited > timeout {
                return Ok(None);
            }
            if waited < SPIN {
                std::hint::spin_loop();
            } else {
                std::thread::sleep(NAP);
            }
        }
    }
}

fn signal_data(signal: c_int) -> usize {
    usize::try_from(signal).unwrap_or(0)
}

/// `status` is the low half of what the kernel calls the exit code: signal and event.
fn decode(status: c_int) -> Stop {
    if status >> 8 == PTRACE_EVENT_STOP {
        Stop::Event
    } else if status == libc::SIGTRAP | 0x80 {
        Stop::Syscall
    } else {
        Stop::Signal(status & 0x7f)
    }
}

/// waitid(2) for one thread that this OS thread traces; returns code and status if there is news.
fn wait_id(tid: i32, options: c_int) -> io::Result<Option<(c_int, c_int)>> {
    let Ok(id) = libc::id_t::try_from(tid) else { return Ok(None) };
    let options = options | libc::WNOHANG | libc::__WALL | libc::__WNOTHREAD;
    // SAFETY: the structure is a union of integers, for which zero is a value; its fields for a
    // child are read only after the kernel has filled them in.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        if libc::waitid(libc::P_PID, id, &raw mut info, options) == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok((info.si_pid() != 0).then(|| (info.si_code, info.si_status())))
    }
}

/// Makes the calling thread fit for holding another: no signals, exact naps, before all others
/// where that is allowed, and not on the processor that the other one needs.
pub(super) fn prepare_own_thread(processor_of_other: Option<usize>) {
    let processor = processor_of_other.filter(|number| *number < CpuSet::MAX_CPU);
    if let (Some(processor), Ok(mut set)) = (processor, sched_getaffinity(None)) {
        set.unset(processor);
        // With one processor only, or none allowed besides, this fails and changes nothing.
        let _ = sched_setaffinity(None, &set);
    }
    let set_slack = libc::PR_SET_TIMERSLACK;
    // SAFETY: plain numbers; naps get as short as asked for instead of 50 us longer.
    unsafe { libc::prctl(set_slack, 1, 0, 0, 0) };
    let priority = libc::sched_param { sched_priority: 1 };
    // SAFETY: a structure of this frame; 0 is the calling thread. Without CAP_SYS_NICE it fails and
    // changes nothing; the priority ends with the thread.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority) };
    let mut set = nix::sys::signal::SigSet::all();
    set.remove(nix::sys::signal::Signal::SIGSEGV);
    set.remove(nix::sys::signal::Signal::SIGBUS);
    // Failing would only mean that a handler of the engine may run here.
    let _ = set.thread_block();
}

const _: () = assert!(size_of::<user_regs_struct>() == 27 * 8);
const _: () = assert!(size_of::<RseqConfiguration>() == 24);
