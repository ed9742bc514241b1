//! Serves an agent over HTTP/1.1 and TLS, to those with a client certificate.
//!
//! ```text
//!   accept ─► first byte ─► handshake ─► requests ─► router ─► Control
//!                │ no TLS       │ no certificate
//!                ▼              ▼
//!             refusal         alert
//! ```
//!
//! Invariants: nothing is answered before a certificate of the authority is verified, but a plain request is told why it
//! is refused; connections, their time, requests' headers, bodies and time are all limited by the constants here.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tower_service::Service as _;
use transport::{Identity, IdentityError, https};

use super::control::{Caller, Control};
use super::places::{Place, Places};
use super::routes;

/// Most connections at a time; further ones wait.
pub const CONNECTIONS_MAX: usize = 256;

/// Most of them from one address: whoever keeps many open leaves others room.
pub const CONNECTIONS_PER_SOURCE_MAX: usize = 64;

/// Longest time until a handshake is over.
pub const HANDSHAKE_WITHIN: Duration = Duration::from_secs(5);

/// Longest time until a request's header has come, and longest that a connection is kept without a request.
pub const HEADER_WITHIN: Duration = Duration::from_secs(20);

/// Longest header of a request in bytes.
pub const HEADER_BYTES_MAX: usize = 32 << 10;

/// Most lines of a request's header.
pub const HEADERS_MAX: usize = 64;

/// Longest time that a connection is kept; then its request is finished and it ends.
pub const CONNECTION_WITHIN: Duration = Duration::from_secs(600);

/// Longest time for what is under way when the server ends.
pub const END_WITHIN: Duration = Duration::from_secs(5);

/// Pause after a connection could not be accepted.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// First byte of a connection that begins with a TLS handshake.
const TLS_HANDSHAKE: u8 = 0x16;

/// What a plain request is told.
const PLAIN_REFUSAL: &str = "This port speaks HTTPS and wants a client certificate of the cluster's authority. \
    For a browser: godwit-scheduler web --agent ADDR --identity DIR\n";

/// Serves until `stop`. What is under way then is given [`END_WITHIN`].
///
/// # Errors
/// TLS cannot be set up with the identity.
pub async fn serve<C: Control>(
    listener: TcpListener,
    identity: &Identity,
    control: Arc<C>,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), IdentityError> {
    let acceptor = TlsAcceptor::from(https::server(identity)?);
    let router = routes::router(control);
    accept_until(listener, stop, move |stream, ending| {
        let (acceptor, router) = (acceptor.clone(), router.clone());
        async move { secured(stream, &acceptor, router, ending).await }
    })
    .await;
    Ok(())
}

/// Accepts connections until `stop`, and lets those that stand end. Each is told when the end has come.
pub(super) async fn accept_until<F: Future<Output = ()> + Send + 'static>(
    listener: TcpListener,
    stop: impl Future<Output = ()> + Send,
    connection: impl Fn(TcpStream, watch::Receiver<bool>) -> F,
) {
    let (end, ending) = watch::channel(false);
    let places = Places::default();
    let mut connections = JoinSet::new();
    tokio::pin!(stop);
    loop {
        let accepted = tokio::select! {
            biased;
            () = &mut stop => break,
            accepted = accept(&listener, &places) => accepted,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
        };
        match accepted {
            Ok((stream, place)) => {
                let served = connection(stream, ending.clone());
                connections.spawn(async move {
                    served.await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "A connection could not be accepted");
                sleep(ACCEPT_AGAIN_AFTER).await;
            }
        }
    }
    drop(listener);
    // Nobody listens if there are no connections.
    let _told = end.send(true);
    let ended = async { while connections.join_next().await.is_some() {} };
    if timeout(END_WITHIN, ended).await.is_err() {
        tracing::info!(left = connections.len(), "Requests are cut off");
    }
}

async fn accept(listener: &TcpListener, places: &Places) -> io::Result<(TcpStream, Place)> {
    loop {
        let room = places.room().await?;
        let (stream, from) = listener.accept().await?;
        let Some(place) = places.take(room, from.ip()) else {
            tracing::debug!(%from, "It has {CONNECTIONS_PER_SOURCE_MAX} connections already");
            continue;
        };
        // Answers are written at once: there is nothing to wait for.
        stream.set_nodelay(true)?;
        return Ok((stream, place));
    }
}

async fn secured(
    mut stream: TcpStream,
    acceptor: &TlsAcceptor,
    router: Router,
    ending: watch::Receiver<bool>,
) {
    let mut first = [0];
    let handshake = async {
        if stream.peek(&mut first).await? == 1 && first != [TLS_HANDSHAKE] {
            return refuse_plain(&mut stream).await.map(|()| None);
        }
        acceptor.accept(stream).await.map(Some)
    };
    let stream = match timeout(HANDSHAKE_WITHIN, handshake).await {
        Ok(Ok(Some(stream))) => stream,
        Ok(Ok(None)) | Err(_) => return,
        Ok(Err(error)) => {
            tracing::debug!(%error, "A connection is refused");
            return;
        }
    };
    let (_, session) = stream.get_ref();
    let Some(name) = https::peer_name(session.peer_certificates()) else {
        tracing::debug!("A certificate without a name is refused");
        return;
    };
    requests(TokioIo::new(stream), Caller { name }, router, ending).await;
}

/// Serves one connection's requests, all of one caller.
pub(super) async fn requests<S>(
    stream: TokioIo<S>,
    caller: Caller,
    router: Router,
    mut ending: watch::Receiver<bool>,
) where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let mut request: Request = request.map(axum::body::Body::new);
        request.extensions_mut().insert(caller.clone());
        router.clone().call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_WITHIN)
        .max_buf_size(HEADER_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .serve_connection(stream, service);
    tokio::pin!(connection);
    let mut ended = tokio::select! {
        ended = &mut connection => Some(ended),
        _ = ending.wait_for(|ends| *ends) => None,
        () = sleep(CONNECTION_WITHIN) => None,
    };
    if ended.is_none() {
        connection.as_mut().graceful_shutdown();
        ended = timeout(routes::ACT_WITHIN + END_WITHIN, connection).await.ok();
    }
    if let Some(Err(error)) = ended {
        tracing::debug!(%error, "A connection ended early");
    }
}

/// Says why, and takes what comes so that the answer is not lost to a reset.
async fn refuse_plain(stream: &mut TcpStream) -> io::Result<()> {
    let answer = format!(
        "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{PLAIN_REFUSAL}",
        PLAIN_REFUSAL.len()
    );
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await?;
    let mut rest = stream.take(HEADER_BYTES_MAX as u64);
    tokio::io::copy(&mut rest, &mut tokio::io::sink()).await?;
    Ok(())
}
