//! What the store has of a stream: a log of its events by number, with its head as piece 0, and two marks that end by
//! themselves: one is there while somebody writes, the other one while somebody reads. Pure.

use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::jobs::Owner;
use crate::openai::Api;
use crate::store::{Key, Piece};

/// A writer that did not renew its mark for this long is gone.
pub(super) const WRITER_KEPT: Duration = Duration::from_secs(15);
/// The number of the head.
const HEAD: u64 = 0;
const EVENTS: &str = "events";
/// The part that ends with its writer.
pub(super) const WRITER: &str = "writer";
/// Of a response, not of a stream.
const RESPONSE: &str = "stream";
const READER: &str = "reader";
/// Everything of a stream.
pub(super) const PARTS: [&str; 3] = [EVENTS, WRITER, READER];
/// What marks hold.
pub(super) const MARK: Bytes = Bytes::from_static(b"1");

/// The log of a stream.
pub(super) fn events(stream: &str) -> Key {
    Key::new(stream, EVENTS)
}

/// Says that the stream is written.
pub(super) fn writer(stream: &str) -> Key {
    Key::new(stream, WRITER)
}

/// Says that somebody came back and reads.
pub(super) fn reader(stream: &str) -> Key {
    Key::new(stream, READER)
}

/// Leads from a response's id to the stream's.
pub(super) fn response(id: &str) -> Key {
    Key::new(id, RESPONSE)
}

/// What is known of a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Head {
    /// Whose it is.
    pub(super) owner: Owner,
    /// The path of its call, below `/v1`.
    path: String,
    /// How long it goes on, and is kept, without a reader.
    resumable_ms: u64,
    /// The number of its last event, once it has ended.
    pub(super) last: Option<u64>,
}

impl Head {
    /// Of a stream that begins.
    pub(super) fn new(owner: Owner, api: Api, resumable: Duration) -> Self {
        Self {
            owner,
            path: api.path().to_owned(),
            resumable_ms: u64::try_from(resumable.as_millis()).unwrap_or(u64::MAX),
            last: None,
        }
    }

    pub(super) fn resumable(&self) -> Duration {
        Duration::from_millis(self.resumable_ms)
    }

    /// Whether `asker` may read it as an answer of `api`.
    pub(super) fn is_for(&self, asker: &Owner, api: Api) -> bool {
        asker.may_see(&self.owner) && self.path == api.path()
    }

    /// How long the log is kept from now on.
    pub(super) fn kept(&self) -> Duration {
        match self.last {
            Some(_) => self.resumable(),
            None => self.resumable() + WRITER_KEPT,
        }
    }

    /// Its place in the log.
    pub(super) fn piece(&self) -> Piece {
        let bytes = serde_json::to_vec(self).unwrap_or_default();
        (HEAD, Bytes::from(bytes))
    }

    /// Reads [`Head::piece`].
    pub(super) fn read(piece: &[u8]) -> Option<Self> {
        serde_json::from_slice(piece).ok()
    }
}

/// How often a mark is renewed that is to last for `kept`.
pub(super) fn renewed_every(kept: Duration) -> Duration {
    (kept / 4).min(Duration::from_secs(1))
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;

    use super::*;
    use crate::principal::Who;

    #[test]
    fn a_head_is_read_as_it_was_written_and_says_who_may_read() {
        let mut headers = HeaderMap::new();
        let nobody = Owner::of(&Who::Anyone, &headers);
        headers.insert("authorization", "Bearer a".parse().unwrap());
        let alice = Owner::of(&Who::Anyone, &headers);
        let mut head = Head::new(alice.clone(), Api::Chat, Duration::from_secs(30));
        assert_eq!(head.kept(), Duration::from_secs(45));
        head.last = Some(7);
        assert_eq!(head.kept(), Duration::from_secs(30));
        let (number, piece) = head.piece();
        let read = Head::read(&piece).unwrap();
        assert_eq!((number, &read), (HEAD, &head));
        assert!(read.is_for(&alice, Api::Chat));
        assert!(
            !read.is_for(&alice, Api::Messages),
            "events of another form"
        );
        assert!(!read.is_for(&nobody, Api::Chat));
    }
}
