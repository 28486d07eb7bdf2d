//! (IO) Streams over HTTP/2 that their callers do not read. Such a stream waits for room in its window, and nobody asks
//! its body for more meanwhile, so that no limit of the body's own is looked at. Here the task of each stream has a
//! timer of its own: when it is over, the stream is reset and its body dropped, and with it the call to the backend.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::pin;
use std::task::{Poll, ready};
use std::time::{Duration, Instant};

use hyper::rt::Executor;
use hyper_util::rt::TokioExecutor;

/// How far an answer is.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// There is none yet. What is read until then are answers to the gateway itself.
    Awaited,
    /// Its caller waits for more.
    Asked,
    /// Since then its caller has what there is to be read.
    Given(Instant),
}

tokio::task_local! {
    static PLACE: Cell<Place>;
}

fn go_to(place: impl FnOnce() -> Place) {
    // Over HTTP/1.1 there is none: its connection's writes are watched (see `guard`).
    let _ = PLACE.try_with(|own| {
        if !matches!(own.get(), Place::Awaited) {
            own.set(place());
        }
    });
}

/// The head of the answer is there.
pub(crate) fn begun() {
    let _ = PLACE.try_with(|own| own.set(given_now()));
}

/// The body is asked for more.
pub(crate) fn asked() {
    go_to(|| Place::Asked);
}

/// The body gave something.
pub(crate) fn given() {
    go_to(given_now);
}

fn given_now() -> Place {
    Place::Given(penstock_shell::clock::now())
}

/// Runs the tasks of HTTP/2 streams, each until its caller has read nothing for this long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Streams {
    pub(crate) write_timeout: Duration,
}

impl<F> Executor<F> for Streams
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        TokioExecutor::new().execute(while_read(stream, self.write_timeout));
    }
}

async fn while_read(stream: impl Future<Output = ()>, write_timeout: Duration) {
    let task = async {
        let mut stream = pin!(stream);
        let mut timer = pin!(tokio::time::sleep(write_timeout));
        poll_fn(|cx| {
            if stream.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
            let Place::Given(since) = PLACE.with(Cell::get) else {
                return Poll::Pending;
            };
            let until = (since + write_timeout).into();
            if timer.deadline() != until {
                timer.as_mut().reset(until);
            }
            ready!(timer.as_mut().poll(cx));
            tracing::debug!("a stream that its caller does not read is reset");
            Poll::Ready(())
        })
        .await;
    };
    PLACE.scope(Cell::new(Place::Awaited), task).await;
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    const LIMIT: Duration = Duration::from_millis(20);

    /// Whether a stream that gets there goes on much longer than the limit.
    async fn goes_on(steps: impl FnOnce() + Send) -> bool {
        let stream = async {
            steps();
            pending::<()>().await;
        };
        let end = while_read(stream, LIMIT);
        tokio::time::timeout(LIMIT * 5, end).await.is_err()
    }

    #[tokio::test]
    async fn only_a_stream_whose_caller_has_something_to_read_ends() {
        assert!(goes_on(|| {}).await, "no answer yet");
        assert!(
            goes_on(|| {
                asked();
                given();
            })
            .await,
            "not its own"
        );
        assert!(!goes_on(begun).await, "a head, and no room for a body");
        let waits = || {
            begun();
            asked();
        };
        assert!(goes_on(waits).await, "the backend is slow");
        let unread = || {
            waits();
            given();
        };
        assert!(!goes_on(unread).await);
        let read = || {
            unread();
            asked();
        };
        assert!(goes_on(read).await);
    }
}
