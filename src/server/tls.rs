//! TLS: the certificate and its key, and their replacement while the service runs.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig};

/// What clients may choose from by ALPN, the better one first.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// Where certificate and key are.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// The certificate, followed by those that lead to its authority; PEM.
    pub cert: PathBuf,
    /// The private key of the first certificate; PEM: PKCS #8, PKCS #1 or SEC 1.
    pub key: PathBuf,
}

/// Files that TLS cannot be spoken with.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// One cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// One is no PEM, or has nothing of its kind in it.
    #[error("{path}: no {expected} in PEM: {source}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        expected: &'static str,
        /// What was found.
        source: pem::Error,
    },
    /// They do not make a pair, or are of a kind that is not supported.
    #[error("certificate {cert} and key {key}: {source}")]
    Pair {
        /// The certificate.
        cert: PathBuf,
        /// The key.
        key: PathBuf,
        /// Why.
        source: rustls::Error,
    },
}

/// The certificate in use.
#[derive(Debug)]
pub(crate) struct Tls {
    files: TlsFiles,
    current: RwLock<Arc<ServerConfig>>,
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })
}

fn load(files: &TlsFiles) -> Result<Arc<ServerConfig>, TlsError> {
    let no = |path: &Path, expected| {
        let path = path.to_owned();
        move |source| TlsError::Pem { path, expected, source }
    };
    let certs: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&read(&files.cert)?)
        .collect::<Result<_, _>>()
        .map_err(no(&files.cert, "certificate"))?;
    if certs.is_empty() {
        return Err(no(&files.cert, "certificate")(pem::Error::NoItemsFound));
    }
    let key = PrivateKeyDer::from_pem_slice(&read(&files.key)?).map_err(no(&files.key, "private key"))?;
    let pair = |source| TlsError::Pair { cert: files.cert.clone(), key: files.key.clone(), source };
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(pair)?
        .with_no_client_auth()
        .with_single_cert(certs, key)
        .map_err(pair)?;
    config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
    Ok(Arc::new(config))
}

impl Tls {
    pub(crate) fn open(files: TlsFiles) -> Result<Self, TlsError> {
        let current = RwLock::new(load(&files)?);
        Ok(Self { files, current })
    }

    /// Reads the files again; on an error the old certificate stays. Connections keep the one that they began with.
    pub(crate) fn reload(&self) -> Result<(), TlsError> {
        let config = load(&self.files)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = config;
        Ok(())
    }

    /// For a handshake now.
    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Pair {
        cert: String,
        key: String,
    }

    fn pair() -> Pair {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        Pair { cert: made.cert.pem(), key: made.signing_key.serialize_pem() }
    }

    fn files(dir: &Path, cert: impl AsRef<[u8]>, key: impl AsRef<[u8]>) -> TlsFiles {
        let files = TlsFiles { cert: dir.join("tls.crt"), key: dir.join("tls.key") };
        std::fs::write(&files.cert, cert).unwrap();
        std::fs::write(&files.key, key).unwrap();
        files
    }

    #[test]
    fn files_that_cannot_be_used_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (pair(), pair());
        let both = files(dir.path(), format!("{}{}", one.cert, other.cert), &one.key);
        Tls::open(both.clone()).unwrap();
        for (cert, key, expected) in [
            (one.cert.as_str(), other.key.as_str(), "certificate "),
            (one.key.as_str(), one.key.as_str(), "no certificate in PEM"),
            (one.cert.as_str(), one.cert.as_str(), "no private key in PEM"),
            ("", one.key.as_str(), "no certificate in PEM"),
            ("-----BEGIN CERTIFICATE-----\nAAAA", one.key.as_str(), "no certificate in PEM"),
            ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", one.key.as_str(), "certificate "),
            (one.cert.as_str(), "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "certificate "),
        ] {
            let error = Tls::open(files(dir.path(), cert, key)).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("tls."), "{error}");
        }
        std::fs::remove_file(&both.key).unwrap();
        let error = Tls::open(both).unwrap_err();
        assert!(matches!(&error, TlsError::Read { path, .. } if path.ends_with("tls.key")), "{error}");
    }

    #[test]
    fn a_refused_certificate_leaves_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let one = pair();
        let tls = Tls::open(files(dir.path(), &one.cert, &one.key)).unwrap();
        let before = Arc::as_ptr(tls.acceptor().config());
        std::fs::write(dir.path().join("tls.key"), pair().key).unwrap();
        tls.reload().unwrap_err();
        assert_eq!(Arc::as_ptr(tls.acceptor().config()), before);
        let new = pair();
        files(dir.path(), &new.cert, &new.key);
        tls.reload().unwrap();
        assert_ne!(Arc::as_ptr(tls.acceptor().config()), before);
    }
}
