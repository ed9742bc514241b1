//! The page channel over real connections: pipelining, refused peers, peers that break rules, cuts.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytes::Bytes;
use migrate_core::error::{Classify, ErrorBin};
use migrate_core::layout::PAGE_BYTES;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Runtime;
use transport::pages::server::frame_wait;
use transport::pages::{
    Extent, PAGES_UNDER_WAY_MAX, PageListenerStop, REQUESTS_UNDER_WAY_MAX, ServerStat, StoreError,
    wire,
};
use transport::{
    Options, PageAnswer, PageClient, PageListener, PageRequest, PageServer, TransportError,
};

use crate::common::{Pki, any_port, load, options};
use crate::rogue::{LANE_ALPN, PAGES_ALPN, dial_tcp};

/// Of all pages that are put.
const VERSION: u64 = 5;

fn content(page: u64) -> Vec<u8> {
    (0..PAGE_BYTES as u64).map(|at| (at * 31 + page * 7) as u8).collect()
}

fn contents(extents: &[Extent]) -> Bytes {
    extents.iter().flat_map(Extent::iter).flat_map(content).collect()
}

fn get(first: u64, pages: u32) -> PageRequest {
    PageRequest::Get { extents: vec![Extent::new(first, pages)], take: false, packed: false }
}

fn put(first: u64, pages: u32, packed: bool) -> PageRequest {
    let extents = vec![Extent::new(first, pages)];
    PageRequest::Put { contents: contents(&extents), extents, version: VERSION, packed }
}

/// What a connection of the server ended with, in the order in which they ended.
type Ends = mpsc::Receiver<Result<(), TransportError>>;

/// A server of `b` that has every page and takes any.
struct Served {
    addr: SocketAddr,
    ends: Ends,
    stop: PageListenerStop,
    accepting: JoinHandle<()>,
}

impl Served {
    fn start(pki: &Pki, options: &Options) -> Self {
        Self::with(pki, options, answer_all)
    }

    fn with(
        pki: &Pki,
        options: &Options,
        serve: fn(PageServer) -> Result<(), TransportError>,
    ) -> Self {
        let listener = PageListener::bind(any_port(), &pki.identity("b"), options).unwrap();
        let (addr, stop) = (listener.local_addr(), listener.stop());
        let (sender, ends) = mpsc::channel();
        let accepting = thread::spawn(move || {
            loop {
                let arriving = match listener.accept() {
                    Ok(arriving) => arriving,
                    Err(TransportError::ListenerEnded) => return,
                    Err(error) => panic!("{error}"),
                };
                let sender = sender.clone();
                thread::spawn(move || {
                    // Nobody may be interested.
                    let _told = sender.send(arriving.shake().and_then(serve));
                });
            }
        });
        Self { addr, ends, stop, accepting }
    }

    fn ended(&self) -> Result<(), TransportError> {
        self.ends.recv_timeout(Duration::from_secs(10)).expect("a connection ends")
    }

    fn finish(self) {
        self.stop.stop();
        self.accepting.join().unwrap();
    }
}

fn answer_all(mut server: PageServer) -> Result<(), TransportError> {
    assert_eq!(server.peer().name, "a");
    server.welcome()?;
    while let Some((tag, request)) = server.request()? {
        match request {
            PageRequest::Get { extents, packed, .. } => {
                send_pages(&mut server, tag, &extents, packed)?;
            }
            PageRequest::Put { extents, contents: got, version, .. } => {
                assert_eq!((got, version), (contents(&extents), VERSION));
                server.answer(&PageAnswer::Done { tag })?;
            }
            PageRequest::List { from_page } => {
                let (entries, next_page) = listed(from_page);
                server.answer(&PageAnswer::Listed { tag, entries, next_page })?;
            }
            PageRequest::Stat => {
                server.answer(&PageAnswer::Stat { tag, stat: ServerStat::default() })?;
            }
            PageRequest::Delete => {
                server.answer(&PageAnswer::Failed { tag, error: StoreError::NotOpen })?;
            }
            _ => server.answer(&PageAnswer::Done { tag })?,
        }
    }
    Ok(())
}

/// The list of a store in two parts.
fn listed(from_page: u64) -> (Vec<(Extent, u64)>, Option<u64>) {
    match from_page {
        0 => (vec![(Extent::new(3, 40), VERSION), (Extent::new(43, 1), 1)], Some(90)),
        from_page => (vec![(Extent::new(from_page, 2), VERSION)], None),
    }
}

fn send_pages(
    server: &mut PageServer,
    tag: u32,
    extents: &[Extent],
    packed: bool,
) -> Result<(), TransportError> {
    let pages: Vec<u64> = extents.iter().flat_map(Extent::iter).collect();
    let (first, rest) = pages.split_at(1);
    let mut sent = 0;
    for piece in [first].into_iter().chain(rest.chunks(16)) {
        let extents = Extent::join(piece.iter().copied());
        sent += piece.len();
        let last = sent == pages.len();
        let contents = contents(&extents);
        server.answer(&PageAnswer::Pages { tag, extents, contents, packed, last })?;
    }
    Ok(())
}

fn connect(pki: &Pki, addr: SocketAddr) -> PageClient {
    PageClient::connect(addr, &pki.identity("a"), Some("b"), &options()).unwrap()
}

#[test]
fn calls_are_answered() {
    let pki = Pki::new();
    let served = Served::start(&pki, &options());
    let mut client = connect(&pki, served.addr);
    assert_eq!((client.peer(), client.addr()), ("b", served.addr));
    let before = client.bytes();
    assert_eq!(client.call(&PageRequest::Keep).unwrap(), PageAnswer::Done { tag: 1 });
    let stat = ServerStat::default();
    assert_eq!(client.call(&PageRequest::Stat).unwrap(), PageAnswer::Stat { tag: 2, stat });
    let failed = PageAnswer::Failed { tag: 3, error: StoreError::NotOpen };
    assert_eq!(client.call(&PageRequest::Delete).unwrap(), failed);
    for packed in [false, true] {
        let extents = vec![Extent::new(9, 1), Extent::new(3, 40), Extent::new(1 << 33, 1)];
        let request = PageRequest::Get { extents: extents.clone(), take: true, packed };
        let PageAnswer::Pages { extents: got, contents: bytes, last, .. } =
            client.call(&request).unwrap()
        else {
            panic!("no pages");
        };
        let pages: Vec<u64> = got.iter().flat_map(Extent::iter).collect();
        assert_eq!(pages, extents.iter().flat_map(Extent::iter).collect::<Vec<_>>());
        assert!(last && bytes == contents(&extents));
    }
    assert_eq!(client.call(&put(7, 256, true)).unwrap(), PageAnswer::Done { tag: 6 });
    let (mut tag, mut next) = (6, Some(0));
    while let Some(from_page) = next {
        let answer = client.call(&PageRequest::List { from_page }).unwrap();
        let (entries, next_page) = listed(from_page);
        tag += 1;
        assert_eq!(answer, PageAnswer::Listed { tag, entries, next_page });
        next = next_page;
    }
    assert_eq!(tag, 8, "both parts were asked for");
    let after = client.bytes();
    assert!(after.0 > before.0 && after.1 - before.1 > 42 * PAGE_BYTES as u64);
    // A client that goes is no error at the server.
    drop(client);
    served.ended().unwrap();
    served.finish();
}

/// Neither end waits for the other for ever, although none of the answers is taken before all
/// requests are sent.
#[test]
fn requests_are_pipelined() {
    let pki = Pki::new();
    let served = Served::start(&pki, &options());
    let mut client = connect(&pki, served.addr);
    let mut expected = vec![];
    for round in 0..60u64 {
        assert_eq!(client.send(&get(round * 300, 256)).unwrap(), expected.len() as u32 + 1);
        expected.push(Some(round * 300));
        client.send(&put(round * 300, 256, false)).unwrap();
        expected.push(None);
    }
    assert!(client.has_answers() && client.under_way() == 120);
    assert!(matches!(client.call(&PageRequest::Stat), Err(TransportError::PagesUnderWay { .. })));
    let mut answers = vec![];
    while client.under_way() > 0 {
        client.receive(&mut answers).unwrap();
    }
    let mut answers = answers.into_iter();
    for (tag, first) in (1..).zip(expected) {
        let mut pages = first.unwrap_or_default();
        loop {
            let answer = answers.next().unwrap();
            assert_eq!(answer.tag(), tag);
            match &answer {
                PageAnswer::Done { .. } => assert_eq!(first, None),
                PageAnswer::Pages { extents, contents: got, .. } => {
                    assert_eq!(extents[0].first_page, pages);
                    assert_eq!(*got, contents(extents));
                    pages += Extent::count(extents);
                }
                other => panic!("{other:?}"),
            }
            if answer.is_last() {
                assert!(first.is_none_or(|first| pages == first + 256));
                break;
            }
        }
    }
    assert_eq!(answers.next(), None);
    client.call(&PageRequest::Stat).unwrap();
}

#[test]
fn what_is_under_way_is_bounded() {
    let pki = Pki::new();
    let served = Served::start(&pki, &options());
    let mut client = connect(&pki, served.addr);
    let mut pages = 0;
    let error = loop {
        match client.send(&get(0, 256)) {
            Ok(_) => pages += 256,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, TransportError::PagesUnderWay { .. }), "{error}");
    assert_eq!(pages, PAGES_UNDER_WAY_MAX);
    assert!(!client.has_room(&get(0, 1)) && client.has_room(&PageRequest::Stat));
    while client.under_way() < REQUESTS_UNDER_WAY_MAX {
        client.send(&PageRequest::Stat).unwrap();
    }
    assert!(client.send(&PageRequest::Stat).is_err());
    // What the peer would refuse is not sent, and the connection goes on.
    let mut answers = vec![];
    while client.under_way() > 0 {
        client.receive(&mut answers).unwrap();
        answers.clear();
    }
    let refused = client.send(&get(0, 257)).unwrap_err();
    assert!(matches!(refused, TransportError::Refused(_)), "{refused}");
    client.call(&PageRequest::Stat).unwrap();
}

/// What a client without a proper identity gets, and that it disturbs nobody.
#[test]
fn strangers_are_refused() {
    let pki = Pki::new();
    let served = Served::start(&pki, &options());
    let refused = |identity: &Path, expected: Option<&str>| {
        PageClient::connect(served.addr, &load(identity), expected, &options()).unwrap_err()
    };
    let error = refused(&pki.path("stranger"), None);
    assert_eq!(error.bin(), ErrorBin::PeerIncompatible, "{error}");
    assert!(error.to_string().contains("another authority"), "{error}");
    assert!(served.ended().is_err());
    let error = refused(&pki.path("a"), Some("c"));
    assert_eq!(error.bin(), ErrorBin::PeerIncompatible, "{error}");
    assert!(served.ended().is_err());
    let error = refused(&pki.path("a"), Some("no/name"));
    assert!(matches!(error, TransportError::Option { .. }), "{error}");
    let runtime = Runtime::new().unwrap();
    let (ca, a) = (pki.ca(), pki.path("a"));
    let expired = pki.issue_expired("old");
    let strangers: [(Option<&Path>, &[u8]); 4] =
        [(None, PAGES_ALPN), (Some(&expired), PAGES_ALPN), (Some(&a), LANE_ALPN), (Some(&a), b"")];
    for (host, alpn) in strangers {
        runtime.block_on(async {
            // The handshake may be over for the client when the server refuses it.
            if let Ok(mut stream) = dial_tcp(&ca, host, alpn, served.addr).await {
                let mut came = vec![];
                let _cut = stream.read_to_end(&mut came).await;
                assert!(came.is_empty(), "{host:?} was welcomed");
            }
        });
        let error = served.ended().unwrap_err();
        let told = matches!(error, TransportError::Tls { .. });
        assert!(told, "{host:?} {alpn:?}: {error:?}");
    }
    connect(&pki, served.addr).call(&PageRequest::Stat).unwrap();
    served.ended().unwrap();
    served.finish();
}

#[test]
fn who_is_silent_in_the_handshake_is_cut() {
    let pki = Pki::new();
    let options = Options { handshake_timeout: Duration::from_millis(300), ..options() };
    let served = Served::start(&pki, &options);
    let silent = std::net::TcpStream::connect(served.addr).unwrap();
    let error = served.ended().unwrap_err();
    assert!(matches!(error, TransportError::HandshakeTimeout { .. }), "{error}");
    drop(silent);
    // Nor does a client wait for a server that is silent.
    let mute = std::net::TcpListener::bind(any_port()).unwrap();
    let began = Instant::now();
    let addr = mute.local_addr().unwrap();
    let error = PageClient::connect(addr, &pki.identity("a"), None, &options).unwrap_err();
    assert!(matches!(error, TransportError::HandshakeTimeout { .. }), "{error}");
    assert!(began.elapsed() < Duration::from_secs(2));
    drop(mute);
    let error = PageClient::connect(addr, &pki.identity("a"), None, &options).unwrap_err();
    assert!(error.to_string().contains("migrate memory-server"), "{error}");
}

#[test]
fn a_server_says_why_it_takes_no_requests() {
    let pki = Pki::new();
    let served =
        Served::with(&pki, &options(), |server| server.refuse(StoreError::Busy { max: 7 }));
    let error = PageClient::connect(served.addr, &pki.identity("a"), None, &options()).unwrap_err();
    let source = StoreError::Busy { max: 7 };
    assert!(
        matches!(&error, TransportError::PagesRefused { source: why, .. } if *why == source),
        "{error}"
    );
    assert_eq!(error.bin(), ErrorBin::PeerIncompatible);
}

/// Bytes that break a rule, and what their sender's connection ends with.
#[test]
fn requests_that_break_a_rule_end_the_connection() {
    let pki = Pki::new();
    let served = Served::start(&pki, &options());
    let frame = |request: &PageRequest, tag| wire::encode_request(request, tag).unwrap().concat();
    let mut long = frame(&put(0, 1, false), 1);
    long[20..24].fill(0xff);
    let hostile = [
        vec![0; 64],
        frame(&PageRequest::Stat, 2),
        [frame(&PageRequest::Stat, 1), frame(&PageRequest::Stat, 1)].concat(),
        wire::encode_answer(&PageAnswer::Done { tag: 1 }).unwrap().concat(),
        long,
    ];
    let runtime = Runtime::new().unwrap();
    for bytes in hostile {
        runtime.block_on(async {
            let mut stream =
                dial_tcp(&pki.ca(), Some(&pki.path("a")), PAGES_ALPN, served.addr).await.unwrap();
            stream.write_all(&bytes).await.unwrap();
            stream.flush().await.unwrap();
            let _cut = stream.read_to_end(&mut vec![]).await;
        });
        let error = served.ended().unwrap_err();
        assert_eq!(error.bin(), ErrorBin::PeerMisbehaved, "{error}");
    }
    // An end within a frame.
    runtime.block_on(async {
        let mut stream =
            dial_tcp(&pki.ca(), Some(&pki.path("a")), PAGES_ALPN, served.addr).await.unwrap();
        let half = frame(&put(0, 2, false), 1);
        stream.write_all(&half[..half.len() / 2]).await.unwrap();
        stream.shutdown().await.unwrap();
        let _cut = stream.read_to_end(&mut vec![]).await;
    });
    let error = served.ended().unwrap_err();
    assert_eq!(error.bin(), ErrorBin::PeerMisbehaved, "{error}");
    connect(&pki, served.addr).call(&PageRequest::Stat).unwrap();
}

/// A client may be silent between requests, but not within one, however slowly it drips.
#[test]
fn who_is_too_slow_within_a_request_is_cut() {
    let pki = Pki::new();
    let options = Options { dead_peer: Duration::from_millis(150), ..options() };
    let served = Served::start(&pki, &options);
    let mut patient = connect(&pki, served.addr);
    let runtime = Runtime::new().unwrap();
    let began = Instant::now();
    runtime.block_on(async {
        let mut stream =
            dial_tcp(&pki.ca(), Some(&pki.path("a")), PAGES_ALPN, served.addr).await.unwrap();
        for byte in wire::encode_request(&put(0, 256, false), 1).unwrap().concat() {
            if stream.write_all(&[byte]).await.is_err() || stream.flush().await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let error = served.ended().unwrap_err();
    assert!(matches!(error, TransportError::PagesTimeout { .. }), "{error}");
    let wait = frame_wait(&options);
    assert!(began.elapsed() >= wait && began.elapsed() < 6 * wait, "{:?}", began.elapsed());
    patient.call(&PageRequest::Stat).unwrap();
}

/// Nor does a client that takes no answers keep a thread of the server for ever.
#[test]
fn who_takes_no_answers_is_cut() {
    let pki = Pki::new();
    let options = Options { dead_peer: Duration::from_millis(150), ..options() };
    let served = Served::start(&pki, &options);
    let runtime = Runtime::new().unwrap();
    let stream = runtime.block_on(async {
        let mut stream =
            dial_tcp(&pki.ca(), Some(&pki.path("a")), PAGES_ALPN, served.addr).await.unwrap();
        for tag in 1..=60 {
            let request = wire::encode_request(&get(0, 256), tag).unwrap().concat();
            stream.write_all(&request).await.unwrap();
        }
        stream.flush().await.unwrap();
        stream
    });
    let error = served.ended().unwrap_err();
    assert!(matches!(error, TransportError::PagesTimeout { .. }), "{error}");
    drop(stream);
}

/// A way to serve one request.
type Serve = fn(&mut PageServer) -> Result<(), TransportError>;

/// Serves one request in a way that no server should, and waits for the client to go.
fn serves_badly(pki: &Pki, serve: Serve) -> Served {
    let listener = PageListener::bind(any_port(), &pki.identity("b"), &options()).unwrap();
    let (addr, stop) = (listener.local_addr(), listener.stop());
    let (sender, ends) = mpsc::channel();
    let accepting = thread::spawn(move || {
        let mut server = listener.accept().unwrap().shake().unwrap();
        server.welcome().unwrap();
        server.request().unwrap().unwrap();
        let served = serve(&mut server).and_then(|()| server.request().map(drop));
        let _told = sender.send(served);
    });
    Served { addr, ends, stop, accepting }
}

#[test]
fn answers_that_were_not_asked_for_end_the_connection() {
    let pki = Pki::new();
    let bad: [Serve; 6] = [
        |server| server.answer(&PageAnswer::Done { tag: 1 }),
        |server| send_pages(server, 2, &[Extent::new(5, 3)], false),
        |server| send_pages(server, 1, &[Extent::new(6, 3)], false),
        |server| send_pages(server, 1, &[Extent::new(5, 2)], false),
        |server| send_pages(server, 1, &[Extent::new(5, 4)], false),
        |server| {
            send_pages(server, 1, &[Extent::new(5, 3)], false)?;
            server.answer(&PageAnswer::Done { tag: 1 })
        },
    ];
    for serve in bad {
        let served = serves_badly(&pki, serve);
        let mut client = connect(&pki, served.addr);
        client.send(&get(5, 3)).unwrap();
        let mut answers = vec![];
        let error = loop {
            if let Err(error) = client.receive(&mut answers) {
                break error;
            }
        };
        assert_eq!(error.bin(), ErrorBin::PeerMisbehaved, "{error}");
        // What was handed out before was as asked.
        for answer in answers {
            let PageAnswer::Pages { tag: 1, extents, contents: got, .. } = answer else {
                panic!("{answer:?}");
            };
            assert_eq!(got, contents(&extents));
        }
        assert!(served.ended().is_err(), "the client cuts the connection");
    }
}

#[test]
fn a_cut_in_the_middle_frees_both_ends() {
    let pki = Pki::new();
    // The server goes in the middle of an answer.
    let served = serves_badly(&pki, |server| {
        let extents = vec![Extent::new(5, 1)];
        let contents = contents(&extents);
        let first = PageAnswer::Pages { tag: 1, extents, contents, packed: false, last: false };
        server.answer(&first)?;
        server.stop().cut();
        Ok(())
    });
    let mut client = connect(&pki, served.addr);
    let error = client.call(&get(5, 3)).unwrap_err();
    assert_eq!(error.bin(), ErrorBin::System, "{error}");
    assert!(matches!(served.ended(), Err(TransportError::Ended { .. })));
    assert!(client.call(&PageRequest::Stat).is_err(), "it stays cut");

    // A client that waits for an answer is let go.
    let served = serves_badly(&pki, |_| Ok(()));
    let mut client = connect(&pki, served.addr);
    let stop = client.stop();
    client.send(&get(5, 3)).unwrap();
    let waiting = thread::spawn(move || {
        loop {
            if let Err(error) = client.receive(&mut vec![]) {
                return error;
            }
        }
    });
    thread::sleep(Duration::from_millis(50));
    assert!(!waiting.is_finished());
    stop.cut();
    let error = waiting.join().unwrap();
    assert!(matches!(error, TransportError::Ended { .. }), "{error}");
    assert!(served.ended().is_err());
}

#[test]
fn a_call_has_an_end() {
    let pki = Pki::new();
    let served = serves_badly(&pki, |_| Ok(()));
    let options = Options { dead_peer: Duration::from_millis(60), ..options() };
    let mut client = PageClient::connect(served.addr, &pki.identity("a"), None, &options).unwrap();
    let began = Instant::now();
    let error = client.call(&PageRequest::Stat).unwrap_err();
    assert!(matches!(error, TransportError::PagesTimeout { .. }), "{error}");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert!(served.ended().is_err());
}
