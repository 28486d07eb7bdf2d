//! (IO) TLS of a run: an authority that signs one certificate and is forgotten, and callers who trust it alone.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::client::Resumption;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};
use tokio_rustls::TlsConnector;

/// Writes `ca.crt`, and `tls.crt` with `tls.key` for 127.0.0.1, into the folder.
pub(crate) fn certificate(folder: &Path) -> anyhow::Result<()> {
    let key = KeyPair::generate()?;
    let mut authority = CertificateParams::new(Vec::new())?;
    // Else both certificates have one name, which some take for self-signed.
    let name = &mut authority.distinguished_name;
    name.push(DnType::CommonName, "penstock-bench authority");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = authority.self_signed(&key)?.pem();
    let issuer = Issuer::new(authority, key);
    let key = KeyPair::generate()?;
    let params = CertificateParams::new([Ipv4Addr::LOCALHOST.to_string()])?;
    let certificate = params.signed_by(&key, &issuer)?.pem();
    let files = [
        ("ca.crt", ca),
        ("tls.crt", certificate),
        ("tls.key", key.serialize_pem()),
    ];
    for (name, text) in files {
        let path = folder.join(name);
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// Speaks HTTP/1.1 over TLS with who has a certificate of this authority (a PEM file), and with nobody else. Each
/// connection begins with a whole handshake, as that of a caller who comes for the first time.
pub(crate) fn connector(ca: &Path) -> anyhow::Result<TlsConnector> {
    let read = || format!("read {}", ca.display());
    let mut roots = RootCertStore::empty();
    let authority = CertificateDer::from_pem_file(ca).with_context(read)?;
    roots.add(authority).with_context(read)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.resumption = Resumption::disabled();
    Ok(TlsConnector::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::{PrivateKeyDer, ServerName};
    use tokio::net::{TcpListener, TcpStream};
    use tokio_rustls::TlsAcceptor;

    use super::*;

    fn acceptor(folder: &Path) -> TlsAcceptor {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let certificate = CertificateDer::from_pem_file(folder.join("tls.crt")).unwrap();
        let key = PrivateKeyDer::from_pem_file(folder.join("tls.key")).unwrap();
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }

    #[tokio::test]
    async fn a_certificate_of_another_authority_is_refused() {
        let [ours, other] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        for folder in [&ours, &other] {
            certificate(folder.path()).unwrap();
        }
        for (folder, is_trusted) in [(&ours, true), (&other, false)] {
            let connector = connector(&folder.path().join("ca.crt")).unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let acceptor = acceptor(ours.path());
            let serve = async { acceptor.accept(listener.accept().await.unwrap().0).await };
            let call = async {
                let stream = TcpStream::connect(address).await.unwrap();
                connector
                    .connect(ServerName::from(address.ip()), stream)
                    .await
            };
            let (_, called) = tokio::join!(serve, call);
            assert_eq!(called.is_ok(), is_trusted);
        }
    }
}
