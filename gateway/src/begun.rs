//! An answer that has begun: what was read of it, and how its rest is read.

use bytes::Bytes;

use crate::events::{Events, Passed};
use crate::json_end::JsonEnd;
use crate::provider::Translator;
use crate::rescue::Rescue;
use crate::upstream::Exchange;

/// An answer that has begun: `first` was read already.
pub(crate) struct Begun {
    pub(crate) exchange: Exchange,
    /// `None` for a body that is no event stream.
    pub(crate) events: Option<Events>,
    /// Set for JSON that ends with its connection.
    pub(crate) json: Option<Box<JsonEnd>>,
    /// `None` where the backend speaks the caller's protocol.
    pub(crate) translator: Option<Translator>,
    pub(crate) first: Passed,
    /// Where its rule wants one.
    pub(crate) rescue: Option<Box<Rescue>>,
}

impl Begun {
    /// A body that is no event stream; `first` is its beginning.
    pub(crate) fn untouched(exchange: Exchange, first: Bytes) -> Self {
        Self {
            exchange,
            events: None,
            json: None,
            translator: None,
            first: Passed {
                bytes: first,
                ..Passed::default()
            },
            rescue: None,
        }
    }

    /// A JSON body; `first` is its beginning.
    pub(crate) fn of_json(exchange: Exchange, first: Bytes) -> Self {
        let may_be_cut = exchange.ends_with_connection();
        let mut begun = Self::untouched(exchange, first);
        if may_be_cut {
            let mut json = Box::<JsonEnd>::default();
            json.feed(&begun.first.bytes);
            begun.json = Some(json);
        }
        begun
    }
}
