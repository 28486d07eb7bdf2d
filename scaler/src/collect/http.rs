//! (IO) One HTTP/1.1 client for scrapes and load reports: plain text, short deadlines, bounded bodies.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};

/// How long a connection attempt may take.
const CONNECT: Duration = Duration::from_millis(700);
/// How long an unused connection is kept: a few scrapes.
const IDLE: Duration = Duration::from_secs(10);

/// Shared by all sources; cheap to clone.
pub type HttpClient = Client<HttpConnector, Empty<Bytes>>;

/// Why a page could not be read.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The address does not make a URL.
    #[error("build the request")]
    Build(#[source] http::Error),
    /// No connection, or it broke before the answer.
    #[error("send the request")]
    Send(#[source] hyper_util::client::legacy::Error),
    /// An answer that is not 200.
    #[error("answered {0}")]
    Status(StatusCode),
    /// The body broke off, or was longer than allowed.
    #[error("read the answer")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The deadline passed.
    #[error("took longer than {} ms", .0.as_millis())]
    Timeout(Duration),
    /// The body is not UTF-8.
    #[error("the answer is not text")]
    NotText,
}

impl FetchError {
    /// For metric labels.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Build(_) => "request",
            Self::Send(_) => "connect",
            Self::Status(_) => "status",
            Self::Body(_) => "body",
            Self::Timeout(_) => "timeout",
            Self::NotText => "text",
        }
    }
}

/// Makes the client.
pub fn client() -> HttpClient {
    let mut connector = HttpConnector::new();
    connector.set_connect_timeout(Some(CONNECT));
    connector.set_nodelay(true);
    Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE)
        .pool_max_idle_per_host(1)
        .build(connector)
}

/// Starts a GET and hands back the body of a 200. Cancel safe.
pub async fn open(client: &HttpClient, uri: &str) -> Result<Incoming, FetchError> {
    let request = Request::get(uri)
        .body(Empty::new())
        .map_err(FetchError::Build)?;
    let response = client.request(request).await.map_err(FetchError::Send)?;
    match response.status() {
        StatusCode::OK => Ok(response.into_body()),
        status => Err(FetchError::Status(status)),
    }
}

/// Reads a whole page of at most `limit` bytes within `deadline`. Cancel safe.
pub async fn page(
    client: &HttpClient,
    uri: &str,
    limit: usize,
    deadline: Duration,
) -> Result<String, FetchError> {
    let read = async {
        let body = Limited::new(open(client, uri).await?, limit);
        let bytes = body.collect().await.map_err(FetchError::Body)?.to_bytes();
        String::from_utf8(bytes.into()).map_err(|_| FetchError::NotText)
    };
    tokio::time::timeout(deadline, read)
        .await
        .map_err(|_| FetchError::Timeout(deadline))?
}

/// The URL of a path at an address of the cluster. Parses for every socket address.
pub fn url(address: std::net::SocketAddr, path: &str) -> String {
    debug_assert!(format!("http://{address}{path}").parse::<Uri>().is_ok());
    format!("http://{address}{path}")
}
