//! An upstream that speaks TLS and HTTP/2: a real server, hyper's, that answers what a test says.

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
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::{Authority, Signed, completion, word};

/// Pieces of a body as the server's tasks take them.
pub(crate) type ServedBody = UnsyncBoxBody<Bytes, Infallible>;

/// A request as the server saw it.
#[derive(Clone, Debug)]
pub(crate) struct Served {
    /// Number of the connection it came on, from 0.
    pub(crate) connection: usize,
    pub(crate) version: http::Version,
    pub(crate) uri: http::Uri,
    pub(crate) headers: http::HeaderMap,
    pub(crate) body: Bytes,
    /// The name that was asked for.
    pub(crate) sni: Option<String>,
    /// What the gateway showed of itself.
    pub(crate) shown: Option<CertificateDer<'static>>,
}

type Script = Arc<dyn Fn(usize, &Served) -> Response<ServedBody> + Send + Sync>;

/// How the server speaks.
#[derive(Clone)]
pub(crate) struct Speaks {
    /// `None`: in the clear.
    pub(crate) tls: Option<Arc<ServerConfig>>,
    /// Streams at one time on one connection.
    pub(crate) most_streams: u32,
}

/// What a server is told while it runs.
struct Shared {
    speaks: Speaks,
    script: Script,
    seen: Mutex<Vec<Served>>,
    connections: AtomicUsize,
    open: AtomicUsize,
    /// Ends connections after their streams, with GOAWAY.
    leave: Mutex<CancellationToken>,
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
        speaks: Speaks,
        script: impl Fn(usize, &Served) -> Response<ServedBody> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            speaks,
            script: Arc::new(script),
            seen: Mutex::default(),
            connections: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            leave: Mutex::default(),
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
                    let number = shared.connections.fetch_add(1, Ordering::SeqCst);
                    connections.spawn(async move {
                        shared.open.fetch_add(1, Ordering::SeqCst);
                        let tls = shared.speaks.tls.clone();
                        match tls {
                            None => serve(stream, number, &shared, (None, None)).await,
                            Some(tls) => {
                                // One that the gateway refuses ends the connection, not the server.
                                match TlsAcceptor::from(tls).accept(stream).into_fallible().await {
                                    Ok(stream) => {
                                        let (_, tls) = stream.get_ref();
                                        let sni = tls.server_name().map(str::to_owned);
                                        let shown = tls.peer_certificates().and_then(|c| c.first());
                                        let shown = shown.map(|c| c.clone().into_owned());
                                        serve(stream, number, &shared, (sni, shown)).await;
                                    }
                                    // Closed with something unread it would be reset, which overtakes the alert.
                                    Err((_, mut stream)) => {
                                        let _told = stream.shutdown().await;
                                        let _rest =
                                            tokio::io::copy(&mut stream, &mut tokio::io::sink())
                                                .await;
                                    }
                                }
                            }
                        }
                        shared.open.fetch_sub(1, Ordering::SeqCst);
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

    /// Those that are open.
    pub(crate) fn open(&self) -> usize {
        self.shared.open.load(Ordering::SeqCst)
    }

    /// Tells all connections to end when their streams have.
    pub(crate) fn leave(&self) {
        let token = std::mem::take(&mut *self.shared.leave.lock().unwrap());
        token.cancel();
    }
}

async fn serve(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    number: usize,
    shared: &Arc<Shared>,
    (sni, shown): (Option<String>, Option<CertificateDer<'static>>),
) {
    let service = service_fn(|request: Request<Incoming>| {
        let (shared, sni, shown) = (Arc::clone(shared), sni.clone(), shown.clone());
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await?.to_bytes();
            let served = Served {
                connection: number,
                version: head.version,
                uri: head.uri,
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
    let mut builder = auto::Builder::new(TokioExecutor::new());
    let most_streams = shared.speaks.most_streams;
    builder.http2().max_concurrent_streams(most_streams);
    let leave = shared.leave.lock().unwrap().clone();
    let connection = builder.serve_connection(TokioIo::new(io), service);
    let mut connection = std::pin::pin!(connection);
    let mut left = false;
    loop {
        tokio::select! {
            _ended = connection.as_mut() => return,
            () = leave.cancelled(), if !left => {
                left = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

/// In the clear.
pub(crate) fn clear() -> Speaks {
    Speaks {
        tls: None,
        most_streams: 128,
    }
}

/// Answers streams with words of `length` without end, in the clear, and counts the bytes that were taken of them; all
/// else at once.
pub(crate) async fn endless(length: usize) -> (Arc<AtomicUsize>, HyperUpstream) {
    let sent: Arc<AtomicUsize> = Arc::default();
    let counted = Arc::clone(&sent);
    let upstream = HyperUpstream::start(clear(), move |_, request| {
        if !String::from_utf8_lossy(&request.body).contains("\"stream\":true") {
            return served("x");
        }
        let counted = Arc::clone(&counted);
        let pieces = futures::stream::repeat_with(move || {
            let piece = Bytes::from(word(&"x".repeat(length)));
            counted.fetch_add(piece.len(), Ordering::SeqCst);
            Ok(Frame::data(piece))
        });
        Response::builder()
            .header("content-type", "text/event-stream")
            .body(StreamBody::new(pieces.boxed()).boxed_unsync())
            .unwrap()
    })
    .await;
    (sent, upstream)
}

/// Over TLS with this certificate; `callers` must show one of this authority's.
pub(crate) fn over_tls(signed: &Signed, callers: Option<&Authority>, protocols: &[&str]) -> Speaks {
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
    Speaks {
        tls: Some(Arc::new(config)),
        most_streams: 128,
    }
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
