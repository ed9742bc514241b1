//! Kernels of all layouts are found, and forged ones are not.

use super::*;
use crate::synthetic::{Guest, MIB, VERSIONS};

fn found(guest: &Guest) -> Result<Kernel, IntrospectError> {
    guest.kernel()
}

#[test]
fn kernels_of_all_layouts_are_found() {
    for version in VERSIONS {
        for (has_five_levels, moved) in [(false, 0), (true, 0x2be0_0000)] {
            let guest = Guest::new(version, has_five_levels, moved);
            let kernel = found(&guest).expect(version.release);
            assert_eq!(kernel.release(), version.release);
            assert_eq!(kernel.layout().bytes, version.page_bytes);
        }
    }
}

#[test]
fn a_kernel_counts_only_if_all_processors_are_in_it() {
    let guest = Guest::new(VERSIONS[2], false, 0);
    let found = |cr3: &[u64]| {
        let processor =
            |cr3: &u64| Processor { cr3: *cr3, is_paging: *cr3 != 0, ..guest.processor() };
        let processors: Vec<Processor> = cr3.iter().map(processor).collect();
        Kernel::find(&guest.memory, &processors)
    };
    let own = guest.processor().cr3;
    // One that was not started yet, tables of user space, flags in the lowest bits.
    for cr3 in [&[own][..], &[0, own], &[own | USER_TABLES], &[own | 0x802], &[own | 1 << 63]] {
        assert!(found(cr3).is_ok(), "{cr3:x?}");
    }
    // One that halted in this kernel beside one that is in another.
    for cr3 in [&[][..], &[0], &[own + 0x10_0000], &[u64::MAX], &[own, own + 0x10_0000]] {
        assert!(matches!(found(cr3), Err(IntrospectError::NotRunning)), "{cr3:x?}");
    }
    // Where guests run within the guest, whose registers these are is not known.
    let nests = Processor { may_nest: true, ..guest.processor() };
    for processors in [&[nests][..], &[guest.processor(), nests]] {
        let found = Kernel::find(&guest.memory, processors);
        assert!(matches!(found, Err(IntrospectError::Nested)));
    }
}

#[test]
fn a_kernel_from_before_is_not_taken_for_the_one_that_runs() {
    // What is left of the last start: a note and tables that are consistent.
    let mut guest = Guest::new(VERSIONS[2], false, 0x1000_0000);
    let kernel = found(&guest).expect("a kernel");
    let own = guest.processor();
    assert!(kernel.check(&guest.memory, &[own]).is_ok());
    // The next start's tables, where nothing of the last one's is mapped.
    let new = Processor { cr3: 200 * MIB, ..own };
    assert!(matches!(kernel.check(&guest.memory, &[new]), Err(IntrospectError::NotRunning)));
    // Its note was written over.
    let text = guest.note().replace("6.1.0", "6.1.1");
    guest.rewrite_note(&text);
    assert!(matches!(kernel.check(&guest.memory, &[own]), Err(IntrospectError::NotRunning)));
}

#[test]
fn the_note_that_holds_is_found_among_others() {
    let mut guest = Guest::new(VERSIONS[4], true, 0x0200_0000);
    let text = guest.note();
    guest.put_note(2 * MIB, &text.replace("swapper_pg_dir)=ffff", "swapper_pg_dir)=0fff"));
    guest.put_note(2 * MIB + 0x2000, "OSRELEASE=4.0\n");
    guest.put_note(250 * MIB, &text.replace("NUMBER(phys_base)=", "NUMBER(phys_base)=-"));
    assert_eq!(found(&guest).expect("the one that holds").at.at, Gpa(3 * MIB));
}

#[test]
fn a_forged_note_is_refused_by_the_value_that_cannot_be() {
    let guest = Guest::new(VERSIONS[2], false, 0);
    let text = guest.note();
    let line = |key: &str| {
        let line = text.lines().find(|line| line.starts_with(key)).expect("a line");
        line.to_owned()
    };
    let forged = [
        ("SIZE(page)", "0"),
        ("SIZE(page)", "31"),
        ("SIZE(page)", "-64"),
        ("SIZE(page)", "4294967360"),
        ("OFFSET(page._mapcount)", "61"),
        ("OFFSET(page.private)", "57"),
        ("OFFSET(page.flags)", "18446744073709551615"),
        ("NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)", "-1"),
        ("NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)", "0"),
        ("NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)", "4294967296"),
        ("NUMBER(PAGE_OFFLINE_MAPCOUNT_VALUE)", "7"),
        ("LENGTH(zone.free_area)", "17"),
        ("SIZE(mem_section)", "0"),
        ("SIZE(mem_section)", "4096"),
        ("OFFSET(mem_section.section_mem_map)", "9"),
        ("NUMBER(SECTION_SIZE_BITS)", "64"),
        ("NUMBER(SECTION_SIZE_BITS)", "-27"),
        ("LENGTH(mem_section)", "99999999999"),
        ("NUMBER(phys_base)", "-9223372036854775808"),
        ("NUMBER(PG_lru)", "64"),
    ];
    for (key, value) in forged {
        let mut guest = guest.clone();
        guest.rewrite_note(&text.replace(&line(key), &format!("{key}={value}")));
        let error = found(&guest).expect_err(key);
        assert!(
            matches!(&error, IntrospectError::Implausible { key: found, .. } if found == key),
            "{key}={value}: {error}"
        );
    }
    for key in ["SYMBOL(swapper_pg_dir)", "SYMBOL(mem_section)", "SIZE(page)", "NUMBER(phys_base)"]
    {
        let mut guest = guest.clone();
        guest.rewrite_note(&text.replace(&line(key), ""));
        let error = found(&guest).expect_err(key);
        assert!(
            matches!(&error, IntrospectError::Missing { key: found } if found == key),
            "{error}"
        );
    }
    let mut none = guest.clone();
    none.rewrite_note("");
    assert!(matches!(found(&none), Err(IntrospectError::NoKernel)));
}
