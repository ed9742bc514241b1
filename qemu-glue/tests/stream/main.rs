//! Streams of real QEMUs (tests/data/stream/README.md): what is in them, and that they come back
//! byte for byte however they are cut.

#![expect(clippy::unwrap_used, reason = "a capture that is not as it was fails the test")]

mod contents;
mod loads;
mod pieces;
mod postcopy;
#[path = "../support/mod.rs"]
mod support;

use std::path::PathBuf;

use qemu_glue::stream::{Command, Event, PageContent, Reader, StreamError};

/// The versions of QEMU.
const VERSIONS: [&str; 2] = ["7.2", "10.0"];

/// A capture, unpacked.
fn capture(version: &str, name: &str) -> Vec<u8> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/stream");
    let file = folder.join(format!("{version}-{name}.zst"));
    zstd::decode_all(std::fs::File::open(&file).unwrap()).unwrap()
}

/// What a stream consists of.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Seen {
    machine: String,
    capabilities: Vec<String>,
    uuid: Option<[u8; 16]>,
    commands: Vec<String>,
    blocks: Vec<(String, u64)>,
    parts: usize,
    pages: Pages,
    flushes: usize,
    /// Pages after the package of post-copy.
    later: Pages,
    early: Vec<String>,
    packages: Vec<Vec<u8>>,
    state: Vec<u8>,
    is_ended: bool,
    description: Option<String>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Pages {
    zero: usize,
    whole: usize,
    delta: usize,
    named: usize,
}

impl Pages {
    fn sum(&self) -> usize {
        self.zero + self.whole + self.delta
    }
}

impl Seen {
    /// Takes note of an event.
    fn note(&mut self, event: &Event<'_>) {
        match event {
            Event::Header(configuration) => {
                self.machine.clone_from(&configuration.machine);
                self.capabilities.extend(configuration.capabilities().map(str::to_owned));
                for subsection in &configuration.subsections {
                    if let qemu_glue::stream::Subsection::Uuid(uuid) = subsection {
                        self.uuid = Some(*uuid);
                    }
                }
            }
            Event::Command(command) => {
                self.commands.push(match command {
                    Command::Ping(number) => format!("PING {number}"),
                    _ => command.name().to_owned(),
                });
                if matches!(command, Command::Packaged { .. }) {
                    self.packages.push(Vec::new());
                }
            }
            Event::RamBlocks(list) => {
                let named =
                    |block: &qemu_glue::stream::RamBlock| (block.name.clone(), block.length_bytes);
                self.blocks.extend(list.blocks().iter().map(named));
            }
            Event::SectionPart(_) => self.parts += 1,
            Event::SectionFull(header) => self.early.push(header.id.to_owned()),
            Event::Page(page) => {
                let pages =
                    if self.packages.is_empty() { &mut self.pages } else { &mut self.later };
                pages.named += usize::from(!page.continued);
                *match page.content {
                    PageContent::Zero { .. } => &mut pages.zero,
                    PageContent::Whole(_) => &mut pages.whole,
                    PageContent::Xbzrle(_) => &mut pages.delta,
                } += 1;
            }
            Event::MultifdFlush => self.flushes += 1,
            Event::Bytes(bytes) => {
                self.packages.iter_mut().for_each(|package| package.extend(*bytes));
            }
            Event::DeviceState(bytes) => self.state.extend(*bytes),
            Event::EndOfState => self.is_ended = true,
            Event::Description(text) => {
                self.description = Some(String::from_utf8(text.to_vec()).unwrap());
            }
            _ => {}
        }
    }

    /// Reads a whole stream.
    fn read(mut reader: Reader, bytes: &[u8]) -> Result<Self, StreamError> {
        let mut seen = Self::default();
        let mut input = bytes;
        while let Some(event) = reader.next(&mut input)? {
            seen.note(&event);
        }
        reader.finish()?;
        while let Some(event) = reader.next(&mut &[][..])? {
            seen.note(&event);
        }
        Ok(seen)
    }

    /// Reads a capture.
    fn of(version: &str, name: &str) -> Self {
        Self::read(Reader::new(), &capture(version, name)).unwrap()
    }

    fn block(&self, name: &str) -> Option<u64> {
        self.blocks.iter().find(|(found, _)| found == name).map(|(_, length_bytes)| *length_bytes)
    }

    /// Pages that the listed blocks have.
    fn all_pages(&self) -> usize {
        let bytes: u64 = self.blocks.iter().map(|(_, length_bytes)| length_bytes).sum();
        usize::try_from(bytes / 4096).unwrap()
    }
}
