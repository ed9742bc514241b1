//! `migrate memory-server` as a process: what it keeps and for whom, what it refuses, and what clients
//! that misbehave or die leave of it. No guest is needed.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use framework::{Engine, Env, Pki, wait};
use nix::sys::signal::Signal;
use transport::pages::{Extent, NewStore, ServerStat, StoreError, StoreId, StoreSecret};
use transport::{Identity, Options, PageAnswer, PageClient, PageRequest, TransportError};

const PATIENCE: Duration = Duration::from_secs(30);
const PAGE_BYTES: usize = 4096;

/// Identities of three hosts, and the command.
struct Hosts {
    migrate: PathBuf,
    pki: Pki,
}

impl Hosts {
    fn new() -> Result<Self> {
        let migrate = Env::load()?.migrate()?;
        let pki = Pki::init(&migrate)?;
        for name in ["server", "host-a", "host-b", "host-c"] {
            pki.issue(name)?;
        }
        Ok(Self { migrate, pki })
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.pki.folder().join(name)
    }

    /// Starts the command and does not wait for it.
    fn start(&self, extra: &[&str]) -> Result<Engine> {
        let identity = self.folder("server").display().to_string();
        let words = ["memory-server", "--identity", &identity];
        Engine::start(&self.migrate, &[&words, extra].concat(), None)
    }

    fn serve(&self, extra: &[&str]) -> Result<Server> {
        let ports = ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"];
        let mut engine = self.start(&[&ports, extra].concat())?;
        engine.wait_stderr("listening on", PATIENCE)?;
        let said = engine.stderr();
        let after = |word: &str| {
            let rest = said.split(word).nth(1).context("Not said")?;
            let end = rest.find(|c: char| c == '/' || c.is_whitespace()).unwrap_or(rest.len());
            rest[..end].parse().context("No address")
        };
        let (addr, metrics) = (after("listening on ")?, after("http://")?);
        Ok(Server { engine, addr, metrics })
    }

    fn connect(&self, server: &Server, host: &str) -> Result<PageClient> {
        let identity = Identity::load(&self.folder(host))?;
        Ok(PageClient::connect(server.addr, &identity, Some("server"), &Options::default())?)
    }
}

struct Server {
    engine: Engine,
    addr: SocketAddr,
    metrics: SocketAddr,
}

impl Server {
    /// What a metric's line says.
    fn metric(&self, line: &str) -> Result<u64> {
        let mut stream = TcpStream::connect(self.metrics)?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        ensure!(text.starts_with("HTTP/1.1 200 OK"), "{text}");
        let mut found = text.lines().filter_map(|other| other.strip_prefix(line));
        let value = found.find_map(|rest| rest.strip_prefix(' '));
        Ok(value.with_context(|| format!("{line} is not in {text}"))?.parse()?)
    }

    fn resident_bytes(&self) -> Result<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.engine.pid()))?;
        let rest = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("No RSS")?;
        let kib: u64 = rest.trim().trim_end_matches(" kB").parse()?;
        Ok(kib << 10)
    }

    /// Ctrl-C, after which it must end well.
    fn end(mut self) -> Result<String> {
        self.engine.signal(Signal::SIGINT)?;
        Ok(self.engine.wait(PATIENCE)?.success()?.stderr)
    }
}

fn new_store(id: u8, reserve_pages: u64, hosts: &[&str]) -> NewStore {
    NewStore {
        store: StoreId([id; 16]),
        secret: StoreSecret::new([id; 32]),
        vm: format!("vm-{id}"),
        pages: 1 << 20,
        reserve_pages,
        hosts: hosts.iter().map(|host| (*host).to_owned()).collect(),
    }
}

fn open(id: u8, secret: u8) -> PageRequest {
    PageRequest::Open { store: StoreId([id; 16]), secret: StoreSecret::new([secret; 32]) }
}

/// A page that does not compress, but for every fourth, which is zero.
fn content(page: u64) -> Vec<u8> {
    let mut state = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        if page % 4 == 3 { 0 } else { state as u8 }
    };
    (0..PAGE_BYTES).map(|_| next()).collect()
}

fn put(first: u64, pages: u32) -> PageRequest {
    let extents = vec![Extent::new(first, pages)];
    let contents: Vec<u8> = extents.iter().flat_map(Extent::iter).flat_map(content).collect();
    PageRequest::Put {
        extents,
        contents: contents.into(),
        version: 1,
        packed: first.is_multiple_of(512),
    }
}

fn get(first: u64, pages: u32, take: bool) -> PageRequest {
    PageRequest::Get { extents: vec![Extent::new(first, pages)], take, packed: take }
}

/// What was done.
fn done(client: &mut PageClient, request: &PageRequest) -> Result<()> {
    match client.call(request)? {
        PageAnswer::Done { .. } => Ok(()),
        other => bail!("{request:?}: {other:?}"),
    }
}

fn failed(client: &mut PageClient, request: &PageRequest) -> Result<StoreError> {
    match client.call(request)? {
        PageAnswer::Failed { error, .. } => Ok(error),
        other => bail!("{request:?} was not refused: {other:?}"),
    }
}

/// Gets pages and makes sure that they are what was put.
fn check(client: &mut PageClient, first: u64, pages: u32, take: bool) -> Result<()> {
    let PageAnswer::Pages { extents, contents, .. } = client.call(&get(first, pages, take))? else {
        bail!("No pages from {first} on");
    };
    let wanted = Extent::new(first, pages);
    ensure!(extents.iter().flat_map(Extent::iter).eq(wanted.iter()), "{extents:?}");
    for (page, got) in wanted.iter().zip(contents.chunks_exact(PAGE_BYTES)) {
        ensure!(got == content(page), "Page {page} is another");
    }
    Ok(())
}

/// What is stored, with versions; fits in one answer.
fn list(client: &mut PageClient) -> Result<Vec<(Extent, u64)>> {
    match client.call(&PageRequest::List { from_page: 0 })? {
        PageAnswer::Listed { entries, next_page: None, .. } => Ok(entries),
        other => bail!("{other:?}"),
    }
}

fn stat(client: &mut PageClient) -> Result<ServerStat> {
    match client.call(&PageRequest::Stat)? {
        PageAnswer::Stat { stat, .. } => Ok(stat),
        other => bail!("{other:?}"),
    }
}

#[test]
fn pages_are_kept_and_given_back() -> Result<()> {
    let hosts = Hosts::new()?;
    for compress in ["on", "off"] {
        let server = hosts.serve(&["--capacity", "96M", "--compress", compress])?;
        let mut client = hosts.connect(&server, "host-a")?;
        ensure!(client.peer() == "server", "{}", client.peer());
        ensure!(
            stat(&mut client)?.store.is_none() && stat(&mut client)?.capacity_bytes == 96 << 20
        );
        done(&mut client, &PageRequest::Create(new_store(1, 16_384, &[])))?;
        for first in (0..16_384).step_by(256) {
            done(&mut client, &put(first, 256))?;
        }
        let held = stat(&mut client)?;
        let of_store = held.store.context("A store is open")?;
        ensure!(held.reserved_bytes == 64 << 20 && of_store.stored_pages == 16_384, "{held:?}");
        ensure!(of_store.stored_bytes == 48 << 20, "zeros take no memory: {held:?}");
        ensure!(server.metric("godwit_memory_stored_pages{vm=\"vm-1\"}")? == 16_384);
        ensure!(server.metric("godwit_memory_requests_total{kind=\"put\"}")? == 64);
        check(&mut client, 4000, 256, false)?;
        check(&mut client, 77, 1, true)?;
        let (extents, contents) = (vec![Extent::new(300, 1)], content(300).into());
        done(&mut client, &PageRequest::Put { extents, contents, version: 2, packed: true })?;
        let runs = [((0, 77), 1), ((78, 222), 1), ((300, 1), 2), ((301, 16_083), 1)];
        let runs = runs.map(|((first, pages), version)| (Extent::new(first, pages), version));
        ensure!(list(&mut client)? == runs, "{:?}", list(&mut client)?);
        check(&mut client, 300, 1, false)?;
        ensure!(failed(&mut client, &get(60, 100, false))? == StoreError::NotStored { page: 77 });
        done(&mut client, &PageRequest::Drop { extents: vec![Extent::new(0, 8192)] })?;
        ensure!(stat(&mut client)?.store.is_some_and(|store| store.stored_pages == 8192));
        let half = server.resident_bytes()?;
        done(&mut client, &PageRequest::Delete)?;
        ensure!(failed(&mut client, &get(9000, 1, false))? == StoreError::NotOpen);
        let (after, reserved) = (server.resident_bytes()?, stat(&mut client)?.reserved_bytes);
        ensure!(after + (20 << 20) < half && reserved == 0, "{half} before, {after} after");
        drop(client);
        let said = server.end()?;
        ensure!(said.contains("nothing is stored"), "{said}");
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused_before_anything_moves() -> Result<()> {
    let hosts = Hosts::new()?;
    let server = hosts.serve(&["--capacity", "4M"])?;
    let mut client = hosts.connect(&server, "host-a")?;
    let full = StoreError::Full { free_bytes: 4 << 20, wanted_bytes: 1025 * 4096 };
    ensure!(failed(&mut client, &PageRequest::Create(new_store(1, 1025, &[])))? == full);
    done(&mut client, &PageRequest::Create(new_store(1, 600, &[])))?;
    let mut other = hosts.connect(&server, "host-b")?;
    let full = StoreError::Full { free_bytes: 424 * 4096, wanted_bytes: 425 * 4096 };
    ensure!(failed(&mut other, &PageRequest::Create(new_store(2, 425, &[])))? == full);
    // Zeros count as well: they may not stay so.
    for first in [0, 256] {
        done(&mut client, &put(first, 256))?;
    }
    let reserved = StoreError::Reserved { reserve_pages: 600, wanted_pages: 601 };
    ensure!(failed(&mut client, &put(512, 89))? == reserved);
    done(&mut client, &put(512, 88))?;
    done(&mut client, &put(500, 100))?;
    let beyond = StoreError::OutOfRange { page: 1 << 20, pages: 1 << 20 };
    ensure!(failed(&mut client, &put((1 << 20) - 1, 2))? == beyond);
    done(&mut client, &PageRequest::Delete)?;
    done(&mut other, &PageRequest::Create(new_store(2, 1024, &[])))?;
    ensure!(server.metric("godwit_memory_refused_total{reason=\"full\"}")? == 3);
    Ok(())
}

/// Up and down, by any host of the store, and only where there is room.
#[test]
fn a_reservation_changes_where_there_is_room() -> Result<()> {
    let hosts = Hosts::new()?;
    let server = hosts.serve(&["--capacity", "8M"])?;
    let mut client = hosts.connect(&server, "host-a")?;
    let reserve = |pages| PageRequest::Reserve { pages };
    ensure!(failed(&mut client, &reserve(1))? == StoreError::NotOpen);
    done(&mut client, &PageRequest::Create(new_store(1, 500, &["host-b"])))?;
    done(&mut client, &put(0, 250))?;
    done(&mut client, &put(250, 250))?;
    let full = StoreError::Reserved { reserve_pages: 500, wanted_pages: 501 };
    ensure!(failed(&mut client, &put(500, 1))? == full);
    let mut granted = hosts.connect(&server, "host-b")?;
    done(&mut granted, &open(1, 1))?;
    done(&mut granted, &reserve(1500))?;
    ensure!(server.metric("godwit_memory_reserved_bytes")? == 1500 * 4096);
    ensure!(server.metric("godwit_memory_host_reserved_bytes{host=\"host-a\"}")? == 1500 * 4096);
    done(&mut client, &put(500, 100))?;
    // What is refused changes nothing.
    let mut other = hosts.connect(&server, "host-c")?;
    done(&mut other, &PageRequest::Create(new_store(2, 500, &[])))?;
    let full = StoreError::Full { free_bytes: 48 * 4096, wanted_bytes: 49 * 4096 };
    ensure!(failed(&mut client, &reserve(1549))? == full);
    let small = StoreError::Reserved { reserve_pages: 599, wanted_pages: 600 };
    ensure!(failed(&mut client, &reserve(599))? == small);
    for pages in [(1 << 20) + 1, 1 << 34] {
        let error = failed(&mut client, &reserve(pages))?;
        ensure!(matches!(&error, StoreError::Field { value, .. } if *value == pages), "{error}");
    }
    let held = stat(&mut client)?.store.context("A store is open")?;
    ensure!((held.reserve_pages, held.stored_pages) == (1500, 600), "{held:?}");
    check(&mut client, 400, 200, false)?;
    // What one gives back another one has.
    done(&mut client, &reserve(600))?;
    done(&mut other, &reserve(2048 - 600))?;
    let held = stat(&mut granted)?;
    ensure!((held.reserved_bytes, held.free_bytes()) == (8 << 20, 0), "{held:?}");
    check(&mut granted, 0, 256, false)?;
    done(&mut client, &PageRequest::Revoke { host: "host-b".into() })?;
    ensure!(failed(&mut granted, &reserve(600))? == StoreError::Unknown);
    ensure!(server.metric("godwit_memory_requests_total{kind=\"reserve\"}")? == 9);
    Ok(())
}

/// Whatever one host does, there is memory, a store and a connection for another one.
#[test]
fn no_host_takes_all() -> Result<()> {
    let hosts = Hosts::new()?;
    let server = hosts.serve(&["--capacity", "4M", "--per-host", "2M"])?;
    let create = |id: u16, pages| {
        let mut wanted = new_store(0, pages, &[]);
        wanted.store.0[..2].copy_from_slice(&id.to_le_bytes());
        PageRequest::Create(wanted)
    };
    let mut greedy = vec![];
    let refused = loop {
        match hosts.connect(&server, "host-a") {
            Ok(client) => greedy.push(client),
            Err(error) => break format!("{error:#}"),
        }
    };
    ensure!(refused.contains("256 connections") && refused.contains("close some"), "{refused}");
    ensure!(greedy.len() == 256, "{} connections", greedy.len());
    ensure!(server.metric("godwit_memory_host_connections{host=\"host-a\"}")? == 256);
    let full = StoreError::HostFull { free_bytes: 2 << 20, wanted_bytes: 513 * 4096 };
    ensure!(failed(&mut greedy[0], &create(0, 513))? == full);
    for (id, client) in (0..).zip(&mut greedy) {
        done(client, &create(id, 1))?;
    }
    let full = StoreError::HostFull { free_bytes: 256 * 4096, wanted_bytes: 257 * 4096 };
    ensure!(failed(&mut greedy[0], &PageRequest::Reserve { pages: 258 })? == full);
    done(&mut greedy[0], &PageRequest::Reserve { pages: 257 })?;
    greedy.truncate(1);
    let mut again = wait::until("a place that was given back", PATIENCE, || {
        Ok(hosts.connect(&server, "host-a").ok())
    })?;
    ensure!(failed(&mut again, &create(256, 1))? == StoreError::HostStores { max: 256 });
    ensure!(server.metric("godwit_memory_host_stores{host=\"host-a\"}")? == 256);
    ensure!(server.metric("godwit_memory_refused_total{reason=\"share\"}")? == 3);
    let mut other = hosts.connect(&server, "host-b")?;
    done(&mut other, &create(256, 512))?;
    ensure!(stat(&mut other)?.free_bytes() == 0);
    Ok(())
}

#[test]
fn a_store_is_for_its_hosts_alone() -> Result<()> {
    let hosts = Hosts::new()?;
    let server = hosts.serve(&["--capacity", "16M"])?;
    let mut owner = hosts.connect(&server, "host-a")?;
    done(&mut owner, &PageRequest::Create(new_store(1, 100, &["host-b"])))?;
    done(&mut owner, &put(0, 10))?;
    ensure!(failed(&mut owner, &open(1, 1))? == StoreError::OpenAlready);
    let mut granted = hosts.connect(&server, "host-b")?;
    let mut stranger = hosts.connect(&server, "host-c")?;
    ensure!(failed(&mut granted, &open(1, 2))? == StoreError::Unknown, "another secret");
    ensure!(failed(&mut granted, &open(2, 1))? == StoreError::Unknown, "another id");
    ensure!(failed(&mut stranger, &open(1, 1))? == StoreError::Unknown, "another host");
    let taken = PageRequest::Create(new_store(1, 1, &[]));
    ensure!(failed(&mut stranger, &taken)? == StoreError::Unknown);
    ensure!(failed(&mut stranger, &get(0, 1, false))? == StoreError::NotOpen);
    done(&mut granted, &open(1, 1))?;
    check(&mut granted, 0, 10, false)?;
    let [host_a, host_b, host_c] = ["host-a", "host-b", "host-c"].map(str::to_owned);
    done(&mut granted, &PageRequest::Grant { host: host_c.clone() })?;
    done(&mut stranger, &open(1, 1))?;
    check(&mut stranger, 3, 5, false)?;
    // The guest has moved on: its old hosts are shut out at once.
    for host in [host_a, host_b] {
        done(&mut stranger, &PageRequest::Revoke { host })?;
    }
    ensure!(failed(&mut owner, &get(0, 1, false))? == StoreError::Unknown);
    ensure!(failed(&mut granted, &put(0, 1))? == StoreError::Unknown);
    ensure!(failed(&mut granted, &PageRequest::Delete)? == StoreError::Unknown);
    ensure!(failed(&mut stranger, &PageRequest::Revoke { host: host_c })? == StoreError::Itself);
    check(&mut stranger, 0, 10, true)?;
    done(&mut stranger, &PageRequest::Delete)?;
    // A connection whose store is gone takes another one.
    done(&mut owner, &PageRequest::Create(new_store(1, 100, &[])))?;
    Ok(())
}

#[test]
fn hosts_that_are_not_named_are_not_taken() -> Result<()> {
    let hosts = Hosts::new()?;
    let peers = ["--capacity", "1M", "--peer", "host-a", "--peer", "host-b"];
    let server = hosts.serve(&peers)?;
    for host in ["host-a", "host-b"] {
        stat(&mut hosts.connect(&server, host)?)?;
    }
    let error = hosts.connect(&server, "host-c").err().context("host-c was taken")?;
    ensure!(format!("{error:#}").contains("--peer"), "{error:#}");
    // Nor are hosts of another authority.
    let other = Hosts::new()?;
    let error = other.connect(&server, "host-a").err().context("a stranger was taken")?;
    ensure!(format!("{error:#}").contains("another authority"), "{error:#}");
    ensure!(server.metric("godwit_memory_turned_away_total")? == 1);
    Ok(())
}

#[test]
fn what_nobody_asks_for_ends_unless_it_is_kept() -> Result<()> {
    let hosts = Hosts::new()?;
    let mut server = hosts.serve(&["--capacity", "16M", "--lease-s", "1"])?;
    let mut leased = hosts.connect(&server, "host-a")?;
    done(&mut leased, &PageRequest::Create(new_store(1, 1000, &[])))?;
    let mut kept = hosts.connect(&server, "host-a")?;
    done(&mut kept, &PageRequest::Create(new_store(2, 1000, &[])))?;
    done(&mut kept, &put(0, 100))?;
    done(&mut kept, &PageRequest::Keep)?;
    // As long as something is asked for, the lease goes on.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(2) {
        done(&mut leased, &put(0, 1))?;
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(kept);
    wait::until("the lease's end", PATIENCE, || {
        Ok((server.metric("godwit_memory_expired_total")? == 1).then_some(()))
    })?;
    ensure!(failed(&mut leased, &get(0, 1, false))? == StoreError::Unknown);
    ensure!(server.metric("godwit_memory_reserved_bytes")? == 1000 << 12);
    done(&mut leased, &open(2, 2))?;
    check(&mut leased, 0, 100, false)?;

    // Pages that are kept are not lost by one Ctrl-C.
    server.engine.signal(Signal::SIGINT)?;
    server.engine.wait_stderr("the pages are lost", PATIENCE)?;
    let said = server.engine.stderr();
    ensure!(said.contains("vm-2 of host-a: 100 pages") && said.contains("kept"), "{said}");
    check(&mut leased, 0, 100, false)?;
    ensure!(server.engine.running()?, "It ended");
    server.end()?;
    Ok(())
}

/// Clients that die or send rubbish cost the others nothing.
#[test]
fn a_bad_client_disturbs_no_other() -> Result<()> {
    let hosts = Hosts::new()?;
    let server = hosts.serve(&["--capacity", "64M"])?;
    let mut good = hosts.connect(&server, "host-a")?;
    done(&mut good, &PageRequest::Create(new_store(1, 4000, &["host-b"])))?;
    done(&mut good, &put(0, 256))?;
    for rubbish in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 3000], &[0x16, 3, 1, 255, 255]] {
        let mut stream = TcpStream::connect(server.addr)?;
        stream.write_all(rubbish)?;
    }
    let puts = std::thread::scope(|scope| -> Result<u64> {
        let killed: Vec<_> = (0..4)
            .map(|_| {
                let mut bad = hosts.connect(&server, "host-b")?;
                done(&mut bad, &open(1, 1))?;
                let stop = bad.stop();
                let sending = scope.spawn(move || {
                    let mut sent = 0;
                    while bad.send(&put(1000, 256)).is_ok() && bad.receive(&mut vec![]).is_ok() {
                        sent += 1;
                    }
                    sent
                });
                Ok((stop, sending))
            })
            .collect::<Result<_>>()?;
        for _ in 0..50 {
            check(&mut good, 0, 256, false)?;
        }
        let mut puts = 0;
        for (stop, sending) in killed {
            stop.cut();
            puts += sending.join().map_err(|_| anyhow::anyhow!("A client panicked"))?;
        }
        Ok(puts)
    })?;
    ensure!(puts > 0, "Nothing was under way");
    check(&mut good, 0, 256, false)?;
    check(&mut good, 1000, 256, false)?;
    wait::until("the ends of cut connections", PATIENCE, || {
        Ok((server.metric("godwit_memory_connections")? == 1).then_some(()))
    })?;
    ensure!(server.metric("godwit_memory_broken_total")? >= 4 + 2);
    Ok(())
}

/// Silent connections, more than may shake hands at a time, keep others waiting for a while only.
#[test]
fn silent_connections_do_not_stay() -> Result<()> {
    let hosts = Hosts::new()?;
    let server = hosts.serve(&["--capacity", "1M"])?;
    let mut good = hosts.connect(&server, "host-a")?;
    let silent: Vec<TcpStream> =
        (0..200).map(|_| TcpStream::connect(server.addr)).collect::<Result<_, _>>()?;
    stat(&mut good)?;
    wait::until("room for a new connection", PATIENCE, || {
        Ok(hosts.connect(&server, "host-b").ok())
    })?;
    ensure!(server.metric("godwit_memory_turned_away_total")? >= 200 - 128);
    drop(silent);
    Ok(())
}

#[test]
fn what_is_asked_for_in_vain_is_refused() -> Result<()> {
    let hosts = Hosts::new()?;
    let server = hosts.serve(&["--capacity", "1M"])?;
    let (taken, metrics) = (server.addr.to_string(), server.metrics.to_string());
    let any = "127.0.0.1:0";
    let cases: [(&[&str], &[&str]); 5] = [
        (&["--listen", any, "--capacity", "100000G"], &["machine has", "Give at most"]),
        (&["--listen", any, "--capacity", "0"], &["no room for a page", "8G"]),
        (
            &["--listen", any, "--capacity", "1M", "--per-host", "2M"],
            &["more than --capacity", "at most 1M"],
        ),
        (&["--listen", &taken, "--capacity", "1M"], &["in use", "choose another port"]),
        (
            &["--listen", any, "--capacity", "1M", "--metrics", &metrics],
            &["in use", "choose another port"],
        ),
    ];
    for (extra, words) in cases {
        let ended = hosts.start(extra)?.wait(PATIENCE)?;
        ensure!(ended.code == Some(1), "{extra:?}: {ended:?}");
        for word in words {
            ensure!(ended.stderr.contains(word), "{word:?} is not in {}", ended.stderr);
        }
    }
    let words =
        ["memory-server", "--listen", any, "--capacity", "1M", "--identity", "/nonexistent"];
    let ended = Engine::run(&hosts.migrate, &words, None, PATIENCE)?;
    ensure!(ended.code == Some(1) && ended.stderr.contains("migrate pki issue"), "{ended:?}");
    for usage in [&["--capacity", "much"][..], &["--capacity", "1M", "--lease-s", "0"]] {
        let ended = hosts.start(&[&["--listen", any], usage].concat())?.wait(PATIENCE)?;
        ensure!(ended.code == Some(2), "{usage:?}: {ended:?}");
    }
    // A client is told who is not there.
    drop(server);
    let identity = Identity::load(Path::new(&hosts.folder("host-a")))?;
    let connected = PageClient::connect(taken.parse()?, &identity, None, &Options::default());
    ensure!(matches!(connected, Err(TransportError::PagesConnect { .. })), "{connected:?}");
    Ok(())
}
