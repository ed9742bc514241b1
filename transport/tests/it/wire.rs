//! The wire format: golden bytes, round trips, limits, and damage.
//!
//! The golden files are what version 3 sends. They change only with a new version. To write them
//! and the fuzzers' first corpus: `GODWIT_WRITE_GOLDEN=1 cargo test -p transport --test it golden`.

use std::fs;
use std::path::{Path, PathBuf};

use migrate_core::batch::{PageRun, RunKind};
use migrate_core::codec::{Codec, Packer, packed_bytes_max};
use migrate_core::delta::delta_bytes;
use migrate_core::layout::{BLOCKS_MAX, BlockSpec, PAGE_BYTES, PageIndex};
use proptest::prelude::*;
use transport::lane_wire::{self, Greeting, LANE_HEADER_BYTES, RUN_BYTES};
use transport::messages::{
    Abort, AbortCode, Accept, Ask, Commit, DEVICE_CHUNK_BYTES_MAX, DIGESTS_MAX, Describe,
    DestinationState, DeviceState, Done, FaultStats, Intent, Joined, Load, MISSING_WORDS_MAX,
    MigrationId, Missing, MissingEnd, Offer, Prepare, Prepared, Progress, Ready, Refuse,
    RefuseCode, Reject, RejectCode, RemoteEnd, Request, Running, Select, Split, Store, StreamBack,
    StreamBlocks, StreamBytes, StreamEnd, StreamGuest, StreamHeard, StreamOpen, StreamOpened,
    StreamPostcopy, StreamResume, StreamResumed, Sync, Synced, TEXT_BYTES_MAX, TYPE_NUMBERS, Then,
    VERSIONS_MAX, Verdict, VerifyChunk, VerifyEnd, VerifyRequest, message_type, text,
};
use transport::{Batch, Message, Payload, WireError, fuzz, wire};

pub(crate) fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn store(address: &str) -> Store {
    let name = "memory-1".into();
    Store { address: address.into(), name, id: [7; 16], secret: [9; 32], reserve_pages: 1 << 20 }
}

/// One of every message, in the order of their types.
fn samples() -> Vec<Message> {
    let migration = MigrationId(*b"0123456789abcdef");
    let text = String::from("because");
    let block = |name: &str, length_bytes, page_bytes| BlockSpec {
        name: name.into(),
        length_bytes,
        page_bytes,
    };
    vec![
        Message::Offer(Offer {
            versions: vec![1, 2],
            features: 0x8000_0000_0000_0001,
            engine: "godwit 0.1.0".into(),
            migration,
            intent: Intent::Migrate,
            lanes: 4,
        }),
        Message::Select(Select { version: 1, features: 1, lanes: 2, token: [0xa5; 16] }),
        Message::Reject(Reject { code: RejectCode::Busy, text: text.clone() }),
        Message::Joined(Joined { lanes: 2 }),
        Message::Describe(Describe {
            vm_name: "web-1".into(),
            vm_uuid: Some("7c6b8f4e-3d2a-4b1c-9e8f-001122334455".into()),
            machine: "pc-q35-7.2".into(),
            qemu_version: (7, 2, 22),
            page_bytes: 4096,
            blocks: vec![block("pc.ram", 1 << 30, 4096), block("huge", 4 << 30, 2 << 20)],
            verify: true,
            post_copy: true,
        }),
        Message::Accept(Accept {
            qemu_version: (10, 0, 2),
            resident_bytes: 262_144,
            no_post_copy: None,
        }),
        Message::Refuse(Refuse { code: RefuseCode::Layout, text: text.clone() }),
        Message::Progress(Progress { applied_bytes: 1 << 33, applied_batches: vec![17, 18] }),
        Message::Sync(Sync { sequence: 3, batches: vec![19, 20] }),
        Message::Synced(Synced { sequence: 3, version_digest: u64::MAX }),
        Message::VerifyRequest(VerifyRequest { seed: 0x0123_4567_89ab_cdef }),
        Message::VerifyChunk(VerifyChunk { first_page: 8192, digests: vec![0, 1, u64::MAX] }),
        Message::VerifyEnd(VerifyEnd { pages: 262_144 }),
        Message::Prepare(Prepare {}),
        Message::Prepared(Prepared {}),
        Message::Missing(Missing { first_page: 640, words: vec![1, 0, u64::MAX] }),
        Message::MissingEnd(MissingEnd { pages: 65 }),
        Message::Request(Request { page: 703 }),
        Message::Split(Split {
            resident_pages: 65_536,
            copies: 2,
            direct_io_window_ms: 3000,
            stores: vec![store("192.0.2.7:7701"), store("[2001:db8::7]:7701")],
            is_moved: true,
            then: Then { merge: true, drain: vec![] },
        }),
        Message::RemoteEnd(RemoteEnd { store: 1, pages: 4097, version: 70_000 }),
        Message::DeviceState(DeviceState {
            offset: 524_288,
            part_bytes: 8,
            bytes: b"QEVM\0\0\0\x03".to_vec(),
        }),
        Message::Load(Load { total_bytes: 524_296, digest: 7, version_digest: 8 }),
        Message::Ready(Ready { load_us: 1234, version_digest: 8, run_state: "paused".into() }),
        Message::Commit(Commit { migration, resume: true }),
        Message::Running(Running {
            resume_us: 456,
            faults: Some(FaultStats { count: 9, waited: 1, p50_us: 70, p99_us: 300, max_us: 400 }),
        }),
        Message::Abort(Abort { code: AbortCode::Mismatch, text: text.clone() }),
        Message::Done(Done {}),
        Message::StreamOpen(StreamOpen { name: "unix:/run/out".into(), port: 49_152 }),
        Message::StreamOpened(StreamOpened {}),
        Message::StreamBlocks(StreamBlocks {
            section: 2,
            blocks: vec![block("pc.ram", 1 << 30, 4096), block("vga.vram", 16 << 20, 4096)],
        }),
        Message::StreamBytes(StreamBytes { bytes: b"QEVM\0\0\0\x03".to_vec() }),
        Message::StreamBack(StreamBack { bytes: b"\0\x01\0\x04\0\0\0\0".to_vec() }),
        Message::StreamEnd(StreamEnd {}),
        Message::StreamPostcopy(StreamPostcopy {}),
        Message::StreamGuest(StreamGuest {
            guest: Describe {
                vm_name: "guest \u{2014} private".into(),
                vm_uuid: None,
                machine: "pc-q35-10.0".into(),
                qemu_version: (10, 0, 2),
                page_bytes: 4096,
                blocks: vec![block("pc.ram", 1 << 30, 4096)],
                verify: false,
                post_copy: false,
            },
        }),
        Message::Ask(Ask { migration }),
        Message::Verdict(Verdict { state: DestinationState::Owned, text }),
        Message::StreamHeard(StreamHeard { messages: 300 }),
        Message::StreamResume(StreamResume { messages: 1 << 40 }),
        Message::StreamResumed(StreamResumed { messages: 7, batches: vec![1, 0, 1 << 33] }),
    ]
}

fn sample_batch() -> Batch {
    let run =
        |first, pages, kind, version| PageRun { first: PageIndex(first), pages, kind, version };
    let content: Vec<u8> = (0..3 * PAGE_BYTES).map(|at| (at / 16) as u8).collect();
    let runs = vec![
        run(64, 2, RunKind::Raw, 1),
        run(66, 32_768, RunKind::Zero, 2),
        run((1 << 34) - 1, 1, RunKind::Raw, u32::MAX),
    ];
    Batch::plain(runs, content, 5)
}

/// Two deltas, one of them of all lines, behind a codec that the decoder does not look into.
fn sample_deltas() -> Batch {
    let run = PageRun { first: PageIndex(7), pages: 2, kind: RunKind::Delta, version: 2 };
    let content_bytes = delta_bytes(1) + delta_bytes(u64::MAX);
    let payload = b"packed".to_vec().into();
    Batch { runs: vec![run], payload, codec: Codec::Zstd, content_bytes, round: 6 }
}

/// References, behind zeros.
fn sample_references() -> Batch {
    let run = |first, kind| PageRun { first: PageIndex(first), pages: 2, kind, version: 1 };
    let content = [70u64, (1 << 34) - 1].map(u64::to_le_bytes).concat();
    Batch::plain(vec![run(64, RunKind::Zero), run(66, RunKind::Same)], content, 7)
}

fn lane_frame(batch: &Batch, sequence: u64) -> Vec<u8> {
    [&lane_wire::encode_head(batch, sequence).unwrap()[..], &batch.payload.to_vec()[..]].concat()
}

/// Compares with the file, or writes it where that was asked for.
pub(crate) fn check_golden(path: &Path, bytes: &[u8]) {
    if std::env::var_os("GODWIT_WRITE_GOLDEN").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    let golden = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(golden, bytes, "{} differs: what was released must not change", path.display());
}

#[test]
fn golden_control_frames_do_not_change() {
    let samples = samples();
    let numbers: Vec<u16> = samples.iter().map(Message::type_number).collect();
    assert_eq!(numbers, TYPE_NUMBERS, "there is a sample of every message");
    let mut all = Vec::new();
    for (index, message) in samples.iter().enumerate() {
        let name = message.name().to_lowercase();
        let frame = wire::encode(message, 1).unwrap();
        check_golden(&folder("tests/golden").join(format!("v4-{name}.bin")), &frame);
        check_golden(&folder("fuzz/corpus/control_frame").join(format!("good-{name}")), &frame);
        assert_eq!(wire::decode(&frame, 1).unwrap(), (message.clone(), frame.len()));
        all.extend(wire::encode(message, index as u32 + 1).unwrap());
    }
    check_golden(&folder("fuzz/corpus/control_frame").join("good-all"), &all);
    assert_eq!(fuzz::control_frame(&all) as usize, samples.len());
}

#[test]
fn golden_lane_frames_do_not_change() {
    let greeting = Greeting { version: 2, lane: 3, token: *b"tokentokentokent" };
    let bytes = greeting.encode();
    check_golden(&folder("tests/golden").join("v4-lane-greeting.bin"), &bytes);
    assert_eq!(Greeting::parse(&bytes).unwrap(), greeting);

    let batch = sample_batch();
    let frame = lane_frame(&batch, 1);
    check_golden(&folder("tests/golden").join("v4-lane-batch.bin"), &frame);
    assert_eq!(lane_wire::decode(&frame, 1).unwrap(), (batch.clone(), frame.len()));
    let corpus = folder("fuzz/corpus/lane_frame");
    check_golden(&corpus.join("good-batch"), &frame);
    let two = [&bytes[..], &frame, &lane_frame(&batch, 2)].concat();
    check_golden(&corpus.join("good-greeting-and-two"), &two);
    assert_eq!(fuzz::lane_frame(&two), 2);
    check_golden(
        &folder("tests/golden").join("v4-lane-deltas.bin"),
        &lane_frame(&sample_deltas(), 1),
    );
    check_golden(&corpus.join("good-deltas"), &lane_frame(&sample_deltas(), 1));
    let references = sample_references();
    let frame = lane_frame(&references, 1);
    check_golden(&folder("tests/golden").join("v4-lane-references.bin"), &frame);
    check_golden(&corpus.join("good-references"), &frame);
    assert_eq!(lane_wire::decode(&frame, 1).unwrap(), (references, frame.len()));
    let zeros = Batch::plain(vec![batch.runs[1]], Payload::default(), 0);
    check_golden(&corpus.join("good-zeros"), &lane_frame(&zeros, 1));
}

/// Batches of all codecs, packed by this build: other versions of the libraries pack otherwise, but
/// what was packed once can be unpacked for ever.
#[test]
fn packed_contents_unpack() {
    let mut packer = Packer::default();
    let mut all = vec![];
    for (number, codec) in [Codec::Zstd, Codec::Lz4, Codec::Plain, Codec::Zstd].iter().enumerate() {
        let content: Vec<u8> = (0..5000 + number).map(|at| (at * at / 7) as u8).collect();
        let mut packed = vec![0; packed_bytes_max(content.len())];
        let length = packer.pack(*codec, &content, &mut packed).unwrap();
        all.push(Codec::ALL.iter().position(|other| other == codec).unwrap() as u8);
        all.extend((content.len() as u16).to_le_bytes());
        all.extend((length as u16).to_le_bytes());
        all.extend(&packed[..length]);
    }
    assert_eq!(fuzz::contents(&all), 4);
    let corpus = folder("fuzz/corpus/contents");
    if std::env::var_os("GODWIT_WRITE_GOLDEN").is_some() {
        fs::create_dir_all(&corpus).unwrap();
        fs::write(corpus.join("good-all-codecs"), &all).unwrap();
        fs::write(corpus.join("cut-short"), &all[..all.len() - 1]).unwrap();
        // Another announced length, and bytes that are no stream.
        fs::write(corpus.join("longer-than-announced"), [&[2, 1, 0][..], &all[3..]].concat())
            .unwrap();
        fs::write(corpus.join("noise"), [&[2, 0, 1, 9, 0][..], b"no stream"].concat()).unwrap();
    }
}

#[test]
fn the_fuzzers_corpus_is_handled() {
    type Target = fn(&[u8]) -> u64;
    let targets: [(&str, Target); 4] = [
        ("control_frame", |bytes| u64::from(fuzz::control_frame(bytes))),
        ("lane_frame", fuzz::lane_frame),
        ("page_frame", fuzz::page_frame),
        ("contents", fuzz::contents),
    ];
    for (target, run) in targets {
        let mut files = 0;
        for entry in fs::read_dir(folder("fuzz/corpus").join(target)).unwrap() {
            let path = entry.unwrap().path();
            let accepted = run(&fs::read(&path).unwrap());
            let good = path.file_name().unwrap().to_string_lossy().starts_with("good-");
            assert!(!good || accepted > 0, "{} is refused", path.display());
            files += 1;
        }
        assert!(files >= 3, "{target} has a corpus of {files} files");
    }
}

/// The largest message of every type that can be large.
fn largest() -> Vec<Message> {
    let long = "x".repeat(TEXT_BYTES_MAX);
    let blocks = (0..BLOCKS_MAX)
        .map(|index| BlockSpec {
            name: format!("{index:0255}"),
            length_bytes: 64 << 30,
            page_bytes: 1 << 30,
        })
        .collect();
    let batches = vec![u64::MAX; 64];
    vec![
        Message::Offer(Offer {
            versions: vec![u16::MAX; VERSIONS_MAX],
            features: u64::MAX,
            engine: long.clone(),
            migration: MigrationId([255; 16]),
            intent: Intent::Migrate,
            lanes: 64,
        }),
        Message::Reject(Reject { code: RejectCode::Version, text: long.clone() }),
        Message::Describe(Describe {
            vm_name: long.clone(),
            vm_uuid: Some(long.clone()),
            machine: long.clone(),
            qemu_version: (u32::MAX, u32::MAX, u32::MAX),
            page_bytes: 1 << 31,
            blocks,
            verify: true,
            post_copy: true,
        }),
        Message::Accept(Accept {
            qemu_version: (u32::MAX, u32::MAX, u32::MAX),
            resident_bytes: 64 << 40,
            no_post_copy: Some(long.clone()),
        }),
        Message::Refuse(Refuse { code: RefuseCode::Internal, text: long.clone() }),
        Message::Missing(Missing {
            first_page: (1 << 34) - 64 * MISSING_WORDS_MAX as u64,
            words: vec![u64::MAX; MISSING_WORDS_MAX],
        }),
        Message::Progress(Progress { applied_bytes: u64::MAX, applied_batches: batches.clone() }),
        Message::Sync(Sync { sequence: u32::MAX, batches: batches.clone() }),
        Message::StreamResumed(StreamResumed { messages: u64::MAX, batches }),
        Message::VerifyChunk(VerifyChunk {
            first_page: (1 << 34) - DIGESTS_MAX as u64,
            digests: vec![u64::MAX; DIGESTS_MAX],
        }),
        Message::DeviceState(DeviceState {
            offset: (256 << 20) - DEVICE_CHUNK_BYTES_MAX as u64,
            part_bytes: DEVICE_CHUNK_BYTES_MAX as u32,
            bytes: vec![255; DEVICE_CHUNK_BYTES_MAX],
        }),
        Message::Ready(Ready {
            load_us: u64::MAX,
            version_digest: u64::MAX,
            run_state: long.clone(),
        }),
        Message::Abort(Abort { code: AbortCode::Internal, text: long.clone() }),
        Message::Verdict(Verdict { state: DestinationState::Refused, text: long }),
    ]
}

#[test]
fn the_largest_messages_fit_their_limits() {
    for message in largest().into_iter().chain(samples()) {
        let frame = wire::encode(&message, u32::MAX).unwrap();
        let (name, bytes_max) = message_type(message.type_number()).unwrap();
        assert_eq!(name, message.name());
        assert!(frame.len() <= wire::CONTROL_HEADER_BYTES + bytes_max, "{name}");
        assert!(bytes_max <= wire::CONTROL_BODY_BYTES_MAX, "{name}");
        assert_eq!(wire::decode(&frame, u32::MAX).unwrap().0, message);
    }
}

#[test]
fn one_more_than_allowed_is_refused_by_both_ends() {
    let refused = |message: Message| {
        let error = wire::encode(&message, 1).unwrap_err();
        assert!(matches!(error, WireError::Field { .. } | WireError::Layout { .. }), "{error}");
    };
    let too_long = "x".repeat(TEXT_BYTES_MAX + 1);
    refused(Message::Abort(Abort { code: AbortCode::Internal, text: too_long.clone() }));
    refused(Message::Reject(Reject { code: RejectCode::Busy, text: "a\x1b[2J".into() }));
    refused(Message::Ready(Ready { load_us: 0, version_digest: 0, run_state: too_long }));
    let Message::Describe(good) = samples().remove(4) else { panic!("the samples' order") };
    let block = good.blocks[0].clone();
    refused(Message::Describe(Describe { blocks: vec![], ..good.clone() }));
    refused(Message::Describe(Describe { blocks: vec![block.clone(); 2], ..good.clone() }));
    refused(Message::Describe(Describe { page_bytes: 4095, ..good.clone() }));
    let unnamed = BlockSpec { name: "new\nline".into(), ..block };
    refused(Message::Describe(Describe { blocks: vec![unnamed], ..good }));
    let digests = vec![0; DIGESTS_MAX + 1];
    refused(Message::VerifyChunk(VerifyChunk { first_page: 0, digests }));
    refused(Message::VerifyChunk(VerifyChunk { first_page: u64::MAX, digests: vec![0] }));
    refused(Message::VerifyChunk(VerifyChunk { first_page: 0, digests: vec![] }));
    let state = |offset, part_bytes: usize, bytes: usize| {
        let (part_bytes, bytes) = (part_bytes as u32, vec![0; bytes]);
        Message::DeviceState(DeviceState { offset, part_bytes, bytes })
    };
    refused(state(0, DEVICE_CHUNK_BYTES_MAX + 1, 1));
    refused(state(u64::MAX, 1, 1));
    refused(state(0, 0, 0));
    refused(state(0, 1, 0));
    refused(state(0, 9, 10));
    refused(Message::Joined(Joined { lanes: 65 }));
    refused(Message::Select(Select { version: 0, features: 0, lanes: 1, token: [0; 16] }));
    let Message::Offer(offer) = samples().remove(0) else { panic!("the samples' order") };
    for bad in [
        Offer { versions: vec![], ..offer.clone() },
        Offer { versions: vec![1; VERSIONS_MAX + 1], ..offer.clone() },
        Offer { versions: vec![0], ..offer.clone() },
        Offer { lanes: 65, ..offer.clone() },
        Offer { lanes: 0, ..offer.clone() },
        Offer { intent: Intent::Ask, ..offer },
    ] {
        refused(Message::Offer(bad));
    }
    refused(Message::Missing(Missing { first_page: 0, words: vec![] }));
    refused(Message::Missing(Missing { first_page: 0, words: vec![0; MISSING_WORDS_MAX + 1] }));
    refused(Message::Missing(Missing { first_page: 63, words: vec![0] }));
    refused(Message::Missing(Missing { first_page: 1 << 34, words: vec![0] }));
    refused(Message::MissingEnd(MissingEnd { pages: (1 << 34) + 1 }));
    refused(Message::Request(Request { page: 1 << 34 }));
    let split = |resident_pages, copies, stores, drain: &[u16]| {
        let stores = vec![store("192.0.2.7:7701"); stores];
        let then = Then { merge: false, drain: drain.to_vec() };
        let (direct_io_window_ms, is_moved) = (0, false);
        Split { resident_pages, copies, direct_io_window_ms, stores, is_moved, then }
    };
    for (resident_pages, copies, stores) in
        [(0, 1, 1), ((1 << 34) + 1, 1, 1), (9, 0, 1), (9, 2, 1), (9, 3, 3), (9, 1, 0), (9, 1, 9)]
    {
        refused(Message::Split(split(resident_pages, copies, stores, &[])));
    }
    for (copies, stores, drain) in
        [(1, 3, &[1, 0][..]), (1, 3, &[1, 1]), (1, 3, &[3]), (1, 2, &[0, 1]), (2, 3, &[0, 1])]
    {
        refused(Message::Split(split(9, copies, stores, drain)));
    }
    let remote_end = RemoteEnd { store: 7, pages: 1 << 34, version: 1 << 63 };
    wire::encode(&Message::RemoteEnd(remote_end.clone()), 1).unwrap();
    refused(Message::RemoteEnd(RemoteEnd { store: 8, ..remote_end.clone() }));
    refused(Message::RemoteEnd(RemoteEnd { pages: (1 << 34) + 1, ..remote_end.clone() }));
    refused(Message::RemoteEnd(RemoteEnd { version: 0, ..remote_end.clone() }));
    refused(Message::RemoteEnd(RemoteEnd { version: (1 << 63) + 1, ..remote_end }));
    refused(Message::Load(Load { total_bytes: u64::MAX, digest: 0, version_digest: 0 }));
}

#[test]
fn lengths_are_refused_by_the_header_alone() {
    for number in TYPE_NUMBERS {
        let (name, bytes_max) = message_type(*number).unwrap();
        let header = |length: usize| {
            let mut header = [0; wire::CONTROL_HEADER_BYTES];
            header[..4].copy_from_slice(b"GDWC");
            header[4..6].copy_from_slice(&number.to_le_bytes());
            header[8..12].copy_from_slice(&(length as u32).to_le_bytes());
            header[12] = 1;
            wire::ControlHeader::parse(&header, 1)
        };
        assert_eq!(header(bytes_max).unwrap().body_bytes(), bytes_max);
        let error = header(bytes_max + 1).unwrap_err();
        assert!(matches!(error, WireError::TooLong { what, .. } if what == name), "{error}");
    }
}

#[test]
fn any_text_can_be_made_to_fit() {
    let long = "ü\n\u{7f}".repeat(2000);
    let fitting = text(&long);
    assert!(fitting.len() <= TEXT_BYTES_MAX && fitting.len() > TEXT_BYTES_MAX - 4);
    assert!(!fitting.chars().any(char::is_control));
    let abort = Message::Abort(Abort { code: AbortCode::Qemu, text: fitting });
    wire::encode(&abort, 1).unwrap();
}

#[test]
fn a_migration_id_reads_as_it_prints() {
    let id = MigrationId(*b"\0\x01\xfe\xff89abcdefghij");
    assert_eq!(id.to_string().parse::<MigrationId>().unwrap(), id);
    for bad in ["", "00", &"g".repeat(32), &"0".repeat(33), &format!("+{}", "0".repeat(31))] {
        assert!(bad.parse::<MigrationId>().is_err(), "{bad}");
    }
}

/// Batches that keep all rules.
fn batches() -> impl Strategy<Value = Batch> {
    const KINDS: [RunKind; 4] = [RunKind::Raw, RunKind::Zero, RunKind::Delta, RunKind::Same];
    let kind = prop::sample::select(&KINDS[..]);
    let run = (0u64..1 << 34, 1u16..=8, kind, 1u32..).prop_map(|(first, pages, kind, version)| {
        PageRun { first: PageIndex(first.min((1 << 34) - 8)), pages, kind, version }
    });
    let runs = prop::collection::vec(run, 1..24);
    let codec = prop::sample::select(&Codec::ALL[..]);
    (runs, codec, any::<u32>(), any::<u8>(), any::<bool>()).prop_map(
        |(runs, codec, round, fill, most)| {
            let bounds = runs.iter().map(PageRun::content_bytes);
            let content_bytes = bounds.map(|(min, max)| if most { max } else { min }).sum();
            let payload_bytes = if codec == Codec::Plain { content_bytes } else { 100 };
            Batch { runs, payload: vec![fill; payload_bytes].into(), codec, content_bytes, round }
        },
    )
}

/// Messages with lists and texts of any length and content, which keep the rules or do not.
fn messages() -> impl Strategy<Value = Message> {
    let text = prop_oneof!["[ -~]{0,40}", ".{0,40}"];
    let list = prop::collection::vec(any::<u64>(), 0..70);
    prop_oneof![
        (any::<u64>(), list.clone()).prop_map(|(applied_bytes, applied_batches)| {
            Message::Progress(Progress { applied_bytes, applied_batches })
        }),
        (any::<u32>(), list.clone())
            .prop_map(|(sequence, batches)| Message::Sync(Sync { sequence, batches })),
        (any::<u64>(), list.clone()).prop_map(|(first_page, digests)| {
            Message::VerifyChunk(VerifyChunk { first_page: first_page >> 30, digests })
        }),
        (any::<u64>(), list).prop_map(|(first_page, words)| {
            Message::Missing(Missing { first_page: first_page >> 30 & !63, words })
        }),
        (any::<u64>(), 0..200u32, prop::collection::vec(any::<u8>(), 0..200)).prop_map(
            |(offset, part_bytes, bytes)| {
                Message::DeviceState(DeviceState { offset: offset >> 36, part_bytes, bytes })
            }
        ),
        (text.clone(), prop::collection::vec(any::<u16>(), 0..20), any::<u64>(), 0u16..70)
            .prop_map(|(engine, versions, features, lanes)| {
                Message::Offer(Offer {
                    versions,
                    features,
                    engine,
                    migration: MigrationId([9; 16]),
                    intent: match lanes {
                        0 => Intent::Ask,
                        1 => Intent::Resume,
                        _ => Intent::Migrate,
                    },
                    lanes,
                })
            }),
        (text.clone(), text, prop::collection::vec("[a-z]{1,3}", 0..6)).prop_map(
            |(vm_name, machine, names)| {
                Message::Describe(Describe {
                    vm_name,
                    vm_uuid: None,
                    machine,
                    qemu_version: (7, 2, 0),
                    page_bytes: 4096,
                    blocks: names
                        .into_iter()
                        .map(|name| BlockSpec { name, length_bytes: 8192, page_bytes: 4096 })
                        .collect(),
                    verify: false,
                    post_copy: false,
                })
            }
        ),
        prop::sample::select(samples()),
    ]
}

proptest! {
    #[test]
    fn what_can_be_sent_is_received_as_it_was(message in messages(), sequence in 1u32..) {
        match wire::encode(&message, sequence) {
            Ok(frame) => {
                let decoded = wire::decode(&frame, sequence);
                prop_assert_eq!(decoded, Ok((message, frame.len())));
            }
            Err(error) => {
                let is_rule = matches!(error, WireError::Field { .. } | WireError::Layout { .. });
                prop_assert!(is_rule, "{}", error);
                prop_assert!(message.validate().is_err());
            }
        }
    }

    #[test]
    fn damaged_control_frames_never_panic_nor_pass_a_rule_by(
        message in messages(), cut in any::<prop::sample::Index>(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..4),
    ) {
        let Ok(frame) = wire::encode(&message, 1) else { return Ok(()) };
        let cut = cut.index(frame.len());
        prop_assert!(wire::decode(&frame[..cut], 1).is_err(), "cut at {}", cut);
        let mut damaged = frame;
        for (at, bit) in flips {
            let at = at.index(damaged.len());
            damaged[at] ^= 1 << bit;
        }
        if let Ok((message, frame_bytes)) = wire::decode(&damaged, 1) {
            prop_assert!(frame_bytes <= damaged.len());
            prop_assert!(message.validate().is_ok());
        }
        fuzz::control_frame(&damaged);
    }

    #[test]
    fn batches_are_received_as_they_were_sent(batch in batches(), sequence in 1u64..) {
        let frame = lane_frame(&batch, sequence);
        let head_bytes = LANE_HEADER_BYTES + batch.runs.len() * RUN_BYTES;
        prop_assert_eq!(frame.len(), head_bytes + batch.payload.len());
        prop_assert_eq!(lane_wire::decode(&frame, sequence), Ok((batch, frame.len())));
        prop_assert!(lane_wire::decode(&frame, sequence.wrapping_add(1)).is_err());
    }

    #[test]
    fn damaged_batches_never_panic_nor_pass_a_rule_by(
        batch in batches(), cut in any::<prop::sample::Index>(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..4),
    ) {
        let frame = lane_frame(&batch, 1);
        let cut = cut.index(frame.len());
        prop_assert!(lane_wire::decode(&frame[..cut], 1).is_err(), "cut at {}", cut);
        let mut damaged = frame;
        let head_bytes = LANE_HEADER_BYTES + batch.runs.len() * RUN_BYTES;
        for (at, bit) in flips {
            let at = at.index(head_bytes);
            damaged[at] ^= 1 << bit;
        }
        if let Ok((batch, _)) = lane_wire::decode(&damaged, 1) {
            prop_assert!(lane_wire::encode_head(&batch, 1).is_ok());
        }
        fuzz::lane_frame(&damaged);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        fuzz::control_frame(&bytes);
        fuzz::lane_frame(&bytes);
        let head = |magic: &[u8]| [magic, bytes.get(4..).unwrap_or_default()].concat();
        fuzz::control_frame(&head(b"GDWC"));
        fuzz::lane_frame(&head(b"GDWL"));
    }
}
