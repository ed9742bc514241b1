//! Peers that got a session and then break the protocol, stop reading, or vanish.

use std::time::{Duration, Instant};

use migrate_core::error::{Classify, ErrorBin};
use tokio::io::AsyncWriteExt;
use transport::lane_wire::{Greeting, encode_head};
use transport::messages::{Commit, Intent, MigrationId, Progress, VERSIONS};
use transport::{
    DestinationSession, LaneKind, LaneSender, Listener, Message, TransportError, close_code,
    connect, wire,
};

use crate::common::{KINDS, Pki, batch, listen, offer, options, options_of, pair_of};
use crate::relay::Relay;
use crate::rogue::{
    self, ALPN, Control, TlsStream, lane, offer_lanes, offer_tcp_lanes, read_message, said,
    tcp_end, tcp_lane,
};

/// A session of one lane whose client is a test's own.
struct Rogue {
    control: Control,
    lane: RogueLane,
    destination: DestinationSession,
    _endpoint: quinn::Endpoint,
    _listener: Listener,
}

enum RogueLane {
    Quic(quinn::Connection, quinn::SendStream),
    Tcp(Option<Box<TlsStream>>),
}

impl RogueLane {
    async fn write(&mut self, bytes: &[u8]) {
        match self {
            Self::Quic(_, stream) => stream.write_all(bytes).await.unwrap(),
            Self::Tcp(stream) => {
                let stream = stream.as_mut().unwrap();
                stream.write_all(bytes).await.unwrap();
                stream.flush().await.unwrap();
            }
        }
    }

    /// Ends it as it should be ended.
    async fn finish(&mut self) {
        match self {
            Self::Quic(_, stream) => stream.finish().unwrap(),
            Self::Tcp(stream) => stream.as_mut().unwrap().shutdown().await.unwrap(),
        }
    }

    /// Ends it without a word: a reset over QUIC, and over TCP an end or a reset beneath TLS.
    fn cut(&mut self, reset: bool) {
        match self {
            Self::Quic(_, stream) => stream.reset(quinn::VarInt::from_u32(9)).unwrap(),
            Self::Tcp(stream) => {
                let socket = stream.take().unwrap().into_inner().0;
                if reset {
                    let abort = Some(Duration::ZERO);
                    socket2::SockRef::from(&socket).set_linger(abort).unwrap();
                }
            }
        }
    }
}

async fn rogue_session(pki: &Pki, kind: LaneKind) -> Rogue {
    let mut listener = listen(pki);
    let addr = listener.local_addr();
    let endpoint = rogue::client(&pki.ca(), Some(&pki.path("a")), ALPN);
    let mut control = match kind {
        LaneKind::Tcp => offer_tcp_lanes(&endpoint, addr, 1).await,
        _ => offer_lanes(&endpoint, addr, 1).await,
    };
    let greeting = Greeting { version: VERSIONS[0], lane: 0, token: control.select.token };
    let lane = match kind {
        LaneKind::Tcp => {
            let stream = tcp_lane(&pki.ca(), &pki.path("a"), addr, &greeting).await;
            RogueLane::Tcp(Some(Box::new(stream)))
        }
        _ => {
            let (connection, stream) = lane(&endpoint, addr, &greeting).await;
            RogueLane::Quic(connection, stream)
        }
    };
    read_message(&mut control.receive, 2).await;
    let destination = listener.accept().await.unwrap();
    Rogue { control, lane, destination, _endpoint: endpoint, _listener: listener }
}

/// Sends `bytes` on the control stream after the offer and expects the session's end, with `word`
/// in the error and in what the peer is told.
async fn breaks_control(pki: &Pki, bytes: &[u8], finish: bool, word: &str) {
    for kind in [LaneKind::Quic, LaneKind::Tcp] {
        breaks_control_of(pki, kind, bytes, finish, word).await;
    }
}

async fn breaks_control_of(pki: &Pki, kind: LaneKind, bytes: &[u8], finish: bool, word: &str) {
    let mut rogue = rogue_session(pki, kind).await;
    rogue.control.send.write_all(bytes).await.unwrap();
    if finish {
        rogue.control.send.finish().unwrap();
    }
    let error = loop {
        match rogue.destination.control_receiver.recv().await {
            Ok(_message) => {}
            Err(error) => break error,
        }
    };
    assert!(is_wire(&error, "control", word), "{word}: {error:?}");
    let mut closed = vec![rogue.control.connection.closed().await];
    match &mut rogue.lane {
        RogueLane::Quic(connection, _) => closed.push(connection.closed().await),
        // Nothing can be said there, and nothing is.
        RogueLane::Tcp(stream) => assert!(tcp_end(stream.as_mut().unwrap()).await.is_err()),
    }
    for error in closed {
        let (code, text) = said(error);
        assert_eq!(code, u64::from(close_code::PROTOCOL));
        assert!(text.contains("control") && text.contains(word), "{text}");
    }
}

async fn breaks_lane(pki: &Pki, bytes: &[u8], finish: bool, word: &str) {
    for kind in [LaneKind::Quic, LaneKind::Tcp] {
        breaks_lane_of(pki, kind, bytes, finish, word).await;
    }
}

async fn breaks_lane_of(pki: &Pki, kind: LaneKind, bytes: &[u8], finish: bool, word: &str) {
    let mut rogue = rogue_session(pki, kind).await;
    rogue.lane.write(bytes).await;
    if finish {
        rogue.lane.finish().await;
    }
    let mut receiver = rogue.destination.lanes.remove(0);
    let error = loop {
        match receiver.recv().await {
            Ok(Some(_batch)) => {}
            Ok(None) => panic!("{word}: a clean end"),
            Err(error) => break error,
        }
    };
    assert!(is_wire(&error, "lane 0", word), "{word}: {error:?}");
    let (code, text) = said(rogue.control.connection.closed().await);
    assert_eq!(code, u64::from(close_code::PROTOCOL));
    assert!(text.contains("lane 0") && text.contains(word), "{text}");
    // The lane cannot be read on.
    let error = receiver.recv().await.unwrap_err();
    assert!(matches!(error, TransportError::ClosedHere { .. }), "{error}");
    assert_eq!(error.bin(), ErrorBin::PeerMisbehaved);
}

fn is_wire(error: &TransportError, where_: &str, word: &str) -> bool {
    assert_eq!(error.bin(), ErrorBin::PeerMisbehaved);
    matches!(error, TransportError::Wire { place, source, .. }
        if place == where_ && source.to_string().contains(word))
}

fn progress(sequence: u32) -> Vec<u8> {
    let progress = Progress { applied_bytes: 1, applied_batches: vec![1] };
    wire::encode(&Message::Progress(progress), sequence).unwrap()
}

fn with(mut frame: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    frame
}

#[tokio::test(flavor = "multi_thread")]
async fn control_frames_that_break_the_protocol_end_the_session() {
    let pki = Pki::new();
    // The offer was number 1.
    let good = progress(2);
    breaks_control(&pki, b"garbage that is no frame at all", false, "magic").await;
    breaks_control(&pki, &with(good.clone(), 4, &[0, 0]), false, "type 0").await;
    breaks_control(&pki, &with(good.clone(), 4, &[0xff, 0xff]), false, "type 65535").await;
    breaks_control(&pki, &with(good.clone(), 6, &[1]), false, "flags").await;
    breaks_control(&pki, &with(good.clone(), 8, &[0xff; 4]), false, "4294967295").await;
    breaks_control(&pki, &progress(1), false, "sequence number 1").await;
    breaks_control(&pki, &[good.clone(), good.clone()].concat(), false, "sequence").await;
    breaks_control(&pki, &progress(3), false, "sequence number 3").await;
    breaks_control(&pki, &[progress(3), progress(2)].concat(), false, "sequence").await;
    breaks_control(&pki, &good[..9], true, "9 of 16").await;
    breaks_control(&pki, &good[..good.len() - 1], true, "ends after").await;
    breaks_control(&pki, &good[..16], true, "ends after 0").await;
    // A length of 65 for a list of lanes, with as many entries.
    let body = [vec![0, 65], vec![0; 65]].concat();
    let length = (body.len() as u32).to_le_bytes();
    let long = [with(good[..16].to_vec(), 8, &length), body].concat();
    breaks_control(&pki, &long, false, "64 lanes").await;
    // A list of 2^32 - 1 entries in a body of seven bytes.
    let body = [0, 0xff, 0xff, 0xff, 0xff, 0x0f, 0];
    let huge = [with(good[..16].to_vec(), 8, &7u32.to_le_bytes()), body.to_vec()].concat();
    breaks_control(&pki, &huge, false, "cannot be read").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_that_break_the_protocol_end_the_session() {
    let pki = Pki::new();
    let sent = batch(0, 2, 7);
    let frame = |sequence| {
        [&encode_head(&sent, sequence).unwrap()[..], &sent.payload.to_vec()[..]].concat()
    };
    let good = frame(1);
    breaks_lane(&pki, b"POST /pages HTTP/1.1 and so on, 32 bytes", false, "magic").await;
    breaks_lane(&pki, &with(good.clone(), 4, &[0]), false, "kind").await;
    breaks_lane(&pki, &with(good.clone(), 5, &[3]), false, "codec").await;
    breaks_lane(&pki, &with(good.clone(), 6, &[1]), false, "reserved").await;
    breaks_lane(&pki, &with(good.clone(), 28, &[1]), false, "content bytes").await;
    breaks_lane(&pki, &with(good.clone(), 28, &[0xff; 4]), false, "4294967295").await;
    // Packed, but to fewer bytes than the runs have.
    let packed = with(with(good.clone(), 5, &[2]), 28, &4096u32.to_le_bytes());
    breaks_lane(&pki, &packed, false, "add up").await;
    breaks_lane(&pki, &frame(2), false, "sequence number 2").await;
    breaks_lane(&pki, &[good.clone(), good.clone()].concat(), false, "sequence number 1").await;
    breaks_lane(&pki, &with(good.clone(), 16, &[0; 4]), false, "runs").await;
    breaks_lane(&pki, &with(good.clone(), 16, &[0xff; 4]), false, "4294967295").await;
    breaks_lane(&pki, &with(good.clone(), 20, &[0xff; 4]), false, "4294967295").await;
    breaks_lane(&pki, &with(good.clone(), 20, &4096u32.to_le_bytes()), false, "content bytes")
        .await;
    // The first run: page, pages, kind, reserved, version.
    breaks_lane(&pki, &with(good.clone(), 32, &[0xff; 8]), false, "first page").await;
    breaks_lane(&pki, &with(good.clone(), 40, &[0, 0]), false, "pages").await;
    breaks_lane(&pki, &with(good.clone(), 40, &[0xff; 2]), false, "65535").await;
    breaks_lane(&pki, &with(good.clone(), 42, &[9]), false, "kind").await;
    breaks_lane(&pki, &with(good.clone(), 43, &[1]), false, "reserved").await;
    breaks_lane(&pki, &with(good.clone(), 44, &[0; 4]), false, "version").await;
    breaks_lane(&pki, &good[..20], true, "20 of 32").await;
    breaks_lane(&pki, &good[..40], true, "Runs of a batch").await;
    breaks_lane(&pki, &good[..good.len() - 1], true, "Payload of a batch").await;
}

/// However much of a batch has come, an end that is none is never taken for one.
#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_is_cut_is_an_error_and_no_end() {
    let pki = Pki::new();
    let sent = batch(0, 2, 7);
    let frame = [&encode_head(&sent, 1).unwrap()[..], &sent.payload.to_vec()[..]].concat();
    for (kind, reset) in [(LaneKind::Quic, true), (LaneKind::Tcp, false), (LaneKind::Tcp, true)] {
        for bytes in [0, 1, 31, 32, 40, 64, 5000, frame.len() - 1, frame.len()] {
            let mut rogue = rogue_session(&pki, kind).await;
            rogue.lane.write(&frame[..bytes]).await;
            // What was sent before a reset may be lost, or not.
            tokio::time::sleep(Duration::from_millis(20)).await;
            let mut receiver = rogue.destination.lanes.remove(0);
            if bytes == frame.len() {
                assert_eq!(receiver.recv().await.unwrap().unwrap(), sent);
            }
            rogue.lane.cut(reset);
            let error = receiver.recv().await.unwrap_err();
            match kind {
                LaneKind::Tcp => {
                    assert!(matches!(error, TransportError::LaneBroken { .. }), "{bytes}: {error}");
                    assert_eq!(error.bin(), ErrorBin::System);
                    assert!(error.to_string().contains("lane 0"), "{error}");
                }
                _ => assert!(matches!(error, TransportError::Cut { code: 9, .. }), "{error}"),
            }
            assert!(rogue.destination.closer.close_reason().is_none(), "{bytes}");
        }
    }
}

/// TCP alone stops getting through: both ends of a lane say so, and the session lives on to tell.
#[tokio::test(flavor = "multi_thread")]
async fn a_cut_tcp_connection_is_noticed_by_both_ends() {
    let pki = Pki::new();
    let mut listener = listen(&pki);
    let mut relay = Relay::to(listener.local_addr()).await;
    let (identity, options) = (pki.identity("a"), options_of(LaneKind::Tcp));
    let (source, destination) = tokio::join!(
        connect(relay.addr, &identity, &options, offer(Intent::Migrate)),
        listener.accept()
    );
    let (mut source, mut destination) = (source.unwrap(), destination.unwrap());
    source.lanes[0].send(batch(0, 2, 1)).await.unwrap();
    assert!(destination.lanes[0].recv().await.unwrap().is_some());
    relay.cut_tcp();
    let begin = Instant::now();
    let there = destination.lanes[0].recv().await.unwrap_err();
    assert!(matches!(there, TransportError::LaneBroken { .. }), "{there}");
    let here = loop {
        if let Err(error) = source.lanes[0].send(batch(0, 200, 1)).await {
            break error;
        }
    };
    assert!(matches!(here, TransportError::LaneBroken { .. }), "{here}");
    // Nothing that was not acknowledged counts as delivered.
    let unfinished = source.lanes.remove(1).finish().await.unwrap_err();
    assert!(matches!(unfinished, TransportError::LaneBroken { .. }), "{unfinished}");
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    let commit = Message::Commit(Commit { migration: MigrationId([1; 16]), resume: true });
    source.control_sender.send(&commit).await.unwrap();
    assert_eq!(destination.control_receiver.recv().await.unwrap(), commit);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_peer_would_refuse_is_not_sent_and_does_no_harm() {
    let pki = Pki::new();
    for kind in KINDS {
        refuses_to_send(&pki, kind).await;
    }
}

async fn refuses_to_send(pki: &Pki, kind: LaneKind) {
    let (mut source, mut destination, _listener) = pair_of(pki, kind).await;
    let lane = &mut source.lanes[0];
    let good = batch(0, 2, 1);
    let mut short = good.clone();
    short.payload = vec![0; 4096].into();
    let mut empty = good.clone();
    empty.runs.clear();
    let mut large = good.clone();
    large.payload = vec![0; (1 << 20) + 4096].into();
    let mut unversioned = good.clone();
    unversioned.runs[1].version = 0;
    for bad in [short, empty, large, unversioned] {
        let error = lane.send(bad).await.unwrap_err();
        assert!(matches!(error, TransportError::Refused(_)), "{error}");
        assert_eq!(error.bin(), ErrorBin::CallerMisuse);
    }
    lane.send(good.clone()).await.unwrap();
    assert_eq!(destination.lanes[0].recv().await.unwrap().unwrap(), good);

    let too_many = Progress { applied_bytes: 0, applied_batches: vec![0; 65] };
    let error = source.control_sender.send(&Message::Progress(too_many)).await.unwrap_err();
    assert!(matches!(error, TransportError::Refused(_)), "{error}");
    let commit = Message::Commit(Commit { migration: MigrationId([1; 16]), resume: true });
    source.control_sender.send(&commit).await.unwrap();
    assert_eq!(destination.control_receiver.recv().await.unwrap(), commit);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_stops_reading_blocks_the_sender_within_bounds() {
    let pki = Pki::new();
    for kind in KINDS {
        blocks_within_bounds(&pki, kind).await;
    }
}

async fn blocks_within_bounds(pki: &Pki, kind: LaneKind) {
    let (mut source, mut destination, _listener) = pair_of(pki, kind).await;
    let lane = &mut source.lanes[0];
    let one = batch(0, 256, 3);
    let mut taken = 0u64;
    let waits = Duration::from_millis(1500);
    while tokio::time::timeout(waits, lane.send(one.clone())).await.is_ok_and(|sent| sent.is_ok()) {
        taken += one.payload.len() as u64;
        assert!(taken < 64 << 20, "nothing blocks the sender");
    }
    // Buffered here, under way and buffered there together.
    let window = u64::from(options().lane_window_bytes);
    assert!(taken >= window / 2 && taken <= window, "{taken} bytes were taken");

    // It did not answer for longer than a dead peer may, but it is not dead.
    assert!(source.closer.close_reason().is_none());
    let commit = Message::Commit(Commit { migration: MigrationId([1; 16]), resume: true });
    source.control_sender.send(&commit).await.unwrap();
    assert_eq!(destination.control_receiver.recv().await.unwrap(), commit);

    // The send that was given up left half a batch behind.
    let error = lane.send(one).await.unwrap_err();
    assert!(matches!(error, TransportError::Interrupted { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_vanishes_is_noticed_in_time_by_both_ends() {
    let pki = Pki::new();
    for kind in KINDS {
        notices_that_it_vanished(&pki, kind).await;
    }
}

async fn notices_that_it_vanished(pki: &Pki, kind: LaneKind) {
    let mut listener = listen(pki);
    let relay = Relay::to(listener.local_addr()).await;
    let (identity, options) = (pki.identity("a"), options_of(kind));
    let (source, destination) = tokio::join!(
        connect(relay.addr, &identity, &options, offer(Intent::Migrate)),
        listener.accept()
    );
    let (mut source, mut destination) = (source.unwrap(), destination.unwrap());
    // Keep-alives hold an idle session.
    tokio::time::sleep(options.dead_peer * 2).await;
    assert!(source.closer.close_reason().is_none());
    source.lanes[0].send(batch(0, 200, 1)).await.unwrap();
    assert!(destination.lanes[0].recv().await.unwrap().is_some());

    relay.fall_silent();
    let begin = Instant::now();
    // A sender notices too, although it has something to send.
    let mut lane = source.lanes.remove(0);
    let sending = tokio::spawn(async move {
        loop {
            if let Err(error) = lane.send(batch(0, 200, 1)).await {
                return error;
            }
        }
    });
    let mut receiver = destination.lanes.remove(0);
    let (ours, theirs, receiving) = tokio::join!(
        source.control_receiver.recv(),
        destination.control_receiver.recv(),
        receiver.recv()
    );
    let (ours, theirs, receiving) =
        (ours.unwrap_err(), theirs.unwrap_err(), receiving.unwrap_err());
    let sending = sending.await.unwrap();
    for error in [ours, theirs, receiving, sending] {
        assert!(matches!(error, TransportError::Lost { .. }), "{error:?}");
    }
    let noticed = begin.elapsed();
    assert!(noticed <= options.dead_peer + Duration::from_millis(400), "{noticed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_drops_its_session_is_noticed_at_once() {
    let pki = Pki::new();
    for kind in KINDS {
        notices_that_it_left(&pki, kind).await;
    }
}

async fn notices_that_it_left(pki: &Pki, kind: LaneKind) {
    let (mut source, destination, _listener) = pair_of(pki, kind).await;
    drop(destination);
    let error = source.control_receiver.recv().await.unwrap_err();
    // It was told; of silence it would have learned later, and as another error.
    let was_told = |error: &TransportError| {
        matches!(error, TransportError::Ended { .. } | TransportError::Closed { code: 0, .. })
    };
    assert!(was_told(&error), "{error}");
    // So do its lanes, and say the same.
    let error = fails_to_send(&mut source.lanes[0]).await;
    assert!(matches!(error, TransportError::Closed { code: 0, .. }), "{error}");
}

async fn fails_to_send(lane: &mut LaneSender) -> TransportError {
    loop {
        match lane.send(batch(0, 200, 1)).await {
            Ok(()) => tokio::time::sleep(Duration::from_millis(5)).await,
            Err(error) => return error,
        }
    }
}

/// Nothing orders the end of a lane and that of the session: whoever hears of the lane first waits for
/// the reason.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_lets_its_lanes_go_first_has_left() {
    let pki = Pki::new();
    for kind in KINDS {
        let (mut source, mut destination, _listener) = pair_of(&pki, kind).await;
        drop(std::mem::take(&mut destination.lanes));
        let leaves = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            drop(destination);
        };
        let (error, ()) = tokio::join!(fails_to_send(&mut source.lanes[0]), leaves);
        assert!(matches!(error, TransportError::Closed { code: 0, .. }), "{error}");
    }
}
