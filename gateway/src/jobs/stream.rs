//! (IO) The events of a background response, from the store: those that are there, then those that come, whichever
//! replica writes them.

use std::cmp::Ordering;
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::BoxStream;
use serde_json::json;

use super::responses::Response;
use super::shape;
use super::stored::load;
use crate::following::{Follow, Found, PIECES, follow};
use crate::store::{Error, Store};
use crate::stream::BrokenOff;

/// Events of one attempt: eight times the longest answers of today's models.
pub(super) const MAX_EVENTS: u64 = 1_000_000;
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
}

/// The events from number `from`, and on to the end.
pub(super) fn events(
    store: Arc<Store>,
    response: Response,
    from: u64,
) -> BoxStream<'static, Result<Bytes, BrokenOff>> {
    follow(Following {
        store,
        response,
        next: from,
    })
}

impl Follow for Following {
    async fn look(&mut self, _quiet: u32) -> Result<Found, Error> {
        // In this order: what was written before the record said that it is over is seen.
        let record = load::<Response>(&self.store, &self.response.id).await?;
        let Some((_, record)) = record else {
            return Ok(self.last("The response was deleted.", None));
        };
        let Some((from, most)) = ahead(self.next, record.opened, record.attempt) else {
            let message = "The response was begun anew: read it from its beginning.";
            return Ok(self.last(message, None));
        };
        let log = self.response.events();
        let pieces = self.store.pieces(&log, from, most).await?;
        if let Some((last, _)) = pieces.last() {
            self.next = last + 1;
            let all: Vec<&[u8]> = pieces.iter().map(|(_, piece)| &piece[..]).collect();
            return Ok(Found::More(Bytes::from(all.concat())));
        }
        if record.status.is_over() {
            let was_told = matches!(
                record.status,
                shape::Status::Completed | shape::Status::Incomplete
            );
            if was_told {
                return Ok(Found::End);
            }
            let response = record.pending(&self.store).await.unwrap_or_default();
            return Ok(self.last("The response failed.", Some(response)));
        }
        Ok(Found::Nothing)
    }
}

impl Following {
    /// The event that ends a stream without an answer.
    fn last(&self, message: &str, response: Option<serde_json::Value>) -> Found {
        let number = self.next;
        if let Some(response) = response {
            let kind = "response.failed";
            let event = json!({"type": kind, "sequence_number": number, "response": response});
            return Found::Last(shape::written(kind, &event));
        }
        let code = "stream_ended";
        let error =
            json!({"message": message, "type": "server_error", "param": null, "code": code});
        let event = json!({
            "type": "error", "sequence_number": number, "code": code, "message": message, "param": null, "error": error,
        });
        Found::Last(shape::written("error", &event))
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
