//! (IO) Where lines of usage go: objects of lines (a folder, or a bucket that speaks S3), or a collector that speaks
//! OTLP.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::{Method, Request, Uri, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use object_store::aws::AmazonS3Builder;
use object_store::client::{
    HttpClient, HttpConnector as Connector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
    HttpResponseBody, HttpService,
};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ClientOptions, ObjectStore, ObjectStoreExt as _, PutPayload};
use rustls::ClientConfig;

use super::line;
use crate::own_client;

/// For a question and its answer.
const ANSWER: Duration = Duration::from_secs(30);
/// Answers to puts say little.
const MAX_ANSWER_BYTES: usize = 1 << 20;
/// Records of one request to a collector.
const RECORDS: usize = 1_000;

/// Where lines are to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A folder.
    Folder(PathBuf),
    /// `s3://bucket/prefix`.
    Bucket(String),
    /// The address of `/v1/logs`.
    Collector(Uri),
}

/// A text that names no place for lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be file:PATH, s3://BUCKET[/PREFIX], otlp+http://HOST:PORT or otlp+https://HOST:PORT")]
pub struct TargetError;

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        if let Some(path) = text.strip_prefix("file:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            let is_some = !path.is_empty();
            return is_some
                .then(|| Self::Folder(path.into()))
                .ok_or(TargetError);
        }
        if let Some(place) = text.strip_prefix("s3://") {
            let bucket = place.split('/').next().unwrap_or_default();
            let is_some = !bucket.is_empty() && !place.contains(['?', '#', '@']);
            return is_some
                .then(|| Self::Bucket(text.to_owned()))
                .ok_or(TargetError);
        }
        let url = text.strip_prefix("otlp+").ok_or(TargetError)?;
        let base = url.trim_end_matches('/');
        let uri: Uri = format!("{base}/v1/logs").parse().map_err(|_| TargetError)?;
        let is_web = matches!(uri.scheme_str(), Some("http" | "https"));
        let is_plain = uri.query().is_none() && !base.contains(['@', '#']);
        Some(uri)
            .filter(|uri| is_web && is_plain && uri.host().is_some())
            .map(Self::Collector)
            .ok_or(TargetError)
    }
}

/// Why nothing can be sent there.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The folder cannot be made.
    #[error("make the folder for usage {path}")]
    Folder {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        err: std::io::Error,
    },
    /// The bucket cannot be used as it is configured.
    #[error("use the bucket for usage: look at AWS_REGION, AWS_ENDPOINT and the credentials")]
    Bucket(#[source] object_store::Error),
}

/// Why lines did not arrive.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    #[error(transparent)]
    Objects(#[from] object_store::Error),
    #[error("the collector cannot be reached: {0}")]
    Away(String),
    #[error("the collector answers {0}")]
    Status(http::StatusCode),
    #[error("no answer within {ANSWER:?}")]
    Late,
}

type Web = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// See the module.
pub(super) enum Destination {
    Objects {
        store: Box<dyn ObjectStore>,
        prefix: Path,
    },
    Collector {
        uri: Uri,
        web: Box<Web>,
    },
}

impl Destination {
    pub(super) fn open(target: &Target, tls: &ClientConfig) -> Result<Self, OpenError> {
        match target {
            Target::Folder(path) => {
                let folder = |err| OpenError::Folder {
                    path: path.clone(),
                    err,
                };
                std::fs::create_dir_all(path).map_err(folder)?;
                let store = LocalFileSystem::new_with_prefix(path).map_err(OpenError::Bucket)?;
                Ok(Self::Objects {
                    store: Box::new(store.with_fsync(true)),
                    prefix: Path::default(),
                })
            }
            Target::Bucket(url) => {
                let store = AmazonS3Builder::from_env()
                    .with_url(url)
                    .with_http_connector(Own(own_client::open(tls)))
                    .build()
                    .map_err(OpenError::Bucket)?;
                let place = url.strip_prefix("s3://").unwrap_or_default();
                let prefix = place.split_once('/').map_or("", |(_, prefix)| prefix);
                Ok(Self::Objects {
                    store: Box::new(store),
                    prefix: Path::from(prefix),
                })
            }
            Target::Collector(uri) => Ok(Self::Collector {
                uri: uri.clone(),
                web: Box::new(own_client::open(tls)),
            }),
        }
    }

    /// Sends `lines` as the object `name`; again under the same name does no harm.
    pub(super) async fn put(&self, name: &str, lines: Bytes, replica: &str) -> Result<(), Trouble> {
        match self {
            Self::Objects { store, prefix } => {
                let path = name.split('/').fold(prefix.clone(), Path::join);
                let put = store.put(&path, PutPayload::from_bytes(lines));
                let put = tokio::time::timeout(ANSWER, put).await;
                put.map_err(|_| Trouble::Late)??;
                Ok(())
            }
            Self::Collector { uri, web } => {
                for body in line::logs(&lines, replica, RECORDS) {
                    let sent = tokio::time::timeout(ANSWER, post(web, uri, body.to_string())).await;
                    sent.map_err(|_| Trouble::Late)??;
                }
                Ok(())
            }
        }
    }
}

async fn post(web: &Web, uri: &Uri, body: String) -> Result<(), Trouble> {
    let away = |err: &dyn std::error::Error| Trouble::Away(own_client::root(err));
    let request = Request::builder()
        .method(Method::POST)
        .uri(uri)
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|err| away(&err))?;
    let answer = web.request(request).await.map_err(|err| away(&err))?;
    let status = answer.status();
    let read = Limited::new(answer.into_body(), MAX_ANSWER_BYTES)
        .collect()
        .await;
    read.map_err(|err| away(&*err))?;
    if status.is_success() {
        Ok(())
    } else {
        Err(Trouble::Status(status))
    }
}

/// The gateway's own client for the library, so that it trusts whom the gateway trusts.
#[derive(Clone, Debug)]
struct Own(Web);

impl Connector for Own {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

#[async_trait]
impl HttpService for Own {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        let asked = async {
            let answer = self
                .0
                .request(Request::from_parts(parts, Full::new(body)))
                .await;
            let answer = answer.map_err(|err| HttpError::new(HttpErrorKind::Connect, err))?;
            let (parts, body) = answer.into_parts();
            let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await;
            let body = body.map_err(|err| HttpError::new_boxed(HttpErrorKind::Interrupted, err))?;
            let body = HttpResponseBody::from(body.to_bytes());
            Ok(HttpResponse::from_parts(parts, body))
        };
        let answered = tokio::time::timeout(ANSWER, asked).await;
        answered.unwrap_or_else(|late| Err(HttpError::new(HttpErrorKind::Timeout, late)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_named_by_urls() {
        let read = |text: &str| text.parse::<Target>();
        let folder = || Ok(Target::Folder("/var/usage".into()));
        assert_eq!(read("file:/var/usage"), folder());
        assert_eq!(read("file:///var/usage"), folder());
        let bucket = "s3://usage/penstock";
        assert_eq!(read(bucket), Ok(Target::Bucket(bucket.to_owned())));
        let uri = Uri::from_static("http://collector:4318/v1/logs");
        assert_eq!(
            read("otlp+http://collector:4318/"),
            Ok(Target::Collector(uri))
        );
        for wrong in [
            "",
            "file:",
            "s3://",
            "s3:///prefix",
            "s3://bucket?x=y",
            "http://collector:4318",
            "otlp+ftp://collector",
            "otlp+http://user@collector",
            "otlp+http://collector?x",
            "gs://bucket",
        ] {
            assert_eq!(read(wrong), Err(TargetError), "{wrong}");
        }
    }
}
