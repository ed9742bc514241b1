//! The control messages: what they carry, their limits and their validation.
//!
//! The body of a message is postcard, which does not describe itself: a struct that was released
//! never changes; a change gets a new type number and a new protocol version. Every message is
//! validated after decoding and before encoding, by the same code.

mod split;
mod stream;

use std::fmt;
use std::str::FromStr;

use migrate_core::batch::LANES_MAX;
pub use migrate_core::handover::DestinationState;
use migrate_core::layout::{BLOCKS_MAX, BlockSpec, PAGE_BYTES, RamLayout};
use serde::{Deserialize, Serialize};

use self::split::SPLIT_BODY_BYTES;
pub use self::split::{RemoteEnd, STORES_MAX, Split, Store, Then};
use self::stream::{STREAM_BLOCKS_BODY_BYTES, STREAM_CHUNK_BODY_BYTES};
pub use self::stream::{
    STREAM_CHUNK_BYTES_MAX, StreamBack, StreamBlocks, StreamBytes, StreamEnd, StreamGuest,
    StreamHeard, StreamOpen, StreamOpened, StreamPostcopy, StreamResume, StreamResumed,
};
use crate::error::WireError;

/// Protocol versions that this build speaks, oldest first.
///
/// | version | what changed |
/// |---|---|
/// | 1 | the first |
/// | 2 | deltas, packed batches |
/// | 3 | post-copy |
/// | 4 | packed device state |
pub const VERSIONS: &[u16] = &[4];

/// Most versions that an offer may list.
pub const VERSIONS_MAX: usize = 16;

/// Longest text in a message, in bytes.
pub const TEXT_BYTES_MAX: usize = 1024;

/// Most digests in one [`VerifyChunk`].
pub const DIGESTS_MAX: usize = 8192;

/// Most words in one [`Missing`]: pages of 1 GiB.
pub const MISSING_WORDS_MAX: usize = 4096;

/// Most bytes of device state in one [`DeviceState`].
pub const DEVICE_CHUNK_BYTES_MAX: usize = 512 << 10;

/// Most bytes of device state in all. QEMU's is some 100 KB without RAM; video memory of devices
/// that keep it outside RAM blocks can add tens of MiB.
pub const DEVICE_STATE_BYTES_MAX: u64 = 256 << 20;

/// Highest page number plus one: the pages of the largest RAM that a layout may describe.
pub const PAGES_MAX: u64 = migrate_core::layout::RAM_BYTES_MAX / PAGE_BYTES as u64;

/// Room in bytes for the few integers of a message without lists.
const SMALL_BYTES: usize = 128;

/// Room in bytes for a message with one text.
const TEXT_BODY_BYTES: usize = TEXT_BYTES_MAX + SMALL_BYTES;

/// Room in bytes for a guest's description.
const DESCRIBE_BODY_BYTES: usize = 3 * TEXT_BYTES_MAX + BLOCKS_MAX * 280 + SMALL_BYTES;

/// Room in bytes for a list with an entry a lane.
const LANES_BODY_BYTES: usize = LANES_MAX * 10 + SMALL_BYTES;

/// Feature bit of the engine: guests whose memory is split over hosts are taken.
pub const FEATURE_SPLIT: u64 = 1;

/// Feature bit of the engine: guests come as their QEMU's stream.
pub const FEATURE_STREAM: u64 = 2;

/// Feature bit of the engine: a stream whose session is lost goes on in another one.
pub const FEATURE_STREAM_RESUME: u64 = 4;

/// Feature bit: lanes are TCP connections. At most one of the two bits of lanes is offered.
pub const FEATURE_LANES_TCP: u64 = 1 << 8;

/// Feature bit: every lane has a QUIC connection and a TCP connection. It begins on the first and
/// may go on over the second.
pub const FEATURE_LANES_BOTH: u64 = 1 << 9;

/// Feature bits whose meaning is the transport's own; the others are the engine's.
pub const FEATURES_OF_TRANSPORT: u64 = 0xff00;

/// Names a migration for all time: chosen at random by the source, kept in both journals.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MigrationId(pub [u8; 16]);

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MigrationId({self})")
    }
}

impl FromStr for MigrationId {
    type Err = WireError;

    /// Reads the 32 hexadecimal digits that [`fmt::Display`] writes.
    fn from_str(text: &str) -> Result<Self, WireError> {
        let bad = WireError::Field {
            what: "Migration id",
            field: "digits",
            value: text.len() as u64,
            rule: "32 hexadecimal digits are needed",
        };
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(bad);
        }
        u128::from_str_radix(text, 16).map(|id| Self(id.to_be_bytes())).map_err(|_| bad)
    }
}

/// What a client wants of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Intent {
    /// To bring a guest over.
    Migrate,
    /// To ask how an earlier migration ended; no lanes, only [`Ask`] and [`Verdict`].
    Ask,
    /// To go on with the missing pages of a guest that runs at the server already (post-copy), or with a stream whose
    /// session was lost.
    Resume,
}

/// Client, first message: what it speaks and wants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Protocol versions that the client speaks; 1 to [`VERSIONS_MAX`], none is 0.
    pub versions: Vec<u16>,
    /// Optional features that the client can use, as bits.
    pub features: u64,
    /// Name and version of the client's engine, for the log.
    pub engine: String,
    /// The migration that this session is about.
    pub migration: MigrationId,
    /// What is wanted.
    pub intent: Intent,
    /// Lanes that the client would open; 0 for [`Intent::Ask`], else 1 to `LANES_MAX`.
    pub lanes: u16,
}

impl Offer {
    /// An offer of everything that this build speaks. [`connect`](crate::connect) fills in lanes
    /// and features from its options.
    pub fn new(engine: &str, migration: MigrationId, intent: Intent) -> Self {
        Self {
            versions: VERSIONS.to_vec(),
            features: 0,
            engine: text(engine),
            migration,
            intent,
            lanes: u16::from(intent != Intent::Ask),
        }
    }
}

/// Server, answer to [`Offer`]: what is used in this session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Select {
    /// One of the offered versions: the highest that both speak.
    pub version: u16,
    /// The offered features that the server can use too.
    pub features: u64,
    /// Lanes to open, at most as many as offered.
    pub lanes: u16,
    /// Random; every lane shows it to be let into this session.
    pub token: [u8; 16],
}

/// Why an offer is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RejectCode {
    /// No version is spoken by both.
    Version,
    /// Too many sessions wait already; try later.
    Busy,
}

/// Server, answer to [`Offer`]: no session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reject {
    /// Why, for programs.
    pub code: RejectCode,
    /// Why, for people.
    pub text: String,
}

/// Server: all lanes have arrived, the session is complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    /// How many lanes there are.
    pub lanes: u16,
}

/// Source: the guest that it wants to bring.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Describe {
    /// The guest's name, for the log.
    pub vm_name: String,
    /// The guest's UUID as QEMU reports it, if it has one.
    pub vm_uuid: Option<String>,
    /// QEMU's machine type, with its version (`pc-i440fx-7.2`).
    pub machine: String,
    /// Version of the source's QEMU: major, minor, micro.
    pub qemu_version: (u32, u32, u32),
    /// The guest's page size in bytes.
    pub page_bytes: u32,
    /// The guest's RAM.
    pub blocks: Vec<BlockSpec>,
    /// Whether the source will ask for digests of all pages before the commit.
    pub verify: bool,
    /// Whether the source may hand the guest over while pages are missing.
    pub post_copy: bool,
}

/// Destination, answer to [`Describe`]: this guest fits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accept {
    /// Version of the destination's QEMU: major, minor, micro.
    pub qemu_version: (u32, u32, u32),
    /// Bytes of the destination's RAM that are populated before the first batch: firmware that
    /// QEMU loaded. Where it is not 0, pages of zeros must be sent as such.
    pub resident_bytes: u64,
    /// Why this place cannot take a guest with missing pages; nothing if it can, or was not asked to.
    pub no_post_copy: Option<String>,
}

/// Why a guest is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefuseCode {
    /// Machine type, RAM or page size differ.
    Layout,
    /// The QEMU versions do not go together.
    Qemu,
    /// No QEMU waits for a guest here, or it waits for another.
    NoPlace,
    /// Too little memory.
    Memory,
    /// A migration of this guest, or with this id, goes on already.
    Busy,
    /// Something failed here; the text says what.
    Internal,
}

/// Destination, answer to [`Describe`]: this guest cannot come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refuse {
    /// Why, for programs.
    pub code: RefuseCode,
    /// Why, for people.
    pub text: String,
}

/// Destination, from time to time: what has been written to the guest's RAM. The source bounds
/// what is in flight with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes of page contents applied since the session began.
    pub applied_bytes: u64,
    /// Batches applied, per lane.
    pub applied_batches: Vec<u64>,
}

/// Source: everything up to here must be in place before the answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sync {
    /// Chosen by the source, returned in [`Synced`].
    pub sequence: u32,
    /// Batches sent, per lane.
    pub batches: Vec<u64>,
}

/// Destination, answer to [`Sync`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Synced {
    /// From the [`Sync`] that is answered.
    pub sequence: u32,
    /// Digest of the versions of all pages; the source compares it with its own.
    pub version_digest: u64,
}

/// Source, guest stopped: asks for digests of all pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyRequest {
    /// Seed of the hash, so that the digests cannot be prepared.
    pub seed: u64,
}

/// Destination, answer to [`VerifyRequest`], in ascending order without gaps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyChunk {
    /// The page that the first digest belongs to.
    pub first_page: u64,
    /// Digests of consecutive pages; 1 to [`DIGESTS_MAX`].
    pub digests: Vec<u64>,
}

/// Destination: the last [`VerifyChunk`] was sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyEnd {
    /// How many digests were sent in all.
    pub pages: u64,
}

/// Source: the guest is about to be handed over while pages are missing. The [`Missing`] pages named
/// so far were dropped when the answer comes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {}

/// Destination, answer to [`Prepare`]: page faults can be served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {}

/// A part of the set of missing pages, in ascending order.
///
/// From the source before [`Load`]: the destination drops what it holds of them; no batch is under
/// way then (the source has seen [`Synced`]). From the source in a session to resume: the pages that
/// may be missing. From the destination there: those of them that are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// The page of the first word's lowest bit; a multiple of 64.
    pub first_page: u64,
    /// Bits of consecutive pages, the first in the lowest bit; 1 to [`MISSING_WORDS_MAX`].
    pub words: Vec<u64>,
}

/// The last [`Missing`] was sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingEnd {
    /// How many pages are missing in all.
    pub pages: u64,
}

/// Destination: the guest waits for this page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// The page.
    pub page: u64,
}

/// Source: a part of QEMU's device state, in ascending order without gaps. Some of it is written while
/// the guest still runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// Where the part begins, in bytes from the start of the device state.
    pub offset: u64,
    /// Length of the part in bytes: 1 to [`DEVICE_CHUNK_BYTES_MAX`].
    pub part_bytes: u32,
    /// The part as a block of LZ4, or as it is if it is as long as that.
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
}

/// Source: all was sent, load it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// Length of the device state in bytes.
    pub total_bytes: u64,
    /// Digest of the device state.
    pub digest: u64,
    /// Digest of the versions of all pages, to be compared before loading.
    pub version_digest: u64,
}

/// Destination, answer to [`Load`]: the guest is complete and paused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// How long loading the device state took, in microseconds.
    pub load_us: u64,
    /// Digest of the versions of all pages at the time of loading.
    pub version_digest: u64,
    /// QEMU's run state, as read back after loading.
    pub run_state: String,
}

/// Source: the guest is handed over. From here on the source never resumes it by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// The migration, repeated so that a commit can never be taken for another one's.
    pub migration: MigrationId,
    /// Whether the guest is to run: it does not if it was paused at the source.
    pub resume: bool,
}

/// Destination, answer to [`Commit`]: the guest runs here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// From the arrival of [`Commit`] until QEMU said that the guest runs, in microseconds.
    pub resume_us: u64,
    /// The guest's page faults; nothing without post-copy.
    pub faults: Option<FaultStats>,
}

/// What the page faults of a guest cost that ran while pages were missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultStats {
    /// Faults on missing pages.
    pub count: u64,
    /// Of those, faults on pages that were on their way already.
    pub waited: u64,
    /// Median time from a page's first fault until it was there, in microseconds.
    pub p50_us: u64,
    /// 99th percentile of it in microseconds.
    pub p99_us: u64,
    /// Longest in microseconds.
    pub max_us: u64,
}

/// Why a migration ends early.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum AbortCode {
    /// Somebody asked for it.
    Cancelled,
    /// Convergence within the asked limits is not possible.
    NotConverging,
    /// QEMU failed or is gone.
    Qemu,
    /// Memory could not be read, written or tracked.
    Memory,
    /// Digests differ.
    Mismatch,
    /// The other end broke the protocol.
    Protocol,
    /// Something took longer than allowed.
    Timeout,
    /// Something else; the text says what.
    Internal,
}

/// Either end, before [`Commit`]: the migration ends, the guest stays at the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Abort {
    /// Why, for programs.
    pub code: AbortCode,
    /// Why, for people.
    pub text: String,
}

/// Source: the destination's last word was heard, and nothing more is wanted. The answer is the end of the
/// session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {}

/// Client with [`Intent::Ask`]: how did that migration end?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// The migration asked about.
    pub migration: MigrationId,
}

/// Server, answer to [`Ask`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// What the destination knows.
    pub state: DestinationState,
    /// More, for people.
    pub text: String,
}

/// A body of a message: its own rules beyond its types.
pub(crate) trait Body {
    /// Checks what the types do not say.
    fn validate(&self) -> Result<(), WireError>;
}

/// Ties every message to its type number and to the most bytes that its body may have.
macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $bytes_max:expr;)*) => {
        /// Any control message.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum Message {
            $($(#[$doc])* $name($name),)*
        }

        impl Message {
            /// The message's name, for errors and logs.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$name(_) => stringify!($name),)* }
            }

            /// The type number on the wire.
            pub fn type_number(&self) -> u16 {
                match self { $(Self::$name(_) => $number,)* }
            }

            /// Checks the rules that the types do not express.
            ///
            /// # Errors
            /// [`WireError::Field`] with the first field that breaks a rule.
            pub fn validate(&self) -> Result<(), WireError> {
                match self { $(Self::$name(body) => body.validate(),)* }
            }

            pub(crate) fn encode_body(&self) -> Result<Vec<u8>, postcard::Error> {
                match self { $(Self::$name(body) => postcard::to_stdvec(body),)* }
            }

            pub(crate) fn decode_body(number: u16, body: &[u8]) -> Result<Self, WireError> {
                match number {
                    $($number => {
                        let (body, rest) = postcard::take_from_bytes::<$name>(body)
                            .map_err(|source| WireError::Body { what: stringify!($name), source })?;
                        if !rest.is_empty() {
                            return Err(WireError::Trailing {
                                what: stringify!($name),
                                bytes: rest.len(),
                            });
                        }
                        body.validate()?;
                        Ok(Self::$name(body))
                    })*
                    found => Err(WireError::UnknownType { found }),
                }
            }
        }

        /// Name of a type number and the most bytes that its body may have, or nothing.
        pub fn message_type(number: u16) -> Option<(&'static str, usize)> {
            match number {
                $($number => Some((stringify!($name), $bytes_max)),)*
                _ => None,
            }
        }

        /// All type numbers in ascending order.
        pub const TYPE_NUMBERS: &[u16] = &[$($number),*];
    };
}

messages! {
    /// Client: what it speaks and wants.
    Offer = 1, TEXT_BODY_BYTES;
    /// Server: what is used.
    Select = 2, SMALL_BYTES;
    /// Server: no session.
    Reject = 3, TEXT_BODY_BYTES;
    /// Server: all lanes arrived.
    Joined = 4, SMALL_BYTES;
    /// Source: the guest.
    Describe = 16, DESCRIBE_BODY_BYTES;
    /// Destination: the guest fits.
    Accept = 17, TEXT_BODY_BYTES;
    /// Destination: the guest cannot come.
    Refuse = 18, TEXT_BODY_BYTES;
    /// Destination: what was applied.
    Progress = 32, LANES_BODY_BYTES;
    /// Source: wait until all is applied.
    Sync = 33, LANES_BODY_BYTES;
    /// Destination: all is applied.
    Synced = 34, SMALL_BYTES;
    /// Source: send digests of all pages.
    VerifyRequest = 35, SMALL_BYTES;
    /// Destination: some digests.
    VerifyChunk = 36, DIGESTS_MAX * 10 + SMALL_BYTES;
    /// Destination: no more digests.
    VerifyEnd = 37, SMALL_BYTES;
    /// Source: pages will be missing.
    Prepare = 40, SMALL_BYTES;
    /// Destination: it is prepared for that.
    Prepared = 41, SMALL_BYTES;
    /// Either: some of the missing pages.
    Missing = 42, MISSING_WORDS_MAX * 10 + SMALL_BYTES;
    /// Either: no more of them.
    MissingEnd = 43, SMALL_BYTES;
    /// Destination: the guest waits for a page.
    Request = 44, SMALL_BYTES;
    /// Source: the guest's memory is split.
    Split = 45, SPLIT_BODY_BYTES;
    /// Source: these pages lie on a memory server.
    RemoteEnd = 46, SMALL_BYTES;
    /// Source: a part of the device state.
    DeviceState = 48, DEVICE_CHUNK_BYTES_MAX + SMALL_BYTES;
    /// Source: load the guest.
    Load = 49, SMALL_BYTES;
    /// Destination: loaded and paused.
    Ready = 50, TEXT_BODY_BYTES;
    /// Source: the guest is handed over.
    Commit = 51, SMALL_BYTES;
    /// Destination: the guest runs.
    Running = 52, SMALL_BYTES;
    /// Either: the migration ends.
    Abort = 53, TEXT_BODY_BYTES;
    /// Source: the last word was heard.
    Done = 54, SMALL_BYTES;
    /// Source: a QEMU is about to send a guest.
    StreamOpen = 56, TEXT_BODY_BYTES;
    /// Destination: the QEMU there is connected.
    StreamOpened = 57, SMALL_BYTES;
    /// Source: the stream's RAM.
    StreamBlocks = 58, STREAM_BLOCKS_BODY_BYTES;
    /// Source: bytes of the stream.
    StreamBytes = 59, STREAM_CHUNK_BODY_BYTES;
    /// Destination: bytes of the return path.
    StreamBack = 60, STREAM_CHUNK_BODY_BYTES;
    /// Either: no more bytes.
    StreamEnd = 61, SMALL_BYTES;
    /// Source: the guest is about to run at the destination; every page comes once from now on.
    StreamPostcopy = 62, SMALL_BYTES;
    /// Source: the guest that its QEMU will send.
    StreamGuest = 63, DESCRIBE_BODY_BYTES;
    /// Client: how did a migration end?
    Ask = 64, SMALL_BYTES;
    /// Server: so it did.
    Verdict = 65, TEXT_BODY_BYTES;
    /// Either: so much of the stream was taken.
    StreamHeard = 66, SMALL_BYTES;
    /// Source: a stream goes on.
    StreamResume = 67, SMALL_BYTES;
    /// Destination: from here on.
    StreamResumed = 68, LANES_BODY_BYTES;
}

/// Makes any text fit for a message: control characters become spaces, and what exceeds
/// [`TEXT_BYTES_MAX`] is cut off at a character's end.
pub fn text(from: &str) -> String {
    let mut to = String::with_capacity(from.len().min(TEXT_BYTES_MAX));
    for c in from.chars().map(|c| if c.is_control() { ' ' } else { c }) {
        if to.len() + c.len_utf8() > TEXT_BYTES_MAX {
            break;
        }
        to.push(c);
    }
    to
}

fn rule(
    holds: bool,
    what: &'static str,
    field: &'static str,
    value: u64,
    rule: &'static str,
) -> Result<(), WireError> {
    if holds { Ok(()) } else { Err(WireError::Field { what, field, value, rule }) }
}

fn check_text(what: &'static str, field: &'static str, text: &str) -> Result<(), WireError> {
    let bytes = text.len() as u64;
    rule(text.len() <= TEXT_BYTES_MAX, what, field, bytes, "a text has at most 1024 bytes")?;
    let control = text.chars().find(|c| c.is_control()).map_or(0, u64::from);
    let clean = !text.chars().any(char::is_control);
    rule(clean, what, field, control, "a text has no control characters")
}

fn check_lanes(what: &'static str, field: &'static str, lanes: usize) -> Result<(), WireError> {
    rule(lanes <= LANES_MAX, what, field, lanes as u64, "a session has at most 64 lanes")
}

fn check_digest_range(first_page: u64, count: usize) -> Result<(), WireError> {
    let what = "VerifyChunk";
    let in_range = (1..=DIGESTS_MAX).contains(&count);
    rule(in_range, what, "digests", count as u64, "1 to 8192 digests are allowed")?;
    let end = first_page.checked_add(count as u64).filter(|end| *end <= PAGES_MAX);
    rule(end.is_some(), what, "first_page", first_page, "pages end at 2^34")
}

impl Body for Offer {
    fn validate(&self) -> Result<(), WireError> {
        let what = "Offer";
        let count = self.versions.len();
        let in_range = (1..=VERSIONS_MAX).contains(&count);
        rule(in_range, what, "versions", count as u64, "1 to 16 versions are allowed")?;
        rule(!self.versions.contains(&0), what, "versions", 0, "version 0 does not exist")?;
        check_text(what, "engine", &self.engine)?;
        check_lanes(what, "lanes", usize::from(self.lanes))?;
        let fits = (self.lanes == 0) == (self.intent == Intent::Ask);
        let lanes = u64::from(self.lanes);
        rule(fits, what, "lanes", lanes, "a migration has lanes, a question has none")
    }
}

impl Body for Select {
    fn validate(&self) -> Result<(), WireError> {
        rule(self.version != 0, "Select", "version", 0, "version 0 does not exist")?;
        check_lanes("Select", "lanes", usize::from(self.lanes))
    }
}

impl Body for Reject {
    fn validate(&self) -> Result<(), WireError> {
        check_text("Reject", "text", &self.text)
    }
}

impl Body for Joined {
    fn validate(&self) -> Result<(), WireError> {
        check_lanes("Joined", "lanes", usize::from(self.lanes))
    }
}

/// The blocks make up a guest's RAM.
fn check_blocks(what: &'static str, blocks: &[BlockSpec]) -> Result<(), WireError> {
    let count = blocks.len() as u64;
    rule(blocks.len() <= BLOCKS_MAX, what, "blocks", count, "at most 512 are allowed")?;
    for block in blocks {
        check_text(what, "blocks.name", &block.name)?;
    }
    RamLayout::new(blocks.to_vec()).map(drop).map_err(|source| WireError::Layout { what, source })
}

impl Body for Describe {
    fn validate(&self) -> Result<(), WireError> {
        let what = "Describe";
        check_text(what, "vm_name", &self.vm_name)?;
        check_text(what, "machine", &self.machine)?;
        if let Some(uuid) = &self.vm_uuid {
            check_text(what, "vm_uuid", uuid)?;
        }
        let page = self.page_bytes;
        let fits = page.is_power_of_two() && page as usize >= PAGE_BYTES;
        rule(fits, what, "page_bytes", u64::from(page), "a power of two from 4096 on is needed")?;
        check_blocks(what, &self.blocks)
    }
}

impl Body for Accept {
    fn validate(&self) -> Result<(), WireError> {
        let fits = self.resident_bytes <= migrate_core::layout::RAM_BYTES_MAX;
        rule(fits, "Accept", "resident_bytes", self.resident_bytes, "RAM has at most 64 TiB")?;
        let text = self.no_post_copy.as_deref().unwrap_or_default();
        check_text("Accept", "no_post_copy", text)
    }
}

impl Body for Refuse {
    fn validate(&self) -> Result<(), WireError> {
        check_text("Refuse", "text", &self.text)
    }
}

impl Body for Progress {
    fn validate(&self) -> Result<(), WireError> {
        check_lanes("Progress", "applied_batches", self.applied_batches.len())
    }
}

impl Body for Sync {
    fn validate(&self) -> Result<(), WireError> {
        check_lanes("Sync", "batches", self.batches.len())
    }
}

impl Body for VerifyChunk {
    fn validate(&self) -> Result<(), WireError> {
        check_digest_range(self.first_page, self.digests.len())
    }
}

impl Body for VerifyEnd {
    fn validate(&self) -> Result<(), WireError> {
        rule(self.pages <= PAGES_MAX, "VerifyEnd", "pages", self.pages, "pages end at 2^34")
    }
}

impl Body for Missing {
    fn validate(&self) -> Result<(), WireError> {
        let (what, first, words) = ("Missing", self.first_page, self.words.len());
        let in_range = (1..=MISSING_WORDS_MAX).contains(&words);
        rule(in_range, what, "words", words as u64, "1 to 4096 words are allowed")?;
        rule(first.is_multiple_of(64), what, "first_page", first, "a multiple of 64 is needed")?;
        let end = first.checked_add(64 * words as u64).filter(|end| *end <= PAGES_MAX);
        rule(end.is_some(), what, "first_page", first, "pages end at 2^34")
    }
}

impl Body for MissingEnd {
    fn validate(&self) -> Result<(), WireError> {
        rule(self.pages <= PAGES_MAX, "MissingEnd", "pages", self.pages, "pages end at 2^34")
    }
}

impl Body for Request {
    fn validate(&self) -> Result<(), WireError> {
        rule(self.page < PAGES_MAX, "Request", "page", self.page, "pages end at 2^34")
    }
}

impl Body for DeviceState {
    fn validate(&self) -> Result<(), WireError> {
        let what = "DeviceState";
        let (bytes, part_bytes) = (self.bytes.len(), self.part_bytes as usize);
        let in_range = (1..=DEVICE_CHUNK_BYTES_MAX).contains(&part_bytes);
        rule(in_range, what, "part_bytes", part_bytes as u64, "1 to 524288 bytes are allowed")?;
        let is_packed = (1..=part_bytes).contains(&bytes);
        rule(is_packed, what, "bytes", bytes as u64, "at most as many as the part has")?;
        let end = self.offset.checked_add(part_bytes as u64);
        let fits = end.is_some_and(|end| end <= DEVICE_STATE_BYTES_MAX);
        rule(fits, what, "offset", self.offset, "device state ends at 256 MiB")
    }
}

impl Body for Load {
    fn validate(&self) -> Result<(), WireError> {
        let total = self.total_bytes;
        let fits = total <= DEVICE_STATE_BYTES_MAX;
        rule(fits, "Load", "total_bytes", total, "device state ends at 256 MiB")
    }
}

impl Body for Ready {
    fn validate(&self) -> Result<(), WireError> {
        check_text("Ready", "run_state", &self.run_state)
    }
}

impl Body for Abort {
    fn validate(&self) -> Result<(), WireError> {
        check_text("Abort", "text", &self.text)
    }
}

impl Body for Verdict {
    fn validate(&self) -> Result<(), WireError> {
        check_text("Verdict", "text", &self.text)
    }
}

/// Messages that their types describe completely.
macro_rules! unconditional {
    ($($name:ident),*) => {
        $(impl Body for $name {
            fn validate(&self) -> Result<(), WireError> {
                Ok(())
            }
        })*
    };
}

unconditional!(Synced, VerifyRequest, Prepare, Prepared, Commit, Running, Done, Ask);
