//! Certificates by the test's own authority.

use std::path::PathBuf;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use tempfile::TempDir;

/// An authority and its certificates, as files that are deleted on drop.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: TempDir,
}

/// A certificate and its key, as files.
pub struct Identity {
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// When a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validity {
    /// Now.
    Now,
    /// Only in the past.
    Past,
}

impl Authority {
    /// A new authority.
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, "ttlsweep test authority");
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("a certificate");
        let dir = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(dir.path().join("ca.pem"), issuer.pem()).expect("the file is written");
        Self { issuer, dir }
    }

    /// The file with the authority's certificate.
    pub fn cacert(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// Issues a certificate for these names or addresses.
    pub fn issue(&self, file: &str, names: &[&str], validity: Validity) -> Identity {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        if validity == Validity::Past {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(2020, 2, 1);
        }
        let key = KeyPair::generate().expect("a key");
        let cert = params.signed_by(&key, &self.issuer).expect("a certificate");
        let path = |end: &str| self.dir.path().join(format!("{file}{end}"));
        let identity = Identity { cert: path(".pem"), key: path(".key") };
        std::fs::write(&identity.cert, cert.pem()).expect("the file is written");
        std::fs::write(&identity.key, key.serialize_pem()).expect("the file is written");
        identity
    }
}
