//! The web page for a browser without a certificate: on this machine alone, asking agents with this identity.
//!
//! ```text
//!   browser ─ cookie ─► 127.0.0.1 ─ certificate ─► agent
//! ```
//!
//! Whoever holds the token in the printed address may do what the identity may. Invariants: it listens on loopback only;
//! a request is looked at only if it names this address as its host, so that no foreign name can be made to lead here, and
//! brings the token, as part of the first address or as the cookie that this sets.

use std::fs::File;
use std::io::{self, Read as _};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Request, State};
use axum::http::header::{
    ACCEPT, CACHE_CONTROL, CONTENT_TYPE, COOKIE, ETAG, HOST, HeaderValue, IF_NONE_MATCH, LOCATION,
    SET_COOKIE,
};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::routing::any;
use bytes::Bytes;
use hyper_util::rt::TokioIo;
use subtle::ConstantTimeEq as _;
use tokio::net::TcpListener;

use super::control::{ApiError, Caller};
use super::routes::{Refused, finish};
use super::{Client, page, server};

/// Of the token, before it is written as text.
const TOKEN_BYTES: usize = 32;

/// What of a request is passed on to the agent.
const PASSED: [axum::http::HeaderName; 3] = [ACCEPT, CONTENT_TYPE, IF_NONE_MATCH];

/// What of an answer is passed back.
const PASSED_BACK: [axum::http::HeaderName; 3] = [CACHE_CONTROL, CONTENT_TYPE, ETAG];

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
pub enum WebError {
    /// It would be open to other machines.
    #[error(
        "{listen} is not on this machine alone; take 127.0.0.1:PORT, and ssh -L from elsewhere"
    )]
    NotLoopback {
        /// The address.
        listen: SocketAddr,
    },
    /// No agent was named.
    #[error("No agent is named; add --agent HOST:PORT")]
    NoAgent,
    /// Something of the system is missing.
    #[error("{what} is not possible")]
    System {
        /// What.
        what: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
}

/// A page that can be opened.
#[derive(Debug)]
pub struct Web {
    listener: TcpListener,
    addr: SocketAddr,
    token: String,
    agents: Agents,
}

/// Agents that may be asked; any will do.
#[derive(Debug)]
struct Agents {
    client: Client,
    addrs: Vec<String>,
    /// The one that answered last.
    current: AtomicUsize,
}

struct Gate {
    token: String,
    cookie: String,
    hosts: [String; 2],
}

impl Web {
    /// Opens the port; 0 chooses one. Agents are asked in turn until one answers.
    ///
    /// # Errors
    /// [`WebError`].
    pub async fn bind(
        listen: SocketAddr,
        client: Client,
        addrs: Vec<String>,
    ) -> Result<Self, WebError> {
        if !listen.ip().is_loopback() {
            return Err(WebError::NotLoopback { listen });
        }
        if addrs.is_empty() {
            return Err(WebError::NoAgent);
        }
        let failed = |what: String| move |source| WebError::System { what, source };
        let listener =
            TcpListener::bind(listen).await.map_err(failed(format!("Listening on {listen}")))?;
        let addr = listener.local_addr().map_err(failed(format!("Listening on {listen}")))?;
        let token = token().map_err(failed("Making a token".to_owned()))?;
        let agents = Agents { client, addrs, current: AtomicUsize::new(0) };
        Ok(Self { listener, addr, token, agents })
    }

    /// What is opened in a browser.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}/?token={}", self.addr, self.token)
    }

    /// Serves the page until `stop`.
    pub async fn serve(self, stop: impl Future<Output = ()> + Send) {
        let port = self.addr.port();
        let gate = Gate {
            token: self.token,
            // Cookies know no ports: two pages at a time must not take each other's.
            cookie: format!("godwit-{port}"),
            hosts: [self.addr.to_string(), format!("localhost:{port}")],
        };
        let paths = Router::new()
            .route("/v1/{*rest}", any(pass))
            .route("/metrics", any(pass))
            .route("/openapi.json", any(pass))
            .with_state(Arc::new(self.agents));
        let router =
            finish(paths.merge(page::router())).layer(from_fn_with_state(Arc::new(gate), admit));
        let caller = Caller { name: "browser".to_owned() };
        server::accept_until(self.listener, stop, move |stream, ending| {
            server::requests(TokioIo::new(stream), caller.clone(), router.clone(), ending)
        })
        .await;
    }
}

/// Lets those in who know the token.
async fn admit(State(gate): State<Arc<Gate>>, request: Request, next: Next) -> Response {
    let host = request.headers().get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    if !gate.hosts.iter().any(|known| known == host) {
        return refused(
            "This address is known by another name; open what `godwit-scheduler web` printed",
        );
    }
    if let Some(token) = shown(request.uri()) {
        return if gate.is_token(token) { gate.enter() } else { refused(ENTER) };
    }
    if !gate.has_cookie(request.headers()) {
        return refused(ENTER);
    }
    next.run(request).await
}

const ENTER: &str = "Open the address that `godwit-scheduler web` has printed, with its token";

fn refused(what: &str) -> Response {
    Refused(ApiError::forbidden(what)).into_response()
}

/// The token in the address of the page, if there is one.
fn shown(uri: &Uri) -> Option<&str> {
    if uri.path() != "/" {
        return None;
    }
    uri.query()?.split('&').find_map(|part| part.strip_prefix("token="))
}

impl Gate {
    fn is_token(&self, token: &str) -> bool {
        token.as_bytes().ct_eq(self.token.as_bytes()).into()
    }

    fn has_cookie(&self, headers: &HeaderMap) -> bool {
        let cookies = headers.get_all(COOKIE).iter().filter_map(|cookies| cookies.to_str().ok());
        let mut cookies = cookies.flat_map(|cookies| cookies.split(';'));
        cookies.any(|cookie| match cookie.trim().split_once('=') {
            Some((name, token)) => name == self.cookie && self.is_token(token),
            None => false,
        })
    }

    /// Sets the cookie and takes the token out of the address.
    fn enter(&self) -> Response {
        let cookie = format!("{}={}; Path=/; HttpOnly; SameSite=Strict", self.cookie, self.token);
        let Ok(cookie) = HeaderValue::from_str(&cookie) else {
            return StatusCode::INTERNAL_SERVER_ERROR.into_response();
        };
        let headers = [
            (SET_COOKIE, cookie),
            (LOCATION, HeaderValue::from_static("/")),
            (CACHE_CONTROL, HeaderValue::from_static("no-store")),
        ];
        (StatusCode::SEE_OTHER, headers).into_response()
    }
}

/// Asks an agent what the browser asks.
async fn pass(
    State(agents): State<Arc<Agents>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Refused> {
    let body = body.map_err(|error| Refused(ApiError::bad_request(error.body_text())))?;
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let mut request = Request::new(body);
    *request.method_mut() = method;
    *request.uri_mut() =
        path.parse().map_err(|_| Refused(ApiError::bad_request("That is no path")))?;
    copy(&headers, request.headers_mut(), &PASSED);
    let answer = agents.ask(request).await.map_err(Refused)?;
    let (parts, body) = answer.into_parts();
    let mut response = (parts.status, Body::from(body)).into_response();
    copy(&parts.headers, response.headers_mut(), &PASSED_BACK);
    Ok(response)
}

fn copy(from: &HeaderMap, to: &mut HeaderMap, names: &[axum::http::HeaderName]) {
    for name in names {
        if let Some(value) = from.get(name) {
            to.insert(name, value.clone());
        }
    }
}

impl Agents {
    /// What only looks is asked of the next one if one does not answer; what acts is asked once.
    async fn ask(&self, request: Request<Bytes>) -> Result<axum::http::Response<Bytes>, ApiError> {
        let first = self.current.load(Ordering::Relaxed);
        let tries = if request.method().is_safe() { self.addrs.len() } else { 1 };
        let mut last = ApiError::unavailable(WebError::NoAgent.to_string());
        for index in (first..first + tries).map(|index| index % self.addrs.len()) {
            let Some(addr) = self.addrs.get(index) else { continue };
            match self.client.pass(addr, None, request.clone()).await {
                Ok(answer) => {
                    self.current.store(index, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

fn token() -> io::Result<String> {
    let mut bytes = [0_u8; TOKEN_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
