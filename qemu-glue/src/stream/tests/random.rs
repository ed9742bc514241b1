//! Random streams come back as they were, in whatever pieces; damaged ones do no harm.

use proptest::prelude::*;

use super::*;

fn name() -> impl Strategy<Value = String> {
    "[a-z/@.0-9:]{1,20}"
}

/// Page sizes go with post-copy, addresses with shared RAM left out, never both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Advised,
    Shared,
}

fn blocks(kind: Kind) -> impl Strategy<Value = Arc<BlockList>> {
    let lengths = prop::collection::hash_map(name(), (1u64..40, any::<u64>(), 13u32..31), 1..6);
    lengths.prop_map(move |blocks| {
        let blocks = blocks.into_iter().map(|(name, (pages, address, bits))| RamBlock {
            name,
            length_bytes: pages * 4096,
            page_bytes: (kind == Kind::Advised && address % 3 == 0).then_some(1 << bits),
            address: (kind == Kind::Shared).then_some(address),
        });
        list(blocks.collect())
    })
}

fn content() -> impl Strategy<Value = Content> {
    prop_oneof![
        3 => any::<u8>().prop_map(Content::Zero),
        2 => (any::<u8>(), prop::collection::vec(any::<u8>(), 0..20)).prop_map(|(fill, start)| {
            // As it is told apart when it comes back.
            let end = start.iter().rposition(|byte| *byte != fill).map_or(0, |end| end + 1);
            Content::Whole(fill, start[..end].to_vec())
        }),
        2 => prop::collection::vec(any::<u8>(), 0..60).prop_map(Content::Delta),
    ]
}

fn command() -> impl Strategy<Value = Owned> {
    let range =
        (any::<u64>(), any::<u64>()).prop_map(|(start, length)| DiscardRange::new(start, length));
    let plain = prop_oneof![
        Just(Command::OpenReturnPath),
        any::<u32>().prop_map(Command::Ping),
        Just(Command::PostcopyAdvise(None)),
        Just(Command::PostcopyListen),
        Just(Command::PostcopyRun),
        Just(Command::EnableColo),
        Just(Command::PostcopyResume),
        Just(Command::SwitchoverStart),
    ];
    prop_oneof![
        4 => plain.prop_map(|command| Owned::Plain(Event::Command(command))),
        1 => (name(), prop::collection::vec(range, 1..14)).prop_map(|(block, ranges)| Owned::Discard(block, ranges)),
        1 => name().prop_map(Owned::RecvBitmap),
    ]
}

/// A page by numbers that are made to fit the blocks, which block it follows included.
type Draft = (u16, u64, bool, Content);

#[derive(Debug, Clone)]
enum Step {
    Part(Vec<Draft>),
    Flush,
    Command(Owned),
    Package(Vec<u8>),
    Early(u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    let draft = (any::<u16>(), any::<u64>(), any::<bool>(), content());
    prop_oneof![
        4 => prop::collection::vec(draft, 0..12).prop_map(Step::Part),
        1 => Just(Step::Flush),
        2 => command().prop_map(Step::Command),
        1 => prop::collection::vec(any::<u8>(), 0..50).prop_map(Step::Package),
        1 => (0u64..300, 1u64..4).prop_map(|(mib, block)| Step::Early(mib << 20, block << 20)),
    ]
}

/// Events of a whole stream.
fn stream() -> impl Strategy<Value = Vec<Owned>> {
    let kind = prop_oneof![Just(Kind::Plain), Just(Kind::Advised), Just(Kind::Shared)];
    let parts = kind.prop_flat_map(|kind| {
        let state = prop::collection::vec(prop_oneof![0u8..9, any::<u8>()], 0..80);
        let description = prop::option::of("[{]( |[a-z:\"]){0,30}[}]");
        (Just(kind), blocks(kind), prop::collection::vec(step(), 0..12), state, description)
    });
    parts.prop_map(|(kind, blocks, steps, state, description)| {
        let capabilities: &[&str] = if kind == Kind::Shared { &["x-ignore-shared"] } else { &[] };
        let mut events = vec![Owned::Plain(Event::Header(configuration(capabilities)))];
        if kind == Kind::Advised {
            let advise = Advise { ram_page_sizes: 0x20_1000, target_page_bytes: 4096 };
            events.push(Owned::Plain(Event::Command(Command::PostcopyAdvise(Some(advise)))));
        }
        events.push(Owned::Start(7, RAM_ID.to_owned(), 0, RAM_VERSION));
        events.push(Owned::Plain(Event::RamBlocks(Arc::clone(&blocks))));
        events.extend([Event::EndOfRecords, Event::Footer(7)].map(Owned::Plain));
        let mut current = None;
        for step in steps {
            push(step, &blocks, &mut current, &mut events);
        }
        events.extend(
            [Event::SectionEnd(7), Event::EndOfRecords, Event::Footer(7)].map(Owned::Plain),
        );
        events.push(Owned::DeviceState(device(&state)));
        events.push(Owned::Plain(Event::EndOfState));
        events.extend(description.map(|text| Owned::Description(text.into_bytes())));
        events
    })
}

fn push(step: Step, blocks: &BlockList, current: &mut Option<u16>, events: &mut Vec<Owned>) {
    match step {
        Step::Part(drafts) => {
            events.push(Owned::Plain(Event::SectionPart(7)));
            for (block, page, continued, content) in drafts {
                let block = block % blocks.blocks().len() as u16;
                let offset =
                    page % (blocks.blocks()[usize::from(block)].length_bytes / 4096) * 4096;
                let continued = continued && *current == Some(block);
                *current = Some(block);
                events.push(Owned::Page(BlockIndex(block), offset, continued, content));
            }
            events.extend([Event::EndOfRecords, Event::Footer(7)].map(Owned::Plain));
        }
        Step::Flush => events.extend(
            [Event::SectionPart(7), Event::MultifdFlush, Event::EndOfRecords, Event::Footer(7)]
                .map(Owned::Plain),
        ),
        Step::Command(command) => events.push(command),
        Step::Package(bytes) => {
            let size_bytes = bytes.len() as u32;
            events.push(Owned::Plain(Event::Command(Command::Packaged { size_bytes })));
            if size_bytes > 0 {
                events.push(Owned::Bytes(bytes));
            }
        }
        Step::Early(region_bytes, block_bytes) => {
            events.push(Owned::Full(3, "v0/virtio-mem-device-early".to_owned(), 0, 1));
            let mut bytes = [1 << 32, region_bytes, block_bytes].map(u64::to_be_bytes).concat();
            bytes.extend([0; 12]);
            bytes.extend(vec![0xff; (region_bytes / block_bytes).div_ceil(64) as usize * 8]);
            events.push(Owned::Bytes(bytes));
            events.push(Owned::Plain(Event::Footer(3)));
        }
    }
}

/// Cuts bytes at the places told.
fn cut<'a>(bytes: &'a [u8], places: &[prop::sample::Index]) -> Vec<&'a [u8]> {
    let mut places: Vec<_> = places.iter().map(|place| place.index(bytes.len() + 1)).collect();
    places.sort_unstable();
    places.push(bytes.len());
    let mut from = 0;
    places.iter().map(|to| &bytes[std::mem::replace(&mut from, *to)..*to]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn what_is_written_is_read(
        events in stream(),
        places in prop::collection::vec(any::<prop::sample::Index>(), 0..30),
    ) {
        let bytes = written(&events);
        prop_assert_eq!(&read(&bytes).unwrap(), &events);
        let pieces = cut(&bytes, &places);
        prop_assert_eq!(&read_with(&mut Reader::new(), pieces).unwrap(), &events);
        prop_assert_eq!(&read_with(&mut Reader::new(), bytes.chunks(1)).unwrap(), &events);
        // Fuzzing makes the same demands, and more.
        prop_assert!(crate::fuzz::stream(&bytes));
    }

    #[test]
    fn a_stream_cut_short_needs_more(events in stream(), place in any::<prop::sample::Index>()) {
        let bytes = written(&events);
        let mut input = &bytes[..place.index(bytes.len())];
        let mut reader = Reader::new();
        while reader.next(&mut input).unwrap().is_some() {}
        prop_assert_ne!(reader.end_sign(), EndSign::Described);
        if let Err(error) = reader.finish() {
            prop_assert!(matches!(error.refusal, Refusal::Cut { .. }), "{error:?}");
        }
    }

    #[test]
    fn damage_does_no_harm(
        events in stream(),
        hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        insert in prop::option::of((any::<prop::sample::Index>(), any::<[u8; 3]>())),
    ) {
        let mut bytes = written(&events);
        for (place, value) in hits {
            let at = place.index(bytes.len());
            bytes[at] = value;
        }
        if let Some((place, more)) = insert {
            let at = place.index(bytes.len());
            bytes.splice(at..at, more);
        }
        crate::fuzz::stream(&bytes);
    }
}
