//! Brings requests to the router: connections, TLS, and the bounds that keep slow or many clients from hurting others.
//!
//! HTTP/1.1 only. A connection that sends no complete header in time is closed; beyond the bound on connections new
//! ones wait in the kernel's queue. Stopping lets answers under way end.

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

/// Most bytes of a request's headers.
const MAX_HEADERS: usize = 16 << 10;
/// After a failed accept: the process is out of file descriptors, and asking again at once would only spin.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// How long answers under way may take once the daemon stops.
const DRAIN: Duration = Duration::from_secs(10);

/// Bounds on clients.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at once.
    pub connections: usize,
    /// Time to make a TLS connection, and to send the header of a request.
    pub header_within: Duration,
}

/// Answers requests until `stop`, and then those that are under way.
pub async fn serve(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    router: Router,
    limits: Limits,
    stop: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(limits.connections));
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
        let (router, tls, watcher, stop) = (router.clone(), tls.clone(), graceful.watcher(), stop.clone());
        tokio::spawn(async move {
            let ended = match tls {
                None => converse(stream, router, limits, watcher).await,
                Some(tls) => match secured(tls, stream, limits, &stop).await {
                    Some(stream) => converse(stream, router, limits, watcher).await,
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

async fn secured(
    tls: TlsAcceptor,
    stream: TcpStream,
    limits: Limits,
    stop: &CancellationToken,
) -> Option<tokio_rustls::server::TlsStream<TcpStream>> {
    tokio::select! {
        secured = tokio::time::timeout(limits.header_within, tls.accept(stream)) => secured.ok()?.ok(),
        () = stop.cancelled() => None,
    }
}

async fn converse<S>(
    stream: S,
    router: Router,
    limits: Limits,
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
        .header_read_timeout(limits.header_within)
        .max_buf_size(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    watcher.watch(connection).await
}

/// Reads a certificate chain and its key.
///
/// # Errors
/// Of the files, or of a key that does not fit.
pub fn tls(cert: &Path, key: &Path) -> io::Result<TlsAcceptor> {
    let of = |path: &Path| {
        let path = path.display().to_string();
        move |e: rustls::pki_types::pem::Error| io::Error::other(format!("{path}: {e}"))
    };
    let chain: Vec<_> = CertificateDer::pem_file_iter(cert).and_then(Iterator::collect).map_err(of(cert))?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(of(key))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(io::Error::other)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}
