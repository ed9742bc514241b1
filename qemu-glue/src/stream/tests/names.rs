//! Block names are written where they are needed, and pages of one's own in parts.

use migrate_core::xbzrle;
use proptest::prelude::*;

use super::*;

/// Setup, then these pages in one part.
fn stream_of(pages: &[Owned]) -> Vec<Owned> {
    let part = [
        vec![Owned::Plain(Event::SectionPart(2))],
        pages.to_vec(),
        [Event::EndOfRecords, Event::Footer(2)].map(Owned::Plain).to_vec(),
    ];
    [setup(), part.concat()].concat()
}

/// Whether each page has gone without its name.
fn continued(bytes: &[u8]) -> Vec<(u16, bool)> {
    let mut reader = Reader::new();
    let (mut input, mut found) = (bytes, Vec::new());
    while let Some(event) = reader.next(&mut input).unwrap() {
        if let Event::Page(page) = event {
            found.push((page.block.0, page.continued));
        }
    }
    found
}

#[test]
fn a_name_is_left_out_where_qemu_leaves_it_out() {
    let pages = [zero(0, 0, true), zero(0, 1, true), zero(1, 0, true), zero(1, 1, true)];
    let bytes = written(&stream_of(&pages));
    assert_eq!(continued(&bytes), [(0, false), (0, true), (1, false), (1, true)]);
    // QEMU has a name where it need not at times: it stays.
    let bytes = written(&stream_of(&[zero(0, 0, false), zero(0, 1, false)]));
    assert_eq!(continued(&bytes), [(0, false), (0, false)]);
}

#[test]
fn a_name_is_still_known_in_the_next_part() {
    let mut events = stream_of(&[zero(1, 0, false)]);
    events.extend(stream_of(&[zero(1, 1, true)]).split_off(setup().len()));
    let bytes = written(&events);
    assert_eq!(continued(&bytes), [(1, false), (1, true)]);
}

proptest! {
    /// Whatever is left out, put in between or replaced: every page arrives in its own block.
    #[test]
    fn names_are_put_right(
        pages in prop::collection::vec((0u16..3, 0u64..4, any::<bool>()), 0..40),
        changes in prop::collection::vec(0u8..5, 40),
    ) {
        let blocks = list(vec![block("a", 4), block("b", 4), block("c", 4)]);
        let (mut source, mut stream) = (Writer::resumed(Arc::clone(&blocks)), Vec::new());
        let mut put = |event: &Owned| event.with(|event| source.write(event, &mut stream).unwrap());
        put(&Owned::Plain(Event::SectionPart(2)));
        for (block, page, continued) in &pages {
            put(&zero(*block, *page, *continued));
        }

        let mut reader = Reader::resumed(2, Arc::clone(&blocks));
        let (mut writer, mut out) = (Writer::resumed(Arc::clone(&blocks)), Vec::new());
        let mut wanted = Vec::new();
        let (mut input, mut changes) = (&stream[..], changes.iter());
        while let Some(event) = reader.next(&mut input).unwrap() {
            let Event::Page(page) = event else {
                writer.write(&event, &mut out).unwrap();
                continue;
            };
            let other = PageRecord { block: BlockIndex((page.block.0 + 1) % 3), ..page };
            let pages = match changes.next() {
                Some(1) => vec![],
                Some(2) => vec![other],
                Some(3) => vec![other, page],
                Some(4) => vec![page, PageRecord { continued: true, ..page }],
                _ => vec![page],
            };
            for page in pages {
                wanted.push((page.block, page.offset_bytes));
                writer.write(&Event::Page(page), &mut out).unwrap();
            }
        }
        let mut reader = Reader::resumed(2, blocks);
        let (mut input, mut found) = (&out[..], Vec::new());
        while let Some(event) = reader.next(&mut input).unwrap() {
            if let Event::Page(page) = event {
                found.push((page.block, page.offset_bytes));
            }
        }
        prop_assert_eq!(found, wanted);
    }
}

#[test]
fn parts_are_limited_in_size() {
    let blocks = list(vec![block("pc.ram", 4096)]);
    let (mut writer, mut out) = (Writer::resumed(Arc::clone(&blocks)), Vec::new());
    let mut parts = RamParts::new(2);
    let whole = page_of(7, &[]);
    for number in 0..1000 {
        let content = PageContent::Whole(&whole);
        let (block, offset_bytes) = (BlockIndex(0), number * 4096);
        let page = PageRecord { block, offset_bytes, continued: true, content };
        parts.page(&mut writer, &page, &mut out).unwrap();
    }
    parts.close(&mut writer, &mut out).unwrap();
    // Something else may come between.
    writer.write(&Event::Command(Command::Ping(3)), &mut out).unwrap();
    parts.end(&mut writer, &mut out).unwrap();
    writer.write(&Event::EndOfState, &mut out).unwrap();

    let mut reader = Reader::resumed(2, blocks);
    let (mut input, mut in_part, mut sizes) = (&out[..], 0, Vec::new());
    while let Some(event) = reader.next(&mut input).unwrap() {
        match event {
            Event::SectionPart(2) | Event::SectionEnd(2) => in_part = 0,
            Event::Page(_) => in_part += 1,
            Event::Footer(2) => sizes.push(in_part),
            _ => {}
        }
    }
    // The first page has a name: so many are the first that make a MiB.
    assert_eq!(sizes, [256, 256, 256, 232, 0]);
    assert_eq!(reader.end_sign(), EndSign::Certain);
}

#[test]
fn a_part_of_no_length_has_one_page() {
    let (mut writer, mut out) = (Writer::resumed(list(vec![block("a", 2)])), Vec::new());
    let mut parts = RamParts::with_limit(2, 0);
    for page in [zero(0, 0, true), zero(0, 1, true)] {
        page.with(|event| {
            let Event::Page(page) = event else { panic!() };
            parts.page(&mut writer, page, &mut out).unwrap();
        });
    }
    let footers = out.windows(5).filter(|bytes| *bytes == b"\x7e\0\0\0\x02").count();
    assert_eq!(footers, 1, "the second part is still open");
}

#[test]
fn an_update_is_what_qemu_would_send() {
    let old = page_of(3, b"before");
    let mut room = [0; 4096];
    assert_eq!(PageRecord::update(BlockIndex(0), 0, &old, &old, &mut room), None);
    let new = page_of(3, b"beFore");
    let record = PageRecord::update(BlockIndex(0), 0, &old, &new, &mut room).unwrap();
    let PageContent::Xbzrle(delta) = record.content else { panic!("{record:?}") };
    let mut page = old;
    xbzrle::decode(delta, &mut page).unwrap();
    assert_eq!(page, new);
    let record = PageRecord::update(BlockIndex(0), 0, &old, &[0; 4096], &mut room).unwrap();
    assert_eq!(record.content, PageContent::Zero { fill: 0 });
    // Every other byte: no delta is shorter.
    let mut new = old;
    new.iter_mut().step_by(2).for_each(|byte| *byte ^= 1);
    let record = PageRecord::update(BlockIndex(0), 0, &old, &new, &mut room).unwrap();
    assert_eq!(record.content, PageContent::Whole(&new));
}
