//! (IO) The end of a drain: what its limit finds still open is told so. A stream ends in an error event then, and does
//! not just break off.

use std::pin::Pin;
use std::task::{Context, Poll};

use tokio_util::sync::WaitForCancellationFutureOwned;

use crate::process::Worker;

/// Waits for the limit of a drain, within the task of one stream.
#[derive(Default)]
pub(crate) struct Stopping(Option<Pin<Box<WaitForCancellationFutureOwned>>>);

impl Stopping {
    /// Ready once the limit is reached.
    pub(crate) fn poll(&mut self, worker: &Worker, cx: &mut Context<'_>) -> Poll<()> {
        let wait = || Box::pin(worker.stopping.clone().cancelled_owned());
        self.0.get_or_insert_with(wait).as_mut().poll(cx)
    }
}
