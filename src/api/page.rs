//! The web page: a document, a style sheet and scripts, which load nothing from other hosts.

use std::sync::LazyLock;

use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

use crate::api::PathParams;
use crate::api::error::ApiError;

/// Content security policy: files and calls of this origin only, and no inline scripts or styles.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// A file that the page consists of.
struct Asset {
    name: &'static str,
    kind: &'static str,
    text: &'static str,
}

macro_rules! assets {
    ($($kind:ident $name:literal,)+) => {
        &[$(Asset { name: $name, kind: $kind, text: include_str!(concat!("assets/", $name)) }),+]
    };
}

/// All files; [`page`] answers with the first, the document.
const ASSETS: &[Asset] = assets![
    HTML "index.html", CSS "style.css", SCRIPT "main.js", SCRIPT "api.js", SCRIPT "dom.js", SCRIPT "list.js",
    SCRIPT "sweeps.js", SCRIPT "instance.js", SCRIPT "chart.js", SCRIPT "forms.js",
];

/// The entity tag of each file: a hash of its content.
static TAGS: LazyLock<Vec<String>> = LazyLock::new(|| {
    let tag = |asset: &Asset| {
        let hash = Sha256::digest(asset.text.as_bytes());
        let short: String = hash.iter().take(12).map(|byte| format!("{byte:02x}")).collect();
        format!("\"{short}\"")
    };
    ASSETS.iter().map(tag).collect()
});

/// The document of the page. It contains no data: its scripts call the API with the credentials that the user enters.
pub(crate) async fn page(headers: HeaderMap) -> Response {
    answer(0, &headers)
}

/// Another file of the page.
///
/// # Errors
/// 404 if no file has this name.
pub(crate) async fn asset(PathParams(name): PathParams<String>, headers: HeaderMap) -> Result<Response, ApiError> {
    let place = ASSETS.iter().skip(1).position(|asset| asset.name == name).ok_or_else(ApiError::no_url)?;
    Ok(answer(place + 1, &headers))
}

fn answer(place: usize, asked: &HeaderMap) -> Response {
    let (asset, tag) = (&ASSETS[place], TAGS[place].as_str());
    let headers = [
        (header::CONTENT_TYPE, asset.kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        // Cached, but validated on each use: a new version of the daemon shows its own page at once.
        (header::CACHE_CONTROL, "no-cache"),
        (header::ETAG, tag),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    let known = asked.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok()).unwrap_or("");
    if known.split(',').any(|known| known.trim().trim_start_matches("W/") == tag) {
        return (StatusCode::NOT_MODIFIED, headers).into_response();
    }
    (headers, asset.text).into_response()
}
