//! The page channel's frames: golden bytes, round trips, limits, and damage.

use std::fs;

use bytes::{Bytes, BytesMut};
use migrate_core::layout::PAGE_BYTES;
use migrate_core::store::StoreStat;
use migrate_core::store::names::{LIST_ENTRIES_MAX, VERSION_MAX};
use proptest::prelude::*;
use transport::pages::wire::{
    BODY_BYTES_MAX, DROP_EXTENTS_MAX, EXTENT_BYTES, HEADER_BYTES, KINDS, PIECE_PAGES_MAX,
    REQUEST_PAGES_MAX, VERSION_BYTES, decode_answer, decode_request, encode_answer, encode_request,
};
use transport::pages::{Extent, NewStore, ServerStat, StoreError, StoreId, StoreSecret};
use transport::{PageAnswer, PageRequest, WireError, fuzz};

use crate::wire::{check_golden, folder};

fn contents(pages: u64) -> Bytes {
    (0..pages as usize * PAGE_BYTES).map(|at| (at / 16) as u8).collect::<Vec<_>>().into()
}

fn new_store() -> NewStore {
    NewStore {
        store: StoreId(*b"0123456789abcdef"),
        secret: StoreSecret::new(*b"secretsecretsecretsecretsecret!!"),
        vm: "web-1".into(),
        pages: 1 << 20,
        reserve_pages: 300_000,
        hosts: vec!["host-b".into(), "host-c".into()],
    }
}

/// One of every request, in the order of their kinds.
fn requests() -> Vec<PageRequest> {
    let NewStore { store, secret, .. } = new_store();
    let extents = vec![Extent::new(64, 2), Extent::new((1 << 34) - 1, 1)];
    vec![
        PageRequest::Create(new_store()),
        PageRequest::Open { store, secret },
        PageRequest::Keep,
        PageRequest::Grant { host: "host-d".into() },
        PageRequest::Revoke { host: "host-b".into() },
        PageRequest::Put {
            extents: extents.clone(),
            contents: contents(3),
            version: 7,
            packed: false,
        },
        PageRequest::Get { extents: extents.clone(), take: true, packed: true },
        PageRequest::Drop { extents: [extents, vec![Extent::new(0, u32::MAX)]].concat() },
        PageRequest::Stat,
        PageRequest::Delete,
        PageRequest::List { from_page: (1 << 34) - 1 },
        PageRequest::Reserve { pages: 1 << 34 },
    ]
}

/// One of every answer, in the order of their kinds, and an error of every kind.
fn answers() -> Vec<PageAnswer> {
    let extents = vec![Extent::new(9, 1), Extent::new(7, 1)];
    let store =
        StoreStat { stored_pages: 5, stored_bytes: 6000, reserve_pages: 300_000, kept: true };
    let stat = ServerStat { capacity_bytes: 8 << 30, reserved_bytes: 1 << 30, store: Some(store) };
    let mut all = vec![
        PageAnswer::Done { tag: 1 },
        PageAnswer::Pages { tag: 2, extents, contents: contents(2), packed: false, last: true },
        PageAnswer::Stat { tag: 3, stat },
    ];
    let errors = [
        StoreError::Unknown,
        StoreError::Exists,
        StoreError::Full { free_bytes: 4096, wanted_bytes: 8192 },
        StoreError::Reserved { reserve_pages: 10, wanted_pages: 11 },
        StoreError::NotStored { page: 12 },
        StoreError::OutOfRange { page: 13, pages: 12 },
        StoreError::NotOpen,
        StoreError::OpenAlready,
        StoreError::Field { field: "pages".into(), value: 0, rule: "1 to 2^34".into() },
        StoreError::TooManyStores { max: 1024 },
        StoreError::TooManyHosts { max: 16 },
        StoreError::Itself,
        StoreError::Busy { max: 1024 },
        StoreError::NotTaken,
        StoreError::NoMemory,
        StoreError::Damaged { page: 14 },
        StoreError::HostFull { free_bytes: 4096, wanted_bytes: 8192 },
        StoreError::HostStores { max: 256 },
        StoreError::HostBusy { max: 256 },
    ];
    all.extend((4..).zip(errors).map(|(tag, error)| PageAnswer::Failed { tag, error }));
    let entries = vec![
        (Extent::new(0, 3), 9),
        (Extent::new(3, u32::MAX), VERSION_MAX),
        (Extent::new((1 << 34) - 2, 1), 1),
    ];
    let next_page = Some((1 << 34) - 1);
    all.push(PageAnswer::Listed { tag: 30, entries, next_page });
    all.push(PageAnswer::Listed { tag: 31, entries: vec![], next_page: None });
    all
}

fn request_bytes(request: &PageRequest, tag: u32) -> Vec<u8> {
    encode_request(request, tag).unwrap().concat()
}

fn answer_bytes(answer: &PageAnswer) -> Vec<u8> {
    encode_answer(answer).unwrap().concat()
}

/// Decodes one request that must be complete.
fn request_of(bytes: &[u8]) -> Result<(u32, PageRequest), WireError> {
    Ok(decode_request(&mut BytesMut::from(bytes))?.expect("the frame is complete"))
}

fn answer_of(bytes: &[u8]) -> Result<PageAnswer, WireError> {
    Ok(decode_answer(&mut BytesMut::from(bytes))?.expect("the frame is complete"))
}

#[test]
fn golden_page_frames_do_not_change() {
    let corpus = folder("fuzz/corpus/page_frame");
    let (requests, answers) = (requests(), answers());
    let numbers: Vec<u8> = requests.iter().map(|request| request_bytes(request, 1)[4]).collect();
    let mut others: Vec<u8> = answers.iter().map(|answer| answer_bytes(answer)[4]).collect();
    others.dedup();
    let numbers: Vec<u8> = numbers.into_iter().chain(others).collect();
    assert_eq!(numbers, KINDS.map(|(_, number)| number), "there is a sample of every kind");
    let mut all = Vec::new();
    for ((tag, request), (name, _)) in (1..).zip(&requests).zip(KINDS) {
        let frame = request_bytes(request, tag);
        let name = name.to_lowercase();
        check_golden(&folder("tests/golden").join(format!("pages-v1-{name}.bin")), &frame);
        check_golden(&corpus.join(format!("good-{name}")), &frame);
        assert_eq!(request_of(&frame).unwrap(), (tag, request.clone()));
        all.extend(frame);
    }
    check_golden(&corpus.join("good-requests"), &all);
    assert_eq!(fuzz::page_frame(&all) as usize, requests.len());
    let all = answers.iter().flat_map(answer_bytes).collect::<Vec<_>>();
    for answer in &answers {
        assert_eq!(answer_of(&answer_bytes(answer)).unwrap(), *answer);
    }
    check_golden(&folder("tests/golden").join("pages-v1-answers.bin"), &all);
    check_golden(&corpus.join("good-answers"), &all);
    assert_eq!(fuzz::page_frame(&all) as usize, answers.len());
}

/// Other versions of the library pack otherwise, but what was packed once can be unpacked for ever.
#[test]
fn packed_pages_unpack() {
    let extents = vec![Extent::new(3, 2)];
    let put = PageRequest::Put {
        extents: extents.clone(),
        contents: contents(2),
        version: 1,
        packed: true,
    };
    let path = folder("fuzz/corpus/page_frame").join("good-packed");
    if std::env::var_os("GODWIT_WRITE_GOLDEN").is_some() {
        fs::write(&path, request_bytes(&put, 1)).unwrap();
    }
    let frame = fs::read(path).unwrap();
    assert!(frame.len() < PAGE_BYTES, "{}", frame.len());
    assert_eq!(request_of(&frame).unwrap(), (1, put));
    // What does not become shorter travels as it is.
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    let contents: Bytes = (0..PAGE_BYTES).map(|_| next()).collect::<Vec<_>>().into();
    let put = |packed| {
        let extents = vec![Extent::new(3, 1)];
        PageRequest::Put { extents, contents: contents.clone(), version: 1, packed }
    };
    let frame = request_bytes(&put(true), 1);
    assert_eq!(frame.len(), HEADER_BYTES + EXTENT_BYTES + PAGE_BYTES);
    assert_eq!(request_of(&frame).unwrap().1, put(false));
}

#[test]
fn one_more_than_allowed_is_refused_by_both_ends() {
    let refused = |request: PageRequest| {
        let error = encode_request(&request, 1).unwrap_err();
        let is_rule = matches!(error, WireError::Field { .. } | WireError::TooLong { .. });
        assert!(is_rule, "{request:?}: {error}");
    };
    let get = |extents| PageRequest::Get { extents, take: false, packed: false };
    let put = |extents, contents| PageRequest::Put {
        extents,
        contents,
        version: VERSION_MAX,
        packed: false,
    };
    let most = REQUEST_PAGES_MAX as u32;
    encode_request(&get(vec![Extent::new(0, most)]), 1).unwrap();
    encode_request(&get(vec![Extent::new(0, 1); most as usize]), 1).unwrap();
    encode_request(&put(vec![Extent::new(0, most)], contents(most.into())), 1).unwrap();
    let drop = vec![Extent::new(0, 1 << 31); DROP_EXTENTS_MAX];
    encode_request(&PageRequest::Drop { extents: drop.clone() }, 1).unwrap();
    refused(get(vec![Extent::new(0, most + 1)]));
    refused(get(vec![Extent::new(0, 1); most as usize + 1]));
    refused(get(vec![]));
    refused(get(vec![Extent::new(0, 0)]));
    refused(get(vec![Extent::new(1 << 34, 1)]));
    refused(get(vec![Extent::new(u64::MAX, 1)]));
    refused(put(vec![Extent::new(0, most + 1)], contents(u64::from(most) + 1)));
    refused(put(vec![Extent::new(0, 2)], contents(1)));
    refused(put(vec![Extent::new(0, 1)], Bytes::new()));
    refused(PageRequest::Drop { extents: [drop, vec![Extent::new(0, 1)]].concat() });
    refused(PageRequest::Drop { extents: vec![] });
    for version in [0, VERSION_MAX + 1, u64::MAX] {
        let (extents, contents) = (vec![Extent::new(0, 1)], contents(1));
        refused(PageRequest::Put { extents, contents, version, packed: false });
    }
    for from_page in [1 << 34, u64::MAX] {
        refused(PageRequest::List { from_page });
    }
    for pages in [0, (1 << 34) + 1, u64::MAX] {
        refused(PageRequest::Reserve { pages });
    }
    refused(PageRequest::Grant { host: "x".repeat(BODY_BYTES_MAX) });
    refused(PageRequest::Create(NewStore { vm: "x".repeat(BODY_BYTES_MAX), ..new_store() }));

    let pages = |count: u64| PageAnswer::Pages {
        tag: 1,
        extents: vec![Extent::new(0, count as u32)],
        contents: contents(count),
        packed: false,
        last: false,
    };
    encode_answer(&pages(PIECE_PAGES_MAX)).unwrap();
    assert!(encode_answer(&pages(PIECE_PAGES_MAX + 1)).is_err());
    let unclean = ["a\nb".into(), "x".repeat(200)];
    for rule in unclean {
        let error = StoreError::Field { field: "f".into(), value: 1, rule };
        assert!(encode_answer(&PageAnswer::Failed { tag: 1, error }).is_err());
    }
}

/// A header that lies is refused by itself, before anything that it announces has come.
#[test]
fn headers_are_refused_alone() {
    let good = request_bytes(&requests()[5], 1);
    let changed = |at: usize, bytes: &[u8]| {
        let mut header = good[..HEADER_BYTES].to_vec();
        header[at..at + bytes.len()].copy_from_slice(bytes);
        decode_request(&mut BytesMut::from(&header[..]))
    };
    assert_eq!(changed(8, &[1]).unwrap(), None, "more is to come");
    for (at, bytes) in [
        (0, &b"GDWC"[..]),
        (4, &[0]),
        (4, &[13]),
        (5, &[2]),
        (5, &[0x80]),
        (6, &[1]),
        (12, &[0, 0, 0, 0]),
        (12, &[1, 1, 0, 0]),
        (12, &[255; 4]),
        (16, &[255; 4]),
        (20, &[255; 4]),
        (20, &[0; 4]),
        (24, &[0; 8]),
        (24, &(VERSION_MAX + 1).to_le_bytes()),
    ] {
        assert!(changed(at, bytes).is_err(), "{bytes:?} at {at}");
    }
    // Kinds that carry nothing.
    let mut keep = request_bytes(&PageRequest::Keep, 1);
    keep[16] = 1;
    keep[20] = 1;
    assert!(request_of(&keep).is_err());
    let mut keep = request_bytes(&PageRequest::Keep, 1);
    keep[24] = 1;
    assert!(request_of(&keep).is_err());
    let mut reserve = request_bytes(&PageRequest::Reserve { pages: 1 }, 1);
    reserve[24] = 0;
    assert!(request_of(&reserve).is_err());
    // Neither end takes the other's frames.
    let answer = answer_bytes(&PageAnswer::Done { tag: 1 });
    assert!(request_of(&answer).is_err());
    assert!(answer_of(&request_bytes(&PageRequest::Stat, 1)).is_err());
}

#[test]
fn bodies_and_packed_contents_that_are_damaged_are_refused() {
    let mut grant = request_bytes(&PageRequest::Grant { host: "host-b".into() }, 1);
    grant[HEADER_BYTES] = 200;
    assert!(matches!(request_of(&grant), Err(WireError::Body { .. })));
    grant[HEADER_BYTES] = 3;
    assert!(matches!(request_of(&grant), Err(WireError::Trailing { .. })));
    let extents = vec![Extent::new(0, 1)];
    let put = PageRequest::Put {
        extents,
        contents: vec![7; PAGE_BYTES].into(),
        version: 1,
        packed: true,
    };
    let good = request_bytes(&put, 1);
    let payload = HEADER_BYTES + EXTENT_BYTES;
    for at in payload..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0xf0;
        match request_of(&bad) {
            Err(WireError::Packed { .. }) => {}
            Ok((1, PageRequest::Put { contents, .. })) => assert_eq!(contents.len(), PAGE_BYTES),
            other => panic!("{other:?}"),
        }
    }
    let mut reserved = good;
    reserved[HEADER_BYTES + 12] = 1;
    assert!(request_of(&reserved).is_err());
}

/// Lists that a host could not follow, or could not trust.
#[test]
fn lists_that_break_a_rule_are_refused_by_both_ends() {
    let listed = |entries: &[(u64, u32, u64)], next_page| {
        let entry =
            |(first, pages, version): &(u64, u32, u64)| (Extent::new(*first, *pages), *version);
        PageAnswer::Listed { tag: 1, entries: entries.iter().map(entry).collect(), next_page }
    };
    let most: Vec<_> = (0..LIST_ENTRIES_MAX as u64).map(|page| (page, 1, 1 + page % 2)).collect();
    let longest = listed(&most, Some(LIST_ENTRIES_MAX as u64));
    let frame = answer_bytes(&longest);
    assert_eq!(frame.len(), HEADER_BYTES + LIST_ENTRIES_MAX * (EXTENT_BYTES + VERSION_BYTES));
    assert_eq!(answer_of(&frame).unwrap(), longest);
    let one_more = [&most[..], &[(1 << 20, 1, 1)]].concat();
    for bad in [
        listed(&one_more, None),
        listed(&[(5, 2, 1), (6, 1, 2)], None),
        listed(&[(5, 2, 1), (3, 1, 2)], None),
        listed(&[(5, 0, 1)], None),
        listed(&[(5, 1, 0)], None),
        listed(&[(5, 1, VERSION_MAX + 1)], None),
        listed(&[((1 << 34) - 1, 2, 1)], None),
        listed(&[(5, 2, 1)], Some(6)),
        listed(&[(5, 2, 1)], Some(0)),
        listed(&[(5, 2, 1)], Some(1 << 34)),
        listed(&[], Some(7)),
    ] {
        let error = encode_answer(&bad).unwrap_err();
        assert!(matches!(error, WireError::Field { .. }), "{error}");
    }
    // The same of a peer that does not look: extents, then versions, lie behind the header.
    let good = answer_bytes(&listed(&[(5, 2, 1), (7, 1, 2)], Some(9)));
    let versions = HEADER_BYTES + 2 * EXTENT_BYTES;
    for (at, byte) in [
        (HEADER_BYTES, 6),
        (HEADER_BYTES + 8, 0),
        (HEADER_BYTES + EXTENT_BYTES, 4),
        (versions, 0),
        (versions + 7, 0x80),
        (24, 7),
        (29, 1),
        (16, 8),
        (20, 8),
        (20, 24),
    ] {
        let mut bad = good.clone();
        bad[at] = byte;
        assert!(answer_of(&bad).is_err(), "{byte} at {at}");
    }
    assert!(answer_of(&good).is_ok());
}

fn any_request() -> impl Strategy<Value = PageRequest> {
    let extent = (0u64..1 << 20, 1u32..5).prop_map(|(first, pages)| Extent::new(first, pages));
    let extents = prop::collection::vec(extent, 1..12);
    prop_oneof![
        (extents.clone(), any::<bool>(), any::<u8>(), 1..=VERSION_MAX).prop_map(
            |(extents, packed, fill, version)| {
                let bytes = Extent::count(&extents) as usize * PAGE_BYTES;
                PageRequest::Put { extents, contents: vec![fill; bytes].into(), version, packed }
            }
        ),
        (extents.clone(), any::<bool>(), any::<bool>())
            .prop_map(|(extents, take, packed)| PageRequest::Get { extents, take, packed }),
        extents.prop_map(|extents| PageRequest::Drop { extents }),
        (0u64..1 << 34).prop_map(|from_page| PageRequest::List { from_page }),
        (1..=1u64 << 34).prop_map(|pages| PageRequest::Reserve { pages }),
        ".{0,40}".prop_map(|host| PageRequest::Grant { host }),
        prop::sample::select(requests()),
    ]
}

proptest! {
    /// However the bytes are cut apart on the way.
    #[test]
    fn requests_are_received_as_they_were_sent(
        requests in prop::collection::vec(any_request(), 1..5), step in 1usize..5000,
    ) {
        let all: Vec<u8> = (1..).zip(&requests).flat_map(|(tag, r)| request_bytes(r, tag)).collect();
        let (mut received, mut got) = (BytesMut::new(), vec![]);
        for piece in all.chunks(step) {
            received.extend_from_slice(piece);
            while let Some(request) = decode_request(&mut received).unwrap() {
                got.push(request);
            }
        }
        prop_assert!(received.is_empty());
        prop_assert_eq!(got, (1..).zip(requests).collect::<Vec<_>>());
    }

    #[test]
    fn damaged_frames_never_panic_nor_pass_a_rule_by(
        request in any_request(), answer in prop::sample::select(answers()),
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..4),
    ) {
        for mut damaged in [request_bytes(&request, 1), answer_bytes(&answer)] {
            for (at, bit) in &flips {
                // The head and what is near it.
                let at = at.index(damaged.len().min(200));
                damaged[at] ^= 1 << bit;
            }
            fuzz::page_frame(&damaged);
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        fuzz::page_frame(&bytes);
        fuzz::page_frame(&[b"GDWP", bytes.get(4..).unwrap_or_default()].concat());
    }
}
