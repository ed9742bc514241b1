//! Tests on real processes: nothing of the target may change, whatever happens to the engine.

mod kill;
pub(crate) mod target;

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use super::inject::Point;
use super::*;
use crate::check::Severity;
use crate::uffd::{Features, handshake};
use target::TargetProcess;

/// The point at which this process kills itself; 0 is nowhere.
static DIE_AT: AtomicU32 = AtomicU32::new(0);
/// How often that point is passed before.
static PASSES: AtomicU32 = AtomicU32::new(0);

/// Called by the code under test at every [`Point`].
pub(super) fn reach(point: Point) {
    if DIE_AT.load(SeqCst) == point as u32 && PASSES.fetch_sub(1, SeqCst) == 0 {
        let own = rustix::process::getpid();
        let _ = rustix::process::kill_process(own, rustix::process::Signal::KILL);
        // The signal may take a moment when another thread handles it.
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}

fn userfaultfds(pid: i32) -> usize {
    let links = procfs::descriptors(pid).unwrap().into_iter();
    links
        .filter_map(|fd| std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok())
        .filter(|target| target.as_os_str() == "anon_inode:[userfaultfd]")
        .count()
}

fn assert_not_held(pid: i32) {
    for tid in procfs::threads(pid).unwrap() {
        let Ok(status) = procfs::status(pid, tid) else { continue };
        assert_eq!(status.tracer_pid, 0, "thread {tid} is still traced");
        let state = procfs::thread_state(pid, tid).unwrap_or('X');
        assert!(!matches!(state, 't' | 'T'), "thread {tid} is stopped ({state})");
    }
}

fn pseudo_random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Injects into threads in every state, including threads about to end.
#[test]
fn hundreds_of_injections_disturb_nothing() {
    let mut process = TargetProcess::start();
    process.wait_for_progress();
    let pid = process.pid();
    let identity = Identity::of(pid).unwrap();
    let descriptors = procfs::descriptors(pid).unwrap().len();
    let (mut seed, mut done, mut longest) = (0x1234_5678_9abc_def1, 0u32, 0);
    let mut times = Vec::new();
    let began = Instant::now();
    while done < 800 && began.elapsed() < Duration::from_secs(60) {
        let target = Target::examine(pid).unwrap();
        let threads = procfs::threads(pid).unwrap();
        let at = usize::try_from(pseudo_random(&mut seed)).unwrap() % threads.len();
        let work = Work::Create { keep_remote: false, left_over: Vec::new() };
        match on_thread(&identity, &target, threads[at], &work) {
            Ok((fd, report)) => {
                handshake(fd.unwrap(), Features::TRACKING).unwrap();
                assert_eq!(report.remote_fd, None);
                longest = longest.max(report.stopped_us);
                times.push(report.stopped_us);
                done += 1;
            }
            Err(error) => assert!(error.another_thread_may_do(), "{error:?}"),
        }
    }
    times.sort_unstable();
    let median = times[times.len() / 2];
    println!("{done} injections, thread held {median} us (median), {longest} us (longest)");
    assert_eq!(done, 800);
    assert_not_held(pid);
    process.wait_for_progress();
    assert_eq!(userfaultfds(pid), 0);
    assert!(procfs::descriptors(pid).unwrap().len() <= descriptors + 1);
    assert_eq!(process.end(), (0, String::new()));
}

#[test]
fn a_kept_descriptor_can_be_taken_again_and_closed() {
    let process = TargetProcess::start();
    let pid = process.pid();
    let attached = userfaultfd(pid, None, CloseRemote::No).unwrap();
    let Way::Injection(report) = attached.way else { panic!("{:?}", attached.way) };
    let remote_fd = report.remote_fd.unwrap();
    assert_eq!(userfaultfds(pid), 1);
    handshake(&attached.uffd, Features::TRACKING).unwrap();
    drop(attached.uffd);
    let again = take_descriptor(pid, remote_fd).unwrap();
    // It is the same object: the handshake was done already.
    assert!(handshake(&again, Features::TRACKING).is_err());
    close_descriptor(pid, remote_fd).unwrap();
    assert_eq!(userfaultfds(pid), 0);
    assert!(matches!(close_descriptor(pid, remote_fd), Err(AttachError::TakeOver { .. })));
    assert!(matches!(take_descriptor(pid, 0), Err(AttachError::TakeOver { .. })));
    assert_eq!(process.end(), (0, String::new()));
}

#[test]
fn a_stopped_process_stays_stopped() {
    let mut process = TargetProcess::start();
    let pid = process.pid();
    let number = rustix::process::Pid::from_raw(pid).unwrap();
    for _ in 0..20 {
        rustix::process::kill_process(number, rustix::process::Signal::STOP).unwrap();
        let all_stopped = || {
            let threads = procfs::threads(pid).unwrap();
            threads.iter().all(|tid| procfs::thread_state(pid, *tid).is_ok_and(|s| s == 'T'))
        };
        wait_until(all_stopped);
        let (fd, _) = userfaultfd_by_injection(pid, false).unwrap();
        handshake(fd, Features::TRACKING).unwrap();
        wait_until(all_stopped);
        rustix::process::kill_process(number, rustix::process::Signal::CONT).unwrap();
        process.wait_for_progress();
    }
    assert_eq!(userfaultfds(pid), 0);
    // Being stopped is no disturbance of ours, but it ends relative sleeps late, never early.
    assert_eq!(process.end(), (0, String::new()));
}

/// SIGSTOP and SIGCONT cannot be blocked: they come in the middle of an injection.
#[test]
fn stops_and_continues_during_injections() {
    let mut process = TargetProcess::start();
    let pid = process.pid();
    let number = rustix::process::Pid::from_raw(pid).unwrap();
    let end = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let ended = std::sync::Arc::clone(&end);
    let stopper = std::thread::spawn(move || {
        use rustix::process::Signal;
        while !ended.load(SeqCst) {
            for signal in [Signal::STOP, Signal::CONT] {
                let _ = rustix::process::kill_process(number, signal);
                std::thread::sleep(Duration::from_micros(300));
            }
        }
    });
    for _ in 0..200 {
        let (fd, _) = userfaultfd_by_injection(pid, false).unwrap();
        handshake(fd, Features::TRACKING).unwrap();
    }
    end.store(true, SeqCst);
    stopper.join().unwrap();
    rustix::process::kill_process(number, rustix::process::Signal::CONT).unwrap();
    wait_until(|| {
        let threads = procfs::threads(pid).unwrap();
        !threads.iter().any(|tid| matches!(procfs::thread_state(pid, *tid), Ok('t' | 'T')))
    });
    process.wait_for_progress();
    assert_eq!(userfaultfds(pid), 0);
    assert_eq!(process.end(), (0, String::new()));
}

fn wait_until(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_debugger_is_named() {
    let process = TargetProcess::start();
    let pid = process.pid();
    let threads = procfs::threads(pid).unwrap();
    // Another process seizes all threads and waits.
    let mut tracer = target::role("tracer", "attach::tests::role_tracer");
    tracer.env("GODWIT_TEST_PID", pid.to_string());
    let mut tracer = tracer.spawn().unwrap();
    wait_until(|| {
        threads.iter().any(|tid| procfs::status(pid, *tid).is_ok_and(|s| s.tracer_pid != 0))
    });
    wait_until(|| {
        procfs::threads(pid)
            .unwrap()
            .iter()
            .all(|tid| procfs::status(pid, *tid).map_or(true, |status| status.tracer_pid != 0))
            || matches!(
                userfaultfd_by_injection(pid, false),
                Err(AttachError::AlreadyTraced { .. })
            )
    });
    let findings = probe(pid);
    assert!(findings.iter().any(|f| f.severity == Severity::Blocker && f.what.contains("traced")));
    let result = on_thread(
        &Identity::of(pid).unwrap(),
        &Target::examine(pid).unwrap(),
        pid,
        &Work::Create { keep_remote: false, left_over: Vec::new() },
    );
    let tracer_pid = i32::try_from(tracer.id()).unwrap();
    let Err(AttachError::AlreadyTraced { tracer_pid: found, .. }) = result else {
        panic!("{result:?}")
    };
    assert_eq!(found, tracer_pid);
    tracer.kill().unwrap();
    tracer.wait().unwrap();
    wait_until(|| userfaultfd_by_injection(pid, false).is_ok());
    assert_eq!(process.end(), (0, String::new()));
}

/// Not a test: seizes all threads of a process and waits.
#[test]
#[ignore = "the debugger process of another test"]
fn role_tracer() {
    if std::env::var(target::ROLE).as_deref() != Ok("tracer") {
        return;
    }
    let pid: i32 = std::env::var("GODWIT_TEST_PID").unwrap().parse().unwrap();
    let threads = procfs::threads(pid).unwrap().into_iter();
    let held: Vec<_> = threads.filter_map(|tid| ptrace::Held::seize(tid).ok()).collect();
    assert!(!held.is_empty());
    std::thread::sleep(Duration::from_secs(60));
}

/// A filter that would kill the process is asked first; one that allows the call is no obstacle.
#[test]
fn seccomp_filters_are_asked_first() {
    for (role, allowed) in [("filtered-kill", false), ("filtered-allow", true)] {
        let mut command = target::role(role, "attach::tests::target::role_filtered");
        let mut child = command.spawn().unwrap();
        let mut lines = io::BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.starts_with("TARGET: ready") {
            line.clear();
            assert_ne!(io::BufRead::read_line(&mut lines, &mut line).unwrap(), 0);
        }
        let result = userfaultfd_by_injection(i32::try_from(child.id()).unwrap(), false);
        match result {
            Ok(_) => assert!(allowed),
            Err(AttachError::Seccomp { call: "userfaultfd", action, .. }) => {
                assert!(!allowed && action == "KillProcess");
            }
            Err(other) => panic!("{role}: {other:?}"),
        }
        // It lives, and ends in peace when its input does.
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success(), "{role}");
    }
}

#[test]
fn a_process_that_ends_or_never_was_is_an_error() {
    let mut child = Command::new("sleep").arg("60").spawn().unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    // Until libc is mapped, the code that is needed is not there.
    wait_until(|| userfaultfd_by_injection(pid, false).is_ok());
    child.kill().unwrap();
    let result = userfaultfd_by_injection(pid, false);
    assert!(result.is_err(), "{result:?}");
    child.wait().unwrap();
    let result = userfaultfd_by_injection(pid, false);
    assert!(matches!(result, Err(AttachError::Proc { .. })), "{result:?}");
    assert!(userfaultfd_by_injection(-5, false).is_err());
    assert!(userfaultfd_by_injection(0, false).is_err());
}

#[test]
fn probing_finds_nothing_against_a_child_and_says_so_of_a_dead_one() {
    let process = TargetProcess::start();
    let findings = probe(process.pid());
    for finding in &findings {
        println!("{finding}");
        assert_ne!(finding.severity, Severity::Blocker, "{finding}");
    }
    assert_eq!(process.end(), (0, String::new()));
    let findings = probe(i32::MAX);
    assert!(findings.iter().any(|finding| finding.severity == Severity::Blocker));
}

#[test]
fn a_single_thread_blocked_in_each_call_goes_on() {
    for (program, arguments) in [
        ("sleep", vec!["1.5"]),
        ("timeout", vec!["1.5", "sleep", "10"]),
        ("sh", vec!["-c", "sleep 1.2; exit 7"]),
    ] {
        let began = Instant::now();
        let mut child = Command::new(program).args(&arguments).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        for _ in 0..50 {
            userfaultfd_by_injection(pid, false).unwrap();
        }
        let code = child.wait().unwrap().code();
        let expected = match program {
            "sleep" => 0,
            "timeout" => 124,
            _ => 7,
        };
        assert_eq!(code, Some(expected), "{program}");
        assert!(began.elapsed() >= Duration::from_millis(1200), "{program} ended early");
    }
}
