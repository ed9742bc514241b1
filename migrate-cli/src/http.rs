//! Metrics over HTTP/1.1: one request a connection, and one page.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use transport::TransportError;

use crate::error::EngineError;
use crate::tell;

/// Longest request with its headers in bytes.
const REQUEST_BYTES_MAX: usize = 8 << 10;

/// How long a request and its answer may take.
const WITHIN: Duration = Duration::from_secs(5);

/// Most requests at a time; further ones wait.
const REQUESTS_MAX: usize = 16;

/// Pause after a connection could not be accepted.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// What the text is (<https://prometheus.io/docs/specs/om/open_metrics_spec/>).
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A port for metrics.
#[derive(Debug)]
pub struct Http {
    listener: TcpListener,
    addr: SocketAddr,
}

/// Opens the port; 0 chooses one.
///
/// # Errors
/// Another process has it, or what else is wrong.
pub async fn bind(addr: SocketAddr) -> Result<Http, EngineError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => TransportError::AddressInUse { protocol: "TCP", addr },
        _ => TransportError::Socket { what: "listen for requests of metrics", addr, source },
    };
    let listener = TcpListener::bind(addr).await.map_err(failed)?;
    let addr = listener.local_addr().map_err(failed)?;
    Ok(Http { listener, addr })
}

/// The same if a port is asked for.
///
/// # Errors
/// As [`bind`].
pub async fn bind_if(addr: Option<SocketAddr>) -> Result<Option<Http>, EngineError> {
    match addr {
        Some(addr) => bind(addr).await.map(Some),
        None => Ok(None),
    }
}

/// All that is registered, as text.
pub fn page(registry: &Registry) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _infallible = encode(&mut text, registry);
    text
}

impl Http {
    /// The address that is listened on.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Tells the user of the port, and answers from now on with what `text` says at the moment.
    pub fn begin(self, text: impl Fn() -> String + Send + Sync + 'static) {
        tell!("metrics on http://{}/metrics", self.addr);
        tokio::spawn(self.serve(text));
    }

    /// Answers for ever with what `text` says at the moment.
    pub async fn serve(self, text: impl Fn() -> String + Send + Sync + 'static) {
        let text = Arc::new(text);
        let room = Arc::new(Semaphore::new(REQUESTS_MAX));
        while let Ok(permit) = Arc::clone(&room).acquire_owned().await {
            let (stream, peer) = match self.listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a request of metrics was not accepted");
                    tokio::time::sleep(ACCEPT_AGAIN_AFTER).await;
                    continue;
                }
            };
            let text = Arc::clone(&text);
            tokio::spawn(async move {
                let _permit = permit;
                match tokio::time::timeout(WITHIN, answer(stream, &*text)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::debug!(%peer, %error, "no metrics were sent"),
                    Err(_elapsed) => tracing::debug!(%peer, "a request of metrics took too long"),
                }
            });
        }
    }
}

async fn answer(mut stream: TcpStream, text: &(impl Fn() -> String + Sync)) -> io::Result<()> {
    let request = read_request(&mut stream).await?;
    let response = match target(&request) {
        Some("/metrics") => response("200 OK", CONTENT_TYPE, &text()),
        Some(_) => response("404 Not Found", "text/plain", "Metrics are at /metrics.\n"),
        None => response("400 Bad Request", "text/plain", "Only GET is answered.\n"),
    };
    stream.write_all(response.as_bytes()).await?;
    stream.shutdown().await
}

/// Everything up to the empty line.
async fn read_request(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut request = Vec::with_capacity(1024);
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        if request.len() >= REQUEST_BYTES_MAX {
            return Err(io::Error::other("the request is too long"));
        }
        if stream.read_buf(&mut request).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(request)
}

/// The path that a GET asks for, without its query.
fn target(request: &[u8]) -> Option<&str> {
    let line = request.split(|byte| *byte == b'\r').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    let is_http = method == "GET" && version.starts_with("HTTP/1.") && words.next().is_none();
    is_http.then(|| target.split('?').next().unwrap_or_default())
}

fn response(status: &str, content_type: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{body}"
    )
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    async fn ask(addr: SocketAddr, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).await.unwrap_or_default();
        response
    }

    #[tokio::test]
    async fn metrics_are_at_their_path_alone() {
        let http = bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await.unwrap();
        let addr = http.addr();
        tokio::spawn(http.serve(|| {
            "some 7
# EOF
"
            .to_owned()
        }));
        let found = ask(addr, b"GET /metrics?x=1 HTTP/1.1\r\nHost: x\r\n\r\n").await;
        let (head, body) = found.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
        assert_eq!(
            body,
            "some 7
# EOF
"
        );
        assert!(ask(addr, b"GET / HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 404"));
        for bad in
            [&b"POST /metrics HTTP/1.1\r\n\r\n"[..], b"GET /metrics\r\n\r\n", b"\xff \r\n\r\n"]
        {
            assert!(ask(addr, bad).await.starts_with("HTTP/1.1 400"));
        }
        assert_eq!(ask(addr, &vec![b'x'; REQUEST_BYTES_MAX + 1]).await, "");
        let taken = bind(addr).await.unwrap_err().tell();
        assert!(taken.contains("in use") && taken.contains("choose another port"), "{taken}");
    }
}
