//! Decisions about pages, carried out under their lock.

use migrate_core::layout::{PAGE_BYTES, PageIndex};
use migrate_core::remote::{
    Arrived, FaultAnswer, Fetch, MissingFault, Remote, WriteFault, runs_of,
};
use qemu_glue::pager::Fault;

use super::Shared;
use crate::error::EngineError;

impl Shared {
    /// Decides about a fault; adds what is to be asked for.
    ///
    /// # Errors
    /// What the pager says.
    pub(super) fn fault(&self, fault: Fault, fetches: &mut Vec<Fetch>) -> Result<(), EngineError> {
        let (page, now) = (fault.page, self.now());
        let mut remote = self.remote.lock();
        if fault.is_protected {
            match remote.write_fault(page.0) {
                WriteFault::Unprotect => self.pager.unprotect(page, 1)?,
                WriteFault::Wake => self.pager.wake(page, 1)?,
            }
        } else {
            let answer = remote.missing_fault(page.0, fault.is_write, now);
            self.carry_out(&mut remote, page.0, answer, fetches)?;
            fetches.extend(remote.read_ahead());
        }
        if remote.wanted_evictions() > 0 {
            self.keeper.notify_one();
        }
        Ok(())
    }

    /// Carries out what was decided about a missing page.
    fn carry_out(
        &self,
        remote: &mut Remote,
        page: u64,
        fault: MissingFault,
        fetches: &mut Vec<Fetch>,
    ) -> Result<(), EngineError> {
        self.punch(&fault.punch)?;
        match fault.answer {
            FaultAnswer::Zeros(run) => {
                for (first, count) in self.layout().split(PageIndex(run.start), run.end - run.start)
                {
                    self.pager.place_zeros(first, count)?;
                }
            }
            FaultAnswer::Present => {
                if self.pager.place_zeros(PageIndex(page), 1)?.placed > 0 {
                    remote.given_back(page);
                }
            }
            FaultAnswer::Fetch(fetch) => fetches.push(fetch),
            FaultAnswer::Wait => {}
            FaultAnswer::NoRoom => drop(self.keeper.notify_one()),
            FaultAnswer::Lost => self.changed.notify_waiters(),
        }
        Ok(())
    }

    /// Takes pages out of the RAM file, and wakes who waits for them: each faults anew.
    ///
    /// # Errors
    /// What the pager says.
    pub(super) fn punch(&self, pages: &[u64]) -> Result<(), EngineError> {
        for run in runs_of(pages.iter().copied()) {
            for (first, count) in self.layout().split(PageIndex(run.start), run.end - run.start) {
                self.pager.evict(first, count)?;
                self.pager.wake(first, count)?;
            }
        }
        Ok(())
    }

    /// Write-protects pages, or ends that.
    ///
    /// # Errors
    /// What the pager says.
    pub(super) fn protect(&self, pages: &[u64], protected: bool) -> Result<(), EngineError> {
        for run in runs_of(pages.iter().copied()) {
            for (first, count) in self.layout().split(PageIndex(run.start), run.end - run.start) {
                match protected {
                    true => self.pager.protect(first, count)?,
                    false => self.pager.unprotect(first, count)?,
                }
            }
        }
        Ok(())
    }

    /// There may be room again: serves who waits for that.
    ///
    /// # Errors
    /// What the pager says.
    pub(super) fn serve_waiting(
        &self,
        remote: &mut Remote,
        fetches: &mut Vec<Fetch>,
    ) -> Result<(), EngineError> {
        for (page, fault) in remote.waiting_with_room(self.now()) {
            self.carry_out(remote, page, fault, fetches)?;
        }
        Ok(())
    }

    /// Places pages that a server sent.
    ///
    /// # Errors
    /// What the pager says.
    pub(super) fn arrived(
        &self,
        server: usize,
        pages: impl Iterator<Item = u64>,
        contents: &[u8],
        fetches: &mut Vec<Fetch>,
    ) -> Result<(), EngineError> {
        for (page, content) in pages.zip(contents.chunks_exact(PAGE_BYTES)) {
            // For each page anew: a fault does not wait for all of them.
            let mut remote = self.remote.lock();
            match remote.arrived(page, server, self.now()) {
                Arrived::Place { protect: true } => {
                    self.pager.place_protected(PageIndex(page), content)?;
                }
                Arrived::Place { protect: false } => {
                    self.pager.place(PageIndex(page), content)?;
                }
                Arrived::Ignore => {}
            }
            fetches.extend(remote.read_ahead());
        }
        Ok(())
    }
}
