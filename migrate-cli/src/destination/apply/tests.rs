//! Batches applied to memory of this process.

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt;

use memmap2::{MmapOptions, MmapRaw};
use qemu_glue::ram::{GuestRam, RamRegion};

use super::*;

const PAGES: u64 = 256;

/// RAM as a QEMU would have it.
struct Guest {
    ram: Arc<GuestRam>,
    file: File,
    _map: MmapRaw,
}

impl Guest {
    fn new() -> Self {
        let length_bytes = PAGES * PAGE_BYTES as u64;
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(length_bytes).unwrap();
        let map = MmapOptions::new().map_raw(&file).unwrap();
        let hva = map.as_ptr() as u64;
        let name = "m0".to_owned();
        let region = RamRegion { name, length_bytes, page_bytes: PAGE_BYTES as u64, hva };
        let pid = i32::try_from(std::process::id()).unwrap();
        let ram = Arc::new(GuestRam::open(pid, &[region], true).unwrap());
        Self { ram, file, _map: map }
    }

    /// The byte that fills a page.
    fn fill_of(&self, page: u64) -> u8 {
        let mut content = [0; PAGE_BYTES];
        self.file.read_exact_at(&mut content, page * PAGE_BYTES as u64).unwrap();
        assert!(content.iter().all(|byte| *byte == content[0]), "page {page} is mixed");
        content[0]
    }

    /// Applies batches of a lane in a session with so many.
    async fn apply(
        &self,
        (lane, lanes): (usize, usize),
        batches: Vec<Batch>,
    ) -> Result<(), String> {
        let pages = Arc::new(DestinationPages::new(PAGES));
        let (applier, inlets) = Applier::start(self.ram.clone(), pages, lanes, 2);
        let mut want = vec![0; lanes];
        want[lane] = batches.len() as u64;
        for batch in batches {
            let _taken = inlets[lane].push(batch).await;
        }
        let reached = applier.reach(&want).await;
        drop(inlets);
        applier.join();
        reached.map_err(|error| {
            assert_eq!(error.bin(), ErrorBin::PeerMisbehaved);
            error.source().map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
        })
    }
}

/// A run and its contents.
type Part = (PageRun, Vec<u8>);

fn run(first: u64, pages: usize, version: u32, kind: RunKind) -> PageRun {
    PageRun { first: PageIndex(first), pages: u16::try_from(pages).unwrap(), kind, version }
}

/// Pages full of these bytes.
fn raw(first: u64, version: u32, fills: &[u8]) -> Part {
    let content = fills.iter().flat_map(|fill| [*fill; PAGE_BYTES]).collect();
    (run(first, fills.len(), version, RunKind::Raw), content)
}

/// References to these pages.
fn same(first: u64, version: u32, of: &[u64]) -> Part {
    let content = of.iter().flat_map(|page| page.to_le_bytes()).collect();
    (run(first, of.len(), version, RunKind::Same), content)
}

fn batch(parts: Vec<Part>) -> Batch {
    let (runs, contents): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
    Batch::plain(runs, contents.concat(), 1)
}

#[tokio::test]
async fn a_reference_takes_what_the_page_holds_at_its_turn() {
    let guest = Guest::new();
    let one = vec![
        raw(1, 1, &[0xa1]),
        same(2, 1, &[1]),
        raw(1, 2, &[0xa2]),
        // The second of them takes what the first has just taken.
        same(3, 1, &[1, 3]),
        same(1, 3, &[2]),
    ];
    let zero = (run(3, 1, 2, RunKind::Zero), vec![]);
    let two = vec![same(5, 1, &[4]), zero, same(6, 1, &[3]), same(4, 2, &[1])];
    guest.apply((0, 1), vec![batch(one), batch(two)]).await.unwrap();
    let fills: Vec<u8> = (0..8).map(|page| guest.fill_of(page)).collect();
    assert_eq!(fills, [0, 0xa1, 0xa1, 0, 0xa1, 0xa2, 0, 0]);
}

#[tokio::test]
async fn references_that_cannot_be_meant_are_refused() {
    // Of three lanes, or of two and one for missing pages, pages 64 to 127 travel on lane 1.
    let cases = [
        ("itself", same(80, 1, &[80]), "which is itself"),
        ("itself again", same(70, 2, &[70]), "which is itself"),
        ("another lane", same(80, 1, &[5]), "the same lane"),
        ("the lane of neither", same(5, 1, &[6]), "the same lane"),
        ("never came", same(80, 1, &[90]), "which never came"),
        ("comes later", same(80, 1, &[82, 70, 70]), "which comes later"),
        ("outside", same(80, 1, &[PAGES]), "outside the guest's RAM"),
        ("far outside", same(80, 1, &[u64::MAX]), "outside the guest's RAM"),
        ("wrong version", same(80, 2, &[70]), "version 1 was due"),
        ("none outside", same(PAGES, 1, &[70]), "outside the guest's RAM"),
    ];
    for (what, part, word) in cases {
        let guest = Guest::new();
        let batches = vec![batch(vec![raw(70, 1, &[7])]), batch(vec![part])];
        let said = guest.apply((1, 3), batches).await.expect_err(what);
        assert!(said.contains(word), "{what}: {said}");
        assert_eq!(guest.fill_of(80), 0, "{what}: was written");
    }
    let cut = Batch::plain(vec![run(80, 1, 1, RunKind::Same)], vec![70u8, 0, 0, 0, 0, 0, 0], 1);
    let said = Guest::new().apply((1, 3), vec![batch(vec![raw(70, 1, &[7])]), cut]).await;
    assert!(said.is_err_and(|said| said.contains("fewer or more bytes")));
}

#[test]
fn the_last_lane_may_not_count() {
    let pages = |of| [PageIndex(64), PageIndex(of)];
    assert!(travel_on(1, pages(65), 3) && travel_on(1, pages(65), 2));
    assert!(travel_on(1, pages(4 * 64), 3), "one of three lanes");
    assert!(travel_on(1, pages(3 * 64), 3), "one of two lanes and one for missing pages");
    assert!(!travel_on(1, pages(2 * 64), 3) && !travel_on(0, pages(65), 3));
    assert!(travel_on(0, pages(0), 1) && travel_on(0, pages(0), 2));
}

#[test]
fn contents_are_taken_front_to_back_across_pieces() {
    let pieces: [&[u8]; 3] = [&[1, 2, 3], &[4], &[5, 6]];
    let mut contents = Contents::of(pieces.into_iter());
    let mut take = |bytes| {
        let pieces = contents.take(bytes)?;
        Some(pieces.iter().map(|piece| piece.to_vec()).collect::<Vec<_>>())
    };
    assert_eq!(take(2), Some(vec![vec![1, 2]]));
    assert_eq!(take(0), Some(vec![]));
    assert_eq!(take(3), Some(vec![vec![3], vec![4], vec![5]]));
    assert_eq!(take(1), Some(vec![vec![6]]));
    assert_eq!(take(1), None, "fewer bytes than asked for");
    assert!(contents.ended());
    assert!(!Contents::of([&[][..], &[1]].into_iter()).ended());
    let mut contents = Contents::of(pieces.into_iter());
    assert_eq!((contents.take_number(5), contents.take_number(2)), (Some(0x05_0403_0201), None));
}
