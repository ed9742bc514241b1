//! Clients and servers that must not get a session, and what they and we are told.

use std::time::{Duration, Instant};

use migrate_core::error::{Classify, ErrorBin};
use transport::lane_wire::Greeting;
use transport::listener::HANDSHAKES_MAX;
use transport::messages::{Intent, Joined, RejectCode, Select, VERSIONS, Verdict};
use transport::{
    LaneKind, LaneReceiver, Listener, Message, Options, Session, TransportError, close_code,
    connect, wire,
};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::common::{Pki, any_port, listen, offer, options, options_of};
use crate::rogue::{
    self, ALPN, LANE_ALPN, dial, dial_tcp, lane, offer_lanes, offer_tcp_lanes, read_message, said,
    tcp_end, tcp_lane,
};

/// A good client gets a session, whatever came before.
async fn still_serves(pki: &Pki, listener: &mut Listener) -> Session<LaneReceiver> {
    serves(pki, listener, LaneKind::Quic).await
}

async fn serves(pki: &Pki, listener: &mut Listener, kind: LaneKind) -> Session<LaneReceiver> {
    let addr = listener.local_addr();
    let (identity, options) = (pki.identity("a"), options_of(kind));
    let (source, destination) =
        tokio::join!(connect(addr, &identity, &options, offer(Intent::Migrate)), listener.accept());
    assert_eq!(source.unwrap().lanes.len(), 3);
    destination.unwrap()
}

/// The close of a rogue client's connection, which must come by itself.
async fn verdict(endpoint: &quinn::Endpoint, addr: std::net::SocketAddr) -> (u64, String) {
    let connection = match endpoint.connect(addr, "b").unwrap().await {
        Ok(connection) => connection,
        Err(error) => return said(error),
    };
    // In TLS 1.3 a client is done before the server has seen its certificate.
    let closed = tokio::time::timeout(Duration::from_secs(2), connection.closed());
    said(closed.await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn another_authority_is_refused_by_both_ends() {
    let pki = Pki::new();
    let mut listener = listen(&pki);
    let addr = listener.local_addr();
    let stranger = pki.identity("stranger");
    let error = connect(addr, &stranger, &options(), offer(Intent::Migrate)).await.unwrap_err();
    assert!(
        matches!(error, TransportError::Tls { alert: 48, reported: "found here", .. }),
        "{error}"
    );
    assert_eq!(error.bin(), ErrorBin::PeerIncompatible);
    assert!(error.to_string().contains("another authority"), "{error}");
    // The server does not rely on the client's refusal.
    let endpoint = rogue::client(&pki.ca(), Some(&pki.path("stranger")), ALPN);
    assert_eq!(verdict(&endpoint, addr).await.0, 0x100 + 48);
    still_serves(&pki, &mut listener).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn expired_certificates_are_refused_by_both_ends() {
    let pki = Pki::new();
    let old = pki.issue_expired("b.old");
    let mut listener = listen(&pki);
    let endpoint = rogue::client(&pki.ca(), Some(&old), ALPN);
    assert_eq!(verdict(&endpoint, listener.local_addr()).await.0, 0x100 + 45);
    still_serves(&pki, &mut listener).await;

    let server = rogue::server(&old, ALPN);
    let addr = server.local_addr().unwrap();
    let serving = tokio::spawn(async move { server.accept().await.unwrap().await.is_err() });
    let identity = pki.identity("a");
    let error = connect(addr, &identity, &options(), offer(Intent::Migrate)).await.unwrap_err();
    assert!(matches!(error, TransportError::Tls { alert: 45, .. }), "{error}");
    assert!(serving.await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_without_certificate_is_refused() {
    let pki = Pki::new();
    let mut listener = listen(&pki);
    let endpoint = rogue::client(&pki.ca(), None, ALPN);
    assert_eq!(verdict(&endpoint, listener.local_addr()).await.0, 0x100 + 116);
    still_serves(&pki, &mut listener).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_protocol_is_refused_by_both_ends() {
    let pki = Pki::new();
    let mut listener = listen(&pki);
    let endpoint = rogue::client(&pki.ca(), Some(&pki.path("a")), b"h3");
    assert_eq!(verdict(&endpoint, listener.local_addr()).await.0, 0x100 + 120);
    still_serves(&pki, &mut listener).await;

    let server = rogue::server(&pki.path("b"), b"h3");
    let addr = server.local_addr().unwrap();
    let serving = tokio::spawn(async move { server.accept().await.unwrap().await.is_err() });
    let identity = pki.identity("a");
    let error = connect(addr, &identity, &options(), offer(Intent::Migrate)).await.unwrap_err();
    assert!(matches!(error, TransportError::Tls { alert: 120, .. }), "{error}");
    assert!(serving.await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn another_version_is_rejected_with_words() {
    let pki = Pki::new();
    let mut listener = listen(&pki);
    let mut later = offer(Intent::Migrate);
    later.versions = vec![7, 8];
    let identity = pki.identity("a");
    let error = connect(listener.local_addr(), &identity, &options(), later).await.unwrap_err();
    let TransportError::Rejected { code: RejectCode::Version, text, .. } = &error else {
        panic!("{error}");
    };
    assert!(text.contains(&format!("{VERSIONS:?}")) && text.contains("[7, 8]"), "{text}");
    assert_eq!(error.bin(), ErrorBin::PeerIncompatible);
    still_serves(&pki, &mut listener).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_offer_that_the_peer_would_refuse_is_not_sent() {
    let pki = Pki::new();
    let mut bad = offer(Intent::Migrate);
    bad.engine = "two\nlines".into();
    let identity = pki.identity("a");
    let error = connect(any_port(), &identity, &options(), bad).await.unwrap_err();
    assert!(matches!(error, TransportError::Refused(_)), "{error}");
    assert_eq!(error.bin(), ErrorBin::CallerMisuse);
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_the_port_changes_nothing() {
    let pki = Pki::new();
    let mut listener = listen(&pki);
    let addr = listener.local_addr();
    let socket = std::net::UdpSocket::bind(any_port()).unwrap();
    let mut state = 1u32;
    for round in 0..2000usize {
        let packet: Vec<u8> = (0..round % 1400)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect();
        let _full = socket.send_to(&packet, addr);
    }
    still_serves(&pki, &mut listener).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_client_delays_nobody_and_is_closed() {
    let pki = Pki::new();
    let mut listener = listen(&pki);
    let addr = listener.local_addr();
    let endpoint = rogue::client(&pki.ca(), Some(&pki.path("a")), ALPN);
    let silent = dial(&endpoint, addr).await;
    let half = dial(&endpoint, addr).await;
    let (mut send, _receive) = half.open_bi().await.unwrap();
    send.write_all(b"GDWC").await.unwrap();
    let laneless = offer_lanes(&endpoint, addr, 2).await;

    let begin = Instant::now();
    still_serves(&pki, &mut listener).await;
    assert!(begin.elapsed() < Duration::from_millis(1500), "{:?}", begin.elapsed());
    for (connection, missing) in
        [(silent, "a stream"), (half, "an offer"), (laneless.connection, "a lane")]
    {
        let (code, text) = said(connection.closed().await);
        assert_eq!(code, u64::from(close_code::TIMEOUT));
        assert!(text.starts_with(missing), "{text}");
    }
    assert!(begin.elapsed() < Duration::from_millis(3500), "{:?}", begin.elapsed());
    still_serves(&pki, &mut listener).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_silent_clients_than_there_is_room_for_are_turned_away() {
    let pki = Pki::new();
    let patient = Options { handshake_timeout: Duration::from_secs(15), ..options() };
    let mut listener = Listener::bind(any_port(), &pki.identity("b"), &patient).unwrap();
    let addr = listener.local_addr();
    let endpoint = rogue::client(&pki.ca(), Some(&pki.path("a")), ALPN);
    let begin = Instant::now();
    let mut dialling = tokio::task::JoinSet::new();
    for _ in 0..HANDSHAKES_MAX + 40 {
        let connecting = endpoint.connect(addr, "b").unwrap();
        dialling.spawn(async move { connecting.await.ok() });
    }
    let connections: Vec<_> = dialling.join_all().await.into_iter().flatten().collect();
    assert!(begin.elapsed() < patient.handshake_timeout, "the machine is too slow for this test");
    assert!(connections.len() <= HANDSHAKES_MAX, "{}", connections.len());
    assert!(connections.len() > HANDSHAKES_MAX / 2, "{}", connections.len());
    for connection in connections {
        connection.closed().await;
    }
    still_serves(&pki, &mut listener).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lanes_that_do_not_belong_are_refused_and_the_session_goes_on() {
    let pki = Pki::new();
    let mut listener = listen(&pki);
    let addr = listener.local_addr();
    let a = rogue::client(&pki.ca(), Some(&pki.path("a")), ALPN);
    let b = rogue::client(&pki.ca(), Some(&pki.path("b")), ALPN);
    let mut control = offer_lanes(&a, addr, 2).await;
    let token = control.select.token;
    let right = Greeting { version: VERSIONS[0], lane: 0, token };
    let refused = u64::from(close_code::LANE_REFUSED);

    let mut wrong_token = token;
    wrong_token[15] ^= 1;
    let wrong = [
        (&a, Greeting { token: wrong_token, ..right }, "another token"),
        (&b, right, "another certificate"),
        (&a, Greeting { lane: 2, ..right }, "a lane too many"),
        (&a, Greeting { version: VERSIONS[0] + 1, ..right }, "another version"),
    ];
    for (endpoint, greeting, what) in wrong {
        let (connection, _stream) = lane(endpoint, addr, &greeting).await;
        assert_eq!(said(connection.closed().await).0, refused, "{what}");
    }
    let first = lane(&a, addr, &right).await;
    let (twice, _stream) = lane(&a, addr, &right).await;
    let second_or_first = tokio::select! {
        error = twice.closed() => said(error).0,
        error = first.0.closed() => said(error).0,
    };
    assert_eq!(second_or_first, refused, "the same lane twice");
    let _last = lane(&a, addr, &Greeting { lane: 1, ..right }).await;
    let joined = read_message(&mut control.receive, 2).await;
    assert_eq!(joined, Message::Joined(Joined { lanes: 2 }));
    let session = listener.accept().await.unwrap();
    assert_eq!(session.lanes.len(), 2);

    // A token is good for one session, while it waits.
    let (late, _stream) = lane(&a, addr, &right).await;
    assert_eq!(said(late.closed().await).0, refused, "a token of a complete session");
}

#[tokio::test(flavor = "multi_thread")]
async fn tcp_lanes_that_do_not_belong_are_closed_and_the_session_goes_on() {
    let pki = Pki::new();
    let mut listener = listen(&pki);
    let addr = listener.local_addr();
    let endpoint = rogue::client(&pki.ca(), Some(&pki.path("a")), ALPN);
    let mut control = offer_tcp_lanes(&endpoint, addr, 2).await;
    let token = control.select.token;
    let right = Greeting { version: VERSIONS[0], lane: 0, token };
    let open = async |host: &str, greeting: Greeting| {
        tcp_lane(&pki.ca(), &pki.path(host), addr, &greeting).await
    };
    let mut wrong_token = token;
    wrong_token[15] ^= 1;
    let wrong = [
        ("a", Greeting { token: wrong_token, ..right }, "another token"),
        ("b", right, "another certificate"),
        ("a", Greeting { lane: 2, ..right }, "a lane too many"),
        ("a", Greeting { version: VERSIONS[0] + 1, ..right }, "another version"),
    ];
    for (host, greeting, what) in wrong {
        let mut stream = open(host, greeting).await;
        assert!(tcp_end(&mut stream).await.is_err(), "{what}");
    }
    // A session of TCP lanes takes no other kind.
    let (quic, _stream) = lane(&endpoint, addr, &right).await;
    assert_eq!(said(quic.closed().await).0, u64::from(close_code::LANE_REFUSED));

    let mut first = open("a", right).await;
    let mut twice = open("a", right).await;
    tokio::select! {
        end = tcp_end(&mut twice) => assert!(end.is_err()),
        end = tcp_end(&mut first) => assert!(end.is_err()),
    }
    let _last = open("a", Greeting { lane: 1, ..right }).await;
    let joined = read_message(&mut control.receive, 2).await;
    assert_eq!(joined, Message::Joined(Joined { lanes: 2 }));
    let session = listener.accept().await.unwrap();
    assert_eq!((session.lanes.len(), session.closer.lane_kind()), (2, LaneKind::Tcp));

    let mut late = open("a", right).await;
    assert!(tcp_end(&mut late).await.is_err(), "a token of a complete session");
    serves(&pki, &mut listener, LaneKind::Tcp).await;
}

/// A session of QUIC lanes takes none over TCP.
#[tokio::test(flavor = "multi_thread")]
async fn a_tcp_lane_nobody_asked_for_is_closed() {
    let pki = Pki::new();
    let mut listener = listen(&pki);
    let addr = listener.local_addr();
    let endpoint = rogue::client(&pki.ca(), Some(&pki.path("a")), ALPN);
    let mut control = offer_lanes(&endpoint, addr, 1).await;
    let greeting = Greeting { version: VERSIONS[0], lane: 0, token: control.select.token };
    let mut tcp = tcp_lane(&pki.ca(), &pki.path("a"), addr, &greeting).await;
    assert!(tcp_end(&mut tcp).await.is_err());
    let _lane = lane(&endpoint, addr, &greeting).await;
    read_message(&mut control.receive, 2).await;
    assert_eq!(listener.accept().await.unwrap().lanes.len(), 1);
}

/// What a host must not be taken for on the TCP port: each is turned away, or never answered.
#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_refused_over_tcp() {
    let pki = Pki::new();
    let old = pki.issue_expired("a.old");
    let mut listener = listen(&pki);
    let addr = listener.local_addr();
    let (a, stranger) = (pki.path("a"), pki.path("stranger"));
    let cases: [(Option<&std::path::Path>, &[u8], &str); 6] = [
        (Some(&stranger), LANE_ALPN, "another authority"),
        (Some(&old), LANE_ALPN, "an expired certificate"),
        (None, LANE_ALPN, "no certificate"),
        (Some(&a), ALPN, "the protocol of QUIC connections"),
        (Some(&a), b"h2", "another protocol"),
        (Some(&a), b"", "no protocol"),
    ];
    for (host, alpn, what) in cases {
        // In TLS 1.3 a client is done before the server has seen its certificate.
        let Ok(mut stream) = dial_tcp(&pki.ca(), host, alpn, addr).await else { continue };
        assert!(tcp_end(&mut stream).await.is_err(), "{what}");
    }
    serves(&pki, &mut listener, LaneKind::Tcp).await;
}

/// The client's own checks: a server of the right authority answers over QUIC, and something else
/// over TCP.
#[tokio::test(flavor = "multi_thread")]
async fn another_host_on_the_tcp_port_is_not_believed() {
    let pki = Pki::new();
    for (host, alpn, word) in [
        ("a", LANE_ALPN, "another certificate"),
        ("stranger", LANE_ALPN, "another authority"),
        ("b", b"h2", "different protocols"),
        ("b", b"", "different protocols"),
    ] {
        let server = rogue::server(&pki.path("b"), ALPN);
        let addr = server.local_addr().unwrap();
        let tcp = rogue::tcp_server(&pki.path(host), alpn, addr).await;
        let serving = tokio::spawn(async move {
            let connection = server.accept().await.unwrap().await.unwrap();
            let (mut send, mut receive) = connection.accept_bi().await.unwrap();
            let Message::Offer(offer) = read_message(&mut receive, 1).await else { panic!() };
            let (features, token) = (offer.features, [1; 16]);
            let select = Select { version: VERSIONS[0], features, lanes: 1, token };
            send.write_all(&wire::encode(&Message::Select(select), 1).unwrap()).await.unwrap();
            connection.closed().await;
        });
        let (identity, options) = (pki.identity("a"), options_of(LaneKind::Tcp));
        let error = connect(addr, &identity, &options, offer(Intent::Migrate)).await.unwrap_err();
        assert!(error.to_string().contains(word), "{word}: {error}");
        assert_ne!(error.bin(), ErrorBin::System, "{error}");
        serving.await.unwrap();
        tcp.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_over_tcp_changes_nothing() {
    let pki = Pki::new();
    let mut listener = listen(&pki);
    let addr = listener.local_addr();
    for length in (0..3000usize).step_by(61) {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        // From random bytes to what begins as a TLS record of the largest length.
        let mut bytes: Vec<u8> = (0..length).map(|at| (at * 31 + length * 7) as u8).collect();
        let head = [[0x16, 3, 1, 0xff, 0xff], [0x17, 3, 3, 0x40, 0], *b"GET /"][length % 3];
        bytes.iter_mut().zip(head).for_each(|(byte, head)| *byte = head);
        let _closed_already = stream.write_all(&bytes).await;
        let _ended = stream.shutdown().await;
        let answer = tokio::time::timeout(Duration::from_secs(4), stream.read(&mut [0; 64])).await;
        answer.expect("the connection is kept").ok();
    }
    // A greeting that is none, after a proper handshake.
    let good = Greeting { version: VERSIONS[0], lane: 0, token: [1; 16] }.encode();
    let mut reserved = good;
    reserved[9] = 1;
    for bytes in [b"GET / HTTP/1.1\r\nHost: migrate\r\n\r\n".as_slice(), &reserved, &good[..31]] {
        let mut stream = dial_tcp(&pki.ca(), Some(&pki.path("a")), LANE_ALPN, addr).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream.flush().await.unwrap();
        if bytes.len() < good.len() {
            stream.shutdown().await.unwrap();
        }
        assert!(tcp_end(&mut stream).await.is_err());
    }
    serves(&pki, &mut listener, LaneKind::Tcp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_tcp_clients_are_bounded_and_closed() {
    let pki = Pki::new();
    let mut listener = listen(&pki);
    let addr = listener.local_addr();
    let begin = Instant::now();
    let mut silent = Vec::new();
    for _ in 0..HANDSHAKES_MAX + 40 {
        silent.push(TcpStream::connect(addr).await.unwrap());
    }
    let mut turned_away = 0;
    for stream in &mut silent[HANDSHAKES_MAX..] {
        let soon = Duration::from_millis(800);
        let ended = tokio::time::timeout(soon, stream.read(&mut [0; 1])).await;
        turned_away += usize::from(ended.is_ok());
    }
    assert!(begin.elapsed() < options().handshake_timeout, "the machine is too slow for this test");
    assert_eq!(turned_away, 40);
    // They do not keep control connections and lanes over QUIC out.
    still_serves(&pki, &mut listener).await;
    serves(&pki, &mut listener, LaneKind::Auto).await;
    for stream in &mut silent[..HANDSHAKES_MAX] {
        let ended = tokio::time::timeout(Duration::from_secs(4), stream.read(&mut [0; 1])).await;
        assert!(matches!(ended.expect("a silent client is kept"), Ok(0) | Err(_)));
    }
    // Silence after the TLS handshake is no better.
    let mut shaken = dial_tcp(&pki.ca(), Some(&pki.path("a")), LANE_ALPN, addr).await.unwrap();
    assert!(tcp_end(&mut shaken).await.is_err());
    serves(&pki, &mut listener, LaneKind::Tcp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_greeting_that_is_none_is_told_so() {
    let pki = Pki::new();
    let mut listener = listen(&pki);
    let addr = listener.local_addr();
    let a = rogue::client(&pki.ca(), Some(&pki.path("a")), ALPN);
    let good = Greeting { version: VERSIONS[0], lane: 0, token: [1; 16] }.encode();
    let mut reserved = good;
    reserved[9] = 1;
    for (bytes, word) in [(*b"GET / HTTP/1.1\r\nHost: migrate\r\n\r\n", "magic"), {
        let mut padded = [0; 33];
        padded[..32].copy_from_slice(&reserved);
        (padded, "reserved")
    }] {
        let connection = dial(&a, addr).await;
        let mut stream = connection.open_uni().await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        let (code, text) = said(connection.closed().await);
        assert_eq!(code, u64::from(close_code::PROTOCOL));
        assert!(text.contains(word), "{text}");
    }
    still_serves(&pki, &mut listener).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_message_that_is_no_offer_is_told_so() {
    let pki = Pki::new();
    let mut listener = listen(&pki);
    let a = rogue::client(&pki.ca(), Some(&pki.path("a")), ALPN);
    let connection = dial(&a, listener.local_addr()).await;
    let (mut send, _receive) = connection.open_bi().await.unwrap();
    let joined = Message::Joined(Joined { lanes: 1 });
    send.write_all(&wire::encode(&joined, 1).unwrap()).await.unwrap();
    let (code, text) = said(connection.closed().await);
    assert_eq!(code, u64::from(close_code::PROTOCOL));
    assert!(text.contains("Joined") && text.contains("Offer"), "{text}");
    still_serves(&pki, &mut listener).await;
}

/// A server that answers an offer with `answer`.
async fn connect_to_a_server_that_says(pki: &Pki, answer: Vec<u8>) -> TransportError {
    connect_of_kind(pki, answer, LaneKind::Quic).await
}

async fn connect_of_kind(pki: &Pki, answer: Vec<u8>, kind: LaneKind) -> TransportError {
    let server = rogue::server(&pki.path("b"), ALPN);
    let addr = server.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        let connection = server.accept().await.unwrap().await.unwrap();
        let (mut send, mut receive) = connection.accept_bi().await.unwrap();
        read_message(&mut receive, 1).await;
        send.write_all(&answer).await.unwrap();
        connection.closed().await;
    });
    let (identity, options) = (pki.identity("a"), options_of(kind));
    let error = connect(addr, &identity, &options, offer(Intent::Migrate)).await.unwrap_err();
    serving.await.unwrap();
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_breaks_the_protocol_gets_no_session() {
    let pki = Pki::new();
    let select = Select { version: VERSIONS[0], features: 0, lanes: 3, token: [0; 16] };
    for bad in [
        Select { version: VERSIONS[0] + 1, ..select.clone() },
        Select { features: 1, ..select.clone() },
        Select { lanes: 0, ..select.clone() },
        Select { lanes: 4, ..select.clone() },
    ] {
        let answer = wire::encode(&Message::Select(bad.clone()), 1).unwrap();
        let error = connect_to_a_server_that_says(&pki, answer).await;
        assert!(matches!(error, TransportError::Unexpected { .. }), "{bad:?}: {error}");
        assert_eq!(error.bin(), ErrorBin::PeerMisbehaved);
    }
    let verdict =
        Verdict { state: transport::messages::DestinationState::Unknown, text: String::new() };
    let answer = wire::encode(&Message::Verdict(verdict), 1).unwrap();
    let error = connect_to_a_server_that_says(&pki, answer).await;
    assert!(error.to_string().contains("Verdict"), "{error}");
    let error = connect_to_a_server_that_says(&pki, b"SSH-2.0-OpenSSH_9.2".to_vec()).await;
    assert!(matches!(error, TransportError::Wire { .. }), "{error}");
}

/// As a release that knows of no lanes over TCP.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_tcp_lanes_is_told_apart() {
    let pki = Pki::new();
    let select = Select { version: VERSIONS[0], features: 0, lanes: 3, token: [0; 16] };
    let answer = wire::encode(&Message::Select(select), 1).unwrap();
    let error = connect_of_kind(&pki, answer, LaneKind::Tcp).await;
    assert!(matches!(error, TransportError::LaneKind { .. }), "{error}");
    assert_eq!(error.bin(), ErrorBin::PeerIncompatible);
    assert!(error.to_string().contains("--lanes quic"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_never_answers_is_given_up() {
    let pki = Pki::new();
    let server = rogue::server(&pki.path("b"), ALPN);
    let addr = server.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        let connection = server.accept().await.unwrap().await.unwrap();
        connection.closed().await
    });
    let identity = pki.identity("a");
    let quick = Options { handshake_timeout: Duration::from_millis(400), ..options() };
    let begin = Instant::now();
    let error = connect(addr, &identity, &quick, offer(Intent::Migrate)).await.unwrap_err();
    let waiting_for = "the answer to the offer";
    assert!(
        matches!(error, TransportError::HandshakeTimeout { waiting_for: w, .. } if w == waiting_for),
        "{error}"
    );
    assert!(begin.elapsed() < Duration::from_secs(1));
    serving.await.unwrap();
}
