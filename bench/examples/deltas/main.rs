//! Compares what the engine can remember of sent pages, without a guest:
//! `cargo run --release -p bench --example deltas`.
//! An argument chooses the workloads whose names hold it.
//!
//! A guest of 1 GiB full of text is written to in several ways ([`guest`]) while it is moved:
//! rounds in the engine's own order ([`migrate_core::order`]), with a scan every tick, each page
//! read when its turn comes. All methods ([`methods`]) see the same pages at the same time, so
//! rounds last as long as they are told here, not as long as a method's bytes would take. The first
//! round is the same for all: every page whole. Counted is what comes after it, until the guest has
//! been stopped.
//!
//! Tables go to stdout: MB of contents with 16 bytes for each page sent, as a lane has it, and the
//! same packed by a lane's Zstandard stream.

mod guest;
mod methods;

use std::time::Duration;

use anyhow::Result;
use migrate_core::batch::RUN_BYTES;
use migrate_core::codec::{Codec, Packer, packed_bytes_max};
use migrate_core::delta::Page;
use migrate_core::encode::BATCH_TARGET_BYTES;
use migrate_core::layout::{PAGE_BYTES, PageIndex};
use migrate_core::order::{Heat, Order, TICK};
use migrate_core::page_cache::Sending;
use migrate_core::pageset::PageSet;
use rustix::time::{ClockId, clock_gettime};

use crate::guest::{GUEST_PAGES, Guest, WORKLOADS, Workload};
use crate::methods::{Method, Sent};

/// Ticks of the first round: 1 GiB at 1 Gbit/s.
const FIRST_ROUND_TICKS: u32 = 86;

/// Ticks of each later round, and how many there are before the guest is stopped.
const ROUND_TICKS: u32 = 10;
const LATER_ROUNDS: u32 = 6;

/// Pages that a method is given together, as a batch is read.
const GROUP_PAGES: usize = 64;

/// Bytes of the largest batch: it was not full before its last group.
const BATCH_BYTES_MAX: usize = BATCH_TARGET_BYTES + GROUP_PAGES * PAGE_BYTES;

/// Memory for what is remembered, in MiB.
const BUDGETS_MIB: [u64; 3] = [64, 128, 512];

/// A method with a budget, and what it came to.
struct Contestant {
    method: Box<dyn Method>,
    packer: Packer,
    /// Contents for the next batch, of which the first `batch_bytes` bytes are in use.
    batch: Vec<u8>,
    batch_bytes: usize,
    packed: Vec<u8>,
    later: Tally,
    first_cpu: Duration,
}

/// What was sent after the first round.
#[derive(Default)]
struct Tally {
    pages: u64,
    with_base: u64,
    content_bytes: u64,
    packed_bytes: u64,
    run_bytes: u64,
    cpu: Duration,
}

impl Contestant {
    fn new(method: Box<dyn Method>) -> Self {
        Self {
            method,
            packer: Packer::default(),
            batch: vec![0; BATCH_BYTES_MAX],
            batch_bytes: 0,
            packed: vec![0; packed_bytes_max(BATCH_BYTES_MAX)],
            later: Tally::default(),
            first_cpu: Duration::ZERO,
        }
    }

    /// Sends a group of pages, and packs the batch if it is full.
    fn send(&mut self, group: &Group, first_round: bool) -> Result<()> {
        let began = cpu_time();
        let (mut pages, mut with_base) = (0, 0);
        for (&(page, sending), content) in group.pages.iter().zip(&group.contents) {
            let room = &mut self.batch[self.batch_bytes..][..PAGE_BYTES];
            self.batch_bytes += match self.method.send(page, content, sending, room) {
                Sent::Unchanged => {
                    with_base += 1;
                    0
                }
                Sent::Delta(bytes) => {
                    with_base += 1;
                    pages += 1;
                    bytes
                }
                Sent::Whole => {
                    room.copy_from_slice(content);
                    pages += 1;
                    PAGE_BYTES
                }
            };
        }
        let took = cpu_time().saturating_sub(began);
        if first_round {
            self.first_cpu += took;
            self.batch_bytes = 0;
            return Ok(());
        }
        self.later.cpu += took;
        self.later.pages += group.pages.len() as u64;
        self.later.with_base += with_base;
        self.later.run_bytes += pages * RUN_BYTES as u64;
        if self.batch_bytes >= BATCH_TARGET_BYTES { self.pack() } else { Ok(()) }
    }

    fn pack(&mut self) -> Result<()> {
        let content = &self.batch[..self.batch_bytes];
        let packed = self.packer.pack(Codec::Zstd, content, &mut self.packed)?;
        self.later.content_bytes += self.batch_bytes as u64;
        self.later.packed_bytes += packed as u64;
        self.batch_bytes = 0;
        Ok(())
    }
}

/// Pages that are read together.
#[derive(Default)]
struct Group {
    pages: Vec<(PageIndex, Sending)>,
    contents: Vec<Page>,
}

/// A guest on its way.
struct Migration {
    guest: Guest,
    order: Order,
    heat: Heat,
    now: Duration,
    /// How often each page was sent.
    versions: Vec<u32>,
    contestants: Vec<Contestant>,
}

impl Migration {
    fn new(workload: &Workload) -> Self {
        let methods = BUDGETS_MIB.iter().flat_map(|mib| methods::with_budget(mib << 20));
        Self {
            guest: Guest::new(workload),
            order: Order::new(GUEST_PAGES),
            heat: Heat::new(GUEST_PAGES),
            now: Duration::ZERO,
            versions: vec![0; GUEST_PAGES as usize],
            contestants: methods.map(Contestant::new).collect(),
        }
    }

    /// Sends a round and returns what was written meanwhile. Each tick the guest writes, a scan
    /// tells what, and the tick's share of the pages is sent.
    fn round(&mut self, dirty: &PageSet, ticks: u32, number: u32) -> Result<PageSet> {
        self.contestants.iter_mut().for_each(|contestant| contestant.method.begin_round());
        let waves = self.order.begin_round(dirty);
        let mut queue = waves.iter().flat_map(PageSet::iter).collect::<Vec<_>>().into_iter();
        let (mut left_out, mut written) = (PageSet::new(GUEST_PAGES), PageSet::new(GUEST_PAGES));
        for ticks_left in (1..=ticks as usize).rev() {
            let scan = self.guest.write_for_a_tick();
            self.now += TICK;
            self.order.scanned(&scan, self.now);
            self.heat.scanned(&scan, self.now);
            left_out.union_with(&self.order.leave_out(&scan, number == 1));
            written.union_with(&scan);
            let share = queue.len().div_ceil(ticks_left);
            let pages: Vec<u64> = queue.by_ref().take(share).collect();
            self.send(pages.into_iter().filter(|page| !left_out.contains(*page)), number == 1)?;
        }
        self.order.round_sent();
        Ok(written)
    }

    fn send(&mut self, pages: impl Iterator<Item = u64>, first_round: bool) -> Result<()> {
        let mut pages = pages.peekable();
        while pages.peek().is_some() {
            let mut group = Group::default();
            for page in pages.by_ref().take(GROUP_PAGES) {
                let version = &mut self.versions[page as usize];
                *version += 1;
                let sending = Sending { version: *version, heat: self.heat.of(page) };
                group.pages.push((PageIndex(page), sending));
                group.contents.push(self.guest.read(page));
            }
            for contestant in &mut self.contestants {
                contestant.send(&group, first_round)?;
            }
        }
        Ok(())
    }

    /// All rounds, and what is left when the guest has stopped.
    fn run(&mut self) -> Result<()> {
        let mut dirty = PageSet::new(GUEST_PAGES);
        dirty.insert_range(0..GUEST_PAGES);
        dirty = self.round(&dirty, FIRST_ROUND_TICKS, 1)?;
        for number in 2..2 + LATER_ROUNDS {
            dirty = self.round(&dirty, ROUND_TICKS, number)?;
        }
        self.contestants.iter_mut().for_each(|contestant| contestant.method.begin_round());
        self.send(dirty.iter(), false)?;
        self.contestants.iter_mut().try_for_each(Contestant::pack)
    }

    /// One row a method, one column a budget.
    fn print(&self, workload: &Workload) {
        let pages = self.contestants.first().map_or(0, |first| first.later.pages);
        let whole_mb = pages as f64 * (PAGE_BYTES + RUN_BYTES) as f64 / 1e6;
        println!(
            "\n{}; {pages} pages after the first round, {whole_mb:.1} MB whole\n",
            workload.name
        );
        let budgets = BUDGETS_MIB.map(|mib| format!(" {mib} MiB |")).concat();
        println!("| remembered |{budgets} ns a page, first round | later |");
        println!("|---|{}---|---|", "---|".repeat(BUDGETS_MIB.len()));
        let methods = self.contestants.len() / BUDGETS_MIB.len();
        for number in 0..methods {
            let with_budgets = self.contestants.iter().skip(number).step_by(methods);
            let mut row = String::new();
            let (mut first_ns, mut later_ns) = (vec![], vec![]);
            for Contestant { method, later, first_cpu, .. } in with_budgets {
                if row.is_empty() {
                    row = format!("| {} |", method.name());
                }
                let mb = |bytes: u64| (bytes + later.run_bytes) as f64 / 1e6;
                let base = 100.0 * later.with_base as f64 / later.pages.max(1) as f64;
                let (plain, packed) = (mb(later.content_bytes), mb(later.packed_bytes));
                row += &format!(" {plain:.1} ({packed:.1}), {base:.0} % |");
                first_ns.push(format!("{}", first_cpu.as_nanos() / u128::from(GUEST_PAGES)));
                later_ns.push(format!("{}", later.cpu.as_nanos() / u128::from(later.pages.max(1))));
            }
            println!("{row} {} | {} |", first_ns.join(", "), later_ns.join(", "));
        }
    }
}

/// Processor time of this thread.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap_or_default()
}

fn main() -> Result<()> {
    println!("Cells: MB sent after the first round (packed), share of pages with a base.");
    let wanted = std::env::args().nth(1).unwrap_or_default();
    for workload in WORKLOADS.iter().filter(|workload| workload.name.contains(&wanted)) {
        let mut migration = Migration::new(workload);
        migration.run()?;
        migration.print(workload);
    }
    Ok(())
}
