//! Beginning to page, and taking paging over.

use std::fs::File;
use std::os::fd::OwnedFd;

use super::{Duty, Paged, Pager, PagerError};
use crate::error::ProcError;
use crate::procfs::{self, Identity};
use crate::ram::{GuestRam, covering};
use crate::uffd::{self, Cached, Features, RegisterError, TargetUffd};

impl Pager {
    /// Registers all blocks with a fresh userfaultfd of the process: from here on a thread of QEMU
    /// that touches a missing page waits. Empty the blocks first: what the file holds counts as
    /// right. For [`present`](Self::present) on hugetlbfs, `ram` must have been opened for writing.
    ///
    /// # Errors
    /// [`PagerError::Busy`] if another userfaultfd holds a block, [`PagerError::Changed`] if one is
    /// no longer mapped as `ram` found it, [`PagerError::Handshake`] if the descriptor was used
    /// before. What was registered by then is undone; the descriptor is used up.
    pub fn start(pid: i32, uffd: OwnedFd, ram: &GuestRam, duty: Duty) -> Result<Self, PagerError> {
        let wanted = duty.features();
        let supported = uffd::supported().unwrap_or(wanted);
        if !supported.contains(Features::PAGING) {
            return Err(PagerError::Unsupported { what: "UFFD_FEATURE_MISSING_SHMEM" });
        }
        if !supported.contains(wanted) {
            return Err(PagerError::Unsupported { what: "UFFD_FEATURE_WP_HUGETLBFS_SHMEM" });
        }
        duty.check(ram)?;
        let uffd = TargetUffd::initialise(uffd, wanted)
            .map_err(|source| PagerError::Handshake { pid, source })?;
        let pager = Self::prepare(pid, duty, uffd, ram)?;
        pager.check_mapped()?;
        pager.register_all()?;
        // A block that was mapped anew between the first look and its registration is other memory.
        if let Err(error) = pager.check_mapped() {
            pager.undo(pager.blocks.len());
            return Err(error);
        }
        Ok(pager)
    }

    /// Takes over what an engine that died left registered, with a duplicate of its descriptor. Every
    /// thread that waits is woken, so that its fault is reported again.
    ///
    /// # Errors
    /// [`PagerError::NotRegistered`] if a block is not registered: the other engine had not got that
    /// far, or had begun to end paging. Nothing is undone on an error.
    pub fn resume(pid: i32, uffd: OwnedFd, ram: &GuestRam, duty: Duty) -> Result<Self, PagerError> {
        let pager = Self::prepare(pid, duty, TargetUffd::adopt(uffd), ram)?;
        pager.check_mapped()?;
        pager.check_registered()?;
        for block in &pager.blocks {
            // Changes nothing, unless the block is registered with another descriptor.
            pager.register(block)?;
            let woken = pager.uffd.wake(&block.region.addresses());
            woken
                .map_err(|source| pager.failed("wake the threads that wait for", block, source))?;
        }
        Ok(pager)
    }

    fn prepare(pid: i32, duty: Duty, uffd: TargetUffd, ram: &GuestRam) -> Result<Self, PagerError> {
        let proc_failed = |source| PagerError::Proc { pid, source };
        ram.identity().check().map_err(proc_failed)?;
        let identity = Identity::of(pid).map_err(proc_failed)?;
        if identity.start_ticks() != ram.identity().start_ticks() {
            return Err(proc_failed(ProcError::Replaced { pid }));
        }
        uffd.set_nonblocking().map_err(|source| PagerError::Descriptor {
            what: "set up",
            pid,
            source,
        })?;
        let path = format!("/proc/{pid}/maps");
        let maps = File::open(&path)
            .map_err(|source| proc_failed(ProcError::Read { path: path.into(), source }))?;
        let layout = ram.layout().clone();
        let mut blocks = Vec::with_capacity(layout.blocks().len());
        let found = ram.regions().zip(ram.backings()).zip(ram.files()).enumerate();
        for (index, ((region, backing), file)) in found {
            let file = file.try_clone().map_err(|source| PagerError::Block {
                what: "keep the file open that backs",
                block: region.name.clone(),
                pid,
                source,
            })?;
            let pages = layout.block_pages(index);
            blocks.push(Paged { region: region.clone(), backing, file, pages });
        }
        Ok(Self { pid, identity, duty, uffd, maps, layout, blocks })
    }

    fn check_mapped(&self) -> Result<(), PagerError> {
        for block in &self.blocks {
            if !self.intact(block)? {
                let name = block.region.name.clone();
                return Err(PagerError::Changed { block: name, pid: self.pid });
            }
        }
        Ok(())
    }

    fn register_all(&self) -> Result<(), PagerError> {
        for (index, block) in self.blocks.iter().enumerate() {
            if let Err(error) = self.register(block) {
                // A block that another descriptor holds must not be touched.
                let busy = matches!(error, PagerError::Busy { .. });
                self.undo(if busy { index } else { index + 1 });
                return Err(error);
            }
        }
        Ok(())
    }

    fn register(&self, block: &Paged) -> Result<(), PagerError> {
        match self.uffd.register(&block.region.addresses(), self.duty.mode()) {
            Ok(()) => Ok(()),
            Err(RegisterError::Busy) => {
                Err(PagerError::Busy { block: block.region.name.clone(), pid: self.pid })
            }
            Err(RegisterError::Other(source)) => Err(self.failed("register", block, source)),
        }
    }

    fn undo(&self, blocks: usize) {
        for block in self.blocks.iter().take(blocks) {
            if let Err(error) = self.uffd.unregister(&block.region.addresses()) {
                tracing::debug!(pid = self.pid, block = block.region.name, %error, "not undone");
            }
        }
    }

    /// Checks that every mapping of every block is registered. The kernel has no question for that;
    /// but UFFDIO_CONTINUE looks for the registration before it looks for a page, and fills nothing.
    fn check_registered(&self) -> Result<(), PagerError> {
        let mappings = procfs::mappings(self.pid)
            .map_err(|source| PagerError::Proc { pid: self.pid, source })?;
        for block in &self.blocks {
            let name = || block.region.name.clone();
            let covering = covering(self.pid, &block.region, &mappings)
                .map_err(|_| PagerError::Changed { block: name(), pid: self.pid })?;
            for mapping in covering {
                let start = mapping.start.max(block.region.hva);
                let page = start..start + block.region.page_bytes;
                match self.uffd.map_cached(&page) {
                    Ok(Cached::Bytes(_) | Cached::Mapped | Cached::Missing) => {}
                    Err(source) => return Err(self.fill_failed("look at", block, source)),
                }
            }
        }
        Ok(())
    }
}
