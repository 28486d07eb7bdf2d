//! (IO) `/v1/files`: what was uploaded for batches, and what batches made.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::share;
use super::stored::{Owner, Record, load_for, page, record_bytes};
use super::{Reply, ReplyBody, limit, queried};
use crate::reject::Reject;
use crate::store::{Key, Store};
use crate::stream::BrokenOff;

/// What a file is stored in.
pub(super) const PIECE_BYTES: usize = 256 << 10;
/// How long a file is kept, if its maker does not say.
pub(super) const KEPT: Duration = Duration::from_hours(7 * 24);
/// The longest that its maker may say; OpenAI's limit.
pub(super) const MAX_KEPT: Duration = Duration::from_hours(30 * 24);
/// Where a file's bytes are.
pub(super) const CONTENT: &str = "content";
/// The owner's list of files.
pub(super) const LIST: &str = "files";
/// Pieces that are read at one time.
const READ_PIECES: u64 = 4;
const MAX_PAGE: usize = 1_000;
const PAGE: usize = 100;

/// What is known of a file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct File {
    pub(super) id: String,
    pub(super) owner: Owner,
    pub(super) bytes: u64,
    pub(super) created_at: u64,
    pub(super) expires_at: u64,
    pub(super) filename: String,
    pub(super) purpose: String,
    /// All numbers of its pieces are below.
    pub(super) pieces: u64,
}

impl Record for File {
    const PART: &'static str = "file";
    const WHAT: &'static str = "file";
    // The content and `expires_at` decide.
    const KEPT: Duration = MAX_KEPT;

    fn id(&self) -> &str {
        &self.id
    }

    fn owner(&self) -> &Owner {
        &self.owner
    }
}

impl File {
    /// As the API shows it.
    pub(super) fn shown(&self) -> Value {
        json!({
            "id": self.id, "object": "file", "bytes": self.bytes, "created_at": self.created_at,
            "expires_at": self.expires_at, "filename": self.filename, "purpose": self.purpose, "status": "processed",
        })
    }

    pub(super) fn content(&self) -> Key {
        Key::new(&self.id, CONTENT)
    }

    /// What it holds of its owner's share.
    pub(super) fn share(&self) -> share::Bytes {
        share::Bytes::until(&self.owner, self.expires_at)
    }

    /// How much that is: its content and its record.
    pub(super) fn held(&self) -> u64 {
        self.bytes + record_bytes(self)
    }

    fn is_over(&self) -> bool {
        self.expires_at <= super::stored::now_s()
    }
}

/// A file that `owner` may see and that has not expired.
pub(super) async fn find(store: &Store, owner: &Owner, id: &str) -> Result<File, Reject> {
    let (_, file) = load_for::<File>(store, owner, id).await?;
    if file.is_over() {
        return Err(super::stored::not_found::<File>(id));
    }
    Ok(file)
}

pub(super) async fn get(store: &Store, owner: &Owner, id: &str) -> Result<Reply, Reject> {
    let file = find(store, owner, id).await?;
    Ok(Reply::json(200, &file.shown()))
}

pub(super) async fn list(store: &Store, owner: &Owner, query: &str) -> Result<Reply, Reject> {
    let newest_first = queried(query, "order") != Some("asc");
    let purpose = queried(query, "purpose");
    let shown = |file: &File| {
        let is_asked = purpose.is_none_or(|purpose| purpose == file.purpose);
        (is_asked && !file.is_over()).then(|| file.shown())
    };
    let most = limit(query, PAGE, MAX_PAGE)?;
    let after = queried(query, "after");
    let page = page(store, &owner.list(LIST), after, newest_first, most, shown).await?;
    Ok(Reply::json(200, &page))
}

pub(super) async fn delete(store: &Store, owner: &Owner, id: &str) -> Result<Reply, Reject> {
    let file = find(store, owner, id).await?;
    store.unlist(&file.owner.list(LIST), id).await?;
    store.remove(id, &[File::PART, CONTENT]).await?;
    file.share().give_back(store, file.held()).await?;
    Ok(Reply::json(
        200,
        &json!({"id": id, "object": "file", "deleted": true}),
    ))
}

pub(super) async fn content(store: &Arc<Store>, owner: &Owner, id: &str) -> Result<Reply, Reject> {
    let file = find(store, owner, id).await?;
    Ok(Reply {
        status: 200,
        content_type: "application/octet-stream",
        body: ReplyBody::Stream(read(Arc::clone(store), file)),
    })
}

/// A file's pieces, one read after the other.
fn read(store: Arc<Store>, file: File) -> BoxStream<'static, Result<Bytes, BrokenOff>> {
    struct Reading {
        store: Arc<Store>,
        file: File,
        next: u64,
        left: u64,
    }
    let start = Reading {
        next: 0,
        left: file.bytes,
        store,
        file,
    };
    let pages = stream::try_unfold(start, async |mut reading| {
        let log = reading.file.content();
        while reading.next < reading.file.pieces {
            let pieces = reading.store.pieces(&log, reading.next, READ_PIECES).await;
            let pieces = pieces.map_err(|_| BrokenOff)?;
            reading.next += READ_PIECES;
            let pieces: Vec<Result<Bytes, BrokenOff>> =
                pieces.into_iter().map(|(_, piece)| Ok(piece)).collect();
            let bytes: usize = pieces.iter().flatten().map(Bytes::len).sum();
            reading.left = reading
                .left
                .saturating_sub(u64::try_from(bytes).unwrap_or(0));
            if !pieces.is_empty() {
                return Ok(Some((stream::iter(pieces), reading)));
            }
        }
        // It expired meanwhile.
        if reading.left > 0 {
            Err(BrokenOff)
        } else {
            Ok(None)
        }
    });
    futures::TryStreamExt::try_flatten(pages).boxed()
}
