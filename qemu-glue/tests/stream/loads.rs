//! A real QEMU loads what was read, taken apart and written anew.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use migrate_core::xbzrle;
use qemu_glue::qmp::{Client, RunState};
use qemu_glue::stream::{
    BlockIndex, BlockList, Event, PageContent, PageRecord, RamParts, Reader, Writer,
};

use crate::support::{MACHINE, Program, Qemu, folder, programs};
use crate::{VERSIONS, capture};

pub(crate) type Page = [u8; 4096];
pub(crate) type Memory = BTreeMap<(BlockIndex, u64), Page>;

/// What the pages of a capture come to, and the capture with other records that come to the same:
/// each page as an older version first, then as what makes the page of that; zero pages left out.
fn written_anew(bytes: &[u8]) -> (Memory, Vec<u8>, Reader) {
    let (mut reader, mut writer) = (Reader::new(), Writer::new());
    let (mut memory, mut out, mut is_listed, mut is_state) = (Memory::new(), vec![], false, false);
    let mut section = 0;
    let mut take = |reader: &mut Reader, mut input: &[u8]| {
        while let Some(event) = reader.next(&mut input).unwrap() {
            if let Event::SectionStart(header) = &event {
                section = header.section;
            }
            match &event {
                Event::Page(page) => note(page, &mut memory),
                Event::DeviceState(_) if !is_state => {
                    is_state = true;
                    pages_anew(section, &memory, &mut writer, &mut out);
                    writer.write(&event, &mut out).unwrap();
                }
                // All parts are new, and the description stays behind.
                _ if is_listed && !is_state => {}
                Event::Description(_) => {}
                _ => writer.write(&event, &mut out).unwrap(),
            }
            is_listed |= matches!(event, Event::Footer(_));
        }
    };
    take(&mut reader, bytes);
    reader.finish().unwrap();
    take(&mut reader, &[]);
    (memory, out, reader)
}

/// Puts a page, or what changed in it, where it belongs.
pub(crate) fn note(page: &PageRecord<'_>, memory: &mut Memory) {
    let held = memory.entry((page.block, page.offset_bytes)).or_insert([0; 4096]);
    match page.content {
        PageContent::Zero { fill } => held.fill(fill),
        PageContent::Whole(content) => *held = *content,
        PageContent::Xbzrle(delta) => drop(xbzrle::decode(delta, held).unwrap()),
    }
}

fn pages_anew(section: u32, memory: &Memory, writer: &mut Writer, out: &mut Vec<u8>) {
    let mut parts = RamParts::with_limit(section, 64 << 10);
    for ((block, offset_bytes), page) in memory {
        if page.iter().all(|byte| *byte == 0) {
            continue;
        }
        let (block, offset_bytes) = (*block, *offset_bytes);
        let mut older = *page;
        older[offset_bytes as usize / 4096 % 4096] ^= 0xff;
        let whole = PageContent::Whole(&older);
        let record = PageRecord { block, offset_bytes, continued: true, content: whole };
        parts.page(writer, &record, out).unwrap();
        let mut room = [0; 4096];
        let update = PageRecord::update(block, offset_bytes, &older, page, &mut room).unwrap();
        parts.page(writer, &update, out).unwrap();
    }
    parts.end(writer, out).unwrap();
}

/// A QEMU that waits for a stream; its guest's RAM is the file `ram` of the folder.
pub(crate) fn destination(program: &Program, folder: &Path, more: &[&str]) -> Qemu {
    let rom = folder.join("rom");
    std::fs::write(&rom, vec![0; 64 << 10]).unwrap();
    let machine = format!("{MACHINE},memory-backend=pc.ram");
    let ram = folder.join("ram");
    let memory =
        format!("memory-backend-file,id=pc.ram,size=16M,share=on,mem-path={}", ram.display());
    let arguments = ["-m", "16", "-machine", &machine, "-object", &memory, "-bios"];
    let arguments = [&arguments[..], &[rom.to_str().unwrap(), "-incoming", "defer"], more].concat();
    Qemu::start(program, folder, "destination", &arguments)
}

/// Has a QEMU read from one end of a socket pair, whose other end is returned.
pub(crate) async fn incoming(client: &Client) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    client.send_fd("stream", OwnedFd::from(theirs)).await.unwrap();
    client.migrate_incoming_fd("stream").await.unwrap();
    ours
}

/// Waits until all is loaded into a QEMU that was told not to start the guest.
async fn until_paused(client: &Client) {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let state = client.query_status().await.unwrap().state;
        if state == RunState::Paused {
            return;
        }
        assert_eq!(state, RunState::InMigrate);
        assert!(Instant::now() < until, "it was not loaded");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The contents of `pc.ram`.
pub(crate) fn ram_of(memory: &Memory, blocks: &BlockList) -> Vec<u8> {
    let block = blocks.find("pc.ram").unwrap();
    let mut ram = vec![0; 16 << 20];
    for ((_, offset), page) in memory.iter().filter(|((found, _), _)| *found == block) {
        let offset = usize::try_from(*offset).unwrap();
        ram[offset..offset + 4096].copy_from_slice(page);
    }
    assert!(ram.iter().any(|byte| *byte != 0));
    ram
}

#[tokio::test]
async fn what_was_written_anew() {
    for version in VERSIONS {
        let (memory, stream, reader) = written_anew(&capture(version, "xbzrle"));
        let wanted = ram_of(&memory, reader.blocks().unwrap());
        for program in programs() {
            let folder = folder();
            let qemu = destination(&program, folder.path(), &["-S"]);
            let client = qemu.client().await;
            let mut socket = incoming(&client).await;
            let stream = stream.clone();
            let sending = std::thread::spawn(move || socket.write_all(&stream));
            until_paused(&client).await;
            sending.join().unwrap().unwrap();
            let found = std::fs::read(folder.path().join("ram")).unwrap();
            assert!(found == wanted, "{version} to {}", program.name);
        }
    }
}
