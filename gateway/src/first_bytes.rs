//! (IO) What a caller in the clear speaks, by the first bytes of its connection, which stay there to be read. Told
//! before, hyper reads whole heads at once; told by reading, it reads the first bytes alone and makes room twice.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::ReadBuf;
use tokio::net::TcpStream;

/// How HTTP/2 begins (RFC 9113, 3.4). No method of HTTP/1.1 does: `PRI` is kept free for that.
const HTTP_2: &[u8] = b"PRI";

/// What a connection speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Speaks {
    Http1,
    Http2,
    /// Too few bytes came together.
    Unclear,
}

/// Waits for the first bytes; `None` when told to end.
pub(crate) struct FirstBytes<'a> {
    stream: &'a TcpStream,
    is_ended: bool,
}

impl<'a> FirstBytes<'a> {
    pub(crate) fn of(stream: &'a TcpStream) -> Self {
        Self {
            stream,
            is_ended: false,
        }
    }

    /// Nobody is to be waited for.
    pub(crate) fn end(mut self: Pin<&mut Self>) {
        self.is_ended = true;
    }
}

impl Future for FirstBytes<'_> {
    type Output = io::Result<Option<Speaks>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if self.is_ended {
            return Poll::Ready(Ok(None));
        }
        let mut room = [0; HTTP_2.len()];
        let mut bytes = ReadBuf::new(&mut room);
        ready!(self.stream.poll_peek(cx, &mut bytes))?;
        Poll::Ready(Ok(Some(speaks(bytes.filled()))))
    }
}

fn speaks(first: &[u8]) -> Speaks {
    match first {
        HTTP_2 => Speaks::Http2,
        b"P" | b"PR" => Speaks::Unclear,
        _ => Speaks::Http1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_bytes_tell() {
        for (first, expected) in [
            (&b"PRI"[..], Speaks::Http2),
            (b"P", Speaks::Unclear),
            (b"PR", Speaks::Unclear),
            (b"PRO", Speaks::Http1),
            (b"POS", Speaks::Http1),
            (b"G", Speaks::Http1),
            (b"", Speaks::Http1),
        ] {
            assert_eq!(speaks(first), expected, "{first:?}");
        }
    }
}
