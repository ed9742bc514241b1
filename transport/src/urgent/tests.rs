//! Tests over real sessions; what a rogue would send goes past the checks of this end.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::thread;
use std::time::Duration;

use migrate_core::batch::{PageRun, RunKind};
use migrate_core::error::{Classify, ErrorBin};
use migrate_core::layout::PAGE_BYTES;
use rustix::event::{PollFd, PollFlags, poll};

use super::*;
use crate::messages::{Abort, AbortCode, Intent, MigrationId, Offer};
use crate::pki::{InitOptions, IssueOptions, init, issue};
use crate::{
    DestinationSession, Identity, LaneKind, Listener, Options, SourceSession, connect, messages,
};

async fn sessions(lane_kind: LaneKind) -> (SourceSession, DestinationSession) {
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca");
    init(&ca, &InitOptions::default()).unwrap();
    let [a, b] = ["a", "b"].map(|name| {
        let host = issue(&ca, name, &IssueOptions::default()).unwrap();
        Identity::load(&host).unwrap()
    });
    let options = Options { lane_kind, lanes: 2, ..Options::default() };
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let mut listener = Listener::bind(any, &b, &options).unwrap();
    let (addr, offer) =
        (listener.local_addr(), Offer::new("t", MigrationId([7; 16]), Intent::Migrate));
    let (source, destination) = tokio::join!(connect(addr, &a, &options, offer), listener.accept());
    (source.unwrap(), destination.unwrap())
}

/// The last lanes of both sessions as urgent ones. The sessions must be kept.
async fn ends(kind: LaneKind) -> (UrgentSender, UrgentReceiver, SourceSession, DestinationSession) {
    let (mut source, mut destination) = sessions(kind).await;
    let (sender, mut receiver) = (source.lanes.pop().unwrap(), destination.lanes.pop().unwrap());
    // Somebody waits for a batch as long as the lane may be any lane.
    let waited = tokio::time::timeout(Duration::from_millis(20), receiver.recv()).await;
    assert!(waited.is_err());
    (sender.into_urgent().unwrap(), receiver.into_urgent().unwrap(), source, destination)
}

fn content(page: u64, pages: u16) -> Batch {
    let run = PageRun { first: PageIndex(page), pages, kind: RunKind::Raw, version: 1 };
    let bytes: Vec<u8> =
        (0..usize::from(pages) * PAGE_BYTES).map(|at| (at as u64 * 31 + page) as u8).collect();
    Batch::plain(vec![run], bytes, 0)
}

/// Waits for batches as the fault thread does; `early` is what came beyond them.
fn receive(receiver: &mut UrgentReceiver, early: &mut Vec<Batch>, batches: usize) -> Vec<Batch> {
    while early.len() < batches {
        poll(&mut [PollFd::new(receiver, PollFlags::IN)], None).unwrap();
        receiver.receive(early).unwrap();
    }
    early.drain(..batches).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_and_batches_pass_each_other() {
    for kind in [LaneKind::Tcp, LaneKind::Auto] {
        let (mut sender, mut receiver, source, _destination) = ends(kind).await;
        let before = source.wire_bytes();
        // From a page to an answer with all its neighbours.
        let sizes = |page: u64| [1, 16, 63].map(|pages| pages + (page % 2) as u16);
        let answering = thread::spawn(move || {
            let mut asked = VecDeque::new();
            let mut most = 0;
            for expected in 0..300u64 {
                if asked.is_empty() {
                    asked.push_back(sender.requested().unwrap());
                }
                let page = asked.pop_front().unwrap();
                assert_eq!(page, PageIndex(expected));
                for pages in sizes(page.0) {
                    sender.send(content(page.0, pages)).unwrap();
                    while let Some(page) = sender.requested_already().unwrap() {
                        asked.push_back(page);
                    }
                    most = most.max(asked.len());
                }
            }
            assert!(most > 1, "requests are seen while answers are sent");
            let end = sender.requested();
            assert!(matches!(end, Err(TransportError::Ended { .. })), "{end:?}");
        });
        thread::spawn(move || {
            // Ten requests are always under way.
            (0..10).for_each(|page| receiver.ask(PageIndex(page)).unwrap());
            let mut early = vec![];
            for page in 0..300u64 {
                let answer = receive(&mut receiver, &mut early, 3);
                for (batch, pages) in answer.into_iter().zip(sizes(page)) {
                    assert_eq!(batch, content(page, pages));
                }
                if page + 10 < 300 {
                    receiver.ask(PageIndex(page + 10)).unwrap();
                }
            }
        })
        .join()
        .unwrap();
        answering.join().unwrap();
        assert!(source.closer.close_reason().is_none(), "a lane that has ended is no loss");
        let after = source.wire_bytes();
        assert!(after.sent - before.sent > 300 * 80 * PAGE_BYTES as u64);
        assert!(after.received - before.received > 300 * 20);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_over_quic_is_none() {
    let (mut source, mut destination) = sessions(LaneKind::Quic).await;
    let (sender, receiver) = (source.lanes.pop().unwrap(), destination.lanes.pop().unwrap());
    assert!(!sender.has_tcp() && !receiver.has_tcp());
    assert!(matches!(sender.into_urgent(), Err(TransportError::LaneKind { .. })));
    assert!(matches!(receiver.into_urgent(), Err(TransportError::LaneKind { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_carried_batches_is_none() {
    let (mut source, mut destination) = sessions(LaneKind::Tcp).await;
    source.lanes[1].send(content(0, 1)).await.unwrap();
    let mut receiver = destination.lanes.pop().unwrap();
    receiver.recv().await.unwrap().unwrap();
    assert!(matches!(receiver.into_urgent(), Err(TransportError::Interrupted { .. })));
}

/// Who waits is let go at both ends, and the session goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_is_stopped_ends() {
    let (mut sender, mut receiver, source, destination) = ends(LaneKind::Auto).await;
    let stop = sender.stop();
    let waiting = thread::spawn(move || sender.requested().unwrap_err());
    tokio::time::sleep(Duration::from_millis(20)).await;
    stop.stop();
    assert!(matches!(waiting.join().unwrap(), TransportError::Ended { .. }));
    let ended = receiver.receive(&mut vec![]);
    assert!(matches!(ended, Err(TransportError::Ended { .. })), "{ended:?}");
    for closer in [source.closer, destination.closer] {
        assert!(closer.close_reason().is_none());
    }
}

/// A connection that breaks off is no end: the session is over at both ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_breaks_off_ends_the_session() {
    let (mut sender, receiver, mut source, mut destination) = ends(LaneKind::Auto).await;
    let waiting = thread::spawn(move || sender.requested().unwrap_err());
    tokio::time::sleep(Duration::from_millis(20)).await;
    // As a firewall would, with nobody's knowledge.
    receiver.0.pipe.handle().close();
    let error = waiting.join().unwrap();
    assert!(matches!(error, TransportError::LaneBroken { .. }), "{error}");
    let ended = Duration::from_secs(2);
    let (here, there) = tokio::join!(
        tokio::time::timeout(ended, source.control_receiver.recv()),
        tokio::time::timeout(ended, destination.control_receiver.recv())
    );
    assert!(here.unwrap().is_err() && there.unwrap().is_err());
}

/// Who writes to a peer that does not read is let go by a cut.
#[tokio::test(flavor = "multi_thread")]
async fn a_cut_frees_who_writes() {
    let (mut sender, _receiver, _source, _destination) = ends(LaneKind::Tcp).await;
    let stop = sender.stop();
    let writing = thread::spawn(move || {
        loop {
            if let Err(error) = sender.send(content(0, 63)) {
                return error;
            }
        }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!writing.is_finished(), "nothing holds it back");
    stop.cut();
    assert!(matches!(writing.join().unwrap(), TransportError::Ended { .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_breaks_the_protocol_ends_the_session() {
    let batch = |sequence| {
        let batch = content(3, 1);
        [&encode_head(&batch, sequence).unwrap()[..], &batch.payload.to_vec()].concat()
    };
    let mut huge = batch(1);
    huge[20..24].fill(0xff);
    for bytes in [vec![0; 64], batch(2), [batch(1), batch(1)].concat(), huge] {
        let (mut sender, mut receiver, _source, mut destination) = ends(LaneKind::Tcp).await;
        sender.0.pipe.write(&[bytes]).unwrap();
        let mut got = vec![];
        let error = loop {
            if let Err(error) = receiver.receive(&mut got) {
                break error;
            }
        };
        assert_eq!(error.bin(), ErrorBin::PeerMisbehaved, "{error}");
        let told = destination.control_receiver.recv().await.unwrap_err();
        assert_eq!(told.bin(), ErrorBin::PeerMisbehaved, "{told}");
        assert!(receiver.0.pipe.received().len() < 1 << 17, "kept without need");
    }
    let request = |page| Message::Request(Request { page });
    let abort = Message::Abort(Abort { code: AbortCode::Internal, text: messages::text("no") });
    let frames = [
        vec![7; 16],
        wire::encode(&request(1), 2).unwrap(),
        [wire::encode(&request(1), 1).unwrap(), wire::encode(&request(2), 1).unwrap()].concat(),
        wire::encode(&abort, 1).unwrap(),
    ];
    for bytes in frames {
        let (mut sender, mut receiver, mut source, _destination) = ends(LaneKind::Tcp).await;
        receiver.0.pipe.write(&[bytes]).unwrap();
        let error = loop {
            if let Err(error) = sender.requested() {
                break error;
            }
        };
        assert_eq!(error.bin(), ErrorBin::PeerMisbehaved, "{error}");
        assert!(source.control_receiver.recv().await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_has_ended_is_found_out() {
    let (mut source, mut destination) = sessions(LaneKind::Tcp).await;
    let receiver = destination.lanes.pop().unwrap().into_urgent().unwrap();
    receiver.stop().cut();
    let sender = source.lanes.pop().unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(matches!(sender.into_urgent(), Err(TransportError::LaneBroken { .. })));
}
