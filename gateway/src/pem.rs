//! Certificates and keys in PEM form. Pure.

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// All certificates of a text; `None` if there are none, or something that is none.
pub(crate) fn certificates(pem: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    all.ok().filter(|all| !all.is_empty())
}

/// The first private key of a text.
pub(crate) fn key(pem: &[u8]) -> Option<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_slice(pem).ok()
}

/// Adds all certificates of a text to `roots`; `None` if there are none, or something that is none.
pub(crate) fn add_roots(roots: &mut RootCertStore, pem: &[u8]) -> Option<()> {
    for certificate in certificates(pem)? {
        roots.add(certificate).ok()?;
    }
    Some(())
}
