//! Verifies the signature of the DCS SDKs, `SDK-HMAC-SHA256`: builds the signed text again from the received request.
//!
//! Pure functions: the clock and the secret are arguments. A signature covers exactly the headers that the caller lists,
//! which differ from client to client.

use std::fmt::Write as _;
use std::time::Duration;

use axum::http::request::Parts;
use hmac::{Hmac, KeyInit, Mac};
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// Name of the scheme: the first word of the Authorization header.
pub(crate) const SCHEME: &str = "SDK-HMAC-SHA256";
/// Largest difference between the clocks of caller and server.
const SKEW: Duration = Duration::from_secs(15 * 60);
/// The characters to encode: all but `A-Za-z0-9-_.~`.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// The parsed Authorization header of a signed request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Signed {
    /// Access key of the caller.
    pub access: String,
    headers: Vec<String>,
    signature: Vec<u8>,
}

impl Signed {
    /// Parses `SDK-HMAC-SHA256 Access=<AK>, SignedHeaders=<a;b>, Signature=<hex>`.
    pub(crate) fn parse(authorization: &str) -> Option<Self> {
        let fields = authorization.trim().strip_prefix(SCHEME)?;
        let (mut access, mut headers, mut signature) = (None, None, None);
        for field in fields.split(',') {
            let (name, value) = field.trim().split_once('=')?;
            match name {
                "Access" => access = Some(value.to_owned()),
                "SignedHeaders" => headers = Some(value.split(';').map(str::to_ascii_lowercase).collect()),
                "Signature" => signature = from_hex(value),
                _ => return None,
            }
        }
        Some(Self { access: access?, headers: headers?, signature: signature? })
    }

    /// Whether the request with this body was signed with this secret, at most 15 minutes from `now`.
    pub(crate) fn verify(&self, request: &Parts, body: &[u8], secret: &str, now: Timestamp) -> bool {
        let Some(date) = header(request, "x-sdk-date") else { return false };
        if !is_recent(&date, now) {
            return false;
        }
        let body_hash = hex(&Sha256::digest(body));
        // Some clients send the hash of the body that they signed: it must be the hash of this body.
        if header(request, "x-sdk-content-sha256").is_some_and(|sent| sent != body_hash) {
            return false;
        }
        let Some(canonical) = self.canonical_request(request, &body_hash) else { return false };
        let to_sign = format!("{SCHEME}\n{date}\n{}", hex(&Sha256::digest(canonical.as_bytes())));
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret.as_bytes()) else { return false };
        mac.update(to_sign.as_bytes());
        mac.finalize().into_bytes().ct_eq(&self.signature).into()
    }

    fn canonical_request(&self, request: &Parts, body_hash: &str) -> Option<String> {
        let mut names = self.headers.clone();
        names.sort();
        let mut text = format!("{}\n{}\n{}\n", request.method, uri(request.uri.path()), query(request.uri.query()));
        for name in &names {
            let _ = writeln!(text, "{name}:{}", header(request, name)?);
        }
        let _ = write!(text, "\n{}\n{body_hash}", names.join(";"));
        Some(text)
    }
}

fn header(request: &Parts, name: &str) -> Option<String> {
    request.headers.get(name)?.to_str().ok().map(|value| value.trim().to_owned())
}

fn is_recent(date: &str, now: Timestamp) -> bool {
    let signed = DateTime::strptime("%Y%m%dT%H%M%SZ", date).and_then(|time| time.to_zoned(TimeZone::UTC));
    signed.is_ok_and(|signed| signed.timestamp().duration_since(now).unsigned_abs() <= SKEW)
}

/// The canonical path: decoded, encoded again, with a slash at the end.
fn uri(path: &str) -> String {
    let mut text = String::with_capacity(path.len() + 1);
    for segment in path.split('/').skip(1) {
        text.push('/');
        text.push_str(&encode(&percent_decode_str(segment).decode_utf8_lossy()));
    }
    if !text.ends_with('/') {
        text.push('/');
    }
    text
}

/// The canonical query: its pairs decoded, sorted by key and value, encoded again.
fn query(query: Option<&str>) -> String {
    let pairs = query.unwrap_or("").split('&').filter(|pair| !pair.is_empty());
    let decode = |text: &str| percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned();
    let mut pairs: Vec<_> = pairs
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(key), decode(value))
        })
        .collect();
    pairs.sort();
    let pairs: Vec<_> = pairs.iter().map(|(key, value)| format!("{}={}", encode(key), encode(value))).collect();
    pairs.join("&")
}

fn encode(text: &str) -> String {
    utf8_percent_encode(text, ENCODED).to_string()
}

/// Encodes bytes as lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return None;
    }
    text.as_bytes().chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::Request;

    const PREFIX: &str = "/v2/0123456789abcdef0123456789abcdef/instances/5560df16-cebf-4473-95c4-d1b573c16e79/";
    const HEADERS: &str = "content-type;host;user-agent;x-project-id;x-sdk-date";

    fn request(method: &str, path: &str, date: &str) -> Parts {
        let request = Request::builder()
            .method(method)
            .uri(format!("{PREFIX}{path}"))
            .header("Host", "127.0.0.1:8080")
            .header("Content-Type", "application/json")
            .header("X-Project-Id", "0123456789abcdef0123456789abcdef")
            .header("User-Agent", "huaweicloud-usdk-python/3.0")
            .header("X-Sdk-Date", date)
            .body(())
            .unwrap();
        request.into_parts().0
    }

    fn signed(signature: &str) -> Signed {
        let header = format!("{SCHEME} Access=AKEXAMPLE, SignedHeaders={HEADERS}, Signature={signature}");
        Signed::parse(&header).unwrap()
    }

    fn now() -> Timestamp {
        "2025-01-01T00:10:00Z".parse().unwrap()
    }

    #[track_caller]
    fn check(method: &str, path: &str, body: &str, signature: &str) {
        let parts = request(method, path, "20250101T000000Z");
        let signed = signed(signature);
        assert!(signed.verify(&parts, body.as_bytes(), "SKEXAMPLE", now()));
        assert!(!signed.verify(&parts, body.as_bytes(), "another", now()), "another secret");
        assert!(!signed.verify(&parts, b"{}", "SKEXAMPLE", now()), "another body");
        let late = "2025-01-01T00:15:01Z".parse().unwrap();
        assert!(!signed.verify(&parts, body.as_bytes(), "SKEXAMPLE", late), "too late");
        let other = request(method, &format!("{path}x"), "20250101T000000Z");
        assert!(!signed.verify(&other, body.as_bytes(), "SKEXAMPLE", now()), "another path or query");
    }

    #[test]
    fn vector_of_a_post_without_a_body() {
        let signature = "05355a154c2b0ae9517060744997f9c029e51fcfae7e8ef4065239c3cfe5246c";
        check("POST", "scan-expire-keys-task", "", signature);
    }

    #[test]
    fn vector_of_a_get_with_a_query() {
        let signature = "2e13479fee6a593e7009db146c4ea35c0654384d9f9e10060def053431320f3b";
        check("GET", "auto-expire/histories?limit=10&offset=0&status=success", "", signature);
    }

    #[test]
    fn vector_of_a_put_with_a_body() {
        let signature = "660689e99e4398ed12e99323f826bd716c22e1e6c15dda08e068f858515705f7";
        let body = r#"{"enable_auto_scan": true, "interval": 86400}"#;
        check("PUT", "scan-expire-keys/autoscan-config", body, signature);
    }

    #[test]
    fn the_order_of_a_query_and_its_encoding_do_not_matter() {
        assert_eq!(query(Some("b=2&a=%41&a=1&c")), "a=1&a=A&b=2&c=");
        assert_eq!(query(Some("x=a+b~/")), "x=a%20b~%2F");
        assert_eq!(uri("/v2/a%20b/c"), "/v2/a%20b/c/");
    }

    #[test]
    fn a_body_hash_that_is_sent_along_must_be_the_bodys() {
        let mut parts = request("POST", "scan-expire-keys-task", "20250101T000000Z");
        let sent = hex(&Sha256::digest(b"another body")).parse().unwrap();
        parts.headers.insert("X-Sdk-Content-Sha256", sent);
        assert!(!signed(&"0".repeat(64)).verify(&parts, b"", "SKEXAMPLE", now()));
    }

    #[test]
    fn nonsense_is_no_signature() {
        for text in [
            "",
            SCHEME,
            "SDK-HMAC-SHA256 Access=a",
            "Basic abc",
            "SDK-HMAC-SHA256 Access=a, SignedHeaders=b, Signature=zz",
        ] {
            assert_eq!(Signed::parse(text), None, "{text}");
        }
    }
}
