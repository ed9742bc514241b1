//! The kernel's own counters of memory, by the names under which `/proc/vmstat` shows them.
//!
//! ```text
//!  vmstat_text:  nr_free_pages ... │ numa_hit ... │ nr_inactive_anon ... │ nr_dirty_threshold ... │ pgpgin ... pswpin ...
//!                vm_zone_stat[]    │              │ vm_node_stat[]       │                        │ vm_event_states of each
//!                                                                                                 │ processor, summed up
//! ```
//!
//! Numbers of counters differ from version to version and by configuration, and their names lie in the kernel in
//! the same order (mm/vmstat.c: `vmstat_text`): so the names give the numbers.

use std::collections::BTreeMap;

use crate::error::IntrospectError;
use crate::kernel::Kernel;
use crate::memory::{Gva, PhysicalMemory};
use crate::symbols::Symbols;

/// Most names that are looked at; 6.12 has some 190.
const NAMES_MAX: u64 = 512;

/// Longest name in bytes.
const NAME_BYTES_MAX: usize = 64;

/// Most processors whose events are summed up.
const PROCESSORS_MAX: u32 = 8192;

/// First counter of what follows those of zones.
const FIRST_BEHIND_ZONES: [&str; 2] = ["numa_hit", "nr_inactive_anon"];

/// First counter of nodes.
const FIRST_OF_NODES: &str = "nr_inactive_anon";

/// First counter behind those of nodes.
const FIRST_BEHIND_NODES: &str = "nr_dirty_threshold";

/// First event.
const FIRST_EVENT: &str = "pgpgin";

/// Which symbols are needed.
pub(crate) const SYMBOLS: [&str; 6] = [
    "vmstat_text",
    "vm_zone_stat",
    "vm_node_stat",
    "vm_event_states",
    "__per_cpu_offset",
    "nr_cpu_ids",
];

/// Reads counters. Their names are read once.
#[derive(Debug, Clone)]
pub struct Counters {
    /// Place of each name in the kernel's list.
    places: BTreeMap<String, u64>,
    zones: Gva,
    nodes: Gva,
    /// Where processors count events, and the list of their own offsets; absent in kernels that count none.
    events: Option<Events>,
}

#[derive(Debug, Clone, Copy)]
struct Events {
    at: Gva,
    offsets: Gva,
    processors: Gva,
}

impl Counters {
    /// Finds the counters.
    ///
    /// # Errors
    /// [`IntrospectError::NoSymbol`] for a kernel whose tables have no variables; what reading brings.
    pub fn find(
        kernel: &Kernel,
        memory: &impl PhysicalMemory,
        symbols: &Symbols,
    ) -> Result<Self, IntrospectError> {
        let events = || -> Result<Events, IntrospectError> {
            Ok(Events {
                at: symbols.address("vm_event_states")?,
                offsets: symbols.address("__per_cpu_offset")?,
                processors: symbols.address("nr_cpu_ids")?,
            })
        };
        Ok(Self {
            places: names(kernel, memory, symbols.address("vmstat_text")?)?,
            zones: symbols.address("vm_zone_stat")?,
            nodes: symbols.address("vm_node_stat")?,
            events: events().ok(),
        })
    }

    /// The value of a counter, in its unit of `/proc/vmstat`: mostly pages. Nothing if the kernel has none of that name.
    ///
    /// # Errors
    /// What reading brings.
    pub fn value(
        &self,
        kernel: &Kernel,
        memory: &impl PhysicalMemory,
        name: &str,
    ) -> Result<Option<u64>, IntrospectError> {
        let place = |name: &str| self.places.get(name).copied();
        let Some(at) = place(name) else { return Ok(None) };
        let zones_end = FIRST_BEHIND_ZONES.into_iter().filter_map(place).min();
        let read = |array: Gva, number: u64| {
            let at = array.plus(number * 8).ok_or(IntrospectError::NotMapped { at: array })?;
            // Corrections of single processors may leave it below zero.
            let value = kernel.translator().read_u64(memory, at)?.cast_signed();
            Ok(Some(u64::try_from(value).unwrap_or(0)))
        };
        if zones_end.is_some_and(|end| at < end) {
            return read(self.zones, at);
        }
        let nodes = place(FIRST_OF_NODES).zip(place(FIRST_BEHIND_NODES));
        if let Some((first, end)) = nodes
            && (first..end).contains(&at)
        {
            return read(self.nodes, at - first);
        }
        match (place(FIRST_EVENT), self.events) {
            (Some(first), Some(events)) if at >= first => {
                events.sum(kernel, memory, at - first).map(Some)
            }
            _ => Ok(None),
        }
    }
}

impl Events {
    fn sum(
        &self,
        kernel: &Kernel,
        memory: &impl PhysicalMemory,
        number: u64,
    ) -> Result<u64, IntrospectError> {
        let translator = kernel.translator();
        let processors = translator.read_u32(memory, self.processors)?.min(PROCESSORS_MAX);
        let mut sum = 0u64;
        for processor in 0..u64::from(processors) {
            let nowhere = IntrospectError::NotMapped { at: self.offsets };
            let at = self.offsets.plus(processor * 8).ok_or(nowhere)?;
            let own = translator.read_u64(memory, at)?;
            let at = Gva(self.at.0.wrapping_add(own).wrapping_add(number * 8));
            match translator.read_u64(memory, at) {
                Ok(count) => sum = sum.wrapping_add(count),
                // A processor that is possible, and is not there.
                Err(IntrospectError::NotMapped { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(sum)
    }
}

/// The names at `list`, to the first pointer that leads to none.
fn names(
    kernel: &Kernel,
    memory: &impl PhysicalMemory,
    list: Gva,
) -> Result<BTreeMap<String, u64>, IntrospectError> {
    let mut places = BTreeMap::new();
    for place in 0..NAMES_MAX {
        let Some(at) = list.plus(place * 8) else { break };
        let pointer = Gva(kernel.translator().read_u64(memory, at)?);
        let Some(name) = name(kernel, memory, pointer)? else { break };
        places.entry(name).or_insert(place);
    }
    Ok(places)
}

fn name(
    kernel: &Kernel,
    memory: &impl PhysicalMemory,
    at: Gva,
) -> Result<Option<String>, IntrospectError> {
    let mapped = match kernel.translator().translate(memory, at) {
        Ok(mapped) => mapped,
        Err(error @ IntrospectError::Ram(_)) => return Err(error),
        Err(_) => return Ok(None),
    };
    let mut buffer = vec![0; NAME_BYTES_MAX];
    if kernel.translator().read(memory, at, &mut buffer).is_err() {
        // Beyond the end of the page nothing need be, and the name may end before.
        buffer.truncate(usize::try_from(mapped.bytes).unwrap_or(NAME_BYTES_MAX));
        memory.read(mapped.at, &mut buffer)?;
    }
    let Some(end) = buffer.iter().position(|byte| *byte == 0) else { return Ok(None) };
    buffer.truncate(end);
    let is_name = !buffer.is_empty()
        && buffer
            .iter()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'_');
    Ok(is_name.then(|| String::from_utf8(buffer).ok()).flatten())
}
