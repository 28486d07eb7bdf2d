//! (IO) The events of a background response, from the store: those that are there, then those that come, whichever
//! replica writes them.

use std::cmp::Ordering;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use serde_json::json;

use super::responses::Response;
use super::shape;
use super::stored::load;
use crate::store::{Error, Store};
use crate::stream::BrokenOff;

/// Time between two looks for more.
const EVERY: Duration = Duration::from_millis(100);
/// Looks without an event after which a comment keeps the connection open: 15 s.
const QUIET_LOOKS: u32 = 150;
/// Without an empty line: behind an id, the official Python SDKs read one as an event without data and break at it.
pub(crate) const WAITING: &[u8] = b": waiting\n";
const PIECES: u64 = 64;
/// Events of one attempt: eight times the longest answers of today's models.
pub(super) const MAX_EVENTS: u64 = 1_000_000;
/// Looks at a store that fails, before the stream breaks off.
const MAX_FAILURES: u32 = 50;

/// Which numbers come next for a reader that was told everything below `next`, and how many of them; `None` if what it
/// was told is not part of this attempt. Numbers below `opened` are told before the first attempt.
fn ahead(next: u64, opened: u64, attempt: u32) -> Option<(u64, u64)> {
    let first = first_number(opened, attempt);
    match next.cmp(&opened) {
        Ordering::Less => Some((next, opened - next)),
        Ordering::Equal => Some((first, PIECES)),
        Ordering::Greater => {
            let is_of_attempt = (first..first + MAX_EVENTS).contains(&(next - 1));
            is_of_attempt.then_some((next, PIECES))
        }
    }
}

/// The number of an attempt's first event: a reader of an earlier one is not told half of each.
pub(super) fn first_number(opened: u64, attempt: u32) -> u64 {
    u64::from(attempt.saturating_sub(1)) * MAX_EVENTS + opened
}

struct Following {
    store: Arc<Store>,
    response: Response,
    next: u64,
    quiet: u32,
    failures: u32,
    ended: bool,
}

/// The events from number `from`, and on to the end.
pub(super) fn events(
    store: Arc<Store>,
    response: Response,
    from: u64,
) -> BoxStream<'static, Result<Bytes, BrokenOff>> {
    let start = Following {
        store,
        response,
        next: from,
        quiet: 0,
        failures: 0,
        ended: false,
    };
    stream::try_unfold(start, async |mut following| {
        loop {
            if following.ended {
                return Ok(None);
            }
            match following.look().await {
                Ok(Some(bytes)) => return Ok(Some((bytes, following))),
                Ok(None) => {}
                Err(_) if following.failures < MAX_FAILURES => following.failures += 1,
                Err(_) => return Err(BrokenOff),
            }
            tokio::time::sleep(EVERY).await;
        }
    })
    .boxed()
}

impl Following {
    /// What there is now.
    async fn look(&mut self) -> Result<Option<Bytes>, Error> {
        // In this order: what was written before the record said that it is over is seen.
        let record = load::<Response>(&self.store, &self.response.id).await?;
        let Some((_, record)) = record else {
            self.ended = true;
            return Ok(Some(self.last("The response was deleted.", None)));
        };
        let Some((from, most)) = ahead(self.next, record.opened, record.attempt) else {
            self.ended = true;
            let message = "The response was begun anew: read it from its beginning.";
            return Ok(Some(self.last(message, None)));
        };
        let log = self.response.events();
        let pieces = self.store.pieces(&log, from, most).await?;
        self.failures = 0;
        if let Some((last, _)) = pieces.last() {
            self.next = last + 1;
            self.quiet = 0;
            let all: Vec<&[u8]> = pieces.iter().map(|(_, piece)| &piece[..]).collect();
            return Ok(Some(Bytes::from(all.concat())));
        }
        if record.status.is_over() {
            self.ended = true;
            let was_told = matches!(
                record.status,
                shape::Status::Completed | shape::Status::Incomplete
            );
            if was_told {
                return Ok(None);
            }
            let response = record.pending(&self.store).await.unwrap_or_default();
            return Ok(Some(self.last("The response failed.", Some(response))));
        }
        self.quiet += 1;
        if self.quiet.is_multiple_of(QUIET_LOOKS) {
            return Ok(Some(Bytes::from_static(WAITING)));
        }
        Ok(None)
    }

    /// The event that ends a stream without an answer.
    fn last(&self, message: &str, response: Option<serde_json::Value>) -> Bytes {
        let number = self.next;
        if let Some(response) = response {
            let kind = "response.failed";
            let event = json!({"type": kind, "sequence_number": number, "response": response});
            return shape::written(kind, &event);
        }
        let code = "stream_ended";
        let error =
            json!({"message": message, "type": "server_error", "param": null, "code": code});
        let event = json!({
            "type": "error", "sequence_number": number, "code": code, "message": message, "param": null, "error": error,
        });
        shape::written("error", &event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_gets_one_attempt_whole() {
        assert_eq!(ahead(0, 2, 0), Some((0, 2)));
        assert_eq!(ahead(2, 2, 0), Some((2, PIECES)), "none has begun");
        assert_eq!(ahead(2, 2, 1), Some((2, PIECES)));
        assert_eq!(ahead(7, 2, 1), Some((7, PIECES)));
        assert_eq!(ahead(2, 2, 3), Some((2 * MAX_EVENTS + 2, PIECES)));
        assert_eq!(
            ahead(2 * MAX_EVENTS + 9, 2, 3),
            Some((2 * MAX_EVENTS + 9, PIECES))
        );
        assert_eq!(ahead(7, 2, 2), None, "begun anew");
    }
}
