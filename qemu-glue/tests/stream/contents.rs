//! What is in each capture.

use std::collections::BTreeSet;
use std::sync::Arc;

use qemu_glue::fuzz;
use qemu_glue::stream::channel::{Channel, recognise};
use qemu_glue::stream::multifd::{ChannelInit, INIT_BYTES, PACKET_HEADER_BYTES, PacketHeader};
use qemu_glue::stream::return_path::{ReturnMessage, ReturnReader};
use qemu_glue::stream::{BlockList, Command, Event, Reader, Refusal, Writer};

use crate::loads::{Memory, note};
use crate::{Pages, Seen, VERSIONS, capture};

const MACHINE: &str = "pc-i440fx-7.2";
const RAM_BYTES: u64 = 16 << 20;
const UUID: [u8; 16] = *b"\x6f\x0d\x6d\x1e\x3a\x57\x4a\x0e\x9d\x0c\x01\x23\x45\x67\x89\xab";

/// The messages of a return path, as text.
fn answers(bytes: &[u8]) -> Vec<String> {
    assert!(fuzz::return_path(bytes), "it comes back");
    let (mut reader, mut input, mut found) = (ReturnReader::new(), bytes, Vec::new());
    while let Some(message) = reader.next(&mut input).unwrap() {
        found.push(match message {
            ReturnMessage::RequestPages(_) => "REQ_PAGES".to_owned(),
            ReturnMessage::RecvBitmap { block } => format!("RECV_BITMAP {block}"),
            ReturnMessage::BitmapSize(size) => format!("{size} bytes"),
            ReturnMessage::BitmapBits(_) | ReturnMessage::BitmapEnd => continue,
            message => format!("{message:?}"),
        });
    }
    reader.finish().unwrap();
    found
}

#[test]
fn plain_pre_copy() {
    for version in VERSIONS {
        let seen = Seen::of(version, "plain");
        assert_eq!(seen.machine, MACHINE);
        assert!(seen.capabilities.is_empty() && seen.commands.is_empty());
        assert_eq!(seen.block("pc.ram"), Some(RAM_BYTES));
        assert_eq!(seen.block("pc.bios"), Some(64 << 10));
        // The guest is stopped: every page comes once.
        assert_eq!(seen.pages.sum(), seen.all_pages());
        assert_eq!(seen.pages.named, seen.blocks.len());
        assert!(seen.pages.delta == 0 && (1..40).contains(&seen.pages.whole), "{:?}", seen.pages);
        assert!(seen.is_ended && seen.state.starts_with(b"\x04"));
        let description: serde_json::Value =
            serde_json::from_str(seen.description.as_deref().unwrap()).unwrap();
        let devices = description["devices"].as_array().unwrap();
        // Each device of the description begins a section within the state.
        for device in devices {
            let name = device["name"].as_str().unwrap();
            let counted = [&[name.len() as u8], name.as_bytes()].concat();
            assert!(seen.state.windows(counted.len()).any(|bytes| bytes == counted), "{name}");
        }
        assert!(devices.len() > 10);
    }
}

#[test]
fn without_a_description() {
    for version in VERSIONS {
        let seen = Seen::of(version, "no-description");
        assert!(seen.is_ended && seen.description.is_none());
        // The state ends with the footer of a section.
        assert_eq!(seen.state[seen.state.len() - 5], 0x7e);
        assert_eq!(seen.state.len(), Seen::of(version, "plain").state.len());
    }
}

#[test]
fn shared_ram_stays_out() {
    for version in VERSIONS {
        let bytes = capture(version, "ignore-shared");
        let seen = Seen::of(version, "ignore-shared");
        assert_eq!(seen.capabilities, ["x-ignore-shared"]);
        assert_eq!(seen.uuid, Some(UUID));
        assert_eq!(seen.block("m0"), Some(RAM_BYTES));
        assert_eq!(seen.pages.sum(), seen.all_pages() - (RAM_BYTES / 4096) as usize);
        let mut reader = Reader::new();
        let mut input = &bytes[..];
        let list = loop {
            if let Some(Event::RamBlocks(list)) = reader.next(&mut input).unwrap() {
                break list;
            }
        };
        assert!(list.blocks().iter().all(|block| block.address.is_some()));
        let ram = list.get(list.find("m0").unwrap()).unwrap();
        assert_eq!((ram.address, ram.page_bytes), (Some(0), None));
    }
}

/// The guest's memory put together: deltas fit what came before them.
#[test]
fn deltas() {
    for version in VERSIONS {
        let bytes = capture(version, "xbzrle");
        let seen = Seen::of(version, "xbzrle");
        assert!(seen.pages.delta >= 128 && seen.pages.whole >= 256, "{:?}", seen.pages);
        let mut memory = Memory::new();
        let (mut reader, mut input) = (Reader::new(), &bytes[..]);
        while let Some(event) = reader.next(&mut input).unwrap() {
            if let Event::Page(page) = event {
                note(&page, &mut memory);
            }
        }
        let ram = reader.blocks().unwrap().find("pc.ram").unwrap();
        // The guest counts in every page, in order: no two differ by more than a round.
        let counters = (0x10..0x90).map(|page| {
            let page = &memory[&(ram, page * 4096)];
            u16::from_le_bytes([page[0x10], page[0x11]])
        });
        let counters = counters.collect::<Vec<_>>();
        assert!(counters.iter().all(|count| counters[0].wrapping_sub(*count) <= 1), "{counters:?}");
    }
}

#[test]
fn the_return_path() {
    for version in VERSIONS {
        let seen = Seen::of(version, "return-path");
        assert_eq!(seen.commands, ["OPEN_RETURN_PATH", "PING 1"]);
        let mut wanted = vec!["Pong(1)", "Shut { error: 0 }"];
        if version == "10.0" {
            wanted.insert(0, "SwitchoverAck");
        }
        assert_eq!(answers(&capture(version, "return-path.back")), wanted);
    }
}

#[test]
fn post_copy_announced_and_not_used() {
    for version in VERSIONS {
        let seen = Seen::of(version, "advised");
        assert_eq!(seen.commands, ["OPEN_RETURN_PATH", "PING 1", "POSTCOPY_ADVISE"]);
        assert_eq!(seen.pages.sum(), seen.all_pages());
        assert!(seen.description.is_some());
        assert_eq!(answers(&capture(version, "advised.back")), ["Pong(1)", "Shut { error: 0 }"]);
    }
}

#[test]
fn post_copy() {
    for version in VERSIONS {
        let seen = Seen::of(version, "postcopy");
        let names: BTreeSet<_> = seen.commands.iter().map(String::as_str).collect();
        let wanted = [
            "OPEN_RETURN_PATH",
            "PACKAGED",
            "PING 1",
            "PING 2",
            "PING 4",
            "POSTCOPY_ADVISE",
            "POSTCOPY_RAM_DISCARD",
        ];
        assert_eq!(names, BTreeSet::from(wanted));
        assert!(seen.is_ended && seen.state.is_empty() && seen.description.is_none());
        assert!(seen.later.whole >= 100 && seen.later.delta == 0, "{:?}", seen.later);

        let package = &seen.packages[0];
        assert!(fuzz_package(package));
        let inside =
            Seen::read(Reader::package(u32::try_from(package.len()).unwrap()), package).unwrap();
        assert_eq!(inside.commands, ["POSTCOPY_LISTEN", "PING 3", "POSTCOPY_RUN"]);
        // The same devices, and the same amount of state but for what changes while a guest runs.
        let stopped = Seen::of(version, "plain").state.len();
        assert!(inside.state.len().abs_diff(stopped) < 1000, "{}", inside.state.len());

        let back = answers(&capture(version, "postcopy.back"));
        assert_eq!(back.first().map(String::as_str), Some("Pong(1)"));
        assert_eq!(back.last().map(String::as_str), Some("Shut { error: 0 }"));
        for pong in ["Pong(2)", "Pong(3)", "Pong(4)", "REQ_PAGES"] {
            assert!(back.iter().any(|message| message == pong), "{version}: {pong}");
        }
    }
}

/// Whether a package comes back.
fn fuzz_package(package: &[u8]) -> bool {
    let mut reader = Reader::package(u32::try_from(package.len()).unwrap());
    let (mut writer, mut out) = (Writer::new(), Vec::new());
    for mut piece in package.chunks(7) {
        while let Some(event) = reader.next(&mut piece).unwrap() {
            writer.write(&event, &mut out).unwrap();
        }
    }
    reader.finish().unwrap();
    out == package
}

/// Every page that the guest asked for came after the package.
#[test]
fn requests_are_answered() {
    for version in VERSIONS {
        let (bytes, back) = (capture(version, "postcopy"), capture(version, "postcopy.back"));
        let mut later = BTreeSet::new();
        let (mut reader, mut input, mut is_later) = (Reader::new(), &bytes[..], false);
        let mut blocks = Arc::<BlockList>::default();
        while let Some(event) = reader.next(&mut input).unwrap() {
            match event {
                Event::RamBlocks(list) => blocks = list,
                Event::Command(Command::Packaged { .. }) => is_later = true,
                Event::Page(page) if is_later => {
                    assert!(later.insert((page.block, page.offset_bytes)), "a page comes twice");
                }
                _ => {}
            }
        }
        let (mut answers, mut input, mut block) = (ReturnReader::new(), &back[..], None);
        let mut requests = 0;
        while let Some(message) = answers.next(&mut input).unwrap() {
            let ReturnMessage::RequestPages(request) = message else { continue };
            block = request.block.map(|name| blocks.find(name).unwrap()).or(block);
            assert_eq!(request.length_bytes, 4096);
            assert!(later.contains(&(block.unwrap(), request.start_bytes)), "{request:?}");
            requests += 1;
        }
        assert!(requests > 0);
    }
}

/// The connection breaks in post-copy; another one goes on.
#[test]
fn recovery() {
    for version in VERSIONS {
        let broken = capture(version, "broken");
        let (mut reader, mut input) = (Reader::new(), &broken[..]);
        while reader.next(&mut input).unwrap().is_some() {}
        assert!(matches!(reader.finish().unwrap_err().refusal, Refusal::Cut { .. }));
        let blocks = Arc::clone(reader.blocks().unwrap());
        let section = reader.ram_section().unwrap();

        let bytes = capture(version, "recovery");
        let seen = Seen::read(Reader::resumed(section, Arc::clone(&blocks)), &bytes).unwrap();
        let count = |name: &str| seen.commands.iter().filter(|found| *found == name).count();
        assert_eq!(count("RECV_BITMAP"), blocks.blocks().len());
        assert_eq!(count("POSTCOPY_RESUME"), 1);
        assert!(seen.is_ended && seen.pages.sum() > 0);
        let mut reader = Reader::resumed(section, Arc::clone(&blocks));
        let (mut writer, mut out) = (Writer::resumed(Arc::clone(&blocks)), Vec::new());
        for mut piece in bytes.chunks(101) {
            while let Some(event) = reader.next(&mut piece).unwrap() {
                writer.write(&event, &mut out).unwrap();
            }
        }
        assert!(out == bytes);

        let back = answers(&capture(version, "recovery.back"));
        for block in blocks.blocks() {
            let at = back.iter().position(|found| *found == format!("RECV_BITMAP {}", block.name));
            let bytes = (block.length_bytes / 4096).div_ceil(64) * 8;
            assert_eq!(back[at.unwrap() + 1], format!("{bytes} bytes"));
        }
        assert!(back.iter().any(|found| found == "ResumeAck(1)"));
        assert_eq!(back.last().map(String::as_str), Some("Shut { error: 0 }"));
    }
}

#[test]
fn multifd() {
    for version in VERSIONS {
        let seen = Seen::of(version, "multifd");
        // Zero pages went on the main channel before 9.0, and barriers had no mark before 8.1.
        let is_old = version == "7.2";
        assert_eq!((seen.pages.zero > 0, seen.flushes == 0, seen.pages.whole), (is_old, is_old, 0));
        let bytes = capture(version, "multifd-channel");
        assert_eq!(recognise(&bytes), Some(Channel::Multifd));
        let refused = Seen::read(Reader::new(), &bytes).unwrap_err().refusal;
        assert!(matches!(refused, Refusal::Channel { .. }));
        let (init, mut rest) = bytes.split_first_chunk::<INIT_BYTES>().unwrap();
        assert_eq!(ChannelInit::parse(init).unwrap(), ChannelInit { uuid: [0; 16], channel: 0 });
        let (mut packets, mut zero) = (0, 0);
        while let Some((header, later)) = rest.split_first_chunk::<PACKET_HEADER_BYTES>() {
            let packet = PacketHeader::parse(header).unwrap();
            assert_eq!(packet.payload_bytes as usize, packet.normal_offsets.len() * 4096);
            assert!(packet.block.is_empty() || seen.block(&packet.block).is_some());
            rest = later.get(packet.payload_bytes as usize..).unwrap_or_default();
            zero += packet.zero_offsets.len();
            packets += 1;
        }
        assert!(packets > 0);
        assert_eq!(zero == 0, is_old);
    }
}

#[test]
fn the_preempt_channel() {
    for version in VERSIONS {
        let bytes = capture(version, "preempt-channel");
        assert_eq!(recognise(&bytes), Some(Channel::Preempt));
        assert!(matches!(
            Seen::read(Reader::new(), &bytes).unwrap_err().refusal,
            Refusal::Channel { .. }
        ));
    }
}

#[test]
fn compressed_pages_are_refused() {
    let refused = Seen::read(Reader::new(), &capture("7.2", "compress")).unwrap_err();
    let Refusal::RamForm { remedy, .. } = refused.refusal else { panic!("{refused:?}") };
    assert!(remedy.contains("capability compress"));
}

#[test]
fn huge_pages() {
    for version in VERSIONS {
        let bytes = capture(version, "huge-pages");
        let (mut reader, mut input) = (Reader::new(), &bytes[..]);
        while reader.next(&mut input).unwrap().is_some() {}
        let blocks = reader.blocks().unwrap();
        for block in blocks.blocks() {
            let is_huge = block.name == "m0";
            assert_eq!(block.page_bytes, is_huge.then_some(2 << 20), "{}", block.name);
        }
        assert_eq!(blocks.find("m0").map(|index| index.0), Some(0));
    }
}

#[test]
fn what_a_new_machine_type_adds() {
    let seen = Seen::of("10.0", "virtio-mem");
    assert_eq!(seen.machine, "pc-i440fx-10.0");
    assert_eq!(seen.early.len(), 1);
    assert!(seen.early[0].ends_with("/virtio-mem-device-early"), "{:?}", seen.early);
    assert_eq!(seen.commands, ["SWITCHOVER_START"]);
    assert_eq!(seen.block("0000:00:02.0/v0"), Some(128 << 20));
    // Unplugged memory is not sent.
    assert_eq!(seen.pages.sum(), seen.all_pages() - (128 << 20) / 4096);
    assert_ne!(seen.pages, Pages::default());
}
