//! (IO) Questions to a gateway's admin port.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

/// A gateway answers from memory or its store: one that takes longer is not there.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The address of `path` at `admin`.
pub(crate) fn address(admin: &str, path: &str) -> anyhow::Result<Uri> {
    let admin = admin.trim_end_matches('/');
    let uri: Uri = format!("{admin}{path}")
        .parse()
        .with_context(|| format!("--admin '{admin}' is not a URL"))?;
    ensure!(
        uri.scheme_str() == Some("http"),
        "--admin '{admin}' needs http:// and a host"
    );
    Ok(uri)
}

/// Status and body of the answer, which has `most` bytes at most.
pub(crate) async fn ask(
    admin: &str,
    request: Request<Full<Bytes>>,
    most: usize,
) -> anyhow::Result<(StatusCode, Bytes)> {
    tokio::time::timeout(TIMEOUT, answer(request, most))
        .await
        .with_context(|| format!("{admin} did not answer within {} s", TIMEOUT.as_secs()))?
        .with_context(|| {
            format!("ask {admin}: is it the admin address of a running gateway? (--admin)")
        })
}

async fn answer(request: Request<Full<Bytes>>, most: usize) -> anyhow::Result<(StatusCode, Bytes)> {
    let client: Client<HttpConnector, Full<Bytes>> =
        Client::builder(TokioExecutor::new()).build_http();
    let answer = client.request(request).await?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), most);
    match body.collect().await {
        Ok(whole) => Ok((status, whole.to_bytes())),
        Err(err) => bail!("{err}"),
    }
}
