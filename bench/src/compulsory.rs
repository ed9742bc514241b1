//! Compulsory bytes: what no migration can do without, whatever it does.
//!
//! ```text
//!  memory of the guest where it was stopped ── pages that are not zero ── each content once
//!                                             ── one Zstandard stream ──> bytes
//! ```
//! A page is compulsory if the guest uses it, it is not zero, and no other page with its content
//! has been counted. Whether the guest uses a page only a look into its kernel could tell, and there
//! is none: all pages count, so that the figure is an *upper bound* of what is compulsory (a migration that knew
//! the guest could do with less). What is counted is compressed as a single
//! Zstandard stream of level [`LEVEL`] with long-distance matching over a window of 8 MiB, which
//! Godwit's own streams have, too, in the order of addresses. Device state, headers and encryption come on top of it for everybody.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result, ensure};
use framework::{Backend, Vm};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;
use zstd::stream::write::Encoder;

const PAGE_BYTES: usize = 4096;

/// Bytes of one read.
const PART_BYTES: usize = 1 << 20;

/// Level of Zstandard.
pub(crate) const LEVEL: i32 = 3;

/// Binary logarithm of its window's size.
const WINDOW_LOG: u32 = 23;

/// What the memory of a guest holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Compulsory {
    /// Pages looked at: all that are no holes.
    pub(crate) pages: u64,
    /// Of them, not zero.
    pub(crate) nonzero_pages: u64,
    /// Of them, each content once.
    pub(crate) unique_pages: u64,
    /// Those, compressed, in bytes.
    pub(crate) bytes: u64,
}

/// Counts what is written to it.
#[derive(Debug, Default)]
struct Count(u64);

impl Write for Count {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Takes pages in the order of their addresses.
struct Tally {
    seen: HashSet<u128>,
    stream: Encoder<'static, Count>,
    pages: u64,
    nonzero_pages: u64,
}

impl Tally {
    fn new() -> Result<Self> {
        let mut stream = Encoder::new(Count::default(), LEVEL).context("No Zstandard stream")?;
        stream.window_log(WINDOW_LOG).context("No window of 8 MiB")?;
        stream.long_distance_matching(true).context("No long-distance matching")?;
        Ok(Self { seen: HashSet::new(), stream, pages: 0, nonzero_pages: 0 })
    }

    fn add(&mut self, pages: &[u8]) -> Result<()> {
        for page in pages.chunks_exact(PAGE_BYTES) {
            self.pages += 1;
            if page.iter().fold(0, |all, byte| all | byte) == 0 {
                continue;
            }
            self.nonzero_pages += 1;
            if self.seen.insert(xxh3_128(page)) {
                self.stream.write_all(page).context("Zstandard failed")?;
            }
        }
        Ok(())
    }

    fn end(self) -> Result<Compulsory> {
        let unique_pages = self.seen.len() as u64;
        let bytes = self.stream.finish().context("Zstandard failed")?.0;
        Ok(Compulsory { pages: self.pages, nonzero_pages: self.nonzero_pages, unique_pages, bytes })
    }
}

/// Of a guest that has been stopped for good, in the QEMU that it has left.
///
/// # Errors
/// Its memory cannot be read.
pub(crate) fn of(vm: &mut Vm) -> Result<Compulsory> {
    let mut tally = Tally::new()?;
    if vm.spec().backend == Backend::Private {
        let answer = vm.qmp().monitor("gpa2hva 0")?;
        let from = host_address(&answer).with_context(|| format!("No address in {answer:?}"))?;
        let memory = File::open(format!("/proc/{}/mem", vm.pid())).context("Cannot open memory")?;
        add_range(&mut tally, &memory, from, vm.spec().memory_mib << 20)?;
        return tally.end();
    }
    ensure!(!vm.ram_files().is_empty(), "The guest's memory lies in no file");
    for path in vm.ram_files() {
        let shown = path.display();
        let file = File::open(path).with_context(|| format!("Cannot open {shown}"))?;
        add_data(&mut tally, &file).with_context(|| format!("Cannot read {shown}"))?;
    }
    tally.end()
}

/// The address in `Host virtual address for 0x0 (m0) is 0x7f0000000000`.
fn host_address(answer: &str) -> Option<u64> {
    let (_, address) = answer.trim().rsplit_once("0x")?;
    u64::from_str_radix(address, 16).ok()
}

/// Adds all of a file but its holes, which reading would not fill but would take its time.
fn add_data(tally: &mut Tally, file: &File) -> Result<()> {
    let mut at = 0;
    loop {
        let from = match seek(file.as_fd(), SeekFrom::Data(at)) {
            Ok(from) => from,
            // Nothing but a hole follows.
            Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error).context("No data can be found"),
        };
        let to = seek(file.as_fd(), SeekFrom::Hole(from)).context("No hole can be found")?;
        add_range(tally, file, from, to.saturating_sub(from))?;
        at = to;
    }
}

fn add_range(tally: &mut Tally, file: &File, from: u64, bytes: u64) -> Result<()> {
    let mut part = vec![0; PART_BYTES];
    let mut done = 0;
    while done < bytes {
        let count = usize::try_from(bytes - done).unwrap_or(PART_BYTES).min(PART_BYTES);
        let part = part.get_mut(..count).unwrap_or_default();
        file.read_exact_at(part, from + done).context("Cannot read the guest's memory")?;
        tally.add(part)?;
        done += count as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use guest_programs::pattern::{fill_block, fill_text};

    use super::*;

    fn noise(number: u64) -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        fill_block(1, number, &mut page);
        page
    }

    fn count(pages: &[[u8; PAGE_BYTES]]) -> Compulsory {
        let mut tally = Tally::new().unwrap();
        tally.add(&pages.concat()).unwrap();
        tally.end().unwrap()
    }

    #[test]
    fn zeros_and_repeats_are_not_compulsory() {
        let found = count(&[[0; PAGE_BYTES], noise(1), noise(2), noise(1), [0; PAGE_BYTES]]);
        assert_eq!((found.pages, found.nonzero_pages, found.unique_pages), (5, 3, 2));
        let page = PAGE_BYTES as u64;
        assert!((2 * page..2 * page + 200).contains(&found.bytes), "{found:?}");
        assert_eq!(count(&[noise(1), noise(2)]).bytes, found.bytes);
    }

    #[test]
    fn text_counts_as_what_it_compresses_to() {
        let mut text = [[0; PAGE_BYTES]; 8];
        for (seed, page) in text.iter_mut().enumerate() {
            fill_text(seed as u64, page);
        }
        let found = count(&text);
        assert_eq!(found.unique_pages, 8);
        assert!(found.bytes < 8 * PAGE_BYTES as u64 / 3, "{found:?}");
    }

    #[test]
    fn what_repeats_within_the_window_counts_once() {
        let part: Vec<[u8; PAGE_BYTES]> = (0..1024).map(noise).collect();
        // Every page is another one, as each has a byte of its own.
        let mut again = part.clone();
        again.iter_mut().for_each(|page| page[0] ^= 0x55);
        let (once, twice) = (count(&part), count(&[part, again].concat()));
        assert_eq!(twice.unique_pages, 2 * once.unique_pages);
        assert!(twice.bytes < once.bytes * 11 / 10, "{once:?} {twice:?}");
    }

    #[test]
    fn holes_of_a_file_are_left_out() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&noise(1), 3 << 20).unwrap();
        file.write_all_at(&noise(2), 40 << 20).unwrap();
        let mut tally = Tally::new().unwrap();
        add_data(&mut tally, &file).unwrap();
        let found = tally.end().unwrap();
        assert_eq!(found.unique_pages, 2);
        assert!(found.pages < 100, "{found:?}");
    }

    #[test]
    fn reads_the_address_that_qemu_prints() {
        let answer = "Host virtual address for 0x0 (m0) is 0x7f12a3e00000\r\n";
        assert_eq!(host_address(answer), Some(0x7f12_a3e0_0000));
        assert_eq!(host_address("No memory is mapped"), None);
    }
}
