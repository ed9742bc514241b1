//! Shared by the session tests: authorities and identities, options, sessions, batches.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use migrate_core::batch::{PageRun, RunKind};
use migrate_core::layout::{PAGE_BYTES, PageIndex};
use tempfile::TempDir;
use transport::messages::{Intent, MigrationId, Offer};
use transport::pki::{InitOptions, IssueOptions, init, issue};
use transport::{
    Batch, DestinationSession, Identity, LaneKind, Listener, Options, SourceSession, connect,
};

/// What a lane can be carried by: everything holds for each.
pub(crate) const KINDS: [LaneKind; 3] = [LaneKind::Quic, LaneKind::Tcp, LaneKind::Auto];

/// Two authorities and the identities `a`, `b` (of the first) and `stranger` (of the second).
pub(crate) struct Pki {
    pub(crate) dir: TempDir,
}

impl Pki {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        init(&one, &InitOptions::default()).unwrap();
        init(&two, &InitOptions::default()).unwrap();
        for name in ["a", "b"] {
            issue(&one, name, &IssueOptions::default()).unwrap();
        }
        issue(&two, "stranger", &IssueOptions::default()).unwrap();
        Self { dir }
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.dir.path().join("one")
    }

    /// An identity of the first authority that expired five days ago.
    pub(crate) fn issue_expired(&self, name: &str) -> PathBuf {
        let old = IssueOptions { days: 5, backdate_days: 10, out_dir: None };
        issue(&self.ca(), name, &old).unwrap()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        let authority = if name == "stranger" { "two" } else { "one" };
        self.dir.path().join(authority).join(name)
    }

    pub(crate) fn identity(&self, name: &str) -> Identity {
        load(&self.path(name))
    }
}

pub(crate) fn load(path: &Path) -> Identity {
    Identity::load(path).unwrap()
}

/// Options that make tests quick.
pub(crate) fn options() -> Options {
    Options {
        lanes: 3,
        dead_peer: Duration::from_millis(600),
        handshake_timeout: Duration::from_secs(2),
        udp_buffer_bytes: 1 << 20,
        ..Options::default()
    }
}

/// The same with lanes of a kind. Where they have both kinds of connections they go over to TCP at
/// the first batch after a tenth of a second.
pub(crate) fn options_of(lane_kind: LaneKind) -> Options {
    Options { lane_kind, fast_bits_per_s: 1, ..options() }
}

pub(crate) fn any_port() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 0))
}

pub(crate) fn offer(intent: Intent) -> Offer {
    Offer::new("test 1", MigrationId([7; 16]), intent)
}

pub(crate) fn listen(pki: &Pki) -> Listener {
    Listener::bind(any_port(), &pki.identity("b"), &options()).unwrap()
}

/// A session between `a` and a listener of `b`.
pub(crate) async fn pair(pki: &Pki) -> (SourceSession, DestinationSession, Listener) {
    pair_of(pki, LaneKind::Quic).await
}

/// The same with lanes of a kind.
pub(crate) async fn pair_of(
    pki: &Pki,
    kind: LaneKind,
) -> (SourceSession, DestinationSession, Listener) {
    let mut listener = listen(pki);
    let addr = listener.local_addr();
    let identity = pki.identity("a");
    let options = options_of(kind);
    let (source, destination) =
        tokio::join!(connect(addr, &identity, &options, offer(Intent::Migrate)), listener.accept());
    (source.unwrap(), destination.unwrap(), listener)
}

/// A batch of one raw run and one run of zeros.
pub(crate) fn batch(first: u64, pages: u16, fill: u8) -> Batch {
    let raw = PageRun { first: PageIndex(first), pages, kind: RunKind::Raw, version: 1 };
    let zero = PageRun {
        first: PageIndex(first + u64::from(pages)),
        pages: 5,
        kind: RunKind::Zero,
        version: 2,
    };
    let content = vec![fill; usize::from(pages) * PAGE_BYTES];
    Batch::plain(vec![raw, zero], content, 3)
}
