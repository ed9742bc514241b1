//! A process with blocks mapped as QEMU has them, whose threads touch memory on demand and may be
//! held by it: the target of the paging tests.
#![expect(unsafe_code, reason = "touches memory through raw pointers and system calls")]

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hasher};
use std::io::{BufRead, BufReader, Write};
use std::process::Child;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use migrate_core::layout::PAGE_BYTES;

use crate::attach::tests::target;
use crate::ram::RamRegion;
use crate::ram::tests::{Kind, writer};

const BLOCKS: &str = "GODWIT_TEST_BLOCKS";

/// How long a job may take that nothing holds.
const JOB_TIMEOUT: Duration = Duration::from_secs(60);

/// Bytes of a page that [`content`] determines; those behind are for marks.
const CHECKED_BYTES: usize = 4000;

/// What belongs into a page.
pub(super) fn content(page: u64) -> Vec<u8> {
    let mut seed = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).take(PAGE_BYTES / 8).flatten().collect()
}

/// The contents of several pages, one behind the other.
pub(super) fn contents(pages: std::ops::Range<u64>) -> Vec<u8> {
    pages.flat_map(content).collect()
}

/// What a job that reads answers.
pub(super) fn sum(bytes: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    format!("{:016x}", hasher.finish())
}

/// The process as the tests see it. Dropping it kills it.
#[derive(Debug)]
pub(super) struct Guest {
    child: Child,
    answers: Receiver<(u64, String)>,
    done: HashMap<u64, String>,
    jobs: u64,
    pub(super) regions: Vec<RamRegion>,
}

/// Something that a thread of the guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Job(u64);

impl Guest {
    pub(super) fn start(blocks: &[(Kind, u64)], page_bytes: u64) -> Self {
        let mut command = target::role("guest", "pager::tests::guest::role_guest");
        let list: Vec<_> =
            blocks.iter().map(|(kind, bytes)| format!("{bytes}={}", kind.describe())).collect();
        let mut child = command.env(BLOCKS, list.join("\n")).spawn().unwrap();
        let (sender, answers) = mpsc::channel();
        let output = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in output.lines() {
                let Ok(line) = line else { return };
                let Some(answer) = line.strip_prefix("GUEST: ") else { continue };
                let (job, answer) = answer.split_once(' ').unwrap();
                if sender.send((job.parse().unwrap(), answer.to_owned())).is_err() {
                    return;
                }
            }
        });
        let mut guest = Self { child, answers, done: HashMap::new(), jobs: 0, regions: Vec::new() };
        for (index, (_, length_bytes)) in blocks.iter().enumerate() {
            let hva = guest.wait(Job(index as u64)).parse().unwrap();
            let (name, length_bytes) = (format!("block{index}"), *length_bytes);
            guest.regions.push(RamRegion { name, length_bytes, page_bytes, hva });
        }
        guest.jobs = blocks.len() as u64;
        guest
    }

    pub(super) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// Has a new thread of the process do something; see [`work`].
    pub(super) fn begin(&mut self, order: &str) -> Job {
        let job = self.jobs;
        self.jobs += 1;
        writeln!(self.child.stdin.as_mut().unwrap(), "{job} {order}").unwrap();
        Job(job)
    }

    /// What a job answered, once it is done.
    pub(super) fn wait(&mut self, job: Job) -> String {
        let deadline = Instant::now() + JOB_TIMEOUT;
        loop {
            if let Some(answer) = self.done.remove(&job.0) {
                return answer;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let (number, answer) = self.answers.recv_timeout(left).expect("the job hangs");
            self.done.insert(number, answer);
        }
    }

    pub(super) fn order(&mut self, order: &str) -> String {
        let job = self.begin(order);
        self.wait(job)
    }

    /// Whether a job is still under way a moment later.
    pub(super) fn is_held(&mut self, job: Job) -> bool {
        std::thread::sleep(Duration::from_millis(100));
        self.done.extend(self.answers.try_iter());
        !self.done.contains_key(&job.0)
    }

    pub(super) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn copy_of(address: u64, bytes: u64) -> Vec<u8> {
    let mut copy = vec![0u8; usize::try_from(bytes).unwrap()];
    // SAFETY: within a block of this process; the copy is private to this thread.
    unsafe { std::ptr::copy_nonoverlapping(address as *const u8, copy.as_mut_ptr(), copy.len()) };
    copy
}

/// Reads and marks random pages and looks whether each holds what belongs there. Answers how many
/// pages were wrong and how many were looked at.
fn roam(address: u64, pages: u64, thread: u64, touches: u64) -> (u64, u64) {
    let mark = CHECKED_BYTES as u64 + thread;
    let (mut marked, mut wrong, mut looks) = (HashMap::new(), 0, 0);
    let mut seed = 0x1234_5678_9abc_def1 ^ (thread + 1);
    let mut look = |page: u64, mark_of: Option<&u8>| {
        let found = copy_of(address + page * PAGE_BYTES as u64, PAGE_BYTES as u64);
        let expected = content(page);
        let same = found.iter().zip(&expected).take(CHECKED_BYTES).all(|(a, b)| a == b);
        let at = usize::try_from(mark).unwrap();
        looks += 1;
        if !same || found[at] != mark_of.copied().unwrap_or(expected[at]) {
            wrong += 1;
        }
    };
    for touch in 0..touches {
        seed = seed ^ seed << 13;
        seed = seed ^ seed >> 7;
        seed = seed ^ seed << 17;
        let page = seed % pages;
        // Half of the pages are touched first by a write.
        if seed >> 40 & 1 == 0 {
            let value = touch as u8;
            let byte = (address + page * PAGE_BYTES as u64 + mark) as *mut u8;
            // SAFETY: within a block of this process; each thread has a byte of its own.
            unsafe { byte.write_volatile(value) };
            marked.insert(page, value);
        }
        look(page, marked.get(&page));
    }
    for (page, mark) in &marked {
        look(*page, Some(mark));
    }
    (wrong, looks)
}

/// Moves bytes between memory and a pipe with one system call, in which the kernel takes the fault.
fn through_pipe(address: u64, bytes: u64, into_memory: bool) -> String {
    let length = usize::try_from(bytes).unwrap();
    let (output, input) = rustix::pipe::pipe().unwrap();
    let mut buffer = vec![0xee; length];
    // SAFETY: within a block of this process, to which no other thread writes meanwhile.
    let memory = unsafe { std::slice::from_raw_parts_mut(address as *mut u8, length) };
    if into_memory {
        rustix::io::write(&input, &buffer).unwrap();
        return format!("{:?}", rustix::io::read(&output, memory));
    }
    match rustix::io::write(&input, memory) {
        Ok(count) => {
            assert_eq!(count, length);
            assert_eq!(rustix::io::read(&output, &mut buffer[..]).unwrap(), length);
            sum(&buffer)
        }
        Err(error) => format!("{error:?}"),
    }
}

fn work(order: &str, blocks: &[(u64, u64)]) -> String {
    let words: Vec<&str> = order.split(' ').collect();
    let number = |index: usize| words[index].parse::<u64>().unwrap();
    let (block, bytes) = blocks[usize::try_from(number(1)).unwrap()];
    let address = block + number(2);
    let advise = |advice| {
        // SAFETY: a range of a block of this process.
        let result = unsafe {
            libc::madvise(address as *mut _, usize::try_from(number(3)).unwrap(), advice)
        };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        "done".to_owned()
    };
    match words[0] {
        "sum" => sum(&copy_of(address, number(3))),
        "store" => {
            // SAFETY: within a block of this process.
            unsafe { (address as *mut u8).write_volatile(words[3].parse().unwrap()) };
            "done".to_owned()
        }
        "kernel-reads" => through_pipe(address, number(3), false),
        "kernel-writes" => through_pipe(address, number(3), true),
        "roam" => {
            let pages = bytes / PAGE_BYTES as u64;
            let (wrong, looks) = roam(block, pages, number(3), number(4));
            format!("{wrong} wrong of {looks}")
        }
        "time" => {
            let page = number(4);
            let touch = |index: u64| {
                let began = Instant::now();
                // SAFETY: within a block of this process.
                unsafe { ((address + index * page) as *const u8).read_volatile() };
                began.elapsed().as_nanos().to_string()
            };
            (0..number(3)).map(touch).collect::<Vec<_>>().join(" ")
        }
        "punch" => advise(libc::MADV_REMOVE),
        "split" => advise(libc::MADV_DONTDUMP),
        "remap" => {
            let bytes = usize::try_from(bytes).unwrap();
            writer::map("memfd", bytes, Some(block));
            "done".to_owned()
        }
        _ => panic!("{order}"),
    }
}

/// Not a test: the child.
#[test]
#[ignore = "the child process of other tests"]
fn role_guest() {
    if std::env::var(target::ROLE).as_deref() != Ok("guest") {
        return;
    }
    let mut blocks = Vec::new();
    for (index, line) in std::env::var(BLOCKS).unwrap().lines().enumerate() {
        let (bytes, kind) = line.split_once('=').unwrap();
        let address = writer::map(kind, bytes.parse().unwrap(), None);
        blocks.push((address, bytes.parse().unwrap()));
        println!("\nGUEST: {index} {address}");
    }
    for order in std::io::stdin().lines() {
        let (order, blocks) = (order.unwrap(), blocks.clone());
        std::thread::spawn(move || {
            let (job, order) = order.split_once(' ').unwrap();
            println!("\nGUEST: {job} {}", work(order, &blocks));
        });
    }
}
