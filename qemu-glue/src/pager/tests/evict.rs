//! Pages that are taken away from a process which goes on using them.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use super::*;

fn start_evicting(guest: &Guest) -> (GuestRam, Pager, i32) {
    let ram = GuestRam::open(guest.pid(), &guest.regions, true).unwrap();
    let (uffd, remote_fd) = attach(guest);
    let pager = Pager::start(guest.pid(), uffd, &ram, Duty::Evict).unwrap();
    (ram, pager, remote_fd)
}

fn write_to_protected(page: u64) -> Fault {
    Fault { is_write: true, is_protected: true, ..read(page) }
}

#[test]
fn a_writer_waits_for_protected_pages_and_a_reader_does_not() {
    let mut guest = Guest::start(&[(Kind::Memfd, MIB)], 4096);
    guest.order("store 0 8192 7");
    let (_ram, pager, _) = start_evicting(&guest);
    pager.place(PageIndex(3), &content(3)).unwrap();
    pager.protect(PageIndex(2), 2).unwrap();
    assert_eq!(guest.order("sum 0 12288 4096"), sum(&content(3)));
    let writer = guest.begin("store 0 12288 9");
    assert_eq!(faults(&pager, 1), [write_to_protected(3)]);
    assert!(guest.is_held(writer));
    pager.unprotect(PageIndex(2), 2).unwrap();
    guest.wait(writer);
    guest.order("store 0 8192 9");
    assert!(none(&pager));
}

#[test]
fn an_evicted_page_is_missing_and_comes_back_protected_or_not() {
    let mut guest = Guest::start(&[(Kind::Memfd, MIB)], 4096);
    let (ram, pager, _) = start_evicting(&guest);
    pager.place(PageIndex(5), &content(5)).unwrap();
    pager.protect(PageIndex(5), 1).unwrap();
    // Waits for the protection when the page goes away.
    let writer = guest.begin("store 0 20480 9");
    assert_eq!(faults(&pager, 1), [write_to_protected(5)]);
    let mut copy = vec![0; PAGE_BYTES];
    ram.read(PageIndex(5), &mut copy).unwrap();
    assert_eq!(copy, content(5));
    pager.evict(PageIndex(5), 1).unwrap();
    assert!(pager.present().unwrap().is_empty());
    pager.wake(PageIndex(5), 1).unwrap();
    let missing = Fault { is_write: true, ..read(5) };
    assert_eq!(faults(&pager, 1), [missing]);
    // Comes back protected: the write is told once more, and nothing was written meanwhile.
    assert_eq!(pager.place_protected(PageIndex(5), &copy).unwrap(), placed(1, 0));
    assert_eq!(faults(&pager, 1), [write_to_protected(5)]);
    ram.read(PageIndex(5), &mut copy).unwrap();
    assert_eq!(copy, content(5));
    pager.unprotect(PageIndex(5), 1).unwrap();
    guest.wait(writer);
    // Protected, evicted and placed without protection, it is none of what it was.
    pager.protect(PageIndex(5), 1).unwrap();
    pager.evict(PageIndex(5), 1).unwrap();
    pager.place(PageIndex(5), &copy).unwrap();
    guest.order("store 0 20480 1");
    assert!(none(&pager));
}

#[test]
fn the_kernel_writes_for_the_process_to_protected_pages_as_to_missing_ones() {
    let mut guest = Guest::start(&[(Kind::Memfd, MIB)], 4096);
    let (_ram, pager, _) = start_evicting(&guest);
    pager.place(PageIndex(1), &content(1)).unwrap();
    pager.protect(PageIndex(1), 1).unwrap();
    let job = guest.begin("kernel-writes 0 4096 4096");
    assert_eq!(faults(&pager, 1), [write_to_protected(1)]);
    assert!(guest.is_held(job));
    pager.unprotect(PageIndex(1), 1).unwrap();
    assert_eq!(guest.wait(job), "Ok(4096)");
}

#[test]
fn large_pages_are_refused_with_the_remedy() {
    let _alone = HUGE_POOL.lock();
    let Some(pool) = HugePages::get(1) else { return };
    let (_file, path) = pool.file(2 * MIB);
    let guest = Guest::start(&[(Kind::File { path, offset: 0 }, 2 * MIB)], 2 * MIB);
    let ram = GuestRam::open(guest.pid(), &guest.regions, true).unwrap();
    let error = Pager::start(guest.pid(), attach(&guest).0, &ram, Duty::Evict).unwrap_err();
    assert!(error.to_string().contains("hugetlb=on"), "{error}");
    assert_eq!(error.bin(), ErrorBin::CallerMisuse);
}

/// What became of pages.
#[derive(Default)]
struct Away {
    /// Evicted, with their contents.
    contents: HashMap<u64, Vec<u8>>,
    /// Being evicted.
    leaving: HashMap<u64, Vec<u8>>,
    cancelled: u64,
    fetched: u64,
}

/// Threads of the guest roam over memory of which pages are taken away all the time.
#[test]
fn no_write_is_lost_while_pages_come_and_go() {
    const PAGES: u64 = 2048;
    let mut guest = Guest::start(&[(Kind::Memfd, PAGES * PAGE)], 4096);
    let (ram, pager, remote_fd) = start_evicting(&guest);
    for page in 0..PAGES {
        pager.place(PageIndex(page), &content(page)).unwrap();
    }
    let jobs: Vec<_> =
        (0..6).map(|thread| guest.begin(&format!("roam 0 0 {thread} 6000"))).collect();
    let (away, over) = (Mutex::new(Away::default()), AtomicBool::new(false));
    let evicted = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut waiting = Vec::new();
            while !over.load(SeqCst) {
                poll(&pager, Duration::from_millis(5));
                while pager.read_faults(&mut waiting).unwrap() {}
                for fault in waiting.drain(..) {
                    serve(&pager, &mut away.lock().unwrap(), fault);
                }
            }
        });
        let evictor = scope.spawn(|| evict(&pager, &ram, &away, &over, PAGES));
        let answers: Vec<_> = jobs.into_iter().map(|job| guest.wait(job)).collect();
        over.store(true, SeqCst);
        for answer in answers {
            assert!(answer.starts_with("0 wrong of "), "{answer}");
        }
        evictor.join().unwrap()
    });
    let away = away.into_inner().unwrap();
    println!("{evicted} pages evicted, {} fetched, {} kept", away.fetched, away.cancelled);
    assert!(evicted > 1000 && away.fetched > 1000 && away.cancelled > 10);
    pager.end().unwrap();
    close_descriptor(guest.pid(), remote_fd).unwrap();
}

fn serve(pager: &Pager, away: &mut Away, fault: Fault) {
    let page = fault.page.0;
    if fault.is_protected {
        away.cancelled += u64::from(away.leaving.remove(&page).is_some());
        match away.contents.contains_key(&page) {
            true => pager.wake(fault.page, 1).unwrap(),
            false => pager.unprotect(fault.page, 1).unwrap(),
        }
        return;
    }
    match away.contents.remove(&page) {
        Some(content) => away.fetched += pager.place(fault.page, &content).unwrap().placed,
        // Was placed since.
        None => pager.wake(fault.page, 1).unwrap(),
    }
}

fn evict(pager: &Pager, ram: &GuestRam, away: &Mutex<Away>, over: &AtomicBool, pages: u64) -> u64 {
    let (mut evicted, mut at) = (0, 0);
    while !over.load(SeqCst) {
        // Walks through memory in steps that do not repeat soon.
        let victims: Vec<u64> = (0..16).map(|step| (at + step * 131) % pages).collect();
        at += 17;
        for &page in &victims {
            let mut away = away.lock().unwrap();
            if away.contents.contains_key(&page) {
                continue;
            }
            pager.protect(PageIndex(page), 1).unwrap();
            let mut copy = vec![0; PAGE_BYTES];
            ram.read(PageIndex(page), &mut copy).unwrap();
            away.leaving.insert(page, copy);
        }
        std::thread::sleep(Duration::from_micros(300));
        for &page in &victims {
            let mut away = away.lock().unwrap();
            if let Some(copy) = away.leaving.remove(&page) {
                pager.evict(PageIndex(page), 1).unwrap();
                away.contents.insert(page, copy);
                pager.wake(PageIndex(page), 1).unwrap();
                evicted += 1;
            }
        }
    }
    evicted
}
