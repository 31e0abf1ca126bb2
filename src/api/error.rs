//! Errors of the API, in the contract's form. Bodies contain no internal details: those go to the log.

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
pub(crate) struct ErrorBody {
    /// Error code, as the contract defines it.
    #[schema(example = "DCS.3022")]
    pub error_code: String,
    /// What is wrong, in a sentence.
    #[schema(example = "This DCS instance does not exist.")]
    pub error_msg: String,
    /// What to do about it, if known. The contract does not use this field.
    #[schema(value_type = Option<String>)]
    pub error_ext_msg: Option<String>,
}

/// An error with its HTTP status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiError {
    /// HTTP status of the response.
    pub status: StatusCode,
    /// Error code of the body.
    pub code: &'static str,
    /// The contract's message, or our own if it has none.
    pub message: String,
    /// What to do about it, if known.
    pub hint: Option<String>,
}

macro_rules! errors {
    ($($(#[$doc:meta])* $name:ident = $status:ident, $code:literal, $message:literal;)+) => {
        impl ApiError {
            $($(#[$doc])* pub(crate) fn $name() -> Self {
                Self { status: StatusCode::$status, code: $code, message: $message.to_owned(), hint: None }
            })+
        }
    };
}

errors! {
    /// The server of the instance can never be swept: it is unsupported or no master.
    cannot_scan = BAD_REQUEST, "DCS.4818", "Do not support auto expire scan.";
    /// `first_scan_at` is missing, invalid or not in the future.
    first_scan_at = BAD_REQUEST, "DCS.4819", "The first_scan_at parameter is invalid. It must be an ISO format UTC date-time later than the current time.";
    /// `interval` is missing or outside its range.
    interval = BAD_REQUEST, "DCS.4820", "The interval parameter is invalid. It must be greater than or equal to 0.";
    /// `timeout` is missing, outside its range or less than twice `interval`.
    timeout = BAD_REQUEST, "DCS.4821", "The timeout parameter is invalid. It must be at least interval * 2; greater than 1 second if interval is 0.";
    /// `scan_keys_count` is missing or outside its range.
    scan_keys_count = BAD_REQUEST, "DCS.4822", "The scan_keys_count parameter is invalid. It must be between 10 and 1000.";
    /// The call needs a body, and the request has none.
    empty_body = BAD_REQUEST, "DCS.4004", "Empty request body.";
    /// The body is not valid JSON, or not an object.
    not_json = BAD_REQUEST, "DCS.4005", "The message body contains invalid characters or is not in JSON format.";
    /// The body is longer than `auth::MAX_BODY`.
    too_large = PAYLOAD_TOO_LARGE, "DCS.4005", "The message body is too large.";
    /// The instance has an unfinished task.
    still_running = BAD_REQUEST, "DCS.4017", "This DCS instance job task is still running.";
    /// The token or the signature is not valid.
    invalid_token = UNAUTHORIZED, "DCS.1001", "Invalid token.";
    /// The token was valid and has expired.
    token_expired = UNAUTHORIZED, "DCS.1002", "Token expired.";
    /// The request has no credentials.
    no_token = UNAUTHORIZED, "DCS.1003", "No token in the request.";
    /// The credentials are not for the project of the path.
    wrong_project = UNAUTHORIZED, "DCS.1004", "Project ID does not match the token.";
    /// The role of the caller does not allow the call.
    forbidden = FORBIDDEN, "DCS.2003", "This role does not have the permission to perform this operation.";
    /// Without credentials: a browser sent the request for another site.
    foreign_site = FORBIDDEN, "DCS.2003", "This request comes from another site or for another host name.";
    /// The project has no instance with this id.
    no_instance = NOT_FOUND, "DCS.3022", "This DCS instance does not exist.";
    /// There is no task with this id in the caller's projects.
    no_task = NOT_FOUND, "DCS.4001", "The requested task does not exist.";
    /// The instance has no forecast yet.
    no_forecast = NOT_FOUND, "DCS.4001", "No forecast of this instance was made yet.";
    /// No route has this path.
    no_url = NOT_FOUND, "DCS.4001", "The requested URL does not exist.";
    /// The route does not have this method.
    no_method = METHOD_NOT_ALLOWED, "DCS.5001", "The requested method is not allowed.";
    /// An error of the daemon itself; the log has the details.
    internal = INTERNAL_SERVER_ERROR, "DCS.5000", "Internal service error.";
    /// The answer took too long, or the daemon is stopping.
    unavailable = SERVICE_UNAVAILABLE, "DCS.5000", "Service unavailable, try again later.";
}

impl ApiError {
    /// A parameter, field or body is invalid; `what` names it.
    pub(crate) fn invalid(what: impl std::fmt::Display) -> Self {
        let message = format!("Invalid {what} in the request.");
        Self { status: StatusCode::BAD_REQUEST, code: "DCS.4800", message, hint: None }
    }

    /// The shared database cannot be reached.
    fn store_unreachable() -> Self {
        let message = "The records cannot be reached; running sweeps continue until the lease of this daemon expires.";
        Self { message: message.into(), ..Self::unavailable() }
    }

    /// The state of the task does not allow the command now.
    pub(crate) fn conflict(message: impl Into<String>) -> Self {
        Self { status: StatusCode::CONFLICT, code: "DCS.4017", message: message.into(), hint: None }
    }

    /// The instance refused the connection, or cannot be inspected. The text of such a failure contains no secret.
    pub(crate) fn of_instance(failure: Failure) -> Self {
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
            StoreError::Silent(_) | StoreError::Connect { .. } => Self::store_unreachable(),
            StoreError::Sql(sqlx::Error::PoolTimedOut | sqlx::Error::Io(_) | sqlx::Error::Tls(_)) => {
                Self::store_unreachable()
            }
            // Another daemon was first: the caller may try again.
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
            TaskError::Unfinished(_) => Self::conflict(Self::still_running().message),
            TaskError::Ended => Self::conflict("The task has ended."),
            // The message names the missing file: whoever may create tasks may know it, and the operator has to restore it.
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
