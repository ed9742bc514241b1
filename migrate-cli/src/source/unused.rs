//! Memory that the guest does not use: it is not sent, and reads as zeros at the destination.
//!
//! ```text
//!   scan (arms) ──► which pages of the round are unused? ──► they are sent as if they held zeros
//!   stop ─► the same kernel? ─► which of those are used now? ──► last round
//! ```
//!
//! Invariants:
//! - Whether a page is unused is read after its dirty mark was cleared (correctness rule 5): should the guest take it
//!   and write it later, it is reported again and sent in another round.
//! - A page that is skipped is zero at the destination, also if an older version was sent (rule 4): it is judged
//!   like a page that holds zeros, which also resets what deltas build upon.
//! - With the guest stopped, every page that was skipped is looked at again; if another kernel runs by then, all of
//!   them are sent.

pub mod streamed;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fctrans::error::IntrospectError;
use fctrans::kernel::Kernel;
use fctrans::memory::LiveMemory;
use migrate_core::layout::PageIndex;
use migrate_core::page_table::SourcePages;
use migrate_core::pageset::PageSet;
use migrate_core::precopy::Round;
use parking_lot::{Mutex, RwLock};
use qemu_glue::qmp::Client;
use qemu_glue::vm::{self, Processor};

use super::prepare::Guest;
use crate::blocking::on_thread;
use crate::error::EngineError;
use crate::resets::Resets;

/// The kernel that a guest with this memory runs, if what it says of its pages can be relied upon.
async fn running_kernel(client: &Client, memory: LiveMemory) -> Result<Kernel, EngineError> {
    let processors = vm::processors(client).await?;
    let found = on_thread(move || {
        let kernel = Kernel::find(&memory, &processors)?;
        // Guests that fill what they free rely on that content.
        kernel.check_unfilled(&memory)?;
        Ok::<_, IntrospectError>(kernel)
    });
    let kernel = found.await??;
    tracing::info!(kernel = kernel.release(), "unused memory is skipped");
    Ok(kernel)
}

/// The guest's kernel, and what is skipped by what it says.
#[derive(Debug)]
pub struct Unused {
    client: Client,
    /// Resets since before the kernel was found.
    resets: Resets,
    kernel: Kernel,
    memory: LiveMemory,
    /// Those of the round being sent.
    of_round: RwLock<PageSet>,
    skipped: Mutex<PageSet>,
    /// Another kernel runs by now.
    is_over: AtomicBool,
}

impl Unused {
    /// Looks for the guest's kernel.
    ///
    /// # Errors
    /// Why nothing is skipped.
    pub async fn find(guest: &Guest) -> Result<Self, EngineError> {
        let resets = Resets::watch(&guest.client);
        let memory = LiveMemory::new(Arc::clone(&guest.ram), &guest.vm.guest_physical);
        let pages = guest.ram.layout().pages();
        let kernel = running_kernel(&guest.client, memory.clone()).await?;
        Ok(Self {
            client: guest.client.clone(),
            resets,
            kernel,
            memory,
            of_round: RwLock::new(PageSet::new(pages)),
            skipped: Mutex::new(PageSet::new(pages)),
            is_over: AtomicBool::new(false),
        })
    }

    /// Where the guest's processors are: nowhere if QEMU does not tell, or the guest was reset, and then nothing is
    /// skipped any more.
    pub async fn processors(&self) -> Vec<Processor> {
        if self.is_over() || self.resets.happened() {
            return vec![];
        }
        vm::processors(&self.client).await.unwrap_or_else(|error| {
            tracing::warn!(%error, "it is not known which kernel the guest runs");
            vec![]
        })
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire)
    }

    /// Finds out which pages of a round are unused, after they were armed. Blocks.
    ///
    /// # Errors
    /// If memory cannot be read.
    pub fn begin_round(&self, round: &Round) -> Result<(), EngineError> {
        let mut pages = round.dirty.clone();
        pages.union_with(&round.look);
        *self.of_round.write() = self.unused_of(&pages)?;
        Ok(())
    }

    /// Those of `pages` that are unused now.
    fn unused_of(&self, pages: &PageSet) -> Result<PageSet, EngineError> {
        if self.is_over() {
            return Ok(PageSet::new(pages.size()));
        }
        Ok(self.kernel.still_unused(&self.memory, pages)?)
    }

    /// Parts of consecutive pages, as first, number, and whether they are unused: from now on skipped or
    /// not.
    pub fn split(&self, first: u64, pages: u64) -> Vec<(u64, u64, bool)> {
        let of_round = self.of_round.read();
        let mut parts: Vec<(u64, u64, bool)> = vec![];
        for page in first..first + pages {
            let is_unused = of_round.contains(page);
            match parts.last_mut() {
                Some((_, pages, of)) if *of == is_unused => *pages += 1,
                _ => parts.push((page, 1, is_unused)),
            }
        }
        drop(of_round);
        let mut skipped = self.skipped.lock();
        for (first, pages, is_unused) in &parts {
            match is_unused {
                true => skipped.insert_range(*first..first + pages),
                false => skipped.remove_range(*first..first + pages),
            }
        }
        parts
    }

    /// The guest is stopped, and its processors hold this: pages that were skipped and are used now. Blocks.
    ///
    /// # Errors
    /// If memory cannot be read.
    pub fn used_again(&self, processors: &[Processor]) -> Result<PageSet, EngineError> {
        if let Some(pages) = self.of_another_kernel(processors)? {
            return Ok(pages);
        }
        let mut again = self.skipped();
        again.subtract(&self.kernel.still_unused(&self.memory, &again)?);
        Ok(again)
    }

    /// The processors hold this: all that was skipped, if another kernel runs than was found. Nothing is skipped
    /// from then on.
    ///
    /// # Errors
    /// If memory cannot be read.
    pub fn of_another_kernel(
        &self,
        processors: &[Processor],
    ) -> Result<Option<PageSet>, EngineError> {
        if self.is_over() {
            return Ok(None);
        }
        let error = match self.kernel.check(&self.memory, processors) {
            Ok(()) => return Ok(None),
            Err(error @ IntrospectError::Ram(_)) => return Err(error.into()),
            Err(error) => error,
        };
        tracing::warn!(%error, "all that was skipped is sent");
        self.is_over.store(true, Ordering::Release);
        let mut skipped = self.skipped.lock();
        let none = PageSet::new(skipped.size());
        Ok(Some(std::mem::replace(&mut skipped, none)))
    }

    /// The guest is stopped, and will run at the destination before `missing` pages are there: takes those out that
    /// are unused and of which it never got any version. Blocks.
    ///
    /// # Errors
    /// If memory cannot be read.
    pub fn thin(&self, missing: &mut PageSet, sent: &SourcePages) -> Result<(), EngineError> {
        let mut unused = self.unused_of(missing)?;
        let stale: Vec<u64> =
            unused.iter().filter(|page| sent.was_sent(PageIndex(*page))).collect();
        stale.into_iter().for_each(|page| unused.remove(page));
        missing.subtract(&unused);
        self.skipped.lock().union_with(&unused);
        Ok(())
    }

    /// Pages of the round that are unused and were never sent anywhere: skipped from now on, unless a later round has
    /// them again.
    pub fn skip(&self, pages: &PageSet) -> PageSet {
        let mut unused = pages.clone();
        unused.intersect(&self.of_round.read());
        self.skipped.lock().union_with(&unused);
        unused
    }

    /// Those of the pages with `data` that the guest uses, and of these the ones that it is likely to need soon, as far
    /// as its kernel tells. Blocks.
    ///
    /// # Errors
    /// If memory cannot be read.
    pub fn in_use(&self, data: &PageSet) -> Result<(PageSet, PageSet), EngineError> {
        let unused = self.unused_of(data)?;
        let mut in_use = data.clone();
        in_use.subtract(&unused);
        let mut hot = PageSet::new(data.size());
        if let Some(set) = self.kernel.working_set(&self.memory, &unused)? {
            hot = in_use.clone();
            hot.subtract(&set.cold);
        }
        Ok((in_use, hot))
    }

    /// Number of pages that are skipped now.
    pub fn skipped_pages(&self) -> u64 {
        self.skipped.lock().len()
    }

    /// The pages that are skipped now.
    pub fn skipped(&self) -> PageSet {
        self.skipped.lock().clone()
    }
}
