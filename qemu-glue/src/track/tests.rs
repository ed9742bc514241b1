//! Tests of dirty tracking on a child process, on huge pages and on a running QEMU.

use std::collections::BTreeSet;
use std::process::{Child, Command, Stdio};

use migrate_core::layout::PageIndex;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::*;
use crate::attach::{CloseRemote, Way, userfaultfd};
use crate::procfs;
use crate::ram::tests::{HUGE_POOL, HugePages, Kind, Writer, tmpfs_file};

const MIB: u64 = 1 << 20;

fn track(child: &Writer) -> (GuestRam, DirtyTracker) {
    let ram = GuestRam::open(child.pid(), &child.regions, true).unwrap();
    let attached = userfaultfd(child.pid(), None, CloseRemote::Yes).unwrap();
    let tracker = DirtyTracker::arm(child.pid(), attached.uffd, &ram).unwrap();
    (ram, tracker)
}

fn scan(tracker: &mut DirtyTracker) -> Vec<u64> {
    let mut dirty = PageSet::new(tracker.pages());
    let report = tracker.scan(&mut dirty).unwrap();
    assert_eq!(report.pages, dirty.len());
    dirty.iter().collect()
}

#[derive(Debug, Clone)]
enum Op {
    Write { block: usize, page: u64 },
    Read { block: usize, page: u64 },
    Punch { block: usize, page: u64, pages: u64 },
    Scan,
    Peek,
}

fn op() -> impl Strategy<Value = Op> {
    let (block, page) = (0usize..3, 0u64..256);
    prop_oneof![
        8 => (block.clone(), page.clone()).prop_map(|(block, page)| Op::Write { block, page }),
        2 => (block.clone(), page.clone()).prop_map(|(block, page)| Op::Read { block, page }),
        1 => (block, page, 1u64..5).prop_map(|(block, page, pages)| Op::Punch { block, page, pages }),
        1 => Just(Op::Scan),
        1 => Just(Op::Peek),
    ]
}

/// Pages of the third block lie so far apart that few share a page table.
const APART: u64 = 130;

/// Where a page of a block lies in it, in bytes.
fn place(block: usize, page: u64) -> u64 {
    page * 4096 * if block == SPARSE { APART } else { 1 }
}

const SPARSE: usize = 2;

/// Random lists of operations against a model: what was written is reported, once.
#[test]
fn scans_report_what_was_written() {
    let (_file, path) = tmpfs_file(2 * MIB);
    let blocks = [
        (Kind::Memfd, MIB),
        (Kind::File { path, offset: MIB / 2 }, MIB),
        // Nothing is there when tracking begins.
        (Kind::Memfd, 256 * APART * 4096),
    ];
    let number = |block: usize, page| block as u64 * 256 + place(block, page) / 4096;
    let mut child = Writer::start(&blocks, 4096);
    // Part of the pages exist before tracking begins, and the second block is three mappings.
    for page in (0..256).step_by(3) {
        child.write(0, page * 4096, 1);
        child.write(1, page * 4096, 1);
    }
    child.order(&format!("split 1 {} {}", 64 * 4096, 64 * 4096));
    let (_ram, tracker) = track(&child);
    let tracker = std::cell::RefCell::new(tracker);
    let child = std::cell::RefCell::new(child);
    let config = Config { cases: 60, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new(config);
    let lists = prop::collection::vec(op(), 1..80);
    runner
        .run(&lists, |ops| {
            let (mut tracker, mut child) = (tracker.borrow_mut(), child.borrow_mut());
            scan(&mut tracker);
            let (mut must, mut may) = (BTreeSet::new(), BTreeSet::new());
            for op in ops.into_iter().chain([Op::Scan]) {
                match op {
                    Op::Write { block, page } => {
                        child.write(block, place(block, page), 7);
                        must.insert(number(block, page));
                    }
                    Op::Read { block, page } => {
                        child.order(&format!("read {block} {}", place(block, page)));
                        if block == SPARSE {
                            // Where nothing was protected it came into being as if it was written.
                            may.insert(number(block, page));
                        }
                    }
                    Op::Punch { block, page, pages } => {
                        let pages = if block == SPARSE { 1 } else { pages.min(256 - page) };
                        let at = place(block, page);
                        child.order(&format!("punch {block} {at} {}", pages * 4096));
                        // Reported if a page was there; a hole that stays one need not be.
                        let punched = (page..page + pages).map(|page| number(block, page));
                        if block == SPARSE {
                            // Nor one that came and went where nothing was protected.
                            must.retain(|page| !punched.clone().any(|punched| punched == *page));
                        }
                        may.extend(punched);
                    }
                    Op::Scan | Op::Peek => {
                        let mut dirty = PageSet::new(tracker.pages());
                        let rearm = matches!(op, Op::Scan);
                        let report =
                            if rearm { tracker.scan(&mut dirty) } else { tracker.peek(&mut dirty) };
                        prop_assert_eq!(report.unwrap().pages, dirty.len());
                        let found: BTreeSet<u64> = dirty.iter().collect();
                        prop_assert!(must.is_subset(&found), "{:?} not in {:?}", must, found);
                        let all: BTreeSet<u64> = must.union(&may).copied().collect();
                        prop_assert!(found.is_subset(&all), "{:?} beyond {:?}", found, all);
                        if rearm {
                            must.clear();
                            may.clear();
                        }
                    }
                }
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn untouched_holes_stay_holes_and_punched_pages_are_found() {
    let mut child = Writer::start(&[(Kind::Memfd, 4 * MIB)], 4096);
    for page in 0..10 {
        child.write(0, page * 4096, 3);
    }
    let (ram, mut tracker) = track(&child);
    assert_eq!(scan(&mut tracker), [0u64; 0]);
    // Arming and scanning fill nothing.
    assert_eq!(ram.resident_bytes().unwrap(), 10 * 4096);
    let known = ram.data_ranges().unwrap();
    // Page 1 was written before it is punched, 2 and 3 are clean: the kernel reports page 1 alone.
    child.write(0, 4096, 4);
    child.order("punch 0 4096 12288");
    assert_eq!(scan(&mut tracker), [1]);
    let mut vanished = PageSet::new(tracker.pages());
    assert_eq!(ram.vanished(&known, &mut vanished).unwrap(), 3);
    assert_eq!(vanished.iter().collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(ram.resident_bytes().unwrap(), 7 * 4096);
    child.write(0, 1000 * 4096, 1);
    child.write(0, 2 * 4096, 1);
    assert_eq!(scan(&mut tracker), [2, 1000]);
    assert_eq!(scan(&mut tracker), [0u64; 0]);
    // A set of another size is refused before anything is marked clean.
    child.write(0, 0, 1);
    let result = tracker.scan(&mut PageSet::new(7));
    assert!(matches!(result, Err(TrackError::WrongSet { found: 7, expected: 1024 })), "{result:?}");
    assert_eq!(scan(&mut tracker), [0]);
}

/// KiB that the process's page tables take.
fn page_tables_kib(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPTE:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Memory without data is not protected, and found all the same as soon as there is some.
#[test]
fn stretches_without_data_take_no_page_tables() {
    const STRETCH: u64 = 2 * MIB;
    let mut child = Writer::start(&[(Kind::Memfd, 4096 * MIB)], 4096);
    child.write(0, 5 * STRETCH, 1);
    let before_kib = page_tables_kib(child.pid());
    let (ram, mut tracker) = track(&child);
    assert_eq!(scan(&mut tracker), [0u64; 0]);
    // All of it would be 8 MiB.
    assert!(page_tables_kib(child.pid()) < before_kib + 64);
    // A page that came into being is found, the holes around it are not reported.
    let pages = |stretch: u64, page: u64| stretch * 512 + page;
    child.write(0, 700 * STRETCH + 8192, 1);
    let mut seen = PageSet::new(tracker.pages());
    assert_eq!(tracker.peek(&mut seen).unwrap().pages, 1);
    assert_eq!(scan(&mut tracker), [pages(700, 2)]);
    assert_eq!(scan(&mut tracker), [0u64; 0]);
    // From now on this stretch is like any other.
    child.write(0, 700 * STRETCH + 8192, 2);
    child.write(0, 701 * STRETCH - 4096, 2);
    child.write(0, 701 * STRETCH, 2);
    child.order(&format!("read 0 {}", 700 * STRETCH + 4096));
    assert_eq!(scan(&mut tracker), [pages(700, 2), pages(700, 511), pages(701, 0)]);
    assert_eq!(scan(&mut tracker), [0u64; 0]);
    // One that was filled and punched out before a scan is a hole again, and found when it is none.
    child.write(0, 900 * STRETCH, 1);
    child.order(&format!("punch 0 {} 4096", 900 * STRETCH));
    assert_eq!(scan(&mut tracker), [0u64; 0]);
    child.write(0, 900 * STRETCH, 2);
    assert_eq!(scan(&mut tracker), [pages(900, 0)]);
    assert_eq!(ram.resident_bytes().unwrap(), 6 * 4096);
}

/// More separate pages than one call of the kernel returns.
#[test]
fn scattered_pages_beyond_one_buffer() {
    let mut child = Writer::start(&[(Kind::Memfd, 512 * MIB)], 4096);
    let (_ram, mut tracker) = track(&child);
    let expected: Vec<u64> = (0..131_072).step_by(2).collect();
    child.order("every 0 8192");
    assert_eq!(scan(&mut tracker), expected);
    assert_eq!(scan(&mut tracker), [0u64; 0]);
}

#[test]
fn blocks_that_vanish_or_change_are_noticed() {
    for order in ["unmap 1", "remap 1"] {
        let mut child = Writer::start(&[(Kind::Memfd, MIB), (Kind::Memfd, MIB)], 4096);
        let (_ram, mut tracker) = track(&child);
        scan(&mut tracker);
        child.order(order);
        let result = tracker.scan(&mut PageSet::new(512));
        let Err(TrackError::Changed { block, .. }) = result else { panic!("{order}: {result:?}") };
        assert_eq!(block, "block1");
        // Undoing what is left goes through.
        drop(tracker);
        child.write(0, 0, 1);
    }
    let mut child = Writer::start(&[(Kind::Memfd, MIB)], 4096);
    let ram = GuestRam::open(child.pid(), &child.regions, false).unwrap();
    child.order("remap 0");
    let attached = userfaultfd(child.pid(), None, CloseRemote::Yes).unwrap();
    let result = DirtyTracker::arm(child.pid(), attached.uffd, &ram);
    assert!(matches!(result, Err(TrackError::Changed { .. })), "{result:?}");
}

#[test]
fn a_second_tracker_is_refused_until_the_first_ends() {
    let mut child = Writer::start(&[(Kind::Memfd, MIB)], 4096);
    let (ram, tracker) = track(&child);
    let attach = || userfaultfd(child.pid(), None, CloseRemote::Yes).unwrap().uffd;
    let result = DirtyTracker::arm(child.pid(), attach(), &ram);
    assert!(matches!(result, Err(TrackError::Busy { .. })), "{result:?}");
    tracker.disarm().unwrap();
    let mut second = DirtyTracker::arm(child.pid(), attach(), &ram).unwrap();
    let third = attach();
    child.write(0, 4096, 1);
    assert_eq!(scan(&mut second), [1]);
    drop(second);
    // Closing undoes everything: the memory can be registered again, and written.
    let mut third = DirtyTracker::arm(child.pid(), third, &ram).unwrap();
    child.write(0, 8192, 1);
    assert_eq!(scan(&mut third), [2]);
    // A descriptor that was used is refused.
    let used = rustix::io::fcntl_dupfd_cloexec(&third.uffd, 0).unwrap();
    drop(third);
    let result = DirtyTracker::arm(child.pid(), used, &ram);
    assert!(matches!(result, Err(TrackError::Handshake { .. })), "{result:?}");
}

#[test]
fn the_end_of_the_process_is_an_error_and_no_trouble() {
    let child = Writer::start(&[(Kind::Memfd, MIB)], 4096);
    let (_ram, mut tracker) = track(&child);
    drop(child);
    assert!(tracker.scan(&mut PageSet::new(256)).is_err());
    tracker.disarm().unwrap();
}

#[test]
fn huge_pages_report_all_their_parts() {
    const HUGE: u64 = 2 * MIB;
    let _alone = HUGE_POOL.lock();
    let Some(pool) = HugePages::get(5) else { return };
    let (_file, path) = pool.file(5 * HUGE);
    let mut child = Writer::start(&[(Kind::File { path, offset: HUGE }, 4 * HUGE)], HUGE);
    child.write(0, 5, 1);
    let (ram, mut tracker) = track(&child);
    assert_eq!(scan(&mut tracker), [0u64; 0]);
    child.write(0, HUGE + 12345, 1);
    child.write(0, 5, 2);
    assert_eq!(scan(&mut tracker), (0..1024).collect::<Vec<_>>());
    assert_eq!(scan(&mut tracker), [0u64; 0]);
    // A page that was never populated.
    child.write(0, 3 * HUGE, 1);
    assert_eq!(scan(&mut tracker), (1536..2048).collect::<Vec<_>>());
    assert_eq!(ram.resident_bytes().unwrap(), 3 * HUGE);
}

/// A QEMU whose firmware starts anew every few ms, writing to RAM; killed when dropped.
pub(crate) struct Qemu {
    child: Child,
    _file: tempfile::NamedTempFile,
    pub(crate) region: RamRegion,
}

impl Qemu {
    pub(crate) fn start(mib: u64, more: &[&str]) -> Option<Self> {
        let (file, path) = tmpfs_file(mib * MIB);
        let object = format!("memory-backend-file,id=mem0,size={mib}M,mem-path={path},share=on");
        let child = Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg", "-nodefaults", "-display", "none", "-serial", "none"])
            .args([
                "-m",
                &mib.to_string(),
                "-machine",
                "pc,memory-backend=mem0",
                "-object",
                &object,
            ])
            .args(["-boot", "reboot-timeout=1"])
            .args(more)
            .stdin(Stdio::null())
            .spawn();
        let child = match child {
            Ok(child) => child,
            Err(error) => {
                println!("SKIPPED, no qemu-system-x86_64: {error}");
                return None;
            }
        };
        let pid = i32::try_from(child.id()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let hva = loop {
            assert!(Instant::now() < deadline, "QEMU did not map its RAM");
            let mappings = procfs::mappings(pid).unwrap_or_default();
            if let Some(found) = mappings.iter().find(|mapping| mapping.path == path) {
                break found.start;
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        let name = "mem0".to_owned();
        let region = RamRegion { name, length_bytes: mib * MIB, page_bytes: 4096, hva };
        std::thread::sleep(Duration::from_millis(500));
        Some(Self { child, _file: file, region })
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A copy that follows the scans of a running guest is exact when the guest stands still.
#[test]
fn a_copy_of_a_running_qemu_converges_to_its_memory() {
    let Some(qemu) = Qemu::start(128, &[]) else { return };
    let regions = [qemu.region.clone()];
    let ram = GuestRam::open(qemu.pid(), &regions, false).unwrap();
    let attached = userfaultfd(qemu.pid(), None, CloseRemote::Yes).unwrap();
    let mut tracker = DirtyTracker::arm(qemu.pid(), attached.uffd, &ram).unwrap();
    let mut copy = vec![0u8; usize::try_from(ram.layout().bytes()).unwrap()];
    let mut dirty = ram.data_ranges().unwrap();
    let mut reported = 0;
    for round in 0..40 {
        if round == 39 {
            qemu.signal(rustix::process::Signal::STOP);
            std::thread::sleep(Duration::from_millis(100));
        }
        reported += tracker.scan(&mut dirty).unwrap().pages;
        for page in dirty.iter() {
            let at = usize::try_from(page).unwrap() * PAGE_BYTES;
            ram.read(PageIndex(page), &mut copy[at..at + PAGE_BYTES]).unwrap();
        }
        dirty.clear();
        std::thread::sleep(Duration::from_millis(25));
    }
    let mut now = vec![0u8; copy.len()];
    ram.read(PageIndex(0), &mut now).unwrap();
    let wrong = now.chunks(PAGE_BYTES).zip(copy.chunks(PAGE_BYTES)).filter(|(a, b)| a != b).count();
    println!("{reported} pages reported in 40 scans, {wrong} wrong at the end");
    assert!(reported > 40, "the guest wrote nothing");
    assert_eq!(wrong, 0);
    qemu.signal(rustix::process::Signal::CONT);
}

/// libvirt starts every QEMU so.
#[test]
fn a_sandboxed_qemu_is_tracked() {
    let sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
    let Some(qemu) = Qemu::start(64, &["-sandbox", sandbox]) else { return };
    let status = procfs::status(qemu.pid(), qemu.pid()).unwrap();
    assert_eq!(status.seccomp, 2);
    let ram = GuestRam::open(qemu.pid(), std::slice::from_ref(&qemu.region), false).unwrap();
    let attached = userfaultfd(qemu.pid(), None, CloseRemote::Yes).unwrap();
    let mut tracker = DirtyTracker::arm(qemu.pid(), attached.uffd, &ram).unwrap();
    let mut dirty = PageSet::new(tracker.pages());
    let deadline = Instant::now() + Duration::from_secs(20);
    while dirty.is_empty() {
        assert!(Instant::now() < deadline, "the guest writes nothing");
        std::thread::sleep(Duration::from_millis(20));
        tracker.scan(&mut dirty).unwrap();
    }
}

/// Prints what the README's figures come from: how long a QEMU thread is held, what a scan costs.
#[test]
fn figures_from_a_running_qemu() {
    let Some(qemu) = Qemu::start(1024, &[]) else { return };
    let regions = [qemu.region.clone()];
    let mut held = Vec::new();
    for _ in 0..200 {
        let attached = userfaultfd(qemu.pid(), None, CloseRemote::Yes).unwrap();
        let Way::Injection(report) = attached.way else { panic!() };
        held.push(report.stopped_us);
    }
    held.sort_unstable();
    println!(
        "thread held by 200 injections of two calls: {} us p10, {} us median, {} us p90, {} us longest",
        held[20], held[100], held[180], held[199]
    );
    let ram = GuestRam::open(qemu.pid(), &regions, false).unwrap();
    qemu.signal(rustix::process::Signal::STOP);
    std::thread::sleep(Duration::from_millis(50));
    // Populated to the last page, so that the scan has all of it to walk.
    let writable = GuestRam::open(qemu.pid(), &regions, true).unwrap();
    let mut page = [0; PAGE_BYTES];
    for index in 0..writable.layout().pages() {
        writable.read(PageIndex(index), &mut page).unwrap();
        writable.write(PageIndex(index), &page).unwrap();
    }
    let attached = userfaultfd(qemu.pid(), None, CloseRemote::Yes).unwrap();
    let began = Instant::now();
    let mut tracker = DirtyTracker::arm(qemu.pid(), attached.uffd, &ram).unwrap();
    let armed = began.elapsed();
    let mut dirty = PageSet::new(tracker.pages());
    let mut scans: Vec<_> = (0..50).map(|_| tracker.scan(&mut dirty).unwrap().took).collect();
    scans.sort_unstable();
    println!(
        "1 GiB: armed in {armed:?}, clean scan {:?} median, {:?} longest",
        scans[25], scans[49]
    );
    assert!(dirty.is_empty());
    qemu.signal(rustix::process::Signal::CONT);
}
