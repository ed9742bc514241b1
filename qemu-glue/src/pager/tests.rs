//! Tests of demand paging on a child process whose threads wait for pages.

mod evict;
mod guest;
mod load;
mod qemu;

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use migrate_core::error::{Classify, ErrorBin};
use rustix::event::{PollFd, PollFlags, Timespec};

use super::*;
use crate::attach::{CloseRemote, Way, close_descriptor, take_descriptor, userfaultfd};
use crate::ram::GuestRam;
use crate::ram::tests::{HUGE_POOL, HugePages, Kind, tmpfs_file};
use guest::{Guest, content, contents, sum};

const MIB: u64 = 1 << 20;

/// A descriptor, of which the child keeps a copy of this number.
fn attach(guest: &Guest) -> (OwnedFd, i32) {
    let attached = userfaultfd(guest.pid(), None, CloseRemote::No).unwrap();
    let Way::Injection(report) = attached.way else { panic!("{:?}", attached.way) };
    (attached.uffd, report.remote_fd.unwrap())
}

fn start(guest: &Guest) -> (GuestRam, Pager, i32) {
    let ram = GuestRam::open(guest.pid(), &guest.regions, true).unwrap();
    let (uffd, remote_fd) = attach(guest);
    let pager = Pager::start(guest.pid(), uffd, &ram, Duty::Fill).unwrap();
    (ram, pager, remote_fd)
}

/// Waits until a fault may be read, or for a time.
fn poll(pager: &Pager, timeout: Duration) {
    let mut fds = [PollFd::new(pager, PollFlags::IN)];
    rustix::event::poll(&mut fds, Some(&Timespec::try_from(timeout).unwrap())).unwrap();
    assert!(!fds[0].revents().contains(PollFlags::ERR), "{fds:?}");
}

/// The faults of so many pages, each once, in ascending order.
fn faults(pager: &Pager, pages: usize) -> Vec<Fault> {
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut found = Vec::new();
    loop {
        pager.read_faults(&mut found).unwrap();
        found.sort_by_key(|fault| fault.page);
        found.dedup();
        if found.len() >= pages {
            assert_eq!(found.len(), pages, "{found:?}");
            return found;
        }
        assert!(Instant::now() < deadline, "{pages} faults expected, found {found:?}");
        poll(pager, Duration::from_millis(100));
    }
}

fn none(pager: &Pager) -> bool {
    std::thread::sleep(Duration::from_millis(50));
    let mut found = Vec::new();
    pager.read_faults(&mut found).unwrap();
    found.is_empty()
}

fn list(set: &PageSet) -> Vec<u64> {
    set.iter().collect()
}

fn read(fault: u64) -> Fault {
    Fault { page: PageIndex(fault), pages: 1, is_write: false, is_protected: false }
}

fn placed(placed: u64, present: u64) -> Placement {
    Placement { placed, present }
}

#[test]
fn a_reader_waits_and_gets_what_was_placed() {
    let (_file, path) = tmpfs_file(3 * MIB);
    let blocks = [(Kind::Memfd, MIB), (Kind::File { path, offset: MIB }, 2 * MIB)];
    let mut guest = Guest::start(&blocks, 4096);
    let (_ram, pager, _) = start(&guest);
    assert!(none(&pager));
    let first = guest.begin("sum 0 12288 4096");
    let second = guest.begin("sum 1 1048576 4096");
    let third = guest.begin("store 1 4097 9");
    // The second block begins at page 256 of the layout.
    let write = Fault { is_write: true, ..read(257) };
    assert_eq!(faults(&pager, 3), [read(3), write, read(512)]);
    assert!(guest.is_held(first) && guest.is_held(second) && guest.is_held(third));
    // A neighbour wakes nobody.
    assert_eq!(pager.place(PageIndex(4), &content(4)).unwrap(), placed(1, 0));
    assert!(guest.is_held(first));
    for page in [3, 257, 512] {
        assert_eq!(pager.place(PageIndex(page), &content(page)).unwrap(), placed(1, 0));
    }
    assert_eq!(guest.wait(first), sum(&content(3)));
    assert_eq!(guest.wait(second), sum(&content(512)));
    guest.wait(third);
    let mut stored = content(257);
    stored[1] = 9;
    assert_eq!(guest.order("sum 1 4096 4096"), sum(&stored));
    assert_eq!(guest.order("sum 0 16384 4096"), sum(&content(4)));
    assert!(none(&pager));
    assert_eq!(list(&pager.present().unwrap()), [3, 4, 257, 512]);
}

#[test]
fn a_page_that_is_there_is_left_alone_and_its_waiters_go_on() {
    let mut guest = Guest::start(&[(Kind::Memfd, 4 * MIB)], 4096);
    guest.order("store 0 40960 7");
    let (ram, pager, _) = start(&guest);
    ram.write(PageIndex(20), &content(20)).unwrap();
    // Missing, but put into the file while a thread waits for it: that does not wake the thread.
    let held = guest.begin("sum 0 122880 4096");
    assert_eq!(faults(&pager, 1), [read(30)]);
    ram.write(PageIndex(30), &content(30)).unwrap();
    assert!(guest.is_held(held));
    assert_eq!(pager.place(PageIndex(0), &contents(100..612)).unwrap(), placed(509, 3));
    assert_eq!(guest.wait(held), sum(&content(30)));
    let mut all = contents(100..612);
    let page = |page: usize| page * PAGE_BYTES..(page + 1) * PAGE_BYTES;
    all[page(10)].fill(0);
    all[10 * PAGE_BYTES] = 7;
    all[page(20)].copy_from_slice(&content(20));
    all[page(30)].copy_from_slice(&content(30));
    assert_eq!(guest.order(&format!("sum 0 0 {}", 2 * MIB)), sum(&all));
    assert_eq!(pager.place(PageIndex(0), &contents(0..512)).unwrap(), placed(0, 512));
    assert_eq!(guest.order(&format!("sum 0 0 {}", 2 * MIB)), sum(&all));
    assert!(none(&pager));
}

#[test]
fn zeros_are_placed_where_nothing_is() {
    let mut guest = Guest::start(&[(Kind::Memfd, 4 * MIB)], 4096);
    let (ram, pager, _) = start(&guest);
    pager.place(PageIndex(5), &content(5)).unwrap();
    pager.place(PageIndex(300), &contents(300..302)).unwrap();
    let held = guest.begin("sum 0 24576 4096");
    faults(&pager, 1);
    assert_eq!(pager.place_zeros(PageIndex(2), 500).unwrap(), placed(497, 3));
    assert_eq!(guest.wait(held), sum(&[0; PAGE_BYTES]));
    assert_eq!(guest.order("sum 0 20480 4096"), sum(&content(5)));
    assert_eq!(guest.order("sum 0 1228800 8192"), sum(&contents(300..302)));
    assert_eq!(list(&pager.present().unwrap()), (2..502).collect::<Vec<_>>());
    assert_eq!(pager.place_zeros(PageIndex(2), 500).unwrap(), placed(0, 500));
    assert_eq!(ram.resident_bytes().unwrap(), 500 * 4096);
}

#[test]
fn mappings_that_were_split_are_filled_across_their_borders() {
    let mut guest = Guest::start(&[(Kind::Memfd, 4 * MIB)], 4096);
    guest.order("split 0 28672 4096");
    let (_ram, pager, _) = start(&guest);
    guest.order("split 0 819200 409600");
    assert_eq!(pager.place(PageIndex(0), &contents(0..512)).unwrap(), placed(512, 0));
    assert_eq!(pager.place_zeros(PageIndex(500), 100).unwrap(), placed(88, 12));
    let held = guest.begin("sum 0 2457600 4096");
    assert_eq!(faults(&pager, 1), [read(600)]);
    pager.place(PageIndex(600), &content(600)).unwrap();
    assert_eq!(guest.wait(held), sum(&content(600)));
    assert_eq!(guest.order(&format!("sum 0 0 {}", 2 * MIB)), sum(&contents(0..512)));
    pager.end().unwrap();
    assert_eq!(guest.order("sum 0 2461696 4096"), sum(&[0; PAGE_BYTES]));
}

#[test]
fn what_is_no_whole_page_of_one_block_is_refused() {
    let guest = Guest::start(&[(Kind::Memfd, MIB), (Kind::Memfd, MIB)], 4096);
    let (_ram, pager, _) = start(&guest);
    for (first, bytes) in
        [(0, 0), (0, 1), (0, 4097), (255, 8192), (511, 8192), (512, 4096), (u64::MAX, 4096)]
    {
        let error = pager.place(PageIndex(first), &vec![1; bytes]).unwrap_err();
        assert!(matches!(error, PagerError::OutOfRange { .. }), "{first} {bytes}: {error}");
        assert_eq!(error.bin(), ErrorBin::CallerMisuse);
    }
    for (first, pages) in [(0, 0), (255, 2), (0, 513), (0, u64::MAX), (u64::MAX, u64::MAX)] {
        let error = pager.place_zeros(PageIndex(first), pages).unwrap_err();
        assert!(matches!(error, PagerError::OutOfRange { .. }), "{first} {pages}: {error}");
    }
    assert!(pager.present().unwrap().is_empty());
}

/// The engine dies while threads wait, and another one takes over.
#[test]
fn threads_wait_for_the_next_engine() {
    let mut guest = Guest::start(&[(Kind::Memfd, MIB), (Kind::Memfd, MIB)], 4096);
    let (ram, pager, remote_fd) = start(&guest);
    pager.place(PageIndex(0), &content(0)).unwrap();
    let read_before = guest.begin("sum 0 4096 4096");
    faults(&pager, 1);
    let not_read = guest.begin("sum 1 8192 4096");
    poll(&pager, Duration::from_secs(20));
    drop(pager);
    let while_away = guest.begin("sum 1 16384 4096");
    for job in [read_before, not_read, while_away] {
        assert!(guest.is_held(job));
    }
    let uffd = take_descriptor(guest.pid(), remote_fd).unwrap();
    // A descriptor on which reads block cannot be polled.
    rustix::fs::fcntl_setfl(&uffd, rustix::fs::OFlags::empty()).unwrap();
    let pager = Pager::resume(guest.pid(), uffd, &ram, Duty::Fill).unwrap();
    poll(&pager, Duration::ZERO);
    assert_eq!(faults(&pager, 3), [read(1), read(258), read(260)]);
    assert_eq!(list(&pager.present().unwrap()), [0]);
    for (job, page) in [(read_before, 1), (not_read, 258), (while_away, 260)] {
        assert!(guest.is_held(job));
        assert_eq!(pager.place(PageIndex(page), &content(page)).unwrap(), placed(1, 0));
        assert_eq!(guest.wait(job), sum(&content(page)));
    }
    // New faults come as before.
    let held = guest.begin("sum 0 0 8192");
    assert_eq!(guest.wait(held), sum(&contents(0..2)));
    let held = guest.begin("sum 0 8192 4096");
    assert_eq!(faults(&pager, 1), [read(2)]);
    pager.end().unwrap();
    assert_eq!(guest.wait(held), sum(&[0; PAGE_BYTES]));
    drop(pager);
    close_descriptor(guest.pid(), remote_fd).unwrap();
    assert_eq!(guest.order("sum 1 8192 4096"), sum(&content(258)));
}

#[test]
fn only_what_is_registered_is_taken_over() {
    let mut guest = Guest::start(&[(Kind::Memfd, MIB), (Kind::Memfd, MIB)], 4096);
    let (ram, pager, remote_fd) = start(&guest);
    let again = || take_descriptor(guest.pid(), remote_fd).unwrap();
    let (other, _) = attach(&guest);
    // A second pager is refused, and leaves the first in place.
    let result = Pager::start(guest.pid(), other.try_clone().unwrap(), &ram, Duty::Fill);
    assert!(matches!(result, Err(PagerError::Busy { .. })), "{result:?}");
    let result = Pager::resume(guest.pid(), other, &ram, Duty::Fill);
    assert!(matches!(result, Err(PagerError::Busy { .. })), "{result:?}");
    let result = Pager::start(guest.pid(), again(), &ram, Duty::Fill);
    assert!(matches!(result, Err(PagerError::Handshake { .. })), "{result:?}");
    Pager::resume(guest.pid(), again(), &ram, Duty::Fill).unwrap();
    pager.end().unwrap();
    let result = Pager::resume(guest.pid(), again(), &ram, Duty::Fill);
    let Err(error @ PagerError::NotRegistered { .. }) = result else { panic!("{result:?}") };
    assert_eq!(error.bin(), ErrorBin::CallerMisuse);
    // Neither the refusal nor the look changed anything.
    assert_eq!(guest.order("sum 0 0 4096"), sum(&[0; PAGE_BYTES]));
}

#[test]
fn a_start_that_fails_leaves_nothing_registered() {
    let mut guest = Guest::start(&[(Kind::Memfd, MIB), (Kind::Memfd, MIB)], 4096);
    let ram = GuestRam::open(guest.pid(), &guest.regions, true).unwrap();
    let second = GuestRam::open(guest.pid(), &guest.regions[1..], true).unwrap();
    let other = Pager::start(guest.pid(), attach(&guest).0, &second, Duty::Fill).unwrap();
    let result = Pager::start(guest.pid(), attach(&guest).0, &ram, Duty::Fill);
    let Err(PagerError::Busy { block, .. }) = result else { panic!("{result:?}") };
    assert_eq!(block, "block1");
    // The first block is free again, the second still with the other pager.
    assert_eq!(guest.order("sum 0 0 4096"), sum(&[0; PAGE_BYTES]));
    let held = guest.begin("sum 1 0 4096");
    assert_eq!(faults(&other, 1), [read(0)]);
    other.place(PageIndex(0), &content(0)).unwrap();
    assert_eq!(guest.wait(held), sum(&content(0)));
    // A block that was mapped anew is not the one that was opened.
    guest.order("remap 0 0");
    let first = GuestRam::open(guest.pid(), &guest.regions[..1], true).unwrap();
    let pager = Pager::start(guest.pid(), attach(&guest).0, &first, Duty::Fill).unwrap();
    guest.order("remap 0 0");
    let error = pager.place(PageIndex(0), &content(0)).unwrap_err();
    assert!(matches!(error, PagerError::NotRegistered { .. }), "{error}");
    pager.end().unwrap();
    let result = Pager::start(guest.pid(), attach(&guest).0, &first, Duty::Fill);
    assert!(matches!(result, Err(PagerError::Changed { .. })), "{result:?}");
}

#[test]
fn present_pages_are_those_of_the_file() {
    let (_file, path) = tmpfs_file(6 * MIB);
    let blocks = [(Kind::File { path, offset: MIB }, 2 * MIB), (Kind::Memfd, MIB)];
    let mut guest = Guest::start(&blocks, 4096);
    let (ram, pager, _) = start(&guest);
    assert!(pager.present().unwrap().is_empty());
    pager.place(PageIndex(10), &contents(10..20)).unwrap();
    pager.place_zeros(PageIndex(767), 1).unwrap();
    // Never touched by the process, yet there.
    ram.write(PageIndex(511), &content(511)).unwrap();
    assert_eq!(list(&pager.present().unwrap()), [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 511, 767]);
    assert_eq!(guest.order("sum 0 2093056 4096"), sum(&content(511)));
    // Punched by a balloon: missing again, and reported again.
    guest.order("punch 0 49152 12288");
    ram.discard(PageIndex(767), 1).unwrap();
    assert_eq!(list(&pager.present().unwrap()), [10, 11, 15, 16, 17, 18, 19, 511]);
    let held = guest.begin("sum 0 53248 4096");
    assert_eq!(faults(&pager, 1), [read(13)]);
    pager.place_zeros(PageIndex(13), 1).unwrap();
    assert_eq!(guest.wait(held), sum(&[0; PAGE_BYTES]));
}

#[test]
fn the_end_lets_everybody_through() {
    let mut guest = Guest::start(&[(Kind::Memfd, MIB), (Kind::Memfd, MIB)], 4096);
    let (_ram, pager, _) = start(&guest);
    pager.place(PageIndex(1), &content(1)).unwrap();
    let jobs = [guest.begin("sum 0 8192 4096"), guest.begin("sum 1 4096 4096")];
    assert_eq!(faults(&pager, 2), [read(2), read(257)]);
    let unread = guest.begin("store 1 8192 5");
    poll(&pager, Duration::from_secs(20));
    pager.end().unwrap();
    for job in jobs {
        assert_eq!(guest.wait(job), sum(&[0; PAGE_BYTES]));
    }
    guest.wait(unread);
    assert_eq!(guest.order("sum 0 4096 4096"), sum(&content(1)));
    assert_eq!(guest.order("sum 1 40960 4096"), sum(&[0; PAGE_BYTES]));
    assert!(none(&pager));
    let error = pager.place(PageIndex(100), &content(100)).unwrap_err();
    assert!(matches!(error, PagerError::NotRegistered { .. }), "{error}");
    pager.end().unwrap();
}

/// read(2) and write(2) on guest RAM: the kernel takes the fault.
#[test]
fn faults_of_the_kernel_are_served() {
    let mut guest = Guest::start(&[(Kind::Memfd, MIB)], 4096);
    let (_ram, pager, _) = start(&guest);
    let out = guest.begin("kernel-reads 0 4096 4096");
    let into = guest.begin("kernel-writes 0 20481 100");
    let write = Fault { is_write: true, ..read(5) };
    assert_eq!(faults(&pager, 2), [read(1), write]);
    assert!(guest.is_held(out) && guest.is_held(into));
    pager.place(PageIndex(1), &content(1)).unwrap();
    pager.place(PageIndex(5), &content(5)).unwrap();
    assert_eq!(guest.wait(out), sum(&content(1)));
    assert_eq!(guest.wait(into), "Ok(100)");
    let mut written = content(5);
    written[1..101].fill(0xee);
    assert_eq!(guest.order("sum 0 20480 4096"), sum(&written));
}

#[test]
fn more_faults_than_one_read_takes() {
    let mut guest = Guest::start(&[(Kind::Memfd, 2 * MIB)], 4096);
    let (_ram, pager, _) = start(&guest);
    let count = FAULTS_MAX as u64 + 44;
    let jobs: Vec<_> =
        (0..count).map(|page| guest.begin(&format!("sum 0 {} 4096", page * PAGE))).collect();
    let path = format!("/proc/{}/fdinfo/{}", std::process::id(), pager.as_fd().as_raw_fd());
    let deadline = Instant::now() + Duration::from_secs(60);
    let waiting = format!("pending:\t{count}\n");
    while !std::fs::read_to_string(&path).unwrap().contains(&waiting) {
        assert!(Instant::now() < deadline, "not {count} threads wait");
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut found = Vec::new();
    assert!(pager.read_faults(&mut found).unwrap());
    assert_eq!(found.len(), FAULTS_MAX);
    assert!(!pager.read_faults(&mut found).unwrap());
    found.sort_by_key(|fault| fault.page);
    assert_eq!(found, (0..count).map(read).collect::<Vec<_>>());
    assert_eq!(pager.place(PageIndex(0), &contents(0..count)).unwrap(), placed(count, 0));
    for (page, job) in (0..).zip(jobs) {
        assert_eq!(guest.wait(job), sum(&content(page)));
    }
}

#[test]
fn a_full_file_system_is_named_and_placing_goes_on_when_there_is_room() {
    let folder = tempfile::tempdir().unwrap();
    let mount = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=2M", "none"])
        .arg(folder.path())
        .status();
    if !mount.as_ref().is_ok_and(std::process::ExitStatus::success) {
        println!("SKIPPED, tmpfs cannot be mounted: {mount:?}");
        return;
    }
    let path = folder.path().join("ram");
    File::create(&path).unwrap().set_len(4 * MIB).unwrap();
    let path = path.to_str().unwrap().to_owned();
    let mut guest = Guest::start(&[(Kind::File { path, offset: 0 }, 4 * MIB)], 4096);
    let (ram, pager, _) = start(&guest);
    let error = pager.place(PageIndex(0), &contents(0..1024)).unwrap_err();
    let zeros = pager.place_zeros(PageIndex(1000), 1).unwrap_err();
    let present = list(&pager.present().unwrap());
    ram.discard(PageIndex(0), 256).unwrap();
    let again = pager.place(PageIndex(300), &contents(300..600)).unwrap();
    drop(ram);
    let sums = guest.order("sum 0 1228800 1228800");
    guest.kill();
    drop(pager);
    let unmounted = std::process::Command::new("umount").arg(folder.path()).status().unwrap();
    assert!(unmounted.success());
    for error in [error, zeros] {
        assert!(matches!(error, PagerError::Full { .. }), "{error:?}");
        assert!(error.to_string().contains("remount,size="), "{error}");
        assert_eq!(error.bin(), ErrorBin::System);
    }
    assert_eq!(present, (0..512).collect::<Vec<_>>());
    assert_eq!(again, placed(88, 212));
    assert_eq!(sums, sum(&contents(300..600)));
}

#[test]
fn the_end_of_the_process_has_its_own_error() {
    let mut guest = Guest::start(&[(Kind::Memfd, MIB)], 4096);
    let (ram, pager, _) = start(&guest);
    let (other, _) = attach(&guest);
    guest.begin("sum 0 0 4096");
    faults(&pager, 1);
    guest.kill();
    let error = pager.place(PageIndex(0), &content(0)).unwrap_err();
    assert!(matches!(error, PagerError::Gone { .. }), "{error:?}");
    let error = pager.place_zeros(PageIndex(0), 1).unwrap_err();
    assert!(matches!(error, PagerError::Gone { .. }), "{error:?}");
    assert!(none(&pager));
    pager.end().unwrap();
    let result = Pager::start(guest.pid(), other, &ram, Duty::Fill);
    assert!(matches!(result, Err(PagerError::Proc { .. })), "{result:?}");
}

#[test]
fn huge_pages_are_placed_whole() {
    const HUGE: u64 = 2 * MIB;
    const PARTS: u64 = 512;
    let _alone = HUGE_POOL.lock();
    let Some(pool) = HugePages::get(7) else { return };
    let (_file, path) = pool.file(7 * HUGE);
    let mut guest = Guest::start(&[(Kind::File { path, offset: HUGE }, 6 * HUGE)], HUGE);
    let (ram, pager, remote_fd) = start(&guest);
    let held = guest.begin("sum 0 3000000 5000");
    let fault = Fault { pages: PARTS, ..read(PARTS) };
    assert_eq!(faults(&pager, 1), [fault]);
    for (first, pages) in [(PARTS, 1), (PARTS + 1, PARTS), (0, 7 * PARTS)] {
        let error = pager.place(PageIndex(first), &vec![0; (pages * PAGE) as usize]).unwrap_err();
        assert!(matches!(error, PagerError::OutOfRange { page_bytes: HUGE, .. }), "{error}");
        assert!(pager.place_zeros(PageIndex(first), pages).is_err());
    }
    assert!(guest.is_held(held));
    let all = contents(0..6 * PARTS);
    let bytes =
        |pages: Range<u64>| &all[(pages.start * PAGE) as usize..(pages.end * PAGE) as usize];
    // The first page lies in the file, untouched by the process; the others are missing.
    ram.write(PageIndex(0), bytes(0..PARTS)).unwrap();
    assert_eq!(list(&pager.present().unwrap()), (0..PARTS).collect::<Vec<_>>());
    let result = pager.place(PageIndex(0), &vec![9; 2 * HUGE as usize]).unwrap();
    assert_eq!(result, placed(PARTS, PARTS));
    assert_eq!(guest.wait(held), sum(&[9; 5000]));
    assert_eq!(guest.order(&format!("sum 0 0 {HUGE}")), sum(bytes(0..PARTS)));
    // Two pages further on, with the engine restarted between.
    let held = guest.begin(&format!("sum 0 {} {HUGE}", 4 * HUGE));
    assert_eq!(faults(&pager, 1)[0].page, PageIndex(4 * PARTS));
    drop(pager);
    let uffd = take_descriptor(guest.pid(), remote_fd).unwrap();
    let pager = Pager::resume(guest.pid(), uffd, &ram, Duty::Fill).unwrap();
    assert_eq!(faults(&pager, 1)[0].page, PageIndex(4 * PARTS));
    let two = bytes(3 * PARTS..5 * PARTS);
    assert_eq!(pager.place(PageIndex(3 * PARTS), two).unwrap(), placed(2 * PARTS, 0));
    assert_eq!(guest.wait(held), sum(bytes(4 * PARTS..5 * PARTS)));
    let zeros = pager.place_zeros(PageIndex(2 * PARTS), 2 * PARTS).unwrap();
    assert_eq!(zeros, placed(PARTS, PARTS));
    let zero = sum(&vec![0; HUGE as usize]);
    assert_eq!(guest.order(&format!("sum 0 {} {HUGE}", 2 * HUGE)), zero);
    assert_eq!(list(&pager.present().unwrap()), (0..5 * PARTS).collect::<Vec<_>>());
    guest.order(&format!("punch 0 {HUGE} {HUGE}"));
    let mut expected: Vec<u64> = (0..5 * PARTS).collect();
    expected.drain(PARTS as usize..2 * PARTS as usize);
    assert_eq!(list(&pager.present().unwrap()), expected);
    let held = guest.begin(&format!("kernel-reads 0 {HUGE} 4096"));
    assert_eq!(faults(&pager, 1), [fault]);
    pager.end().unwrap();
    assert_eq!(guest.wait(held), sum(&[0; PAGE_BYTES]));
    assert_eq!(guest.order(&format!("sum 0 {} {HUGE}", 5 * HUGE)), zero);
}
