//! (IO) Reads the keys of providers again and again, each replica for itself: what is at the provider's own URL, or
//! where its discovery document says (OpenID Connect Discovery 1.0, 4). Bounded in time, size and reads at one time;
//! what cannot be read leaves the last good keys in force for a day.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream;
use http::{StatusCode, Uri};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use serde::Deserialize;

use super::keys::KeySet;
use super::sets::{Sets, Source};
use crate::own_client;
use crate::process::Process;

/// Between two looks at whose turn it is.
const TICK: Duration = Duration::from_secs(1);
/// From the name's look-up to the last byte, each of two documents.
const LIMIT: Duration = Duration::from_secs(5);
/// The largest sets of today have some 20 KiB.
const MAX_BYTES: usize = 256 << 10;
/// Providers that are read at one time.
const AT_ONCE: usize = 4;

type Reader = Client<HttpsConnector<HttpConnector>, Empty<Bytes>>;

/// Why keys could not be read.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("'{0}' is no URL")]
    Url(String),
    #[error("{0} sends keys in the clear")]
    InTheClear(String),
    #[error("no answer within {LIMIT:?}")]
    Late,
    #[error("{0}")]
    Connection(String),
    #[error("status {0}")]
    Status(StatusCode),
    #[error("the answer is larger than {MAX_BYTES} bytes, or broke off")]
    Body,
    #[error("its discovery document cannot be read")]
    Discovery,
    #[error("its discovery document is of issuer '{0}'")]
    Issuer(String),
    #[error("the answer holds no key that can be used")]
    Keys,
}

#[derive(Deserialize)]
struct Discovery {
    issuer: String,
    jwks_uri: String,
}

/// Runs until it is dropped.
pub(crate) async fn run(process: Arc<Process>) {
    let sets = &process.key_sets;
    let reader: Reader = own_client::open(process.tls());
    loop {
        let now_s = penstock_shell::clock::since_epoch().as_secs();
        let due = {
            let snapshot = process.snapshot.load();
            let principals = snapshot.as_ref().and_then(|of| of.principals.as_ref());
            let sources = principals
                .into_iter()
                .flat_map(|of| of.identities.sources());
            sets.due(sources, now_s)
        };
        let reads = stream::iter(due).map(|source| read_one(sets, &reader, source));
        reads
            .buffer_unordered(AT_ONCE)
            .for_each(async |()| ())
            .await;
        // Whoever asks is heard at once, and the rest in turns.
        let _asked = tokio::time::timeout(TICK, sets.wake.notified()).await;
    }
}

async fn read_one(sets: &Sets, reader: &Reader, source: Source) {
    let found = read(reader, &source).await;
    if let Err(trouble) = &found {
        tracing::warn!(
            issuer = source.issuer,
            error = %trouble,
            "keys of an identity provider cannot be read; the last ones stay for a day"
        );
    }
    let now_s = penstock_shell::clock::since_epoch().as_secs();
    sets.tried(&source, found.ok(), now_s);
}

async fn read(reader: &Reader, source: &Source) -> Result<KeySet, Trouble> {
    let url = match &source.url {
        Some(url) => url.clone(),
        None => discover(reader, &source.issuer).await?,
    };
    let body = get(reader, &url).await?;
    KeySet::read(&body).ok_or(Trouble::Keys)
}

/// Where an issuer says that its keys are.
async fn discover(reader: &Reader, issuer: &str) -> Result<String, Trouble> {
    let base = issuer.trim_end_matches('/');
    let body = get(reader, &format!("{base}/.well-known/openid-configuration")).await?;
    let found: Discovery = serde_json::from_slice(&body).map_err(|_| Trouble::Discovery)?;
    if found.issuer != issuer {
        return Err(Trouble::Issuer(found.issuer));
    }
    // What is said over TLS is not to be looked for in the clear.
    if issuer.starts_with("https://") && !found.jwks_uri.starts_with("https://") {
        return Err(Trouble::InTheClear(found.jwks_uri));
    }
    Ok(found.jwks_uri)
}

async fn get(reader: &Reader, url: &str) -> Result<Bytes, Trouble> {
    let uri: Uri = url.parse().map_err(|_| Trouble::Url(url.to_owned()))?;
    let asked = async {
        let answer = reader.get(uri).await;
        let answer = answer.map_err(|err| Trouble::Connection(own_client::root(&err)))?;
        if answer.status() != StatusCode::OK {
            return Err(Trouble::Status(answer.status()));
        }
        let body = Limited::new(answer.into_body(), MAX_BYTES).collect().await;
        Ok(body.map_err(|_| Trouble::Body)?.to_bytes())
    };
    match tokio::time::timeout(LIMIT, asked).await {
        Ok(got) => got,
        Err(_) => Err(Trouble::Late),
    }
}
