//! Tests on the RAM of a child process that maps files as QEMU does.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout};

use migrate_core::error::{Classify, ErrorBin};

use super::*;
use crate::attach::tests::target;

/// What the child maps, one block for each.
#[derive(Debug, Clone)]
pub(crate) enum Kind {
    /// A memfd without a name.
    Memfd,
    /// A file, from an offset on.
    File { path: String, offset: u64 },
    /// Shared memory without a file.
    SharedAnonymous,
    /// Private memory, as QEMU has without share=on.
    Private,
}

impl Kind {
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Memfd => "memfd".into(),
            Self::File { path, offset } => format!("file:{offset}:{path}"),
            Self::SharedAnonymous => "shared".into(),
            Self::Private => "private".into(),
        }
    }
}

/// A child process that has blocks mapped and writes to them on demand.
#[derive(Debug)]
pub(crate) struct Writer {
    child: Child,
    answers: BufReader<ChildStdout>,
    pub(crate) regions: Vec<RamRegion>,
}

impl Writer {
    pub(crate) fn start(blocks: &[(Kind, u64)], page_bytes: u64) -> Self {
        let mut command = target::role("writer", "ram::tests::writer::role_writer");
        let list: Vec<_> =
            blocks.iter().map(|(kind, bytes)| format!("{bytes}={}", kind.describe())).collect();
        command.env(writer::BLOCKS, list.join("\n"));
        let mut child = command.spawn().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        let mut process = Self { child, answers, regions: Vec::new() };
        for (index, (_, bytes)) in blocks.iter().enumerate() {
            let hva = process.answer().parse().unwrap();
            let name = format!("block{index}");
            process.regions.push(RamRegion { name, length_bytes: *bytes, page_bytes, hva });
        }
        process
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    fn answer(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.answers.read_line(&mut line).unwrap(), 0, "the writer died");
            if let Some(answer) = line.strip_prefix("WRITER: ") {
                return answer.trim().to_owned();
            }
        }
    }

    /// Has the child carry out a command; see [`writer`].
    pub(crate) fn order(&mut self, order: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{order}").unwrap();
        assert_eq!(self.answer(), "done", "{order}");
    }

    /// Writes one byte at a byte offset of a block.
    pub(crate) fn write(&mut self, block: usize, offset: u64, value: u8) {
        self.order(&format!("write {block} {offset} {value}"));
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) mod writer {
    //! The child: maps what the environment names, then obeys its standard input.
    #![expect(unsafe_code, reason = "maps memory and writes it through raw pointers")]

    use std::os::fd::AsRawFd;

    use super::*;

    pub(crate) const BLOCKS: &str = "GODWIT_TEST_BLOCKS";

    pub(crate) fn map(kind: &str, bytes: usize, fixed: Option<u64>) -> u64 {
        let (mut flags, mut offset, mut fd) = (libc::MAP_SHARED, 0, -1);
        let file;
        match kind.split(':').collect::<Vec<_>>()[..] {
            ["memfd"] => {
                let name = "ram";
                let memfd =
                    rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).unwrap();
                file = File::from(memfd);
                file.set_len(bytes as u64).unwrap();
                fd = file.as_raw_fd();
            }
            ["file", start, path] => {
                file = OpenOptions::new().read(true).write(true).open(path).unwrap();
                offset = start.parse().unwrap();
                fd = file.as_raw_fd();
            }
            ["shared"] => flags |= libc::MAP_ANONYMOUS,
            ["private"] => flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            _ => panic!("{kind}"),
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let hint = fixed.unwrap_or(0) as *mut libc::c_void;
        if fixed.is_some() {
            flags |= libc::MAP_FIXED;
        }
        // SAFETY: a new mapping, or one over a block of this process that only this code uses.
        let address = unsafe { libc::mmap(hint, bytes, protection, flags, fd, offset) };
        assert_ne!(address, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        address as u64
    }

    fn obey(order: &str, blocks: &mut [(u64, usize)]) {
        let words: Vec<&str> = order.split(' ').collect();
        let number = |index: usize| words[index].parse::<u64>().unwrap();
        let (address, bytes) = blocks[usize::try_from(number(1)).unwrap()];
        let advise = |advice| {
            let start = address + number(2);
            // SAFETY: a range of a block of this process.
            let result = unsafe {
                libc::madvise(start as *mut _, usize::try_from(number(3)).unwrap(), advice)
            };
            assert_eq!(result, 0, "{}", io::Error::last_os_error());
        };
        match words[0] {
            "write" => {
                assert!(number(2) < bytes as u64);
                let value = words[3].parse().unwrap();
                // SAFETY: within a block of this process.
                unsafe {
                    ((address + number(2)) as *mut u8).write_volatile(value);
                };
            }
            "every" => {
                let step = usize::try_from(number(2)).unwrap();
                for offset in (0..bytes as u64).step_by(step) {
                    // SAFETY: as above.
                    unsafe { ((address + offset) as *mut u8).write_volatile(1) };
                }
            }
            // SAFETY: as above.
            "read" => drop(unsafe { ((address + number(2)) as *const u8).read_volatile() }),
            "punch" => advise(libc::MADV_REMOVE),
            "split" => advise(libc::MADV_DONTDUMP),
            // SAFETY: the block is not used again.
            "unmap" => assert_eq!(unsafe { libc::munmap(address as *mut _, bytes) }, 0),
            "remap" => drop(map("memfd", bytes, Some(address))),
            _ => panic!("{order}"),
        }
    }

    /// Not a test: the child.
    #[test]
    #[ignore = "the child process of other tests"]
    fn role_writer() {
        if std::env::var(target::ROLE).as_deref() != Ok("writer") {
            return;
        }
        let mut blocks = Vec::new();
        for line in std::env::var(BLOCKS).unwrap().lines() {
            let (bytes, kind) = line.split_once('=').unwrap();
            let bytes = bytes.parse().unwrap();
            let address = map(kind, bytes, None);
            blocks.push((address, bytes));
            println!("\nWRITER: {address}");
        }
        for order in io::stdin().lines() {
            obey(&order.unwrap(), &mut blocks);
            println!("\nWRITER: done");
        }
    }
}

/// A file on tmpfs.
pub(crate) fn tmpfs_file(bytes: u64) -> (tempfile::NamedTempFile, String) {
    let file = tempfile::Builder::new().prefix("godwit-test").tempfile_in("/dev/shm").unwrap();
    file.as_file().set_len(bytes).unwrap();
    let path = file.path().to_str().unwrap().to_owned();
    (file, path)
}

const MIB: u64 = 1 << 20;

fn blocks_of(file: &File) -> u64 {
    file.metadata().unwrap().blocks()
}

#[test]
fn every_shared_backend_is_read_and_written() {
    let (file, path) = tmpfs_file(5 * MIB);
    let blocks = [
        (Kind::Memfd, 2 * MIB),
        (Kind::File { path: path.clone(), offset: MIB }, 3 * MIB),
        (Kind::SharedAnonymous, MIB),
    ];
    let mut child = Writer::start(&blocks, 4096);
    child.write(0, 4096, 11);
    child.write(1, 2 * MIB, 22);
    child.write(2, MIB - 1, 33);
    // Several mappings of one file, as mbind makes them.
    child.order(&format!("split 1 {MIB} {MIB}"));
    // The name may be gone.
    std::fs::remove_file(&path).unwrap();
    let ram = GuestRam::open(child.pid(), &child.regions, true).unwrap();
    assert_eq!(ram.layout().bytes(), 6 * MIB);
    let mut page = [0; PAGE_BYTES];
    ram.read(PageIndex(1), &mut page).unwrap();
    assert_eq!(page[0], 11);
    let mut pages = vec![1; 2 * PAGE_BYTES];
    ram.read(PageIndex(2 * 256 + 511), &mut pages).unwrap();
    assert_eq!((pages[PAGE_BYTES - 1], pages[PAGE_BYTES]), (0, 22));
    ram.read(PageIndex(6 * 256 - 1), &mut page).unwrap();
    assert_eq!(page[PAGE_BYTES - 1], 33);
    // The block begins 1 MiB into its file.
    let mut byte = [0];
    file.as_file().read_exact_at(&mut byte, 3 * MIB).unwrap();
    assert_eq!(byte, [22]);
    ram.write(PageIndex(2 * 256), &[77; PAGE_BYTES]).unwrap();
    file.as_file().read_exact_at(&mut byte, MIB).unwrap();
    assert_eq!(byte, [77]);
    assert_eq!(ram.address_of(PageIndex(2 * 256)), Some(child.regions[1].hva));
}

#[test]
fn holes_stay_holes_and_discards_make_them() {
    let (file, path) = tmpfs_file(4 * MIB);
    let child = Writer::start(&[(Kind::File { path, offset: 0 }, 4 * MIB)], 4096);
    let ram = GuestRam::open(child.pid(), &child.regions, true).unwrap();
    let pages = ram.layout().pages();
    let mut buffer = vec![1u8; 4 * MIB as usize];
    ram.read(PageIndex(0), &mut buffer).unwrap();
    assert!(buffer.iter().all(|byte| *byte == 0));
    assert_eq!((blocks_of(file.as_file()), ram.resident_bytes().unwrap()), (0, 0));
    assert!(ram.data_ranges().unwrap().is_empty());
    for first in [3, 100, pages - 2] {
        ram.write(PageIndex(first), &[5; 2 * PAGE_BYTES]).unwrap();
    }
    let data = |ram: &GuestRam| ram.data_ranges().unwrap().iter().collect::<Vec<_>>();
    assert_eq!(data(&ram), [3, 4, 100, 101, pages - 2, pages - 1]);
    assert_eq!(ram.resident_bytes().unwrap(), 6 * 4096);
    ram.discard(PageIndex(4), 97).unwrap();
    assert_eq!(data(&ram), [3, 101, pages - 2, pages - 1]);
    ram.read(PageIndex(0), &mut buffer).unwrap();
    assert!(buffer[4 * 4096..101 * 4096].iter().all(|byte| *byte == 0));
    assert_eq!(buffer[3 * 4096], 5);
    assert_eq!(blocks_of(file.as_file()) * 512, 4 * 4096);
}

/// Pieces that end anywhere, some of them empty, more than one system call takes.
fn write_in_pieces(ram: &GuestRam, first: u64, pages: usize) {
    let content: Vec<u8> = (0..pages * PAGE_BYTES).map(|at| (at % 251) as u8 + 1).collect();
    let mut pieces = vec![IoSlice::new(&[])];
    let mut rest = &content[..];
    for length in (0..).map(|number| 1 + number * 37 % 300) {
        let (piece, left) = rest.split_at(length.min(rest.len()));
        pieces.extend([IoSlice::new(piece), IoSlice::new(&[])]);
        rest = left;
        if rest.is_empty() {
            break;
        }
    }
    assert!(pieces.len() > IOV_MAX, "{} pieces", pieces.len());
    ram.write_pieces(PageIndex(first), &mut pieces).unwrap();
    let mut found = vec![0; content.len()];
    ram.read(PageIndex(first), &mut found).unwrap();
    assert!(found == content, "the contents differ");
    let mut odd = [IoSlice::new(&content[..100]), IoSlice::new(&content[..PAGE_BYTES])];
    let error = ram.write_pieces(PageIndex(first), &mut odd).unwrap_err();
    assert!(matches!(error, RamError::OutOfRange { .. }), "{error}");
}

#[test]
fn contents_in_pieces_are_written() {
    let child = Writer::start(&[(Kind::Memfd, 2 * MIB)], 4096);
    let ram = GuestRam::open(child.pid(), &child.regions, true).unwrap();
    write_in_pieces(&ram, 3, 60);
    assert_eq!(ram.data_ranges().unwrap().iter().collect::<Vec<_>>(), (3..63).collect::<Vec<_>>());
}

#[test]
fn what_is_not_shared_memory_is_refused() {
    let private = Writer::start(&[(Kind::Private, MIB)], 4096);
    let error = GuestRam::open(private.pid(), &private.regions, false).unwrap_err();
    assert!(matches!(error, RamError::Private { .. }), "{error:?}");
    assert_eq!(error.bin(), ErrorBin::CallerMisuse);
    assert!(error.to_string().contains("share=on"), "{error}");

    // The test's own folder is on a disk.
    let disk = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    disk.set_len(MIB).unwrap();
    let path =
        format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&disk));
    let child = Writer::start(&[(Kind::File { path, offset: 0 }, MIB)], 4096);
    let error = GuestRam::open(child.pid(), &child.regions, false).unwrap_err();
    assert!(matches!(error, RamError::WrongFileSystem { .. }), "{error:?}");

    let (_file, path) = tmpfs_file(MIB);
    let mut child = Writer::start(&[(Kind::File { path, offset: 0 }, MIB)], 4096);
    let mut wrong = child.regions.clone();
    wrong[0].page_bytes = 8192;
    let error = GuestRam::open(child.pid(), &wrong, false).unwrap_err();
    assert!(matches!(error, RamError::PageSize { .. }), "{error:?}");
    let mut beyond = child.regions.clone();
    beyond[0].length_bytes = 64 << 30;
    let error = GuestRam::open(child.pid(), &beyond, false).unwrap_err();
    assert!(
        matches!(
            error,
            RamError::NotMapped { .. } | RamError::Private { .. } | RamError::Scattered { .. }
        ),
        "{error:?}"
    );
    child.order("unmap 0");
    let error = GuestRam::open(child.pid(), &child.regions, false).unwrap_err();
    assert!(matches!(error, RamError::NotMapped { .. }), "{error:?}");
    assert!(matches!(GuestRam::open(child.pid(), &[], false), Err(RamError::Layout { .. })));
    assert!(matches!(GuestRam::open(-3, &child.regions, false), Err(RamError::Proc { .. })));
}

#[test]
fn reads_and_writes_stay_within_a_block() {
    let child = Writer::start(&[(Kind::Memfd, MIB), (Kind::Memfd, MIB)], 4096);
    let ram = GuestRam::open(child.pid(), &child.regions, false).unwrap();
    let mut buffer = vec![0; 2 * PAGE_BYTES];
    let outside =
        |result| assert!(matches!(result, Err(RamError::OutOfRange { .. })), "{result:?}");
    outside(ram.read(PageIndex(255), &mut buffer));
    outside(ram.read(PageIndex(512), &mut buffer));
    outside(ram.read(PageIndex(u64::MAX), &mut buffer));
    outside(ram.read(PageIndex(0), &mut []));
    outside(ram.read(PageIndex(0), &mut buffer[..4095]));
    outside(ram.discard(PageIndex(0), u64::MAX));
    outside(ram.discard(PageIndex(0), 0));
    ram.read(PageIndex(254), &mut buffer).unwrap();
    ram.read(PageIndex(256), &mut buffer).unwrap();
    let read_only =
        |result| assert!(matches!(result, Err(RamError::ReadOnly { .. })), "{result:?}");
    read_only(ram.write(PageIndex(0), &buffer));
    read_only(ram.discard(PageIndex(0), 1));
}

/// Huge pages for the tests of this process; gives back what it took.
#[derive(Debug)]
pub(crate) struct HugePages {
    before: String,
    mount: tempfile::TempDir,
}

const NR_HUGEPAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl HugePages {
    /// Raises the pool and mounts hugetlbfs; prints why not, if not.
    pub(crate) fn get(pages: u64) -> Option<Self> {
        let skip = |why: String| {
            println!("SKIPPED, no huge pages: {why}");
            None
        };
        let before = match std::fs::read_to_string(NR_HUGEPAGES) {
            Ok(before) => before,
            Err(error) => return skip(error.to_string()),
        };
        let wanted = before.trim().parse::<u64>().unwrap() + pages;
        if let Err(error) = std::fs::write(NR_HUGEPAGES, wanted.to_string()) {
            return skip(error.to_string());
        }
        let mount = tempfile::tempdir().unwrap();
        let huge = Self { before, mount };
        let got = std::fs::read_to_string(NR_HUGEPAGES).unwrap();
        if got.trim().parse::<u64>().unwrap() < wanted {
            return skip(format!("{} of {wanted} pages", got.trim()));
        }
        let status = std::process::Command::new("mount")
            .args(["-t", "hugetlbfs", "-o", "pagesize=2M", "none"])
            .arg(huge.mount.path())
            .status();
        match status {
            Ok(status) if status.success() => Some(huge),
            other => skip(format!("mount: {other:?}")),
        }
    }

    pub(crate) fn file(&self, bytes: u64) -> (File, String) {
        let path = self.mount.path().join("ram");
        let file = File::create(&path).unwrap();
        file.set_len(bytes).unwrap();
        (file, path.to_str().unwrap().to_owned())
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.mount.path()).status();
        let _ = std::fs::write(NR_HUGEPAGES, self.before.trim());
    }
}

pub(crate) static HUGE_POOL: Mutex<()> = Mutex::new(());

#[test]
fn huge_pages_are_read_written_and_discarded() {
    const HUGE: u64 = 2 * MIB;
    let _alone = HUGE_POOL.lock();
    let Some(pool) = HugePages::get(4) else { return };
    let (file, path) = pool.file(3 * HUGE);
    // The second and third page of the file.
    let child = Writer::start(&[(Kind::File { path, offset: HUGE }, 2 * HUGE)], HUGE);
    let ram = GuestRam::open(child.pid(), &child.regions, true).unwrap();
    let mut page = [1; PAGE_BYTES];
    ram.read(PageIndex(700), &mut page).unwrap();
    assert_eq!((page, blocks_of(&file)), ([0; PAGE_BYTES], 0));
    assert!(ram.data_ranges().unwrap().is_empty());
    ram.write(PageIndex(511), &[9; 2 * PAGE_BYTES]).unwrap();
    assert_eq!(ram.resident_bytes().unwrap(), 2 * HUGE);
    assert_eq!(ram.data_ranges().unwrap().len(), 1024);
    ram.write(PageIndex(600), &[8; PAGE_BYTES]).unwrap();
    // Part of the first page and all of nothing: no hole, but zeros.
    ram.discard(PageIndex(500), 13).unwrap();
    ram.read(PageIndex(512), &mut page).unwrap();
    assert_eq!(page, [0; PAGE_BYTES]);
    ram.read(PageIndex(600), &mut page).unwrap();
    assert_eq!(page, [8; PAGE_BYTES]);
    assert_eq!(ram.resident_bytes().unwrap(), 2 * HUGE);
    // All of the second page, and the end of the first.
    ram.write(PageIndex(510), &[9; PAGE_BYTES]).unwrap();
    ram.discard(PageIndex(510), 514).unwrap();
    assert_eq!(ram.resident_bytes().unwrap(), HUGE);
    ram.read(PageIndex(600), &mut page).unwrap();
    assert_eq!(page, [0; PAGE_BYTES]);
    ram.read(PageIndex(510), &mut page).unwrap();
    assert_eq!(page, [0; PAGE_BYTES]);
    // A discard in a hole allocates nothing.
    ram.discard(PageIndex(600), 3).unwrap();
    assert_eq!(ram.resident_bytes().unwrap(), HUGE);
    // Across the border of two pages, one of which is a hole.
    write_in_pieces(&ram, 480, 60);
    assert_eq!(ram.resident_bytes().unwrap(), 2 * HUGE);
}
