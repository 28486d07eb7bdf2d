//! (IO) Following what others write to the store: what is there, then what comes, until an end. Who follows says by
//! [`Follow`] where to look and what it finds.

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};

use crate::store::Error;
use crate::stream::BrokenOff;

/// Time between two looks for more.
pub(crate) const EVERY: Duration = Duration::from_millis(100);
/// Looks without an event after which a comment keeps the connection open: 15 s.
const QUIET_LOOKS: u32 = 150;
/// Looks at a store that fails one after another, before the stream breaks off.
const MAX_FAILURES: u32 = 50;
/// Events that are read at a time.
pub(crate) const PIECES: u64 = 64;
/// Without an empty line: behind an id, the official Python SDKs read one as an event without data and break at it.
pub(crate) const WAITING: &[u8] = b": waiting\n";

/// What a look found.
pub(crate) enum Found {
    /// These events; there may be more.
    More(Bytes),
    /// These events, and nothing follows.
    Last(Bytes),
    Nothing,
    /// Nothing, and nothing follows.
    End,
}

/// Somebody who follows.
pub(crate) trait Follow: Send + 'static {
    /// What there is now, after `quiet` looks that found nothing.
    fn look(&mut self, quiet: u32) -> impl Future<Output = Result<Found, Error>> + Send;
}

struct Following<F> {
    follow: F,
    quiet: u32,
    failures: u32,
    is_over: bool,
}

/// Everything that `follow` finds, on to the end.
pub(crate) fn follow<F: Follow>(follow: F) -> BoxStream<'static, Result<Bytes, BrokenOff>> {
    let start = Following {
        follow,
        quiet: 0,
        failures: 0,
        is_over: false,
    };
    stream::try_unfold(start, async |mut following| {
        let next = following.next().await?;
        Ok(next.map(|bytes| (bytes, following)))
    })
    .boxed()
}

impl<F: Follow> Following<F> {
    async fn next(&mut self) -> Result<Option<Bytes>, BrokenOff> {
        while !self.is_over {
            match self.follow.look(self.quiet).await {
                Ok(found) => {
                    self.failures = 0;
                    if let Some(bytes) = self.take(found) {
                        return Ok(Some(bytes));
                    }
                }
                Err(_) if self.failures < MAX_FAILURES => self.failures += 1,
                Err(_) => return Err(BrokenOff),
            }
            if !self.is_over {
                tokio::time::sleep(EVERY).await;
            }
        }
        Ok(None)
    }

    /// What goes out for it.
    fn take(&mut self, found: Found) -> Option<Bytes> {
        match found {
            Found::More(bytes) => {
                self.quiet = 0;
                Some(bytes)
            }
            Found::Last(bytes) => {
                self.is_over = true;
                Some(bytes)
            }
            Found::End => {
                self.is_over = true;
                None
            }
            Found::Nothing => {
                self.quiet += 1;
                let is_due = self.quiet.is_multiple_of(QUIET_LOOKS);
                is_due.then(|| Bytes::from_static(WAITING))
            }
        }
    }
}
