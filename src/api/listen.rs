//! Accepts connections for the router, with TLS, and with limits that protect clients from slow and from many others.
//!
//! HTTP/1.1 only. A connection that sends no complete header in time is closed; beyond the limit on connections new
//! ones wait in the kernel's queue. At the end, replies under way are finished.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

/// Most bytes of the headers of a request.
const MAX_HEADERS: usize = 16 << 10;
/// Pause after a failed accept: the process is out of file descriptors, and a retry at once would only loop.
const ACCEPT_RETRY_AFTER: Duration = Duration::from_millis(100);
/// How long a client may take no byte of its reply.
#[cfg(target_os = "linux")]
const UNREAD_FOR: Duration = Duration::from_secs(60);
/// Longest time for replies under way once the daemon stops.
const DRAIN: Duration = Duration::from_secs(10);

/// Options for new connections. A reload of the settings replaces them.
#[derive(Clone)]
pub(crate) struct ListenOptions {
    /// TLS with the certificate; `None`: plain HTTP.
    pub tls: Option<TlsAcceptor>,
    /// Longest time for the TLS handshake, and for receiving the header of a request.
    pub header_within: Duration,
}

/// Answers requests until `stop`, and finishes those that are under way then. `connections` is the most open connections.
pub(crate) async fn serve(
    listener: TcpListener,
    options: watch::Receiver<ListenOptions>,
    router: Router,
    connections: usize,
    stop: CancellationToken,
) {
    let permits = Arc::new(Semaphore::new(connections));
    let graceful = GracefulShutdown::new();
    loop {
        let accepted = async {
            // Never an error: the semaphore is not closed.
            let permit = permits.clone().acquire_owned().await.ok();
            (listener.accept().await, permit)
        };
        let (accepted, permit) = tokio::select! {
            accepted = accepted => accepted,
            () = stop.cancelled() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_RETRY_AFTER).await;
                continue;
            }
        };
        let (router, watcher, stop) = (router.clone(), graceful.watcher(), stop.clone());
        let ListenOptions { tls, header_within } = options.borrow().clone();
        set_write_timeout(&stream);
        tokio::spawn(async move {
            let ended = match tls {
                None => serve_http(stream, router, header_within, watcher).await,
                Some(tls) => match accept_tls(tls, stream, header_within, &stop).await {
                    Some(stream) => serve_http(stream, router, header_within, watcher).await,
                    None => Ok(()),
                },
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection broke");
            }
            drop(permit);
        });
    }
    drop(listener);
    if tokio::time::timeout(DRAIN, graceful.shutdown()).await.is_err() {
        tracing::warn!("some replies were not finished in time and were cut off");
    }
}

/// Has the kernel close the connection of a client that takes no byte of its reply for [`UNREAD_FOR`]: it would keep its permit for
/// ever.
fn set_write_timeout(stream: &TcpStream) {
    #[cfg(target_os = "linux")]
    if let Err(error) = socket2::SockRef::from(stream).set_tcp_user_timeout(Some(UNREAD_FOR)) {
        tracing::debug!(%error, "cannot set a write timeout");
    }
}

/// The TLS handshake; `None` if it fails, takes too long, or the daemon stops.
async fn accept_tls(
    tls: TlsAcceptor,
    stream: TcpStream,
    header_within: Duration,
    stop: &CancellationToken,
) -> Option<tokio_rustls::server::TlsStream<TcpStream>> {
    tokio::select! {
        secured = tokio::time::timeout(header_within, tls.accept(stream)) => secured.ok()?.ok(),
        () = stop.cancelled() => None,
    }
}

/// Answers the requests of one connection.
async fn serve_http<S>(
    stream: S,
    router: Router,
    header_within: Duration,
    watcher: hyper_util::server::graceful::Watcher,
) -> Result<(), hyper::Error>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let router = router.clone();
        async move { Ok::<_, Infallible>(router.oneshot(request.map(Body::new)).await.unwrap_or_else(|e| match e {})) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_within)
        .max_buf_size(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    watcher.watch(connection).await
}

/// Why the listener cannot use TLS.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsListenError {
    /// A file cannot be read, or does not contain what it should in PEM.
    #[error("{setting}: cannot read {what} from {path}: {source}; it must be a PEM file", path = path.display())]
    Pem {
        /// The setting that names the file: `tls-cert` or `tls-key`.
        setting: &'static str,
        /// What the file should contain.
        what: &'static str,
        /// Path of the file that was read.
        path: PathBuf,
        /// Error of reading or parsing it.
        source: pem::Error,
    },
    /// The key does not belong to the certificate.
    #[error("tls-key: {path} does not go with the certificate of tls-cert: {source}", path = path.display())]
    Pair {
        /// Path of the file with the key.
        path: PathBuf,
        /// Error of the TLS library.
        source: rustls::Error,
    },
}

impl TlsListenError {
    /// The setting whose file is wrong.
    pub(crate) fn setting(&self) -> &'static str {
        match self {
            Self::Pem { setting, .. } => setting,
            Self::Pair { .. } => "tls-key",
        }
    }
}

/// Reads a certificate chain and its private key.
///
/// # Errors
/// Every problem of the two files.
pub(crate) fn tls(cert: &Path, key: &Path) -> Result<TlsAcceptor, Vec<TlsListenError>> {
    let failed = |setting, what, path: &Path| {
        let path = path.to_owned();
        move |source| TlsListenError::Pem { setting, what, path, source }
    };
    let chain = CertificateDer::pem_file_iter(cert).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let chain = chain.and_then(|chain| if chain.is_empty() { Err(pem::Error::NoItemsFound) } else { Ok(chain) });
    let chain = chain.map_err(failed("tls-cert", "a certificate", cert));
    let secret = PrivateKeyDer::from_pem_file(key).map_err(failed("tls-key", "a private key", key));
    let (chain, secret) = match (chain, secret) {
        (Ok(chain), Ok(secret)) => (chain, secret),
        (chain, secret) => return Err(chain.err().into_iter().chain(secret.err()).collect()),
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, secret))
        .map_err(|source| vec![TlsListenError::Pair { path: key.to_owned(), source }])?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}
