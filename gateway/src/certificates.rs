//! (IO) Certificates that callers see: folders with `tls.crt` and `tls.key`, as Kubernetes mounts a TLS Secret, and
//! which of them answers which name. The files are looked at again and again; new connections get what is newest, and
//! what cannot be used is said and leaves the last good certificate in force.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::{ClientHello, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig};
use webpki::EndEntityCert;

use crate::metrics::Metrics;
use crate::pem;

/// Names in a folder that the kubelet mounts from a Secret of type `kubernetes.io/tls`.
const CERTIFICATE_FILE: &str = "tls.crt";
const KEY_FILE: &str = "tls.key";
/// The kubelet itself brings a changed Secret within about a minute.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// A Secret holds 1 MiB.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Names of a caller's certificate that are looked at.
const MAX_NAMES: usize = 64;
/// What the two sides of a connection may choose from.
pub(crate) const PROTOCOLS: [&[u8]; 2] = [HTTP_2, b"http/1.1"];
/// What is chosen by who speaks HTTP/2.
pub(crate) const HTTP_2: &[u8] = b"h2";

/// Where TLS for callers comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsSettings {
    /// Folders with a certificate and its key; the first one answers names that no certificate is for.
    pub folders: Vec<PathBuf>,
    /// PEM file with the authorities of which every caller must show a certificate.
    pub client_ca: Option<PathBuf>,
}

/// Why files cannot be used.
#[derive(Debug, thiserror::Error)]
enum CertificateError {
    #[error("read {path}")]
    Read {
        path: String,
        #[source]
        err: std::io::Error,
    },
    #[error("{path} does not hold certificates in PEM form")]
    Certificates { path: String },
    #[error("{path} does not hold a private key in PEM form")]
    Key { path: String },
    #[error(
        "certificate and key in {path} do not belong together, or are of a kind that is not known"
    )]
    Pair {
        path: String,
        #[source]
        err: rustls::Error,
    },
    #[error("set up TLS")]
    Setup(#[source] rustls::Error),
    #[error("set up the authorities of callers")]
    Verifier(#[source] rustls::server::VerifierBuilderError),
}

/// The last good form of something that files hold.
struct Followed<T> {
    path: PathBuf,
    /// What was read last, good or not.
    seen: Option<Vec<Vec<u8>>>,
    good: Option<T>,
    is_bad: bool,
}

impl<T> Followed<T> {
    fn new(path: PathBuf) -> Self {
        Self {
            path,
            seen: None,
            good: None,
            is_bad: false,
        }
    }

    /// Reads the files. Whether there is a new good form.
    fn look(
        &mut self,
        read: impl Fn(&Path) -> Result<Vec<Vec<u8>>, CertificateError>,
        make: impl Fn(&Path, &[Vec<u8>]) -> Result<T, CertificateError>,
    ) -> bool {
        let made = match read(&self.path) {
            Ok(files) if self.seen.as_ref() == Some(&files) => return false,
            Ok(files) => {
                let made = make(&self.path, &files);
                self.seen = Some(files);
                made
            }
            // Said once, until the files are there again.
            Err(_) if self.is_bad && self.seen.is_none() => return false,
            Err(err) => {
                self.seen = None;
                Err(err)
            }
        };
        let path = self.path.display();
        match made {
            Ok(made) => {
                tracing::info!(tls.path = %path, "certificate loaded");
                self.good = Some(made);
                self.is_bad = false;
                true
            }
            Err(err) => {
                let cause = std::error::Error::source(&err).map(ToString::to_string);
                let cause = cause.unwrap_or_default();
                let is_served = self.good.is_some();
                tracing::error!(tls.path = %path, error = %err, error.cause = cause, tls.served = is_served,
                    "certificate cannot be used; the last good one, if there is one, stays");
                self.is_bad = true;
                false
            }
        }
    }
}

/// See the module.
pub(crate) struct Certificates {
    /// `None` while not one certificate can be used.
    current: ArcSwapOption<ServerConfig>,
}

impl Certificates {
    pub(crate) fn new() -> Self {
        Self {
            current: ArcSwapOption::empty(),
        }
    }

    /// What a new connection is served with.
    pub(crate) fn current(&self) -> Option<Arc<ServerConfig>> {
        self.current.load_full()
    }

    /// Looks at the files for ever. The first look is over before the first wait.
    pub(crate) async fn follow(&self, settings: TlsSettings, metrics: &Metrics) {
        let mut folders: Vec<_> = settings.folders.into_iter().map(Followed::new).collect();
        let mut authorities = settings.client_ca.map(Followed::new);
        loop {
            let mut changed = false;
            for folder in &mut folders {
                changed |= folder.look(read_folder, pair);
            }
            if let Some(authorities) = &mut authorities {
                changed |= authorities.look(|path| Ok(vec![read_file(path)?]), roots);
            }
            if changed {
                self.publish(&folders, authorities.as_ref(), metrics);
            }
            let bad = folders.iter().filter(|folder| folder.is_bad).count()
                + usize::from(authorities.as_ref().is_some_and(|file| file.is_bad));
            metrics
                .unusable_certificates
                .set(i64::try_from(bad).unwrap_or(i64::MAX));
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn publish(
        &self,
        folders: &[Followed<Arc<CertifiedKey>>],
        authorities: Option<&Followed<RootCertStore>>,
        metrics: &Metrics,
    ) {
        let choice = Choice {
            keys: folders
                .iter()
                .filter_map(|folder| folder.good.clone())
                .collect(),
        };
        // Without its authorities nobody would be refused: then nobody is let in.
        let callers = authorities.map(|file| file.good.clone());
        if choice.keys.is_empty() || callers.as_ref().is_some_and(Option::is_none) {
            return;
        }
        match config(choice, callers.flatten()) {
            Ok(config) => {
                metrics.certificate_reloads.inc();
                self.current.store(Some(Arc::new(config)));
            }
            Err(err) => tracing::error!(error = %err, "TLS for callers cannot be set up"),
        }
    }
}

fn config(
    choice: Choice,
    callers: Option<RootCertStore>,
) -> Result<ServerConfig, CertificateError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(CertificateError::Setup)?;
    let builder = match callers {
        None => builder.with_no_client_auth(),
        Some(roots) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(CertificateError::Verifier)?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_cert_resolver(Arc::new(choice));
    config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
    Ok(config)
}

/// What a caller's certificate, which was verified, is for: URIs and DNS names.
pub(crate) fn names(shown: Option<&[CertificateDer<'_>]>) -> Vec<String> {
    let certificate = shown.and_then(|all| EndEntityCert::try_from(all.first()?).ok());
    let Some(certificate) = certificate else {
        return Vec::new();
    };
    let uris = certificate.valid_uri_names();
    let all = uris.chain(certificate.valid_dns_names());
    all.take(MAX_NAMES).map(str::to_owned).collect()
}

/// Which certificate answers: the first one that is for the name that the caller asks for, else the first one.
#[derive(Debug)]
struct Choice {
    keys: Vec<Arc<CertifiedKey>>,
}

impl ResolvesServerCert for Choice {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name();
        let name = name.and_then(|name| ServerName::try_from(name).ok());
        let is_for = |key: &&Arc<CertifiedKey>| {
            let certificate = key.end_entity_cert().ok();
            let certificate = certificate.and_then(|der| ParsedCertificate::try_from(der).ok());
            certificate
                .zip(name.as_ref())
                .is_some_and(|(cert, name)| rustls::client::verify_server_name(&cert, name).is_ok())
        };
        let found = self.keys.iter().find(is_for).or(self.keys.first());
        found.cloned()
    }
}

/// The kubelet swaps all files of a folder at once, by a link: both are read from where the first one is.
fn read_folder(folder: &Path) -> Result<Vec<Vec<u8>>, CertificateError> {
    let certificate = folder.join(CERTIFICATE_FILE);
    let certificate = certificate.canonicalize().unwrap_or(certificate);
    let key = certificate.with_file_name(KEY_FILE);
    let key = if key.exists() {
        key
    } else {
        folder.join(KEY_FILE)
    };
    Ok(vec![read_file(&certificate)?, read_file(&key)?])
}

fn read_file(path: &Path) -> Result<Vec<u8>, CertificateError> {
    let read = || {
        let mut bytes = Vec::new();
        File::open(path)?
            .take(MAX_FILE_BYTES)
            .read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().map_err(|err| CertificateError::Read {
        path: path.display().to_string(),
        err,
    })
}

fn pair(folder: &Path, files: &[Vec<u8>]) -> Result<Arc<CertifiedKey>, CertificateError> {
    let path = folder.display().to_string();
    let [certificates, key] = files else {
        return Err(CertificateError::Certificates { path });
    };
    let Some(certificates) = pem::certificates(certificates) else {
        return Err(CertificateError::Certificates { path });
    };
    let Some(key) = pem::key(key) else {
        return Err(CertificateError::Key { path });
    };
    let provider = rustls::crypto::ring::default_provider();
    CertifiedKey::from_der(certificates, key, &provider)
        .map(Arc::new)
        .map_err(|err| CertificateError::Pair { path, err })
}

fn roots(path: &Path, files: &[Vec<u8>]) -> Result<RootCertStore, CertificateError> {
    let mut roots = RootCertStore::empty();
    let mut files = files.iter();
    let added = files.try_for_each(|file| pem::add_roots(&mut roots, file));
    added.ok_or_else(|| CertificateError::Certificates {
        path: path.display().to_string(),
    })?;
    Ok(roots)
}
