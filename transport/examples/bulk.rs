//! Measures bulk transfer over loopback with the same bytes, tuning and number of connections: plain
//! streams, one a connection, and a session's lanes, each over QUIC and over TLS on TCP. Prints one
//! JSON object with, for every way, the median and the range of the goodput in Gbit/s and the median
//! of the processor seconds for 10^9 bytes, of both ends together.
//!
//! ```text
//! cargo run --release -p transport --example bulk -- [MIB] [LANES] [REPEATS] [WAY ...]
//! ```
//!
//! | way | what |
//! |---|---|
//! | `plain` | QUIC, from one buffer into nothing |
//! | `memory` | QUIC, from a file in memory into a new file in memory, as guests' memory is |
//! | `lanes` | a session's lanes over QUIC, into nothing; `ratio` compares them with `plain` |
//! | `tcp_plain`, `tcp_memory`, `tcp_lanes` | the same over TLS on TCP |
//!
//! The plain transfers write and read the same pieces of 1 MiB without framing, checks and
//! acknowledgement by the application. What `memory` is slower by is what copying and finding
//! memory costs on this machine. All ways alternate.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use migrate_core::batch::{PageRun, RunKind};
use migrate_core::layout::{PAGE_BYTES, PageIndex};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Endpoint, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TokioRuntime, VarInt};
use rustix::time::{ClockId, clock_gettime};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use transport::messages::{Intent, MigrationId, Offer};
use transport::pki::{InitOptions, IssueOptions, init, issue};
use transport::{Batch, Identity, LaneKind, Listener, Options, connect};

const PIECE_BYTES: usize = 1 << 20;

/// Where guests' memory lies.
const MEMORY_FOLDER: &str = "/dev/shm";

/// One way to carry the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Way {
    name: &'static str,
    kind: LaneKind,
    what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Plain,
    Memory,
    Lanes,
}

const WAYS: [Way; 6] = [
    Way { name: "plain", kind: LaneKind::Quic, what: What::Plain },
    Way { name: "memory", kind: LaneKind::Quic, what: What::Memory },
    Way { name: "lanes", kind: LaneKind::Quic, what: What::Lanes },
    Way { name: "tcp_plain", kind: LaneKind::Tcp, what: What::Plain },
    Way { name: "tcp_memory", kind: LaneKind::Tcp, what: What::Memory },
    Way { name: "tcp_lanes", kind: LaneKind::Tcp, what: What::Lanes },
];

/// What was asked for.
struct Plan {
    host: PathBuf,
    identity: Identity,
    options: Options,
    /// Pieces a connection.
    pieces: usize,
    source: Arc<File>,
}

impl Plan {
    fn bytes(&self) -> usize {
        self.pieces * self.options.lanes * PIECE_BYTES
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (numbers, ways): (Vec<_>, Vec<_>) =
        words.iter().partition(|word| word.parse::<usize>().is_ok());
    let number = |at: usize| numbers.get(at).and_then(|word| word.parse().ok());
    let ways: Vec<Way> = match ways.as_slice() {
        [] => WAYS.to_vec(),
        names => names.iter().map(|name| way(name)).collect::<Result<_>>()?,
    };
    let mib: usize = number(0).unwrap_or(1024);
    let mut options = Options::default();
    options.lanes = number(1).unwrap_or(options.lanes);
    let repeats = number(2).unwrap_or(3);
    ensure!(mib >= options.lanes && repeats > 0, "At least 1 MiB a lane and one repeat are needed");

    let dir = tempfile::tempdir()?;
    init(dir.path(), &InitOptions::default())?;
    let host = issue(dir.path(), "host", &IssueOptions::default())?;
    let identity = Identity::load(&host)?;
    let pieces = mib / options.lanes;
    let source = memory_file()?;
    for piece in 0..pieces * options.lanes {
        let content: Vec<u8> = (0..PIECE_BYTES).map(|at| (at * 31 + piece) as u8).collect();
        source.write_all_at(&content, (piece * PIECE_BYTES) as u64)?;
    }
    let plan = Plan { host, identity, options, pieces, source: Arc::new(source) };
    let mut measured = vec![Vec::new(); ways.len()];
    for _ in 0..repeats {
        for (way, all) in ways.iter().zip(&mut measured) {
            let cpu = cpu_seconds();
            let seconds = measure(&plan, *way).await?;
            let gbps = plan.bytes() as f64 * 8.0 / 1e9 / seconds;
            all.push((gbps, (cpu_seconds() - cpu) * 1e9 / plan.bytes() as f64));
        }
    }
    print(&plan, repeats, &ways, &measured);
    Ok(())
}

fn way(name: &str) -> Result<Way> {
    let found = WAYS.into_iter().find(|way| way.name == name);
    found.with_context(|| format!("{name:?} is none of {:?}", WAYS.map(|way| way.name)))
}

async fn measure(plan: &Plan, way: Way) -> Result<f64> {
    let ends = match way.what {
        What::Lanes => return lanes_seconds(plan, way.kind).await,
        What::Plain => None,
        What::Memory => Some((Arc::clone(&plan.source), Arc::new(memory_file()?))),
    };
    match way.kind {
        LaneKind::Tcp => tcp_seconds(plan, ends).await,
        _ => quic_seconds(plan, ends).await,
    }
}

fn print(plan: &Plan, repeats: usize, ways: &[Way], measured: &[Vec<(f64, f64)>]) {
    let mut fields = Vec::new();
    let mut medians = Vec::new();
    for (Way { name, .. }, all) in ways.iter().zip(measured) {
        let (mut gbps, mut cpu): (Vec<_>, Vec<_>) = all.iter().copied().unzip();
        let (middle, cpu) = (median(&mut gbps), median(&mut cpu));
        fields.push(format!("\"{name}_gbps\": {middle:.3}"));
        // Sorted by now.
        if let [least, .., most] | [least @ most] = gbps.as_slice() {
            fields.push(format!("\"{name}_range_gbps\": [{least:.3}, {most:.3}]"));
        }
        fields.push(format!("\"{name}_cpu_s_per_gb\": {cpu:.3}"));
        medians.push((*name, middle));
    }
    let of = |name| medians.iter().find(|(other, _)| *other == name).map(|(_, gbps)| gbps);
    if let (Some(lanes), Some(plain)) = (of("lanes"), of("plain")) {
        fields.push(format!("\"ratio\": {:.3}", lanes / plain));
    }
    fields.push(format!("\"bytes\": {}", plan.bytes()));
    fields.push(format!("\"connections\": {}", plan.options.lanes));
    fields.push(format!("\"repeats\": {repeats}"));
    println!("{{{}}}", fields.join(", "));
}

/// Processor time of this process so far.
fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn memory_file() -> Result<File> {
    let made = tempfile::tempfile_in(MEMORY_FOLDER);
    made.with_context(|| format!("No file can be made in {MEMORY_FOLDER}"))
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// One session; the time from the first batch until the last was received.
async fn lanes_seconds(plan: &Plan, lane_kind: LaneKind) -> Result<f64> {
    let (identity, pieces) = (&plan.identity, plan.pieces);
    let options = &Options { lane_kind, ..plan.options.clone() };
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let mut listener = Listener::bind(any, identity, options)?;
    let offer = Offer::new("bulk", MigrationId([1; 16]), Intent::Migrate);
    let (source, destination) =
        tokio::join!(connect(listener.local_addr(), identity, options, offer), listener.accept());
    let (source, destination) = (source?, destination?);
    let begin = Instant::now();
    let mut receiving = tokio::task::JoinSet::new();
    for mut lane in destination.lanes {
        receiving.spawn(async move {
            let mut bytes = 0;
            while let Some(batch) = lane.recv().await? {
                bytes += batch.payload.len();
            }
            anyhow::Ok(bytes)
        });
    }
    let payload = Bytes::from(vec![0xa5; PIECE_BYTES]);
    for mut lane in source.lanes {
        let payload = payload.clone();
        tokio::spawn(async move {
            let pages = PIECE_BYTES / PAGE_BYTES;
            for piece in 0..pieces {
                let first = PageIndex((piece * pages) as u64);
                let pages = u16::try_from(pages)?;
                let run = PageRun { first, pages, kind: RunKind::Raw, version: 1 };
                let batch = Batch::plain(vec![run], payload.clone(), 1);
                lane.send(batch).await?;
            }
            lane.finish().await?;
            anyhow::Ok(())
        });
    }
    let mut received = 0;
    while let Some(bytes) = receiving.join_next().await {
        received += bytes??;
    }
    let seconds = begin.elapsed().as_secs_f64();
    ensure!(received == plan.bytes(), "{received} bytes arrived");
    source.closer.close_now(transport::close_code::DONE, "measured");
    Ok(seconds)
}

/// The two files of a transfer from memory to memory.
type Ends = Option<(Arc<File>, Arc<File>)>;

/// TLS for plain transfers: the server shows who it is, the client does not.
fn plain_tls(host: &Path) -> Result<(rustls::ServerConfig, rustls::ClientConfig)> {
    let chain = vec![CertificateDer::from_pem_file(host.join("cert.pem"))?];
    let key = PrivateKeyDer::from_pem_file(host.join("key.pem"))?;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(host.join("ca.pem"))?)?;
    let mut server = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    // A TCP client that leaves with these unread resets the connection.
    server.send_tls13_tickets = 0;
    let client = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok((server, client))
}

/// The same bytes over as many plain quinn connections, each with a socket of its own; from one
/// file to another if there are `ends`.
async fn quic_seconds(plan: &Plan, ends: Ends) -> Result<f64> {
    let Plan { host, options, pieces, .. } = plan;
    let pieces = *pieces;
    let (server, client) = plain_tls(host)?;
    let mut server =
        quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(server)?));
    server.transport_config(tuning(options)?);
    let mut client = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(client)?));
    client.transport_config(tuning(options)?);

    let mut endpoints = Vec::new();
    let mut streams = Vec::new();
    for _ in 0..options.lanes {
        let there = endpoint(options, Some(server.clone()))?;
        let here = endpoint(options, None)?;
        let connecting = here.connect_with(client.clone(), there.local_addr()?, "host")?;
        let accepting = async {
            there.accept().await.context("The endpoint ended")?.await.context("No connection")
        };
        let (source, destination) = tokio::join!(connecting, accepting);
        let (source, destination) = (source?, destination?);
        let mut send = source.open_uni().await?;
        send.write_all(&[0]).await?;
        let mut receive = destination.accept_uni().await?;
        receive.read_exact(&mut [0]).await?;
        endpoints.push((here, there, source, destination));
        streams.push((send, receive));
    }
    let begin = Instant::now();
    let mut receiving = tokio::task::JoinSet::new();
    let payload = Bytes::from(vec![0xa5; PIECE_BYTES]);
    let (source, destination) = ends.unzip();
    for (lane, (mut send, mut receive)) in streams.into_iter().enumerate() {
        let first = (lane * pieces * PIECE_BYTES) as u64;
        let (payload, source, destination) = (payload.clone(), source.clone(), destination.clone());
        tokio::spawn(async move {
            let mut buffer = vec![0; if source.is_some() { PIECE_BYTES } else { 0 }];
            for piece in 0..pieces {
                if let Some(source) = &source {
                    source.read_exact_at(&mut buffer, first + (piece * PIECE_BYTES) as u64)?;
                    send.write_all(&buffer).await?;
                } else {
                    send.write_chunk(payload.clone()).await?;
                }
            }
            send.finish()?;
            send.stopped().await?;
            anyhow::Ok(())
        });
        receiving.spawn(async move {
            let mut bytes = 0;
            while let Some(chunk) = receive.read_chunk(usize::MAX, true).await? {
                if let Some(destination) = &destination {
                    destination.write_all_at(&chunk.bytes, first + bytes as u64)?;
                }
                bytes += chunk.bytes.len();
            }
            anyhow::Ok(bytes)
        });
    }
    let seconds = all_received(plan, receiving, begin).await?;
    for (here, there, ..) in endpoints {
        here.close(VarInt::from_u32(0), b"");
        there.close(VarInt::from_u32(0), b"");
    }
    Ok(seconds)
}

/// The same over as many TLS connections on TCP, as the crates make them by default.
async fn tcp_seconds(plan: &Plan, ends: Ends) -> Result<f64> {
    let pieces = plan.pieces;
    let (server, client) = plain_tls(&plan.host)?;
    let (server, client) =
        (TlsAcceptor::from(Arc::new(server)), TlsConnector::from(Arc::new(client)));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let mut streams = Vec::new();
    for _ in 0..plan.options.lanes {
        let connecting = async {
            let stream = TcpStream::connect(listener.local_addr()?).await?;
            stream.set_nodelay(true)?;
            client.connect("host".try_into()?, stream).await.context("No connection")
        };
        let accepting = async {
            let (stream, _) = listener.accept().await?;
            server.accept(stream).await.context("No connection")
        };
        let (source, destination) = tokio::join!(connecting, accepting);
        streams.push((source?, destination?));
    }
    let begin = Instant::now();
    let mut receiving = tokio::task::JoinSet::new();
    let (source, destination) = ends.unzip();
    for (lane, (mut send, mut receive)) in streams.into_iter().enumerate() {
        let first = (lane * pieces * PIECE_BYTES) as u64;
        let (source, destination) = (source.clone(), destination.clone());
        tokio::spawn(async move {
            let mut buffer = vec![0xa5; PIECE_BYTES];
            for piece in 0..pieces {
                if let Some(source) = &source {
                    source.read_exact_at(&mut buffer, first + (piece * PIECE_BYTES) as u64)?;
                }
                send.write_all(&buffer).await?;
            }
            send.shutdown().await?;
            anyhow::Ok(())
        });
        receiving.spawn(async move {
            let mut bytes = 0;
            let mut buffer = vec![0; 256 << 10];
            loop {
                let read = receive.read(&mut buffer).await?;
                if read == 0 {
                    return anyhow::Ok(bytes);
                }
                if let Some(destination) = &destination {
                    destination.write_all_at(&buffer[..read], first + bytes as u64)?;
                }
                bytes += read;
            }
        });
    }
    all_received(plan, receiving, begin).await
}

/// The time since `begin` when all receivers are done.
async fn all_received(
    plan: &Plan,
    mut receiving: tokio::task::JoinSet<Result<usize>>,
    begin: Instant,
) -> Result<f64> {
    let mut received = 0;
    while let Some(bytes) = receiving.join_next().await {
        received += bytes??;
    }
    ensure!(received == plan.bytes(), "{received} bytes arrived");
    Ok(begin.elapsed().as_secs_f64())
}

/// The session's choice of cipher: AES-128 first.
fn provider() -> Arc<CryptoProvider> {
    let suites = [ring::cipher_suite::TLS13_AES_128_GCM_SHA256];
    Arc::new(CryptoProvider { cipher_suites: suites.into(), ..ring::default_provider() })
}

fn tuning(options: &Options) -> Result<Arc<quinn::TransportConfig>> {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(options.udp_payload_bytes_max);
    let mut config = quinn::TransportConfig::default();
    config
        .max_idle_timeout(Some(IdleTimeout::try_from(options.dead_peer)?))
        .keep_alive_interval(Some(options.dead_peer / 5))
        .stream_receive_window(VarInt::from_u32(options.lane_window_bytes))
        .receive_window(VarInt::from_u32(options.lane_window_bytes))
        .send_window(u64::from(options.lane_window_bytes))
        .send_fairness(false)
        .initial_rtt(options.initial_rtt)
        .mtu_discovery_config(Some(mtu));
    Ok(Arc::new(config))
}

fn endpoint(options: &Options, server: Option<quinn::ServerConfig>) -> Result<Endpoint> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_recv_buffer_size(options.udp_buffer_bytes)?;
    socket.set_send_buffer_size(options.udp_buffer_bytes)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(options.udp_payload_bytes_max)?;
    let socket: UdpSocket = socket.into();
    Ok(Endpoint::new(config, server, socket, Arc::new(TokioRuntime))?)
}
