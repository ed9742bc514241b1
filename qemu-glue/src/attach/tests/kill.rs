//! The engine dies by SIGKILL at every point of an injection: the target goes on undisturbed.

use std::time::Duration;

use super::target::{self, ROLE, TargetProcess};
use super::*;

const POINT: &str = "GODWIT_TEST_POINT";
const PASS: &str = "GODWIT_TEST_PASSES";
const PID: &str = "GODWIT_TEST_PID";
const POINTS: u32 = Point::StackRestored as u32;

/// Not a test: injects without end, until it dies at the point named.
#[test]
#[ignore = "the injecting process of other tests"]
fn role_injector() {
    if std::env::var(ROLE).as_deref() != Ok("injector") {
        return;
    }
    let number = |name| std::env::var(name).unwrap().parse::<u32>().unwrap();
    let pid = i32::try_from(number(PID)).unwrap();
    PASSES.store(number(PASS), SeqCst);
    DIE_AT.store(number(POINT), SeqCst);
    let identity = Identity::of(pid).unwrap();
    let target = Target::examine(pid).unwrap();
    let mut seed = u64::from(std::process::id()) << 20 | 1;
    println!("\nINJECTOR: ready");
    loop {
        let threads = procfs::threads(pid).unwrap();
        let at = usize::try_from(pseudo_random(&mut seed)).unwrap() % threads.len();
        let work = Work::Create { keep_remote: false, left_over: Vec::new() };
        match on_thread(&identity, &target, threads[at], &work) {
            Ok(_) => {}
            Err(error) => assert!(error.another_thread_may_do(), "{error:?}"),
        }
    }
}

fn injector(pid: i32, point: u32, passes: u32) -> std::process::Child {
    let mut command = target::role("injector", "attach::tests::kill::role_injector");
    command.env(PID, pid.to_string()).env(POINT, point.to_string());
    command.env(PASS, passes.to_string()).stderr(std::process::Stdio::inherit());
    command.spawn().unwrap()
}

fn check_after(process: &mut TargetProcess) {
    let pid = process.pid();
    // The kernel lets go while the dead process is being taken apart.
    wait_until(|| {
        procfs::threads(pid)
            .unwrap()
            .iter()
            .all(|tid| procfs::status(pid, *tid).map_or(true, |status| status.tracer_pid == 0))
    });
    assert_not_held(pid);
    process.wait_for_progress();
}

fn finish(process: TargetProcess, deaths: u32) {
    let pid = process.pid();
    let left = userfaultfds(pid);
    let (_, report) = userfaultfd_by_injection(pid, false).unwrap();
    assert_eq!(report.left_over_closed, left);
    assert_eq!(userfaultfds(pid), 0);
    let (short_sleeps, violations) = process.end();
    println!(
        "{deaths} deaths, {left} descriptors left and closed, {short_sleeps} sleeps cut short"
    );
    assert_eq!(violations, "");
    assert!(short_sleeps <= u64::from(deaths));
}

#[test]
fn death_at_every_point() {
    let mut process = TargetProcess::start();
    process.wait_for_progress();
    let mut deaths = 0;
    for round in 0..14 {
        for point in 1..=POINTS {
            let mut child = injector(process.pid(), point, round % 3);
            let status = child.wait().unwrap();
            let signal = std::os::unix::process::ExitStatusExt::signal(&status);
            assert_eq!(signal, Some(9), "point {point}");
            deaths += 1;
            check_after(&mut process);
        }
    }
    finish(process, deaths);
}

#[test]
fn death_at_random_moments() {
    let mut process = TargetProcess::start();
    process.wait_for_progress();
    let mut seed = 0xfeed_f00d_1234_5671;
    let deaths = 200;
    for _ in 0..deaths {
        let mut child = injector(process.pid(), 0, 0);
        let mut lines = io::BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.starts_with("INJECTOR: ready") {
            line.clear();
            assert_ne!(io::BufRead::read_line(&mut lines, &mut line).unwrap(), 0);
        }
        std::thread::sleep(Duration::from_micros(pseudo_random(&mut seed) % 3_000));
        child.kill().unwrap();
        child.wait().unwrap();
        check_after(&mut process);
    }
    finish(process, deaths);
}
