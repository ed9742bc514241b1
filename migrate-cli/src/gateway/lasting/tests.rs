//! Streams over real sessions on loopback that are broken off again and again, and sessions that are refused.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migrate_core::batch::{PageRun, RunKind};
use migrate_core::layout::PageIndex;
use tokio::sync::mpsc;
use transport::messages::{
    FEATURE_STREAM_RESUME, Intent, Message, MigrationId, RefuseCode, StreamBack, StreamBytes,
    StreamResume,
};
use transport::pki::{InitOptions, IssueOptions, init, issue};
use transport::{
    Batch, DestinationSession, Identity, LaneKind, Listener, Offer, Options, SourceSession,
};

use super::*;
use crate::source::gate::Gate;
use crate::source::lanes::LaneTasks;
use crate::source::link::Link;

const MIGRATION: MigrationId = MigrationId([7; 16]);

/// Messages each way, and batches a lane.
const MESSAGES: u64 = 3000;

/// Longer than any of this takes.
const LONG: Duration = Duration::from_secs(60);

/// A listener with its streams, and hosts that know it.
struct Site {
    _folder: tempfile::TempDir,
    hosts: [Arc<Identity>; 2],
    addr: SocketAddr,
    awaited: Awaited,
    sessions: mpsc::Receiver<DestinationSession>,
}

fn options(lane_kind: LaneKind) -> Options {
    Options {
        lanes: 2,
        lane_kind,
        dead_peer: Duration::from_secs(2),
        udp_buffer_bytes: 1 << 20,
        features: FEATURE_STREAM_RESUME,
        ..Options::default()
    }
}

impl Site {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        init(folder.path(), &InitOptions::default()).unwrap();
        let [here, other, there] = ["a", "c", "b"].map(|name| {
            let path = issue(folder.path(), name, &IssueOptions::default()).unwrap();
            Arc::new(Identity::load(&path).unwrap())
        });
        let addr = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut listener = Listener::bind(addr, &there, &options(LaneKind::Quic)).unwrap();
        let (addr, awaited) = (listener.local_addr(), Awaited::default());
        let (queue, sessions) = mpsc::channel(4);
        let streams = awaited.clone();
        tokio::spawn(async move {
            while let Ok(session) = listener.accept().await {
                let streams = streams.clone();
                match session.intent {
                    Intent::Resume => {
                        tokio::spawn(async move { streams.hand_over(session).await });
                    }
                    _ => queue.send(session).await.unwrap(),
                }
            }
        });
        Self { _folder: folder, hosts: [here, other], addr, awaited, sessions }
    }

    async fn connect(&self, host: usize, intent: Intent, kind: LaneKind) -> SourceSession {
        let offer = Offer::new("test", MIGRATION, intent);
        transport::connect(self.addr, &self.hosts[host], &options(kind), offer).await.unwrap()
    }

    /// A stream with both of its ends.
    async fn stream(
        &mut self,
        kind: LaneKind,
        within: Duration,
    ) -> (Leaving, Link, LaneTasks, Arriving) {
        let session = self.connect(0, Intent::Migrate, kind).await;
        let there = self.sessions.recv().await.unwrap();
        let place = self.awaited.enter(&there).unwrap();
        assert!(self.awaited.enter(&there).is_none(), "it is there already");
        let again = Again {
            name: "test".into(),
            addr: self.addr,
            identity: Arc::clone(&self.hosts[0]),
            options: options(kind),
            migration: MIGRATION,
            within,
        };
        let gate = Arc::new(Gate::new(None));
        let (leaving, link, lanes) = Leaving::start(session, again, gate, Instant::now());
        (leaving, link, lanes, Arriving::start(there, place, within))
    }

    /// How a session that is to replace another is answered.
    async fn refused(&self, host: usize) -> RefuseCode {
        let mut session = self.connect(host, Intent::Resume, LaneKind::Quic).await;
        match session.control_receiver.recv().await.unwrap() {
            Message::Refuse(refuse) => refuse.code,
            other => panic!("{other:?}"),
        }
    }
}

fn batch(number: u64) -> Batch {
    let run = PageRun { first: PageIndex(number), pages: 1, kind: RunKind::Raw, version: 1 };
    Batch::plain(vec![run], vec![number as u8; 4096], 0)
}

/// Bytes of a size that varies, by which they are told apart.
fn bytes(number: u64) -> Vec<u8> {
    let mut bytes = number.to_le_bytes().to_vec();
    bytes.resize(8 + (number * 7919 % 5000) as usize, number as u8);
    bytes
}

async fn take_lane(mut lane: mpsc::Receiver<Batch>) {
    for number in 0..MESSAGES {
        assert_eq!(lane.recv().await.unwrap(), batch(number));
    }
}

/// Everything arrives once and in order, whoever breaks off when.
async fn all_arrives(kind: LaneKind) {
    let mut site = Site::new();
    let (leaving, mut link, mut lanes, mut arriving) = site.stream(kind, LONG).await;
    let mut tasks = tokio::task::JoinSet::new();
    for queue in lanes.queues() {
        tasks.spawn(async move {
            for number in 0..MESSAGES {
                queue.send(batch(number)).await.unwrap();
            }
        });
    }
    arriving.batches().into_iter().for_each(|lane| drop(tasks.spawn(take_lane(lane))));
    let control = Arc::clone(arriving.control());
    tasks.spawn(async move {
        for number in 0..MESSAGES {
            let back = StreamBack { bytes: bytes(number) };
            control.send(Message::StreamBack(back)).await.unwrap();
        }
    });
    let cuts = tokio::spawn({
        let (here, there) = (leaving.cutter(), arriving.cutter());
        async move {
            for turn in 0u64.. {
                tokio::time::sleep(Duration::from_millis(5 + turn * 37 % 60)).await;
                match turn % 3 {
                    0 => here(),
                    1 => there(),
                    _ => {
                        here();
                        there();
                    }
                }
            }
        }
    });
    let here = async {
        for number in 0..MESSAGES {
            let part = StreamBytes { bytes: bytes(number) };
            link.send(Message::StreamBytes(part)).await.unwrap();
            let back = Message::StreamBack(StreamBack { bytes: bytes(number) });
            assert_eq!(link.recv().await.unwrap(), back);
        }
    };
    let there = async {
        for number in 0..MESSAGES {
            let part = Message::StreamBytes(StreamBytes { bytes: bytes(number) });
            assert_eq!(arriving.recv().await.unwrap(), part);
        }
    };
    tokio::join!(here, there);
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
    cuts.abort();
    let _aborted = cuts.await;
    tokio::join!(leaving.close(None), arriving.close(None));
    let why = arriving.recv().await.unwrap_err();
    assert!(why.tell().contains("done"), "{why:?}");
    let (here, there) = (leaving.reconnects(), arriving.reconnects());
    assert!(here > 3 && there >= here, "{here} {there}");
    println!("{here} and {there} sessions after the first");
}

#[tokio::test(flavor = "multi_thread")]
async fn all_arrives_once_and_in_order() {
    for kind in [LaneKind::Quic, LaneKind::Tcp, LaneKind::Auto] {
        all_arrives(kind).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_no_right_to_a_stream_is_refused_and_it_goes_on() {
    let mut site = Site::new();
    assert_eq!(site.refused(0).await, RefuseCode::NoPlace, "there is none");
    let (leaving, mut link, _lanes, mut arriving) = site.stream(LaneKind::Quic, LONG).await;
    assert_eq!(site.refused(1).await, RefuseCode::NoPlace, "another host's");
    assert_eq!(leaving.reconnects(), 0);
    // One that says nothing is waited for, and no other meanwhile.
    let silent = site.connect(0, Intent::Resume, LaneKind::Quic).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(site.refused(0).await, RefuseCode::Busy);
    link.send(Message::StreamBytes(StreamBytes { bytes: bytes(1) })).await.unwrap();
    let part = Message::StreamBytes(StreamBytes { bytes: bytes(1) });
    assert_eq!(arriving.recv().await.unwrap(), part);
    assert!(silent.closer.close_reason().is_some());
    assert_eq!((leaving.reconnects(), arriving.reconnects()), (1, 1));
    drop(arriving);
    let why = link.recv().await.unwrap_err();
    assert!(matches!(why, EngineError::Transport(_)) && !is_loss(&why), "{why:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_that_cannot_be_end_it() {
    let mut site = Site::new();
    let (_leaving, mut link, _lanes, mut arriving) = site.stream(LaneKind::Quic, LONG).await;
    let mut liar = site.connect(0, Intent::Resume, LaneKind::Quic).await;
    let more = Message::StreamResume(StreamResume { messages: 1 });
    liar.control_sender.send(&more).await.unwrap();
    let answer = liar.control_receiver.recv().await.unwrap();
    assert!(matches!(answer, Message::Abort(_)), "{answer:?}");
    let why = arriving.recv().await.unwrap_err();
    assert!(why.tell().contains("1 messages or batches came of 0"), "{why:?}");
    let why = link.recv().await.unwrap_err();
    assert!(why.tell().contains("no stream of this migration waits here"), "{why:?}");
    let part = Message::StreamBytes(StreamBytes { bytes: bytes(1) });
    assert!(matches!(link.send(part).await, Err(EngineError::Cancelled)));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_longer_than_was_said() {
    let mut site = Site::new();
    let (_leaving, link, _lanes, mut arriving) =
        site.stream(LaneKind::Quic, Duration::from_secs(1)).await;
    let began = Instant::now();
    // Whoever would look for the stream is gone.
    arriving.cutter()();
    drop(link);
    let why = arriving.recv().await.unwrap_err();
    assert!(matches!(why, EngineError::ContactLost { seconds: 1, .. }), "{why:?}");
    assert!((900..10_000).contains(&began.elapsed().as_millis()), "{:?}", began.elapsed());
    assert_eq!(site.refused(0).await, RefuseCode::NoPlace);
}
