//! TLS: the authorities to trust, the client certificate, and what a failed handshake means.
//!
//! rustls with ring as its one provider. Every certificate is checked, its name included (`redis-cli` does not check
//! the name), unless the operator says `insecure`.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::model::shard::NodeAddr;
use crate::node::error::{NodeError, PLAIN};
use crate::settings::TlsSettings;

/// Makes ring the TLS provider of this process. `main` calls it once; a second call changes nothing.
pub fn install_provider() {
    let _ = ring::default_provider().install_default();
}

/// Why TLS files cannot be used; found before a connection is made.
#[derive(Debug, thiserror::Error)]
pub enum TlsFileError {
    /// A file that cannot be read, or holds nothing of the kind in PEM.
    #[error("{option}: cannot read {what} from {path}: {source}; it must be a PEM file", path = path.display())]
    Pem {
        /// The option that names the file: `--cacert`, `--cert` or `--key`.
        option: &'static str,
        /// What should be in it.
        what: &'static str,
        /// Path of the file that the option names.
        path: PathBuf,
        /// Why the file could not be read or parsed.
        source: rustls::pki_types::pem::Error,
    },
    /// A file of authorities or a certificate that TLS rejects.
    #[error("{option}: {path}: {source}", path = path.display())]
    Unusable {
        /// The option that names the file: `--cacert` or `--key`.
        option: &'static str,
        /// Path of the file that the option names.
        path: PathBuf,
        /// Why TLS rejects its contents.
        source: rustls::Error,
    },
    /// The system has no store of authorities.
    #[error("this system has no certificate authorities to trust ({0}); name a file with --cacert")]
    NoSystemRoots(String),
    /// A name that no certificate can have.
    #[error("--sni: `{0}` is neither a host name nor an address")]
    Name(String),
    /// Certificate and key do not match, or the like.
    #[error("TLS cannot be set up: {0}")]
    Setup(#[source] rustls::Error),
}

impl TlsFileError {
    /// The setting that is wrong; `None` where no single one is.
    pub fn setting(&self) -> Option<&'static str> {
        match self {
            Self::Pem { option, .. } | Self::Unusable { option, .. } => Some(option.trim_start_matches('-')),
            Self::NoSystemRoots(_) => Some("cacert"),
            Self::Name(_) => Some("sni"),
            Self::Setup(_) => None,
        }
    }
}

/// A TLS configuration that is ready to use.
#[derive(Debug, Clone)]
pub struct Tls {
    config: Arc<ClientConfig>,
    sni: Option<ServerName<'static>>,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// [`TlsFileError`], naming the option and the file.
    pub fn load(settings: &TlsSettings) -> Result<Self, TlsFileError> {
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(TlsFileError::Setup)?;
        let builder = if settings.insecure {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        } else {
            let roots = Arc::new(roots(settings.cacert.as_deref())?);
            let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider)
                .build()
                .map_err(|e| TlsFileError::Setup(rustls::Error::General(e.to_string())))?;
            builder.with_webpki_verifier(verifier)
        };
        let config =
            match &settings.identity {
                None => builder.with_no_client_auth(),
                Some((cert, key)) => {
                    let chain = certificates("--cert", cert)?;
                    builder
                        .with_client_auth_cert(chain, private_key(key)?)
                        .map_err(|source| TlsFileError::Unusable { option: "--key", path: key.clone(), source })?
                }
            };
        let sni =
            settings.sni.clone().map(|name| ServerName::try_from(name.clone()).map_err(|_| TlsFileError::Name(name)));
        Ok(Self { config: Arc::new(config), sni: sni.transpose()? })
    }

    /// Everything that is wrong with the files, where [`Tls::load`] stops at the first.
    pub fn problems(settings: &TlsSettings) -> Vec<TlsFileError> {
        let mut problems = Vec::new();
        if !settings.insecure {
            problems.extend(roots(settings.cacert.as_deref()).err());
        }
        if let Some((cert, key)) = &settings.identity {
            problems.extend(certificates("--cert", cert).err());
            problems.extend(private_key(key).err());
        }
        if problems.is_empty() {
            // Each file is valid by itself; what remains is whether they match.
            problems.extend(Self::load(settings).err());
        }
        problems
    }

    /// Encrypts a new connection to `host`. The caller bounds the time.
    ///
    /// # Errors
    /// [`NodeError::Tls`], or [`NodeError::Connect`] where the connection itself broke.
    pub(super) async fn encrypt(
        &self,
        stream: TcpStream,
        host: &str,
        addr: &NodeAddr,
    ) -> Result<TlsStream<TcpStream>, NodeError> {
        let name = match &self.sni {
            Some(name) => name.clone(),
            None => ServerName::try_from(host.to_owned()).map_err(|_| NodeError::Tls {
                addr: addr.clone(),
                problem: format!("`{host}` is no name that a certificate can hold"),
                hint: "give the name in its certificate with --sni NAME",
            })?,
        };
        let connected = TlsConnector::from(self.config.clone()).connect(name, stream).await;
        connected.map_err(|source| {
            let closed = matches!(
                source.kind(),
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
            );
            explain(addr, &source).unwrap_or_else(|| {
                if closed {
                    NodeError::TlsCut { addr: addr.clone() }
                } else {
                    NodeError::Connect { addr: addr.clone(), source }
                }
            })
        })
    }
}

/// What a TLS error inside an I/O error means, or `None` where there is none inside.
pub(super) fn explain(addr: &NodeAddr, error: &io::Error) -> Option<NodeError> {
    let tls = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    let (problem, hint) = match tls {
        rustls::Error::InvalidCertificate(certificate) => certificate_problem(certificate),
        rustls::Error::InvalidMessage(_) => {
            ("it answered the TLS handshake with something that is no TLS".to_owned(), PLAIN)
        }
        rustls::Error::AlertReceived(
            alert @ (AlertDescription::CertificateRequired
            | AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::DecryptError
            | AlertDescription::AccessDenied),
        ) => (
            format!("the server does not accept our certificate ({alert:?})"),
            "it wants a certificate of an authority that it trusts: --cert FILE and --key FILE",
        ),
        // TLS 1.2 has no alert of its own for a certificate that is missing.
        rustls::Error::AlertReceived(AlertDescription::HandshakeFailure) => (
            "the server ended the TLS handshake (HandshakeFailure)".to_owned(),
            "it may want a certificate (--cert FILE and --key FILE), or offer no cipher that is safe today",
        ),
        rustls::Error::AlertReceived(AlertDescription::ProtocolVersion) | rustls::Error::PeerIncompatible(_) => (
            format!("no version of TLS that both speak: {tls}"),
            "the server must offer TLS 1.2 or 1.3 (`tls-protocols`)",
        ),
        other => (other.to_string(), "check the server's TLS settings and what stands in between"),
    };
    Some(NodeError::Tls { addr: addr.clone(), problem, hint })
}

fn certificate_problem(problem: &CertificateError) -> (String, &'static str) {
    use CertificateError as E;
    match problem {
        E::NotValidForNameContext { expected, presented } => (
            format!("its certificate is for {}, not for {}", names(presented), expected.to_str()),
            "connect by a name that the certificate holds, or say which one with --sni NAME",
        ),
        E::NotValidForName => (
            "its certificate is for another name".to_owned(),
            "connect by a name that the certificate holds, or say which one with --sni NAME",
        ),
        E::UnknownIssuer => (
            "its certificate comes from an authority that is not trusted here".to_owned(),
            "name the authority's certificate with --cacert FILE",
        ),
        // An authority that was created again under its old name.
        E::BadSignature => (
            "its certificate was not signed by the authority of that name that is trusted here".to_owned(),
            "name the authority's present certificate with --cacert FILE",
        ),
        E::ExpiredContext { not_after, .. } => {
            (format!("its certificate expired at {}", date(*not_after)), "renew the server's certificate")
        }
        E::Expired => ("its certificate has expired".to_owned(), "renew the server's certificate"),
        E::NotValidYetContext { not_before, .. } => (
            format!("its certificate is not valid before {}", date(*not_before)),
            "is the clock of this machine right?",
        ),
        E::NotValidYet => ("its certificate is not valid yet".to_owned(), "is the clock of this machine right?"),
        other => (
            format!("its certificate cannot be accepted: {other}"),
            "the server's certificate must be one that an authority issued for it, not the authority's own",
        ),
    }
}

fn names(presented: &[String]) -> String {
    if presented.is_empty() {
        return "no name at all".to_owned();
    }
    // The crate writes DnsName("x") and IpAddress(x); people write x.
    let bare = presented.iter().map(|name| {
        let inner = name.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')')).unwrap_or(name);
        inner.trim_matches('"').to_owned()
    });
    bare.collect::<Vec<_>>().join(", ")
}

fn date(time: UnixTime) -> String {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    jiff::Timestamp::from_second(seconds).map_or_else(|_| format!("{seconds}"), |at| at.to_string())
}

fn roots(cacert: Option<&Path>) -> Result<RootCertStore, TlsFileError> {
    let mut roots = RootCertStore::empty();
    match cacert {
        Some(path) => {
            for certificate in certificates("--cacert", path)? {
                roots.add(certificate).map_err(|source| TlsFileError::Unusable {
                    option: "--cacert",
                    path: path.to_owned(),
                    source,
                })?;
            }
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            // A system store may hold certificates that cannot be read; the others are trusted.
            roots.add_parsable_certificates(found.certs);
            if roots.is_empty() {
                let why = found.errors.first().map_or_else(|| "the store is empty".to_owned(), ToString::to_string);
                return Err(TlsFileError::NoSystemRoots(why));
            }
        }
    }
    Ok(roots)
}

fn certificates(option: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsFileError> {
    let failed = |source| TlsFileError::Pem { option, what: "a certificate", path: path.to_owned(), source };
    let read = CertificateDer::pem_file_iter(path).map_err(failed)?.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    if read.is_empty() { Err(failed(rustls::pki_types::pem::Error::NoItemsFound)) } else { Ok(read) }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsFileError> {
    let failed = |source| TlsFileError::Pem { option: "--key", what: "a private key", path: path.to_owned(), source };
    PrivateKeyDer::from_pem_file(path).map_err(failed)
}

/// Accepts every certificate, for `insecure`. The handshake's own signature is still checked: the peer has the
/// key of the certificate that it shows.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
