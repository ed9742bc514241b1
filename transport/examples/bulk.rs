//! Measures bulk transfer over loopback: a plain quinn stream per connection, then a session's
//! lanes, with the same bytes, tuning and number of connections. Prints one JSON object:
//! `{"plain_gbps": .., "memory_gbps": .., "lanes_gbps": .., "ratio": ..}` and what was measured.
//!
//! ```text
//! cargo run --release -p transport --example bulk -- [MIB] [LANES] [REPEATS]
//! ```
//!
//! The plain transfer writes and reads the same pieces of 1 MiB without framing, checks and
//! acknowledgement by the application. It is measured twice: from one buffer into nothing
//! (`plain`), and from a file in memory into a new file in memory (`memory`), as guests' memory is;
//! the difference is what copying and finding memory costs on this machine. `lanes` go into nothing,
//! too, and `ratio` compares them with `plain`. All alternate, and the medians are printed.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use migrate_core::batch::{PageRun, RunKind};
use migrate_core::layout::{PAGE_BYTES, PageIndex};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Endpoint, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TokioRuntime, VarInt};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use socket2::{Domain, Protocol, Socket, Type};
use transport::messages::{Intent, MigrationId, Offer};
use transport::pki::{InitOptions, IssueOptions, init, issue};
use transport::{Batch, Identity, Listener, Options, connect};

const PIECE_BYTES: usize = 1 << 20;

/// Where guests' memory lies.
const MEMORY_FOLDER: &str = "/dev/shm";

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<usize> = std::env::args()
        .skip(1)
        .map(|argument| argument.parse().context("Arguments are [MIB] [LANES] [REPEATS]"))
        .collect::<Result<_>>()?;
    let mib = arguments.first().copied().unwrap_or(1024);
    let mut options = Options::default();
    options.lanes = arguments.get(1).copied().unwrap_or(options.lanes);
    let repeats = arguments.get(2).copied().unwrap_or(3);
    ensure!(mib >= options.lanes && repeats > 0, "At least 1 MiB a lane and one repeat are needed");

    let dir = tempfile::tempdir()?;
    init(dir.path(), &InitOptions::default())?;
    let host = issue(dir.path(), "host", &IssueOptions::default())?;
    let identity = Identity::load(&host)?;
    let pieces = mib / options.lanes;
    let bytes = pieces * options.lanes * PIECE_BYTES;
    let (mut plain, mut memory, mut lanes) = (Vec::new(), Vec::new(), Vec::new());
    let source = memory_file()?;
    for piece in 0..pieces * options.lanes {
        let content: Vec<u8> = (0..PIECE_BYTES).map(|at| (at * 31 + piece) as u8).collect();
        source.write_all_at(&content, (piece * PIECE_BYTES) as u64)?;
    }
    let source = Arc::new(source);
    let mut wire = 0;
    for _ in 0..repeats {
        plain.push(plain_seconds(&host, &options, pieces, None).await?);
        let ends = (Arc::clone(&source), Arc::new(memory_file()?));
        memory.push(plain_seconds(&host, &options, pieces, Some(ends)).await?);
        let (seconds, sent) = lanes_seconds(&identity, &options, pieces).await?;
        lanes.push(seconds);
        wire = sent;
    }
    let gbps = |seconds: f64| bytes as f64 * 8.0 / 1e9 / seconds;
    let (plain, lanes) = (gbps(median(&mut plain)), gbps(median(&mut lanes)));
    let memory = gbps(median(&mut memory));
    println!(
        "{{\"plain_gbps\": {plain:.3}, \"memory_gbps\": {memory:.3}, \
         \"lanes_gbps\": {lanes:.3}, \"ratio\": {:.3}, \
         \"bytes\": {bytes}, \"wire_bytes\": {wire}, \"connections\": {}, \"repeats\": {repeats}}}",
        lanes / plain,
        options.lanes
    );
    Ok(())
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
async fn lanes_seconds(
    identity: &Identity,
    options: &Options,
    pieces: usize,
) -> Result<(f64, u64)> {
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
    ensure!(received == pieces * options.lanes * PIECE_BYTES, "{received} bytes arrived");
    let wire = source.closer.wire_bytes().sent;
    source.closer.close_now(transport::close_code::DONE, "measured");
    Ok((seconds, wire))
}

/// The same bytes over as many plain quinn connections, each with a socket of its own; from one
/// file to another if there are `ends`.
async fn plain_seconds(
    host: &std::path::Path,
    options: &Options,
    pieces: usize,
    ends: Option<(Arc<File>, Arc<File>)>,
) -> Result<f64> {
    let chain = vec![CertificateDer::from_pem_file(host.join("cert.pem"))?];
    let key = PrivateKeyDer::from_pem_file(host.join("key.pem"))?;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(host.join("ca.pem"))?)?;
    let server = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    let mut server =
        quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(server)?));
    server.transport_config(tuning(options)?);
    let client = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
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
    let mut received = 0;
    while let Some(bytes) = receiving.join_next().await {
        received += bytes??;
    }
    let seconds = begin.elapsed().as_secs_f64();
    ensure!(received == pieces * options.lanes * PIECE_BYTES, "{received} bytes arrived");
    for (here, there, ..) in endpoints {
        here.close(VarInt::from_u32(0), b"");
        there.close(VarInt::from_u32(0), b"");
    }
    Ok(seconds)
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
