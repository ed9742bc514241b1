//! Memory for pages: chunks of 2 MiB, each cut into slots of one size, given back when they are empty.
//!
//! ```text
//!   size 512:   [■■□■□□□…]  [■□□□…]
//!   size 4096:  [■■■■■■■…]  [■■■■…]   [□□■□…]  ◄─ drains: its slots move to the others
//!                 full        open
//! ```
//!
//! Where pages were freed here and there, chunks that are mostly empty drain, a few slots at a time, so
//! that nobody waits long for it.
//!
//! Invariants: a chunk that exists has a slot in use; what chunks take never exceeds the limit given,
//! plus one chunk for each size of slots and one that drains.

use std::collections::BTreeSet;

use memmap2::MmapMut;

use crate::layout::PAGE_BYTES;

/// Bytes of a chunk.
pub const CHUNK_BYTES: usize = 2 << 20;

/// Sizes of slots in bytes.
const SIZES: [usize; 6] = [512, 1024, 1536, 2048, 3072, PAGE_BYTES];

/// Bytes beyond the limit that chunks may take, since the last one of each size may be nearly empty.
pub const SLACK_BYTES: u64 = ((SIZES.len() + 1) * CHUNK_BYTES) as u64;

/// Stands for no page.
const NOBODY: u64 = u64::MAX;

/// Chunks of a size drain while more than this part of them is free, and two chunks besides.
const FREE_PART: usize = 4;

/// Where a page's content lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    chunk: u32,
    index: u16,
}

/// The kernel gives no more memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoMemory;

#[derive(Debug)]
struct Chunk {
    memory: MmapMut,
    /// Which of [`SIZES`].
    size: usize,
    /// Slots that were used and are free. While the chunk drains it may name some beyond the owners.
    free: Vec<u16>,
    /// The page in every slot that was ever used, or [`NOBODY`]; those beyond take no memory yet.
    owners: Vec<u64>,
    /// Slots with a page.
    used: usize,
}

impl Chunk {
    fn slots(&self) -> usize {
        slots(self.size)
    }

    fn is_full(&self) -> bool {
        self.used == self.slots()
    }

    fn bytes(&self, index: u16) -> &[u8] {
        let bytes = SIZES[self.size];
        let at = usize::from(index) * bytes;
        &self.memory[at..at + bytes]
    }

    fn bytes_mut(&mut self, index: u16) -> &mut [u8] {
        let bytes = SIZES[self.size];
        let at = usize::from(index) * bytes;
        &mut self.memory[at..at + bytes]
    }

    /// A slot for a page; the chunk is not full.
    fn take(&mut self, page: u64) -> u16 {
        self.used += 1;
        match self.free.pop() {
            Some(index) => {
                self.owners[usize::from(index)] = page;
                index
            }
            None => {
                self.owners.push(page);
                (self.owners.len() - 1) as u16
            }
        }
    }

    fn give_back(&mut self, index: u16) {
        self.used -= 1;
        self.owners[usize::from(index)] = NOBODY;
        self.free.push(index);
    }

    /// The last slot with a page, and that page. Free ones behind it are forgotten.
    fn last(&mut self) -> Option<(u16, u64)> {
        while self.owners.last() == Some(&NOBODY) {
            self.owners.pop();
        }
        let page = *self.owners.last()?;
        Some(((self.owners.len() - 1) as u16, page))
    }

    /// The chunk drains no longer.
    fn remember_free(&mut self) {
        let owners = self.owners.len();
        self.free.retain(|index| usize::from(*index) < owners);
    }
}

fn slots(size: usize) -> usize {
    CHUNK_BYTES / SIZES[size]
}

/// The chunks of one size.
#[derive(Debug, Default)]
struct Class {
    chunks: usize,
    used: usize,
    /// Chunks with a free slot, but for the one that drains.
    open: BTreeSet<u32>,
}

impl Class {
    fn free(&self, size: usize) -> usize {
        self.chunks * slots(size) - self.used
    }

    /// Whether so much is free that a chunk can be done without.
    fn is_sparse(&self, size: usize) -> bool {
        self.free(size) > self.chunks * slots(size) / FREE_PART + 2 * slots(size)
    }
}

/// Memory for the pages of one store.
#[derive(Debug)]
pub struct Arena {
    chunks: Vec<Option<Chunk>>,
    /// Numbers without a chunk.
    vacant: Vec<u32>,
    classes: [Class; SIZES.len()],
    draining: Option<u32>,
    bytes_max: u64,
}

impl Arena {
    /// No chunks yet. `bytes_max` is what all slots in use may have together.
    pub fn new(bytes_max: u64) -> Self {
        let classes = std::array::from_fn(|_| Class::default());
        Self { chunks: vec![], vacant: vec![], classes, draining: None, bytes_max }
    }

    /// Bytes that the chunks take.
    pub fn memory_bytes(&self) -> u64 {
        let chunks: usize = self.classes.iter().map(|class| class.chunks).sum();
        (chunks * CHUNK_BYTES) as u64
    }

    /// A slot of at least `bytes` bytes, 4096 at most, for the content of `page`. The slots that had
    /// to be moved to make room are told to `moved`.
    ///
    /// # Errors
    /// [`NoMemory`]
    pub fn allocate(
        &mut self,
        page: u64,
        bytes: usize,
        mut moved: impl FnMut(u64, Slot),
    ) -> Result<Slot, NoMemory> {
        let size = SIZES.iter().position(|size| bytes <= *size).ok_or(NoMemory)?;
        if self.classes[size].open.is_empty() {
            while let Some((page, slot)) = self.make_room(CHUNK_BYTES as u64) {
                moved(page, slot);
            }
        }
        self.allocate_of(size, page)
    }

    /// Changes what all slots in use may have together; they have no more. Where the chunks take too
    /// much for that, a slot is moved and returned as by [`Self::tidy`], and this is to be called again;
    /// until nothing is returned they may take what they do, so that nobody waits long for it.
    pub fn fit(&mut self, bytes_max: u64) -> Option<(u64, Slot)> {
        self.bytes_max = bytes_max;
        let moved = self.make_room(0);
        self.bytes_max = bytes_max.max(self.memory_bytes().saturating_sub(SLACK_BYTES));
        moved
    }

    /// Moves a slot if there is no room for so many bytes of chunks more.
    fn make_room(&mut self, more: u64) -> Option<(u64, Slot)> {
        if self.memory_bytes() + more <= self.bytes_max + SLACK_BYTES {
            return None;
        }
        // The chunk that drains already may find no place; another one then does.
        self.move_one(true).or_else(|| self.move_one(true))
    }

    fn allocate_of(&mut self, size: usize, page: u64) -> Result<Slot, NoMemory> {
        let chunk = match self.classes[size].open.first() {
            Some(chunk) => *chunk,
            None => self.add_chunk(size)?,
        };
        let class = &mut self.classes[size];
        let place = self.chunks[chunk as usize].as_mut().ok_or(NoMemory)?;
        let index = place.take(page);
        class.used += 1;
        if place.is_full() {
            class.open.remove(&chunk);
        }
        Ok(Slot { chunk, index })
    }

    fn add_chunk(&mut self, size: usize) -> Result<u32, NoMemory> {
        // A mapping of its own: only so is it the kernel's again as soon as it is dropped.
        let memory = MmapMut::map_anon(CHUNK_BYTES).map_err(|_| NoMemory)?;
        let chunk = Some(Chunk { memory, size, free: vec![], owners: vec![], used: 0 });
        let number = match self.vacant.pop() {
            Some(number) => {
                self.chunks[number as usize] = chunk;
                number
            }
            None => {
                self.chunks.push(chunk);
                (self.chunks.len() - 1) as u32
            }
        };
        self.classes[size].chunks += 1;
        self.classes[size].open.insert(number);
        Ok(number)
    }

    /// Gives a slot back; it is not used any more.
    pub fn free(&mut self, slot: Slot) {
        let Some(chunk) = self.chunks[slot.chunk as usize].as_mut() else { return };
        let class = &mut self.classes[chunk.size];
        chunk.give_back(slot.index);
        class.used -= 1;
        if chunk.used == 0 {
            class.chunks -= 1;
            class.open.remove(&slot.chunk);
            if self.draining == Some(slot.chunk) {
                self.draining = None;
            }
            self.chunks[slot.chunk as usize] = None;
            self.vacant.push(slot.chunk);
        } else if self.draining != Some(slot.chunk) {
            class.open.insert(slot.chunk);
        }
    }

    /// Moves a slot of a chunk that drains, if one is to. Returns the page whose slot it was and its new
    /// one.
    pub fn tidy(&mut self) -> Option<(u64, Slot)> {
        self.move_one(false)
    }

    /// With `at_all_costs` a chunk drains if its slots find any place.
    fn move_one(&mut self, at_all_costs: bool) -> Option<(u64, Slot)> {
        let from = match self.draining {
            Some(from) => from,
            None => {
                let from = self.sparsest(at_all_costs)?;
                let size = self.chunks[from as usize].as_ref()?.size;
                self.classes[size].open.remove(&from);
                *self.draining.insert(from)
            }
        };
        let chunk = self.chunks[from as usize].as_mut()?;
        let size = chunk.size;
        let (index, page) = chunk.last()?;
        if self.classes[size].open.is_empty() {
            // The room was used meanwhile.
            chunk.remember_free();
            self.classes[size].open.insert(from);
            self.draining = None;
            return None;
        }
        let to = self.allocate_of(size, page).ok()?;
        let pair = [from as usize, to.chunk as usize];
        let [source, target] = self.chunks.get_disjoint_mut(pair).ok()?;
        target.as_mut()?.bytes_mut(to.index).copy_from_slice(source.as_ref()?.bytes(index));
        self.free(Slot { chunk: from, index });
        Some((page, to))
    }

    /// The chunk with the fewest slots in use, of the size with the most memory to spare.
    fn sparsest(&self, at_all_costs: bool) -> Option<u32> {
        let spare = |(size, class): &(usize, &Class)| class.free(*size) * SIZES[*size];
        let may = |(size, class): &(usize, &Class)| {
            class.is_sparse(*size) || at_all_costs && class.free(*size) >= slots(*size)
        };
        let classes = self.classes.iter().enumerate();
        let (_, class) = classes.filter(may).max_by_key(spare)?;
        let used = |number: &&u32| {
            let chunk = self.chunks.get(**number as usize).and_then(Option::as_ref);
            chunk.map_or(usize::MAX, |chunk| chunk.used)
        };
        class.open.iter().min_by_key(used).copied()
    }

    /// What a slot holds.
    pub fn bytes(&self, slot: Slot) -> &[u8] {
        let chunk = self.chunks.get(slot.chunk as usize).and_then(Option::as_ref);
        chunk.map_or(&[], |chunk| chunk.bytes(slot.index))
    }

    /// The same, to be filled.
    pub fn bytes_mut(&mut self, slot: Slot) -> &mut [u8] {
        let chunk = self.chunks.get_mut(slot.chunk as usize).and_then(Option::as_mut);
        chunk.map_or(&mut [], |chunk| chunk.bytes_mut(slot.index))
    }
}
