//! Which RAM blocks the engine moves, which QEMU streams, and which nobody can.

use std::collections::BTreeMap;

use super::GpaRange;
use super::error::VmError;
use super::hmp::{self, FlatRange, RamBlock};
use super::process::BackingFile;
use crate::check::{Finding, Severity};
use crate::procfs::{self, Mapping};
use crate::qmp::{Client, MemoryBackend, QemuVersion, QmpError};
use crate::ram::RamRegion;

/// How often the blocks are read again if they change meanwhile.
const ATTEMPTS: usize = 3;

/// Most addresses that are asked for per block, the longest ranges first.
const PROBES_PER_BLOCK: usize = 16;

/// Shorter ranges are not asked for: below 1 MiB the guest remaps memory at will.
const PROBE_BYTES_MIN: u64 = 1 << 20;

/// More than this much streamed memory, in bytes, is worth a warning: it is sent while the guest
/// stands still.
const STREAMED_BYTES_WARN: u64 = 64 << 20;

const SHARE: &str = "start QEMU with -object memory-backend-file,share=on,mem-path=/dev/shm/... \
                     (or hugetlbfs) for all guest memory, or use --path stream";

/// What was found out about memory.
#[derive(Debug, Default)]
pub(super) struct Memory {
    pub regions: Vec<RamRegion>,
    pub streamed_blocks: Vec<(String, u64)>,
    pub placed: Vec<RamRegion>,
    pub guest_physical: Vec<GpaRange>,
    pub files: Vec<BackingFile>,
    pub findings: Vec<Finding>,
}

/// A memory backend with the type of its object.
#[derive(Debug, Clone)]
struct Backend {
    info: MemoryBackend,
    /// Such as `memory-backend-file`; empty if it is not known.
    kind: String,
}

/// Everything that QEMU said, before anything is concluded from it.
#[derive(Debug)]
struct Evidence {
    version: QemuVersion,
    blocks: Vec<RamBlock>,
    backends: Vec<Backend>,
    ranges: Vec<FlatRange>,
    /// Per block: where QEMU has it, or why that is in doubt.
    addresses: BTreeMap<String, Result<u64, String>>,
    mappings: Vec<Mapping>,
}

/// Asks QEMU and /proc, and concludes.
pub(super) async fn examine(client: &Client, pid: i32) -> Result<Memory, VmError> {
    for _ in 0..ATTEMPTS {
        let blocks = hmp::ramblocks(&client.hmp(hmp::RAMBLOCK).await?)?;
        let backends = backends(client).await?;
        let ranges = hmp::memory_ranges(&client.hmp(hmp::MTREE).await?)?;
        let mut addresses = BTreeMap::new();
        for block in blocks.iter().filter(|block| !block.name.is_empty()) {
            if let Some(address) = address(client, block, &ranges).await? {
                addresses.insert(block.name.clone(), address);
            }
        }
        let mappings = tokio::task::spawn_blocking(move || procfs::mappings(pid))
            .await
            .map_err(|_| VmError::Interrupted)??;
        if hmp::ramblocks(&client.hmp(hmp::RAMBLOCK).await?)? != blocks {
            continue;
        }
        let version = client.version().clone();
        return Ok(Evidence { version, blocks, backends, ranges, addresses, mappings }.conclude());
    }
    Err(VmError::Changing)
}

async fn backends(client: &Client) -> Result<Vec<Backend>, VmError> {
    let mut backends = Vec::new();
    for info in client.query_memdev().await? {
        let kind = match &info.id {
            Some(id) => match client.qom_get(&format!("/objects/{id}"), "type").await {
                Ok(kind) => kind.as_str().unwrap_or_default().to_owned(),
                // The machine's own back end is not among the user's objects.
                Err(QmpError::Command { .. }) => String::new(),
                Err(error) => return Err(error.into()),
            },
            None => String::new(),
        };
        backends.push(Backend { info, kind });
    }
    Ok(backends)
}

/// Where QEMU has a block: asked for several of its ranges, which must agree.
async fn address(
    client: &Client,
    block: &RamBlock,
    ranges: &[FlatRange],
) -> Result<Option<Result<u64, String>>, VmError> {
    let mut known = block.hva;
    let mut probes: Vec<&FlatRange> = ranges
        .iter()
        .filter(|range| range.name == block.name && range.bytes >= PROBE_BYTES_MIN)
        .collect();
    probes.sort_by_key(|range| std::cmp::Reverse(range.bytes));
    for range in probes.into_iter().take(PROBES_PER_BLOCK) {
        let text = client.hmp(&format!("gpa2hva {:#x}", range.gpa)).await?;
        let found = hmp::host_address(&text)
            .filter(|(name, _)| *name == block.name)
            .and_then(|(_, hva)| hva.checked_sub(range.offset));
        match (known, found) {
            (_, None) => return Ok(Some(Err(format!("QEMU answers {:?}", text.trim())))),
            (Some(before), Some(now)) if before != now => {
                let text = format!("QEMU names two addresses, {before:#x} and {now:#x}");
                return Ok(Some(Err(text)));
            }
            (_, Some(_)) => known = found,
        }
    }
    Ok(known.map(Ok))
}

impl Evidence {
    fn conclude(self) -> Memory {
        let mut memory = Memory::default();
        for block in self.blocks.iter().filter(|block| !block.name.is_empty()) {
            let backend = self.backend(&block.name);
            match self.left_out(block, backend) {
                Err(doubt) => {
                    let what =
                        format!("RAM block {} cannot be moved directly: {doubt}", block.name);
                    memory.findings.push(Finding::indirect(what, SHARE));
                }
                Ok(false) => self.streamed(block, backend, &mut memory),
                Ok(true) => match self.region(block) {
                    Ok((region, file)) => {
                        memory.regions.push(region);
                        memory.files.push(file);
                    }
                    Err(doubt) => {
                        let what =
                            format!("RAM block {} cannot be moved directly: {doubt}", block.name);
                        memory.findings.push(Finding::indirect(what, SHARE));
                    }
                },
            }
        }
        self.summarise(&mut memory);
        memory.placed = self.placed();
        memory.guest_physical = guest_physical(&self.ranges, &memory.placed);
        memory
    }

    /// The blocks of whole pages whose address is known.
    fn placed(&self) -> Vec<RamRegion> {
        let blocks = self.blocks.iter().filter_map(|block| {
            let hva = *self.addresses.get(&block.name)?.as_ref().ok()?;
            let whole = block.used_bytes > 0 && block.used_bytes.is_multiple_of(block.page_bytes);
            whole.then(|| block.at(hva))
        });
        blocks.collect()
    }

    /// The back end of a block: blocks have the id of theirs, or its path on old machine types.
    fn backend(&self, block: &str) -> Option<&Backend> {
        let id = block.strip_prefix("/objects/").unwrap_or(block);
        self.backends.iter().find(|backend| backend.info.id.as_deref() == Some(id))
    }

    /// Whether x-ignore-shared leaves the block out (migration/ram.c: `ramblock_is_ignored`, from
    /// 8.1 on `migrate_ram_is_ignored`), or why that is in doubt.
    fn left_out(&self, block: &RamBlock, backend: Option<&Backend>) -> Result<bool, String> {
        let only_files = self.version.at_least(8, 1);
        let shared_mapping = match self.addresses.get(&block.name) {
            Some(Ok(hva)) => procfs::find(&self.mappings, *hva).map(|mapping| mapping.shared),
            _ => None,
        };
        let Some(backend) = backend else {
            // Video memory and ROMs: never named files; shared only where QEMU was told so.
            return match shared_mapping {
                Some(true) if !only_files => Err("it is shared but has no memory backend".into()),
                _ => Ok(false),
            };
        };
        if let Some(mapped) = shared_mapping
            && mapped != backend.info.share
        {
            return Err(format!(
                "its backend says share={} but its mapping says otherwise",
                backend.info.share
            ));
        }
        match (backend.info.share, only_files, backend.kind.as_str()) {
            (false, ..) => Ok(false),
            (true, false, _) => Ok(true),
            (true, true, "") => Err("the type of its memory backend is not known".into()),
            (true, true, kind) => Ok(kind == "memory-backend-file"),
        }
    }

    fn streamed(&self, block: &RamBlock, backend: Option<&Backend>, memory: &mut Memory) {
        memory.streamed_blocks.push((block.name.clone(), block.used_bytes));
        let Some(backend) = backend else { return };
        let why = if backend.info.share {
            format!("is a {}, which QEMU {} streams", backend.kind, self.version)
        } else {
            "is private memory".to_owned()
        };
        let mib = block.used_bytes >> 20;
        memory.findings.push(Finding::indirect(
            format!("RAM block {} ({mib} MiB) {why}, with the guest stopped", block.name),
            SHARE,
        ));
    }

    /// The block as a region, if its mapping is what it must be.
    fn region(&self, block: &RamBlock) -> Result<(RamRegion, BackingFile), String> {
        let hva = match self.addresses.get(&block.name) {
            Some(Ok(hva)) => *hva,
            Some(Err(doubt)) => return Err(doubt.clone()),
            None => return Err("the guest does not see it anywhere".into()),
        };
        if block.used_bytes == 0 || !block.used_bytes.is_multiple_of(block.page_bytes) {
            return Err(format!("its length {} is no multiple of its pages", block.used_bytes));
        }
        let end = hva.checked_add(block.used_bytes).ok_or("its address is out of range")?;
        let first = procfs::find(&self.mappings, hva).ok_or("QEMU has nothing mapped there")?;
        let mut at = hva;
        while at < end {
            let mapping = procfs::find(&self.mappings, at).ok_or("it is mapped only in part")?;
            if !mapping.shared || !mapping.write || mapping.inode == 0 {
                return Err(format!("{:?} is not mapped shared and writable", mapping.path));
            }
            let expected = (hva - first.start).checked_add(first.offset_bytes);
            let offset = (at - mapping.start).checked_add(mapping.offset_bytes);
            let continues = expected.and_then(|expected| expected.checked_add(at - hva)) == offset;
            if !mapping.same_file(first) || !continues {
                return Err("its mapping has gaps".into());
            }
            at = mapping.end;
        }
        let region = block.at(hva);
        let (device, inode) = (first.device, first.inode);
        Ok((region, BackingFile { device, inode, block: block.name.clone() }))
    }

    fn summarise(&self, memory: &mut Memory) {
        if memory.regions.is_empty() {
            memory.findings.push(Finding::indirect("The VM has no RAM in a shared file", SHARE));
        }
        let streamed: u64 = memory.streamed_blocks.iter().map(|(_, bytes)| bytes).sum();
        if streamed > STREAMED_BYTES_WARN {
            memory.findings.push(Finding::new(
                Severity::Warning,
                format!("{} MiB are sent while the guest is stopped", streamed >> 20),
                "reduce video memory",
            ));
        }
        let unused = self.backends.iter().filter(|backend| {
            let id = backend.info.id.as_deref().unwrap_or_default();
            !self
                .blocks
                .iter()
                .any(|block| block.name == id || block.name.strip_prefix("/objects/") == Some(id))
        });
        for backend in unused {
            let id = backend.info.id.as_deref().unwrap_or("(without id)");
            memory.findings.push(Finding::new(
                Severity::Note,
                format!("Memory backend {id} is used by no device and is not migrated"),
                "none is needed",
            ));
        }
    }
}

impl RamBlock {
    fn at(&self, hva: u64) -> RamRegion {
        RamRegion {
            name: self.name.clone(),
            length_bytes: self.used_bytes,
            page_bytes: self.page_bytes,
            hva,
        }
    }
}

/// Where the guest sees the regions, adjacent parts joined.
fn guest_physical(ranges: &[FlatRange], regions: &[RamRegion]) -> Vec<GpaRange> {
    let mut parts: Vec<&FlatRange> = ranges
        .iter()
        .filter(|range| {
            let of = |region: &RamRegion| {
                let end = range.offset.checked_add(range.bytes);
                region.name == range.name && end.is_some_and(|end| end <= region.length_bytes)
            };
            regions.iter().any(of)
        })
        .collect();
    parts.sort_by_key(|range| range.gpa);
    let mut joined: Vec<GpaRange> = Vec::with_capacity(parts.len());
    for part in parts {
        match joined.last_mut() {
            Some(last)
                if last.block == part.name
                    && last.gpa.checked_add(last.bytes) == Some(part.gpa)
                    && last.offset.checked_add(last.bytes) == Some(part.offset) =>
            {
                last.bytes += part.bytes;
            }
            _ => joined.push(GpaRange {
                gpa: part.gpa,
                bytes: part.bytes,
                block: part.name.clone(),
                offset: part.offset,
            }),
        }
    }
    joined
}
