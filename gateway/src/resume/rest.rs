//! (IO) The rest of a stream, from the store: the events that are there, then those that come, whichever replica writes
//! them.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures::stream::BoxStream;

use super::id::EventId;
use super::log::{self, Head, MARK, renewed_every};
use super::sequence;
use crate::following::{EVERY, Follow, Found, PIECES, follow};
use crate::jobs::Owner;
use crate::openai::{Api, Wire};
use crate::reject::{Broken, Reject};
use crate::store::{Error, Expect, Piece, Store};
use crate::stream::BrokenOff;

/// A caller may be back before the first events are written.
const FIRST_LOOKS: u32 = 5;
/// Looks without an event after which it is seen whether somebody still writes: 1 s.
const DOUBTFUL_LOOKS: u32 = 10;

/// Finds a stream for a caller who saw the event `last`.
pub(super) async fn find(
    store: &Store,
    asker: &Owner,
    api: Api,
    last: &EventId,
) -> Result<Head, Reject> {
    let head = soon(|| head(store, &last.stream)).await?;
    let Some(head) = head.filter(|head| head.is_for(asker, api)) else {
        return Err(Reject::StreamNotFound);
    };
    if head.last.is_some_and(|end| last.number > end) {
        return Err(Reject::InvalidField {
            param: super::LAST_EVENT_ID.to_string(),
            expected: "the id of an event that was sent: this stream ended before",
        });
    }
    Ok(head)
}

/// The id of the stream that is the response of this id.
pub(super) async fn find_response(store: &Store, id: &str) -> Result<Option<String>, Error> {
    let key = log::response(id);
    let found = soon(|| store.get(&key)).await?;
    Ok(found.map(|found| String::from_utf8_lossy(&found.value).into_owned()))
}

/// Looks a few times.
async fn soon<T, F>(look: impl Fn() -> F) -> Result<Option<T>, Error>
where
    F: Future<Output = Result<Option<T>, Error>>,
{
    for _ in 1..FIRST_LOOKS {
        if let Some(found) = look().await? {
            return Ok(Some(found));
        }
        tokio::time::sleep(EVERY).await;
    }
    look().await
}

async fn head(store: &Store, stream: &str) -> Result<Option<Head>, Error> {
    let found = store.pieces(&log::events(stream), 0, 1).await?;
    Ok(found.first().and_then(|(_, piece)| Head::read(piece)))
}

struct Following {
    store: Arc<Store>,
    /// The stream's id.
    id: String,
    wire: Wire,
    next: u64,
    /// Events of the Responses API up to this number of their own were seen.
    seen: Option<u64>,
    /// When the reader's mark is renewed.
    mark_at: Instant,
}

/// The events after `last`, and after the one with the number `seen` of the Responses API, and on to the end.
pub(super) fn events(
    store: Arc<Store>,
    wire: Wire,
    last: EventId,
    seen: Option<u64>,
) -> BoxStream<'static, Result<Bytes, BrokenOff>> {
    follow(Following {
        store,
        id: last.stream,
        wire,
        next: last.number.saturating_add(1),
        seen,
        mark_at: penstock_shell::clock::now(),
    })
}

impl Follow for Following {
    async fn look(&mut self, quiet: u32) -> Result<Found, Error> {
        // In this order: what was written before the mark ended, or the head said that it is over, is seen.
        let is_doubtful = quiet > 0 && quiet.is_multiple_of(DOUBTFUL_LOOKS);
        let is_written = !is_doubtful || self.store.get(&log::writer(&self.id)).await?.is_some();
        let Some(head) = head(&self.store, &self.id).await? else {
            return Ok(self.cut());
        };
        self.mark(&head).await;
        let key = log::events(&self.id);
        loop {
            let pieces = self.store.pieces(&key, self.next, PIECES).await?;
            let Some((last, _)) = pieces.last() else {
                break;
            };
            self.next = last + 1;
            let unseen = self.unseen(&pieces);
            if !unseen.is_empty() {
                return Ok(Found::More(Bytes::from(unseen.concat())));
            }
        }
        Ok(match head.last {
            Some(last) if self.next > last => Found::End,
            Some(_) => self.cut(),
            None if !is_written => self.cut(),
            None => Found::Nothing,
        })
    }
}

impl Following {
    /// Those of `pieces` that the caller has not seen.
    fn unseen<'a>(&mut self, pieces: &'a [Piece]) -> Vec<&'a [u8]> {
        let mut pieces = pieces.iter().map(|(_, piece)| &piece[..]).peekable();
        while let Some(seen) = self.seen
            && let Some(piece) = pieces.peek()
        {
            // Those that have no number belong to the one before.
            match sequence::number(piece) {
                Some(number) if number > seen => {
                    self.seen = None;
                    break;
                }
                Some(number) if number == seen => self.seen = None,
                _ => {}
            }
            pieces.next();
        }
        pieces.collect()
    }

    /// Says that the stream is read, so that it goes on, and keeps one that has ended. A mark that is lost is made up
    /// for by the next one.
    async fn mark(&mut self, head: &Head) {
        let now = penstock_shell::clock::now();
        if now < self.mark_at {
            return;
        }
        self.mark_at = now + renewed_every(head.resumable());
        if head.last.is_none() {
            let mark = log::reader(&self.id);
            let kept = head.resumable();
            let _ = self.store.put(&mark, MARK, Expect::Any, kept).await;
        } else {
            // Nobody else writes any more.
            let log = log::events(&self.id);
            let _ = self
                .store
                .write(&log, vec![head.piece()], head.kept())
                .await;
        }
    }

    /// The event that ends a stream whose rest is gone.
    fn cut(&self) -> Found {
        Found::Last(Bytes::from(Broken::Cut.event(self.wire, false)))
    }
}
