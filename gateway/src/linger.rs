//! (IO) The end of an HTTP/1.1 connection whose caller is still sending: a request that was refused before all of it
//! had come. Closing at once would answer what is under way with a reset, and many clients would report that in place
//! of the refusal (RFC 9112, 9.6).

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::guard::WatchedIo;

/// How long what comes is thrown away. nginx waits as long for the next piece (`lingering_timeout`).
const LIMIT: Duration = Duration::from_secs(5);
const READ_BYTES: usize = 16 << 10;

/// Closes a connection: this side at once, and all of it when the other side has no more to send, or when that takes
/// too long.
pub(crate) async fn close(mut io: WatchedIo) {
    let close = async {
        io.shutdown().await?;
        if !io.is_inside() {
            return Ok(());
        }
        let mut room = vec![0; READ_BYTES];
        while io.read(&mut room).await? > 0 {}
        Ok::<_, std::io::Error>(())
    };
    // However it ends, it is over.
    let _ended = tokio::time::timeout(LIMIT, close).await;
}
