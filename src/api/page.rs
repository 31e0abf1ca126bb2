//! The page to look at: a document, its style and its modules, which load nothing from elsewhere.

use std::sync::LazyLock;

use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

use crate::api::At;
use crate::api::error::ApiError;

/// Nothing but files of our own and calls to where they came from: neither a script nor a style that stands in a document.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// A file of the page.
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

/// The document is the first.
const ASSETS: &[Asset] = assets![
    HTML "index.html", CSS "style.css", SCRIPT "main.js", SCRIPT "api.js", SCRIPT "dom.js", SCRIPT "list.js",
    SCRIPT "sweeps.js", SCRIPT "instance.js", SCRIPT "chart.js", SCRIPT "forms.js",
];

/// What a browser may keep of each, until the answer is another one.
static TAGS: LazyLock<Vec<String>> = LazyLock::new(|| {
    let tag = |asset: &Asset| {
        let hash = Sha256::digest(asset.text.as_bytes());
        let short: String = hash.iter().take(12).map(|byte| format!("{byte:02x}")).collect();
        format!("\"{short}\"")
    };
    ASSETS.iter().map(tag).collect()
});

/// The page. It holds no data and asks the API for it, with the credentials that the person gives.
pub async fn page(headers: HeaderMap) -> Response {
    answer(0, &headers)
}

/// A file that the page is made of.
///
/// # Errors
/// There is none of this name.
pub async fn asset(At(name): At<String>, headers: HeaderMap) -> Result<Response, ApiError> {
    let place = ASSETS.iter().skip(1).position(|asset| asset.name == name).ok_or_else(ApiError::no_url)?;
    Ok(answer(place + 1, &headers))
}

fn answer(place: usize, asked: &HeaderMap) -> Response {
    let (asset, tag) = (&ASSETS[place], TAGS[place].as_str());
    let headers = [
        (header::CONTENT_TYPE, asset.kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        // Kept, and asked for again each time: a new version of the daemon is a new page at once.
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
