//! (IO) A client connection under watch: slow heads, idle connections, callers that do not read, drain.
//!
//! A worker looks over its connections a few times a second at most. Each keeps when it last changed phase, so a
//! request needs no timer of its own. What is cut here is cut without an answer: there is nobody to read it.

use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use futures::task::AtomicWaker;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::framing::{Found, Framing};
use crate::settings::Limits;
use crate::socket::Socket;

/// Waiting for the first byte of a request.
const IDLE: u8 = 0;
/// Part of a request head has come.
const HEAD: u8 = 1;
/// A request is being answered.
const BUSY: u8 = 2;
/// The request's body is still coming.
const BODY: u8 = 3;

const NOTHING: u8 = 0;
const DRAIN: u8 = 1;
const CUT: u8 = 2;

/// Says that writes do not wait.
const FLOWING: u64 = u64::MAX;
/// Says that every head so far gives one length of its body.
const CLEAR: u64 = u64::MAX;

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caller {
    pub(crate) address: IpAddr,
    pub(crate) is_tls: bool,
}

/// What is known of one client connection.
#[derive(Debug)]
pub(crate) struct Watch {
    pub(crate) caller: Caller,
    /// In the certificate that its caller showed.
    names: OnceLock<Vec<String>>,
    phase: AtomicU8,
    /// Requests in progress; more than one where the caller speaks HTTP/2.
    requests: AtomicU32,
    is_http2: AtomicBool,
    /// Worker time of the last change of phase.
    since_ms: AtomicU64,
    /// Worker time since when a write waits, or [`FLOWING`].
    blocked_ms: AtomicU64,
    order: AtomicU8,
    /// Heads that were handled.
    heads: AtomicU64,
    /// Number of the first head that gives two lengths of its body, or [`CLEAR`].
    doubtful: AtomicU64,
    waker: AtomicWaker,
    clock: Arc<AtomicU64>,
}

impl Watch {
    /// A new connection. `clock` is the worker's time in ms, advanced by its ticks.
    pub(crate) fn new(clock: &Arc<AtomicU64>, caller: Caller) -> Self {
        Self {
            caller,
            names: OnceLock::new(),
            // Whoever connects is expected to speak: an open connection without a byte counts as a slow head.
            phase: AtomicU8::new(HEAD),
            requests: AtomicU32::new(0),
            is_http2: AtomicBool::new(false),
            since_ms: AtomicU64::new(clock.load(Ordering::Relaxed)),
            blocked_ms: AtomicU64::new(FLOWING),
            order: AtomicU8::new(NOTHING),
            heads: AtomicU64::new(0),
            doubtful: AtomicU64::new(CLEAR),
            waker: AtomicWaker::new(),
            clock: Arc::clone(clock),
        }
    }

    /// The caller showed a certificate with these names, which was verified.
    pub(crate) fn shows(&self, names: Vec<String>) {
        if !names.is_empty() {
            // A handshake happens once.
            let _set = self.names.set(names);
        }
    }

    /// What the caller's certificate is for; nothing without one.
    pub(crate) fn names(&self) -> &[String] {
        self.names.get().map_or(&[], Vec::as_slice)
    }

    fn enter(&self, phase: u8) {
        self.since_ms
            .store(self.clock.load(Ordering::Relaxed), Ordering::Relaxed);
        self.phase.store(phase, Ordering::Relaxed);
    }

    /// Counts a head that is handled. Whether where its body ends is in doubt.
    pub(crate) fn is_next_doubtful(&self) -> bool {
        let head = self.heads.fetch_add(1, Ordering::Relaxed);
        head >= self.doubtful.load(Ordering::Relaxed)
    }

    /// The caller speaks HTTP/2, whose frames come at any time: only requests are signs of life.
    pub(crate) fn speaks_http2(&self) {
        if !self.is_http2.swap(true, Ordering::Relaxed) {
            self.enter(IDLE);
        }
    }

    /// A request head is complete.
    pub(crate) fn busy(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.enter(BUSY);
    }

    /// The handler waits for the rest of a body.
    pub(crate) fn reads_body(&self) {
        self.enter(BODY);
    }

    /// The handler has the body.
    pub(crate) fn has_body(&self) {
        self.enter(BUSY);
    }

    /// The answer is on its way, or its caller has gone.
    pub(crate) fn idle(&self) {
        if self.requests.fetch_sub(1, Ordering::Relaxed) <= 1 {
            self.enter(IDLE);
        }
    }

    /// Ends the connection after the request in progress.
    pub(crate) fn drain(&self) {
        self.order.fetch_max(DRAIN, Ordering::AcqRel);
        self.waker.wake();
    }

    /// Cuts the connection if it has been in one phase for too long at `now_ms`. One that idles and speaks HTTP/2 is
    /// asked to end first, so that no request is lost that is on its way.
    pub(crate) fn check(&self, now_ms: u64, limits: &Limits) {
        let over = |since_ms: u64, limit: std::time::Duration| {
            u128::from(now_ms.saturating_sub(since_ms)) >= limit.as_millis()
        };
        let since_ms = self.since_ms.load(Ordering::Relaxed);
        let is_http2 = self.is_http2.load(Ordering::Relaxed);
        let was_asked = self.order.load(Ordering::Relaxed) != NOTHING;
        let too_long = match self.phase.load(Ordering::Relaxed) {
            IDLE if is_http2 && was_asked => over(since_ms, limits.header_timeout),
            IDLE if is_http2 && over(since_ms, limits.idle_timeout) => {
                self.enter(IDLE);
                self.drain();
                false
            }
            IDLE => over(since_ms, limits.idle_timeout),
            HEAD => over(since_ms, limits.header_timeout),
            _ => false,
        };
        let blocked_ms = self.blocked_ms.load(Ordering::Relaxed);
        if too_long || (blocked_ms != FLOWING && over(blocked_ms, limits.write_timeout)) {
            self.order.store(CUT, Ordering::Release);
            self.waker.wake();
        }
    }
}

/// The socket, telling its [`Watch`] what happens.
pub(crate) struct WatchedIo {
    io: Socket,
    watch: Arc<Watch>,
    framing: Framing,
}

impl WatchedIo {
    /// Watches `io`.
    pub(crate) fn new(io: Socket, watch: Arc<Watch>) -> Self {
        Self {
            io,
            watch,
            framing: Framing::new(),
        }
    }

    /// Whether more must come before a request is whole.
    pub(crate) fn is_inside(&self) -> bool {
        self.framing.is_inside()
    }

    fn wrote<T>(&self, result: Poll<T>) -> Poll<T> {
        let blocked_ms = self.watch.blocked_ms.load(Ordering::Relaxed);
        if result.is_pending() {
            if blocked_ms == FLOWING {
                self.watch
                    .blocked_ms
                    .store(self.watch.clock.load(Ordering::Relaxed), Ordering::Relaxed);
            }
        } else if blocked_ms != FLOWING {
            self.watch.blocked_ms.store(FLOWING, Ordering::Relaxed);
        }
        result
    }
}

impl AsyncRead for WatchedIo {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let result = Pin::new(&mut this.io).poll_read(cx, buf);
        match this.watch.phase.load(Ordering::Relaxed) {
            IDLE if result.is_ready() && !this.watch.is_http2.load(Ordering::Relaxed) => {
                this.watch.enter(HEAD);
            }
            // hyper asks for a body once before the handler knows that there is one, and then waits.
            HEAD | BODY if result.is_pending() && this.framing.is_inside() => {
                // A caller with Nagle's algorithm on keeps the body back until the head is acknowledged, which Linux
                // may delay by 40 ms. Not being able to is no reason to stop.
                let _ = SockRef::from(this.io.tcp()).set_tcp_quickack(true);
            }
            _ => {}
        }
        match this.framing.feed(&buf.filled()[before..]) {
            Some(Found::Doubtful(head)) => this.watch.doubtful.store(head, Ordering::Relaxed),
            Some(Found::Http2) => this.watch.speaks_http2(),
            None => {}
        }
        result
    }
}

impl AsyncWrite for WatchedIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.io).poll_write(cx, buf);
        self.wrote(result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Over TLS it is here that writing waits.
        let result = Pin::new(&mut self.io).poll_flush(cx);
        self.wrote(result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.wrote(result)
    }
}

/// Runs a connection until it ends, or until its [`Watch`] cuts it: `None`. `drain` is called once when it shall end
/// soon.
pub(crate) async fn run<C: Future>(
    mut connection: Pin<&mut C>,
    watch: &Watch,
    mut drain: impl FnMut(Pin<&mut C>),
) -> Option<C::Output> {
    run_by(
        &mut connection,
        watch,
        |c, cx| c.as_mut().poll(cx),
        |c| drain(c.as_mut()),
    )
    .await
}

/// The same of what is polled by `poll`.
pub(crate) async fn run_by<C, T>(
    connection: &mut C,
    watch: &Watch,
    mut poll: impl FnMut(&mut C, &mut Context<'_>) -> Poll<T>,
    mut drain: impl FnMut(&mut C),
) -> Option<T> {
    let mut draining = false;
    std::future::poll_fn(|cx| {
        watch.waker.register(cx.waker());
        match watch.order.load(Ordering::Acquire) {
            CUT => return Poll::Ready(None),
            DRAIN if !draining => {
                draining = true;
                drain(connection);
            }
            _ => {}
        }
        poll(connection, cx).map(Some)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch_at(clock: &Arc<AtomicU64>) -> Watch {
        let caller = Caller {
            address: IpAddr::from([127, 0, 0, 1]),
            is_tls: false,
        };
        Watch::new(clock, caller)
    }

    fn is_cut(watch: &Watch, now_ms: u64) -> bool {
        watch.check(now_ms, &Limits::default());
        watch.order.load(Ordering::Relaxed) == CUT
    }

    #[test]
    fn each_phase_has_its_limit() {
        let clock = Arc::new(AtomicU64::new(0));
        assert!(!is_cut(&watch_at(&clock), 9_999));
        assert!(
            is_cut(&watch_at(&clock), 10_000),
            "a head that does not come"
        );
        let watch = watch_at(&clock);
        watch.busy();
        assert!(!is_cut(&watch, 10_000_000), "a long answer is no fault");
        clock.store(10_000_000, Ordering::Relaxed);
        watch.idle();
        assert!(!is_cut(&watch, 10_119_999));
        assert!(is_cut(&watch, 10_120_000), "a connection that idles");
    }

    #[test]
    fn a_write_that_waits_too_long_is_cut_and_one_that_flows_again_is_not() {
        let clock = Arc::new(AtomicU64::new(5));
        let watch = watch_at(&clock);
        watch.busy();
        watch.blocked_ms.store(5, Ordering::Relaxed);
        assert!(!is_cut(&watch, 60_004));
        watch.blocked_ms.store(FLOWING, Ordering::Relaxed);
        assert!(!is_cut(&watch, 70_000));
        watch.blocked_ms.store(5, Ordering::Relaxed);
        assert!(is_cut(&watch, 60_005));
    }
}
