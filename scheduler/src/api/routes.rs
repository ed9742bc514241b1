//! What may be asked under which path, and how it is answered.
//!
//! Invariants: whatever changes something goes on to its end even if the caller leaves; whatever is refused says why as
//! JSON; a request that a browser makes for another site's page changes nothing.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Extension, FromRequestParts, Path, Request, State};
use axum::http::header::{
    ALLOW, CACHE_CONTROL, CONTENT_TYPE, ETAG, HOST, HeaderValue, IF_NONE_MATCH, ORIGIN,
};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use axum::{Json, Router};
use bytes::Bytes;
use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use xxhash_rust::xxh3::xxh3_128;

use super::control::{
    ApiError, Caller, Control, ErrorBody, MoveAnswer, MoveRequest, ReceiveAnswer, ReceiveRequest,
    ResizeRequest,
};
use super::view::{HistoryView, PlanView, View};
use super::{openapi, page};
use crate::model::GrayBox;
use crate::profile::report::NAME_BYTES_MAX;

/// Longest body of a request in bytes.
pub(super) const BODY_BYTES_MAX: usize = 64 << 10;

/// Longest time that a caller waits for what it asks to be done. What is not done by then goes on.
pub(super) const ACT_WITHIN: Duration = Duration::from_secs(55);

/// Most things that are being done at a time.
pub(super) const ACTS_MAX: usize = 64;

/// What metrics are (<https://prometheus.io/docs/specs/om/open_metrics_spec/>).
const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// An agent that is asked.
struct App<C> {
    control: Arc<C>,
    /// The last state that was told, as it was told.
    told: Mutex<Option<Told>>,
    places: Arc<Semaphore>,
}

#[derive(Clone)]
struct Told {
    view: Arc<View>,
    json: Bytes,
    etag: HeaderValue,
}

type Agent<C> = State<Arc<App<C>>>;

/// All paths. Requests must carry their [`Caller`] as an extension.
pub(super) fn router<C: Control>(control: Arc<C>) -> Router {
    let places = Arc::new(Semaphore::new(ACTS_MAX));
    let app = Arc::new(App { control, told: Mutex::new(None), places });
    let paths = Router::new()
        .route("/v1/state", get(state::<C>))
        .route("/v1/hosts/{host}/history", get(history::<C>))
        .route("/v1/hosts/{host}/drain", put(drain::<C>).delete(undrain::<C>))
        .route("/v1/plan", get(plan::<C>))
        .route("/v1/moves", post(begin_move::<C>))
        .route("/v1/moves/{guest}", delete(abort_move::<C>))
        .route("/v1/receive", post(receive::<C>))
        .route("/v1/receive/{guest}", delete(stop_receiving::<C>))
        .route("/v1/guests/{guest}/memory", put(resize::<C>))
        .route("/v1/guests/{guest}/gray-box", put(set_gray_box::<C>))
        .route("/metrics", get(metrics::<C>))
        .route("/openapi.json", get(openapi_json))
        .with_state(app);
    finish(paths.merge(page::router()))
}

/// What holds for all paths.
pub(super) fn finish(router: Router) -> Router {
    router
        .fallback(async || Refused(ApiError::not_found("There is no such path; see /openapi.json")))
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(from_fn(guard))
}

/// What is known of the cluster.
#[utoipa::path(
    get, path = "/v1/state", tag = "look",
    params(("If-None-Match" = Option<String>, Header, description = "`ETag` of the last answer")),
    responses(
        (status = 200, description = "Everything at one moment; `ETag` names it", body = View),
        (status = 304, description = "As before"),
        (status = "default", description = "Why not", body = ErrorBody),
    ),
)]
async fn state<C: Control>(State(app): Agent<C>, headers: HeaderMap) -> Result<Response, Refused> {
    let Told { json, etag, .. } = app.tell()?;
    let unchanged = headers.get(IF_NONE_MATCH) == Some(&etag);
    let mut response = if unchanged {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        (with_type("application/json"), Body::from(json)).into_response()
    };
    response.headers_mut().insert(ETAG, etag);
    Ok(response)
}

/// How a host's load was of late, and what is expected next.
#[utoipa::path(
    get, path = "/v1/hosts/{host}/history", tag = "look",
    params(("host" = String, Path, description = "A host's name")),
    responses(
        (status = 200, description = "Shares of what the host has", body = HistoryView),
        (status = "default", description = "Why not", body = ErrorBody),
    ),
)]
async fn history<C: Control>(
    State(app): Agent<C>,
    Name(host): Name,
) -> Result<Json<HistoryView>, Refused> {
    let history = app.control.history(&host);
    history
        .map(Json)
        .ok_or_else(|| Refused(ApiError::not_found(format!("There is no host {host:?}"))))
}

/// What the policy would do now. Nothing is done.
#[utoipa::path(
    get, path = "/v1/plan", tag = "look",
    responses(
        (status = 200, description = "A plan; it has no steps if nothing is to be done", body = PlanView),
        (status = "default", description = "Why not", body = ErrorBody),
    ),
)]
async fn plan<C: Control>(State(app): Agent<C>) -> Result<Json<PlanView>, Refused> {
    app.act(async |control| control.propose().await).await.map(Json)
}

/// Begins a migration.
#[utoipa::path(
    post, path = "/v1/moves", tag = "act", request_body = MoveRequest,
    responses(
        (status = 202, description = "It is claimed and begins; how it goes is in the state", body = MoveAnswer),
        (status = "default", description = "Why not", body = ErrorBody),
    ),
)]
async fn begin_move<C: Control>(
    State(app): Agent<C>,
    Extension(caller): Extension<Caller>,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<MoveAnswer>), Refused> {
    let request: MoveRequest = parsed(body)?;
    let begun = app.act(async move |control| control.begin_move(&caller, request).await).await?;
    Ok((StatusCode::ACCEPTED, Json(begun)))
}

/// Gives a migration up: the guest runs on where it was.
#[utoipa::path(
    delete, path = "/v1/moves/{guest}", tag = "act",
    params(("guest" = String, Path, description = "A guest's name")),
    responses(
        (status = 204, description = "It is being given up"),
        (status = "default", description = "Why not", body = ErrorBody),
    ),
)]
async fn abort_move<C: Control>(
    State(app): Agent<C>,
    Extension(caller): Extension<Caller>,
    Name(guest): Name,
) -> Result<StatusCode, Refused> {
    app.act(async move |control| control.abort_move(&caller, &guest).await).await.map(nothing)
}

/// Empties a host.
#[utoipa::path(
    put, path = "/v1/hosts/{host}/drain", tag = "act",
    params(("host" = String, Path, description = "A host's name")),
    responses(
        (status = 204, description = "Its guests are to leave, and none comes"),
        (status = "default", description = "Why not", body = ErrorBody),
    ),
)]
async fn drain<C: Control>(
    State(app): Agent<C>,
    Extension(caller): Extension<Caller>,
    Name(host): Name,
) -> Result<StatusCode, Refused> {
    app.act(async move |control| control.drain(&caller, &host, true).await).await.map(nothing)
}

/// Lets guests come to a host again.
#[utoipa::path(
    delete, path = "/v1/hosts/{host}/drain", tag = "act",
    params(("host" = String, Path, description = "A host's name")),
    responses(
        (status = 204, description = "Guests may come again"),
        (status = "default", description = "Why not", body = ErrorBody),
    ),
)]
async fn undrain<C: Control>(
    State(app): Agent<C>,
    Extension(caller): Extension<Caller>,
    Name(host): Name,
) -> Result<StatusCode, Refused> {
    app.act(async move |control| control.drain(&caller, &host, false).await).await.map(nothing)
}

/// Gets this host ready for a guest. Only agents ask this.
#[utoipa::path(
    post, path = "/v1/receive", tag = "agents", request_body = ReceiveRequest,
    responses(
        (status = 200, description = "Where the guest is waited for", body = ReceiveAnswer),
        (status = "default", description = "Why not", body = ErrorBody),
    ),
)]
async fn receive<C: Control>(
    State(app): Agent<C>,
    Extension(caller): Extension<Caller>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<ReceiveAnswer>, Refused> {
    let request: ReceiveRequest = parsed(body)?;
    app.act(async move |control| control.receive(&caller, request).await).await.map(Json)
}

/// Says that a guest does not come. Only agents ask this.
#[utoipa::path(
    delete, path = "/v1/receive/{guest}", tag = "agents",
    params(("guest" = String, Path, description = "A guest's name")),
    responses(
        (status = 204, description = "It is not waited for any more"),
        (status = "default", description = "Why not", body = ErrorBody),
    ),
)]
async fn stop_receiving<C: Control>(
    State(app): Agent<C>,
    Extension(caller): Extension<Caller>,
    Name(guest): Name,
) -> Result<StatusCode, Refused> {
    app.act(async move |control| control.stop_receiving(&caller, &guest).await).await.map(nothing)
}

/// Changes what a guest of this host may use of its memory. Only agents ask this.
#[utoipa::path(
    put, path = "/v1/guests/{guest}/memory", tag = "agents", request_body = ResizeRequest,
    params(("guest" = String, Path, description = "A guest's name")),
    responses(
        (status = 204, description = "Its balloon was told"),
        (status = "default", description = "Why not", body = ErrorBody),
    ),
)]
async fn resize<C: Control>(
    State(app): Agent<C>,
    Extension(caller): Extension<Caller>,
    Name(guest): Name,
    body: Result<Bytes, BytesRejection>,
) -> Result<StatusCode, Refused> {
    let request: ResizeRequest = parsed(body)?;
    app.act(async move |control| control.resize(&caller, &guest, request).await).await.map(nothing)
}

/// Takes what the application of a guest of this host says of itself.
#[utoipa::path(
    put, path = "/v1/guests/{guest}/gray-box", tag = "figures", request_body = GrayBox,
    params(("guest" = String, Path, description = "A guest's name")),
    responses(
        (status = 204, description = "It counts from the next report on"),
        (status = "default", description = "Why not", body = ErrorBody),
    ),
)]
async fn set_gray_box<C: Control>(
    State(app): Agent<C>,
    Extension(caller): Extension<Caller>,
    Name(guest): Name,
    body: Result<Bytes, BytesRejection>,
) -> Result<StatusCode, Refused> {
    let figures: GrayBox = parsed(body)?;
    let set = app.act(async move |control| control.set_gray_box(&caller, &guest, figures).await);
    set.await.map(nothing)
}

/// Metrics for Prometheus.
#[utoipa::path(
    get, path = "/metrics", tag = "look",
    responses((status = 200, description = "OpenMetrics", body = String, content_type = "application/openmetrics-text")),
)]
async fn metrics<C: Control>(State(app): Agent<C>) -> Response {
    (with_type(METRICS_TYPE), app.control.metrics()).into_response()
}

/// This description.
#[utoipa::path(
    get, path = "/openapi.json", tag = "look",
    responses((status = 200, description = "OpenAPI 3.1", body = Object)),
)]
async fn openapi_json() -> Result<Response, Refused> {
    let text = openapi::text().map_err(|what| Refused(ApiError::unavailable(what)))?;
    Ok((with_type("application/json"), text).into_response())
}

impl<C: Control> App<C> {
    /// The state as JSON; made once for all that ask.
    fn tell(&self) -> Result<Told, Refused> {
        let view = self.control.view();
        let mut told = self.told.lock();
        if let Some(told) = told.as_ref().filter(|told| Arc::ptr_eq(&told.view, &view)) {
            return Ok(told.clone());
        }
        let json = to_json(view.as_ref())?;
        let etag = HeaderValue::from_str(&format!("\"{:x}\"", xxh3_128(&json)))
            .map_err(|error| Refused(ApiError::unavailable(error.to_string())))?;
        Ok(told.insert(Told { view, json, etag }).clone())
    }

    /// Has something done, to its end even if the caller leaves.
    async fn act<T, F>(&self, act: impl FnOnce(Arc<C>) -> F) -> Result<T, Refused>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, ApiError>> + Send + 'static,
    {
        let unavailable = |what: &str| Refused(ApiError::unavailable(what));
        let place = Arc::clone(&self.places)
            .try_acquire_owned()
            .map_err(|_| unavailable("Too much is being done; ask again in a moment"))?;
        let act = act(Arc::clone(&self.control));
        let done = tokio::spawn(async move {
            let done = act.await;
            drop(place);
            done
        });
        match timeout(ACT_WITHIN, done).await {
            Ok(Ok(done)) => done.map_err(Refused),
            Ok(Err(_)) => Err(unavailable("The agent failed at this; its log says why")),
            Err(_) => Err(unavailable("It is not done yet and goes on; look at the state")),
        }
    }
}

/// An error, as it is answered.
#[derive(Debug)]
pub(super) struct Refused(pub(super) ApiError);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.0.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(ErrorBody { error: self.0.to_string() })).into_response()
    }
}

/// A name out of the path.
struct Name(String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refused> {
        let Path(name) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|error| Refused(ApiError::bad_request(error.body_text())))?;
        if name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
            return Err(Refused(ApiError::bad_request("That is no name of a host or guest")));
        }
        Ok(Self(name))
    }
}

fn parsed<T: DeserializeOwned>(body: Result<Bytes, BytesRejection>) -> Result<T, Refused> {
    let body = body.map_err(|error| Refused(ApiError::bad_request(error.body_text())))?;
    serde_json::from_slice(&body).map_err(|error| {
        Refused(ApiError::bad_request(format!("The body is not what is expected: {error}")))
    })
}

fn to_json(value: &impl Serialize) -> Result<Bytes, Refused> {
    serde_json::to_vec(value)
        .map(Bytes::from)
        .map_err(|error| Refused(ApiError::unavailable(error.to_string())))
}

const fn nothing((): ()) -> StatusCode {
    StatusCode::NO_CONTENT
}

pub(super) fn with_type(media_type: &'static str) -> [(axum::http::HeaderName, HeaderValue); 1] {
    [(CONTENT_TYPE, HeaderValue::from_static(media_type))]
}

async fn wrong_method() -> Response {
    let error = "That cannot be done with this path; see /openapi.json".to_owned();
    (StatusCode::METHOD_NOT_ALLOWED, Json(ErrorBody { error })).into_response()
}

/// Refuses what another site's page makes a browser ask, and marks answers.
async fn guard(request: Request, next: Next) -> Response {
    let is_read = request.method().is_safe();
    let mut response = if is_read || is_of_this_site(request.headers()) {
        next.run(request).await
    } else {
        let what = "Another site's page asks for this: it is not done";
        Refused(ApiError::forbidden(what)).into_response()
    };
    let is_refusal = response.status().is_client_error() || response.status().is_server_error();
    let headers = response.headers_mut();
    headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    for (name, value) in page::HEADERS {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    if is_refusal && response.status() != StatusCode::METHOD_NOT_ALLOWED {
        response.headers_mut().remove(ALLOW);
    }
    response
}

/// Browsers say whose page asks; programs say nothing.
pub(super) fn is_of_this_site(headers: &HeaderMap) -> bool {
    let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
    let from = text("sec-fetch-site");
    let origin = text(ORIGIN.as_str());
    let host = text(HOST.as_str()).unwrap_or_default();
    let same_host = |origin: &str| {
        origin.strip_prefix("https://").or_else(|| origin.strip_prefix("http://")) == Some(host)
    };
    from.is_none_or(|from| matches!(from, "same-origin" | "none")) && origin.is_none_or(same_host)
}
