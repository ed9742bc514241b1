//! Figures of a made guest, as `free` would show them.

use super::*;
use crate::synthetic::{Guest, Image, Place, VERSIONS};

/// Offsets in the image.
const LIST: u64 = 0x0100_0000;
const TEXTS: u64 = 0x0100_4000;
const ZONES: u64 = 0x0110_0000;
const NODES: u64 = 0x0110_1000;
const PROCESSORS: u64 = 0x0110_4000;
const OWN: u64 = 0x0110_5000;
const VARIABLES: u64 = 0x0111_0000;

const ZONE_NAMES: [&str; 3] = ["nr_free_pages", "nr_zone_inactive_anon", "nr_mlock"];
const NUMA_NAMES: [&str; 2] = ["numa_hit", "numa_miss"];
const NODE_NAMES: [&str; 9] = [
    "nr_inactive_anon",
    "nr_active_anon",
    "nr_inactive_file",
    "nr_active_file",
    "nr_slab_reclaimable",
    "nr_file_pages",
    "nr_shmem",
    "nr_kernel_misc_reclaimable",
    "nr_swapcached",
];
const EVENT_NAMES: [&str; 5] =
    ["nr_dirty_threshold", "nr_dirty_background_threshold", "pgpgin", "pswpin", "pswpout"];

/// A guest that counts: nodes have 1000, 2000, ... pages, processors 7 and 5 events of every kind.
fn guest() -> Guest {
    let mut guest = Guest::new(VERSIONS[5], true, 0);
    let mut image = Image::default();
    image.add("_stext", Place::Image(0));
    for (name, at) in [
        ("vmstat_text", LIST),
        ("vm_zone_stat", ZONES),
        ("vm_node_stat", NODES),
        ("__per_cpu_offset", PROCESSORS),
        ("nr_cpu_ids", PROCESSORS + 0x800),
    ] {
        image.add(name, Place::Image(at));
    }
    image.add("vm_event_states", Place::Absolute(0x100));
    for (number, name) in SYMBOLS.into_iter().enumerate() {
        image.add(name, Place::Image(VARIABLES + number as u64 * 8));
    }
    image.write(&mut guest, true);
    let names = [&ZONE_NAMES[..], &NUMA_NAMES, &NODE_NAMES, &EVENT_NAMES].concat();
    for (number, name) in names.iter().enumerate() {
        let text = TEXTS + number as u64 * 40;
        guest.memory.write(Guest::place(text), format!("{name}\0").as_bytes());
        let pointer = guest.address(text).0;
        guest.memory.write_u64(Guest::place(LIST + number as u64 * 8), pointer);
    }
    let mut set = |at: u64, value: u64| guest.memory.write_u64(Guest::place(at), value);
    set(ZONES, 40_000);
    for number in 0..NODE_NAMES.len() as u64 {
        set(NODES + number * 8, (number + 1) * 1000);
    }
    // total, reserve, min_free_kbytes, scale, free swap, all swap.
    for (number, value) in [200_000, 3000, 4000, 10, 500, 800].into_iter().enumerate() {
        set(VARIABLES + number as u64 * 8, value);
    }
    set(PROCESSORS + 0x800, 3);
    let own = |number: u64| OWN + number * 0x200;
    for (number, events) in [7, 5].into_iter().enumerate() {
        let number = number as u64;
        for event in 0..3 {
            set(own(number) + 0x100 + event * 8, events);
        }
    }
    for number in 0..2 {
        let own = guest.address(own(number)).0;
        guest.memory.write_u64(Guest::place(PROCESSORS + number * 8), own);
    }
    guest
}

#[test]
fn memory_use_is_what_free_shows() {
    let guest = guest();
    let kernel = guest.kernel().expect("a kernel");
    let figures = Figures::find(&kernel, &guest.memory).expect("figures");
    let found = figures.read(&kernel, &guest.memory).expect("counters");
    // Marks: min 1000 pages, low 1000 + 250. Files 3000 + 4000 less 1250, slab 5000 + 8000 less 1250.
    let available = 40_000 + 5750 + 11_750 - 3000;
    let pages = |pages: u64| pages * 4096;
    assert_eq!(
        found,
        Summary {
            total_bytes: pages(200_000),
            used_bytes: pages(200_000 - available),
            free_bytes: pages(40_000),
            shared_bytes: pages(7000),
            // The swap cache, of 9000 pages here, is no part of the page cache's 6000.
            buff_cache_bytes: pages(5000),
            available_bytes: pages(available),
            swap_total_bytes: pages(800),
            swap_free_bytes: pages(500),
            swapped_in_pages: Some(12),
            swapped_out_pages: Some(12),
        }
    );
}
