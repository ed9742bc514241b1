//! Paging under load, and what it costs.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use super::*;

/// Threads of the guest roam over memory while one thread serves their faults and another places
/// everything in order: every byte must be right, and no mark of the guest lost.
#[test]
fn everything_arrives_while_the_guest_roams() {
    const PAGES: u64 = 8192;
    let mut guest = Guest::start(&[(Kind::Memfd, PAGES * PAGE)], 4096);
    let (_ram, pager, remote_fd) = start(&guest);
    let jobs: Vec<_> =
        (0..8).map(|thread| guest.begin(&format!("roam 0 0 {thread} 4000"))).collect();
    let all = AtomicBool::new(false);
    let (served, pushed) = std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            let (mut served, mut waiting) = (0, Vec::new());
            while !all.load(SeqCst) {
                poll(&pager, Duration::from_millis(10));
                while pager.read_faults(&mut waiting).unwrap() {}
                for fault in waiting.drain(..) {
                    served += pager.place(fault.page, &content(fault.page.0)).unwrap().placed;
                }
            }
            served
        });
        let pusher = scope.spawn(|| {
            let mut pushed = 0;
            for first in (0..PAGES).step_by(32) {
                let batch = contents(first..first + 32);
                pushed += pager.place(PageIndex(first), &batch).unwrap().placed;
                std::thread::sleep(Duration::from_millis(2));
            }
            all.store(true, SeqCst);
            pushed
        });
        (server.join().unwrap(), pusher.join().unwrap())
    });
    println!("{served} pages placed on a fault, {pushed} in order");
    assert_eq!(served + pushed, PAGES);
    assert!(served > 100, "the guest hardly waited");
    assert_eq!(pager.present().unwrap().len(), PAGES);
    pager.end().unwrap();
    close_descriptor(guest.pid(), remote_fd).unwrap();
    for job in jobs {
        let answer = guest.wait(job);
        assert!(answer.starts_with("0 wrong of "), "{answer}");
    }
}

/// Prints how long a thread waits for a page that the pager has at hand.
#[test]
#[ignore = "a measurement"]
fn figures_of_paging() {
    const PAGES: u64 = 20_000;
    for (what, busy) in [("poll", false), ("no sleep between reads", true)] {
        let mut guest = Guest::start(&[(Kind::Memfd, PAGES * PAGE)], 4096);
        let (_ram, pager, _) = start(&guest);
        let page = content(1);
        let job = guest.begin(&format!("time 0 0 {PAGES} 4096"));
        let (mut left, mut waiting) = (PAGES, Vec::new());
        while left > 0 {
            if !busy {
                poll(&pager, Duration::from_secs(20));
            }
            pager.read_faults(&mut waiting).unwrap();
            for fault in waiting.drain(..) {
                left -= pager.place(fault.page, &page).unwrap().placed;
            }
        }
        let mut waited: Vec<u64> =
            guest.wait(job).split(' ').map(|text| text.parse().unwrap()).collect();
        waited.sort_unstable();
        let at = |share: f64| waited[(waited.len() as f64 * share) as usize] as f64 / 1000.0;
        println!(
            "fault to wake, {what}: {:.1} us p50, {:.1} us p90, {:.1} us p99",
            at(0.5),
            at(0.9),
            at(0.99)
        );
    }
    let guest = Guest::start(&[(Kind::Memfd, 256 * MIB)], 4096);
    let (_ram, pager, _) = start(&guest);
    let batch = contents(0..256);
    let processor = || {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        Duration::try_from(time).unwrap()
    };
    let place_all = || {
        let began = processor();
        for first in (0..65_536).step_by(256) {
            pager.place(PageIndex(first), &batch).unwrap();
        }
        (processor() - began).as_secs_f64() * 1e6 / 256.0
    };
    let (missing, there) = (place_all(), place_all());
    let began = processor();
    let count = pager.present().unwrap().len();
    let asked = (processor() - began).as_secs_f64() * 1e6;
    println!(
        "time on a processor: 1 MiB placed {missing:.0} us, found there {there:.0} us; \
         {count} present pages listed {asked:.0} us"
    );
}
