//! Authentication and authorization of requests. Tokens and signatures are compared in constant time.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use secrecy::ExposeSecret;
use serde::Serialize;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use utoipa::ToSchema;

use crate::api::error::ApiError;
use crate::api::responses::GuardedWithoutRecords;
use crate::api::signature::{SCHEME, Signed};
use crate::api::{App, AppState};
use crate::settings::serve::{AccessKey, ApiSettings, Grant, Role};

/// Longest request body, in bytes.
pub(crate) const MAX_BODY: usize = 64 << 10;

/// The rights of the caller, an argument of handlers. [`require`] sets it.
#[derive(Debug, Clone)]
pub(crate) struct Caller(pub Arc<Grant>);

impl Caller {
    /// Checks that the caller may see a project.
    ///
    /// # Errors
    /// `DCS.1004` if not.
    pub(crate) fn project(&self, project: &str) -> Result<(), ApiError> {
        if self.0.allows(project) { Ok(()) } else { Err(ApiError::wrong_project()) }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        parts.extensions.get::<Self>().cloned().ok_or_else(ApiError::no_token)
    }
}

/// The caller, by its credentials.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CallerDto {
    /// Name of the credentials in the settings.
    pub name: String,
    /// What the caller may do: `reader` or `operator`.
    pub role: &'static str,
    /// Projects that the caller may see; left out: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub projects: Option<Vec<String>>,
}

/// Shows the name, role and projects of the caller.
#[utoipa::path(
    get, path = "/api/v1/caller", tag = "settings", operation_id = "show_caller",
    responses((status = 200, body = CallerDto), GuardedWithoutRecords)
)]
pub(crate) async fn show_caller(caller: Caller) -> Json<CallerDto> {
    let grant = &caller.0;
    let projects = grant.projects.as_ref().map(|projects| projects.iter().cloned().collect());
    Json(CallerDto { name: grant.name.clone(), role: grant.role.as_str(), projects })
}

/// Lets an authorized request through with its [`Caller`], and answers others with the error. Requests that change something need the
/// role of an operator.
pub(crate) async fn require(State(app): State<App>, request: Request, next: Next) -> Response {
    match authorize(&app, request).await {
        Ok(request) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

async fn authorize(app: &AppState, request: Request) -> Result<Request, ApiError> {
    let settings = app.settings.borrow().clone();
    let (mut parts, body) = request.into_parts();
    // Headers first: buffering the bodies of thousands of unknown callers would exhaust the memory.
    let credentials = credentials(&settings.api, &parts)?;
    let body = axum::body::to_bytes(body, MAX_BODY).await.map_err(|_| ApiError::too_large())?;
    let grant = match credentials {
        RequestCredentials::Granted(grant) => grant,
        // The signature covers the body, so it can be verified only now.
        RequestCredentials::Signed(signed, key) => {
            if !signed.verify(&parts, &body, key.secret.expose_secret(), Timestamp::now()) {
                return Err(ApiError::invalid_token());
            }
            key.grant.clone()
        }
    };
    let only_reads = matches!(parts.method, Method::GET | Method::HEAD | Method::OPTIONS);
    if !only_reads && grant.role < Role::Operator {
        return Err(ApiError::forbidden());
    }
    parts.extensions.insert(Caller(Arc::new(grant)));
    Ok(Request::from_parts(parts, Body::from(body)))
}

/// The credentials in the headers of a request.
enum RequestCredentials<'a> {
    /// A valid token, or none where none is needed.
    Granted(Grant),
    /// A signature that must still be verified with this key.
    Signed(Signed, &'a AccessKey),
}

fn credentials<'a>(settings: &'a ApiSettings, parts: &Parts) -> Result<RequestCredentials<'a>, ApiError> {
    if settings.is_open() {
        refuse_foreign_sites(&parts.headers)?;
        return Ok(RequestCredentials::Granted(open_grant()));
    }
    let text = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok());
    let authorization = text(header::AUTHORIZATION.as_str());
    let bearer = authorization.and_then(|value| value.strip_prefix("Bearer "));
    if let Some(token) = text("x-auth-token").or(bearer) {
        return by_token(settings, token.trim()).map(RequestCredentials::Granted);
    }
    match authorization {
        Some(value) if value.starts_with(SCHEME) => {
            let signed = Signed::parse(value).ok_or_else(ApiError::invalid_token)?;
            let key = settings.keys.iter().find(|key| key.access == signed.access);
            Ok(RequestCredentials::Signed(signed, key.ok_or_else(ApiError::invalid_token)?))
        }
        Some(_) => Err(ApiError::invalid_token()),
        None => Err(ApiError::no_token()),
    }
}

/// The rights of every caller where the settings have no credentials.
fn open_grant() -> Grant {
    Grant { name: "loopback".to_owned(), role: Role::Operator, projects: None }
}

fn by_token(settings: &ApiSettings, token: &str) -> Result<Grant, ApiError> {
    let hash = Sha256::digest(token.as_bytes());
    // Every token is compared, so that the time does not tell which one was similar.
    let found = settings
        .tokens
        .iter()
        .fold(None, |found, known| if bool::from(known.sha256.ct_eq(&hash[..])) { Some(known) } else { found });
    let known = found.ok_or_else(ApiError::invalid_token)?;
    match known.expires {
        Some(expires) if expires <= Timestamp::now() => Err(ApiError::token_expired()),
        _ => Ok(known.grant.clone()),
    }
}

/// Without credentials every program on this machine may use the API, but no web site in a browser on it: neither by a
/// cross-site request nor by a host name that resolves to this address (DNS rebinding).
fn refuse_foreign_sites(headers: &HeaderMap) -> Result<(), ApiError> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let host = text("host").unwrap_or("");
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(""),
        None => host.split(':').next().unwrap_or(""),
    };
    let is_here = name.eq_ignore_ascii_case("localhost")
        || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
    let own = text("origin").is_none_or(|origin| origin.split_once("://").is_some_and(|(_, rest)| rest == host));
    if is_here && own { Ok(()) } else { Err(ApiError::foreign_site()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_sites_and_other_names_are_refused() {
        let check = |pairs: &[(&'static str, &'static str)]| {
            let headers = pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
            refuse_foreign_sites(&headers.collect()).is_ok()
        };
        assert!(check(&[("host", "127.0.0.1:8080")]));
        assert!(check(&[("host", "localhost:8080"), ("origin", "http://localhost:8080")]));
        assert!(check(&[("host", "[::1]:8080")]));
        assert!(!check(&[("host", "evil.example:8080")]), "a name made to resolve to this machine");
        assert!(!check(&[("host", "127.0.0.1:8080"), ("origin", "http://evil.example")]));
        assert!(!check(&[]));
    }
}
