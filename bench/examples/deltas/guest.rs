//! A guest of 1 GiB full of text, and what writes to it.

use std::collections::HashMap;

use migrate_core::delta::Page;
use migrate_core::layout::PAGE_BYTES;
use migrate_core::pageset::PageSet;

/// Pages of the guest: 1 GiB.
pub(crate) const GUEST_PAGES: u64 = 1 << 18;

/// Where the pages that are written lie, and how many there are: 200 MiB.
const HOT_FIRST: u64 = 1 << 16;
const HOT_PAGES: u64 = 51_200;

/// Pages that a stream writes, one after the other and over again: 400 MiB.
const STREAM_FIRST: u64 = HOT_FIRST + HOT_PAGES;
const STREAM_PAGES: u64 = 102_400;

/// Which page is written next.
#[derive(Clone, Copy)]
enum Where {
    /// Any of the hot set.
    Anywhere,
    /// Of the hot set, the page of rank n with a chance of 1 / n (Zipf).
    Skewed,
    /// The next of the stream.
    Stream,
}

/// What is written to it.
#[derive(Clone, Copy)]
enum What {
    /// 64 bytes of text at a multiple of 8.
    Bytes64,
    /// 8 words of 8 bytes, each a count, at multiples of 8.
    Words8,
    /// Other text, all over the page.
    WholePage,
    /// What is there already.
    Same,
}

/// Somebody who writes in the guest.
struct Writer {
    place: Where,
    what: What,
    /// Writes in a tick of 100 ms.
    writes: u32,
}

/// What happens in a guest.
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    writers: &'static [Writer],
}

const fn writer(place: Where, what: What, writes: u32) -> Writer {
    Writer { place, what, writes }
}

/// What is compared.
pub(crate) const WORKLOADS: [Workload; 6] = [
    Workload {
        name: "64 bytes, anywhere in 200 MiB",
        writers: &[writer(Where::Anywhere, What::Bytes64, 2000)],
    },
    Workload {
        name: "64 bytes, skewed over 200 MiB (Zipf)",
        writers: &[writer(Where::Skewed, What::Bytes64, 2000)],
    },
    Workload {
        name: "8 scattered words, anywhere in 200 MiB",
        writers: &[writer(Where::Anywhere, What::Words8, 2000)],
    },
    Workload {
        name: "Whole pages, anywhere in 200 MiB",
        writers: &[writer(Where::Anywhere, What::WholePage, 500)],
    },
    Workload {
        name: "Equal content, anywhere in 200 MiB",
        writers: &[writer(Where::Anywhere, What::Same, 2000)],
    },
    Workload {
        name: "64 bytes, skewed over 200 MiB, beside a stream of whole pages through 400 MiB",
        writers: &[
            writer(Where::Skewed, What::Bytes64, 2000),
            writer(Where::Stream, What::WholePage, 500),
        ],
    },
];

/// Numbers that look random, always the same (splitmix64).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Below `end`, n with a chance of about 1 / (n + 1).
    fn skewed(&mut self, end: u64) -> u64 {
        let share = self.next() as f64 / u64::MAX as f64;
        ((end as f64).powf(share) as u64).min(end) - 1
    }
}

/// Words as they come in text: some often, most rarely.
struct Words {
    /// Each with a space behind it.
    words: Vec<Vec<u8>>,
    /// Numbers of words, as often as they come.
    picks: Vec<usize>,
}

impl Words {
    fn new() -> Self {
        const SYLLABLES: [&str; 16] = [
            "ra", "ten", "mo", "li", "sa", "ker", "un", "dis", "po", "tion", "e", "ing", "ver",
            "al", "com", "ba",
        ];
        const WORDS: u64 = 4096;
        let mut rng = Rng(1);
        let mut word = |number| {
            let syllables = match number {
                0..16 => 1,
                16..256 => 2,
                _ => 3,
            };
            let mut word: String =
                (0..syllables).map(|_| SYLLABLES[rng.below(16) as usize]).collect();
            word.push(' ');
            word.into_bytes()
        };
        let words = (0..WORDS).map(&mut word).collect();
        let picks = (0..1 << 16).map(|_| rng.skewed(WORDS) as usize).collect();
        Self { words, picks }
    }

    fn fill(&self, rng: &mut Rng, mut room: &mut [u8]) {
        while !room.is_empty() {
            let word = &self.words[self.picks[rng.below(1 << 16) as usize]];
            let (target, rest) = room.split_at_mut(word.len().min(room.len()));
            target.copy_from_slice(&word[..target.len()]);
            room = rest;
        }
    }
}

/// The guest's memory while it runs.
pub(crate) struct Guest {
    writers: &'static [Writer],
    words: Words,
    rng: Rng,
    stream_next: u64,
    count: u64,
    /// Pages that were written to; the others are as in the beginning.
    written: HashMap<u64, Box<Page>>,
}

impl Guest {
    pub(crate) fn new(workload: &Workload) -> Self {
        Self {
            writers: workload.writers,
            words: Words::new(),
            rng: Rng(7),
            stream_next: 0,
            count: 0,
            written: HashMap::new(),
        }
    }

    /// The content of a page.
    pub(crate) fn read(&self, page: u64) -> Page {
        match self.written.get(&page) {
            Some(content) => **content,
            None => first_content(&self.words, page),
        }
    }

    /// Runs the guest for 100 ms and returns the pages that a scan finds written.
    pub(crate) fn write_for_a_tick(&mut self) -> PageSet {
        let mut dirty = PageSet::new(GUEST_PAGES);
        for Writer { place, what, writes } in self.writers {
            for _ in 0..*writes {
                let page = self.choose(*place);
                self.write(page, *what);
                dirty.insert(page);
            }
        }
        dirty
    }

    fn choose(&mut self, place: Where) -> u64 {
        match place {
            Where::Anywhere => HOT_FIRST + self.rng.below(HOT_PAGES),
            // Neighbours in rank are no neighbours in memory; no divisor is common to both numbers.
            Where::Skewed => HOT_FIRST + self.rng.skewed(HOT_PAGES) * 20_011 % HOT_PAGES,
            Where::Stream => {
                self.stream_next = (self.stream_next + 1) % STREAM_PAGES;
                STREAM_FIRST + self.stream_next
            }
        }
    }

    fn write(&mut self, page: u64, what: What) {
        let Self { words, rng, count, written, .. } = self;
        let content = written.entry(page).or_insert_with(|| Box::new(first_content(words, page)));
        match what {
            What::Bytes64 => {
                let start = 8 * rng.below((PAGE_BYTES as u64 - 64) / 8 + 1) as usize;
                words.fill(rng, &mut content[start..start + 64]);
            }
            What::Words8 => {
                for _ in 0..8 {
                    *count += 1;
                    let slot = rng.below(PAGE_BYTES as u64 / 8) as usize;
                    content.as_chunks_mut::<8>().0[slot] = count.to_le_bytes();
                }
            }
            What::WholePage => words.fill(rng, &mut content[..]),
            What::Same => {}
        }
    }
}

fn first_content(words: &Words, page: u64) -> Page {
    let mut content = [0; PAGE_BYTES];
    words.fill(&mut Rng(page << 20), &mut content);
    content
}
