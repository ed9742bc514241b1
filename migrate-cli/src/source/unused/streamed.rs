//! The same for pages that QEMU sends: those that the guest does not use travel as zeros.
//!
//! ```text
//!   QEMU reads a page ─► it comes here ─► unused now? ─► zeros
//!                                              └─ no ──► its content
//!   the guest is stopped, QEMU has sent all ─► which of the zeros are used now? ─► their content
//!   before the commit ─► the same kernel, and no reset? ─► else it is given up
//! ```
//!
//! Invariants:
//! - A page is judged after QEMU cleared its dirty mark and read it: whoever takes it later and writes it has QEMU send it
//!   again.
//! - With the guest stopped, every page that travelled as zeros instead of its content is looked at again.
//! - What was judged by a kernel that does not run any more is never handed over.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use fctrans::kernel::Kernel;
use fctrans::memory::LiveMemory;
use migrate_core::layout::{PAGE_BYTES, PageIndex, RamLayout};
use migrate_core::pageset::PageSet;
use parking_lot::Mutex;
use qemu_glue::qmp::Client;
use qemu_glue::ram::{ProcessRam, RamError, ReadRam};
use qemu_glue::vm::{self, GpaRange, VmInventory};

use super::running_kernel;
use crate::blocking::on_thread;
use crate::error::EngineError;
use crate::resets::Resets;

/// Fewer pages that follow one another are sent without a look: the descriptions that tell of them would have to be read
/// for them alone.
const PAGES_MIN: usize = 16;

/// The guest's memory by the numbers that its pages have in the stream.
#[derive(Debug)]
struct Numbered {
    ram: Arc<ProcessRam>,
    memory: LiveMemory,
    /// Pages that travelled as zeros.
    skipped: Mutex<PageSet>,
}

/// The guest's kernel, and what is skipped by what it says.
#[derive(Debug)]
pub struct Streamed {
    client: Client,
    /// Resets since before the kernel was found.
    resets: Resets,
    kernel: Kernel,
    ram: ProcessRam,
    guest_physical: Vec<GpaRange>,
    /// Once the stream has said how it numbers pages.
    numbered: OnceLock<Numbered>,
    /// Memory could not be read, or the guest was reset.
    is_over: AtomicBool,
}

impl Streamed {
    /// Looks for the guest's kernel.
    ///
    /// # Errors
    /// Why nothing is skipped.
    pub async fn find(client: &Client, vm: &VmInventory) -> Result<Self, EngineError> {
        let resets = Resets::watch(client);
        let ram = ProcessRam::open(vm.pid, &vm.placed)?;
        let memory = LiveMemory::new(Arc::new(ram.clone()), &vm.guest_physical);
        let kernel = running_kernel(client, memory).await?;
        Ok(Self {
            client: client.clone(),
            resets,
            kernel,
            ram,
            guest_physical: vm.guest_physical.clone(),
            numbered: OnceLock::new(),
            is_over: AtomicBool::new(false),
        })
    }

    /// The stream numbers pages like this.
    pub fn begin(&self, layout: &RamLayout) {
        self.numbered.get_or_init(|| {
            let ram = Arc::new(self.ram.numbered_by(layout));
            let memory = LiveMemory::new(Arc::clone(&ram), &self.guest_physical);
            Numbered { ram, memory, skipped: Mutex::new(PageSet::new(layout.pages())) }
        });
    }

    /// Parts of pages with content that came one after the other, as first, number, and whether they are unused: from now
    /// on skipped or not. Blocks.
    pub fn split(&self, first: u64, pages: usize) -> Vec<(u64, usize, bool)> {
        let Some(numbered) = self.numbered.get() else { return vec![(first, pages, false)] };
        let all = first..first + pages as u64;
        let unused = if pages < PAGES_MIN { vec![] } else { self.unused_in(numbered, all.clone()) };
        let mut parts = vec![];
        let mut at = first;
        for part in unused {
            parts.push((at, part.start - at, false));
            parts.push((part.start, part.end - part.start, true));
            at = part.end;
        }
        parts.push((at, all.end - at, false));
        let mut skipped = numbered.skipped.lock();
        for (first, pages, is_unused) in &parts {
            match is_unused {
                true => skipped.insert_range(*first..first + pages),
                false => skipped.remove_range(*first..first + pages),
            }
        }
        let parts = parts.into_iter().filter(|(_, pages, _)| *pages > 0);
        parts.map(|(first, pages, is_unused)| (first, pages as usize, is_unused)).collect()
    }

    fn unused_in(&self, numbered: &Numbered, pages: Range<u64>) -> Vec<Range<u64>> {
        if self.is_over.load(Ordering::Acquire) {
            return vec![];
        }
        self.kernel.unused_in(&numbered.memory, pages).unwrap_or_else(|error| {
            tracing::warn!(%error, "memory that the guest does not use is sent as well from now on");
            self.is_over.store(true, Ordering::Release);
            vec![]
        })
    }

    /// The guest is stopped, and QEMU has sent everything: pages that travelled as zeros and are used now. Blocks.
    ///
    /// # Errors
    /// If memory cannot be read.
    pub fn used_again(&self) -> Result<PageSet, EngineError> {
        let Some(numbered) = self.numbered.get() else { return Ok(PageSet::new(0)) };
        let mut skipped = numbered.skipped.lock();
        let still = self.kernel.still_unused(&numbered.memory, &skipped)?;
        let mut again = std::mem::replace(&mut *skipped, still);
        again.subtract(&skipped);
        Ok(again)
    }

    /// Copies a page.
    ///
    /// # Errors
    /// If memory cannot be read.
    pub fn read(&self, page: PageIndex, content: &mut [u8; PAGE_BYTES]) -> Result<(), RamError> {
        match self.numbered.get() {
            Some(numbered) => numbered.ram.read_part(page, 0, content),
            None => self.ram.read_part(page, 0, content),
        }
    }

    /// What was skipped may be handed over: the kernel that told is the one that runs. To be asked with the guest stopped.
    ///
    /// # Errors
    /// [`EngineError::OtherKernel`], or what QEMU says.
    pub async fn confirm(self: Arc<Self>) -> Result<(), EngineError> {
        if self.skipped_pages() == 0 {
            return Ok(());
        }
        let processors = vm::processors(&self.client).await?;
        let was_reset = self.resets.happened();
        let checked = on_thread(move || match self.numbered.get() {
            Some(numbered) => self.kernel.check(&numbered.memory, &processors),
            None => Ok(()),
        });
        match checked.await? {
            Ok(()) if !was_reset => Ok(()),
            _ => Err(EngineError::OtherKernel),
        }
    }

    /// Number of pages that travelled as zeros instead of their content.
    pub fn skipped_pages(&self) -> u64 {
        self.numbered.get().map_or(0, |numbered| numbered.skipped.lock().len())
    }
}
