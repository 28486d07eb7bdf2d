//! (IO) `POST /v1/files`: a form of any size up to the limit, stored piece by piece as it comes.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::stream;
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use multer::{Constraints, Field, Multipart, SizeLimit};

use super::files::{CONTENT, File, KEPT, LIST, MAX_KEPT, PIECE_BYTES};
use super::share;
use super::stored::{Owner, new_id, now_s, save};
use super::{Reply, invalid};
use crate::body::Source;
use crate::guard::Watch;
use crate::process::Process;
use crate::reject::Reject;
use crate::store::{Expect, Key, Store};

/// A form's parts besides the file, and the lines between the parts.
const FORM_BYTES: u64 = 64 << 10;
const MAX_TEXT_BYTES: u64 = 1 << 10;
const MAX_NAME_BYTES: usize = 256;
/// The shortest time to live that OpenAI takes.
const MIN_KEPT_S: u64 = 3_600;

/// Takes a file.
pub(super) async fn upload(
    process: &Arc<Process>,
    watch: &Watch,
    owner: &Owner,
    headers: &HeaderMap,
    body: Source,
) -> Result<Reply, Reject> {
    let store = process.jobs.store()?;
    let boundary = headers
        .get(CONTENT_TYPE)
        .and_then(|value| multer::parse_boundary(value.to_str().ok()?).ok())
        .ok_or_else(|| invalid("file", "sent as multipart/form-data"))?;
    let _room = process
        .lease_body(2 * PIECE_BYTES)
        .ok_or(Reject::Overloaded)?;
    let limits = &process.settings.limits;
    let most = u64::try_from(limits.file_bytes).unwrap_or(u64::MAX);
    let bounds = SizeLimit::new()
        .whole_stream(most.saturating_add(FORM_BYTES))
        .per_field(MAX_TEXT_BYTES)
        .for_field("file", most);
    let frames = stream::try_unfold((body, limits.body_timeout), next_frame);
    let form = Multipart::with_constraints(frames, boundary, Constraints::new().size_limit(bounds));
    watch.reads_body();
    let mut taker = Taker::new(Arc::clone(process), Arc::clone(store), owner);
    let taken = taker.take(form, limits.file_bytes).await;
    watch.busy();
    let stored = match taken {
        Ok(()) => taker.finish(owner).await,
        Err(reject) => Err(reject),
    };
    if stored.is_err() {
        // The pieces, and what they count, have an end of life all the same.
        let _ = store.remove(&taker.id, &[CONTENT]).await;
        let _ = taker.share.give_back(store, taker.written).await;
    }
    stored.map(|file| Reply::json(200, &file.shown()))
}

/// Why the body ended early.
#[derive(Debug, thiserror::Error)]
#[error("the body broke off")]
struct BodyFailed(Reject);

/// A frame of the body, if one comes in time.
async fn next_frame(
    (mut body, limit): (Source, Duration),
) -> Result<Option<(Bytes, (Source, Duration))>, BodyFailed> {
    let frame = tokio::time::timeout(limit, body.next()).await;
    let frame = frame
        .unwrap_or(Err(Reject::BodyTimeout))
        .map_err(BodyFailed)?;
    Ok(frame.map(|bytes| (bytes, (body, limit))))
}

/// Takes a form apart.
struct Taker {
    process: Arc<Process>,
    store: Arc<Store>,
    id: String,
    filename: Option<String>,
    purpose: Option<String>,
    kept_s: Option<u64>,
    rest: BytesMut,
    pieces: u64,
    bytes: u64,
    /// What the pieces count, until it is known how long they are kept.
    share: share::Bytes,
    /// Bytes that count so.
    written: u64,
}

impl Taker {
    fn new(process: Arc<Process>, store: Arc<Store>, owner: &Owner) -> Self {
        Self {
            process,
            store,
            share: share::Bytes::until(owner, now_s() + MAX_KEPT.as_secs()),
            written: 0,
            id: new_id("file-"),
            filename: None,
            purpose: None,
            kept_s: None,
            rest: BytesMut::new(),
            pieces: 0,
            bytes: 0,
        }
    }

    async fn take(&mut self, mut form: Multipart<'_>, most: usize) -> Result<(), Reject> {
        let told = |err: multer::Error| told(err, most);
        while let Some(field) = form.next_field().await.map_err(told)? {
            match field.name().unwrap_or_default() {
                "file" if self.filename.is_none() => {
                    let name = field.file_name().unwrap_or("upload").to_owned();
                    self.filename = Some(name.chars().take(MAX_NAME_BYTES).collect());
                    self.take_file(field, most).await?;
                }
                "purpose" => self.purpose = Some(field.text().await.map_err(told)?),
                "expires_after[seconds]" => {
                    let text = field.text().await.map_err(told)?;
                    let seconds = text.parse().ok();
                    let bounds = MIN_KEPT_S..=MAX_KEPT.as_secs();
                    let seconds = seconds.filter(|seconds| bounds.contains(seconds));
                    let expected = "a number of seconds from 3600 to 2592000";
                    self.kept_s =
                        Some(seconds.ok_or_else(|| invalid("expires_after[seconds]", expected))?);
                }
                "expires_after[anchor]" => {
                    if field.text().await.map_err(told)? != "created_at" {
                        return Err(invalid("expires_after[anchor]", "'created_at'"));
                    }
                }
                _ => return Err(invalid("form", "a file, its purpose and expires_after")),
            }
        }
        Ok(())
    }

    async fn take_file(&mut self, mut field: Field<'_>, most: usize) -> Result<(), Reject> {
        while let Some(bytes) = field.chunk().await.map_err(|err| told(err, most))? {
            self.bytes += u64::try_from(bytes.len()).unwrap_or(0);
            self.rest.extend_from_slice(&bytes);
            while self.rest.len() > PIECE_BYTES {
                let piece = self.rest.split_to(PIECE_BYTES).freeze();
                self.write(piece, MAX_KEPT).await?;
            }
        }
        Ok(())
    }

    async fn write(&mut self, piece: Bytes, kept: Duration) -> Result<(), Reject> {
        let bytes = share::count(piece.len());
        self.share.claim(&self.process, &self.store, bytes).await?;
        self.written += bytes;
        let log = Key::new(&self.id, CONTENT);
        self.store
            .write(&log, vec![(self.pieces, piece)], kept)
            .await?;
        self.pieces += 1;
        Ok(())
    }

    /// The last piece, which also says how long all are kept, and then the record.
    async fn finish(&mut self, owner: &Owner) -> Result<File, Reject> {
        let filename = self.filename.take();
        let filename = filename.ok_or_else(|| invalid("file", "part of the form"))?;
        let purpose = self.purpose.take().filter(|purpose| purpose == "batch");
        let purpose = purpose.ok_or_else(|| invalid("purpose", "'batch'"))?;
        let kept = self.kept_s.map_or(KEPT, Duration::from_secs);
        let rest = std::mem::take(&mut self.rest).freeze();
        if !rest.is_empty() {
            self.write(rest, kept).await?;
        }
        let created_at = now_s();
        let file = File {
            id: self.id.clone(),
            owner: owner.clone(),
            bytes: self.bytes,
            created_at,
            expires_at: created_at + kept.as_secs(),
            filename,
            purpose,
            pieces: self.pieces,
        };
        save(&self.store, &file, Expect::Any).await?;
        file.share().add(&self.store, file.held()).await?;
        self.share.give_back(&self.store, self.written).await?;
        self.written = 0;
        let list = owner.list(LIST);
        self.store
            .enlist(&list, &file.id, created_at * 1_000, MAX_KEPT)
            .await?;
        self.store.settle().await?;
        Ok(file)
    }
}

fn told(err: multer::Error, max_bytes: usize) -> Reject {
    match err {
        multer::Error::FieldSizeExceeded { .. } | multer::Error::StreamSizeExceeded { .. } => {
            Reject::BodyTooLarge { max_bytes }
        }
        // It is the frames' own.
        multer::Error::StreamReadFailed(err) => err
            .downcast::<BodyFailed>()
            .map_or(Reject::BodyBroken, |failed| failed.0),
        _ => Reject::BodyBroken,
    }
}
