//! Authorities, certificates and clients that speak TLS and HTTP/2, made for one test.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Somebody who signs certificates.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) pem: String,
}

/// A certificate and its key, in PEM form.
#[derive(Clone)]
pub(crate) struct Signed {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    pub(crate) fn sign(&self, names: &[&str]) -> Signed {
        self.sign_with(names, |_| {})
    }

    /// One whose time is over.
    pub(crate) fn sign_expired(&self, names: &[&str]) -> Signed {
        self.sign_with(names, |params| {
            params.not_before = rcgen::date_time_ymd(2020, 1, 1);
            params.not_after = rcgen::date_time_ymd(2021, 1, 1);
        })
    }

    fn sign_with(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Signed {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).unwrap();
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Signed {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        }
    }

    pub(crate) fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        let der = CertificateDer::from_pem_slice(self.pem.as_bytes()).unwrap();
        roots.add(der).unwrap();
        roots
    }

    /// A client's side of TLS that trusts this authority and offers these protocols.
    pub(crate) fn client(&self, protocols: &[&str], shown: Option<&Signed>) -> ClientConfig {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(self.roots());
        let mut config = match shown {
            None => builder.with_no_client_auth(),
            Some(signed) => builder
                .with_client_auth_cert(vec![signed.der()], signed.key_der())
                .unwrap(),
        };
        config.alpn_protocols = protocols
            .iter()
            .map(|name| name.as_bytes().to_vec())
            .collect();
        config
    }
}

impl Signed {
    pub(crate) fn der(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(self.certificate.as_bytes()).unwrap()
    }

    pub(crate) fn key_der(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::from_pem_slice(self.key.as_bytes()).unwrap()
    }

    /// Into a folder as the kubelet mounts it: files are links into a folder that is swapped by a link.
    pub(crate) fn mount(&self, folder: &Path, version: &str) {
        let inside = folder.join(format!("..{version}"));
        std::fs::create_dir_all(&inside).unwrap();
        std::fs::write(inside.join("tls.crt"), &self.certificate).unwrap();
        std::fs::write(inside.join("tls.key"), &self.key).unwrap();
        let next = folder.join("..data_tmp");
        std::os::unix::fs::symlink(format!("..{version}"), &next).unwrap();
        std::fs::rename(next, folder.join("..data")).unwrap();
        for name in ["tls.crt", "tls.key"] {
            // There from the second time on.
            let _ = std::os::unix::fs::symlink(format!("..data/{name}"), folder.join(name));
        }
    }
}

/// A connection over TLS, for the name `name`.
pub(crate) async fn tls(
    address: SocketAddr,
    config: ClientConfig,
    name: &str,
) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from(name.to_owned()).unwrap();
    TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
}

/// A client that speaks HTTP/2.
pub(crate) struct H2Client {
    sender: SendRequest<Full<Bytes>>,
    pub(crate) connection: JoinSet<Result<(), hyper::Error>>,
}

impl H2Client {
    pub(crate) async fn over(
        io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ) -> Result<Self, hyper::Error> {
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .handshake(TokioIo::new(io))
            .await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(connection);
        Ok(Self {
            sender,
            connection: tasks,
        })
    }

    pub(crate) async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        Self::over(stream).await.unwrap()
    }

    pub(crate) async fn request(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, hyper::Error> {
        self.sender.ready().await?;
        self.sender.send_request(request).await
    }

    /// The answer to a `POST` whose head has come.
    pub(crate) async fn begin(&mut self, path: &str, body: &str) -> Response<Incoming> {
        self.request(post_to(path, body)).await.unwrap()
    }

    /// Status and body of the answer to a `POST`.
    pub(crate) async fn post(&mut self, path: &str, body: &str) -> (u16, String) {
        let answer = self.begin(path, body).await;
        let status = answer.status().as_u16();
        (status, text(answer).await)
    }
}

pub(crate) fn post_to(path: &str, body: &str) -> Request<Full<Bytes>> {
    Request::post(format!("http://gateway{path}"))
        .header("content-type", "application/json")
        .body(Full::new(Bytes::copy_from_slice(body.as_bytes())))
        .unwrap()
}

/// The rest of an answer.
pub(crate) async fn text(answer: Response<Incoming>) -> String {
    let bytes = answer.into_body().collect().await.unwrap().to_bytes();
    String::from_utf8(bytes.to_vec()).unwrap()
}
