//! What a stream is made of.

use std::sync::Arc;

use super::blocks::BlockList;
use super::command::Command;
use super::configuration::Configuration;
use super::record::PageRecord;

/// An element of the stream. Written in the same order, events give the same bytes again.
///
/// Bytes of pages, packages and device state are borrowed: from what the reader was fed, or where
/// they came in pieces, from the reader.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// Magic, version and configuration: how every stream begins, but for the contents of a package
    /// and for one that goes on after a broken connection.
    Header(Configuration),
    /// A command to the destination.
    Command(Command<'a>),
    /// A section that comes in parts begins: always `ram`. [`RamBlocks`](Self::RamBlocks) follow.
    SectionStart(SectionHeader<'a>),
    /// A further part of the section with this number; records follow.
    SectionPart(u32),
    /// The last part of it; records follow.
    SectionEnd(u32),
    /// A section as a whole that comes before the device state, as virtio-mem has one.
    /// [`Bytes`](Self::Bytes) follow.
    SectionFull(SectionHeader<'a>),
    /// All RAM blocks; records may follow.
    RamBlocks(Arc<BlockList>),
    /// A page.
    Page(PageRecord<'a>),
    /// A barrier for the channels of multifd.
    MultifdFlush,
    /// The records of this part end.
    EndOfRecords,
    /// The end of the section with this number, or of a part of it.
    Footer(u32),
    /// Bytes of a package or of a section as a whole, in pieces of any size.
    Bytes(&'a [u8]),
    /// Bytes of the device state, from the first section as a whole after RAM on, in pieces of any
    /// size.
    DeviceState(&'a [u8]),
    /// Nothing more is to be loaded.
    EndOfState,
    /// A description of the device state for people, in JSON; QEMU reads past it.
    Description(&'a [u8]),
}

/// How a section begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SectionHeader<'a> {
    /// The number by which its parts and footers refer to it, as the source chose it.
    pub section: u32,
    /// Its name.
    pub id: &'a str,
    /// Which of the sections with this name.
    pub instance: u32,
    /// The version of its contents.
    pub version: u32,
}

/// What is known of the stream's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndSign {
    /// More must come.
    None,
    /// The device state's last byte so far is the one that ends it, or belongs to it. Only the end
    /// of the connection, or QEMU's monitor, can tell.
    Possible,
    /// The description came, nothing after it: this is the end unless more comes.
    Described,
    /// The stream is over; nothing may follow but a description.
    Certain,
}
