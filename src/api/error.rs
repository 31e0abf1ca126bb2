//! Errors as the contract's clients read them. Bodies carry no internals: those go to the log.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::model::failure::{Failure, FailureKind};
use crate::model::task::IllegalTransition;
use crate::store::StoreError;
use crate::tasks::TaskError;

/// The body of every error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct ErrorBody {
    /// The contract's code.
    #[schema(example = "DCS.3022")]
    pub error_code: String,
    /// What is wrong.
    #[schema(example = "This DCS instance does not exist.")]
    pub error_msg: String,
    /// What to do, where there is something to say. Not used by the contract.
    #[schema(value_type = Option<String>)]
    pub error_ext_msg: Option<String>,
}

/// An error and its status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// The HTTP status.
    pub status: StatusCode,
    /// The contract's code.
    pub code: &'static str,
    /// The contract's message, or ours where it has none.
    pub message: String,
    /// What to do, where there is more to say.
    pub hint: Option<String>,
}

macro_rules! errors {
    ($($(#[$doc:meta])* $name:ident = $status:ident, $code:literal, $message:literal;)+) => {
        impl ApiError {
            $($(#[$doc])* pub fn $name() -> Self {
                Self { status: StatusCode::$status, code: $code, message: $message.to_owned(), hint: None }
            })+
        }
    };
}

errors! {
    /// The instance cannot be scanned.
    cannot_scan = BAD_REQUEST, "DCS.4818", "Do not support auto expire scan.";
    /// PUT of a first time that is none or has passed.
    first_scan_at = BAD_REQUEST, "DCS.4819", "The first_scan_at parameter is invalid. It must be an ISO format UTC date-time later than the current time.";
    /// PUT of a bad interval.
    interval = BAD_REQUEST, "DCS.4820", "The interval parameter is invalid. It must be greater than or equal to 0.";
    /// PUT of a bad timeout.
    timeout = BAD_REQUEST, "DCS.4821", "The timeout parameter is invalid. It must be at least interval * 2; greater than 1 second if interval is 0.";
    /// PUT of a bad COUNT.
    scan_keys_count = BAD_REQUEST, "DCS.4822", "The scan_keys_count parameter is invalid. It must be between 10 and 1000.";
    /// A body is needed.
    empty_body = BAD_REQUEST, "DCS.4004", "Empty request body.";
    /// The body is not JSON.
    not_json = BAD_REQUEST, "DCS.4005", "The message body contains invalid characters or is not in JSON format.";
    /// The body is longer than any that means something here.
    too_large = PAYLOAD_TOO_LARGE, "DCS.4005", "The message body is too large.";
    /// A task of the instance has not ended.
    still_running = BAD_REQUEST, "DCS.4017", "This DCS instance job task is still running.";
    /// A token that is none of ours.
    invalid_token = UNAUTHORIZED, "DCS.1001", "Invalid token.";
    /// A token that was one of ours.
    token_expired = UNAUTHORIZED, "DCS.1002", "Token expired.";
    /// No credentials at all.
    no_token = UNAUTHORIZED, "DCS.1003", "No token in the request.";
    /// Another project than the credentials are for.
    wrong_project = UNAUTHORIZED, "DCS.1004", "Project ID does not match the token.";
    /// The role may not do that.
    forbidden = FORBIDDEN, "DCS.2003", "This role does not have the permission to perform this operation.";
    /// A browser that was sent here by another site.
    foreign_site = FORBIDDEN, "DCS.2003", "This request comes from another site or for another host name.";
    /// No such instance in the project.
    no_instance = NOT_FOUND, "DCS.3022", "This DCS instance does not exist.";
    /// No such task.
    no_task = NOT_FOUND, "DCS.4001", "The requested task does not exist.";
    /// No forecast was made yet.
    no_forecast = NOT_FOUND, "DCS.4001", "No forecast of this instance was made yet.";
    /// No such path.
    no_url = NOT_FOUND, "DCS.4001", "The requested URL does not exist.";
    /// The path does not take the method.
    no_method = METHOD_NOT_ALLOWED, "DCS.5001", "The requested method is not allowed.";
    /// Our own trouble.
    internal = INTERNAL_SERVER_ERROR, "DCS.5000", "Internal service error.";
    /// Too slow, or about to stop.
    unavailable = SERVICE_UNAVAILABLE, "DCS.5000", "Service unavailable, try again later.";
}

impl ApiError {
    /// A parameter or field that is wrong.
    pub fn invalid(what: impl std::fmt::Display) -> Self {
        let message = format!("Invalid {what} in the request.");
        Self { status: StatusCode::BAD_REQUEST, code: "DCS.4800", message, hint: None }
    }

    /// The database that daemons share cannot be reached.
    fn store_away() -> Self {
        let message = "The records cannot be reached; sweeps under way go on until the lease of this daemon ends.";
        Self { message: message.into(), ..Self::unavailable() }
    }

    /// A command that makes no sense now.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self { status: StatusCode::CONFLICT, code: "DCS.4017", message: message.into(), hint: None }
    }

    /// The instance does not let us in, or cannot be looked at. No secret is in such a failure.
    pub fn of_instance(failure: Failure) -> Self {
        let status = match failure.kind {
            FailureKind::CannotConnect | FailureKind::NotAuthenticated | FailureKind::NotAllowed => {
                StatusCode::BAD_GATEWAY
            }
            _ => StatusCode::CONFLICT,
        };
        Self { status, code: "DCS.5000", message: failure.message, hint: failure.hint }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = ErrorBody { error_code: self.code.to_owned(), error_msg: self.message, error_ext_msg: self.hint };
        let mut response = (self.status, axum::Json(body)).into_response();
        if self.status == StatusCode::UNAUTHORIZED {
            let schemes = axum::http::HeaderValue::from_static("Bearer, SDK-HMAC-SHA256");
            response.headers_mut().insert(axum::http::header::WWW_AUTHENTICATE, schemes);
        }
        response
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        tracing::error!(%error, "a request failed");
        match error {
            StoreError::Silent(_) | StoreError::Connect { .. } => Self::store_away(),
            StoreError::Sql(sqlx::Error::PoolTimedOut | sqlx::Error::Io(_) | sqlx::Error::Tls(_)) => Self::store_away(),
            // It changed hands meanwhile.
            StoreError::Fenced(_) | StoreError::AlreadyHandled | StoreError::Unfinished(_) => Self::unavailable(),
            _ => Self::internal(),
        }
    }
}

impl From<IllegalTransition> for ApiError {
    fn from(error: IllegalTransition) -> Self {
        Self::conflict(format!("The task is {}: it cannot do that now.", error.state))
    }
}

impl From<TaskError> for ApiError {
    fn from(error: TaskError) -> Self {
        match error {
            TaskError::Store(error) => error.into(),
            TaskError::Transition(error) => error.into(),
            TaskError::Busy(_) => Self::conflict(Self::still_running().message),
            TaskError::Ended => Self::conflict("The task has ended."),
            // A client with the right to create tasks may learn which file is missing; only an operator can restore it.
            TaskError::Settings(_) => {
                tracing::error!(%error, "a task could not be created");
                Self { message: format!("Service unavailable: {error}."), ..Self::unavailable() }
            }
            TaskError::Closing => Self::unavailable(),
            TaskError::OwnerSilent => {
                let message = "The daemon that has the task does not answer.".to_owned();
                let hint = "Ask again once its lease has run out; GET /api/v1/daemons shows it.".to_owned();
                Self { message, hint: Some(hint), ..Self::unavailable() }
            }
            TaskError::OwnerFailed(message) => Self { message, ..Self::internal() },
        }
    }
}
