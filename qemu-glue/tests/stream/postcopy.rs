//! A stream of pre-copy becomes one of post-copy, and a real QEMU asks for its pages.
//!
//! ```text
//! header, PING 1, ADVISE, blocks, pages of ROMs and out-of-date ones | DISCARD | package | answers … | END
//! ```

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use qemu_glue::stream::return_path::{ReturnMessage, ReturnReader};
use qemu_glue::stream::{
    Advise, BlockIndex, BlockList, Command, Configuration, Discard, DiscardRange, Event,
    PageContent, PageRecord, RamParts, Reader, SectionHeader, Writer,
};

use crate::loads::{Memory, Page, destination, incoming, note, ram_of};
use crate::support::{folder, programs};
use crate::{VERSIONS, capture};

/// Pages that are sent only when they are asked for.
const REQUESTS: usize = 20;

/// What a capture comes to.
struct Guest {
    configuration: Configuration,
    section: u32,
    blocks: Arc<BlockList>,
    memory: Memory,
    state: Vec<u8>,
}

impl Guest {
    fn read(bytes: &[u8]) -> Self {
        let (mut reader, mut input) = (Reader::new(), bytes);
        let (mut configuration, mut memory, mut state) = (None, Memory::new(), vec![]);
        while let Some(event) = reader.next(&mut input).unwrap() {
            match event {
                Event::Header(found) => configuration = Some(found),
                Event::Page(page) => note(&page, &mut memory),
                Event::DeviceState(bytes) => state.extend(bytes),
                _ => {}
            }
        }
        let (section, blocks) = (reader.ram_section().unwrap(), reader.blocks().unwrap().clone());
        Self { configuration: configuration.unwrap(), section, blocks, memory, state }
    }
}

/// The end of a connection that plays the source.
struct Source {
    socket: UnixStream,
    writer: Writer,
    parts: RamParts,
    guest: Guest,
    ram: BlockIndex,
    /// Offsets of the pages of RAM that have been sent since it was discarded.
    sent: BTreeSet<u64>,
}

impl Source {
    fn put(&mut self, events: &[Event<'_>]) {
        let mut out = Vec::new();
        events.iter().for_each(|event| self.writer.write(event, &mut out).unwrap());
        self.socket.write_all(&out).unwrap();
    }

    fn pages(&mut self, pages: &[(BlockIndex, u64, Page)]) {
        let mut out = Vec::new();
        for (block, offset_bytes, page) in pages {
            let (block, offset_bytes) = (*block, *offset_bytes);
            let content = PageContent::Whole(page);
            let record = PageRecord { block, offset_bytes, continued: true, content };
            self.parts.page(&mut self.writer, &record, &mut out).unwrap();
        }
        self.parts.close(&mut self.writer, &mut out).unwrap();
        self.socket.write_all(&out).unwrap();
    }

    /// Everything up to the package.
    fn before(&mut self) {
        let advise = Advise { ram_page_sizes: 4096, target_page_bytes: 4096 };
        let section = self.guest.section;
        self.put(&[
            Event::Header(self.guest.configuration.clone()),
            Event::Command(Command::OpenReturnPath),
            Event::Command(Command::Ping(1)),
            Event::Command(Command::PostcopyAdvise(Some(advise))),
            Event::SectionStart(SectionHeader { section, id: "ram", instance: 0, version: 4 }),
            Event::RamBlocks(Arc::clone(&self.guest.blocks)),
            Event::EndOfRecords,
            Event::Footer(section),
        ]);
        let ram = self.ram;
        let early = self.guest.memory.iter().map(|((block, offset), page)| {
            let out_of_date = *block == ram;
            (*block, *offset, if out_of_date { [0xaa; 4096] } else { *page })
        });
        let early: Vec<_> = early.collect();
        self.pages(&early);
        let ranges = [DiscardRange::new(0, 16 << 20)];
        let discard = Discard { block: "pc.ram", ranges: &ranges };
        self.put(&[Event::Command(Command::PostcopyRamDiscard(discard))]);
    }

    /// The package with the device state.
    fn package(&mut self) {
        let mut package = Vec::new();
        let events = [
            Event::Command(Command::PostcopyListen),
            Event::DeviceState(&self.guest.state),
            Event::Command(Command::Ping(3)),
            Event::Command(Command::PostcopyRun),
        ];
        let mut writer = Writer::new();
        events.iter().for_each(|event| writer.write(event, &mut package).unwrap());
        let size_bytes = u32::try_from(package.len()).unwrap();
        self.put(&[Event::Command(Command::Packaged { size_bytes }), Event::Bytes(&package)]);
    }

    /// Sends these pages of RAM, as far as they were not.
    fn serve(&mut self, offsets: &[u64]) {
        let fresh = offsets.iter().filter(|offset| self.sent.insert(**offset));
        let pages = fresh.map(|offset| {
            let page = self.guest.memory.get(&(self.ram, *offset)).copied();
            (self.ram, *offset, page.unwrap_or([0; 4096]))
        });
        let pages: Vec<_> = pages.collect();
        self.pages(&pages);
    }

    /// Sends what was not, and the end.
    fn rest(&mut self) {
        let all = self.guest.memory.keys().filter(|(block, _)| *block == self.ram);
        let all: Vec<_> = all.map(|(_, offset)| *offset).collect();
        self.serve(&all);
        let mut out = Vec::new();
        RamParts::new(self.guest.section).end(&mut self.writer, &mut out).unwrap();
        self.writer.write(&Event::EndOfState, &mut out).unwrap();
        self.socket.write_all(&out).unwrap();
    }

    /// Answers requests; when a few were, sends what is left. Returns how many there were.
    fn answer(mut self) -> usize {
        let (mut reader, mut buffer) = (ReturnReader::new(), [0; 512]);
        let (mut is_loaded, mut is_sent, mut requests) = (false, false, 0);
        loop {
            let count = self.socket.read(&mut buffer).unwrap();
            assert!(count > 0, "the destination has given up");
            let mut input = &buffer[..count];
            while let Some(message) = reader.next(&mut input).unwrap() {
                match message {
                    ReturnMessage::RequestPages(request) => {
                        // Only RAM was discarded.
                        assert!(request.block.is_none_or(|block| block == "pc.ram"));
                        self.serve(&[request.start_bytes]);
                        requests += 1;
                        if is_loaded && requests >= REQUESTS && !is_sent {
                            is_sent = true;
                            self.rest();
                        }
                    }
                    ReturnMessage::Pong(3) => is_loaded = true,
                    ReturnMessage::Shut { error } => {
                        assert_eq!(error, 0);
                        return requests;
                    }
                    message => assert_eq!(message, ReturnMessage::Pong(1)),
                }
            }
        }
    }
}

#[tokio::test]
async fn post_copy_made_of_pre_copy() {
    for version in VERSIONS {
        for program in programs() {
            let guest = Guest::read(&capture(version, "xbzrle"));
            let (ram, wanted) =
                (guest.blocks.find("pc.ram").unwrap(), ram_of(&guest.memory, &guest.blocks));
            let folder = folder();
            let qemu = destination(&program, folder.path(), &[]);
            let client = qemu.client().await;
            client.set_capabilities(&[("postcopy-ram", true)]).await.unwrap();
            let socket = incoming(&client).await;
            socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let (writer, parts) = (Writer::new(), RamParts::new(guest.section));
            let sent = BTreeSet::new();
            let mut source = Source { socket, writer, parts, guest, ram, sent };
            let serving = std::thread::spawn(move || {
                source.before();
                source.package();
                source.answer()
            });
            let requests = tokio::task::spawn_blocking(|| serving.join().unwrap()).await.unwrap();
            client.stop().await.unwrap();
            let found = std::fs::read(folder.path().join("ram")).unwrap();
            check(&found, &wanted);
            println!("{version} to {}: {requests} requests", program.name);
        }
    }
}

/// The guest goes on writing into 128 pages, two words each; the rest is as it was.
fn check(found: &[u8], wanted: &[u8]) {
    let mut is_written = 0;
    for (number, (found, wanted)) in found.chunks(4096).zip(wanted.chunks(4096)).enumerate() {
        if !(0x10..0x90).contains(&number) {
            assert!(found == wanted, "page {number}");
            continue;
        }
        let differ = |at: &usize| found[*at] != wanted[*at];
        let mut others = (0..4096).filter(|at| !matches!(at, 0x10 | 0x11 | 0xa00 | 0xa01));
        assert!(!others.any(|at| differ(&at)), "page {number}");
        is_written += usize::from(differ(&0x10) || differ(&0x11));
    }
    assert!(is_written > 100, "the guest has not gone on");
}
