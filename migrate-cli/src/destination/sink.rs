//! Where the pages go that came over the lanes: into guest memory, or into the stream of a QEMU that loads them itself
//! (`gateway`).

use std::fmt;
use std::io::IoSlice;

use migrate_core::delta::changed_ranges;
use migrate_core::layout::{PAGE_BYTES, PageIndex, RamLayout};
use qemu_glue::ram::GuestRam;

use super::apply::ApplyError;

/// Gives the next so many bytes of a batch's contents; nothing if there are fewer.
pub type Take<'t, 'a> = &'t mut dyn FnMut(usize) -> Option<Vec<IoSlice<'a>>>;

/// Takes pages from several threads, from each in batches.
pub trait PageSink: fmt::Debug + Send + Sync {
    /// The guest's RAM.
    fn layout(&self) -> &RamLayout;

    /// Begins to take a batch.
    fn begin(&self) -> Box<dyn PageWriter + '_>;
}

/// Takes the pages of a batch in their order; consecutive ones lie within a RAM block.
pub trait PageWriter {
    /// Pages of zeros.
    ///
    /// # Errors
    /// If they cannot be taken, as below.
    fn zeros(&mut self, first: PageIndex, pages: u64) -> Result<(), ApplyError>;

    /// Whole pages.
    ///
    /// # Errors
    /// As above.
    fn whole(&mut self, first: PageIndex, contents: &mut [IoSlice<'_>]) -> Result<(), ApplyError>;

    /// The lines of a page that changed, which `take` gives.
    ///
    /// # Errors
    /// As above, and [`ApplyError::Length`] if there are not enough.
    fn delta(&mut self, page: PageIndex, mask: u64, take: Take<'_, '_>) -> Result<(), ApplyError>;

    /// The content of another page, as it is now.
    ///
    /// # Errors
    /// As above.
    fn same(&mut self, page: PageIndex, of: PageIndex) -> Result<(), ApplyError>;

    /// The batch is over.
    ///
    /// # Errors
    /// As above.
    fn end(self: Box<Self>) -> Result<(), ApplyError>;
}

impl PageSink for GuestRam {
    fn layout(&self) -> &RamLayout {
        Self::layout(self)
    }

    fn begin(&self) -> Box<dyn PageWriter + '_> {
        Box::new(self)
    }
}

impl PageWriter for &GuestRam {
    fn zeros(&mut self, first: PageIndex, pages: u64) -> Result<(), ApplyError> {
        Ok(self.discard(first, pages)?)
    }

    fn whole(&mut self, first: PageIndex, contents: &mut [IoSlice<'_>]) -> Result<(), ApplyError> {
        Ok(self.write_pieces(first, contents)?)
    }

    fn delta(&mut self, page: PageIndex, mask: u64, take: Take<'_, '_>) -> Result<(), ApplyError> {
        for range in changed_ranges(mask) {
            let mut lines = take(range.len()).ok_or(ApplyError::Length)?;
            self.write_part(page, range.start, &mut lines)?;
        }
        Ok(())
    }

    fn same(&mut self, page: PageIndex, of: PageIndex) -> Result<(), ApplyError> {
        let mut content = [0; PAGE_BYTES];
        self.read(of, &mut content)?;
        Ok(self.write(page, &content)?)
    }

    fn end(self: Box<Self>) -> Result<(), ApplyError> {
        Ok(())
    }
}
