//! Brings requests to the router: connections, TLS, and the bounds that keep slow or many clients from hurting others.
//!
//! HTTP/1.1 only. A connection that sends no complete header in time is closed; beyond the bound on connections new
//! ones wait in the kernel's queue. Stopping lets answers under way end.

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

/// Most bytes of a request's headers.
const MAX_HEADERS: usize = 16 << 10;
/// After a failed accept: the process is out of file descriptors, and asking again at once would only spin.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// How long a client may leave an answer unread.
#[cfg(target_os = "linux")]
const UNREAD_FOR: Duration = Duration::from_secs(60);
/// How long answers under way may take once the daemon stops.
const DRAIN: Duration = Duration::from_secs(10);

/// How a new connection is met.
#[derive(Clone)]
pub struct Terms {
    /// How to encrypt, if at all.
    pub tls: Option<TlsAcceptor>,
    /// Time to make a TLS connection, and to send the header of a request.
    pub header_within: Duration,
}

/// Answers requests until `stop`, and then those that are under way. At most so many `connections` at once.
pub async fn serve(
    listener: TcpListener,
    terms: watch::Receiver<Terms>,
    router: Router,
    connections: usize,
    stop: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(connections));
    let graceful = GracefulShutdown::new();
    loop {
        let accepted = async {
            // The semaphore is never closed.
            let place = places.clone().acquire_owned().await.ok();
            (listener.accept().await, place)
        };
        let (accepted, place) = tokio::select! {
            accepted = accepted => accepted,
            () = stop.cancelled() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        let (router, watcher, stop) = (router.clone(), graceful.watcher(), stop.clone());
        let Terms { tls, header_within } = terms.borrow().clone();
        bound_writing(&stream);
        tokio::spawn(async move {
            let ended = match tls {
                None => converse(stream, router, header_within, watcher).await,
                Some(tls) => match secured(tls, stream, header_within, &stop).await {
                    Some(stream) => converse(stream, router, header_within, watcher).await,
                    None => Ok(()),
                },
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection broke");
            }
            drop(place);
        });
    }
    drop(listener);
    if tokio::time::timeout(DRAIN, graceful.shutdown()).await.is_err() {
        tracing::warn!("some answers were still under way and were cut");
    }
}

/// A client that takes no byte of its answer for [`UNREAD_FOR`] is cut by the kernel: it would keep its place for ever.
fn bound_writing(stream: &TcpStream) {
    #[cfg(target_os = "linux")]
    if let Err(error) = socket2::SockRef::from(stream).set_tcp_user_timeout(Some(UNREAD_FOR)) {
        tracing::debug!(%error, "a connection without a bound on writing");
    }
}

async fn secured(
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

async fn converse<S>(
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

/// Why the listener cannot speak TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsListenError {
    /// A file that cannot be read, or holds nothing of the kind in PEM.
    #[error("{setting}: cannot read {what} from {path}: {source}; it must be a PEM file", path = path.display())]
    Pem {
        /// `tls-cert` or `tls-key`.
        setting: &'static str,
        /// What should be in it.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: pem::Error,
    },
    /// Each can be read, and they cannot be used together.
    #[error("tls-key: {path} does not go with the certificate of tls-cert: {source}", path = path.display())]
    Pair {
        /// The file with the key.
        path: PathBuf,
        /// Why.
        source: rustls::Error,
    },
}

impl TlsListenError {
    /// The setting that is to blame.
    pub fn setting(&self) -> &'static str {
        match self {
            Self::Pem { setting, .. } => setting,
            Self::Pair { .. } => "tls-key",
        }
    }
}

/// Reads a certificate chain and its key.
///
/// # Errors
/// All that is wrong with the files.
pub fn tls(cert: &Path, key: &Path) -> Result<TlsAcceptor, Vec<TlsListenError>> {
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
