//! Names in tables as the kernel lays them out, and in tables that are none.

use super::*;
use crate::synthetic::{Guest, Image, Place, VERSIONS};

fn guest(is_signed: bool) -> Guest {
    let mut guest = Guest::new(VERSIONS[3], false, 0x0600_0000);
    let mut image = Image::default();
    image.add("fixed_percpu_data", Place::Absolute(0x40));
    image.add("_stext", Place::Image(0));
    image.add(&"x".repeat(300), Place::Image(0x10));
    // More than a piece of names.
    for number in 0..9000 {
        image.add(&format!("filler_{number:05}"), Place::Image(0x20));
    }
    image.add("vm_zone_stat", Place::Image(0x0012_3450));
    image.add("vm_zone_stat", Place::Image(0x30));
    image.add("vm_event_states", Place::Absolute(0x1_4000));
    image.write(&mut guest, is_signed);
    guest
}

fn find(guest: &Guest, names: &[&str]) -> Result<Symbols, IntrospectError> {
    Symbols::find(&guest.kernel().expect("a kernel"), &guest.memory, names)
}

#[test]
fn names_lead_to_addresses_with_either_kind_of_offsets() {
    for is_signed in [true, false] {
        let guest = guest(is_signed);
        let long = "x".repeat(300);
        let names = ["vm_zone_stat", "vm_event_states", "no_such_name", &long];
        let symbols = find(&guest, &names).expect("symbols");
        let at = |name: &str| symbols.address(name);
        assert_eq!(at("vm_zone_stat").expect("the first of two"), guest.address(0x0012_3450));
        assert_eq!(at(&long).expect("a long name"), guest.address(0x10));
        assert!(matches!(at("no_such_name"), Err(IntrospectError::NoSymbol { .. })));
        // Not asked for.
        assert!(matches!(at("filler_00001"), Err(IntrospectError::NoSymbol { .. })));
        if is_signed {
            assert_eq!(at("vm_event_states").expect("of processors"), Gva(0x1_4000));
        }
    }
}

#[test]
fn tables_that_are_none_are_refused() {
    let good = guest(true);
    let broken = |offset: u64, bytes: &[u8]| {
        let mut guest = good.clone();
        guest.memory.write(Guest::place(offset), bytes);
        find(&guest, &["vm_zone_stat"]).expect_err("broken").to_string()
    };
    // Too many, none, other offsets, names that are lengths alone.
    assert!(broken(8 << 20, &u32::MAX.to_le_bytes()).contains("their number"));
    assert!(broken(8 << 20, &0u32.to_le_bytes()).contains("their number"));
    assert!(broken(7 << 20, &[7; 64]).contains("contradict the note"));
    assert!(broken(4 << 20, &[0xff; 1 << 18]).contains("not among them"));
    assert!(broken((6 << 20) + 0x4000, &[0xff; 512]).contains("not among them"));
}

#[test]
fn a_note_without_tables_says_so() {
    let guest = Guest::new(VERSIONS[0], false, 0);
    let error = find(&guest, &["vm_zone_stat"]).expect_err("no tables");
    assert!(matches!(error, IntrospectError::Missing { key } if key.contains("kallsyms_num_syms")));
}
