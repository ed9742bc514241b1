//! What is not read is refused by its name, with what to do about it.

use std::error::Error;

use super::*;

/// The beginning of a stream, then these bytes.
fn after_setup(bytes: &[u8]) -> Vec<u8> {
    [&written(&setup())[..], bytes].concat()
}

/// The beginning of a stream, a part of `ram`, then these bytes.
fn in_part(bytes: &[u8]) -> Vec<u8> {
    after_setup(&[b"\x02\0\0\0\x02", bytes].concat())
}

fn start(id: &str) -> Vec<u8> {
    let head = written(&[Owned::Plain(Event::Header(configuration(&[])))]);
    let mut bytes = head;
    bytes.extend(written(&[Owned::Start(9, id.to_owned(), 0, 1)]));
    bytes
}

#[test]
fn sections_in_parts_other_than_ram() {
    for (id, word) in [
        ("dirty-bitmap", "dirty-bitmaps"),
        ("block", "mirror"),
        ("0000:00:04.0/vfio", "VFIO"),
        ("spapr/htab", "x86-64"),
        ("s390-skeys", "x86-64"),
        ("else", "unplug"),
    ] {
        let Refusal::Section { id: found, remedy } = refusal(&start(id)) else { panic!("{id}") };
        assert_eq!(found, id);
        assert!(remedy.contains(word), "{id}: {remedy}");
    }
    let early = written(&[Owned::Full(4, "nvme/early".to_owned(), 0, 1)]);
    assert!(matches!(refusal(&after_setup(&early)), Refusal::Section { .. }));
}

#[test]
fn forms_of_ram() {
    let compressed = 0x1100u64.to_be_bytes();
    let Refusal::RamForm { remedy, .. } = refusal(&in_part(&compressed)) else { panic!() };
    assert!(remedy.contains("compress"));
    let hook = 0x80u64.to_be_bytes();
    let Refusal::RamForm { how, .. } = refusal(&in_part(&hook)) else { panic!() };
    assert!(how.contains("RDMA"));
    for flags in [0x001u64, 0x00a, 0x400, 0x030, 0x220, 0x1010, 0] {
        let refused = refusal(&in_part(&flags.to_be_bytes()));
        assert!(matches!(refused, Refusal::Flags { .. }), "{flags:#x}: {refused:?}");
    }
    let again = 0x1004u64.to_be_bytes();
    assert!(matches!(refusal(&in_part(&again)), Refusal::Blocks { .. }));
}

#[test]
fn capabilities() {
    let head = |names: &[&str]| written(&[Owned::Plain(Event::Header(configuration(names)))]);
    for name in ["mapped-ram", "new-thing"] {
        let bytes = [head(&["x-ignore-shared", name]), vec![8]].concat();
        let Refusal::Capability { name: found, .. } = refusal(&bytes) else { panic!("{name}") };
        assert_eq!(found, name);
    }
    let advise = Advise { ram_page_sizes: 4096, target_page_bytes: 4096 };
    let both = [
        Owned::Plain(Event::Header(configuration(&["x-ignore-shared"]))),
        Owned::Plain(Event::Command(Command::PostcopyAdvise(Some(advise)))),
    ];
    assert!(matches!(refusal(&written(&both)), Refusal::Capability { .. }));
    let mut other_pages = configuration(&[]);
    other_pages.subsections.push(Subsection::TargetPageBits(14));
    let bytes = [written(&[Owned::Plain(Event::Header(other_pages))]), vec![8]].concat();
    assert_eq!(refusal(&bytes), Refusal::PageBits { bits: 14 });
}

#[test]
fn pages_that_cannot_be() {
    let page = |word: u64, rest: &[u8]| in_part(&[&word.to_be_bytes()[..], rest].concat());
    assert_eq!(refusal(&page(0x22, b"\0")), Refusal::NothingToContinue);
    let unknown = Refusal::UnknownBlock { name: "vga".to_owned() };
    assert_eq!(refusal(&page(0x02, b"\x03vga\0")), unknown);
    let outside = Refusal::OutOfBlock { block: "pc.bios".to_owned(), offset_bytes: 0x2000 };
    assert_eq!(refusal(&page(0x2002, b"\x07pc.bios\0")), outside);
    assert!(matches!(refusal(&page(0x02, b"\0")), Refusal::Name { .. }));
    assert!(matches!(refusal(&page(0x02, b"\x02\xff\xff")), Refusal::Name { .. }));
    let delta = |rest: &[u8]| refusal(&page(0x40, &[b"\x07pc.bios", rest].concat()));
    assert_eq!(delta(b"\x02\0\x01"), Refusal::Delta { what: "its encoding" });
    assert_eq!(delta(b"\x01\x10\x01"), Refusal::Delta { what: "its length" });
}

#[test]
fn lists_of_blocks() {
    let begin = written(&[
        Owned::Plain(Event::Header(configuration(&[]))),
        Owned::Start(2, RAM_ID.to_owned(), 0, RAM_VERSION),
    ]);
    let refused = |words: &[&[u8]]| refusal(&[&begin[..], &words.concat()].concat());
    let total = |bytes: u64| (bytes | 4).to_be_bytes();
    let a_page = 4096u64.to_be_bytes();
    let faults = [
        refused(&[&0x10u64.to_be_bytes()]),
        refused(&[&total(u64::MAX << 12)]),
        refused(&[&total(4096), b"\x01a", &8192u64.to_be_bytes()]),
        refused(&[&total(4096), b"\x01a", &100u64.to_be_bytes()]),
        refused(&[&total(4096), b"\x01a", &0u64.to_be_bytes()]),
        refused(&[&total(8192), b"\x01a", &a_page, b"\x01a", &a_page]),
    ];
    for fault in faults {
        assert!(matches!(fault, Refusal::Blocks { .. }), "{fault:?}");
    }
    assert!(matches!(refused(&[&total(4096), b"\0", &a_page]), Refusal::Name { .. }));
    let many: Vec<_> = (0..513).map(|number| block(&number.to_string(), 1)).collect();
    assert!(BlockList::new(many[..512].to_vec()).is_ok());
    assert!(matches!(BlockList::new(many), Err(Refusal::Blocks { .. })));
    let odd = RamBlock { page_bytes: Some(12288), ..block("a", 1) };
    assert!(matches!(BlockList::new(vec![odd]), Err(Refusal::Blocks { .. })));
}

#[test]
fn commands() {
    assert_eq!(refusal(&after_setup(b"\x08\0\x0c\0\0")), Refusal::UnknownCommand { number: 12 });
    assert_eq!(refusal(&after_setup(b"\x08\0\0\0\0")), Refusal::UnknownCommand { number: 0 });
    for damaged in [
        &b"\x08\0\x02\0\x05"[..],
        b"\x08\0\x03\0\x08\0\0\0\0\0\0\x10\0",
        b"\x08\0\x06\0\x04\x01\x01a\0",
        b"\x08\0\x06\0\x04\0\x01a\0",
        b"\x08\0\x06\0\x04\0\x01a\x01",
        b"\x08\0\x06\0\x06\0\x01a\0\0\0",
        b"\x08\0\x0a\0\x03\x01ab",
        b"\x08\0\x0a\0\x01\0",
    ] {
        let refused = refusal(&after_setup(damaged));
        assert!(matches!(refused, Refusal::Command { .. }), "{damaged:?}: {refused:?}");
    }
}

#[test]
fn elements_out_of_order() {
    let ended = [setup(), end_of_ram().to_vec()].concat();
    let ended = written(&ended);
    let after_end = |bytes: &[u8]| refusal(&[&ended[..], bytes].concat());
    let element = |refused| matches!(refused, Refusal::Element { .. });
    assert!(element(refusal(&after_setup(b"\0"))), "the end before RAM's end");
    assert!(element(refusal(&after_setup(b"\x06"))));
    assert!(element(refusal(&after_setup(b"\x55"))));
    assert!(element(after_end(b"\x02\0\0\0\x02")), "a part after the last one");
    assert!(element(refusal(&in_part(b"\0\0\0\0\0\0\0\x10\x02"))), "no footer");
    let again = written(&[Owned::Start(2, RAM_ID.to_owned(), 0, RAM_VERSION)]);
    assert!(element(refusal(&after_setup(&again))));
    let old = written(&[Owned::Start(2, RAM_ID.to_owned(), 0, 3)]);
    assert!(matches!(refusal(&after_setup(&old)), Refusal::Version { found: 3, .. }));
    let number = Refusal::SectionNumber { found: 3, known: 2 };
    assert_eq!(refusal(&after_setup(b"\x02\0\0\0\x03")), number);
    assert_eq!(refusal(&in_part(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x03")), number);
    assert_eq!(after_end(b"\0\x01"), Refusal::AfterEnd);
    assert_eq!(after_end(b"\0\x06\0\0\0\x02{}\x01"), Refusal::AfterEnd);
    let long = Refusal::TooLong { what: "The description", found: 1 << 25, max: 1 << 24 };
    assert_eq!(after_end(b"\0\x06\x02\0\0\0"), long);
}

#[test]
fn a_package_has_no_ram() {
    let refused = |bytes: &[u8]| {
        let mut reader = Reader::package(bytes.len() as u32);
        read_with(&mut reader, [bytes]).unwrap_err().refusal
    };
    let start = written(&[Owned::Start(2, RAM_ID.to_owned(), 0, RAM_VERSION)]);
    assert!(matches!(refused(&start), Refusal::Element { .. }));
    assert!(matches!(refused(b"\x02\0\0\0\x02"), Refusal::Element { .. }));
    assert!(matches!(refused(b"\0"), Refusal::Element { .. }));
    assert!(matches!(refused(b"\x08\0\x07\0\x04\0\0\0\x01a"), Refusal::Command { .. }));
}

#[test]
fn a_refusal_is_final_and_tells_where() {
    let bytes = after_setup(b"\x55more");
    let mut reader = Reader::new();
    let error = read_with(&mut reader, [&bytes[..]]).unwrap_err();
    assert_eq!(error.at_byte as usize, bytes.len() - 5);
    assert!(error.source().unwrap().to_string().contains("0x55"));
    let again = reader.next(&mut &b"\x08\0\x01\0\0"[..]).unwrap_err();
    assert_eq!((again.refusal, again.at_byte), (Refusal::Stopped, error.at_byte));
    assert_eq!(reader.finish().unwrap_err().refusal, Refusal::Stopped);
}

#[test]
fn what_cannot_be_written() {
    let (mut writer, mut out) = (Writer::new(), b"before".to_vec());
    let mut refused = |event: &Owned| {
        let error = event.with(|event| writer.write(event, &mut out)).unwrap_err();
        assert_eq!(out, b"before", "nothing was added");
        error
    };
    assert!(matches!(refused(&zero(0, 0, true)), WriteError::UnknownBlock { known: 0, .. }));
    let long = "x".repeat(256);
    assert!(matches!(refused(&Owned::RecvBitmap(long.clone())), WriteError::TooLong { .. }));
    let ranges = vec![DiscardRange::new(0, 4096); DISCARD_RANGES_MAX + 1];
    assert!(matches!(refused(&Owned::Discard("a".into(), ranges)), WriteError::TooLong { .. }));
    assert!(matches!(refused(&Owned::Discard("a".into(), vec![])), WriteError::Empty { .. }));
    let machine = Configuration { machine: long.clone() + "x", subsections: vec![] };
    assert!(matches!(refused(&Owned::Plain(Event::Header(machine))), WriteError::TooLong { .. }));
    let most = Owned::Discard("x".repeat(255), vec![DiscardRange::new(0, 1); DISCARD_RANGES_MAX]);
    assert!(written(std::slice::from_ref(&most)).len() <= 5 + usize::from(u16::MAX));

    let mut writer = Writer::resumed(list(vec![block("a", 1)]));
    let mut out = Vec::new();
    let mut page = |event: &Owned| event.with(|event| writer.write(event, &mut out));
    assert!(matches!(page(&zero(0, 1, true)), Err(WriteError::OutOfBlock { .. })));
    assert!(matches!(page(&zero(1, 0, true)), Err(WriteError::UnknownBlock { known: 1, .. })));
    let delta = Owned::Page(BlockIndex(0), 0, true, Content::Delta(vec![0; 4097]));
    assert!(matches!(page(&delta), Err(WriteError::TooLong { .. })));
    page(&zero(0, 0, true)).unwrap();
}
