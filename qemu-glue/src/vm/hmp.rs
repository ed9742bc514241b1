//! Parsers for the human monitor's texts, which have no machine-readable counterpart.
//!
//! Forms: softmmu/physmem.c (`ram_block_format`), softmmu/memory.c (`mtree_print_flatview`),
//! monitor/hmp-cmds.c (`gpa2hva`) of QEMU 7.2, and the same under system/ of QEMU 10.0. A line
//! that does not have the known form is an error, never skipped.

use super::error::VmError;

/// Most RAM blocks (with ROMs and video memory) that are read.
pub(crate) const BLOCKS_MAX: usize = 4096;

/// Most ranges of the guest's address space that are read.
pub(crate) const RANGES_MAX: usize = 65_536;

/// Longest piece of a line, in characters, that an error repeats.
const QUOTE_CHARS: usize = 120;

pub(crate) const RAMBLOCK: &str = "info ramblock";
pub(crate) const MTREE: &str = "info mtree -f";

/// One line of `info ramblock`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RamBlock {
    /// Empty for a block that is not migrated under any name.
    pub name: String,
    /// Size of the pages behind it in bytes.
    pub page_bytes: u64,
    /// Length in use in bytes.
    pub used_bytes: u64,
    /// QEMU's address of it, from 8.2 on.
    pub hva: Option<u64>,
}

/// One range of the flat view of guest memory that is backed by memory of QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FlatRange {
    pub gpa: u64,
    pub bytes: u64,
    pub name: String,
    pub offset: u64,
}

fn unknown(command: &'static str, line: &str) -> VmError {
    VmError::Text { command, line: line.chars().take(QUOTE_CHARS).collect() }
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

/// Parses `info ramblock`.
pub(crate) fn ramblocks(text: &str) -> Result<Vec<RamBlock>, VmError> {
    let mut lines = text.lines().map(str::trim_end).filter(|line| !line.is_empty());
    match lines.next() {
        Some(header) if header.trim_start().starts_with("Block Name") => {}
        other => return Err(unknown(RAMBLOCK, other.unwrap_or("(nothing)"))),
    }
    let mut blocks = Vec::new();
    for line in lines {
        if blocks.len() >= BLOCKS_MAX {
            return Err(VmError::TooMany { command: RAMBLOCK, limit: BLOCKS_MAX });
        }
        blocks.push(ramblock(line).ok_or_else(|| unknown(RAMBLOCK, line))?);
    }
    Ok(blocks)
}

/// `NAME 4 KiB 0xOFFSET 0xUSED 0xTOTAL [0xHVA rw|ro]`, read from its end: names are the guest's
/// configuration.
fn ramblock(line: &str) -> Option<RamBlock> {
    let mut words: Vec<&str> = line.split_whitespace().collect();
    let hva = match words.last()? {
        &"rw" | &"ro" => {
            words.pop();
            Some(hex(words.pop()?)?)
        }
        _ => None,
    };
    let total_bytes = hex(words.pop()?)?;
    let used_bytes = hex(words.pop()?)?;
    let _ram_offset = hex(words.pop()?)?;
    let shift = match words.pop()? {
        "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return None,
    };
    let page_bytes = words.pop()?.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    if !page_bytes.is_power_of_two() || used_bytes > total_bytes {
        return None;
    }
    Some(RamBlock { name: words.join(" "), page_bytes, used_bytes, hva })
}

/// Parses the flat view of the address space `memory` in `info mtree -f`: ranges of RAM and ROM.
pub(crate) fn memory_ranges(text: &str) -> Result<Vec<FlatRange>, VmError> {
    let mut ranges = Vec::new();
    let (mut wanted, mut found) = (false, false);
    for line in text.lines().map(str::trim_end) {
        if line.starts_with("FlatView #") {
            wanted = false;
        } else if line.starts_with(" AS \"memory\",") {
            (wanted, found) = (true, true);
        } else if wanted && line.starts_with("  ") && line.trim_start().starts_with(is_hex) {
            if ranges.len() >= RANGES_MAX {
                return Err(VmError::TooMany { command: MTREE, limit: RANGES_MAX });
            }
            ranges.extend(flat_range(line).ok_or_else(|| unknown(MTREE, line))?);
        }
    }
    if found { Ok(ranges) } else { Err(unknown(MTREE, "(no address space \"memory\")")) }
}

fn is_hex(c: char) -> bool {
    c.is_ascii_hexdigit()
}

/// `START-END (prio N, TYPE): NAME[ @OFFSET]`. Nothing for ranges that are no memory of QEMU.
fn flat_range(line: &str) -> Option<Option<FlatRange>> {
    let (start, rest) = line.trim_start().split_once('-')?;
    let (end, rest) = rest.split_once(" (prio ")?;
    let (kind, mut name) = rest.split_once(", ")?.1.split_once("): ")?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let end = u64::from_str_radix(end, 16).ok()?;
    if !matches!(kind.trim_start_matches("nv-"), "ram" | "rom") {
        return Some(None);
    }
    let mut offset = 0;
    if let Some((before, digits)) = name.rsplit_once(" @") {
        offset = u64::from_str_radix(digits, 16).ok()?;
        name = before;
    }
    let bytes = end.checked_sub(start)?.checked_add(1)?;
    Some(Some(FlatRange { gpa: start, bytes, name: name.to_owned(), offset }))
}

/// Parses the answer to `gpa2hva`: name of the block and QEMU's address. Nothing if no memory is
/// there, or another text came.
pub(crate) fn host_address(text: &str) -> Option<(String, u64)> {
    let rest = text.trim().strip_prefix("Host virtual address for ")?;
    let (_, rest) = rest.split_once(" (")?;
    let (name, address) = rest.rsplit_once(") is ")?;
    Some((name.to_owned(), hex(address)?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn data(name: &str) -> String {
        let path = format!("{}/tests/data/{name}.txt", env!("CARGO_MANIFEST_DIR"));
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn blocks_of_both_versions_are_read() {
        for version in ["7.2", "10.0"] {
            let blocks = ramblocks(&data(&format!("{version}-dimm.ramblock"))).unwrap();
            let sizes: Vec<(&str, u64)> =
                blocks.iter().map(|block| (block.name.as_str(), block.used_bytes)).collect();
            assert_eq!(sizes[..2], [("ram0", 256 << 20), ("d0", 128 << 20)], "{version}");
            assert_eq!(blocks.len(), 7);
            assert!(blocks.iter().all(|block| block.page_bytes == 4096));
            assert_eq!(blocks.iter().all(|block| block.hva.is_some()), version == "10.0");
        }
    }

    #[test]
    fn numa_nodes_are_told_apart() {
        for version in ["7.2", "10.0"] {
            let ranges = memory_ranges(&data(&format!("{version}-numa.mtree"))).unwrap();
            let node: Vec<_> = ranges.iter().filter(|range| range.name == "n1").collect();
            assert_eq!((node[0].gpa, node[0].bytes, node[0].offset), (128 << 20, 128 << 20, 0));
            assert_eq!(node.len(), 1, "other address spaces must not be counted");
        }
    }

    #[test]
    fn memory_above_the_hole_keeps_its_offset() {
        for version in ["7.2", "10.0"] {
            let ranges = memory_ranges(&data(&format!("{version}-big.mtree"))).unwrap();
            let high =
                FlatRange { gpa: 4 << 30, bytes: 2 << 30, name: "big0".into(), offset: 3 << 30 };
            assert!(ranges.contains(&high), "{version}: {ranges:?}");
            let total: u64 = ranges.iter().filter(|r| r.name == "big0").map(|r| r.bytes).sum();
            // The VGA window hides 128 KiB of it.
            assert_eq!(total, (5 << 30) - (128 << 10), "{version}");
        }
    }

    #[test]
    fn an_incoming_machine_has_its_layout_already() {
        for version in ["7.2", "10.0"] {
            let ranges = memory_ranges(&data(&format!("{version}-incoming.mtree"))).unwrap();
            assert!(ranges.iter().any(|range| range.name == "ram0" && range.gpa == 1 << 20));
        }
    }

    #[test]
    fn huge_pages_and_blocks_without_a_name_are_read() {
        let line = "        hp    2 MiB  0x0000000000000000 0x0000000040000000 0x0000000040000000";
        assert_eq!(ramblock(line).unwrap().page_bytes, 2 << 20);
        let line = "     4 KiB  0x0000000000000000 0x0000000000001000 0x0000000000001000 0x7f00 rw";
        assert_eq!(ramblock(line).unwrap().name, "");
        let line = "        hp    3 MiB  0x0 0x1000 0x1000";
        assert_eq!(ramblock(line), None);
    }

    #[test]
    fn addresses_are_read() {
        let text = "Host virtual address for 0x100000 (ram0) is 0x7fc1b80ff000\r\n";
        assert_eq!(host_address(text), Some(("ram0".into(), 0x7fc1_b80f_f000)));
        assert_eq!(host_address("No memory is mapped at address 0xfffffffff000\r\n"), None);
        assert_eq!(host_address("Memory at address 0xfec00000 is not RAM\r\n"), None);
    }

    #[test]
    fn other_texts_are_refused() {
        assert!(ramblocks("").is_err());
        assert!(ramblocks("unknown command: 'info ramblock'").is_err());
        assert!(memory_ranges("unknown command").is_err());
        let damaged = data("7.2-dimm.mtree").replace("(prio 0, ram): d0", "ram d0");
        assert!(memory_ranges(&damaged).is_err());
    }

    proptest! {
        #[test]
        fn damaged_texts_never_panic(
            file in prop::sample::select(vec![
                "7.2-dimm.ramblock",
                "10.0-dimm.ramblock",
                "10.0-numa.mtree",
            ]),
            at in any::<prop::sample::Index>(),
            with in "[ -~\n]{0,3}",
        ) {
            let mut text = data(file);
            let at = at.index(text.len());
            text.replace_range(at..=at, &with);
            let _ = ramblocks(&text);
            let _ = memory_ranges(&text);
            let _ = host_address(&text);
        }
    }
}
