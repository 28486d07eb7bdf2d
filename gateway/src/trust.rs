//! TLS towards backends: whom the gateway believes, which name it asks for, what it shows of itself; and why a
//! handshake failed. A backend's certificate is always verified: nothing turns that off (docs/decisions/0021).
//!
//! What one backend needs is made when a snapshot is built. As long as its values stay the same it stays the same
//! thing, so sessions are resumed; when one changes, new connections use the new one and old ones are used no more.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use penstock_core::config::{BackendTls, ClientCertificate, CredentialRef};
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::certificates::PROTOCOLS;
use crate::pem;
use crate::socket::Socket;
use crate::source::{Credential, Credentials};

/// Files with authorities that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The file cannot be read.
    #[error("read certificate authorities from {path}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        #[source]
        err: io::Error,
    },
    /// The file holds something else.
    #[error("{path} does not hold certificates in PEM form")]
    Pem {
        /// The file.
        path: String,
    },
    /// rustls refuses its own defaults.
    #[error("set up TLS")]
    Setup(#[source] rustls::Error),
}

/// What all backends have in common that say nothing themselves: the public authorities, and those of the operator's
/// choice.
pub struct Trust {
    provider: Arc<CryptoProvider>,
    usual: Arc<RootCertStore>,
    config: Arc<ClientConfig>,
}

impl Trust {
    /// Trusts the public authorities, and those in `extra` (PEM).
    pub fn new(extra: Option<&Path>) -> Result<Self, TlsError> {
        let mut roots = RootCertStore {
            roots: webpki_roots::TLS_SERVER_ROOTS.to_vec(),
        };
        if let Some(path) = extra {
            let shown = || path.display().to_string();
            let pem = std::fs::read(path).map_err(|err| TlsError::Read { path: shown(), err })?;
            let added = pem::add_roots(&mut roots, &pem);
            added.ok_or_else(|| TlsError::Pem { path: shown() })?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let usual = Arc::new(roots);
        let config = client(&provider, &usual, None).map_err(TlsError::Setup)?;
        Ok(Self {
            provider,
            usual,
            config: Arc::new(config),
        })
    }

    /// TLS towards a host of which nothing is said.
    pub(crate) fn usual(&self) -> &ClientConfig {
        &self.config
    }

    /// TLS towards the host `host`, of whose backend `wanted` is said. `previous` is kept if nothing has changed.
    pub(crate) fn secure(
        &self,
        host: &str,
        wanted: Option<&BackendTls>,
        values: &Credentials,
        previous: Option<&Arc<Secured>>,
    ) -> Result<Arc<Secured>, Unsecured> {
        let host = wanted
            .and_then(|wanted| wanted.hostname.as_deref())
            .unwrap_or(host);
        let known = |wanted: &CredentialRef| match values.values.get(&wanted.id) {
            Some(value) => Ok((wanted.id.clone(), value.clone())),
            None => Err(Unsecured::Missing(wanted.id.clone())),
        };
        let authorities = wanted.map_or(&[][..], |wanted| &wanted.authorities);
        let authorities: Result<Vec<Value>, _> = authorities.iter().map(known).collect();
        let shown = wanted.and_then(|wanted| wanted.client_certificate.as_ref());
        let shown = match shown {
            None => None,
            Some(ClientCertificate { certificate, key }) => {
                Some([known(certificate)?, known(key)?])
            }
        };
        let material = Material {
            host: host.to_owned(),
            authorities: authorities?,
            shown,
        };
        match previous.filter(|previous| previous.material == material) {
            Some(previous) => Ok(Arc::clone(previous)),
            None => self.make(material).map(Arc::new),
        }
    }

    fn make(&self, material: Material) -> Result<Secured, Unsecured> {
        let name = ServerName::try_from(material.host.clone());
        let name = name.map_err(|_| Unsecured::Name(material.host.clone()))?;
        let config = if material.authorities.is_empty() && material.shown.is_none() {
            Arc::clone(&self.config)
        } else {
            let config = client(&self.provider, &self.roots(&material)?, material.shown()?);
            Arc::new(config.map_err(Unsecured::Pair)?)
        };
        Ok(Secured {
            name,
            config,
            material,
        })
    }

    fn roots(&self, material: &Material) -> Result<Arc<RootCertStore>, Unsecured> {
        if material.authorities.is_empty() {
            return Ok(Arc::clone(&self.usual));
        }
        let mut roots = RootCertStore::empty();
        for (id, value) in &material.authorities {
            pem::add_roots(&mut roots, value.value.expose().as_bytes())
                .ok_or_else(|| Unsecured::Certificates(id.clone()))?;
        }
        Ok(Arc::new(roots))
    }
}

/// A certificate and its key.
type Shown = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn client(
    provider: &Arc<CryptoProvider>,
    roots: &Arc<RootCertStore>,
    shown: Option<Shown>,
) -> Result<ClientConfig, rustls::Error> {
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(provider))
            .build()
            .map_err(|err| rustls::Error::General(err.to_string()))?;
    let builder = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_safe_default_protocol_versions()?
        .with_webpki_verifier(verifier);
    let mut config = match shown {
        None => builder.with_no_client_auth(),
        Some((certificates, key)) => builder.with_client_auth_cert(certificates, key)?,
    };
    config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
    Ok(config)
}

/// A value and what it is called.
type Value = (String, Credential);

/// What TLS towards one backend is made from.
#[derive(Debug, PartialEq, Eq)]
struct Material {
    host: String,
    authorities: Vec<Value>,
    /// Certificate and key.
    shown: Option<[Value; 2]>,
}

impl Material {
    fn shown(&self) -> Result<Option<Shown>, Unsecured> {
        let Some([certificate, key]) = &self.shown else {
            return Ok(None);
        };
        let text = |value: &'_ Value| value.1.value.expose().as_bytes().to_vec();
        let certificates = pem::certificates(&text(certificate));
        let certificates =
            certificates.ok_or_else(|| Unsecured::Certificates(certificate.0.clone()))?;
        let private = pem::key(&text(key)).ok_or_else(|| Unsecured::Key(key.0.clone()))?;
        Ok(Some((certificates, private)))
    }
}

/// TLS towards one backend.
pub struct Secured {
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
    material: Material,
}

impl Secured {
    /// A handshake. Cancel safe.
    pub(crate) async fn connect(&self, tcp: TcpStream) -> Result<Socket, io::Error> {
        let connector = TlsConnector::from(Arc::clone(&self.config));
        let tls = connector.connect(self.name.clone(), tcp).await?;
        Ok(Socket::Tls(Box::new(tls.into())))
    }
}

/// Why no TLS can be spoken with a backend.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Unsecured {
    /// A value has not arrived.
    #[error("'{0}' has not arrived")]
    Missing(String),
    /// The name that the certificate must be for is none.
    #[error("'{0}' is not a name that a certificate could be for")]
    Name(String),
    /// A value holds something else.
    #[error("'{0}' does not hold certificates in PEM form")]
    Certificates(String),
    /// A value holds something else.
    #[error("'{0}' does not hold a private key in PEM form")]
    Key(String),
    /// They do not belong together, or are of a kind that is not known.
    #[error("its certificate and key do not belong together, or are of a kind that is not known")]
    Pair(#[source] rustls::Error),
}

/// Why a handshake failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandshakeError {
    /// No authority that is trusted here has signed the backend's certificate.
    UnknownIssuer,
    /// The certificate is for other names.
    WrongName,
    /// The certificate is no longer valid, or not yet.
    Expired,
    /// Something else is wrong with the certificate.
    Certificate,
    /// The backend does not take what the gateway shows of itself.
    ClientCertificate,
    /// The two have no version or cipher in common, or the other side does not speak TLS.
    Handshake,
}

impl HandshakeError {
    const ALL: [Self; 6] = [
        Self::UnknownIssuer,
        Self::WrongName,
        Self::Expired,
        Self::Certificate,
        Self::ClientCertificate,
        Self::Handshake,
    ];

    /// Of an error of rustls, wherever it is among the causes of `err`.
    pub(crate) fn find(err: &(dyn Error + 'static)) -> Option<Self> {
        let mut next = Some(err);
        while let Some(err) = next {
            if let Some(found) = err.downcast_ref() {
                return Some(Self::of(found));
            }
            // The source of such an error is the source of what it holds, not what it holds.
            let held = err.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
            next = match held {
                Some(held) => Some(held),
                None => err.source(),
            };
        }
        None
    }

    fn of(err: &rustls::Error) -> Self {
        use AlertDescription as Alert;
        use CertificateError as Bad;
        match err {
            // The second one where an authority of the same name is trusted.
            rustls::Error::InvalidCertificate(Bad::UnknownIssuer | Bad::BadSignature) => {
                Self::UnknownIssuer
            }
            rustls::Error::InvalidCertificate(
                Bad::NotValidForName | Bad::NotValidForNameContext { .. },
            ) => Self::WrongName,
            rustls::Error::InvalidCertificate(
                Bad::Expired
                | Bad::ExpiredContext { .. }
                | Bad::NotValidYet
                | Bad::NotValidYetContext { .. },
            ) => Self::Expired,
            rustls::Error::InvalidCertificate(_) => Self::Certificate,
            rustls::Error::AlertReceived(
                Alert::NoCertificate
                | Alert::BadCertificate
                | Alert::UnsupportedCertificate
                | Alert::CertificateRevoked
                | Alert::CertificateExpired
                | Alert::CertificateUnknown
                | Alert::UnknownCA
                | Alert::AccessDenied
                // Where an authority of the same name is trusted.
                | Alert::DecryptError
                | Alert::CertificateRequired,
            ) => Self::ClientCertificate,
            _ => Self::Handshake,
        }
    }

    /// For metrics and decisions.
    pub fn label(self) -> &'static str {
        match self {
            Self::UnknownIssuer => "tls_unknown_issuer",
            Self::WrongName => "tls_wrong_name",
            Self::Expired => "tls_expired",
            Self::Certificate => "tls_certificate",
            Self::ClientCertificate => "tls_client_certificate",
            Self::Handshake => "tls_handshake",
        }
    }
}

impl fmt::Display for HandshakeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UnknownIssuer => "its certificate is signed by nobody whom the gateway trusts",
            Self::WrongName => "its certificate is for other names",
            Self::Expired => "its certificate has expired, or is not valid yet",
            Self::Certificate => "its certificate cannot be used",
            Self::ClientCertificate => "it does not take the gateway's certificate, or misses one",
            Self::Handshake => "it does not speak TLS as the gateway does",
        })
    }
}

/// The last handshake with an endpoint, as far as it failed.
#[derive(Debug, Default)]
pub struct LastHandshake(AtomicU8);

impl LastHandshake {
    /// Takes in how a handshake went. Whether that is news.
    pub(crate) fn note(&self, failed: Option<HandshakeError>) -> bool {
        let code = failed.map_or(0, |failed| {
            let position = HandshakeError::ALL.iter().position(|err| *err == failed);
            position
                .and_then(|at| u8::try_from(at + 1).ok())
                .unwrap_or(0)
        });
        // A load first: a store would take the cache line from other cores on each connection.
        self.0.load(Ordering::Relaxed) != code && self.0.swap(code, Ordering::Relaxed) != code
    }

    /// Why it failed.
    pub fn failed(&self) -> Option<HandshakeError> {
        let code = usize::from(self.0.load(Ordering::Relaxed));
        HandshakeError::ALL.get(code.checked_sub(1)?).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_found_below_other_errors() {
        let expired = rustls::Error::InvalidCertificate(CertificateError::Expired);
        let wrapped = io::Error::other(io::Error::new(io::ErrorKind::InvalidData, expired.clone()));
        assert_eq!(
            HandshakeError::find(&io::Error::new(io::ErrorKind::InvalidData, expired)),
            Some(HandshakeError::Expired)
        );
        assert_eq!(
            HandshakeError::find(&wrapped),
            Some(HandshakeError::Expired)
        );
        let reset = io::Error::from(io::ErrorKind::ConnectionReset);
        assert_eq!(HandshakeError::find(&reset), None);
    }

    #[test]
    fn a_failed_handshake_is_news_once_until_it_fails_otherwise_or_works() {
        let last = LastHandshake::default();
        assert!(!last.note(None));
        for failed in HandshakeError::ALL {
            assert!(last.note(Some(failed)));
            assert!(!last.note(Some(failed)));
            assert_eq!(last.failed(), Some(failed));
        }
        assert!(last.note(None));
        assert_eq!(last.failed(), None);
    }
}
