//! A process whose threads notice every disturbance: the target of the injection tests.
//!
//! The test binary starts itself again with a role in the environment; the "test" that plays the
//! role is ignored in ordinary runs and returns at once without it.
#![expect(unsafe_code, reason = "raw system calls, signal handlers and register checks")]

use std::arch::asm;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

pub(crate) const ROLE: &str = "GODWIT_TEST_ROLE";

/// What each kind of thread counted; index by the constants below.
static PROGRESS: [AtomicU64; 9] = [const { AtomicU64::new(0) }; 9];
static VIOLATIONS: Mutex<Vec<String>> = Mutex::new(Vec::new());
static STOP: AtomicBool = AtomicBool::new(false);
/// Relative sleeps that ended early: allowed only where engines are killed.
static SHORT_SLEEPS: AtomicU64 = AtomicU64::new(0);
/// Signals handled and sent, per receiving thread.
static HANDLED: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];
static SENT: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];
/// Whether the receivers may end: one that ends takes its pending signals with it.
static DRAINED: AtomicBool = AtomicBool::new(false);
static RECEIVERS: [AtomicI32; 3] = [const { AtomicI32::new(0) }; 3];

const SPIN: usize = 0;
const SLEEP: usize = 1;
const PIPE: usize = 2;
const POLL: usize = 3;
const CONDITION: usize = 4;
const SPAWN: usize = 5;
const SIGNALS: usize = 6;

fn violation(text: String) {
    let mut list = VIOLATIONS.lock().unwrap();
    if list.len() < 20 {
        list.push(text);
    }
}

fn running() -> bool {
    !STOP.load(SeqCst)
}

fn progress(kind: usize) {
    PROGRESS[kind].fetch_add(1, SeqCst);
}

/// The signal mask must always be what the thread set itself.
fn check_mask(expected: u64, who: &str) {
    let mut mask = 0u64;
    let size = size_of::<u64>();
    // SAFETY: the kernel's signal set is 8 bytes.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, 0, 0, &raw mut mask, size) };
    if mask != expected {
        violation(format!("{who}: signal mask {mask:#x}, expected {expected:#x}"));
    }
}

fn signal(number: usize) -> i32 {
    libc::SIGRTMIN() + 1 + i32::try_from(number).unwrap()
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

fn set_mask(mask: u64) {
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const mask, 0, 8) };
}

const WORDS: usize = 32 * 8 + 16;

/// Loads every register that user code has, loops, and stores them again. Returns what came out:
/// 32 vectors of 64 bytes, r8-r15, flags, MXCSR, an x87 number and the red zone's sum.
fn spin_round(input: &[u64; WORDS], rounds: u64, wide: bool) -> [u64; WORDS] {
    let mut output = [0u64; WORDS];
    let (source, target) = (input.as_ptr(), output.as_mut_ptr());
    macro_rules! round {
        ($load:expr, $store:expr) => {
            // SAFETY: reads WORDS words behind `source`, writes as many behind `target`; all
            // registers that are changed are named; the red zone is free, as the compiler must
            // expect pushes here.
            unsafe {
                asm!(
                    $load,
                    "sub rsp, 16", "mov dword ptr [rsp], 0x7f80", "ldmxcsr dword ptr [rsp]",
                    "fldpi", "add rsp, 16",
                    "mov r8, [rsi + 2048]", "mov r9, [rsi + 2056]", "mov r10, [rsi + 2064]",
                    "mov r11, [rsi + 2072]", "mov r12, [rsi + 2080]", "mov r13, [rsi + 2088]",
                    "mov r14, [rsi + 2096]", "mov r15, [rsi + 2104]",
                    "mov [rsp - 8], r8", "mov [rsp - 64], r9", "mov [rsp - 128], r10",
                    "stc",
                    "2:", "lea rcx, [rcx - 1]", "jrcxz 3f", "jmp 2b", "3:",
                    "setc byte ptr [rdi + 2112]",
                    "mov [rdi + 2048], r8", "mov [rdi + 2056], r9", "mov [rdi + 2064], r10",
                    "mov [rdi + 2072], r11", "mov [rdi + 2080], r12", "mov [rdi + 2088], r13",
                    "mov [rdi + 2096], r14", "mov [rdi + 2104], r15",
                    "mov rax, [rsp - 8]", "add rax, [rsp - 64]", "add rax, [rsp - 128]",
                    "mov [rdi + 2136], rax",
                    "fstp qword ptr [rdi + 2128]", "stmxcsr dword ptr [rdi + 2120]",
                    "sub rsp, 16", "mov dword ptr [rsp], 0x1f80", "ldmxcsr dword ptr [rsp]",
                    "add rsp, 16",
                    $store,
                    in("rsi") source, in("rdi") target, inout("rcx") rounds => _,
                    out("rax") _, out("r12") _, out("r13") _, out("r14") _, out("r15") _,
                    clobber_abi("sysv64"),
                );
            }
        };
    }
    if wide {
        round!(
            concat!(
                ".irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,",
                "16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n",
                "vmovdqu64 zmm\\r, [rsi + \\r*64]\n.endr"
            ),
            concat!(
                ".irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,",
                "16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n",
                "vmovdqu64 [rdi + \\r*64], zmm\\r\n.endr\nvzeroupper"
            )
        );
    } else {
        round!(
            ".irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\nmovdqu xmm\\r, [rsi + \\r*64]\n.endr",
            ".irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\nmovdqu [rdi + \\r*64], xmm\\r\n.endr"
        );
    }
    output
}

fn spin(mask: u64) {
    let wide = is_x86_feature_detected!("avx512f");
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    while running() {
        let mut input = [0u64; WORDS];
        for word in &mut input {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *word = seed;
        }
        // In half of the rounds the upper parts are in their initial state.
        let wide = wide && seed & 1 << 40 != 0;
        let output = spin_round(&input, 200_000, wide);
        for vector in 0..if wide { 32 } else { 16 } {
            let words = if wide { 8 } else { 2 };
            let range = vector * 8..vector * 8 + words;
            if input[range.clone()] != output[range] {
                violation(format!("vector register {vector} changed"));
            }
        }
        if input[256..264] != output[256..264] {
            violation("a general register changed".into());
        }
        let red_zone = input[256].wrapping_add(input[257]).wrapping_add(input[258]);
        if output[264] != 1 || output[265] != 0x7f80 || output[267] != red_zone {
            violation(format!("flags, MXCSR or red zone changed: {:x?}", &output[264..]));
        }
        if f64::from_bits(output[266]) != std::f64::consts::PI {
            violation("an x87 register changed".into());
        }
        check_mask(mask, "spin");
        progress(SPIN);
    }
}

fn sleep_exactly(mask: u64) {
    while running() {
        let began = Instant::now();
        let time = libc::timespec { tv_sec: 0, tv_nsec: 3_000_000 };
        // SAFETY: a timespec of this frame.
        let result = unsafe { libc::nanosleep(&raw const time, std::ptr::null_mut()) };
        if result != 0 {
            SHORT_SLEEPS.fetch_add(1, SeqCst);
        } else if began.elapsed() < Duration::from_millis(3) {
            violation(format!(
                "nanosleep was {:?} short",
                Duration::from_millis(3) - began.elapsed()
            ));
        }
        check_mask(mask, "sleep");
        progress(SLEEP);
    }
}

/// Numbers through a pipe, read byte-exactly by a blocking read.
fn pipes(mask: u64) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    std::thread::spawn(move || {
        for number in 0u64.. {
            if !running() || writer.write_all(&number.to_le_bytes()).is_err() {
                return;
            }
            if number % 8 == 0 {
                std::thread::sleep(Duration::from_micros(700));
            }
        }
    });
    let fd = std::os::fd::AsRawFd::as_raw_fd(&reader);
    for expected in 0u64.. {
        let mut bytes = [0u8; 8];
        // SAFETY: a buffer of this frame.
        let count = unsafe { libc::read(fd, bytes.as_mut_ptr().cast(), 8) };
        if count == 0 {
            return;
        }
        if count != 8 || u64::from_le_bytes(bytes) != expected {
            let error = std::io::Error::last_os_error();
            violation(format!("read: {count}, {bytes:?}, expected {expected} ({error})"));
            return;
        }
        check_mask(mask, "pipe");
        progress(PIPE);
    }
}

/// ppoll with a timeout and nothing to wait for: must end by the timeout alone.
fn polls(mask: u64) {
    while running() {
        let began = Instant::now();
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 2_000_000 };
        let all = u64::MAX;
        // SAFETY: structures of this frame; the kernel's signal set is 8 bytes. The raw call
        // changes `time`, which is this thread's own.
        let result = unsafe {
            libc::syscall(libc::SYS_ppoll, 0usize, 0usize, &raw mut time, &raw const all, 8)
        };
        if result != 0 || began.elapsed() < Duration::from_millis(2) {
            let error = std::io::Error::last_os_error();
            violation(format!("ppoll: {result} ({error}) after {:?}", began.elapsed()));
        }
        check_mask(mask, "poll");
        progress(POLL);
    }
}

fn conditions(mask: u64) {
    let shared = Arc::new((Mutex::new(0u64), Condvar::new()));
    let other = Arc::clone(&shared);
    let ping = std::thread::spawn(move || {
        let (number, changed) = &*other;
        // The last change comes after the end was noticed, so that nobody waits in vain.
        loop {
            let mut number = number.lock().unwrap();
            *number += 1;
            changed.notify_all();
            if !running() {
                break;
            }
            let (_number, _) = changed.wait_timeout(number, Duration::from_millis(2)).unwrap();
        }
    });
    let never = (Mutex::new(()), Condvar::new());
    while running() {
        let (number, changed) = &*shared;
        let now = *number.lock().unwrap();
        let limit = Duration::from_secs(5);
        let (guard, result) =
            changed.wait_timeout_while(number.lock().unwrap(), limit, |new| *new == now).unwrap();
        drop(guard);
        if result.timed_out() && running() {
            violation("a wake-up was lost".into());
        }
        changed.notify_all();
        let began = Instant::now();
        let limit = Duration::from_millis(1);
        let (_guard, result) = never.1.wait_timeout(never.0.lock().unwrap(), limit).unwrap();
        // Spurious wake-ups are allowed, early time-outs are not.
        if result.timed_out() && began.elapsed() < limit {
            violation("a futex wait timed out early".into());
        }
        check_mask(mask, "condition");
        progress(CONDITION);
    }
    ping.join().unwrap();
}

fn spawns() {
    while running() {
        let threads: Vec<_> = (0..4).map(|_| std::thread::spawn(|| progress(SPAWN))).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}

extern "C" fn count(signal: i32) {
    let number = usize::try_from(signal - libc::SIGRTMIN() - 1).unwrap_or(0);
    HANDLED[number].fetch_add(1, SeqCst);
}

/// Three receivers: in user code, in ppoll that alone lets the signal in, in a blocking read.
fn receiver(number: usize, base: u64) {
    // SAFETY: no arguments.
    let tid = unsafe { libc::syscall(libc::SYS_gettid) };
    let own = bit(signal(number));
    let mask = if number == 1 { base } else { base & !own };
    set_mask(mask);
    RECEIVERS[number].store(i32::try_from(tid).unwrap(), SeqCst);
    let (reader, _writer) = std::io::pipe().unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&reader);
    while !DRAINED.load(SeqCst) {
        let before = HANDLED[number].load(SeqCst);
        let result = match number {
            0 => {
                for _ in 0..10_000 {
                    std::hint::spin_loop();
                }
                0
            }
            1 => {
                let inside = base & !own;
                let (fds, time) = (0usize, 0usize);
                // SAFETY: the kernel's signal set is 8 bytes; no descriptors, no timeout.
                unsafe { libc::syscall(libc::SYS_ppoll, fds, 0, time, &raw const inside, 8) }
            }
            _ => {
                let mut byte = 0u8;
                // SAFETY: one byte of this frame.
                unsafe { libc::read(fd, (&raw mut byte).cast(), 1) as i64 }
            }
        };
        if number != 0 {
            let error = std::io::Error::last_os_error().raw_os_error();
            if result != -1 || error != Some(libc::EINTR) {
                violation(format!("receiver {number}: {result}, {error:?}"));
            } else if HANDLED[number].load(SeqCst) == before {
                violation(format!("receiver {number}: EINTR without a signal"));
            }
        }
        check_mask(mask, "receiver");
        progress(SIGNALS);
    }
}

/// Sends queued signals, at most 32 ahead of their handling.
fn sender() {
    let pid = i32::try_from(std::process::id()).unwrap();
    while running() {
        for number in 0..RECEIVERS.len() {
            let tid = RECEIVERS[number].load(SeqCst);
            let (sent, handled) = (SENT[number].load(SeqCst), HANDLED[number].load(SeqCst));
            if tid == 0 || sent.saturating_sub(handled) >= 32 {
                continue;
            }
            // Counted first: the handler may run before the call returns.
            SENT[number].fetch_add(1, SeqCst);
            // SAFETY: plain numbers.
            let result = unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal(number)) };
            if result != 0 {
                SENT[number].fetch_sub(1, SeqCst);
            }
        }
        std::thread::sleep(Duration::from_micros(150));
    }
}

/// What is pending and blocked in a thread of this process, as the kernel says.
fn signals_of(tid: i32) -> String {
    let status = std::fs::read_to_string(format!("/proc/self/task/{tid}/status"));
    let status = status.unwrap_or_else(|error| error.to_string());
    let lines = status.lines().filter(|line| line.starts_with("Sig") || line.starts_with("State"));
    lines.collect::<Vec<_>>().join(", ")
}

/// Lets the receivers handle what is pending and return from their calls.
fn drain() {
    let pid = i32::try_from(std::process::id()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    let pending = |n: usize| SENT[n].load(SeqCst) != HANDLED[n].load(SeqCst);
    while (0..3).any(pending) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    for number in 0..3 {
        let (sent, handled) = (SENT[number].load(SeqCst), HANDLED[number].load(SeqCst));
        if sent != handled {
            violation(format!(
                "signals to receiver {number}: {sent} sent, {handled} handled; {}",
                signals_of(RECEIVERS[number].load(SeqCst))
            ));
        }
        if handled == 0 {
            violation(format!("receiver {number} never got a signal"));
        }
    }
    DRAINED.store(true, SeqCst);
    for (number, tid) in RECEIVERS.iter().enumerate() {
        let tid = tid.load(SeqCst);
        // SAFETY: plain numbers. Wakes the receiver so that it sees that it may end.
        unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal(number)) };
    }
}

fn serve() {
    let all_ours = (0..3).map(|number| bit(signal(number))).fold(0, |a, b| a | b);
    for number in 0..3 {
        // SAFETY: an empty action with a handler that touches only an atomic; no SA_RESTART.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = count as *const () as usize;
            libc::sigaction(signal(number), &raw const action, std::ptr::null_mut());
        }
    }
    set_mask(all_ours);
    let mut threads = Vec::new();
    for work in [spin, sleep_exactly, pipes, polls, conditions] {
        threads.push(std::thread::spawn(move || work(all_ours)));
    }
    threads.push(std::thread::spawn(spawns));
    for number in 0..3 {
        threads.push(std::thread::spawn(move || receiver(number, all_ours)));
    }
    let sender = std::thread::spawn(sender);
    // All of it is under way: a short test on a busy machine may be over before a signal comes.
    while HANDLED.iter().any(|handled| handled.load(SeqCst) == 0) {
        std::thread::sleep(Duration::from_millis(1));
    }
    println!("\nTARGET: ready");
    for line in std::io::stdin().lines() {
        if line.unwrap() == "end" {
            break;
        }
        let counts = PROGRESS.each_ref().map(|count| count.load(SeqCst).to_string());
        println!("\nTARGET: {}", counts.join(" "));
    }
    STOP.store(true, SeqCst);
    sender.join().unwrap();
    drain();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let found = VIOLATIONS.lock().unwrap().join("; ");
    println!("\nTARGET: {} {found}", SHORT_SLEEPS.load(SeqCst));
}

/// Not a test: what the started process does.
#[test]
#[ignore = "the target process of other tests"]
fn role_target() {
    if std::env::var(ROLE).as_deref() == Ok("target") {
        serve();
    }
}

/// Not a test: forbids itself userfaultfd, or nothing, and waits.
#[test]
#[ignore = "the process with a seccomp filter of another test"]
fn role_filtered() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let action = match role.as_str() {
        "filtered-kill" => libc::SECCOMP_RET_KILL_PROCESS,
        "filtered-allow" => libc::SECCOMP_RET_ALLOW,
        _ => return,
    };
    let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut filter = [
        op(0x20, 0, 0, 0),
        op(0x15, 0, 1, u32::try_from(libc::SYS_userfaultfd).unwrap()),
        op(0x06, 0, 0, action),
        op(0x06, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
    // SAFETY: plain numbers, and a program of this frame that the kernel copies.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let (call, mode) = (libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER);
        let all_threads = libc::SECCOMP_FILTER_FLAG_TSYNC;
        assert_eq!(libc::syscall(call, mode, all_threads, &raw const program), 0);
    }
    println!("\nTARGET: ready");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
}

/// This test binary again, in a role.
pub(crate) fn role(name: &str, test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"]);
    command.env(ROLE, name).stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// The target process as the tests see it. Dropping it kills it.
#[derive(Debug)]
pub(super) struct TargetProcess {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl TargetProcess {
    pub(super) fn start() -> Self {
        let mut child = role("target", "attach::tests::target::role_target").spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let mut process = Self { child, lines };
        assert_eq!(process.answer(), "ready");
        process
    }

    pub(super) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    fn answer(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.lines.read_line(&mut line).unwrap(), 0, "the target process died");
            if let Some(answer) = line.strip_prefix("TARGET: ") {
                return answer.trim().to_owned();
            }
        }
    }

    fn send(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// Progress of each kind of thread.
    pub(super) fn progress(&mut self) -> Vec<u64> {
        self.send("?");
        self.answer().split(' ').map(|count| count.parse().unwrap()).collect()
    }

    /// Waits until every kind of thread has gone on since `before`.
    pub(super) fn wait_for_progress(&mut self) {
        let before = self.progress();
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let now = self.progress();
            if (0..=SIGNALS).all(|kind| now[kind] > before[kind]) {
                return;
            }
            assert!(Instant::now() < deadline, "a thread stands still: {before:?} {now:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends the process; returns relative sleeps that ended early, and what else was noticed.
    pub(super) fn end(mut self) -> (u64, String) {
        self.send("end");
        let answer = self.answer();
        let (short, rest) = answer.split_once(' ').unwrap_or((&answer, ""));
        let result = (short.parse().unwrap(), rest.to_owned());
        assert!(self.child.wait().unwrap().success());
        result
    }
}

impl Drop for TargetProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
