//! (IO) Keys in the store, on the admin port, for who shows the gateway's admin token:
//!
//! - `POST /keys` makes one, `{"name": …, "team": …}` with the fields of a VirtualKey; its text is told once;
//! - `GET /keys?after=NAME&limit=100` lists them, oldest first, `GET /keys/NAME` tells of one;
//! - `PATCH /keys/NAME` changes fields (RFC 7396), `POST /keys/NAME/rotate` makes the next text, `{"overlap": "24h"}`;
//! - `DELETE /keys/NAME` takes it back.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use futures::stream::{self, StreamExt as _};
use penstock_core::duration;
use penstock_core::ids::Id;
use penstock_core::key::{self, Hash, RANDOM_BYTES, hexadecimal};
use penstock_core::names;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::record::{MAX_OVERLAP, Record, Spec, Wrong, check_name};
use super::{
    KEPT, NAME, RECORD, StoredKeys, all_names, name_key, now_s, read, record_key, tag, tag_of_hash,
};
use crate::process::Process;
use crate::snapshot::Snapshot;
use crate::store::{Durability, Error, Expect, Store};

/// Keys that are told of at one time.
const MAX_LISTED: usize = 1_000;
/// Records that are read at one time for a list.
const READS: usize = 32;
const DAY: Duration = Duration::from_hours(24);

/// See the module.
pub(crate) fn routes(process: &Arc<Process>) -> Router {
    Router::new()
        .route("/keys", get(list).post(create))
        .route("/keys/{name}", get(show).patch(change).delete(revoke))
        .route("/keys/{name}/rotate", post(rotate))
        .with_state(Arc::clone(process))
}

/// Why something is not done.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("no config yet")]
    NoConfig,
    #[error(
        "keys are not managed here: put a token into the Secret {0} (key 'token', 20 bytes or more)"
    )]
    NotManaged(String),
    #[error("this gateway has no store to keep keys in")]
    NoStore,
    #[error(
        "this needs the gateway's admin token, and what was shown is not it (Authorization: Bearer …)"
    )]
    Token,
    #[error("{0}")]
    Wrong(#[from] Wrong),
    #[error("the body cannot be read: {0}")]
    Body(#[from] serde_json::Error),
    #[error("overlap: {0}")]
    Overlap(String),
    #[error("there is no key '{0}'")]
    Unknown(String),
    #[error("there is a key '{0}' already")]
    Exists(String),
    #[error("somebody else has changed the key '{0}' meanwhile: try again")]
    Changed(String),
    #[error("the store did not take it: {0}")]
    Store(#[from] Error),
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match self {
            Self::NoConfig | Self::Store(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::NotManaged(_) | Self::Unknown(_) => StatusCode::NOT_FOUND,
            Self::NoStore | Self::Exists(_) | Self::Changed(_) => StatusCode::CONFLICT,
            Self::Token => StatusCode::UNAUTHORIZED,
            Self::Wrong(_) | Self::Body(_) | Self::Overlap(_) => StatusCode::BAD_REQUEST,
        };
        (status, format!("{self}\n")).into_response()
    }
}

/// A key, as those are told who manage keys.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown<'a> {
    name: &'a str,
    #[serde(flatten)]
    spec: &'a Spec,
    revision: u32,
    created_at: String,
}

fn shown<'a>(name: &'a str, record: &'a Record) -> Shown<'a> {
    let created = i64::try_from(record.created_s).unwrap_or(i64::MAX);
    Shown {
        name,
        spec: &record.spec,
        revision: record.revision,
        created_at: jiff::Timestamp::from_second(created)
            .unwrap_or(jiff::Timestamp::MAX)
            .to_string(),
    }
}

fn json_of(status: StatusCode, body: &impl Serialize) -> Response {
    // What is told here always has a JSON form.
    let mut text = serde_json::to_string(body).unwrap_or_default();
    text.push('\n');
    (status, [(header::CONTENT_TYPE, "application/json")], text).into_response()
}

/// Who may manage keys is let in here.
struct Office<'a> {
    keys: &'a StoredKeys,
    store: &'a Store,
    snapshot: Arc<Snapshot>,
}

/// A key and the version that it was read with.
struct Found {
    record: Record,
    version: u64,
}

impl<'a> Office<'a> {
    fn enter(process: &'a Process, headers: &HeaderMap) -> Result<Self, Refusal> {
        let snapshot = process.snapshot.load_full().ok_or(Refusal::NoConfig)?;
        let shown = headers.get(header::AUTHORIZATION);
        let token = shown.and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
        let principals = snapshot.principals.as_ref();
        let is_admin = principals.and_then(|known| known.is_admin(token.unwrap_or_default()));
        match is_admin {
            Some(true) => {}
            Some(false) => return Err(Refusal::Token),
            None => {
                let secret = names::gateway_admin(&snapshot.config.gateway.name);
                return Err(Refusal::NotManaged(secret));
            }
        }
        let keys = &*process.stored_keys;
        let store = keys.store.as_deref().ok_or(Refusal::NoStore)?;
        Ok(Self {
            keys,
            store,
            snapshot,
        })
    }

    fn check(&self, spec: &Spec) -> Result<(), Refusal> {
        let namespace = &self.keys.namespace;
        spec.read(namespace)?;
        let rules = self.snapshot.config.rules.iter();
        let policies: BTreeSet<&Id> = rules.map(|rule| &rule.policy).collect();
        match spec.unknown_policy(namespace, &policies) {
            Some(wrong) => Err(wrong.into()),
            None => Ok(()),
        }
    }

    /// A new text, and its hash, by which the key of this name is found from now on.
    async fn mint(&self, name: &str) -> Result<(String, Hash), Refusal> {
        let principals = self.snapshot.principals.as_ref();
        let text = key::text(rand::random::<[u8; RANDOM_BYTES]>());
        let hash = principals.and_then(|known| known.hash(text.as_bytes()));
        let hash = hash.ok_or(Refusal::NoConfig)?;
        let (at, name) = (name_key(&hexadecimal(&hash)), name.as_bytes());
        let put = self
            .store
            .put(&at, Bytes::copy_from_slice(name), Expect::Any, KEPT);
        put.await?;
        Ok((text, hash))
    }

    async fn find(&self, name: &str) -> Result<Found, Refusal> {
        let found = self.store.get(&record_key(name)).await?;
        let found = found.and_then(|found| {
            let record: Option<Record> = read(&found.value);
            record.map(|record| Found {
                record,
                version: found.version,
            })
        });
        found.ok_or_else(|| Refusal::Unknown(name.to_owned()))
    }

    async fn put(&self, name: &str, record: &Record, version: u64) -> Result<bool, Refusal> {
        let value = Bytes::from(serde_json::to_vec(record)?);
        let (at, expect) = (record_key(name), Expect::Version(version));
        if self.store.put(&at, value, expect, KEPT).await?.is_some() {
            return Ok(true);
        }
        // What is asked again because the connection broke finds what it wrote itself.
        let found = self.store.get(&at).await?;
        let found: Option<Record> = found.and_then(|found| read(&found.value));
        Ok(found.as_ref() == Some(record))
    }

    /// Writes a key again that was found.
    async fn put_again(&self, name: &str, found: &Found) -> Result<(), Refusal> {
        if !self.put(name, &found.record, found.version).await? {
            return Err(Refusal::Changed(name.to_owned()));
        }
        Ok(self.keys.tell(self.store, name).await?)
    }

    /// Nobody is found by these hashes any more.
    async fn forget(&self, hashes: impl IntoIterator<Item = &String>) -> Result<(), Refusal> {
        for hash in hashes {
            self.store.remove(&tag_of_hash(hash), &[NAME]).await?;
        }
        Ok(())
    }

    /// A text is told when it is on the disk.
    async fn told(&self, status: StatusCode, name: &str, record: &Record, text: &str) -> Response {
        let durability = self.store.settle().await;
        let mut body = json!(shown(name, record));
        body["key"] = text.into();
        body["durable"] = matches!(durability, Ok(Durability::Durable)).into();
        json_of(status, &body)
    }
}

async fn create(
    State(process): State<Arc<Process>>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, Refusal> {
    let office = Office::enter(&process, &headers)?;
    let mut fields: Map<String, Value> = serde_json::from_slice(&body)?;
    let name = match fields.remove("name") {
        Some(Value::String(name)) => name,
        _ => String::new(),
    };
    check_name(&name)?;
    let spec: Spec = serde_json::from_value(Value::Object(fields))?;
    office.check(&spec)?;
    let (text, hash) = office.mint(&name).await?;
    let record = Record::new(spec, &hash, now_s());
    if !office.put(&name, &record, 0).await? {
        office.forget(record.hashes.keys()).await?;
        return Err(Refusal::Exists(name));
    }
    let at_ms = penstock_shell::clock::unix_ms();
    office
        .store
        .enlist(&all_names(), &name, at_ms, KEPT)
        .await?;
    Ok(office
        .told(StatusCode::CREATED, &name, &record, &text)
        .await)
}

/// Which keys to list.
#[derive(Deserialize)]
struct Page {
    after: Option<String>,
    #[serde(default = "usual_limit")]
    limit: usize,
}

fn usual_limit() -> usize {
    100
}

async fn list(
    State(process): State<Arc<Process>>,
    Query(page): Query<Page>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let office = Office::enter(&process, &headers)?;
    let limit = page.limit.clamp(1, MAX_LISTED);
    let (store, after) = (office.store, page.after.as_deref());
    let mut found = store.listed(&all_names(), after, false, limit + 1).await?;
    let has_more = found.len() > limit;
    found.truncate(limit);
    let reads = stream::iter(found).map(|name| async move {
        let record = super::record(store, &name).await?;
        Ok::<_, Error>(record.map(|record| (name, record)))
    });
    let records: Vec<_> = reads.buffered(READS).collect().await;
    let mut data = Vec::new();
    for found in records {
        // One that was taken back just now.
        let Some((name, record)) = found? else {
            continue;
        };
        data.push(json!(shown(&name, &record)));
    }
    let body = json!({ "data": data, "hasMore": has_more });
    Ok(json_of(StatusCode::OK, &body))
}

async fn show(
    State(process): State<Arc<Process>>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let office = Office::enter(&process, &headers)?;
    let found = office.find(&name).await?;
    Ok(json_of(StatusCode::OK, &shown(&name, &found.record)))
}

async fn change(
    State(process): State<Arc<Process>>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, Refusal> {
    let office = Office::enter(&process, &headers)?;
    let patch: Map<String, Value> = serde_json::from_slice(&body)?;
    let mut found = office.find(&name).await?;
    let mut spec = serde_json::to_value(&found.record.spec)?;
    merge(&mut spec, Value::Object(patch));
    found.record.spec = serde_json::from_value(spec)?;
    office.check(&found.record.spec)?;
    office.put_again(&name, &found).await?;
    office.store.settle().await?;
    Ok(json_of(StatusCode::OK, &shown(&name, &found.record)))
}

/// RFC 7396.
fn merge(to: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *to = patch;
        return;
    };
    if !to.is_object() {
        *to = json!({});
    }
    let Value::Object(to) = to else { return };
    for (name, value) in patch {
        if value.is_null() {
            to.remove(&name);
        } else {
            merge(to.entry(name).or_insert(Value::Null), value);
        }
    }
}

/// How the next text takes the place of the one before.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rotation {
    overlap: Option<String>,
}

async fn rotate(
    State(process): State<Arc<Process>>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, Refusal> {
    let office = Office::enter(&process, &headers)?;
    let rotation: Rotation = if body.is_empty() {
        Rotation::default()
    } else {
        serde_json::from_slice(&body)?
    };
    let overlap = match rotation.overlap.as_deref().map(duration::parse) {
        None => DAY,
        Some(Ok(overlap)) if overlap <= MAX_OVERLAP => overlap,
        Some(Ok(_)) => return Err(Refusal::Overlap("use 0s to 720h".to_owned())),
        Some(Err(err)) => return Err(Refusal::Overlap(err.to_string())),
    };
    let mut found = office.find(&name).await?;
    let (text, hash) = office.mint(&name).await?;
    let now_s = now_s();
    let until_s = now_s.saturating_add(overlap.as_secs());
    let gone = found.record.rotate(&hash, until_s, now_s);
    let put = office.put_again(&name, &found).await;
    if let Err(Refusal::Changed(_)) = put {
        office.forget([&hexadecimal(&hash)]).await?;
    }
    put?;
    office.forget(&gone).await?;
    Ok(office
        .told(StatusCode::OK, &name, &found.record, &text)
        .await)
}

async fn revoke(
    State(process): State<Arc<Process>>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let office = Office::enter(&process, &headers)?;
    let mut found = office.find(&name).await?;
    office.forget(found.record.hashes.keys()).await?;
    // All gateways are told while it is there still: who gets an error here can ask again.
    found.record.hashes.clear();
    office.put_again(&name, &found).await?;
    office.store.remove(&tag(&name), &[RECORD]).await?;
    office.store.unlist(&all_names(), &name).await?;
    office.store.settle().await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}
