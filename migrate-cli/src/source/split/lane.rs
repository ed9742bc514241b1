//! The way to one memory server.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use migrate_core::encode::PageCounts;
use migrate_core::layout::{PAGE_BYTES, PageIndex};
use migrate_core::page_table::is_zero;
use migrate_core::pageset::PageSet;
use qemu_glue::ram::GuestRam;
use transport::messages::Store;
use transport::pages::wire::{DROP_EXTENTS_MAX, REQUEST_PAGES_MAX};
use transport::pages::{Extent, PageAnswer, PageClient, PageRequest};

use super::super::gate::Gate;
use super::super::outlet::PumpError;
use super::super::unused::Unused;
use super::routes::Share;
use crate::error::EngineError;
use crate::stores;

/// Requests that may wait for their answers.
const UNDER_WAY: usize = 8;

/// Pages that are read at a time.
const READ_PAGES: u64 = 64;

/// Pages from which on they are sent.
const PUT_PAGES: u64 = REQUEST_PAGES_MAX - READ_PAGES;

/// Version of all pages that the source puts.
const VERSION: u64 = 1;

/// A store and what it holds.
#[derive(Debug)]
pub(super) struct StoreLane {
    store: Store,
    client: PageClient,
    stored: PageSet,
    /// The highest that pages were put with; 0 if none was.
    version: u64,
    answers: Vec<PageAnswer>,
    /// Bytes that travelled, for who does not want to wait for the lane.
    moved: Arc<AtomicU64>,
}

/// Pages to be put by one request.
#[derive(Debug, Default)]
struct Put {
    pages: Vec<u64>,
    contents: Vec<u8>,
}

impl StoreLane {
    /// A store that was just made, of a guest of so many pages.
    /// What travels is told in `moved`.
    pub(super) fn new(store: Store, client: PageClient, pages: u64, moved: Arc<AtomicU64>) -> Self {
        Self { store, client, stored: PageSet::new(pages), version: 0, answers: vec![], moved }
    }

    /// Tells the server that the store is still wanted. Blocks.
    pub(super) fn keep_alive(&mut self) {
        let told = self
            .settle(0)
            .and_then(|()| stores::ask(&mut self.client, &self.store.address, &PageRequest::Stat));
        if let Err(error) = told {
            tracing::info!(error = %error.tell(), "a store's lease was not renewed");
        }
    }

    /// The pages that the server holds.
    pub(super) fn stored(&self) -> &PageSet {
        &self.stored
    }

    /// A version that no page has a higher one than; the pager goes on from the next.
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// Bytes that travelled, in both directions.
    pub(super) fn wire_bytes(&self) -> u64 {
        let (sent, received) = self.client.bytes();
        sent + received
    }

    /// Sends a share of a round and waits until the server has it. Pages that are unused or zero are not sent, and
    /// dropped if they were before. Blocks.
    ///
    /// # Errors
    /// What the server says, or if memory cannot be read.
    pub(super) fn send(
        &mut self,
        share: &Share,
        ram: &GuestRam,
        unused: Option<&Unused>,
        gate: &Gate,
    ) -> Result<PageCounts, EngineError> {
        let (mut counts, before) = (PageCounts::default(), self.client.bytes().0);
        let (mut put, mut gone) = (Put::default(), share.drop.clone());
        for extent in Extent::join(share.send.iter()) {
            let (first, pages) = (extent.first_page, u64::from(extent.pages));
            let parts = match unused {
                Some(unused) => unused.split(first, pages),
                None => vec![(first, pages, false)],
            };
            for (first, pages, is_unused) in parts {
                if is_unused {
                    gone.insert_range(first..first + pages);
                    continue;
                }
                for (part, pages) in ram.layout().split(PageIndex(first), pages) {
                    let end = part.0 + pages;
                    for first in (part.0..end).step_by(READ_PAGES as usize) {
                        let count = READ_PAGES.min(end - first);
                        self.read(ram, (first, count), &mut put, &mut gone, &mut counts)?;
                        if put.pages.len() as u64 >= PUT_PAGES {
                            self.flush(&mut put, gate)?;
                        }
                    }
                }
            }
        }
        self.flush(&mut put, gate)?;
        gone.intersect(&self.stored);
        self.drop_pages(&gone)?;
        self.settle(0)?;
        counts.wire_bytes = self.client.bytes().0 - before;
        Ok(counts)
    }

    fn read(
        &mut self,
        ram: &GuestRam,
        (first, pages): (u64, u64),
        put: &mut Put,
        gone: &mut PageSet,
        counts: &mut PageCounts,
    ) -> Result<(), EngineError> {
        let mut content = vec![0; pages as usize * PAGE_BYTES];
        ram.read(PageIndex(first), &mut content)?;
        for (page, content) in (first..).zip(content.chunks(PAGE_BYTES)) {
            let was_sent = self.stored.contains(page);
            if is_zero(content) {
                counts.zero += u64::from(was_sent);
                gone.insert(page);
                continue;
            }
            counts.raw += 1;
            counts.resent += u64::from(was_sent);
            self.stored.insert(page);
            put.pages.push(page);
            put.contents.extend_from_slice(content);
        }
        Ok(())
    }

    fn flush(&mut self, put: &mut Put, gate: &Gate) -> Result<(), EngineError> {
        let Put { pages, contents } = std::mem::take(put);
        if pages.is_empty() {
            return Ok(());
        }
        let (extents, contents) = (Extent::join(pages), Bytes::from(contents));
        let before = self.client.bytes().0;
        self.version = self.version.max(VERSION);
        self.request(&PageRequest::Put { extents, contents, version: VERSION, packed: true })?;
        // The session is over, and its own error says why.
        let goes_on = gate.pay(self.client.bytes().0 - before);
        if goes_on { Ok(()) } else { Err(PumpError::LaneClosed.into()) }
    }

    fn drop_pages(&mut self, pages: &PageSet) -> Result<(), EngineError> {
        for extents in Extent::join(pages.iter()).chunks(DROP_EXTENTS_MAX) {
            self.request(&PageRequest::Drop { extents: extents.to_vec() })?;
        }
        self.stored.subtract(pages);
        Ok(())
    }

    fn request(&mut self, request: &PageRequest) -> Result<(), EngineError> {
        self.settle(UNDER_WAY - 1)?;
        self.client
            .send(request)
            .map_err(|source| stores::no_store(&self.store.address, source))?;
        Ok(())
    }

    /// Waits until at most `left` requests are without an answer.
    fn settle(&mut self, left: usize) -> Result<(), EngineError> {
        while self.client.under_way() > left || !self.answers.is_empty() {
            for answer in self.answers.drain(..) {
                if let PageAnswer::Failed { error, .. } = answer {
                    return Err(stores::refused(&self.store.address, error));
                }
            }
            if self.client.under_way() > left {
                let received = self.client.receive(&mut self.answers);
                received.map_err(|source| stores::no_store(&self.store.address, source))?;
                self.moved.store(self.wire_bytes(), Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Reads all back and compares it with memory: how many pages there are, and how many differ. Blocks.
    ///
    /// # Errors
    /// If the server does not answer, or memory cannot be read.
    pub(super) fn verify(&mut self, ram: &GuestRam) -> Result<(u64, u64), EngineError> {
        self.settle(0)?;
        let (mut compared, mut mismatches) = (0, 0);
        let stored: Vec<u64> = self.stored.iter().collect();
        for pages in stored.chunks(REQUEST_PAGES_MAX as usize) {
            let extents = Extent::join(pages.iter().copied());
            let request = PageRequest::Get { extents, take: false, packed: true };
            let contents = match stores::call(&mut self.client, &self.store.address, &request)? {
                PageAnswer::Pages { contents, .. } => contents,
                _ => Bytes::new(),
            };
            for (at, page) in pages.iter().enumerate() {
                let mut ours = [0; PAGE_BYTES];
                ram.read(PageIndex(*page), &mut ours)?;
                let theirs = contents.get(at * PAGE_BYTES..(at + 1) * PAGE_BYTES);
                compared += 1;
                mismatches += u64::from(theirs != Some(&ours[..]));
            }
        }
        Ok((compared, mismatches))
    }

    /// Deletes the store, if the server still answers. Blocks.
    pub(super) fn delete(&mut self) {
        let settled = self.settle(0).and_then(|()| {
            stores::ask(&mut self.client, &self.store.address, &PageRequest::Delete)
        });
        if let Err(error) = settled {
            tracing::info!(error = %error.tell(), "a store is left to its lease");
        }
    }
}
