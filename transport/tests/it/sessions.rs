//! Sessions between two honest ends, over real sockets on the loopback interface.

use std::time::{Duration, Instant};

use crate::common::{
    KINDS, Pki, any_port, batch, listen, offer, options, options_of, pair, pair_of,
};
use crate::relay::Relay;
use crate::rogue::{LANE_ALPN, tcp_server};
use migrate_core::error::{Classify, ErrorBin};
use transport::messages::{
    Abort, AbortCode, Ask, DestinationState, Intent, Progress, Sync, Synced, VERSIONS, Verdict,
};
use transport::{For, LaneKind, Listener, Message, Options, TransportError, close_code, connect};

#[tokio::test(flavor = "multi_thread")]
async fn messages_and_batches_arrive_in_order() {
    let pki = Pki::new();
    for kind in KINDS {
        all_arrives(&pki, kind).await;
    }
}

async fn all_arrives(pki: &Pki, kind: LaneKind) {
    let (mut source, mut destination, _listener) = pair_of(pki, kind).await;
    assert_eq!(source.peer.name, "b");
    assert_eq!(destination.peer.name, "a");
    assert_eq!((source.selected.version, destination.selected.version), (VERSIONS[0], VERSIONS[0]));
    assert_eq!((source.lanes.len(), destination.lanes.len()), (3, 3));
    assert_eq!(destination.engine, "test 1");

    let mut sending = Vec::new();
    for (index, mut lane) in source.lanes.drain(..).enumerate() {
        sending.push(tokio::spawn(async move {
            assert_eq!(lane.index(), index);
            for round in 0..50u64 {
                lane.send(batch(round * 300, 200, index as u8)).await.unwrap();
            }
            lane.finish().await.unwrap();
        }));
    }
    let mut receiving = Vec::new();
    for (index, mut lane) in destination.lanes.drain(..).enumerate() {
        receiving.push(tokio::spawn(async move {
            for round in 0..50u64 {
                let got = lane.recv().await.unwrap().unwrap();
                assert_eq!(got, batch(round * 300, 200, index as u8));
            }
            assert!(lane.recv().await.unwrap().is_none());
            assert_eq!(lane.batches(), 50);
        }));
    }
    let sync = Sync { sequence: 9, batches: vec![50; 3] };
    source.control_sender.send(&Message::Sync(sync.clone())).await.unwrap();
    assert_eq!(destination.control_receiver.recv().await.unwrap(), Message::Sync(sync));
    for task in sending.into_iter().chain(receiving) {
        task.await.unwrap();
    }
    let synced = Message::Synced(Synced { sequence: 9, version_digest: 1 });
    destination.control_sender.send(&synced).await.unwrap();
    assert_eq!(source.control_receiver.recv().await.unwrap(), synced);

    let payload = 3 * 50 * 200 * 4096u64;
    let wire = source.wire_bytes();
    // Headers and acknowledgements are a few per cent; a busy machine loses packets even on loopback.
    assert!(wire.sent > payload && wire.sent < payload * 3 / 2, "{wire:?} for {payload}");
    let there = destination.wire_bytes();
    assert!(there.received > payload && there.received <= wire.sent, "{there:?} for {wire:?}");
    assert_eq!(destination.closer.lane_kind(), kind);
    let stats = source.closer.stats();
    // Connections that carry little do not find out how large their packets may be.
    assert!(kind != LaneKind::Quic || stats.udp_payload_bytes_min > 1200, "{stats:?}");
    assert!(stats.rtt < Duration::from_millis(100), "{stats:?}");
}

/// Who hears a part gets all of it in order, also while the other takes nothing or is gone; the end is for both.
#[tokio::test(flavor = "multi_thread")]
async fn messages_are_sorted_by_whom_they_are_for() {
    let pki = Pki::new();
    let (source, destination, _listener) = pair(&pki).await;
    let which = |message: &Message| match message {
        Message::Sync(_) => For::First,
        Message::Abort(_) => For::Both,
        _ => For::Second,
    };
    let (mut first, mut second) = destination.control_receiver.sorted(which);
    let sync = |sequence| Message::Sync(Sync { sequence, batches: vec![0; 3] });
    let ask = Message::Ask(Ask { migration: source.migration });
    let abort = Message::Abort(Abort { code: AbortCode::Cancelled, text: "no".into() });
    for message in [sync(1), ask.clone(), sync(2), abort.clone(), sync(3), ask.clone()] {
        source.control_sender.send(&message).await.unwrap();
    }
    assert!(second.has_more().await && second.has_more().await);
    for due in [&ask, &abort] {
        assert_eq!(second.recv().await.unwrap(), *due);
    }
    for due in [&sync(1), &sync(2), &abort] {
        assert_eq!(first.recv().await.unwrap(), *due);
    }
    drop(first);
    assert_eq!(second.recv().await.unwrap(), ask);
    source.close(close_code::DONE, "done").await;
    assert!(!second.has_more().await);
    let ended = second.recv().await.unwrap_err();
    assert!(matches!(ended, TransportError::Closed { code: close_code::DONE, .. }), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_has_no_lanes_and_its_answer_arrives_before_the_close() {
    let pki = Pki::new();
    let mut listener = listen(&pki);
    let addr = listener.local_addr();
    let answering = tokio::spawn(async move {
        let mut session = listener.accept().await.unwrap();
        assert_eq!(session.intent, Intent::Ask);
        assert!(session.lanes.is_empty());
        let Message::Ask(Ask { migration }) = session.control_receiver.recv().await.unwrap() else {
            panic!("no question");
        };
        let verdict = Verdict { state: DestinationState::Running, text: migration.to_string() };
        session.control_sender.send(&Message::Verdict(verdict)).await.unwrap();
        session.control_sender.finish(Duration::from_secs(1)).await.unwrap();
        session.close(close_code::DONE, "answered").await;
    });
    let identity = pki.identity("a");
    let mut session = connect(addr, &identity, &options(), offer(Intent::Ask)).await.unwrap();
    let ask = Message::Ask(Ask { migration: session.migration });
    session.control_sender.send(&ask).await.unwrap();
    let Message::Verdict(verdict) = session.control_receiver.recv().await.unwrap() else {
        panic!("no verdict");
    };
    assert_eq!(verdict.state, DestinationState::Running);
    assert_eq!(verdict.text, "07".repeat(16));
    answering.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_reason_of_a_close_arrives_everywhere() {
    let pki = Pki::new();
    for kind in KINDS {
        reason_arrives(&pki, kind).await;
    }
}

async fn reason_arrives(pki: &Pki, kind: LaneKind) {
    let (mut source, mut destination, _listener) = pair_of(pki, kind).await;
    let lane = source.lanes.first_mut().unwrap();
    destination.closer.close_now(close_code::ABORTED, "the disk is full");
    let is_reason = |error: &TransportError| {
        matches!(error, TransportError::Closed { code: close_code::ABORTED, text, .. }
            if text == "the disk is full")
    };
    let error = source.control_receiver.recv().await.unwrap_err();
    assert!(is_reason(&error), "{error}");
    assert_eq!(error.bin(), ErrorBin::System);
    let error = source.control_receiver.recv().await.unwrap_err();
    assert!(is_reason(&error), "again: {error}");
    // The lane's connection hears of it by itself, a moment later.
    let error = loop {
        match lane.send(batch(0, 1, 0)).await {
            Ok(()) => tokio::time::sleep(Duration::from_millis(5)).await,
            Err(error) => break error,
        }
    };
    assert!(is_reason(&error), "{error}");
    let error = lane.send(batch(0, 1, 0)).await.unwrap_err();
    assert!(is_reason(&error), "again: {error}");
    let error = destination.control_receiver.recv().await.unwrap_err();
    assert!(matches!(error, TransportError::ClosedHere { code: close_code::ABORTED, .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_receive_loses_no_message() {
    let pki = Pki::new();
    let (source, mut destination, _listener) = pair(&pki).await;
    let sending = tokio::spawn(async move {
        for applied_bytes in 0..200 {
            let progress = Progress { applied_bytes, applied_batches: vec![1, 2, 3] };
            source.control_sender.send(&Message::Progress(progress)).await.unwrap();
            if applied_bytes % 7 == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        source
    });
    let mut next = 0;
    while next < 200 {
        let received = destination.control_receiver.recv();
        let Ok(message) = tokio::time::timeout(Duration::from_micros(50), received).await else {
            continue;
        };
        let Message::Progress(progress) = message.unwrap() else { panic!("another message") };
        assert_eq!(progress.applied_bytes, next);
        next += 1;
    }
    sending.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_accepted_session_outlives_its_listener() {
    let pki = Pki::new();
    for kind in KINDS {
        outlives(&pki, kind).await;
    }
}

async fn outlives(pki: &Pki, kind: LaneKind) {
    let (mut source, mut destination, listener) = pair_of(pki, kind).await;
    let addr = listener.local_addr();
    drop(listener);
    let identity = pki.identity("a");
    let refused = connect(addr, &identity, &options(), offer(Intent::Ask)).await;
    assert!(refused.is_err());
    for (source, destination) in source.lanes.iter_mut().zip(&mut destination.lanes) {
        for _ in 0..20 {
            source.send(batch(0, 200, 1)).await.unwrap();
            assert_eq!(destination.recv().await.unwrap().unwrap(), batch(0, 200, 1));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_listener_on_the_port_is_refused() {
    let pki = Pki::new();
    let listener = listen(&pki);
    let addr = listener.local_addr();
    let error = Listener::bind(addr, &pki.identity("b"), &options()).unwrap_err();
    assert!(matches!(error, TransportError::AddressInUse { addr: used, .. } if used == addr));
    assert_eq!(error.bin(), ErrorBin::CallerMisuse);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_is_free_for_udp_alone_is_refused() {
    let pki = Pki::new();
    let taken = std::net::TcpListener::bind(any_port()).unwrap();
    let addr = taken.local_addr().unwrap();
    let error = Listener::bind(addr, &pki.identity("b"), &options()).unwrap_err();
    assert!(
        matches!(error, TransportError::AddressInUse { protocol: "TCP", addr: used } if used == addr)
    );
    let text = error.to_string();
    assert!(text.contains("TCP") && text.contains("another port"), "{text}");
    drop(taken);
    Listener::bind(addr, &pki.identity("b"), &options()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_can_be_asked_for_by_name() {
    let pki = Pki::new();
    let mut listener = listen(&pki);
    let addr = listener.local_addr();
    let identity = pki.identity("a");
    for kind in KINDS {
        let wanted = |name: &str| Options { expected_peer: Some(name.into()), ..options_of(kind) };
        let no = connect(addr, &identity, &wanted("c"), offer(Intent::Migrate)).await.unwrap_err();
        assert!(matches!(no, TransportError::Tls { .. }), "{no}");
        let wanted = wanted("b");
        let (source, destination) = tokio::join!(
            connect(addr, &identity, &wanted, offer(Intent::Migrate)),
            listener.accept()
        );
        assert_eq!(source.unwrap().peer.name, "b");
        destination.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_smaller_number_of_lanes_and_the_common_features_hold() {
    let pki = Pki::new();
    let few = Options { lanes: 1, features: 0b011, ..options() };
    let mut listener = Listener::bind(any_port(), &pki.identity("b"), &few).unwrap();
    let addr = listener.local_addr();
    let identity = pki.identity("a");
    for kind in KINDS {
        let many = Options { lanes: 5, features: 0b110, ..options_of(kind) };
        let offer = offer(Intent::Migrate);
        let (source, destination) =
            tokio::join!(connect(addr, &identity, &many, offer), listener.accept());
        let (source, destination) = (source.unwrap(), destination.unwrap());
        assert_eq!((source.lanes.len(), destination.lanes.len()), (1, 1));
        assert_eq!((source.selected.features, destination.selected.features), (0b010, 0b010));
    }
}

/// Batches go on in order, and the lane ends where it ended.
#[tokio::test(flavor = "multi_thread")]
async fn lanes_go_over_to_tcp_once_they_are_fast() {
    let pki = Pki::new();
    let (mut source, mut destination, _listener) = pair_of(&pki, LaneKind::Auto).await;
    assert_eq!(source.closer.lane_kind(), LaneKind::Quic);
    let mut sending = source.lanes.remove(1);
    let closer = source.closer.clone();
    let sender = tokio::spawn(async move {
        let mut before = None;
        for number in 0..60u64 {
            sending.send(batch(number * 300, 100, number as u8)).await.unwrap();
            if number < 3 {
                assert_eq!(closer.lane_kind(), LaneKind::Quic, "decided before it was measured");
            } else if closer.lane_kind() == LaneKind::Tcp && before.is_none() {
                before = Some((number, closer.stats().packets_sent));
            }
            tokio::time::sleep(Duration::from_millis(4)).await;
        }
        sending.finish().await.unwrap();
        let (number, packets) = before.expect("the lane never goes over");
        // 400 KB are some 70 packets of QUIC.
        let rest = closer.stats().packets_sent - packets;
        assert!(number < 50 && rest < 200, "{rest} packets after batch {number}");
    });
    let receiving = &mut destination.lanes[1];
    for number in 0..60u64 {
        let got = receiving.recv().await.unwrap().unwrap();
        assert_eq!(got, batch(number * 300, 100, number as u8));
    }
    assert!(receiving.recv().await.unwrap().is_none());
    sender.await.unwrap();
    // The others follow with their next batch.
    source.lanes[0].send(batch(0, 1, 1)).await.unwrap();
    assert_eq!(destination.lanes[0].recv().await.unwrap().unwrap(), batch(0, 1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_link_keeps_its_lanes_on_quic() {
    let pki = Pki::new();
    let mut listener = listen(&pki);
    let (addr, identity) = (listener.local_addr(), pki.identity("a"));
    let options = Options { fast_bits_per_s: 1_000_000_000, ..options_of(LaneKind::Auto) };
    let (source, destination) =
        tokio::join!(connect(addr, &identity, &options, offer(Intent::Migrate)), listener.accept());
    let (mut source, mut destination) = (source.unwrap(), destination.unwrap());
    // 40 KB every 5 ms are 64 Mb/s.
    for number in 0..60 {
        source.lanes[0].send(batch(number * 300, 10, 1)).await.unwrap();
        destination.lanes[0].recv().await.unwrap().unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(source.closer.lane_kind(), LaneKind::Quic);
    let lane = source.lanes.remove(0);
    let (ended, end) = tokio::join!(lane.finish(), destination.lanes[0].recv());
    ended.unwrap();
    assert!(end.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn where_tcp_does_not_get_through_lanes_are_quic_or_it_is_said() {
    let pki = Pki::new();
    let mut listener = listen(&pki);
    let relay = Relay::of_udp(listener.local_addr()).await;
    let identity = pki.identity("a");
    for other in [None, Some("a"), Some("stranger")] {
        // Another host than the one that answers over UDP.
        let other = match other {
            Some(name) => Some(tcp_server(&pki.path(name), LANE_ALPN, relay.addr).await),
            None => None,
        };
        let options = options_of(LaneKind::Auto);
        let (source, destination) = tokio::join!(
            connect(relay.addr, &identity, &options, offer(Intent::Migrate)),
            listener.accept()
        );
        let (mut source, mut destination) = (source.unwrap(), destination.unwrap());
        assert_eq!(destination.closer.lane_kind(), LaneKind::Quic);
        source.lanes[2].send(batch(0, 9, 1)).await.unwrap();
        assert_eq!(destination.lanes[2].recv().await.unwrap().unwrap(), batch(0, 9, 1));
        if let Some(other) = other {
            other.abort();
            let _aborted = other.await;
        }
    }

    let options = options_of(LaneKind::Tcp);
    let error = connect(relay.addr, &identity, &options, offer(Intent::Migrate)).await.unwrap_err();
    assert!(matches!(error, TransportError::LaneConnect { .. }), "{error}");
    assert_eq!(error.bin(), ErrorBin::System);
    assert!(error.to_string().contains("--lanes quic"), "{error}");
}

/// A connection that died while it was not used is found out before a lane goes over to it.
#[tokio::test(flavor = "multi_thread")]
async fn a_lane_does_not_go_over_to_a_connection_that_has_ended() {
    let pki = Pki::new();
    let mut listener = listen(&pki);
    let mut relay = Relay::to(listener.local_addr()).await;
    let (identity, options) = (pki.identity("a"), options_of(LaneKind::Auto));
    let (source, destination) = tokio::join!(
        connect(relay.addr, &identity, &options, offer(Intent::Migrate)),
        listener.accept()
    );
    let (mut source, mut destination) = (source.unwrap(), destination.unwrap());
    relay.cut_tcp();
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(400) {
        source.lanes[0].send(batch(0, 100, 1)).await.unwrap();
        assert_eq!(destination.lanes[0].recv().await.unwrap().unwrap(), batch(0, 100, 1));
    }
    assert_eq!(source.closer.lane_kind(), LaneKind::Quic);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_is_found_out_in_time() {
    let pki = Pki::new();
    let silent = std::net::UdpSocket::bind(any_port()).unwrap();
    let addr = silent.local_addr().unwrap();
    let begin = Instant::now();
    let identity = pki.identity("a");
    let quick = Options { handshake_timeout: Duration::from_millis(300), ..options() };
    let error = connect(addr, &identity, &quick, offer(Intent::Migrate)).await.unwrap_err();
    assert!(matches!(error, TransportError::HandshakeTimeout { .. }), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(1));
}
