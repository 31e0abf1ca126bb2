//! HTTP client of a daemon's API, for the subcommands that talk to one.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use futures_util::StreamExt;
use reqwest::{Method, Response, StatusCode};
use serde_json::Value;

use crate::cli::exit::Exit;
use crate::cli::output;
use crate::settings::raw::{Origin, Problem};

/// The environment variable with the token, where no `--token-file` is given.
pub(super) const TOKEN: &str = "TTLSWEEP_TOKEN";

/// Timeout of a request. Streams have none.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// The contract's error codes for invalid requests: they end with the exit code for invalid arguments.
const INVALID_REQUEST: [&str; 7] = ["DCS.4004", "DCS.4005", "DCS.4800", "DCS.4819", "DCS.4820", "DCS.4821", "DCS.4822"];

/// Where the daemon is and the credentials for it.
#[derive(Debug, Args)]
pub(super) struct ClientArgs {
    /// URL of the daemon
    #[arg(long, env = "TTLSWEEP_SERVER", value_name = "URL", default_value = "http://127.0.0.1:8080", global = true)]
    pub server: String,

    /// File whose first line is the token (TTLSWEEP_TOKEN works too)
    #[arg(long, env = "TTLSWEEP_TOKEN_FILE", value_name = "FILE", global = true)]
    pub token_file: Option<PathBuf>,

    /// PEM file with the certificate authority that signed the daemon's certificate
    #[arg(long, env = "TTLSWEEP_CA_FILE", value_name = "FILE", global = true)]
    pub ca_file: Option<PathBuf>,

    /// Print JSON as the daemon sends it
    #[arg(long, global = true)]
    pub json: bool,
}

/// Why a request to the daemon failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    /// No connection, or no reply in time.
    #[error("cannot reach the daemon at {url}: {}", output::chain(.source))]
    Unreachable {
        /// The URL of the daemon, without credentials.
        url: String,
        /// The error of the HTTP client.
        source: reqwest::Error,
    },
    /// The daemon answered with an error of the API.
    #[error("{code}: {message}")]
    Refused {
        /// HTTP status of the response.
        status: StatusCode,
        /// The error code of the body, such as `DCS.3022`.
        code: String,
        /// The message of the body.
        message: String,
        /// The hint of the body, where it has one.
        hint: Option<String>,
    },
    /// The reply is none of this API: another program answers there, or a proxy.
    #[error("the reply is not one of a ttlsweep daemon: {0}")]
    NotOurApi(String),
}

impl ClientError {
    /// The exit code for this error.
    pub(super) fn exit(&self) -> Exit {
        match self {
            // 502: the daemon itself could not reach the instance.
            Self::Unreachable { .. } | Self::NotOurApi(_) => Exit::NoAccess,
            Self::Refused { status, .. } if matches!(status.as_u16(), 401 | 403 | 502) => Exit::NoAccess,
            Self::Refused { code, .. } if INVALID_REQUEST.contains(&code.as_str()) => Exit::Usage,
            Self::Refused { .. } => Exit::Failed,
        }
    }

    /// What the user can do about it.
    fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Unreachable { source, .. } if output::chain(source).contains("certificate") => {
                "name the authority that signed the daemon's certificate: --ca-file FILE"
            }
            Self::Unreachable { .. } => {
                "is `ttlsweep serve` running there, and is http or https right? --server gives another URL"
            }
            Self::Refused { status: StatusCode::UNAUTHORIZED, .. } => {
                "give the token by --token-file or TTLSWEEP_TOKEN"
            }
            Self::Refused { hint, .. } => return hint.clone(),
            Self::NotOurApi(_) => "is that a `ttlsweep serve`, with no proxy in between? --server gives another URL",
        };
        Some(hint.to_owned())
    }
}

/// A client of one daemon.
#[derive(Debug)]
pub(super) struct Client {
    http: reqwest::Client,
    server: String,
    token: Option<String>,
}

impl Client {
    /// A client for the URL and with the credentials of these arguments.
    ///
    /// # Errors
    /// The first argument that is invalid or names a file that cannot be read.
    pub(super) fn new(args: &ClientArgs) -> Result<Self, Problem> {
        // An error means that it is installed already, which is fine: there is only this one provider.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let problem = |flag: &str, message: String| Problem { origin: Some(Origin::Flag(flag.to_owned())), message };
        let unreadable = |path: &Path, error| format!("cannot read {}: {error}", path.display());
        let token = match &args.token_file {
            Some(path) => {
                let text = std::fs::read_to_string(path);
                let text = text.map_err(|e| problem("--token-file", unreadable(path, e)))?;
                Some(text.lines().next().unwrap_or("").trim().to_owned())
            }
            None => std::env::var_os(TOKEN).map(OsString::into_string).transpose().map_err(|_| Problem {
                origin: Some(Origin::Env(TOKEN.to_owned())),
                message: "the token is not UTF-8 text".to_owned(),
            })?,
        };
        let mut builder = reqwest::Client::builder().connect_timeout(CONNECT_WITHIN);
        if let Some(path) = &args.ca_file {
            let pem = std::fs::read(path).map_err(|e| problem("--ca-file", unreadable(path, e)))?;
            let certificates = reqwest::Certificate::from_pem_bundle(&pem).ok().filter(|found| !found.is_empty());
            let none = || problem("--ca-file", format!("{} holds no PEM certificate", path.display()));
            builder = builder.tls_certs_merge(certificates.ok_or_else(none)?);
        }
        let server = match args.server.trim_end_matches('/') {
            whole if whole.contains("://") => whole.to_owned(),
            address => format!("http://{address}"),
        };
        match reqwest::Url::parse(&server).as_ref().map(reqwest::Url::scheme) {
            Ok("https") => {}
            // Without TLS no certificates are loaded: the system may have none.
            Ok("http") => builder = builder.tls_certs_only([]),
            _ => return Err(problem("--server", "is not a URL such as http://127.0.0.1:8080".to_owned())),
        }
        let http = builder.build().map_err(|e| Problem { origin: None, message: output::chain(&e) })?;
        Ok(Self { http, server, token: token.filter(|token| !token.is_empty()) })
    }

    async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        within: Option<Duration>,
    ) -> Result<Response, ClientError> {
        let mut request = self.http.request(method, format!("{}{path}", self.server));
        if let Some(within) = within {
            request = request.timeout(within);
        }
        if let Some(token) = &self.token {
            request = request.header("X-Auth-Token", token);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let unreachable = |source: reqwest::Error| ClientError::Unreachable {
            url: self.server.clone(),
            source: source.without_url(),
        };
        let response = request.send().await.map_err(unreachable)?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body: Value = response.json().await.unwrap_or_default();
        let text = |name: &str| body[name].as_str().unwrap_or("").to_owned();
        match body["error_code"].as_str() {
            Some(code) => Err(ClientError::Refused {
                status,
                code: code.to_owned(),
                message: text("error_msg"),
                hint: body["error_ext_msg"].as_str().map(str::to_owned),
            }),
            None => Err(ClientError::NotOurApi(format!("status {status}"))),
        }
    }

    /// Sends a request and returns the JSON of the reply.
    ///
    /// # Errors
    /// [`ClientError`].
    pub(super) async fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, ClientError> {
        let response = self.ask(method, path, body, Some(ANSWER_WITHIN)).await?;
        response.json().await.map_err(|e| ClientError::NotOurApi(e.without_url().to_string()))
    }

    /// Sends a GET request and returns the JSON of the reply.
    ///
    /// # Errors
    /// [`ClientError`].
    pub(super) async fn get(&self, path: &str) -> Result<Value, ClientError> {
        self.send(Method::GET, path, None).await
    }

    /// Reads a stream of Server-Sent Events and calls `each` with the data of every event, until the stream ends.
    ///
    /// # Errors
    /// [`ClientError`].
    pub(super) async fn follow(&self, path: &str, mut each: impl FnMut(Value)) -> Result<(), ClientError> {
        let response = self.ask(Method::GET, path, None, None).await?;
        let mut chunks = response.bytes_stream();
        let mut unread: Vec<u8> = Vec::new();
        while let Some(chunk) = chunks.next().await {
            // A lost connection is no error: the caller asks for the task again, and finds out whether the daemon is there.
            let Ok(chunk) = chunk else { return Ok(()) };
            unread.extend_from_slice(&chunk);
            while let Some(end) = unread.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = unread.drain(..=end).collect();
                if let Some(data) = line.strip_prefix(b"data: ") {
                    each(serde_json::from_slice(data).map_err(|e| ClientError::NotOurApi(e.to_string()))?);
                }
            }
        }
        Ok(())
    }
}

/// The path with a query of the parameters that have a value.
pub(super) fn with_query<'a>(path: &str, parameters: impl IntoIterator<Item = (&'a str, Option<String>)>) -> String {
    let mut query = url::form_urlencoded::Serializer::new(String::new());
    for (name, value) in parameters {
        if let Some(value) = value {
            query.append_pair(name, &value);
        }
    }
    match query.finish() {
        query if query.is_empty() => path.to_owned(),
        query => format!("{path}?{query}"),
    }
}

/// Prints an error with its hint and returns its exit code.
pub(super) fn failed(error: &ClientError) -> Exit {
    output::note(&format!("error: {error}"));
    if let Some(hint) = error.hint() {
        output::note(&format!("  hint: {hint}"));
    }
    error.exit()
}

/// Prints a value as indented JSON.
///
/// # Errors
/// A stdout that cannot be written.
pub(super) fn print_json(value: &Value) -> anyhow::Result<()> {
    output::print(&format!("{}\n", serde_json::to_string_pretty(value)?))?;
    Ok(())
}

/// A value of an object, by its JSON pointer, as the text of a table cell; `-` if it is missing or null.
pub(super) fn cell(object: &Value, name: &str) -> String {
    match object.pointer(name) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Number(number)) => number.as_u64().map_or_else(|| number.to_string(), output::grouped),
        Some(Value::Bool(flag)) => if *flag { "yes" } else { "no" }.to_owned(),
        _ => "-".to_owned(),
    }
}

/// A table with a row for each object. A column is a heading and a JSON pointer.
pub(super) fn table(objects: &[Value], columns: &[(&str, &str)]) -> String {
    let mut rows = vec![columns.iter().map(|(heading, _)| (*heading).to_owned()).collect::<Vec<_>>()];
    rows.extend(objects.iter().map(|object| columns.iter().map(|(_, name)| cell(object, name)).collect()));
    output::table(&rows)
}
