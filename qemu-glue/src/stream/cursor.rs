//! Reads big-endian fields off a slice that may end too early.

/// More bytes are needed before anything can be said: so many in all, from the element's first on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Need(pub(crate) usize);

/// Why no element was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stop<R> {
    /// It is not all there yet.
    Need(usize),
    /// It never will be.
    Refused(R),
}

impl<R> From<Need> for Stop<R> {
    fn from(Need(bytes): Need) -> Self {
        Self::Need(bytes)
    }
}

/// Where reading of an element stands.
#[derive(Debug, Clone)]
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Reads from the middle of `bytes` on; what is needed is counted from their start.
    pub(crate) fn from(bytes: &'a [u8], at: usize) -> Self {
        Self { bytes, at }
    }

    /// Bytes read so far.
    pub(crate) fn at(&self) -> usize {
        self.at
    }

    /// The next byte, which stays where it is.
    pub(crate) fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], Need> {
        let end = self.at.saturating_add(count);
        let taken = self.bytes.get(self.at..end).ok_or(Need(end))?;
        self.at = end;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<&'a [u8; N], Need> {
        let end = self.at.saturating_add(N);
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let (taken, _) = rest.split_first_chunk().ok_or(Need(end))?;
        self.at = end;
        Ok(taken)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Need> {
        self.array::<1>().map(|[byte]| *byte)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Need> {
        self.array().map(|bytes| u16::from_be_bytes(*bytes))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Need> {
        self.array().map(|bytes| u32::from_be_bytes(*bytes))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Need> {
        self.array().map(|bytes| u64::from_be_bytes(*bytes))
    }

    /// All that is left.
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        self.at = self.bytes.len();
        rest
    }

    /// Bytes with their number in one byte before them.
    pub(crate) fn counted(&mut self) -> Result<&'a [u8], Need> {
        let length = self.u8()?;
        self.take(usize::from(length))
    }
}

/// A name of QEMU's: not empty, and readable.
pub(crate) fn name(bytes: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(bytes).ok()?;
    (!text.is_empty() && !text.chars().any(char::is_control)).then_some(text)
}

/// Bytes that arrived before the element that they belong to was complete.
#[derive(Debug, Default)]
pub(crate) struct Gather {
    bytes: Vec<u8>,
    /// Bytes at the front that have been handed out; they go when the next element is asked for.
    spent: usize,
}

impl Gather {
    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes.get(self.spent..).unwrap_or_default()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes().is_empty()
    }

    /// Lets go of what was handed out.
    pub(crate) fn clear_spent(&mut self) {
        self.bytes.drain(..self.spent.min(self.bytes.len()));
        self.spent = 0;
    }

    /// Adds from `input` until `wanted` bytes are here; says whether they are.
    pub(crate) fn fill(&mut self, wanted: usize, input: &mut &[u8]) -> bool {
        let missing = wanted.saturating_sub(self.bytes().len());
        let (taken, rest) = input.split_at(missing.min(input.len()));
        self.bytes.extend_from_slice(taken);
        *input = rest;
        self.bytes().len() >= wanted
    }

    /// Adds all of `input`.
    pub(crate) fn take_all(&mut self, input: &mut &[u8]) {
        self.bytes.extend_from_slice(input);
        *input = &[];
    }

    /// Takes the next bytes away; they stay readable until [`clear_spent`](Self::clear_spent).
    pub(crate) fn spend(&mut self, count: usize) -> &[u8] {
        let rest = self.spend_seeing_all(count);
        rest.get(..count).unwrap_or(rest)
    }

    /// The same, with what comes after them to be seen too.
    pub(crate) fn spend_seeing_all(&mut self, count: usize) -> &[u8] {
        let from = self.spent;
        self.spent = from.saturating_add(count).min(self.bytes.len());
        self.bytes.get(from..).unwrap_or_default()
    }

    /// Bytes of memory that this takes.
    pub(crate) fn capacity_bytes(&self) -> usize {
        self.bytes.capacity()
    }
}
