//! Asks an agent over HTTP/1.1 and TLS, with this host's identity.
//!
//! Each request has a connection of its own: agents ask each other seldom, and nothing is left open that could go stale.
//! Invariants: every request ends within a named time, and no answer is read beyond [`ANSWER_BYTES_MAX`].

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1;
use hyper::header::{ACCEPT, CONNECTION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use rustls_pki_types::ServerName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use transport::{Identity, https};

use crate::control::{
    ApiError, ErrorBody, MoveAnswer, MoveRequest, ReceiveAnswer, ReceiveRequest, ResizeRequest,
};
use crate::figures::GrayBox;
use crate::view::{HistoryView, PlanView, View};

/// Longest answer in bytes.
pub const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Longest time until a connection stands.
pub const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// Longest time for asking what is.
pub const READ_WITHIN: Duration = Duration::from_secs(15);

/// Longest time for asking that something be done; longer than agents take ([`crate::control`]).
pub const ACT_WITHIN: Duration = Duration::from_secs(65);

/// Longest text of an error that is passed on, in characters.
const ERROR_CHARS_MAX: usize = 1024;

/// Stands for the server's name where none is expected; it is not sent.
const ANY_NAME: &str = "any.invalid";

/// What may stand in a path as it is.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// Asks agents.
#[derive(Debug, Clone)]
pub struct Client {
    identity: Arc<Identity>,
}

/// An agent: where it is asked, as `HOST:PORT`, and the name that its certificate must have, if one is expected.
#[derive(Debug, Clone, Copy)]
struct Agent<'a> {
    addr: &'a str,
    peer: Option<&'a str>,
}

impl Client {
    /// Shows this identity to all that it asks.
    #[must_use]
    pub const fn new(identity: Arc<Identity>) -> Self {
        Self { identity }
    }

    /// The name that others see.
    #[must_use]
    pub fn name(&self) -> &str {
        self.identity.name()
    }

    /// What the agent knows.
    ///
    /// # Errors
    /// [`ApiError::Unavailable`] if it cannot be reached, or what it says.
    pub async fn state(&self, addr: &str, peer: Option<&str>) -> Result<View, ApiError> {
        self.get(Agent { addr, peer }, "/v1/state").await
    }

    /// How a host's load was of late.
    ///
    /// # Errors
    /// As [`Self::state`].
    pub async fn history(
        &self,
        addr: &str,
        peer: Option<&str>,
        host: &str,
    ) -> Result<HistoryView, ApiError> {
        self.get(Agent { addr, peer }, &format!("/v1/hosts/{}/history", segment(host))).await
    }

    /// What the policy would do now. Nothing is done.
    ///
    /// # Errors
    /// As [`Self::state`].
    pub async fn propose(&self, addr: &str, peer: Option<&str>) -> Result<PlanView, ApiError> {
        self.get(Agent { addr, peer }, "/v1/plan").await
    }

    /// Begins a migration; returns once it is claimed.
    ///
    /// # Errors
    /// As [`Self::state`]. If the answer is lost, that is said: it may have begun.
    pub async fn begin_move(
        &self,
        addr: &str,
        peer: Option<&str>,
        request: &MoveRequest,
    ) -> Result<MoveAnswer, ApiError> {
        self.act(Agent { addr, peer }, Method::POST, "/v1/moves", Some(request)).await
    }

    /// Gives a migration up.
    ///
    /// # Errors
    /// As [`Self::begin_move`].
    pub async fn abort_move(
        &self,
        addr: &str,
        peer: Option<&str>,
        guest: &str,
    ) -> Result<(), ApiError> {
        let path = format!("/v1/moves/{}", segment(guest));
        self.act_only(Agent { addr, peer }, Method::DELETE, &path, None::<&()>).await
    }

    /// Says that a host is to be emptied, or is not any more.
    ///
    /// # Errors
    /// As [`Self::begin_move`].
    pub async fn drain(
        &self,
        addr: &str,
        peer: Option<&str>,
        host: &str,
        is_drained: bool,
    ) -> Result<(), ApiError> {
        let method = if is_drained { Method::PUT } else { Method::DELETE };
        let path = format!("/v1/hosts/{}/drain", segment(host));
        self.act_only(Agent { addr, peer }, method, &path, None::<&()>).await
    }

    /// Asks a destination to get ready for a guest.
    ///
    /// # Errors
    /// As [`Self::begin_move`].
    pub async fn receive(
        &self,
        addr: &str,
        peer: Option<&str>,
        request: &ReceiveRequest,
    ) -> Result<ReceiveAnswer, ApiError> {
        self.act(Agent { addr, peer }, Method::POST, "/v1/receive", Some(request)).await
    }

    /// Tells a destination that a guest does not come.
    ///
    /// # Errors
    /// As [`Self::begin_move`].
    pub async fn stop_receiving(
        &self,
        addr: &str,
        peer: Option<&str>,
        guest: &str,
    ) -> Result<(), ApiError> {
        let path = format!("/v1/receive/{}", segment(guest));
        self.act_only(Agent { addr, peer }, Method::DELETE, &path, None::<&()>).await
    }

    /// Changes what a guest may use of its memory.
    ///
    /// # Errors
    /// As [`Self::begin_move`].
    pub async fn resize(
        &self,
        addr: &str,
        peer: Option<&str>,
        guest: &str,
        request: &ResizeRequest,
    ) -> Result<(), ApiError> {
        let path = format!("/v1/guests/{}/memory", segment(guest));
        self.act_only(Agent { addr, peer }, Method::PUT, &path, Some(request)).await
    }

    /// Tells what a guest's application says of itself.
    ///
    /// # Errors
    /// As [`Self::begin_move`].
    pub async fn set_gray_box(
        &self,
        addr: &str,
        peer: Option<&str>,
        guest: &str,
        figures: &GrayBox,
    ) -> Result<(), ApiError> {
        let path = format!("/v1/guests/{}/gray-box", segment(guest));
        self.act_only(Agent { addr, peer }, Method::PUT, &path, Some(figures)).await
    }

    /// Passes a request on as it is, but for `Host` and `Connection`, and the answer back, whatever it says.
    ///
    /// # Errors
    /// [`ApiError::Unavailable`] if there is no answer.
    pub async fn pass(
        &self,
        addr: &str,
        peer: Option<&str>,
        request: Request<Bytes>,
    ) -> Result<Response<Bytes>, ApiError> {
        let agent = Agent { addr, peer };
        let is_read = request.method().is_safe();
        let within = if is_read { READ_WITHIN } else { ACT_WITHIN };
        let mut sent = false;
        match timeout(within, self.exchange(agent, request, &mut sent)).await {
            Ok(answer) => answer,
            Err(_) => Err(unavailable(addr, &format!("it does not answer within {within:?}"))),
        }
        .map_err(|error| if sent && !is_read { in_doubt(&error) } else { error })
    }

    async fn get<T: DeserializeOwned>(&self, agent: Agent<'_>, path: &str) -> Result<T, ApiError> {
        self.act(agent, Method::GET, path, None::<&()>).await
    }

    async fn act<T: DeserializeOwned>(
        &self,
        agent: Agent<'_>,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, ApiError> {
        let bytes = self.ask(agent, method, path, body).await?;
        serde_json::from_slice(&bytes).map_err(|error| {
            unavailable(
                agent.addr,
                &format!(
                    "its answer is not of a known form ({error}); bring all agents to one version"
                ),
            )
        })
    }

    async fn act_only(
        &self,
        agent: Agent<'_>,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<(), ApiError> {
        self.ask(agent, method, path, body).await.map(drop)
    }

    /// The body of a success.
    async fn ask(
        &self,
        agent: Agent<'_>,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Bytes, ApiError> {
        let body = match body {
            Some(body) => serde_json::to_vec(body)
                .map_err(|error| ApiError::bad_request(error.to_string()))?,
            None => Vec::new(),
        };
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .body(Bytes::from(body))
            .map_err(|error| ApiError::bad_request(error.to_string()))?;
        let json = HeaderValue::from_static("application/json");
        if !request.body().is_empty() {
            request.headers_mut().insert(CONTENT_TYPE, json.clone());
        }
        request.headers_mut().insert(ACCEPT, json);
        let answer = self.pass(agent.addr, agent.peer, request).await?;
        if answer.status().is_success() {
            return Ok(answer.into_body());
        }
        let status = answer.status().as_u16();
        let what = serde_json::from_slice::<ErrorBody>(answer.body())
            .map(|body| body.error.chars().take(ERROR_CHARS_MAX).collect())
            .unwrap_or_else(|_| format!("{} answers with status {status}", agent.addr));
        Err(ApiError::from_status(status, what))
    }

    async fn exchange(
        &self,
        agent: Agent<'_>,
        request: Request<Bytes>,
        sent: &mut bool,
    ) -> Result<Response<Bytes>, ApiError> {
        let stream = match timeout(CONNECT_WITHIN, self.connect(agent)).await {
            Ok(stream) => stream?,
            Err(_) => {
                return Err(unavailable(
                    agent.addr,
                    &format!("no connection in {CONNECT_WITHIN:?}"),
                ));
            }
        };
        let lost = |error: hyper::Error| unavailable(agent.addr, &chain(&error));
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(lost)?;
        let (mut parts, body) = request.into_parts();
        let host = HeaderValue::from_str(agent.addr)
            .map_err(|_| ApiError::bad_request("that is no address"))?;
        parts.headers.insert(HOST, host);
        parts.headers.insert(CONNECTION, HeaderValue::from_static("close"));
        let request = Request::from_parts(parts, Full::new(body));
        *sent = true;
        let answered = async {
            let (parts, body) = sender.send_request(request).await.map_err(lost)?.into_parts();
            let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
            let body = body.map_err(|error| unavailable(agent.addr, &error.to_string()))?;
            Ok(Response::from_parts(parts, body.to_bytes()))
        };
        tokio::pin!(answered, connection);
        // The connection is driven here, not by a task of its own: it ends with the request.
        tokio::select! {
            biased;
            answer = &mut answered => answer,
            ended = &mut connection => match ended {
                Ok(()) => answered.await,
                // A server that wants no certificate of ours says so after the handshake.
                Err(error) => Err(lost(error)),
            },
        }
    }

    async fn connect(&self, agent: Agent<'_>) -> Result<TlsStream<TcpStream>, ApiError> {
        let config = https::client(&self.identity, agent.peer)
            .map_err(|error| unavailable(agent.addr, &chain(&error)))?;
        let name = ServerName::try_from(agent.peer.unwrap_or(ANY_NAME).to_owned())
            .map_err(|error| unavailable(agent.addr, &chain(&error)))?;
        let stream = TcpStream::connect(agent.addr)
            .await
            .map_err(|error| unavailable(agent.addr, &error.to_string()))?;
        // Requests and answers are written at once: there is nothing to wait for.
        let _slower = stream.set_nodelay(true);
        TlsConnector::from(config)
            .connect(name, stream)
            .await
            .map_err(|error| unavailable(agent.addr, &chain(&error)))
    }
}

/// A name as one part of a path.
#[must_use]
pub fn segment(name: &str) -> String {
    // A lone dot, or two, would be taken for a step in the path.
    match name {
        "." => "%2E".to_owned(),
        ".." => "%2E%2E".to_owned(),
        name => utf8_percent_encode(name, PLAIN).to_string(),
    }
}

fn unavailable(addr: &str, why: &str) -> ApiError {
    ApiError::unavailable(format!("The agent at {addr} cannot be asked: {why}"))
}

fn in_doubt(error: &ApiError) -> ApiError {
    ApiError::unavailable(format!("{error}; whether it did what was asked is not known"))
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}
