//! A guest's memory without its help: its kernel's counters, read from outside.
//!
//! Finding the kernel and its counters takes tens of milliseconds, reading them some microseconds: it is found once, and
//! again only when what it says cannot be (the guest was started anew). A guest in which none is found is asked less and
//! less often. Invariant: what is read is what a guest wants to be read; it is used for nothing but figures.

use std::sync::Arc;

use fctrans::kernel::Kernel;
use fctrans::memory::LiveMemory;
use fctrans::summary::{Figures, Summary};
use migrate_core::forecast::Sample;
use qemu_glue::qmp::Client;
use qemu_glue::ram::{GuestRam, ProcessRam};
use qemu_glue::vm;

use super::sample::Sampler;

/// How long is waited after nothing was found, at first and at most, seconds.
const RETRY_FIRST_S: f64 = 30.0;
const RETRY_MAX_S: f64 = 900.0;

/// What was found in a guest.
#[derive(Debug)]
struct Found {
    memory: LiveMemory,
    kernel: Kernel,
    figures: Figures,
    total_bytes: u64,
    swapped_out_pages: u64,
    sampler: Sampler,
}

/// A look into one guest.
#[derive(Debug)]
pub struct Look {
    found: Option<Box<Found>>,
    retry_at_s: f64,
    retry_s: f64,
    why_not: Option<String>,
}

impl Default for Look {
    fn default() -> Self {
        Self { found: None, retry_at_s: 0.0, retry_s: RETRY_FIRST_S, why_not: None }
    }
}

impl Look {
    /// Whether it is time to look for the kernel, for which the monitor is needed.
    #[must_use]
    pub fn is_due(&self, at_s: f64) -> bool {
        self.found.is_none() && at_s >= self.retry_at_s
    }

    /// Why nothing is known, if nothing is.
    #[must_use]
    pub fn why_not(&self) -> Option<&str> {
        self.why_not.as_deref()
    }

    /// Looks for the kernel.
    pub async fn find(&mut self, client: &Client, at_s: f64) {
        match find(client).await {
            Ok(found) => {
                self.found = Some(Box::new(found));
                (self.why_not, self.retry_s) = (None, RETRY_FIRST_S);
            }
            Err(why) => {
                self.why_not = Some(why);
                self.retry_at_s = at_s + self.retry_s;
                self.retry_s = (self.retry_s * 2.0).min(RETRY_MAX_S);
            }
        }
    }

    /// Reads the kernel's counters, if it was found and is still the same.
    pub fn read(&mut self) -> Option<Summary> {
        let found = self.found.as_mut()?;
        match found.figures.read(&found.kernel, &found.memory) {
            Ok(summary) if found.is_of_the_same_kernel(&summary) => Some(summary),
            Ok(_) => self.lost("the guest was started anew".into()),
            Err(error) => self.lost(error.to_string()),
        }
    }

    /// Whether it is time for a sample of its pages.
    #[must_use]
    pub(super) fn is_sample_due(&self, at_s: f64) -> bool {
        self.found.as_ref().is_some_and(|found| found.sampler.is_due(at_s))
    }

    /// Takes what the last sample showed, and begins the next one if it `may`.
    pub(super) async fn sample(&mut self, may: bool, at_s: f64) {
        let Some(found) = &mut self.found else { return };
        found.sampler.collect().await;
        if may && found.sampler.is_due(at_s) {
            found.sampler.begin(&found.kernel, &found.memory, at_s);
        }
    }

    /// What the last sample showed.
    pub(super) fn sampled(&self) -> Option<&Sample> {
        self.found.as_ref()?.sampler.seen()
    }

    fn lost(&mut self, why: String) -> Option<Summary> {
        *self = Self { why_not: Some(why), ..Self::default() };
        None
    }
}

impl Found {
    /// Counters of a kernel only grow, and it has as much memory as before, give or take what is plugged.
    fn is_of_the_same_kernel(&mut self, summary: &Summary) -> bool {
        let swapped_out_pages = summary.swapped_out_pages.unwrap_or(0);
        let grows = swapped_out_pages >= self.swapped_out_pages;
        let is_same =
            grows && summary.total_bytes.abs_diff(self.total_bytes) <= self.total_bytes / 2;
        let can_be = summary.free_bytes <= summary.total_bytes;
        (self.swapped_out_pages, self.total_bytes) = (swapped_out_pages, summary.total_bytes);
        is_same && can_be
    }
}

async fn find(client: &Client) -> Result<Found, String> {
    let inventory = vm::inventory(client).await.map_err(told)?;
    let processors = vm::processors(client).await.map_err(told)?;
    let (pid, regions) = (inventory.pid, inventory.regions);
    let memory = if regions.is_empty() {
        let ram = ProcessRam::open(pid, &inventory.placed).map_err(told)?;
        LiveMemory::new(Arc::new(ram), &inventory.guest_physical)
    } else {
        let ram = GuestRam::open(pid, &regions, false).map_err(told)?;
        LiveMemory::new(Arc::new(ram), &inventory.guest_physical)
    };
    let search = tokio::task::spawn_blocking(move || {
        let kernel = Kernel::find(&memory, &processors).map_err(told)?;
        let figures = Figures::find(&kernel, &memory).map_err(told)?;
        let summary = figures.read(&kernel, &memory).map_err(told)?;
        let swapped_out_pages = summary.swapped_out_pages.unwrap_or(0);
        let total_bytes = summary.total_bytes;
        let sampler = Sampler::default();
        Ok(Found { memory, kernel, figures, total_bytes, swapped_out_pages, sampler })
    });
    search.await.map_err(told)?
}

fn told(error: impl std::error::Error) -> String {
    error.to_string()
}
