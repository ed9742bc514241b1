//! What may be asked of an agent.

use std::future::Future;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::figures::GrayBox;
use crate::view::{HistoryView, PlanView, View};

/// Why an agent did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// No such host, guest or move. HTTP 404.
    #[error("{what}")]
    NotFound {
        /// What there is not, and what there is.
        what: String,
    },
    /// It is against a rule, or something else is under way. HTTP 409.
    #[error("{what}")]
    Conflict {
        /// Why not, and what to do.
        what: String,
    },
    /// What was asked makes no sense. HTTP 400.
    #[error("{what}")]
    BadRequest {
        /// What is wrong with it.
        what: String,
    },
    /// The caller's certificate does not allow it. HTTP 403.
    #[error("{what}")]
    Forbidden {
        /// Who may.
        what: String,
    },
    /// The store, another agent or QEMU cannot be reached. HTTP 503.
    #[error("{what}")]
    Unavailable {
        /// Why, and where the guest runs where that matters.
        what: String,
    },
}

impl ApiError {
    /// [`Self::NotFound`].
    pub fn not_found(what: impl Into<String>) -> Self {
        Self::NotFound { what: what.into() }
    }

    /// [`Self::Conflict`].
    pub fn conflict(what: impl Into<String>) -> Self {
        Self::Conflict { what: what.into() }
    }

    /// [`Self::BadRequest`].
    pub fn bad_request(what: impl Into<String>) -> Self {
        Self::BadRequest { what: what.into() }
    }

    /// [`Self::Forbidden`].
    pub fn forbidden(what: impl Into<String>) -> Self {
        Self::Forbidden { what: what.into() }
    }

    /// [`Self::Unavailable`].
    pub fn unavailable(what: impl Into<String>) -> Self {
        Self::Unavailable { what: what.into() }
    }

    /// The status code that says so.
    #[must_use]
    pub const fn status(&self) -> u16 {
        match self {
            Self::BadRequest { .. } => 400,
            Self::Forbidden { .. } => 403,
            Self::NotFound { .. } => 404,
            Self::Conflict { .. } => 409,
            Self::Unavailable { .. } => 503,
        }
    }

    /// What a status code says; those that agents do not send count as unavailable.
    #[must_use]
    pub const fn from_status(status: u16, what: String) -> Self {
        match status {
            400 | 405 | 413 | 415 | 422 => Self::BadRequest { what },
            401 | 403 => Self::Forbidden { what },
            404 => Self::NotFound { what },
            409 => Self::Conflict { what },
            _ => Self::Unavailable { what },
        }
    }
}

/// What an answer holds that is no success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// What is wrong and what to do, in words.
    pub error: String,
}

/// Asks for a migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MoveRequest {
    /// The guest.
    pub guest: String,
    /// Where to; the best place is found where none is named.
    #[serde(default)]
    pub to: Option<String>,
    /// Why, in words.
    #[serde(default)]
    pub reason: String,
}

/// What was begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MoveAnswer {
    /// The guest.
    pub guest: String,
    /// Where from.
    pub from: String,
    /// Where to.
    pub to: String,
    /// The host whose agent moves it.
    pub agent: String,
}

/// Asks a destination to get ready for a guest. Only agents ask this.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReceiveRequest {
    /// The guest.
    pub guest: String,
    /// Its UUID, empty if it has none.
    #[serde(default)]
    pub uuid: String,
}

/// Where the destination waits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReceiveAnswer {
    /// Address and port of `migrate receive`.
    pub addr: String,
}

/// Asks for a guest's memory to grow or shrink. Only agents ask this.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResizeRequest {
    /// What the guest may use, MiB.
    pub to_mib: f64,
}

/// Who asks, by the certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The certificate's name.
    pub name: String,
}

/// An agent, as it can be asked. Whether the caller may is decided by it.
pub trait Control: Send + Sync + 'static {
    /// What the agent knows; made anew at its interval.
    fn view(&self) -> Arc<View>;

    /// How a host's load was of late.
    fn history(&self, host: &str) -> Option<HistoryView>;

    /// Metrics in OpenMetrics' text format.
    fn metrics(&self) -> String;

    /// What the policy would do now, for all hotspots that are known. Nothing is done.
    fn propose(&self) -> impl Future<Output = Result<PlanView, ApiError>> + Send;

    /// Begins a migration; returns once it is claimed.
    fn begin_move(
        &self,
        caller: &Caller,
        request: MoveRequest,
    ) -> impl Future<Output = Result<MoveAnswer, ApiError>> + Send;

    /// Gives a migration up: the guest runs on where it was.
    fn abort_move(
        &self,
        caller: &Caller,
        guest: &str,
    ) -> impl Future<Output = Result<(), ApiError>> + Send;

    /// Says that a host is to be emptied, or is not any more.
    fn drain(
        &self,
        caller: &Caller,
        host: &str,
        is_drained: bool,
    ) -> impl Future<Output = Result<(), ApiError>> + Send;

    /// Gets ready for a guest.
    fn receive(
        &self,
        caller: &Caller,
        request: ReceiveRequest,
    ) -> impl Future<Output = Result<ReceiveAnswer, ApiError>> + Send;

    /// Ends getting ready for a guest that does not come.
    fn stop_receiving(
        &self,
        caller: &Caller,
        guest: &str,
    ) -> impl Future<Output = Result<(), ApiError>> + Send;

    /// Changes what a guest may use of its memory.
    fn resize(
        &self,
        caller: &Caller,
        guest: &str,
        request: ResizeRequest,
    ) -> impl Future<Output = Result<(), ApiError>> + Send;

    /// Takes what a guest's application says of itself.
    fn set_gray_box(
        &self,
        caller: &Caller,
        guest: &str,
        figures: GrayBox,
    ) -> impl Future<Output = Result<(), ApiError>> + Send;
}
