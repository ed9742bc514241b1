//! Addresses of the kernel's variables by their names, from the tables by which the kernel itself finds them.
//!
//! ```text
//!   names:   [len, token, token, ...] [len, ...] ...        a length from 128 on takes two bytes
//!   tokens:  token_index[token] ──► token_table: "T_\0", "init\0", ...
//!   offsets: of the symbol with the same number, from relative_base
//! ```
//!
//! Source: kernel/kallsyms.c, scripts/kallsyms.c. The note leads to the tables since Linux 6.0; names of variables are in them
//! with CONFIG_KALLSYMS_ALL. Offsets are 32 bits: unsigned, or, until 6.14 on machines with several processors, counted
//! downwards from -1 where they are negative and addresses of their own where not. Which it is, a symbol tells that
//! the note has as well.
//!
//! Invariant: every length is bounded before it is followed.

use std::collections::BTreeMap;

use crate::error::IntrospectError;
use crate::kernel::Kernel;
use crate::memory::{Gva, PhysicalMemory};
use crate::note::Note;

/// Most symbols; distributions' kernels have some 150,000 to 250,000.
const SYMBOLS_MAX: u32 = 1 << 21;

/// Longest table of names, in bytes.
const NAMES_BYTES_MAX: usize = 48 << 20;

/// Longest name in bytes that is looked at (include/linux/kallsyms.h: `KSYM_NAME_LEN`).
const NAME_BYTES_MAX: usize = 512;

/// Names are read in pieces.
const PIECE_BYTES: usize = 64 << 10;

/// Tokens are numbered by a byte.
const TOKENS: usize = 256;

/// Longest token in bytes.
const TOKEN_BYTES_MAX: usize = 512;

/// The symbol by which the kind of offsets is known.
const KNOWN: &str = "_stext";

/// Addresses by name.
#[derive(Debug, Clone, Default)]
pub struct Symbols {
    addresses: BTreeMap<String, Gva>,
}

impl Symbols {
    /// The address of `name`.
    ///
    /// # Errors
    /// [`IntrospectError::NoSymbol`] if the kernel does not have it, or it was not asked for.
    pub fn address(&self, name: &str) -> Result<Gva, IntrospectError> {
        let found = self.addresses.get(name).copied();
        found.ok_or_else(|| IntrospectError::NoSymbol { name: name.to_owned() })
    }

    /// Looks for those of `names` that the kernel has; of several with one name the first.
    ///
    /// # Errors
    /// [`IntrospectError::Missing`] for a kernel before 6.0; [`IntrospectError::Symbols`] for tables that are
    /// none; what reading them brings.
    pub fn find(
        kernel: &Kernel,
        memory: &impl PhysicalMemory,
        names: &[&str],
    ) -> Result<Self, IntrospectError> {
        let tables = Tables::of(kernel, memory)?;
        let mut numbers = BTreeMap::new();
        tables.each_name(|number, name| {
            let name = str::from_utf8(name).unwrap_or_default();
            if name == KNOWN || names.contains(&name) {
                numbers.entry(name.to_owned()).or_insert(number);
            }
        })?;
        let known = numbers.get(KNOWN).copied();
        let known = known.ok_or(IntrospectError::Symbols { why: "_stext is not among them" })?;
        let stext = kernel.note().symbol(KNOWN)?;
        let kind = tables.kind(known, stext)?;
        let address = |(name, number)| Ok((name, tables.address(number, kind)?));
        let addresses = numbers.into_iter().map(address).collect::<Result<_, IntrospectError>>()?;
        Ok(Self { addresses })
    }
}

/// How offsets are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Unsigned, from the base.
    Unsigned,
    /// Negative ones downwards from the base less one; others are addresses.
    Signed,
}

/// Where the tables are, and the small ones of them.
struct Tables<'a, M> {
    kernel: &'a Kernel,
    memory: &'a M,
    symbols: u32,
    names_at: Gva,
    offsets_at: Gva,
    base: u64,
    tokens: Vec<Vec<u8>>,
}

impl<'a, M: PhysicalMemory> Tables<'a, M> {
    fn of(kernel: &'a Kernel, memory: &'a M) -> Result<Self, IntrospectError> {
        let note: &Note = kernel.note();
        let translator = kernel.translator();
        let symbols = translator.read_u32(memory, note.symbol("kallsyms_num_syms")?)?;
        if symbols == 0 || symbols > SYMBOLS_MAX {
            return Err(IntrospectError::Symbols { why: "their number" });
        }
        let base = translator.read_u64(memory, note.symbol("kallsyms_relative_base")?)?;
        Ok(Self {
            kernel,
            memory,
            symbols,
            names_at: note.symbol("kallsyms_names")?,
            offsets_at: note.symbol("kallsyms_offsets")?,
            base,
            tokens: tokens(kernel, memory)?,
        })
    }

    /// Calls `see` with every symbol's number and name, without the letter of its type.
    fn each_name(&self, mut see: impl FnMut(u32, &[u8])) -> Result<(), IntrospectError> {
        let mut names = Names { tables: self, bytes: vec![], at: 0, read: 0 };
        let mut name = vec![];
        for number in 0..self.symbols {
            let first = names.byte()?;
            let length = match first & 0x80 {
                0 => usize::from(first),
                _ => usize::from(first & 0x7f) | usize::from(names.byte()?) << 7,
            };
            name.clear();
            for _ in 0..length {
                let token = names.byte()?;
                if name.len() < NAME_BYTES_MAX {
                    let token = self.tokens.get(usize::from(token)).map(Vec::as_slice);
                    name.extend_from_slice(token.unwrap_or_default());
                }
            }
            see(number, name.get(1..).unwrap_or_default());
        }
        Ok(())
    }

    fn offset(&self, number: u32) -> Result<u32, IntrospectError> {
        let at = self.offsets_at.plus(u64::from(number) * 4);
        let at = at.ok_or(IntrospectError::Symbols { why: "where offsets are" })?;
        self.kernel.translator().read_u32(self.memory, at)
    }

    fn kind(&self, number: u32, address: Gva) -> Result<Kind, IntrospectError> {
        for kind in [Kind::Unsigned, Kind::Signed] {
            if self.address(number, kind)? == address {
                return Ok(kind);
            }
        }
        Err(IntrospectError::Symbols { why: "they contradict the note" })
    }

    fn address(&self, number: u32, kind: Kind) -> Result<Gva, IntrospectError> {
        let offset = self.offset(number)?;
        Ok(Gva(match (kind, offset.cast_signed()) {
            (Kind::Unsigned, _) => self.base.wrapping_add(u64::from(offset)),
            (Kind::Signed, signed @ 0..) => u64::from(signed.cast_unsigned()),
            (Kind::Signed, signed) => {
                self.base.wrapping_sub(1).wrapping_add(u64::from(signed.unsigned_abs()))
            }
        }))
    }
}

/// What each token stands for.
fn tokens(kernel: &Kernel, memory: &impl PhysicalMemory) -> Result<Vec<Vec<u8>>, IntrospectError> {
    let (note, translator) = (kernel.note(), kernel.translator());
    let mut index = [0; TOKENS * 2];
    translator.read(memory, note.symbol("kallsyms_token_index")?, &mut index)?;
    let table = note.symbol("kallsyms_token_table")?;
    let starts: Vec<usize> = index
        .chunks_exact(2)
        .map(|pair| usize::from(u16::from_le_bytes([pair[0], pair[1]])))
        .collect();
    let last = starts.iter().max().copied().unwrap_or_default();
    let mut bytes = vec![0; last];
    translator.read(memory, table, &mut bytes)?;
    // The last one ends where it says, which need not be within what is mapped.
    let mut at = table.plus(last as u64);
    while let Some(here) = at.filter(|_| bytes.len() < last + TOKEN_BYTES_MAX) {
        let mut byte = [0];
        translator.read(memory, here, &mut byte)?;
        bytes.extend(byte);
        at = here.plus(1).filter(|_| byte != [0]);
    }
    let token = |start: &usize| {
        let from = bytes.get(*start..).unwrap_or_default();
        let token = from.split(|byte| *byte == 0).next().unwrap_or_default();
        token.iter().copied().take(TOKEN_BYTES_MAX).collect()
    };
    Ok(starts.iter().map(token).collect())
}

/// The table of names, read in pieces.
struct Names<'a, 'b, M> {
    tables: &'a Tables<'b, M>,
    bytes: Vec<u8>,
    /// Next byte within `bytes`.
    at: usize,
    /// Bytes of the table that were read.
    read: usize,
}

impl<M: PhysicalMemory> Names<'_, '_, M> {
    fn byte(&mut self) -> Result<u8, IntrospectError> {
        if self.at >= self.bytes.len() {
            self.refill()?;
        }
        let byte = self.bytes.get(self.at).copied();
        self.at += 1;
        byte.ok_or(IntrospectError::Symbols { why: "names end early" })
    }

    fn refill(&mut self) -> Result<(), IntrospectError> {
        if self.read >= NAMES_BYTES_MAX {
            return Err(IntrospectError::Symbols { why: "names without end" });
        }
        let Tables { kernel, memory, names_at, .. } = self.tables;
        let from = names_at.plus(self.read as u64);
        let from = from.ok_or(IntrospectError::Symbols { why: "where names are" })?;
        // To the end of a page, beyond which nothing need be.
        let mapped = kernel.translator().translate(*memory, from)?;
        let bytes = usize::try_from(mapped.bytes).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
        self.bytes.resize(bytes, 0);
        memory.read(mapped.at, &mut self.bytes)?;
        self.at = 0;
        self.read += bytes;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
