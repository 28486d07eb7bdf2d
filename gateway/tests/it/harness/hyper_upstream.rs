//! An upstream that speaks TLS: a real server, hyper's, that answers what a test says.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::StreamExt as _;
use http::{Request, Response};
use http_body_util::{BodyExt as _, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use rustls::server::WebPkiClientVerifier;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::{Authority, Signed, completion};

/// Pieces of a body as the server's tasks take them.
pub(crate) type ServedBody = UnsyncBoxBody<Bytes, Infallible>;

/// A request as the server saw it.
#[derive(Clone, Debug)]
pub(crate) struct Served {
    pub(crate) headers: http::HeaderMap,
    pub(crate) body: Bytes,
    /// The name that was asked for.
    pub(crate) sni: Option<String>,
    /// What the gateway showed of itself.
    pub(crate) shown: Option<CertificateDer<'static>>,
}

type Script = Arc<dyn Fn(usize, &Served) -> Response<ServedBody> + Send + Sync>;

/// What a server is told while it runs.
struct Shared {
    tls: Arc<ServerConfig>,
    script: Script,
    seen: Mutex<Vec<Served>>,
    connections: AtomicUsize,
}

/// See the module.
pub(crate) struct HyperUpstream {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

impl HyperUpstream {
    /// `script` gets the request's number, from 0.
    pub(crate) async fn start(
        tls: Arc<ServerConfig>,
        script: impl Fn(usize, &Served) -> Response<ServedBody> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            tls,
            script: Arc::new(script),
            seen: Mutex::default(),
            connections: AtomicUsize::new(0),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn({
            let shared = Arc::clone(&shared);
            async move {
                let mut connections = JoinSet::new();
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    stream.set_nodelay(true).unwrap();
                    let shared = Arc::clone(&shared);
                    shared.connections.fetch_add(1, Ordering::SeqCst);
                    connections.spawn(async move {
                        let acceptor = TlsAcceptor::from(Arc::clone(&shared.tls));
                        // One that the gateway refuses ends the connection, not the server.
                        if let Ok(stream) = acceptor.accept(stream).await {
                            let (_, tls) = stream.get_ref();
                            let sni = tls.server_name().map(str::to_owned);
                            let shown = tls.peer_certificates().and_then(|all| all.first());
                            let shown = shown.map(|first| first.clone().into_owned());
                            serve(stream, &shared, (sni, shown)).await;
                        }
                    });
                }
            }
        });
        Self {
            address,
            shared,
            _tasks: tasks,
        }
    }

    pub(crate) fn requests(&self) -> Vec<Served> {
        self.shared.seen.lock().unwrap().clone()
    }

    /// Connections that were ever made.
    pub(crate) fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }
}

async fn serve(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    shared: &Arc<Shared>,
    (sni, shown): (Option<String>, Option<CertificateDer<'static>>),
) {
    let service = service_fn(|request: Request<Incoming>| {
        let (shared, sni, shown) = (Arc::clone(shared), sni.clone(), shown.clone());
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await?.to_bytes();
            let served = Served {
                headers: head.headers,
                body,
                sni,
                shown,
            };
            let number = {
                let mut seen = shared.seen.lock().unwrap();
                seen.push(served.clone());
                seen.len() - 1
            };
            Ok::<_, hyper::Error>((shared.script)(number, &served))
        }
    });
    // How a connection ends matters to no test.
    let _ended = auto::Builder::new(TokioExecutor::new())
        .serve_connection(TokioIo::new(io), service)
        .await;
}

/// Over TLS with this certificate; `callers` must show one of this authority's.
pub(crate) fn over_tls(
    signed: &Signed,
    callers: Option<&Authority>,
    protocols: &[&str],
) -> Arc<ServerConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .unwrap();
    let builder = match callers {
        None => builder.with_no_client_auth(),
        Some(authority) => {
            let roots = Arc::new(authority.roots());
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider);
            builder.with_client_cert_verifier(verifier.build().unwrap())
        }
    };
    let mut config = builder
        .with_single_cert(vec![signed.der()], signed.key_der())
        .unwrap();
    let protocols = protocols.iter().map(|name| name.as_bytes().to_vec());
    config.alpn_protocols = protocols.collect();
    Arc::new(config)
}

/// A whole answer.
pub(crate) fn served(text: &str) -> Response<ServedBody> {
    let body = http_body_util::Full::new(Bytes::from(completion(text)));
    Response::builder()
        .header("content-type", "application/json")
        .body(body.boxed_unsync())
        .unwrap()
}

/// An event stream whose pieces the test sends; it ends when the sender is dropped.
pub(crate) fn streamed() -> (mpsc::UnboundedSender<String>, Response<ServedBody>) {
    let (sender, receiver) = mpsc::unbounded_channel::<String>();
    let pieces = futures::stream::unfold(receiver, |mut receiver| async move {
        Some((receiver.recv().await?, receiver))
    });
    let frames = pieces.map(|text| Ok(Frame::data(Bytes::from(text))));
    let answer = Response::builder()
        .header("content-type", "text/event-stream")
        .body(StreamBody::new(frames).boxed_unsync())
        .unwrap();
    (sender, answer)
}
